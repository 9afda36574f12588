"""Where an export goes, and whether it may and can go there; decided before anything is read or written."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.checkpoint import open_checkpoint
from crdiff_export.errors import CheckpointError, PlanError
from crdiff_export.metadata import is_baked
from crdiff_export.plan import Plan

# Our own keys add a few KB to each header; a source without metadata gets all of them.
HEADER_GROWTH = 64 << 10


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes that an export needs at its destination and that are free there."""

    folder: Path
    needed: int
    free: int


def place(plan: Plan, output: Path | None, *, force: bool) -> Path:
    """The path to write, `STEM-crdiff-WxH` if none is given; PlanError where it must not be."""
    folder = plan.checkpoint.kind != "file"
    suffix = "" if folder else ".safetensors"
    target = output if output is not None else Path(f"{plan.checkpoint.stem}-crdiff-{plan.size}{suffix}")
    if not target.parent.is_dir():
        raise PlanError(f"{target}: the folder {target.parent} does not exist", "Create it, or give another -o.")
    _refuse_source(plan, target)
    if folder:
        _check_folder(target, force=force)
    else:
        _check_file(target, force=force)
    if not os.access(target.parent, os.W_OK):
        raise PlanError(f"{target}: the folder {target.parent} cannot be written to", "Give another place with -o.")
    return target


def _refuse_source(plan: Plan, target: Path) -> None:
    root, there = plan.checkpoint.path.resolve(), target.resolve()
    # A sharded source is the folder of its index.
    home = root.parent if plan.checkpoint.kind == "shards" else root
    inside = plan.checkpoint.kind == "folder" and there.is_relative_to(home)
    if there in (root, home) or inside or (target.exists() and target.samefile(root)):
        raise PlanError(f"{target}: that is the base itself", "Give another place with -o; the base is never changed.")


def _check_file(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise PlanError(
            f"{target}: a folder; the output is one file", f"Give a file name: -o {target / 'NAME'}.safetensors"
        )
    if target.suffix != ".safetensors":
        raise PlanError(
            f"{target}: the output is a safetensors file", f"Name it {target.with_suffix('.safetensors').name}."
        )
    if target.exists() and not force:
        raise PlanError(f"{target}: already exists", "Give another -o, or --force to replace it.")


def _check_folder(target: Path, *, force: bool) -> None:
    if target.suffix == ".safetensors":
        raise PlanError(
            f"{target}: the base is a folder, and so is the output", f"Name it {target.with_suffix('').name}."
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise PlanError(f"{target}: a file, where the output is a folder", "Give another place with -o.")
    if not any(target.iterdir()):
        return
    if not force:
        raise PlanError(f"{target}: already exists", "Give another -o, or --force to replace it.")
    if not _is_ours(target):
        raise PlanError(
            f"{target}: not a folder that crdiff made; --force does not replace it",
            "Remove it yourself, or give another -o.",
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds an export; --force must not delete somebody's home."""
    candidates = (folder, *sorted(folder.glob("*.index.json")))
    for path in candidates:
        try:
            return all(is_baked(file.metadata) for file in open_checkpoint(path).files)
        except CheckpointError:
            continue
    return False


def space(plan: Plan, target: Path) -> Space:
    """What the output needs beside what is there; a replaced one stays until the new one is complete."""
    headers = sum(output.source.data_start + HEADER_GROWTH for output in plan.outputs)
    needed = plan.data_size + headers + companions_size(plan)
    return Space(target.parent, needed, shutil.disk_usage(target.parent).free)


def companions_size(plan: Plan) -> int:
    """Bytes of the files that are copied as they are."""
    root = plan.checkpoint.home
    return sum((root / name).stat().st_size for name in plan.checkpoint.companions)


def check_space(space: Space) -> None:
    """PlanError where the disk is too full."""
    if space.needed > space.free:
        raise PlanError(
            f"{space.folder.resolve()}: {space.needed / 1e9:.1f} GB are needed, {space.free / 1e9:.1f} GB are free",
            "Free some space, or give another place with -o.",
        )
