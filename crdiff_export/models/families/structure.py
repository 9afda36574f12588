"""Read the layers of any UNet from the names and shapes of its tensors, in both layouts.

The rule is the public code's (`prune_by_ratio`): weights of linear layers whose path contains `attn` or `ff` and not
`attn2`, in the down, mid and up blocks of diffusers' `UNet2DConditionModel`. It selects the layers of GLIGEN's `fuser`
and the attention of `only_cross_attention`, too, and they are pruned as they are there.

Blocks of the original layout are numbered with their samplers: `input_blocks.0` is the first convolution, then each
residual block with its attention, and each downsampler, has a number (diffusers' `convert_ldm_unet_checkpoint`).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from crdiff_export.errors import FamilyError
from crdiff_export.formats.text import printable
from crdiff_export.models.families.model import FamilyLayer, Kind, LayoutName
from crdiff_export.models.families.unet import GROUPS, KINDS, any_unet, tensors_of

# A transformer block has these; `attn2` may be missing, but not a part of it.
_SELF = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
_CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_BLOCK = re.compile(r"(.*transformer_blocks)\.(\d{1,4})\.(.+)")
# A name that a table can hold as it is: no braces or quotes, numbers without leading zeros and of at most four digits.
_PLAIN = re.compile(r"(?:(?!0\d|\d{5})[\w-]+\.)+weight", re.ASCII)
_INSIDE = re.compile(r"(input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)\.")
_NUMBERED = re.compile(r"(input_blocks|output_blocks|down_blocks|up_blocks)\.(\d{1,3})\.")
_HINT = "The file is damaged, or of a model that only shares its names with a UNet of Stable Diffusion."


class _Place(NamedTuple):
    """Where a UNet may have an attention: its group, its level, and its path in both layouts."""

    group: str
    level: int
    original: str
    diffusers: str


@dataclass(frozen=True, slots=True)
class UNetStructure:
    """The layers of a UNet that the method prunes, and the groups that they are in.

    Attributes:
        layout: The layout.
        layers: The layers.
        others: How the names of other parts begin that have layers which end like them.
    """

    layout: LayoutName
    layers: tuple[FamilyLayer, ...]
    others: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that have layers, in order."""
        present = {layer.group for layer in self.layers}
        return tuple(group for group in GROUPS if group in present)

    def table(self, vector: int | None) -> str:
        """Write the table of a family with these layers in this order, which a baked file carries.

        Args:
            vector: The width of the vector beside the text; None if the model takes none.

        Returns:
            The table, as docs/families.md describes it.
        """
        family, kinds = any_unet(), json.dumps(KINDS)
        lines = [f'id = "{family.id}"', f'title = "{family.title}"', "", "[unet]"]
        lines += [f"groups = {json.dumps(self.groups)}", f"kinds = {kinds}", f"default = {kinds}"]
        lines += [f"vector = {vector}"] if vector else []
        for layout in ("original", "diffusers"):
            first, vectors, last = tensors_of(layout)
            lines += ["", f"[unet.{layout}]", f'first = "{first}"', f'last = "{last}"']
            lines += [f"vectors = {json.dumps(vectors)}"]
            lines += [f"others = {json.dumps(self.others)}"] if self.others and layout == self.layout else []
        for kind, group, original, diffusers in _patterns(self.layers):
            lines += ["", "[[target]]", f'kind = "{kind}"', f'group = "{group}"']
            lines += [f'original = "{original}"', f'diffusers = "{diffusers}"']
        return "\n".join(lines) + "\n"


def read_structure(shapes: Mapping[str, tuple[int, ...]]) -> UNetStructure | None:
    """Read the structure of a UNet.

    Args:
        shapes: The shape of every tensor, by name, without prefix.

    Returns:
        The structure; None if the tensors are of no UNet, or of one without layers to prune.

    Raises:
        FamilyError: A part of a block is missing, or a layer is where no block is.
    """
    layout: LayoutName
    if "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes:
        layout, places = "original", list(_original_places(shapes))
    elif "conv_in.weight" in shapes and "conv_out.weight" in shapes:
        layout, places = "diffusers", list(_diffusers_places(shapes))
    else:
        return None
    _refuse_gaps(shapes)
    paths = [place.original if layout == "original" else place.diffusers for place in places]
    inside: dict[str, list[str]] = {path: [] for path in paths}
    for name in filter(_INSIDE.match, shapes):
        path = next((".".join(parts) for parts in _heads(name) if ".".join(parts) in inside), None)
        target = is_target(name, shapes[name])
        if path and (not target or _PLAIN.fullmatch(name)):
            inside[path].append(name)
        elif target:
            raise FamilyError(f"{printable(name)}: a layer outside of the blocks of a UNet", _HINT)
    for path in paths:
        _refuse_adapters(inside[path])
        _check_blocks(inside[path], shapes)
    layers = [
        _layer(name, name.removeprefix(f"{path}."), place)
        for place, path in zip(places, paths, strict=True)
        for name in sorted(inside[path], key=_by_weight)
        if is_target(name, shapes[name])
    ]
    _check_levels(places, paths, {layer.tensor for layer in layers})
    return UNetStructure(layout, tuple(layers), _others(shapes, layers)) if layers else None


def _others(shapes: Mapping[str, tuple[int, ...]], layers: Sequence[FamilyLayer]) -> tuple[str, ...]:
    tails = tuple({f".{match[3]}" if (match := _BLOCK.fullmatch(layer.tensor)) else layer.tensor for layer in layers})
    alike = (name for name in shapes if f".{name}".endswith(tails) and not _INSIDE.match(name))
    return tuple(sorted({f"{name.split('.')[0]}." for name in alike if _PLAIN.fullmatch(name)}))


def _refuse_gaps(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a UNet whose blocks are not numbered from 0 on: one is missing."""
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for name in shapes:
        if match := _NUMBERED.match(name):
            numbers[match[1]].add(int(match[2]))
    for stack, numbered in numbers.items():
        if (gap := next((number for number in range(max(numbered)) if number not in numbered), None)) is not None:
            raise FamilyError(f"{stack}.{gap} is missing", _HINT)


def _refuse_adapters(names: Sequence[str]) -> None:
    """Refuse a LoRA beside the weights: its matrices have names like targets."""
    if adapter := next((name for name in names if re.search(r"lora|\.base_layer\.", name)), None):
        raise FamilyError(
            f"{printable(adapter)}: of an adapter that is not fused", "Fuse it, then save the model again."
        )


def is_target(name: str, shape: Sequence[int]) -> bool:
    """Whether the method prunes a tensor inside of the blocks, by its name and as a linear layer's weight."""
    path = name.removesuffix(".weight")
    chosen = ("attn" in path or "ff" in path) and "attn2" not in path
    return name.endswith(".weight") and chosen and len(shape) > 1


def _by_weight(name: str) -> tuple[str, int]:
    """Put the blocks of a stack that have the same weight one after another, as a pattern of a table has them."""
    match = _BLOCK.fullmatch(name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, 0)


def _patterns(layers: Sequence[FamilyLayer]) -> Iterator[tuple[Kind, str, str, str]]:
    """Yield kind, group and both names of the layers, with a range for consecutive blocks of a stack."""
    numbers = [int(match[2]) if (match := _BLOCK.fullmatch(layer.diffusers)) else 0 for layer in layers]

    def pattern(i: int) -> tuple[Kind, str, str, str, int]:
        names = (layers[i].original[0], layers[i].diffusers)
        original, diffusers = (_BLOCK.sub(r"\1.{}.\3", name) for name in names)
        return layers[i].kind, layers[i].group, original, diffusers, numbers[i] - i

    for (kind, group, original, diffusers, _), run in groupby(range(len(layers)), pattern):
        first, *others = (numbers[i] for i in run)
        blocks = f"{{{first}..{others[-1]}}}" if others else str(first)
        yield kind, group, original.replace("{}", blocks), diffusers.replace("{}", blocks)


def _heads(name: str) -> Iterator[list[str]]:
    """Yield the first two, three and four parts of a name: paths of attentions have as many."""
    parts = name.split(".")
    for count in (2, 3, 4):
        yield parts[:count]


def _layer(name: str, rest: str, place: _Place) -> FamilyLayer:
    kind: Kind = "ff" if "ff" in rest.split(".") else "attn"
    return FamilyLayer(name, None, place.group, kind, (f"{place.original}.{rest}", None), f"{place.diffusers}.{rest}")


def _original_places(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Place]:
    blocks = {".".join(name.split(".")[:2]) for name in shapes}
    level = layer = 0
    number = 1
    while (block := f"input_blocks.{number}") in blocks:
        if f"{block}.0.op.weight" in shapes:
            level, layer = level + 1, 0
        else:
            yield _Place("down", level, f"{block}.1", f"down_blocks.{level}.attentions.{layer}")
            layer += 1
        number += 1
    yield _Place("mid", 0, "middle_block.1", "mid_block.attentions.0")
    level = layer = number = 0
    while (block := f"output_blocks.{number}") in blocks:
        yield _Place("up", level, f"{block}.1", f"up_blocks.{level}.attentions.{layer}")
        layer, number = layer + 1, number + 1
        if any(f"{block}.{i}.conv.weight" in shapes for i in (1, 2)):
            level, layer = level + 1, 0


def _diffusers_places(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Place]:
    resnets: dict[tuple[str, int], int] = defaultdict(int)
    samplers: set[int] = set()
    for name in shapes:
        if match := re.match(r"(down|up)_blocks\.(\d{1,3})\.(?:resnets\.(\d{1,3})|downsamplers)\.", name):
            level = int(match[2])
            if match[3] is None:
                samplers.add(level)
            else:
                key = match[1], level
                resnets[key] = max(resnets[key], int(match[3]) + 1)
    number = 1
    for level in range(sum(group == "down" for group, _ in resnets)):
        for layer in range(resnets["down", level]):
            path = f"down_blocks.{level}.attentions.{layer}"
            yield _Place("down", level, f"input_blocks.{number}.1", path)
            number += 1
        number += level in samplers
    yield _Place("mid", 0, "middle_block.1", "mid_block.attentions.0")
    number = 0
    for level in range(sum(group == "up" for group, _ in resnets)):
        for layer in range(resnets["up", level]):
            path = f"up_blocks.{level}.attentions.{layer}"
            yield _Place("up", level, f"output_blocks.{number}.1", path)
            number += 1


def _check_blocks(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that transformer blocks are numbered without gaps, and that each has all of its parts."""
    blocks: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if (match := _BLOCK.fullmatch(name)) and len(shapes[name]) == 2:
            blocks[match[1]][int(match[2])].add(match[3].removesuffix(".weight"))
    for stack, numbered in blocks.items():
        for number in range(max(numbered) + 1):
            parts = numbered.get(number, set())
            wanted = (*_SELF, *(_CROSS if any(part.startswith("attn2.") for part in parts) else ()))
            if missing := next((part for part in wanted if part not in parts), None):
                key = f"{stack}.{number}.{missing}.weight"
                problem = f"has shape {list(shapes[key])}, and is no matrix" if key in shapes else "is missing"
                raise FamilyError(f"{printable(key)} {problem}", _HINT)


def _check_levels(places: Sequence[_Place], paths: Sequence[str], targets: set[str]) -> None:
    """Check that a level has attention after each of its residual blocks, or after none."""
    present = {path for path in paths if any(target.startswith(f"{path}.") for target in targets)}
    levels: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for place, path in zip(places, paths, strict=True):
        levels[place.group, place.level].append(path)
    for level in levels.values():
        if any(path in present for path in level) and (missing := next((p for p in level if p not in present), None)):
            raise FamilyError(f"{printable(missing)} has no attention, others of its level have", _HINT)
