"""Results of an evaluation for --json."""

from typing import Any

from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.statistics import Estimate


def pairs_json(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Give the prompts, each with the seed of its noise."""
    return [{"prompt": prompt, "seed": seed} for prompt, seed in evaluation.job.pairs]


def subject_json(evaluation: Evaluation, subject: Subject) -> dict[str, Any]:
    """Give the models at one size with their scores."""
    return {
        "resolution": str(subject.size), "models": [_finding_json(finding) for finding in evaluation.of(subject)],
    }  # fmt: skip


def beside_json(evaluation: Evaluation, subject: Subject) -> list[dict[str, Any]]:
    """Give how the pruned models at one size compare with what was drawn beside them."""
    return [
        {"model": ours, "beside": rival, "minus_beside": _estimate_json(estimate), "verdict": estimate.verdict}
        for ours, rival, estimate in evaluation.against(subject)
    ]


def _finding_json(finding: Finding) -> dict[str, Any]:
    model = finding.model
    return {
        "model": model.name, "poa_weight": None if model.beside else model.weight,
        "score": _estimate_json(finding.mean),
        "minus_dense": _estimate_json(finding.difference), "right": _estimate_json(finding.right), "fid": model.fid,
        "parts": dict(finding.parts), "verdict": finding.difference.verdict if finding.difference else None,
        "scores": [score.value for score in model.scores], "seconds": round(model.seconds, 3),
    }  # fmt: skip


def _estimate_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    if not estimate:
        return None
    low, high = (estimate.low, estimate.high) if estimate.bounded else (None, None)
    return {"value": estimate.value, "low": low, "high": high}
