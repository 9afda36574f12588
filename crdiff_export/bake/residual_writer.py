"""A residual in the making: what is pruned away is written, or compared, while the weights stream past."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from crdiff_export.bake import residual, stream
from crdiff_export.bake.direct_writer import Writer
from crdiff_export.bake.residual import Kept
from crdiff_export.bake.stream import Pruning
from crdiff_export.errors import VerifyError
from crdiff_export.formats import safetensors
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.verify.reopen import REPAIR

if TYPE_CHECKING:
    from hashlib import _Hash

_UNKNOWN = f"0x{'0' * 64}"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A finished sidecar."""

    path: Path
    size: int
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]


class Keeping:
    """The residual of one file of a plan, written from some place in a file on.

    Its size is known at the end alone, so there is room in the header for the largest that it can get.
    """

    def __init__(self, pruning: Pruning, number: int) -> None:
        self._head = base_head(pruning.plan.outputs[number].source)
        self._most = sum(cut.stop - cut.start for cut in stream.places(pruning.plan, number))
        self.size = 0

    def reserved(self, start: int) -> tuple[TensorSpec, ...]:
        """Its tensors from `start` on in the data section, as large as they can get."""
        return residual.specs(start, self._most, len(self._head))

    def tensors(self, start: int) -> tuple[TensorSpec, ...]:
        """Its tensors, once it is complete."""
        return residual.specs(start, self.size, len(self._head))

    def begin(self, writer: Writer, place: int) -> None:
        """Write to byte `place` of a file and on."""
        self._writer, self._place = writer, place

    def begin_sidecar(self, writer: Writer) -> None:
        """Write to a file of its own."""
        self._room = len(self._sidecar_head(self.reserved(0), _UNKNOWN, _UNKNOWN))
        self.begin(writer, self._room)

    @staticmethod
    def _sidecar_head(tensors: tuple[TensorSpec, ...], of: str, own: str, room: int = 0) -> bytes:
        return safetensors.serialise(tensors, {residual.OF: of, residual.OWN_HASH: own}, room)

    def add(self, removed: memoryview) -> None:
        """Write the next weights that are zeroed."""
        self._writer.append(removed, self._place + self.size)
        self.size += len(removed)

    def complete(self, digest: "_Hash") -> None:
        """Write the base's header behind the last weight, and let a hash see all of it."""
        end = self._place + self.size
        self._writer.append(memoryview(self._head), end)
        for piece in self._writer.read(self._place, end + len(self._head)):
            digest.update(piece)

    def finish_sidecar(self, of: str) -> Sidecar:
        """Make the file of its own complete and durable; `of` is the hash of the file that it belongs to."""
        digest = sha256()
        self.complete(digest)
        tensors, own = self.tensors(0), f"0x{digest.hexdigest()}"
        size = self._room + tensors[-1].end
        self._writer.patch(self._sidecar_head(tensors, of, own, self._room))
        self._writer.finish(size)
        self._writer.close()
        return Sidecar(self._writer.path, size, tensors, {residual.OF: of, residual.OWN_HASH: own})


def base_head(source: SourceFile) -> bytes:
    """The length and header of a base's file as they are; nothing for one that is no safetensors file."""
    if source.tensors_of is not None:
        return b""
    with source.path.open("rb") as file:
        return file.read(source.data_start)


class Comparing:
    """A residual that is held against what its base gives; a context that closes its file."""

    def __init__(self, kept: Kept, head: bytes) -> None:
        self._kept, self._head, self._place = kept, head, kept.values.start
        self._reader = kept.file.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def compare(self, removed: memoryview) -> None:
        """Hold the next values against what is pruned away."""
        if self._place + len(removed) > self._kept.values.end or self._read(len(removed)) != removed:
            self._refuse(residual.VALUES)

    def finish(self) -> None:
        """Hold what is left against the base's header."""
        if self._place != self._kept.values.end:
            self._refuse(residual.VALUES)
        size = self._kept.head.nbytes if self._kept.head else 0
        if len(self._head) != size or self._read(size) != self._head:
            self._refuse(residual.HEAD)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        self._reader.read_into(self._place, memoryview(data))
        self._place += size
        return data

    def _refuse(self, name: str) -> NoReturn:
        raise VerifyError(f"{self._kept.file.path}: {name} is not what was pruned away from the base", REPAIR)
