"""The training of the demo models, in miniature: a few steps of each stage."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from demo_training import convert, data, diffusion, model, model_xl, run, sized, training, vae, words
from demo_training.demo import DemoTraining
from demo_training.demo_xl import DemoXLTraining
from demo_training.diffusion_xl import Period
from demo_training.training import Pace, Schedule
from PIL import Image

from crdiff_export.models import families
from crdiff_export.models.demo import drawing, scenes
from crdiff_export.sizes import Size

GEOMETRY = model.Geometry(
    scenes.vocabulary(), native=32, widths=(8, 16), heads=2, vae_widths=(4, 4, 4), groups=4, vae_groups=2, text_layers=1
)
GEOMETRY_XL = model_xl.GeometryXL(
    scenes.vocabulary(), native=64, widths=(8, 16, 24), depths=(0, 1, 3), head=8, vae_widths=(4, 4, 4, 4), groups=4,
    vae_groups=2,
)  # fmt: skip
SCHEDULE = Schedule(steps=2, batch=2, rate=1e-3, warm_up=1, decay=0.5, average=0.9, report=10)
NEVER = Pace(save=math.inf)
BUCKETS = (Size(64, 64), Size(48, 80))
PERIODS = (
    Period(0, (Size(32, 32),), shift=3.0, relations=("left of", "above"), tells_target=False),
    Period(1, BUCKETS, shift=6.0, relations=tuple(scenes.RELATIONS)),
)
SMALL = DemoTraining(vae=SCHEDULE, diffusion=SCHEDULE, geometry=GEOMETRY)
SMALL_XL = DemoXLTraining(
    vae=SCHEDULE, diffusion=SCHEDULE, second=replace(SCHEDULE, steps=3), periods=PERIODS,
    periods_again=(replace(PERIODS[1], first=0),), geometry=GEOMETRY_XL,
)  # fmt: skip
TRAININGS: dict[str, DemoTraining | DemoXLTraining] = {"demo": SMALL, "demo-xl": SMALL_XL}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Untrained models need not be judged at length, and torch stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("diffusion", "diffusion_xl"):
            patch.setattr(f"demo_training.{name}.JUDGED", 1)
            patch.setattr(f"demo_training.{name}.SAMPLING", 1)
        patch.setattr(torch, "set_num_threads", lambda _: None)
        patch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
        yield


def train(name: str, folder: Path, log: list[str], pace: Pace = NEVER, seed: int = 0) -> Path | None:
    return run.run(replace(TRAININGS[name], seed=seed), folder, log.append, pace, "the command")


@pytest.fixture(scope="module", params=TRAININGS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = train(request.param, tmp_path_factory.mktemp("trained"), [])
    assert file
    return file


def test_diffusers_and_the_family_open_it(trained: Path) -> None:
    import diffusers

    with safetensors.safe_open(trained, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    match = families.detect(shapes)
    assert (match.family.id, match.layout.name, match.special) == (trained.stem, "original", None)
    config = str(trained.parent / f"{trained.stem}-pipeline")
    kind = getattr(diffusers, match.family.pipelines[""].pipeline)
    pipe = kind.from_single_file(str(trained), config=config, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    image = pipe(scenes.EXAMPLE, height=48, width=32, num_inference_steps=1, generator=seed, output_type="np").images[0]
    assert image.shape == (48, 32, 3)
    assert np.isfinite(image).all()
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert not pipe.scheduler.alphas_cumprod[-1]


def test_header_says_how_it_was_made(trained: Path) -> None:
    with safetensors.safe_open(trained, "pt") as file:
        metadata = file.metadata()
        filled = [name for name in file.offset_keys() if file.get_tensor(name).numel()]
        aligned = filled == sorted(filled, key=lambda name: (-file.get_tensor(name).element_size(), name))
    content = trained.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert metadata["crdiff.demo.command"] == "the command"
    assert metadata["modelspec.prediction_type"] == "v"
    assert float(metadata["crdiff.demo.loss.diffusion"]) > 0
    assert aligned


def test_resuming_changes_nothing(trained: Path, tmp_path: Path) -> None:
    log: list[str] = []
    stops = 0
    while not (file := train(trained.stem, tmp_path, log, Pace(save=math.inf, stop=time.monotonic()))):
        stops += 1
    resumed = ["vae: resumed after 1 of 2 steps", "diffusion: resumed after 1 of 2 steps"]
    if trained.stem == "demo-xl":
        resumed += ["second: resumed after 1 of 3 steps", "second: resumed after 2 of 3 steps"]
    assert [line for line in log if "resumed after" in line and "after 2 of 2" not in line] == resumed
    assert stops == len(resumed)  # after each step that is not the last of its stage
    assert file.read_bytes() == trained.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_the_second_training_begins_with_the_file_of_the_first(tmp_path: Path) -> None:
    """Nothing else of the first training is needed, and its header has what the first one's says."""
    while not (first := tmp_path / "demo-xl-first.safetensors").exists():
        train("demo-xl", tmp_path, [], Pace(save=math.inf, stop=time.monotonic()))
    alone = tmp_path / "alone"
    alone.mkdir()
    first.rename(alone / first.name)
    file = train("demo-xl", alone, [])
    assert file
    with safetensors.safe_open(file, "pt") as opened, safetensors.safe_open(alone / first.name, "pt") as before:
        metadata, earlier = opened.metadata(), before.metadata()
        names = {
            name.partition(".")[0]
            for name in opened.keys()  # noqa: SIM118
            if not torch.equal(opened.get_tensor(name), before.get_tensor(name))
        }
    assert names == {"model", "conditioner"}  # the autoencoder stays
    for name in ("vae", "diffusion"):
        assert metadata[f"crdiff.demo.loss.{name}"] == earlier[f"crdiff.demo.loss.{name}"]
    assert (metadata["crdiff.demo.steps.diffusion"], metadata["crdiff.demo.steps.second"]) == ("2", "3")


def test_other_seeds_give_other_weights(tmp_path: Path) -> None:
    """As the checkpoint after the first step shows."""
    for seed in (0, 1):
        assert train("demo", tmp_path / str(seed), [], Pace(save=math.inf, stop=time.monotonic()), seed) is None
    first, other = (list((tmp_path / str(seed)).glob("*.pt")) for seed in (0, 1))
    assert len(first) == len(other) == 1
    weights = [torch.load(path, weights_only=True)["average"] for path in (*first, *other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# Names.


def test_conversion_and_back(tmp_path: Path) -> None:
    """Every tensor comes back under its name from what diffusers reads."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config = model.write_folder(model.configs(GEOMETRY), GEOMETRY, tmp_path / "config")
    parts = model.build(GEOMETRY, 0)
    file = tmp_path / "model.safetensors"
    convert.write(file, convert.original(parts, GEOMETRY), {})
    for kind, part, folder in ((UNet2DConditionModel, parts.unet, "unet"), (AutoencoderKL, parts.vae, "vae")):
        loaded = kind.from_single_file(str(file), config=str(config), subfolder=folder, local_files_only=True)
        found, expected = loaded.state_dict(), part.state_dict()
        assert set(found) == set(expected)
        assert [name for name in found if not torch.equal(found[name], expected[name].half().float())] == []


def test_the_text_encoders_of_the_small_sdxl_come_back(tmp_path: Path) -> None:
    """Layers, pooled text and projection: what diffusers reads from the file encodes a prompt as the parts do."""
    from diffusers import StableDiffusionXLPipeline

    parts = SMALL_XL.build()
    file = tmp_path / "model.safetensors"
    convert.write(file, SMALL_XL.original(parts, tmp_path / "folder"), {})
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(tmp_path / "folder"), local_files_only=True, torch_dtype=torch.float32
    )
    states = SMALL_XL.denoiser(parts, pipe.tokenizer).encode_prompts([scenes.EXAMPLE])
    read, _, pooled, _ = pipe.encode_prompt(scenes.EXAMPLE, do_classifier_free_guidance=False)
    torch.testing.assert_close((read, pooled), states, rtol=2e-3, atol=2e-3)  # the file has float16
    for folder, part in parts.by_folder.items():
        found = getattr(pipe, folder).state_dict()
        assert [
            name for name, weight in part.state_dict().items() if not torch.equal(found[name], weight.half().float())
        ] == []


def test_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="class_embedding"):
        convert.unet_name("class_embedding.weight")


# The tokenizer.


def test_every_word_is_one_token(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    config = model.write_folder(model.configs(GEOMETRY), GEOMETRY, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(config / "tokenizer")
    every = {word: tokenizer(word).input_ids for word in scenes.vocabulary()}
    assert {len(ids) for ids in every.values()} == {3}
    assert len({ids[1] for ids in every.values()}) == len(every)
    assert len(tokenizer("astronaut").input_ids) == 2 + len("astronaut")
    assert tokenizer.model_max_length == model.POSITIONS


def test_merges_leave_earlier_words_whole() -> None:
    vocabulary = ["red", "green", "greed", "banana", "ban", "aa", "aaaa"]
    table = words.merges(vocabulary)
    assert [words.split(word, table) for word in vocabulary] == [[f"{word}</w>"] for word in vocabulary]


# The sizes of pictures.


def sizes_of(size: Size, count: int = 500) -> list[Size]:
    rng = np.random.default_rng(0)
    return [sized.true_size(size, 128, rng) for _ in range(count)]


def test_pictures_had_many_sizes() -> None:
    sides = np.array([min(size.width, size.height) for size in sizes_of(Size(128, 128))])
    shapes = np.array([size.width / size.height for size in sizes_of(Size(128, 128))])
    assert 0.3 < np.mean(sides < 120) < 0.5
    assert sides.min() >= 32
    assert sides.max() <= 192
    assert 0.4 < np.mean(shapes == 1) < 0.65
    assert 0.6 < shapes.min() < 0.7
    assert 1.4 < shapes.max() < 1.55


def test_wide_sizes_have_wide_pictures() -> None:
    assert np.median([size.width / size.height for size in sizes_of(Size(160, 96))]) == pytest.approx(160 / 96, abs=0.1)


@pytest.mark.parametrize("size", [Size(64, 64), Size(96, 160)])
def test_a_picture_is_what_it_is_told_to_be(size: Size) -> None:
    """A scene that was drawn at the size told, enlarged and cropped where it is told, is the picture."""
    chosen = scenes.sample(np.random.default_rng(1), scenes.split()[0], 24)
    rng, again = np.random.default_rng(2), np.random.default_rng(2)
    drawn = sized.draw(chosen, size, 128, rng)
    assert drawn.pictures.shape == (24, 3, size.height, size.width)
    cropped = 0
    for scene, picture, told in zip(chosen, data.images(drawn.pictures), drawn.time_ids.int().tolist(), strict=True):
        true = sized.true_size(size, 128, again)
        whole = Image.fromarray(drawing.draw(scene, true.width, true.height, again))
        height, width, top, left, shown_height, shown_width = told
        assert (height, width, shown_height, shown_width) == (true.height, true.width, size.height, size.width)
        scale = max(size.width / width, size.height / height)
        whole = whole.resize((max(size.width, round(width * scale)), max(size.height, round(height * scale))),
                             Image.Resampling.BICUBIC)  # fmt: skip
        assert left == again.integers(whole.width - size.width + 1)
        assert top == again.integers(whole.height - size.height + 1)
        part = whole.crop((left, top, left + size.width, top + size.height))
        assert np.array_equal(np.asarray(part), picture)
        cropped += bool(top or left)
    assert cropped > 4


def test_what_a_period_tells(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    config = model.write_folder(SMALL_XL.configs(), GEOMETRY_XL, tmp_path)
    stage = SMALL_XL.denoiser(SMALL_XL.build(), CLIPTokenizer.from_pretrained(config / "tokenizer"))
    assert [stage.period(step).first for step in (0, 1, 5)] == [0, 1, 1]
    told: list[torch.Tensor] = []
    unet = stage.model["unet"]
    unet.register_forward_hook(lambda _m, _a, given, _o: told.append(given["added_cond_kwargs"]["time_ids"]),
                               with_kwargs=True)  # fmt: skip
    for step in range(8):
        stage.loss(step)
    untold, *others = [{tuple(ids) for ids in batch[:, 4:].tolist()} for batch in told]
    assert untold <= {(64, 64), (80, 48)}  # any, whatever is drawn
    assert {len(sizes) for sizes in others} == {1}
    assert {size for sizes in others for size in sizes} == {(64, 64), (80, 48)}


# The parts of a step.


def test_settling_keeps_what_is_decoded() -> None:
    coder = model.build(replace(GEOMETRY, vae_widths=(8, 8, 8)), 0).vae.eval()
    rng = np.random.default_rng(0)
    pictures = data.pictures(scenes.sample(rng, scenes.split()[0], 64), 32, 32, rng)
    with torch.inference_mode():
        before = coder.encode(pictures).latent_dist
        decoded = coder.decode(before.mode()).sample
        vae.settle(coder, pictures, model.SCALE)
        after = coder.encode(pictures).latent_dist
        torch.testing.assert_close(coder.decode(after.mode()).sample, decoded, rtol=1e-3, atol=1e-4)
    scaled = after.mean * model.SCALE
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert scaled.mean((0, 2, 3)).abs().max() < 0.1
    # The noise of a latent grows as the latents do.
    grown = (after.logvar - before.logvar).mean((0, 2, 3)).exp().sqrt()
    torch.testing.assert_close(grown, after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3)), rtol=1e-2, atol=0)


def test_rate_rises_holds_and_falls() -> None:
    schedule = Schedule(steps=100, batch=1, rate=1.0, warm_up=10, decay=0.2, average=0.9, report=1)
    assert [schedule.rate_at(step) for step in (0, 9, 50, 79)] == [0.1, 1, 1, 1]
    assert schedule.rate_at(90) == pytest.approx(0.5)
    assert schedule.rate_at(99) == pytest.approx(0.05)


def test_times_are_shifted_to_the_noisy_end() -> None:
    even = np.linspace(0, 1, 1001)
    assert np.array_equal(diffusion.shifted(even, 1.0), even)
    moved = diffusion.shifted(even, 3.0)
    assert (moved[0], moved[-1]) == (0, 1)
    assert (np.diff(moved) > 0).all()
    assert np.mean(moved > 0.75) == pytest.approx(0.5, abs=0.01)


def test_every_step_has_numbers_of_its_own() -> None:
    drawn = {
        float(training.numbers(seed, stage, step).random())
        for seed in (0, 1) for stage in ("vae", "diffusion") for step in (0, 1)
    }  # fmt: skip
    assert len(drawn) == 8
    assert training.numbers(0, "vae", 3).random() == training.numbers(0, "vae", 3).random()
