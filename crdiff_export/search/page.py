"""The HTML page of a search: the result, its course, the check with its pictures, and all trials."""

from collections.abc import Iterator
from functools import partial

from crdiff_export.evaluate import page as evaluation_page
from crdiff_export.evaluate import report_text as evaluation_text
from crdiff_export.evaluate.report import ContactSheet, page, plots
from crdiff_export.evaluate.report.page import PageSection
from crdiff_export.evaluate.request import Subject
from crdiff_export.search import plot, report_text
from crdiff_export.search.result import SearchResult


def render(result: SearchResult) -> str:
    """Render the page."""
    title = f"Ratios of {result.job.drawing.base.name} for {result.job.request.size}"
    return page.render(title, report_text.facts(result), list(_sections(result)))


def contact_sheet(result: SearchResult, subject: Subject) -> ContactSheet:
    """Return the check's pictures of a subject, dense beside the best, where the two differ most."""
    assert result.evaluation
    title = f"{result.job.drawing.base.name} at {subject.size}: where the models differ most"
    return evaluation_page.differences(result.evaluation, subject, title, report_text.facts(result))


def _sections(result: SearchResult) -> Iterator[PageSection]:
    scores = evaluation_text.table(result.evaluation) if result.evaluation else None
    yield PageSection("Result", report_text.conclusion(result), scores)
    yield plots.section("Course of the search", partial(plot.draw, result))
    for subject in result.evaluation.subjects if result.evaluation else ():
        sheet = contact_sheet(result, subject)
        yield PageSection(sheet.title, sheet=sheet)
    yield PageSection("Trials", table=(("trial", "candidate", "score", ""), _trials(result)))


def _trials(result: SearchResult) -> list[tuple[str, ...]]:
    """Return all trials, the best first; those that were stopped early have the estimate that the method was told."""
    return [
        (
            str(trial.number),
            report_text.candidate_text(trial.candidate),
            f"{score:.4f}",
            "" if trial.state == "complete" else "estimated",
        )
        for trial, score in sorted(plot.scores(result), key=lambda pair: -pair[1])
    ]
