"""Parts of fused tensors that are no squares: each has a threshold of its own, whichever layout the file has.

The oracle cuts the tensors by hand and sorts.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import FamilyError
from crdiff_export.models.families import detect, load_family
from crdiff_export.progress import Silent
from crdiff_export.sampling.comfyui.match import PREFIX, model_parts
from crdiff_export.sampling.poa.masks import prune
from crdiff_export.sampling.poa.source import from_baked
from crdiff_export.verify import open_baked
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import verify
from tests.support import makers
from tests.support.isolation import Crdiff
from tests.support.messages import raises

# Attention of 3 query heads for each key head, with the queries last, and a gate whose halves diffusers keeps apart.
TABLE = """
id = "fused"
title = "Fused"
native = "512x512"
grid = 16

[transformer]
kinds = ["attn", "ff"]
default = ["attn", "ff"]

[transformer.original]
[transformer.diffusers]
"""
TARGETS = (
    ("attn", "layers.{0..1}.attention.qkv.weight", "part = [2, 3, 4]\nof = 5", "layers.{0..1}.attn.to_q.weight"),
    ("attn", "layers.{0..1}.attention.qkv.weight", "part = 0\nof = 5", "layers.{0..1}.attn.to_k.weight"),
    ("attn", "layers.{0..1}.attention.qkv.weight", "part = 1\nof = 5", "layers.{0..1}.attn.to_v.weight"),
    ("ff", "layers.{0..1}.mlp.0.weight", "part = 0\nof = 2", "layers.{0..1}.ff.gate.weight"),
    ("ff", "layers.{0..1}.mlp.0.weight", "part = 1\nof = 2", "layers.{0..1}.ff.up.weight"),
    ("ff", "layers.{0..1}.mlp.2.weight", "", "layers.{0..1}.ff.down.weight"),
)
for kind, original, part, diffusers in TARGETS:
    TABLE += f'\n[[target]]\nkind = "{kind}"\noriginal = "{original}"\n{part}\ndiffusers = "{diffusers}"\n'
# Of a block: the tensor in the original layout, its shape, and the rows and the name of each part in diffusers'.
CUTS = {
    "attention.qkv": ((60, 36), {"attn.to_k": (0, 12), "attn.to_v": (12, 24), "attn.to_q": (24, 60)}),
    "mlp.0": ((104, 36), {"ff.gate": (0, 52), "ff.up": (52, 104)}),
    "mlp.2": ((36, 52), {"ff.down": (0, 36)}),
}
RATIO, LAYOUTS = 0.4, ("original", "diffusers")
Weights = dict[str, NDArray[np.float16]]


def weights(layout: str) -> Weights:
    """Two blocks, the parts of a tensor with scales far apart, so that one threshold would not do for them."""
    rng = np.random.default_rng(11)
    made: Weights = {"norm.weight": rng.standard_normal(36).astype(np.float16)}
    for block in range(2):
        for fused, (shape, cuts) in CUTS.items():
            whole = rng.standard_normal(shape).astype(np.float16).round(1)  # ties
            for scale, (name, (start, stop)) in enumerate(cuts.items(), 1):
                whole[start:stop] *= np.float16(scale)
                made |= {f"layers.{block}.{name}.weight": whole[start:stop]} if layout == "diffusers" else {}
            made |= {f"layers.{block}.{fused}.weight": whole} if layout == "original" else {}
    return made


def expected(dense: Weights) -> tuple[Weights, list[str]]:
    """The pruned weights, and the thresholds in the order of the file."""
    pruned, thresholds = {name: array.copy() for name, array in dense.items()}, []
    for name, whole in pruned.items():
        block, fused = name.removeprefix("layers.")[:1], name[len("layers.0.") : -len(".weight")]
        parts = CUTS[fused][1].values() if fused in CUTS else [(0, len(whole))] if block in "01" else []
        for start, stop in parts:
            cut = whole[start:stop]
            threshold = np.sort(np.abs(cut), axis=None)[int(cut.size * RATIO) - 1]
            cut[np.abs(cut) <= threshold] = 0
            thresholds.append(float(threshold).hex())
    return pruned, thresholds


def written(path: Path, arrays: Mapping[str, NDArray[np.float16]]) -> Path:
    return makers.write(path, {name: ("F16", array.shape, array.tobytes()) for name, array in arrays.items()})


@pytest.fixture
def table(here: Path) -> Path:
    (here / "own.toml").write_text(TABLE)
    return here / "own.toml"


def baked(table: Path, layout: str) -> Path:
    base = written(table.with_name(f"{layout}.safetensors"), weights(layout))
    output = table.with_name(f"{layout}-out.safetensors")
    export(ExportRequest(str(base), Size(256, 256), output, family=table, ratio=RATIO, residual="sidecar"))
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_part_has_a_threshold_of_its_own(table: Path, layout: str) -> None:
    output = baked(table, layout)
    base, (pruned, thresholds) = table.with_name(f"{layout}.safetensors"), expected(weights(layout))
    assert {name: data for name, (_, _, data) in makers.read(output).items()} == {
        name: array.tobytes() for name, array in pruned.items()
    }
    assert json.loads(makers.metadata_of(output)["crdiff.thresholds"]) == thresholds
    assert verify(output, str(base), Silent()).against == "all"
    restore(output, table.with_name("back.safetensors"))
    assert table.with_name("back.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_poa_and_comfyui_prune_either_layout_by_a_file_of_either(table: Path, layout: str) -> None:
    output = baked(table, layout)
    masks, loaded = from_baked(output).masks, {name: torch.from_numpy(w) for name, w in weights("diffusers").items()}
    pruned = expected(weights("diffusers"))[0]
    assert masks.diffusers.keys() == pruned.keys() - {"norm.weight"}
    for name, parts in masks.diffusers.items():
        assert torch.equal(prune(loaded[name], parts), torch.from_numpy(pruned[name])), name
    comfyui = {PREFIX + name: torch.from_numpy(weight) for name, weight in weights("original").items()}
    fused = expected(weights("original"))[0]
    parts_of = model_parts(comfyui, open_baked(output))
    assert parts_of.keys() == {PREFIX + name for name in fused if name != "norm.weight"}
    for name, parts in parts_of.items():
        assert torch.equal(prune(comfyui[name], parts), torch.from_numpy(fused[name.removeprefix(PREFIX)])), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_of_parts_are_counted(table: Path, layout: str, crdiff: Crdiff) -> None:
    written(table.with_name("base.safetensors"), weights(layout))
    ran = crdiff(*shlex.split("families validate own.toml base.safetensors --json"))
    assert ran.result["would_prune"] == {"blocks": {"layers": 12, "weights": 2 * (60 * 36 + 104 * 36 + 36 * 52)}}


@pytest.mark.parametrize("rows", [61, 59, 4])
def test_rows_that_are_not_equal_blocks_are_refused(table: Path, rows: int) -> None:
    shapes = {name: array.shape for name, array in weights("original").items()}
    name = "layers.1.attention.qkv.weight"
    with raises(FamilyError, f"{name} has shape [{rows}, 36]", "5 equal blocks"):
        detect(shapes | {name: (rows, 36)}, load_family(table))
