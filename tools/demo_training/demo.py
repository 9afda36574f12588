"""`demo`, Stable Diffusion 1 in miniature, trained at 64x64."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from crdiff_export.models.demo import scenes
from demo_training import convert, data, model, training, vae
from demo_training.convert import State
from demo_training.diffusion import Denoiser
from demo_training.model import SCALE, Config, Geometry, Parts
from demo_training.training import Schedule

# Two cores of their own need 0.29 s for a step of the first stage and 1.0 s for one of the second: 105 minutes in all.
# With a rate of 4e-3 and more the autoencoder does not get beyond grey.
VAE = Schedule(steps=2500, batch=8, rate=1.5e-3, warm_up=50, decay=0.4, average=0.99, report=100)
DIFFUSION = Schedule(
    steps=5400, batch=32, rate=1e-3, warm_up=100, decay=0.3, average=0.998, report=250, attempt=(3140, 3800)
)


@dataclass(frozen=True, slots=True)
class DemoTraining:
    """All that the weights of `demo` depend on, but for the machine and its number of threads."""

    seed: int = 0
    threads: int = 2
    vae: Schedule = VAE
    diffusion: Schedule = DIFFUSION
    geometry: Geometry = field(default_factory=lambda: Geometry(scenes.vocabulary()))

    name: ClassVar[str] = "demo"
    metadata: ClassVar[Mapping[str, str]] = {
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": "crdiff demo",
    }

    def configs(self) -> dict[str, Config]:
        """Every table of the pipeline's folder, by its file's name."""
        return model.configs(self.geometry)

    def build(self) -> Parts:
        """The models with random weights."""
        return model.build(self.geometry, self.seed)

    def draw(self, rng: np.random.Generator, step: int) -> tuple[data.Scenes, torch.Tensor]:
        """The scenes and pictures of a step of the autoencoder's training."""
        some = scenes.sample(rng, scenes.split()[0], self.vae.batch)
        return some, data.pictures(some, self.geometry.native, self.geometry.native, rng)

    def settle(self, autoencoder: AutoencoderKL) -> None:
        """Scale the latents of the trained autoencoder."""
        rng, native = training.numbers(self.seed, "settle", 0), self.geometry.native
        pictures = data.pictures(scenes.sample(rng, scenes.split()[0], 512), native, native, rng)
        vae.settle(autoencoder, pictures, SCALE)

    def denoiser(self, parts: Parts, tokenizer: CLIPTokenizer) -> Denoiser:
        """The second stage."""
        return Denoiser(parts, tokenizer, self.diffusion, self.geometry, self.seed)

    def original(self, parts: Parts, folder: Path) -> State:
        """Every tensor of the original file."""
        return convert.original(parts, self.geometry)
