"""The formats seen as bits, against numbers decoded by formula and by torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import Encoding
from tests.support import oracle

NARROW = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def magnitudes(dtype: str) -> NDArray[np.float64]:
    size = oracle.FORMATS[dtype].size
    return oracle.decode(dtype, np.arange(1 << (8 * size - 1)).astype(f"<u{size}").tobytes())


@pytest.mark.parametrize("dtype", NARROW)
def test_the_patterns_are_the_formula(dtype: str) -> None:
    with np.errstate(invalid="ignore"):
        ours = dtypes.patterns(dtype).view(np.float32).astype(np.float64)
    assert np.array_equal(ours, magnitudes(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_patterns_are_torchs(dtype: str) -> None:
    size = oracle.FORMATS[dtype].size
    patterns = np.arange(1 << (8 * size - 1)).astype(f"<u{size}")
    theirs = torch.from_numpy(patterns.view(np.uint8)).view(TORCH[dtype]).float().numpy()
    number = ~np.isnan(theirs)
    assert np.array_equal(dtypes.patterns(dtype)[number], theirs.view(np.uint32)[number])


@pytest.mark.parametrize("dtype", dtypes.FORMATS)
def test_what_is_finite(dtype: str) -> None:
    form = dtypes.FORMATS[dtype]
    assert (form.itemsize, form.first_nonfinite) == (oracle.FORMATS[dtype].size, oracle.FORMATS[dtype].finite)
    assert form.mask == (1 << (form.width - 1)) - 1
    edge = np.array([form.first_nonfinite - 1, form.first_nonfinite], f"<u{form.itemsize}")
    last, beyond = oracle.decode(dtype, edge.tobytes())
    assert math.isfinite(last)
    assert not math.isfinite(beyond)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_patterns_ascend_and_then_hold_no_numbers(dtype: str) -> None:
    scale, finite = dtypes.patterns(dtype).astype(np.int64), dtypes.FORMATS[dtype].first_nonfinite
    assert (np.diff(scale[:finite]) > 0).all()
    assert scale[finite - 1] <= dtypes.LARGEST
    assert (scale[finite:] > dtypes.LARGEST).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_is_its_own_limit(dtype: str) -> None:
    form = dtypes.FORMATS[dtype]
    for pattern in range(0, form.first_nonfinite, 1 if form.width == 8 else 37):
        bits = int(dtypes.patterns(dtype)[pattern])
        assert Encoding(dtype).limit(dtypes.value(bits)) == pattern
        assert Encoding(dtype).limit(dtypes.value(bits + 1)) == pattern
        assert bits == 0 or Encoding(dtype).limit(dtypes.value(bits - 1)) == pattern - 1


@given(bits=st.integers(0, dtypes.LARGEST), dtype=st.sampled_from(NARROW))
@example(bits=dtypes.LARGEST, dtype="F8_E4M3")
@example(bits=dtypes.LARGEST, dtype="F16")
@example(bits=0, dtype="BF16")
@example(bits=1, dtype="F8_E5M2")
def test_a_limit_splits_the_numbers(bits: int, dtype: str) -> None:
    threshold = dtypes.value(bits)
    limit = Encoding(dtype).limit(threshold)
    below = magnitudes(dtype) <= threshold
    assert below[: limit + 1].all()
    assert not below[limit + 1 :].any()


@given(bits=st.integers(0, dtypes.LARGEST))
@example(bits=0)
@example(bits=1)
@example(bits=0x0080_0000)
@example(bits=dtypes.LARGEST)
def test_values_and_bits(bits: int) -> None:
    number = float(np.uint32(bits).view(np.float32))
    assert dtypes.value(bits) == number
    assert dtypes.bits(number) == dtypes.bits(-number) == bits
    assert Encoding("F32").limit(number) == bits
    assert dtypes.bits(float.fromhex(dtypes.value(bits).hex())) == bits
