"""Scenes as tensors, and pictures judged and put on a sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from crdiff_export.evaluate.scorers import demo_scorer as scorer
from crdiff_export.models.demo import drawing, scenes

Scenes = Sequence[scenes.Scene]
Pictures = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Judged:
    """Means over some pictures."""

    right: float
    score: float


def pictures(some: Scenes, width: int, height: int, rng: np.random.Generator) -> torch.Tensor:
    """The scenes rendered: [scene, 3, height, width] from -1 to 1."""
    rendered = torch.from_numpy(drawing.draw_batch(some, width, height, rng))
    return rendered.permute(0, 3, 1, 2).float() / 127.5 - 1


def grounds(some: Scenes) -> torch.Tensor:
    """The colours of the scenes' backgrounds: [scene, 3, 1, 1] from -1 to 1."""
    colours = torch.tensor([scenes.BACKGROUNDS[scene.background] for scene in some], dtype=torch.float32)
    return colours[:, :, None, None] / 127.5 - 1


def images(drawn: torch.Tensor) -> Pictures:
    """Back from -1 to 1 into bytes: [scene, height, width, 3]."""
    array: Pictures = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return array


def judged(drawn: Pictures, some: Scenes) -> Judged:
    """What the judge says of the pictures."""
    scores = [scorer.judge(image, scene) for image, scene in zip(drawn, some, strict=True)]
    right, score = np.mean([(score.parts["right"], score.value) for score in scores], axis=0)
    return Judged(float(right), float(score))


def draw_and_judge(
    pipe: Any, some: Scenes, size: tuple[int, int], steps: int, guidance: float, sheet: Path | None = None
) -> Judged:
    """Draw the scenes' prompts at this width and height, each from a seed of its own, and judge what comes out."""
    drawn = pipe(
        [scene.prompt for scene in some],
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(some))],
        output_type="pt",
    ).images
    made = images(drawn * 2 - 1)
    if sheet:
        save_sheet(made, sheet)
    return judged(made, some)


def save_sheet(drawn: Pictures, file: Path, columns: int = 8) -> None:
    """Pictures of one size beside one another, twice as large."""
    _, height, width, _ = drawn.shape
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), (64, 64, 64))
    for i, picture in enumerate(drawn):
        sheet.paste(Image.fromarray(picture), (i % columns * (width + 2), i // columns * (height + 2)))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(file)
