"""Train a demo model: `python tools/train_demo.py OUT` makes OUT/demo.safetensors and OUT/demo-pipeline.

With `--model demo-xl` it is the small SDXL instead of the small Stable Diffusion 1.

Checkpoints and sheets of samples lie in OUT too; the same command goes on where it was stopped. The same seed gives the
same weights on the same machine with the same number of threads, no matter how often it was stopped.
"""

import argparse
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

# Threads that spin while they wait take the time of those that work when cores are shared: 4 times slower. Torch reads
# it as it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from demo_training.demo import DemoTraining
from demo_training.demo_xl import DemoXLTraining
from demo_training.run import pace, run

MODELS = {training.name: training for training in (DemoTraining, DemoXLTraining)}


def main() -> int:
    """Parse the command line and run; 3 says that the time was up before the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--steps", type=int, help="of text encoders and UNet")
    parser.add_argument("--second-steps", type=int, help="of these in the small SDXL's second training")
    parser.add_argument("--minutes", type=float, help="save and stop after so many")
    chosen = parser.parse_args()
    training = MODELS[chosen.model](seed=chosen.seed, threads=chosen.threads)
    vae, diffusion = (
        replace(schedule, steps=steps or schedule.steps)
        for schedule, steps in ((training.vae, chosen.vae_steps), (training.diffusion, chosen.steps))
    )
    model = "" if chosen.model == "demo" else f" --model {chosen.model}"
    steps = f"--vae-steps {vae.steps} --steps {diffusion.steps}"
    training = replace(training, vae=vae, diffusion=diffusion)
    if isinstance(training, DemoXLTraining):
        second = replace(training.second, steps=chosen.second_steps or training.second.steps)
        training, steps = replace(training, second=second), f"{steps} --second-steps {second.steps}"
    command = f"python tools/train_demo.py OUT{model} --seed {chosen.seed} --threads {chosen.threads} {steps}"
    return 0 if run(training, chosen.out, _log, pace(120, chosen.minutes), command) else 3


def _log(line: str) -> None:
    sys.stdout.write(f"{datetime.now().astimezone():%H:%M:%S} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
