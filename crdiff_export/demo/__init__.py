"""The `demo` base: Stable Diffusion 1 in its original layout, shrunk to 2.7 MB of random weights, for trying the tool.

It is made on demand and its bytes are the same on every machine: a weight is a sum of hash bytes of its tensor's name
times a short step, which float32 holds exactly, so that the only rounding is the one to float16.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from operator import mul
from pathlib import Path

from crdiff_export.errors import BakeError

SHA256 = "00f8925901e7968de610fa6544b4197756379776fbffd240cbf0771b75ff743a"
NAME = "demo.safetensors"
METADATA = {
    "crdiff.demo": "random weights, for trying the tool",
    "format": "pt",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "sgm",
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": "64x64",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.title": "crdiff demo",
}

WIDTHS = (32, 64)
TIME = 4 * WIDTHS[0]
LATENT = 4
VAE_WIDTHS = (8, 16, 16, 16)  # three halvings: a factor of 8, as in SD1
TEXT_WIDTH = 64
TEXT_LAYERS = 2
TOKENS = 514  # 256 bytes, each within a word and at its end, and two markers: a tokenizer that merges nothing
POSITIONS = 77
STEPS = 1000

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def path() -> Path:
    """The demo checkpoint in the user's cache, complete and as it should be; in the temporary folder if need be.

    Written there if it is missing or damaged. Any number of processes may call this at once.
    """
    tried = []
    for folder in _folders():
        file = folder / NAME
        tried.append(str(file))
        if not _intact(file):
            # Windows refuses to replace a file that is open elsewhere: then look again, it may be another's good one.
            with suppress(OSError):
                _write(file, build())
            if not _intact(file):
                continue
        return file
    raise BakeError(
        f"The demo checkpoint cannot be written: tried {' and '.join(tried) or 'nothing'}.",
        "Set CRDIFF_CACHE to a folder that can be written to.",
    )


def build() -> bytes:
    """The whole safetensors file."""
    width = {"I64": 8, "F32": 4, "F16": 2}
    tensors = sorted(_tensors(), key=lambda tensor: (-width[tensor[1]], tensor[0]))
    data = b"".join(content for *_, content in tensors)
    digest = {"modelspec.hash_sha256": f"0x{hashlib.sha256(data).hexdigest()}"}
    header: dict[str, object] = {"__metadata__": dict(sorted((METADATA | digest).items()))}
    end = 0
    for name, dtype, shape, content in tensors:
        start, end = end, end + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _folders() -> Iterator[Path]:
    """Where the file may lie, the user's cache first."""
    with suppress(RuntimeError):  # no home folder
        yield _cache()
    with suppress(FileNotFoundError):  # no temporary folder
        temporary = Path(tempfile.gettempdir())
        if sys.platform == "win32":  # where it is the user's own
            yield temporary / "crdiff"
        else:
            yield temporary / f"crdiff-{os.getuid()}"


def _cache() -> Path:
    """The cache folder the environment asks for, or the platform's."""
    if chosen := os.environ.get("CRDIFF_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "crdiff"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "crdiff"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "crdiff"


def _intact(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == SHA256
    except OSError:
        return False


def _write(file: Path, data: bytes) -> None:
    """Put `data` at `file` all at once, by way of a sibling."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, sibling = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(sibling).replace(file)
    except BaseException:
        Path(sibling).unlink(missing_ok=True)
        raise


def _tensors() -> Iterator[tuple[str, str, Shape, bytes]]:
    """Every tensor: name, dtype, shape, content."""
    import numpy as np

    for name, values in zip(("betas", "alphas_cumprod"), _schedule(), strict=True):
        yield name, "F32", (STEPS,), np.array(values, "<f4").tobytes()
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    yield positions, "I64", (1, POSITIONS), np.arange(POSITIONS, dtype="<i8").tobytes()
    for name, shape in _weights():
        size = math.prod(shape)
        random = hashlib.shake_128(name.encode()).digest(8 * size + 1)
        # The sum of four uniform int16: 17 bits and a sign, and near enough to a bell curve.
        bell = np.frombuffer(random, "<i2", 4 * size).reshape((*shape, 4)).sum(-1, dtype=np.int32).astype(np.float32)
        middle, step = _middle_and_step(name, shape, random[-1])
        yield name, "F16", shape, (np.float32(middle) + np.float32(step) * bell).astype("<f2").tobytes()


def _middle_and_step(name: str, shape: Shape, seed: int) -> tuple[float, float]:
    """What to add to a tensor's random sums, and to multiply them with before."""
    if name.endswith(".bias"):
        return 0.0, 2.0**-21
    if len(shape) == 1:  # the weight of a norm
        return 1.0, 2.0**-20
    deviation = (0.625 + seed % 8 / 8) / math.sqrt(math.prod(shape[1:]))  # no two layers quite alike
    fraction, exponent = math.frexp(deviation / (2**16 / math.sqrt(3)))
    return 0.0, math.ldexp(round(fraction * 128), exponent - 7)  # 7 bits; with the sum's 17 float32's 24


def _schedule() -> tuple[list[float], list[float]]:
    """SD1's betas, "scaled linear" from 0.00085 to 0.012, and the products of 1 - beta."""
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    roots = [first + (last - first) * step / (STEPS - 1) for step in range(STEPS)]
    betas = [root * root for root in roots]  # not ** 2, whose last bit is the platform's affair
    return betas, list(accumulate((1.0 - beta for beta in betas), mul))


def _weights() -> Named:
    """Name and shape of every float16 tensor."""
    for prefix, part in (
        ("model.diffusion_model", _unet()),
        ("first_stage_model", _vae()),
        ("cond_stage_model.transformer.text_model", _text_model()),
    ):
        yield from ((f"{prefix}.{name}", shape) for name, shape in part)


def _layer(name: str, *weight: int, bias: bool = True) -> Named:
    """A linear layer or a convolution, or a norm where there is one size only."""
    yield f"{name}.weight", weight
    if bias:
        yield f"{name}.bias", weight[:1]


def _unet() -> Named:
    narrow, wide = WIDTHS
    yield from _layer("time_embed.0", TIME, narrow)
    yield from _layer("time_embed.2", TIME, TIME)
    yield from _layer("input_blocks.0.0", narrow, LATENT, 3, 3)
    yield from _block("input_blocks.1", narrow, narrow)
    yield from _layer("input_blocks.2.0.op", narrow, narrow, 3, 3)
    yield from _block("input_blocks.3", wide, narrow)
    yield from _block("middle_block", wide, wide)
    yield from _resnet("middle_block.2", wide, wide)
    yield from _block("output_blocks.0", wide, wide + wide)  # each takes in what an input block left, last one first
    yield from _block("output_blocks.1", wide, wide + narrow)
    yield from _layer("output_blocks.1.2.conv", wide, wide, 3, 3)
    yield from _block("output_blocks.2", narrow, wide + narrow)
    yield from _block("output_blocks.3", narrow, narrow + narrow)
    yield from _layer("out.0", narrow)
    yield from _layer("out.2", LATENT, narrow, 3, 3)


def _block(name: str, width: int, into: int) -> Named:
    """A residual block and a transformer after it."""
    yield from _resnet(f"{name}.0", width, into)
    yield from _layer(f"{name}.1.norm", width)
    yield from _layer(f"{name}.1.proj_in", width, width, 1, 1)
    yield from _transformer(f"{name}.1.transformer_blocks.0", width)
    yield from _layer(f"{name}.1.proj_out", width, width, 1, 1)


def _resnet(name: str, width: int, into: int) -> Named:
    yield from _layer(f"{name}.in_layers.0", into)
    yield from _layer(f"{name}.in_layers.2", width, into, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", width, TIME)
    yield from _layer(f"{name}.out_layers.0", width)
    yield from _layer(f"{name}.out_layers.3", width, width, 3, 3)
    if width != into:
        yield from _layer(f"{name}.skip_connection", width, into, 1, 1)


def _transformer(name: str, width: int) -> Named:
    for attention, context in (("attn1", width), ("attn2", TEXT_WIDTH)):
        yield from _layer(f"{name}.{attention}.to_q", width, width, bias=False)
        yield from _layer(f"{name}.{attention}.to_k", width, context, bias=False)
        yield from _layer(f"{name}.{attention}.to_v", width, context, bias=False)
        yield from _layer(f"{name}.{attention}.to_out.0", width, width)
    yield from _layer(f"{name}.ff.net.0.proj", 8 * width, width)
    yield from _layer(f"{name}.ff.net.2", width, 4 * width)
    for i in (1, 2, 3):
        yield from _layer(f"{name}.norm{i}", width)


def _vae() -> Named:
    levels = list(enumerate(VAE_WIDTHS))
    first, deepest, lowest = VAE_WIDTHS[0], VAE_WIDTHS[-1], len(VAE_WIDTHS) - 1

    yield from _layer("encoder.conv_in", first, 3, 3, 3)
    into = first
    for i, width in levels:
        yield from _vae_resnet(f"encoder.down.{i}.block.0", width, into)
        if i < lowest:
            yield from _layer(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
        into = width
    yield from _vae_middle("encoder.mid", deepest)
    yield from _layer("encoder.norm_out", deepest)
    yield from _layer("encoder.conv_out", 2 * LATENT, deepest, 3, 3)

    yield from _layer("quant_conv", 2 * LATENT, 2 * LATENT, 1, 1)
    yield from _layer("post_quant_conv", LATENT, LATENT, 1, 1)

    yield from _layer("decoder.conv_in", deepest, LATENT, 3, 3)
    yield from _vae_middle("decoder.mid", deepest)
    into = deepest
    for i, width in reversed(levels):
        yield from _vae_resnet(f"decoder.up.{i}.block.0", width, into)
        yield from _vae_resnet(f"decoder.up.{i}.block.1", width, width)
        if i > 0:
            yield from _layer(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
        into = width
    yield from _layer("decoder.norm_out", first)
    yield from _layer("decoder.conv_out", 3, first, 3, 3)


def _vae_middle(name: str, width: int) -> Named:
    yield from _vae_resnet(f"{name}.block_1", width, width)
    yield from _layer(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _layer(f"{name}.attn_1.{part}", width, width, 1, 1)
    yield from _vae_resnet(f"{name}.block_2", width, width)


def _vae_resnet(name: str, width: int, into: int) -> Named:
    yield from _layer(f"{name}.norm1", into)
    yield from _layer(f"{name}.conv1", width, into, 3, 3)
    yield from _layer(f"{name}.norm2", width)
    yield from _layer(f"{name}.conv2", width, width, 3, 3)
    if width != into:
        yield from _layer(f"{name}.nin_shortcut", width, into, 1, 1)


def _text_model() -> Named:
    width = TEXT_WIDTH
    yield "embeddings.token_embedding.weight", (TOKENS, width)
    yield "embeddings.position_embedding.weight", (POSITIONS, width)
    for i in range(TEXT_LAYERS):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{part}", width, width)
        yield from _layer(f"{layer}.layer_norm1", width)
        yield from _layer(f"{layer}.mlp.fc1", 4 * width, width)
        yield from _layer(f"{layer}.mlp.fc2", width, 4 * width)
        yield from _layer(f"{layer}.layer_norm2", width)
    yield from _layer("final_layer_norm", width)
