"""The criterion that a request names, resolved once: which weights go, and how it changes a recipe's plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from crdiff_export.errors import OptionError
from crdiff_export.formats.crdiff_keys import CalibrationStamp
from crdiff_export.models.recipe import Variant
from crdiff_export.progress import Progress
from crdiff_export.prune import criteria
from crdiff_export.prune.criteria import Calibration, Loaded, Ranked
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Plan, with_ratios

MAGNITUDE = "magnitude"
UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class CriterionChoice:
    """A criterion together with the open calibration that it ranks by, if it needs one."""

    loaded: Loaded
    calibration: Calibration | None = None

    @classmethod
    def of(cls, criterion: str, calibration: Path | None) -> Self:
        """Load a criterion and open its calibration.

        Args:
            criterion: The criterion as a user writes it, such as `wanda:compare=row`.
            calibration: The file with its statistics; None for a criterion that needs none.

        Returns:
            The criterion, ready to rank.

        Raises:
            OptionError: The criterion is unknown, or the calibration is missing or not needed.
            CalibrationError: The file is not a calibration.
        """
        loaded = criteria.load(criterion)
        if loaded.statistics and calibration is None:
            raise OptionError(
                f"{loaded.spec} needs a calibration", "Give --calibration FILE, which `crdiff calibrate` makes."
            )
        if calibration is not None and not loaded.statistics:
            raise OptionError(
                f"{loaded.spec} needs no calibration",
                "Leave --calibration out, or choose a criterion that ranks by one, such as wanda.",
            )
        return cls(loaded, None if calibration is None else Calibration.open(calibration))

    @property
    def name(self) -> str:
        """The criterion as headers spell it."""
        return str(self.loaded.spec)

    @property
    def masks(self) -> bool:
        """Whether it gives masks; magnitude and uniform give thresholds."""
        return self.loaded.criterion is not None

    @property
    def moves(self) -> bool:
        """Whether it changes weights that are not pruned, to compensate for those that are."""
        return self.loaded.moves

    def plan(self, planned: Plan) -> Plan:
        """Adapt a recipe's plan to the criterion, and add its notes.

        Raises:
            CalibrationError: The calibration does not fit the plan.
        """
        planned = _with_equal_ratios(planned) if self.name == UNIFORM else planned
        planned = replace(planned, variant=_without_foreign_evidence(planned.variant, self.name, self.calibration))
        if self.calibration is None:
            return planned
        notes = self.calibration.check(planned, self.loaded.statistics)
        return replace(planned, notes=(*planned.notes, *notes))

    def rank(self, plans: Sequence[Plan], kernel: Kernel, progress: Progress, device: str) -> Ranked:
        """Rank the weights of plans that share their checkpoint and cast.

        Args:
            plans: The plans.
            kernel: Counts magnitudes.
            progress: Told of the bytes read.
            device: The torch device on which scores are computed.

        Returns:
            The ranked weights, which decide for any ratios.
        """
        return criteria.rank(plans, self.loaded, kernel, progress, calibration=self.calibration, device=device)

    def calibrated(self, progress: Progress) -> CalibrationStamp | None:
        """Return the header's record of the calibration, whose file is read for its hash."""
        found = self.calibration
        if found is None:
            return None
        progress.stage("hashing", found.nbytes)
        return CalibrationStamp(found.hashed(progress), found.size)


def _with_equal_ratios(planned: Plan) -> Plan:
    """Give all groups the same ratio, so that as many weights are pruned as with the variant's own ratios."""
    ratios = {planned.ratio(group) for group in planned.groups}
    counts = {group: sum(s.count for s in planned.scopes if s.group == group) for group in planned.groups}
    if len(ratios) == 1 or not any(counts.values()):
        return planned
    mean = math.fsum(planned.ratio(group) * count for group, count in counts.items()) / sum(counts.values())
    equal = with_ratios(planned, dict.fromkeys(planned.groups, mean))
    said = "/".join(f"{planned.ratio(group):g}" for group in planned.groups)
    variant = replace(
        equal.variant, provenance="starting-point", source=f"mean of {said} ({planned.variant.source})",
        prompt=None, evidence=None,
    )  # fmt: skip
    return replace(equal, variant=variant)


def _without_foreign_evidence(variant: Variant, criterion: str, calibration: Calibration | None) -> Variant:
    """Drop provenance and evidence of numbers that were found with another criterion or calibration.

    A recipe names both in its evidence; without a name it was magnitude. Equal ratios for all groups belong to uniform
    as well.
    """
    evidence = variant.evidence
    if evidence is None and variant.provenance == "starting-point":
        return variant
    theirs = _canonical(str(evidence.extra.get("criterion", MAGNITUDE)) if evidence else MAGNITUDE)
    alike = {theirs, criterion} <= {MAGNITUDE, UNIFORM} and len(set(variant.ratios.values())) == 1
    measured = evidence.extra.get("calibration") if evidence else None
    other = calibration is not None and measured is not None and measured != calibration.hash
    if (theirs == criterion or alike) and not other:
        return variant
    if variant.provenance == "starting-point":  # it was measured, but not searched for
        return replace(variant, evidence=None)
    source = f"{variant.source}; found with {theirs}{' by another calibration' if other else ''}"
    return replace(variant, provenance="starting-point", source=source, prompt=None, evidence=None)


def _canonical(spec: str) -> str:
    """Return the canonical spelling of a criterion, or the text itself if its package is not installed."""
    try:
        return str(Spec.parse(spec))
    except OptionError:
        return spec
