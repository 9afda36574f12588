"""Show how to open a variant: code for diffusers, and the folders that ComfyUI, A1111 and Forge read.

Source: diffusers' `loaders/single_file*.py`, 0.36 to 0.42, for what it makes of one file.
"""

from collections.abc import Collection, Iterator, Mapping
from glob import escape
from itertools import groupby
from typing import Literal

from crdiff_export.hub.location import parse_uri
from crdiff_export.models import families
from crdiff_export.models.families import pipelines
from crdiff_export.models.families.pipelines import BUNDLED, Pipeline
from crdiff_export.publish.card.model import Card, CardVariant
from crdiff_export.publish.card.text import prose, quoted, word
from crdiff_export.sizes import Size

Kind = Literal["pipeline", "folder", "component", "checkpoint", "network", "shards"]

FILES: Collection[Kind] = ("checkpoint", "network")
_DTYPES: Mapping[str | None, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_PROMPT = quoted("a lighthouse on a cliff, morning light")
_CHECKPOINTS, _NETWORKS = "ComfyUI/models/checkpoints", "ComfyUI/models/diffusion_models"
_WEBUI = "stable-diffusion-webui{}/models/Stable-diffusion"


def usage(card: Card) -> Iterator[str]:
    """Yield the lines on how to open each kind of file in the repository, with one variant as the example."""
    variants = sorted(card.sorted_variants(), key=_alike)  # stable: the smallest size of each kind comes first
    for _, group in groupby(variants, key=_alike):
        variant, *others = group
        shown = [*_diffusers(card, variant), *_folders(card, variant)] or [_no_way(variant), ""]
        more = " (the others of this kind likewise, each with its own size)" if others else ""
        yield from (f"{_heading(variant)}, here {variant.stamp.resolution}{more}:", "", *shown)


def kind(variant: CardVariant) -> Kind:
    """Tell from path, layout and prefix how a variant is stored."""
    if not variant.path.endswith(".safetensors"):
        if variant.path.rsplit("/", 1)[-1] in ("unet", "transformer"):
            return "component"
        if variant.stamp.layout != "diffusers":
            return "shards"
        return "folder" if variant.path else "pipeline"
    return "checkpoint" if (variant.stamp.layout, variant.stamp.prefix) == ("original", BUNDLED) else "network"


def title(family: str) -> str:
    """Return the title of a family; the id of one that is unknown here."""
    return next((known.title for known in families.all_families() if known.id == family), prose(family))


def _alike(variant: CardVariant) -> tuple[str, ...]:
    """Equal for variants that are opened with the same code."""
    stamp, weights = variant.stamp, variant.weights or ""
    return stamp.family, _special(variant), kind(variant), stamp.layout, stamp.prefix, stamp.cast or "", weights


def _special(variant: CardVariant) -> str:
    """The model of a family that has the same shape as others but needs its own configuration."""
    base = variant.stamp.family == "sd21" and variant.stamp.native == Size(512, 512)
    return "inpainting" if variant.inpainting else "base" if base else ""


def _heading(variant: CardVariant) -> str:
    network = "UNet" if "down" in variant.stamp.groups else "transformer"
    what = {
        "pipeline": "the pipeline", "folder": "a pipeline's folder", "component": f"the {network}'s folder",
        "checkpoint": "a checkpoint", "network": f"the {network} alone", "shards": "a checkpoint in shards",
    }[kind(variant)]  # fmt: skip
    special = "" if not _special(variant) else f" ({_special(variant)})"
    return f"**{title(variant.stamp.family)}{special}**, {what}"


def _diffusers(card: Card, variant: CardVariant) -> Iterator[str]:
    """A Python program that makes a picture; nothing for what diffusers cannot open."""
    model, stored = pipelines.find(variant.stamp.family, _special(variant)), kind(variant)
    whole = stored in ("pipeline", "folder")
    if stored == "shards" or not (whole or model):
        return
    model = model or Pipeline("DiffusionPipeline", "")
    dtype = f"torch_dtype=torch.{_DTYPES.get(variant.stamp.cast, model.dtype)}"
    imports, opening = _whole(card, variant, dtype) if whole else _parts(card, variant, model, dtype)
    imports += ["from diffusers.utils import load_image"] if model.pictures else []
    yield "```python"
    yield "import torch"
    yield from sorted(imports, key=lambda line: line.split()[1])
    yield ""
    yield from opening
    yield from (f'{name} = load_image("{name}.png")' for name in model.pictures)
    yield from (f"prompt = {_PROMPT}", f"image = pipe(prompt, {model.call.format(variant.stamp.resolution)}).images[0]")
    yield "```"
    yield ""


def _whole(card: Card, variant: CardVariant, dtype: str) -> tuple[list[str], list[str]]:
    """Imports and code for a pipeline with all its parts."""
    imports, opening, source = ["from diffusers import DiffusionPipeline"], [], quoted(card.repo) + _at(card)
    if variant.path:
        imports.append("from huggingface_hub import snapshot_download")
        pattern = quoted(f"{escape(variant.path)}/*")
        inside = quoted(f"/{variant.path}")
        opening = [f"folder = snapshot_download({source}, allow_patterns={pattern}) + {inside}"]
        source = "folder"
    arguments = f"{source}, {dtype}{_weights(variant)}"
    return imports, [*opening, f'pipe = DiffusionPipeline.from_pretrained({arguments}).to("cuda")']


def _parts(card: Card, variant: CardVariant, model: Pipeline, dtype: str) -> tuple[list[str], list[str]]:
    """Imports and code for a file, or for a folder with the pruned part alone."""
    stored, config, repo = kind(variant), quoted(_config(card, variant, model)), quoted(card.repo)
    imports = [f"from diffusers import {model.pipeline}"]
    opening = [f"file = hf_hub_download({repo}, {quoted(variant.path)}{_at(card)})"]
    if stored != "component":
        imports.append("from huggingface_hub import hf_hub_download")
    if stored == "checkpoint" and model.folder == "unet":
        arguments = [f"    file, config={config}, {dtype}"]
        return imports, [*opening, f"pipe = {model.pipeline}.from_single_file(", *arguments, ').to("cuda")']
    # Of SD3 and FLUX there are checkpoints with and without text encoders; this opens both.
    imports[0] = f"from diffusers import {', '.join(sorted((model.pipeline, model.network)))}"
    if stored == "component":
        where = f"{repo}, subfolder={quoted(variant.path)}{_at(card)}, {dtype}{_weights(variant)}"
        opening = [f"{model.folder} = {model.network}.from_pretrained({where})"]
    else:
        weights, renaming = _renamed(variant, model)
        imports += ["from safetensors.torch import load_file"] if renaming else []
        where = f'    {weights}, config={config}, subfolder="{model.folder}", {dtype}'
        opening += [*renaming, f"{model.folder} = {model.network}.from_single_file(", where, ")"]
    arguments = [f"    {config}, {model.folder}={model.folder}, {dtype}"]
    return imports, [*opening, f"pipe = {model.pipeline}.from_pretrained(", *arguments, ').to("cuda")']


def _renamed(variant: CardVariant, model: Pipeline) -> tuple[str, list[str]]:
    """The argument for `from_single_file`, and the lines that make it from the file."""
    layout, prefix = variant.stamp.layout, variant.stamp.prefix
    known = BUNDLED if model.folder == "unet" and layout == "original" else ""
    if prefix == known or (layout == "original" and prefix == BUNDLED):
        return "file", []
    name = f"name.removeprefix({quoted(prefix)})" if prefix else "name"
    name = f"{quoted(known)} + {name}" if known else name
    chosen = f" if name.startswith({quoted(prefix)})" if prefix else ""
    pairs = f"    for name, tensor in load_file(file).items(){chosen}"
    return "weights", ["weights = {", f"    {name}: tensor", pairs, "}"]


def _config(card: Card, variant: CardVariant, model: Pipeline) -> str:
    """The repository with the configuration and the other parts of the model: the base, if it has folders."""
    base, origin = card.base_of(variant), parse_uri(variant.stamp.source_name)
    folders = base and base.repo and (base.pipeline or (origin and not origin.file))
    return base.repo if base and base.repo and folders else model.config


def _at(card: Card) -> str:
    """The argument for the branch; empty for main."""
    return "" if card.revision == "main" else f", revision={quoted(card.revision)}"


def _weights(variant: CardVariant) -> str:
    return f", variant={quoted(variant.weights)}" if variant.weights else ""


def _folders(card: Card, variant: CardVariant) -> Iterator[str]:
    """Commands that put a file into the folders of programs."""
    family, stored = variant.stamp.family, kind(variant)
    flux = family.startswith("flux-") and variant.stamp.layout == "original"
    bare = "; text encoders and VAE are the base's"
    folders = []
    if family == "demo":
        return
    if stored == "checkpoint":
        folders = [("ComfyUI, Load Checkpoint", _CHECKPOINTS)]
        folders += [("A1111 and Forge", _WEBUI.format(""))] if "down" in variant.stamp.groups else []
    elif stored == "network" and variant.stamp.prefix in ("", BUNDLED):
        folders = [(f"ComfyUI, Load Diffusion Model{bare}", _NETWORKS)]
    if flux and folders:
        folders.append((f"Forge{bare if stored == 'network' else ''}", _WEBUI.format("-forge")))
    if folders:
        yield "```sh"
        for program, folder in folders:
            yield f"# {program}"
            branch = "" if card.revision == "main" else f" --revision {word(card.revision)}"
            yield f"hf download {word(card.repo)} {word(variant.path)}{branch} --local-dir {folder}"
        yield "```"
        yield ""


def _no_way(variant: CardVariant) -> str:
    if variant.stamp.family == "demo":
        return "The demo model is there to try crdiff out: `crdiff preview demo` draws with it, and nothing else does."
    if kind(variant) == "shards":
        return "It is split as its base is. diffusers and ComfyUI open such a model only when its shards are joined."
    return "Open it as you open its base."
