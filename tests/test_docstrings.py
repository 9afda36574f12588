"""Docstrings of names that other rooms use: `Args` is the signature, `Returns` and `Raises` are there where needed.

The rule, for every public function, class and public method of a class that another room imports or that a room's
`__init__` lists in `__all__`:

- a function or method with two parameters or more (`self` and `cls` apart) has `Args:`, unless it is a click command,
  or a method that only fulfils a protocol and has no docstring of its own;
- `Args:`, where it is present, names exactly the parameters of the signature, in their order;
- `Returns:` or `Yields:` stands where `Args:` is required and something other than None is returned;
- `Raises:` names each subclass of CrdiffError that the body itself raises.

A room that does not pass yet stands in TO_DOCUMENT; take it out as soon as it does. What is missing there is listed by
`python -m pytest tests/test_docstrings.py --runxfail -k ROOM`.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from crdiff_export import errors
from tests.support.source_code import FILES, PACKAGE, parsed, relative, room

# Rooms whose docstrings do not pass yet; each entry goes when its room passes.
TO_DOCUMENT: set[str] = set()
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Shape|Example|Examples|Note|Source|Attributes):", re.MULTILINE)
ENTRY = re.compile(r"^    \*{0,2}(\w+)(?: \([^)]*\))?:", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def shared_names() -> frozenset[str]:
    """Full names of everything that a room lists in `__all__`, or that a module of another room imports or uses."""
    names: set[str] = set()
    for path in FILES:
        uses = {
            node: node.value.id
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        for name, full in imported(path):
            if full.split(".")[0] == PACKAGE.name and full.split(".")[1:2] != [room(path)]:
                names |= {full, *(f"{full}.{node.attr}" for node, used in uses.items() if used == name)}
        if path.name == "__init__.py":
            names |= {full for name, full in imported(path) if name in exported(path)}
    return frozenset(names)


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """What a module imports from others: the name that it has there, and the full name."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def exported(path: Path) -> list[str]:
    """The names in `__all__`."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def shared_functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Functions of a module, and public methods of its classes, that other rooms use."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for node in parsed(path).body:
        if not isinstance(node, Function | ast.ClassDef) or f"{module}.{node.name}" not in shared_names():
            continue
        if isinstance(node, Function):
            yield node.name, node
            continue
        for method in node.body:
            if isinstance(method, Function) and not method.name.startswith("_"):
                yield f"{node.name}.{method.name}", method


def parameters(function: Function) -> list[str]:
    args = function.args
    every = [*args.posonlyargs, *args.args, *([args.vararg] if args.vararg else []), *args.kwonlyargs]
    names = [arg.arg for arg in (*every, *([args.kwarg] if args.kwarg else []))]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def sections(docstring: str) -> dict[str, str]:
    """The text of each Google section, by its name."""
    pieces = SECTION.split(docstring)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def problems(name: str, function: Function) -> Iterator[str]:
    """What the docstring of a function lacks, in words."""
    docstring = ast.get_docstring(function)
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if docstring is None or any("command" in text or "group" in text or text == "overload" for text in decorators):
        return
    found, expected = sections(docstring), parameters(function)
    if "Args" in found:
        listed = ENTRY.findall(found["Args"])
        if listed != expected:
            yield f"{name}: Args lists {', '.join(listed)}; the parameters are {', '.join(expected)}"
    elif len(expected) >= 2:
        yield f"{name}: has no Args"
    returned = ast.unparse(function.returns) if function.returns else "None"
    if len(expected) >= 2 and returned not in ("None", "Never", "NoReturn") and not {"Returns", "Yields"} & set(found):
        yield f"{name}: has no Returns or Yields"
    if missing := raised(function) - set(ENTRY.findall(found.get("Raises", ""))):
        yield f"{name}: Raises does not name {', '.join(sorted(missing))}"


def raised(function: Function) -> set[str]:
    """Classes of errors that the body raises itself, nested functions apart."""
    names = set()
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            names.add(ast.unparse(node.exc.func).rpartition(".")[2])
        pending += ast.iter_child_nodes(node)
    return names & ERRORS


def report(name: str) -> list[str]:
    """All problems of a room."""
    return [
        f"{relative(path)}: {text}"
        for path in FILES
        if room(path) == name
        for shown, function in shared_functions(path)
        for text in problems(shown, function)
    ]


@pytest.mark.parametrize("name", sorted({room(path) for path in FILES if path != PACKAGE / "__init__.py"}))
def test_docstrings_agree_with_signatures(name: str, request: pytest.FixtureRequest) -> None:
    if name in TO_DOCUMENT:
        request.applymarker(pytest.mark.xfail(reason="to be documented", strict=False))
    missing = report(name)
    assert not missing, "\n" + "\n".join(missing)


ARGS, RETURNS, RAISES = "Args:\n    a: One.\n    b: Two.\n", "Returns:\n    Sum.\n", "Raises:\n    PlanError: No.\n"


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        (RETURNS + RAISES, "has no Args"),
        (ARGS.replace("b:", "c:") + RETURNS + RAISES, "Args lists a, c; the parameters are a, b"),
        (ARGS + RAISES, "has no Returns or Yields"),
        (ARGS + RETURNS, "Raises does not name PlanError"),
        (ARGS + RETURNS + RAISES, None),
    ],
    ids=["no Args", "another parameter", "no Returns", "no Raises", "complete"],
)
def test_the_rule_notices(docstring: str, missing: str | None) -> None:
    code = f'def f(a: int, b: int) -> int:\n    """Add.\n\n{docstring}"""\n    raise PlanError("message", "hint")\n'
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    assert list(problems("f", function)) == ([f"f: {missing}"] if missing else [])
