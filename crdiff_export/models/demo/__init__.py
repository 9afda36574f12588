"""The `demo` base: Stable Diffusion 1 in miniature, for trying everything offline, in seconds, on a real model.

Its pictures are the scenes of `scenes.py` at 64x64, on which `tools/train_demo.py` trained it; it has never seen any
other size. Weights and configuration are files of this package, and the header of the weights says how they were made.
"""

from pathlib import Path
from typing import Final

from crdiff_export.errors import CheckpointError

NAME: Final = "demo.safetensors"
PIPELINE: Final = "pipeline"
# How its pictures are drawn unless someone asks for something else, and how training judged them.
STEPS: Final = 25
GUIDANCE: Final = 4.0


def path() -> Path:
    """The checkpoint; CheckpointError where the installation lacks it."""
    return _part(NAME)


def config() -> Path:
    """The pipeline's folder without weights, for diffusers' `from_single_file`; CheckpointError where it is missing."""
    return _part(PIPELINE)


def _part(name: str) -> Path:
    part = Path(__file__).parent / name
    if not part.exists():
        raise CheckpointError(f"{part}: missing from this installation of crdiff", "Install the package again.")
    return part
