"""The demo base: the same bytes everywhere, what loaders expect, and a cache that heals itself."""

import hashlib
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from crdiff_export import demo
from crdiff_export.demo import config as demo_config
from crdiff_export.errors import BakeError

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
    return demo.build()


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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "cache"


def test_bytes_are_the_same_everywhere(data: bytes) -> None:
    assert hashlib.sha256(data).hexdigest() == demo.SHA256
    assert len(data) < 4 << 20


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


def test_weights_are_finite_and_of_different_scales(tensors: Arrays) -> None:
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    queries = [f"{UNET}{block}.transformer_blocks.0.attn1.to_q.weight" for of in BLOCKS.values() for block in of]
    assert len({round(float(tensors[name].astype(np.float64).std()), 3) for name in queries}) > len(BLOCKS)
    norm = tensors[f"{UNET}out.0.weight"]
    assert 0.8 < norm.min() < 1 < norm.max() < 1.2


def test_noise_schedule_is_that_of_sd1(tensors: Arrays) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(tensors["betas"], betas, rtol=1e-6)
    np.testing.assert_allclose(tensors["alphas_cumprod"], np.cumprod(1 - betas), rtol=1e-6)


@pytest.mark.parametrize("group", list(BLOCKS))
def test_groups_have_few_ties(groups: Arrays, group: str) -> None:
    _, counts = np.unique(groups[group], return_counts=True)
    assert counts.max() < 0.01 * groups[group].size


def test_groups_have_thresholds_of_their_own(groups: Arrays) -> None:
    thresholds = {float(magnitudes[int(0.3 * magnitudes.size) - 1]) for magnitudes in groups.values()}
    assert len(thresholds) == len(groups)
    assert min(thresholds) > 0


def test_import_costs_nothing() -> None:
    code = "import sys, crdiff_export.demo; sys.exit(bool({'numpy', 'torch', 'safetensors'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# What loaders make of it.


@pytest.fixture(scope="module")
def saved(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / demo.NAME
    file.write_bytes(data)
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_config.write(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize(
    ("component", "class_name"), [("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")], ids=["unet", "vae"]
)
def test_diffusers_takes_every_tensor(
    component: str, class_name: str, saved: Path, config: Path, tensors: Arrays
) -> None:
    model_class = getattr(pytest.importorskip("diffusers"), class_name)
    fresh = model_class.from_config(model_class.load_config(config, subfolder=component, local_files_only=True))
    model = model_class.from_single_file(str(saved), config=str(config), subfolder=component, local_files_only=True)
    loaded = model.state_dict()
    assert set(loaded) == set(fresh.state_dict())
    # Every tensor is random, so equal bytes mean that each name was found, and found once.
    assert sorted(tensor.half().numpy().tobytes() for tensor in loaded.values()) == sorted(
        tensor.tobytes() for name, tensor in tensors.items() if name.startswith(PREFIXES[component])
    )


def test_transformers_names_the_text_encoder_alike(config: Path, tensors: Arrays) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    with torch.device("meta"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(config / "text_encoder"))
    # transformers before 5.6 has `text_model.` before every name; before 4.31 it kept position_ids as well.
    expected = {name.removeprefix("text_model."): tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = PREFIXES["text_encoder"] + "text_model."
    found = {name.removeprefix(prefix): value.shape for name, value in tensors.items() if name.startswith(prefix)}
    positions = found.pop("embeddings.position_ids")
    assert found == expected | {"embeddings.position_ids": positions} or found == expected
    assert positions == (1, demo.POSITIONS)


def test_pipeline_draws_from_it(saved: Path, config: Path) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pipe = diffusers.StableDiffusionPipeline.from_single_file(str(saved), config=str(config), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    image = pipe("a cat", num_inference_steps=2, height=64, width=96, generator=seed, output_type="np").images[0]
    assert image.shape == (64, 96, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01


# The cache.


def test_path_writes_the_file(cache: Path) -> None:
    file = demo.path()
    assert file == cache / demo.NAME
    assert hashlib.sha256(file.read_bytes()).hexdigest() == demo.SHA256
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize("damage", [b"", b"no checkpoint"], ids=["empty", "other"])
def test_damaged_file_is_replaced(cache: Path, damage: bytes) -> None:
    cache.mkdir()
    (cache / demo.NAME).write_bytes(damage)
    assert hashlib.sha256(demo.path().read_bytes()).hexdigest() == demo.SHA256
    assert len(list(cache.iterdir())) == 1


def test_cut_file_is_replaced(cache: Path, data: bytes) -> None:
    cache.mkdir()
    (cache / demo.NAME).write_bytes(data[:-1])
    assert demo.path().read_bytes() == data


def test_temporary_folder_serves_where_the_cache_cannot(cache: Path, tmp_path: Path) -> None:
    cache.write_text("a file where the folder should be")
    file = demo.path()
    assert file.parent.parent == tmp_path / "temporary"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == demo.SHA256


def test_intact_file_is_not_written_again(cache: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / demo.NAME).write_bytes(data)
    monkeypatch.setattr(demo, "_write", lambda file, data: pytest.fail("written"))
    assert demo.path() == cache / demo.NAME


def test_failed_write_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    (cache / demo.NAME).mkdir(parents=True)  # a folder, which no file can replace
    assert demo.path().parent.parent == tmp_path / "temporary"
    assert list(cache.iterdir()) == [cache / demo.NAME]


def test_nowhere_to_write(cache: Path, tmp_path: Path) -> None:
    cache.write_text("")
    (tmp_path / "temporary").write_text("")
    with pytest.raises(BakeError) as error:
        demo.path()
    assert str(cache / demo.NAME) in error.value.message
    assert "CRDIFF_CACHE" in error.value.hint


def test_many_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: demo.path(), range(16)))
    assert {hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == {demo.SHA256}
    assert list(cache.iterdir()) == [cache / demo.NAME]


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {"CRDIFF_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ("linux", {"CRDIFF_CACHE": "~/a"}, Path("/home/me/a")),
        ("linux", {"CRDIFF_CACHE": "", "XDG_CACHE_HOME": "/b"}, Path("/b/crdiff")),
        ("linux", {}, Path("/home/me/.cache/crdiff")),
        ("darwin", {}, Path("/home/me/Library/Caches/crdiff")),
        ("win32", {"LOCALAPPDATA": "/local"}, Path("/local/crdiff")),
        ("win32", {}, Path("/home/me/AppData/Local/crdiff")),
    ],
    ids=["chosen", "chosen-home", "xdg", "linux", "macos", "windows", "windows-bare"],
)
def test_cache_folder(
    platform: str, environment: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CRDIFF_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", "USERPROFILE": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert next(iter(demo._folders())) == folder
