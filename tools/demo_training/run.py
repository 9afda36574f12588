"""The whole story: the autoencoder, then text encoder and UNet, then one file and the folder that opens it."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from crdiff_export.models.demo import scenes
from demo_training import convert, diffusion, model, training, vae
from demo_training.model import Geometry
from demo_training.training import Pace, Schedule

# Two cores of their own need 0.29 s for a step of the first stage and 1.0 s for one of the second: 105 minutes in all.
# With a rate of 4e-3 and more the autoencoder does not get beyond grey.
VAE = Schedule(steps=2500, batch=8, rate=1.5e-3, warm_up=50, decay=0.4, average=0.99, report=100)
DIFFUSION = Schedule(
    steps=5400, batch=32, rate=1e-3, warm_up=100, decay=0.3, average=0.998, report=250, attempt=(3140, 3800)
)
NAME = "demo.safetensors"
FOLDER = "demo-pipeline"


@dataclass(frozen=True, slots=True)
class Training:
    """All that the weights depend on, but for the machine and its number of threads."""

    seed: int = 0
    threads: int = 2
    vae: Schedule = VAE
    diffusion: Schedule = DIFFUSION
    geometry: Geometry = field(default_factory=lambda: Geometry(scenes.vocabulary()))


def run(training_: Training, folder: Path, log: Callable[[str], None], pace: Pace, command: str) -> Path | None:
    """Train in the folder, from where it was left; the finished file, or nothing if the time was up before."""
    torch.set_num_threads(training_.threads)
    torch.use_deterministic_algorithms(mode=True)
    geometry = training_.geometry
    folder.mkdir(parents=True, exist_ok=True)
    config = model.write_folder(geometry, folder / FOLDER)
    tokenizer = CLIPTokenizer.from_pretrained(config / "tokenizer")
    parts = model.build(geometry, training_.seed)

    first = vae.Autoencoder(parts.vae, training_.vae, geometry.native, training_.seed)
    if not training.train(first, folder, log, pace):
        return None
    parts.vae.load_state_dict(first.average.state_dict())
    parts.vae.eval().requires_grad_(requires_grad=False)
    vae.settle(parts.vae, geometry.native, training_.seed)

    second = diffusion.Denoiser(parts, tokenizer, training_.diffusion, geometry, training_.seed)
    if not training.train(second, folder, log, pace):
        return None
    file = folder / NAME
    state = convert.original(second.parts(), geometry)
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
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "sgm",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": f"{native}x{native}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "crdiff demo",
    }
