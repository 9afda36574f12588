"""Scaled fp8: every spelling and code against the oracle, and everything that is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CheckpointError, CrdiffError, PlanError, PreviewError, VerifyError
from crdiff_export.evaluate.preview import PreviewRequest, preview
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.progress import Silent
from crdiff_export.prune.criteria.reading import to_weights
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import open_targets
from crdiff_export.sampling.poa import from_baked, from_recipe
from crdiff_export.sampling.poa.masks import prune
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import verify
from tests.support import makers, masking, oracle
from tests.support.hostile_weights import DIT_RATIOS, UNET_RATIOS
from tests.support.messages import raises
from tests.support.scaled_models import FUSED, METADATA, SPELLINGS, UNET, Scaled, number

LAYER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def bake(base: Path, **asked: Any) -> Path:
    asked.setdefault("ratios", UNET_RATIOS)
    request = ExportRequest(str(base), Size(96, 64), base.with_name("out.safetensors"), force=True, **asked)
    return export(request).written.path


def expected(scaled: Scaled, table: str = UNET) -> oracle.Expected:
    ratios, dit = (DIT_RATIOS, True) if table == FUSED else (UNET_RATIOS, False)
    return oracle.expect([scaled.tensors], ratios, ("attn", "ff"), dit=dit, scales=scaled.scales)


# Exactness


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("table", "plain"),
    [(UNET, ()), (UNET, ("F32", "F16", "BF16")), (UNET, ("F8_E4M3", "F16")), (FUSED, ()), (FUSED, ("F32", "BF16"))],
)
def test_codes_with_scales_are_ranked_as_their_numbers(
    spelling: str, table: str, plain: Sequence[str], tmp_path: Path
) -> None:
    """Every byte, threshold and count; a group's threshold spans layers with other scales and without one."""
    scaled = Scaled(table, spelling, plain)
    base = scaled.write(tmp_path / "base.safetensors")
    ratios = DIT_RATIOS if table == FUSED else UNET_RATIOS
    output = bake(base, ratios=ratios, targets=("attn", "ff"))
    oracle.hold(base, output, expected(scaled, table))
    header = makers.metadata_of(output)
    assert (header["crdiff.schema"], header["crdiff.scaled"]) == ("2", "true")
    verify(output, None, Silent())
    assert verify(output, str(base), Silent()).against == "all"


@pytest.mark.parametrize("seed", range(3))
def test_the_pruned_file_is_the_pruned_base(seed: int, tmp_path: Path) -> None:
    """Dequantised exactly, weights above the threshold are the base's, and all others are zero."""
    scaled = Scaled(UNET, "metadata", seed=seed)
    base = scaled.write(tmp_path / "base.safetensors")
    output = makers.read(bake(base))
    thresholds = dict(zip(UNET_RATIOS, expected(scaled).thresholds, strict=True))
    for piece in expected(scaled).slices:
        dense, pruned = (
            oracle.decode(dtype, data) * scaled.scales[piece.tensor]
            for dtype, _, data in (scaled.tensors[piece.tensor], output[piece.tensor])
        )
        assert np.array_equal(np.where(np.abs(dense) > thresholds[piece.group], dense, 0.0), pruned)


def test_every_code_and_extreme_scales(tmp_path: Path) -> None:
    """All 256 codes, NaN and infinities too, with the smallest, the largest and odd scales."""
    scaled = Scaled(UNET, "metadata")
    values = [2.0**-149, float(oracle.FLOAT32_MAX), 1.0, float(np.float32(0.1)), 2.0**-126 * 1.5, 3.0**15]
    for turn, name in enumerate(scaled.scales):
        code, shape, _ = scaled.tensors[name]
        every = np.resize(np.arange(256, dtype=np.uint8), int(np.prod(shape)))
        scaled.tensors[name] = code, shape, every.tobytes()
        scaled.scales[name] = values[turn % len(values)]
        scaled.tensors[f"{name.removesuffix('.weight')}.weight_scale"] = "F32", (), number("F32", scaled.scales[name])
    base = scaled.write(tmp_path / "base.safetensors")
    output = bake(base, allow_nonfinite=True)
    oracle.hold(base, output, expected(scaled))
    verify(output, str(base), Silent())


def test_shards_have_their_scales_elsewhere(tmp_path: Path) -> None:
    """A weight and its scale may lie in two files."""
    scaled = Scaled(UNET, "comfy_quant")
    ordered = sorted(scaled.tensors.items(), key=lambda item: not item[0].endswith(".weight_scale"))
    index = makers.write_shards(tmp_path / "base", dict(ordered), 3)
    folder = export(ExportRequest(str(index), Size(96, 64), tmp_path / "out", ratios=UNET_RATIOS)).written.path
    shards = sorted(folder.parent.glob("*.safetensors") if folder.is_file() else folder.glob("*.safetensors"))
    content = {name: data for shard in shards for name, (_, _, data) in makers.read(shard).items()}
    assert content == expected(scaled).files[0]


def test_one_scale_of_1_is_plain_fp8(tmp_path: Path) -> None:
    scaled = Scaled(UNET, "scaled_fp8")
    for name in scaled.scales:
        scaled.tensors[f"{name.removesuffix('.weight')}.scale_weight"] = "F32", (), number("F32", 1.0)
    plain = {name: tensor for name, tensor in scaled.tensors.items() if "scale" not in name}
    one = makers.read(bake(scaled.write(tmp_path / "base.safetensors")))
    other = makers.read(bake(makers.write(tmp_path / "plain.safetensors", plain)))
    assert {name: one[name] for name in other} == other


def test_a_quantised_text_encoder_does_not_matter(tmp_path: Path) -> None:
    """Its marker is its own: the UNet's weights are plain, and the header is of schema 1."""
    tensors = makers.tiny(UNET, "F16") | {
        "cond_stage_model.scaled_fp8": ("F8_E4M3", (0,), b""),
        "cond_stage_model.a.weight": ("F8_E4M3", (4, 2), bytes(8)),
        "cond_stage_model.a.scale_weight": ("F32", (), number("F32", 0.5)),
    }
    header = makers.metadata_of(bake(makers.write(tmp_path / "base.safetensors", tensors)))
    assert header["crdiff.schema"] == "1"
    assert "crdiff.scaled" not in header


# What is refused


def replaced(name: str, *tensor: Any) -> Callable[[Scaled], None]:
    def change(scaled: Scaled) -> None:
        scaled.tensors[f"{LAYER}.{name}"] = tensor

    return change


def without(*names: str) -> Callable[[Scaled], None]:
    def change(scaled: Scaled) -> None:
        for name in names:
            del scaled.tensors[name if "." in name else f"{LAYER}.{name}"]

    return change


def form(text: str) -> Callable[[Scaled], None]:
    raw = text.encode()
    return replaced("comfy_quant", "U8", (len(raw),), raw)


def header(text: str) -> Callable[[Scaled], None]:
    def change(scaled: Scaled) -> None:
        scaled.metadata[METADATA] = text

    return change


REFUSED: list[tuple[str, Callable[[Scaled], None], str]] = [
    ("comfy_quant", replaced("weight_scale", "F32", (8, 1), bytes(32)), "weight_scale"),
    ("comfy_quant", form('{"format": "float8_e5m2", "convrot": true}'), "convrot"),
    ("metadata", header('{"layers": {"' + LAYER + '": {"format": "float8_e5m2", "rotate": 1}}}'), "rotate"),
    ("comfy_quant", replaced("weight_scale_inv", "F32", (), number("F32", 1.0)), "weight_scale_inv"),
    ("comfy_quant", replaced("weight_zero_point", "F32", (), number("F32", 1.0)), "weight_zero_point"),
    ("scaled_fp8", replaced("weight.scale", "F32", (), number("F32", 1.0)), "weight.scale"),
    ("metadata", replaced("lora_A.weight", "F16", (1, 8), bytes(16)), "lora_A.weight"),
    ("comfy_quant", replaced("weight_scale", "F32", (0,), b""), "weight_scale"),
    ("comfy_quant", replaced("weight_scale", "F64", (), bytes(8)), "weight_scale"),
    ("comfy_quant", replaced("weight_scale", "U8", (1,), b"\1"), "weight_scale"),
    ("comfy_quant", replaced("weight_scale", "F32", (), number("F32", 0.0)), "weight_scale"),
    ("comfy_quant", replaced("weight_scale", "F32", (), number("F32", -1.0)), "weight_scale"),
    ("comfy_quant", replaced("weight_scale", "F32", (), number("F32", float("nan"))), "weight_scale"),
    ("comfy_quant", replaced("weight_scale", "F32", (), number("F32", float("inf"))), "weight_scale"),
    ("comfy_quant", without("weight_scale"), "weight_scale"),
    ("comfy_quant", without("comfy_quant"), "comfy_quant"),
    ("comfy_quant", form('{"format": "nvfp4"}'), "nvfp4"),
    ("comfy_quant", form('{"format": "mxfp8", "group_size": 32}'), "mxfp8"),
    ("comfy_quant", form('{"format": "float8_e4m3fn"}'), "F8_E5M2"),
    ("comfy_quant", form('{"format": ["float8_e4m3fn"]}'), LAYER),
    ("comfy_quant", form("{}"), LAYER),
    ("comfy_quant", form("float8_e4m3fn"), "comfy_quant"),
    ("comfy_quant", form('{"format": "float8_e5m2", "format": "nvfp4"}'), "comfy_quant"),
    ("comfy_quant", replaced("comfy_quant", "U8", (1 << 17,), bytes(1 << 17)), "comfy_quant"),
    ("comfy_quant", header('{"layers": {"' + LAYER + '": {"format": "int8_tensorwise"}}}'), "int8_tensorwise"),
    ("metadata", header('{"layers": {}}'), METADATA),
    ("metadata", header('{"layers": []}'), METADATA),
    ("metadata", header("[]"), METADATA),
    ("scaled_fp8", without("model.diffusion_model.scaled_fp8"), "scaled_fp8"),
    ("scaled_fp8", replaced("weight_scale", "F32", (), number("F32", 1.0)), "weight_scale"),
    ("scaled_fp8", replaced("weight", "F16", (8, 8), bytes(128)), "F16"),
    ("scaled_fp8", header('{"layers": {}}'), "scaled_fp8"),
]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (UNET, f"{LAYER}.weight"),
        ("flux-dev.original-transformer", "double_blocks.0.img_mlp.0.weight"),
        ("qwen-image.diffusers-transformer", "transformer_blocks.0.img_mlp.net.0.proj.weight"),
    ],
)
@pytest.mark.parametrize("spelling", ["comfy_quant", "metadata"])
def test_packed_weights_are_called_so_and_not_damaged(table: str, name: str, spelling: str, tmp_path: Path) -> None:
    """Two numbers of nvfp4 are in one byte, so their tensor is narrower than the layer."""
    tensors, layer = makers.tiny(table, "F16"), name.removesuffix(".weight")
    _, (rows, columns), _ = tensors[name]
    text = '{"format": "nvfp4"}'
    tensors[name] = "U8", (rows, columns // 2), bytes(rows * columns // 2)
    tensors[f"{layer}.weight_scale"] = "F8_E4M3", (rows, 2), bytes(rows * 2)
    tensors[f"{layer}.weight_scale_2"] = "F32", (), number("F32", 1.0)
    metadata = {"format": "pt"}
    if spelling == "metadata":
        metadata[METADATA] = '{"layers": {"' + layer + '": ' + text + "}}"
    else:
        tensors[f"{layer}.comfy_quant"] = "U8", (len(text),), text.encode()
    with raises(PlanError, "base.safetensors", name, "nvfp4"):
        bake(makers.write(tmp_path / "base.safetensors", tensors, metadata), ratios={}, ratio=0.3)


@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3"])
@pytest.mark.parametrize("tail", ["lora_A.default.weight", "lora_down.weight", "weight_scale_inv"])
def test_a_plain_weight_with_more_beside_it_is_refused(dtype: str, tail: str, tmp_path: Path) -> None:
    """LoRA weights that were not merged, or fp8 scales under an unknown name."""
    tensors = makers.tiny(UNET, dtype if dtype == "F16" else None)
    name = f"{LAYER}.weight"
    if dtype != "F16":
        _, shape, _ = tensors[name]
        tensors[name] = dtype, shape, makers.weights(name, dtype, shape)
    tensors[f"{LAYER}.{tail}"] = "F32", (1, 1), number("F32", 1.0)
    with raises(PlanError, "base.safetensors", tail):
        bake(makers.write(tmp_path / "base.safetensors", tensors))


@pytest.mark.parametrize(("spelling", "change", "key"), REFUSED)
def test_other_quantisations_are_refused(
    spelling: str, change: Callable[[Scaled], None], key: str, tmp_path: Path
) -> None:
    scaled = Scaled(UNET, spelling)
    change(scaled)
    base = scaled.write(tmp_path / "base.safetensors")
    with raises(PlanError, "base.safetensors", key):
        bake(base)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_cast_obs_and_drawing_are_refused(tmp_path: Path) -> None:
    """A cast would change codes, obs moves weights, and diffusers does not open such files."""
    base = Scaled(UNET, "metadata").write(tmp_path / "base.safetensors")
    with raises(PlanError, "--dtype"):
        bake(base, dtype="fp16")
    with raises(PreviewError, "base.safetensors", METADATA):
        preview(PreviewRequest(str(base), ("a",), size=Size(96, 64), ratio=0.3))
    choice = CriterionChoice.of("obs", masking.write_calibration(tmp_path / "obs.safetensors", {}, {}, "demo"))
    with raises(PlanError, "base.safetensors", "obs"):
        plan_variant(ExportRequest(str(base), Size(96, 64), ratio=0.3), open_checkpoint(base), choice)
    encoder = makers.tiny(UNET, "F16") | {"cond_stage_model.a.scale_weight": ("F32", (), bytes(4))}
    beside = makers.write(tmp_path / "beside.safetensors", encoder)
    with raises(PlanError, "--dtype", "cond_stage_model.a.scale_weight"):
        bake(beside, dtype="fp16")


def test_scores_are_of_the_numbers(tmp_path: Path) -> None:
    """Other criteria rank by code times scale, and the zeros of the file are their mask."""
    scaled = Scaled(UNET, "metadata")
    base = scaled.write(tmp_path / "base.safetensors")
    request = ExportRequest(str(base), Size(96, 64), ratios=UNET_RATIOS, criterion="random")
    plan = plan_variant(request, open_checkpoint(base))
    with open_targets(plan.checkpoint) as read:
        for target in plan.targets:
            name = target.source.name
            values = to_weights(target, read(target), torch.device("cpu")).values.double().flatten().numpy()
            exact = oracle.decode(*scaled.tensors[name][::2]) * scaled.scales[name]
            assert np.array_equal(values, exact.astype(np.float32)), name
    output = bake(base, criterion="random")
    assert verify(output, str(base), Silent()).against == "all"


# Reading it back


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scaled, Path, Path]:
    """A scaled checkpoint, its base and a file with a residual."""
    scaled = Scaled(UNET, "scaled_fp8", ("F16",))
    base = scaled.write(tmp_path_factory.mktemp("scaled") / "base.safetensors")
    return scaled, base, bake(base, residual="embed")


def test_restore_gives_the_base(case: tuple[Scaled, Path, Path], tmp_path: Path) -> None:
    _, base, output = case
    restored = restore(output, tmp_path / "restored.safetensors", Silent())
    assert restored.path.read_bytes() == base.read_bytes()


def test_inspect_names_the_quantisation(case: tuple[Scaled, Path, Path]) -> None:
    for path in case[1:]:
        assert "scaled fp8" in dict(inspect(path).facts())["quantised"]


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("crdiff.scaled", None, VerifyError),
        ("crdiff.scaled", "yes", CheckpointError),
        ("crdiff.threshold.mid", "0x1.0000000000000p+1024", CheckpointError),
        ("crdiff.threshold.mid", "0x1.8p-3", VerifyError),
    ],
)
def test_a_header_that_contradicts_its_layers(
    key: str, text: str | None, kind: type[CrdiffError], case: tuple[Scaled, Path, Path], tmp_path: Path
) -> None:
    changed = makers.said(case[2], {key: text}, tmp_path / "changed.safetensors")
    with raises(kind, "changed.safetensors"):
        verify(changed, None, Silent())


def test_plain_layers_do_not_say_scaled(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(UNET, "F16"))
    changed = makers.said(bake(base), {"crdiff.scaled": "true", "crdiff.schema": "2"}, tmp_path / "changed.safetensors")
    with raises(VerifyError, "crdiff.scaled"):
        verify(changed, None, Silent())


# POA


def dequantised(scaled: Scaled, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight as loaders dequantise it: both factors in the dtype of the model."""
    stored, shape, data = scaled.tensors[name]
    code = torch.from_numpy(oracle.decode(stored, data)).reshape(shape).to(dtype)
    return code * torch.tensor(scaled.scales.get(name, 1.0)).to(dtype)


def test_poa_takes_the_mask_of_the_file(case: tuple[Scaled, Path, Path]) -> None:
    """Whatever a loader rounds to: the pruned weights are the dense ones with the file's zeros."""
    scaled, base, output = case
    baked = makers.read(output)
    request = ExportRequest(str(base), Size(96, 64), ratios=UNET_RATIOS)
    for source in (from_baked(output), from_recipe(request)):
        for name in scaled.scales:
            dense = dequantised(scaled, name, torch.bfloat16)
            parts = source.masks.original[name.removeprefix("model.diffusion_model.")]
            zeros = torch.from_numpy(oracle.decode(baked[name][0], baked[name][2]) == 0).reshape(dense.shape)
            assert torch.equal(prune(dense, parts), dense.masked_fill(zeros, 0.0)), name
