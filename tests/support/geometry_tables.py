"""Every tensor's name, dtype and shape of real models, one table per family and layout in `geometry/`.

`*.original` is the whole bundle, text encoders and VAE included; `*.original-unet` and `*.original-transformer` are the
model alone, behind its bundle prefix where it has one. They come from the state dicts of the authors' own modules
(CompVis/stable-diffusion, Stability-AI/sd3.5, black-forest-labs/flux) and of diffusers, built on the meta device.
"""

import gzip
import json
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "geometry"


def names() -> list[str]:
    """All tables: `<family>.<layout>`."""
    return sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))


def load(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> dtype and shape, in the order of the model; a copy that a test may change."""
    return dict(_read(name))


@cache
def _read(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    raw = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return {tensor: (dtype, tuple(shape)) for tensor, (dtype, shape) in raw.items()}
