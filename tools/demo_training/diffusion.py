"""The second stage: text encoder and UNet together, on latents of scenes that are drawn as they are needed."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from crdiff_export.models import demo
from crdiff_export.models.demo import scenes
from demo_training import data, model
from demo_training.model import SCALE, Geometry, Parts
from demo_training.training import Schedule, averaged, noise, numbers

UNPROMPTED = 0.1  # share of the pictures that are learnt without their prompt, for classifier-free guidance
GUIDANCE, SAMPLING = demo.GUIDANCE[demo.DEMO], demo.STEPS
JUDGED = 32
# Colours and shapes are learnt at all times of the schedule, what stands where and how often only where there is little
# but noise: above t = 750 a thing of 5x5 latents is hard to see. From these steps on, more of the times are up there: a
# half above 750 with a shift of 3, a quarter above 900; with 6 two thirds and 40 %.
LEARNT = 4070  # from this step on the other relations are left out
SHIFTS = ((3140, 6.0), (1650, 3.0))


class Denoiser:
    """Learns the velocity between noise and latent, from the prompt."""

    name = "diffusion"

    def __init__(
        self, parts: Parts, tokenizer: CLIPTokenizer, schedule: Schedule, geometry: Geometry, seed: int
    ) -> None:
        parts.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        self.model = nn.ModuleDict({"text": parts.text, "unet": parts.unet})
        self.average = averaged(self.model)
        self.vae = parts.vae
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.geometry = geometry
        self.seed = seed
        self.scheduler = model.scheduler(geometry)
        self.train, held_out = scenes.split()
        relations = demo.RELATIONS[demo.DEMO]
        self.learnt = scenes.with_relations(self.train, relations)
        self.held_out = scenes.with_relations(held_out, relations)

    def parts(self) -> Parts:
        """The averaged models, and the autoencoder."""
        return Parts(text=self.average["text"], unet=self.average["unet"], vae=self.vae)

    def loss(self, step: int) -> torch.Tensor:
        """The mean squared error of the velocity, at a time in each part of the schedule, which is shifted later on."""
        rng = numbers(self.seed, self.name, step)
        batch, native = self.schedule.batch, self.geometry.native
        some = scenes.sample(rng, self.learnt if step >= LEARNT else self.train, batch)
        latents = encode(self.vae, data.pictures(some, native, native, rng))
        prompts = [
            "" if drop < UNPROMPTED else scene.prompt for scene, drop in zip(some, rng.random(batch), strict=True)
        ]
        spread = shifted((np.arange(batch) + rng.random(batch)) / batch, shift_at(step))
        times = torch.from_numpy((spread * self.scheduler.config.num_train_timesteps).astype(np.int64))
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


def shift_at(step: int) -> float:
    """How far the times of a step are shifted; 1 is not at all."""
    return next((shift for first, shift in SHIFTS if step >= first), 1.0)


def shifted(part: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Fractions of the schedule moved to its noisy end, as in Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2)."""
    return shift * part / (1 + (shift - 1) * part)


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents as the UNet sees them."""
    with torch.no_grad():
        latents: torch.Tensor = vae.encode(pictures).latent_dist.mode() * SCALE
    return latents


def draw_and_judge(denoiser: Denoiser, count: int, size: tuple[int, int], sheet: Path | None = None) -> data.Judged:
    """Draw held-out prompts with fixed seeds at this width and height, and judge what comes out."""
    some = scenes.sample(np.random.default_rng(0), denoiser.held_out, count)
    pipe = model.pipeline(denoiser.parts(), denoiser.geometry, denoiser.tokenizer)
    return data.draw_and_judge(pipe, some, size, SAMPLING, GUIDANCE, sheet)
