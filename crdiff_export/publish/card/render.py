"""Make a card, or update the front matter and the managed section of a card that exists."""

from typing import Any

from crdiff_export.models.families import pipelines
from crdiff_export.publish.card import front_matter, managed_section
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
    """Write a card. In a card that exists only our keys and our section change, and every other byte stays.

    A key that somebody has set stays. base_model and tags gain what is missing; tags also lose the sizes that the
    section no longer has. Rendering again changes nothing.

    Args:
        card: The content.
        existing: The text of the card that exists, if there is one.

    Returns:
        The text.

    Raises:
        CardError: If a card cannot be changed safely.
    """
    text = existing or f"# {prose(card.repo.partition('/')[2] or card.repo)}\n\n{summary(card)}\n"
    newline = managed_section.newline(text)
    head, block, rest = front_matter.split(text) or _without_front_matter(text, newline)
    line = 1 + managed_section.count_lines(text) - managed_section.count_lines(rest)
    before, ours, after = managed_section.split(rest, newline, line)
    stale = sizes(ours) - set(card.sizes())
    changes = Changes(
        units={"license": _licence(card), **_single(card), GATING: _gating(card)},
        items={"base_model": [base.repo for base in card.bases if base.repo], "tags": _tags(card)},
        stale={"tags": frozenset(map(_SIZE_TAG.format, stale))},
        single=frozenset({"base_model"}),
        order=_ORDER,
    )
    edited = front_matter.edit(block, changes, newline, 1 + managed_section.count_lines(head))
    return "".join([head, edited, before, *(written + newline for written in section(card)), after])


def _without_front_matter(text: str, newline: str) -> tuple[str, str, str]:
    """Put empty front matter before the text."""
    mark = "\ufeff" * text.startswith("\ufeff")
    body = text.removeprefix("\ufeff")
    blank = "" if body.startswith(("\r", "\n")) else newline
    return f"{mark}---{newline}", "", f"---{newline}{blank}{body}"


def _licence(card: Card) -> dict[str, str]:
    """The keys for the bases' licence; none if a licence is not known."""
    kinds = list(dict.fromkeys((base.license, base.license_name, base.license_link) for base in card.bases))
    named = {licence for licence, _, _ in kinds}
    if not kinds or None in named:
        return {}
    if len(kinds if "other" in named else named) > 1:
        # The section lists them.
        return {"license": "other", "license_name": "see-the-bases", "license_link": page(card.repo, "README.md")}
    licence, name, address = kinds[0]
    if licence != "other":
        return {"license": str(licence)}
    repo = card.bases[0].repo
    link = address or (page(repo) if repo else None)
    return {"license": "other", "license_name": name or "see-the-base", **({"license_link": link} if link else {})}


def _single(card: Card) -> dict[str, dict[str, str]]:
    """The keys that do not depend on other keys."""
    tasks = {base.pipeline_tag for base in card.bases if base.pipeline_tag}
    usual = [pipelines.find(stamp.family) for stamp in card.stamps()]
    of_pictures = all(pipeline and pipeline.pictures for pipeline in usual)
    values = {
        "pipeline_tag": tasks.pop() if len(tasks) == 1 else "image-to-image" if of_pictures else "text-to-image",
    }
    if card.variants or not card.packs:  # no library of the Hub's opens a pack
        is_diffusers = any(kind(variant) == "pipeline" for variant in card.variants)
        values["library_name"] = "diffusers" if is_diffusers else "diffusion-single-file"
    if any(base.repo for base in card.bases):
        values["base_model_relation"] = card.relation
    return {key: {key: value} for key, value in values.items()}


def _gating(card: Card) -> dict[str, Any]:
    """The gating form of the first gated base; two forms cannot be merged."""
    return next((dict(base.gating) for base in card.bases if base.gated and base.gating), {})


def _tags(card: Card) -> list[str]:
    return [*_TAGS, *map(_SIZE_TAG.format, card.sizes())]
