"""The training of the demo model, in miniature: two steps of each stage."""

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
from demo_training import convert, data, diffusion, model, run, training, vae, words
from demo_training.training import Pace, Schedule

from crdiff_export.models import families
from crdiff_export.models.demo import scenes

GEOMETRY = model.Geometry(
    scenes.vocabulary(), native=32, widths=(8, 16), heads=2, vae_widths=(4, 4, 4), groups=4, vae_groups=2, text_layers=1
)
SCHEDULE = Schedule(steps=2, batch=2, rate=1e-3, warm_up=1, decay=0.5, average=0.9, report=10)
NEVER = Pace(save=math.inf)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Untrained models need not be judged at length, and torch stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demo_training.diffusion.JUDGED", 1)
        patch.setattr("demo_training.diffusion.SAMPLING", 1)
        patch.setattr(torch, "set_num_threads", lambda _: None)
        patch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
        yield


def train(folder: Path, log: list[str], pace: Pace = NEVER, seed: int = 0) -> Path | None:
    chosen = run.Training(seed=seed, vae=SCHEDULE, diffusion=SCHEDULE, geometry=GEOMETRY)
    return run.run(chosen, folder, log.append, pace, "the command")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = train(tmp_path_factory.mktemp("trained"), [])
    assert file
    return file


def test_diffusers_and_the_family_open_it(trained: Path) -> None:
    from diffusers import StableDiffusionPipeline

    with safetensors.safe_open(trained, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    match = families.detect(shapes)
    assert (match.family.id, match.layout.name, match.special) == ("demo", "original", None)
    config = str(trained.parent / run.FOLDER)
    pipe = StableDiffusionPipeline.from_single_file(str(trained), config=config, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    image = pipe(scenes.EXAMPLE, 48, 32, num_inference_steps=1, generator=seed, output_type="np").images[0]
    assert image.shape == (48, 32, 3)
    assert np.isfinite(image).all()
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert not pipe.scheduler.alphas_cumprod[-1]


def test_header_says_how_it_was_made(trained: Path) -> None:
    with safetensors.safe_open(trained, "pt") as file:
        metadata = file.metadata()
        aligned = file.offset_keys() == sorted(
            file.keys(), key=lambda name: (-file.get_tensor(name).element_size(), name)
        )
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
    while not (file := train(tmp_path, log, Pace(save=math.inf, stop=time.monotonic()))):
        stops += 1
    assert stops == 2  # after the first step of each stage
    assert [line for line in log if "after 1 of 2 steps" in line] == [
        "vae: resumed after 1 of 2 steps",
        "diffusion: resumed after 1 of 2 steps",
    ]
    assert file.read_bytes() == trained.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_other_seeds_give_other_weights(tmp_path: Path) -> None:
    """As the checkpoint after the first step shows."""
    for seed in (0, 1):
        assert train(tmp_path / str(seed), [], Pace(save=math.inf, stop=time.monotonic()), seed) is None
    first, other = (list((tmp_path / str(seed)).glob("*.pt")) for seed in (0, 1))
    assert len(first) == len(other) == 1
    weights = [torch.load(path, weights_only=True)["average"] for path in (*first, *other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# Names.


def test_conversion_and_back(tmp_path: Path) -> None:
    """Every tensor comes back under its name from what diffusers reads."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config = model.write_folder(GEOMETRY, tmp_path / "config")
    parts = model.build(GEOMETRY, 0)
    file = tmp_path / "model.safetensors"
    convert.write(file, convert.original(parts, GEOMETRY), {})
    for kind, part, folder in ((UNet2DConditionModel, parts.unet, "unet"), (AutoencoderKL, parts.vae, "vae")):
        loaded = kind.from_single_file(str(file), config=str(config), subfolder=folder, local_files_only=True)
        found, expected = loaded.state_dict(), part.state_dict()
        assert set(found) == set(expected)
        assert [name for name in found if not torch.equal(found[name], expected[name].half().float())] == []


def test_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="class_embedding"):
        convert.unet_name("class_embedding.weight")


# The tokenizer.


def test_every_word_is_one_token(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    config = model.write_folder(GEOMETRY, tmp_path)
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


# The parts of a step.


def test_settling_keeps_what_is_decoded() -> None:
    coder = model.build(replace(GEOMETRY, vae_widths=(8, 8, 8)), 0).vae.eval()
    rng = np.random.default_rng(0)
    pictures = data.pictures(scenes.sample(rng, scenes.split()[0], 64), 32, 32, rng)
    with torch.inference_mode():
        before = coder.encode(pictures).latent_dist
        decoded = coder.decode(before.mode()).sample
        vae.settle(coder, 32, 0)
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
