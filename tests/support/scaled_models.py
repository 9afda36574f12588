"""Narrow models of which some layers are fp8 with a scale, in each of ComfyUI's spellings."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.support import makers, oracle
from tests.support.hostile_weights import DIT_RATIOS, UNET_RATIOS
from tests.support.makers import Shape

Made = dict[str, tuple[str, Shape, bytes]]
UNET, FUSED = "demo.original-unet", "sd3-medium.original-transformer"
SPELLINGS = ("scaled_fp8", "comfy_quant", "metadata")
FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
METADATA = "_quantization_metadata"


def number(dtype: str, value: float) -> bytes:
    """A scale as a file has it."""
    single = struct.pack("<f", value)
    return struct.pack("<e", value) if dtype == "F16" else single[2:] if dtype == "BF16" else single


def codes(rng: np.random.Generator, dtype: str, shape: Shape) -> bytes:
    """All finite codes by turns, both zeros among them, in any order."""
    finite = oracle.FORMATS[dtype].finite
    every = np.concatenate([np.arange(finite), np.arange(finite) + 128]).astype(np.uint8)
    return bytes(rng.permutation(np.resize(every, int(np.prod(shape)))))


class Scaled:
    """A checkpoint some of whose targets are fp8 with a scale, in one spelling.

    Attributes:
        tensors: Its tensors.
        metadata: Its metadata.
        scales: The scale of each weight that has one.
    """

    def __init__(self, table: str, spelling: str, plain: Sequence[str] = (), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tensors: Made = {}
        self.scales: dict[str, float] = {}
        layers: dict[str, Mapping[str, object]] = {}
        original = makers.tiny(table, "F16")
        dit = table == FUSED
        pieces = oracle.expect([original], DIT_RATIOS if dit else UNET_RATIOS, ("attn", "ff"), dit=dit).slices
        targets = {piece.tensor: i for i, piece in enumerate(pieces)}
        for name, (dtype, shape, data) in original.items():
            turn = targets.get(name)
            if turn is None:
                self.tensors[name] = dtype, shape, data
                continue
            if plain and turn % 3 == 0:
                other = plain[turn % len(plain)]
                self.tensors[name] = other, shape, makers.weights(name, other, shape)
                continue
            # The marker has one format for all of a model.
            code = "F8_E4M3" if turn % 2 or spelling == "scaled_fp8" else "F8_E5M2"
            kind = ("F32", "F16", "BF16")[turn % 3]
            raw = number(kind, float(rng.uniform(1e-3, 5e-3)))
            self.scales[name] = float(oracle.decode(kind, raw)[0])
            layer = name.removesuffix(".weight")
            tail = "scale_weight" if spelling == "scaled_fp8" else "weight_scale"
            self.tensors[name] = code, shape, codes(rng, code, shape)
            self.tensors[f"{layer}.{tail}"] = kind, ((), (1,))[turn % 2], raw
            layers[layer] = {"format": FORMATS[code], "full_precision_matrix_mult": bool(turn % 2)}
            if spelling == "comfy_quant":
                text = json.dumps(layers[layer]).encode()
                self.tensors[f"{layer}.comfy_quant"] = "U8", (len(text),), text
        self.metadata = {"format": "pt"}
        if spelling == "metadata":
            self.metadata[METADATA] = json.dumps({"format_version": "1.0", "layers": layers})
        if spelling == "scaled_fp8":
            prefix = next(iter(targets)).partition("input_blocks.")[0].partition("joint_blocks.")[0]
            self.tensors[f"{prefix}scaled_fp8"] = "F8_E4M3", (2,), b"\0\0"

    def write(self, path: Path) -> Path:
        return makers.write(path, self.tensors, self.metadata)
