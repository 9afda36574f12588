"""Exports and conversions in another layout than the base's: the same weights under other names, pruned alike."""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils
from torch import Tensor

from crdiff_export import ExportRequest, Size, export
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.convert import ConvertRequest, prepare, run
from crdiff_export.errors import CheckpointError, OptionError, PackError, PlanError, PoaError, VerifyError
from crdiff_export.evaluate.preview import thumbnail
from crdiff_export.export import Baked
from crdiff_export.export import prepare as prepare_export
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.models import demo
from crdiff_export.models.families import LayoutName
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling import poa
from crdiff_export.sampling.comfyui import match
from crdiff_export.verify import open_baked
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import Verified, verify
from tests.support.layout_models import TRANSFORMERS, UNETS
from tests.support.messages import raises
from tests.support.scaled_models import Scaled

KINDS = {**UNETS, **TRANSFORMERS}
SIZE = Size(96, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines by their kind; tests do not change them."""
    root = tmp_path_factory.mktemp("folders")
    kinds = {**KINDS, "sd15-other": KINDS["sd15"]}
    return cache(lambda kind: kinds[kind].save(root / kind, seed=2 if kind == "sd15-other" else 0))


def convert(base: Path, layout: LayoutName, output: Path, **options: Any) -> Path:
    return run(prepare(ConvertRequest(str(base), layout, output, **options)), Silent()).path


@cache
def dense_of(folder: Path) -> Path:
    """A folder that no test changes, in the original layout."""
    return convert(folder, "original", folder.with_suffix(".safetensors"))


def bake(base: Path | str, output: Path, layout: LayoutName | None = None, **options: Any) -> Baked:
    options = {"size": Size(512, 768), "ratio": 0.3, **options}
    return export(ExportRequest(str(base), output=output, layout=layout, **options))


def weights(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape
        and torch.equal(left[k].reshape(-1).view(torch.uint8), right[k].reshape(-1).view(torch.uint8))
        for k in right
    )  # fmt: skip


# diffusers as the oracle


@pytest.mark.parametrize("kind", UNETS)
def test_diffusers_reads_from_the_file_what_the_folder_has(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders(kind)
    path = convert(folder, "original", tmp_path / "one.safetensors")
    cls: Any = type(KINDS[kind].kind.make())
    pipe = cls.from_single_file(str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float16)
    for name in ("unet", "vae", *KINDS[kind].encoders()):
        loaded = getattr(pipe, name)
        library = diffusers if hasattr(diffusers, type(loaded).__name__) else transformers
        theirs = getattr(library, type(loaded).__name__).from_pretrained(folder / name, torch_dtype=torch.float16)
        assert same(loaded.state_dict(), theirs.state_dict()), name


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_diffusers_own_converter_gives_the_folder_back(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders(kind)
    made = weights(convert(folder, "original", tmp_path / "one.safetensors"))
    made = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in made.items()}
    expected = weights(folder / "transformer/diffusion_pytorch_model.safetensors")
    if kind == "flux-dev":  # diffusers knows FLUX's own width only
        source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
        space = dict(vars(single_file_utils))
        exec(source.replace("inner_dim = 3072", "inner_dim = 12"), space)
        converted = space["convert_flux_transformer_checkpoint_to_diffusers"](dict(made))
    else:
        converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(made))
    assert same(converted, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder, part = folders(kind), KINDS[kind].kind.part
    single = convert(folder, "original", tmp_path / "one.safetensors")
    back = convert(single, "diffusers", tmp_path / "back")
    assert same(
        weights(back / "diffusion_pytorch_model.safetensors"),
        weights(folder / part / "diffusion_pytorch_model.safetensors"),
    )
    again = convert(back, "original", tmp_path / "again.safetensors")
    network = weights(again)
    assert same(network, {k: v for k, v in weights(single).items() if k in network})


def test_the_demo_in_diffusers_predicts_the_same(tmp_path: Path) -> None:
    folder = convert(Path("demo"), "diffusers", tmp_path / "unet")
    config = str(demo.config())
    one = diffusers.UNet2DConditionModel.from_single_file(
        str(demo.path()), config=config, subfolder="unet", local_files_only=True, torch_dtype=torch.float32
    )
    other = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 16, 24), 500, torch.randn(1, 32, 64)
    with torch.no_grad():
        assert torch.equal(one(*inputs).sample, other(*inputs).sample)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("sd15", "sd1-ldm"), ("sdxl", "sdxl-sgm"), ("sd3-medium", "sd3-comfyui"), ("flux-dev", "flux-flux")],
)
def test_sd_mecha_knows_every_key(kind: str, config: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    configs = pytest.importorskip("sd_mecha.extensions.model_configs")
    known = {name.removeprefix("model.diffusion_model.") for name in set(configs.resolve(config).keys())}
    made = weights(convert(folders(kind), "original", tmp_path / "one.safetensors"))
    unknown = {name.removeprefix("model.diffusion_model.") for name in made} - known
    assert not unknown, sorted(unknown)[:5]


# the same pruning


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_thresholds_and_counts_are_the_same(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, part = folders(kind), KINDS[kind].kind.part
    plain = bake(folder, tmp_path / "plain")
    other = bake(folder, tmp_path / "other.safetensors", "original")
    assert other.stamp.groups == plain.stamp.groups
    assert sorted(map(str, other.stamp.thresholds or ())) == sorted(map(str, plain.stamp.thresholds or ()))
    dense = dense_of(folder)
    same_bytes = bake(dense, tmp_path / "again.safetensors")
    assert same(weights(other.written.path), weights(same_bytes.written.path))
    pruned = tmp_path / "plain" / part / "diffusion_pytorch_model.safetensors"
    converted = convert_baked(pruned, tmp_path)
    network = {k: v for k, v in weights(other.written.path).items() if k in converted}
    assert same(converted, network)


def convert_baked(path: Path, folder: Path) -> dict[str, Tensor]:
    """A baked network in the original layout, its `crdiff.*` keys taken off so that it passes for a base."""
    bare = folder / "bare.safetensors"
    safetensors.torch.save_file(weights(path), bare)
    return weights(convert(bare, "original", folder / "bare-original.safetensors"))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo's layers have seen in two steps."""
    output = tmp_path_factory.mktemp("calibration") / "seen.safetensors"
    return calibrate(CalibrateRequest("demo", SIZE, ("wanda",), output, limit=1, steps=2)).path


@pytest.mark.parametrize("criterion", ["random:seed=3", "wanda", "wanda:compare=row"])
def test_other_criteria_choose_the_same_weights(criterion: str, calibration: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"criterion": criterion, "size": SIZE}
    options["calibration"] = None if "random" in criterion else calibration
    original = bake("demo", tmp_path / "o.safetensors", **options)
    other = bake("demo", tmp_path / "d", "diffusers", **options)
    assert other.stamp.groups == original.stamp.groups
    bare = weights(tmp_path / "d/diffusion_pytorch_model.safetensors")
    dense = weights(convert(Path("demo"), "diffusers", tmp_path / "dense") / "diffusion_pytorch_model.safetensors")
    zeros = sum(int((bare[k] == 0).sum() - (dense[k] == 0).sum()) for k in bare)
    assert zeros > 0
    back = convert_baked(tmp_path / "d/diffusion_pytorch_model.safetensors", tmp_path)
    pruned = weights(original.written.path)
    assert same(back, {k: pruned[k] for k in back})


def test_header_says_where_it_comes_from(folders: Callable[[str], Path], tmp_path: Path) -> None:
    made = bake(folders("sdxl"), tmp_path / "x.safetensors", "original")
    stamp = open_baked(made.written.path).stamp
    assert (stamp.layout, stamp.source_layout) == ("original", "diffusers")
    metadata = open_checkpoint(made.written.path).metadata
    assert metadata["modelspec.implementation"] == "sgm"
    plain = bake(folders("sdxl"), tmp_path / "plain").written.files[0].path
    assert metadata["modelspec.architecture"] == open_checkpoint(plain).metadata["modelspec.architecture"]
    dense = open_checkpoint(dense_of(folders("sdxl"))).metadata
    assert f"{stamp.source_hash}" == dense["modelspec.hash_sha256"]
    assert not any(key.startswith("crdiff.") for key in dense)


@pytest.mark.parametrize("layout", [None, "diffusers"])
def test_the_base_s_own_layout_changes_nothing(
    layout: LayoutName | None, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    made = bake(folders("sd15"), tmp_path / "out", layout)
    assert made.stamp.source_layout is None
    assert (tmp_path / "out/model_index.json").exists()


def test_two_runs_give_the_same_bytes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = (bake(folders("sdxl"), tmp_path / f"{n}.safetensors", "original", threads=n) for n in (1, 2))
    assert one.written.path.read_bytes() == two.written.path.read_bytes()


def test_a_cast_and_several_sizes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    made = bake(folders("sd15"), tmp_path / "x.safetensors", "original", dtype="bf16")
    loaded = weights(made.written.path)
    assert {t.dtype for t in loaded.values()} == {torch.bfloat16}
    checked(made.written.path, folders("sd15"))


# reading back


def checked(path: Path, base: Path | str) -> Verified:
    return verify(path, str(base), Silent())


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd21", "flux-dev"])
def test_verify_compares_with_a_base_of_either_layout(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders(kind)
    dense = dense_of(folder)
    made = bake(folder, tmp_path / "x.safetensors", "original").written.path
    assert checked(made, folder).against == "all"
    assert checked(made, dense).against == "all"
    plain = bake(folder, tmp_path / "plain").written.path
    network = KINDS[kind].kind.part
    assert checked(plain, folder).against == "all"
    assert checked(plain / network, dense).against == "all"
    there = bake(dense, tmp_path / "there", "diffusers").written.path
    assert checked(there, dense).against == "all"
    assert checked(there, folder).against == "all"


def test_verify_proves_what_the_other_layout_does_not_have_by_the_hash(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    made = export(ExportRequest("demo", SIZE, tmp_path / "x.safetensors")).written.path
    unet = convert(Path("demo"), "diffusers", tmp_path / "unet")
    found = checked(made, unet)
    assert found.against == "all"
    assert len(found.notes) == 1
    bare = export(ExportRequest("demo", SIZE, tmp_path / "y.safetensors", hashing=False)).written.path
    assert checked(bare, unet).notes != found.notes


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_verify_finds_a_changed_bit_in_any_part(part: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("sdxl"), tmp_path / "base")
    made = bake(folder, tmp_path / "x.safetensors", "original").written.path
    (path,) = (folder / part).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with raises(VerifyError):
        checked(made, folder)


def test_a_changed_configuration_is_noticed(tmp_path: Path) -> None:
    made = export(ExportRequest("demo", SIZE, tmp_path / "x", layout="diffusers")).written.path
    assert checked(made, "demo").against == "all"
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "attention_head_dim": 8}))
    with raises(VerifyError, "config.json"):
        checked(made, "demo")


@pytest.mark.parametrize("way", ["embed", "sidecar"])
def test_restore_gives_the_base_in_the_layout_of_the_file(
    way: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders("sdxl")
    made = bake(folder, tmp_path / "x.safetensors", "original", residual=way).written.path
    assert checked(made, folder).residual != "none"
    restored = restore(made, tmp_path / "restored.safetensors")
    assert restored.source_layout == "diffusers"
    assert same(weights(restored.path), weights(dense_of(folder)))


def test_a_pack_of_a_folder_exports_to_the_original_layout(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder, size = folders("sdxl"), Size(512, 768)
    plan = PlanRequest(str(folder), size, ratio=0.3)
    pack = open_pack(
        create.make(create.prepare_new(create.PackRequest((plan,), tmp_path / "p.crdiff")), Silent()).pack.path
    )
    plain = bake(folder, tmp_path / "plain.safetensors", "original")
    packed = bake(folder, tmp_path / "packed.safetensors", "original", pack=pack, ratio=None)
    assert packed.written.path.read_bytes() == plain.written.path.read_bytes()
    other = KINDS["sdxl"].save(tmp_path / "other")
    unet = other / "unet/diffusion_pytorch_model.safetensors"
    tensors = weights(unet)
    tensors["conv_in.bias"] += 1
    safetensors.torch.save_file(tensors, unet, {"format": "pt"})
    with raises(PackError, "the base of"):
        bake(other, tmp_path / "no.safetensors", "original", pack=pack, ratio=None)


# untidy folders


def untidy(folders: Callable[[str], Path], tmp_path: Path, kind: str = "sdxl") -> Path:
    return shutil.copytree(folders(kind), tmp_path / "base")


def test_variants_and_shards_give_the_same_file(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    expected = weights(dense_of(folders("sdxl")))
    variant = UNETS["sdxl"].save(tmp_path / "variant", variant="fp16")
    assert same(weights(convert(variant, "original", tmp_path / "v.safetensors", variant="fp16")), expected)
    assert same(weights(convert(variant, "original", tmp_path / "w.safetensors")), expected)
    shards = UNETS["sdxl"].save(tmp_path / "shards", shards="100KB")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 2
    assert same(weights(convert(shards, "original", tmp_path / "s.safetensors")), expected)


def test_two_variants_beside_each_other(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    folder = untidy(folders, tmp_path)
    for path in folder.rglob("*.safetensors"):
        name = path.name.replace(".safetensors", ".fp16.safetensors")
        safetensors.torch.save_file(
            {k: v + 1 for k, v in weights(path).items()}, path.with_name(name), {"format": "pt"}
        )
    plain = weights(convert(folder, "original", tmp_path / "plain.safetensors"))
    other = weights(convert(folder, "original", tmp_path / "fp16.safetensors", variant="fp16"))
    assert all(torch.equal(other[k], plain[k] + 1) for k in plain)
    made = bake(folder, tmp_path / "x.safetensors", "original", variant="fp16").written.path
    assert checked(made, folder).against == "all"


def test_pickled_text_encoders_and_vae(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    expected = weights(dense_of(folders("sdxl")))
    folder = untidy(folders, tmp_path)
    for path, name in (("text_encoder/model", "pytorch_model"), ("text_encoder_2/model", "pytorch_model"),
                       ("vae/diffusion_pytorch_model", "diffusion_pytorch_model")):  # fmt: skip
        old = folder / f"{path}.safetensors"
        torch.save(weights(old), old.with_name(f"{name}.bin"))
        old.unlink()
    assert same(weights(convert(folder, "original", tmp_path / "b.safetensors")), expected)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_a_missing_part_is_said_before_anything_is_written(
    part: str, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = untidy(folders, tmp_path)
    shutil.rmtree(folder / part)
    job = prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))
    assert sum(part in note for note in job.plan.notes) == 1
    made = weights(run(job, Silent()).path)
    prefix = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1.",
              "vae": "first_stage_model."}[part]  # fmt: skip
    assert not any(name.startswith(prefix) for name in made)


def test_a_safety_checker_is_left_out_and_named(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    folder = untidy(folders, tmp_path, "sd15")
    (folder / "safety_checker").mkdir()
    safetensors.torch.save_file({"x": torch.zeros(2)}, folder / "safety_checker/model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    job = prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))
    assert sum("safety_checker" in note for note in job.plan.notes) == 1


def test_names_of_older_and_newer_libraries(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    expected = weights(dense_of(folders("sdxl")))
    folder = untidy(folders, tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(name: str) -> str:
        if ".mid_block.attentions.0." in name:
            for new, before in old.items():
                name = name.replace(new, before)
        return name

    positions = {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    for path, change in (
        ("vae/diffusion_pytorch_model", lambda tensors: {older(k): v for k, v in tensors.items()}),
        ("text_encoder_2/model", lambda tensors: {**tensors, **positions}),
        ("text_encoder/model", lambda tensors: {k if k.startswith("text_model.") else f"text_model.{k}": v
                                                for k, v in tensors.items()}),
    ):  # fmt: skip
        file = folder / f"{path}.safetensors"
        safetensors.torch.save_file(change(weights(file)), file, {"format": "pt"})
    assert same(weights(convert(folder, "original", tmp_path / "x.safetensors")), expected)


def test_a_scheduler_that_says_v_becomes_the_marks_of_the_original_layout(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = untidy(folders, tmp_path)
    path = folder / "scheduler/scheduler_config.json"
    config = {**json.loads(path.read_text()), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    made = bake(folder, tmp_path / "x.safetensors", "original")
    tensors = weights(made.written.path)
    assert (tensors["v_pred"].shape, tensors["ztsnr"].shape) == ((0,), (0,))
    assert made.stamp.prediction == "v-zsnr"
    assert checked(made.written.path, folder).against == "all"
    path.write_text(json.dumps({**config, "_class_name": "EDMEulerScheduler"}))
    with raises(PlanError, "edm"):
        prepare(ConvertRequest(str(folder), "original", tmp_path / "y.safetensors"))
    path.write_text(json.dumps({**config, "prediction_type": "sample"}))
    with raises(PlanError, "other"):
        prepare(ConvertRequest(str(folder), "original", tmp_path / "y.safetensors"))


@pytest.mark.parametrize(("part", "file"), [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_a_component_with_other_layers_is_refused_by_its_key(
    part: str, file: str, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = untidy(folders, tmp_path)
    path = folder / part / f"{file}.safetensors"
    safetensors.torch.save_file({**weights(path), "adapter.weight": torch.zeros(2)}, path, {"format": "pt"})
    with raises(PlanError, "adapter.weight"):
        prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))


def test_weights_that_are_there_twice_are_refused(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    folder = untidy(folders, tmp_path)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    for variant in ("fp16", "bf16"):
        shutil.copy(path, path.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    path.unlink()
    with raises(CheckpointError, "in diffusion_pytorch_model"):
        prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))


@pytest.mark.parametrize("output", ["x", "x.ckpt"])
def test_outputs_of_another_kind_are_refused(output: str, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    with raises(PlanError):
        prepare(ConvertRequest(str(folders("sd15")), "original", tmp_path / output))


def test_a_file_name_for_a_folder_suggests_the_original_layout(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    with raises(PlanError, "x.safetensors") as caught:
        bake(folders("sd15"), tmp_path / "x.safetensors")
    assert "--layout original" in caught.value.hint


def test_a_folder_in_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    with raises(PlanError, "x.safetensors"):
        bake("demo", tmp_path / "x.safetensors", "diffusers")


def test_a_pickle_becomes_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "demo.ckpt"
    torch.save({"state_dict": weights(demo.path())}, path)
    expected = convert(Path("demo"), "diffusers", tmp_path / "plain")
    made = convert(path, "diffusers", tmp_path / "unet")
    assert same(*(weights(folder / "diffusion_pytorch_model.safetensors") for folder in (made, expected)))


def test_the_layout_that_a_base_has_is_not_converted(tmp_path: Path) -> None:
    with raises(OptionError, "--layout original"):
        prepare(ConvertRequest("demo", "original", tmp_path / "x.safetensors"))


def test_baked_files_are_not_converted(tmp_path: Path) -> None:
    made = export(ExportRequest("demo", SIZE, tmp_path / "x.safetensors")).written.path
    with raises(PlanError, "x.safetensors"):
        prepare(ConvertRequest(str(made), "diffusers", tmp_path / "y"))


def test_the_base_is_never_the_output(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    folder = untidy(folders, tmp_path)
    with raises(PlanError):
        prepare(ConvertRequest(str(folder), "original", folder / "x.safetensors", force=True))


def test_an_older_output_is_replaced_only_by_force(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    output = convert(folders("sd15"), "original", tmp_path / "x.safetensors")
    with raises(PlanError):
        convert(folders("sd15"), "original", output)
    convert(folders("sd15"), "original", output, force=True)
    made = bake("demo", tmp_path / "d", "diffusers").written.path
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    bake("demo", tmp_path / "d", "diffusers", force=True)


def test_poa_takes_files_and_bases_of_either_layout(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("sd15")
    dense = dense_of(folder)
    made = bake(folder, tmp_path / "x.safetensors", "original", poa_weight=1.5).written.path
    plain = bake(folder, tmp_path / "plain", poa_weight=1.5).written.path
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768)
    drawn = []
    for source, base in ((plain, folder), (made, folder), (made, dense), (made, None), (plain / "unet", dense)):
        opened = poa.from_baked(source, str(base) if base else None)
        with poa.enabled(unet, opened), torch.no_grad():
            drawn.append(unet(*inputs).sample)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    with raises(PoaError, "hashes to"):
        poa.from_baked(made, str(folders("sd15-other")))


def test_a_thumbnail_is_the_base_s(tmp_path: Path) -> None:
    request = ExportRequest("demo", SIZE, tmp_path / "x", layout="diffusers")
    job = prepare_export(request)
    setup = thumbnail.prepare(job, "a red circle")
    assert setup.opening.kind == "file"


def test_the_default_name_is_the_base_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = export(ExportRequest("demo", SIZE, layout="diffusers"))
    assert made.written.path.name == "demo-crdiff-96x64"


def test_verify_names_what_a_base_of_another_layout_lacks(tmp_path: Path) -> None:
    made = export(ExportRequest("demo", SIZE, tmp_path / "x.safetensors")).written.path
    unet = convert(Path("demo"), "diffusers", tmp_path / "unet") / "diffusion_pytorch_model.safetensors"
    tensors = weights(unet)
    del tensors["conv_norm_out.bias"]
    safetensors.torch.save_file(tensors, unet, {"format": "pt"})
    with raises(PlanError, "conv_norm_out.bias"):
        checked(made, unet.parent)


# damaged and tampered files

LACKING = {
    "sdxl": ("unet", "time_embedding.linear_1.bias", "up_blocks.1.attentions.0.transformer_blocks.1.norm2.weight",
             "mid_block.resnets.1.conv2.bias", "down_blocks.0.downsamplers.0.conv.weight"),
    "sdxl ": ("vae", "decoder.conv_out.weight", "encoder.mid_block.attentions.0.to_q.bias", "post_quant_conv.bias",
              "decoder.up_blocks.3.resnets.1.norm1.weight"),
    " sdxl": ("text_encoder_2", "text_projection.weight", "text_model.encoder.layers.3.self_attn.k_proj.bias",
              "text_model.embeddings.position_embedding.weight"),
    "sd15": ("text_encoder", "encoder.layers.0.mlp.fc1.bias", "final_layer_norm.weight"),
    "flux-dev": ("transformer", "transformer_blocks.3.attn.norm_added_k.weight", "norm_out.linear.bias",
                 "single_transformer_blocks.2.proj_out.bias"),
    "sd3-medium": ("transformer", "pos_embed.pos_embed", "transformer_blocks.5.ff_context.net.2.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKING)
def test_a_missing_tensor_is_refused_by_its_name(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    part, *names = LACKING[case]
    folder = untidy(folders, tmp_path, case.strip())
    (path,) = (folder / part).glob("*.safetensors")
    whole = weights(path)
    for name in names:
        assert name in whole
        safetensors.torch.save_file({k: v for k, v in whole.items() if k != name}, path, {"format": "pt"})
        with raises(PlanError, name):
            prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))


@pytest.mark.parametrize("name", ["out.2.bias", "middle_block.0.in_layers.2.weight", "time_embed.0.weight"])
def test_a_missing_tensor_of_the_original_layout_is_refused(name: str, tmp_path: Path) -> None:
    tensors = weights(demo.path())
    del tensors[f"model.diffusion_model.{name}"]
    base = tmp_path / "demo.safetensors"
    safetensors.torch.save_file(tensors, base, {"format": "pt"})
    with raises(PlanError, name):
        prepare(ConvertRequest(str(base), "diffusers", tmp_path / "x"))


def test_a_missing_shard_of_a_component_is_refused(tmp_path: Path) -> None:
    folder = UNETS["sd15"].save(tmp_path / "shards", shards="8KB")
    shards = sorted((folder / "vae").glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with raises(CheckpointError, shards[-1].name):
        prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))


@pytest.mark.parametrize("hashing", [True, False])
def test_verify_finds_tensors_that_were_cut_out_or_added(
    hashing: bool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders("sd15")
    dense = dense_of(folder)
    made = bake(folder, tmp_path / "x.safetensors", "original", hashing=hashing).written.path
    whole, metadata = weights(made), dict(open_checkpoint(made).metadata)
    vae = {k: v for k, v in whole.items() if not k.startswith("first_stage_model.")}
    for tensors in (vae, {**whole, "foo.bar": torch.ones(2)}, {**whole, "v_pred": torch.zeros(0)}):
        safetensors.torch.save_file(tensors, made, metadata)
        for base in (folder, *((dense,) if "foo.bar" not in tensors else ())):
            with raises(VerifyError):
                checked(made, base)


def test_verify_compares_what_base_and_file_predict(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plain, folder = folders("sdxl"), untidy(folders, tmp_path)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    epsilon = bake(plain, tmp_path / "e.safetensors", "original").written.path
    v = bake(folder, tmp_path / "v.safetensors", "original").written.path
    assert checked(v, folder).against == "all"
    for file, base in ((epsilon, folder), (v, plain)):
        with raises(VerifyError, "predict"):
            checked(file, base)
    tensors, metadata = weights(v), dict(open_checkpoint(v).metadata)
    dense = convert(folder, "original", tmp_path / "dense.safetensors")
    safetensors.torch.save_file({k: t for k, t in tensors.items() if k != "v_pred"}, v, metadata)
    for base in (folder, dense):
        with raises(VerifyError, "v_pred"):
            checked(v, base)


def test_a_configuration_is_compared_with_a_base_of_either_layout(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = dense_of(folders("sd15"))
    made = bake(dense, tmp_path / "x", "diffusers").written.path
    (made / "config.json").write_text("{}")
    for base in (dense, folders("sd15")):
        with raises(VerifyError, "config.json"):
            checked(made, base)


def test_plain_pickles_go_before_a_variant_that_was_not_chosen(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = untidy(folders, tmp_path, "sd15")
    path = folder / "text_encoder/model.safetensors"
    plain = weights(path)
    torch.save(plain, path.with_name("pytorch_model.bin"))
    other = {name: tensor + 1 for name, tensor in plain.items()}
    safetensors.torch.save_file(other, path.with_name("model.fp16.safetensors"), {"format": "pt"})
    path.unlink()
    expected = weights(dense_of(folders("sd15")))
    assert same(weights(convert(folder, "original", tmp_path / "x.safetensors")), expected)


def test_files_of_adapters_beside_the_weights_are_left_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = untidy(folders, tmp_path, "sd15")
    for part in ("text_encoder", "vae"):
        safetensors.torch.save_file({"a": torch.zeros(1)}, folder / part / "adapter_model.safetensors")
    expected = weights(dense_of(folders("sd15")))
    assert same(weights(convert(folder, "original", tmp_path / "x.safetensors")), expected)


def test_a_linked_component_is_in_the_file_and_not_said_to_be_left_out(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = untidy(folders, tmp_path, "sd15")
    (folder / "vae").rename(tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    job = prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors"))
    assert not job.plan.notes
    assert any(tensor.name.startswith("first_stage_model.") for tensor in job.plan.outputs[0].tensors)


def test_a_variant_that_a_component_does_not_have_is_noted(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = untidy(folders, tmp_path, "sd15")
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    job = prepare(ConvertRequest(str(folder), "original", tmp_path / "x.safetensors", variant="fp16"))
    assert [("vae" in note, "text_encoder" in note) for note in job.plan.notes] == [(False, True), (True, False)]


def test_scaled_fp8_and_all_files_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    scaled = Scaled("sd15.original", "scaled_fp8").write(tmp_path / "scaled.safetensors")
    with raises(PlanError, "scaled.safetensors"):
        prepare(ConvertRequest(str(scaled), "diffusers", tmp_path / "x"))
    with raises(OptionError, "--all-files"):
        bake(folders("sd15"), tmp_path / "x.safetensors", "original", all_files=True)


def test_a_pack_of_a_folder_is_for_models_of_either_layout(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder, size = folders("sd15"), Size(512, 768)
    request = create.PackRequest((PlanRequest(str(folder), size, ratio=0.3, poa_weight=1.5),), tmp_path / "p.crdiff")
    pack = create.make(create.prepare_new(request), Silent()).pack.path
    made = bake(folder, tmp_path / "x.safetensors", "original", poa_weight=1.5).written.path
    options = {"config": str(folder), "subfolder": "unet", "local_files_only": True, "torch_dtype": torch.float32}
    unet = diffusers.UNet2DConditionModel.from_single_file(str(dense_of(folder)), **options)
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768)
    with torch.no_grad():
        with poa.enabled(unet, pack, size="512x768"):
            packed = unet(*inputs).sample
        with poa.enabled(unet, made):
            assert torch.equal(packed, unet(*inputs).sample)
        assert not torch.equal(packed, unet(*inputs).sample)
    comfy = {name.removeprefix("model."): tensor for name, tensor in weights(dense_of(folder)).items()}
    assert match.pack_parts(match.find_layers(comfy, open_pack(pack)), open_pack(pack), size, {}).keys() == {
        f"diffusion_model.{target.layer.original[0]}" for target in open_baked(made).plan.targets
    }
