"""Would any other sparsity do as well? `python benchmarks/ablation.py OUT [--device cuda --dtype fp16 --jobs 8]`.

On the demo model, at sizes that it was not made for: every criterion, with the starting ratios and with ratios that
were searched for it, without and with POA, each compared with the dense model from the same noise on held-out prompts;
uniform ratios compared with block-wise ones; random weights as the control. Writes `ablation.md`, the table of
docs/ablation.md, and `ablation.png`. Finished results stay in OUT, so an interrupted run goes on where it stopped.
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

SIZES = ("48x48", "80x80", "96x64")
# Criteria that are searched, too, each with as many trials.
MAIN = ("magnitude", "random", "wanda", "taylor", "obs", "adverse")
# Criteria that differ from those in one thing.
OTHERS = (
    "uniform", "adverse:form=coin", "wanda:compare=row", "taylor:form=abs", "obs:compensate=off", "adverse:form=steady",
    "adverse:form=signed", "adverse:form=guarded", "adverse:form=second", "adverse:form=channel",
)  # fmt: skip
CALIBRATED = ("wanda", "taylor", "obs", "adverse")
COIN = "adverse:form=coin"  # needs no calibration
# Together these need every statistic.
WITH_ALL = ("wanda", "taylor", "taylor:form=abs", "obs", "adverse:form=second")
RATIO, WEIGHT = 0.3, 1.5  # where the search of the paper's public code begins, and its POA weight
STARTING, SEARCHED = "starting", "searched"
PLAIN = "magnitude"
SHOWN = (-0.2, 0.15)  # the plot's range: worse differences look alike


def needs(criterion: str) -> bool:
    """Say whether a criterion ranks by a calibration."""
    return criterion.partition(":")[0] in CALIBRATED and criterion != COIN


@dataclass(frozen=True, slots=True)
class Settings:
    """The folder of the results, and how pictures are drawn."""

    out: Path
    device: str
    dtype: str
    batch: int
    trials: int
    prompts: int
    held_out: int

    @property
    def start(self) -> Path:
        """The recipe that searches begin with."""
        return self.out / "start.toml"

    def calibration(self, size: str, criterion: str) -> Path | None:
        return self.out / f"calibration-{size}.safetensors" if needs(criterion) else None

    def result(self, size: str, criterion: str, ratios: str) -> Path:
        return self.out / f"{size}-{criterion.replace(':', '-').replace('=', '-')}-{ratios}.json"


def calibrate(settings: Settings, size: str) -> str:
    """Collect the statistics of all criteria at a size."""
    from crdiff_export import Size
    from crdiff_export.calibrate import CalibrateRequest
    from crdiff_export.calibrate import calibrate as run

    path = settings.calibration(size, CALIBRATED[0])
    assert path
    if path.exists():
        return f"{path.name}: there"
    device, batch = settings.device, settings.batch
    run(CalibrateRequest("demo", Size.parse(size), WITH_ALL, path, device=device, dtype="fp32", batch=batch))
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"


def search(settings: Settings, size: str, criterion: str) -> str:
    """Search ratios for a criterion."""
    from crdiff_export import Size
    from crdiff_export.progress import Silent
    from crdiff_export.search import SearchRequest, prepare
    from crdiff_export.search import search as run_search

    path = settings.result(size, criterion, "ratios")
    if path.exists():
        return f"{path.name}: there"
    result = run_search(
        prepare(
            SearchRequest(
                "demo", Size.parse(size), criterion=criterion, calibration=settings.calibration(size, criterion),
                recipe=settings.start, limit=settings.prompts, trials=settings.trials, batch=-(-settings.prompts // 2),
                device=settings.device, dtype=settings.dtype,
                storage=str(path.with_suffix(".db")), outputs=(path.with_suffix(".toml"),),
                force=True,
            )
        ),
        Silent(),
    )  # fmt: skip
    trials = [t for t in result.trials if t.value is not None and not t.candidate.dense and t.scores]
    # The best of those that prune: the dense model is what every row is compared with.
    best = max((t for t in trials if t.state == "complete"), key=lambda trial: trial.value or 0.0)
    ratios, dense = best.candidate.by_group, result.dense.value
    path.write_text(json.dumps({"ratios": ratios, "score": best.value, "dense": dense}))
    return f"{path.name}: {ratios}, {best.value:.4f} (dense {dense:.4f})"


def measure(settings: Settings, size: str, criterion: str, which: str) -> str:
    """Evaluate dense, pruned and POA on held-out prompts."""
    from crdiff_export import Size
    from crdiff_export.evaluate import EvaluateRequest, evaluate
    from crdiff_export.sampling import prompts

    path = settings.result(size, criterion, which)
    if path.exists():
        return f"{path.name}: there"
    if which == STARTING:
        ratios: dict[str, float] = dict.fromkeys(("down", "mid", "up"), RATIO)
    else:
        of = PLAIN if criterion == "uniform" else criterion
        ratios = json.loads(settings.result(size, of, "ratios").read_text())["ratios"]
    evaluation = evaluate(
        EvaluateRequest(
            "demo", (Size.parse(size),), prompts=prompts.held_out(settings.held_out), ratios=ratios,
            criterion=criterion, calibration=settings.calibration(size, criterion), weights=(WEIGHT,), native=False,
            batch=settings.batch, device=settings.device, dtype=settings.dtype,
        )
    )  # fmt: skip
    models = [finding.model for finding in evaluation.findings]
    record = {
        "ratios": evaluation.subjects[0].ratios, "pairs": len(evaluation.job.pairs),
        "scores": {model.name: model.values for model in models},
        "right": {f.model.name: f.right and f.right.value for f in evaluation.findings},
        "facts": evaluation.facts,
    }  # fmt: skip
    path.write_text(json.dumps(record))
    means = ", ".join(f"{f.model.name} {f.mean.value:.4f}" for f in evaluation.findings)
    return f"{path.name}: {means}"


def begin(settings: Settings) -> None:
    """Write the settings into the folder, or refuse a folder with results of other settings."""
    import search_demo

    from crdiff_export.models import recipe_toml

    text = json.dumps({key: getattr(settings, key) for key in ("dtype", "trials", "prompts", "held_out")})
    path = settings.out / "settings.json"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{path}: of other settings; give another folder")
    path.write_text(text)
    settings.start.write_text(recipe_toml.dump(search_demo.start()))


def each(settings: Settings, jobs: int) -> None:
    """Calibrate, search and measure everything, as many at once as there are jobs."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_quiet) as pool:

        def finish(work: Callable[..., str], arguments: Iterable[tuple[str, ...]]) -> None:
            for future in as_completed([pool.submit(work, settings, *words) for words in arguments]):
                print(future.result(), flush=True)

        finish(calibrate, [(size,) for size in SIZES])
        starting = [criterion for criterion in (*MAIN, *OTHERS) if criterion != "uniform"]
        finish(measure, [(size, criterion, STARTING) for criterion in starting for size in SIZES])
        finish(search, [(size, criterion) for criterion in MAIN for size in SIZES])
        finish(measure, [(size, criterion, SEARCHED) for criterion in (*MAIN, "uniform") for size in SIZES])


def _quiet() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One model at one size: its score, and its differences to the dense model and to magnitude."""

    size: str
    criterion: str
    which: str
    model: str
    score: float
    right: float
    low: float
    high: float
    difference: float
    verdict: str
    to_magnitude: tuple[float, float, float, str] | None


def rows(settings: Settings) -> Iterator[AblationRow]:
    """Yield every row of the table."""
    from crdiff_export.evaluate import statistics

    def read(size: str, criterion: str, which: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(settings.result(size, criterion, which).read_text())
        return record

    def grid(scores: list[float]) -> list[list[float]]:
        return [[score] for score in scores]

    for size in SIZES:
        starting = [criterion for criterion in (*MAIN, *OTHERS) if criterion != "uniform"]
        for which, criteria in ((STARTING, starting), (SEARCHED, [*MAIN, "uniform"])):
            plain = read(size, PLAIN, which)
            for criterion in criteria:
                if not settings.result(size, criterion, which).exists():
                    print(f"missing: {settings.result(size, criterion, which).name}")
                    continue
                record = read(size, criterion, which)
                dense = grid(record["scores"]["dense"])
                for model in ("pruned", f"POA {WEIGHT:g}"):
                    scores = grid(record["scores"][model])
                    to_dense = statistics.difference(scores, dense)
                    to_plain = statistics.difference(scores, grid(plain["scores"][model]))
                    # Pictures of another device or dtype cannot be paired.
                    alike = criterion != PLAIN and dict(record["facts"])["drawn on"] == dict(plain["facts"])["drawn on"]
                    yield AblationRow(
                        size, criterion, which, model, statistics.mean(scores).value, record["right"][model],
                        to_dense.low, to_dense.high, to_dense.value, to_dense.verdict,
                        (to_plain.value, to_plain.low, to_plain.high, to_plain.verdict) if alike else None,
                    )  # fmt: skip


def table(table_rows: list[AblationRow]) -> str:
    """Return all rows in Markdown."""
    lines = [
        "| size | ratios | criterion | model | score | right | minus dense (95 %) | | minus magnitude (95 %) | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    short = {"no difference shown": ""}
    for row in table_rows:
        to_dense = f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
        verdict = short.get(row.verdict, f"**{row.verdict}**")
        to_magnitude = ["", ""]
        if row.to_magnitude:
            value, low, high, shown = row.to_magnitude
            to_magnitude = [f"{value:+.3f} ({low:+.3f} to {high:+.3f})", short.get(shown, f"**{shown}**")]
        cells = [
            row.size, row.which, f"`{row.criterion}`", row.model, f"{row.score:.3f}", f"{row.right:.0%}", to_dense,
            verdict, *to_magnitude,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(table_rows: list[AblationRow], path: Path) -> None:
    """Plot differences to the dense model with their intervals, a panel for each size; arrows mark worse ones."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(SIZES), figsize=(4.2 * len(SIZES), 9), sharey=True, layout="constrained")
    names = list(dict.fromkeys((row.which, row.criterion) for row in table_rows))
    for panel, size in zip(panels, SIZES, strict=True):
        for shift, (model, colour) in enumerate((("pruned", "#0072B2"), (f"POA {WEIGHT:g}", "#D55E00"))):
            points = [row for row in table_rows if row.size == size and row.model == model]
            heights = [names.index((row.which, row.criterion)) + 0.3 * shift - 0.15 for row in points]
            values = [row.difference for row in points]
            spread = [[row.difference - row.low for row in points], [row.high - row.difference for row in points]]
            panel.errorbar(values, heights, xerr=spread, fmt="o", ms=4, lw=1.2, color=colour, label=model)
            off = [height for height, value in zip(heights, values, strict=True) if value < SHOWN[0]]
            panel.plot([SHOWN[0]] * len(off), off, "<", ms=7, color=colour, clip_on=False)
        panel.axvline(0, color="0.4", lw=0.8)
        panel.set_xlim(*SHOWN)
        panel.set_title(size)
        panel.set_xlabel("score minus dense, 95 %")
        panel.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(names)), [f"{criterion} ({which})" for which, criterion in names])
    panels[0].invert_yaxis()
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=81)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=84, help="of the search")
    parser.add_argument("--held-out", type=int, default=162)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the table and the plot again")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.out, args.device, args.dtype, args.batch, args.trials, args.prompts, args.held_out)
    if not args.report:
        begin(settings)
        each(settings, args.jobs)
    table_rows = list(rows(settings))
    (args.out / "ablation.json").write_text(json.dumps([asdict(row) for row in table_rows]))
    (args.out / "ablation.md").write_text(table(table_rows) + "\n")
    plot(table_rows, args.out / "ablation.png")
    print(f"{args.out / 'ablation.md'}\n{args.out / 'ablation.png'}")


if __name__ == "__main__":
    main()
