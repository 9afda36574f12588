"""A search for ratios on a real pipeline: what a trial measures, what is checked, and what may be said of it."""

import io
import json
import re
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial
from PIL import Image

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CrdiffError, SearchError
from crdiff_export.evaluate.comparison import DENSE
from crdiff_export.evaluate.scorers import Score
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.models import demo, recipe_files, recipe_toml
from crdiff_export.models.demo import scenes
from crdiff_export.models.recipe import Recipe
from crdiff_export.progress import Silent
from crdiff_export.sampling import poa, prompts
from crdiff_export.search import (
    Candidate,
    SearchProgress,
    SearchRequest,
    SearchResult,
    check_and_write,
    files,
    page,
    plot,
    prepare,
    report_text,
    search,
    tune,
)
from crdiff_export.search.objective import open_objective
from crdiff_export.search.pairs import Pairs, choose_pairs
from crdiff_export.search.setup import PAPER_TRIALS, choose_budget
from crdiff_export.search.study import open_study
from tests.support.browser import Browser, check_looks
from tests.support.evaluating import draw_plainly, open_plainly
from tests.support.messages import raises
from tests.support.pages import ParsedPage
from tests.support.search_objective import plain_storage

SIZE = Size(48, 48)
STEPS = 1
REQUEST = SearchRequest("demo", SIZE, limit=6, held_out_limit=8, trials=5, steps=STEPS, batch=6, early_stop=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def result(folder: Path) -> SearchResult:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    made = tune(replace(REQUEST, outputs=(folder / "a.toml",), sheet=folder / "sheet.html"))
    torch.set_num_threads(usual)
    return made


def attempts_in(path: Path) -> list[FrozenTrial]:
    with plain_storage(path) as storage:
        return optuna.load_study(study_name="demo-48x48", storage=storage).trials


def settings_in(path: Path) -> dict[str, str]:
    with plain_storage(path) as storage:
        study = optuna.load_study(study_name="demo-48x48", storage=storage)
        return dict(study.user_attrs["crdiff"]["settings"])


# --- what a trial measures ---


def drawn(file: Path, pairs: Pairs, source: Path | None = None, weight: float = 1.0) -> list[float]:
    """The judge's scores of what diffusers draws of a file, with POA where a baked file says of what."""
    pipe = open_plainly(file)
    if source:
        poa.enable(pipe, source, weight)
    pictures = draw_plainly(pipe, pairs, SIZE, STEPS, guidance_scale=demo.GUIDANCE["demo"])
    images = [np.frombuffer(picture, np.uint8).reshape(SIZE.height, SIZE.width, 3) for picture in pictures]
    return [judge(image, scenes.Scene.parse(prompt)).value for image, (prompt, _) in zip(images, pairs, strict=True)]


@pytest.mark.parametrize("number", [0, 1, 3], ids=["dense", "recipe", "tried"])
def test_a_trial_scores_what_diffusers_draws_of_a_baked_file(number: int, result: SearchResult, tmp_path: Path) -> None:
    trial = result.trials[number]
    file = demo.path()
    if number:
        ratios = trial.candidate.by_group
        file = export(ExportRequest("demo", SIZE, tmp_path / "o.safetensors", ratios=ratios)).written.path
    scores = drawn(file, result.job.pairs.search)
    assert [trial.scores[pair] for pair in range(6)] == pytest.approx(scores, abs=1e-9)
    assert trial.value == pytest.approx(np.mean(scores), abs=1e-9)
    assert (trial.scores == result.trials[0].scores) == (number == 0)


def test_poa_weight_is_searched_and_measured(tmp_path: Path) -> None:
    request = replace(REQUEST, poa_range=(1.2, 2.5), trials=3, held_out_limit=2, native=False)
    made = tune(replace(request, outputs=(tmp_path / "p.toml",)))
    trial = made.trials[2]
    weight = trial.candidate.poa_weight
    assert weight
    assert made.trials[1].candidate.poa_weight == 2.4365  # the recipe's
    assert 1.2 <= weight <= 2.5
    ratios = trial.candidate.by_group
    baked = export(ExportRequest("demo", SIZE, tmp_path / "o.safetensors", ratios=ratios)).written.path
    scores = drawn(demo.path(), made.job.pairs.search, baked, weight)
    assert [trial.scores[pair] for pair in range(6)] == pytest.approx(scores, abs=1e-9)
    if not made.best.candidate.dense:
        assert made.variant
        assert made.variant.evidence
        assert made.variant.poa_weight == pytest.approx(made.best.candidate.poa_weight, abs=1e-4)
        assert made.variant.evidence.extra["poa"] == pytest.approx(made.finding.mean.value, rel=1e-4)  # type: ignore[union-attr]


def test_first_come_the_dense_model_and_the_recipe(result: SearchResult) -> None:
    assert [trial.number for trial in result.trials] == [0, 1, 2, 3, 4]
    assert result.trials[0].candidate.dense
    assert result.trials[1].candidate == Candidate.of({"down": 0.839, "mid": 0.6537, "up": 0.3155})
    assert result.best.value == max(trial.value for trial in result.trials if trial.value is not None)


def test_weights_are_compared_until_they_are_those_that_were_counted(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that failed the comparison is tried again, and fails it again."""
    from crdiff_export.sampling.session import Session

    style = Session.style

    def spoiled(self: Session, *args: Any) -> Any:
        with torch.no_grad():
            self.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(0.5)
        return style(self, *args)

    monkeypatch.setattr(Session, "style", spoiled)
    with pytest.raises(CrdiffError, match="mid_block"):
        tune(replace(REQUEST, trials=3))
    states = [trial.state.name for trial in attempts_in(here / "demo-48x48.db")]
    assert states == ["COMPLETE", "FAIL", "FAIL", "FAIL"]


def test_memory_that_is_too_small_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crdiff_export.sampling.session import Session

    def draw(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Session, "draw", draw)
    with pytest.raises(CrdiffError, match="device cpu: not enough memory") as caught:
        tune(REQUEST)
    assert "--batch" in caught.value.hint


def test_everything_that_scores_depend_on_is_in_the_fingerprint(result: SearchResult, folder: Path) -> None:
    prints = settings_in(folder / "a.db")
    assert {key: prints[key] for key in ("family", "size", "steps", "negative", "dtype", "device", "batch")} == {
        "family": "demo", "size": "48x48", "steps": "1", "negative": "none", "dtype": "fp32", "device": "cpu",
        "batch": "6",
    }  # fmt: skip
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", prints["base"])
    assert {"scorer judge", "scheduler", "prompts and seeds", "other parts", "guidance", "targets"} <= prints.keys()
    assert {"crdiff", "diffusers", "torch", "transformers"} <= prints.keys()


def test_the_same_again_tries_nothing_twice(result: SearchResult, folder: Path) -> None:
    again = tune(replace(REQUEST, outputs=(folder / "a.toml",), force=True, native=False))
    assert again.trials == result.trials
    assert again.verdict == result.verdict


# --- what is checked, and said ---


def test_the_check_is_of_other_prompts_and_noise(result: SearchResult) -> None:
    chosen = result.job.pairs
    assert [prompt for prompt, _ in chosen.search] == list(prompts.to_search(6))
    assert [prompt for prompt, _ in chosen.check] == list(prompts.held_out(8))
    seeds = [seed for _, seed in (*chosen.search, *chosen.check)]
    assert seeds == list(range(14))
    assert result.evaluation
    assert [str(subject.size) for subject in result.evaluation.subjects] == ["48x48", "64x64"]


def test_what_is_checked_is_what_the_recipe_says(result: SearchResult, folder: Path, tmp_path: Path) -> None:
    """An export of the recipe draws the pictures of the check, and its header carries what they showed."""
    assert result.evaluation
    assert result.variant
    assert result.subject
    recipe = tmp_path / "r.toml"
    recipe.write_text(recipe_toml.dump(recipe_of(result)))
    baked = export(ExportRequest("demo", SIZE, tmp_path / "o.safetensors", recipe=recipe))
    pruned = next(one for one in result.evaluation.models if one.subject == result.subject and one.weight == 1)
    for part in (slice(0, 6), slice(6, 8)):  # as many at once as the check draws
        expected = drawn(baked.written.path, result.evaluation.job.pairs[part])
        assert [score.value for score in pruned.scores[part]] == pytest.approx(expected, abs=1e-9)
    assert all(len(str(ratio)) <= 6 for ratio in result.variant.ratios.values())
    metadata = _metadata(baked.written.path)
    assert metadata["crdiff.provenance"] == "searched"
    assert metadata["crdiff.evidence.method"] == "tpe"
    assert metadata["crdiff.evidence.trials"] == "5"
    assert metadata["crdiff.poa.weight"] == "1.0"
    assert json.loads(metadata["crdiff.evidence.interval"]) == list(result.variant.evidence.interval)  # type: ignore[union-attr,arg-type]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return dict(file.metadata())


def judged(result: SearchResult, gain: float, count: int = 8) -> SearchResult:
    """The same with made-up scores in the check: the pruned model's are the dense one's and `gain`."""
    made = result.evaluation
    assert made
    noise = np.random.default_rng(0).normal(0, 1, count)
    models = tuple(
        replace(
            one,
            scores=tuple(Score(float(v)) for v in noise + (0 if one.weight == DENSE else gain)),
            images=one.images[:count],
        )
        for one in made.models
    )
    job = replace(made.job, pairs=made.job.pairs[:count])
    return replace(result, evaluation=replace(made, models=models, job=job))


def recipe_of(result: SearchResult) -> Recipe:
    """The recipe, whatever the check of so few prompts has shown."""
    recipe = judged(result, 0.5, 8).recipe
    assert recipe
    return recipe


@pytest.mark.parametrize(
    ("gain", "count", "verdict", "written"),
    [(0.5, 8, "better", True), (-0.5, 8, "worse", False), (0.0, 8, "no difference shown", True),
     (0.5, 4, "too few to say", True)],
    ids=["better", "worse", "no-difference", "too-few"],
)  # fmt: skip
def test_words_and_recipe_follow_the_interval(
    gain: float, count: int, verdict: str, written: bool, result: SearchResult, tmp_path: Path
) -> None:
    request = replace(result.job.request, sheet=None)
    outputs = (tmp_path / "a.toml", tmp_path / "a.html")
    made = judged(replace(result, job=replace(result.job, request=request, outputs=outputs)), gain, count)
    assert made.verdict == verdict
    assert (made.recipe is not None) == written
    assert [path.name for path in files.write(made).files] == (["a.toml"] if written else []) + ["a.html"]
    text = report_text.conclusion(made) + ParsedPage(outputs[1].read_text()).text
    assert ("better" in text) == (verdict == "better")
    assert ("worse" in text) == (verdict == "worse")
    assert ("no recipe was written" in text) == (not written)


def test_the_recipe_says_where_its_numbers_come_from(result: SearchResult) -> None:
    made = recipe_of(result)
    (variant,) = made.variants
    assert recipe_toml.parse(recipe_toml.dump(made), made.name) == made
    assert (variant.provenance, variant.poa_weight, variant.prompt, made.repo) == ("searched", 1.0, None, None)
    assert variant.source.startswith("crdiff search: tpe, seed 42, the best of 5 trials (number ")
    assert variant.source.endswith("by demo of the pruned model alone, 6 pictures")
    evidence = variant.evidence
    assert evidence
    assert (evidence.scorer, evidence.prompts, evidence.extra["searched_pairs"]) == ("demo", 8, 6)
    assert evidence.extra["pairs_sha256"] != evidence.extra["searched_pairs_sha256"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_is_the_same_each_time(kind: str, result: SearchResult) -> None:
    made = plot.draw(result, kind)
    assert made == plot.draw(result, kind)
    if kind == "png":
        assert min(Image.open(io.BytesIO(made)).size) > 300
    else:
        words = ("trial", "best so far", "dense", "ratio of down", "ratio of mid", "ratio of up")
        assert all(word in made.decode() for word in words)


def test_best_so_far_never_falls(result: SearchResult) -> None:
    course = [value for _, value in plot.best_so_far(result.trials)]
    assert course == sorted(course)
    assert course[-1] == result.best.value


def test_page_needs_nothing_else(result: SearchResult) -> None:
    text = page.render(result)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert text.count("<script") == 1
    assert text.count("data:image/png") == 2 * 8 * 2
    shown = ParsedPage(text).text
    assert shown.index(result.verdict) < shown.index(report_text.conclusion(result)) < shown.index("Course of")


def test_page_looks_as_it_should(result: SearchResult, chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "search.html").write_text(page.render(result))
    check_looks(chromium, tmp_path / "search.html", "search")


def test_sheet_has_dense_beside_the_best(result: SearchResult, folder: Path) -> None:
    text = (folder / "sheet.html").read_text()
    assert text.count("data:image/png") == 8 * 2
    assert ">dense<" in text
    assert ">pruned<" in text


def test_how_far_it_is(result: SearchResult) -> None:
    progress = SearchProgress("a.db", 5, 12, result.best, result.dense, 7300)
    text = report_text.progress_text(progress)
    assert text == f"5 of 12 over, best {result.best.value:.4f}, dense {result.dense.value:.4f}, 2 h 02 min left"
    assert report_text.progress_text(replace(progress, trials=None, best=None, dense=None, left=None)) == "5 over"
    assert [report_text.duration(seconds) for seconds in (12, 90, 3600)] == ["12 s", "2 min", "1 h 00 min"]


# --- what is asked for ---

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize(
    ("change", "searched", "checked"),
    [
        ({"prompts": LETTERS[:24]}, LETTERS[:16], LETTERS[16:24]),
        ({"prompts": LETTERS[:24], "limit": 2}, LETTERS[:2], LETTERS[16:24]),
        ({"prompts": ("a", "b", "a")}, ("a",), ("b",)),
        ({"prompts": LETTERS[:2], "held_out": LETTERS[2:]}, LETTERS[:2], LETTERS[2:]),
        ({"prompts": LETTERS[:2], "held_out": LETTERS[2:], "held_out_limit": 9}, LETTERS[:2], LETTERS[2:11]),
    ],
    ids=["thirds", "limit", "each-once", "held-out", "held-out-limit"],
)
def test_some_prompts_are_kept_for_the_check(change: Any, searched: Any, checked: Any) -> None:
    chosen = choose_pairs(SearchRequest("sdxl", SIZE, noise=5, **change))
    assert tuple(prompt for prompt, _ in chosen.search) == searched
    assert tuple(prompt for prompt, _ in chosen.check) == checked
    seeds = [seed for _, seed in (*chosen.search, *chosen.check)]
    assert seeds == list(range(5, 5 + len(seeds)))
    assert bool(chosen.notes) == (len(checked) < 8)


def test_one_prompt_has_other_noise_in_the_check() -> None:
    chosen = choose_pairs(SearchRequest("sdxl", SIZE, prompt="a fox", pictures=9))
    assert chosen.search == tuple(("a fox", seed) for seed in range(9))
    assert chosen.check == tuple(("a fox", seed) for seed in range(9, 18))
    assert chosen.pictures == 9
    assert not chosen.notes
    (note,) = choose_pairs(SearchRequest("sdxl", SIZE, prompt="a fox", pictures=3)).notes
    assert note.startswith("3 held-out pictures: an interval takes 8")


def test_a_search_for_one_prompt_is_a_variant_for_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check opens the base when the search's pipeline is gone."""
    from crdiff_export.sampling import session as drawing

    pipelines: list[weakref.ref[Any]] = []
    opens = drawing._open

    def noted(*args: Any) -> Any:
        assert not [ref for ref in pipelines if ref() is not None]
        pipe = opens(*args)
        pipelines.append(weakref.ref(pipe.unet))
        return pipe

    monkeypatch.setattr(drawing, "_open", noted)
    prompt, target = scenes.EXAMPLE, here / "one.toml"
    request = replace(REQUEST, limit=None, held_out_limit=None, prompt=prompt, pictures=3, trials=2, native=False)
    job = prepare(request)
    assert job.study == "demo-48x48-a-red-circle-left-of-a-blue-square-on-wh"
    made = search(replace(job, outputs=(target,)), Silent())
    assert (here / f"{job.study}.db").exists()
    made = check_and_write(replace(made, best=made.trials[1]), Silent())
    assert made.verdict == "too few to say"
    assert report_text.conclusion(made).startswith("on 3 held-out pictures, too few for an interval")
    (variant,) = recipe_files.load(target).variants
    assert (variant.prompt, variant.provenance) == (prompt, "searched")
    assert len(pipelines) == 2


def test_the_paper_has_its_own_box_and_method(here: Path) -> None:
    job = prepare(replace(REQUEST, paper=True, trials=None))
    space, method = job.setup.space, job.setup.method
    assert (space.low, space.high, method.name, method.seed) == (0.1, 0.8, "anneal", 42)
    assert job.budget.trials == PAPER_TRIALS
    assert any("0.8, a number in ImageReward's units" in note for note in job.notes)


def test_a_number_of_trials_a_time_or_both() -> None:
    def asked(**change: Any) -> tuple[int | None, float | None]:
        budget = choose_budget(SearchRequest("demo", SIZE, **change))
        return budget.trials, budget.seconds

    assert asked() == (60, None)
    assert asked(hours=2.0) == (None, 7200)
    assert asked(hours=0.5, trials=9) == (9, 1800)


def test_targets_and_places_of_files(here: Path) -> None:
    job = prepare(replace(REQUEST, targets=("ff",)))
    assert job.plan.kinds == ("ff",)
    assert (job.storage, job.study) == ("demo-48x48.db", "demo-48x48")
    assert [path.name for path in job.outputs] == ["demo-48x48.toml"]
    other = prepare(replace(REQUEST, outputs=(here / "x.html",), study="mine"))
    assert (other.storage, other.study) == (str(here / "x.db"), "mine")
    assert not list(here.iterdir())


def test_too_little_time_is_an_error_and_keeps_the_trial(here: Path) -> None:
    """The dense model's trial is another worker's, who is at it."""
    job = prepare(replace(REQUEST, trials=None, hours=1e-6))
    with (
        open_objective(job, Silent(), lambda: None) as objective,
        open_study(job.storage, job.study, job.setup, objective.fingerprint) as study,
        warnings.catch_warnings(action="ignore"),
    ):
        study.optuna.ask()
    with raises(SearchError, "demo-48x48.db", "the dense model's trial"):
        search(job, Silent())
