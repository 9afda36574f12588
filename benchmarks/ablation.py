"""Would any other sparsity do as well? `python benchmarks/ablation.py OUT [--device cuda --dtype fp16 --jobs 8]`.

On the demo model, at sizes that it was not made for: every criterion, with the starting ratios and with ratios that
were searched for it, without and with POA, each compared with the dense model from the same noise on held-out prompts;
uniform ratios compared with block-wise ones; random weights as the control. Writes `ablation.md`, the table of
docs/ablation.md, and `ablation.png`. Finished results stay in OUT, so an interrupted run goes on where it stopped.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import study
from study import RATIO, SEARCHED, STARTING, WEIGHT, Call, Comparison

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
PLAIN = "magnitude"
SHOWN = (-0.2, 0.15)  # the plot's range: worse differences look alike


def needs(criterion: str) -> bool:
    """Say whether a criterion ranks by a calibration."""
    return criterion.partition(":")[0] in CALIBRATED and criterion != COIN


@dataclass(frozen=True)
class Settings(study.Settings):
    """The files of the results, and how they come about."""

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
    found = study.best_pruned(result)
    path.write_text(json.dumps(found))
    return f"{path.name}: {found}"


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
    path.write_text(json.dumps(study.record(evaluation)))
    return f"{path.name}: {study.means(evaluation)}"


def parts(settings: Settings) -> Iterator[Iterable[Call]]:
    """Yield everything that is to be done: calibrations, starting ratios, searches, searched ratios."""
    starting = [criterion for criterion in (*MAIN, *OTHERS) if criterion != "uniform"]
    yield [(calibrate, (settings, size)) for size in SIZES]
    yield [(measure, (settings, size, criterion, STARTING)) for criterion in starting for size in SIZES]
    yield [(search, (settings, size, criterion)) for criterion in MAIN for size in SIZES]
    yield [(measure, (settings, size, each, SEARCHED)) for each in (*MAIN, "uniform") for size in SIZES]


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One model at one size: its score, and its differences to the dense model and to magnitude."""

    size: str
    criterion: str
    which: str
    model: str
    score: float
    right: float
    to_dense: Comparison
    to_magnitude: Comparison | None


def rows(settings: Settings) -> Iterator[AblationRow]:
    """Yield every row of the table."""

    def read(size: str, criterion: str, which: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(settings.result(size, criterion, which).read_text())
        return record

    for size in SIZES:
        starting = [criterion for criterion in (*MAIN, *OTHERS) if criterion != "uniform"]
        for which, criteria in ((STARTING, starting), (SEARCHED, [*MAIN, "uniform"])):
            plain = read(size, PLAIN, which)
            for criterion in criteria:
                if not settings.result(size, criterion, which).exists():
                    print(f"missing: {settings.result(size, criterion, which).name}")
                    continue
                record = read(size, criterion, which)
                # Pictures of another device or dtype cannot be paired.
                alike = criterion != PLAIN and dict(record["facts"])["drawn on"] == dict(plain["facts"])["drawn on"]
                for model in ("pruned", f"POA {WEIGHT:g}"):
                    scores = record["scores"][model]
                    yield AblationRow(
                        size, criterion, which, model, sum(scores) / len(scores), record["right"][model],
                        study.compare(scores, record["scores"]["dense"]),
                        study.compare(scores, plain["scores"][model]) if alike else None,
                    )  # fmt: skip


def table(table_rows: list[AblationRow]) -> str:
    """Return all rows in Markdown."""
    lines = [
        "| size | ratios | criterion | model | score | right | minus dense (95 %) | | minus magnitude (95 %) | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table_rows:
        to_magnitude = [str(row.to_magnitude), row.to_magnitude.mark] if row.to_magnitude else ["", ""]
        cells = [
            row.size, row.which, f"`{row.criterion}`", row.model, f"{row.score:.3f}", f"{row.right:.0%}",
            str(row.to_dense), row.to_dense.mark, *to_magnitude,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def points(table_rows: list[AblationRow]) -> Iterator[study.Point]:
    """Yield differences to the dense model for the plot."""
    for row in table_rows:
        yield study.Point(row.size, f"{row.criterion} ({row.which})", row.model, row.to_dense)


def main() -> None:
    import search_demo

    from crdiff_export.models import demo, recipe_toml

    settings, report_only = study.parse(Settings, __doc__, batch=81, trials=16, prompts=84, held_out=162)
    if not report_only:
        settings.begin(demo.path())
        settings.start.write_text(recipe_toml.dump(search_demo.start()))
        study.run(parts(settings), settings.jobs)
    table_rows = list(rows(settings))
    (settings.out / "ablation.json").write_text(json.dumps([asdict(row) for row in table_rows]))
    (settings.out / "ablation.md").write_text(table(table_rows) + "\n")
    study.plot(list(points(table_rows)), settings.out / "ablation.png", height=9, shown=SHOWN)
    print(f"{settings.out / 'ablation.md'}\n{settings.out / 'ablation.png'}")


if __name__ == "__main__":
    main()
