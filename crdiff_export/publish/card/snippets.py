"""How a variant is opened: its kind of file, the diffusers pipeline for it, and the folders of other programs.

`templates/use.md` makes the code of a card from this. Source: diffusers' `loaders/single_file*.py`, 0.36 to 0.42, for
what it makes of one file.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from crdiff_export.bake.residual import NONE, RESIDUAL_KEYS
from crdiff_export.errors import FamilyError
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.dtypes import DTYPES as FLOATS
from crdiff_export.hub import bases
from crdiff_export.hub.location import HubLocation, parse_uri
from crdiff_export.models import families
from crdiff_export.models.families import Family, pipelines
from crdiff_export.models.families.model import BUNDLED, Pipeline
from crdiff_export.models.prediction import EDM_V_SCHEDULER, V_SCHEDULER, Prediction
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.publish.card.model import Card, CardPack, CardVariant
from crdiff_export.publish.card.text import prose, quoted, word
from crdiff_export.sizes import Size

Kind = Literal["pipeline", "folder", "component", "checkpoint", "network", "shards"]

FILES: Collection[Kind] = ("checkpoint", "network")
DTYPES: Mapping[str | None, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_CHECKPOINTS, _NETWORKS = "ComfyUI/models/checkpoints", "ComfyUI/models/diffusion_models"
_WEBUI = "stable-diffusion-webui{}/models/Stable-diffusion"


def kind(variant: CardVariant) -> Kind:
    """Tell from path, layout and prefix how a variant is stored."""
    if not variant.path.endswith(".safetensors"):
        stamp = variant.stamp
        alone = stamp.layout == "diffusers" and stamp.source_layout == "original"
        if alone or variant.path.rsplit("/", 1)[-1] in ("unet", "transformer"):
            return "component"
        if variant.stamp.layout != "diffusers":
            return "shards"
        return "folder" if variant.path else "pipeline"
    return "checkpoint" if (variant.stamp.layout, variant.stamp.prefix) == ("original", BUNDLED) else "network"


def title(family: str) -> str:
    """Return the title of a family; the id of one that is unknown here."""
    record = _family(family)
    return record.title if record else prose(family)


def _family(family: str) -> Family | None:
    try:
        return families.by_id(family)
    except FamilyError:
        return None


def opening(variant: CardVariant) -> tuple[str, ...]:
    """Return a key that variants share which are opened with the same code."""
    stamp = variant.stamp
    model = stamp.family, _special(stamp), stamp.prediction or ""
    return *model, kind(variant), stamp.layout, stamp.prefix, stamp.cast or "", variant.weights or ""


def _special(stamp: Stamp) -> str:
    """The model of a family that has the same shape as others but needs its own configuration."""
    prediction, special = Prediction.parse(stamp.prediction or ""), stamp.special
    if special or not prediction:
        # Headers from before the prediction was in them: the native size tells a twin. A size that the base states
        # itself does not tell.
        family, by_family = _family(stamp.family), stamp.native_source == "family"
        is_twin = family and family.twin and stamp.native == Size(*family.twin.native) and by_family
        return special or ("base" if is_twin else "")
    return prediction.kind if prediction.kind in ("edm", "other") else ""


def is_built_in_base(stamp: Stamp) -> bool:
    """Whether a variant is of the base that comes with crdiff, whose other parts are nowhere else."""
    model = pipelines.find(stamp.family)
    return model is not None and model.config in bases.BUILT_IN


def call(model: Pipeline, size: Size) -> str:
    """Return the arguments of the pipeline's call behind the prompt, as Python."""
    usual = {
        "num_inference_steps": model.steps, model.guidance_argument: model.guidance,
        "negative_prompt": model.negative_prompt, **model.arguments,
    }  # fmt: skip
    values = {key: quoted(value) if isinstance(value, str) else repr(value) for key, value in usual.items()}
    return ", ".join([model.call.format(size), *(f"{key}={values[key]}" for key in usual if usual[key] is not None)])


def is_drawn(stamp: Stamp) -> bool:
    """Whether `crdiff preview` draws with the base of a variant; of a family that is not known here it may."""
    family, special = _family(stamp.family), _special(stamp)
    if family is None or (family.scope == "group" and not family.pipelines and not special):
        return True  # the folder of the base may name a pipeline
    model = family.pipelines.get(special)
    return model is not None and not model.pictures


def has_better_rival(stamp: Stamp, name: str) -> bool:
    """Whether something scored higher than pruning at a size like a variant's, and `crdiff preview` can draw it."""
    family = _family(stamp.family)
    model = family.pipelines.get(_special(stamp)) if family else None
    better = pipelines.better_rivals(model.pipeline if model else "", stamp.resolution, stamp.native)
    return name in better and is_drawn(stamp)


def heading(variant: CardVariant) -> str:
    """Return the model and the kind of file, for the line above the code."""
    network = "UNet" if "down" in variant.stamp.groups else "transformer"
    what = {
        "pipeline": "the pipeline", "folder": "a pipeline's folder", "component": f"the {network}'s folder",
        "checkpoint": "a checkpoint", "network": f"the {network} alone", "shards": "a checkpoint in shards",
    }[kind(variant)]  # fmt: skip
    special = "" if not _special(variant.stamp) else f" ({_special(variant.stamp)})"
    return f"**{title(variant.stamp.family)}{special}**, {what}"


def pipeline(variant: CardVariant) -> Pipeline | None:
    """Return the diffusers pipeline that opens a variant, if one does; a whole pipeline names its own class."""
    stored, special = kind(variant), _special(variant.stamp)
    if stored == "shards" or variant.stamp.scaled:
        return None
    model = pipelines.find(variant.stamp.family, special)
    if model and model.config in bases.BUILT_IN:
        return None
    if model:
        return None if stored in FILES and model.network in pipelines.FOLDERS_ONLY else model
    # Other special models need more than a prompt.
    family = _family(variant.stamp.family)
    by_prompt = not special or (family and any(each.prompt for each in family.specials if each.id == special))
    return Pipeline("DiffusionPipeline", "") if stored in ("pipeline", "folder") and by_prompt else None


def scheduler(variant: CardVariant) -> tuple[str, str] | None:
    """Return the scheduler's class, and the Python expression for it, where the configuration's is another one."""
    prediction = Prediction.parse(variant.stamp.prediction or "")
    if prediction is None or prediction.kind in ("edm", "other"):
        return None
    model = pipelines.find(variant.stamp.family, _special(variant.stamp))
    if prediction.kind == (model.prediction if model else "epsilon") and not prediction.zero_snr:
        return None
    values = {key: quoted(v) if isinstance(v, str) else repr(v) for key, v in prediction.scheduler_settings.items()}
    settings = [f"{key}={value}" for key, value in values.items()]
    if prediction.kind == "edm-v":
        name = call = EDM_V_SCHEDULER
    else:
        name, call = V_SCHEDULER, f"{V_SCHEDULER}.from_config"
        settings = ["pipe.scheduler.config", *settings]
    return name, "\n    ".join([f"{call}(", *(f"{text}," for text in settings)]) + "\n)"


def renaming(variant: CardVariant, model: Pipeline) -> str | None:
    """Return the Python expression that turns the file's tensor names into those that diffusers knows, if it must."""
    layout, prefix = variant.stamp.layout, variant.stamp.prefix
    expected = BUNDLED if model.folder == "unet" and layout == "original" else ""
    if prefix == expected or (layout == "original" and prefix == BUNDLED):
        return None
    name = f"name.removeprefix({quoted(prefix)})" if prefix else "name"
    return f"{quoted(expected)} + {name}" if expected else name


def configuration(card: Card, variant: CardVariant, model: Pipeline) -> str:
    """Return the repository with the other parts of the model: the base, if it has diffusers' folders."""
    base, origin = card.base_of(variant.stamp), parse_uri(variant.stamp.source_name)
    folders = base and base.repo and (base.pipeline or (origin and not origin.file))
    return base.repo if base and base.repo and folders else model.config


def recreate(variant: CardVariant) -> str:
    """Return the command line that exports the same weights again."""
    stamp = variant.stamp
    ways = [way for way, key in RESIDUAL_KEYS.items() if key == stamp.residual != NONE]
    options = [*_options(stamp, variant.weights), *(text for way in ways for text in ("--residual", way))]
    name = variant.path.rsplit("/", 1)[-1] or f"crdiff-{stamp.resolution}"
    words = ["crdiff", "export", _base(stamp), "--res", str(stamp.resolution), *options, "-o", name]
    return " ".join(map(word, words))


def recreate_pack(pack: CardPack) -> list[str]:
    """Return the command lines that make the same pack again: one creates it, others add sizes of other numbers."""
    groups: dict[tuple[object, ...], list[Size]] = {}
    for size, stamp in pack.header.variants.items():
        calibrated = stamp.calibrated.hash if stamp.calibrated else None
        groups.setdefault((*_options(stamp, pack.weights), calibrated), []).append(size)
    lines: list[str] = []
    name = pack.path.rsplit("/", 1)[-1]
    for (*options, _), sizes in groups.items():
        base = _base(pack.header.common)
        target = ["create", base] if not lines else ["add", name, "--base", base]
        listed = [text for size in sizes for text in ("--res", str(size))]
        output = [] if lines else ["-o", name]
        lines.append(" ".join(map(word, ["crdiff", "pack", *target, *listed, *map(str, options), *output])))
    return lines


def _options(stamp: Stamp, weights: str | None) -> list[str]:
    """Return the options of an export, or of a pack, that decide which weights go."""
    options = ["--family", "FILE"] * (stamp.family_table is not None and stamp.family != "unet")
    if stamp.native_source == "given":
        options += ["--native", str(stamp.native)]
    ratios = {group: repr(shares.ratio) for group, shares in stamp.groups.items()}
    if len(set(ratios.values())) == 1:
        options += ["--ratio", *set(ratios.values())]
    elif set(ratios) <= {"down", "mid", "up"}:
        options += [text for group, ratio in ratios.items() for text in (f"--{group}", ratio)]
    else:
        options += ["--recipe", "RECIPE"]
    family = _family(stamp.family)
    if family is None or stamp.targets != family.default_kinds:
        options += ["--targets", ",".join(stamp.targets)]
    if stamp.criterion != MAGNITUDE:
        options += ["--criterion", stamp.criterion]
    options += ["--allow-nonfinite"] * any(shares.nonfinite for shares in stamp.groups.values())
    chosen = weights or stamp.source_variant
    options += ["--variant", chosen] if chosen else []
    options += ["--layout", stamp.layout] if stamp.source_layout else []
    options += ["--calibration", "CALIBRATION"] * (stamp.calibrated is not None)
    options += [text for name, dtype in FLOATS.items() if dtype == stamp.cast for text in ("--dtype", name)]
    return options


def compare(variants: Sequence[CardVariant]) -> str | None:
    """Return the command line that draws a variant beside its base, and beside two-pass where that did better.

    Args:
        variants: The variants of a card.

    Returns:
        A command of the first that two-pass did better for, or else of the first; None if none can be drawn.
    """
    drawn = [variant for variant in variants if is_drawn(variant.stamp)]
    if not drawn:
        return None
    variant = next((variant for variant in drawn if has_better_rival(variant.stamp, "two-pass")), drawn[0])
    name = variant.path.rsplit("/", 1)[-1] or f"crdiff-{variant.stamp.resolution}"
    chosen = variant.weights or variant.stamp.source_variant
    weights = ["--variant", chosen] if chosen else []
    rival = ["--beside", "two-pass"] if has_better_rival(variant.stamp, "two-pass") else []
    words = ["crdiff", "preview", _base(variant.stamp), "--baked", name, *weights, *rival, "--prompt", "TEXT"]
    return " ".join(map(word, words))


def _base(stamp: Stamp) -> str:
    """Return how a command names the base of a variant: on the Hub, built in, or as the file was called."""
    name = stamp.source_name
    return f"./{name}" if name.startswith("-") else name


def address(card: Card, pack: CardPack) -> str:
    """Return the address of a pack, as `poa.enable` and `--pack` take it."""
    return str(HubLocation(card.repo, pack.path, None if card.revision == "main" else card.revision))


def export_pack(card: Card, pack: CardPack) -> str:
    """Return the command line that exports the smallest size of a pack."""
    stamp = example(pack)
    weights = ["--variant", pack.weights] if pack.weights else []
    words = ["crdiff", "export", _base(stamp), *weights, "--pack", address(card, pack), "--res", str(stamp.resolution)]
    return " ".join(map(word, words))


def example(pack: CardPack) -> Stamp:
    """Return the header of the smallest size of a pack."""
    return min(pack.header.variants.values(), key=lambda stamp: stamp.resolution.pixels)


def base_on_hub(pack: CardPack) -> tuple[HubLocation, CardVariant] | None:
    """Describe the base of a pack as if it were a variant, so that it is opened as one.

    Returns:
        Where it is, and the variant; None for a base that is not on the Hub as one safetensors file or as a pipeline.
    """
    stamp = example(pack)
    origin = parse_uri(stamp.source_name)
    if origin is None or not (origin.file.endswith(".safetensors") if origin.file else stamp.layout == "diffusers"):
        return None
    return origin, CardVariant(origin.file or "", stamp, 0, None, pack.weights)


def pack_heading(pack: CardPack) -> str:
    """Return the model of a pack, for the line above the code."""
    variant = CardVariant(pack.path, example(pack), pack.size, None)
    special = _special(variant.stamp)
    return f"**{title(variant.stamp.family)}{f' ({special})' if special else ''}**"


def in_comfyui(pack: CardPack) -> bool:
    """Whether ComfyUI opens the base of a pack, and so the node takes the pack."""
    family, stamp = pack.header.common.family, pack.header.common
    opened_by = families.by_id(family).programs if families.is_built_in(family) else ()
    return "comfyui" in opened_by or ("comfyui-original" in opened_by and stamp.layout == "original")


def folders(variant: CardVariant) -> list[tuple[str, str]]:
    """List the programs that open a file, each with the folder that it reads."""
    family, stored = variant.stamp.family, kind(variant)
    bare = "; text encoders and VAE are the base's"
    programs: list[tuple[str, str]] = []
    opened_by = families.by_id(family).programs if families.is_built_in(family) else ()
    if "comfyui-original" in opened_by and variant.stamp.layout == "original":
        opened_by = ("comfyui", *opened_by)
    if variant.stamp.scaled:  # others are not known to read codes with a scale
        opened_by = tuple(program for program in opened_by if program == "comfyui")
    if stored == "checkpoint":
        programs += [("ComfyUI, Load Checkpoint", _CHECKPOINTS)] if "comfyui" in opened_by else []
        programs += [("A1111 and Forge", _WEBUI.format(""))] if "a1111" in opened_by else []
    elif stored == "network" and variant.stamp.prefix in ("", BUNDLED):
        programs += [(f"ComfyUI, Load Diffusion Model{bare}", _NETWORKS)] if "comfyui" in opened_by else []
    in_forge = "forge" in opened_by and "a1111" not in opened_by
    if programs and in_forge and variant.stamp.layout == "original":
        programs.append((f"Forge{bare if stored == 'network' else ''}", _WEBUI.format("-forge")))
    return programs
