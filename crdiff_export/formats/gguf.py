"""Read from a GGUF file which types its weights have, to say why it cannot be pruned.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; numbers of the types: `ggml_type` of ggml.h.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

_PLAIN: Final = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_MINIMUM: Final = {3: "Q4_1", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 12: "Q4_K", 13: "Q5_K"}
_NO_ZERO: Final = {20: "IQ4_NL", 23: "IQ4_XS"}
_OTHERS: Final = {
    2: "Q4_0", 6: "Q5_0", 8: "Q8_0", 11: "Q3_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
# Bytes of the fixed-size types of metadata values, by number.
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# More than any file has, so that a hostile one costs no time.
_MOST: Final = 1 << 20


def why_not(path: Path) -> str:
    """Say why the weights of a GGUF file cannot be pruned, or that doing so is not built in.

    Args:
        path: The file, which begins with `GGUF`.

    Returns:
        The end of a sentence about its weights.
    """
    try:
        with path.open("rb") as file:
            types = set(_types(file))
    except (OSError, ValueError, struct.error):
        types = set()
    quantised = types - _PLAIN.keys()
    if some := [name for number, name in _MINIMUM.items() if number in quantised]:
        return f"are quantised ({_listed(some)}) and cannot be pruned exactly: a minimum is subtracted from them"
    if some := [name for number, name in _NO_ZERO.items() if number in quantised]:
        return f"are quantised ({_listed(some)}) and cannot be pruned exactly: their codebook has no zero"
    names = [_OTHERS.get(number, f"type {number}") for number in sorted(quantised)]
    kind = f"are quantised ({_listed(names)})" if names else "are in a format of its own"
    return f"{kind}, and pruning them is not built in"


def _types(file: BinaryIO) -> Iterator[int]:
    """Yield the type of each tensor, in the order of the file's table."""
    if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
        raise ValueError
    tensors, pairs = _number(file, "<Q"), _number(file, "<Q")
    if max(tensors, pairs) > _MOST:
        raise ValueError
    for _ in range(pairs):
        _skip_string(file)
        _skip_value(file, _number(file, "<I"))
    for _ in range(tensors):
        _skip_string(file)
        dimensions = _number(file, "<I")
        if dimensions > 8:
            raise ValueError
        file.seek(8 * dimensions, 1)
        yield _number(file, "<I")
        file.seek(8, 1)


def _number(file: BinaryIO, form: str) -> int:
    (number,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return int(number)


def _skip_string(file: BinaryIO) -> None:
    file.seek(_number(file, "<Q"), 1)


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _skip_string(file)
    elif kind == _ARRAY:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if inner in _SIZES:
            file.seek(_SIZES[inner] * count, 1)
        elif inner == _STRING and count <= _MOST:
            for _ in range(count):
                _skip_string(file)
        else:
            raise ValueError
    elif kind in _SIZES:
        file.seek(_SIZES[kind], 1)
    else:
        raise ValueError


def _listed(names: list[str]) -> str:
    return ", ".join(names)
