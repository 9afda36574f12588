"""A family that a user has written: from its table to a file that needs the table no more."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import FamilyError, VerifyError
from crdiff_export.progress import Silent
from crdiff_export.sampling.poa.source import from_baked
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import verify
from tests.support import makers
from tests.support.command_lines import Line
from tests.support.isolation import Crdiff
from tests.support.messages import raises, refused

# As docs/families.md teaches it; targets are the picture's feed-forward, attention on request.
TABLE = """
id = "tiny"
title = "Tiny model"
grid = 16

[transformer]
kinds = ["ff", "attn"]
default = ["ff"]
channels = 16

[transformer.diffusers]
first = "img_in.weight"
marks = [
    { tensor = "txt_norm.weight" },
    { tensor = "txt_in.weight", axis = 1, sizes = [24], what = "width of the text" },
]

[[target]]
kind = "ff"
diffusers = "transformer_blocks.{0..2}.img_mlp.net.0.proj.weight"

[[target]]
kind = "ff"
diffusers = "transformer_blocks.{0..2}.img_mlp.net.2.weight"

[[target]]
kind = "attn"
diffusers = "transformer_blocks.{0..2}.attn.to_q.weight"
"""
SIZE = Size(96, 64)


@pytest.fixture
def base(here: Path) -> Path:
    """A model of a class of diffusers that is not built in, and its table beside it."""
    import diffusers
    from safetensors.torch import save_file

    torch.manual_seed(3)
    net = diffusers.QwenImageTransformer2DModel(
        num_layers=3, in_channels=16, out_channels=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, here / "base.safetensors")
    (here / "own.toml").write_text(TABLE)
    return here / "base.safetensors"


def request(base: Path, **options: Any) -> ExportRequest:
    output, table = base.parent / "o.safetensors", base.parent / "own.toml"
    return ExportRequest(str(base), SIZE, output, family=table, native=Size(512, 512), **options)


def test_its_targets_are_pruned_each_by_its_own_threshold(base: Path) -> None:
    export(request(base, ratio=0.4))
    before, after = makers.read(base), makers.read(base.parent / "o.safetensors")
    for name, (_, _, data) in before.items():
        old, new = np.frombuffer(data, "<f4"), np.frombuffer(after[name][2], "<f4")
        expected = old.copy()
        if "img_mlp.net" in name and name.endswith(".weight"):
            expected[np.abs(old) <= np.sort(np.abs(old))[int(0.4 * old.size) - 1]] = 0
        assert np.array_equal(new, expected), name


def test_a_file_of_it_needs_the_table_no_more(base: Path, line: Line) -> None:
    output = export(request(base, residual="sidecar")).written.path
    (base.parent / "own.toml").unlink()
    header = makers.metadata_of(output)
    assert (header["crdiff.schema"], header["crdiff.family"]) == ("2", "tiny")
    assert header["crdiff.family.table"] == TABLE
    assert "modelspec.architecture" not in header
    assert verify(output, str(base), Silent()).against == "all"
    assert "Tiny model" in line("inspect o.safetensors").out
    restore(output, base.parent / "back.safetensors")
    assert (base.parent / "back.safetensors").read_bytes() == base.read_bytes()
    source = from_baked(output)
    assert sorted(source.masks.diffusers) == sorted(
        f"transformer_blocks.{i}.img_mlp.net.{part}.weight" for i in range(3) for part in ("0.proj", "2")
    )


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        (b"img_mlp.net.2", b"txt_mlp.net.2", "txt_mlp"),
        (b"img_mlp.net.2", b"img_mlp.net.9", "crdiff.family.table"),
        (b"[[target]]", b"[[target]1", "crdiff.family.table"),
    ],
)
def test_a_table_in_a_header_that_was_changed_is_refused(base: Path, old: bytes, new: bytes, key: str) -> None:
    output = export(request(base)).written.path
    raw = output.read_bytes()
    output.write_bytes(raw.replace(old, new, 1))
    with raises(VerifyError, "o.safetensors", key):
        verify(output, None, Silent())


def test_the_starting_point_says_that_nobody_tuned_it(base: Path) -> None:
    baked = export(request(base))
    assert (baked.stamp.provenance, dict(baked.job.plan.variant.ratios)) == ("starting-point", {"blocks": 0.3})
    assert "not tuned for this model" in baked.stamp.provenance_source


def test_without_its_table_it_is_refused(base: Path) -> None:
    with raises(FamilyError, "Qwen-Image"):
        export(ExportRequest(str(base), SIZE, base.parent / "o.safetensors"))


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


# --- the commands ---


def test_validate_shows_what_would_be_pruned(base: Path, line: Line) -> None:
    ran = line("families validate own.toml base.safetensors --json")
    assert ran.code == 0, ran.err
    tensors = makers.read(base)
    pruned = [name for name in tensors if "img_mlp.net" in name and name.endswith(".weight")]
    weights = sum(len(tensors[name][2]) // 4 for name in pruned)
    assert ran.result["would_prune"] == {"blocks": {"layers": 6, "weights": weights}}
    assert "transformer_blocks.0.img_mlp.net.0.proj.weight" in line("families validate own.toml base.safetensors").out
    assert line("families validate own.toml").code == 0
    assert line("export base.safetensors --res 96x64 --family own.toml --native 512 --dry-run").code == 0


def test_what_does_not_fit_is_named(base: Path, line: Line) -> None:
    (base.parent / "own.toml").write_text(TABLE.replace("{0..2}.attn", "{0..3}.attn"))
    refused(line("families validate own.toml base.safetensors"), 1, "transformer_blocks.3.attn.to_q.weight")


def test_families_are_listed_and_shown(line: Line) -> None:
    listed = line("families list --json").result["families"]
    assert {"sdxl", "flux-dev", "ssd-1b"} <= {family["id"] for family in listed}
    assert 'id = "sdxl"' in line("families show sdxl").out
    refused(line("families show sdlx"), 2, "sdlx")
