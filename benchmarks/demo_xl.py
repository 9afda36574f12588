"""Does pruning help an SDXL below its native size? `python benchmarks/demo_xl.py OUT [--device cuda --jobs 8]`.

On the small SDXL that comes with crdiff, told the size drawn or its native size: the dense model, the pruned one with
the starting ratios and with ratios that were searched for, POA, other criteria, and two-pass, each from the same noise
on held-out prompts. Whatever is better than the dense model that is told the same size is drawn again from other noise.
Writes `demo-xl.md`, the tables of docs/demo-xl.md, and `demo-xl.png`. Finished results stay in OUT, so that an
interrupted run goes on where it was.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BASE = "demo-xl"
SIZES = ("64x64", "56x72", "48x72", "96x96", "128x128", "160x160", "96x160")
# Sizes with more or fewer pixels than the native one. The last part of the training had the others.
SEARCHED_SIZES = ("64x64", "56x72", "48x72", "96x96", "160x160")
TRUE, TOLD_NATIVE = "drawn", "native"
STARTING, SEARCHED = "starting", "searched"
MAGNITUDE, ADVERSE, RANDOM = "magnitude", "adverse", "random"
RATIO, WEIGHT = 0.3, 1.5  # where the search of the paper's public code begins, and its POA weight
AGAIN = 10_000  # the first seed of the second noise


@dataclass(frozen=True, slots=True)
class Arm:
    """What is drawn in one go: dense, pruned and, of magnitude, POA; `told` is the size that the model is told."""

    size: str
    told: str
    criterion: str
    ratios: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The stem of its result."""
        again = f"-{self.seed}" if self.seed else ""
        return f"{self.size}-told-{self.told}-{self.criterion}-{self.ratios}{again}"

    @property
    def is_plain(self) -> bool:
        """Whether the rivals are drawn with it."""
        return (self.told, self.criterion, self.ratios) == (TRUE, MAGNITUDE, STARTING)


@dataclass(frozen=True, slots=True)
class Settings:
    """The folder of the results, and how pictures are drawn and searches run."""

    out: Path
    device: str
    dtype: str
    batch: int
    trials: int
    prompts: int
    held_out: int

    def ratios(self, size: str, told: str) -> Path:
        """The result of a search."""
        return self.out / f"{size}-told-{told}-ratios.json"

    def calibration(self, arm: Arm) -> Path | None:
        """The statistics that a criterion ranks by."""
        return self.out / f"{arm.size}-told-{arm.told}.safetensors" if arm.criterion == ADVERSE else None

    def result(self, arm: Arm) -> Path:
        """The result of an arm."""
        return self.out / f"{arm.name}.json"


def told_size(told: str) -> Any:
    """Return what a request says of the told size."""
    return "native" if told == TOLD_NATIVE else None


def arms() -> Iterator[Arm]:
    """Yield everything that is drawn from the first noise."""
    for size in SIZES:
        tells = (TRUE, TOLD_NATIVE) if size in SEARCHED_SIZES else (TRUE,)
        for told in tells:
            yield Arm(size, told, MAGNITUDE, STARTING)
            if size in SEARCHED_SIZES:
                yield Arm(size, told, MAGNITUDE, SEARCHED)
        for criterion in (ADVERSE, RANDOM):
            yield Arm(size, TRUE, criterion, STARTING)
            if size in SEARCHED_SIZES:
                yield Arm(size, TRUE, criterion, SEARCHED)


def calibrate(settings: Settings, size: str) -> str:
    """Collect what `adverse` ranks by."""
    from crdiff_export import Size
    from crdiff_export.calibrate import CalibrateRequest
    from crdiff_export.calibrate import calibrate as run

    path = settings.calibration(Arm(size, TRUE, ADVERSE, STARTING))
    assert path
    if not path.exists():
        run(CalibrateRequest(BASE, Size.parse(size), (ADVERSE,), path, device=settings.device, dtype="fp32",
                             batch=settings.batch))  # fmt: skip
    return path.name


def search(settings: Settings, size: str, told: str) -> str:
    """Search ratios for magnitude, of the pruned model alone; its own check is on the held-out prompts."""
    from crdiff_export import Size
    from crdiff_export.search import SearchRequest, tune
    from crdiff_export.search.report_text import conclusion

    path = settings.ratios(size, told)
    if path.exists():
        return path.name
    result = tune(
        SearchRequest(
            BASE, Size.parse(size), limit=settings.prompts, trials=settings.trials, held_out_limit=settings.held_out,
            batch=-(-settings.prompts // 2), device=settings.device, dtype=settings.dtype, native=False,
            told_size=told_size(told), storage=str(path.with_suffix(".db")), outputs=(path.with_suffix(".toml"),),
            force=True,
        )
    )  # fmt: skip
    trials = [t for t in result.trials if t.value is not None and not t.candidate.dense and t.scores]
    # The best of those that prune, even where the dense model is better.
    best = max((t for t in trials if t.state == "complete"), key=lambda trial: trial.value or 0.0)
    record = {
        "ratios": best.candidate.by_group, "score": best.value, "dense": result.dense.value,
        "trials": len(result.trials), "conclusion": conclusion(result),
    }  # fmt: skip
    path.write_text(json.dumps(record))
    return f"{path.name}: {record}"


def measure(settings: Settings, arm: Arm) -> str:
    """Evaluate dense, pruned and POA on held-out prompts."""
    from crdiff_export import Size
    from crdiff_export.evaluate import EvaluateRequest, evaluate
    from crdiff_export.sampling import prompts

    path = settings.result(arm)
    if path.exists():
        return path.name
    ratios: dict[str, float] = dict.fromkeys(("down", "mid", "up"), RATIO)
    if arm.ratios == SEARCHED:
        ratios = json.loads(settings.ratios(arm.size, arm.told).read_text())["ratios"]
    evaluation = evaluate(
        EvaluateRequest(
            BASE, (Size.parse(arm.size),), prompts=prompts.held_out(settings.held_out, BASE), ratios=ratios,
            seed=arm.seed, told_size=told_size(arm.told),
            criterion=arm.criterion, calibration=settings.calibration(arm),
            weights=(WEIGHT if arm.criterion == MAGNITUDE else 1.0,), native=False, batch=settings.batch,
            beside=("native-size", "two-pass") if arm.is_plain else (), device=settings.device, dtype=settings.dtype,
        )
    )  # fmt: skip
    models = [finding.model for finding in evaluation.findings]
    record = {
        "ratios": evaluation.subjects[0].ratios, "pairs": len(evaluation.job.pairs),
        "scores": {model.name: model.values for model in models},
        "right": {finding.model.name: finding.right and finding.right.value for finding in evaluation.findings},
        "seconds": {model.name: model.seconds for model in models}, "facts": evaluation.facts,
    }  # fmt: skip
    path.write_text(json.dumps(record))
    means = ", ".join(f"{finding.model.name} {finding.mean.value:.4f}" for finding in evaluation.findings)
    return f"{path.name}: {means}"


def begin(settings: Settings) -> None:
    """Write the settings into the folder, or refuse a folder with results of other settings."""
    text = json.dumps({key: getattr(settings, key) for key in ("dtype", "trials", "prompts", "held_out")})
    path = settings.out / "settings.json"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{path}: of other settings; give another folder")
    path.write_text(text)


def each(settings: Settings, jobs: int) -> None:
    """Calibrate, search and measure everything, as many at once as there are jobs."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_quiet) as pool:

        def finish(work: Callable[..., str], arguments: Iterable[tuple[Any, ...]]) -> None:
            for future in as_completed([pool.submit(work, settings, *words) for words in arguments]):
                print(future.result(), flush=True)

        starting = [arm for arm in arms() if arm.ratios == STARTING and arm.criterion != ADVERSE]
        finish(measure, [(arm,) for arm in starting])
        finish(search, [(size, told) for told in (TRUE, TOLD_NATIVE) for size in SEARCHED_SIZES])
        finish(calibrate, [(size,) for size in SIZES])
        finish(measure, [(arm,) for arm in arms()])
        finish(measure, [(arm,) for arm in again(settings)])


def again(settings: Settings) -> Iterator[Arm]:
    """Yield the arms to draw once more from other noise: those with a model that is better than its dense one."""
    better = {(row.size, row.told, row.criterion, row.ratios) for row in rows(settings, 0) if row.verdict == "better"}
    for arm in arms():
        if (arm.size, arm.told, arm.criterion, arm.ratios) in better:
            yield Arm(arm.size, arm.told, arm.criterion, arm.ratios, AGAIN)


def _quiet() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference of scores with its 95 % interval."""

    value: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        """Return the numbers for a table."""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One model at one size, told one size: its score, and its differences to the two dense models."""

    size: str
    told: str
    criterion: str
    ratios: str
    model: str
    score: float
    right: float
    to_own_dense: Comparison | None
    to_dense: Comparison | None

    @property
    def verdict(self) -> str:
        """What the difference to the dense model shows which is told the same size."""
        return self.to_own_dense.verdict if self.to_own_dense else ""


def rows(settings: Settings, seed: int) -> Iterator[ResultRow]:
    """Yield every row that was drawn from this noise; the dense model and the rivals once for each size."""
    for arm in arms():
        path = settings.result(Arm(arm.size, arm.told, arm.criterion, arm.ratios, seed))
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        plain = settings.result(Arm(arm.size, TRUE, MAGNITUDE, STARTING, seed))
        dense = json.loads(plain.read_text())["scores"]["dense"] if plain.exists() else None
        for model, scores in record["scores"].items():
            is_first = (arm.criterion, arm.ratios) == (MAGNITUDE, STARTING)
            if (model == "dense" and not (is_first and arm.told == TRUE)) or (model == "two-pass" and not is_first):
                continue
            yield ResultRow(
                arm.size, arm.told, arm.criterion, arm.ratios, model, sum(scores) / len(scores), record["right"][model],
                _compare(scores, record["scores"]["dense"]) if model != "dense" else None,
                _compare(scores, dense) if dense and arm.told != TRUE else None,
            )  # fmt: skip


def _compare(scores: list[float], others: list[float]) -> Comparison:
    from crdiff_export.evaluate import statistics

    estimate = statistics.difference([[score] for score in scores], [[score] for score in others])
    return Comparison(estimate.value, estimate.low, estimate.high, estimate.verdict)


def table(result_rows: Iterable[ResultRow]) -> str:
    """Return rows in Markdown."""
    lines = [
        "| size | told | model | score | right | minus dense told the same (95 %) | | minus dense told its size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    short = {"no difference shown": "", "": ""}
    for row in result_rows:
        criterion = "" if row.criterion == MAGNITUDE else f" by {row.criterion}"
        ratios = "" if row.model in ("dense", "native-size", "two-pass") else f"{criterion}, {row.ratios} ratios"
        verdict = short.get(row.verdict, f"**{row.verdict}**")
        cells = [
            row.size, row.told, row.model + ratios, f"{row.score:.3f}", f"{row.right:.0%}",
            str(row.to_own_dense or ""), verdict, str(row.to_dense or ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def searches(settings: Settings) -> str:
    """Return what the searches believed of their best ratios, in Markdown."""
    lines = ["| size | told | trials | ratios | best minus dense | its conclusion |", "|---|---|---|---|---|---|"]
    for size in SEARCHED_SIZES:
        for told in (TRUE, TOLD_NATIVE):
            path = settings.ratios(size, told)
            if not path.exists():
                continue
            record = json.loads(path.read_text())
            ratios = ", ".join(f"{group} {ratio:g}" for group, ratio in record["ratios"].items())
            gain = f"{record['score'] - record['dense']:+.3f}"
            lines.append(f"| {size} | {told} | {record['trials']} | {ratios} | {gain} | {record['conclusion']} |")
    return "\n".join(lines)


def plot(result_rows: list[ResultRow], path: Path) -> None:
    """Plot every model's score minus that of the dense model told the size drawn, a panel for each size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(SIZES), figsize=(3.2 * len(SIZES), 7), sharey=True, layout="constrained")
    names: dict[str, None] = {}
    for panel, size in zip(panels, SIZES, strict=True):
        for row in (row for row in result_rows if row.size == size and row.model != "dense"):
            difference = row.to_dense or row.to_own_dense
            assert difference
            detail = "" if row.model in ("native-size", "two-pass") else f" {row.criterion}, {row.ratios}"
            name = f"{row.model}{detail}" + (", told native" if row.told == TOLD_NATIVE else "")
            names.setdefault(name)
            height = list(names).index(name)
            spread = [[difference.value - difference.low], [difference.high - difference.value]]
            colour = "#D55E00" if "native" in name else "#0072B2"
            panel.errorbar([difference.value], [height], xerr=spread, fmt="o", ms=4, lw=1.2, color=colour)
        panel.axvline(0, color="0.4", lw=0.8)
        panel.set_title(size)
        panel.set_xlabel("score minus dense, 95 %")
        panel.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(names)), list(names))
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=64, help="of a search")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the tables and the plot again")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.out, args.device, args.dtype, args.batch, args.trials, args.prompts, args.held_out)
    if not args.report:
        begin(settings)
        each(settings, args.jobs)
    first, second = list(rows(settings, 0)), list(rows(settings, AGAIN))
    (args.out / "demo-xl.json").write_text(json.dumps([asdict(row) for row in (*first, *second)]))
    text = f"{table(first)}\n\nFrom other noise:\n\n{table(second)}\n\n{searches(settings)}\n"
    (args.out / "demo-xl.md").write_text(text)
    plot(first, args.out / "demo-xl.png")
    print(f"{args.out / 'demo-xl.md'}\n{args.out / 'demo-xl.png'}")


if __name__ == "__main__":
    main()
