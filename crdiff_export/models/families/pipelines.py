"""The diffusers pipeline of each family, for diffusers 0.36 to 0.42; they stand in the families' tables."""

from typing import Final

from crdiff_export.models.families.catalogue import all_families
from crdiff_export.models.families.model import Pipeline
from crdiff_export.sizes import Size

# Classes that have no `from_single_file`: diffusers opens them from a folder only.
FOLDERS_ONLY: Final = frozenset(("CogView4Transformer2DModel", "PixArtTransformer2DModel"))
_SDXL: Final = "StableDiffusionXLPipeline"
# Those of the demo models, with which two passes were measured above the native size, too.
_DEMOS: Final = frozenset({"StableDiffusionPipeline", _SDXL})


def better_rivals(pipeline: str, size: Size, native: Size) -> frozenset[str]:
    """Return what scored higher than pruning on the demo models, for a pipeline and a size like theirs.

    docs/demo.md and docs/demo-xl.md have the figures.

    Args:
        pipeline: The class of the base's pipeline.
        size: The size that is drawn.
        native: The size that the base was trained for.

    Returns:
        Names as `--beside` has them.
    """
    is_above = size.is_far_above(native)
    is_better = {
        "native-size": is_above and pipeline == _SDXL,
        "two-pass": size.is_far_below(native) or (is_above and pipeline in _DEMOS),
    }
    return frozenset(name for name, holds in is_better.items() if holds)


def find(family: str, special: str = "") -> Pipeline | None:
    """Return the pipeline of a family.

    Args:
        family: The family's id.
        special: The id of a `Special`, `base` for the family's twin, `edm` for a model that predicts as EDM does.

    Returns:
        The pipeline, or None if diffusers has none.
    """
    return next((each.pipelines.get(special) for each in all_families() if each.id == family), None)


def from_prompts() -> frozenset[str]:
    """Return the pipelines of UNets that draw from a prompt alone."""
    pipelines = (pipeline for family in all_families() for pipeline in family.pipelines.values())
    return frozenset(each.pipeline for each in pipelines if each.folder == "unet" and not each.pictures)
