"""The source of POA's pruned weights: a baked file, a recipe, or a ranking of a base's weights.

`from_baked` takes thresholds from a file's header, or masks from its zeros, for the base in memory; with a residual,
for the file itself in memory, too. `from_recipe` ranks the weights as an export does and writes nothing.
`BaseRanking` ranks them once for many ratios.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.errors import PoaError
from crdiff_export.export import ExportRequest, plan_variant
from crdiff_export.formats.hashing import hash_data, hash_file
from crdiff_export.hub import bases
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import criteria, kernels
from crdiff_export.prune.criteria import magnitude
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, with_ratios
from crdiff_export.prune.ranking import rank
from crdiff_export.sampling.poa.masks import Masks
from crdiff_export.verify import DATA_HASH, FILE_HASH, BakedCheckpoint, open_baked, read_decision
from crdiff_export.verify.compare_base import in_layout_of


@dataclass(frozen=True)
class Source:
    """Everything that POA needs beside one copy of the weights.

    Attributes:
        masks: The parts of each pruned weight.
        plan: A plan of the checkpoint that a model in memory is compared with: the baked file if there is one, else
            the base.
        weight: The POA weight that the file or the recipe recommends.
        base: The name of the base.
        baked: The baked file, if any.
        notes: Notes of the ranking.
    """

    masks: Masks
    plan: Plan
    weight: float
    base: str
    baked: BakedCheckpoint | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The checkpoint of the plan."""
        return self.plan.checkpoint.path

    @property
    def has_residual(self) -> bool:
        """Whether a residual restores the dense weights from the pruned ones."""
        return self.baked is not None and self.baked.stamp.residual != "none"


def from_baked(path: str | Path, base: str | None = None, progress: Progress | None = None) -> Source:
    """Make the source of a baked file.

    Thresholds are read from its header. Without thresholds, the zeros of its pruned layers are read; with moved
    weights, these layers stay in memory.

    Args:
        path: A baked file or folder.
        base: The base that it should be made from; its hash is compared with the header's.
        progress: Told of the bytes that are hashed and read.

    Returns:
        The source.

    Raises:
        PoaError: The file was made from another base.
        CheckpointError: The file was not made by crdiff.
        VerifyError: The file was changed after crdiff wrote it.

    """
    baked = open_baked(Path(path).expanduser())
    if base is not None:
        _check_base(baked, base, progress or Silent())
    stamp = baked.stamp
    masks = Masks.of(baked.plan, read_decision(baked, progress))
    return Source(masks, baked.plan, stamp.poa_weight, stamp.source_name, baked)


def from_recipe(request: ExportRequest, progress: Progress | None = None) -> Source:
    """Make the source of an export that is not written.

    Args:
        request: The export; its output is not needed.
        progress: Told of the bytes that are read.

    Returns:
        The source, with the thresholds or masks that the export would use.

    Raises:
        PoaError: The request has a cast.

    """
    if request.dtype:
        raise PoaError(f"a cast to {request.dtype} is not for POA", "Load the model in that dtype instead.")
    base = bases.locate(request.base, request.variant)
    criterion, shown = CriterionChoice.of(request.criterion, request.calibration), progress or Silent()
    plan = plan_variant(request, base.open(request.variant), criterion)
    kernel = kernels.load(request.device, request.threads)
    decided = rank(criterion, [plan], kernel, shown, request.device).decide(plan, shown)
    return Source(Masks.of(plan, decided), plan, plan.variant.poa_weight, base.name, notes=decided.notes)


class BaseRanking:
    """The weights of a base, ranked once, which gives sources for any ratios.

    Args:
        plans: Plans of one checkpoint. They decide which layers may be pruned; their ratios do not matter.
        base: The name of the base.
        progress: Told of the bytes that are read.
        criterion: The criterion that ranks; magnitude by default.
        device: torch's name of the device that computes scores.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        base: str,
        progress: Progress | None = None,
        *,
        criterion: CriterionChoice | None = None,
        device: str = "cpu",
    ) -> None:
        self._base = base
        # Layers with a ratio of 0 would not be read.
        every = [with_ratios(plan, {group: plan.ratio(group) or 0.5 for group in plan.groups}) for plan in plans]
        kernel, shown = kernels.load("cpu", None), progress or Silent()
        self._ranked: criteria.Ranked
        if criterion and criterion.masks:
            self._ranked = rank(criterion, every, kernel, shown, device)
        else:  # the ranking counts magnitudes, and looks up the threshold of a ratio in them
            self._ranked = magnitude.RankedMagnitudes(every, kernel, shown, refined=False)

    def source(self, plan: Plan, weight: float = 1.0) -> Source:
        """Make the source of a plan whose layers were ranked.

        New ratios of an F32 checkpoint read its weights again, and so do masks whose scores do not fit into memory.
        Masks are freed with the source.

        Args:
            plan: The plan; at least one of its ratios is above 0.
            weight: The POA weight that the source recommends.

        Returns:
            The source.

        """
        decided = self._ranked.decide(plan)
        return Source(Masks.of(plan, decided), plan, weight, self._base, notes=decided.notes)


def _check_base(baked: BakedCheckpoint, base: str, progress: Progress) -> None:
    variant = baked.stamp.source_variant
    located = bases.locate(base, variant)
    files = in_layout_of(baked, located.open(variant)).files
    for file, output in zip(files, baked.checkpoint.files, strict=False):
        data, whole = output.metadata.get(DATA_HASH), output.metadata.get(FILE_HASH)
        if not (data or whole):
            raise PoaError(
                f"{output.path}: its header has no hash of its base (--no-hash)",
                "Leave the base out: a pipeline's weights are compared with the file's own, too.",
            )
        if file.parts and not data:
            raise PoaError(
                f"{file.path}: has another layout than {output.path.name}, which only has the hash of a whole file",
                "Leave the base out: a pipeline's weights are compared with the file's own, too.",
            )
        progress.stage("hashing", file.data_size)
        actual = "0x" + (hash_data(file, progress) if data else hash_file(file.path, progress))
        if actual != (data or whole):
            raise PoaError(
                f"{file.path}: hashes to {actual}, the base of {output.path.name} to {data or whole}",
                "Give the base that the file was made from; `crdiff inspect` names it.",
            )
    if len(files) != len(baked.checkpoint.files):
        raise PoaError(
            f"{located.path}: has {len(files)} files of weights, {baked.checkpoint.path} {len(baked.checkpoint.files)}",
            "Give the base that the file was made from; `crdiff inspect` names it.",
        )
