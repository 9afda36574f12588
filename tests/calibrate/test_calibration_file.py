"""The file of a calibration: what it says, and what is wrong with it or with the base it is used for."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crdiff_export.errors import CalibrationError, CrdiffError, OptionError
from crdiff_export.progress import Silent
from crdiff_export.prune import criteria, kernels
from crdiff_export.prune.criteria import Calibration, calibration
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size
from tests.support import criteria_makers, makers
from tests.support.criteria_makers import NATIVE, SIZE, planned, write_calibration

AGAIN = "Calibrate again, or give another file."
OWN = "Give a calibration of this base, or calibrate it."


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(tmp_path / "base.safetensors", makers.tiny("demo.diffusers-unet"))


def refusal(call: Callable[[], object], kind: type[CrdiffError] = CalibrationError) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.message, caught.value.hint


def made(
    path: Path, plan: Plan, said: Mapping[str, str | None] | None = None, changed: Mapping[str, Any] | None = None
) -> Path:
    """A calibration of all layers; `changed` are statistics that the first layer has instead, None for lacking one."""
    found = criteria_makers.calibrated(plan)
    first = criteria_makers.names(plan)[0]
    found[first] = {kind: values for kind, values in {**found[first], **(changed or {})}.items() if values is not None}
    return write_calibration(path, plan, found, said)


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
    said = calibration.header(
        family="demo", base="demo", base_hash="0xab", size=Size(96, 64), native=Size(64, 64),
        statistics=("norm", "gram"), layers={"b.weight": "0" * 16, "a.weight": "f" * 16}, facts={"steps": "4"},
    )  # fmt: skip
    assert said == {
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

    found = criteria_makers.calibrated(plan, ("norm", "gram"))
    said = calibration.header(
        family="demo", base="b", base_hash="0x0", size=SIZE, native=NATIVE, statistics=("norm", "gram"),
        layers=criteria_makers.digests(plan), facts={},
    )  # fmt: skip
    path = tmp_path / "c.safetensors"
    save_file({f"{kind}/{name}": each[kind] for name, each in found.items() for kind in each}, path, said)
    opened = Calibration.open(path)
    assert opened.check(plan, ("norm", "gram")) == ()
    for name, each in found.items():
        assert (opened.read(name, "norm").numpy() == each["norm"]).all()


# --- files that are none ---


def test_no_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    assert refusal(lambda: Calibration.open(path)) == (
        f"{path}: no such file",
        "Check the path and its permissions.",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"abc", "the file has 3 bytes, too few for a header")],
)
def test_no_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    assert refusal(lambda: Calibration.open(path)) == (f"{path}: {message}", AGAIN)


def test_no_calibration(tmp_path: Path, plan: Plan) -> None:
    path = plan.checkpoint.path
    assert refusal(lambda: Calibration.open(path)) == (
        f"{path}: is not a calibration",
        f"Its header has no crdiff.calibration. {AGAIN}",
    )


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        (
            {"": "2"}, "is a calibration of version '2', version 1 is known here",
            "Calibrate again, or use the crdiff that made it.",
        ),
        *(
            ({key: None}, f"its header has no crdiff.calibration.{key}", AGAIN)
            for key in ("family", "base", "base_hash", "size", "native", "statistics", "layers")
        ),
        ({"size": "large"}, "crdiff.calibration.size is 'large', which is not a size", AGAIN),
        ({"native": "0"}, "crdiff.calibration.native is '0', which is not a size", AGAIN),
        ({"layers": "[]"}, "crdiff.calibration.layers is not a JSON object", AGAIN),
        (
            {"layers": "{"},
            ("crdiff.calibration.layers is not JSON: "
             "Expecting property name enclosed in double quotes at character 1"), AGAIN,
        ),
        ({"layers": '{"a.weight": 3}'}, "crdiff.calibration.layers has 3 for 'a.weight'", AGAIN),
        ({"layers": '{"a.weight": "ab"}'}, "crdiff.calibration.layers has 'ab' for 'a.weight'", AGAIN),
    ],
)  # fmt: skip
def test_headers(tmp_path: Path, plan: Plan, said: dict[str, str | None], message: str, hint: str) -> None:
    path = made(tmp_path / "c.safetensors", plan, said)
    assert refusal(lambda: Calibration.open(path)) == (f"{path}: {message}", hint)


# --- what does not go with the base ---


def test_another_family(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan, {"family": "sdxl"})
    opened = Calibration.open(path)
    base = plan.checkpoint.path
    assert refusal(lambda: opened.check(plan, ("norm",))) == (f"{path}: is of the family 'sdxl', {base} of demo", OWN)


def test_another_size(tmp_path: Path, plan: Plan) -> None:
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan, {"size": "128"}))
    assert opened.check(plan, ("norm",)) == (
        "c.safetensors was made at 128x128, this is for 96x64: other weights may matter at that size",
    )


def test_a_missing_statistic(tmp_path: Path, plan: Plan) -> None:
    found = criteria_makers.calibrated(plan, ("norm", "gram"))
    path = write_calibration(tmp_path / "c.safetensors", plan, found)
    opened = Calibration.open(path)
    hint = "Calibrate again for this criterion."
    message = f"{path}: has no gradient, it has norm, gram"
    assert refusal(lambda: opened.check(plan, ("norm", "gradient"))) == (message, hint)
    ranked = refusal(
        lambda: criteria.rank([plan], criteria.load("adverse"), kernels.load("cpu", 1), Silent(), calibration=opened)
    )
    assert ranked == (message, hint)
    none = write_calibration(path, plan, found, {"statistics": ""})
    assert refusal(lambda: Calibration.open(none).check(plan, ("norm",)))[0] == f"{path}: has no norm, it has nothing"


def test_a_statistic_that_nobody_knows(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan, {"statistics": "norm,noise"})
    opened, name = Calibration.open(path), criteria_makers.names(plan)[0]
    assert refusal(lambda: opened.check(plan, ("noise",)))[0] == f"{path}: has no noise, it has norm, noise"
    assert refusal(lambda: opened.read(name, "noise")) == (f"{path}: has no noise of {name}", OWN)


def test_a_missing_layer(tmp_path: Path, plan: Plan) -> None:
    name = criteria_makers.names(plan)[0]
    path = made(tmp_path / "c.safetensors", plan, changed={"gram": None})
    opened = Calibration.open(path)
    assert opened.check(plan, ("norm",)) == ()
    for call in (lambda: opened.check(plan, ("gram",)), lambda: opened.read(name, "gram")):
        assert refusal(call) == (f"{path}: has no gram of {name}", OWN)
    whole = dict(list(criteria_makers.calibrated(plan).items())[1:])
    path = write_calibration(path, plan, whole)
    assert refusal(lambda: Calibration.open(path).check(plan, ("norm",)))[0] == f"{path}: has no norm of {name}"


def test_a_layer_of_a_group_that_is_left_alone_may_be_missing(tmp_path: Path) -> None:
    plan = planned(tmp_path / "b.safetensors", makers.tiny("demo.diffusers-unet"), {"down": 0, "mid": 0.2, "up": 0.1})
    found = {n: each for n, each in criteria_makers.calibrated(plan).items() if not n.startswith("down_blocks")}
    opened = Calibration.open(write_calibration(tmp_path / "c.safetensors", plan, found))
    assert opened.check(plan, ("norm",)) == ()
    ranked = criteria.rank([plan], criteria.load("wanda"), kernels.load("cpu", 1), Silent(), calibration=opened)
    assert [t.pruned > 0 for t in ranked.decide(plan).thresholds] == [False, True, True]
    other = criteria_makers.with_ratio(plan, 0.1)
    name = next(n for n in criteria_makers.names(plan) if n.startswith("down_blocks"))
    assert refusal(lambda: ranked.decide(other))[0] == f"{opened.path}: has no norm of {name}"


def test_another_shape(tmp_path: Path, plan: Plan) -> None:
    name, (rows, columns) = criteria_makers.names(plan)[0], criteria_makers.weights(plan)[0].shape
    wider = criteria_makers.statistics((rows, columns + 1))
    cases = {
        "norm": (wider["norm"], f"F64 [{columns + 1}], not F64 [{columns}]"),
        "gram": (wider["gram"], f"F32 [{columns + 1}, {columns + 1}], not F32 [{columns}, {columns}]"),
        "gradient": (wider["gradient"], f"F32 [{rows}, {columns + 1}], not F32 [{rows}, {columns}]"),
    }
    for kind, (values, said) in cases.items():
        path = made(tmp_path / f"{kind}.safetensors", plan, changed={kind: values})
        opened = Calibration.open(path)
        expected = f"{path}: {kind}/{name} is {said}", OWN
        assert refusal(partial(opened.check, plan, (kind,))) == expected
        assert refusal(partial(opened.read, name, kind, (rows, columns))) == expected
    oblong = made(tmp_path / "oblong.safetensors", plan, changed={"gram": np.ones((3, 4), np.float32)})
    said = f"{oblong}: gram/{name} is F32 [3, 4], not F32 [4, 4]"
    assert refusal(lambda: Calibration.open(oblong).read(name, "gram"))[0] == said
    single = made(tmp_path / "single.safetensors", plan, changed={"norm": np.array(3.0)})
    said = f"{single}: norm/{name} is F64 [], not F64 [0]"
    assert refusal(lambda: Calibration.open(single).read(name, "norm"))[0] == said


def test_another_dtype(tmp_path: Path, plan: Plan) -> None:
    name, columns = criteria_makers.names(plan)[0], criteria_makers.weights(plan)[0].shape[1]
    path = made(tmp_path / "c.safetensors", plan, changed={"norm": np.ones(columns, np.float32)})
    message = f"{path}: norm/{name} is F32 [{columns}], not F64 [{columns}]"
    assert refusal(lambda: Calibration.open(path).read(name, "norm")) == (message, OWN)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("norm", "wanda"), ("gram", "obs"), ("gradient_square", "taylor"), ("native_gradient", "adverse")],
)
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_numbers_that_are_none(tmp_path: Path, plan: Plan, kind: str, spec: str, odd: float) -> None:
    name, shape = criteria_makers.names(plan)[0], criteria_makers.weights(plan)[0].shape
    values = criteria_makers.statistics(shape)[kind].copy()
    values.flat[[0, 3]] = odd
    path = made(tmp_path / "c.safetensors", plan, changed={kind: values})
    opened = Calibration.open(path)
    expected = f"{path}: 2 numbers of {kind}/{name} are not finite", AGAIN
    assert refusal(lambda: opened.read(name, kind)) == expected
    ranked = refusal(
        lambda: criteria.rank([plan], criteria.load(spec), kernels.load("cpu", 1), Silent(), calibration=opened)
    )
    assert ranked == expected


def test_another_bases_weights(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan)
    other = planned(tmp_path / "other.safetensors", makers.tiny("demo.diffusers-unet", seed=1))
    opened, kernel = Calibration.open(path), kernels.load("cpu", 1)
    name = criteria_makers.names(plan)[0]
    message = f"{path}: was made of another base: {name} has other weights"
    ranked = refusal(lambda: criteria.rank([other], criteria.load("wanda"), kernel, Silent(), calibration=opened))
    assert ranked == (message, OWN)
    criteria.rank([other], criteria.load("random"), kernel, Silent(), calibration=opened)  # which does not use it
    fewer = dict(list(criteria_makers.digests(plan).items())[1:])
    path = made(path, plan, {"layers": json.dumps(fewer)})
    opened = Calibration.open(path)
    ranked = refusal(lambda: criteria.rank([plan], criteria.load("wanda"), kernel, Silent(), calibration=opened))
    assert ranked == (f"{path}: has nothing of {name}", OWN)


def test_no_calibration_where_one_is_needed(plan: Plan) -> None:
    kernel = kernels.load("cpu", 1)
    assert refusal(lambda: criteria.rank([plan], criteria.load("obs:damping=0.1"), kernel, Silent()), OptionError) == (
        "obs:damping=0.1 needs a calibration",
        "Give --calibration FILE, made for this base and this size.",
    )


def test_a_file_that_became_shorter(tmp_path: Path, plan: Plan) -> None:
    path = made(tmp_path / "c.safetensors", plan)
    opened, name = Calibration.open(path), criteria_makers.names(plan)[-1]
    with path.open("rb+") as file:
        file.truncate(opened.source.data_start + 8)
    expected = (
        f"{path}: the file became shorter while it was read",
        "Leave the file alone during the export, then run it again.",
    )
    assert refusal(lambda: opened.read(name, "gram")) == expected
    changed = "the file changed while it was read", "Leave it alone during the export, then run it again."
    assert refusal(lambda: opened.hash) == (f"{path}: {changed[0]}", changed[1])
    path.unlink()
    hint = "Check the disk, or copy the file to another one."
    assert refusal(lambda: opened.hash) == (f"{path}: reading failed: No such file or directory", hint)


def test_its_header_is_part_of_what_it_is(tmp_path: Path, plan: Plan) -> None:
    own = Calibration.open(made(tmp_path / "own.safetensors", plan)).hash
    assert Calibration.open(made(tmp_path / "again.safetensors", plan)).hash == own
    digests = dict.fromkeys(criteria_makers.digests(plan), "0" * 16)
    said = {"size": "128x128", "native": "32x32", "base": "x", "facts.prompts": "abd", "layers": json.dumps(digests)}
    hashes = {Calibration.open(made(tmp_path / "o.safetensors", plan, {key: text})).hash for key, text in said.items()}
    assert len(hashes | {own}) == len(said) + 1


def test_the_hash_is_read_with_progress(tmp_path: Path, plan: Plan) -> None:
    class Bytes(Silent):
        seen = 0

        def advance(self, size: int) -> None:
            self.seen += size

    opened, progress = Calibration.open(made(tmp_path / "c.safetensors", plan)), Bytes()
    assert opened.hashed(progress) == opened.hash
    assert progress.seen == opened.nbytes


def test_doubles(tmp_path: Path) -> None:
    plan = planned(tmp_path / "b.safetensors", makers.tiny("demo.diffusers-unet", "F64"), cast="F32")
    opened = Calibration.open(made(tmp_path / "c.safetensors", plan))
    assert refusal(lambda: opened.check(plan, ("norm",))) == (
        f"{plan.checkpoint.path}: {plan.targets[0].name!r} is F64, which is not calibrated",
        "Save it as F32, F16, BF16, F8_E4M3, F8_E5M2 first, then calibrate and export that.",
    )
