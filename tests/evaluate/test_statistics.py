"""Intervals of means, differences and shares, compared with tables, formulas and simulations."""

import math

import numpy as np
import pytest

from crdiff_export.evaluate import statistics as stats


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    ids=["81/263", "15/148", "0/20", "1/29"],
)
def test_interval_of_a_share(hits: int, total: int, low: float, high: float) -> None:
    share = stats.share([[1.0]] * hits + [[0.0]] * (total - hits))
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)
    assert share.value == hits / total


def test_interval_of_a_mean_is_the_normal_one_for_many() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    estimate = stats.mean([[value] for value in values])
    half = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert estimate == stats.mean([[value] for value in values])


def test_interval_covers_the_true_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    rng = np.random.default_rng(2)
    for count in (8, 10, 40):
        estimates = [stats.mean(rng.normal(1, 1, (count, 1)).tolist()) for _ in range(300)]
        assert 0.89 <= np.mean([estimate.low <= 1 <= estimate.high for estimate in estimates]) <= 0.985


def test_more_pictures_of_a_prompt_are_no_more_prompts() -> None:
    values = np.random.default_rng(3).normal(0, 1, 30)
    once, often = stats.mean([[value] for value in values]), stats.mean([[value] * 9 for value in values])
    assert (once.low, once.high) == pytest.approx((often.low, often.high))


def test_pictures_of_a_single_prompt_are_resampled() -> None:
    estimate = stats.mean([[0.0, 1.0] * 50])
    assert (estimate.low, estimate.high) == pytest.approx((0.4, 0.6), abs=0.02)


@pytest.mark.parametrize(
    "few", [[[0.5]], [[0.5], [0.6]] * 3, [[0.5] * 7]], ids=["one", "six prompts", "seven pictures"]
)
def test_few_have_no_interval(few: list[list[float]]) -> None:
    estimate = stats.mean(few)
    assert (estimate.low, estimate.high, estimate.bounded) == (-math.inf, math.inf, False)
    assert estimate.verdict == "too few to say"


@pytest.mark.parametrize(("changed", "verdict"), [(5, "no difference shown"), (6, "better")])
def test_a_few_changes_show_nothing(changed: int, verdict: str) -> None:
    scores = [[1.0]] * changed + [[0.0]] * (12 - changed)
    assert stats.difference(scores, [[0.0]] * 12).verdict == verdict
    assert stats.mean(scores).verdict == "better", "resamples alone would show it"


def test_differences_are_paired() -> None:
    base = np.random.default_rng(4).normal(0, 10, (50, 1))
    change = stats.difference((base + 0.1).tolist(), base.tolist())
    assert change.value == pytest.approx(0.1)
    assert change.verdict == "better"
    assert stats.difference(base.tolist(), (base + 0.1).tolist()).verdict == "worse"
    other = np.random.default_rng(5).normal(0, 10, (50, 1))
    assert stats.difference(base.tolist(), other.tolist()).verdict == "no difference shown"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "better"), (0.0, 0.2, "no difference shown"), (-0.1, 0.2, "no difference shown"),
     (-0.2, 0.0, "no difference shown"), (-0.2, -0.1, "worse")],
    ids=["above", "from-0", "around", "to-0", "below"],
)  # fmt: skip
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert stats.Estimate((low + high) / 2, low, high).verdict == verdict
