"""Write a checkpoint of a real model's geometry with random weights: `make_checkpoint.py TABLE OUT [--sparse]`.

TABLE is one of tests/support/geometry. Weights are written piece by piece; `--sparse` leaves a hole instead.
"""

import argparse
import gzip
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GEOMETRY = Path(__file__).resolve().parent.parent / "tests" / "support" / "geometry"
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
PIECE = 1 << 22


def content(name: str, dtype: str, shape: list[int]) -> Iterator[bytes]:
    """A tensor's bytes: bell-shaped, each tensor with a scale of its own, as in trained models."""
    rng = np.random.default_rng([*name.encode()])
    count, scale = math.prod(shape), np.float32((0.5 + rng.random()) / math.sqrt(max(math.prod(shape[1:]), 1)))
    for start in range(0, count, PIECE):
        values = rng.standard_normal(min(PIECE, count - start), np.float32) * scale
        if dtype == "BF16":
            yield (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            yield values.astype({"F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).tobytes()


def write(path: Path, table: dict[str, tuple[str, list[int]]], *, sparse: bool = False) -> None:
    """Write a file with these tensors: each name's dtype and shape."""
    tensors = sorted(table.items(), key=lambda item: -SIZES[item[1][0]])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors:
        size = math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(body)) + body)
        if sparse:
            file.truncate(8 + len(body) + position)
            return
        for name, (dtype, shape) in tensors:
            for piece in content(name, dtype, shape):
                file.write(piece)


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(p.name.removesuffix(".json.gz") for p in GEOMETRY.glob("*.json.gz")))
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparse", action="store_true")
    args = parser.parse_args()
    table = json.loads(gzip.decompress((GEOMETRY / f"{args.table}.json.gz").read_bytes()))
    write(args.out, table, sparse=args.sparse)


if __name__ == "__main__":
    main()
