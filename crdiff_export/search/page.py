"""The HTML page of a search: the result, its course, the check with its pictures, and all trials."""

from collections.abc import Iterator
from functools import partial

from crdiff_export.evaluate import page as evaluation_page
from crdiff_export.evaluate import plot as evaluation_plot
from crdiff_export.evaluate import report_text as evaluation_text
from crdiff_export.evaluate.report import ContactSheet, page, plots
from crdiff_export.evaluate.report.page import PageSection, PageTable
from crdiff_export.evaluate.request import Subject
from crdiff_export.search import plot, report_text
from crdiff_export.search.result import SearchResult


def render(result: SearchResult) -> str:
    """Render the page."""
    title = f"Ratios of {result.job.drawing.base.name} for {result.job.request.size}"
    return page.render(
        title,
        list(_sections(result)),
        verdicts=[(result.verdict, report_text.conclusion(result))],
        facts=report_text.facts(result),
        command=result.job.request.command,
    )


def contact_sheet(result: SearchResult, subject: Subject) -> ContactSheet:
    """Return the check's pictures of a subject, dense beside the best, where the two differ most."""
    assert result.evaluation
    title = f"{result.job.drawing.base.name} at {subject.size}: where the models differ most"
    return evaluation_page.differences(result.evaluation, subject, title, report_text.facts(result))


def _sections(result: SearchResult) -> Iterator[PageSection]:
    yield PageSection("Best ratios", report_text.candidate_text(result.best.candidate))
    if result.evaluation:
        yield plots.section("Differences to the dense model", partial(evaluation_plot.render, result.evaluation))
        yield PageSection("Scores on held-out prompts", table=evaluation_text.page_table(result.evaluation))
    yield plots.section("Course of the search", partial(plot.draw, result))
    for subject in result.evaluation.subjects if result.evaluation else ():
        sheet = contact_sheet(result, subject)
        yield PageSection(sheet.title, sheet=sheet)
    trials = PageTable(("trial", "score", "candidate", ""), _trials(result), ("trial", "score"))
    yield PageSection("Trials, the best first", table=trials)


def _trials(result: SearchResult) -> list[tuple[str, ...]]:
    """Return all trials, the best first; those that were stopped early have the estimate that the method was told."""
    return [
        (
            str(trial.number),
            f"{score:.4f}",
            report_text.candidate_text(trial.candidate),
            "" if trial.state == "complete" else "estimated",
        )
        for trial, score in sorted(plot.scores(result), key=lambda pair: -pair[1])
    ]
