"""The loop that both stages share: a step, an average of the weights, a checkpoint now and then.

All that is random in a step comes from the seed, the stage and the step's number, so that a checkpoint holds no state
of a generator, and stopping and resuming changes nothing.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a stage trains, and how fast: a linear start, a constant rate, and a linear end down to zero."""

    steps: int
    batch: int
    rate: float
    warm_up: int
    decay: float
    """Share of the steps at the end in which the rate falls."""
    average: float
    """How much of the averaged weights a step keeps; less in the first steps."""
    report: int
    """Steps from one report to the next."""
    attempt: tuple[int, int] | None = None
    """Up to a step the rate is that of a training of so many steps, which was given up there as too short."""

    def rate_at(self, step: int) -> float:
        """The learning rate of this step."""
        steps = self.attempt[1] if self.attempt and step < self.attempt[0] else self.steps
        left = (steps - step) / max(1.0, self.decay * steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up, left)


class Stage(Protocol):
    """One of the two things to train."""

    name: str
    schedule: Schedule

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def average(self) -> nn.Module:
        """What `train` keeps at the average of the model's weights."""
        ...

    def loss(self, step: int) -> torch.Tensor:
        """The loss of this step's batch."""
        ...

    def report(self, step: int, folder: Path) -> str:
        """How good the averaged weights are, in a few words; pictures go into the folder."""
        ...


@dataclass(frozen=True, slots=True)
class Pace:
    """What is the machine's affair."""

    save: float = 120.0
    """Seconds from one checkpoint to the next."""
    stop: float = float("inf")
    """When to save and stop, in `time.monotonic()`."""


def numbers(seed: int, stage: str, step: int) -> np.random.Generator:
    """The generator of this step's batch."""
    return np.random.default_rng([seed, *stage.encode(), step])


def noise(rng: np.random.Generator) -> torch.Generator:
    """Torch's generator for the same step."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def averaged(model: Model) -> Model:
    """A copy to keep at the average of the weights."""
    return copy.deepcopy(model).eval().requires_grad_(requires_grad=False)


def train(stage: Stage, folder: Path, log: Callable[[str], None], pace: Pace) -> bool:
    """Train from the last checkpoint in the folder to the stage's end, or until the time is up, and then say no."""
    schedule = stage.schedule
    parameters = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01)
    file = folder / f"{stage.name}.pt"
    first, mean = _resume(file, stage, optimiser)
    if first:
        log(f"{stage.name}: resumed after {first} of {schedule.steps} steps")
    started = saved = time.monotonic()
    for step in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = stage.loss(step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        _follow(stage, min(schedule.average, (step + 1) / (step + 10)))
        keep = min(0.99, step / (step + 1))
        mean = keep * mean + (1 - keep) * loss.item()
        done, now = step + 1, time.monotonic()
        if done % 25 == 0 or done == schedule.steps:
            rate = (done - first) / (now - started)
            left = (schedule.steps - done) / rate / 60
            log(f"{stage.name} {done}/{schedule.steps}  loss {mean:.4f}  {rate:.2f} steps/s  {left:.0f} min left")
        stop = now > pace.stop
        if stop or done == schedule.steps or now - saved > pace.save:
            _save(file, stage, optimiser, done, mean)
            saved = time.monotonic()
        if stop and done < schedule.steps:
            return False
        if done % schedule.report == 0 or done == schedule.steps:
            log(f"{stage.name} {done}/{schedule.steps}  {stage.report(done, folder)}")
    return True


def loss_reached(folder: Path, name: str) -> float:
    """The running mean of the stage's loss at its last checkpoint."""
    return float(torch.load(folder / f"{name}.pt", weights_only=True)["loss"])


def _follow(stage: Stage, keep: float) -> None:
    with torch.no_grad():
        pairs = zip(stage.average.parameters(), stage.model.parameters(), strict=True)
        for mean, now in pairs:
            mean.lerp_(now, 1 - keep)


def _resume(file: Path, stage: Stage, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    """Steps done and the mean of the loss."""
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    stage.model.load_state_dict(state["model"])
    stage.average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"], state["loss"]


def _save(file: Path, stage: Stage, optimiser: torch.optim.Optimizer, step: int, loss: float) -> None:
    """All at once, by way of a sibling."""
    part = file.with_suffix(".part")
    state = {"model": stage.model.state_dict(), "average": stage.average.state_dict(), "step": step, "loss": loss}
    torch.save({**state, "optimiser": optimiser.state_dict()}, part)
    part.replace(file)
