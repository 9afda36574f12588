"""The HTML page of an evaluation: numbers, plot, and the pictures where the models differ most."""

import io
from collections.abc import Iterator
from functools import partial
from typing import Final

from PIL import Image

from crdiff_export.evaluate import plot, report_text
from crdiff_export.evaluate.comparison import Facts
from crdiff_export.evaluate.report import ContactSheet, SheetPicture, SheetRow, page, plots
from crdiff_export.evaluate.report.page import PageSection
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation
from crdiff_export.formats.text import printable

# Pictures of each subject.
SHOWN: Final = 8


def render(evaluation: Evaluation) -> str:
    """Render the page."""
    notes = [("note", printable(text, limit=1000)) for text in evaluation.notes]
    return page.render(
        f"{printable(evaluation.job.drawing.base.name)} at {_sizes(evaluation)}: dense, pruned and POA",
        list(_sections(evaluation)),
        verdicts=report_text.verdicts(evaluation),
        facts=(*evaluation.facts, *notes),
        command=evaluation.job.request.command,
    )


def differences(evaluation: Evaluation, subject: Subject, title: str, facts: Facts = ()) -> ContactSheet:
    """Make a sheet of the pictures where pruning changes the score most.

    Args:
        evaluation: The evaluation.
        subject: The size and the ratios.
        title: What stands above the pictures.
        facts: Facts for the sheet.

    Returns:
        A row for each picture: those that pruning made worst come first, those it made best last.
    """
    models = [finding.model for finding in evaluation.of(subject)]
    rows = []
    for index in evaluation.most_different(subject, SHOWN):
        prompt, seed = evaluation.job.pairs[index]
        pictures = tuple(
            SheetPicture(
                Image.open(io.BytesIO(model.images[index])).convert("RGB"),
                caption=f"score {model.scores[index].value:.4g}",
            )
            for model in models
        )
        rows.append(SheetRow(prompt, seed, pictures))
    return ContactSheet(title, facts, tuple(model.name for model in models), tuple(rows))


def _sizes(evaluation: Evaluation) -> str:
    sizes = dict.fromkeys(str(subject.size) for subject in evaluation.subjects if not subject.is_native_check)
    return ", ".join(sizes)


def _sections(evaluation: Evaluation) -> Iterator[PageSection]:
    yield plots.section("Differences to the dense model", partial(plot.render, evaluation))
    yield PageSection("Scores", table=report_text.page_table(evaluation))
    for subject in evaluation.subjects:
        title = f"{report_text.where(evaluation, subject)}: where the models differ most"
        sheet = differences(evaluation, subject, title)
        if sheet.rows:
            yield PageSection(
                title, "First where pruning lowers the score most, last where it raises it most.", sheet=sheet
            )
