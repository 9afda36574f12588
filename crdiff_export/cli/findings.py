"""Findings of an evaluation for --json."""

from typing import Any

from crdiff_export.evaluate.findings import Finding
from crdiff_export.evaluate.statistics import Estimate


def finding_json(finding: Finding) -> dict[str, Any]:
    """One model of an evaluation."""
    return {
        "model": finding.drawn.name, "poa_weight": finding.drawn.weight, "score": _said(finding.mean),
        "minus_dense": _said(finding.difference), "right": _said(finding.right), "fid": finding.drawn.fid,
        "parts": dict(finding.parts), "verdict": finding.difference.verdict if finding.difference else None,
        "scores": [score.value for score in finding.drawn.scores], "seconds": round(finding.drawn.seconds, 3),
    }  # fmt: skip


def _said(estimate: Estimate | None) -> dict[str, float | None] | None:
    if not estimate:
        return None
    ends = (estimate.low, estimate.high) if estimate.bounded else (None, None)
    return {"value": estimate.value, "low": ends[0], "high": ends[1]}
