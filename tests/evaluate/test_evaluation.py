"""`crdiff evaluate`: the same pictures as diffusers draws, honest intervals, and words that follow them."""

import base64
import errno
import io
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CrdiffError, PlanError, PreviewError
from crdiff_export.evaluate import (
    EvaluateRequest,
    Evaluation,
    Subject,
    count,
    evaluate,
    evidence,
    files,
    measure,
    page,
    plot,
    prepare,
    report_text,
)
from crdiff_export.evaluate import statistics as stats
from crdiff_export.evaluate.scorers import Score, inception
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.weight_file import FileBytes
from crdiff_export.models import demo, recipe_files, recipe_toml
from crdiff_export.models.demo import scenes
from crdiff_export.models.recipe import Evidence
from crdiff_export.progress import Silent
from crdiff_export.prune.plan import with_ratios
from crdiff_export.sampling import poa, prompts, session
from tests.support import makers
from tests.support.isolation import Crdiff, Ran

Line = Callable[[str], Ran]

RATIO = 0.4
STEPS = 2
SIZES = (Size(48, 48), Size(64, 64))
WITHOUT_FID = tuple(name for name in report_text.COLUMNS if name != "FID")
REQUEST = EvaluateRequest("demo", SIZES, limit=8, ratio=RATIO, steps=STEPS, batch=8, weights=(1.5,))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found() -> Evaluation:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    made = evaluate(REQUEST)
    torch.set_num_threads(usual)
    return made


# --- statistics ---


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    ids=["81/263", "15/148", "0/20", "1/29"],
)
def test_interval_of_a_share(hits: int, total: int, low: float, high: float) -> None:
    found = stats.share(hits, total)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    assert found.value == hits / total


def test_interval_of_a_mean_is_the_normal_one_for_many() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = stats.mean([[value] for value in values])
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert found == stats.mean([[value] for value in values])


def test_interval_holds_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 2000)
    rng = np.random.default_rng(2)
    for many in (8, 10, 40):
        hit = [stats.mean(rng.normal(1, 1, (many, 1)).tolist()) for _ in range(400)]
        assert 0.89 <= np.mean([one.low <= 1 <= one.high for one in hit]) <= 0.98


def test_more_pictures_of_a_prompt_are_no_more_prompts() -> None:
    values = np.random.default_rng(3).normal(0, 1, 30)
    once, often = stats.mean([[value] for value in values]), stats.mean([[value] * 9 for value in values])
    assert once.low == pytest.approx(often.low)
    assert once.high == pytest.approx(often.high)


def test_of_one_prompt_its_pictures_are_drawn() -> None:
    found = stats.mean([[0.0, 1.0] * 50])
    assert found.low == pytest.approx(0.4, abs=0.02)
    assert found.high == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    "few", [[[0.5]], [[0.5], [0.6]] * 3, [[0.5] * 7]], ids=["one", "six prompts", "seven pictures"]
)
def test_few_have_no_interval(few: list[list[float]]) -> None:
    found = stats.mean(few)
    assert (found.low, found.high, found.bounded) == (-math.inf, math.inf, False)
    assert found.verdict == "too few to say"


def test_differences_are_paired() -> None:
    base = np.random.default_rng(4).normal(0, 10, (50, 1))
    found = stats.difference((base + 0.1).tolist(), base.tolist())
    assert found.value == pytest.approx(0.1)
    assert found.verdict == "better"
    assert stats.difference(base.tolist(), (base + 0.1).tolist()).verdict == "worse"
    other = np.random.default_rng(5).normal(0, 10, (50, 1))
    assert stats.difference(base.tolist(), other.tolist()).verdict == "no difference shown"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "better"), (0.0, 0.2, "no difference shown"), (-0.1, 0.2, "no difference shown"),
     (-0.2, 0.0, "no difference shown"), (-0.2, -0.1, "worse")],
    ids=["above", "from-0", "around", "to-0", "below"],
)  # fmt: skip
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert stats.Estimate((low + high) / 2, low, high).verdict == verdict


# --- prompts ---


def test_held_out_prompts_were_held_out() -> None:
    chosen = prompts.held_out(150)
    assert len(set(chosen)) == 150
    train = {scene.combination for scene in scenes.split()[0]}
    assert not train & {scenes.Scene.parse(prompt).combination for prompt in chosen}
    assert prompts.held_out(150) == chosen
    assert prompts.held_out(50) == chosen[:50]
    others = prompts.to_search(50)
    searched = {scenes.Scene.parse(prompt).combination for prompt in others}
    assert len(set(others)) == 50
    assert not (train | {scenes.Scene.parse(prompt).combination for prompt in chosen}) & searched
    assert all(scenes.Scene.parse(prompt).learnt for prompt in (*chosen, *others))
    assert {scenes.Scene.parse(prompt).kind for prompt in chosen} == {"single", "counted", "related"}


def test_prompts_are_drawn_once_each() -> None:
    assert prompts.choose(["a", "b", "a", "c"], 2) == ("a", "b")
    assert len(prompts.choose((), None)) == prompts.HELD_OUT
    with pytest.raises(CrdiffError, match="the demo model has 162 prompts that it was not trained on, 163"):
        prompts.held_out(163)


# --- thresholds of any ratios ---

RATIOS = (
    {"down": 0.3, "mid": 0.5, "up": 0.1},
    {"down": 0.0, "mid": 0.999, "up": 0.3},
    {"down": 0.2, "mid": 0, "up": 0},
)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("table", ["sd15.original", "sdxl.diffusers-unet", "sd35-medium.original-transformer"])
def test_a_count_gives_the_thresholds_of_an_export(table: str, dtype: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table, dtype))
    request = ExportRequest(str(base), Size(512, 512), ratio=0.5)
    planned = plan_variant(request, open_checkpoint(base))
    counted = poa.Counted([planned], base.name)
    for ratios in RATIOS:
        own = ratios if planned.groups != ("blocks",) else {"blocks": ratios["down"] + 0.1}
        found = counted.source(with_ratios(planned, own))
        assert found.masks == poa.from_recipe(replace(request, ratio=None, ratios=own)).masks


def test_sizes_with_other_targets_are_pruned_as_an_export_prunes_them(tmp_path: Path) -> None:
    known = recipe_files.by_alias("demo")
    assert known
    kinds = (("attn",), ("attn", "ff"))
    variants = tuple(
        replace(known.variants[0], resolution=size, targets=targets) for size, targets in zip(SIZES, kinds, strict=True)
    )
    recipe = tmp_path / "two.toml"
    recipe.write_text(recipe_toml.dump(replace(known, variants=variants)))
    job = prepare(replace(REQUEST, recipe=recipe, ratio=None))
    counted = count(job, Silent())
    assert [subject.kinds for subject in job.subjects] == [*kinds, ("attn",)]  # the last is a look at the native size
    for subject in job.subjects:
        own = ExportRequest("demo", subject.of, recipe=recipe)
        assert counted.source(subject.plan).masks == poa.from_recipe(own).masks


def test_half_a_count_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original", "F32"))
    request = ExportRequest(str(base), Size(512, 512), ratio=0.3)
    planned = plan_variant(request, open_checkpoint(base))
    counted = poa.Counted([planned], base.name)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(FileBytes, "read_into", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            counted.source(planned)
    assert counted.source(planned).masks == poa.from_recipe(request).masks


def test_what_is_not_finite_matters_only_where_it_is_pruned(tmp_path: Path) -> None:
    tensors = makers.tiny("sd15.original", "F16")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, b"\x00\x7c" + data[2:])
    base = makers.write(tmp_path / "base.safetensors", tensors)
    request = ExportRequest(str(base), Size(512, 512), ratios={"down": 0.3, "mid": 0.0, "up": 0.3})
    planned = plan_variant(request, open_checkpoint(base))
    counted = poa.Counted([planned], base.name)
    assert counted.source(planned).masks == poa.from_recipe(request).masks
    with pytest.raises(PlanError, match="1 target weights are not finite"):
        counted.source(with_ratios(planned, {"down": 0.3, "mid": 0.1, "up": 0.3}))


def test_another_criterion_draws_what_its_export_does(tmp_path: Path) -> None:
    one = replace(REQUEST, sizes=SIZES[:1], limit=2, weights=(1.0,), native=False, criterion="random:seed=1")
    made = evaluate(one)
    assert ("criterion", "random:seed=1") in made.facts
    said = evidence.measured(made, made.subjects[0])
    assert said
    assert said.extra["criterion"] == "random:seed=1"
    plain = evaluate(replace(one, criterion="magnitude"))
    ours, theirs = ([one.scores for one in found.drawn] for found in (made, plain))
    assert (ours[0] == theirs[0], ours[1] == theirs[1]) == (True, False), "dense is dense, pruned is not"
    request = ExportRequest("demo", SIZES[0], tmp_path / "o.safetensors", ratio=RATIO, criterion="random:seed=1")
    baked = export(request).written.path
    assert list(map(pixels, made.drawn[1].images)) == drawn(baked, SIZES[0], made.pairs)


# --- the pictures and their scores ---


def drawn(file: Path, size: Size, pairs: tuple[tuple[str, int], ...], source: Path | None = None) -> list[bytes]:
    """What diffusers draws of a file; with POA at 1.5 where a baked file says of what."""
    import diffusers

    with warnings.catch_warnings(action="ignore"):
        pipe = diffusers.StableDiffusionPipeline.from_single_file(
            str(file), config=str(demo.config()), local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    if source:
        poa.enable(pipe, source, 1.5)
    images = pipe(
        [prompt for prompt, _ in pairs], width=size.width, height=size.height, num_inference_steps=STEPS,
        guidance_scale=demo.GUIDANCE, generator=[torch.Generator().manual_seed(seed) for _, seed in pairs],
    ).images  # fmt: skip
    return [image.tobytes() for image in images]


def pixels(packed: bytes) -> bytes:
    return Image.open(io.BytesIO(packed)).tobytes()


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5], ids=["dense", "pruned", "poa"])
def test_pictures_are_those_of_diffusers(weight: float, found: Evaluation, tmp_path: Path) -> None:
    size = SIZES[0]
    baked = export(ExportRequest("demo", size, tmp_path / "o.safetensors", ratio=RATIO)).written.path
    file, source = {0.0: (demo.path(), None), 1.0: (baked, None), 1.5: (demo.path(), baked)}[weight]
    ours = next(one for one in found.drawn if one.subject.size == size and one.weight == weight)
    assert list(map(pixels, ours.images)) == drawn(file, size, found.pairs, source)
    assert len({*map(pixels, ours.images)}) == len(found.pairs)


def test_scores_are_those_of_the_judge(found: Evaluation) -> None:
    for one in found.drawn:
        assert len(one.scores) == 8
        for score, packed, (prompt, _) in zip(one.scores, one.images, found.pairs, strict=True):
            said = judge(np.asarray(Image.open(io.BytesIO(packed))), scenes.Scene.parse(prompt))
            assert (score.value, score.parts["right"]) == (said.score, said.right)


def test_every_picture_has_its_own_noise_and_all_models_the_same(found: Evaluation) -> None:
    assert found.pairs == tuple(zip(prompts.held_out(8), range(8), strict=True))
    twice = prepare(replace(REQUEST, pictures=2, limit=3, seed=5)).pairs
    assert [seed for _, seed in twice] == [5, 6, 7, 8, 9, 10]
    assert [prompt for prompt, _ in twice] == [prompt for prompt in prompts.held_out(3) for _ in range(2)]
    scores = [score.value for score in found.drawn[0].scores]
    assert replace(found, pictures=2).grid(found.drawn[0]) == [scores[:2], scores[2:4], scores[4:6], scores[6:]]


def test_every_size_has_every_model_and_the_native_size_is_looked_at() -> None:
    def seen(request: EvaluateRequest) -> list[tuple[str, str, tuple[float, ...]]]:
        return [(str(s.size), str(s.of), s.drawn) for s in prepare(request).subjects]

    models = (0.0, 1.0, 1.5)
    # Here the native size is asked for, with the same ratios.
    assert seen(REQUEST) == [("48x48", "48x48", models), ("64x64", "64x64", models)]
    one = replace(REQUEST, sizes=SIZES[:1])
    assert seen(one) == [("48x48", "48x48", models), ("64x64", "48x48", models)]
    assert seen(replace(one, native=False)) == [("48x48", "48x48", models)]
    assert seen(replace(one, ratio=0.0)) == [("48x48", "48x48", (0.0,))]
    assert seen(replace(one, weights=(0.0, 1.0), native=False)) == [("48x48", "48x48", (0.0, 1.0))]


def test_dense_pictures_of_a_size_are_drawn_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two sizes with ratios of their own look at the native size twice, and at its dense model once."""
    from crdiff_export.sampling.session import Session

    calls: list[Size] = []
    draw = Session.draw

    def noted(self: Session, prompts: Any, seeds: Any, style: Any, on_step: Any = None) -> Any:
        calls.append(style.size)
        return draw(self, prompts, seeds, style, on_step)

    monkeypatch.setattr(Session, "draw", noted)
    known = recipe_files.by_alias("demo")
    assert known
    variants = tuple(
        replace(known.variants[0], resolution=Size(side, side), ratios=dict.fromkeys(("down", "mid", "up"), ratio))
        for side, ratio in ((48, 0.2), (56, 0.3))
    )
    recipe = tmp_path / "two.toml"
    recipe.write_text(recipe_toml.dump(replace(known, variants=variants)))
    sizes = (Size(48, 48), Size(56, 56))
    made = evaluate(replace(REQUEST, sizes=sizes, recipe=recipe, limit=1, steps=1, pictures=1, ratio=None))
    assert [calls.count(size) for size in (*sizes, made.native)] == [3, 3, 5]
    ones = [one for one in made.drawn if one.subject.size == made.native and one.weight == 0]
    assert len(ones) == 2
    assert ones[0].images == ones[1].images


# --- what is said ---


def synthetic(found: Evaluation, gain: float) -> Evaluation:
    """The same pictures with made-up scores: the pruned models' are the dense ones' and `gain`."""
    rng = np.random.default_rng(0)
    noise = {size: rng.normal(0, 1, 8) for size in SIZES}
    made = []
    for one in found.drawn:
        values = noise[one.subject.size] + (gain + rng.normal(0, 0.1, 8) if one.weight else 0)
        made.append(replace(one, scores=tuple(Score(float(value)) for value in values)))
    return replace(found, drawn=tuple(made))


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, "better"), (-0.5, "worse"), (0.0, "no difference shown")])
def test_words_follow_the_interval(gain: float, verdict: str, found: Evaluation) -> None:
    made = synthetic(found, gain)
    columns, rows = report_text.table(made)
    assert "right" not in columns  # this scorer has no such part
    said = [row[columns.index("which shows")] for row in rows]
    assert said == ["", verdict, verdict] * 2
    text = page.render(made)
    others = {"better", "worse", "no difference shown", "too few"} - {verdict}
    assert not [word for word in others if word in re.sub(r"base64,[^\"]*", "", text)]


def test_table_has_a_row_for_each_model(found: Evaluation) -> None:
    columns, rows = report_text.table(found)
    assert columns == WITHOUT_FID
    assert [row[:2] for row in rows] == [
        ("48x48", "dense"), ("", "pruned"), ("", "POA 1.5"), ("64x64 (native)", "dense"), ("", "pruned"),
        ("", "POA 1.5"),
    ]  # fmt: skip
    mean = np.mean([score.value for score in found.drawn[0].scores])
    assert rows[0][2] == f"{mean:.3f}"


def test_recipe_carries_what_was_measured(found: Evaluation, tmp_path: Path) -> None:
    def recommended(subject: Subject) -> Subject:
        return replace(subject, variant=replace(subject.variant, poa_weight=1.5))

    found = replace(found, drawn=tuple(replace(one, subject=recommended(one.subject)) for one in found.drawn))
    target = tmp_path / "measured.toml"
    files.write(found, (target,), replace=False)
    made = recipe_files.load(target)
    assert (made.family, made.name) == ("demo", "measured.toml")
    assert [variant.resolution for variant in made.variants] == list(SIZES)
    for variant, (dense, pruned, amplified) in zip(
        made.variants, zip(*[iter(found.findings)] * 3, strict=True), strict=True
    ):
        said = variant.evidence
        assert said
        assert pruned.difference
        assert amplified.difference
        assert variant.provenance == "starting-point"  # the ratios were given
        assert said.scorer == "demo"
        assert (said.dense, said.pruned) == pytest.approx((dense.mean.value, pruned.mean.value), rel=1e-5)
        assert said.interval == pytest.approx((pruned.difference.low, pruned.difference.high), rel=1e-5)
        assert said.extra["poa"] == pytest.approx(amplified.mean.value, rel=1e-5)
        assert (said.prompts, said.extra["pictures"]) == (8, 8)
        assert variant.ratios == dict.fromkeys(("down", "mid", "up"), RATIO)


def test_numbers_for_another_size_are_a_starting_point(found: Evaluation, tmp_path: Path) -> None:
    subject = found.subjects[0]
    searched = replace(
        subject.variant, resolution=Size(96, 64), provenance="searched", source="a search", evidence=Evidence("s", 1.0)
    )
    made = evidence.variant(found, replace(subject, variant=searched))
    assert (made.provenance, made.source) == ("starting-point", "a search; those for 96x64")
    assert made.resolution == subject.size
    own = evidence.variant(found, replace(subject, variant=replace(searched, resolution=subject.of)))
    assert (own.provenance, own.source) == ("searched", "a search")


def test_what_prunes_nothing_keeps_its_evidence(found: Evaluation, tmp_path: Path) -> None:
    subject = found.subjects[0]
    known = replace(subject.variant, resolution=subject.of, provenance="searched", evidence=Evidence("s", 1.0))
    alone = replace(subject, variant=known, drawn=(0.0,))
    dense = replace(found, drawn=(replace(found.drawn[0], subject=alone),))
    files.write(dense, (tmp_path / "d.toml",), replace=False)
    assert recipe_files.load(tmp_path / "d.toml").variants[0].evidence == Evidence("s", 1.0)


def test_one_prompt_is_no_evidence_for_others(found: Evaluation) -> None:
    one = replace(found, pairs=tuple(("a", seed) for _, seed in found.pairs), pictures=8)
    said = evidence.measured(one, one.subjects[0])
    assert said
    assert (said.prompts, said.interval, "poa_low" in said.extra) == (1, None, False)
    subject = replace(one.subjects[0], variant=replace(one.subjects[0].variant, prompt="a"))
    own = replace(one, drawn=tuple(replace(d, subject=subject) for d in one.drawn if d.subject == one.subjects[0]))
    said = evidence.measured(own, subject)
    assert said
    assert said.interval


def test_right_pictures_of_a_prompt_are_no_independent_evidence(found: Evaluation) -> None:
    scores = tuple(Score(float(i < 4), {"right": float(i < 4)}) for i in range(10) for _ in range(4))
    one = replace(found.drawn[0], scores=scores)
    made = replace(found, drawn=(one,), pictures=4, pairs=tuple((str(i // 4), i) for i in range(40)))
    (finding,) = made.findings
    assert finding.right == finding.mean
    grades = replace(one, scores=(*scores[:-1], Score(0.0, {"right": 0.5})))
    assert replace(made, drawn=(grades,)).findings[0].right is None
    lacks = replace(one, scores=(*scores[:-1], Score(0.0)))
    assert replace(made, drawn=(lacks,)).findings[0].right is None


def test_small_scales_have_more_digits(found: Evaluation) -> None:
    def small(one: Any) -> Any:
        return replace(one, scores=tuple(Score(0.3 + score.value / 10_000) for score in one.scores))

    _, rows = report_text.table(replace(synthetic(found, 0.5), drawn=tuple(map(small, synthetic(found, 0.5).drawn))))
    assert rows[1][4].startswith("+0.0000")
    assert float(rows[1][4]) > 0


def test_names_are_shown_as_they_are(found: Evaluation) -> None:
    odd = replace(found, scorer="command:sh -c '$1_{x$ <script>\x1b'", base="<script>alert(1)</script>\x1b[2J")
    text = page.render(odd)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "$1_{x$" in plot.draw(odd, "svg").decode()


def test_a_plot_does_not_follow_the_users_settings(found: Evaluation) -> None:
    import matplotlib as mpl

    before = plot.draw(found, "svg")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert plot.draw(found, "svg") == before
        assert mpl.rcParams["font.size"] == 30


def test_nothing_measured_is_no_evidence(found: Evaluation) -> None:
    alone = replace(found, drawn=tuple(one for one in found.drawn if one.weight == 0))
    assert evidence.measured(alone, alone.subjects[0]) is None


def test_page_has_the_pictures_and_nothing_from_elsewhere(found: Evaluation) -> None:
    text = page.render(found)
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]
    assert len(images) == 2 * 8 * 3
    assert sorted(image.tobytes() for image in images) == sorted(
        pixels(packed) for one in found.drawn for packed in one.images
    )
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert "<script" not in text
    assert "<svg" in text


def test_most_different_are_the_worst_and_the_best(found: Evaluation) -> None:
    made = synthetic(found, 0)
    subject = made.subjects[0]
    pruned = [one for one in made.drawn if one.subject == subject and one.weight]
    gains = [3.0, -2.0, 0.0, 5.0, -4.0, 1.0, 0.5, 0.1]
    changed = {
        id(one): replace(
            one, scores=tuple(replace(s, value=s.value + g) for s, g in zip(one.scores, gains, strict=True))
        )
        for one in pruned
    }
    made = replace(made, drawn=tuple(changed.get(id(one), one) for one in made.drawn))
    assert list(made.most_different(subject, 4)) == [4, 1, 0, 3]
    assert sorted(made.most_different(subject, 100)) == list(range(8))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_is_the_same_each_time(kind: str, found: Evaluation) -> None:
    made = plot.draw(found, kind)
    assert made == plot.draw(found, kind)
    if kind == "png":
        assert min(Image.open(io.BytesIO(made)).size) > 300
    else:
        assert all(word in made.decode() for word in ("48x48", "64x64", "dense", "pruned", "POA 1.5", "fully right"))


@pytest.mark.parametrize(
    ("device", "advice"), [("cuda", "a smaller --batch, or --scorer-device cpu"), ("cpu", "--dtype bf16")]
)
def test_too_little_memory_is_told_with_what_helps(device: str, advice: str) -> None:
    place = session.Place(device, "fp16", advice=measure.ADVICE)
    with pytest.raises(PreviewError) as error, session._enough_memory(place):
        raise RuntimeError("CUDA out of memory")
    assert error.value.message == f"device {device}: not enough memory"
    assert error.value.hint == f"Give a smaller --res, or {advice}."


@pytest.mark.parametrize("where", ["drawing", "writing"])
def test_what_is_interrupted_leaves_nothing(where: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crdiff_export.cli.signals import Stopped

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(
        {"drawing": "crdiff_export.sampling.session.Session.draw", "writing": "crdiff_export.evaluate.plot.draw"}[
            where
        ],
        stop,
    )
    outputs = (here / "e.toml", here / "e.png")
    with pytest.raises(Stopped):
        evaluate(replace(REQUEST, sizes=SIZES[:1], limit=1, steps=1, native=False, outputs=outputs))
    assert list(here.iterdir()) == []


# --- the command ---


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


def test_command_prints_facts_a_table_and_files(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "absent", lambda: pytest.fail("nobody asked for an FID"))  # nor has its package
    ran = line("evaluate demo --res 48 --limit 8 --steps 1 --ratio 0.4 --no-native -o e.html -o e.toml")
    assert ran.code == 0, ran.err
    out = ran.out.splitlines()
    assert out[0].split() == ["base:", "demo", "(demo),", "native", "64x64"]
    assert re.search(r"ratios for 48x48: +down 0.4, mid 0.4, up 0.4: starting point, tuned by nobody", ran.out)
    (head,) = [text for text in out if text.startswith("size")]
    assert re.split(" {2,}", head) == list(WITHOUT_FID)
    assert out[-2:] == ["e.html", "e.toml"]
    assert "note: 24 pictures of 8 prompts, on cpu in fp32" in ran.err
    assert line("recipes validate e.toml").code == 0


def test_quiet_prints_the_table_alone(here: Path) -> None:
    """In a process of its own, for which nothing was loaded before."""
    words = shlex.split("evaluate demo --res 48 --limit 2 --steps 1 --ratio 0.4 --no-native -q")
    ran = subprocess.run(
        [sys.executable, "-m", "crdiff_export", *words], cwd=here, check=False, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [text.split()[0] for text in ran.stdout.splitlines()] == ["size", "48x48", "pruned", "POA"]


def test_a_table_is_there_before_a_file_that_cannot_be(line: Line, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("crdiff_export.models.recipe_toml.dump", full)
    ran = line("evaluate demo --res 48 --limit 2 --steps 1 --ratio 0.4 --no-native -o e.toml")
    assert ran.code == 1
    assert "too few to say" in ran.out
    assert "e.toml: No space left on device" in ran.err
    assert not (here / "e.toml").exists()


def test_a_program_that_dies_is_told(line: Line, here: Path) -> None:
    (here / "dies.py").write_text("raise SystemExit('no model here')")
    ran = line(f"evaluate demo --res 48 --limit 2 --steps 1 --no-native --scorer 'command:{sys.executable} dies.py'")
    assert ran.code == 1
    assert "ended with status 1 before the score of picture 1" in ran.err
    assert "no model here" in ran.err


@pytest.mark.parametrize("weight", ["", "0.5*demo+0.5*"], ids=["alone", "in-a-sum"])
def test_of_a_command_only_the_programs_name_gets_out(weight: str, line: Line, here: Path) -> None:
    """Neither on the screen nor into a file that is made to be given away."""
    (here / "my_judge.py").write_text("import sys\nfor _ in sys.stdin: print('{\"score\": 1}', flush=True)")
    words = f"{sys.executable} my_judge.py --token hf_secret"
    outputs = ("e.toml", "e.html", "e.svg")
    asked = f"evaluate demo --res 48 --limit 2 --steps 1 --no-native --scorer '{weight}command:{words}'"
    ran = line(f"{asked} {' '.join(f'-o {name}' for name in outputs)}")
    assert ran.code == 0, ran.err
    texts = {name: (here / name).read_text() for name in outputs}
    texts |= {"screen": ran.out + ran.err, "json": line(f"{asked} --json").out}
    name = f"{weight}command:{Path(sys.executable).name}"
    for where, text in texts.items():
        assert name in text, where
        for private in ("secret", "my_judge", sys.executable):
            assert private not in text, where
    said = recipe_files.load(here / "e.toml").variants[0].evidence
    assert said
    assert said.scorer == name


def test_black_pictures_are_pointed_out(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(_: Any, prompts: Any, *__: Any) -> list[Image.Image]:
        return [Image.new("RGB", (48, 48))] * len(prompts)

    monkeypatch.setattr("crdiff_export.sampling.session.Session.draw", black)
    ran = line("evaluate demo --res 48 --limit 2 --steps 1 --no-native")
    assert "note: 6 pictures are all black: try another --dtype, such as bf16 or fp32" in ran.err


def test_json_has_every_score(line: Line) -> None:
    ran = line("evaluate demo --res 48 --limit 2 --steps 1 --ratio 0.4 --poa-weight 2 --no-native --json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert (said["schema"], said["native"], said["scorer"]) == (1, "64x64", "demo")
    (size,) = said["sizes"]
    assert [model["model"] for model in size["models"]] == ["dense", "pruned", "POA 2"]
    assert all(len(model["scores"]) == 2 for model in size["models"])
    assert size["models"][0]["minus_dense"] is None
    assert size["models"][1]["verdict"] == "too few to say"
    assert [pair["seed"] for pair in said["pairs"]] == [0, 1]


REFUSED = {
    "no-size": ("evaluate demo", 2, "there is no size", "--res"),
    "no-scorer": ("evaluate {sd15} --res 512 --prompt x", 2, "there is no scorer", "--scorer"),
    "no-such-seed": ("evaluate demo --res 48 --seed 18446744073709551616", 2, "not so many seeds", "smaller --seed"),
    "last-seeds": ("evaluate demo --res 48 --limit 2 --seed 18446744073709551615", 2, "not so many", "smaller --seed"),
    "blank-file": ("evaluate demo --res 48 --prompts blank.txt", 2, "blank.txt: has no prompt", "one prompt a line"),
    "one-bad-scene": ("evaluate demo --res 48 --prompts bad.txt", 1, "it does not know fox", "Write it"),
    "bad-sum": ("evaluate demo --res 48 --scorer 0.5*", 1, "a scorer is missing", "Write 0.5*clip-score"),
    "bad-command": ("evaluate demo --res 48 --scorer command:", 1, "names no program", "command"),
    "scorer-device": ("evaluate demo --res 48 --scorer-device cuda:7", 1, "device cuda:7", "--device"),
    "no-prompts": ("evaluate {sd15} --res 512 --scorer aesthetic", 2, "there are no prompts", "--prompts FILE"),
    "empty-prompt": ("evaluate demo --res 48 --prompt ' '", 2, "a prompt is empty", "what the pictures"),
    "not-a-scene": ("evaluate demo --res 48 --prompt fox --limit 1 --steps 1", 1, "it does not know fox", "Write it"),
    "no-such-scorer": ("evaluate demo --res 48 --scorer beauty", 1, "no scorer is called 'beauty'", "aesthetic"),
    "too-many": ("evaluate demo --res 48 --limit 1000", 2, "162 prompts that it was not trained on", "--limit"),
    "off-grid": ("evaluate demo --res 50", 1, "50x50 does not fit", "Use 48x48"),
    "strange-output": ("evaluate demo --res 48 -o e.jpg", 1, "neither a page (HTML)", "e.jpg.html"),
    "no-folder": ("evaluate demo --res 48 -o no/e.html", 1, "the folder no does not exist", "Create it"),
}


@pytest.mark.parametrize(("words", "code", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(
    words: str, code: int, message: str, hint: str, line: Line, sd15: Path, here: Path
) -> None:
    (here / "blank.txt").write_text(" \n\n")
    (here / "bad.txt").write_text("two red circles on grey\na red fox\n")
    before = set(here.iterdir())
    ran = line(words.format(sd15=sd15))
    assert ran.code == code, ran.err
    assert message in ran.err
    assert hint in ran.err
    assert "Traceback" not in ran.err
    assert set(here.iterdir()) == before


@pytest.fixture
def sd15(here: Path) -> Path:
    return makers.write(here / "sd15.safetensors", makers.tiny("sd15.original"))
