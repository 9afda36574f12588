"""The check's pictures, dense beside what was found, where the two differ most."""

import io
from typing import Final

from PIL import Image

from crdiff_export.evaluate.report import Contact, Row, Shot
from crdiff_export.search import report_text
from crdiff_export.search.found import Found
from crdiff_export.sizes import Size

SHOWN: Final = 8


def contact(found: Found, size: Size) -> Contact:
    """A sheet of the pairs at a size where pruning changes the score most, for the worse first, then for the better."""
    made = found.evaluation
    assert made
    subject = next(one for one in made.subjects if one.size == size)
    findings = made.of(subject)
    rows = []
    for place in made.most_different(subject, SHOWN):
        prompt, seed = made.pairs[place]
        shots = tuple(Shot(_opened(finding.drawn.images[place])) for finding in findings)
        scores = ", ".join(f"{one.drawn.name} {one.drawn.scores[place].value:.3f}" for one in findings)
        rows.append(Row(f"{prompt} ({scores})", seed, shots))
    title = f"{made.base} at {size}: where the models differ most"
    return Contact(title, report_text.facts(found), tuple(one.drawn.name for one in findings), tuple(rows))


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
