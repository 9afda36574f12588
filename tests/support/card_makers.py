"""Variants, bases and cards to test with, and readers of cards that know nothing of the code under test."""

import hashlib
import re
from dataclasses import replace
from typing import Any

from markdown_it import MarkdownIt

from crdiff_export.formats.crdiff_keys import GroupStamp, Stamp
from crdiff_export.models import families
from crdiff_export.publish.card import BaseModel, Card, CardVariant, render
from crdiff_export.sizes import Size

BEGIN, END = "<!-- crdiff:begin -->", "<!-- crdiff:end -->"
BUNDLED = "model.diffusion_model."
NOBODY = "search start of the CR-Diff public code: 0.3/0.3/0.3, POA weight 1.5; nobody tuned this size"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
BASE = BaseModel.from_front_matter(SDXL, gated=False, data={"license": "openrail++", "pipeline_tag": "text-to-image"})


def stamp(**changes: Any) -> Stamp:
    """What the header of an SDXL variant says."""
    family = families.by_id(changes.get("family", "sdxl"))
    values = {
        "family": family.id,
        "layout": "original",
        "prefix": BUNDLED,
        "criterion": "magnitude",
        "targets": family.default_kinds,
        "groups": {group: GroupStamp(0.3, 31, 100, 0.046875) for group in family.groups},
        "resolution": Size(512, 512),
        "native": Size(*family.native or (512, 512)),
        "source_name": f"hf://{SDXL}/sd_xl_base_1.0.safetensors",
        "recipe": "sdxl.toml 512x512",
        "provenance": "starting-point",
        "provenance_source": NOBODY,
        "poa_weight": 1.5,
        "source_hash": "0x" + hashlib.sha256(b"tensors").hexdigest(),
        "source_file_hash": "0x" + hashlib.sha256(b"file").hexdigest(),
    }
    return Stamp(**{**values, **changes})


def row(path: str = "sdxl-512x512.safetensors", **changes: Any) -> CardVariant:
    sha256 = (
        hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest() if path.endswith(".safetensors") else None
    )
    return CardVariant(path, stamp(**changes), 6_938_040_682, sha256)


def card(*rows: CardVariant, of: tuple[BaseModel, ...] = (BASE,)) -> Card:
    return Card("me/x", rows, of)


def front(text: str) -> str:
    """The front matter, found anew."""
    match = re.match(r"\ufeff?---\r?\n((?:.*\r?\n)*?)---[ \t]*(?:\r?\n|\Z)", text)
    return match[1] if match else ""


def body(text: str) -> str:
    """All that follows the front matter."""
    match = re.match(r"\ufeff?---\r?\n(?:.*\r?\n)*?---[ \t]*(?:\r?\n|\Z)", text)
    return text[match.end() :] if match else text.removeprefix("\ufeff")


def shown_as_code(text: str) -> set[int]:
    """The numbers of the lines that are code, by a parser of CommonMark."""
    tokens = MarkdownIt("commonmark").parse(text)
    spans = [token.map for token in tokens if token.type in ("fence", "code_block") and token.map]
    return {number for start, end in spans for number in range(start, end)}


def around(text: str) -> tuple[str, str, str] | None:
    """What stands before our section's content, the content, and what follows; None without markers."""
    code = shown_as_code(text)
    lines = text.splitlines(keepends=True)
    places = [n for n, line in enumerate(lines) if line.strip() in (BEGIN, END) and n not in code]
    if not places:
        return None
    begin, end = places
    return "".join(lines[: begin + 1]), "".join(lines[begin + 1 : end]), "".join(lines[end:])


def section(text: str) -> str:
    parts = around(body(text))
    assert parts
    return parts[1]


def told(*rows: CardVariant, of: tuple[BaseModel, ...] = (BASE,), revision: str = "main") -> str:
    """What the section of a new card says."""
    return section(render(replace(card(*rows, of=of), revision=revision), None))
