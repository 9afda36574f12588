"""What our section of a card says: the variants, how to open them, the way back to the base, and what nobody knows."""

import re
from collections.abc import Iterator, Mapping, Sequence

from crdiff_export.formats.crdiff_keys import PAPER, Stamp
from crdiff_export.publish.card import snippets
from crdiff_export.publish.card.model import BaseModel, Card, Origin, Row
from crdiff_export.publish.card.text import link, page, prose

NOTE = "<!-- What is between crdiff:begin and crdiff:end is written anew at every push. Write above or below it. -->"
_PAPER = PAPER.partition(":")[2]
_ROW = re.compile(r"\|.*\|")
_SIZE = re.compile(r"[1-9][0-9]*x[1-9][0-9]*")
_HEX = re.compile(r"[0-9a-f]{64}")
_SIZE_COLUMN = "size"
_LAYERS: Mapping[str, str] = {"attn": "attention", "ff": "feed-forward", "attn2": "second attention"}
_STANDINGS: Mapping[str, str] = {"starting-point": "starting point, tuned by nobody"}
_SAID: Mapping[str, str] = {"searched": "were found by a search", "published": "are published ones"}
_FIRST = ("scorer", "dense", "pruned", "interval", "prompts")


def section(card: Card) -> list[str]:
    """The lines between the markers."""
    lines = [
        NOTE, "", "## Pruned variants", "", *_what(card), "", *_table(card), "",
        "### Use it", "", *snippets.usage(card),
        "### Dense weights and POA", "", *_dense(card), "",
        "### Where the ratios come from", "", *_honest(card), "",
    ]  # fmt: skip
    return [line.rstrip() for line in lines]


def sizes(lines: Sequence[str]) -> frozenset[str]:
    """The sizes that an earlier section's table has, as `512x512`."""
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if _ROW.fullmatch(line.strip())]
    places = [cells.index(_SIZE_COLUMN) for cells in rows if _SIZE_COLUMN in cells][:1]
    cells = (row[place] for place in places for row in rows if place < len(row))
    return frozenset(cell for cell in cells if _SIZE.fullmatch(cell))


def summary(card: Card) -> str:
    """One sentence for the beginning of a new card, true of whatever variants come later."""
    bases = _listed([_name(card, base) for base in card.bases]) or "diffusion models"
    return f"Variants of {bases}, pruned with CR-Diff, each for one image size."


def _what(card: Card) -> Iterator[str]:
    kinds = {kind for row in card.rows for kind in row.stamp.targets}
    layers = _listed([name for kind, name in _LAYERS.items() if kind in kinds]) or "target"
    own = "self-" if "attn" in kinds and all("down" in row.stamp.groups for row in card.rows) else ""
    natives = _listed(sorted({str(row.stamp.native) for row in card.rows}))
    casts = {row.stamp.cast for row in card.rows}
    cast = f", {'partly ' if None in casts else ''}cast to {_listed(sorted(map(prose, filter(None, casts))))}"
    smallest = "some" if any(row.stamp.masked for row in card.rows) else "the smallest"
    moves = any(row.stamp.moved for row in card.rows)
    moved = " but for those of the pruned layers where the table says so" if moves else ""
    yield (
        f"Each variant is its base with {smallest} weights of the {own}{layers} layers set to zero, for one image "
        f"size; the base was trained for {natives}. The method is CR-Diff ([arXiv {_PAPER}]"
        f"(https://arxiv.org/abs/{_PAPER})). Nothing was trained: all other weights are the "
        f"base's{moved}{cast if casts - {None} else ''}."
    )
    yield ""
    for base in card.bases:
        absent = "" if base.repo else ", which is not known on the Hub"
        yield f"- Base: {_name(card, base)}{absent}. {_licence(base)}"


def _name(card: Card, base: BaseModel) -> str:
    if base.repo:
        return link(base.repo, page(base.repo))
    names = dict.fromkeys(prose(row.stamp.source_name) for row in card.rows if card.base_of(row) == base)
    return _listed(list(names)) or "a model"


def _licence(base: BaseModel) -> str:
    if base.license is None:
        known = "The Hub names no licence for it" if base.repo else "Its licence is not known here"
        said = f"{known}; whatever it is, its variants stay under it."
    else:
        name = base.license_name or base.license
        shown = link(name, base.license_link) if base.license_link else prose(name)
        said = f"Its licence is {shown}, and its variants stay under it."
    return said + (" It is gated: accept its terms on its page first." if base.gated else "")


def _table(card: Card) -> Iterator[str]:
    several = len(card.bases) > 1
    ranked = _ranks(card)
    head = ["file", _SIZE_COLUMN, "ratios", "provenance", "POA weight", "bytes", "SHA-256"]
    head[3:3] = ["weights go by"] if ranked else []
    head[1:1] = ["base"] if several else []
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in card.ordered():
        base = card.base_of(row)
        cells = [
            _file(card, row),
            *([_name(card, base) if base else prose(row.stamp.source_name)] if several else ()),
            str(row.stamp.resolution),
            ", ".join(f"{prose(name)} {group.ratio:g}" for name, group in row.stamp.groups.items()),
            *([_criterion(row.stamp)] if ranked else ()),
            _standing(row.stamp),
            f"{row.stamp.poa_weight:g}",
            f"{row.size:,}",
            _digest(row.sha256) if row.sha256 else "several files",
        ]
        yield f"| {' | '.join(cells)} |"


def _ranks(card: Card) -> bool:
    """Whether a variant was pruned by something else than the paper's magnitude."""
    return any(row.stamp.criterion != "magnitude" for row in card.rows)


def _criterion(stamp: Stamp) -> str:
    told = f", calibrated at {stamp.calibrated.size} ({_digest(stamp.calibrated.hash)})" if stamp.calibrated else ""
    return f"{prose(stamp.criterion)}{told}{'; the others were moved' if stamp.moved else ''}"


def _file(card: Card, row: Row) -> str:
    if snippets.kind(row) in snippets.FILES:
        return link(row.path, page(card.repo, row.path, card.revision))
    tree = page(card.repo, row.path or "-", card.revision).replace("/blob/", "/tree/", 1).removesuffix("/-")
    return link(f"{row.path}/" if row.path else "this repository", tree)


def _standing(stamp: Stamp) -> str:
    return _STANDINGS.get(stamp.provenance) or prose(stamp.provenance)


def _digest(text: str) -> str:
    """A SHA-256 as a header or the Hub spells it, in the spelling of `sha256sum`."""
    digits = text.removeprefix("0x")
    return f"`{digits}`" if _HEX.fullmatch(digits) else prose(text)


def _dense(card: Card) -> Iterator[str]:
    weights = sorted({row.stamp.poa_weight for row in card.rows})
    advice = f"{weights[0]:g}" if len(weights) == 1 else "in the table"
    yield (
        "A variant alone is the pruned model. POA (pruned output amplification) mixes it with the dense one in each "
        "call of the network: *D* = (1 - *w*)·dense + *w*·pruned. With *w* = 1 that is the variant alone; the "
        f"recommended *w* is {advice}."
    )
    yield ""
    yield _mask(card)
    yield ""
    yield (
        "crdiff does POA with one copy of the weights: in diffusers, `crdiff_export.poa.enable(pipe, FILE)` for a "
        "pipeline that holds the base; in ComfyUI, the node *CR-Diff POA* (`crdiff comfyui install`) behind a loader "
        "of the base."
    )
    yield ""
    sources: dict[str, list[Row]] = {}
    for row in card.ordered():
        sources.setdefault(_source(card, row), []).append(row)
    for source, rows in sources.items():
        yield source if len(sources) == 1 else f"{source} For {_sizes(card, rows)}."


def _mask(card: Card) -> str:
    masked = [row.stamp.masked is not None for row in card.rows]
    if not any(masked):
        return (
            "The dense weights are the base's. The header of each file has the exact thresholds: whoever has the dense "
            "weights gets the mask from them, and so the pruned weights bit by bit. How is specified in "
            "docs/metadata.md of crdiff; `crdiff verify FILE --base BASE` does it and compares."
        )
    if all(row.stamp.moved for row in card.rows):
        return (
            "The dense weights are the base's. Weights that stay were moved as well, so the pruned layers are in the "
            "files alone; `crdiff verify FILE --base BASE` compares everything else with the base."
        )
    where = "In each file" if all(masked) else "Where the header has no thresholds,"
    return (
        f"The dense weights are the base's. {where} the zeros of the pruned layers are the mask. How is specified in "
        "docs/metadata.md of crdiff; `crdiff verify FILE --base BASE` compares a file with its base."
    )


def _source(card: Card, row: Row) -> str:
    stamp, base = row.stamp, card.base_of(row)
    origin = Origin.parse(stamp.source_name)
    if origin:
        name = "/".join(filter(None, (origin.repo, origin.file)))
        shown = link(name, page(origin.repo, origin.file or ""))
    else:
        shown = prose(stamp.source_name) + (f" of {link(base.repo, page(base.repo))}" if base and base.repo else "")
    if snippets.kind(row) not in snippets.FILES:
        return f"- Dense: {shown}. The header of each file of weights has the SHA-256 of the one that it was made from."
    hashes = [
        f"SHA-256 of {what} {_digest(text)}"
        for what, text in (("the file", stamp.source_file_hash), ("its tensors' bytes", stamp.source_hash))
        if text
    ]
    told = ", ".join(hashes) if hashes else "no hash was recorded, so nothing tells whether a copy is the right one"
    return f"- Dense: {shown}, {told}."


def _honest(card: Card) -> Iterator[str]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in card.ordered():
        stamp = row.stamp
        evidence = tuple(sorted(stamp.evidence.items()))
        groups.setdefault((stamp.provenance, stamp.provenance_source, stamp.prompt, evidence), []).append(row)
    for rows in groups.values():
        stamp = rows[0].stamp
        yield f"- For {_sizes(card, rows)}: {_judgement(stamp)}"


def _judgement(stamp: Stamp) -> str:
    source = f"({prose(stamp.provenance_source)})"
    prompt = f" They are for one prompt: “{prose(stamp.prompt)}”." if stamp.prompt else ""
    measured = sorted(stamp.evidence, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key))
    told = ", ".join(f"{prose(key)} {prose(stamp.evidence[key])}" for key in measured)
    evidence = f" It records this measurement and no other: {told}." if told else ""
    if stamp.provenance == "starting-point":
        nobody = "tuned" if evidence else "tuned or measured"
        text = f"**nobody {nobody} these ratios** for the model and size. They are a starting point {source}, and the"
        return f"{text} pictures may be worse than the base's: compare both before you rely on it.{prompt}{evidence}"
    none = "" if evidence else " No measurement is recorded."
    said = _SAID.get(stamp.provenance) or f"are called {prose(stamp.provenance)}"
    return f"by the header, the ratios {said} {source}.{prompt}{evidence}{none}"


def _sizes(card: Card, rows: Sequence[Row]) -> str:
    """The rows' sizes, with the family where there are several."""
    several = len({row.stamp.family for row in card.rows}) > 1
    names = (f"{snippets.title(row.stamp.family)} " if several else "" for row in rows)
    return _listed(list(dict.fromkeys(f"{name}{row.stamp.resolution}" for name, row in zip(names, rows, strict=True))))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
