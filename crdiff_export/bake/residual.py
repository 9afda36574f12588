"""The residual: the weights that pruning has set to zero, as they were, so that the base can be had back bit by bit.

No mask is kept: what is zero in a pruned target was pruned. So a residual is the values alone, in the order of the
file's bytes and each in its own dtype, and beside them the header of the base's file. Both are plain bytes (U8), behind
all tensors of the baked file under names that sort last, or in a file of their own beside it (docs/metadata.md).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from crdiff_export.errors import CheckpointError, OptionError, PlanError, VerifyError
from crdiff_export.formats import dtypes, safetensors
from crdiff_export.formats.checkpoint import read_file
from crdiff_export.formats.crdiff_keys import RESIDUALS
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, Target
from crdiff_export.verify.reopen import NEWER, BakedCheckpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NONE, EMBED, SIDECAR = WAYS = ("none", "embed", "sidecar")
# What `crdiff.residual` calls them.
SAID = dict(zip(WAYS, RESIDUALS, strict=True))
# Loaders take nothing under such names, of this dtype and in this place for weights (ComfyUI, A1111, kohya, sd.cpp).
VALUES, HEAD = "zz_crdiff.residual", "zz_crdiff.header"
# Not .safetensors: A1111 and ComfyUI list every such file as a model.
SUFFIX = ".crdiff-residual"
OUTPUT_HASH = "modelspec.hash_sha256"
# In the header of a sidecar: the hash of the file that it belongs to, and that of its own bytes.
OF, OWN_HASH = "crdiff.residual.of", "crdiff.residual.hash_sha256"
_BUNDLE = "model.diffusion_model."
_BASE = "Use the base itself; `crdiff inspect` names it."


@dataclass(frozen=True, slots=True)
class Kept:
    """The residual of one file: tensors of `file`, which is the baked file itself or its sidecar.

    `size` are the bytes of the base's own tensors. `head` is None where the base was no safetensors file.
    """

    baked: SourceFile
    file: SourceFile
    values: TensorSpec
    head: TensorSpec | None
    size: int


def check_request(residual: str, criterion: CriterionChoice, *, hashing: bool) -> None:
    """Refuse options that exclude each other for any base.

    Raises:
        OptionError: The residual is unknown, or does not go with the criterion or with an export without hashes.
    """
    if residual not in WAYS:
        raise OptionError(f"--residual {residual}: no way to keep one", f"Give one of: {', '.join(WAYS)}.")
    if residual != NONE and not hashing:
        raise OptionError(
            f"--residual {residual} and --no-hash do not go together",
            "A residual is bound to its weights by hash; leave one of the two out.",
        )
    if residual != NONE and criterion.moves:
        raise OptionError(
            f"--residual {residual} and {criterion.name} do not go together: weights that stay are moved, too, and a "
            "residual holds only those that go",
            "Leave --residual out, or move none (obs:compensate=off).",
        )


def check_plan(plan: Plan, residual: str) -> None:
    """Refuse a base that a residual cannot give back, or that must not embed one, before a weight is read."""
    if residual == NONE:
        return
    path = plan.checkpoint.path
    if plan.cast and any(run.cast for output in plan.outputs for run in output.runs):
        raise OptionError(
            f"--residual {residual} and --dtype do not go together: {path} would be cast, which cannot be undone",
            "Leave one of the two out.",
        )
    if names := {VALUES, HEAD} & plan.checkpoint.shapes.keys():
        raise PlanError(f"{path}: holds {max(names)}, the residual of another export", "Export from that one's base.")
    taken = {sidecar(Path(output.source.name)).as_posix() for output in plan.outputs}
    if residual == SIDECAR and (there := taken & {str(name) for name in plan.checkpoint.companions}):
        raise PlanError(f"{path}: holds {min(there)}, where the sidecar would be", "Move it out of the base's folder.")
    if residual == EMBED and not _is_bundle(plan):
        raise PlanError(
            f"{path}: loaders refuse a file with more than the model in it, unless its names begin with {_BUNDLE}",
            "Give --residual sidecar, which puts the residual into a file beside it.",
        )


def _is_bundle(plan: Plan) -> bool:
    match = plan.match
    return plan.checkpoint.kind == "file" and match.layout.name == "original" and match.prefix == _BUNDLE


def expected(plan: Plan, counts: Sequence[int]) -> int:
    """The bytes of a plan's residuals where `counts` weights of each scope are pruned; no less than they will be."""
    widest = [max((t.output.itemsize for t in plan.targets if t.scope == n), default=0) for n in range(len(counts))]
    return sum(count * size for count, size in zip(counts, widest, strict=True)) + sum(
        output.source.data_start + safetensors.ALIGNMENT for output in plan.outputs
    )


def sidecar(path: Path) -> Path:
    """Where the residual of the file at `path` is, if it is not in it."""
    return path.with_suffix(SUFFIX)


def specs(start: int, size: int, head: int) -> tuple[TensorSpec, ...]:
    """The tensors of a residual of `size` bytes from `start` on in a data section, with `head` bytes of header."""
    end = start + size
    values = TensorSpec(VALUES, "U8", (size,), start, end)
    return (values, TensorSpec(HEAD, "U8", (head,), end, end + head)) if head else (values,)


def own(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of a file that are its residual."""
    return tuple(t for t in tensors if t.name in (VALUES, HEAD))


def find(baked: BakedCheckpoint) -> tuple[Kept, ...]:
    """The residual of each file of a baked checkpoint, from headers alone.

    PlanError where it has none, CheckpointError for a sidecar that is missing or cannot be read, VerifyError for one
    that belongs to another file, and for a file that another tool has changed.
    """
    said, path = baked.stamp.residual, baked.checkpoint.path
    if said == SAID[NONE]:
        name = show(baked.stamp.source_name)
        raise PlanError(f"{path}: has no residual (crdiff.residual is none)", f"Use the base itself, {name}.")
    if said not in SAID.values():
        raise VerifyError(f"{path}: crdiff.residual is {show(said)}, which is not known here", NEWER)
    for file in baked.checkpoint.files:
        if OUTPUT_HASH not in file.metadata:
            raise VerifyError(
                f"{file.path}: its header has no {OUTPUT_HASH}, so nothing tells whether it is whole", _BASE
            )
    look = _embedded if said == SAID[EMBED] else _beside
    return tuple(look(file) for file in baked.checkpoint.files)


def _embedded(file: SourceFile) -> Kept:
    found = {t.name: t for t in own(file.tensors)}
    if VALUES not in found:
        raise VerifyError(
            f"{file.path}: has no tensor {VALUES}, its header says that it embeds one",
            f"Another tool has left it out. {_BASE}",
        )
    size = max((t.end for t in file.tensors if t.name not in found), default=0)
    return _kept(file, file, size, size)


def _beside(file: SourceFile) -> Kept:
    path = sidecar(file.path)
    try:
        there = read_file(path, path.name)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file, where the residual of {file.path.name} should be", f"Put it there. {_BASE}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "Check its permissions.") from error
    said = file.metadata[OUTPUT_HASH]
    if OF not in there.metadata:
        raise VerifyError(f"{path}: not a residual (no {OF} in its header)", f"Put the right one there. {_BASE}")
    if (of := there.metadata[OF]) != said:
        raise VerifyError(
            f"{path}: belongs to a file that hashes to {show(of)}, the header of {file.path.name} says {said}",
            f"Put the right one there. {_BASE}",
        )
    return _kept(file, there, 0, file.data_size)


def _kept(baked: SourceFile, file: SourceFile, start: int, size: int) -> Kept:
    found = {t.name: t for t in own(file.tensors)}
    values, head = found.get(VALUES), found.get(HEAD)
    if values is None or tuple(found.values()) != specs(start, values.nbytes, head.nbytes if head else 0):
        raise VerifyError(f"{file.path}: its residual is not where crdiff puts it", f"It was changed since. {_BASE}")
    return Kept(baked, file, values, head, size)


def check(baked: BakedCheckpoint, progress: Progress) -> None:
    """Hash the files and their residuals; VerifyError for one that is not as it was written."""
    hashed = [(kept.baked, OUTPUT_HASH) for kept in find(baked)]
    hashed += [(kept.file, OWN_HASH) for kept in find(baked) if kept.file is not kept.baked]
    progress.stage("hashing", sum(file.data_size for file, _ in hashed))
    for file, key in hashed:
        check_hash(file, key, hash_data(file, progress))


def check_hash(file: SourceFile, key: str, actual: str) -> None:
    """VerifyError for a file whose bytes hash to something else than its header says under `key`."""
    if (said := file.metadata.get(key)) != f"0x{actual}":
        raise VerifyError(
            f"{file.path}: its bytes hash to 0x{actual}, its header says {show(said or 'nothing')}",
            f"It was merged, altered or damaged, and cannot be restored. {_BASE}",
        )


def head(kept: Kept) -> bytes:
    """The length and header of the base's file; VerifyError for one that is not of these tensors."""
    tensors = tuple(t for t in kept.baked.tensors if t.end <= kept.size and t.name not in (VALUES, HEAD))
    if kept.head is None:
        return safetensors.serialise(tensors, {"format": "pt"})
    raw = bytearray(kept.head.nbytes)
    with contextlib.closing(kept.file.open()) as reader:
        reader.read_into(kept.head.start, memoryview(raw))
    try:
        size = safetensors.length(bytes(raw[:8]), len(raw), str(kept.file.path))
        found = safetensors.parse(bytes(raw[8:]), len(raw) + kept.size, str(kept.file.path))
    except CheckpointError as error:
        raise VerifyError(
            f"{kept.file.path}: the header in {HEAD} is none", f"It was changed since. {_BASE}"
        ) from error
    if size + 8 != len(raw) or sorted(found.tensors, key=_name) != sorted(tensors, key=_name):
        raise VerifyError(
            f"{kept.file.path}: the header in {HEAD} is of other tensors", f"It was changed since. {_BASE}"
        )
    return bytes(raw)


def _name(tensor: TensorSpec) -> str:
    return tensor.name


class Values:
    """The values of one residual, taken from it one after another; a context that closes its file."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._reader = kept, kept.file.open()
        self._place = kept.values.start
        self._buffer = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def fill(self, weights: memoryview, dtype: str) -> None:
        """Put the next values where the weights are zero; VerifyError if there are not as many."""
        from crdiff_export.prune.kernels.pick import put, zeros

        size = zeros(weights, dtype) * dtypes.FORMATS[dtype].itemsize
        if size > self._kept.values.end - self._place:
            raise self._misfit("more")
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        self._reader.read_into(self._place, self._buffer[:size])
        put(weights, dtype, self._buffer[:size])
        self._place += size

    def finish(self) -> None:
        """VerifyError if any are left."""
        if self._place != self._kept.values.end:
            raise self._misfit("fewer")

    def _misfit(self, what: str) -> VerifyError:
        path, there = self._kept.baked.path, self._kept.values.nbytes
        return VerifyError(
            f"{path}: {what} of its weights are zero than its residual of {there} bytes has values for",
            f"It was merged, altered or damaged, and cannot be restored. {_BASE}",
        )


def dense(baked: BakedCheckpoint) -> "Iterator[tuple[Target, NDArray[np.unsignedinteger]]]":
    """Every target of the plan, in its order, with its weights as they were before pruning: raw bits, flat.

    One at a time, and without a look at the hashes, which is what `check` is for.
    """
    import numpy as np

    for number, kept in enumerate(find(baked)):
        with contextlib.closing(kept.baked.open()) as reader, Values(kept) as values:
            for target in (t for t in baked.plan.targets if t.file == number):
                start, stop = target.span(target.source)
                weights = memoryview(bytearray(stop - start))
                reader.read_into(start, weights)
                if baked.plan.scopes[target.scope].rank:
                    values.fill(weights, target.source.dtype)
                yield target, np.frombuffer(weights, f"u{target.source.itemsize}")
            values.finish()
