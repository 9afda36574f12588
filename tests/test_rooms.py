"""Rules that hold for the whole package: which room may import which, what loads late, and what is never done."""

import ast
import inspect
import re
import socket
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from crdiff_export import errors
from crdiff_export.models.families import all_families
from tests.support.isolation import NetworkUsed
from tests.support.source_code import FILES, PACKAGE, imports, parsed, relative, room

# A room may import itself and the rooms in lower rows; `publish` stands beside the rooms that run models.
ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("search",),
    ("evaluate",),
    ("calibrate",),
    ("sampling", "publish"),
    ("export", "convert"),
    ("packs",),
    ("verify",),
    ("bake",),
    ("prune", "hub"),
    ("models",),
    ("formats",),
    ("sizes", "progress"),
    ("errors",),
)
# Rooms that run models; publishing must work where none of their libraries is installed.
RUN_MODELS = ("search", "evaluate", "calibrate", "sampling")
HEAVY = {
    *("numpy", "numba", "torch", "safetensors", "huggingface_hub", "diffusers", "transformers", "matplotlib", "jinja2"),
    *("optuna", "scipy", "cmaes", "sqlalchemy", "psycopg", "torch_fidelity", "comfy", "folder_paths"),
}
# Modules that are themselves imported inside functions, and so may import heavy libraries at their top.
LOADED_LATE = (
    *("prune/kernels/cast", "prune/kernels/cpu", "prune/kernels/device", "prune/kernels/pick"),
    *(f"prune/criteria/{name}" for name in ("random", "wanda", "taylor", "obs", "adverse", "scored")),
    *("prune/criteria/reading", "prune/criteria/selection"),
    *("models/demo/drawing",),
    *(f"sampling/poa/{name}" for name in (("handle", "hooks", "layers", "batch", "follow", "in_place", "packed"))),
    *("sampling/session", "sampling/webui/sdnext"),
    *(f"calibrate/{name}" for name in ("collect", "denoise", "gradients", "runner")),
    *("evaluate/render", "evaluate/preview/render"),
    *(f"evaluate/scorers/{name}" for name in ("aesthetic", "blip", "clip", "demo_scorer", "image_reward", "weights")),
    *(f"search/{name}" for name in ("storage", "study", "worker")),
)
ONLY_IN = {
    "rich": {"cli"},
    "click": {"cli"},
    "huggingface_hub": {"hub", "publish"},
    "torch": {"formats", "prune", "sampling", "evaluate", "calibrate"},
    "numba": {"prune"},
    "diffusers": {"sampling"},
    "comfy": {"sampling"},
    "folder_paths": {"sampling"},
    "PIL": {"evaluate", "calibrate"},
    "jinja2": {"evaluate", "publish"},
    "matplotlib": {"evaluate", "search"},
    "optuna": {"search"},
    "scipy": {"search"},
    "torch_fidelity": {"evaluate"},
    "cmaes": {"search"},
    "sqlalchemy": {"search"},
    "psycopg": {"search"},
}
# The one program that is ever started is the one that a `command:` scorer names.
STARTS_PROGRAMS = PACKAGE / "evaluate" / "scorers" / "process.py"
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


def row(name: str) -> int:
    return next(number for number, names in enumerate(ROWS) if name in names)


def rooms(path: Path) -> set[str]:
    """The other rooms that a module imports from, types included."""
    names = (name.split(".") for name in imports(path, types=True))
    taken = {inside for package, *rest in names if package == PACKAGE.name for inside in rest[:1]}
    # `from crdiff_export import export` names the function of the public API, whose home is the room of that name.
    return {name if name != "poa" else "sampling" for name in taken} - {room(path)}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_every_room_has_one_row() -> None:
    named = [name for names in ROWS for name in names]
    assert sorted(named) == sorted({room(path) for path in FILES if path != PACKAGE / "__init__.py"})


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=relative)
def test_imports_go_down(path: Path) -> None:
    mine = room(path)
    for other in rooms(path):
        assert row(other) > row(mine), f"{mine} imports {other}"
        assert mine != "publish" or other not in RUN_MODELS


def test_modules_import_in_no_circle() -> None:
    names = {dotted(path): path for path in FILES}
    graph = {
        name: {target for full in imports(path, top=True) if (target := _module(full, names)) and target != name}
        for name, path in names.items()
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", sorted({room(path) for path in FILES}))
def test_modules_of_a_room_import_in_one_direction(name: str) -> None:
    """Imports in functions and for types count, too; those of a folder's `__init__` do not."""
    names = {dotted(path): path for path in FILES if room(path) == name and path.stem != "__init__"}
    graph = {
        module: {target for full in imports(path, types=True) if (target := _module(full, names)) and target != module}
        for module, path in names.items()
    }
    assert list(TopologicalSorter(graph).static_order()) or not names


def _module(full: str, names: dict[str, Path]) -> str | None:
    """The module of the package that an imported name is, or is in."""
    return next((name for name in (full, full.rpartition(".")[0]) if name in names and name != PACKAGE.name), None)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_private_modules_stay_in_their_folder(path: Path) -> None:
    for name in imports(path, types=True):
        *folders, _ = name.split(".")
        for depth, folder in enumerate(folders):
            if folder.startswith("_") and folder != "__future__":
                assert path.is_relative_to(PACKAGE.parent.joinpath(*folders[:depth])), name


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_library_is_imported_in_few_rooms(package: str) -> None:
    where = {room(path) for path in FILES for name in imports(path) if name.split(".")[0] == package}
    assert where == ONLY_IN[package]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_imports_wait(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(path, top=True)} & HEAVY
    assert not heavy or relative(path).removesuffix(".py") in LOADED_LATE


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_runs_a_file_or_opens_a_socket(path: Path) -> None:
    names = set(imports(path))
    allowed = {"subprocess"} if path == STARTS_PROGRAMS else set()
    assert not {name.split(".")[0] for name in names} & (NEVER - allowed)
    assert not {name for name in names if name.startswith("urllib.request")}
    calls = {ast.unparse(n.func) for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)}
    assert not calls & {"eval", "exec", "compile", "torch.load", "os.system", "__import__"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node in tree.body:
            assert ast.get_docstring(node), node.name


def hints() -> Iterator[tuple[str, str]]:
    """The end and the beginning of every hint that is written where it is raised."""
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            named = isinstance(node, ast.Call) and ast.unparse(node.func) in kinds and len(node.args) == 2
            if named and isinstance(node, ast.Call):
                hint = node.args[1]
                pieces = hint.values if isinstance(hint, ast.JoinedStr) else [hint]
                for end, piece in (("begins", pieces[0]), ("ends", pieces[-1])):
                    if isinstance(piece, ast.Constant):
                        yield end, str(piece.value)


def test_hints_are_sentences() -> None:
    texts = list(hints())
    assert len(texts) > 50
    for end, text in texts:
        right = text[0].isupper() or text[0] in "`0123456789" if end == "begins" else text[-1] in ".?"
        assert right, text


def test_errors_have_codes_of_their_own() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.CrdiffError)]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4}


# The fixture that keeps tests off the network does so.


def test_a_connection_is_blocked() -> None:
    with pytest.raises(NetworkUsed):
        socket.create_connection(("192.0.2.1", 80))  # RFC 5737: reserved for documentation
    with pytest.raises(NetworkUsed):
        socket.getaddrinfo("example.org", 80)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, pytest.raises(NetworkUsed):
        datagram.sendto(b"", ("192.0.2.1", 9))


def test_loopback_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1])).close()


# The scorer that comes with the built-in bases; a key of `crdiff inspect --json`, and of old headers.
NO_FAMILIES = {
    ("evaluate/scorers/spec.py", "demo"), ("evaluate/scorers/demo_scorer.py", "demo"),
    ("verify/inspect.py", "inpainting"), ("formats/crdiff_keys.py", "inpainting"),
}  # fmt: skip


def test_only_tables_know_families() -> None:
    """No code outside `models/` has the id of a family or of a special model; it asks the family's table."""
    families = all_families()
    names = {family.id for family in families} | {special.id for family in families for special in family.specials}
    named = {
        (relative(path), node.value)
        for path in FILES
        if room(path) != "models"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert named == NO_FAMILIES
    for path in PACKAGE.rglob("*.md"):
        assert not re.search(rf"[\"']({'|'.join(names)})[\"']", path.read_text("utf-8")), path
