"""What was measured of a variant, as a recipe carries it."""

import hashlib
from dataclasses import replace
from importlib.metadata import version

from crdiff_export.bake.metadata import tool_version
from crdiff_export.evaluate.findings import DENSE, PRUNED, Evaluation, Subject
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.models.recipe import Evidence, Scalar, Variant
from crdiff_export.prune.criterion_choice import MAGNITUDE

DIGITS = 6  # significant ones


def variant(found: Evaluation, subject: Subject) -> Variant:
    """The subject's variant for its size, with the evidence; where its ratios come from stays what it was.

    Those of another size are a starting point for this one, whoever tuned them there.
    """
    known = subject.variant
    if subject.borrowed:
        known = replace(
            known, provenance="starting-point", evidence=None, source=f"{known.source}; those for {known.resolution}"
        )
    return replace(known, resolution=subject.of, evidence=measured(found, subject) or known.evidence)


def measured(found: Evaluation, subject: Subject) -> Evidence | None:
    """Means of the dense and the pruned model, and the interval of their difference; None where nothing is pruned.

    The same of POA at the variant's weight, if that was drawn, is in `extra`.
    """
    by_weight = {finding.drawn.weight: finding for finding in found.of(subject)}
    if PRUNED not in by_weight:
        return None
    pruned = by_weight[PRUNED]
    assert pruned.difference
    # An interval over the pictures of one prompt says nothing about others.
    claims = len(found.prompts) > 1 or subject.variant.prompt is not None
    extra: dict[str, Scalar] = {}
    amplified = by_weight.get(subject.variant.poa_weight)
    if amplified and amplified.difference and amplified is not pruned:
        extra["poa"] = _rounded(amplified.mean.value)
        if claims and (ends := _ends(amplified.difference)):
            extra |= {"poa_low": ends[0], "poa_high": ends[1]}
    prompts = "\n".join(f"{prompt}\t{seed}" for prompt, seed in found.pairs)
    if found.criterion != MAGNITUDE:
        extra["criterion"] = found.criterion
    if found.calibration:
        extra["calibration"] = found.calibration
    extra |= {
        "pictures": len(found.pairs),
        "pairs_sha256": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        "crdiff": tool_version(),
        "diffusers": version("diffusers"),
        "torch": version("torch"),
    }
    return Evidence(
        scorer=found.scorer,
        pruned=_rounded(pruned.mean.value),
        dense=_rounded(by_weight[DENSE].mean.value),
        prompts=len(found.prompts),
        interval=_ends(pruned.difference) if claims else None,
        extra=extra,
    )


def _ends(estimate: Estimate) -> tuple[float, float] | None:
    return (_rounded(estimate.low), _rounded(estimate.high)) if estimate.bounded else None


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") + 0.0  # which is never -0.0
