"""The plan of an export, made from names, shapes and options before the first weight is read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from crdiff_export.errors import FamilyError, OptionError, PlanError, RecipeError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.crdiff_keys import PACK
from crdiff_export.formats.dtypes import FORMATS, Encoding
from crdiff_export.formats.safetensors import BITS, TensorSpec, show
from crdiff_export.formats.weight_file import Bytes, SourceFile
from crdiff_export.models import families
from crdiff_export.models.families import Family, FamilyLayer, Match, Quantisation
from crdiff_export.models.recipe import Variant
from crdiff_export.prune import threshold
from crdiff_export.prune.scaled_fp8 import read_scales
from crdiff_export.sizes import Size

# Dtypes that `--dtype` casts; flags, ids and other integers stay as they are.
CASTABLE = ("F64", *FORMATS)


class TooWideError(PlanError):
    """A dtype that can be pruned only after a cast, which an export can do but a pipeline cannot."""


@dataclass(frozen=True, slots=True)
class Target:
    """One layer's weight to prune: elements `start:stop` of a tensor, which are whole rows.

    A weight that has a `scale` is the stored number times it (`scaled_fp8.py`).
    """

    file: int
    source: TensorSpec
    output: TensorSpec
    layer: FamilyLayer
    start: int
    stop: int
    scope: int
    scale: float | None = None

    @property
    def encoding(self) -> Encoding:
        """How its weights are written."""
        return Encoding(self.output.dtype, self.scale)

    @property
    def name(self) -> str:
        """The tensor's name, with the range of rows if it is not the whole tensor."""
        if self.count == self.source.count:
            return self.source.name
        columns = self.source.shape[-1]
        return f"{self.source.name}[{self.start // columns}:{self.stop // columns}]"

    @property
    def count(self) -> int:
        """The number of weights."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        columns = self.source.shape[-1]
        return self.count // columns, columns

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the base."""
        return self.count * self.source.itemsize

    def span(self, tensor: TensorSpec) -> tuple[int, int]:
        """Return the range of its bytes in the data section of `tensor`, which is its source or its output."""
        return tensor.start + self.start * tensor.itemsize, tensor.start + self.stop * tensor.itemsize


@contextmanager
def open_targets(checkpoint: Checkpoint) -> Iterator[Callable[[Target], memoryview]]:
    """Give a function that reads a target's bytes from a checkpoint; it opens each file once."""
    readers: dict[int, Bytes] = {}
    with ExitStack() as stack:

        def read(target: Target) -> memoryview:
            if target.file not in readers:
                readers[target.file] = stack.enter_context(closing(checkpoint.files[target.file].open()))
            start, stop = target.span(target.source)
            data = memoryview(bytearray(stop - start))
            readers[target.file].read_into(start, data)
            return data

        yield read


@dataclass(frozen=True, slots=True)
class Scope:
    """Weights that share one threshold: a group of blocks (UNet) or one layer (transformers)."""

    name: str
    group: str
    ratio: float
    count: int

    @property
    def rank(self) -> int:
        """k: the threshold is the k-th smallest magnitude; 0 prunes nothing."""
        return threshold.rank(self.ratio, self.count)


@dataclass(frozen=True, slots=True)
class Run:
    """Output bytes `start:stop` are the source's bytes from `source` on, cast if `cast` is (from, to)."""

    start: int
    stop: int
    source: int
    tensor: str = ""
    cast: tuple[str, str] | None = None


@dataclass(frozen=True)
class OutputFile:
    """One file to write: the source's tensors at their places in the output, in the order of the source's header."""

    source: SourceFile
    tensors: tuple[TensorSpec, ...]
    runs: tuple[Run, ...]

    @cached_property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return max((t.end for t in self.tensors), default=0)


@dataclass(frozen=True)
class Plan:
    """What an export does: which weights are candidates, how many of them are pruned, and where all bytes go.

    Attributes:
        checkpoint: The base.
        match: Its family, layout and prefix.
        size: The target size.
        variant: The ratios and the POA weight.
        recipe: The name of the recipe.
        kinds: The kinds of layers that are pruned.
        scopes: Sets of weights with one threshold each.
        targets: The weights to prune, in the order of files, bytes and rows.
        outputs: The files to write.
        cast: The safetensors dtype of all float tensors in the output; None keeps each one's own.
        allow_nonfinite: Whether targets may hold infinite weights and NaN.
        notes: What the user should know.
        native: The size that the user says the base was trained at; None to look for it in the base.
    """

    checkpoint: Checkpoint
    match: Match
    size: Size
    variant: Variant
    recipe: str
    kinds: tuple[str, ...]
    scopes: tuple[Scope, ...]
    targets: tuple[Target, ...]
    outputs: tuple[OutputFile, ...]
    cast: str | None = None
    allow_nonfinite: bool = False
    notes: tuple[str, ...] = ()
    native: Size | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The family's groups, in order."""
        return self.match.family.groups

    def unchanged(self, file: int) -> int:
        """Return how many bytes at the start of a file's data section are the source's, whatever the thresholds."""
        output = self.outputs[file]
        if any(run.cast for run in output.runs):
            return 0
        starts = (t.span(t.output)[0] for t in self.targets if t.file == file and self.scopes[t.scope].rank)
        return min(starts, default=output.data_size)

    def ratio(self, group: str) -> float:
        """Return the requested ratio of a group."""
        return float(self.variant.ratios[group])

    @property
    def has_scales(self) -> bool:
        """Whether weights of its targets have a scale (scaled fp8)."""
        return any(target.scale is not None for target in self.targets)

    @cached_property
    def data_size(self) -> int:
        """Bytes of tensors to write."""
        return sum(o.data_size for o in self.outputs)


def with_ratios(plan: Plan, ratios: Mapping[str, float]) -> Plan:
    """Change the ratios of a plan.

    Args:
        plan: The plan.
        ratios: The new ratio of each group.

    Returns:
        A new plan.
    """
    scopes = tuple(replace(scope, ratio=float(ratios[scope.group])) for scope in plan.scopes)
    return replace(plan, scopes=scopes, variant=replace(plan.variant, ratios=dict(ratios)))


def quantisation(checkpoint: Checkpoint, prefix: str = "") -> Quantisation | None:
    """Recognise quantised weights.

    Args:
        checkpoint: The checkpoint.
        prefix: Only tensors with this prefix count.

    Returns:
        The kind of quantisation and the key that shows it; None for plain weights.
    """
    for file in checkpoint.files:
        names = (t.name for t in file.tensors if t.name.startswith(prefix))
        if kind := families.quantisation(names, file.metadata):
            return kind
    return None


def recognise(checkpoint: Checkpoint, family: Family | None = None) -> Match:
    """Recognise the family of a checkpoint, and refuse one that must not be pruned.

    A quantised text encoder beside a plain UNet is allowed.

    Args:
        checkpoint: The checkpoint.
        family: The family that it is to be of; None for any that is built in or installed.

    Returns:
        The family, layout and prefix.

    Raises:
        FamilyError: No family matches.
        PlanError: The checkpoint is quantised other than by scales, was pruned by crdiff before, or is a pack.
    """
    if any(PACK in file.metadata for file in checkpoint.files):
        raise PlanError(f"{checkpoint.path}: a pack, which has no weights", "Give its base, and the pack with --pack.")
    if any("crdiff.schema" in file.metadata for file in checkpoint.files):
        raise PlanError(
            f"{checkpoint.path}: its header says that crdiff pruned it",
            "Export from the base, which `crdiff inspect` names. If `crdiff verify` finds that the weights are others, "
            "as after a merge, save the file without its crdiff.* keys.",
        )
    try:
        match = families.detect(checkpoint.shapes, family)
    except FamilyError as error:
        # Quantised layers have other names and shapes than the family's.
        _refuse_quantised(checkpoint, "")
        raise FamilyError(f"{checkpoint.path}: {error.message}", error.hint) from error
    _refuse_quantised(checkpoint, match.prefix)
    return match


def _refuse_quantised(checkpoint: Checkpoint, prefix: str) -> None:
    quantised = quantisation(checkpoint, prefix)
    if quantised and not quantised.scaled:
        raise PlanError(
            f"{checkpoint.path}: quantised weights {quantised}",
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
    """Plan an export.

    Args:
        checkpoint: The base.
        match: Its family, layout and prefix.
        size: The target size.
        variant: The ratios and the POA weight.
        recipe: The name of the recipe.
        kinds: The kinds of layers to prune; by default the variant's or the family's.
        cast: The safetensors dtype of all float tensors in the output; None keeps each one's own.
        allow_nonfinite: Whether targets may hold infinite weights and NaN.
        notes: What the user should know.

    Returns:
        The plan.

    Raises:
        OptionError: The family has no such layers.
        PlanError: A target's dtype or quantisation cannot be pruned, or a cast would change quantised weights.
    """
    if cast and (quantised := quantisation(checkpoint)):
        message = f"{checkpoint.path}: --dtype would change quantised weights ({quantised.kind})"
        raise PlanError(message, "Leave --dtype out.")
    chosen = _kinds(match, kinds, variant, recipe)
    outputs = tuple(_output(file, cast) for file in checkpoint.files)
    names = dict.fromkeys(match.prefix + layer.tensor for layer in match.layout.layers if layer.kind in chosen)
    scales = read_scales(checkpoint, match.prefix, names)
    targets, scopes = _targets(outputs, match, chosen, variant.ratios, scales)
    ema = (
        [f"{match.ema_tensors} tensors of an EMA copy (model_ema.*) are left as they are"] if match.ema_tensors else []
    )
    sparse = [f"{f.path.name} is mostly a hole: its weights read as zeros" for f in checkpoint.files if f.is_sparse]
    return Plan(
        checkpoint, match, size, variant, recipe, chosen, scopes, targets, outputs, cast, allow_nonfinite,
        (*checkpoint.notes, *checkpoint.copy_notes, *notes, *ema, *sparse),
    )  # fmt: skip


def _kinds(match: Match, kinds: Sequence[str] | None, variant: Variant, recipe: str) -> tuple[str, ...]:
    """Choose the user's kinds of layers, or the variant's, or else the family's."""
    family, requested = match.family, kinds or variant.targets
    if not requested:
        return family.default_kinds
    for kind in requested:
        if kind not in family.kinds:
            message, hint = f"{family.title} has no {show(kind)} targets", f"It has: {', '.join(family.kinds)}"
            if kinds:
                raise OptionError(message, f"{hint} (--targets).")
            raise RecipeError(f"{recipe}, {variant.resolution}: {message}", f"{hint}.")
    return tuple(kind for kind in family.kinds if kind in requested)


def _targets(
    outputs: Sequence[OutputFile],
    match: Match,
    kinds: Sequence[str],
    ratios: Mapping[str, float],
    scales: Mapping[str, float],
) -> tuple[tuple[Target, ...], tuple[Scope, ...]]:
    """List the targets in the order of files, bytes and rows, which is the order of lists in the header."""
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
            for layer in sorted(layers.get(source.name, ()), key=lambda layer: layer.part.first if layer.part else 0):
                _check_target(output.source, written[source.name])
                start, stop = (row * source.shape[1] for row in layer.rows(source.shape))
                scope = len(targets) if per_layer else number[layer.group]
                scale = scales.get(source.name)
                targets.append(Target(file, source, written[source.name], layer, start, stop, scope, scale))
    if per_layer:
        scopes = [Scope(t.name, t.layer.group, float(ratios[t.layer.group]), t.count) for t in targets]
    else:
        counts = {g: sum(t.count for t in targets if t.layer.group == g) for g in match.family.groups}
        scopes = [Scope(g, g, float(ratios[g]), counts[g]) for g in match.family.groups]
    return tuple(targets), tuple(scopes)


def _check_target(file: SourceFile, tensor: TensorSpec) -> None:
    if tensor.dtype not in FORMATS:
        message = f"{file.path}: {show(tensor.name)} is {tensor.dtype}, which cannot be pruned"
        may = f"Targets may be {', '.join(FORMATS)};"
        if tensor.dtype in CASTABLE:
            raise TooWideError(message, f"{may} --dtype casts it.")
        raise PlanError(message, f"{may} export from the checkpoint before it was quantised.")


def _output(file: SourceFile, cast: str | None) -> OutputFile:
    """Place every tensor of a file in the output; without a cast nothing moves."""
    if cast is None:
        return OutputFile(file, file.tensors, (Run(0, file.data_size, 0),) if file.data_size else ())
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
    return OutputFile(file, tuple(placed[t.name] for t in file.tensors), tuple(runs))
