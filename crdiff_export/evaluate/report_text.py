"""The words of an evaluation's table: a model is better or worse only where its interval says so."""

import math
from typing import Final

from crdiff_export.evaluate.comparison import DENSE
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.statistics import Estimate

COLUMNS: Final = ("size", "model", "score", "95 %", "right", "FID", "minus dense", "95 % of it", "which shows")
NUMERIC: Final = ("score", "right", "FID", "minus dense")
# What a narrow terminal leaves out first: the claim is about differences, whose interval stays.
OPTIONAL: Final = ("95 %", "right")


def where(evaluation: Evaluation, subject: Subject) -> str:
    """Name a subject in a table or a heading.

    Args:
        evaluation: The evaluation.
        subject: One of its subjects.

    Returns:
        Its size, and the size that its ratios are for if that is another.
    """
    native = " (native)" if subject.size == evaluation.job.drawing.native else ""
    return f"{subject.size}{native}" + (f", ratios for {subject.plan.size}" if subject.is_native_check else "")


def table(evaluation: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make the table of an evaluation.

    Args:
        evaluation: The evaluation.

    Returns:
        The names of the columns, and a row for each model and size. Empty columns are left out.
    """
    digits = _digits(evaluation)
    rows = [
        _row(evaluation, subject, finding, digits)
        for subject in evaluation.subjects
        for finding in evaluation.of(subject)
    ]
    used = [column for column in zip(COLUMNS, *rows, strict=True) if any(column[1:])]
    names, *lines = zip(*used, strict=True)
    return names, lines


def _row(evaluation: Evaluation, subject: Subject, finding: Finding, digits: int) -> tuple[str, ...]:
    model, mean, difference = finding.model, finding.mean, finding.difference
    plain, signed = f".{digits}f", f"+.{digits}f"
    shows = ("", "", "")
    if difference:
        shows = f"{difference.value:{signed}}", _interval(difference, signed), difference.verdict
    return (
        where(evaluation, subject) if model.weight == DENSE else "",
        model.name,
        f"{mean.value:{plain}}",
        _interval(mean, plain),
        f"{finding.right.value:.0%}" if finding.right else "",
        "" if model.fid is None else f"{model.fid:.2f}",
        *shows,
    )


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}" if estimate.bounded else ""


def _digits(evaluation: Evaluation) -> int:
    """Return decimals that show two digits of the narrowest interval of a difference: a scorer's scale may be small."""
    differences = [f.difference for f in evaluation.findings if f.difference and f.difference.bounded]
    widths = [estimate.high - estimate.low for estimate in differences if estimate.high > estimate.low]
    return min(9, max(3, 2 - math.ceil(math.log10(min(widths))))) if widths else 3
