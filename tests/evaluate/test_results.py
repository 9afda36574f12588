"""What follows from scores: findings, evidence, tables, pages and plots."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crdiff_export import Size
from crdiff_export.errors import OptionError
from crdiff_export.evaluate import Evaluation, Subject, evidence, files, page, plot, report_text
from crdiff_export.evaluate.report import plots
from crdiff_export.evaluate.results import ModelScores
from crdiff_export.evaluate.scorers import Score
from crdiff_export.models import recipe_files
from crdiff_export.models.recipe import Evidence, Variant, borrow
from tests.support.evaluating import of_pairs
from tests.support.messages import raises
from tests.support.pages import ParsedPage

WITHOUT_FID = tuple(name for name in report_text.COLUMNS if name != "FID")


def rescored(evaluation: Evaluation, gain: float, scale: float = 1.0) -> Evaluation:
    """The same pictures with made-up scores: the pruned models' are the dense ones' and `gain`."""
    rng = np.random.default_rng(0)
    noise = {subject.size: rng.normal(0, 1, 8) for subject in evaluation.subjects}

    def change(model: ModelScores) -> ModelScores:
        values = noise[model.subject.size] + (gain + rng.normal(0, 0.1, 8) if model.weight else 0)
        return replace(model, scores=tuple(Score(0.3 + scale * float(value)) for value in values))

    return replace(evaluation, models=tuple(map(change, evaluation.models)))


def with_variant(subject: Subject, variant: Variant) -> Subject:
    return replace(subject, plan=replace(subject.plan, variant=variant))


def revariant(evaluation: Evaluation, **changes: Any) -> Evaluation:
    """The same evaluation of variants with some changes."""
    subjects = {old: with_variant(old, replace(old.plan.variant, **changes)) for old in evaluation.subjects}
    return replace(evaluation, models=tuple(replace(m, subject=subjects[m.subject]) for m in evaluation.models))


def write(evaluation: Evaluation, path: Path) -> None:
    files.write(replace(evaluation, job=replace(evaluation.job, outputs=(path,))))


# --- the table ---


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, "better"), (-0.5, "worse"), (0.0, "no difference shown")])
def test_words_follow_the_interval(gain: float, verdict: str, evaluation: Evaluation) -> None:
    made = rescored(evaluation, gain)
    columns, rows = report_text.table(made)
    assert "right" not in columns  # this scorer has no such part
    assert [row[columns.index("which shows")] for row in rows] == ["", verdict, verdict] * 2
    others = {"better", "worse", "no difference shown", "too few"} - {verdict}
    shown = ParsedPage(page.render(made)).text
    assert not [word for word in others if word in shown]
    assert [said for said, _ in report_text.verdicts(made)] == [verdict] * 4 + [""]
    assert shown.index(verdict) < shown.index("Differences to the dense model")  # before anything else


def test_table_has_a_row_for_each_model(evaluation: Evaluation) -> None:
    columns, rows = report_text.table(evaluation)
    assert columns == WITHOUT_FID
    assert [row[:2] for row in rows] == [
        ("48x48", "dense"), ("", "pruned"), ("", "POA 1.5"), ("64x64 (native)", "dense"), ("", "pruned"),
        ("", "POA 1.5"),
    ]  # fmt: skip
    assert float(rows[0][columns.index("score")]) == pytest.approx(np.mean(evaluation.models[0].values), abs=5e-4)


def test_small_scales_have_more_digits(evaluation: Evaluation) -> None:
    columns, rows = report_text.table(rescored(evaluation, 0.5, scale=1e-4))
    change = rows[1][columns.index("minus dense")]
    assert change.startswith("+0.0000")
    assert float(change) > 0


def test_right_pictures_of_a_prompt_are_no_independent_evidence(evaluation: Evaluation) -> None:
    scores = tuple(Score(float(i < 4), {"right": float(i < 4)}) for i in range(10) for _ in range(4))
    model = replace(evaluation.models[0], scores=scores)
    made = of_pairs(replace(evaluation, models=(model,)), [(str(i // 4), i) for i in range(40)], 4)
    (finding,) = made.findings
    assert finding.right == finding.mean
    for last in (Score(0.0, {"right": 0.5}), Score(0.0)):
        changed = replace(model, scores=(*scores[:-1], last))
        assert replace(made, models=(changed,)).findings[0].right is None


def test_most_different_are_the_worst_and_the_best(evaluation: Evaluation) -> None:
    made = rescored(evaluation, 0)
    subject = made.subjects[0]
    gains = [3.0, -2.0, 0.0, 5.0, -4.0, 1.0, 0.5, 0.1]

    def change(model: ModelScores) -> ModelScores:
        if model.subject != subject or not model.weight:
            return model
        scores = zip(model.scores, gains, strict=True)
        return replace(model, scores=tuple(replace(score, value=score.value + gain) for score, gain in scores))

    made = replace(made, models=tuple(map(change, made.models)))
    assert made.most_different(subject, 4) == [4, 1, 0, 3]
    assert sorted(made.most_different(subject, 100)) == list(range(8))


# --- the evidence ---


def test_recipe_carries_the_evidence(evaluation: Evaluation, tmp_path: Path) -> None:
    path, evaluation = tmp_path / "measured.toml", revariant(evaluation, poa_weight=1.5)
    write(evaluation, path)
    made = recipe_files.load(path)
    assert (made.family, made.name) == ("demo", "measured.toml")
    assert [variant.resolution for variant in made.variants] == [subject.size for subject in evaluation.subjects]
    findings = zip(*[iter(evaluation.findings)] * 3, strict=True)
    for variant, (dense, pruned, amplified) in zip(made.variants, findings, strict=True):
        measured = variant.evidence
        assert measured
        assert pruned.difference
        assert variant.provenance == "starting-point"  # the ratios were given
        assert variant.ratios == dict.fromkeys(("down", "mid", "up"), 0.4)
        assert (measured.scorer, measured.prompts, measured.extra["pictures"]) == ("demo", 8, 8)
        assert (measured.dense, measured.pruned) == pytest.approx((dense.mean.value, pruned.mean.value), rel=1e-5)
        assert measured.interval == pytest.approx((pruned.difference.low, pruned.difference.high), rel=1e-5)
        assert measured.extra["poa"] == pytest.approx(amplified.mean.value, rel=1e-5)


def test_ratios_for_another_size_are_a_starting_point(evaluation: Evaluation) -> None:
    subject = evaluation.subjects[0]
    searched = replace(
        subject.plan.variant, resolution=Size(96, 64), provenance="searched", source="a search",
        evidence=Evidence("s", 1.0),
    )  # fmt: skip
    made = evidence.variant(evaluation, with_variant(subject, borrow(searched, subject.plan.size)))
    assert (made.provenance, made.source) == ("starting-point", "a search; borrowed from 96x64")
    assert (made.resolution, made.borrowed_from) == (subject.size, None)
    own = evidence.variant(evaluation, with_variant(subject, replace(searched, resolution=subject.plan.size)))
    assert (own.provenance, own.source) == ("searched", "a search")


def test_a_variant_that_prunes_nothing_keeps_its_evidence(evaluation: Evaluation, tmp_path: Path) -> None:
    subject = evaluation.subjects[0]
    searched = replace(
        subject.plan.variant, resolution=subject.size, provenance="searched", evidence=Evidence("s", 1.0)
    )
    alone = replace(with_variant(subject, searched), weights=(0.0,))
    dense = replace(evaluation, models=(replace(evaluation.models[0], subject=alone),))
    assert evidence.measured(dense, alone) is None
    write(dense, tmp_path / "d.toml")
    assert recipe_files.load(tmp_path / "d.toml").variants[0].evidence == Evidence("s", 1.0)


def test_one_prompt_is_no_evidence_for_others(evaluation: Evaluation) -> None:
    single = of_pairs(evaluation, [("a", seed) for _, seed in evaluation.job.pairs], 8)
    measured = evidence.measured(single, single.subjects[0])
    assert measured
    assert (measured.prompts, measured.interval, "poa_low" in measured.extra) == (1, None, False)
    single = revariant(single, prompt="a")
    measured = evidence.measured(single, single.subjects[0])
    assert measured
    assert measured.interval


# --- the page and the plot ---


def test_page_has_the_pictures_and_nothing_from_elsewhere(evaluation: Evaluation) -> None:
    html = page.render(evaluation)
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]
    drawn = [Image.open(io.BytesIO(png)) for model in evaluation.models for png in model.images]
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in drawn)
    assert len(images) == 2 * 8 * 3
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", html)
    assert html.count("<script") == 1
    assert "<svg" in html


def test_names_are_shown_as_they_are(evaluation: Evaluation) -> None:
    job = evaluation.job
    base = replace(job.drawing.base, name="<script>alert(1)</script>\x1b[2J")
    pairs = tuple((f"<script>{prompt}", seed) for prompt, seed in job.pairs)
    job = replace(job, drawing=replace(job.drawing, base=base), pairs=pairs)
    odd = replace(evaluation, job=job, scorer="command:sh -c '$1_{x$ <script>\x1b'", notes=("<script>",))
    html = page.render(odd)
    assert html.count("<script") == 1
    assert "\x1b" not in html
    assert "$1_{x$" in plot.render(odd, "svg").decode()


def test_without_matplotlib_a_page_says_so_and_a_plot_is_refused(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    html = page.render(evaluation)
    assert "<svg" not in html
    assert "pip install matplotlib" in html
    assert files.check([tmp_path / "page.html", tmp_path / "recipe.toml"], force=False)
    with raises(OptionError, "matplotlib"):
        files.check([tmp_path / "page.html", tmp_path / "plot.svg"], force=False)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_is_the_same_whatever_the_users_settings(kind: str, evaluation: Evaluation) -> None:
    import matplotlib as mpl

    made = plot.render(evaluation, kind)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert plot.render(evaluation, kind) == made
        assert mpl.rcParams["font.size"] == 30
    if kind == "png":
        assert min(Image.open(io.BytesIO(made)).size) > 300
    else:
        words: tuple[Any, ...] = ("48x48", "64x64", "dense", "pruned", "POA 1.5", "score - dense")
        assert all(word in made.decode() for word in words)
