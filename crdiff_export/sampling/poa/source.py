"""Where the dense and the pruned weights of POA come from: one type, made in three ways.

`from_baked`: thresholds from a baked file's header, or masks from its zeros, for the base in memory. `from_baked` of a
file with its residual: for the base or the file itself in memory. `from_recipe`: thresholds or masks found as an export
finds them, nothing written; `Counted` gives them for any ratios.
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
from crdiff_export.sampling.poa.masks import Masks
from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH, BakedCheckpoint, open_baked, read_decision


@dataclass(frozen=True)
class Source:
    """What is needed for POA besides one copy of the weights.

    `plan` reads the checkpoint that a model in memory is held against: the pruned one if `baked` is there, else the
    base. `weight` is the one that the file or the recipe recommends. `notes` are what only the ranking has shown.
    """

    masks: Masks
    plan: Plan
    weight: float
    base: str
    baked: BakedCheckpoint | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The checkpoint that `plan` reads."""
        return self.plan.checkpoint.path

    @property
    def has_residual(self) -> bool:
        """Whether the dense weights can be had from the pruned ones."""
        return self.baked is not None and self.baked.stamp.residual != "none"


def from_baked(path: str | Path, base: str | None = None, progress: Progress | None = None) -> Source:
    """Thresholds from the header of a baked file or folder; where it has none, masks from its zeros, which are read.

    Of a file with moved weights its pruned layers are held. With `base`, its hash is held against the one in the
    header; PoaError if it is another. CheckpointError for a file that crdiff has not made, VerifyError for one that was
    changed.
    """
    baked = open_baked(Path(path).expanduser())
    if base is not None:
        _check_base(baked, base, progress or Silent())
    stamp = baked.stamp
    masks = Masks.of(baked.plan, read_decision(baked, progress))
    return Source(masks, baked.plan, stamp.poa_weight, stamp.source_name, baked)


def from_recipe(request: ExportRequest, progress: Progress | None = None) -> Source:
    """The thresholds or masks that an export of `request` would find; its weights are read, nothing is written."""
    if request.dtype:
        raise PoaError(f"a cast to {request.dtype} is not for POA", "Load the model in that dtype instead.")
    base = bases.locate(request.base, request.variant)
    criterion, shown = CriterionChoice.of(request.criterion, request.calibration), progress or Silent()
    plan = plan_variant(request, base.open(request.variant), criterion)
    kernel = kernels.load(request.device, request.threads)
    decided = criterion.rank([plan], kernel, shown, request.device).decide(plan, shown)
    return Source(Masks.of(plan, decided), plan, plan.variant.poa_weight, base.name, notes=decided.notes)


class Counted:
    """A base whose weights have been ranked once, which gives the source of any ratios by a look-up.

    What goes is what an export with `criterion`, which is magnitude by default, prunes. The plans, of
    one checkpoint, say which layers may be pruned; their ratios do not matter. `device` is torch's, for criteria with
    scores.
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
        # At a ratio of 0 nothing would be read.
        every = [with_ratios(plan, {group: plan.ratio(group) or 0.5 for group in plan.groups}) for plan in plans]
        kernel, shown = kernels.load("cpu", None), progress or Silent()
        self._ranked: criteria.Ranked
        if criterion and criterion.masks:
            self._ranked = criterion.rank(every, kernel, shown, device)
        else:  # thresholds are looked up, where their ratios are known
            self._ranked = magnitude.RankedMagnitudes(every, kernel, shown, refined=False)

    def source(self, plan: Plan, weight: float = 1.0) -> Source:
        """The source of a plan whose layers were ranked; at least one of its ratios prunes something.

        Thresholds of an F32 checkpoint take another look at its weights, unless these ratios were asked for before; so
        do masks where their scores do not fit into memory. Masks are freed with the source.
        """
        decided = self._ranked.decide(plan)
        return Source(Masks.of(plan, decided), plan, weight, self._base, notes=decided.notes)


def _check_base(baked: BakedCheckpoint, base: str, progress: Progress) -> None:
    located = bases.locate(base)
    files = located.open(None).files
    for file, made in zip(files, baked.checkpoint.files, strict=False):
        data, whole = made.metadata.get(DATA_HASH), made.metadata.get(FILE_HASH)
        if not (data or whole):
            raise PoaError(
                f"{made.path}: its header has no hash of its base (--no-hash)",
                "Leave the base out: a pipeline's weights are compared with the file's own, too.",
            )
        progress.stage("hashing", file.data_size)
        actual = "0x" + (hash_data(file, progress) if data else hash_file(file.path, progress))
        if actual != (data or whole):
            raise PoaError(
                f"{file.path}: hashes to {actual}, the base of {made.path.name} to {data or whole}",
                "Give the base that the file was made from; `crdiff inspect` names it.",
            )
    if len(files) != len(baked.checkpoint.files):
        raise PoaError(
            f"{located.path}: has {len(files)} files of weights, {baked.checkpoint.path} {len(baked.checkpoint.files)}",
            "Give the base that the file was made from; `crdiff inspect` names it.",
        )
