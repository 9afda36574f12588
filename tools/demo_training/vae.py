"""The first stage: an autoencoder, whose latents are some times smaller than the picture on either side."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from crdiff_export.models.demo import scenes
from demo_training import data
from demo_training.model import LATENT
from demo_training.training import Schedule, averaged, noise, numbers

THINGS = 6.0  # weight of a pixel that is not ground: things cover a tenth of a picture, and have all of its colours
# Weight of the distance from a normal distribution, per number of a latent. With 1e-3 colours are given up for it.
DIVERGENCE = 1e-5

START = -6.0  # logarithm of the latents' variance


# Draws the batch of a step: the scenes, and their pictures, [scene, 3, height, width] from -1 to 1.
Draw = Callable[[np.random.Generator, int], tuple[data.Scenes, torch.Tensor]]


class Autoencoder:
    """Learns to give pictures back."""

    name = "vae"

    def __init__(self, model: AutoencoderKL, schedule: Schedule, draw: Draw, native: int, seed: int) -> None:
        with torch.no_grad():  # little noise from the start: much of it hides the colours for hundreds of steps
            model.quant_conv.bias[LATENT:] = START
        self.model = model
        self.average = averaged(model)
        self.schedule = schedule
        self.draw = draw
        self.native = native
        self.seed = seed
        self.held_out = scenes.split()[1]

    def loss(self, step: int) -> torch.Tensor:
        """The squared distance of the pixels, and the divergence.

        Its gradient fades where a picture is right. That of L1 does not, and drowned the colours for 1000 steps.
        """
        rng = numbers(self.seed, self.name, step)
        some, pictures = self.draw(rng, step)
        latents = self.model.encode(pictures).latent_dist
        drawn: torch.Tensor = self.model.decode(latents.sample(noise(rng))).sample
        weights = torch.where((pictures != data.grounds(some)).any(1, keepdim=True), THINGS, 1.0)
        divergence: torch.Tensor = latents.kl().mean() / latents.mean[0].numel()
        return (weights * (drawn - pictures).square()).mean() + DIVERGENCE * divergence

    def report(self, step: int, folder: Path) -> str:
        """The distance of held-out pictures from what is made of them, and how many the judge finds right."""
        size = (self.native, self.native)
        decibels, right = reconstruct(self.average, self.held_out, 64, size, folder / f"vae-{step:05}.png")
        return f"{decibels:.1f} dB, {right:.1%} of the held-out pictures right"


def reconstruct(
    vae: AutoencoderKL, chosen: data.Scenes, count: int, size: tuple[int, int], sheet: Path | None = None
) -> tuple[float, float]:
    """The PSNR of `count` pictures, and the share that the judge finds right."""
    rng = np.random.default_rng(0)
    some = scenes.sample(rng, chosen, count)
    pictures = data.pictures(some, *size, rng)
    with torch.inference_mode():
        drawn = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in torch.split(pictures, 16)]
        )
    error = functional.mse_loss(drawn.clamp(-1, 1), pictures).item() / 4  # of values from 0 to 1
    images = data.images(drawn)
    if sheet:
        data.save_sheet(images[:32], sheet)
    return -10 * math.log10(error), data.judged(images, some).right


def settle(vae: AutoencoderKL, pictures: torch.Tensor, scale: float) -> None:
    """Give each channel of the pictures' latents mean 0 and deviation 1 / scale, and keep what is decoded."""
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(pictures, 32)])
    mean = latents.mean((0, 2, 3)).clone()
    gain = 1 / (scale * latents.std((0, 2, 3)))
    channels = len(mean)
    with torch.no_grad():
        into, out = vae.quant_conv, vae.post_quant_conv
        into.weight[:channels] *= gain[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - mean) * gain
        into.bias[channels:] += 2 * gain.log()  # the logarithm of the variance
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight /= gain[None, :, None, None]
