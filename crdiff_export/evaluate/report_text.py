"""The words of an evaluation's table: a model is better or worse only where its interval says so."""

from typing import Final

from crdiff_export.evaluate.report.page import PageTable
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.formats.text import plural, printable
from crdiff_export.models.evidence_text import decimals

COLUMNS: Final = (
    *("size", "model", "s/picture", "score", "95 %", "right", "FID"),
    *("minus dense", "95 % of it", "which shows"),
)
NUMERIC: Final = ("s/picture", "score", "right", "FID", "minus dense")
# What a narrow terminal leaves out first: the claim is about differences, whose interval stays.
OPTIONAL: Final = ("s/picture", "95 %", "right")


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


def page_table(evaluation: Evaluation) -> PageTable:
    """Make the table of a page, which a narrow screen cuts at the right.

    Args:
        evaluation: The evaluation.

    Returns:
        The rows of `table`. Sizes are headings, and the verdicts and what they rest on come first.
    """
    names, rows = table(evaluation)
    first = [name for name in ("model", "which shows", "minus dense", "95 % of it") if name in names]
    columns = [*first, *(name for name in names[1:] if name not in first)]
    grouped: list[list[str]] = []
    for row in rows:
        cells = dict(zip(names, row, strict=True))
        if cells["size"]:
            grouped.append([cells["size"], *[""] * (len(columns) - 1)])
        grouped.append([cells[name] for name in columns])
    return PageTable(columns, grouped, NUMERIC)


def verdicts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Say what an evaluation shows of each pruned model.

    Args:
        evaluation: The evaluation.

    Returns:
        A verdict and a sentence for each, such as ("better", "at 48x48: pruned - dense is +0.034 (95 %: +0.007 to
        +0.061), 162 prompts, scorer demo").
    """
    digits = _digits(evaluation)
    basis = f"{plural(len(evaluation.prompts), 'prompt')}, scorer {printable(evaluation.scorer, 40)}"
    return [
        (estimate.verdict, f"at {where(evaluation, subject)}: {ours} - {other} is {_change(estimate, digits)}, {basis}")
        for subject in evaluation.subjects
        for ours, other, estimate in (*_against_dense(evaluation, subject), *evaluation.against(subject))
    ]


def rival_lines(evaluation: Evaluation) -> list[str]:
    """Say in lines how the pruned models compare with what was drawn beside them; the table compares with dense."""
    digits = _digits(evaluation)
    return [
        f"{estimate.verdict}: at {where(evaluation, subject)} {ours} - {other} is {_change(estimate, digits)}"
        for subject in evaluation.subjects
        for ours, other, estimate in evaluation.against(subject)
    ]


def _against_dense(evaluation: Evaluation, subject: Subject) -> list[tuple[str, str, Estimate]]:
    found = evaluation.of(subject)
    return [(finding.model.name, "dense", finding.difference) for finding in found if finding.difference]


def _change(estimate: Estimate, digits: int) -> str:
    signed = f"+.{digits}f"
    ends = f" (95 %: {_interval(estimate, signed)})" if estimate.bounded else ""
    return f"{estimate.value:{signed}}{ends}"


def _row(evaluation: Evaluation, subject: Subject, finding: Finding, digits: int) -> tuple[str, ...]:
    model, mean, difference = finding.model, finding.mean, finding.difference
    plain, signed = f".{digits}f", f"+.{digits}f"
    shows = ("", "", "")
    if difference:
        shows = f"{difference.value:{signed}}", _interval(difference, signed), difference.verdict
    return (
        where(evaluation, subject) if model.is_dense else "",
        model.name,
        f"{model.seconds / max(1, len(model.scores)):.3g}",
        f"{mean.value:{plain}}",
        _interval(mean, plain),
        f"{finding.right.value:.0%}" if finding.right else "",
        "" if model.fid is None else f"{model.fid:.2f}",
        *shows,
    )


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}" if estimate.bounded else ""


def _digits(evaluation: Evaluation) -> int:
    """Return the decimals for the narrowest interval of a difference."""
    differences = [f.difference for f in evaluation.findings if f.difference and f.difference.bounded]
    widths = [estimate.high - estimate.low for estimate in differences if estimate.high > estimate.low]
    return decimals(min(widths, default=0.0))
