"""A UNet of no known family, from the base to pictures: pruned by the reference's rule, table as what it is."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import PlanError, VerifyError
from crdiff_export.models import demo
from crdiff_export.progress import Silent
from crdiff_export.sampling.comfyui.match import model_parts
from crdiff_export.sampling.poa.source import from_baked
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.reopen import open_baked
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import verify
from tests.support import makers
from tests.support.command_lines import Line
from tests.support.forks import Forks
from tests.support.isolation import Crdiff
from tests.support.messages import raises, refused

SIZE, RATIOS = Size(96, 64), {"down": 0.3, "up": 0.6}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def net() -> Any:
    """Without a mid block, and of depths that no known model has."""
    import diffusers

    torch.manual_seed(5)
    return diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=64, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        transformer_layers_per_block=(1, 3), attention_head_dim=8, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(net: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's pipeline with this UNet in it."""
    import warnings

    import diffusers

    place = tmp_path_factory.mktemp("any") / "pipe"
    with warnings.catch_warnings(action="ignore"):
        pipe = diffusers.StableDiffusionPipeline.from_single_file(str(demo.path()), config=str(demo.config()))
        pipe.register_modules(unet=net)
        pipe.save_pretrained(place)
    return place


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


def with_residual(folder: Path, place: Path) -> Path:
    """An export of the UNet alone, beside its base, with what was pruned."""
    shutil.copy(folder / UNET, place / "base.safetensors")
    request = ExportRequest(
        str(place / "base.safetensors"), SIZE, place / "o.safetensors", ratios=RATIOS, residual="sidecar",
        native=Size(64, 64),
    )  # fmt: skip
    return export(request).written.path


def pruned_by_the_rule(net: Any) -> dict[str, torch.Tensor]:
    """The public code's rule on the modules: one threshold for each group, whose weights at or below it go."""
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for group, ratio in RATIOS.items():
        names = [
            f"{path}.weight" for path, module in net.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and path.startswith(group)
            and ("attn" in path or "ff" in path) and "attn2" not in path
        ]  # fmt: skip
        every = torch.cat([weights[name].abs().flatten() for name in names])
        threshold = every.sort().values[int(ratio * every.numel()) - 1]
        for name in names:
            weights[name][weights[name].abs() <= threshold] = 0
    return weights


def test_it_is_pruned_by_the_rule_and_named_as_what_it_is(net: Any, folder: Path, tmp_path: Path) -> None:
    written = export(ExportRequest(str(folder), SIZE, tmp_path / "out", ratios=RATIOS)).written
    ours, expected = load_file(written.path / UNET), pruned_by_the_rule(net)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], weights) for name, weights in expected.items())
    header = makers.metadata_of(written.path / UNET)
    assert header["crdiff.family"] == "unet"
    assert (header["crdiff.resolution.native"], header["crdiff.resolution.native.source"]) == ("32x32", "config.json")
    assert "modelspec.architecture" not in header, "never a lookalike's"
    assert not [key for key in header if key.endswith(".mid")]
    assert verify(written.path, str(folder), Silent()).against == "all"
    assert inspect(written.path)


def targets_of(header: dict[str, str], layout: str) -> dict[str, str]:
    """The targets in a header and their groups, read as docs/metadata.md says, without crdiff."""
    groups = {}
    for target in tomllib.loads(header["crdiff.family.table"])["target"]:
        pattern = target[layout]
        numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        blocks = range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [0]
        for block in blocks if target["kind"] in header["crdiff.targets"].split(",") else ():
            name = header["crdiff.prefix"] + re.sub(r"\{.*\}", str(block), pattern)
            groups[name] = target["group"]
    return groups


def test_its_header_says_what_was_pruned(folder: Path, tmp_path: Path) -> None:
    """Whoever has the base and the header has the pruned weights."""
    written = export(ExportRequest(str(folder), SIZE, tmp_path / "out", ratios=RATIOS)).written
    header, weights = makers.metadata_of(written.path / UNET), load_file(folder / UNET)
    groups = targets_of(header, header["crdiff.layout"])
    assert header["crdiff.schema"] == "2"
    assert "unet" in tomllib.loads(header["crdiff.family.table"]), "a threshold for each group"
    for group in ("down", "up"):
        names = [name for name in groups if groups[name] == group]
        assert sum(weights[name].numel() for name in names) == int(header[f"crdiff.total.{group}"])
        for name in names:
            weights[name][weights[name].abs() <= float.fromhex(header[f"crdiff.threshold.{group}"])] = 0
    pruned = load_file(written.path / UNET)
    assert all(torch.equal(pruned[name], tensor) for name, tensor in weights.items())


def test_poa_knows_its_layers_by_both_names(folder: Path, tmp_path: Path) -> None:
    path = export(ExportRequest(str(folder), SIZE, tmp_path / "out", ratios=RATIOS)).written.path
    source, header = from_baked(path), makers.metadata_of(path / UNET)
    assert sorted(source.masks.diffusers) == sorted(targets_of(header, "diffusers"))
    originals = targets_of(header, "original")
    names = zip(targets_of(header, "diffusers"), originals, strict=True)
    dense = {f"diffusion_model.{original}": load_file(folder / UNET)[name] for name, original in names}
    assert sorted(model_parts(dense, open_baked(path))) == sorted(f"diffusion_model.{name}" for name in originals)


def test_a_file_without_a_table_is_read_by_its_names(folder: Path, tmp_path: Path) -> None:
    """As crdiff wrote them before, with schema 1."""
    output = with_residual(folder, tmp_path)
    old = makers.said(output, {"crdiff.schema": "1", "crdiff.family.table": None}, tmp_path / "old.safetensors")
    shutil.copy(output.with_suffix(".crdiff-residual"), old.with_suffix(".crdiff-residual"))
    assert verify(old, str(tmp_path / "base.safetensors"), Silent()).against == "all"
    restore(old, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (folder / UNET).read_bytes()
    assert from_baked(old).masks.diffusers.keys() == from_baked(output).masks.diffusers.keys()


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    output = export(ExportRequest(str(folder), SIZE, tmp_path / "out", ratios=RATIOS)).written.path
    shutil.copy(demo.path(), tmp_path / "other.safetensors")
    with raises(VerifyError, "other.safetensors", "UNet (original layout"):
        verify(output, str(tmp_path / "other.safetensors"), Silent())


def test_the_starting_point_is_for_its_own_groups(folder: Path, tmp_path: Path) -> None:
    baked = export(ExportRequest(str(folder), SIZE, tmp_path / "out"))
    assert dict(baked.job.plan.variant.ratios) == {"down": 0.3, "up": 0.3}
    assert (baked.stamp.provenance, baked.stamp.poa_weight, baked.stamp.borrowed_from) == ("starting-point", 1.5, None)
    assert "not tuned for this model" in baked.stamp.provenance_source


def test_its_table_can_be_a_start(folder: Path, drawing: Forks, line: Line, here: Path) -> None:
    """A user names the model, and says its native size."""
    assert '"family.table"' in line("families show unet").out
    assert line(f"export {folder} --res 96x64 -o out").code == 0
    text = line("inspect out --json").result["crdiff"]["family.table"]
    table = text.replace('id = "unet"', 'id = "mine"\nnative = "64x64"').replace('"UNet"', '"My UNet"')
    (here / "mine.toml").write_text(table)
    layers = line(f"families validate mine.toml {folder} --json").result["would_prune"]
    assert {group: each["layers"] for group, each in layers.items()} == {"down": 24, "up": 48}
    shutil.copy(folder / UNET, here / "base.safetensors")
    assert line("export base.safetensors --res 96x64 --family mine.toml -o o.safetensors").code == 0
    header = makers.metadata_of(here / "o.safetensors")
    assert (header["crdiff.family"], header["crdiff.resolution.native"]) == ("mine", "64x64")
    words = f"preview {folder} --family mine.toml --res 48 --prompt 'a red circle' --steps 1 -o x.html"
    ran = drawing.start(here, *shlex.split(words)).end()
    assert ran.code == 0, ran.err


def test_the_base_comes_back_from_a_residual(folder: Path, tmp_path: Path) -> None:
    output = with_residual(folder, tmp_path)
    restore(output, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (folder / UNET).read_bytes()


def test_a_file_that_says_no_size_needs_one(folder: Path, line: Line, here: Path) -> None:
    shutil.copy(folder / UNET, here / "base.safetensors")
    with raises(PlanError, "base.safetensors"):
        export(ExportRequest("base.safetensors", SIZE, Path("o.safetensors")))
    ran = line("export base.safetensors --res 96x64 --native 64 -o o.safetensors")
    assert ran.code == 0, ran.err
    header = makers.metadata_of(here / "o.safetensors")
    assert (header["crdiff.resolution.native"], header["crdiff.resolution.native.source"]) == ("64x64", "given")


def test_a_group_that_it_lacks_is_no_option(folder: Path, line: Line) -> None:
    refused(line(f"export {folder} --res 96x64 --mid 0.3"), 2, "'mid'")


@pytest.mark.parametrize(
    "words",
    [
        "preview {} --res 48 --prompt 'a red circle' --steps 1 -o x.html",
        "evaluate {} --res 48 --steps 1 --prompts p.txt --no-native --scorer judge:score -o r.toml",
        "calibrate {} --res 48 --steps 1 --prompts p.txt --criterion wanda -o c.safetensors",
        "search {} --res 48 --prompts p.txt --steps 1 --trials 2 --no-native --scorer judge:score -o a.toml",
    ],
    ids=lambda words: words.split()[0],
)
def test_it_is_drawn_with(drawing: Forks, folder: Path, here: Path, words: str) -> None:
    (here / "p.txt").write_text("a red circle\na blue square\na green ring\na lamp\n")
    (here / "judge.py").write_text("def score(images, prompts):\n    return [sum(i.tobytes()) / 1e6 for i in images]\n")
    ran = drawing.start(here, *shlex.split(words.format(folder))).end()
    assert ran.code == 0, ran.err
    assert "mid" not in ran.out.replace("middle", "")
