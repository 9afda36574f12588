"""The content of a card: the repository, its variants and their bases."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self
from urllib.parse import urlsplit

from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.hub.location import parse_uri
from crdiff_export.packs import PackHeader
from crdiff_export.publish.card.text import page

GATING = "extra_gated_"
# Cards on the Hub nest gating forms three deep; deeper values are dropped.
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base as the Hub describes it.

    Attributes:
        repo: The Hub id; None for a base that is not on the Hub.
        license: The licence's id on the Hub.
        license_name: The name of a licence whose id is `other`.
        license_link: The address of its text.
        pipeline_tag: The Hub's name for the task.
        gated: Whether people have to accept terms first.
        gating: The `extra_gated_*` keys of a gated base's card.
        pipeline: Whether the repository has diffusers' folders, and so the configuration of the model.
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
        cls, repo: str | None, gated: bool | str, data: Mapping[str, Any], *, pipeline: bool = False
    ) -> Self:
        """Read the front matter of a base's card. Values of a type that the Hub does not document are left out.

        Args:
            repo: The Hub id.
            gated: Whether the base is gated; the Hub says "auto" or "manual".
            data: The parsed front matter. A link to a file of the repository becomes an address.
            pipeline: Whether the repository has diffusers' folders.

        Returns:
            The base.
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
            gated=bool(gated),
            gating=dict(_gating(data)) if gated else {},
            pipeline=pipeline,
        )


@dataclass(frozen=True, slots=True)
class CardVariant:
    """A variant in the repository.

    Attributes:
        path: Its file, or its folder ('' for the root).
        stamp: Its header.
        size: Bytes of its weights.
        sha256: The SHA-256 of its file as hex; None for a folder.
        weights: diffusers' name for weights such as `*.fp16.safetensors`.
        sheet: The path of a picture of the variant beside its base, as `crdiff preview` draws it.
    """

    path: str
    stamp: Stamp
    size: int
    sha256: str | None
    weights: str | None = None
    sheet: str | None = None


@dataclass(frozen=True, slots=True)
class CardPack:
    """A pack in the repository.

    Attributes:
        path: Its file.
        header: What its metadata says.
        size: Its bytes.
        sha256: The SHA-256 of the file as hex, where the Hub gives it.
        weights: diffusers' name for the weights of a base that is a folder, such as `*.fp16.safetensors`.
    """

    path: str
    header: PackHeader
    size: int
    sha256: str | None = None
    weights: str | None = None

    def is_of_base(self, stamp: Stamp) -> bool:
        """Whether a baked file was made from the base of this pack, by the hashes in both headers."""
        files = self.header.files
        hashes = {f"0x{digest}" for file in files for digest in (file.data_hash, file.file_hash) if digest}
        return bool(hashes & {stamp.source_hash, stamp.source_file_hash})

    def holds(self, stamp: Stamp) -> bool:
        """Whether an export with the pack makes the weights of a baked file."""
        own = self.header.variants.get(stamp.resolution)
        return own is not None and self.is_of_base(stamp) and _numbers(own) == _numbers(stamp)


@dataclass(frozen=True, slots=True)
class CardRow:
    """One size with its numbers, and where the repository has it: in a file, in packs, or in both."""

    stamp: Stamp
    file: CardVariant | None = None
    packs: tuple[CardPack, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """The content of a card.

    Attributes:
        repo: The Hub id of the repository.
        variants: Its exported variants, in any order.
        bases: The bases of all variants.
        relation: The Hub's `base_model_relation`: adapter, merge, quantized or finetune.
        revision: The branch that the card and the variants are on.
        packs: Its packs, in any order.
    """

    repo: str
    variants: tuple[CardVariant, ...]
    bases: tuple[BaseModel, ...]
    relation: str = "finetune"
    revision: str = "main"
    packs: tuple[CardPack, ...] = ()

    def rows(self) -> tuple[CardRow, ...]:
        """Return the sizes by family, from small to large, and by name; what is in a file and a pack alike, once."""
        packs = sorted(self.packs, key=lambda pack: pack.path)
        rows = [
            CardRow(variant.stamp, variant, tuple(pack for pack in packs if pack.holds(variant.stamp)))
            for variant in self.variants
        ]
        listed = {(pack.path, row.stamp.resolution) for row in rows for pack in row.packs}
        rows += (
            CardRow(stamp, packs=(pack,))
            for pack in packs
            for size, stamp in pack.header.variants.items()
            if (pack.path, size) not in listed
        )
        return tuple(sorted(rows, key=_rank))

    def stamps(self) -> tuple[Stamp, ...]:
        """Return the headers of all sizes, in the order of `rows`."""
        return tuple(row.stamp for row in self.rows())

    def sizes(self) -> tuple[str, ...]:
        """Return the sizes of the variants, in their order."""
        return tuple(dict.fromkeys(str(stamp.resolution) for stamp in self.stamps()))

    def base_of(self, stamp: Stamp) -> BaseModel | None:
        """Find the base of a variant, as far as the names tell."""
        if len(self.bases) == 1:
            return self.bases[0]
        location = parse_uri(stamp.source_name)
        repo = location.repo.lower() if location else None
        candidates = [base for base in self.bases if (base.repo.lower() if base.repo else None) == repo]
        return candidates[0] if len(candidates) == 1 else None


def _numbers(stamp: Stamp) -> Mapping[str, str]:
    """Return what decides which weights go: all requested numbers, without the base."""
    return replace(stamp, source_hash=None, source_file_hash=None, residual="none").request_keys()


def _rank(row: CardRow) -> tuple[str, int, int, str]:
    size = row.stamp.resolution
    path = row.file.path if row.file else row.packs[0].path
    return row.stamp.family, size.pixels, size.width, path


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _absolute(repo: str | None, link: str | None) -> str | None:
    """Make a link of the base's card fit for the card of another repository."""
    if link is None:
        return None
    if re.match(r"https?://", link, re.IGNORECASE):
        return link if _is_address(link) else None
    inside = link.removeprefix("./").removeprefix("/")
    return page(repo, inside) if repo and inside and ":" not in inside else None


def _is_address(text: str) -> bool:
    try:
        return bool(urlsplit(text).hostname) and text.isprintable() and " " not in text
    except ValueError:
        return False


def _gating(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(key, str) and key.startswith(GATING) and (plain := _plain(value, _DEPTH)) is not None:
            yield key, plain


def _plain(value: object, depth: int) -> Any:
    """Copy text, numbers and flags in lists and mappings, sharing nothing; None for anything else."""
    if depth and isinstance(value, Mapping):
        pairs = ((str(key), _plain(inner, depth - 1)) for key, inner in value.items())
        return {key: inner for key, inner in pairs if inner is not None}
    if depth and isinstance(value, list):
        return [inner for item in value if (inner := _plain(item, depth - 1)) is not None]
    if isinstance(value, str | bool | int):
        return value
    return None if value is None or isinstance(value, Mapping | list) else str(value)
