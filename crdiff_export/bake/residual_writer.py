"""Write a residual while the weights of its base stream past."""

from hashlib import sha256
from typing import TYPE_CHECKING

from crdiff_export.bake import stream
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.bake.residual import OWNER_HASH, SIDECAR_HASH, tensor_specs
from crdiff_export.formats import safetensors
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    from hashlib import _Hash

# Takes a hash's place in a header until it is known.
_UNKNOWN_HASH = f"0x{'0' * 64}"


class ResidualWriter:
    """Writes the residual of one file, either behind the file's own tensors or into a sidecar.

    The final size is unknown until the last weight has passed, so headers reserve room for the largest one.
    """

    def __init__(self, plan: Plan, number: int) -> None:
        self._base_header = header_of(plan.outputs[number].source)
        self._largest = sum(cut.stop - cut.start for cut in stream.prune_ranges(plan, number))
        self.size = 0

    def largest_tensors(self, start: int) -> tuple[TensorSpec, ...]:
        """Describe its tensors from byte `start` of the data section on, as large as they can get."""
        return tensor_specs(start, self._largest, len(self._base_header))

    def tensors(self, start: int) -> tuple[TensorSpec, ...]:
        """Describe its tensors from byte `start` of the data section on, once it is complete."""
        return tensor_specs(start, self.size, len(self._base_header))

    def begin(self, writer: DirectWriter, offset: int) -> None:
        """Write into a file from byte `offset` on."""
        self._writer, self._offset = writer, offset

    def begin_sidecar(self, writer: DirectWriter) -> None:
        """Write into a file of its own."""
        self._header_size = len(safetensors.serialise(self.largest_tensors(0), _sidecar_metadata(_UNKNOWN_HASH)))
        self.begin(writer, self._header_size)

    def add(self, pruned: memoryview) -> None:
        """Write the next pruned weights."""
        self._writer.append(pruned, self._offset + self.size)
        self.size += len(pruned)

    def complete(self, digest: "_Hash") -> None:
        """Write the base's header behind the last weight, and feed the whole residual to `digest`."""
        end = self._offset + self.size
        self._writer.append(memoryview(self._base_header), end)
        for piece in self._writer.read(self._offset, end + len(self._base_header)):
            digest.update(piece)

    def finish_sidecar(self, owner_hash: str) -> int:
        """Complete the sidecar of the file with this hash, make it durable, and return its bytes."""
        digest = sha256()
        self.complete(digest)
        metadata = _sidecar_metadata(owner_hash, f"0x{digest.hexdigest()}")
        return self._writer.complete(self.tensors(0), metadata, self._header_size)


def _sidecar_metadata(owner_hash: str, own_hash: str = _UNKNOWN_HASH) -> dict[str, str]:
    return {OWNER_HASH: owner_hash, SIDECAR_HASH: own_hash}


def header_of(source: SourceFile) -> bytes:
    """Return the length field and header of a safetensors file; nothing for a file of another format."""
    if source.reader is not None:
        return b""
    with source.path.open("rb") as file:
        return file.read(source.data_start)
