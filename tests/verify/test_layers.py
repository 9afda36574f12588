"""Zeros of every layer, compared with an independent count, in every dtype and layout."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CheckpointError, FamilyError, PlanError
from crdiff_export.models.families import all_families, by_id
from crdiff_export.progress import Silent
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.layers import LayerZeros, count_zeros, group_zeros
from crdiff_export.verify.weight_reader import PIECE, read_pieces
from tests.support import makers, oracle
from tests.support.hostile_weights import DIT_RATIOS, UNET_RATIOS
from tests.support.messages import raises
from tests.support.scaled_models import FUSED, SPELLINGS, UNET, Scaled

INDEX = "shards/diffusion_pytorch_model.safetensors.index.json"


def count(path: Path) -> tuple[LayerZeros, ...]:
    return count_zeros(inspect(path), Silent())


def expected(tensors: makers.Tensors, *, dit: bool) -> dict[str, tuple[int, int]]:
    """The weights and zeros of each layer, from numbers that the oracle decodes."""
    ratios = DIT_RATIOS if dit else UNET_RATIOS
    plain = {name: ("F16", shape, bytes(2 * int(np.prod(shape)))) for name, (_, shape, _) in tensors.items()}
    answer = {}
    for piece in oracle.expect([plain], ratios, ("attn", "ff"), dit=dit).slices:
        dtype, shape, data = tensors[piece.tensor]
        numbers = oracle.decode(dtype, data)[piece.start : piece.stop]
        columns = shape[1]
        rows = f"[{piece.start // columns}:{piece.stop // columns}]"
        name = piece.tensor + (rows if numbers.size < int(np.prod(shape)) else "")
        answer[name] = (numbers.size, int((numbers == 0).sum()))
    return answer


def with_zeros(tensors: makers.Tensors, seed: int = 0) -> dict[str, tuple[str, makers.Shape, bytes]]:
    """The tensors with +0 and -0 at random places, another share in each."""
    rng = np.random.default_rng(seed)
    changed = {}
    for name, (dtype, shape, data) in tensors.items():
        if dtype not in oracle.FORMATS or len(shape) != 2:
            changed[name] = (dtype, shape, data)
            continue
        codes = np.frombuffer(data, f"<u{makers.SIZES[dtype]}").copy()
        zero = rng.random(codes.size) < rng.random()
        codes[zero] = rng.integers(0, 2, int(zero.sum()), np.uint8).astype(codes.dtype) << (8 * codes.itemsize - 1)
        changed[name] = (dtype, shape, codes.tobytes())
    return changed


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F8_E4M3", "F8_E5M2", "F64"])
@pytest.mark.parametrize("table", [UNET, FUSED])
def test_zeros_of_both_signs_in_every_dtype(tmp_path: Path, table: str, dtype: str) -> None:
    """Also the parts of a fused tensor, each for itself."""
    tensors = with_zeros(makers.tiny(table, dtype))
    layers = count(makers.write(tmp_path / "a.safetensors", tensors))
    answer = expected(tensors, dit=table == FUSED)
    assert {layer.name: (layer.weights, layer.zeros) for layer in layers} == answer
    assert len({layer.share for layer in layers}) > 10
    assert any("[" in name for name in answer) == (table == FUSED)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_codes_of_scaled_fp8_are_counted(tmp_path: Path, spelling: str) -> None:
    scaled = Scaled(UNET, spelling, plain=("F16", "BF16"))
    layers = count(makers.write(tmp_path / "a.safetensors", scaled.tensors, scaled.metadata))
    assert {layer.name: (layer.weights, layer.zeros) for layer in layers} == expected(scaled.tensors, dit=False)
    assert sum(layer.zeros for layer in layers) > 0


def test_shards_are_one_model(tmp_path: Path) -> None:
    tensors = with_zeros(makers.tiny("sd15.diffusers-unet"))
    index = makers.write_shards(tmp_path, tensors, 3)
    assert {layer.name: (layer.weights, layer.zeros) for layer in count(index)} == expected(tensors, dit=False)


def test_a_baked_file_has_the_zeros_of_its_header(narrow_exports: Callable[[str], tuple[Path, Path]]) -> None:
    """The base has no zeros, so the counts of the header are those of the layers."""
    base, baked = narrow_exports(UNET)
    metadata = makers.metadata_of(baked)
    for group in group_zeros(count(baked)):
        assert (group.zeros, group.weights) == tuple(
            int(metadata[f"crdiff.{key}.{group.group}"]) for key in ("pruned", "total")
        )
    assert not any(layer.zeros for layer in count(base))


def test_a_baked_file_has_the_layers_of_its_targets(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "a.safetensors", makers.tiny(FUSED))
    request = ExportRequest(str(base), Size(512, 512), tmp_path / "o.safetensors", ratio=0.3, targets=("attn",))
    baked = export(request).written.path
    assert {layer.kind for layer in count(baked)} == {"attn"}
    assert {layer.kind for layer in count(base)} == {"attn", "ff"}
    assert all(abs(layer.share - 0.3) < 0.01 for layer in count(baked))


def test_groups_and_blocks_are_in_order(tmp_path: Path) -> None:
    layers = count(makers.write(tmp_path / "a.safetensors", makers.tiny("flux-dev.original-transformer")))
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    assert blocks == [
        *(f"transformer_blocks.{number}" for number in range(19)),
        *(f"single_transformer_blocks.{number}" for number in range(38)),
    ]
    unet = count(makers.write(tmp_path / "b.safetensors", makers.tiny("sdxl.original")))
    assert list(dict.fromkeys(layer.group for layer in unet)) == ["down", "mid", "up"]
    assert [group.layers for group in group_zeros(unet)] == [144, 60, 216]


@pytest.mark.parametrize("family", [family.id for family in all_families()])
def test_every_layer_has_a_cell_of_its_own(family: str) -> None:
    """In each layout of each family: a block, and a projection that its neighbours have, too."""
    from crdiff_export.verify.layers import _place

    for layout in by_id(family).layouts:
        cells = Counter(_place(layer) for layer in layout.layers)
        assert max(cells.values()) == 1
        assert all(re.search(r"\.\d+$", block) for block, _ in cells)
        assert len({projection for _, projection in cells}) <= 12


def test_a_hole_is_refused(shelf: Path) -> None:
    with raises(CheckpointError, "sparse.safetensors"):
        count(shelf / "sparse.safetensors")


@pytest.mark.parametrize("name", ["lora.safetensors", "vae.safetensors", "odd.safetensors"])
def test_an_unknown_family_is_refused(shelf: Path, name: str) -> None:
    with raises(FamilyError, name):
        count(shelf / name)


def test_codes_without_a_zero_weight_are_refused(tmp_path: Path) -> None:
    tensors = makers.tiny(UNET)
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    dtype, shape, data = tensors[name]
    path = makers.write(tmp_path / "a.safetensors", tensors | {name: ("I8", shape, data[: len(data) // 2])})
    with raises(CheckpointError, name, "I8"):
        count(path)
    quantised = name.removesuffix(".weight") + ".smooth_factor"
    path = makers.write(tmp_path / "b.safetensors", tensors | {quantised: (dtype, (1,), data[:2])})
    with raises(PlanError, quantised):
        count(path)


def test_a_file_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    path = makers.write(tmp_path / "a.safetensors", makers.tiny(UNET))
    inspection = inspect(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with raises(CheckpointError, "a.safetensors"):
        count_zeros(inspection, Silent())


class Counted(Silent):
    """A progress that adds up what it is told."""

    def __init__(self) -> None:
        self.size = self.done = 0

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        self.size += size

    def advance(self, size: int) -> None:
        self.done += size


def test_the_progress_ends_at_its_size(tmp_path: Path) -> None:
    progress = Counted()
    layers = count_zeros(inspect(makers.write(tmp_path / "a.safetensors", makers.tiny(FUSED))), progress)
    assert progress.done == progress.size == 2 * sum(layer.weights for layer in layers)


class Memory:
    """A reader of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self.data[offset : offset + len(target)]

    def close(self) -> None:
        pass


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
def test_pieces_are_the_whole_and_no_larger(start: int, size: int, piece: int) -> None:
    data = bytes(range(100))
    pieces = [bytes(part) for part in read_pieces(Memory(data), start, start + size, piece)]
    assert b"".join(pieces) == data[start : start + size]
    assert all(len(part) == piece for part in pieces[:-1])
    assert all(0 < len(part) <= piece for part in pieces)


def test_a_piece_holds_whole_elements() -> None:
    assert PIECE * 8 % 6 == PIECE * 8 % 64 == 0
