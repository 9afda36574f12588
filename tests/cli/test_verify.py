"""`crdiff inspect` and `crdiff verify`: what they show, what they check, and what they could not check."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from crdiff_export.models import demo
from tests.support import makers
from tests.support.command_lines import Line
from tests.support.isolation import Ran
from tests.support.messages import golden

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("name", ["sd15.safetensors", "pipe", "lora.safetensors", "sparse.safetensors"])
def test_inspect_says_what_a_file_is(line: Line, name: str) -> None:
    ran = line("inspect {shelf}/" + name)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("file:")
    assert line("inspect {shelf}/" + name + " --json").result["file"].endswith(name)


def test_inspect_shows_all_metadata_on_demand(line: Line) -> None:
    assert "modelspec.title: Tiny SD" in line("inspect {shelf}/sd15.safetensors --metadata").out
    assert line("inspect {shelf}/sd15.safetensors --metadata --json").result["metadata"] == {
        "modelspec.title": "Tiny SD"
    }


def test_verify_says_what_it_checked(line: Line, baked: Path, here: Path) -> None:
    shutil.copy(baked, here)
    ran = line("verify o.safetensors")
    assert (ran.code, ran.out) == (
        0, "o.safetensors: holds what its header says (1,245,184 target weights, the SHA-256)\n",
    )  # fmt: skip
    ran = line("verify o.safetensors --base demo")
    assert ran.out.endswith(f"(1,245,184 target weights, the SHA-256, every byte against {demo.path()})\n")
    assert line("verify o.safetensors -q") == Ran(0, "", "")
    assert line("verify o.safetensors --json --base demo").result == {
        "schema": 1, "verified": True, "file": "o.safetensors", "weights": 1245184, "hash": True,
        "base": str(demo.path()), "against_base": "all", "residual": "none",
    }  # fmt: skip


def test_verify_says_what_it_could_not_check(line: Line) -> None:
    line("export demo --res 64x96 -o o.safetensors --no-hash")
    ran = line("verify o.safetensors")
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == (
        "note: the header has no hash (--no-hash); bytes outside the target weights were not checked"
    )
    assert line("verify o.safetensors --json").result["hash"] is False


KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
OTHER = "model.diffusion_model.out.2.bias"


@pytest.mark.parametrize(
    ("name", "number", "options", "key"),
    [
        (KEY, 0.001, "", f"'{KEY}' has 1 weights"),
        (KEY, 3, "", "78672 weights of mid are zero, crdiff.pruned.mid is 78673"),
        (OTHER, 3, "--base demo", "hash to 0x"),
    ],
    ids=["left", "zero gone", "other byte"],
)
def test_verify_fails(line: Line, baked: Path, name: str, number: float, options: str, key: str) -> None:
    """With a number where a zero is in a pruned tensor, or over the first number of another."""
    tensors = makers.read(baked)
    dtype, shape, data = tensors[name]
    values = np.frombuffer(data, "<f2").copy()
    values[int(np.argmin(np.abs(values))) if name == KEY else 0] = number
    changed = tensors | {name: (dtype, shape, values.tobytes())}
    makers.write(Path("o.safetensors"), changed, makers.metadata_of(baked))
    ran = line(f"verify o.safetensors --json {options}")
    assert (ran.code, ran.out, ran.error["code"]) == (3, "", "verify")
    assert ran.error["message"].startswith("o.safetensors: ")
    assert key in ran.error["message"]
    golden(f"{ran.error['message']}\n{ran.error['hint']}")


def test_verify_fails_with_another_base(line: Line, here: Path) -> None:
    line("export demo --res 64x96 -o o.safetensors --no-hash")
    tensors = {
        name: (dtype, shape, data if name == "betas" else makers.weights(name, dtype, shape))
        for name, (dtype, shape, data) in makers.read(demo.path()).items()
    }
    makers.write(here / "other.safetensors", tensors)
    ran = line("verify o.safetensors --base other.safetensors --json")
    assert (ran.code, ran.error["code"]) == (3, "verify")
    assert "'down'" in ran.error["message"]
    golden(f"{ran.error['message']}\n{ran.error['hint']}")
