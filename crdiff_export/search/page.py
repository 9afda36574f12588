"""A search as one HTML page: what it found, its course, the check with its pictures, all trials; nothing elsewhere."""

from collections.abc import Iterator, Sequence
from html import escape

from crdiff_export.evaluate import report_text as of_evaluation
from crdiff_export.evaluate.report import page
from crdiff_export.search import plot, report_text
from crdiff_export.search.found import Found


def render(found: Found) -> str:
    """The page."""
    title = f"Ratios of {found.job.easel.base.name} for {found.job.request.size}"
    body = "".join((*_result(found), *_course(found), *_pictures(found), *_trials(found)))
    return page.frame(title, report_text.facts(found), body)


def _result(found: Found) -> Iterator[str]:
    yield f"<section><h2>Result</h2><p>{escape(report_text.conclusion(found))}</p>"
    if found.evaluation:
        yield from _table(*of_evaluation.table(found.evaluation))
    yield "</section>"


def _course(found: Found) -> Iterator[str]:
    svg = plot.draw(found, "svg").decode()
    yield f"<section><h2>Course of the search</h2>{svg[svg.index('<svg') :]}</section>"


def _pictures(found: Found) -> Iterator[str]:
    if not found.evaluation:
        return
    from crdiff_export.search import pictures

    number = 0
    for subject in found.evaluation.subjects:
        contact = pictures.contact(found, subject.size)
        yield f"<section><h2>{escape(contact.title)}</h2></section>"
        yield page.rows(contact, number)
        number += sum(len(row.shots) for row in contact.rows)


def _trials(found: Found) -> Iterator[str]:
    """All trials, the best first; what was stopped early has the estimate that the method was told."""
    rows = [
        (
            str(one.place),
            report_text.spelled(one.candidate),
            f"{value:.4f}",
            "" if one.state == "complete" else "estimated",
        )
        for one, value in sorted(plot.scored(found), key=lambda pair: -pair[1])
    ]
    yield "<section><h2>Trials</h2>"
    yield from _table(("trial", "candidate", "score", ""), rows)
    yield "</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table class=numbers><tr>"
    yield from (f"<th scope=col>{escape(name)}</th>" for name in columns)
    yield "</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
    yield "</table>"
