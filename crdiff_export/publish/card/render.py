"""The whole card: its front matter and our section of it, made anew or put in step in a card that somebody has."""

from typing import Any

from crdiff_export.publish.card import front_matter, marked
from crdiff_export.publish.card.front_matter import Changes
from crdiff_export.publish.card.model import GATING, Card
from crdiff_export.publish.card.section import section, sizes, summary
from crdiff_export.publish.card.snippets import kind
from crdiff_export.publish.card.text import page, prose

_TAGS = ("cr-diff", "pruned", "sparse")
_SIZE_TAG = "resolution:{}"
_ORDER = (
    *("license", "license_name", "license_link", "base_model", "base_model_relation"),
    *("library_name", "pipeline_tag", "tags"),
)


def render(card: Card, existing: str | None) -> str:
    """The card's text: a new one, or `existing` with our keys and our section in step and every other byte as it was.

    A key that somebody has set stays; base_model and tags only gain what is missing, and tags lose the sizes that the
    section had and has no more. CardError where that cannot be done safely; rendering again changes nothing.
    """
    text = existing or f"# {prose(card.repo.partition('/')[2] or card.repo)}\n\n{summary(card)}\n"
    newline = marked.newline(text)
    head, block, rest = front_matter.split(text) or _without_front_matter(text, newline)
    ours = marked.find(rest, 1 + marked.line_ends(text) - marked.line_ends(rest))
    stale = sizes(ours.inside()) - set(card.sizes())
    changes = Changes(
        units={"license": _licence(card), **_single(card), GATING: _gating(card)},
        items={"base_model": [base.repo for base in card.bases if base.repo], "tags": _tags(card)},
        stale={"tags": frozenset(map(_SIZE_TAG.format, stale))},
        single=frozenset({"base_model"}),
        order=_ORDER,
    )
    made = front_matter.edit(block, changes, newline, 1 + marked.line_ends(head))
    return head + made + ours.replaced(section(card), newline)


def _without_front_matter(text: str, newline: str) -> tuple[str, str, str]:
    """Front matter with nothing in it, before the text."""
    mark = "\ufeff" * text.startswith("\ufeff")
    body = text.removeprefix("\ufeff")
    blank = "" if body.startswith(("\r", "\n")) else newline
    return f"{mark}---{newline}", "", f"---{newline}{blank}{body}"


def _licence(card: Card) -> dict[str, str]:
    """The bases' licence; nothing where one of them is not known."""
    kinds = list(dict.fromkeys((base.license, base.license_name, base.license_link) for base in card.bases))
    named = {licence for licence, _, _ in kinds}
    if not kinds or None in named:
        return {}
    if len(kinds if "other" in named else named) > 1:
        # The section says whose is which.
        return {"license": "other", "license_name": "see-the-bases", "license_link": page(card.repo, "README.md")}
    licence, name, address = kinds[0]
    if licence != "other":
        return {"license": str(licence)}
    repo = card.bases[0].repo
    link = address or (page(repo) if repo else None)
    return {"license": "other", "license_name": name or "see-the-base", **({"license_link": link} if link else {})}


def _single(card: Card) -> dict[str, dict[str, str]]:
    """The keys that stand for themselves."""
    library = "diffusers" if any(kind(row) == "pipeline" for row in card.rows) else "diffusion-single-file"
    tasks = {base.pipeline_tag for base in card.bases if base.pipeline_tag}
    refiners = all(row.stamp.family == "sdxl-refiner" for row in card.rows)
    values = {
        "library_name": library,
        "pipeline_tag": tasks.pop() if len(tasks) == 1 else "image-to-image" if refiners else "text-to-image",
    }
    if any(base.repo for base in card.bases):
        values["base_model_relation"] = card.relation
    return {key: {key: value} for key, value in values.items()}


def _gating(card: Card) -> dict[str, Any]:
    """What the first gated base asks of people before they get its files: two forms in one would be neither."""
    return next((dict(base.gating) for base in card.bases if base.gated and base.gating), {})


def _tags(card: Card) -> list[str]:
    return [*_TAGS, *map(_SIZE_TAG.format, card.sizes())]
