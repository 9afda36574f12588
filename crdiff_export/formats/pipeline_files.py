"""Choose the files that a diffusers pipeline needs from those of its folder, by their names.

Names follow diffusers (`_add_variant`), old names (`variant_compatible_siblings`, "legacy") included.
"""

import re
from collections.abc import Sequence

from crdiff_export.formats.strict_json import MalformedError, parse_object

# The components whose weights are pruned.
COMPONENTS = ("unet", "transformer")
# Configurations, vocabularies and tokenizers, which a pipeline needs besides its weights.
SMALL_FILES = (".json", ".txt", ".model")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors; the old way: model-00001-of-00002.fp16.safetensors
_NAME = r"(?P<folder>.+)/{}(-\d{{5}}-of-\d{{5}})?(\.(?P<variant>[^/.]+?))?(-\d{{5}}-of-\d{{5}})?\.{}"
_SAFETENSORS = re.compile(_NAME.format("[^/.]+?", "safetensors"))
# Pickles of other names are no weights: optimizer.bin, training_args.bin.
_PICKLES = re.compile(_NAME.format("(diffusion_)?pytorch_model", "bin"))
# Licence files, copied with the weights.
_LEGAL = re.compile(r"(licen[cs]e|notice|copying)\b", re.IGNORECASE)
_OTHER_INDEX = re.compile(
    r"((?P<folder>.+)/)?[^/]+\.(?P<format>bin|pt|msgpack|onnx)(\.[^/.]+)?\.index(\.[^/.]+)?\.json"
)


def component_weights(names: Sequence[str], variant: str | None) -> list[str]:
    """List the weights of every component: those of the variant if it has some, else the plain ones.

    A component without safetensors has pickles, except those that are pruned.

    Args:
        names: All files, relative to the folder, with '/' between the parts.
        variant: The variant, such as "fp16".

    Returns:
        The names of the files, folder by folder.
    """
    safe, pickles = (_by_folder(names, pattern) for pattern in (_SAFETENSORS, _PICKLES))
    folders = {folder: files for folder, files in pickles.items() if folder not in COMPONENTS} | safe
    chosen: list[str] = []
    for _, inside in sorted(folders.items()):
        special = [name for name, kind in inside.items() if variant and kind == variant]
        plain = [name for name, kind in inside.items() if kind is None]
        chosen += special or plain or inside
    return chosen


def component_variants(names: Sequence[str]) -> dict[str, str | None]:
    """Map the files of weights of one folder to their variants; None for the plain ones.

    Args:
        names: The files, below a folder.

    Returns:
        The variant of each.
    """
    return {name: kind for pattern in (_SAFETENSORS, _PICKLES) for inside in _by_folder(names, pattern).values()
            for name, kind in inside.items()}  # fmt: skip


def _by_folder(names: Sequence[str], pattern: re.Pattern[str]) -> dict[str, dict[str, str | None]]:
    """Map each folder to its files of weights, and those to their variants."""
    folders: dict[str, dict[str, str | None]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            folders.setdefault(match["folder"], {})[name] = match["variant"]
    return folders


def component_folders(index: bytes) -> list[str] | None:
    """Return the folders of a pipeline's components, from its model_index.json; None if that names none."""
    try:
        values = parse_object(index, fractions=True)
    except MalformedError:  # the commands that draw say what is wrong with it
        return None
    names = [name for name, value in values.items() if isinstance(value, list)]
    return [*names, *COMPONENTS] if names else None


def pipeline_files(names: Sequence[str], variant: str | None, components: Sequence[str] | None) -> list[str]:
    """List the files that a pipeline needs, without original checkpoints and weights in other formats.

    Args:
        names: All files, relative to the folder, with '/' between the parts.
        variant: The variant whose weights are taken where a component has it.
        components: The folders of the pipeline's components; None to take all folders for components.

    Returns:
        The names that stay, in the same order.
    """
    weights = set(component_weights(names, variant))
    pickled = {name.rpartition("/")[0] for name in weights if name.endswith(".bin")}

    def belongs(name: str) -> bool:
        folder, slash, _ = name.partition("/")
        if slash and components is not None and folder not in components:
            return False
        other = _OTHER_INDEX.fullmatch(name)
        is_other = other is not None and not (other["format"] == "bin" and other["folder"] in pickled)
        is_small = name.endswith(SMALL_FILES) and not is_other
        return name in weights or is_small or (not slash and bool(_LEGAL.match(name)))

    return [name for name in names if belongs(name)]
