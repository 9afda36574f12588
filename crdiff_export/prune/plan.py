"""What an export will do, decided from names, shapes and flags alone, before the first weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from crdiff_export.errors import FamilyError, PlanError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.formats.safetensors import BITS, TensorSpec, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.models import families
from crdiff_export.models.families import FamilyLayer, Match
from crdiff_export.models.recipe import Variant
from crdiff_export.prune import threshold
from crdiff_export.sizes import Size

# Tensors that `--dtype` casts; flags, ids and everything else that is no float stay.
CASTABLE = ("F64", *FORMATS)


class TooWideError(PlanError):
    """A dtype that is pruned only after a cast: an export can cast, a model that is drawn with is pruned as it is."""


@dataclass(frozen=True, slots=True)
class Target:
    """One weight to prune, or a run of its rows: `start:stop` are elements of the tensor."""

    file: int
    source: TensorSpec
    output: TensorSpec
    group: str
    kind: str
    start: int
    stop: int
    scope: int

    @property
    def name(self) -> str:
        """The tensor's name, with the rows where they are not all."""
        columns = self.source.shape[-1]
        whole = (self.start, self.stop) == (0, self.source.count)
        return self.source.name if whole else f"{self.source.name}[{self.start // columns}:{self.stop // columns}]"

    @property
    def count(self) -> int:
        """The number of weights."""
        return self.stop - self.start

    def span(self, tensor: TensorSpec) -> tuple[int, int]:
        """Its bytes in the data section that holds `tensor`, which is the source or the output."""
        return tensor.start + self.start * tensor.itemsize, tensor.start + self.stop * tensor.itemsize


@dataclass(frozen=True, slots=True)
class Scope:
    """Weights that share one threshold: a group of blocks (UNet), or one layer (DiT)."""

    name: str
    group: str
    ratio: float
    count: int

    @property
    def rank(self) -> int:
        """k: the threshold is the k-th smallest magnitude; 0 leaves the scope alone."""
        return threshold.rank(self.ratio, self.count)


@dataclass(frozen=True, slots=True)
class Run:
    """Output bytes `start:stop` come from the source's from `source` on, cast where `cast` gives (from, to)."""

    start: int
    stop: int
    source: int
    tensor: str = ""
    cast: tuple[str, str] | None = None


@dataclass(frozen=True)
class Output:
    """One file to write: the source's tensors at their output places, in the order of the source's header."""

    source: SourceFile
    tensors: tuple[TensorSpec, ...]
    runs: tuple[Run, ...]

    @cached_property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return max((t.end for t in self.tensors), default=0)


@dataclass(frozen=True)
class Plan:
    """The whole job."""

    checkpoint: Checkpoint
    match: Match
    size: Size
    variant: Variant
    recipe: str
    kinds: tuple[str, ...]
    scopes: tuple[Scope, ...]
    targets: tuple[Target, ...]
    outputs: tuple[Output, ...]
    cast: str | None = None
    allow_nonfinite: bool = False
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """The family's groups, in order."""
        return self.match.family.groups

    def unchanged(self, file: int) -> int:
        """How many bytes at the start of a file's data section are the source's, whatever the thresholds will be."""
        output = self.outputs[file]
        if any(run.cast for run in output.runs):
            return 0
        starts = (t.span(t.output)[0] for t in self.targets if t.file == file and self.scopes[t.scope].rank)
        return min(starts, default=output.data_size)

    def ratio(self, group: str) -> float:
        """The share of a group's weights that is asked for."""
        return float(self.variant.ratios[group])

    @cached_property
    def data_size(self) -> int:
        """Bytes of tensors to write."""
        return sum(o.data_size for o in self.outputs)


def with_ratios(plan: Plan, ratios: Mapping[str, float]) -> Plan:
    """The same plan with other ratios for its groups."""
    scopes = tuple(replace(scope, ratio=float(ratios[scope.group])) for scope in plan.scopes)
    return replace(plan, scopes=scopes, variant=replace(plan.variant, ratios=dict(ratios)))


def quantisation(checkpoint: Checkpoint, prefix: str = "") -> str | None:
    """How the weights behind `prefix` are quantised and the key that shows it; None where they are not."""
    for file in checkpoint.files:
        names = (t.name for t in file.tensors if t.name.startswith(prefix))
        if found := families.quantisation(names, file.metadata):
            return found
    return None


def recognise(checkpoint: Checkpoint) -> Match:
    """What the checkpoint is; FamilyError if nobody knows, PlanError if it must not be pruned.

    A quantised text encoder beside a plain UNet does no harm.
    """
    if any("crdiff.schema" in file.metadata for file in checkpoint.files):
        raise PlanError(
            f"{checkpoint.path}: already pruned by crdiff",
            "Export from the base that it was made from; `crdiff inspect` names it.",
        )
    try:
        match = families.detect(checkpoint.shapes)
    except FamilyError:
        # Quantised layers have other names and shapes than the family's.
        _refuse_quantised(checkpoint, "")
        raise
    _refuse_quantised(checkpoint, match.prefix)
    return match


def _refuse_quantised(checkpoint: Checkpoint, prefix: str) -> None:
    if found := quantisation(checkpoint, prefix):
        raise PlanError(
            f"{checkpoint.path}: quantised weights ({found}) cannot be pruned by magnitude",
            "Export from the fp16 or bf16 checkpoint, then quantise the result.",
        )


def make(
    checkpoint: Checkpoint,
    match: Match,
    size: Size,
    variant: Variant,
    recipe: str,
    *,
    kinds: Sequence[str] | None = None,
    cast: str | None = None,
    allow_nonfinite: bool = False,
    notes: Sequence[str] = (),
) -> Plan:
    """Plan an export of `variant` for `size`; PlanError for all that can be known before a weight is read.

    `cast` is a safetensors dtype that every float tensor gets; None keeps each as it is.
    """
    chosen = _kinds(match, kinds or variant.targets)
    outputs = tuple(_output(file, cast) for file in checkpoint.files)
    targets, scopes = _targets(outputs, match, chosen, variant.ratios)
    seen = (
        [f"{match.ema_tensors} tensors of an EMA copy (model_ema.*) are left as they are"] if match.ema_tensors else []
    )
    sparse = [f"{f.path.name} is mostly a hole: its weights read as zeros" for f in checkpoint.files if f.is_sparse]
    return Plan(
        checkpoint, match, size, variant, recipe, chosen, scopes, targets, outputs, cast, allow_nonfinite,
        (*checkpoint.notes, *notes, *seen, *sparse),
    )  # fmt: skip


def _kinds(match: Match, asked: Sequence[str] | None) -> tuple[str, ...]:
    family = match.family
    if asked is None:
        return tuple(family.default_kinds)
    for kind in asked:
        if kind not in family.kinds:
            raise PlanError(
                f"{family.title} has no {show(kind)} targets", f"It has: {', '.join(family.kinds)} (--targets)."
            )
    if not asked:
        raise PlanError("no targets are asked for", f"Give some of: {', '.join(family.kinds)} (--targets).")
    return tuple(kind for kind in family.kinds if kind in asked)


def _targets(
    outputs: Sequence[Output], match: Match, kinds: Sequence[str], ratios: Mapping[str, float]
) -> tuple[tuple[Target, ...], tuple[Scope, ...]]:
    """Every target in the order of the bytes: shard by name, place, row. The header's lists use this order."""
    layers: dict[str, list[FamilyLayer]] = {}
    for layer in match.layout.layers:
        if layer.kind in kinds:
            layers.setdefault(match.prefix + layer.tensor, []).append(layer)
    per_layer = match.family.scope == "layer"
    number = {group: i for i, group in enumerate(match.family.groups)}
    written = {t.name: t for output in outputs for t in output.tensors}
    targets: list[Target] = []
    for file, output in enumerate(outputs):
        for source in output.source.by_offset:
            for layer in sorted(layers.get(source.name, ()), key=lambda layer: layer.part or 0):
                _check_target(output.source, written[source.name])
                start, stop = _rows(source, layer)
                scope = len(targets) if per_layer else number[layer.group]
                targets.append(Target(file, source, written[source.name], layer.group, layer.kind, start, stop, scope))
    if per_layer:
        scopes = [Scope(t.name, t.group, float(ratios[t.group]), t.count) for t in targets]
    else:
        counts = {g: sum(t.count for t in targets if t.group == g) for g in match.family.groups}
        scopes = [Scope(g, g, float(ratios[g]), counts[g]) for g in match.family.groups]
    return tuple(targets), tuple(scopes)


def _rows(tensor: TensorSpec, layer: FamilyLayer) -> tuple[int, int]:
    if layer.part is None:
        return 0, tensor.count
    square = tensor.shape[1] * tensor.shape[1]
    return layer.part * square, (layer.part + 1) * square


def _check_target(file: SourceFile, tensor: TensorSpec) -> None:
    if tensor.dtype not in FORMATS:
        message = f"{file.path}: {show(tensor.name)} is {tensor.dtype}, which cannot be pruned"
        may = f"Targets may be {', '.join(FORMATS)};"
        if tensor.dtype in CASTABLE:
            raise TooWideError(message, f"{may} --dtype casts it.")
        raise PlanError(message, f"{may} export from the checkpoint before it was quantised.")


def _output(file: SourceFile, cast: str | None) -> Output:
    """Where every tensor of a file goes. Without a cast that is where it was."""
    if cast is None:
        return Output(file, file.tensors, (Run(0, file.data_size, 0),) if file.data_size else ())
    placed: dict[str, TensorSpec] = {}
    runs: list[Run] = []
    position = 0
    for t in file.by_offset:
        dtype = cast if t.dtype in CASTABLE else t.dtype
        end = position + (t.count * BITS[dtype] + 7) // 8
        placed[t.name] = TensorSpec(t.name, dtype, t.shape, position, end)
        if end > position:
            runs.append(Run(position, end, t.start, t.name, None if dtype == t.dtype else (t.dtype, dtype)))
        position = end
    return Output(file, tuple(placed[t.name] for t in file.tensors), tuple(runs))
