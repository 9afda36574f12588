"""Which files of a diffusers folder an export copies, by what the Hub path takes."""

import json
import shutil
from pathlib import Path

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CheckpointError
from crdiff_export.export import prepare
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.pipeline_files import component_weights, pipeline_files
from crdiff_export.hub.location import HubLocation, cached_location
from tests.support import makers
from tests.support.messages import raises

PIPELINE = (
    "model_index.json", "unet/config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors.index.json", "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors", "tokenizer/merges.txt", "tokenizer/spiece.model",
    "scheduler/scheduler_config.json", "image_encoder/pytorch_model-00001-of-00001.bin",
    "image_encoder/pytorch_model.bin.index.json", "image_encoder/config.json",
    "vae/diffusion_pytorch_model.safetensors", "LICENSE.md",
)  # fmt: skip
OTHERS = (
    "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md", "picture.png", "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.bin.index.json", "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx", "unet/diffusion_flax_model.msgpack", "vae/diffusion_pytorch_model.bin",
    "unet/optimizer.bin", "vae_encoder/openvino_model.xml", "vae_encoder/config.json", "feature/model.safetensors",
)  # fmt: skip
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler", "image_encoder")
INDEX = json.dumps({"_class_name": "StableDiffusionPipeline", **{name: ["diffusers", "X"] for name in COMPONENTS}})
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(here: Path) -> Path:
    for name in (*PIPELINE, *OTHERS):
        (here / "sd" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "sd" / name).write_text(name)
    (here / "sd/model_index.json").write_text(INDEX)
    makers.write(here / "sd" / UNET, makers.tiny("demo.diffusers-unet"))
    return here / "sd"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_the_pipeline_is_copied_and_the_rest_is_named(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model (1).safetensors").touch()
    baked = export(ExportRequest(str(folder), Size(96, 64), Path("out")))
    assert files(Path("out")) == {*PIPELINE, UNET}
    (note,) = [note for note in baked.job.plan.notes if "left out" in note]
    assert "unet/diffusion_pytorch_model (1).safetensors: weights beside" in " ".join(baked.job.plan.notes)
    assert "--all-files" in note
    assert f"and {len(OTHERS) - 3} more" in note


def test_all_files_are_copied_on_request(folder: Path) -> None:
    export(ExportRequest(str(folder), Size(96, 64), Path("out"), all_files=True))
    assert files(Path("out")) == {*PIPELINE, UNET, *OTHERS}


def test_space_is_that_of_the_files_that_are_copied(folder: Path) -> None:
    with (folder / "v1-5-pruned.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    assert prepare(ExportRequest(str(folder), Size(96, 64), Path("out"))).space.needed < 1 << 30
    assert prepare(ExportRequest(str(folder), Size(96, 64), Path("out"), all_files=True)).space.needed > 1 << 40


def test_a_variant_takes_its_own_weights_where_it_has_some(folder: Path) -> None:
    shutil.copy(folder / UNET, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    export(ExportRequest(str(folder), Size(96, 64), Path("out"), variant="fp16"))
    made = files(Path("out"))
    assert {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"} <= made
    assert not {UNET, "text_encoder/model.safetensors"} & made
    assert "vae/diffusion_pytorch_model.safetensors" in made  # which has no other


@pytest.mark.parametrize("index", [None, "{}", "not JSON"])
def test_without_a_list_every_folder_may_be_a_component(folder: Path, index: str | None) -> None:
    (folder / "model_index.json").unlink()
    if index:
        (folder / "model_index.json").write_text(index)
    export(ExportRequest(str(folder), Size(96, 64), Path("out")))
    assert {"vae_encoder/config.json", "feature/model.safetensors"} <= files(Path("out"))
    assert "v1-5-pruned.safetensors" not in files(Path("out"))


def test_names_of_weights() -> None:
    old = ["unet/a-00001-of-00002.fp16.safetensors", "unet/a-00002-of-00002.fp16.safetensors"]
    new = ["unet/a.fp16-00001-of-00002.safetensors", "unet/a.fp16-00002-of-00002.safetensors"]
    plain = ["unet/a-00001-of-00002.safetensors", "unet/a-00002-of-00002.safetensors"]
    for names in (old, new):
        assert component_weights([*names, *plain], "fp16") == names
        assert component_weights([*names, *plain], None) == plain
        assert component_weights(names, None) == names
    assert pipeline_files(["unet/a.bin.index.fp16.json", "unet/a.safetensors.index.json"], None, None) == [
        "unet/a.safetensors.index.json"
    ]


# --- old names of variants ---


@pytest.mark.parametrize("old", [True, False])
def test_shards_of_a_variant_are_read_under_old_and_new_names(here: Path, old: bool) -> None:
    makers.write_shards(here / "sd/unet", makers.tiny("demo.diffusers-unet"), 2)
    stem = "diffusion_pytorch_model"
    index = here / "sd/unet" / f"{stem}.safetensors.index.json"
    text = index.read_text()
    for number in (1, 2):
        part = f"{number:05}-of-00002"
        name = f"{stem}-{part}.fp16.safetensors" if old else f"{stem}.fp16-{part}.safetensors"
        (here / "sd/unet" / f"{stem}-{part}.safetensors").rename(here / "sd/unet" / name)
        text = text.replace(f"{stem}-{part}.safetensors", name)
    index.unlink()
    name = f"{stem}.safetensors.fp16.index.json" if old else f"{stem}.safetensors.index.fp16.json"
    (here / "sd/unet" / name).write_text(text)
    for variant in ("fp16", None):  # without a name, the only one is taken
        checkpoint = open_checkpoint(here / "sd", variant)
        assert len(checkpoint.files) == 2
        assert name in {path.name for path in checkpoint.companions}
    export(ExportRequest("sd", Size(96, 64), Path("out"), variant="fp16", ratio=0.3))
    assert files(Path("out")) == files(here / "sd")


@pytest.mark.parametrize("is_sharded", [True, False])
def test_an_index_without_its_shards_names_the_variant_beside_it(here: Path, is_sharded: bool) -> None:
    makers.write_shards(here / "unet", makers.tiny("demo.diffusers-unet"), 2)
    for shard in (here / "unet").glob("*-of-*"):
        shard.unlink()
    with raises(CheckpointError, "diffusion_pytorch_model-00001-of-00002.safetensors"):
        open_checkpoint(here)
    if is_sharded:
        makers.write_shards(here / "unet", makers.tiny("demo.diffusers-unet"), 2, variant="fp16")
    else:
        makers.write(here / "unet/diffusion_pytorch_model.fp16.safetensors", makers.tiny("demo.diffusers-unet"))
    with raises(CheckpointError, "diffusion_pytorch_model.safetensors.index.json") as error:
        open_checkpoint(here)
    assert "--variant fp16" in error.value.hint
    assert len(open_checkpoint(here, "fp16").files) == (2 if is_sharded else 1)


# --- names ---


def test_a_snapshot_is_called_after_its_repository(here: Path) -> None:
    snapshot = here / "models--org--some--name" / "snapshots" / ("ab" * 20)
    (snapshot / "unet").mkdir(parents=True)
    makers.write(snapshot / UNET, makers.tiny("demo.diffusers-unet"))
    assert cached_location(snapshot) == HubLocation("org/some--name", revision="ab" * 20)
    assert cached_location(here) is None
    job = prepare(ExportRequest(str(snapshot), Size(96, 64)))
    assert (job.target.name, job.base.name) == ("some--name-crdiff-96x64", f"hf://org/some--name@{'ab' * 20}")


@pytest.mark.parametrize("name", ["fill.sft", "fill.SFT", "fill.safetensors"])
def test_an_output_is_called_after_its_base_without_the_ending(here: Path, name: str) -> None:
    makers.write(here / name, makers.tiny("demo.original-unet"))
    assert prepare(ExportRequest(name, Size(96, 64))).target == Path("fill-crdiff-96x64.safetensors")


@pytest.mark.parametrize("output", ["there", "there/"])
def test_a_folder_gets_the_default_name_inside(here: Path, output: str) -> None:
    (here / "there").mkdir()
    target = prepare(ExportRequest("demo", Size(96, 64), Path(output))).target
    assert target == Path("there/demo-crdiff-96x64.safetensors")
