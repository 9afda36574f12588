"""The second stage: text encoder and UNet together, on latents of scenes that are drawn as they are needed."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from crdiff_export.demo import scenes
from demo_training import data, model
from demo_training.model import SCALE, Geometry, Parts
from demo_training.training import Schedule, averaged, noise, numbers

UNPROMPTED = 0.1  # share of the pictures that are learnt without their prompt, for classifier-free guidance
GUIDANCE = 4.0
SAMPLING = 25
JUDGED = 32


class Denoiser:
    """Learns the velocity between noise and latent, from the prompt."""

    name = "diffusion"

    def __init__(
        self, parts: Parts, tokenizer: CLIPTokenizer, schedule: Schedule, geometry: Geometry, seed: int
    ) -> None:
        self.model = nn.ModuleDict({"text": parts.text, "unet": parts.unet})
        self.average = averaged(self.model)
        self.vae = parts.vae
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.geometry = geometry
        self.seed = seed
        self.scheduler = model.scheduler(geometry)
        self.train, self.held_out = scenes.split()

    def parts(self) -> Parts:
        """The averaged models, and the autoencoder."""
        return Parts(text=self.average["text"], unet=self.average["unet"], vae=self.vae)

    def loss(self, step: int) -> torch.Tensor:
        """The mean squared error of the velocity, at times drawn evenly and one in each part of the schedule."""
        rng = numbers(self.seed, self.name, step)
        batch, native = self.schedule.batch, self.geometry.native
        some = scenes.sample(rng, self.train, batch)
        latents = encode(self.vae, data.pictures(some, native, native, rng))
        prompts = [
            "" if drop < UNPROMPTED else scene.prompt for scene, drop in zip(some, rng.random(batch), strict=True)
        ]
        spread = (np.arange(batch) + rng.random(batch)) / batch * self.scheduler.config.num_train_timesteps
        times = torch.from_numpy(spread.astype(np.int64))
        added = torch.randn(latents.shape, generator=noise(rng))
        noisy = self.scheduler.add_noise(latents, added, times)
        velocity = self.scheduler.get_velocity(latents, added, times)
        context = self.model["text"](self.tokens(prompts)).last_hidden_state
        found = self.model["unet"](noisy, times, context).sample
        return functional.mse_loss(found, velocity)

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """As the pipeline makes them, each as long as the longest that there may be."""
        made = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        ids: torch.Tensor = made.input_ids
        return ids

    def report(self, step: int, folder: Path) -> str:
        """How many held-out prompts are drawn right, of the same ones each time."""
        file = folder / f"diffusion-{step:05}.png"
        found = draw_and_judge(self, JUDGED, (self.geometry.native, self.geometry.native), file)
        return f"{found.right:.0%} of {JUDGED} held-out prompts right, score {found.score:.3f}"


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents as the UNet sees them."""
    with torch.no_grad():
        latents: torch.Tensor = vae.encode(pictures).latent_dist.mode() * SCALE
    return latents


def draw_and_judge(denoiser: Denoiser, count: int, size: tuple[int, int], sheet: Path | None = None) -> data.Judged:
    """Draw held-out prompts with fixed seeds at this width and height, and judge what comes out."""
    some = scenes.sample(np.random.default_rng(0), denoiser.held_out, count)
    pipe = model.pipeline(denoiser.parts(), denoiser.geometry, denoiser.tokenizer)
    drawn = pipe(
        [scene.prompt for scene in some],
        width=size[0],
        height=size[1],
        num_inference_steps=SAMPLING,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="pt",
    ).images
    images = data.images(drawn * 2 - 1)
    if sheet:
        data.save_sheet(images, sheet)
    return data.judged(images, some)
