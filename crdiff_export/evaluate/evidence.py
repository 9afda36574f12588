"""The evidence that a recipe carries: what was measured of a variant."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version

from crdiff_export.bake.metadata import tool_version
from crdiff_export.evaluate.comparison import DENSE, PRUNED, Pair
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.models.recipe import Evidence, Scalar, Variant
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.sampling import pipelines

DIGITS = 6  # significant ones


def variant(evaluation: Evaluation, subject: Subject) -> Variant:
    """Make the variant for a subject's size, with its evidence.

    Args:
        evaluation: The evaluation.
        subject: The subject that was drawn.

    Returns:
        The subject's variant. Ratios that were tuned for another size are only a starting point for this one.
    """
    planned = subject.plan.variant
    if planned.borrowed_from:
        planned = replace(planned, source=f"{planned.source}; borrowed from {planned.borrowed_from}")
    return replace(
        planned, resolution=subject.plan.size, borrowed_from=None,
        evidence=measured(evaluation, subject) or planned.evidence,
    )  # fmt: skip


def measured(evaluation: Evaluation, subject: Subject) -> Evidence | None:
    """Return what was measured of a subject.

    Args:
        evaluation: The evaluation.
        subject: The subject that was drawn.

    Returns:
        The means of the dense and the pruned model, the interval of their difference, and in `extra` the same of POA
        at the variant's weight, if that was drawn. None if nothing was pruned.
    """
    job, planned = evaluation.job, subject.plan.variant
    models = [finding for finding in evaluation.of(subject) if not finding.model.beside]
    by_weight = {finding.model.weight: finding for finding in models}
    if PRUNED not in by_weight:
        return None
    pruned = by_weight[PRUNED]
    assert pruned.difference
    # An interval over the pictures of one prompt says nothing about others.
    is_general = len(evaluation.prompts) > 1 or planned.prompt is not None
    extra: dict[str, Scalar] = {}
    amplified = by_weight.get(planned.poa_weight)
    if amplified and amplified.difference and amplified is not pruned:
        extra["poa"] = _rounded(amplified.mean.value)
        if is_general and (ends := _interval(amplified.difference)):
            extra |= {"poa_low": ends[0], "poa_high": ends[1]}
    if job.criterion.name != MAGNITUDE:
        extra["criterion"] = job.criterion.name
    if job.criterion.calibration:
        extra["calibration"] = job.criterion.calibration.hash
    if told := pipelines.told_size(job.drawing.opening.pipeline):
        extra["told_size"] = str(told)
    extra |= {
        "pictures": len(job.pairs),
        "pairs_sha256": pairs_digest(job.pairs),
        "crdiff": tool_version(),
        "diffusers": version("diffusers"),
        "torch": version("torch"),
    }
    return Evidence(
        scorer=evaluation.scorer,
        pruned=_rounded(pruned.mean.value),
        dense=_rounded(by_weight[DENSE].mean.value),
        prompts=len(evaluation.prompts),
        interval=_interval(pruned.difference) if is_general else None,
        extra=extra,
    )


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """Return a short hash of prompts and seeds."""
    return hashlib.sha256("\n".join(f"{prompt}\t{seed}" for prompt, seed in pairs).encode()).hexdigest()[:16]


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    return (_rounded(estimate.low), _rounded(estimate.high)) if estimate.bounded else None


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") + 0.0  # turns -0.0 into 0.0
