"""What the tests of command lines share: a way to type one, in this process or in a fork, and a folder of bases."""

import json
import os
import shlex
import shutil
import struct
from pathlib import Path

import pytest

from crdiff_export.models import demo
from tests.support import makers
from tests.support.command_lines import Line
from tests.support.forks import Forks
from tests.support.isolation import Crdiff


@pytest.fixture
def line(crdiff: Crdiff, shelf: Path) -> Line:
    """Runs a command line as one would type it; {shelf} is the folder of bases."""
    return lambda text: crdiff(*shlex.split(text.format(shelf=shelf)))


@pytest.fixture(scope="package")
def baked(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The demo base, pruned for 64x96. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("baked") / "here"
    folder.mkdir()
    assert forks.start(folder, "export", "demo", "--res", "64x96", "-qo", "o.safetensors").end().code == 0
    return folder / "o.safetensors"


@pytest.fixture(scope="package")
def shelf(tmp_path_factory: pytest.TempPathFactory, shelf: Path, baked: Path) -> Path:
    """The shelf of all tests with some more that is wrong."""
    folder = tmp_path_factory.mktemp("more") / "shelf"
    shutil.copytree(shelf, folder, copy_function=os.link)
    tensors = makers.read(demo.path())
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    dtype, shape, data = tensors[name]
    wrong: dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]] = {
        "infinite": {name: (dtype, shape, b"\x00\x7c" + data[2:])},
        "wide": {"betas": ("F32", (1,), struct.pack("<f", 1e30))},
        "bytes": {name: ("I8", shape, data[::2])},
        "flat": {name: (dtype, (len(data) // 2,), data)},
        "quantised": {"model.diffusion_model.a.qweight": ("I32", (), bytes(4))},
    }
    for stem, changes in wrong.items():
        makers.write(folder / f"{stem}.safetensors", tensors | changes)
    (folder / "empty.safetensors").touch()
    (folder / "text.safetensors").write_text("<!DOCTYPE html><title>Log in</title>")
    (folder / "latin.toml").write_bytes(b"\xe4")
    model = '[model]\nfamily = "demo"\ntitle = "demo"\nnative = "64x64"\n'
    (folder / "bare.toml").write_text(model)
    (folder / "part.toml").write_text(
        f'{model}[[variant]]\nresolution = "64x64"\nratios = {{ down = 0.1, mid = 0.1 }}\npoa_weight = 1.5\n'
        'provenance = "starting-point"\nsource = "a guess"\n'
    )
    searched = {"model_config": {"name": "sdxl", "width": 512, "height": 512}, "best_avg_score": -2}
    (folder / "config.json").write_text(json.dumps(searched))
    os.link(baked, folder / "pruned.safetensors")
    with (folder / "hole.safetensors").open("wb") as hole:
        hole.write(makers.header(tensors, makers.metadata_of(baked)))
        hole.truncate(hole.tell() + sum(len(data) for _, _, data in tensors.values()))
    return folder
