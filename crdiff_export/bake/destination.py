"""Choose and check the output's path and the free disk space, before any weight is read or written."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.bake import residual
from crdiff_export.errors import CheckpointError, PlanError
from crdiff_export.formats.checkpoint import PICKLES, Checkpoint, open_checkpoint
from crdiff_export.formats.crdiff_keys import is_baked
from crdiff_export.formats.safetensors import MAX_BYTES, show
from crdiff_export.formats.text import amount
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size

# Our own keys add a few KB to each header; a source without metadata gets all of them.
HEADER_GROWTH = 64 << 10


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """The bytes that an export needs in a folder."""

    folder: Path
    needed: int

    @property
    def free(self) -> int:
        """The bytes that are free there."""
        return shutil.disk_usage(self.folder).free


def choose_target(
    checkpoint: Checkpoint, size: Size, output: Path | None, stem: str | None, way: str, *, force: bool
) -> Path:
    """Choose the output's path and check it.

    Args:
        checkpoint: The base's headers.
        size: The size to prune for.
        output: The path that the user gives, or a folder for an output with the default name; None for
            `STEM-crdiff-WxH` in the current folder.
        stem: The base's name, for the default; None to take the checkpoint's.
        way: How the residual is kept; a sidecar needs a free path, too.
        force: Replace an output that exists.

    Returns:
        The path to write.

    Raises:
        PlanError: The output cannot or must not be written there.
    """
    folder = checkpoint.kind != "file"
    suffix = "" if folder else ".safetensors"
    default = f"{stem or checkpoint.stem}-crdiff-{size}{suffix}"
    target = output if output is not None else Path(default)
    with _refuse_os_errors(target):
        if _names_a_folder(target, is_folder=folder, force=force):
            target = target / default
    check_target(checkpoint, target, force=force)
    if way == residual.SIDECAR and not folder:
        check_file(residual.sidecar_path(target), force=force)
    return target


def _names_a_folder(target: Path, *, is_folder: bool, force: bool) -> bool:
    """Whether the output goes into the folder `target`; if not, `target` is the output itself.

    Where the output is a folder, too, an empty folder and an earlier output are the output itself, and so is any
    folder that --force is to replace.
    """
    if not target.is_dir():
        return False
    if not is_folder:
        return target.suffix != ".safetensors"
    has_name = target.name not in ("", "..")
    return not has_name or (not force and any(target.iterdir()) and not _is_ours(target))


def check_target(checkpoint: Checkpoint, target: Path, *, force: bool, source: str = "base") -> None:
    """Check that a file or folder like a checkpoint can be written to `target`.

    Args:
        checkpoint: The checkpoint that is read.
        target: The path to write.
        force: Replace an output that exists.
        source: What the checkpoint is called in messages.

    Raises:
        PlanError: It cannot or must not be written there.
    """
    with _refuse_os_errors(target):
        _check_parent(target)
        _refuse_source(checkpoint, target, source)
        if checkpoint.kind != "file":
            _check_folder(checkpoint, target, force=force)
        else:
            _check_file_name(target)
            _check_free(target, force=force)


def check_file(target: Path, *, force: bool) -> None:
    """Check that a file of any kind, such as a report, can be written.

    Args:
        target: The file.
        force: Replace a file that exists.

    Raises:
        PlanError: It cannot or must not be written there.
    """
    with _refuse_os_errors(target):
        _check_parent(target)
        _check_free(target, force=force)


@contextlib.contextmanager
def _refuse_os_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}", "Give another place with -o.") from error


def _check_parent(target: Path) -> None:
    """Refuse a path without a name, and a folder that does not exist or cannot be written to."""
    if target.name in ("", "..", ".safetensors"):
        name = target.with_name("NAME.safetensors") if target.name == ".safetensors" else target / "NAME"
        raise PlanError(f"{target}: not a name for the output", f"Give it one: -o {name}.")
    if not target.parent.is_dir():
        raise PlanError(f"{target}: the folder {target.parent} does not exist", "Create it, or give another -o.")
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # raises OSError for a name that is too long, for example
    if not os.access(target.parent, os.W_OK):
        raise PlanError(f"{target}: the folder {target.parent} cannot be written to", "Give another place with -o.")


def _check_free(target: Path, *, force: bool) -> None:
    """Refuse a path that is taken, unless `force` may replace a regular file there."""
    if target.exists() and not target.is_file():
        raise PlanError(f"{target}: not a regular file", "Give another place with -o.")
    if os.path.lexists(target) and not force:
        raise PlanError(f"{target}: already exists", "Give another -o, or --force to replace it.")


def _refuse_source(checkpoint: Checkpoint, target: Path, source: str) -> None:
    """Refuse the source, its folder, and any folder around it, which --force would replace with everything in it."""
    checkpoint = checkpoint.on_disk
    # Path.resolve raises RuntimeError for links in a circle.
    root, real = (Path(os.path.realpath(path)) for path in (checkpoint.path, target))
    # The path of a sharded source is its index.
    home = root.parent if checkpoint.kind == "shards" else root
    inside = checkpoint.kind == "folder" and real.is_relative_to(home)
    hint = f"Give another place with -o; the {source} is never changed."
    if real in (root, home) or inside or (target.exists() and target.samefile(root)):
        raise PlanError(f"{target}: that is the {source} itself", hint)
    if root.is_relative_to(real):
        raise PlanError(f"{target}: the {source} lies in it", hint)


def _check_file_name(target: Path) -> None:
    if target.is_dir():
        raise PlanError(
            f"{target}: a folder; the output is one file", f"Give a file name: -o {target / 'NAME.safetensors'}."
        )
    if target.suffix != ".safetensors":
        name = target.stem if target.suffix in (*PICKLES, ".sft") else target.name
        raise PlanError(
            f"{target}: the output is a safetensors file", f"Name it {name}.safetensors, or give a folder that exists."
        )


def _check_folder(checkpoint: Checkpoint, target: Path, *, force: bool) -> None:
    if target.suffix == ".safetensors":
        name = target.with_suffix("").name
        if checkpoint.origin:
            raise PlanError(f"{target}: in diffusers' layout the output is a folder", f"Name it {name}.")
        one_file = "; or make one file of it, which web UIs open: --layout original" * (checkpoint.kind == "folder")
        raise PlanError(f"{target}: the base is a folder, and so is the output", f"Name it {name}{one_file}.")
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
    hint = "Remove it yourself, or give another -o."
    if not _is_ours(target):
        raise PlanError(f"{target}: not a folder that crdiff made; --force does not replace it", hint)
    if foreign := _foreign_file(checkpoint, target):
        raise PlanError(f"{target}: holds {foreign}, which is no part of the output; --force would delete it", hint)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds an export; --force must not delete any other folder."""
    try:
        return all(is_baked(file.metadata) for file in open_checkpoint(folder).files)
    except CheckpointError:
        return False


def _foreign_file(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Return a file in an earlier output that the new one would not have; weights may be split into other files."""
    new = {*(file.name for file in checkpoint.files), *map(str, checkpoint.companions), *checkpoint.generated}
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    weights = ("diffusion_pytorch_model*", f"*{residual.SUFFIX}")
    names = (path.relative_to(folder).as_posix() for path in files if not any(map(path.match, weights)))
    return next((name for name in names if name not in new), None)


def check_headers(plan: Plan) -> None:
    """Refuse a base whose header leaves no room for ours, before anything is written.

    Raises:
        PlanError: A header would be longer than the format allows.
    """
    for file in (output.source for output in plan.outputs):
        if file.data_start + HEADER_GROWTH <= MAX_BYTES:
            continue
        longest = max(file.metadata, key=lambda key: len(key) + len(file.metadata[key]), default=None)
        if longest is None:
            hint = "Save it with shorter names of tensors."
        else:
            hint = f"Save it without the key {show(longest)}, which has {len(file.metadata[longest]):,} characters."
        sizes = f"its header has {file.data_start:,} bytes, the format allows {MAX_BYTES:,}"
        raise PlanError(f"{file.path}: no room for crdiff's keys: {sizes}", hint)


def measure_space(plan: Plan, target: Path, way: str, counts: Sequence[int] | None = None) -> DiskSpace:
    """Compute the bytes that an output needs, beside an output that it replaces.

    Args:
        plan: The plan of the export.
        target: The path of the output.
        way: How the residual is kept.
        counts: For each scope, how many weights are pruned, once that is known: with ties, more than the ratio says.

    Returns:
        The bytes needed.
    """
    headers = sum(output.source.data_start + HEADER_GROWTH for output in plan.outputs)
    needed = plan.data_size + headers + companions_size(plan.checkpoint)
    if way != residual.NONE:
        needed += residual.largest_size(plan, counts or [scope.rank for scope in plan.scopes])
    return DiskSpace(target.parent, needed)


def companions_size(checkpoint: Checkpoint) -> int:
    """Return the total bytes of the files beside the weights, which are copied or written."""
    generated = sum(map(len, checkpoint.generated.values()))
    return generated + sum((checkpoint.home / name).stat().st_size for name in checkpoint.companions)


def check_space(*spaces: DiskSpace) -> None:
    """Check the space for all outputs together.

    Raises:
        PlanError: A folder has too little space for the outputs that go there.
    """
    needed: Counter[Path] = Counter()
    for space in spaces:
        needed[space.folder.resolve()] += space.needed
    for folder, size in needed.items():
        if size > (free := DiskSpace(folder, size).free):
            raise PlanError(
                f"{folder}: {amount(size)} needed, {amount(free)} free",
                "Free some space, or give another place with -o.",
            )
