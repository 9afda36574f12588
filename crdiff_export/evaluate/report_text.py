"""The words of an evaluation's table: a model is better or worse only where its interval says so."""

from collections.abc import Iterable, Iterator
from typing import Final

from crdiff_export.evaluate.report.page import PageTable
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.scorers.spec import DEMO
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.formats.text import plural, printable
from crdiff_export.models.evidence_text import decimals

COLUMNS: Final = (
    *("size", "model", "s/picture", "score", "score's 95 %", "right", "FID"),
    *("minus dense", "its 95 %", "which shows"),
)
NUMERIC: Final = ("s/picture", "score", "right", "FID", "minus dense")
# What a narrow terminal leaves out first: the claim is about differences, whose interval stays.
OPTIONAL: Final = ("s/picture", "score's 95 %", "right")


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
    first = [name for name in ("model", "which shows", "minus dense", "its 95 %") if name in names]
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
        A verdict and a sentence for each, such as ("better", "at 48x48, pruned against dense +0.034 (95 %: +0.007 to
        +0.061)"), and sentences without a verdict: on what it rests, and what follows is compared with.
    """
    digits = _digits(evaluation)

    def sentences(subject: Subject, pairs: Iterable[tuple[str, str, Estimate]]) -> Iterator[tuple[str, str]]:
        for ours, other, estimate in pairs:
            yield (
                estimate.verdict,
                f"at {where(evaluation, subject)}, {ours} against {other} {_change(estimate, digits)}",
            )

    subjects = evaluation.subjects
    dense = [said for subject in subjects for said in sentences(subject, _against_dense(evaluation, subject))]
    rivals = [said for subject in subjects for said in sentences(subject, evaluation.against(subject))]
    if not dense:
        return [("", "Nothing was pruned: all ratios are 0.")]
    basis = (
        f"{plural(len(evaluation.prompts), 'prompt')}, scorer {printable(evaluation.scorer, 40)}{_scale(evaluation)}"
    )
    return [*dense, *([("", "Compared with what else was drawn:"), *rivals] if rivals else []), ("", f"({basis})")]


def _scale(evaluation: Evaluation) -> str:
    """Explain the scores of the demo's judge; of other scorers their authors do."""
    return ": from 0 to 1, how much of the prompt is right; right: all of it" if evaluation.scorer == DEMO else ""


def _against_dense(evaluation: Evaluation, subject: Subject) -> list[tuple[str, str, Estimate]]:
    findings = evaluation.of(subject)
    return [(finding.model.name, "dense", finding.difference) for finding in findings if finding.difference]


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
