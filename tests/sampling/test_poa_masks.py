"""What the masks of POA say of weights in memory, against files, converters that are not ours, and brute force."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils as converters
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import PoaError
from crdiff_export.export import plan_variant
from crdiff_export.formats import dtypes
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.dtypes import Encoding, torch_dtypes
from crdiff_export.models import demo
from crdiff_export.models.families import by_id
from crdiff_export.prune.criteria import Decision, Mask
from crdiff_export.prune.threshold import Threshold
from crdiff_export.sampling.poa import Schedule, from_baked, mix
from crdiff_export.sampling.poa.handle import Poa
from crdiff_export.sampling.poa.masks import MaskPart, Masks, Part, ReplacedWeights, ThresholdPart, holds, prune
from tests.support import makers

PREFIX = "model.diffusion_model."


def unet_config(table: str) -> dict[str, Any]:
    levels = 3 if table == "sdxl" else 4
    types = ["CrossAttnDownBlock2D"] * levels
    added = {"class_embed_type": None, "addition_embed_type": "text_time"} if "sdxl" in table else {}
    return {
        "layers_per_block": 2,
        "down_block_types": types,
        "up_block_types": types,
        "class_embed_type": None,
        **added,
    }


def converted(table: str, path: Path) -> dict[str, torch.Tensor]:
    """The weights by diffusers' names, as diffusers converts them."""
    weights = safetensors.torch.load_file(path)
    if table.startswith("sd3"):
        result = converters.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    else:
        result = converters.convert_ldm_unet_checkpoint(weights, unet_config(table))
    assert isinstance(result, dict)
    return result


BLOCKS = ("ff", "attn")


@pytest.mark.parametrize(
    ("table", "dtype", "targets"),
    [
        ("sd15.original", "F32", None), ("sd21.original", "BF16", None), ("sdxl.original", "F16", None),
        ("sdxl-refiner.original", "BF16", None), ("sd3-medium.original-transformer", "F32", BLOCKS),
        ("sd35-medium.original-transformer", "F16", (*BLOCKS, "attn2")),
        ("sd35-large.original-transformer", "BF16", None), ("flux-dev.original-transformer", "F16", BLOCKS),
        ("flux-dev.original-transformer", "F32", BLOCKS),
    ],
)  # fmt: skip
def test_they_fit_an_original_file_and_what_diffusers_makes_of_it(
    table: str, dtype: str, targets: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """Pruned by the masks, the base is the baked file; so are both as diffusers converts them.

    Parts of fused tensors have thresholds of their own.
    """
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table, dtype))
    output = export(ExportRequest(str(base), Size(512, 512), tmp_path / "out.safetensors", ratio=0.4, targets=targets))
    masks = from_baked(output.written.path).masks
    dense, pruned = safetensors.torch.load_file(base), safetensors.torch.load_file(output.written.path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in dense) else ""
    for name, weight in dense.items():
        parts = masks.original.get(name.removeprefix(prefix), ())
        assert torch.equal(prune(weight, parts) if parts else weight, pruned[name]), name
    if table.startswith("flux"):  # diffusers converts it in its real width only
        return
    dense, pruned = converted(table, base), converted(table, output.written.path)
    assert masks.diffusers.keys() == {name for name in dense if not torch.equal(dense[name], pruned[name])}
    for name, parts in masks.diffusers.items():
        assert torch.equal(prune(dense[name], parts), pruned[name]), name


def whole(part: Part) -> Part:
    """A cut of a fused weight's part as one of a weight of its own."""
    assert isinstance(part, ThresholdPart)
    return replace(part, start=0, stop=part.stop - part.start)


def test_either_layout_of_flux_gives_the_same_masks(tmp_path: Path) -> None:
    """The names and parts of FLUX.1 in diffusers, written down again."""
    tensors = makers.tiny("flux-dev.original-transformer", "F32")
    base = makers.write(tmp_path / "base.safetensors", tensors)
    output = export(ExportRequest(str(base), Size(512, 512), tmp_path / "out.safetensors", ratio=0.4,
                                  targets=("ff", "attn")))  # fmt: skip
    masks = from_baked(output.written.path).masks
    expected: dict[str, Part] = {}
    for i in range(19):
        block, single = f"double_blocks.{i}.img_", f"transformer_blocks.{i}."
        qkv = masks.original[f"{block}attn.qkv.weight"]
        expected |= {f"{single}attn.to_{x}.weight": whole(cut) for x, cut in zip("qkv", qkv, strict=True)}
        expected[f"{single}attn.to_out.0.weight"] = whole(masks.original[f"{block}attn.proj.weight"][0])
        expected[f"{single}ff.net.0.proj.weight"] = whole(masks.original[f"{block}mlp.0.weight"][0])
        expected[f"{single}ff.net.2.weight"] = whole(masks.original[f"{block}mlp.2.weight"][0])
    for i in range(38):
        parts = masks.original[f"single_blocks.{i}.linear1.weight"]
        own = f"single_transformer_blocks.{i}.attn.to_"
        expected |= {f"{own}{x}.weight": whole(cut) for x, cut in zip("qkv", parts, strict=True)}
    assert {name: cuts[0] for name, cuts in masks.diffusers.items()} == expected


# Parts of weights.


def bits(gone: np.ndarray[Any, Any], start: int = 0, dtype: str = "F32") -> MaskPart:
    return MaskPart(start, start + gone.size, dtype, torch.from_numpy(Mask.pack(gone).bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (17, 31), (64, 40)])
def test_a_bit_decides(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The same in new memory, in memory that is there, and by NumPy; signs, infinities and NaN of what stays, too."""
    rng = np.random.default_rng(shape)
    weight = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    flat = weight.view(-1)
    flat[0], flat[-1] = float("nan"), float("-inf")
    gone = rng.random(shape) < 0.4
    for first, last in ((False, False), (True, True)):
        gone.flat[0], gone.flat[-1] = first, last
        part = bits(gone)
        expected = torch.from_numpy(np.where(gone, 0.0, weight.double().numpy())).to(dtype)
        room = torch.full(shape, 7.0, dtype=dtype)
        for result in (part.rule(dtype)(weight, None), part.rule(dtype)(weight, room), prune(weight, (part,))):
            assert result.equal(expected) or (result.isnan() == expected.isnan()).all()
            assert torch.equal(result.nan_to_num(), expected.nan_to_num())
            assert (
                result.view(-1).view(torch.uint8).view(-1, weight.itemsize)[torch.from_numpy(gone).view(-1)] == 0
            ).all()
        assert part.rule(dtype)(weight, room) is room


def test_a_mask_on_a_weight_that_is_not_contiguous() -> None:
    weight = torch.randn(12, 8).t()
    gone = np.random.default_rng(0).random((8, 12)) < 0.5
    expected = torch.where(torch.from_numpy(gone), 0.0, weight)
    assert torch.equal(bits(gone).rule(torch.float32)(weight, None), expected)
    assert torch.equal(bits(gone).rule(torch.float32)(weight, torch.empty(8, 12)), expected)


def test_parts_of_a_fused_weight() -> None:
    weight = torch.randn(9, 3)
    gone = np.random.default_rng(1).random((3, 9)) < 0.5
    own = torch.randn(9)
    parts = (bits(gone[0].ravel()), ReplacedWeights(9, 18, "F32", own))
    result = prune(weight, parts)
    assert torch.equal(result[:3], torch.where(torch.from_numpy(gone[0].reshape(3, 3)), 0.0, weight[:3]))
    assert torch.equal(result[3:6].reshape(-1), own)
    assert torch.equal(result[6:], weight[6:])
    alone = prune(weight[:3], (ReplacedWeights(0, 9, "F32", own),))
    alone += 1
    assert not torch.equal(alone.reshape(-1), own), "what prune gives is a new tensor"


def test_gradients_go_through_a_mask() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    gone = np.random.default_rng(2).random((4, 6)) < 0.5
    (grad,) = torch.autograd.grad(bits(gone).rule(torch.float32)(weight, None).sum(), weight)
    assert torch.equal(grad, (~torch.from_numpy(gone)).float())


def test_a_mask_is_known_by_what_it_holds() -> None:
    gone = np.random.default_rng(3).random(100) < 0.5
    other = gone.copy()
    other[50] ^= True
    assert repr(bits(gone)) == repr(bits(gone.copy())) != repr(bits(other))
    one, two = torch.zeros(4), torch.ones(4)
    assert (
        repr(ReplacedWeights(0, 4, "F32", one))
        == repr(ReplacedWeights(0, 4, "F32", one.clone()))
        != repr(ReplacedWeights(0, 4, "F32", two))
    )


def test_nothing_is_made_of_layers_that_stay() -> None:
    """A decision has None for them."""
    plan = plan_variant(ExportRequest("demo", Size(96, 64), ratios={"down": 0.0, "mid": 0.5, "up": 0.0}),
                        open_checkpoint(demo.path()))  # fmt: skip
    rng = np.random.default_rng(0)
    masks = tuple(
        Mask.pack(rng.random(target.count) < 0.5) if target.layer.group == "mid" else None for target in plan.targets
    )
    result = Masks.of(plan, Decision(tuple(Threshold(None, 0, s.count) for s in plan.scopes), masks))
    assert {name.partition(".")[0] for name in result.diffusers} == {"mid_block"}
    assert len(result.original) == sum(target.layer.group == "mid" for target in plan.targets)


LOADED = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def rankings(draw: st.DrawFn) -> tuple[str, int]:
    """A dtype and a magnitude of it."""
    dtype = draw(st.sampled_from(sorted(dtypes.FORMATS)))
    pattern = draw(st.integers(0, dtypes.FORMATS[dtype].first_nonfinite - 1))
    return dtype, pattern if dtype == "F32" else int(dtypes.patterns(dtype)[pattern])


@given(rankings(), st.sampled_from(LOADED), st.lists(st.floats(width=32, allow_nan=False), max_size=8))
def test_a_limit_goes_with_the_rounding_of_a_cast(
    ranking: tuple[str, int], loaded: torch.dtype, values: list[float]
) -> None:
    """Cast to fewer bits, the threshold is cast along; with more bits, what rounds to at most the threshold goes."""
    dtype, bits = ranking
    cut, threshold = ThresholdPart(0, 1, bits, dtype), torch.tensor(dtypes.value(bits))
    assume(threshold.to(loaded).isfinite())
    assume(
        dtype == "F32" or dtypes.patterns(dtype)[Encoding(dtype).limit(dtypes.value(bits)) + 1] < dtypes.INFINITY
    )  # the largest of all
    limit = cut.limit(loaded)
    assert torch.tensor(limit, dtype=loaded).item() == limit
    around = [torch.nextafter(torch.tensor(limit), torch.tensor(to)) for to in (-math.inf, math.inf)]
    weights = torch.tensor([float(threshold), limit, *map(float, around), *values, *(v / 1e30 for v in values)])
    weights = weights.to(loaded)
    weights = weights[weights.isfinite()]
    seen = weights.float().to(torch_dtypes()[dtype]).float() if holds(loaded, dtype) else weights.float()
    bound = threshold if holds(loaded, dtype) else threshold.to(loaded).float()
    kept = weights[(seen.abs() > bound) | ~seen.isfinite()]
    result = prune(weights, (replace(cut, stop=len(weights)),))
    assert torch.equal(result[result != 0], kept)


def test_what_is_pruned_is_positive_zero_and_what_is_not_finite_stays() -> None:
    weights = torch.tensor([0.5, -0.5, -0.0, math.nan, math.inf, -math.inf, 0.75, -0.5000001])
    result = prune(weights, (ThresholdPart(0, 8, dtypes.bits(0.5), "F32"),))
    assert result.view(torch.int32).tolist()[:3] == [0, 0, 0]
    assert result[3].isnan()
    assert result[4:].tolist() == weights[4:].tolist()


@given(st.floats(-4, 4), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_mix_is_the_formula(weight: float, dtype: torch.dtype) -> None:
    dense, pruned = torch.randn(2, 64).to(dtype)
    expected = ((1 - weight) * dense.float() + weight * pruned.float()).to(dtype)
    result = mix(dense, pruned, weight)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_the_ends_of_the_mix_are_the_predictions_themselves() -> None:
    dense, pruned = nn.Parameter(torch.tensor([math.inf, 1.0])), torch.tensor([2.0, math.nan])
    assert mix(dense, pruned, 0) is dense
    assert mix(dense, pruned, 1) is pruned


@pytest.mark.parametrize(
    ("family", "timesteps"),
    [
        ("sd15", [999.0, 500.0, 1.0]),
        ("flux-dev", [0.999, 0.5, 0.001]),
        ("lumina-2", [0.001, 0.5, 0.999]),
        ("cosmos2-2b", [80 / 81, 2 / 3, 1 / 11]),
    ],
)
def test_the_step_is_told_by_the_timestep_as_each_pipeline_gives_it(family: str, timesteps: list[float]) -> None:
    config = SimpleNamespace(num_train_timesteps=1000)
    pipe = SimpleNamespace(
        scheduler=SimpleNamespace(
            config=config, timesteps=torch.tensor([999.0, 500.0, 1.0]), sigmas=torch.tensor([80.0, 2.0, 0.1, 0.0])
        )
    )
    handle: Any = SimpleNamespace(_pipe=lambda: pipe, _time=by_id(family).time)
    done = [Poa._fraction(handle, (), {"timestep": torch.tensor([timestep])}) for timestep in timesteps]
    assert done == [0, 1 / 3, 2 / 3]


def test_a_schedule() -> None:
    assert Schedule(1.5).constant == 1.5
    assert Schedule(1.5, stop=0.5).constant is None
    half = Schedule(lambda fraction: 2 * fraction, 0.25, 0.75)
    assert [half.at(step / 8) for step in range(8)] == [0, 0, 0.5, 0.75, 1.0, 1.25, 0, 0]
    with pytest.raises(PoaError, match="the POA weight is 'two'"):
        Schedule(lambda _: "two").at(0)  # type: ignore[arg-type, return-value]
