"""Compare the tensors of two checkpoints, first by their headers, then weight by weight."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.safetensors import BITS, TensorSpec
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.models.families import Match
from crdiff_export.progress import Progress
from crdiff_export.prune.plan import quantisation
from crdiff_export.verify.inspect import Inspection
from crdiff_export.verify.layers import MAGNITUDE
from crdiff_export.verify.weight_reader import PIECE, read_pieces, refuse_holes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Groups beside those of a family: the layers of the model that are never pruned, and text encoders, VAE and the like.
OTHER_LAYERS: Final = "other layers"
OTHER_MODELS: Final = "other models"
_INTEGERS: Final = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# Elements that are compared at once: few enough for a processor's cache, and whole bytes of every dtype.
_ELEMENTS: Final = 1 << 16


class Change(NamedTuple):
    """One entry that differs between the headers: its value in A and in B, None where it is absent."""

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class HeaderDifference:
    """What differs between the headers of A and B.

    Attributes:
        only_a: The tensors that B does not have.
        only_b: The tensors that A does not have.
        common: The number of tensors with the same name.
        shapes: The tensors of another shape, which are not compared.
        dtypes: The tensors of another dtype.
        metadata: The keys of the metadata with another value.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    common: int
    shapes: tuple[Change, ...]
    dtypes: tuple[Change, ...]
    metadata: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """What differs between the weights of one tensor in A and in B.

    Attributes:
        name: Its name.
        group: Its group.
        dtypes: Its dtype in A and in B.
        weights: The number of its weights.
        differing: How many of them differ: in any bit, or in their value where the dtypes differ.
        newly_zero: How many are zero in B, but not in A.
        no_longer_zero: How many are zero in A, but not in B.
        zero_in_both: How many are zero in A and in B.
        nonfinite: How many differ and have no finite difference, because one of them is infinite or NaN.
        largest: The largest finite absolute difference; None for tensors that are not float.
        relative: The L2 norm of the finite differences, divided by that of A; None for tensors that are not float, and
            where A is zero.
    """

    name: str
    group: str
    dtypes: tuple[str, str]
    weights: int
    differing: int
    newly_zero: int
    no_longer_zero: int
    zero_in_both: int
    nonfinite: int = 0
    largest: float | None = None
    relative: float | None = None

    @property
    def share(self) -> float:
        """The share of its weights that differ."""
        return self.differing / max(self.weights, 1)


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """What differs between the weights of a group in A and in B, or of all groups; see `TensorDifference`."""

    group: str
    tensors: int
    differing_tensors: int
    weights: int
    differing: int
    newly_zero: int
    no_longer_zero: int
    zero_in_both: int

    @property
    def share(self) -> float:
        """The share of its weights that differ."""
        return self.differing / max(self.weights, 1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        a: The headers of A.
        b: The headers of B.
        header: What differs between the headers.
        groups: The tensors that were compared, by group.
        tensors: The tensors whose weights differ, those that differ most first.
    """

    a: Inspection
    b: Inspection
    header: HeaderDifference
    groups: tuple[GroupDifference, ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors with the same bytes; metadata may differ."""
        header = self.header
        return not (header.only_a or header.only_b or header.shapes or header.dtypes or self.tensors)

    @property
    def total(self) -> GroupDifference:
        """All groups together."""
        return _add("all", self.groups)

    @property
    def notes(self) -> list[str]:
        """Notes for the user."""
        notes = []
        if not self.header.common:
            notes.append(
                "no tensor has the same name in A and B: they are other models, or one model in two layouts or with "
                "another prefix"
            )
        floats = [change for change in self.header.dtypes if {change.a, change.b} <= MAGNITUDE.keys()]
        if floats:
            notes.append("tensors of another dtype are compared as float32 values, as float64 where one is F64")
        if len(floats) < len(self.header.dtypes):
            notes.append("tensors of another dtype that are not float in both are not compared")
        if any(tensor.nonfinite for tensor in self.tensors):
            notes.append("weights that are infinite or NaN count as differing, but not for largest and relative")
        scaled = [quantised for side in (self.a, self.b) if (quantised := quantisation(side.checkpoint))]
        if scaled:
            notes.append(f"quantised weights ({scaled[0].kind}) are compared as they are stored, without their scales")
        return notes


def compare(a: Inspection, b: Inspection, progress: Progress) -> Comparison:
    """Compare two checkpoints: their headers, and the weights of all tensors that have the same name and shape.

    Args:
        a: The headers of A.
        b: The headers of B.
        progress: Is told how far the work is, and may interrupt it.

    Returns:
        What differs.

    Raises:
        CheckpointError: A file cannot be read, or is mostly a hole.
    """
    ours, theirs = _tensors(a.checkpoint), _tensors(b.checkpoint)
    header = _compare_headers(a.checkpoint, b.checkpoint)
    pairs = [
        (left, theirs[name]) for name, left in ours.items()
        if name in theirs and left.spec.shape == theirs[name].spec.shape and _is_comparable(left, theirs[name])
    ]  # fmt: skip
    if pairs:
        refuse_holes(a.checkpoint)
        refuse_holes(b.checkpoint)
    match = a.match or b.match
    groups = _groups_of(match)
    progress.stage("comparing", sum(left.spec.nbytes for left, _ in pairs))
    differences: list[TensorDifference] = []
    specs: dict[str, list[TensorSpec]] = {}
    with ExitStack() as stack:
        readers = [
            [stack.enter_context(closing(file.open())) for file in side.checkpoint.files] for side in (a, b)
        ]  # fmt: skip
        for left, right in pairs:
            group = _group(left.spec.name, match, groups)
            specs.setdefault(group, []).append(left.spec)
            pair = _Pair(left.spec, right.spec, readers[0][left.file], readers[1][right.file])
            if not pair.is_equal():
                difference = pair.compare(group)
                differences += [difference] if difference.differing else []
            progress.advance(left.spec.nbytes)
    order = [*dict.fromkeys(groups.values()), OTHER_LAYERS, OTHER_MODELS]
    totals = [
        _total(name, specs[name], [difference for difference in differences if difference.group == name])
        for name in sorted(specs, key=order.index)
    ]
    return Comparison(a, b, header, tuple(totals), tuple(sorted(differences, key=_size, reverse=True)))


class _Tensor(NamedTuple):
    """A tensor, and the number of its file."""

    file: int
    spec: TensorSpec


def _tensors(checkpoint: Checkpoint) -> dict[str, _Tensor]:
    return {tensor.name: _Tensor(number, tensor) for number, tensor in checkpoint.tensors()}


def _is_comparable(left: _Tensor, right: _Tensor) -> bool:
    """Whether two tensors have the same dtype, or values that a float holds exactly."""
    dtypes = {left.spec.dtype, right.spec.dtype}
    return len(dtypes) == 1 or dtypes <= MAGNITUDE.keys()


def _compare_headers(a: Checkpoint, b: Checkpoint) -> HeaderDifference:
    ours, theirs = ({name: tensor.spec for name, tensor in _tensors(side).items()} for side in (a, b))
    common = [name for name in ours if name in theirs]
    keys = sorted({*a.metadata, *b.metadata})
    return HeaderDifference(
        only_a=tuple(name for name in ours if name not in theirs),
        only_b=tuple(name for name in theirs if name not in ours),
        common=len(common),
        shapes=tuple(
            Change(name, str(list(ours[name].shape)), str(list(theirs[name].shape)))
            for name in common if ours[name].shape != theirs[name].shape
        ),
        dtypes=tuple(
            Change(name, ours[name].dtype, theirs[name].dtype)
            for name in common if ours[name].dtype != theirs[name].dtype
        ),
        metadata=tuple(
            Change(key, a.metadata.get(key), b.metadata.get(key))
            for key in keys if a.metadata.get(key) != b.metadata.get(key)
        ),
    )  # fmt: skip


def _groups_of(match: Match | None) -> dict[str, str]:
    """Map every tensor that may be pruned, or has a part that may be, to its group, in the order of the groups."""
    if match is None:
        return {}
    layers = sorted(match.layout.layers, key=lambda layer: match.family.groups.index(layer.group))
    return {match.prefix + layer.tensor: layer.group for layer in layers}


def _group(name: str, match: Match | None, groups: Mapping[str, str]) -> str:
    """Return the group of a tensor; all tensors of an unknown model are other layers."""
    if name in groups:
        return groups[name]
    return OTHER_LAYERS if match is None or name.startswith(match.prefix) else OTHER_MODELS


def _total(name: str, tensors: Sequence[TensorSpec], differences: Sequence[TensorDifference]) -> GroupDifference:
    weights = sum(tensor.count for tensor in tensors)
    same = GroupDifference(name, len(tensors) - len(differences), 0, weights, 0, 0, 0, 0)
    parts = [
        GroupDifference(
            name, 1, 1, 0, tensor.differing, tensor.newly_zero, tensor.no_longer_zero, tensor.zero_in_both
        )
        for tensor in differences
    ]  # fmt: skip
    return _add(name, [same, *parts])


def _add(name: str, parts: Sequence[GroupDifference]) -> GroupDifference:
    keys = ("tensors", "differing_tensors", "weights", "differing", "newly_zero", "no_longer_zero", "zero_in_both")
    return GroupDifference(name, *(sum(getattr(part, key) for part in parts) for key in keys))


def _size(tensor: TensorDifference) -> tuple[float, float]:
    """Order tensors by the size of their difference; one from zero to something has no relative size, and is first."""
    if tensor.relative is not None:
        return tensor.relative, tensor.share
    return (math.inf if tensor.largest or tensor.nonfinite else 0.0), tensor.share


@dataclass(frozen=True, slots=True)
class _Pair:
    """One tensor in A and in B, and the readers of its files."""

    a: TensorSpec
    b: TensorSpec
    reader_a: Bytes
    reader_b: Bytes

    def pieces(self, elements: int) -> Iterator[tuple[memoryview, memoryview]]:
        """Yield the same elements of both."""
        yield from zip(
            read_pieces(self.reader_a, self.a.start, self.a.end, elements * BITS[self.a.dtype] // 8),
            read_pieces(self.reader_b, self.b.start, self.b.end, elements * BITS[self.b.dtype] // 8),
            strict=True,
        )

    def is_equal(self) -> bool:
        """Whether both have the same dtype and bytes."""
        import numpy as np

        return self.a.dtype == self.b.dtype and all(
            np.array_equal(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8))
            for left, right in self.pieces(8 * PIECE // BITS[self.a.dtype])
        )

    def compare(self, group: str) -> TensorDifference:
        """Compare all weights."""
        differing = newly_zero = no_longer_zero = zero_in_both = 0
        floats = _Floats() if self.a.dtype in MAGNITUDE else None
        for left, right in self.pieces(_ELEMENTS):
            zero_a, zero_b = _zeros(left, self.a.dtype), _zeros(right, self.b.dtype)
            if floats:
                changed = floats.add(left, right, self.a.dtype, self.b.dtype)
            else:
                changed = _changed(left, right, BITS[self.a.dtype])
            differing += int(changed.sum())
            newly_zero += int((zero_b & ~zero_a).sum())
            no_longer_zero += int((zero_a & ~zero_b).sum())
            zero_in_both += int((zero_a & zero_b).sum())
        return TensorDifference(
            self.a.name, group, (self.a.dtype, self.b.dtype), self.a.count,
            differing, newly_zero, no_longer_zero, zero_in_both,
            floats.nonfinite if floats else 0, floats.largest if floats else None, floats.relative if floats else None,
        )  # fmt: skip


class _Floats:
    """The sums over the differences of floats. Its arrays are reused: new ones would take longer than the sums."""

    def __init__(self) -> None:
        import numpy as np

        self.nonfinite = 0
        self.largest = 0.0
        self._squares = self._squares_a = 0.0
        self._arrays = np.empty((2, _ELEMENTS))

    @property
    def relative(self) -> float | None:
        """The L2 norm of the differences, divided by that of A; None if A is zero, or if a sum is infinite."""
        if not self._squares_a:
            return None if self._squares else 0.0
        relative = math.sqrt(self._squares / self._squares_a)
        return relative if math.isfinite(relative) else None

    def add(self, left: memoryview, right: memoryview, dtype_a: str, dtype_b: str) -> "NDArray[np.bool_]":
        """Add some weights of A and B, and return which of them differ."""
        import numpy as np

        codes_a, codes_b = _codes(left, dtype_a), _codes(right, dtype_b)
        a, b = self._arrays[:, : codes_a.size]
        changed: NDArray[np.bool_] = codes_a != codes_b
        with np.errstate(all="ignore"):
            _decode(codes_a, dtype_a, a)
            _decode(codes_b, dtype_b, b)
            if dtype_a != dtype_b:
                changed = (a != b) & ~(np.isnan(a) & np.isnan(b))
            difference = np.subtract(b, a, out=b)
            finite = np.isfinite(difference)
            self.nonfinite += int(np.count_nonzero(changed & ~finite))
            np.copyto(difference, 0, where=~finite)
            np.copyto(a, 0, where=~np.isfinite(a))
            self.largest = max(self.largest, float(difference.max()), -float(difference.min()))
            # Not the operator @, whose threads wait for each other on a busy machine.
            self._squares += float(np.einsum("i,i", difference, difference))
            self._squares_a += float(np.einsum("i,i", a, a))
        return changed


def _codes(data: memoryview, dtype: str) -> "NDArray[np.unsignedinteger[Any]]":
    import numpy as np

    return np.frombuffer(data, f"<u{BITS[dtype] // 8}")


def _decode(codes: "NDArray[np.unsignedinteger[Any]]", dtype: str, out: "NDArray[np.float64]") -> None:
    """Write the numbers of codes, exactly: a float64 holds every number of the other floats."""
    import numpy as np

    if dtype in ("F64", "F32"):
        np.copyto(out, codes.view(np.float64 if dtype == "F64" else np.float32))
    else:
        np.take(_table(dtype), codes, out=out, mode="clip")  # no code is too large; this mode needs no second array


@cache
def _table(dtype: str) -> "NDArray[np.float64]":
    """Return the number of every code of a narrow float."""
    import numpy as np

    from crdiff_export.prune.kernels.cast import cast

    codes = np.arange(1 << BITS[dtype], dtype=f"<u{BITS[dtype] // 8}")
    with np.errstate(invalid="ignore"):  # some processors warn of a signalling NaN
        return np.frombuffer(cast(memoryview(codes.tobytes()), dtype, "F32"), np.float32).astype(np.float64)


def _zeros(data: memoryview, dtype: str) -> "NDArray[np.bool_]":
    """Return which elements are zero; none of a dtype that is neither a float of ours nor an integer."""
    import numpy as np

    if dtype not in MAGNITUDE and dtype not in _INTEGERS:
        return np.zeros(8 * len(data) // BITS[dtype], np.bool_)
    codes = _codes(data, dtype)
    magnitudes = codes & codes.dtype.type(MAGNITUDE[dtype]) if dtype in MAGNITUDE else codes
    return np.equal(magnitudes, 0, dtype=np.bool_)


def _changed(left: memoryview, right: memoryview, bits: int) -> "NDArray[np.bool_]":
    """Return which elements of so many bits differ."""
    import numpy as np

    differing = np.frombuffer(left, np.uint8) ^ np.frombuffer(right, np.uint8)
    changed: NDArray[np.bool_] = np.asarray(np.unpackbits(differing, bitorder="little").reshape(-1, bits).any(axis=-1))
    return changed
