"""The whole story: the autoencoder, then text encoders and UNet, then one file and the folder that opens it.

Text encoders and UNet may be trained a second time. Then the first training's file is `NAME-first.safetensors`, and the
second one begins with the weights in it.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import safetensors
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
    """A training of text encoders and UNet."""

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
        """The training of text encoders and UNet."""
        ...

    def original(self, parts: Models, folder: Path) -> State:
        """Every tensor of the original file; the folder is free for what it takes."""
        ...


@runtime_checkable
class TrainingTwice(Training, Protocol):
    """A model whose text encoders and UNet are trained a second time."""

    def denoiser_again(self, file: Path, config: Path, tokenizer: CLIPTokenizer) -> Denoising:
        """The second training, which begins with the weights of the first one's file."""
        ...


def run(training_: Training, folder: Path, log: Callable[[str], None], pace: Pace, command: str) -> Path | None:
    """Train in the folder, from where it was left; the finished file, or nothing if the time was up before."""
    torch.set_num_threads(training_.threads)
    torch.use_deterministic_algorithms(mode=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.write_folder(training_.configs(), training_.geometry, folder / f"{training_.name}-pipeline")
    tokenizer = CLIPTokenizer.from_pretrained(config / "tokenizer")
    file = folder / f"{training_.name}.safetensors"
    metadata = _metadata(training_, command)
    if isinstance(training_, TrainingTwice):
        first = file.with_stem(f"{file.stem}-first")
        if not first.exists() and not _train(training_, first, tokenizer, log, pace, metadata):
            return None
        stage = training_.denoiser_again(first, config, tokenizer)
        if not training.train(stage, folder, log, pace):
            return None
        with safetensors.safe_open(first, "np") as opened:
            metadata = {**opened.metadata(), **metadata}
        _write(training_, file, stage.parts(), metadata, [stage])
    elif not _train(training_, file, tokenizer, log, pace, metadata):
        return None
    log(f"{file}: {file.stat().st_size} bytes, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return file


def pace(save: float, minutes: float | None) -> Pace:
    """Checkpoints every so many seconds, and a stop after so many minutes from now."""
    return Pace(save, time.monotonic() + 60 * minutes if minutes else float("inf"))


def _train(
    training_: Training,
    file: Path,
    tokenizer: CLIPTokenizer,
    log: Callable[[str], None],
    pace: Pace,
    metadata: Mapping[str, str],
) -> bool:
    """Train all models from random weights, and write the file unless the time was up before."""
    parts = training_.build()
    coder = vae.Autoencoder(parts.vae, training_.vae, training_.draw, training_.geometry.native, training_.seed)
    if not training.train(coder, file.parent, log, pace):
        return False
    parts.vae.load_state_dict(coder.average.state_dict())
    parts.vae.eval().requires_grad_(requires_grad=False)
    training_.settle(parts.vae)
    denoiser = training_.denoiser(parts, tokenizer)
    if not training.train(denoiser, file.parent, log, pace):
        return False
    _write(training_, file, denoiser.parts(), metadata, [coder, denoiser])
    return True


def _write(
    training_: Training, file: Path, parts: Models, metadata: Mapping[str, str], stages: Sequence[Stage]
) -> None:
    """Write a file of the models, whose header has the steps and losses of these stages."""
    state = training_.original(parts, file.with_name(f"{training_.name}-folder"))
    losses = {stage.name: training.loss_reached(file.parent, stage.name) for stage in stages}
    convert.write(
        file,
        state,
        {
            **metadata,
            **{f"crdiff.demo.loss.{name}": f"{loss:.4f}" for name, loss in losses.items()},
            **{f"crdiff.demo.steps.{stage.name}": str(stage.schedule.steps) for stage in stages},
        },
    )


def _metadata(training_: Training, command: str) -> dict[str, str]:
    """What the file says of itself; losses, steps and its hash come with them."""
    native = training_.geometry.native
    return {
        "crdiff.demo": "a miniature trained on rendered scenes, for trying the tool",
        "crdiff.demo.command": command,
        "crdiff.demo.seed": str(training_.seed),
        "crdiff.demo.threads": str(training_.threads),
        "crdiff.demo.torch": torch.__version__,
        "format": "pt",
        "modelspec.implementation": "sgm",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": f"{native}x{native}",
        "modelspec.sai_model_spec": "1.0.1",
        **training_.metadata,
    }
