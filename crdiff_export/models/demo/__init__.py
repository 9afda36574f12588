"""The `demo` base: Stable Diffusion 1 in miniature, to try everything on a trained model, offline and in seconds.

`tools/train_demo.py` trained it on the scenes of `scenes.py` at 64x64 and at no other size. Weights and configuration
are files of this package; the header of the weights records the training.
"""

from pathlib import Path
from typing import Final

from crdiff_export.errors import CheckpointError

NAME: Final = "demo.safetensors"
PIPELINE: Final = "pipeline"
# The defaults for drawing its pictures, which the training's own evaluation used.
STEPS: Final = 25
GUIDANCE: Final = 4.0


def path() -> Path:
    """Return the path of the checkpoint; CheckpointError if the installation lacks it."""
    return _part(NAME)


def config() -> Path:
    """Return the pipeline's folder without weights, for `from_single_file`; CheckpointError if it is missing."""
    return _part(PIPELINE)


def _part(name: str) -> Path:
    part = Path(__file__).parent / name
    if not part.exists():
        raise CheckpointError(f"{part}: missing from this installation of crdiff", "Install the package again.")
    return part
