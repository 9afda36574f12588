"""The criterion that a request names, resolved once: which weights go, and how it changes a recipe's plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.errors import CriterionError, OptionError, PlanError, foreign_errors
from crdiff_export.formats.crdiff_keys import CalibrationStamp
from crdiff_export.models.recipe import START_POA_WEIGHT, Variant
from crdiff_export.progress import Progress
from crdiff_export.prune.criteria import Calibration, Criterion
from crdiff_export.prune.criteria.spec import GROUP, MAGNITUDES, SCORED, Spec, installed
from crdiff_export.prune.plan import Plan, with_ratios

if TYPE_CHECKING:
    from typing import Self

MAGNITUDE = "magnitude"
UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class CriterionChoice:
    """A criterion with its options, and the open calibration that it ranks by, if it needs one.

    Attributes:
        spec: Its name and options.
        criterion: What gives the scores; None for magnitude and uniform, which rank by |w|.
        calibration: The statistics for the scores.
    """

    spec: Spec
    criterion: Criterion | None = None
    calibration: Calibration | None = None

    @classmethod
    def load(cls, text: str) -> "Self":
        """Load a criterion by its name and options, without a calibration.

        Raises:
            OptionError: The name or an option is unknown, or the package of the criterion is broken.
        """
        spec = Spec.parse(text)
        if spec.name in MAGNITUDES:
            return cls(spec)
        built_in = SCORED.get(spec.name)
        return cls(spec, _make(EntryPoint(spec.name, built_in, GROUP) if built_in else installed()[spec.name], spec))

    @classmethod
    def of(cls, criterion: str, calibration: Path | None) -> "Self":
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
        choice = cls.load(criterion)
        choice.check_calibration(given=calibration is not None)
        return choice if calibration is None else replace(choice, calibration=Calibration.open(calibration))

    def check_calibration(self, *, given: bool) -> None:
        """Check that there is a calibration where one is needed, and nowhere else.

        Args:
            given: Whether there is one.

        Raises:
            OptionError: It is missing, or not needed.
        """
        if self.statistics and not given:
            raise OptionError(
                f"{self.name} needs a calibration", "Make one with `crdiff calibrate` and give it as calibration."
            )
        if given and not self.statistics:
            raise OptionError(
                f"{self.name} needs no calibration",
                "Leave the calibration out, or choose a criterion that ranks by one, such as wanda.",
            )

    @property
    def name(self) -> str:
        """The criterion as headers spell it."""
        return str(self.spec)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics that it needs."""
        return self.criterion.statistics if self.criterion else ()

    @property
    def compare(self) -> str:
        """The weights that are compared with each other: `block` (the scope), `row`, or `layer` (OBS only)."""
        return self.spec.options.get("compare", "block")

    @property
    def masks(self) -> bool:
        """Whether it gives masks; magnitude and uniform give thresholds."""
        return self.criterion is not None

    @property
    def moves(self) -> bool:
        """Whether it changes weights that are not pruned, to compensate for those that are."""
        return hasattr(self.criterion, "compensate")

    def drop_foreign_numbers(self, variant: Variant, targets: Sequence[str] | None = None) -> Variant:
        """Drop provenance, evidence and POA weight of numbers that were found otherwise than they will be used.

        A recipe names criterion and calibration in its evidence; without a name it was magnitude. Equal ratios for all
        groups belong to uniform as well.

        Args:
            variant: A recipe's variant.
            targets: The kinds of layers that will be pruned, if they are not those of the variant.

        Returns:
            The variant, as a starting point if its numbers belong to another criterion, calibration or other targets.
        """
        evidence = variant.evidence
        if evidence is None and variant.provenance == "starting-point":
            return variant
        reasons = []
        measured_with = _canonical(str(evidence.extra.get("criterion", MAGNITUDE)) if evidence else MAGNITUDE)
        alike = {measured_with, self.name} <= {MAGNITUDE, UNIFORM} and len(set(variant.ratios.values())) == 1
        if measured_with != self.name and not alike:
            reasons.append(f"with {measured_with}")
        measured = evidence.extra.get("calibration") if evidence else None
        if self.calibration is not None and measured is not None and measured != self.calibration.hash:
            reasons.append("by another calibration" if reasons else f"with {measured_with} by another calibration")
        if targets is not None:
            reasons.append("for other targets")
        if not reasons:
            return variant
        if variant.provenance == "starting-point":  # it was measured, but not searched for
            return replace(variant, evidence=None)
        return replace(
            variant, provenance="starting-point", poa_weight=START_POA_WEIGHT, prompt=None, evidence=None,
            source=f"{variant.source}; found {' '.join(reasons)}",
        )  # fmt: skip

    def plan(self, planned: Plan) -> Plan:
        """Adapt a plan to the criterion, and add its notes.

        Raises:
            CalibrationError: The calibration does not fit the plan.
            PlanError: The criterion moves weights, and some have a scale.
        """
        if planned.has_scales and self.moves:
            message = f"{planned.checkpoint.path}: {self.name} moves weights, which fp8 with a scale does not allow"
            raise PlanError(message, "Export from the fp16 or bf16 checkpoint, or leave --criterion out.")
        planned = _with_equal_ratios(planned) if self.name == UNIFORM else planned
        if self.calibration is None:
            return planned
        notes = self.calibration.check(planned, self.statistics)
        return replace(planned, notes=(*planned.notes, *notes))

    def calibrated(self, progress: Progress) -> CalibrationStamp | None:
        """Return the header's record of the calibration, whose file is read for its hash."""
        if self.calibration is None:
            return None
        progress.stage("hashing", self.calibration.nbytes)
        return CalibrationStamp(self.calibration.hashed(progress), self.calibration.size)


def _make(entry: EntryPoint, spec: Spec) -> Criterion:
    """Call an entry point; an error of another package's own code becomes one of one line."""
    package = entry.dist.name if entry.dist else entry.value
    hint = f"It has to make a criterion, with statistics and score, of a mapping of options; ask {package}."
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"{entry.name}: {entry.value} cannot be loaded: {error}", f"Install {package} again, or whatever it needs."
        ) from error
    if not callable(factory):
        raise OptionError(f"{entry.name}: {entry.value} is not a function", hint)
    with foreign_errors(CriterionError, entry.name, f"Ask {package}."):
        criterion: Criterion = factory(spec.values)
    statistics = getattr(criterion, "statistics", None)
    listed = isinstance(statistics, tuple) and all(isinstance(name, str) for name in statistics)
    if not listed or not callable(getattr(criterion, "score", None)):
        raise OptionError(
            f"{entry.name}: {entry.value} makes {type(criterion).__name__}, which is not a criterion", hint
        )
    return criterion


def _with_equal_ratios(planned: Plan) -> Plan:
    """Give all groups the same ratio, so that as many weights are pruned as with the variant's own ratios."""
    ratios = {planned.ratio(group) for group in planned.groups}
    counts = {group: sum(s.count for s in planned.scopes if s.group == group) for group in planned.groups}
    if len(ratios) == 1 or not any(counts.values()):
        return planned
    mean = math.fsum(planned.ratio(group) * count for group, count in counts.items()) / sum(counts.values())
    equal = with_ratios(planned, dict.fromkeys(planned.groups, mean))
    ratios_text = "/".join(f"{planned.ratio(group):g}" for group in planned.groups)
    variant = replace(
        equal.variant, provenance="starting-point", source=f"mean of {ratios_text} ({planned.variant.source})",
        poa_weight=START_POA_WEIGHT, prompt=None, evidence=None,
    )  # fmt: skip
    return replace(equal, variant=variant)


def _canonical(spec: str) -> str:
    """Return the canonical spelling of a criterion, or the text itself if its package is not installed."""
    try:
        return str(Spec.parse(spec))
    except OptionError:
        return spec
