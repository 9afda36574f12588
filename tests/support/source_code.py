"""The package's own source code, parsed: what each module imports, and which room it is in."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import crdiff_export

PACKAGE = Path(crdiff_export.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The file or folder at the top of the package that a module is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def typing_only(tree: ast.Module) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {inner for block in blocks for inner in ast.walk(block)}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, top: bool = False, types: bool = False) -> tuple[str, ...]:
    """Every name that a module imports; with `top` not those in functions, with `types` those for types alone, too."""
    return tuple(_imports(path, top=top, types=types))


def _imports(path: Path, *, top: bool, types: bool) -> Iterator[str]:
    tree = parsed(path)
    skipped = set() if types else typing_only(tree)
    for node in tree.body if top else ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()
