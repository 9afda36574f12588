"""The bases of this package: Stable Diffusion 1 and SDXL in miniature, to try everything on trained models, offline.

`tools/train_demo.py` trained them on the scenes of `scenes.py`: `demo` at 64x64 and at no other size, `demo-xl` at
128x128 and in other shapes of as many pixels. Weights and configuration are files of this package; the header of the
weights records the training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from crdiff_export.errors import CheckpointError

DEMO: Final = "demo"
DEMO_XL: Final = "demo-xl"
NAMES: Final = (DEMO, DEMO_XL)
# The relations that each has learnt. Trained with all four from the beginning, `demo` learnt the axis soon, but not in
# two hours which thing is where, because each thing is on either side in half of the pictures. `demo-xl` learnt two
# first.
RELATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    DEMO: ("left of", "above"),
    DEMO_XL: ("left of", "right of", "above", "below"),
}
# The defaults for drawing their pictures, which the training's own evaluation used.
STEPS: Final = 25
GUIDANCE: Final[Mapping[str, float]] = {DEMO: 4.0, DEMO_XL: 2.0}


def path(name: str = DEMO) -> Path:
    """Return the path of a checkpoint; CheckpointError if the installation lacks it."""
    return _part(f"{name}.safetensors")


def config(name: str = DEMO) -> Path:
    """Return the pipeline's folder without weights, for `from_single_file`; CheckpointError if it is missing."""
    return _part(f"{name}-pipeline")


def _part(name: str) -> Path:
    part = Path(__file__).parent / name
    if not part.exists():
        raise CheckpointError(f"{part}: missing from this installation of crdiff", "Install the package again.")
    return part
