"""ComfyUI's nodes as far as they go without ComfyUI: installing them, and what they work with."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.models import demo
from crdiff_export.packs import create
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling.comfyui import listing, match
from crdiff_export.sampling.comfyui.patch import PatchedLayer, PoaPatch, PruneSwitch, fraction
from crdiff_export.sampling.poa.masks import MaskPart, Masks, ReplacedWeights
from crdiff_export.sampling.poa.mix import Schedule
from crdiff_export.verify.reopen import BakedCheckpoint, open_baked, read_decision
from tests.support import geometry_tables, makers, masking
from tests.support.comfyui_nodes import load
from tests.support.isolation import Crdiff
from tests.support.messages import raises
from tests.support.scaled_models import UNET, Scaled

Weights = dict[str, torch.Tensor]
SIZE = Size(96, 64)
INSTALLED = {"__init__.py", "crdiff.json", "crdiff_export", "example_workflows"}


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder as ComfyUI's."""
    for name in ("comfy", "custom_nodes/somebody", "models/checkpoints"):
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    return tmp_path / "ComfyUI"


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_install_then_uninstall(crdiff: Crdiff, comfyui: Path) -> None:
    node = comfyui / "custom_nodes" / "crdiff"
    ran = crdiff("comfyui", "install", comfyui)
    assert (ran.code, ran.out) == (0, f"{node}\n")
    assert "restart ComfyUI" in ran.err
    assert contents(comfyui / "custom_nodes") == {"crdiff", "somebody"}
    assert contents(node) == INSTALLED
    assert not list(node.rglob("__pycache__"))
    assert not (node / "crdiff_export" / "recipes").exists()
    assert not list(node.rglob("*.safetensors"))
    (node / "crdiff_export" / "of_an_old_version.py").touch()
    (node / "crdiff.json").write_text('{"crdiff": "0.0.1", "package": "crdiff_export"}')
    assert "version 0.0.1 is replaced" in crdiff("comfyui", "install", comfyui).err
    assert not (node / "crdiff_export" / "of_an_old_version.py").exists()
    ran = crdiff("comfyui", "uninstall", comfyui, "-q")
    assert (ran.code, ran.out, ran.err) == (0, f"{node}\n", "")
    assert contents(comfyui / "custom_nodes") == {"somebody"}
    ran = crdiff("comfyui", "uninstall", comfyui)
    assert (ran.code, ran.out) == (0, "")
    assert "not installed" in ran.err


def test_json(crdiff: Crdiff, comfyui: Path) -> None:
    node = str(comfyui / "custom_nodes" / "crdiff")
    version = tool_version()
    first = {"schema": 1, "installed": node, "version": version, "linked": None, "replaced": None, "aside": None}
    package = str(Path(listing.__file__).parents[2])
    assert crdiff("comfyui", "install", comfyui, "--json").result == first
    again = crdiff("comfyui", "install", comfyui, "--link", "--json").result
    assert again == first | {"linked": package, "replaced": version}
    assert crdiff("comfyui", "uninstall", comfyui, "--json").result == {"schema": 1, "removed": node}
    assert crdiff("comfyui", "uninstall", comfyui, "--json").result == {"schema": 1, "removed": None}


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_the_nodes_load_where_nothing_is_installed(crdiff: Crdiff, comfyui: Path, link: bool) -> None:
    node = comfyui / "custom_nodes" / "crdiff"
    crdiff("comfyui", "install", comfyui, *(["--link"] if link else []))
    ran = load(node)
    assert ran.returncode == 0, ran.stderr
    names, package = ran.stdout.splitlines()
    assert names == "CrdiffPack|CrdiffPoa|CrdiffInfo|CR-Diff|CR-Diff POA|CR-Diff Info"
    assert Path(package).is_relative_to(node) is not link
    workflows = Path(listing.__file__).with_name("example_workflows")
    assert contents(node / "example_workflows") == contents(workflows)
    assert len(list(node.rglob("*.png"))) == 1
    (node / "crdiff.json").write_text('{"crdiff": "0.0.1", "package": "/gone/crdiff_export"}')
    assert "/gone/crdiff_export is not there any more; run `crdiff comfyui install` again" in load(node).stderr


def test_what_is_somebody_elses_stays(crdiff: Crdiff, comfyui: Path) -> None:
    node = comfyui / "custom_nodes" / "crdiff"
    node.mkdir()
    (node / "mine.py").touch()
    for command in ("install", "uninstall"):
        ran = crdiff("comfyui", command, comfyui, "--json")
        assert ran.code == 1
        assert ran.error["code"] == "poa"
        assert "was not installed by crdiff" in ran.error["message"]
    ran = crdiff("comfyui", "install", comfyui, "--force")
    assert ran.code == 0
    assert "what was there is now" in ran.err
    assert contents(comfyui / "custom_nodes") == {"crdiff", "crdiff.disabled", "somebody"}
    assert contents(node.with_name("crdiff.disabled")) == {"mine.py"}
    (node / "notes.txt").touch()
    assert crdiff("comfyui", "uninstall", comfyui).code == 1
    assert "crdiff.disabled, which is there, too" in crdiff("comfyui", "install", comfyui, "--force").err
    assert (node / "notes.txt").exists()


def test_a_link_of_the_users_own_stays(crdiff: Crdiff, comfyui: Path, tmp_path: Path) -> None:
    crdiff("comfyui", "install", comfyui)
    node = comfyui / "custom_nodes" / "crdiff"
    node.rename(tmp_path / "own")
    node.symlink_to(tmp_path / "own", target_is_directory=True)
    assert crdiff("comfyui", "uninstall", comfyui).code == 1
    assert crdiff("comfyui", "install", comfyui).code == 1
    assert contents(tmp_path / "own") == INSTALLED


def test_the_folder_must_be_comfyuis(crdiff: Crdiff, comfyui: Path, tmp_path: Path) -> None:
    for path, text in {
        tmp_path: f"Give the folder inside: {comfyui}.",
        comfyui / "custom_nodes": f"Give the folder that it is in: {comfyui}.",
        comfyui / "comfy": "is no ComfyUI folder",
        tmp_path / "gone": "there is no such folder",
    }.items():
        ran = crdiff("comfyui", "install", path)
        assert ran.code == 1
        assert text in ran.err
    shutil.rmtree(comfyui / "comfy")  # the desktop app has it elsewhere
    assert crdiff("comfyui", "install", comfyui).code == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_right_to_write(crdiff: Crdiff, comfyui: Path) -> None:
    (comfyui / "custom_nodes").chmod(0o500)
    ran = crdiff("comfyui", "install", comfyui)
    (comfyui / "custom_nodes").chmod(0o700)
    assert ran.code == 1
    assert "see to it that you may write there" in ran.err


# Models that are compared with a file.

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
Bakes = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def bakes(tmp_path_factory: pytest.TempPathFactory) -> Bakes:
    """Give the base of a layout, or the demo model, and its export by a criterion."""
    bases: dict[str, masking.Base] = {}

    @cache
    def bake(table: str, criterion: str) -> tuple[Path, Path]:
        if table == "demo":
            output = tmp_path_factory.mktemp("demo") / "baked.safetensors"
            export(ExportRequest("demo", Size(96, 64), output, ratio=0.4, poa_weight=1.5, criterion=criterion))
            return demo.path(), output
        if table not in bases:
            bases[table] = masking.base(tmp_path_factory.mktemp("base"), table)
        base = bases[table]
        request = base.request(base.path.with_name(f"{criterion}.safetensors"), criterion)
        return base.path, export(request).written.path

    return bake


@pytest.fixture
def baked(bakes: Bakes) -> BakedCheckpoint:
    return open_baked(bakes("demo", "magnitude")[1])


def loaded(path: Path, dtype: torch.dtype = torch.float16) -> Weights:
    """A model's weights by ComfyUI's names."""
    prefix = "model.diffusion_model."
    weights = safetensors.torch.load_file(path)
    inside = any(name.startswith(prefix) for name in weights)
    return {
        match.PREFIX + name.removeprefix(prefix): weight.to(dtype)
        for name, weight in weights.items()
        if name.startswith(prefix) or not inside
    }


@DTYPES
@pytest.mark.parametrize(
    ("table", "criterion"),
    [("demo", "magnitude"), ("sd15.original", "obs"), ("flux-dev.original-transformer", "wanda")],
)
def test_a_layer_takes_the_pruned_weights(table: str, criterion: str, dtype: torch.dtype, bakes: Bakes) -> None:
    """They are those of the file as it is loaded in this dtype, also if ComfyUI computes in float32."""
    base, output = bakes(table, criterion)
    weights, pruned = loaded(base, dtype), loaded(output, dtype)
    # A threshold is rounded as in an export with --dtype, and prunes more than the file that is cast afterwards.
    exact = criterion != "magnitude" or dtype in (torch.float16, torch.float32)
    switch, parts = PruneSwitch(), match.model_parts(weights, open_baked(output))
    assert {name for name in weights if not torch.equal(weights[name].double(), pruned[name].double())} <= parts.keys()
    assert dtype.itemsize == 1 or all(not torch.equal(weights[key], pruned[key]) for key in parts)
    for key, own in parts.items():
        layer, before = PatchedLayer(switch, key, own, ()), pruned[key].clone()
        switch.pruned = False
        switch.used.clear()
        assert layer(weights[key]) is weights[key]
        switch.pruned = True
        results = layer(weights[key]), layer(weights[key].float())
        if exact:
            assert all(torch.equal(result.double(), pruned[key].double()) for result in results)
        assert layer(weights[key].to(torch.float8_e4m3fn)).dtype == torch.float8_e4m3fn
        assert torch.equal(pruned[key].double(), before.double())
        assert switch.used


@pytest.mark.parametrize("family", ["flux-2-dev", "qwen-image", "ssd-1b"])
def test_a_base_with_diffusers_names_is_matched_by_comfyuis(family: str, tmp_path: Path) -> None:
    """ComfyUI renames what it loads to the names of the authors, and fuses what they fuse."""
    table = next(name for name in geometry_tables.names() if name.startswith(f"{family}.diffusers"))
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table, "F32"))
    baked = open_baked(export(ExportRequest(str(base), SIZE, tmp_path / "baked.safetensors", ratio=0.4)).written.path)
    weights, pruned = (safetensors.torch.load_file(path) for path in (base, baked.checkpoint.path))

    def renamed(tensors: Weights) -> Weights:
        rows: dict[str, list[torch.Tensor]] = {}
        for layer in baked.plan.match.layout.layers:  # in the order of their parts
            rows.setdefault(match.PREFIX + layer.original[0], []).append(tensors[layer.tensor])
        return {name: torch.cat(parts) for name, parts in rows.items()}

    fused, expected, switch = renamed(weights), renamed(pruned), PruneSwitch()
    parts = match.model_parts(fused, baked)
    switch.pruned = True
    for key, of_key in parts.items():
        assert not torch.equal(fused[key], expected[key])
        assert torch.equal(PatchedLayer(switch, key, of_key, ())(fused[key]), expected[key])
    assert len(parts) == len({target.layer.original[0] for target in baked.plan.targets})


@pytest.mark.parametrize(
    ("calls", "missed"),
    [
        ([(9.0, "ab"), (5.0, "ab")], ""),
        ([(9.0, "ab"), (9.0, "a"), (5.0, "b"), (5.0, "a")], ""),  # skip-layer guidance: not all in every call
        ([(9.0, "a"), (5.0, "ab")], "b"),
        ([(9.0, "ab"), (5.0, "b")], "a"),
        ([(9.0, "ab"), (5.0, "")], "a, b"),
    ],
)
def test_a_step_without_a_pruned_layer_names_it(calls: list[tuple[float, str]], missed: str) -> None:
    patch = PoaPatch({"a": (), "b": ()}, Schedule(1.5), "x.safetensors")

    def sample() -> None:
        for sigma, used in calls:
            patch._count(sigma, set(used))
        patch._check_step()

    if not missed:
        sample()
        return
    with raises(PoaError, "x.safetensors", f"pruned weights: {missed}"):
        sample()


@DTYPES
@pytest.mark.parametrize(("table", "criterion"), [("demo", "magnitude"), ("sd15.original", "obs")])
def test_the_pruned_model_is_refused(table: str, criterion: str, dtype: torch.dtype, bakes: Bakes) -> None:
    _, output = bakes(table, criterion)
    with raises(match.PrunedError, output.name):
        match.model_parts(loaded(output, dtype), open_baked(output))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda w: w * 1.01, "attn1.to_q"), (lambda w: w.reshape(-1)[:8], "has 8 weights"),
        (lambda w: w.to(torch.int8), "int8"), (None, "attn1.to_q"),
    ],
    ids=["another model", "another shape", "quantised", "another family"],
)  # fmt: skip
@pytest.mark.parametrize(("table", "criterion"), [("demo", "magnitude"), ("sd15.original", "wanda")])
def test_other_models_are_refused(
    table: str, criterion: str, change: Callable[[Any], Any] | None, key: str, bakes: Bakes
) -> None:
    base, output = bakes(table, criterion)
    weights = loaded(base)
    name = match.PREFIX + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    weight = weights.pop(name)
    if change:
        weights[name] = change(weight)
    with raises(PoaError, key):
        match.model_parts(weights, open_baked(output))


def test_the_file_is_found_by_its_zeros(bakes: Bakes) -> None:
    """Not a file with moved weights, which would fit any model."""
    base, output = bakes("sd15.original", "wanda")
    moved, other = bakes("sd15.original", "obs")[1], bakes("flux-dev.original-transformer", "wanda")[1]
    baked, parts = match.find(loaded(base), [other, moved, output])
    assert baked.checkpoint.path == output
    assert all(isinstance(part, MaskPart) for own in parts.values() for part in own)


class Quantised:
    """ComfyUI's tensor of fp8 codes with a scale, as far as the node looks at it."""

    def __init__(self, codes: torch.Tensor, scale: float) -> None:
        self._qdata, self._params, self.dtype = codes, SimpleNamespace(scale=torch.tensor(scale)), torch.bfloat16
        self.ndim, self.shape = codes.ndim, codes.shape

    def numel(self) -> int:
        return self._qdata.numel()


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scaled, Path]:
    """A model of scaled fp8 and of other layers, and its export."""
    made = Scaled(UNET, "metadata", ("F16",))
    base = made.write(tmp_path_factory.mktemp("scaled") / "base.safetensors")
    output = base.with_name("baked.safetensors")
    return made, export(ExportRequest(str(base), Size(96, 64), output, ratio=0.4)).written.path


def quantised(made: Scaled, path: Path) -> dict[str, Any]:
    """A model's weights as ComfyUI loads scaled fp8."""
    prefix, weights = "model.diffusion_model.", safetensors.torch.load_file(path)
    return {
        match.PREFIX + name.removeprefix(prefix): Quantised(weight, made.scales[name])
        if name in made.scales
        else weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def test_scaled_fp8_takes_the_mask_of_its_codes(scaled: tuple[Scaled, Path]) -> None:
    """The layer's weights come dequantised, in whatever dtype the model computes in."""
    made, output = scaled
    base = quantised(made, output.with_name("base.safetensors"))
    baked, parts = match.find(base, [output])
    assert baked.checkpoint.path == output
    pruned = safetensors.torch.load_file(output)
    for name, scale in made.scales.items():
        key = match.PREFIX + name.removeprefix("model.diffusion_model.")
        dense = base[key]._qdata.to(torch.bfloat16) * torch.tensor(scale, dtype=torch.bfloat16)
        switch = PruneSwitch()
        switch.pruned = True
        layer = PatchedLayer(switch, key, parts[key], ())
        assert torch.equal(layer(dense), dense.masked_fill(pruned[name].float() == 0, 0.0))


def test_scaled_fp8_is_refused_for_other_models(scaled: tuple[Scaled, Path]) -> None:
    made, output = scaled
    key, baked = match.PREFIX + "input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight", open_baked(output)
    base = quantised(made, output.with_name("base.safetensors"))
    with raises(match.PrunedError, output.name):
        match.model_parts(quantised(made, output), baked)
    codes, scale = base[key]._qdata, float(base[key]._params.scale)
    others = (Quantised(codes, 2 * scale), codes, codes.to(torch.bfloat16), Quantised(codes.roll(1, 0), scale))
    for other in others:
        with raises(PoaError, "attn1.to_v", output.name):
            match.model_parts({**base, key: other}, baked)


def test_codes_apart_from_their_scales_are_refused_for_a_pack(scaled: tuple[Scaled, Path], tmp_path: Path) -> None:
    made, output = scaled
    base = output.with_name("base.safetensors")
    request = create.PackRequest((PlanRequest(str(base), Size(96, 64), ratio=0.4),), tmp_path / "p.crdiff")
    pack = create.make(create.prepare_new(request), Silent()).pack
    weights = quantised(made, base)
    assert match.find_layers(weights, pack)
    apart = {key: getattr(weight, "_qdata", weight) for key, weight in weights.items()}
    with raises(PoaError, "without its scale"):
        match.find_layers(apart, pack)


def test_copies_of_masks_are_released(bakes: Bakes) -> None:
    baked = open_baked(bakes("sd15.original", "obs")[1])
    masks = Masks.of(baked.plan, read_decision(baked))
    (part,) = next(iter(masks.original.values()))
    assert isinstance(part, ReplacedWeights)
    alone = part.extra_bytes
    part.rule(torch.float32)(torch.empty(part.stop), None)
    assert part.extra_bytes == 3 * alone
    masks.release()
    assert part.extra_bytes == alone


def test_with_moved_weights_the_biases_are_compared(bakes: Bakes) -> None:
    base, moved = bakes("sd15.original", "obs")
    file, weights = open_baked(moved), loaded(base)
    name = match.PREFIX + "input_blocks.1.1.transformer_blocks.0.ff.net.2.bias"
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        match.model_parts({**weights, name: weights[name].to(dtype)}, file)
    match.model_parts({key: weight for key, weight in weights.items() if key != name}, file)
    weight = name.replace("bias", "weight")
    match.model_parts({**weights, weight: weights[weight] * 1.01}, file)
    with raises(PoaError, "ff.net.2"):
        match.model_parts({**weights, name: weights[name] + 1}, file)
    match.model_parts({**weights, name: weights[name] + 1}, open_baked(bakes("sd15.original", "wanda")[1]))


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_smaller_mask_is_seen_by_its_zeros(criterion: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {}
    for ratio in (0.1, 0.4):
        request = ExportRequest("demo", Size(96, 64), tmp_path / f"{ratio}.safetensors", ratio=ratio)
        files[ratio] = open_baked(export(replace(request, criterion=criterion)).written.path)
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        match.model_parts(loaded(demo.path(), dtype), files[0.4])
    assert not caplog.messages
    match.model_parts(loaded(files[0.1].checkpoint.path), files[0.4])
    (text,) = caplog.messages
    assert "25% of the weights that" in text
    assert "load 'demo' instead" in text


def test_files_are_told_by_their_header(baked: BakedCheckpoint, tmp_path: Path) -> None:
    assert listing.is_baked(baked.checkpoint.path)
    assert not listing.is_baked(demo.path())
    assert not listing.is_baked(tmp_path / "gone.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\1\2")
    assert not listing.is_baked(tmp_path / "short.safetensors")
    changing = tmp_path / "changing.safetensors"
    shutil.copyfile(demo.path(), changing)
    assert not listing.is_baked(changing)
    shutil.copyfile(baked.checkpoint.path, changing)
    assert listing.is_baked(changing)


def test_the_text_is_that_of_inspect(baked: BakedCheckpoint) -> None:
    text = listing.about(baked.checkpoint.path)
    for part in ("pruned for: 96x64", "not tuned", "POA weight: 1.5", "down | 0.4 |"):
        assert part in text
    with pytest.raises(CrdiffError):
        listing.about(Path(__file__))


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(14.6, 0), (14.601, 0), (10.0, 0), (5.0, 0.25), (4.9999, 0.25), (2.0, 0.5), (1.0, 0.5), (0.5, 0.75), (0.01, 0.75)],
)
def test_how_much_is_done(sigma: float, expected: float) -> None:
    assert fraction(sigma, [14.6, 5.0, 2.0, 0.5, 0.0]) == expected


def test_how_much_is_done_where_noise_is_put_on() -> None:
    assert [fraction(sigma, [0.0, 2.0, 5.0]) for sigma in (0.0, 1.0, 2.0, 5.0)] == [0, 0, 0.5, 0.5]
    assert fraction(1.0, [1.0]) == 0
