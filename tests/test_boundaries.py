"""What may import what, and other rules that hold for all of the package."""

import ast
import inspect
import socket
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import NetworkUsed

import crdiff_export
from crdiff_export import errors

PACKAGE = Path(crdiff_export.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top down. A module imports what is in its own layer or below.
LAYERS: tuple[set[str], ...] = (
    {"__main__", "commands", "ui"},
    {"summary", "publish", "survey", "push", "preview", "evaluation", "tuning", "calibration"},
    {"drawing"},
    {
        *("__init__", "export", "inspection", "verify", "against", "restore", "bases", "destination", "hub", "poa"),
        *("demo", "scorers", "search"),
    },
    {
        *("plan", "criteria", "architecture", "hashing", "weights", "writer", "metadata", "bake", "baked", "card"),
        *("residual", "keeping", "report", "twins", "ranking"),
    },
    {
        *("checkpoint", "source", "pickled", "unpickle", "magic", "header", "strict_json", "stamp"),
        *("families", "recipe", "recipe_files", "recipe_toml"),
        *("matrix", "matrix_keys", "toml_lines"),
        *("kernels", "floats", "threshold", "staging", "pipeline"),
    },
    {"errors", "progress", "amounts"},
)
HEAVY = {
    *("numpy", "numba", "torch", "safetensors", "huggingface_hub", "diffusers", "transformers", "matplotlib"),
    *("optuna", "scipy", "cmaes", "sqlalchemy", "psycopg", "torch_fidelity"),
}
# What a function imports when it is called, and so may import what is heavy at its top.
LOADED_LATE = {
    *(path for path in (PACKAGE / "kernels").glob("*.py") if path.name != "__init__.py"),
    *(PACKAGE / "poa" / f"{name}.py" for name in ("sampling", "hooks", "layers", "batch")),
    PACKAGE / "preview" / "camera.py",
    PACKAGE / "drawing" / "session.py",
    PACKAGE / "demo" / "drawing.py",
    PACKAGE / "scorers" / "demo.py",
    *(PACKAGE / "scorers" / f"{name}.py" for name in ("aesthetic", "blip", "clip", "image_reward", "weights")),
    *(PACKAGE / "search" / f"{name}.py" for name in ("journal", "ledger", "pruning", "study")),
    PACKAGE / "evaluation" / "measure.py",
    *(PACKAGE / "calibration" / f"{name}.py" for name in ("collect", "denoise", "gradients", "runner")),
    *(PACKAGE / "criteria" / f"{name}.py" for name in ("random", "wanda", "taylor", "obs", "adverse", "scored")),
    *(PACKAGE / "criteria" / f"{name}.py" for name in ("reading", "selection")),
}
ONLY_IN = {
    "rich": {"ui"},
    "click": {"commands"},
    "huggingface_hub": {"hub"},
    "torch": {"kernels", "poa", "drawing", "scorers", "criteria", "calibration"},
    "numba": {"kernels"},
    "diffusers": {"poa", "drawing"},
    "transformers": {"drawing", "scorers"},
    "PIL": {"report", "evaluation", "scorers", "tuning", "calibration"},
    "matplotlib": {"evaluation", "tuning"},
    "optuna": {"search"},
    "scipy": {"search"},
    "torch_fidelity": {"scorers"},
    "cmaes": {"search"},
    "sqlalchemy": {"search"},
    "psycopg": {"search"},
}
# The one program that is ever started is the one that a `command:` scorer names.
STARTS_PROGRAMS = PACKAGE / "scorers" / "process.py"
NEVER = {
    "pickle",
    "marshal",
    "shelve",
    "socket",
    "ssl",
    "http",
    "requests",
    "httpx",
    "aiohttp",
    "subprocess",
}


def part(path: Path) -> str:
    """The module's name below the package; a subpackage counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def typing_only(tree: ast.Module) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {inner for block in blocks for inner in ast.walk(block)}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, top: bool = False) -> tuple[str, ...]:
    """Every module that is imported for more than its types; with `top` not those in functions."""
    return tuple(_imports(path, top=top))


def _imports(path: Path, *, top: bool) -> Iterator[str]:
    tree = parsed(path)
    skipped = typing_only(tree)
    for node in tree.body if top else ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The part of the package that an imported name is in; None for other packages."""
    package, inside, *_ = (*name.split("."), "")
    if package != PACKAGE.name:
        return None
    return inside if inside and ((PACKAGE / inside).is_dir() or (PACKAGE / f"{inside}.py").exists()) else "__init__"


def layer(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_one_layer() -> None:
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted({part(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    for name in imports(path):
        if other := own(name):
            assert layer(other) >= layer(part(path)), f"{part(path)} imports {other}"


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        others = {other for name in imports(path) if (other := own(name))} - {part(path)}
        graph.setdefault(part(path), set()).update(others)
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_one_place(package: str) -> None:
    where = {part(path) for path in FILES for name in imports(path) if name.split(".")[0] == package}
    assert where == ONLY_IN[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_imports_wait(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(path, top=True)} & HEAVY
    assert not heavy or path in LOADED_LATE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_runs_a_file_or_opens_a_socket(path: Path) -> None:
    names = set(imports(path))
    allowed = {"subprocess"} if path == STARTS_PROGRAMS else set()
    assert not {name.split(".")[0] for name in names} & (NEVER - allowed)
    assert not {name for name in names if name.startswith("urllib.request")}
    calls = {ast.unparse(n.func) for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)}
    assert not calls & {"eval", "exec", "compile", "torch.load", "os.system", "__import__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_fits_a_readers_head(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_is_public_says_what_it_does(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node in tree.body:
            assert ast.get_docstring(node), node.name


def hints() -> Iterator[tuple[str, str]]:
    """The end and the beginning of every hint that is written where it is raised."""
    known = {name for name, found in vars(errors).items() if inspect.isclass(found)}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            named = isinstance(node, ast.Call) and ast.unparse(node.func) in known and len(node.args) == 2
            if named and isinstance(node, ast.Call):
                hint = node.args[1]
                pieces = hint.values if isinstance(hint, ast.JoinedStr) else [hint]
                for place, piece in (("begins", pieces[0]), ("ends", pieces[-1])):
                    if isinstance(piece, ast.Constant):
                        yield place, str(piece.value)


def test_hints_are_sentences() -> None:
    found = list(hints())
    assert len(found) > 50
    for place, text in found:
        right = text[0].isupper() or text[0] in "`0123456789" if place == "begins" else text[-1] in ".?"
        assert right, text


def test_errors_have_codes_of_their_own() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.CrdiffError)]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4}


# The fixture that keeps tests off the network does so.


def test_a_connection_is_blocked() -> None:
    with pytest.raises(NetworkUsed):
        socket.create_connection(("192.0.2.1", 80))  # RFC 5737: nobody's address
    with pytest.raises(NetworkUsed):
        socket.getaddrinfo("example.org", 80)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, pytest.raises(NetworkUsed):
        datagram.sendto(b"", ("192.0.2.1", 9))


def test_loopback_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1])).close()
