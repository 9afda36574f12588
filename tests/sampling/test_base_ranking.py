"""Thresholds of any ratios from one reading of the weights: they are those of an export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size
from crdiff_export.errors import PlanError
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.weight_file import FileBytes
from crdiff_export.prune.plan import with_ratios
from crdiff_export.sampling import poa
from tests.support import makers
from tests.support.messages import raises

RATIOS = (
    {"down": 0.3, "mid": 0.5, "up": 0.1},
    {"down": 0.0, "mid": 0.999, "up": 0.3},
    {"down": 0.2, "mid": 0, "up": 0},
)


@pytest.mark.parametrize(
    ("table", "dtype"),
    [("sd15.original", "F16"), ("sdxl.diffusers-unet", "F32"), ("sd35-medium.original-transformer", "BF16")],
)
def test_a_count_gives_the_thresholds_of_an_export(table: str, dtype: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table, dtype))
    request = ExportRequest(str(base), Size(512, 512), ratio=0.5)
    plan = plan_variant(request, open_checkpoint(base))
    counted = poa.BaseRanking([plan], base.name)
    for ratios in RATIOS:
        own = ratios if plan.groups != ("blocks",) else {"blocks": ratios["down"] + 0.1}
        source = counted.source(with_ratios(plan, own))
        assert source.masks == poa.from_recipe(replace(request, ratio=None, ratios=own)).masks


def test_half_a_count_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original", "F32"))
    request = ExportRequest(str(base), Size(512, 512), ratio=0.3)
    plan = plan_variant(request, open_checkpoint(base))
    counted = poa.BaseRanking([plan], base.name)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(FileBytes, "read_into", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            counted.source(plan)
    assert counted.source(plan).masks == poa.from_recipe(request).masks


def test_a_weight_that_is_not_finite_matters_only_where_it_is_pruned(tmp_path: Path) -> None:
    tensors = makers.tiny("sd15.original", "F16")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, b"\x00\x7c" + data[2:])
    base = makers.write(tmp_path / "base.safetensors", tensors)
    request = ExportRequest(str(base), Size(512, 512), ratios={"down": 0.3, "mid": 0.0, "up": 0.3})
    plan = plan_variant(request, open_checkpoint(base))
    counted = poa.BaseRanking([plan], base.name)
    assert counted.source(plan).masks == poa.from_recipe(request).masks
    with raises(PlanError, "not finite"):
        counted.source(with_ratios(plan, {"down": 0.3, "mid": 0.1, "up": 0.3}))
