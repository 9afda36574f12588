"""Would any sparsity do? `python benchmarks/ablation.py OUT [--device cuda --dtype fp16 --jobs 8]`.

On the demo model, at sizes that it was not made for: every criterion, with the starting ratios and with ratios that
were searched for it, without and with POA, each against the dense model from the same noise on held-out prompts;
uniform ratios against block-wise ones; random weights as the control. Writes `ablation.md`, the table of
docs/ablation.md, and `ablation.png`. What is finished stays in OUT, so that a run that was stopped goes on.
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
# Searched as well, each with as many trials.
MAIN = ("magnitude", "random", "wanda", "taylor", "obs", "adverse")
# What differs from those in one thing.
OTHERS = (
    "uniform", "adverse:form=coin", "wanda:compare=row", "taylor:form=abs", "obs:compensate=off", "adverse:form=steady",
    "adverse:form=signed", "adverse:form=guarded", "adverse:form=second", "adverse:form=channel",
)  # fmt: skip
CALIBRATED = ("wanda", "taylor", "obs", "adverse")
COIN = "adverse:form=coin"  # which needs none
# Between them they need every statistic.
WITH_ALL = ("wanda", "taylor", "taylor:form=abs", "obs", "adverse:form=second")
RATIO, WEIGHT = 0.3, 1.5  # where the search of the paper's public code begins, and its POA weight
STARTING, SEARCHED = "starting", "searched"
PLAIN = "magnitude"
SHOWN = (-0.2, 0.15)  # of the plot: what is worse is too bad to be told apart


def needs(criterion: str) -> bool:
    """Whether it ranks by a calibration."""
    return criterion.partition(":")[0] in CALIBRATED and criterion != COIN


@dataclass(frozen=True, slots=True)
class Asked:
    """How all of it is drawn."""

    out: Path
    device: str
    dtype: str
    batch: int
    trials: int
    prompts: int
    held_out: int

    @property
    def start(self) -> Path:
        """Where searches begin."""
        return self.out / "start.toml"

    def calibration(self, size: str, criterion: str) -> Path | None:
        return self.out / f"calibration-{size}.safetensors" if needs(criterion) else None

    def result(self, size: str, criterion: str, ratios: str) -> Path:
        return self.out / f"{size}-{criterion.replace(':', '-').replace('=', '-')}-{ratios}.json"


def calibrate(asked: Asked, size: str) -> str:
    """The statistics of all criteria at a size."""
    from crdiff_export import Size
    from crdiff_export.calibrate import CalibrateRequest
    from crdiff_export.calibrate import calibrate as made

    path = asked.calibration(size, CALIBRATED[0])
    assert path
    if path.exists():
        return f"{path.name}: there"
    made(
        CalibrateRequest("demo", Size.parse(size), WITH_ALL, path, device=asked.device, dtype="fp32", batch=asked.batch)
    )
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"


def search(asked: Asked, size: str, criterion: str) -> str:
    """Ratios for a criterion."""
    from crdiff_export import Size
    from crdiff_export.progress import Silent
    from crdiff_export.search.tuning import SearchRequest, Unwatched, prepare, work

    path = asked.result(size, criterion, "ratios")
    if path.exists():
        return f"{path.name}: there"
    found = work(
        prepare(
            SearchRequest(
                "demo", Size.parse(size), criterion=criterion, calibration=asked.calibration(size, criterion),
                recipe=asked.start, limit=asked.prompts, trials=asked.trials, batch=-(-asked.prompts // 2),
                device=asked.device, dtype=asked.dtype,
                storage=str(path.with_suffix(".journal")), outputs=(path.with_suffix(".toml"),),
                force=True,
            )
        ),
        Silent(), Unwatched(),
    )  # fmt: skip
    trials = [one for one in found.trials if one.value is not None and not one.candidate.dense and one.scores]
    whole = [one for one in trials if one.state == "complete"]
    best = max(whole, key=lambda one: one.value or 0.0)  # of those that prune: the dense model is every row's measure
    path.write_text(json.dumps({"ratios": best.candidate.by_group, "score": best.value, "dense": found.dense.value}))
    return f"{path.name}: {best.candidate.by_group}, {best.value:.4f} (dense {found.dense.value:.4f})"


def measure(asked: Asked, size: str, criterion: str, which: str) -> str:
    """Dense, pruned and POA on held-out prompts."""
    from crdiff_export import Size
    from crdiff_export.evaluate import EvaluateRequest
    from crdiff_export.evaluate import evaluate as made
    from crdiff_export.sampling import prompts

    path = asked.result(size, criterion, which)
    if path.exists():
        return f"{path.name}: there"
    if which == STARTING:
        ratios: dict[str, float] = dict.fromkeys(("down", "mid", "up"), RATIO)
    else:
        of = PLAIN if criterion == "uniform" else criterion
        ratios = json.loads(asked.result(size, of, "ratios").read_text())["ratios"]
    found = made(
        EvaluateRequest(
            "demo", (Size.parse(size),), prompts=prompts.held_out(asked.held_out), ratios=ratios, criterion=criterion,
            calibration=asked.calibration(size, criterion), weights=(WEIGHT,), native=False, batch=asked.batch,
            device=asked.device, dtype=asked.dtype,
        )
    )  # fmt: skip
    said = {
        "ratios": dict(found.subjects[0].ratios), "pairs": len(found.pairs),
        "scores": {one.model.name: [score.value for score in one.model.scores] for one in found.findings},
        "right": {one.model.name: one.right and one.right.value for one in found.findings},
        "facts": found.facts,
    }  # fmt: skip
    path.write_text(json.dumps(said))
    told = ", ".join(f"{f.model.name} {f.mean.value:.4f}" for f in found.findings)
    return f"{path.name}: {told}"


def begin(asked: Asked) -> None:
    """Write down with what it begins; a folder of other settings is not gone on with."""
    import search_demo

    from crdiff_export.models import recipe_toml

    said = json.dumps({key: getattr(asked, key) for key in ("dtype", "trials", "prompts", "held_out")})
    settings = asked.out / "settings.json"
    if settings.exists() and settings.read_text() != said:
        raise SystemExit(f"{settings}: of other settings; give another folder")
    settings.write_text(said)
    asked.start.write_text(recipe_toml.dump(search_demo.start()))


def each(asked: Asked, jobs: int) -> None:
    """Do all of it, so many at once."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_quiet) as pool:

        def finish(work: Callable[..., str], arguments: Iterable[tuple[str, ...]]) -> None:
            for future in as_completed([pool.submit(work, asked, *one) for one in arguments]):
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
class Row:
    """One model at one size: its score, and what it is better or worse by than the dense model and than magnitude."""

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
    beside: tuple[float, float, float, str] | None


def rows(asked: Asked) -> Iterator[Row]:
    """Every row of the table."""
    from crdiff_export.evaluate import statistics

    def read(size: str, criterion: str, which: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(asked.result(size, criterion, which).read_text())
        return found

    def grid(scores: list[float]) -> list[list[float]]:
        return [[score] for score in scores]

    for size in SIZES:
        starting = [criterion for criterion in (*MAIN, *OTHERS) if criterion != "uniform"]
        for which, some in ((STARTING, starting), (SEARCHED, [*MAIN, "uniform"])):
            plain = read(size, PLAIN, which)
            for criterion in some:
                if not asked.result(size, criterion, which).exists():
                    print(f"missing: {asked.result(size, criterion, which).name}")
                    continue
                found = read(size, criterion, which)
                dense = grid(found["scores"]["dense"])
                for model in ("pruned", f"POA {WEIGHT:g}"):
                    own = grid(found["scores"][model])
                    to_dense = statistics.difference(own, dense)
                    to_plain = statistics.difference(own, grid(plain["scores"][model]))
                    # Pictures of another device or dtype are no pairs.
                    alike = criterion != PLAIN and dict(found["facts"])["drawn on"] == dict(plain["facts"])["drawn on"]
                    yield Row(
                        size, criterion, which, model, statistics.mean(own).value, found["right"][model], to_dense.low,
                        to_dense.high, to_dense.value, to_dense.verdict,
                        (to_plain.value, to_plain.low, to_plain.high, to_plain.verdict) if alike else None,
                    )  # fmt: skip


def table(found: list[Row]) -> str:
    """All rows in Markdown."""
    lines = [
        "| size | ratios | criterion | model | score | right | minus dense (95 %) | | minus magnitude (95 %) | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    short = {"no difference shown": ""}
    for row in found:
        own = f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
        verdict = short.get(row.verdict, f"**{row.verdict}**")
        beside = ["", ""]
        if row.beside:
            value, low, high, said = row.beside
            beside = [f"{value:+.3f} ({low:+.3f} to {high:+.3f})", short.get(said, f"**{said}**")]
        cells = [
            row.size, row.which, f"`{row.criterion}`", row.model, f"{row.score:.3f}", f"{row.right:.0%}", own, verdict,
            *beside,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: list[Row], path: Path) -> None:
    """Differences to the dense model with their intervals, a panel for each size; arrows for what lies further left."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(SIZES), figsize=(4.2 * len(SIZES), 9), sharey=True, layout="constrained")
    names = list(dict.fromkeys((row.which, row.criterion) for row in found))
    for panel, size in zip(panels, SIZES, strict=True):
        for shift, (model, colour) in enumerate((("pruned", "#0072B2"), (f"POA {WEIGHT:g}", "#D55E00"))):
            own = [row for row in found if row.size == size and row.model == model]
            places = [names.index((row.which, row.criterion)) + 0.3 * shift - 0.15 for row in own]
            values = [row.difference for row in own]
            spread = [[row.difference - row.low for row in own], [row.high - row.difference for row in own]]
            panel.errorbar(values, places, xerr=spread, fmt="o", ms=4, lw=1.2, color=colour, label=model)
            off = [place for place, value in zip(places, values, strict=True) if value < SHOWN[0]]
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
    asked = Asked(args.out, args.device, args.dtype, args.batch, args.trials, args.prompts, args.held_out)
    if not args.report:
        begin(asked)
        each(asked, args.jobs)
    found = list(rows(asked))
    (args.out / "ablation.json").write_text(json.dumps([asdict(row) for row in found]))
    (args.out / "ablation.md").write_text(table(found) + "\n")
    plot(found, args.out / "ablation.png")
    print(f"{args.out / 'ablation.md'}\n{args.out / 'ablation.png'}")


if __name__ == "__main__":
    main()
