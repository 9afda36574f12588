"""Where an export goes, and whether it may and can go there; decided before anything is read or written."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.bake import residual
from crdiff_export.errors import CheckpointError, PlanError
from crdiff_export.formats.checkpoint import PICKLES, open_checkpoint
from crdiff_export.formats.crdiff_keys import is_baked
from crdiff_export.formats.text import amount
from crdiff_export.prune.plan import Plan

# Our own keys add a few KB to each header; a source without metadata gets all of them.
HEADER_GROWTH = 64 << 10


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes that an export needs at its destination and that are free there."""

    folder: Path
    needed: int
    free: int


def place(plan: Plan, output: Path | None, stem: str | None = None, keep: str = residual.NONE, *, force: bool) -> Path:
    """The path to write, `STEM-crdiff-WxH` if none is given; PlanError where it must not or cannot be.

    With `keep` a sidecar it has to have room beside it, too.
    """
    folder = plan.checkpoint.kind != "file"
    suffix = "" if folder else ".safetensors"
    target = output if output is not None else Path(f"{stem or plan.checkpoint.stem}-crdiff-{plan.size}{suffix}")
    check(plan, target, force=force)
    if keep == residual.SIDECAR and not folder:
        _check_sidecar(residual.sidecar(target), force=force)
    return target


def _check_sidecar(path: Path, *, force: bool) -> None:
    try:
        there = os.path.lexists(path) or bool(path.lstat())
    except FileNotFoundError:
        return
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}", "Give another place with -o.") from error
    if there and not path.is_file():
        raise PlanError(f"{path}: not a regular file", "Give another place with -o.")
    if there and not force:
        raise PlanError(f"{path}: already exists", "Give another -o, or --force to replace it.")


def check(plan: Plan, target: Path, *, force: bool, source: str = "base") -> None:
    """PlanError where a file or folder like the plan's checkpoint must not or cannot be written to `target`."""
    try:
        _check(plan, target, folder=plan.checkpoint.kind != "file", force=force, source=source)
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}", "Give another place with -o.") from error


def _check(plan: Plan, target: Path, *, folder: bool, force: bool, source: str) -> None:
    if target.name in ("", ".."):
        raise PlanError(f"{target}: not a name for the output", f"Give it one: -o {target / 'NAME'}.")
    if not target.parent.is_dir():
        raise PlanError(f"{target}: the folder {target.parent} does not exist", "Create it, or give another -o.")
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # a name that is too long, say
    _refuse_source(plan, target, source)
    if folder:
        _check_folder(plan, target, force=force)
    else:
        _check_file(target, force=force)
    if not os.access(target.parent, os.W_OK):
        raise PlanError(f"{target}: the folder {target.parent} cannot be written to", "Give another place with -o.")


def _refuse_source(plan: Plan, target: Path, source: str) -> None:
    """Refuse the source, its folder, and a folder around it that --force would replace with everything in it."""
    # Not Path.resolve, which raises RuntimeError for a link in a circle.
    root, there = (Path(os.path.realpath(path)) for path in (plan.checkpoint.path, target))
    # A sharded source is the folder of its index.
    home = root.parent if plan.checkpoint.kind == "shards" else root
    inside = plan.checkpoint.kind == "folder" and there.is_relative_to(home)
    hint = f"Give another place with -o; the {source} is never changed."
    if there in (root, home) or inside or (target.exists() and target.samefile(root)):
        raise PlanError(f"{target}: that is the {source} itself", hint)
    if root.is_relative_to(there):
        raise PlanError(f"{target}: the {source} lies in it", hint)


def _check_file(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise PlanError(
            f"{target}: a folder; the output is one file", f"Give a file name: -o {target / 'NAME.safetensors'}."
        )
    if target.suffix != ".safetensors":
        name = target.stem if target.suffix in PICKLES else target.name
        raise PlanError(f"{target}: the output is a safetensors file", f"Name it {name}.safetensors.")
    if target.exists() and not target.is_file():
        raise PlanError(f"{target}: not a regular file", "Give another place with -o.")
    if os.path.lexists(target) and not force:
        raise PlanError(f"{target}: already exists", "Give another -o, or --force to replace it.")


def _check_folder(plan: Plan, target: Path, *, force: bool) -> None:
    if target.suffix == ".safetensors":
        raise PlanError(
            f"{target}: the base is a folder, and so is the output", f"Name it {target.with_suffix('').name}."
        )
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise PlanError(f"{target}: not a folder, which the output is", "Give another place with -o.")
    if target.is_symlink():
        raise PlanError(f"{target}: a link to a folder", f"Give the folder itself: -o {target.resolve()}.")
    if not any(target.iterdir()):
        return
    if not force:
        raise PlanError(f"{target}: already exists", "Give another -o, or --force to replace it.")
    mine = "Remove it yourself, or give another -o."
    if not _is_ours(target):
        raise PlanError(f"{target}: not a folder that crdiff made; --force does not replace it", mine)
    if stranger := _stranger(plan, target):
        raise PlanError(f"{target}: holds {stranger}, which is no part of the output; --force would delete it", mine)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds an export; --force must not delete somebody's home."""
    candidates = (folder, *sorted(folder.glob("*.index.json")))
    for path in candidates:
        try:
            return all(is_baked(file.metadata) for file in open_checkpoint(path).files)
        except CheckpointError:
            continue
    return False


def _stranger(plan: Plan, folder: Path) -> str | None:
    """A file in an earlier output that the new one would not have: somebody put it there. Weights may be split anew."""
    new = {output.source.name for output in plan.outputs} | {str(name) for name in plan.checkpoint.companions}
    there = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    ours = ("diffusion_pytorch_model*", f"*{residual.SUFFIX}")
    names = (path.relative_to(folder).as_posix() for path in there if not any(map(path.match, ours)))
    return next((name for name in names if name not in new), None)


def space(plan: Plan, target: Path, keep: str = residual.NONE, counts: Sequence[int] | None = None) -> Space:
    """What the output needs beside what is there; a replaced one stays until the new one is complete.

    `counts` are the weights that each scope loses, where that is known: with ties, more than was asked for.
    """
    headers = sum(output.source.data_start + HEADER_GROWTH for output in plan.outputs)
    needed = plan.data_size + headers + companions_size(plan)
    if keep != residual.NONE:
        needed += residual.expected(plan, counts or [scope.rank for scope in plan.scopes])
    return Space(target.parent, needed, shutil.disk_usage(target.parent).free)


def companions_size(plan: Plan) -> int:
    """Bytes of the files that are copied as they are."""
    root = plan.checkpoint.home
    return sum((root / name).stat().st_size for name in plan.checkpoint.companions)


def check_space(*spaces: Space) -> None:
    """PlanError where a disk is too full for all outputs that go there."""
    for folder in dict.fromkeys(space.folder.resolve() for space in spaces):
        here = [space for space in spaces if space.folder.resolve() == folder]
        needed, free = sum(space.needed for space in here), here[0].free
        if needed > free:
            raise PlanError(
                f"{folder}: {amount(needed)} needed, {amount(free)} free",
                "Free some space, or give another place with -o.",
            )
