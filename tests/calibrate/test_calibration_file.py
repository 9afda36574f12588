"""The file of a calibration: its content, and what is wrong with it or with the base it is used for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crdiff_export.errors import CalibrationError
from crdiff_export.progress import Silent
from crdiff_export.prune import kernels
from crdiff_export.prune.criteria import Calibration, Ranked, calibration
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.ranking import rank
from crdiff_export.sizes import Size
from tests.support import criteria_makers, makers
from tests.support.criteria_makers import NATIVE, SIZE, planned, write_calibration
from tests.support.messages import raises

DEMO = "demo.diffusers-unet"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned(tmp_path_factory.mktemp("base") / "base.safetensors", makers.tiny(DEMO))


def ranked(plan: Plan, text: str, calibration: Calibration | None = None) -> Ranked:
    return rank(replace(CriterionChoice.load(text), calibration=calibration), [plan], kernels.load("cpu", 1), Silent())


def made(
    path: Path, plan: Plan, keys: Mapping[str, str | None] | None = None, changed: Mapping[str, Any] | None = None
) -> Path:
    """A calibration of all layers; `changed` are statistics that the first layer has instead, None for lacking one."""
    statistics = criteria_makers.calibrated(plan)
    first = criteria_makers.names(plan)[0]
    values = {**statistics[first], **(changed or {})}
    statistics[first] = {kind: array for kind, array in values.items() if array is not None}
    return write_calibration(path, plan, statistics, keys)


def test_what_it_says(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan)
    opened = Calibration.open(path)
    assert (opened.path, opened.family, opened.base, opened.base_hash) == (path, "demo", "base.safetensors", "0x12")
    assert (opened.size, opened.native) == (SIZE, NATIVE)
    assert opened.statistics == criteria_makers.ALL
    assert opened.layers == criteria_makers.digests(plan)
    assert opened.facts == {"prompts": "abc"}
    assert opened.hash == "0x" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert opened.nbytes == path.stat().st_size
    assert opened.check(plan, criteria_makers.ALL) == ()
    for name, each in criteria_makers.calibrated(plan).items():
        for kind, values in each.items():
            read = opened.read(name, kind)
            assert read.dtype == (torch.float64 if kind == "norm" else torch.float32)
            assert (read.numpy() == values).all()


def test_the_header_that_is_written() -> None:
    metadata = calibration.header(
        family="demo", base="demo", base_hash="0xab", size=Size(96, 64), native=Size(64, 64),
        statistics=("norm", "gram"), layers={"b.weight": "0" * 16, "a.weight": "f" * 16}, facts={"steps": "4"},
    )  # fmt: skip
    assert metadata == {
        "crdiff.calibration": "1",
        "crdiff.calibration.family": "demo",
        "crdiff.calibration.base": "demo",
        "crdiff.calibration.base_hash": "0xab",
        "crdiff.calibration.size": "96x64",
        "crdiff.calibration.native": "64x64",
        "crdiff.calibration.statistics": "norm,gram",
        "crdiff.calibration.layers": json.dumps({"a.weight": "f" * 16, "b.weight": "0" * 16}),
        "crdiff.calibration.facts.steps": "4",
    }


def test_a_file_by_the_safetensors_library(tmp_path: Path, plan: Plan) -> None:
    from safetensors.numpy import save_file

    statistics = criteria_makers.calibrated(plan, ("norm", "gram"))
    metadata = calibration.header(
        family="demo", base="b", base_hash="0x0", size=SIZE, native=NATIVE, statistics=("norm", "gram"),
        layers=criteria_makers.digests(plan), facts={},
    )  # fmt: skip
    path = tmp_path / "c.safetensors"
    save_file({f"{kind}/{name}": each[kind] for name, each in statistics.items() for kind in each}, path, metadata)
    opened = Calibration.open(path)
    assert opened.check(plan, ("norm", "gram")) == ()
    for name, each in statistics.items():
        assert (opened.read(name, "norm").numpy() == each["norm"]).all()


# --- files that are no calibration ---


@pytest.mark.parametrize(
    ("content", "key"), [(None, "no such file"), (b"", "empty"), (b"abc", "3 bytes")], ids=["none", "empty", "short"]
)
def test_no_safetensors(tmp_path: Path, content: bytes | None, key: str) -> None:
    path = tmp_path / "c.safetensors"
    if content is not None:
        path.write_bytes(content)
    with raises(CalibrationError, path, key):
        Calibration.open(path)


def test_no_calibration(plan: Plan) -> None:
    with raises(CalibrationError, plan.checkpoint.path):
        Calibration.open(plan.checkpoint.path)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"": "2"}, "'2'"),
        *(({key: None}, key) for key in ("family", "base", "base_hash", "size", "native", "statistics", "layers")),
        ({"size": "large"}, "crdiff.calibration.size"),
        ({"native": "0"}, "crdiff.calibration.native"),
        *(({"layers": text}, "crdiff.calibration.layers") for text in ("[]", "{")),
        *(({"layers": f'{{"a.weight": {value}}}'}, "'a.weight'") for value in ("3", '"ab"')),
    ],
)
def test_headers(tmp_path: Path, plan: Plan, keys: dict[str, str | None], key: str) -> None:
    path = write_calibration(tmp_path / "c.safetensors", plan, criteria_makers.calibrated(plan, ("norm",)), keys)
    with raises(CalibrationError, path, key):
        Calibration.open(path)


# --- what does not go with the base ---


def test_another_family(tmp_path: Path, plan: Plan) -> None:
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan, {"family": "sdxl"}))
    with raises(CalibrationError, "'sdxl'", "demo"):
        opened.check(plan, ("norm",))


def test_another_size(tmp_path: Path, plan: Plan) -> None:
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan, {"size": "128"}))
    (note,) = opened.check(plan, ("norm",))
    assert "128x128" in note
    assert "96x64" in note


def test_a_missing_statistic(tmp_path: Path, plan: Plan) -> None:
    statistics = criteria_makers.calibrated(plan, ("norm", "gram"))
    path = write_calibration(tmp_path / "c.safetensors", plan, statistics)
    opened = Calibration.open(path)
    with raises(CalibrationError, path, "gradient", "norm, gram"):
        opened.check(plan, ("norm", "gradient"))
    none = Calibration.open(write_calibration(path, plan, statistics, {"statistics": ""}))
    with raises(CalibrationError, path, "norm"):
        none.check(plan, ("norm",))


def test_an_unknown_statistic(tmp_path: Path, plan: Plan) -> None:
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan, {"statistics": "norm,noise"}))
    name = criteria_makers.names(plan)[0]
    with raises(CalibrationError, "noise"):
        opened.check(plan, ("noise",))
    with raises(CalibrationError, "noise", name):
        opened.read(name, "noise")


def test_a_missing_layer(tmp_path: Path, plan: Plan) -> None:
    name = criteria_makers.names(plan)[0]
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan, changed={"gram": None}))
    assert opened.check(plan, ("norm",)) == ()
    whole = dict(list(criteria_makers.calibrated(plan).items())[1:])
    fewer = Calibration.open(write_calibration(tmp_path / "d.safetensors", plan, whole))
    for call, statistic in (
        (lambda: opened.check(plan, ("gram",)), "gram"),
        (lambda: opened.read(name, "gram"), "gram"),
        (lambda: fewer.check(plan, ("norm",)), "norm"),
    ):
        with raises(CalibrationError, statistic, name):
            call()


def test_a_layer_of_a_group_that_is_left_alone_may_be_missing(tmp_path: Path) -> None:
    plan = planned(tmp_path / "b.safetensors", makers.tiny(DEMO), {"down": 0, "mid": 0.2, "up": 0.1})
    statistics = {n: each for n, each in criteria_makers.calibrated(plan).items() if not n.startswith("down_blocks")}
    opened = Calibration.open(write_calibration(tmp_path / "c.safetensors", plan, statistics))
    assert opened.check(plan, ("norm",)) == ()
    ranking = ranked(plan, "wanda", opened)
    assert [t.pruned > 0 for t in ranking.decide(plan).thresholds] == [False, True, True]
    with raises(CalibrationError, next(n for n in criteria_makers.names(plan) if n.startswith("down_blocks"))):
        ranking.decide(criteria_makers.with_ratio(plan, 0.1))


def test_another_shape_or_dtype(tmp_path: Path, plan: Plan) -> None:
    name, (rows, columns) = criteria_makers.names(plan)[0], criteria_makers.weights(plan)[0].shape
    wider = criteria_makers.statistics((rows, columns + 1))
    cases = [
        ("norm", wider["norm"], f"F64 [{columns + 1}]"),
        ("norm", np.ones(columns, np.float32), f"F32 [{columns}]"),
        ("gram", wider["gram"], f"F32 [{columns + 1}, {columns + 1}]"),
        ("gradient", wider["gradient"], f"F32 [{rows}, {columns + 1}]"),
    ]
    for kind, values, shape in cases:
        opened = Calibration.open(made(tmp_path / "c.safetensors", plan, changed={kind: values}))
        for call in (partial(opened.check, plan, (kind,)), partial(opened.read, name, kind, (rows, columns))):
            with raises(CalibrationError, f"{kind}/{name}", shape):
                call()
    for kind, values, shape in (("gram", np.ones((3, 4), np.float32), "F32 [3, 4]"), ("norm", np.array(3.0), "F64 []")):
        opened = Calibration.open(made(tmp_path / "c.safetensors", plan, changed={kind: values}))
        with raises(CalibrationError, f"{kind}/{name}", shape):
            opened.read(name, kind)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("norm", "wanda"), ("gram", "obs"), ("gradient_square", "taylor"), ("native_gradient", "adverse")],
)
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_statistics_that_are_not_finite(tmp_path: Path, plan: Plan, kind: str, spec: str, odd: float) -> None:
    name, shape = criteria_makers.names(plan)[0], criteria_makers.weights(plan)[0].shape
    values = criteria_makers.statistics(shape)[kind].copy()
    values.flat[[0, 3]] = odd
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan, changed={kind: values}))
    for call in (partial(opened.read, name, kind), partial(ranked, plan, spec, opened)):
        with raises(CalibrationError, f"2 numbers of {kind}/{name}"):
            call()


def test_weights_of_another_base(tmp_path: Path, plan: Plan) -> None:
    other = planned(tmp_path / "other.safetensors", makers.tiny(DEMO, seed=1))
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan))
    name = criteria_makers.names(plan)[0]
    with raises(CalibrationError, "another base", name):
        ranked(other, "wanda", opened)
    fewer = json.dumps(dict(list(criteria_makers.digests(plan).items())[1:]))
    with raises(CalibrationError, name):
        ranked(plan, "wanda", Calibration.open(made(tmp_path / "d.safetensors", plan, {"layers": fewer})))


def test_a_file_that_became_shorter(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan)
    opened, name = Calibration.open(path), criteria_makers.names(plan)[-1]
    with path.open("rb+") as file:
        file.truncate(opened.source.data_start + 8)
    with raises(CalibrationError, path, "shorter"):
        opened.read(name, "gram")
    with raises(CalibrationError, path, "changed"):
        _ = opened.hash
    path.unlink()
    with raises(CalibrationError, path, "No such file"):
        _ = opened.hash


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan)
    opened, data = Calibration.open(path), path.read_bytes()
    assert opened.hash
    path.unlink()
    path.write_bytes(data[:-8] + bytes(8))
    with raises(CalibrationError, path, "changed"):
        opened.read(criteria_makers.names(plan)[0], "norm")


def test_the_header_is_part_of_the_hash(tmp_path: Path, plan: Plan) -> None:
    statistics = criteria_makers.calibrated(plan, ("norm",))
    digests = dict.fromkeys(criteria_makers.digests(plan), "0" * 16)
    changes = [("size", "128x128"), ("native", "32x32"), ("base", "x"), ("facts.prompts", "abd")]
    changes += [("layers", json.dumps(digests)), ("base_hash", "0x12"), ("base_hash", "0x12")]  # twice as it is
    hashes = [
        Calibration.open(write_calibration(tmp_path / "c.safetensors", plan, statistics, {key: text})).hash
        for key, text in changes
    ]
    assert hashes[-1] == hashes[-2]
    assert len(set(hashes)) == len(changes) - 1


def test_the_hash_is_read_with_progress(tmp_path: Path, plan: Plan) -> None:
    class Bytes(Silent):
        seen = 0

        def advance(self, size: int) -> None:
            self.seen += size

    opened, progress = Calibration.open(made(tmp_path / "c.safetensors", plan)), Bytes()
    assert opened.hashed(progress) == opened.hash
    assert progress.seen == opened.nbytes


def test_doubles(tmp_path: Path) -> None:
    plan = planned(tmp_path / "b.safetensors", makers.tiny(DEMO, "F64"), cast="F32")
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan))
    with raises(CalibrationError, "F64", repr(plan.targets[0].name)):
        opened.check(plan, ("norm",))
