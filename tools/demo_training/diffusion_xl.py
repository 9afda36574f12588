"""Both trainings of `demo-xl`'s text encoders and UNet together, told the sizes of their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from crdiff_export.models import demo
from crdiff_export.models.demo import scenes
from crdiff_export.sizes import Size
from demo_training import data, model, model_xl, sized
from demo_training.diffusion import JUDGED, SAMPLING, UNPROMPTED, shifted
from demo_training.model_xl import SCALE, GeometryXL, PartsXL
from demo_training.training import Schedule, averaged, noise, numbers

GUIDANCE = demo.GUIDANCE[demo.DEMO_XL]


@dataclass(frozen=True, slots=True)
class Period:
    """What a part of the training learns from.

    Attributes:
        first: Its first step.
        sizes: The sizes of the pictures; a step has one of them at random.
        shift: How far times are shifted to the noisy end of the schedule; 1 is not at all.
        relations: The relations of the scenes.
        tells_target: Whether the model is told the size that it is trained at. If not, it is told any of the last
            period's, so that the numbers mean nothing yet.
    """

    first: int
    sizes: tuple[Size, ...]
    shift: float
    relations: tuple[str, ...]
    tells_target: bool = True


class DenoiserXL:
    """Learns the velocity between noise and latent, from the prompt and the sizes of the picture."""

    def __init__(
        self,
        name: str,
        parts: PartsXL,
        tokenizer: CLIPTokenizer,
        schedule: Schedule,
        periods: Sequence[Period],
        geometry: GeometryXL,
        seed: int,
    ) -> None:
        parts.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        self.name = name
        self.model = nn.ModuleDict({"text": parts.text, "text_2": parts.text_2, "unet": parts.unet})
        self.average = averaged(self.model)
        self.vae = parts.vae
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.periods = periods
        self.geometry = geometry
        self.seed = seed
        self.scheduler = model.scheduler(geometry)
        train, held_out = scenes.split()
        relations = {period.relations for period in periods}
        self.train = {some: scenes.with_relations(train, some) for some in relations}
        self.held_out = {some: scenes.with_relations(held_out, some) for some in relations}

    def parts(self) -> PartsXL:
        """The averaged models, and the autoencoder."""
        average = self.average
        return PartsXL(text=average["text"], text_2=average["text_2"], unet=average["unet"], vae=self.vae)

    def period(self, step: int) -> Period:
        """The period that this step is in."""
        return next(period for period in reversed(self.periods) if step >= period.first)

    def loss(self, step: int) -> torch.Tensor:
        """The mean squared error of the velocity, at a time in each part of the schedule."""
        rng = numbers(self.seed, self.name, step)
        batch, period = self.schedule.batch, self.period(step)
        some = scenes.sample(rng, self.train[period.relations], batch)
        size = period.sizes[int(rng.integers(len(period.sizes)))]
        drawn = sized.draw(some, size, self.geometry.native, rng)
        time_ids = drawn.time_ids
        if not period.tells_target:
            targets = tuple(dict.fromkeys(self.periods[-1].sizes))
            chosen = [targets[i] for i in rng.integers(len(targets), size=batch)]
            time_ids[:, 4:] = torch.tensor([(target.height, target.width) for target in chosen], dtype=torch.float32)
        with torch.no_grad():
            latents: torch.Tensor = self.vae.encode(drawn.pictures).latent_dist.mode() * SCALE
        spread = shifted((np.arange(batch) + rng.random(batch)) / batch, period.shift)
        times = torch.from_numpy((spread * self.scheduler.config.num_train_timesteps).astype(np.int64))
        added = torch.randn(latents.shape, generator=noise(rng))
        noisy = self.scheduler.add_noise(latents, added, times)
        velocity = self.scheduler.get_velocity(latents, added, times)
        context, pooled = self.encode_prompts([scene.prompt for scene in some])
        # Without a prompt SDXL is given zeros.
        prompted = torch.from_numpy(rng.random(batch) >= UNPROMPTED).float()
        conditions = {"text_embeds": pooled * prompted[:, None], "time_ids": time_ids}
        context = context * prompted[:, None, None]
        predicted = self.model["unet"](noisy, times, context, added_cond_kwargs=conditions).sample
        return functional.mse_loss(predicted, velocity)

    def encode_prompts(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """As SDXL's pipeline: the states before the last layer of both encoders, and the second one's pooled text.

        Returns:
            float32 [prompt, token, feature] and float32 [prompt, feature].
        """
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text, text_2 = (self.model[name](ids, output_hidden_states=True) for name in ("text", "text_2"))
        return torch.cat([text.hidden_states[-2], text_2.hidden_states[-2]], -1), text_2.text_embeds

    def report(self, step: int, folder: Path) -> str:
        """How many held-out prompts are drawn right, of the same ones each time."""
        period = self.period(step - 1)
        texts = []
        for size in {period.sizes[0], Size(self.geometry.native, self.geometry.native)}:
            sheet = folder / f"{self.name}-{step:05}-{size}.png"
            drawn = draw_and_judge(self, self.held_out[period.relations], JUDGED, size, sheet)
            texts.append(f"{drawn.right:.0%} of {JUDGED} held-out prompts right at {size}, score {drawn.score:.3f}")
        return "; ".join(texts)


def draw_and_judge(
    denoiser: DenoiserXL, chosen: data.Scenes, count: int, size: Size, sheet: Path | None = None
) -> data.Judged:
    """Draw prompts with fixed seeds at this size, which the model is told, and judge what comes out."""
    some = scenes.sample(np.random.default_rng(0), chosen, count)
    pipe = model_xl.pipeline(denoiser.parts(), denoiser.geometry, denoiser.tokenizer)
    return data.draw_and_judge(pipe, some, (size.width, size.height), SAMPLING, GUIDANCE, sheet)
