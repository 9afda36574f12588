"""The folder of an unfinished calibration, and the file that is made from it at the end.

`OUT.part/` beside the output holds `run.json` with the settings of the run, a safetensors file for every finished group
of layers, and the pictures for gradients. An interrupted run goes on there.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.bake import staging
from crdiff_export.bake.destination import check_file
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.errors import CalibrationError, CheckpointError, OptionError, PlanError
from crdiff_export.formats import file_lock, safetensors
from crdiff_export.formats.checkpoint import read_file
from crdiff_export.formats.hashing import PIECE
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.formats.text import printable
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIX: Final = ".safetensors"
_RUN: Final = "run.json"
# The names of the other files: groups and pictures.
_FILES: Final = re.compile(r"[0-9]{4,}\.safetensors|picture-[0-9]{5,}\.png")


def check_target(target: Path, plan: Plan, *, force: bool) -> None:
    """Check that a calibration can be written.

    Args:
        target: The file to write.
        plan: The plan of the base, which must not be overwritten.
        force: Whether an existing file may be replaced.

    Raises:
        OptionError: Its name does not end in `.safetensors`.
        PlanError: It cannot or must not be written there.
    """
    if target.suffix != SUFFIX:
        raise OptionError(
            f"{target}: a calibration is a safetensors file", f"Name it {target.name or 'calibration'}{SUFFIX}."
        )
    paths = [file.path for file in plan.checkpoint.files]  # which do not exist while the base is on the Hub alone
    if os.path.lexists(target) and any(path.exists() and target.exists() and target.samefile(path) for path in paths):
        raise PlanError(f"{target}: that is the base itself", "Give another place with -o.")
    check_file(target, force=force)


class Folder:
    """`OUT.part/`, in use by one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finished(self) -> dict[str, tuple[SourceFile, TensorSpec]]:
        """Map the name of every finished tensor to the file of its group and the tensor in it."""
        tensors = {}
        for path in sorted(self.path.glob(f"[0-9]*{SUFFIX}")):
            try:
                file = read_file(path, path.name)
            except CheckpointError as error:
                raise _damaged(self.path, path.name) from error
            tensors.update({tensor.name: (file, tensor) for tensor in file.tensors})
        return tensors

    def keep(self, tensors: "Mapping[str, Tensor]") -> None:
        """Store a finished group."""
        from safetensors.torch import save_file

        number = 1 + max((int(path.stem) for path in self.path.glob(f"[0-9]*{SUFFIX}")), default=0)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._publish(f"{number:04d}{SUFFIX}", lambda part: save_file(on_cpu, part))

    def picture(self, number: int) -> "Image | None":
        """Load a stored picture; None if it does not exist."""
        from PIL import Image

        path = self.path / _name(number)
        if not path.exists():
            return None
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for a truncated or damaged PNG
            raise _damaged(self.path, path.name) from error

    def keep_picture(self, number: int, image: "Image") -> None:
        """Store a picture without loss."""
        self._publish(_name(number), lambda part: image.save(part, format="PNG", compress_level=1))

    def assemble(
        self, target: Path, names: Sequence[str], metadata: Mapping[str, str], progress: Progress, *, replace: bool
    ) -> int:
        """Write the calibration under its name; the file does not depend on the groups or the run.

        The safetensors library is not used, because its order of metadata is random (safetensors#584) and it needs all
        tensors in memory; it reads the file before it appears.

        Args:
            target: The file.
            names: The tensors, in the order of the file.
            metadata: The header's metadata.
            progress: Told of every byte written.
            replace: Whether to replace an existing file.

        Returns:
            Bytes of the file.
        """
        finished, tensors, end = self.finished(), [], 0
        for name in names:
            _, tensor = finished[name]
            tensors.append(TensorSpec(name, tensor.dtype, tensor.shape, end, end + tensor.nbytes))
            end += tensor.nbytes
        header_size = position = len(safetensors.serialise(tensors, metadata))
        progress.stage("writing", end)
        try:
            with staging.temp_sibling(target, folder=False) as part, DirectWriter(part) as writer:
                for name in names:
                    for piece in _pieces(*finished[name]):
                        writer.append(piece, position)
                        position += len(piece)
                        progress.advance(len(piece))
                size = writer.complete(tensors, metadata, header_size)
                staging.copy_permissions(part, target)
                staging.publish(part, target, replace=replace)
        except OSError as error:
            raise explained(error, target, self.path) from error
        return size

    def remove(self) -> None:
        """Remove the folder after its calibration was written."""
        with contextlib.suppress(OSError):
            _clear(self.path)
        shutil.rmtree(self.path, ignore_errors=True)

    def _publish(self, name: str, save: Any) -> None:
        path = self.path / name
        try:
            with staging.temp_sibling(path, folder=False) as part:
                save(part)
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                staging.publish(part, path)
        except OSError as error:
            raise explained(error, path, self.path) from error


@contextlib.contextmanager
def open_folder(target: Path, run: Mapping[str, str], *, force: bool) -> Iterator[Folder]:
    """Open and lock the folder of a run, with the finished groups of an interrupted run.

    Args:
        target: The file that will be written.
        run: The settings of the run.
        force: Whether to delete the folder of a run with other settings.

    Yields:
        The folder.

    Raises:
        CalibrationError: It belongs to a run with other settings, or another process uses it.
    """
    path = target.with_name(f"{target.name}.part")
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(exist_ok=True)
            if (handle := _lock(path)) is not None:
                stack.callback(os.close, handle)
            _begin(path, run, force=force)
        except OSError as error:
            raise explained(error, path, path) from error
        yield Folder(path)


def _lock(path: Path) -> int | None:
    try:
        return file_lock.lock(path)
    except BlockingIOError as error:
        raise CalibrationError(f"{path}: another run uses it", "Wait for it, or give another -o.") from error
    except OSError:  # a file system without locks
        return None


def _begin(path: Path, run: Mapping[str, str], *, force: bool) -> None:
    record = path / _RUN
    if record.exists():
        other = _difference(record, run)
        if other is None:
            return
        if not force:
            raise CalibrationError(
                f"{path}: started with other settings: {other}",
                f"Give those again to go on, or --force to start over, which deletes {path.name}.",
            )
        _clear(path)
    elif names := [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]:
        if not all(map(_FILES.fullmatch, names)):
            raise CalibrationError(f"{path}: not a folder that crdiff made", "Remove it yourself, or give another -o.")
        if not force:
            raise CalibrationError(
                f"{path}: {_RUN} with the settings of its run is missing",
                f"Give --force to start over, which deletes {path.name}, or another -o.",
            )
        _clear(path)
    with staging.temp_sibling(record, folder=False) as part:
        part.write_text(json.dumps(dict(sorted(run.items())), indent=1, ensure_ascii=False), encoding="utf-8")
        staging.publish(part, record)


def _clear(path: Path) -> None:
    """Empty the folder, which stays because it is locked. The record is removed last."""
    for old in sorted(path.iterdir(), key=lambda old: old.name == _RUN):
        old.unlink()


def _difference(record: Path, run: Mapping[str, str]) -> str | None:
    """Return the first setting that differs from an earlier run; None if all are the same."""
    try:
        earlier = parse_object(record.read_bytes(), fractions=True)
    except MalformedError:
        return f"{record.name} cannot be read"
    for name in sorted({*earlier, *run}):
        if earlier.get(name) != run.get(name):
            before, now = (printable(str(texts.get(name, "not given")), 80) for texts in (earlier, run))
            return f"{name.replace('_', ' ')} {before}, now {now}"
    return None


def _pieces(file: SourceFile, tensor: TensorSpec) -> Iterator[memoryview]:
    """Yield the bytes of a tensor."""
    with contextlib.closing(file.open()) as reader:
        for start in range(tensor.start, tensor.end, PIECE):
            piece = memoryview(bytearray(min(PIECE, tensor.end - start)))
            reader.read_into(start, piece)
            yield piece


def _name(number: int) -> str:
    return f"picture-{number:05d}.png"


def _damaged(path: Path, name: str) -> CalibrationError:
    return CalibrationError(f"{path}: {name} is damaged", "Delete that file; the same command makes it again.")


def explained(error: OSError, path: Path, part: Path) -> CalibrationError:
    """Return an error of the file system as a CalibrationError.

    Args:
        error: The error.
        path: The file that was being written.
        part: The folder of the run.

    Returns:
        The error to raise.
    """
    what = f"{path}: {error.strerror or error}"
    if isinstance(error, FileExistsError) and path != part:
        return CalibrationError(f"{path}: was created in the meantime", "Give the command again with --force.")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CalibrationError(what, f"Free some space, then run it again; what is finished is kept in {part.name}.")
    return CalibrationError(what, "Give a place you may write to with -o.")
