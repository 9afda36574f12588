"""The whole story: the autoencoder, then text encoders and UNet, then one file and the folder that opens it."""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from demo_training import convert, data, model, training, vae
from demo_training.convert import State
from demo_training.model import Config, Geometry
from demo_training.training import Pace, Schedule, Stage

# The models, as `Training.build` makes them, among them a `vae`.
Models = Any


class Denoising(Stage, Protocol):
    """The second stage."""

    def parts(self) -> Models:
        """The trained models."""
        ...


class Training(Protocol):
    """All that a model's weights depend on, but for the machine."""

    name: ClassVar[str]
    metadata: ClassVar[Mapping[str, str]]
    """What the file's header says of the model."""

    @property
    def seed(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def vae(self) -> Schedule: ...
    @property
    def diffusion(self) -> Schedule: ...
    @property
    def geometry(self) -> Geometry: ...

    def configs(self) -> dict[str, Config]:
        """Every table of the pipeline's folder, by its file's name."""
        ...

    def build(self) -> Models:
        """The models with random weights."""
        ...

    def draw(self, rng: np.random.Generator, step: int) -> tuple[data.Scenes, torch.Tensor]:
        """The scenes and pictures of a step of the autoencoder's training."""
        ...

    def settle(self, autoencoder: AutoencoderKL) -> None:
        """Scale the latents of the trained autoencoder."""
        ...

    def denoiser(self, parts: Models, tokenizer: CLIPTokenizer) -> Denoising:
        """The second stage."""
        ...

    def original(self, parts: Models, folder: Path) -> State:
        """Every tensor of the original file; the folder is free for what it takes."""
        ...


def run(training_: Training, folder: Path, log: Callable[[str], None], pace: Pace, command: str) -> Path | None:
    """Train in the folder, from where it was left; the finished file, or nothing if the time was up before."""
    torch.set_num_threads(training_.threads)
    torch.use_deterministic_algorithms(mode=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.write_folder(training_.configs(), training_.geometry, folder / f"{training_.name}-pipeline")
    tokenizer = CLIPTokenizer.from_pretrained(config / "tokenizer")
    parts = training_.build()

    first = vae.Autoencoder(parts.vae, training_.vae, training_.draw, training_.geometry.native, training_.seed)
    if not training.train(first, folder, log, pace):
        return None
    parts.vae.load_state_dict(first.average.state_dict())
    parts.vae.eval().requires_grad_(requires_grad=False)
    training_.settle(parts.vae)

    second = training_.denoiser(parts, tokenizer)
    if not training.train(second, folder, log, pace):
        return None
    file = folder / f"{training_.name}.safetensors"
    state = training_.original(second.parts(), folder / f"{training_.name}-folder")
    losses = {stage.name: training.loss_reached(folder, stage.name) for stage in (first, second)}
    convert.write(file, state, _metadata(training_, losses, command))
    log(f"{file}: {file.stat().st_size} bytes, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return file


def pace(save: float, minutes: float | None) -> Pace:
    """Checkpoints every so many seconds, and a stop after so many minutes from now."""
    return Pace(save, time.monotonic() + 60 * minutes if minutes else float("inf"))


def _metadata(training_: Training, losses: dict[str, float], command: str) -> dict[str, str]:
    """What the file says of itself; its hash comes with it."""
    native = training_.geometry.native
    return {
        "crdiff.demo": "a miniature trained on rendered scenes, for trying the tool",
        "crdiff.demo.command": command,
        "crdiff.demo.seed": str(training_.seed),
        "crdiff.demo.threads": str(training_.threads),
        "crdiff.demo.torch": torch.__version__,
        **{f"crdiff.demo.loss.{name}": f"{loss:.4f}" for name, loss in losses.items()},
        **{f"crdiff.demo.steps.{name}": str(getattr(training_, name).steps) for name in losses},
        "format": "pt",
        "modelspec.implementation": "sgm",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": f"{native}x{native}",
        "modelspec.sai_model_spec": "1.0.1",
        **training_.metadata,
    }
