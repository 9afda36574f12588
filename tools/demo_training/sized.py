"""Pictures of many sizes, enlarged or shrunk and cropped to one that is trained at, as SDXL's training saw them.

SDXL's paper (arXiv 2307.01952, section 2.2) keeps pictures that are smaller than the size trained at, and tells the
model six numbers of each: the size that it had, where it was cropped, and the size that it is shown at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from crdiff_export.models.demo import drawing
from crdiff_export.models.demo.scenes import Scene
from crdiff_export.sizes import Size

# Two of five pictures are smaller than the size trained at, down to a quarter, evenly on a logarithmic scale; in SDXL's
# data 39 % were smaller than 256. The others are up to half as large again.
SMALLER, SMALLEST, LARGEST = 0.4, 0.25, 1.5
# Half of the pictures have the shape that is trained at. Those of the others differ by up to a half, and are cropped.
SHAPED, STRETCH = 0.5, 1.5


@dataclass(frozen=True, slots=True)
class SizedPictures:
    """Pictures of one size, and what the model is told of each.

    Attributes:
        pictures: float32 [picture, 3, height, width], -1 to 1.
        time_ids: float32 [picture, 6], in pixels: the height and width that it had, the rows and columns cropped off at
            the top and at the left, the height and width of `pictures`.
    """

    pictures: torch.Tensor
    time_ids: torch.Tensor


def draw(scenes: Sequence[Scene], size: Size, native: int, rng: np.random.Generator) -> SizedPictures:
    """Draw scenes at sizes of their own, and bring them to `size`.

    Args:
        scenes: What to draw.
        size: The size that is trained at.
        native: The side of the native size, in pixels; the scale of the sizes before.
        rng: Decides everything.

    Returns:
        A picture for each scene.
    """
    made = [_fit(scene, true_size(size, native, rng), size, rng) for scene in scenes]
    pictures = torch.from_numpy(np.stack([picture for picture, _ in made]))
    told = torch.tensor([ids for _, ids in made], dtype=torch.float32)
    return SizedPictures(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, told)


def true_size(size: Size, native: int, rng: np.random.Generator) -> Size:
    """Choose the size that a picture had."""
    smaller, part, shaped, stretch = rng.random(4).tolist()
    scale = SMALLEST ** (1 - part) if smaller < SMALLER else LARGEST**part
    aspect = size.width / size.height * (1 if shaped < SHAPED else STRETCH ** (2 * stretch - 1))
    side = native * scale / max(1.0, aspect, 1 / aspect) ** 0.5  # of the shorter side
    short = max(drawing.SMALLEST, round(side))
    return Size(round(short * max(1.0, aspect)), round(short * max(1.0, 1 / aspect)))


def _fit(
    scene: Scene, true: Size, size: Size, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int, int, int, int]]:
    """Draw a scene, scale it until it covers `size`, and crop what stands out."""
    picture = Image.fromarray(drawing.draw(scene, true.width, true.height, rng))
    scale = max(size.width / true.width, size.height / true.height)
    width, height = max(size.width, round(true.width * scale)), max(size.height, round(true.height * scale))
    left, top = int(rng.integers(width - size.width + 1)), int(rng.integers(height - size.height + 1))
    if (width, height) != (true.width, true.height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + size.width, top + size.height))
    return np.asarray(picture), (true.height, true.width, top, left, size.height, size.width)
