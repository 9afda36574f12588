"""The demo bases: the files that ship are trained models, say how they were made, and loaders take them."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from demo_training import diffusion, diffusion_xl, model
from demo_training.demo import DemoTraining
from demo_training.demo_xl import DemoXLTraining
from safetensors.numpy import load

from crdiff_export.errors import CheckpointError
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.models import demo
from crdiff_export.models.demo import scenes
from crdiff_export.models.families import by_id
from crdiff_export.models.prediction import Prediction, by_marks, by_scheduler
from crdiff_export.sampling import prompts
from tests.support.messages import raises

Arrays = dict[str, np.ndarray[Any, Any]]

UNET = "model.diffusion_model."
TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True)
class DemoFile:
    """What a test needs to know of a demo: its attentions with their depths, and the tensors that are not float16."""

    training: DemoTraining | DemoXLTraining
    attentions: Mapping[str, Mapping[str, int]]
    text: str
    not_half: frozenset[str]

    @property
    def name(self) -> str:
        return self.training.name

    @property
    def native(self) -> int:
        return self.training.geometry.native

    @property
    def prefixes(self) -> dict[str, str]:
        return {"unet": UNET, "vae": "first_stage_model.", "text_encoder": f"{self.text}.transformer."}


SD1 = DemoFile(
    DemoTraining(),
    {
        "down": {"input_blocks.1.1": 1, "input_blocks.3.1": 1},
        "mid": {"middle_block.1": 1},
        "up": {f"output_blocks.{block}.1": 1 for block in range(4)},
    },
    "cond_stage_model",
    frozenset({"alphas_cumprod", "betas", "cond_stage_model.transformer.text_model.embeddings.position_ids"}),
)
SDXL = DemoFile(
    DemoXLTraining(),
    {
        "down": {"input_blocks.3.1": 1, "input_blocks.5.1": 3},
        "mid": {"middle_block.1": 3},
        "up": {"output_blocks.0.1": 3, "output_blocks.1.1": 3, "output_blocks.2.1": 1, "output_blocks.3.1": 1},
    },
    "conditioner.embedders.0",
    frozenset(),
)


@pytest.fixture(scope="module", params=[SD1, SDXL], ids=lambda shipped: shipped.name)
def shipped(request: pytest.FixtureRequest) -> DemoFile:
    made: DemoFile = request.param
    return made


@pytest.fixture(scope="module")
def data(shipped: DemoFile) -> bytes:
    return demo.path(shipped.name).read_bytes()


@pytest.fixture(scope="module")
def metadata(shipped: DemoFile) -> dict[str, str]:
    with safetensors.safe_open(demo.path(shipped.name), "np") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def tensors(data: bytes) -> Arrays:
    return load(data)


@pytest.fixture(scope="module")
def groups(shipped: DemoFile, tensors: Arrays) -> Arrays:
    """The magnitudes that CR-Diff ranks together, sorted."""
    names = {
        group: [
            f"{UNET}{attention}.transformer_blocks.{block}.{target}.weight"
            for attention, depth in attentions.items() for block in range(depth) for target in TARGETS
        ]
        for group, attentions in shipped.attentions.items()
    }  # fmt: skip
    return {group: np.sort(np.abs(np.concatenate([tensors[n].ravel() for n in of]))) for group, of in names.items()}


@pytest.fixture(scope="module")
def pipe(shipped: DemoFile) -> Any:
    import diffusers
    import torch

    kind = getattr(diffusers, by_id(shipped.name).pipelines[""].pipeline)
    with warnings.catch_warnings(action="ignore"):
        opened = kind.from_single_file(
            str(demo.path(shipped.name)), config=str(demo.config(shipped.name)), local_files_only=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    opened.set_progress_bar_config(disable=True)
    return opened


# The file.


def test_header(shipped: DemoFile, data: bytes) -> None:
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
    half = {name for name in header if header[name]["dtype"] == "F16"}
    assert {name for name in header if 0 not in header[name]["shape"]} - half == shipped.not_half


def test_both_predict_v_and_end_in_noise_alone(shipped: DemoFile, tensors: Arrays, metadata: dict[str, str]) -> None:
    found = by_marks(tensors, metadata)
    assert found
    assert found.kind == "v"
    config = json.loads((demo.config(shipped.name) / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert by_scheduler(config) == Prediction("v", zero_snr=True)
    assert bool(found.zero_snr) == (shipped is SDXL)  # no loader of SD1 knows a mark of it


def test_it_is_small(data: bytes) -> None:
    """A wheel is compressed, so the files of the package bound it."""
    package = Path(demo.__file__).parents[2]
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {demo.path(), demo.path("demo-xl")} <= set(files)
    assert len(data) <= 12_000_000
    assert sum(path.stat().st_size for path in files) < 25_000_000


def test_header_says_how_it_was_made(shipped: DemoFile, metadata: dict[str, str]) -> None:
    usual = shipped.training
    model_option, second = "", ""
    if isinstance(usual, DemoXLTraining):
        model_option, second = f" --model {usual.name}", f" --second-steps {usual.second.steps}"
        assert 0 < float(metadata["crdiff.demo.loss.second"]) < 0.5
    assert metadata["crdiff.demo.command"] == (
        f"python tools/train_demo.py OUT{model_option} --seed {usual.seed} --threads {usual.threads} "
        f"--vae-steps {usual.vae.steps} --steps {usual.diffusion.steps}{second}"
    )
    assert 0 < float(metadata["crdiff.demo.loss.vae"]) < 0.05
    assert 0 < float(metadata["crdiff.demo.loss.diffusion"]) < 0.5  # most times are nearly noise alone


def test_configuration_is_what_training_used(shipped: DemoFile, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, str]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found}

    made = files(model.write_folder(shipped.training.configs(), shipped.training.geometry, tmp_path))
    assert files(demo.config(shipped.name)) == made
    assert "model_index.json" in made


def test_drawing_is_as_training_judged_it(shipped: DemoFile) -> None:
    usage = by_id(shipped.name).pipelines[""]
    trained = diffusion if shipped is SD1 else diffusion_xl
    usual = demo.STEPS, demo.GUIDANCE[shipped.name]
    assert (trained.SAMPLING, trained.GUIDANCE) == usual == (usage.steps, usage.guidance)


@pytest.mark.parametrize("part", [demo.path, demo.config], ids=["weights", "configuration"])
def test_an_installation_without_it_says_so(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with raises(CheckpointError, tmp_path, "missing"):
        part()


# What is in it.


def test_weights_are_finite(tensors: Arrays) -> None:
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("group", ["down", "mid", "up"])
def test_groups_have_few_ties(groups: Arrays, group: str) -> None:
    _, counts = np.unique(groups[group], return_counts=True)
    assert counts.max() < 0.01 * groups[group].size


def test_groups_have_thresholds_of_their_own(groups: Arrays) -> None:
    thresholds = {float(magnitudes[int(0.3 * magnitudes.size) - 1]) for magnitudes in groups.values()}
    assert len(thresholds) == len(groups)
    assert min(thresholds) > 0


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_it_draws_what_it_was_never_shown(count: int, shipped: DemoFile, pipe: Any) -> None:
    """Held-out prompts at its own size; docs/demo.md and docs/demo-xl.md have the figures for hundreds."""
    import torch

    chosen = [scenes.Scene.parse(prompt) for prompt in prompts.held_out(count, shipped.name)]
    drawn = pipe(
        [scene.prompt for scene in chosen],
        width=shipped.native,
        height=shipped.native,
        num_inference_steps=demo.STEPS,
        guidance_scale=demo.GUIDANCE[shipped.name],
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(chosen))],
    ).images
    scores = [judge(np.asarray(image), scene) for image, scene in zip(drawn, chosen, strict=True)]
    assert sum(score.parts["right"] for score in scores) >= count * 2 / 3
    assert np.mean([score.value for score in scores]) > 0.8


# What loaders make of it.


@pytest.mark.parametrize("component", SD1.prefixes)
def test_diffusers_takes_every_tensor(component: str, shipped: DemoFile, pipe: Any, tensors: Arrays) -> None:
    loaded = [tensor for tensor in getattr(pipe, component).state_dict().values() if tensor.is_floating_point()]
    stored = [tensor for name, tensor in tensors.items() if name.startswith(shipped.prefixes[component])]
    # No two tensors are alike, so equal bytes mean that each name was found, and found once.
    assert sorted(tensor.half().numpy().tobytes() for tensor in loaded) == sorted(
        tensor.tobytes() for tensor in stored if tensor.dtype == np.float16
    )
