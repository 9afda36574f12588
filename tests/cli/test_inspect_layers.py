"""`crdiff inspect --layers`: what it shows and writes, and what it refuses."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crdiff_export.cli import text_table
from crdiff_export.cli.blocks import Table
from crdiff_export.cli.inspect import _layer_tables
from crdiff_export.evaluate.report import plots
from crdiff_export.models import demo
from crdiff_export.models.families import by_id
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.layers import LayerZeros
from tests.support import geometry_tables, makers
from tests.support.command_lines import Line
from tests.support.messages import refused

pytestmark = pytest.mark.usefixtures("here")
PNG = b"\x89PNG\r\n\x1a\n"


def test_json_has_every_layer(line: Line, baked: Path) -> None:
    result = line(f"inspect {baked} --layers --json").result
    assert len(result["layers"]) == 42
    assert set(result["layers"][0]) == {"name", "group", "kind", "weights", "zeros", "share"}
    header = makers.metadata_of(baked)
    for group in ("down", "mid", "up"):
        layers = [layer for layer in result["layers"] if layer["group"] == group]
        assert sum(layer["zeros"] for layer in layers) == int(header[f"crdiff.pruned.{group}"])
        assert sum(layer["weights"] for layer in layers) == int(header[f"crdiff.total.{group}"])
        assert all(layer["share"] == layer["zeros"] / layer["weights"] for layer in layers)
    assert {layer["name"] for layer in result["layers"]} <= set(makers.read(baked))
    plain = {key: value for key, value in result.items() if key != "layers"}
    assert plain == line(f"inspect {baked} --json").result


def test_text_has_a_bar_for_every_group_and_layer(line: Line, baked: Path) -> None:
    ran = line(f"inspect {baked} --layers")
    assert ran.code == 0
    result = line(f"inspect {baked} --layers --json").result
    shown = [words for text in ran.out.splitlines() if (words := text.split()) and "transformer_blocks" in text]
    assert len(shown) == len(result["layers"])
    for words, layer in zip(shown, result["layers"], strict=True):
        name, weights, zeros, share, bar = words[-5:]
        assert f"model.diffusion_model.{name}.weight" == layer["name"]
        numbers = (f"{layer['weights']:,}", f"{layer['zeros']:,}", f"{layer['share']:.4f}")
        assert (weights, zeros, share, bar) == (*numbers, text_table.share_bar(layer["share"]))
    firsts = [words[0].rstrip(":") for text in ran.out.splitlines() if (words := text.split())]
    assert [word for word in firsts if word in ("down", "mid", "up")] == ["down", "mid", "up"] * 3


def test_headers_are_all_that_is_read_without_it(line: Line, monkeypatch: pytest.MonkeyPatch, baked: Path) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("crdiff_export.formats.weight_file.FileBytes.read_into", read)
    assert line(f"inspect {baked}").code == 0
    with pytest.raises(AssertionError, match="a weight"):
        line(f"inspect {baked} --layers")


@pytest.mark.parametrize("table", ["sdxl.original", "sdxl.diffusers-unet", "flux-dev.original-transformer"])
def test_nothing_is_left_out_at_80_columns(table: str) -> None:
    """With the names and numbers of real models."""
    sizes = {name: math.prod(shape) for name, (_, shape) in geometry_tables.load(table).items()}
    family = by_id(table.partition(".")[0])
    layout = next(layout for layout in family.layouts if table.partition(".")[2].startswith(layout.name))
    layers = []
    for layer in layout.layers:
        size = next(size for name, size in sizes.items() if name.endswith(layer.tensor))
        layers.append(LayerZeros(layer.tensor, layer.group, layer.kind, "", "", size, size))
    blocks = _layer_tables(replace(inspect(demo.path()), match=None), layers)
    for shown in (block for block in blocks if isinstance(block, Table)):
        header, lines = text_table.table_lines(shown, 80)
        assert header
        assert "no room" not in lines[-1]
        assert max(map(len, lines)) <= 80


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminal to open")
@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#"), ("cp437", "#")])
def test_a_terminal_without_blocks_gets_ascii(encoding: str, bar: str, baked: Path, tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "70", "NO_COLOR": "1"}
    ours, theirs = os.openpty()
    words = [sys.executable, "-m", "crdiff_export", "inspect", str(baked), "--layers", "-q"]
    with (tmp_path / "out").open("w+b") as copy:
        process = subprocess.Popen(words, stdout=theirs, stderr=subprocess.DEVNULL, env=variables)
        os.close(theirs)
        while part := _read(ours):
            copy.write(part)
        assert process.wait() == 0
        copy.seek(0)
        text = copy.read().decode(encoding)
    os.close(ours)
    assert bar * 3 in text
    assert "\\u" not in text
    layers = [row for row in text.splitlines() if ".0.attn1.to_" in row or ".0.ff.net." in row]
    assert len(layers) == 42
    assert max(map(len, layers)) <= 70


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux's end of a terminal
        return b""


def test_a_heat_map_is_a_plot_or_a_page(line: Line, baked: Path, here: Path) -> None:
    ran = line(f"inspect {baked} --layers -o map.png -o map.html")
    assert ran.code == 0
    assert ran.out.splitlines()[-2:] == ["map.png", "map.html"]
    first = (here / "map.png").read_bytes(), (here / "map.html").read_bytes()
    assert first[0].startswith(PNG)
    assert b"<svg" in first[1]
    assert line(f"inspect {baked} --layers -o map.png -o map.html --json --force").result["outputs"] == [
        "map.png", "map.html",
    ]  # fmt: skip
    assert (here / "map.png").read_bytes() == first[0]


REFUSED = {
    "without layers": ("inspect demo -o map.png", 2, "--layers"),
    "of two files": ("inspect demo demo --layers -o map.png", 2, "map.png"),
    "suffix": ("inspect demo --layers -o map.svg", 2, "map.svg"),
    "no folder": ("inspect demo --layers -o none/map.png", 1, "none"),
    "existing": ("inspect demo --layers -o there.png", 1, "there.png"),
    "sparse": ("inspect {shelf}/sparse.safetensors --layers", 1, "sparse.safetensors"),
    "LoRA": ("inspect {shelf}/lora.safetensors --layers", 1, "lora.safetensors"),
    "integers": ("inspect {shelf}/bytes.safetensors --layers", 1, "is I8"),
    "quantised": ("inspect {shelf}/quantised.safetensors --layers", 1, "a.qweight"),
}


@pytest.mark.parametrize(("words", "code", "key"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_no_file(line: Line, here: Path, words: str, code: int, key: str) -> None:
    (here / "there.png").write_text("mine")
    refused(line(words), code, key)
    assert [path.name for path in here.iterdir()] == ["there.png"]
    assert (here / "there.png").read_text() == "mine"


def test_without_matplotlib_a_page_has_its_table(
    line: Line, baked: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    refused(line(f"inspect {baked} --layers -o map.png"), 2, "matplotlib")
    assert not (here / "map.png").exists()
    assert line(f"inspect {baked} --layers -o map.html").code == 0
    page = (here / "map.html").read_text()
    assert "<svg" not in page
    assert page.count("attn1.to_q.weight") == 7


def test_several_files_have_their_turn(line: Line, baked: Path) -> None:
    ran = line(f"inspect {baked} nothere demo --layers --json")
    assert ran.code == 1
    assert [len(file.get("layers", [])) for file in ran.result["files"]] == [42, 0, 42]
