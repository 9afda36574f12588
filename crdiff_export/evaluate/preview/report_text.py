"""The words of a preview: facts above the pictures, labels beside them, parameters in the files."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from crdiff_export.evaluate import beside
from crdiff_export.evaluate.comparison import closing_facts, ratios_text, sampling_facts
from crdiff_export.evaluate.preview.request import Preview, PreviewJob, PreviewPicture
from crdiff_export.evaluate.report import ContactSheet, SheetPicture, SheetRow
from crdiff_export.formats.text import printable
from crdiff_export.prune.criterion_choice import MAGNITUDE

if TYPE_CHECKING:
    from crdiff_export.sampling.session import Session, Style


def facts(job: PreviewJob, style: "Style", session: "Session") -> Iterator[tuple[str, str]]:
    """Yield what everyone who sees the pictures should know."""
    request, subject = job.request, job.subject
    yield "base", f"{job.drawing.base.name} ({subject.plan.match.family.title})"
    yield "size", f"{subject.size}, native {job.drawing.native}"
    yield "ratios", f"{ratios_text(subject.plan)}: {job.ratios_from}"
    yield "measured", job.evidence or "nothing is known; `crdiff evaluate` measures"
    if job.criterion != MAGNITUDE:
        yield "criterion", job.criterion
    if job.baked:
        yield "baked file", f"{job.baked.checkpoint.path.name}, pruned for {job.baked.stamp.resolution}"
    yield from sampling_facts(style, session)
    if (request.start, request.stop) != (0, 1):
        yield "POA", f"from {request.start:g} to {request.stop:g} of the steps"
    yield from beside.facts(job.rivals, job.setting)
    yield from closing_facts(job.notes, job.drawing)


def contact_sheet(preview: Preview) -> ContactSheet:
    """Put the pictures on a sheet."""
    job, pictures = preview.job, preview.pictures
    width = len(job.columns)
    rows = []
    for start in range(0, len(pictures), width):
        row = pictures[start : start + width]
        labelled = tuple(SheetPicture(picture.image, _parameters(preview, picture)) for picture in row)
        rows.append(SheetRow(row[0].prompt, row[0].seed, labelled))
    title = f"{printable(job.drawing.base.name)} at {job.subject.size}"
    return ContactSheet(title, preview.facts, job.columns, tuple(rows))


def _parameters(preview: Preview, picture: PreviewPicture) -> str:
    """Return how a picture was made, as A1111 writes it into PNG files, which many programs read."""
    job, style = preview.job, preview.style
    last = {
        "Steps": str(style.steps), "Sampler": preview.scheduler, "CFG scale": f"{style.guidance:g}",
        "Seed": str(picture.seed), "Size": str(style.size), "Model": printable(job.drawing.base.name),
        "crdiff": picture.column,
    }  # fmt: skip
    if picture.weight:
        last["ratios"] = "/".join(f"{ratio:g}" for ratio in job.subject.ratios.values())
        if job.criterion != MAGNITUDE:
            last["criterion"] = job.criterion
    negative = [f"Negative prompt: {job.request.negative}"] if job.request.negative else []
    # A1111 quotes text with a comma or a colon in it.
    quoted = (f"{key}: {json.dumps(text) if set(text) & set(',:') else text}" for key, text in last.items())
    return "\n".join([picture.prompt, *negative, ", ".join(quoted)])
