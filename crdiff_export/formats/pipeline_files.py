"""The files of a diffusers folder by their names: which of them a pipeline is made of.

Names follow diffusers (`_add_variant`), old names (`variant_compatible_siblings`, "legacy") included.
"""

import re
from collections.abc import Sequence

# Configurations, vocabularies and tokenizers, which a pipeline needs besides its weights.
SMALL_FILES = (".json", ".txt", ".model")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors; the old way: model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(?P<folder>.+)/[^/.]+?(-\d{5}-of-\d{5})?(\.(?P<variant>[^/.]+?))?(-\d{5}-of-\d{5})?\.safetensors"
)
# Terms that go where the weights go.
_LEGAL = re.compile(r"(licen[cs]e|notice|copying)\b", re.IGNORECASE)
_OTHER_INDEX = re.compile(r"(.+/)?[^/]+\.(bin|pt|msgpack|onnx)(\.[^/.]+)?\.index(\.[^/.]+)?\.json")


def component_weights(names: Sequence[str], variant: str | None) -> list[str]:
    """List the weights of every component: those of the variant if it has some, else the plain ones.

    Args:
        names: All files, relative to the folder, with '/' between the parts.
        variant: The variant, such as "fp16".

    Returns:
        The names of safetensors files, folder by folder.
    """
    folders: dict[str, dict[str, str | None]] = {}
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            folders.setdefault(match["folder"], {})[name] = match["variant"]
    chosen: list[str] = []
    for _, inside in sorted(folders.items()):
        special = [name for name, kind in inside.items() if variant and kind == variant]
        plain = [name for name, kind in inside.items() if kind is None]
        chosen += special or plain or inside
    return chosen


def pipeline_files(names: Sequence[str], variant: str | None, components: Sequence[str] | None) -> list[str]:
    """List the files that a pipeline is made of, without original checkpoints and weights in other formats.

    Args:
        names: All files, relative to the folder, with '/' between the parts.
        variant: The variant whose weights are taken where a component has it.
        components: The folders of the pipeline's components; None to take all folders for components.

    Returns:
        The names that stay, in the same order.
    """
    weights = set(component_weights(names, variant))

    def belongs(name: str) -> bool:
        folder, slash, _ = name.partition("/")
        if slash and components is not None and folder not in components:
            return False
        is_small = name.endswith(SMALL_FILES) and not _OTHER_INDEX.fullmatch(name)
        return name in weights or is_small or (not slash and bool(_LEGAL.match(name)))

    return [name for name in names if belongs(name)]
