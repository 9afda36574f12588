"""`crdiff evaluate`: what is drawn is what diffusers draws, and the command says what came of it."""

import errno
import io
import json
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

from crdiff_export import ExportRequest, Size, export
from crdiff_export.cli.command import Invocation, command_line
from crdiff_export.cli.signals import Stopped
from crdiff_export.errors import PreviewError
from crdiff_export.evaluate import EvaluateRequest, Evaluation, evaluate, evidence, measure, prepare, render
from crdiff_export.evaluate.results import ModelScores
from crdiff_export.evaluate.scorers import inception
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.models import demo, recipe_files, recipe_toml
from crdiff_export.models.demo import scenes
from crdiff_export.models.recipe import Variant
from crdiff_export.progress import Silent
from crdiff_export.sampling import poa, prompts, session
from crdiff_export.sampling.session import Session
from tests.support.evaluating import REQUEST, Line, draw_plainly, of_pairs, open_plainly
from tests.support.messages import raises, refused
from tests.support.pages import ParsedPage

SMALL, NATIVE = REQUEST.sizes
ONE = replace(REQUEST, sizes=(SMALL,), limit=1, steps=1, native=False)
COMMAND = "evaluate demo --res 48 --limit 2 --steps 1 --ratio 0.4 --no-native"

pytestmark = pytest.mark.usefixtures("one_thread")


def write_recipe(path: Path, *variants: dict[str, Any]) -> Path:
    """A recipe of the demo model with variants that differ from its first."""
    recipe = recipe_files.by_alias("demo")
    assert recipe
    made: tuple[Variant, ...] = tuple(replace(recipe.variants[0], **changes) for changes in variants)
    path.write_text(recipe_toml.dump(replace(recipe, variants=made)))
    return path


# --- the plan ---


def test_every_picture_has_its_own_noise_and_all_models_the_same(evaluation: Evaluation) -> None:
    assert evaluation.job.pairs == tuple(zip(prompts.held_out(8), range(8), strict=True))
    twice = prepare(replace(REQUEST, pictures=2, limit=3, seed=5)).pairs
    assert [seed for _, seed in twice] == [5, 6, 7, 8, 9, 10]
    assert [prompt for prompt, _ in twice] == [prompt for prompt in prompts.held_out(3) for _ in range(2)]
    assert of_pairs(evaluation, evaluation.job.pairs, 2).by_prompt([1, 2, 3, 4]) == [[1, 2], [3, 4]]


def test_every_size_has_every_model_and_the_native_size_is_checked() -> None:
    def subjects(request: EvaluateRequest) -> list[tuple[str, str, tuple[float, ...]]]:
        return [(str(s.size), str(s.plan.size), s.weights) for s in prepare(request).subjects]

    models = (0.0, 1.0, 1.5)
    # Here the native size is asked for, with the same ratios.
    assert subjects(REQUEST) == [("48x48", "48x48", models), ("64x64", "64x64", models)]
    one = replace(REQUEST, sizes=(SMALL,))
    assert subjects(one) == [("48x48", "48x48", models), ("64x64", "48x48", models)]
    assert subjects(replace(one, native=False)) == [("48x48", "48x48", models)]
    assert subjects(replace(one, ratio=0.0)) == [("48x48", "48x48", (0.0,))]
    assert subjects(replace(one, weights=(0.0, 1.0), native=False)) == [("48x48", "48x48", (0.0, 1.0))]


def test_sizes_with_other_targets_are_pruned_as_an_export_prunes_them(tmp_path: Path) -> None:
    targets = (("attn",), ("attn", "ff"))
    variants = [{"resolution": size, "targets": kinds} for size, kinds in zip(REQUEST.sizes, targets, strict=True)]
    recipe = write_recipe(tmp_path / "two.toml", *variants)
    job = prepare(replace(REQUEST, recipe=recipe, ratio=None))
    counted = measure(job, Silent())
    # The last is a check of the native size.
    assert [subject.plan.kinds for subject in job.subjects] == [*targets, ("attn",)]
    for subject in job.subjects:
        own = ExportRequest("demo", subject.plan.size, recipe=recipe)
        assert counted.source(subject.plan).masks == poa.from_recipe(own).masks


# --- the pictures and their scores ---


def pixels(model: ModelScores) -> list[bytes]:
    return [Image.open(io.BytesIO(png)).tobytes() for png in model.images]


def test_pictures_are_those_of_diffusers_and_scores_those_of_the_judge(evaluation: Evaluation, tmp_path: Path) -> None:
    baked = export(ExportRequest("demo", SMALL, tmp_path / "o.safetensors", ratio=0.4)).written.path
    pairs, plain = evaluation.job.pairs, open_plainly(demo.path())
    for model, pipe in zip(evaluation.models, (plain, open_plainly(baked), plain), strict=False):
        assert model.subject.size == SMALL
        if model.weight == 1.5:
            poa.enable(pipe, baked, 1.5)
        assert pixels(model) == draw_plainly(pipe, pairs, SMALL, 1, guidance_scale=demo.GUIDANCE["demo"])
        assert len(set(pixels(model))) == len(pairs)
    for model in evaluation.models:
        assert len(model.scores) == 8
        for score, png, (prompt, _) in zip(model.scores, model.images, pairs, strict=True):
            assert score == judge(np.asarray(Image.open(io.BytesIO(png))), scenes.Scene.parse(prompt))


def test_another_criterion_draws_what_its_export_does(tmp_path: Path) -> None:
    criterion = "random:seed=1"
    made = evaluate(replace(ONE, weights=(1.0,), criterion=criterion))
    assert ("criterion", criterion) in made.facts
    measured = evidence.measured(made, made.subjects[0])
    assert measured
    assert measured.extra["criterion"] == criterion
    request = ExportRequest("demo", SMALL, tmp_path / "o.safetensors", ratio=0.4, criterion=criterion)
    pipe = open_plainly(export(request).written.path)
    assert pixels(made.models[1]) == draw_plainly(pipe, made.job.pairs, SMALL, 1, guidance_scale=demo.GUIDANCE["demo"])


def test_dense_pictures_of_a_size_are_drawn_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two sizes with ratios of their own check the native size twice, and draw its dense model once."""
    calls: list[Size] = []

    def draw(_: Session, texts: list[str], seeds: Any, style: Any, on_step: Any) -> list[Image.Image]:
        calls.append(style.size)
        return [Image.new("RGB", (style.size.width, style.size.height), (len(calls), 0, 0))] * len(texts)

    monkeypatch.setattr(Session, "draw", draw)
    sizes = (SMALL, Size(56, 56))
    ratios = (dict.fromkeys(("down", "mid", "up"), ratio) for ratio in (0.2, 0.3))
    variants = [{"resolution": size, "ratios": own} for size, own in zip(sizes, ratios, strict=True)]
    recipe = write_recipe(tmp_path / "two.toml", *variants)
    made = evaluate(replace(ONE, sizes=sizes, recipe=recipe, native=True, ratio=None))
    native = made.job.drawing.native
    assert [calls.count(size) for size in (*sizes, native)] == [3, 3, 5]
    dense = [model for model in made.models if model.subject.size == native and model.weight == 0]
    assert len(dense) == 2
    assert dense[0].images == dense[1].images


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_too_little_memory_is_told_with_what_helps(error: Exception, device: str) -> None:
    placement = session.Placement(device, "fp16", advice=render.ADVICE)
    with raises(PreviewError, device), session._enough_memory(placement):
        raise error


@pytest.mark.parametrize(
    "target", ["crdiff_export.sampling.session.Session.draw", "crdiff_export.evaluate.plot.render"]
)
def test_an_interrupted_evaluation_leaves_nothing(
    target: str, here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(target, stop)
    with pytest.raises(Stopped):
        evaluate(replace(ONE, outputs=(here / "e.toml", here / "e.png")))
    assert list(here.iterdir()) == []


# --- the command ---


def test_command_prints_facts_a_table_and_files(line: Line, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "absent", lambda: pytest.fail("nobody asked for an FID"))
    ran = line(f"{COMMAND} -o e.html -o e.toml")
    assert ran.code == 0, ran.err
    out = ran.out.splitlines()
    assert out[0].split() == ["base:", "demo", "(demo),", "native", "64x64"]
    assert re.search(r"ratios for 48x48: +down 0.4, mid 0.4, up 0.4: starting point, not tuned", ran.out)
    head = out[out.index("48x48:") + 1]
    assert re.split(" {2,}", head)[:2] == ["model", "s/picture"]
    assert out[-2:] == ["e.html", "e.toml"]
    assert [text for text in out if text.startswith("too few to say: at 48x48, pruned against dense ")]
    assert "note: 6 pictures of 2 prompts, on cpu in fp32" in ran.err
    assert line("recipes validate e.toml").code == 0


def test_quiet_prints_the_table_alone_and_before_a_file_that_cannot_be(
    line: Line, here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("crdiff_export.models.recipe_toml.dump", full)
    ran = line(f"{COMMAND} -q -o e.toml")
    first = [text.split()[0] for text in ran.out.splitlines() if text]
    assert first[:5] == ["48x48:", "model", "dense", "pruned", "POA"]
    assert "too few to say" in ran.out
    refused(ran, 1, "e.toml")
    assert not (here / "e.toml").exists()


def test_a_program_that_dies_is_told(line: Line, here: Path, undrawn: None) -> None:
    (here / "dies.py").write_text("raise SystemExit('no model here')")
    ran = line(f"{COMMAND} -q --scorer 'command:{sys.executable} dies.py'")
    assert ran.code == 1
    assert "ended with status 1 before the score of picture 1" in ran.err
    assert "no model here" in ran.err


@pytest.mark.parametrize(("weight", "how"), [("", "--json"), ("0.5*demo+0.5*", "")], ids=["json", "in-a-sum"])
def test_of_a_command_only_the_programs_name_gets_out(
    weight: str, how: str, line: Line, here: Path, undrawn: None
) -> None:
    """Neither on the screen nor into a file that is made to be given away."""
    (here / "my_judge.py").write_text("import sys\nfor _ in sys.stdin: print('{\"score\": 1}', flush=True)")
    words = f"{sys.executable} my_judge.py --token hf_secret"
    outputs = ("e.toml", "e.html", "e.svg")
    ran = line(f"{COMMAND} {how} --scorer '{weight}command:{words}' {' '.join(f'-o {name}' for name in outputs)}")
    assert ran.code == 0, ran.err
    texts = {"screen": ran.out + ran.err} | {name: (here / name).read_text() for name in outputs}
    name = f"{weight}command:{Path(sys.executable).name}"
    for where, text in texts.items():
        assert name in text, where
        for private in ("secret", "my_judge", sys.executable):
            assert private not in text, where
    measured = recipe_files.load(here / "e.toml").variants[0].evidence
    assert measured
    assert measured.scorer == name


def test_json_has_every_score_and_points_out_black_pictures(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "draw", lambda _, texts, *__: [Image.new("RGB", (48, 48))] * len(texts))
    ran = line(f"{COMMAND} --poa-weight 2 --json")
    assert (ran.code, ran.err) == (0, "")
    made = json.loads(ran.out)
    assert (made["schema"], made["native"], made["scorer"]) == (1, "64x64", "demo")
    (size,) = made["sizes"]
    assert (size["resolution"], size["ratios"]) == ("48x48", {"down": 0.4, "mid": 0.4, "up": 0.4})
    assert [model["model"] for model in size["models"]] == ["dense", "pruned", "POA 2"]
    assert all(len(model["scores"]) == 2 for model in size["models"])
    assert size["models"][0]["minus_dense"] is None
    assert size["models"][1]["verdict"] == "too few to say"
    assert [pair["seed"] for pair in made["pairs"]] == [0, 1]
    assert "--beside two-pass" in made["notes"][0]
    assert "note" not in made["facts"]  # an object would keep the last one alone
    assert made["notes"][-1] == "6 of 6 pictures are all black: try another --dtype, such as bf16 or fp32"


def test_a_page_ends_with_the_command_that_made_it(
    line: Line, here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRDIFF_EVALUATE_POA_WEIGHT", "1.5")
    command = f"{COMMAND} --prompt 'two red circles on grey' -o 'a page.html'"
    assert line(f"{command} -q").code == 0
    text = ParsedPage((here / "a page.html").read_text()).text
    assert f"CRDIFF_EVALUATE_POA_WEIGHT=1.5 crdiff {command} -q" in text


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        *(
            ("--storage", value, "postgresql://***")
            for value in (
                "postgresql://me:s3cret@host:5432/db?password=s3cret",
                "postgresql://me:s3@cret@host/db",
                "postgresql://user@server:s3cret@h.azure.com/db",
                "postgresql://user:a s3cret@h/db",
                "postgresql://h/db?options=-c x=y&password=s3cret",
            )
        ),
        ("--storage", "trials.db", "trials.db"),
        ("--scorer", "0.5*demo+0.5*command:/home/me/judge --token s3cret", "0.5*demo+0.5*command:judge"),
        ("--prompt", "http://a:1 and 3 @ night", "http://a:1 and 3 @ night"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("variable", [True, False])
def test_a_command_line_keeps_secrets(
    option: str, value: str, shown: str, joined: bool, variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRDIFF_SEARCH_IT", value)
    words = ["search", "demo", *([] if variable else [f"{option}={value}"] if joined else [option, value])]
    invocation = Invocation(words, variables={"CRDIFF_SEARCH_IT": option} if variable else {})
    with click.Context(click.Command("search"), obj=invocation):
        parts = shlex.split(command_line())
    expected = (
        [f"CRDIFF_SEARCH_IT={shown}", "crdiff", "search", "demo"]
        if variable
        else ["crdiff", "search", "demo", *([f"{option}={shown}"] if joined else [option, shown])]
    )
    assert parts == expected


def test_a_variable_holds_one_text_with_its_spaces(
    line: Line, here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRDIFF_EVALUATE_PROMPT", "two red circles on grey\ntwo blue squares on white")
    made = line(f"{COMMAND.replace('--limit 2', '')} --json").result
    assert [pair["prompt"] for pair in made["pairs"]] == ["two red circles on grey", "two blue squares on white"]
