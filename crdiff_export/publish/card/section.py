"""Write the managed section of a card: variants, how to open them, the dense weights, the origin of the ratios."""

import re
from collections.abc import Iterator, Mapping, Sequence

from crdiff_export.formats.crdiff_keys import PAPER, Stamp
from crdiff_export.hub.location import parse_uri
from crdiff_export.publish.card import snippets
from crdiff_export.publish.card.model import BaseModel, Card, CardVariant
from crdiff_export.publish.card.text import link, page, prose

NOTE = "<!-- What is between crdiff:begin and crdiff:end is written anew at every push. Write above or below it. -->"
_PAPER = PAPER.partition(":")[2]
_TABLE_LINE = re.compile(r"\|.*\|")
_SIZE = re.compile(r"[1-9][0-9]*x[1-9][0-9]*")
_HEX = re.compile(r"[0-9a-f]{64}")
_SIZE_COLUMN = "size"
_LAYERS: Mapping[str, str] = {"attn": "attention", "ff": "feed-forward", "attn2": "second attention"}
_PROVENANCE_LABELS: Mapping[str, str] = {"starting-point": "starting point, tuned by nobody"}
_PROVENANCE_PHRASES: Mapping[str, str] = {"searched": "were found by a search", "published": "are published ones"}
_EVIDENCE_ORDER = ("scorer", "dense", "pruned", "interval", "prompts")


def section(card: Card) -> list[str]:
    """Return the lines between the markers."""
    lines = [
        NOTE, "", "## Pruned variants", "", *_what(card), "", *_table(card), "",
        "### Use it", "", *snippets.usage(card),
        "### Dense weights and POA", "", *_dense(card), "",
        "### Where the ratios come from", "", *_origins(card), "",
    ]  # fmt: skip
    return [line.rstrip() for line in lines]


def sizes(lines: Sequence[str]) -> frozenset[str]:
    """Read the sizes in the table of an earlier section, as `512x512`."""
    table = [[cell.strip() for cell in line.split("|")] for line in lines if _TABLE_LINE.fullmatch(line.strip())]
    columns = [cells.index(_SIZE_COLUMN) for cells in table if _SIZE_COLUMN in cells][:1]
    cells = (line[column] for column in columns for line in table if column < len(line))
    return frozenset(cell for cell in cells if _SIZE.fullmatch(cell))


def summary(card: Card) -> str:
    """Return one sentence for the top of a new card that stays true when variants are added."""
    bases = _listed([_name(card, base) for base in card.bases]) or "diffusion models"
    return f"Variants of {bases}, pruned with CR-Diff, each for one image size."


def _what(card: Card) -> Iterator[str]:
    kinds = {kind for variant in card.variants for kind in variant.stamp.targets}
    layers = _listed([name for kind, name in _LAYERS.items() if kind in kinds]) or "target"
    own = "self-" if "attn" in kinds and all("down" in variant.stamp.groups for variant in card.variants) else ""
    natives = _listed(sorted({str(variant.stamp.native) for variant in card.variants}))
    casts = {variant.stamp.cast for variant in card.variants}
    cast = f", {'partly ' if None in casts else ''}cast to {_listed(sorted(map(prose, filter(None, casts))))}"
    smallest = "some" if any(variant.stamp.masked for variant in card.variants) else "the smallest"
    moves = any(variant.stamp.moved for variant in card.variants)
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
    names = dict.fromkeys(
        prose(variant.stamp.source_name) for variant in card.variants if card.base_of(variant) == base
    )
    return _listed(list(names)) or "a model"


def _licence(base: BaseModel) -> str:
    if base.license is None:
        known = "The Hub names no licence for it" if base.repo else "Its licence is not known here"
        text = f"{known}; whatever it is, its variants stay under it."
    else:
        name = base.license_name or base.license
        shown = link(name, base.license_link) if base.license_link else prose(name)
        text = f"Its licence is {shown}, and its variants stay under it."
    return text + (" It is gated: accept its terms on its page first." if base.gated else "")


def _table(card: Card) -> Iterator[str]:
    several = len(card.bases) > 1
    with_criteria = _has_criteria(card)
    head = ["file", _SIZE_COLUMN, "ratios", "provenance", "POA weight", "bytes", "SHA-256"]
    head[3:3] = ["weights go by"] if with_criteria else []
    head[1:1] = ["base"] if several else []
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for variant in card.sorted_variants():
        base = card.base_of(variant)
        cells = [
            _file(card, variant),
            *([_name(card, base) if base else prose(variant.stamp.source_name)] if several else ()),
            str(variant.stamp.resolution),
            ", ".join(f"{prose(name)} {group.ratio:g}" for name, group in variant.stamp.groups.items()),
            *([_criterion(variant.stamp)] if with_criteria else ()),
            _provenance(variant.stamp),
            f"{variant.stamp.poa_weight:g}",
            f"{variant.size:,}",
            _digest(variant.sha256) if variant.sha256 else "several files",
        ]
        yield f"| {' | '.join(cells)} |"


def _has_criteria(card: Card) -> bool:
    """Whether a variant was pruned by another criterion than the paper's magnitude."""
    return any(variant.stamp.criterion != "magnitude" for variant in card.variants)


def _criterion(stamp: Stamp) -> str:
    source = stamp.calibrated
    calibrated = f", calibrated at {source.size} ({_digest(source.hash)})" if source else ""
    return f"{prose(stamp.criterion)}{calibrated}{'; the others were moved' if stamp.moved else ''}"


def _file(card: Card, variant: CardVariant) -> str:
    if snippets.kind(variant) in snippets.FILES:
        return link(variant.path, page(card.repo, variant.path, card.revision))
    tree = page(card.repo, variant.path or "-", card.revision).replace("/blob/", "/tree/", 1).removesuffix("/-")
    return link(f"{variant.path}/" if variant.path else "this repository", tree)


def _provenance(stamp: Stamp) -> str:
    return _PROVENANCE_LABELS.get(stamp.provenance) or prose(stamp.provenance)


def _digest(text: str) -> str:
    """A SHA-256 from a header or the Hub, as `sha256sum` writes it."""
    digits = text.removeprefix("0x")
    return f"`{digits}`" if _HEX.fullmatch(digits) else prose(text)


def _dense(card: Card) -> Iterator[str]:
    weights = sorted({variant.stamp.poa_weight for variant in card.variants})
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
    sources: dict[str, list[CardVariant]] = {}
    for variant in card.sorted_variants():
        sources.setdefault(_source(card, variant), []).append(variant)
    for source, variants in sources.items():
        yield source if len(sources) == 1 else f"{source} For {_sizes(card, variants)}."


def _mask(card: Card) -> str:
    masked = [variant.stamp.masked is not None for variant in card.variants]
    if not any(masked):
        return (
            "The dense weights are the base's. The header of each file has the exact thresholds: whoever has the dense "
            "weights gets the mask from them, and so the pruned weights bit by bit. How is specified in "
            "docs/metadata.md of crdiff; `crdiff verify FILE --base BASE` does it and compares."
        )
    if all(variant.stamp.moved for variant in card.variants):
        return (
            "The dense weights are the base's. Weights that stay were moved as well, so the pruned layers are in the "
            "files alone; `crdiff verify FILE --base BASE` compares everything else with the base."
        )
    where = "In each file" if all(masked) else "Where the header has no thresholds,"
    return (
        f"The dense weights are the base's. {where} the zeros of the pruned layers are the mask. How is specified in "
        "docs/metadata.md of crdiff; `crdiff verify FILE --base BASE` compares a file with its base."
    )


def _source(card: Card, variant: CardVariant) -> str:
    stamp, base = variant.stamp, card.base_of(variant)
    origin = parse_uri(stamp.source_name)
    if origin:
        name = "/".join(filter(None, (origin.repo, origin.file)))
        shown = link(name, page(origin.repo, origin.file or ""))
    else:
        shown = prose(stamp.source_name) + (f" of {link(base.repo, page(base.repo))}" if base and base.repo else "")
    if snippets.kind(variant) not in snippets.FILES:
        return f"- Dense: {shown}. The header of each file of weights has the SHA-256 of the one that it was made from."
    hashes = [
        f"SHA-256 of {what} {_digest(text)}"
        for what, text in (("the file", stamp.source_file_hash), ("its tensors' bytes", stamp.source_hash))
        if text
    ]
    text = ", ".join(hashes) if hashes else "no hash was recorded, so nothing tells whether a copy is the right one"
    return f"- Dense: {shown}, {text}."


def _origins(card: Card) -> Iterator[str]:
    groups: dict[tuple[object, ...], list[CardVariant]] = {}
    for variant in card.sorted_variants():
        stamp = variant.stamp
        evidence = tuple(sorted(stamp.evidence.items()))
        groups.setdefault((stamp.provenance, stamp.provenance_source, stamp.prompt, evidence), []).append(variant)
    for variants in groups.values():
        stamp = variants[0].stamp
        yield f"- For {_sizes(card, variants)}: {_origin(stamp)}"


def _origin(stamp: Stamp) -> str:
    source = f"({prose(stamp.provenance_source)})"
    prompt = f" They are for one prompt: “{prose(stamp.prompt)}”." if stamp.prompt else ""
    order = {key: number for number, key in enumerate(_EVIDENCE_ORDER)}
    measured = sorted(stamp.evidence, key=lambda key: (order.get(key, len(order)), key))
    numbers = ", ".join(f"{prose(key)} {prose(stamp.evidence[key])}" for key in measured)
    evidence = f" It records this measurement and no other: {numbers}." if numbers else ""
    if stamp.provenance == "starting-point":
        nobody = "tuned" if evidence else "tuned or measured"
        text = f"**nobody {nobody} these ratios** for the model and size. They are a starting point {source}, and the"
        return f"{text} pictures may be worse than the base's: compare both before you rely on it.{prompt}{evidence}"
    none = "" if evidence else " No measurement is recorded."
    phrase = _PROVENANCE_PHRASES.get(stamp.provenance) or f"are called {prose(stamp.provenance)}"
    return f"by the header, the ratios {phrase} {source}.{prompt}{evidence}{none}"


def _sizes(card: Card, variants: Sequence[CardVariant]) -> str:
    """The variants' sizes, with the family if there are several."""
    several = len({variant.stamp.family for variant in card.variants}) > 1
    stamps = [variant.stamp for variant in variants]
    names = (f"{snippets.title(stamp.family)} " * several + str(stamp.resolution) for stamp in stamps)
    return _listed(list(dict.fromkeys(names)))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
