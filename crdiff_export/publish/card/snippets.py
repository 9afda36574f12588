"""How to open a variant: code for diffusers, and the folders that ComfyUI, A1111 and Forge look into.

What diffusers makes of one file: its `loaders/single_file*.py`, of 0.36 to 0.42.
"""

from collections.abc import Collection, Iterator, Mapping
from glob import escape
from itertools import groupby
from typing import Literal

from crdiff_export.models import families
from crdiff_export.models.families import pipelines
from crdiff_export.models.families.pipelines import BUNDLED, Pipeline
from crdiff_export.publish.card.model import Card, Origin, Row
from crdiff_export.publish.card.text import prose, quoted, word
from crdiff_export.sizes import Size

Kind = Literal["pipeline", "folder", "component", "checkpoint", "network", "shards"]

FILES: Collection[Kind] = ("checkpoint", "network")
_DTYPES: Mapping[str | None, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_PROMPT = quoted("a lighthouse on a cliff, morning light")
_CHECKPOINTS, _NETWORKS = "ComfyUI/models/checkpoints", "ComfyUI/models/diffusion_models"
_WEBUI = "stable-diffusion-webui{}/models/Stable-diffusion"


def usage(card: Card) -> Iterator[str]:
    """The lines that say how to open each kind of file that the repository holds, with one of its variants."""
    rows = sorted(card.ordered(), key=_alike)  # stable: the smallest size of each kind comes first
    for _, group in groupby(rows, key=_alike):
        row, *others = group
        shown = [*_diffusers(card, row), *_folders(card, row)] or [_no_way(row), ""]
        more = " (the others of this kind likewise, each with its own size)" if others else ""
        yield from (f"{_heading(row)}, here {row.stamp.resolution}{more}:", "", *shown)


def kind(row: Row) -> Kind:
    """What a variant's path, layout and prefix tell of how it is stored."""
    if not row.path.endswith(".safetensors"):
        if row.path.rsplit("/", 1)[-1] in ("unet", "transformer"):
            return "component"
        if row.stamp.layout != "diffusers":
            return "shards"
        return "folder" if row.path else "pipeline"
    return "checkpoint" if (row.stamp.layout, row.stamp.prefix) == ("original", BUNDLED) else "network"


def title(family: str) -> str:
    """What people call a family; one that is not known here by its id."""
    return next((known.title for known in families.all_families() if known.id == family), prose(family))


def _alike(row: Row) -> tuple[str, ...]:
    """Equal for variants that are opened with the same code."""
    stamp = row.stamp
    return stamp.family, _special(row), kind(row), stamp.layout, stamp.prefix, stamp.cast or "", row.variant or ""


def _special(row: Row) -> str:
    """Which of a family's models it is: they are of one shape, but need another configuration."""
    base = row.stamp.family == "sd21" and row.stamp.native == Size(512, 512)
    return "inpainting" if row.inpainting else "base" if base else ""


def _heading(row: Row) -> str:
    network = "UNet" if "down" in row.stamp.groups else "transformer"
    what = {
        "pipeline": "the pipeline", "folder": "a pipeline's folder", "component": f"the {network}'s folder",
        "checkpoint": "a checkpoint", "network": f"the {network} alone", "shards": "a checkpoint in shards",
    }[kind(row)]  # fmt: skip
    special = "" if not _special(row) else f" ({_special(row)})"
    return f"**{title(row.stamp.family)}{special}**, {what}"


def _diffusers(card: Card, row: Row) -> Iterator[str]:
    """A Python program that makes a picture; nothing for what diffusers has no way to open."""
    model, stored = pipelines.find(row.stamp.family, _special(row)), kind(row)
    whole = stored in ("pipeline", "folder")
    if stored == "shards" or not (whole or model):
        return
    model = model or Pipeline("DiffusionPipeline", "")
    dtype = f"torch_dtype=torch.{_DTYPES.get(row.stamp.cast, model.dtype)}"
    imports, opening = _whole(card, row, dtype) if whole else _parts(card, row, model, dtype)
    imports += ["from diffusers.utils import load_image"] if model.pictures else []
    yield "```python"
    yield "import torch"
    yield from sorted(imports, key=lambda line: line.split()[1])
    yield ""
    yield from opening
    yield from (f'{name} = load_image("{name}.png")' for name in model.pictures)
    yield from (f"prompt = {_PROMPT}", f"image = pipe(prompt, {model.call.format(row.stamp.resolution)}).images[0]")
    yield "```"
    yield ""


def _whole(card: Card, row: Row, dtype: str) -> tuple[list[str], list[str]]:
    """Imports and code for a pipeline with all its parts."""
    imports, opening, place = ["from diffusers import DiffusionPipeline"], [], quoted(card.repo) + _at(card)
    if row.path:
        imports.append("from huggingface_hub import snapshot_download")
        pattern = quoted(f"{escape(row.path)}/*")
        inside = quoted(f"/{row.path}")
        opening = [f"folder = snapshot_download({place}, allow_patterns={pattern}) + {inside}"]
        place = "folder"
    return imports, [*opening, f'pipe = DiffusionPipeline.from_pretrained({place}, {dtype}{_variant(row)}).to("cuda")']


def _parts(card: Card, row: Row, model: Pipeline, dtype: str) -> tuple[list[str], list[str]]:
    """Imports and code for a file, or for a folder with the pruned part alone."""
    stored, config, repo = kind(row), quoted(_config(card, row, model)), quoted(card.repo)
    imports = [f"from diffusers import {model.pipeline}"]
    opening = [f"file = hf_hub_download({repo}, {quoted(row.path)}{_at(card)})"]
    if stored != "component":
        imports.append("from huggingface_hub import hf_hub_download")
    if stored == "checkpoint" and model.folder == "unet":
        made = [f"    file, config={config}, {dtype}"]
        return imports, [*opening, f"pipe = {model.pipeline}.from_single_file(", *made, ').to("cuda")']
    # Of SD3 and FLUX there are checkpoints with and without text encoders; this opens both.
    imports[0] = f"from diffusers import {', '.join(sorted((model.pipeline, model.network)))}"
    if stored == "component":
        where = f"{repo}, subfolder={quoted(row.path)}{_at(card)}, {dtype}{_variant(row)}"
        opening = [f"{model.folder} = {model.network}.from_pretrained({where})"]
    else:
        weights, renaming = _renamed(row, model)
        imports += ["from safetensors.torch import load_file"] if renaming else []
        where = f'    {weights}, config={config}, subfolder="{model.folder}", {dtype}'
        opening += [*renaming, f"{model.folder} = {model.network}.from_single_file(", where, ")"]
    made = [f"    {config}, {model.folder}={model.folder}, {dtype}"]
    return imports, [*opening, f"pipe = {model.pipeline}.from_pretrained(", *made, ').to("cuda")']


def _renamed(row: Row, model: Pipeline) -> tuple[str, list[str]]:
    """What to give to `from_single_file`, and the lines that make it from the file."""
    layout, prefix = row.stamp.layout, row.stamp.prefix
    known = BUNDLED if model.folder == "unet" and layout == "original" else ""
    if prefix == known or (layout == "original" and prefix == BUNDLED):
        return "file", []
    name = f"name.removeprefix({quoted(prefix)})" if prefix else "name"
    name = f"{quoted(known)} + {name}" if known else name
    chosen = f" if name.startswith({quoted(prefix)})" if prefix else ""
    pairs = f"    for name, tensor in load_file(file).items(){chosen}"
    return "weights", ["weights = {", f"    {name}: tensor", pairs, "}"]


def _config(card: Card, row: Row, model: Pipeline) -> str:
    """The repository that has the configuration, and what else the model needs: the base, if it has folders."""
    base, origin = card.base_of(row), Origin.parse(row.stamp.source_name)
    folders = base and base.repo and (base.pipeline or (origin and not origin.file))
    return base.repo if base and base.repo and folders else model.config


def _at(card: Card) -> str:
    """The argument that says which branch; none for main."""
    return "" if card.revision == "main" else f", revision={quoted(card.revision)}"


def _variant(row: Row) -> str:
    return f", variant={quoted(row.variant)}" if row.variant else ""


def _folders(card: Card, row: Row) -> Iterator[str]:
    """Commands that put a file where programs look for it."""
    family, stored = row.stamp.family, kind(row)
    flux = family.startswith("flux-") and row.stamp.layout == "original"
    bare = "; text encoders and VAE are the base's"
    places = []
    if family == "demo":
        return
    if stored == "checkpoint":
        places = [("ComfyUI, Load Checkpoint", _CHECKPOINTS)]
        places += [("A1111 and Forge", _WEBUI.format(""))] if "down" in row.stamp.groups else []
    elif stored == "network" and row.stamp.prefix in ("", BUNDLED):
        places = [(f"ComfyUI, Load Diffusion Model{bare}", _NETWORKS)]
    if flux and places:
        places.append((f"Forge{bare if stored == 'network' else ''}", _WEBUI.format("-forge")))
    if places:
        yield "```sh"
        for program, folder in places:
            yield f"# {program}"
            branch = "" if card.revision == "main" else f" --revision {word(card.revision)}"
            yield f"hf download {word(card.repo)} {word(row.path)}{branch} --local-dir {folder}"
        yield "```"
        yield ""


def _no_way(row: Row) -> str:
    if row.stamp.family == "demo":
        return "The demo model is there to try crdiff out: `crdiff preview demo` draws with it, and nothing else does."
    if kind(row) == "shards":
        return "It is split as its base is. diffusers and ComfyUI open such a model only when its shards are joined."
    return "Open it as you open its base."
