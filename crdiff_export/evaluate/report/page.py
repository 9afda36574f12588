"""The contact sheet as one HTML page: every picture is in it, no script, and no link to anything elsewhere."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from crdiff_export.evaluate.report.contact import Contact, Row, Shot, shown
from crdiff_export.evaluate.report.sheet import described

# Should something get into the page after all, a browser neither runs nor loads it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark;
  --paper: #fafaf8; --ink: #1a1a1e; --muted: #6b6b72; --rule: #deded9; --shade: #fafaf8f2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #ececee; --muted: #9a9aa2; --rule: #33343a; --shade: #0d0e10f2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 110rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.5rem; font-weight: 600; }
h2 { margin: 0 0 .75rem; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; font-size: .9rem; }
dt, .seed, .help { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.help { font-size: .85rem; margin: 1rem 0 0; }
section { margin-top: 1.5rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0 .75rem .25rem 0; text-align: left; vertical-align: top; font-weight: 500; font-size: .9rem; }
.numbers td { font-weight: 400; white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; background: #fafaf8; }
.seed { padding-bottom: 1rem; font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; background: var(--rule); }
label { cursor: zoom-in; }
.pick { position: absolute; opacity: 0; pointer-events: none; }
.pick:focus-visible + label img { outline: 3px solid Highlight; outline-offset: 2px; }
.pick:checked + label img { position: fixed; inset: 0; z-index: 2; width: 100vw; height: 100vh; max-width: none;
  padding: 3rem 1rem 1rem; background: var(--shade); object-fit: contain; outline: none; }
.small .pick:checked + label img { image-rendering: pixelated; }
.name, .close { display: none; }
.pick:checked ~ .name { display: block; position: fixed; top: .75rem; left: 1rem; z-index: 3; font-weight: 600; }
.pick:checked ~ .close { display: block; position: fixed; inset: 0; z-index: 4; cursor: zoom-out; }
@media print { section { break-inside: avoid; overflow: visible; } .help { display: none; } }
"""
_HELP = "Click a picture to see it large; the arrow keys then go from one to the next, and a click closes it."
# Pixels of a picture's longer side up to which single ones are to be seen when it is large.
SMALL = 256


def save(contact: Contact, path: Path) -> None:
    """Write the page."""
    path.write_text(render(contact), encoding="utf-8")


def render(contact: Contact) -> str:
    """The page. Its pictures are PNG, pixel by pixel those given."""
    small = all(max(shot.image.size) <= SMALL for row in contact.rows for shot in row.shots)
    return frame(contact.title, contact.facts, rows(contact), small=small)


def frame(title: str, facts: Sequence[tuple[str, str]], body: str, *, small: bool = True) -> str:
    """A whole page around sections; where pictures are `small`, single pixels are to be seen when one is large."""
    return "\n".join(_frame(escape(title), facts, body, small=small)) + "\n"


def _frame(title: str, facts: Sequence[tuple[str, str]], body: str, *, small: bool) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>"
    yield f"<body{' class=small' if small else ''}>\n<h1>{title}</h1>\n<dl>"
    yield from (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    yield f'</dl>\n<p class="help">{_HELP}</p>'
    yield '<input class="pick" type="radio" name="large" id="none" checked aria-label="no picture large">'
    yield body
    yield "</body>\n</html>"


def rows(contact: Contact, number: int = 0) -> str:
    """A section for each prompt; the pictures of a page are numbered from `number` on."""
    return "\n".join(_rows(contact, number))


def _rows(contact: Contact, number: int) -> Iterator[str]:
    for prompt, some in contact.by_prompt():
        yield f"<section>\n<h2>{escape(shown(prompt)) or '(no prompt)'}</h2>\n<table>"
        yield f"<tr>{''.join(f'<th scope=col>{escape(name)}</th>' for name in contact.columns)}</tr>"
        for row in some:
            cells = (_cell(shot, _name(contact, row, place), number + place) for place, shot in enumerate(row.shots))
            yield f"<tr>{''.join(cells)}</tr>"
            yield f'<tr><td class="seed" colspan="{len(row.shots)}">seed {row.seed}</td></tr>'
            number += len(row.shots)
        yield "</table>\n</section>"


def _name(contact: Contact, row: Row, place: int) -> str:
    return f"{contact.columns[place]}, seed {row.seed}: {shown(row.prompt)}"


def _cell(shot: Shot, name: str, number: int) -> str:
    width, height = shot.image.size
    alt = escape(name)
    return (
        f'<td><input class="pick" type="radio" name="large" id="p{number}" aria-label="{alt}">'
        f'<label for="p{number}"><img src="{_data(shot)}" width="{width}" height="{height}" alt="{alt}"></label>'
        f'<span class="name" aria-hidden="true">{alt}</span>'
        f'<label class="close" for="none" aria-hidden="true"></label></td>'
    )


def _data(shot: Shot) -> str:
    """The picture as a PNG within a link, which is the whole of it."""
    stream = io.BytesIO()
    shot.image.save(stream, format="PNG", pnginfo=described(shot.parameters))
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
