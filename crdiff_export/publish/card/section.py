"""Write the managed section of a card: variants, how to open them, the dense weights, the origin of the ratios.

`templates/section.md` is its text. Every name from a header or a repository goes through a filter of `text.py`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crdiff_export.formats.crdiff_keys import PAPER, Stamp, auto_v2, auto_v3
from crdiff_export.formats.text import PROJECT_ADDRESS
from crdiff_export.hub.location import parse_uri
from crdiff_export.models.evidence_text import evidence_text, poa_note
from crdiff_export.publish.card import snippets
from crdiff_export.publish.card.model import BaseModel, Card, CardPack, CardRow, CardVariant
from crdiff_export.publish.card.text import image, link, page, prose, quoted, word

if TYPE_CHECKING:
    from jinja2 import Template

_T = TypeVar("_T")
_PAPER = PAPER.partition(":")[2]
_TABLE_LINE = re.compile(r"\|.*\|")
_SIZE = re.compile(r"[1-9][0-9]*x[1-9][0-9]*")
_HEX = re.compile(r"[0-9a-f]{64}")
_LAYERS: Mapping[str, str] = {
    "attn": "attention",
    "ff": "feed-forward",
    "ff-shared": "shared feed-forward",
    "attn2": "second attention",
}


def section(card: Card) -> list[str]:
    """Return the lines between the markers."""
    rows = card.rows()
    variants, packs = [row.file for row in rows if row.file], sorted(card.packs, key=lambda pack: pack.path)
    text = _template().render(card=card, rows=rows, stamps=card.stamps(), variants=variants, packs=packs)
    return [line.rstrip() for line in text.split("\n")]


def sizes(lines: Sequence[str]) -> frozenset[str]:
    """Read the sizes in the table of an earlier section, as `512x512`."""
    table = [[cell.strip() for cell in line.split("|")] for line in lines if _TABLE_LINE.fullmatch(line.strip())]
    columns = [cells.index("size") for cells in table if "size" in cells][:1]
    cells = (line[column] for column in columns for line in table if column < len(line))
    return frozenset(cell for cell in cells if _SIZE.fullmatch(cell))


def summary(card: Card) -> str:
    """Return one sentence for the top of a new card that stays true when variants are added."""
    bases = _listed(_name(card, base) for base in card.bases) or "diffusion models"
    return f"Variants of {bases}, pruned with CR-Diff, each for one image size."


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=False,  # noqa: S701  this is Markdown; HTML's escapes would not do
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "digest": _digest, "escape_glob": escape, "exact": "{:,}".format, "grouped": _grouped, "link": link,
        "listed": _listed, "prose": prose,
        "number": "{:g}".format, "one_line": _one_line, "quoted": quoted, "sorted": sorted, "word": word,
    }  # fmt: skip
    environment.tests |= {"beaten": snippets.has_better_rival, "drawn": snippets.is_drawn}
    environment.globals |= {
        "base_digests": _base_digests, "crdiff": link("crdiff", PROJECT_ADDRESS) if PROJECT_ADDRESS else "crdiff",
        "digests": _digests, "file": _file, "layers": _layers, "name": _name, "origin": _origin,
        "pack_file": _pack_file, "paper": _PAPER, "picture": _picture, "poa_note": poa_note, "sizes": _sizes,
        "snippets": snippets, "source": _source, "standing": _standing,
    }  # fmt: skip
    return environment.get_template("section.md")


def _one_line(text: str) -> str:
    return " ".join(text.split()) + "\n"


def _grouped(items: Iterable[_T], key: Callable[[_T], object]) -> list[list[_T]]:
    """Put variants or rows that have the same key together."""
    groups: dict[object, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _layers(card: Card) -> str:
    kinds = {kind for stamp in card.stamps() for kind in stamp.targets}
    prefix = "self-" if "attn" in kinds and all("down" in stamp.groups for stamp in card.stamps()) else ""
    return prefix + (_listed(name for kind, name in _LAYERS.items() if kind in kinds) or "target")


def _name(card: Card, base: BaseModel) -> str:
    if base.repo:
        return link(base.repo, page(base.repo))
    names = (prose(stamp.source_name) for stamp in card.stamps() if card.base_of(stamp) == base)
    return _listed(dict.fromkeys(names)) or "a model"


def _file(card: Card, variant: CardVariant) -> str:
    if snippets.kind(variant) in snippets.FILES:
        return link(variant.path, page(card.repo, variant.path, card.revision))
    tree = page(card.repo, variant.path or "-", card.revision).replace("/blob/", "/tree/", 1).removesuffix("/-")
    return link(f"{variant.path}/" if variant.path else "this repository", tree)


def _pack_file(card: Card, pack: CardPack) -> str:
    return link(pack.path, page(card.repo, pack.path, card.revision))


def _digest(text: str) -> str:
    """A SHA-256 from a header or the Hub, as `sha256sum` writes it."""
    digits = text.removeprefix("0x")
    return f"`{digits}`" if _HEX.fullmatch(digits) else prose(text)


def _digests(file_hash: str | None, tensors_hash: str | None) -> list[str]:
    """The hashes of a file, each with its name, and the short ones by which Civitai and web UIs find it."""
    digests = [
        ("SHA-256", _digest, file_hash), ("AutoV2", _short(auto_v2), file_hash),
        ("SHA-256 of its tensors' bytes", _digest, tensors_hash), ("AutoV3", _short(auto_v3), tensors_hash),
    ]  # fmt: skip
    return [f"{name} {make(value)}" for name, make, value in digests if value]


def _base_digests(card: Card, row: CardRow) -> list[str]:
    """The hashes of the one file of a base: those in the header, completed by those in a pack of the same base."""
    stamp = row.stamp
    packs = row.packs or [pack for pack in card.packs if pack.is_of_base(stamp)]
    (file, *others) = next((pack.header.files for pack in packs), (None,))
    if file is None or others:
        return _digests(stamp.source_file_hash, stamp.source_hash)
    return _digests(stamp.source_file_hash or file.file_hash, file.data_hash)


def _short(shorten: Callable[[str], str]) -> Callable[[str], str]:
    return lambda digest: f"`{shorten(digest)}`" if _HEX.fullmatch(digest.removeprefix("0x")) else prose(digest)


def _picture(card: Card, variant: CardVariant) -> str:
    size = variant.stamp.resolution
    text = f"Pictures of the base and of the pruned model, from the same noise, at {size}"
    return image(text, card.repo, variant.sheet or "", card.revision)


def _standing(stamp: Stamp) -> str:
    """Whether pruning helped, as far as the header knows, in one sentence."""
    if stamp.evidence:
        return prose(evidence_text(stamp.evidence))
    return "not measured: whether pruning helps at this size is unknown"


def _source(card: Card, stamp: Stamp) -> str:
    """The dense weights that a variant was made from."""
    base, name = card.base_of(stamp), stamp.source_name
    if origin := parse_uri(name):
        return link("/".join(filter(None, (origin.repo, origin.file))), page(origin.repo, origin.file or ""))
    return prose(name) + (f" of {link(base.repo, page(base.repo))}" if base and base.repo else "")


def _origin(row: CardRow) -> tuple[object, ...]:
    stamp = row.stamp
    evidence = tuple(sorted(stamp.evidence.items()))
    return stamp.provenance, stamp.provenance_source, str(stamp.borrowed_from), stamp.prompt, evidence


def _sizes(card: Card, stamps: Sequence[Stamp]) -> str:
    """The sizes in some headers, with the family if the card has several."""
    several = len({stamp.family for stamp in card.stamps()}) > 1
    names = (f"{snippets.title(stamp.family)} " * several + str(stamp.resolution) for stamp in stamps)
    return _listed(dict.fromkeys(names))


def _listed(names: Iterable[str]) -> str:
    words = list(names)
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
