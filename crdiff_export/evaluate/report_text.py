"""What is said about an evaluation, in a table and in sentences: nothing is better unless its interval says so."""

import math
from collections.abc import Iterator

from crdiff_export.evaluate.findings import DENSE, Evaluation, Finding, Subject
from crdiff_export.evaluate.statistics import Estimate

COLUMNS = ("size", "model", "score", "95 %", "right", "FID", "minus dense", "95 % of it", "which shows")
NUMERIC = ("score", "right", "FID", "minus dense")


def where(found: Evaluation, subject: Subject) -> str:
    """A subject's size, and whose ratios it has where they are for another."""
    native = " (native)" if subject.size == found.native else ""
    return f"{subject.size}{native}" + (f", ratios for {subject.of}" if subject.is_look else "")


def table(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names of columns, and a line for each model and size; a column that nothing is in is left out."""
    lines = list(_rows(found))
    kept = [place for place in range(len(COLUMNS)) if any(line[place] for line in lines)]
    return tuple(COLUMNS[place] for place in kept), [tuple(line[place] for place in kept) for line in lines]


def _rows(found: Evaluation) -> Iterator[tuple[str, ...]]:
    for subject in found.subjects:
        for finding in found.of(subject):
            yield _row(found, subject, finding)


def _row(found: Evaluation, subject: Subject, finding: Finding) -> tuple[str, ...]:
    change, digits = finding.difference, _digits(found)
    mean, plain, signed = finding.mean, f".{digits}f", f"+.{digits}f"
    place = where(found, subject) if finding.drawn.weight == DENSE else ""
    right = f"{finding.right.value:.0%}" if finding.right else ""
    fid = "" if finding.drawn.fid is None else f"{finding.drawn.fid:.2f}"
    said = (f"{change.value:{signed}}", _ends(change, signed), change.verdict) if change else ("", "", "")
    return (place, finding.drawn.name, f"{mean.value:{plain}}", _ends(mean, plain), right, fid, *said)


def _ends(estimate: Estimate, form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}" if estimate.bounded else ""


def _digits(found: Evaluation) -> int:
    """Decimals that show two digits of the narrowest interval of a difference: a scorer's scale may be small."""
    changes = [f.difference for f in found.findings if f.difference and f.difference.bounded]
    widths = [change.high - change.low for change in changes if change.high > change.low]
    return min(9, max(3, 2 - math.ceil(math.log10(min(widths))))) if widths else 3
