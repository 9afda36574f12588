"""An evaluation as one HTML page: numbers, plot, and the pictures where the models differ most; nothing elsewhere."""

import io
from collections.abc import Iterator
from html import escape

from PIL import Image

from crdiff_export.evaluate import plot, report_text
from crdiff_export.evaluate.findings import Evaluation, Subject
from crdiff_export.evaluate.report import Contact, Row, Shot, page
from crdiff_export.formats.text import printable

SHOWN = 8


def render(found: Evaluation) -> str:
    """The page."""
    body = "".join((*_table(found), *_plot(found), *_pictures(found)))
    title = f"{printable(found.base)}: dense, pruned and POA"
    small = max((max(s.size.width, s.size.height) for s in found.subjects), default=0) <= page.SMALL
    facts = (*found.facts, *(("note", printable(text, limit=1000)) for text in found.notes))
    return page.frame(title, facts, body, small=small)


def _table(found: Evaluation) -> Iterator[str]:
    columns, lines = report_text.table(found)
    yield "<section><h2>Scores</h2><table class=numbers><tr>"
    yield from (f"<th scope=col>{escape(name)}</th>" for name in columns)
    yield "</tr>"
    for row in lines:
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
    yield "</table></section>"


def _plot(found: Evaluation) -> Iterator[str]:
    svg = plot.draw(found, "svg").decode()
    yield f"<section><h2>Score against size</h2>{svg[svg.index('<svg') :]}</section>"


def _pictures(found: Evaluation) -> Iterator[str]:
    number = 0
    for subject in found.subjects:
        contact = _contact(found, subject)
        if contact.rows:
            yield f"<section><h2>{escape(contact.title)}</h2></section>"
            yield page.rows(contact, number)
            number += sum(len(row.shots) for row in contact.rows)


def _contact(found: Evaluation, subject: Subject) -> Contact:
    """The rows where pruning changes the score most, for the worse first, then for the better."""
    findings = found.of(subject)
    rows = []
    for place in found.most_different(subject, SHOWN):
        prompt, seed = found.pairs[place]
        shots = tuple(Shot(_opened(finding.drawn.images[place])) for finding in findings)
        scores = ", ".join(f"{f.drawn.name} {f.drawn.scores[place].value:.4g}" for f in findings)
        rows.append(Row(f"{prompt} ({scores})", seed, shots))
    title = f"{report_text.where(found, subject)}: where the models differ most"
    return Contact(title, (), tuple(finding.drawn.name for finding in findings), tuple(rows))


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
