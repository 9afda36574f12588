"""How many trials an hour: `python benchmarks/search.py` (the demo model; another one by --base, --scorer).

`crdiff search` beside the public code's way, in turn and with the same candidates, prompts and seeds. For each prompt
that way takes one process that loads the pipeline, deep-copies it, prunes the copy with `kthvalue` and draws one
picture, and another one that loads the scorer and scores it (BWP_strategy.py; its resizing to 256x256 is left out, so
that both give the same scores). Of crdiff's own trials it also says which share is neither spent drawing nor scoring,
which is what the search itself costs. Opening the base is counted apart: it happens once a search here, and once a
picture there.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crdiff_export import Size
from crdiff_export.evaluate import scorers
from crdiff_export.progress import Silent
from crdiff_export.sampling import prompts
from crdiff_export.search import Candidate, SearchJob, SearchRequest, prepare
from crdiff_export.search.setup import SearchBudget


class Clock:
    """Seconds spent in calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return measured


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Have a clock run while pictures are drawn or scored."""
    from crdiff_export.sampling.session import Session

    draw, load = Session.draw, scorers.load

    def opened(*args: Any, **kwargs: Any) -> scorers.Scorer:
        scorer = load(*args, **kwargs)
        scorer.score = clock.timed(scorer.score)  # type: ignore[method-assign]
        return scorer

    Session.draw, scorers.load = clock.timed(draw), opened  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session.draw, scorers.load = draw, load  # type: ignore[method-assign]


class Ours:
    """A search that is asked for one more trial each time, in one open pipeline."""

    def __init__(self, job: SearchJob) -> None:
        self._job, self._clock = job, Clock()
        self.shares: list[float] = []

    @contextmanager
    def opened(self) -> Iterator[float]:
        """The search, open; what it took to open it."""
        from crdiff_export.search.objective import open_objective
        from crdiff_export.search.study import open_study

        job, began = self._job, time.perf_counter()
        with (
            watched(self._clock),
            open_objective(job, Silent(), lambda: None) as self._objective,
            open_study(job.storage, job.study, job.setup, self._objective.fingerprint) as self._study,
        ):
            yield time.perf_counter() - began

    def trial(self, number: int) -> tuple[float, Candidate, float]:
        """One trial: its seconds, what was tried, and the score."""
        from crdiff_export.search.worker import run_trials

        self._clock.seconds, began = 0.0, time.perf_counter()
        run_trials(self._study, self._objective, SearchBudget(number + 1))
        seconds = time.perf_counter() - began
        self.shares.append(1 - self._clock.seconds / seconds)
        done = self._study.trials()[number]
        assert done.value is not None
        return seconds, done.candidate, done.value


def theirs(job: SearchJob, candidate: Candidate, folder: Path, config: str, steps: int) -> tuple[float, float]:
    """The same trial in the public code's way: its seconds and the score."""
    drawing, began, found = job.drawing, time.perf_counter(), []
    for prompt, seed in job.pairs.search:
        picture = folder / "picture.png"
        task = {
            "base": str(drawing.base.path), "config": config, "ratios": candidate.by_group, "prompt": prompt,
            "seed": seed, "width": job.request.size.width, "height": job.request.size.height, "steps": steps,
            "device": drawing.device, "guidance": job.request.guidance, "picture": str(picture), "scorer": job.scorer,
            "dtype": drawing.dtype,
        }  # fmt: skip
        for child in ("draw", "score"):
            ran = subprocess.run(
                [sys.executable, __file__, child, json.dumps(task)], check=True, capture_output=True, text=True
            )
        found.append(float(ran.stdout.splitlines()[-1]))
    return time.perf_counter() - began, statistics.fmean(found)


def draw(task: dict[str, Any]) -> None:
    """The first process."""
    from copy import deepcopy

    import diffusers
    import torch

    warnings.simplefilter("ignore")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[task["dtype"]]
    if Path(task["base"]).is_dir():
        pipe = diffusers.DiffusionPipeline.from_pretrained(task["base"], torch_dtype=dtype)
    else:
        pipe = diffusers.StableDiffusionPipeline.from_single_file(
            task["base"], config=task["config"], local_files_only=True, torch_dtype=dtype
        )
    pipe.set_progress_bar_config(disable=True)
    unet = deepcopy(pipe.unet)
    for group, ratio in task["ratios"].items():
        weights = [
            weight
            for name, weight in unet.named_parameters()
            if name.startswith(group) and name.endswith("weight") and weight.ndim == 2
            and (".attn1." in name or ".ff." in name)
        ]  # fmt: skip
        every = torch.cat([weight.detach().abs().flatten() for weight in weights])
        rank = int(every.numel() * ratio)
        if rank:
            threshold = every.float().kthvalue(rank).values
            for weight in weights:
                weight.data.mul_(weight.data.abs() > threshold)
    pipe.unet = unet
    pipe.to(task["device"])
    image = pipe(
        [task["prompt"]], width=task["width"], height=task["height"], num_inference_steps=task["steps"],
        guidance_scale=task["guidance"], generator=[torch.Generator().manual_seed(task["seed"])],
    ).images[0]  # fmt: skip
    image.save(task["picture"])


def score(task: dict[str, Any]) -> None:
    """The second process."""
    from PIL import Image

    scorer = scorers.load(task["scorer"], task["device"])
    print(scorer.score([Image.open(task["picture"]).convert("RGB")], [task["prompt"]])[0].value)
    scorer.close()


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in ("draw", "score"):
        {"draw": draw, "score": score}[sys.argv[1]](json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="demo", help="demo, or a diffusers folder, such as one of random_sdxl.py")
    parser.add_argument("--scorer", default="demo")
    parser.add_argument("--res", type=Size.parse, default=Size(48, 48))
    parser.add_argument("--prompts", type=int, default=2, help="pictures of a trial; the public code's number is 2")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--theirs", type=int, help="trials of the public code's way, the first ones; default: all")
    parser.add_argument("--only-ours", action="store_true", help="the share that the search costs, with more trials")
    args = parser.parse_args()
    from crdiff_export.models import demo

    config = str(demo.config())
    known = prompts.to_search(args.prompts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(
            SearchRequest(
                args.base, args.res, args.scorer, prompts=known, held_out=prompts.held_out(8), steps=args.steps,
                guidance=args.guidance, batch=args.batch, trials=args.trials, early_stop=False,
                storage=str(folder / "b.db"), outputs=(folder / "b.toml",),
            )
        )  # fmt: skip
        ours, mine, others = Ours(job), [], []
        place = f"{job.drawing.device}, {job.drawing.dtype}"
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {place}")
        with ours.opened() as opening:
            for number in range(args.trials):
                seconds, candidate, value = ours.trial(number)
                mine.append(seconds)
                if args.only_ours or (args.theirs is not None and number >= args.theirs):
                    print(f"trial {number}: {seconds:.2f} s; score {value:.4f}", flush=True)
                    continue
                theirs_took, other = theirs(job, candidate, folder, config, args.steps)
                others.append(theirs_took)
                print(
                    f"trial {number}: {seconds:.2f} s, {theirs_took:.2f} s; score {value:.4f}, {other:.4f}", flush=True
                )
    print(f"\nopening: {opening:.1f} s, once a search\n\n| way | median trial | trials an hour |\n|---|---|---|")
    rows = [("crdiff search", mine), *([("the public code's way", others)] if others else [])]
    for way, some in rows:
        print(f"| {way} | {statistics.median(some):.2f} s | {3600 / statistics.fmean(some):.0f} |")
    shares = ours.shares[2:] or ours.shares  # the first two open the kernels and compare the weights
    print(f"\nneither drawing nor scoring: {statistics.median(shares):.2%} of a trial (at most {max(shares):.2%})")
    if others:
        ratios = [other / own for own, other in zip(mine, others, strict=False)]
        print(f"as fast: {statistics.median(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f})")
        print(f"trials an hour: {statistics.fmean(others) / statistics.fmean(mine):.1f} times as many")


if __name__ == "__main__":
    main()
