"""Does pruning help an SDXL below its native size? `python benchmarks/demo_xl.py OUT [--device cuda --jobs 8]`.

On the small SDXL that comes with crdiff, told the size drawn or its native size: the dense model, the pruned one with
the starting ratios and with ratios that were searched for, POA, other criteria, and two-pass, each from the same noise
on held-out prompts. Whatever is better than the dense model that is told the same size is drawn again from other noise.
Writes `demo-xl.md`, the tables of docs/demo-xl.md, and `demo-xl.png`. Finished results stay in OUT, so that an
interrupted run goes on where it was.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import study
from study import RATIO, SEARCHED, STARTING, WEIGHT, Call, Comparison

BASE = "demo-xl"
SIZES = ("64x64", "56x72", "48x72", "96x96", "128x128", "160x160", "96x160")
# Far below the native size, where the paper gains most: pruned models are told the native size, too.
SMALL_SIZES = ("64x64", "56x72", "48x72", "96x96")
TRUE, TOLD_NATIVE = "drawn", "native"
MAGNITUDE, ADVERSE, RANDOM = "magnitude", "adverse", "random"
SHOWN = (-0.2, 0.25)  # the plot's range
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


@dataclass(frozen=True)
class Settings(study.Settings):
    """The files of the results, and how they come about."""

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
        tells = (TRUE, TOLD_NATIVE) if size in SMALL_SIZES else (TRUE,)
        for told in tells:
            yield Arm(size, told, MAGNITUDE, STARTING)
            yield Arm(size, told, MAGNITUDE, SEARCHED)
        for criterion in (ADVERSE, RANDOM):
            yield Arm(size, TRUE, criterion, STARTING)
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
    record = {**study.best_pruned(result), "trials": len(result.trials), "conclusion": conclusion(result)}
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
    path.write_text(json.dumps(study.record(evaluation)))
    return f"{path.name}: {study.means(evaluation)}"


def parts(settings: Settings) -> Iterator[Iterable[Call]]:
    """Yield everything that is to be done: starting ratios, searches, calibrations, the rest, and other noise."""
    starting = [arm for arm in arms() if arm.ratios == STARTING and arm.criterion != ADVERSE]
    yield [(measure, (settings, arm)) for arm in starting]
    searched = dict.fromkeys((arm.size, arm.told) for arm in arms() if arm.ratios == SEARCHED)
    yield [(search, (settings, size, told)) for size, told in searched]
    yield [(calibrate, (settings, size)) for size in SIZES]
    yield [(measure, (settings, arm)) for arm in arms()]
    yield [(measure, (settings, arm)) for arm in again(settings)]


def again(settings: Settings) -> Iterator[Arm]:
    """Yield the arms to draw once more from other noise: those with anything better than the dense model."""
    yield from dict.fromkeys(replace(row.arm, seed=AGAIN) for row in rows(settings, 0) if row.is_better)


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One model, told one size: its score, and its differences to the dense model told the same, or the size drawn."""

    arm: Arm
    told: str
    model: str
    score: float
    right: float
    to_own_dense: Comparison | None
    to_dense: Comparison | None

    @property
    def is_better(self) -> bool:
        """Whether it is better than a dense model."""
        return any(found and found.verdict == "better" for found in (self.to_own_dense, self.to_dense))

    @property
    def name(self) -> str:
        """What it is called, with how its weights were chosen."""
        if self.model in ("dense", "two-pass"):
            return self.model
        criterion = "" if self.arm.criterion == MAGNITUDE else f" by {self.arm.criterion}"
        return f"{self.model}{criterion}, {self.arm.ratios} ratios"


def rows(settings: Settings, seed: int) -> Iterator[ResultRow]:
    """Yield every row that was drawn from this noise; the dense model and the rivals once for each size."""
    for arm in (replace(arm, seed=seed) for arm in arms()):
        path = settings.result(arm)
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        plain = settings.result(Arm(arm.size, TRUE, MAGNITUDE, STARTING, seed))
        dense = json.loads(plain.read_text())["scores"]["dense"] if plain.exists() else None
        for model, scores in record["scores"].items():
            if model in ("dense", "native-size", "two-pass") and not arm.is_plain:
                continue
            told = TOLD_NATIVE if model == "native-size" else arm.told
            own = record["scores"]["dense"] if model not in ("dense", "native-size") else None
            yield ResultRow(
                arm, told, "dense" if model == "native-size" else model, sum(scores) / len(scores),
                record["right"][model], study.compare(scores, own) if own else None,
                study.compare(scores, dense) if dense and told != TRUE else None,
            )  # fmt: skip


def table(result_rows: Iterable[ResultRow]) -> str:
    """Return rows in Markdown."""
    lines = [
        "| size | told | model | score | right | minus dense told the same (95 %) | | minus dense told its size | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result_rows:
        cells = [row.arm.size, row.told, row.name, f"{row.score:.3f}", f"{row.right:.0%}"]
        for found in (row.to_own_dense, row.to_dense):
            cells += [str(found or ""), found.mark if found else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def searches(settings: Settings) -> str:
    """Return what the searches believed of their best ratios, in Markdown."""
    lines = ["| size | told | trials | ratios | best minus dense | its conclusion |", "|---|---|---|---|---|---|"]
    for size in SIZES:
        for told in (TRUE, TOLD_NATIVE):
            path = settings.ratios(size, told)
            if not path.exists():
                continue
            record = json.loads(path.read_text())
            ratios = ", ".join(f"{group} {ratio:g}" for group, ratio in record["ratios"].items())
            gain = f"{record['score'] - record['dense']:+.3f}"
            lines.append(f"| {size} | {told} | {record['trials']} | {ratios} | {gain} | {record['conclusion']} |")
    return "\n".join(lines)


def points(result_rows: list[ResultRow]) -> Iterator[study.Point]:
    """Yield differences to the dense model that is told the size drawn, for the plot: the rivals first and last."""
    for row in sorted(result_rows, key=lambda row: (row.model == "two-pass", row.model != "dense")):
        difference = row.to_dense or row.to_own_dense
        if difference:
            told = "told its native size" if row.told == TOLD_NATIVE else "told the size drawn"
            yield study.Point(row.arm.size, row.name, told, difference)


def main() -> None:
    from crdiff_export.models import demo

    settings, report_only = study.parse(Settings, __doc__, batch=32, trials=24, prompts=64, held_out=128)
    if not report_only:
        settings.begin(demo.path(BASE))
        study.run(parts(settings), settings.jobs)
    first, second = list(rows(settings, 0)), list(rows(settings, AGAIN))
    (settings.out / "demo-xl.json").write_text(json.dumps([asdict(row) for row in (*first, *second)]))
    text = f"{table(first)}\n\nFrom other noise:\n\n{table(second)}\n\n{searches(settings)}\n"
    (settings.out / "demo-xl.md").write_text(text)
    study.plot(list(points(first)), settings.out / "demo-xl.png", height=5, shown=SHOWN, panel_width=2.1)
    print(f"{settings.out / 'demo-xl.md'}\n{settings.out / 'demo-xl.png'}")


if __name__ == "__main__":
    main()
