"""The demo base: the file that ships is a trained model, says how it was made, and loaders take it."""

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from demo_training import diffusion, model, run
from safetensors.numpy import load

from crdiff_export.errors import CheckpointError
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.models import demo
from crdiff_export.models.demo import scenes
from crdiff_export.models.families import by_id
from crdiff_export.sampling import prompts
from tests.support.messages import raises

Arrays = dict[str, np.ndarray[Any, Any]]

UNET = "model.diffusion_model."
BLOCKS = {
    "down": ["input_blocks.1.1", "input_blocks.3.1"],
    "mid": ["middle_block.1"],
    "up": ["output_blocks.0.1", "output_blocks.1.1", "output_blocks.2.1", "output_blocks.3.1"],
}
TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
PREFIXES = {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}


@pytest.fixture(scope="module")
def data() -> bytes:
    return demo.path().read_bytes()


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safetensors.safe_open(demo.path(), "np") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def tensors(data: bytes) -> Arrays:
    return load(data)


@pytest.fixture(scope="module")
def groups(tensors: Arrays) -> Arrays:
    """The magnitudes that CR-Diff ranks together, sorted."""
    names = {
        group: [f"{UNET}{block}.transformer_blocks.0.{target}.weight" for block in blocks for target in TARGETS]
        for group, blocks in BLOCKS.items()
    }
    return {group: np.sort(np.abs(np.concatenate([tensors[n].ravel() for n in of]))) for group, of in names.items()}


@pytest.fixture(scope="module")
def pipe() -> Any:
    import diffusers

    with warnings.catch_warnings(action="ignore"):
        opened = diffusers.StableDiffusionPipeline.from_single_file(
            str(demo.path()), config=str(demo.config()), local_files_only=True
        )
    opened.set_progress_bar_config(disable=True)
    return opened


# The file.


def test_header(data: bytes) -> None:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert length % 8 == 0
    assert data[8:10] == b'{"'  # what A1111 looks for
    assert list(metadata) == sorted(metadata)
    assert not any(value.startswith("{") for value in metadata.values())
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[8 + length :]).hexdigest()
    sizes = {"I64": 8, "F32": 4, "F16": 2}
    assert list(header) == sorted(header, key=lambda name: (-sizes[header[name]["dtype"]], name))
    assert {name for name in header if header[name]["dtype"] != "F16"} == {
        "alphas_cumprod",
        "betas",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    }


def test_it_is_small(data: bytes) -> None:
    """A wheel is compressed, so the files of the package bound it."""
    package = Path(demo.__file__).parents[2]
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert demo.path() in files
    assert len(data) <= 12_000_000
    assert sum(path.stat().st_size for path in files) < 20_000_000


def test_header_says_how_it_was_made(metadata: dict[str, str]) -> None:
    found = re.fullmatch(
        r"python tools/train_demo.py OUT --seed (\d+) --threads (\d+) --vae-steps (\d+) --steps (\d+)",
        metadata["crdiff.demo.command"],
    )
    assert found
    usual = run.Training()
    assert list(map(int, found.groups())) == [usual.seed, usual.threads, usual.vae.steps, usual.diffusion.steps]
    assert 0 < float(metadata["crdiff.demo.loss.vae"]) < 0.05
    assert 0 < float(metadata["crdiff.demo.loss.diffusion"]) < 0.5  # most times are nearly noise alone


def test_configuration_is_what_training_used(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, str]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found}

    made = files(model.write_folder(run.Training().geometry, tmp_path))
    assert files(demo.config()) == made
    assert "model_index.json" in made


def test_drawing_is_as_training_judged_it() -> None:
    usage = by_id("demo").pipelines[""]
    assert (diffusion.SAMPLING, diffusion.GUIDANCE) == (demo.STEPS, demo.GUIDANCE) == (usage.steps, usage.guidance)


@pytest.mark.parametrize("part", [demo.path, demo.config], ids=["weights", "configuration"])
def test_an_installation_without_it_says_so(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with raises(CheckpointError, tmp_path, "missing"):
        part()


# What is in it.


def test_weights_are_finite(tensors: Arrays) -> None:
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("group", list(BLOCKS))
def test_groups_have_few_ties(groups: Arrays, group: str) -> None:
    _, counts = np.unique(groups[group], return_counts=True)
    assert counts.max() < 0.01 * groups[group].size


def test_groups_have_thresholds_of_their_own(groups: Arrays) -> None:
    thresholds = {float(magnitudes[int(0.3 * magnitudes.size) - 1]) for magnitudes in groups.values()}
    assert len(thresholds) == len(groups)
    assert min(thresholds) > 0


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_it_draws_what_it_was_never_shown(count: int, pipe: Any) -> None:
    """Held-out prompts at its own size; docs/demo.md has the figure for hundreds."""
    import torch

    chosen = [scenes.Scene.parse(prompt) for prompt in prompts.held_out(count)]
    drawn = pipe(
        [scene.prompt for scene in chosen],
        width=64,
        height=64,
        num_inference_steps=demo.STEPS,
        guidance_scale=demo.GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(chosen))],
    ).images
    scores = [judge(np.asarray(image), scene) for image, scene in zip(drawn, chosen, strict=True)]
    assert sum(score.parts["right"] for score in scores) >= count * 2 / 3
    assert np.mean([score.value for score in scores]) > 0.8


# What loaders make of it.


@pytest.mark.parametrize("component", PREFIXES)
def test_diffusers_takes_every_tensor(component: str, pipe: Any, tensors: Arrays) -> None:
    loaded = [tensor for tensor in getattr(pipe, component).state_dict().values() if tensor.is_floating_point()]
    stored = [tensor for name, tensor in tensors.items() if name.startswith(PREFIXES[component])]
    # No two tensors are alike, so equal bytes mean that each name was found, and found once.
    assert sorted(tensor.half().numpy().tobytes() for tensor in loaded) == sorted(
        tensor.tobytes() for tensor in stored if tensor.dtype == np.float16
    )
