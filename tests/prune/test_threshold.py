"""The k-th smallest from histograms against a sort."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import Encoding
from crdiff_export.prune import Threshold, kernels, threshold
from crdiff_export.prune.kernels.cpu import CpuKernel
from tests.support import oracle

KERNEL = CpuKernel(1)
F32, F16 = Encoding("F32"), Encoding("F16")
DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
Part = tuple[Encoding, Sequence[int]]


def encode(dtype: str, patterns: Sequence[int]) -> bytes:
    return np.array(patterns, np.uint64).astype(f"<u{oracle.FORMATS[dtype].size}").tobytes()


def found(parts: Sequence[Part], k: int) -> Threshold:
    """The threshold as the package finds it: count, and of float32 once more."""
    counts: dict[Encoding, threshold.Totals] = {}
    for encoding, patterns in parts:
        counted = kernels.counters(kernels.magnitudes(encoding.dtype))
        KERNEL.count(memoryview(encode(encoding.dtype, patterns)), encoding.dtype, counted)
        counts.setdefault(encoding, threshold.totals(len(counted)))
        counts[encoding] += counted
    refined = None
    if F32 in counts and k:
        refined = threshold.totals(kernels.REFINED)
        for encoding, patterns in parts:
            if encoding == F32:
                counted = kernels.counters(kernels.REFINED)
                KERNEL.refine(memoryview(encode("F32", patterns)), threshold.upper_bits(counts, k), counted)
                refined += counted
    return threshold.select(counts, k, refined)


def magnitudes(encoding: Encoding, patterns: Sequence[int]) -> NDArray[np.float64]:
    numbers = np.abs(oracle.decode(encoding.dtype, encode(encoding.dtype, patterns)))
    return numbers if encoding.scale is None else numbers * encoding.scale


def assert_as_sorted(parts: Sequence[Part], k: int) -> None:
    numbers = np.sort(np.concatenate([magnitudes(*part) for part in parts]))
    answer = found(parts, k)
    assert answer.total == len(numbers)
    assert answer.nonfinite == int((~np.isfinite(numbers)).sum())
    if k == 0:
        assert (answer.value, answer.pruned) == (None, 0)
        return
    if np.isfinite(numbers[k - 1]):
        wanted = float(numbers[k - 1])
        assert answer.value == wanted
    else:
        assert answer.value is not None
        wanted = answer.value
        assert wanted >= oracle.FLOAT32_MAX
    assert answer.pruned == int((numbers <= wanted).sum())
    for encoding, patterns in parts:
        limit = encoding.limit(wanted)
        size = 8 * oracle.FORMATS[encoding.dtype].size
        small = np.array(patterns, np.uint64) & np.uint64((1 << (size - 1)) - 1) <= limit
        assert np.array_equal(small, magnitudes(encoding, patterns) <= wanted)


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    """Weights of a few dtypes: any patterns, or few different ones, for ties within and between encodings."""
    made: list[Part] = []
    scales = st.none() | st.sampled_from([1.0, 0.5, 1.5]) | st.floats(2.0**-149, float(oracle.FLOAT32_MAX), width=32)
    for dtype in draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4)):
        size = 8 * oracle.FORMATS[dtype].size
        anything = st.integers(0, (1 << size) - 1)
        few = st.sampled_from(draw(st.lists(anything, min_size=1, max_size=3)))
        exact = st.sampled_from([pattern(number, dtype) for number in (0.0, 1.0, 1.5, 2.0, 0.25)])
        encoding = Encoding(dtype, draw(scales) if size == 8 else None)
        made.append((encoding, draw(st.lists(st.one_of(anything, few, exact), min_size=1, max_size=30))))
    return made


def pattern(number: float, dtype: str) -> int:
    """The pattern of a number that every format holds."""
    form = oracle.FORMATS[dtype]
    (bits,) = np.array([number], np.float64).view(np.uint64)
    if number == 0:
        return 0
    exponent = (int(bits) >> 52) - 1023 + (1 << (form.exponent - 1)) - 1
    return (exponent << form.mantissa) | (int(bits) & ((1 << 52) - 1)) >> (52 - form.mantissa)


@settings(max_examples=200)
@given(parts=parts(), share=st.fractions(0, Fraction(999, 1000)))
@example(parts=[(F32, [0x7F80_0000])], share=Fraction(0))
def test_any_weights(parts: list[Part], share: Fraction) -> None:
    total = sum(len(patterns) for _, patterns in parts)
    assert_as_sorted(parts, int(total * share))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank(dtype: str) -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 8 * oracle.FORMATS[dtype].size, 60).tolist()
    for k in range(61):
        assert_as_sorted([(Encoding(dtype), patterns)], k)


@pytest.mark.parametrize("edge", [1 << 15, 5 << 15, 0x0080_0000, 0x7F7F_8000, dtypes.LARGEST + 1])
def test_float32_around_the_edge_of_two_levels(edge: int) -> None:
    patterns = [edge + step for step in (-2, -1, 0, 1) for _ in range(3)]
    for k in range(13):
        assert_as_sorted([(F32, patterns)], k)
        others: list[Part] = [(Encoding("BF16"), [edge >> 16, 0x3F80]), (F16, [0x3C00, 0, 1])]
        assert_as_sorted([(F32, patterns), *others], k)


@given(ratio=st.floats(0, 1, exclude_max=True), total=st.integers(1, 12_000_000_000))
@example(ratio=0.29, total=100)  # 28.999999999999996 as doubles multiply
@example(ratio=float(np.nextafter(1.0, 0)), total=1)
@example(ratio=float(np.nextafter(1.0, 0)), total=12_000_000_000)
def test_the_rank_is_int_of_a_double(ratio: float, total: int) -> None:
    k = threshold.rank(ratio, total)
    assert k == int(np.float64(total) * np.float64(ratio))
    assert 0 <= k < total or total * ratio == total
    assert k <= total


def test_a_rank_beyond_the_numbers_takes_all_of_them() -> None:
    answer = found([(F16, [0x3C00, 0x7C00, 0x7E00, 0xFC00])], 3)
    assert (answer.value, answer.pruned, answer.nonfinite) == (oracle.FLOAT32_MAX, 1, 3)


def test_large_counts_do_not_wrap() -> None:
    """FLUX has 12 billion weights; a histogram of one scope may pass 2**32."""
    counts = {F16: threshold.totals(1 << 15)}
    counts[F16][0x3C00] = 5 << 32
    counts[F16][0x4000] = 7 << 32
    answer = threshold.select(counts, (5 << 32) + 1)
    assert (answer.value, answer.pruned, answer.total) == (2.0, 12 << 32, 12 << 32)
    assert threshold.select(counts, 5 << 32).value == 1.0
