"""Every criterion's scores and OBS's compensation against slow implementations; what a user writes for a criterion."""

import hashlib
import tomllib
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crdiff_export.errors import CalibrationError, OptionError
from crdiff_export.prune import CriterionChoice, criteria
from crdiff_export.prune.criteria import Layer, Spec, obs, spec
from crdiff_export.prune.criteria.obs import Compensating, Obs
from tests.support import ROOT, criteria_makers
from tests.support.criteria_makers import Numbers, hessian, settled
from tests.support.messages import raises

ROWS, COLUMNS = 5, 7


def layer_of(
    weight: Numbers, found: Mapping[str, Any], ratio: float = 0.5, name: str = "a.weight", **changed: Any
) -> Layer:
    tensors = {kind: torch.from_numpy(np.asarray(values)) for kind, values in {**found, **changed}.items()}
    return Layer(name, torch.from_numpy(weight.astype(np.float32)), tensors, ratio)


def weight_of(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Numbers:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32).astype(np.float64)


def scores_of(text: str, layer: Layer) -> Numbers:
    loaded = CriterionChoice.load(text)
    assert loaded.criterion
    scores = loaded.criterion.score(layer)
    assert (scores.dtype, scores.shape) == (torch.float32, layer.weight.shape)
    return scores.double().numpy()


# --- scores ---


@pytest.mark.parametrize(
    "text",
    [
        "wanda", "taylor", "taylor:form=abs", "adverse", "adverse:form=steady", "adverse:form=signed",
        "adverse:form=guarded", "adverse:form=second", "adverse:form=channel",
    ],
)  # fmt: skip
def test_scores(text: str) -> None:
    weight, found = weight_of(), criteria_makers.statistics((ROWS, COLUMNS))
    layer = layer_of(weight, {kind: found[kind] for kind in CriterionChoice.load(text).statistics})
    expected = criteria_makers.formula(text, weight, found)
    np.testing.assert_allclose(scores_of(text, layer), expected, rtol=2e-6, atol=1e-9)


def test_channels_go_together() -> None:
    scores = scores_of("adverse:form=channel", layer_of(weight_of(), criteria_makers.statistics((ROWS, COLUMNS))))
    assert (scores == scores[0]).all()
    assert len(set(scores[0].tolist())) == COLUMNS


def row(*values: float) -> Any:
    return np.array([values], np.float32)


# Weights, statistics, and scores for each criterion.
BY_HAND: dict[str, tuple[Any, dict[str, Any], dict[str, list[list[float]]]]] = {
    "inputs of norms 3 and 1/2": (
        np.array([[1.0, -2.0], [3.0, 0.5]]), {"norm": np.array([9.0, 0.25])}, {"wanda": [[3, 1], [9, 0.25]]}
    ),
    # Without the first weight the loss falls by 2 at the target size and by 1 at the native one, without the second it
    # rises by 1 there and falls by 4 here, without the third it rises by 2 at both.
    "means": (
        row(2, 1, -1), {"gradient": row(1, -1, 2), "native_gradient": row(0.5, 4, 2)},
        {"adverse:form=signed": [[-2 + 1, 1 + 4, 2 - 2]], "adverse:form=guarded": [[-2, 1, 2 + 2]]},
    ),
    # Without the first weight both losses fall, here by more; without the second the native one alone rises; the third
    # has no gradient at all. The fourth's samples all agree: its loss falls at the target size, and rises here.
    "squares": (
        row(0.5, -1, 4, 2),
        {"gradient": row(1, 0, 0, 2), "gradient_square": row(4, 1, 0, 4), "native_gradient": row(2, 3, 0, -3),
         "native_gradient_square": row(16, 9, 0, 9)},
        {"adverse": [[0.5, -1, 4, -0.5]], "adverse:form=steady": [[0.5 * 1, 1 * 0.5, 4, 2 * 0]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("weight", "found", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_scores_by_hand(weight: Numbers, found: dict[str, Any], expected: dict[str, list[list[float]]]) -> None:
    for text, scores in expected.items():
        np.testing.assert_allclose(scores_of(text, layer_of(weight, found)), scores, rtol=1e-6)


def test_a_coin_is_the_control_of_small() -> None:
    """As many weights come first, by magnitude as well, but no gradient says which."""
    weight = weight_of(40, 50)
    scores = scores_of("adverse:form=coin", layer_of(weight, {}))
    first = scores < 0
    assert first.mean() == pytest.approx(0.5, abs=0.001)
    assert abs(np.corrcoef(first.ravel(), np.abs(weight).ravel())[0, 1]) < 0.1
    for group in (first, ~first):
        assert (np.argsort(scores[group], kind="stable") == np.argsort(np.abs(weight)[group], kind="stable")).all()
    assert (scores == scores_of("adverse:form=coin", layer_of(weight, {}))).all()
    assert (scores != scores_of("adverse:form=coin", layer_of(weight, {}, name="b.weight"))).any()
    assert CriterionChoice.load("adverse:form=coin").statistics == ()


# --- random ---


def philox(key: int, count: int) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011), from the counter 1 on, in Python's integers."""
    word, numbers = (1 << 64) - 1, []
    for counter in range(1, -(-count // 4) + 1):
        c, k = [counter, 0, 0, 0], [key & word, key >> 64]
        for _ in range(10):
            first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(second >> 64) ^ c[1] ^ k[0], second & word, (first >> 64) ^ c[3] ^ k[1], first & word]
            k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
        numbers += c
    return numbers[:count]


def test_random_numbers() -> None:
    layer = layer_of(weight_of(), {})
    key = int.from_bytes(hashlib.sha256(b"7/a.weight").digest()[:16], "little")
    bits = [(n >> 32) * 0x7F00_0000 // (1 << 32) + 0x0080_0000 for n in philox(key, ROWS * COLUMNS)]
    expected = np.array(bits, np.uint32).view(np.float32).reshape(ROWS, COLUMNS)
    assert (scores_of("random:seed=7", layer) == expected).all()


def test_random_orders() -> None:
    weight = weight_of(100, 300)
    first = scores_of("random", layer_of(weight, {}))
    scores_of("random", layer_of(weight, {}, name="b.weight"))
    assert (scores_of("random", layer_of(-weight, {})) == first).all(), "what came before and the weights do not matter"
    assert len(np.unique(first)) == first.size
    assert np.isfinite(first).all()
    others = [scores_of("random:seed=1", layer_of(weight, {})), scores_of("random", layer_of(weight, {}, name="b"))]
    for other in others:
        order = np.corrcoef(first.ravel().argsort().argsort(), other.ravel().argsort().argsort())[0, 1]
        assert abs(order) < 0.03  # five standard deviations of 30 000 pairs without any relation


# --- OBS ---


def compensated(layer: Layer, mask: Any, damping: float = 0.01) -> Numbers:
    moved: Tensor = Compensating(damping).compensate(layer, torch.from_numpy(np.asarray(mask)))
    assert (moved.dtype, moved.shape) == (torch.float32, layer.weight.shape)
    return moved.double().numpy()


def test_obs_by_hand() -> None:
    # The mean diagonal is 2, half of it makes H [[3, 1], [1, 3]], and H^-1 [[3, -1], [-1, 3]] / 8. So U_00^2 is 3/8,
    # and U_11^2 is the inverse of 3.
    layer = layer_of(np.array([[2.0, -1.0], [1.0, 3.0]]), {"gram": np.array([[2, 1], [1, 2]], np.float32)})
    expected = [[4 * 8 / 3, 1 * 3], [1 * 8 / 3, 9 * 3]]
    np.testing.assert_allclose(Obs(0.5).score(layer).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(scores_of("obs:damping=0.5", layer), expected, rtol=1e-6)
    # Without 2 the other weight takes 2 / (3/8) / 8 = 2/3; without the last weight nothing is left to move.
    np.testing.assert_allclose(
        compensated(layer, [[True, False], [False, True]], 0.5), [[0.0, -1 / 3], [1.0, 0.0]], rtol=1e-6
    )
    np.testing.assert_allclose(
        compensated(layer, [[False, False], [True, False]], 0.5), [[2.0, -1.0], [0.0, 10 / 3]], rtol=1e-6
    )


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_obs_scores(damping: float) -> None:
    weight, found = weight_of(4, 150), criteria_makers.statistics((4, 150))
    h = hessian(found["gram"], damping)
    expected = np.stack([weight[:, j] ** 2 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(150)], 1)
    for compensate in ("on", "off"):
        scores = scores_of(f"obs:damping={damping},compensate={compensate}", layer_of(weight, found))
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("columns", [1, 9, 128, 129, 300])
def test_compensation(columns: int) -> None:
    weight, found = weight_of(3, columns), criteria_makers.statistics((3, columns), tokens=400)
    mask = np.random.default_rng(1).random(weight.shape) < 0.4
    mask[1] = np.arange(columns) == columns // 2  # a single weight
    mask[2] = False
    moved = compensated(layer_of(weight, found), mask)
    np.testing.assert_allclose(moved, settled(weight, mask, hessian(found["gram"])), atol=2e-5)
    assert (moved[mask] == 0).all()
    assert (moved[2] == weight[2]).all()


def output_error(weight: Numbers, now: Numbers, inputs: Numbers) -> float:
    """||(W - W') X||."""
    return float(np.linalg.norm((weight - now) @ inputs.T))


@given(seed=st.integers(0, 1000), share=st.floats(0.1, 0.7))
@settings(max_examples=20)
def test_compensation_makes_up_for_what_goes(seed: int, share: float) -> None:
    # Inputs that have a few causes in common, as those of a network do.
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((200, 4)) @ rng.standard_normal((4, 24)) + rng.standard_normal((200, 24))
    weight = weight_of(16, 24, seed)
    layer = layer_of(weight, {"gram": (inputs.T @ inputs).astype(np.float32)})
    scores = scores_of("obs", layer)
    mask = scores <= np.quantile(scores, share)
    moved = compensated(layer, mask)
    assert output_error(weight, moved, inputs) < output_error(weight, np.where(mask, 0, weight), inputs)


@given(seed=st.integers(0, 1000), gone=st.integers(1, 23))
@settings(max_examples=20)
def test_it_is_the_best_there_is_where_the_first_columns_go(seed: int, gone: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, weight = rng.standard_normal((60, 24)), weight_of(4, 24, seed)
    gram = (inputs.T @ inputs).astype(np.float32)
    h, mask = hessian(gram), np.zeros(weight.shape, bool)
    mask[:, :gone] = True
    # Least squares: what stays takes H_ss^-1 H_sg of what goes.
    right = np.where(mask, 0, weight)
    right[:, gone:] += np.linalg.solve(h[gone:, gone:], h[gone:, :gone] @ weight[:, :gone].T).T
    np.testing.assert_allclose(compensated(layer_of(weight, {"gram": gram}), mask), right, atol=1e-4)


def test_dead_inputs() -> None:
    weight, found = weight_of(3, 6), criteria_makers.statistics((3, 6))
    gram = found["gram"].copy()
    gram[2] = gram[:, 2] = 0
    layer, h = layer_of(weight, found, gram=gram), hessian(gram)
    scores = scores_of("obs", layer)
    assert (scores[:, 2] == 0).all()
    assert (np.delete(scores, 2, 1) > 0).all()
    mask = np.zeros(weight.shape, bool)
    mask[:, 1] = True
    moved = compensated(layer, mask)
    np.testing.assert_allclose(moved, settled(weight, mask, h), atol=1e-5)
    assert (moved[:, 2] == weight[:, 2]).all()


def sparsegpt(weight: Numbers, h: Numbers, ratio: float, block: int = 128) -> tuple[Any, Numbers]:
    """SparseGPT as its authors wrote it down, in float64, but for one weight fewer a block."""
    w = weight.copy()
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.zeros(w.shape, bool)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        scores = w[:, start:stop] ** 2 / np.diag(u)[start:stop] ** 2
        mask[:, start:stop] = scores <= np.sort(scores, axis=None)[int(scores.size * ratio) - 1]
        for j in range(start, stop):
            for i in range(len(w)):
                if mask[i, j]:
                    w[i] -= w[i, j] / u[j, j] * u[j]
                    w[i, j] = 0
    return mask, w


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_the_choice_of_sparsegpt(ratio: float) -> None:
    weight, found = weight_of(4, 300), criteria_makers.statistics((4, 300), tokens=500)
    mask, moved = Compensating(0.01).choose(layer_of(weight, found, ratio))
    expected, values = sparsegpt(weight, hessian(found["gram"]), ratio)
    assert (mask.numpy() == expected).all()
    np.testing.assert_allclose(moved.numpy(), values, atol=2e-4)
    assert [int(mask[:, a : a + 128].sum()) for a in (0, 128, 256)] == [
        int(4 * n * ratio) for n in (128, 128, 44)
    ]  # fmt: skip


def test_what_sparsegpt_takes_whatever_the_ratio() -> None:
    weight, found = weight_of(3, 6), criteria_makers.statistics((3, 6))
    gram = found["gram"].copy()
    gram[2] = gram[:, 2] = 0
    weight[1, 4] = 0
    mask, moved = Compensating(0.01).choose(layer_of(weight, found, 0.01, gram=gram))
    expected = np.zeros(weight.shape, bool)
    expected[:, 2] = expected[1, 4] = True
    assert (mask.numpy() == expected).all()
    assert (moved.numpy()[expected] == 0).all()


def test_damping_is_raised_where_it_is_too_little() -> None:
    # The eigenvalues are 2.05 and -0.05: a tenth of the mean diagonal mends them, a hundredth does not.
    gram = np.array([[1, 1.05], [1.05, 1]], np.float32)
    layer = layer_of(weight_of(3, 2), {"gram": gram})
    assert (scores_of("obs", layer) == scores_of("obs:damping=0.1", layer)).all()
    np.testing.assert_allclose(scores_of("obs", layer)[:, 1], layer.weight[:, 1].double() ** 2 * 1.1, rtol=1e-6)
    worse = layer_of(weight_of(3, 2), {"gram": gram - 30 * np.eye(2, dtype=np.float32)})
    with raises(CalibrationError, "a.weight", "damping up to 10"):
        scores_of("obs", worse)


def test_obs_tells_where_it_raised_the_damping() -> None:
    # Off the diagonal all are 1.05, so the least eigenvalue is -0.05, which damping has to raise above 0.
    bad = np.full((3, 3), 1.05)
    np.fill_diagonal(bad, 1)
    layers = [layer_of(weight_of(2, 3), {"gram": gram.astype(np.float32)}) for gram in (bad, np.eye(3))]
    criterion = Compensating(0.02)
    assert criterion.notes([]) == criterion.notes(["a.weight"]) == ()
    criterion.compensate(layers[0], layers[0].weight > 0)
    assert criterion.notes(["a.weight"]) == ("damping was raised for 1 of 1 layers, to at most 0.2 (a.weight)",)
    criterion.score(layers[1])  # the same layer of another calibration
    assert criterion.notes(["a.weight"]) == ()


class Matrices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many matrices of `count` float64 there are at once, at most."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count, self._seen, self.most = count, list[ReferenceType[Tensor]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(found) if isinstance(one, Tensor) and one.numel() == self._count]
        self._seen += [ref(one) for one in made if one.dtype == torch.float64]
        self.most = max(self.most, len({one.data_ptr() for known in self._seen if (one := known()) is not None}))
        return found


@pytest.mark.parametrize("raised", [False, True])
def test_a_factor_takes_one_matrix_of_float64(monkeypatch: pytest.MonkeyPatch, *, raised: bool) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400 if raised else 900, 300))
    gram = torch.from_numpy((inputs.T @ inputs).astype(np.float32))
    gram += 1e-2 * torch.rand(gram.shape, generator=torch.Generator().manual_seed(0))  # symmetric but for last bits
    if raised:
        gram.diagonal().sub_(20)
    gram[5] = gram[:, 5] = 0
    before = gram.clone()
    with Matrices(gram.numel()) as seen:
        factor, dead, attempt = obs._factorise("a", gram, 0.01)
    assert (seen.most, attempt) == (1, int(raised))
    assert torch.equal(gram, before)
    damped = gram.double()
    damped[5, 5] = 1
    damped.diagonal().add_(0.01 * 10**attempt * damped.diagonal().mean())
    assert torch.equal(factor, torch.linalg.cholesky(damped.T.flip(0, 1)).flip(0, 1).float())
    lower = damped.tril() + damped.tril(-1).T  # what it goes by, where the other half differs
    of_inverse = torch.linalg.cholesky(torch.linalg.inv(lower), upper=True)
    torch.testing.assert_close(torch.linalg.inv(factor.double()), of_inverse, rtol=0, atol=1e-6 * of_inverse.max())
    assert dead.nonzero().tolist() == [[5]]
    monkeypatch.setattr(obs, "_in_place", lambda _: False)  # as on a GPU
    assert torch.equal(obs._factorise("a", gram, 0.01)[0], factor)


# --- what a user writes ---


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("magnitude", "magnitude"),
        (" uniform ", "uniform"),
        ("wanda:compare=block", "wanda"),
        ("wanda:compare=row", "wanda:compare=row"),
        ("random:seed=007", "random:seed=7"),
        ("random:seed=0", "random"),
        ("taylor:form=abs, compare=row", "taylor:compare=row,form=abs"),
        ("obs:damping=1e-2,compensate=on", "obs"),
        ("obs:damping=.5,compensate=off", "obs:compensate=off,damping=0.5"),
        ("obs:compare=layer", "obs:compare=layer"),
        ("adverse:form=guarded", "adverse:form=guarded"),
    ],
)
def test_specs(text: str, canonical: str) -> None:
    parsed = Spec.parse(text)
    assert str(parsed) == canonical
    assert Spec.parse(canonical) == parsed


def test_values() -> None:
    assert Spec.parse("obs:compare=row,damping=1").values == {"compensate": "on", "damping": "1.0"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("wnda", "'wnda'"),
        ("", "''"),
        (":form=abs", "':form=abs'"),
        ("wanda:", "'wanda:'"),
        ("wanda:row", "'row'"),
        ("taylor:form=", "'form='"),
        ("magnitude:compare=row", "'compare'"),
        ("wanda:form=abs", "'form'"),
        ("random:sed=1", "'sed'"),
        ("obs:damping=1,damping=2", "damping"),
        ("wanda:compare=layer", "'layer'"),
        *((f"random:seed={value}", f"'{value}'") for value in ("-1", "x")),
        *((f"obs:damping={value}", f"'{value}'") for value in ("0", "-1", "inf", "nan", "much")),
        ("obs:compensate=off,compare=layer", "compensate=off"),
    ],
)
def test_bad_specs(text: str, key: str) -> None:
    with raises(OptionError, key):
        CriterionChoice.load(text)


def test_what_is_loaded() -> None:
    for name in criteria.names():
        loaded = CriterionChoice.load(name)
        assert loaded.name == loaded.spec.name == name
        assert (loaded.criterion is None) == (name in ("magnitude", "uniform"))
        assert loaded.moves == (name == "obs")
        assert loaded.compare == "block"
    assert CriterionChoice.load("random").statistics == ()
    assert CriterionChoice.load("obs").statistics == ("gram",)
    assert CriterionChoice.load("magnitude").statistics == ()
    assert not CriterionChoice.load("obs:compensate=off").moves


# --- entry points ---


THEIRS = """
import torch
from crdiff_export.errors import OptionError

class Made:
    statistics = ("norm",)
    def __init__(self, options):
        self.options = dict(options)
    def score(self, layer):
        return torch.zeros_like(layer.weight)

def make(options):
    if set(options) - {"power"}:
        raise OptionError(f"theirs has no option {sorted(options)[0]!r}", "Give power.")
    return Made(options)

class Listed:
    statistics = ["norm"]
    score = Made.score

class Scoreless:
    statistics = ()

number = 3
def none(options): return None
def listed(options): return Listed()
def scoreless(options): return Scoreless()
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ranked_by_them.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    offered = [
        EntryPoint(name, f"ranked_by_them:{place}", spec.GROUP)
        for name, place in (
            ("theirs", "make"), ("wanda", "make"), ("gone", "gone"), ("number", "number"), ("none", "none"),
            ("listed", "listed"), ("scoreless", "scoreless"),
        )
    ]  # fmt: skip
    offered.append(EntryPoint("missing", "no_such_module_of_theirs:make", spec.GROUP))
    monkeypatch.setattr(spec, "entry_points", lambda group: [one for one in offered if one.group == group])


@pytest.mark.usefixtures("theirs")
def test_another_packages_criterion() -> None:
    assert criteria.names()[:7] == ("magnitude", "uniform", "random", "wanda", "taylor", "obs", "adverse")
    assert criteria.names()[7:] == ("gone", "listed", "missing", "none", "number", "scoreless", "theirs")
    loaded = CriterionChoice.load("theirs:power=2,compare=row")
    assert loaded.criterion
    assert (loaded.statistics, loaded.compare, loaded.moves) == (("norm",), "row", False)
    assert vars(loaded.criterion)["options"] == {"power": "2"}
    assert loaded.name == "theirs:compare=row,power=2"
    assert CriterionChoice.load("theirs:compare=block").name == "theirs"
    assert CriterionChoice.load("wanda").criterion.__class__.__name__ == "Wanda", "a built-in name is ours"


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("text", "key"),
    [
        *((name, f"ranked_by_them:{name}") for name in ("gone", "number", "none", "listed", "scoreless")),
        ("missing", "no_such_module_of_theirs"),
        ("theirs:size=1", "'size'"),
        ("theirs:compare=all", "'all'"),
        ("theirs:power", "'power'"),
    ],
)
def test_mistakes_of_another_package(text: str, key: str) -> None:
    with raises(OptionError, key):
        CriterionChoice.load(text)


def test_the_built_in_ones_are_entry_points_too() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"][spec.GROUP] == spec.SCORED
    assert set(spec.OPTIONS) == {*spec.SCORED, *spec.MAGNITUDES}
