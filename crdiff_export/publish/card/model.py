"""What a card is about, as values: the repository, the variants in it, and the bases that they were made from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.publish.card.text import page

GATING = "extra_gated_"
# `bases.locate` names what comes from the Hub so.
_PLACE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?", re.ASCII | re.DOTALL)
# The Hub's own cards nest three deep; what is deeper is no form to fill in.
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Origin:
    """A place on the Hub that a base came from; `file` None for a folder."""

    repo: str
    file: str | None

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The place that a stamp's `source_name` means; None for a base that was not taken from the Hub."""
        match = _PLACE.fullmatch(name)
        return cls(match["repo"], match["file"]) if match else None


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the Hub says of a base; `repo` None for a base that is not on the Hub.

    `gating` are the `extra_gated_*` keys of a gated base's card. `pipeline`: the repository has diffusers' folders,
    so that its configuration can be taken from there.
    """

    repo: str | None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None
    gated: bool = False
    gating: Mapping[str, Any] = field(default_factory=dict)
    pipeline: bool = False

    @classmethod
    def from_front_matter(
        cls, repo: str | None, gated: bool | str, data: Mapping[str, Any], *, pipeline: bool | None = None
    ) -> Self:
        """Read a base card's parsed front matter; what is not of the type that the Hub documents counts as not there.

        A licence's link that means a file of the base's repository becomes an address. `pipeline` None: go by the
        card's `library_name`.
        """
        licence = data.get("license")
        if isinstance(licence, list) and len(licence) == 1:
            licence = licence[0]
        return cls(
            repo=repo,
            license=_text(licence),
            license_name=_text(data.get("license_name")),
            license_link=_absolute(repo, _text(data.get("license_link"))),
            pipeline_tag=_text(data.get("pipeline_tag")),
            gated=bool(gated),  # the Hub says "auto" or "manual"
            gating=dict(_gating(data)) if gated else {},
            pipeline=data.get("library_name") == "diffusers" if pipeline is None else pipeline,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """A variant in the repository: `path` is its file, or its folder ('' for the root).

    `sha256` is of the file as the Hub has it, None for a folder of several files. `variant` is diffusers' name for
    weights such as `*.fp16.safetensors`.
    """

    path: str
    stamp: Stamp
    size: int
    sha256: str | None
    inpainting: bool = False
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """All that a card says: every variant in the repository, in any order, and their bases.

    `relation` is what the Hub calls `base_model_relation`: adapter, merge, quantized or finetune. `revision` is the
    branch that the card and the variants are on.
    """

    repo: str
    rows: tuple[Row, ...]
    bases: tuple[BaseModel, ...]
    relation: str = "finetune"
    revision: str = "main"

    def ordered(self) -> tuple[Row, ...]:
        """The rows by family, then from small to large, then by name."""
        return tuple(sorted(self.rows, key=_rank))

    def sizes(self) -> tuple[str, ...]:
        """The sizes that there are variants for, in the rows' order."""
        return tuple(dict.fromkeys(str(row.stamp.resolution) for row in self.ordered()))

    def base_of(self, row: Row) -> BaseModel | None:
        """The base that a variant was made from, as far as the names tell."""
        origin = Origin.parse(row.stamp.source_name)
        named = [base for base in self.bases if origin and (base.repo or "").lower() == origin.repo.lower()]
        unnamed = [base for base in self.bases if not origin and base.repo is None]
        found = named or (list(self.bases) if len(self.bases) == 1 else unnamed)
        return found[0] if len(found) == 1 else None


def _rank(row: Row) -> tuple[str, int, int, str]:
    size = row.stamp.resolution
    return row.stamp.family, size.width * size.height, size.width, row.path


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _absolute(repo: str | None, place: str | None) -> str | None:
    """A link of the base's card as it is to be written in another repository."""
    if place is None:
        return None
    if re.match(r"https?://", place, re.IGNORECASE):
        return place if _is_address(place) else None
    inside = place.removeprefix("./").removeprefix("/")
    return page(repo, inside) if repo and inside and ":" not in inside else None


def _is_address(text: str) -> bool:
    try:
        return bool(urlsplit(text).hostname) and text.isprintable() and " " not in text
    except ValueError:
        return False


def _gating(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(key, str) and key.startswith(GATING) and (kept := _plain(value, _DEPTH)) is not None:
            yield key, kept


def _plain(value: object, depth: int) -> Any:
    """A copy that shares nothing with itself, of text, whole numbers, yes and no; None for what cannot be kept."""
    if depth and isinstance(value, Mapping):
        pairs = ((str(key), _plain(inner, depth - 1)) for key, inner in value.items())
        return {key: inner for key, inner in pairs if inner is not None}
    if depth and isinstance(value, list):
        return [inner for item in value if (inner := _plain(item, depth - 1)) is not None]
    if isinstance(value, str | bool | int):
        return value
    return None if value is None or isinstance(value, Mapping | list) else str(value)
