"""The architecture id: what a base says of itself, else its family, else, for twins, the spread of one small tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.export import prepare
from crdiff_export.prune import Architecture, architecture
from tests.support import makers

ORIGINAL, DIFFUSERS = "sd21.original", "sd21.diffusers-unet"
PREFIX = "model.diffusion_model."
TENSOR = {
    ORIGINAL: f"{PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias",
    DIFFUSERS: "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
}
FIRST = {ORIGINAL: f"{PREFIX}input_blocks.0.0.weight", DIFFUSERS: "conv_in.weight"}
V768 = Architecture("stable-diffusion-v2-768-v", Size(768, 768))
BASE512 = Architecture("stable-diffusion-v2-512", Size(512, 512), special="base")
INPAINTING = Architecture("stable-diffusion-v2-inpainting", Size(512, 512), special="inpainting")
DEPTH = Architecture("stable-diffusion-v2-depth", Size(512, 512), special="depth")
EIGHT = Architecture("stable-diffusion-v2-768-v/8-channels", Size(512, 512), special="8-channels")
Made = dict[str, tuple[str, makers.Shape, bytes]]


def stored(numbers: np.ndarray[tuple[int], np.dtype[np.float64]], dtype: str) -> bytes:
    if dtype == "BF16":
        return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return bytes(numbers.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes())


def model(table: str, spread: float, channels: int = 4, dtype: str = "F16") -> Made:
    """A narrow SD2.1 whose telling tensor has that standard deviation, around a mean that is not zero."""
    made: Made = dict(makers.tiny(table))
    made[TENSOR[table]] = dtype, (320,), stored(np.tile([0.5 + spread, 0.5 - spread], 160), dtype)
    kind, (width, _, *kernel), _ = made[FIRST[table]]
    shape = (width, channels, *kernel)
    made[FIRST[table]] = kind, shape, makers.weights("first", kind, shape)
    return made


def found(folder: Path, tensors: Made, said: Mapping[str, str] | None = None) -> Architecture:
    base = makers.write(folder / "base.safetensors", tensors, said)
    return architecture.find(prepare(ExportRequest(str(base), Size(512, 512), folder / "out.safetensors")).plan)


class Case(NamedTuple):
    table: str
    spread: float
    expected: Architecture
    channels: int = 4
    dtype: str = "F16"
    stated: str | None = None


CASES = {
    "just wide": Case(ORIGINAL, 0.0901, V768, dtype="F32"),
    "just narrow": Case(ORIGINAL, 0.0899, BASE512, dtype="F32"),
    "bf16": Case(ORIGINAL, 0.12, V768, dtype="BF16"),
    "f64": Case(ORIGINAL, 0.05, BASE512, dtype="F64"),
    "diffusers wide": Case(DIFFUSERS, 0.12, V768),
    "diffusers narrow": Case(DIFFUSERS, 0.05, BASE512),
    "not a number": Case(ORIGINAL, float("nan"), BASE512),  # ComfyUI compares it as well, and epsilon is what is left
    "depth": Case(ORIGINAL, 0.12, DEPTH, channels=5),
    "more channels": Case(ORIGINAL, 0.12, EIGHT, channels=8),
    "inpainting": Case(ORIGINAL, 0.12, INPAINTING, channels=9),
    "diffusers inpainting": Case(DIFFUSERS, 0.12, INPAINTING, channels=9),
    "stated 512": Case(ORIGINAL, 0.12, BASE512, stated=BASE512.id),
    "stated 768": Case(ORIGINAL, 0.05, V768, stated=V768.id),
    "stated inpainting": Case(ORIGINAL, 0.12, INPAINTING, channels=9, stated=INPAINTING.id),
    "stated other wide": Case(ORIGINAL, 0.12, Architecture("of-my-own", Size(768, 768)), stated="of-my-own"),
    "stated other narrow": Case(
        ORIGINAL, 0.05, Architecture("of-my-own", Size(512, 512), special="base"), stated="of-my-own"
    ),
    "stated nothing": Case(ORIGINAL, 0.05, BASE512, stated=""),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sd21_is_told_from_its_twin(case: Case, tmp_path: Path) -> None:
    said = None if case.stated is None else {"modelspec.architecture": case.stated}
    assert found(tmp_path, model(case.table, case.spread, case.channels, case.dtype), said) == case.expected


@pytest.mark.parametrize("change", ["missing", "empty", "integers", "huge"])
def test_sd21_without_the_telling_tensor_is_the_familys(change: str, tmp_path: Path) -> None:
    tensors = model(ORIGINAL, 0.05)
    name = TENSOR[ORIGINAL]
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = {
            "empty": ("F16", (0,), b""),
            "integers": ("I32", (2,), bytes(8)),
            "huge": ("F16", (1 << 17,), bytes(1 << 18)),
        }[change]
    assert found(tmp_path, tensors) == V768


def test_hole_in_place_of_the_telling_tensor_tells_nothing(tmp_path: Path) -> None:
    base = makers.write_sparse(tmp_path / "base.safetensors", ORIGINAL)
    request = ExportRequest(str(base), Size(512, 512), tmp_path / "out.safetensors")
    assert architecture.find(prepare(request).plan) == V768


def test_telling_tensor_in_another_shard(tmp_path: Path) -> None:
    makers.write_shards(tmp_path / "base", model(DIFFUSERS, 0.05), 3)
    request = ExportRequest(str(tmp_path / "base"), Size(512, 512), tmp_path / "out", ratio=0.3)
    for file in export(request).written.files:
        said = makers.metadata_of(file.path)
        assert said["modelspec.architecture"] == BASE512.id
        assert said["crdiff.resolution.native"] == "512x512"


def test_telling_tensor_of_a_pickle(tmp_path: Path) -> None:
    made = model(ORIGINAL, 0.05, dtype="F32")
    types = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    loaded = {
        name: torch.frombuffer(bytearray(data), dtype=types[dtype]).reshape(shape)
        for name, (dtype, shape, data) in made.items()
        if data
    }
    torch.save({"state_dict": loaded}, tmp_path / "base.ckpt")
    request = ExportRequest(str(tmp_path / "base.ckpt"), Size(512, 512), tmp_path / "out.safetensors")
    assert architecture.find(prepare(request).plan) == BASE512


def test_guess_names_no_prediction_type(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", model(ORIGINAL, 0.12))
    written = export(ExportRequest(str(base), Size(512, 512), tmp_path / "out.safetensors", ratio=0.3)).written
    said = makers.metadata_of(written.path)
    assert said["modelspec.architecture"] == V768.id
    assert "modelspec.prediction_type" not in said


@pytest.mark.parametrize(
    ("table", "first", "channels", "expected"),
    [
        ("sd15.original", f"{PREFIX}input_blocks.0.0.weight", 9, "stable-diffusion-v1-inpainting"),
        ("sdxl.original", f"{PREFIX}input_blocks.0.0.weight", 9, "stable-diffusion-xl-v1-inpainting"),
        ("flux-dev.original-transformer", "img_in.weight", 384, "Flux.1-dev/inpaint"),
    ],
)
def test_inpainting_models_have_ids_of_their_own(
    table: str, first: str, channels: int, expected: str, tmp_path: Path
) -> None:
    tensors: Made = dict(makers.tiny(table))
    dtype, (width, _, *kernel), _ = tensors[first]
    shape = (width, channels, *kernel)
    tensors[first] = dtype, shape, makers.weights(first, dtype, shape)
    assert found(tmp_path, tensors).id == expected
