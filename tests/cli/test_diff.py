"""`crdiff diff`: what it shows, its exit codes, and what it refuses."""

from pathlib import Path

import pytest

from crdiff_export.cli.diff import MAX_ROWS
from crdiff_export.models import demo
from tests.support import makers
from tests.support.command_lines import Line
from tests.support.isolation import Ran
from tests.support.messages import refused

pytestmark = pytest.mark.usefixtures("here")


def test_json_has_everything(line: Line, baked: Path) -> None:
    result = line(f"diff demo {baked} --json").result
    base, header = makers.read(demo.path()), makers.metadata_of(baked)
    assert not result["equal"]
    assert (result["a"], result["b"], result["common"]) == (str(demo.path()), str(baked), len(base))
    assert {tensor["name"] for tensor in result["tensors"]} == {
        name for name, tensor in makers.read(baked).items() if tensor != base[name]
    }
    for name in ("down", "mid", "up"):
        group = result["groups"][name]
        assert group["newly_zero"] + group["zero_in_both"] == int(header[f"crdiff.pruned.{name}"])
        assert group["share"] == group["differing"] / group["weights"]
    assert {"name": "crdiff.version", "a": None, "b": header["crdiff.version"]} in result["metadata"]


def test_text_has_the_groups_then_the_tensors(line: Line, baked: Path) -> None:
    ran = line(f"diff demo {baked}")
    assert (ran.code, ran.err.count("note:")) == (0, 0)
    result = line(f"diff demo {baked} --json").result
    lines = [text.split() for text in ran.out.splitlines()]
    for name, group in result["groups"].items():
        (row,) = [words for words in lines if " ".join(words).startswith(f"{name} {group['tensors']} ")]
        assert f"{group['differing']:,}" in row
        assert f"{group['newly_zero']:,}" in row
    shown = [words[0] for words in lines if words and "transformer_blocks" in words[0]]
    names = [
        tensor["name"].removeprefix("model.diffusion_model.").removesuffix(".weight") for tensor in result["tensors"]
    ]
    assert shown == names[:MAX_ROWS]
    everything = line(f"diff demo {baked} --all").out
    assert all(name in everything for name in names)
    assert all(change["name"] in everything for change in result["metadata"])


@pytest.mark.parametrize("option", ["", "--exit-code"])
def test_the_exit_code_tells_on_demand(line: Line, baked: Path, option: str) -> None:
    assert line(f"diff demo {baked} -q {option}") == Ran(3 if option else 0, "differ\n", "")
    assert line(f"diff demo demo -q {option}") == Ran(0, "equal\n", "")
    assert line(f"diff demo nothere -q {option}").code == 1


def test_other_metadata_alone_is_equal(line: Line, here: Path) -> None:
    makers.said(demo.path(), {"note": "\x1b[31m" + "x" * 100}, here / "a.safetensors")
    ran = line("diff demo a.safetensors --exit-code")
    assert ran.code == 0
    assert "result: equal" in ran.out
    assert r"only in B: \x1b[31m" in ran.out
    assert "\x1b" not in ran.out
    assert "x" * 100 not in ran.out


def test_two_layouts_have_no_name_in_common(line: Line, shelf: Path) -> None:
    ran = line(f"diff {shelf}/sd15.safetensors {shelf}/shards/diffusion_pytorch_model.safetensors.index.json")
    assert ran.code == 0
    assert ran.err.count("\n") == 1
    assert "layouts" in ran.err
    assert "1,133: " in ran.out


def test_a_folder_is_compared_by_its_weights(line: Line, shelf: Path) -> None:
    alone = f"{shelf}/pipe/unet/diffusion_pytorch_model.safetensors"
    assert line(f"diff {shelf}/pipe {alone} -q").out == "equal\n"
    result = line(f"diff {shelf}/pipe {shelf}/pipe/unet/diffusion_pytorch_model.fp16.safetensors --json").result
    assert len(result["dtypes"]) == sum(tensor[0] != "F16" for tensor in makers.read(Path(alone)).values())


REFUSED = {
    "one file": ("diff demo", 2, "'B'"),
    "missing": ("diff demo nothere.safetensors", 1, "nothere.safetensors"),
    "alias": ("diff demo sdxl", 1, "sdxl"),
    "sparse": ("diff {shelf}/sparse.safetensors {shelf}/sparse.safetensors", 1, "sparse.safetensors"),
    "empty": ("diff {shelf}/empty.safetensors demo", 1, "empty.safetensors"),
    "text": ("diff demo {shelf}/text.safetensors", 1, "text.safetensors"),
}


@pytest.mark.parametrize(("words", "code", "key"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(line: Line, words: str, code: int, key: str) -> None:
    refused(line(words), code, key)
