"""What `ablation.py` and `demo_xl.py` share: one model drawn in many ways, every result in a file of its own."""

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

RATIO, WEIGHT = 0.3, 1.5  # where the search of the paper's public code begins, and its POA weight
STARTING, SEARCHED = "starting", "searched"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's
Call = tuple[Callable[..., str], tuple[Any, ...]]


@dataclass(frozen=True)
class Settings:
    """The folder of the results, how pictures are drawn, and how long searches take."""

    out: Path
    device: str
    dtype: str
    batch: int
    trials: int
    prompts: int
    held_out: int
    jobs: int

    def begin(self, base: Path) -> None:
        """Write what results depend on into the folder, or refuse a folder of other settings or another base."""
        settings = {key: getattr(self, key) for key in ("dtype", "trials", "prompts", "held_out")}
        text = json.dumps({**settings, "base": hashlib.sha256(base.read_bytes()).hexdigest()})
        path = self.out / "settings.json"
        if path.exists() and path.read_text() != text:
            raise SystemExit(f"{path}: of other settings or another base; give another folder")
        path.write_text(text)


AnySettings = TypeVar("AnySettings", bound=Settings)


def parse(kind: type[AnySettings], doc: str | None, **defaults: int) -> tuple[AnySettings, bool]:
    """Read the command line, and say whether only the report is to be written."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--prompts", type=int, help="of a search")
    parser.add_argument("--held-out", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="processes; they share the cores")
    parser.add_argument("--report", action="store_true", help="only write the tables and the plot again")
    parser.set_defaults(**defaults)
    chosen = vars(parser.parse_args())
    report = chosen.pop("report")
    chosen["out"].mkdir(parents=True, exist_ok=True)
    return kind(**chosen), report


def run(parts: Iterable[Iterable[Call]], jobs: int) -> None:
    """Do one part after another, the calls of each in as many processes as there are jobs."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (threads,)) as pool:
        for part in parts:
            for future in as_completed([pool.submit(work, *arguments) for work, arguments in part]):
                print(future.result(), flush=True)


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")


def best_pruned(result: Any) -> dict[str, Any]:
    """Return the best trial of those that prune, even where the dense model is better."""
    complete = [trial for trial in result.trials if trial.state == "complete" and not trial.candidate.dense]
    best = max((trial for trial in complete if trial.scores), key=lambda trial: trial.value)
    return {"ratios": best.candidate.by_group, "score": best.value, "dense": result.dense.value}


def record(evaluation: Any) -> dict[str, Any]:
    """Return what the tables need of an evaluation."""
    findings = evaluation.findings
    return {
        "ratios": evaluation.subjects[0].ratios,
        "pairs": len(evaluation.job.pairs),
        "scores": {finding.model.name: finding.model.values for finding in findings},
        "right": {finding.model.name: finding.right and finding.right.value for finding in findings},
        "facts": evaluation.facts,
    }


def means(evaluation: Any) -> str:
    """Return the mean scores in a line."""
    return ", ".join(f"{finding.model.name} {finding.mean.value:.4f}" for finding in evaluation.findings)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference of scores with its 95 % interval, by bootstrap over prompts."""

    value: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        """Return the numbers for a table."""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def mark(self) -> str:
        """The verdict for a table, where no news is an empty cell."""
        return "" if self.verdict == "no difference shown" else f"**{self.verdict}**"


def compare(scores: Sequence[float], others: Sequence[float]) -> Comparison:
    """Compare the scores of the same prompts and seeds."""
    from crdiff_export.evaluate import statistics

    estimate = statistics.difference([[score] for score in scores], [[score] for score in others])
    return Comparison(estimate.value, estimate.low, estimate.high, estimate.verdict)


@dataclass(frozen=True, slots=True)
class Point:
    """A comparison in a plot: its panel, its line by the line's name, and the series that it belongs to."""

    panel: str
    line: str
    series: str
    comparison: Comparison


def plot(
    points: Sequence[Point], path: Path, height: float, shown: tuple[float, float], panel_width: float = 3.4
) -> None:
    """Plot differences with their intervals, a panel for each size; an arrow marks what is beyond the range shown."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    names, lines, series = (
        list(dict.fromkeys(getattr(point, key) for point in points)) for key in ("panel", "line", "series")
    )
    figure, grid = plt.subplots(
        1, len(names), figsize=(panel_width * len(names), height), sharey=True, squeeze=False, layout="constrained"
    )
    panels = grid[0]
    for panel, name in zip(panels, names, strict=True):
        for point in (point for point in points if point.panel == name):
            number, found = series.index(point.series), point.comparison
            at = lines.index(point.line) + 0.5 * ((number + 0.5) / len(series) - 0.5)
            spread = [[found.value - found.low], [found.high - found.value]]
            panel.errorbar([found.value], [at], xerr=spread, fmt="o", ms=4, lw=1.2, color=COLOURS[number])
            for edge, marker, is_beyond in (
                (shown[0], "<", found.value < shown[0]),
                (shown[1], ">", found.value > shown[1]),
            ):
                if is_beyond:
                    panel.plot([edge], [at], marker, ms=7, color=COLOURS[number], clip_on=False)
        panel.axvline(0, color="0.4", lw=0.8)
        panel.set_xlim(*shown)
        panel.set_title(name)
        panel.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(lines)), lines)
    panels[0].invert_yaxis()
    handles = [Line2D([], [], marker="o", lw=1.2, color=colour) for colour in COLOURS[: len(series)]]
    figure.legend(
        handles, series, loc="outside lower center", ncols=len(series), frameon=False, title="score minus dense, 95 %"
    )
    figure.savefig(path, dpi=110)
