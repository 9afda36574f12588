"""ComfyUI's nodes as far as they go without ComfyUI: installing them, and what they work with."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.models import demo
from crdiff_export.sampling.comfyui import listing, match
from crdiff_export.sampling.comfyui.patch import PatchedLayer, PruneSwitch, fraction
from crdiff_export.verify.reopen import BakedCheckpoint, open_baked
from tests.support import masking
from tests.support.isolation import Crdiff
from tests.support.source_code import FILES, imports

Weights = dict[str, torch.Tensor]


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder as ComfyUI's."""
    for name in ("comfy", "custom_nodes/somebody", "models/checkpoints"):
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    return tmp_path / "ComfyUI"


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def load(node: Path) -> subprocess.CompletedProcess[str]:
    """Load the folder as ComfyUI does, in a Python that has nothing installed."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('nodes', {str(node / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import crdiff_export\n"
        "print(*module.NODE_CLASS_MAPPINGS, *module.NODE_DISPLAY_NAME_MAPPINGS.values(), sep='|')\n"
        "print(crdiff_export.__file__)\n"
    )
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, capture_output=True, text=True)


def test_install_then_uninstall(crdiff: Crdiff, comfyui: Path) -> None:
    node = comfyui / "custom_nodes" / "crdiff"
    ran = crdiff("comfyui", "install", comfyui)
    assert (ran.code, ran.out) == (0, f"{node}\n")
    assert "restart ComfyUI" in ran.err
    assert contents(comfyui / "custom_nodes") == {"crdiff", "somebody"}
    assert contents(node) == {"__init__.py", "crdiff.json", "crdiff_export"}
    assert not list(node.rglob("__pycache__"))
    assert not (node / "crdiff_export" / "recipes").exists()
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
    assert names == "CrdiffPoa|CrdiffInfo|CR-Diff POA|CR-Diff Info"
    assert Path(package).is_relative_to(node) is not link


def test_an_update_replaces_the_whole_copy(crdiff: Crdiff, comfyui: Path) -> None:
    node = comfyui / "custom_nodes" / "crdiff"
    crdiff("comfyui", "install", comfyui)
    (node / "crdiff_export" / "of_an_old_version.py").touch()
    (node / "crdiff.json").write_text('{"crdiff": "0.0.1", "package": "crdiff_export"}')
    ran = crdiff("comfyui", "install", comfyui)
    assert "version 0.0.1 is replaced" in ran.err
    assert not (node / "crdiff_export" / "of_an_old_version.py").exists()


def test_a_link_to_what_is_gone_says_so(crdiff: Crdiff, comfyui: Path) -> None:
    node = comfyui / "custom_nodes" / "crdiff"
    crdiff("comfyui", "install", comfyui, "--link")
    (node / "crdiff.json").write_text('{"crdiff": "0.0.1", "package": "/gone/crdiff_export"}')
    ran = load(node)
    assert "/gone/crdiff_export is not there any more; run `crdiff comfyui install` again" in ran.stderr


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
    assert contents(tmp_path / "own") == {"__init__.py", "crdiff.json", "crdiff_export"}


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


def test_comfyui_is_imported_late_and_in_one_place() -> None:
    names = {"comfy", "folder_paths", "nodes", "execution", "server"}
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path, top=True)} & names, path
        if path.parent.name != "comfyui":
            assert not {name.split(".")[0] for name in imports(path)} & names, path


# What a model's weights are held against.


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> BakedCheckpoint:
    target = tmp_path_factory.mktemp("baked") / "baked.safetensors"
    export(ExportRequest("demo", Size(96, 64), target, ratio=0.4, poa_weight=1.5))
    return open_baked(target)


def loaded(path: Path, dtype: torch.dtype = torch.float16) -> Weights:
    """A model's weights by ComfyUI's names."""
    weights = safetensors.torch.load_file(path)
    prefix = "model.diffusion_model."
    return {match.PREFIX + k.removeprefix(prefix): v.to(dtype) for k, v in weights.items() if k.startswith(prefix)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_base_is_recognised_in_every_dtype(baked: BakedCheckpoint, dtype: torch.dtype) -> None:
    cuts = match.model_parts(loaded(demo.path(), dtype), baked)
    assert set(cuts) == {
        match.PREFIX + t.source.name.removeprefix("model.diffusion_model.") for t in baked.plan.targets
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_pruned_model_is_refused_in_every_dtype(baked: BakedCheckpoint, dtype: torch.dtype) -> None:
    with pytest.raises(PoaError, match="holds the pruned weights of"):
        match.model_parts(loaded(baked.checkpoint.path, dtype), baked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w * 1.01, "are not those of 'demo'"),
        (lambda w: w[:1], "has 64 weights"),
        (lambda w: w.to(torch.int8), "cannot be pruned on the fly"),
        (None, "the model has no layer"),
    ],
    ids=["another model", "another shape", "quantised", "another family"],
)
def test_other_models_are_refused(baked: BakedCheckpoint, change: object, message: str) -> None:
    weights = loaded(demo.path())
    name = match.PREFIX + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    if callable(change):
        weights[name] = change(weights[name])
    else:
        del weights[name]
    with pytest.raises(PoaError, match=message):
        match.model_parts(weights, baked)


def test_a_layer_takes_the_pruned_weights_when_the_switch_says_so(baked: BakedCheckpoint) -> None:
    weights, pruned = loaded(demo.path()), loaded(baked.checkpoint.path)
    switch = PruneSwitch()
    for key, cuts in match.model_parts(weights, baked).items():
        layer = PatchedLayer(switch, key, cuts, ())
        assert layer(weights[key]) is weights[key]
        switch.pruned = True
        assert torch.equal(layer(weights[key]), pruned[key])
        assert torch.equal(layer(weights[key].float()), pruned[key].float())
        assert layer(weights[key].to(torch.float8_e4m3fn)).dtype == torch.float8_e4m3fn
        assert switch.used
        switch.pruned = switch.used = False


# What a file without thresholds is held against.


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> masking.Base:
    return masking.base(tmp_path_factory.mktemp("masked"), "sd15.original")


def bake(base: masking.Base, criterion: str) -> BakedCheckpoint:
    path = base.path.with_name(f"{criterion}.safetensors")
    if not path.exists():
        export(base.request(path, criterion))
    return open_baked(path)


@pytest.mark.parametrize("criterion", ["random", "wanda", "obs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_what_is_computed_in_float32_was_rounded_as_the_model_was(
    criterion: str, dtype: torch.dtype, masked: masking.Base
) -> None:
    """As the pruned file is when it is loaded in that dtype, moved weights as well."""
    file = bake(masked, criterion)
    weights, pruned = loaded(masked.path, dtype), loaded(file.checkpoint.path, dtype)
    switch = PruneSwitch()
    switch.pruned = True
    for key, parts in match.model_parts(weights, file).items():
        assert torch.equal(PatchedLayer(switch, key, parts, ())(weights[key].float()), pruned[key].float())


def test_where_weights_were_moved_the_biases_tell_the_base(masked: masking.Base) -> None:
    file, weights = bake(masked, "obs"), loaded(masked.path)
    name = match.PREFIX + "input_blocks.1.1.transformer_blocks.0.ff.net.2.bias"
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        match.model_parts({**weights, name: weights[name].to(dtype)}, file)
    match.model_parts({key: weight for key, weight in weights.items() if key != name}, file)
    with pytest.raises(PoaError, match=r"the weights of input_blocks.1.1.transformer_blocks.0.ff.net.2 are not those"):
        match.model_parts({**weights, name: weights[name] + 1}, file)
    match.model_parts({**weights, name: weights[name] + 1}, bake(masked, "wanda"))


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
    (said,) = caplog.messages
    assert "25% of the weights that" in said
    assert "load 'demo' instead" in said


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
    for part in ("pruned for: 96x64", "tuned by nobody", "POA weight: 1.5", "down | 0.4 |"):
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
