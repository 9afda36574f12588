"""GGUF files are refused for what their weights are, as the file's own table of tensors tells."""

import random
import struct
from pathlib import Path

import pytest

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import gguf
from crdiff_export.formats.checkpoint import open_checkpoint
from tests.support.messages import raises

F16, Q4_0, Q4_1, Q8_0, Q4_K, IQ4_NL = 1, 2, 3, 8, 12, 20


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def written(path: Path, *types: int) -> Path:
    """A file with metadata of every kind, and a tensor of each type."""
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("flux"),
        text("general.quantization_version") + struct.pack("<II", 4, 2),
        text("flag") + struct.pack("<IB", 7, 1),
        text("double") + struct.pack("<Id", 12, 0.5),
        text("shape") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
    ]
    tensors = [
        text(f"blocks.{number}.weight") + struct.pack("<I2QIQ", 2, 32, 32, kind, 0) for number, kind in enumerate(types)
    ]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs + tensors) + bytes(64))
    return path


@pytest.mark.parametrize(
    ("types", "keys"),
    [
        ((F16, Q4_K), ("Q4_K", "a minimum is subtracted")),
        ((Q8_0, Q4_1), ("Q4_1", "a minimum is subtracted")),
        ((F16, IQ4_NL), ("IQ4_NL", "no zero")),
        ((F16, Q4_0, Q8_0), ("Q4_0, Q8_0", "not built in")),
        ((F16, 99), ("type 99", "not built in")),
        ((F16,), ("not built in",)),
        ((), ("not built in",)),
    ],
)
def test_the_reason_is_that_of_the_weights(tmp_path: Path, types: tuple[int, ...], keys: tuple[str, ...]) -> None:
    path = written(tmp_path / "m.gguf", *types)
    with raises(CheckpointError, "m.gguf", *keys):
        open_checkpoint(path)


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_file_is_refused_as_well(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    path = written(tmp_path / "m.gguf", F16, Q4_K)
    raw = bytearray(path.read_bytes()[: choose.choice((None, choose.randint(4, 300)))])
    for _ in range(choose.randint(0, 5)):
        raw[choose.randrange(4, len(raw) + 1) - 1 if len(raw) > 4 else 0] = choose.choice((0, 1, 255))
    path.write_bytes(b"GGUF" + bytes(raw[4:]))
    assert gguf.why_not(path)


def test_a_file_that_claims_to_be_endless_costs_no_time(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63))
    assert "not built in" in gguf.why_not(path)
    pair = text("a") + struct.pack("<IIQ", 9, 8, 2**62)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair)
    assert "not built in" in gguf.why_not(path)
