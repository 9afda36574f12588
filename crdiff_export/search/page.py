"""The HTML page of a search: what it found, its course, the check with its pictures, and all trials."""

from collections.abc import Iterator

from crdiff_export.evaluate import report_text as evaluation_text
from crdiff_export.evaluate.report import page
from crdiff_export.evaluate.report.page import PageSection
from crdiff_export.search import pictures, plot, report_text
from crdiff_export.search.found import Found


def render(found: Found) -> str:
    """Render the page."""
    title = f"Ratios of {found.job.drawing.base.name} for {found.job.request.size}"
    return page.render(title, report_text.facts(found), list(_sections(found)))


def _sections(found: Found) -> Iterator[PageSection]:
    scores = evaluation_text.table(found.evaluation) if found.evaluation else None
    yield PageSection("Result", report_text.conclusion(found), scores)
    yield PageSection("Course of the search", plot=plot.draw(found, "svg"))
    for subject in found.evaluation.subjects if found.evaluation else ():
        sheet = pictures.contact(found, subject.size)
        yield PageSection(sheet.title, sheet=sheet)
    yield PageSection("Trials", table=(("trial", "candidate", "score", ""), _trials(found)))


def _trials(found: Found) -> list[tuple[str, ...]]:
    """All trials, the best first; what was stopped early has the estimate that the method was told."""
    return [
        (
            str(one.place),
            report_text.spelled(one.candidate),
            f"{value:.4f}",
            "" if one.state == "complete" else "estimated",
        )
        for one, value in sorted(plot.scored(found), key=lambda pair: -pair[1])
    ]
