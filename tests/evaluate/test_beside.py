"""What is drawn beside the models: from the same noise, by the dense model, and nothing of it stays behind."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from crdiff_export import Size
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.errors import OptionError, PreviewError, SearchError
from crdiff_export.evaluate import EvaluateRequest, Subject, evaluate, plot, report_text
from crdiff_export.evaluate import prepare as prepare_evaluation
from crdiff_export.evaluate.beside import (
    RIVAL_NOTES,
    STRENGTH,
    Rival,
    RivalSizes,
    check,
    parse,
    passes,
)
from crdiff_export.evaluate.evidence import variant
from crdiff_export.evaluate.preview import PreviewRequest, preview
from crdiff_export.evaluate.preview import prepare as prepare_preview
from crdiff_export.evaluate.results import ModelScores
from crdiff_export.models import demo
from crdiff_export.sampling import pipelines
from crdiff_export.search import SearchRequest, tune
from tests.support.evaluating import Line, draw_plainly, open_plainly
from tests.support.messages import raises, refused

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "two red circles on grey"
PAIR = (PROMPT, 3)


def columns(size: Size, here: Path, *beside: str, **options: Any) -> dict[str, bytes]:
    """The pixels of every column of a preview of the demo model."""
    request = PreviewRequest(
        "demo", prompts=(PROMPT,), size=size, seeds=(3,), ratio=0.4, steps=2, beside=beside,
        outputs=(here / "p.html",), force=True, **options,
    )  # fmt: skip
    return {picture.column: picture.image.tobytes() for picture in preview(request).pictures}


# --- two passes ---


@pytest.mark.parametrize(
    ("base", "sizes", "options", "offered"),
    [
        ("demo", [(48, 48)], {}, ["two-pass"]),
        ("demo", [(64, 56), (96, 64)], {"beside": ("a_rival_offered:draw",)}, ["two-pass"]),
        ("demo", [(48, 48)], {"beside": ("two-pass",)}, []),
        ("demo", [(64, 64), (128, 32), (56, 56), (88, 64)], {}, []),
        ("demo-xl", [(64, 64)], {}, ["two-pass"]),
        ("demo-xl", [(64, 64), (160, 160)], {}, ["native-size", "two-pass"]),
        ("demo-xl", [(160, 160)], {"beside": ("native-size",)}, ["two-pass"]),
        ("demo-xl", [(160, 160)], {"told_size": "native"}, ["two-pass"]),
        ("demo-xl", [(160, 160)], {"told_size": Size(64, 64)}, ["native-size", "two-pass"]),
        ("demo-xl", [(160, 160)], {"beside": ("native-size", "two-pass")}, []),
        ("demo-xl", [(96, 160)], {}, []),
    ],
)
def test_what_did_better_on_the_demo_models_is_named_far_from_the_native_size_unless_it_is_drawn(
    base: str, sizes: list[tuple[int, int]], options: dict[str, Any], offered: list[str], here: Path
) -> None:
    (here / "a_rival_offered.py").write_text("def draw(pipe, **call): ...")
    evaluated = prepare_evaluation(EvaluateRequest(base, tuple(Size(*size) for size in sizes), **options))
    previewed = prepare_preview(PreviewRequest(base, prompts=(PROMPT,), size=Size(*sizes[-1]), ratio=0.4, **options))
    for job in (evaluated, previewed):
        assert [kind for note in job.notes for kind, text in RIVAL_NOTES.items() if note == text] == offered


@pytest.mark.parametrize(("sides", "far"), [((30, 20), "below"), ((31, 20), ""), ((74, 20), ""), ((75, 20), "above")])
def test_what_is_far_from_a_size(sides: tuple[int, int], far: str) -> None:
    size, other = Size(*sides), Size(50, 20)
    assert (size.is_far_below(other), size.is_far_above(other)) == (far == "below", far == "above")


def test_below_the_native_size_two_passes_draw_at_it_and_shrink(here: Path) -> None:
    made = columns(Size(48, 48), here, "two-pass")
    assert list(made) == ["dense", "pruned", "POA 1.5", "two-pass"]
    (plain,) = draw_plainly(open_plainly(demo.path()), [PAIR], Size(64, 64), 2, guidance_scale=4.0)
    image = Image.frombytes("RGB", (64, 64), plain).resize((48, 48), Image.Resampling.LANCZOS)
    assert made["two-pass"] == image.tobytes()


def test_above_it_the_picture_is_refined(here: Path) -> None:
    """By diffusers' own image-to-image, in the shape of the target size."""
    made = columns(Size(96, 64), here, "two-pass")
    pipe = open_plainly(demo.path())
    (plain,) = draw_plainly(pipe, [PAIR], Size(80, 56), 2, guidance_scale=4.0)
    image = Image.frombytes("RGB", (80, 56), plain).resize((96, 64), Image.Resampling.LANCZOS)
    refined = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)(
        prompt=[PROMPT], image=[image], strength=STRENGTH, num_inference_steps=2, guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(3)],
    )  # fmt: skip
    assert made["two-pass"] == refined.images[0].tobytes()
    one = PreviewRequest("demo", prompts=(PROMPT,), size=Size(96, 64), ratio=0.4, steps=1, beside=("two-pass",),
                         outputs=(here / "one.html",))  # fmt: skip
    assert len(preview(one).pictures) == 4  # a single step can be refined, too


@pytest.mark.parametrize(
    ("size", "first"),
    [((512, 512), (1024, 1024)), ((2048, 2048), (1024, 1024)), ((2048, 1024), (1448, 728)), ((1024, 1024), None)],
)
def test_the_first_pass_has_the_pixels_of_the_native_size(size: tuple[int, int], first: tuple[int, int] | None) -> None:
    setting = RivalSizes(Size(1024, 1024), Size(*size), 8)
    assert setting.first_size == Size(*(first or size))
    more = 10 if setting.is_larger else 0
    assert passes(Rival("two-pass"), setting, 20) == 20 + more


# --- the size that SDXL is told ---


def sharpness(images: list[Any], prompts: list[str]) -> list[float]:  # as scorers are called
    return [float(np.asarray(image, np.float64).std()) for image in images]


Told = list[list[float]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """The six numbers that the UNet is told of its pictures, for every pass."""
    ids: Told = []
    forward = diffusers.UNet2DConditionModel.forward

    def seen(self: Any, *args: Any, **options: Any) -> Any:
        ids.append(options["added_cond_kwargs"]["time_ids"][0].tolist())
        return forward(self, *args, **options)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", seen)
    return ids


def of_demo_xl(**options: Any) -> EvaluateRequest:
    return EvaluateRequest(
        "demo-xl", (Size(64, 48),), prompts=(PROMPT,), scorer=f"{__name__}:sharpness", ratio=0.3, steps=1,
        native=False, **options,
    )  # fmt: skip


TRUE, NATIVE = [48, 64, 0, 0, 48, 64], [128, 128, 0, 0, 128, 128]


def test_sdxl_is_told_its_native_size_in_that_column_alone(told: Told) -> None:
    evaluation = evaluate(of_demo_xl(beside=("native-size",)))
    assert [model.name for model in evaluation.models] == ["dense", "pruned", "POA 1.5", "native-size"]
    assert told[-1] == NATIVE
    assert len(told) > 4
    assert all(ids == TRUE for ids in told[:-1])


@pytest.mark.parametrize(("size", "ids"), [("native", NATIVE), (Size(96, 80), [80, 96, 0, 0, 80, 96])])
def test_every_model_is_told_the_size_that_is_asked_for(size: Any, ids: list[float], told: Told) -> None:
    evaluation = evaluate(of_demo_xl(told_size=size))
    assert len(told) > 3
    assert all(seen == ids for seen in told)
    width, height = ids[1], ids[0]
    assert dict(evaluation.facts)["told size"].startswith(f"{width}x{height},")
    evidence = variant(evaluation, evaluation.subjects[0]).evidence
    assert evidence
    assert evidence.extra["told_size"] == f"{width}x{height}"


def test_told_its_native_size_the_dense_model_is_the_rival_of_that_name() -> None:
    rival = evaluate(of_demo_xl(beside=("native-size",))).models[-1]
    dense = evaluate(of_demo_xl(told_size="native")).models[0]
    assert (rival.name, dense.name) == ("native-size", "dense")
    assert rival.images == dense.images


def test_a_pipeline_class_is_loaded_without_a_word_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many a class of transformers says at its first use what it would rather have."""
    from transformers.utils import logging

    heard: list[bool] = []

    class Diffusers(ModuleType):
        def __getattr__(self, name: str) -> Any:
            heard.append(logging.get_logger("transformers").isEnabledFor(logging.WARNING))
            return type(name, (), {"__call__": lambda self, target_size: None})

    monkeypatch.setitem(sys.modules, "diffusers", Diffusers("diffusers"))
    assert pipelines.call_arguments("Any") == {"self", "target_size"}
    assert heard == [False]


def test_without_a_told_size_nothing_says_one() -> None:
    evaluation = evaluate(of_demo_xl())
    assert "told size" not in dict(evaluation.facts)
    evidence = variant(evaluation, evaluation.subjects[0]).evidence
    assert evidence
    assert "told_size" not in evidence.extra


def test_a_search_and_a_calibration_are_told_a_size_and_say_so(here: Path, told: Told) -> None:
    request = SearchRequest(
        "demo-xl", Size(64, 48), scorer=f"{__name__}:sharpness", prompts=(PROMPT,),
        held_out=("a small red circle on grey",), steps=1, trials=2, native=False, told_size="native",
        outputs=(here / "found.toml",),
    )  # fmt: skip
    result = tune(request)
    assert told
    assert all(ids == NATIVE for ids in told)
    assert not result.variant or (result.variant.evidence and result.variant.evidence.extra["told_size"] == "128x128")
    with raises(SearchError, "told size"):  # the scores of another setting are not gone on with
        tune(replace(request, told_size=None, force=True))
    told.clear()
    calibrated = calibrate(
        CalibrateRequest("demo-xl", Size(64, 48), ("wanda",), here / "c.safetensors", prompts=(PROMPT,), steps=1,
                         told_size="native")
    )  # fmt: skip
    assert all(ids == NATIVE for ids in told)
    assert dict(calibrated.facts)["told_size"] == "128x128"


def test_told_sizes_that_cannot_be(line: Line) -> None:
    drawing = f"--steps 1 --ratio 0.4 --prompt '{PROMPT}' -o p.png"
    refused(line(f"preview demo --res 48 --told-size native {drawing}"), 2, "--told-size", "StableDiffusionPipeline")
    refused(line(f"preview demo-xl --res 48 --told-size big {drawing}"), 2, "--told-size", "big")


def test_others_are_not_told_a_size() -> None:
    with raises(OptionError, "native-size", "StableDiffusionPipeline"):
        check([Rival("native-size")], "StableDiffusionPipeline")
    check([Rival("native-size")], "StableDiffusionXLPipeline")


# --- a LoRA ---


def test_a_lora_draws_its_column_and_is_gone_after_it(here: Path) -> None:
    pipe = open_plainly(demo.path())
    weights: dict[str, torch.Tensor] = {}
    for name, layer in pipe.unet.named_modules():
        if name.endswith("attn1.to_q"):
            rank = torch.Generator().manual_seed(len(weights))
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=rank)
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=rank) / 4
    from safetensors.torch import save_file

    save_file(weights, here / "my lora.safetensors")
    size = Size(48, 48)
    made = columns(size, here, f"lora:{here / 'my lora.safetensors'}")
    alone = columns(size, here)
    assert {name: made[name] for name in alone} == alone
    pipe.load_lora_weights(str(here), weight_name="my lora.safetensors", local_files_only=True)
    (plain,) = draw_plainly(pipe, [PAIR], size, 2, guidance_scale=4.0)
    assert made["lora:my lora.safetensors"] == plain != made["dense"]


@pytest.mark.parametrize("content", [b"no LoRA at all", None])
def test_a_file_that_is_no_lora_of_this_model(content: bytes | None, line: Line, here: Path) -> None:
    if content:
        (here / "x.safetensors").write_bytes(content)
    else:
        from safetensors.torch import save_file

        save_file({"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)}, here / "x.safetensors")
    command = f"preview demo --res 48 --steps 1 --ratio 0.4 --prompt '{PROMPT}' --beside lora:x.safetensors -o p.png"
    ran = line(command)
    assert (ran.code, ran.out) == (1, "")
    assert "x.safetensors" in ran.err.splitlines()[-2]
    assert not (here / "p.png").exists()


# --- a function ---

MINE = """
from PIL import Image
def draw(pipe, **call):
    return pipe(**call)
def red(pipe, prompt, width, height, **call):
    return [Image.new("RGB", (width, height), "red") for _ in prompt]
def small(pipe, prompt, **call):
    return [Image.new("RGB", (8, 8)) for _ in prompt]
def few(pipe, **call):
    return []
def nothing(pipe, **call):
    return None
def text(pipe, prompt, **call):
    return "picture"
def array(pipe, **call):
    return pipe(**{**call, "output_type": "np"})
def broken(pipe, **call):
    raise KeyError("x")
def other(pipe):
    return []
"""


def test_a_function_gets_the_pipeline_and_the_call(here: Path) -> None:
    (here / "mine_draws.py").write_text(MINE)
    made = columns(Size(48, 48), here, "mine_draws:draw", "mine_draws:red")
    assert made["mine_draws:draw"] == made["dense"]
    assert made["mine_draws:red"] == Image.new("RGB", (48, 48), "red").tobytes()


@pytest.mark.parametrize("name", ["small", "few", "broken", "other", "nothing", "text", "array"])
def test_what_a_function_does_wrong_is_one_line(name: str, line: Line, here: Path) -> None:
    (here / "mine_wrong.py").write_text(MINE)
    ran = line(f"preview demo --res 48 --steps 1 --ratio 0.4 --prompt '{PROMPT}' --beside mine_wrong:{name} -o p.png")
    assert (ran.code, ran.out) == (1, "")
    assert f"mine_wrong:{name}" in ran.err.splitlines()[-2]
    assert "Traceback" not in ran.err


def test_what_a_function_does_to_the_pipeline_changes_no_number_of_the_models(here: Path) -> None:
    (here / "mine_changes.py").write_text(
        "def f(pipe, **call):\n"
        "    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)\n"
        "    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing='trailing')\n"
        "    return pipe(**call)\n"
    )
    request = EvaluateRequest("demo", (Size(48, 48), Size(80, 80)), limit=2, ratio=0.4, steps=2, batch=2)
    alone = evaluate(request)
    beside = evaluate(replace(request, beside=("mine_changes:f", "two-pass")))

    def scores(models: Iterable[ModelScores]) -> list[tuple[Subject, str, list[float]]]:
        return [(model.subject, model.name, model.values) for model in models]

    names = [name for _, name, _ in scores(beside.models)]
    assert [entry[1:] for entry in scores(beside.models) if entry[1] in ("dense", "pruned", "POA 1.5")] == [
        entry[1:] for entry in scores(alone.models)
    ]
    assert names[-4:] == ["two-pass"] * 2 + ["mine_changes:f"] * 2  # functions come last


def test_two_files_of_one_name_are_told_apart(here: Path) -> None:
    (here / "sub").mkdir()
    for path in (here / "x.safetensors", here / "sub" / "x.safetensors"):
        path.touch()
    rivals = parse(["lora:x.safetensors", "lora:sub/x.safetensors", "lora:./x.safetensors"])
    assert [rival.name for rival in rivals] == ["lora:x.safetensors", "lora:sub/x.safetensors"]


@pytest.mark.parametrize("name", ["a $x^$y<b>&", "long " * 30])
def test_any_name_can_be_plotted(name: str, here: Path) -> None:
    (here / "mine_named.py").write_text(MINE)
    request = EvaluateRequest("demo", (Size(48, 48),), limit=2, ratio=0.4, steps=1, beside=("mine_named:red",))
    evaluation = evaluate(request)
    models = tuple(replace(model, beside=name) if model.beside else model for model in evaluation.models)
    svg = plot.render(replace(evaluation, models=models), "svg").decode()
    assert name[:6].replace("<", "&lt;") in svg


def test_every_rival_has_a_mark_of_its_own(here: Path) -> None:
    (here / "mine_many.py").write_text(MINE + "\n".join(f"red{n} = red" for n in range(6)))
    names = tuple(f"mine_many:red{n}" for n in range(6))
    request = EvaluateRequest("demo", (Size(48, 48),), limit=2, ratio=0.4, steps=1, native=False, beside=names)
    ((_, points),) = plot.rows(evaluate(request))
    assert [point.name for point in points] == ["dense", "pruned", "POA 1.5", *names]
    assert len({point.mark for point in points}) == len(points)


# --- the numbers ---


def test_the_pruned_models_are_compared_with_it_picture_by_picture(here: Path) -> None:
    (here / "mine_red.py").write_text(MINE)
    request = EvaluateRequest(
        "demo", (Size(48, 48),), limit=8, ratio=0.4, steps=1, batch=8, weights=(1.5,), beside=("mine_red:red",)
    )
    evaluation = evaluate(request)
    target, check_of_native = evaluation.subjects
    assert [model.name for model in evaluation.models if model.subject == target][-1] == "mine_red:red"
    assert not [model for model in evaluation.models if model.subject == check_of_native and model.beside]
    by_name = {model.name: model for model in evaluation.models if model.subject == target}
    compared = evaluation.against(target)
    assert [(ours, rival) for ours, rival, _ in compared] == [("pruned", "mine_red:red"), ("POA 1.5", "mine_red:red")]
    for ours, rival, estimate in compared:
        change = np.subtract(by_name[ours].values, by_name[rival].values)
        assert estimate.value == pytest.approx(change.mean())
    said = report_text.verdicts(evaluation)
    assert [verdict for verdict, text in said if "pruned against mine_red:red" in text] == [compared[0][2].verdict]
    # The evidence of a recipe is that of the models alone.
    from crdiff_export.evaluate import evidence

    without = replace(evaluation, models=tuple(model for model in evaluation.models if not model.beside))
    assert evidence.measured(evaluation, target) == evidence.measured(without, target)


def test_the_command_says_how_they_compare(line: Line, here: Path, undrawn: None) -> None:
    ran = line("evaluate demo --res 48 --limit 8 --steps 1 --ratio 0.4 --no-native --beside two-pass -o e.html")
    assert ran.code == 0, ran.err
    table, lines = ran.out.split("\n\n")[1:3]
    heading, columns, *rows = table.splitlines()
    assert heading == "48x48:"
    assert [row.split()[0] for row in rows] == ["dense", "pruned", "POA", "two-pass"]
    assert "s/picture" in columns
    assert len([text for text in lines.splitlines() if "against two-pass" in text]) == 2
    assert ">two-pass<" in (here / "e.html").read_text()


# --- what cannot be meant ---


@pytest.mark.parametrize("name", ["", "nothing", "lora:", ":draw", "a b:c", "native size"])
def test_an_unknown_name_is_refused(name: str, line: Line, here: Path) -> None:
    refused(line(f"preview demo --res 48 --prompt x --beside '{name}'"), 2)


def test_files_and_functions_must_be_there(here: Path) -> None:
    for text, key in (("lora:no.safetensors", "no.safetensors"), ("nowhere:draw", "nowhere")):
        with raises(PreviewError, key):
            parse([text])
    (here / "mine_there.py").write_text(MINE)
    with raises(PreviewError, "absent"):
        parse(["mine_there:absent"])
    assert parse(["two-pass", "two-pass", "mine_there:draw"]) == (
        Rival("two-pass"),
        Rival("function", "mine_there:draw"),
    )
