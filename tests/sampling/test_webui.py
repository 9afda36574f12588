"""The extension for web UIs as far as it goes without one: its installation, its settings, and POA in a small stand-in.

The stand-in has the surface of Forge that the extension uses. test_webui_real.py has the real UIs.
"""

import ast
import copy
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.models import demo
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling.comfyui.match import PREFIX
from crdiff_export.sampling.poa.mix import Schedule, mix
from crdiff_export.sampling.webui import listing, script, ui
from crdiff_export.sampling.webui.layers import MergedWeight, PrunedLayers
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import PicturePruning, PoaFile, fraction_done, picture_size
from tests.support import ROOT, scaled_models
from tests.support.isolation import Crdiff
from tests.support.messages import raises
from tests.support.source_code import PACKAGE

EXTENSION = Path(listing.__file__).with_name("extension.py")
# What each UI's folder has.
OF_A1111 = ("webui.py", "modules/sd_hijack_unet.py")
OF_FORGE = (*OF_A1111, "modules_forge/config.py")
FOLDERS = {
    "A1111": OF_A1111,
    "Forge": (*OF_FORGE, "backend/patcher/base.py"),
    "Forge Classic": (*OF_FORGE, "ldm_patched/modules/lora.py"),
    "reForge": (*OF_FORGE, "ldm_patched/modules/patcher_extension.py"),
    "SD.Next": ("webui.py", "installer.py", "modules/sd_offload.py"),
}
WIDE, TALL = Size(96, 64), Size(64, 96)
WEIGHT, TALL_WEIGHT = 1.7, 3.0


def make_ui(folder: Path, name: str) -> Path:
    """A folder as the UI's."""
    for file in FOLDERS[name]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / "extensions" / "somebody").mkdir(parents=True)
    return folder


@pytest.fixture
def forge(tmp_path: Path) -> Path:
    return make_ui(tmp_path / "forge", "Forge")


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Installation.


@pytest.mark.parametrize("name", FOLDERS)
def test_install_then_uninstall(name: str, crdiff: Crdiff, tmp_path: Path) -> None:
    path = make_ui(tmp_path / "webui", name)
    folder = path / "extensions" / "sd-webui-crdiff"
    ran = crdiff("webui", "install", path)
    assert (ran.code, ran.out) == (0, f"{folder}\n")
    assert f"restart {name}; " in ran.err
    assert contents(folder) == {"scripts", "crdiff_export", "crdiff.json"}
    assert contents(folder / "scripts") == {"crdiff_poa.py"}
    assert not (folder / "crdiff_export" / "recipes").exists()
    (folder / "crdiff_export" / "of_an_old_version.py").touch()
    (folder / "crdiff.json").write_text('{"crdiff": "0.0.1", "package": "crdiff_export"}')
    assert "version 0.0.1 is replaced" in crdiff("webui", "install", path).err
    assert not (folder / "crdiff_export" / "of_an_old_version.py").exists()
    ran = crdiff("webui", "uninstall", path, "-q")
    assert (ran.code, ran.out, ran.err) == (0, f"{folder}\n", "")
    assert contents(path / "extensions") == {"somebody"}
    ran = crdiff("webui", "uninstall", path)
    assert (ran.code, ran.out) == (0, "")
    assert "not installed" in ran.err


def test_json(crdiff: Crdiff, forge: Path) -> None:
    folder = str(forge / "extensions" / "sd-webui-crdiff")
    first = {
        "schema": 1, "installed": folder, "ui": "Forge", "version": tool_version(), "replaced": None, "aside": None,
    }  # fmt: skip
    assert crdiff("webui", "install", forge, "--json").result == first
    assert crdiff("webui", "install", forge, "--json").result == first | {"replaced": tool_version()}
    assert crdiff("webui", "uninstall", forge, "--json").result == {"schema": 1, "removed": folder, "ui": "Forge"}
    assert crdiff("webui", "uninstall", forge, "--json").result == {"schema": 1, "removed": None, "ui": "Forge"}


def test_what_is_somebody_elses_stays(crdiff: Crdiff, forge: Path) -> None:
    """It is moved out of the extensions, because a UI loads every folder there."""
    folder = forge / "extensions" / "sd-webui-crdiff"
    folder.mkdir()
    (folder / "mine.py").touch()
    for command in ("install", "uninstall"):
        ran = crdiff("webui", command, forge, "--json")
        assert ran.code == 1
        assert "was not installed by crdiff" in ran.error["message"]
    assert crdiff("webui", "install", forge, "--force").code == 0
    assert contents(forge / "extensions") == {"sd-webui-crdiff", "somebody"}
    assert contents(forge / "sd-webui-crdiff.disabled") == {"mine.py"}


def test_the_folder_must_be_a_uis(crdiff: Crdiff, forge: Path, tmp_path: Path) -> None:
    for path, text in {
        tmp_path: "is none of SD.Next, reForge, Forge, Forge Classic, A1111",
        forge / "extensions": f"Give the folder that it is in: {forge}.",
        tmp_path / "gone": "there is no such folder",
    }.items():
        ran = crdiff("webui", "install", path)
        assert ran.code == 1
        assert text in ran.err


# Settings.


@pytest.mark.parametrize(
    ("settings", "entries"),
    [
        (Settings(), {}),
        (Settings("sdxl.crdiff"), {"CR-Diff": "sdxl.crdiff"}),
        (
            Settings("a/b.safetensors", 0.0, 0.25, 0.5),
            {"CR-Diff": "a/b.safetensors", "CR-Diff weight": "0", "CR-Diff start": "0.25", "CR-Diff stop": "0.5"},
        ),
    ],
)
def test_infotext_gives_the_settings_back(settings: Settings, entries: dict[str, str]) -> None:
    assert settings.infotext() == entries
    assert Settings.from_infotext(entries) == settings


def test_an_infotext_of_somebody_else_is_read_as_far_as_it_goes() -> None:
    assert Settings.from_infotext({"CR-Diff": "a", "CR-Diff weight": "much"}) == Settings("a")


def test_the_plot_changes_one_setting() -> None:
    settings = Settings("a", 1.5)
    assert settings.changed("weight", " 2.25 ") == Settings("a", 2.25)
    assert settings.changed("weight", "file") == Settings("a")
    assert settings.changed("file", "None").file == ""
    assert settings.changed("stop", "0.5").stop == 0.5
    with raises(PoaError, "'much' is no number for CR-Diff's weight"):
        settings.changed("weight", "much")


def test_the_size_is_that_of_the_pass() -> None:
    p = SimpleNamespace(width=512, height=768)
    assert picture_size(p) == Size(512, 768)
    # Enlarged to 1024x1536, of which 1024x1024 are left.
    second = {"is_hr_pass": True, "hr_upscale_to_x": 1024, "hr_upscale_to_y": 1536, "truncate_x": 0, "truncate_y": 64}
    assert picture_size(SimpleNamespace(**vars(p), **second)) == Size(1024, 1024)


def test_the_fraction_is_the_uis_own() -> None:
    def at(step: int, total: int) -> float:
        return fraction_done(SimpleNamespace(sampler=SimpleNamespace(model_wrap_cfg=SimpleNamespace(
            step=step, total_steps=total
        ))))  # fmt: skip

    assert (at(0, 20), at(10, 20)) == (0, 0.5)
    assert at(0, 0) == 0
    assert at(25, 20) < 1  # a sampler that asks more often than the UI counts


# Layers.


class Layers(nn.Module):
    """Two layers of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(hidden))  # type: ignore[no-any-return]


def halved(tensor: torch.Tensor) -> torch.Tensor:
    """What the parts of `pruning` make of a weight."""
    return torch.where(tensor.abs() <= 0.25, 0, tensor)


@pytest.fixture
def pruning() -> PicturePruning:
    from crdiff_export.formats import dtypes
    from crdiff_export.sampling.poa.masks import ThresholdPart

    part = ThresholdPart(0, 16, dtypes.floor_bits(0.25), "F32")
    return PicturePruning({"first.weight": (part,), "second.weight": (part,)}, Schedule(1.5), "x.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0, 1.7])
def test_layers_compute_with_pruned_weights_for_one_call(pruning: PicturePruning, weight: float) -> None:
    """Of a layer with a merged LoRA the base's weight is pruned, and the LoRA merged again."""
    model, hidden = Layers(), torch.randn(3, 4)
    base, delta = model.first.weight.clone(), torch.randn(4, 4) / 5
    model.first.weight.add_(delta)
    expected = copy.deepcopy(model)
    expected.first.weight.copy_(halved(base) + delta)
    expected.second.weight.copy_(halved(model.second.weight))
    own = [(parameter, parameter.clone()) for parameter in model.parameters()]

    def merged(key: str) -> MergedWeight | None:
        return MergedWeight(base, lambda pruned: pruned + delta) if key == "first.weight" else None

    layers = PrunedLayers(model, pruning, merged)
    result = layers.predict(lambda: model(hidden), weight)
    assert torch.equal(result, mix(model(hidden), expected(hidden), weight))
    assert all(now is before for now, (before, _) in zip(model.parameters(), own, strict=True))
    assert all(torch.equal(now, before) for now, before in own)


def test_an_error_within_a_layer_leaves_the_weights(pruning: PicturePruning) -> None:
    model = Layers()
    own = list(model.parameters())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PrunedLayers(model, pruning, lambda _key: None).predict(lambda: model(torch.randn(3, 5)), 1)
    assert all(now is before for now, before in zip(model.parameters(), own, strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_that_goes_past_its_layers_is_an_error(pruning: PicturePruning) -> None:
    with raises(PoaError, "no layer that x.safetensors prunes took its pruned weights"):
        PrunedLayers(Layers(), pruning, lambda _key: None).predict(lambda: torch.zeros(1), 1)


# The whole script, in a stand-in.


class Unet(nn.Module):
    """A model with the demo base's layers, each of which adds its share to what comes out."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        stored = safetensors.torch.load_file(file)
        self.layers: list[nn.Linear] = []
        for name, weight in stored.items():
            if name.startswith(f"model.{PREFIX}") and name.endswith(".weight") and weight.ndim == 2:
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight = nn.Parameter(weight.float(), requires_grad=False)
                module: nn.Module = self
                *path, last = name.removeprefix("model.").removesuffix(".weight").split(".")
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, nn.Module())
                    module = getattr(module, part)
                module.add_module(last, layer)
                self.layers.append(layer)

    def apply_model(self, x: torch.Tensor, _t: Any, **_: Any) -> torch.Tensor:
        return torch.stack([layer(x[..., : layer.in_features]).mean(-1) for layer in self.layers])


class Patcher:
    """Forge's patcher of a UNet."""

    def __init__(self, model: Unet) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.lora_patches: dict[Any, Any] = {}
        self.lora_loader = SimpleNamespace(backup={})

    def clone(self) -> Any:
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.lora_patches, other.lora_loader = self.lora_patches.copy(), self.lora_loader
        return other

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function


class Component:
    """A component of gradio."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def click(self, function: Any, **_: Any) -> None:
        self.function = function


class StandIn:
    """A Forge with the demo base, its extension, and a picture.

    Attributes:
        script: The extension's script.
        warnings: What the page has shown.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.before_ui: list[Callable[[], None]] = []
        self.axis = SimpleNamespace(axis_options=[], AxisOption=lambda *a, **k: SimpleNamespace(label=a[0], apply=a[2]))
        gradio = ModuleType("gradio")
        vars(gradio).update(
            dict.fromkeys(("Accordion", "Row", "Dropdown", "Button", "Checkbox", "Slider", "Markdown"), Component),
            update=dict, Warning=self.warnings.append,
        )  # fmt: skip
        modules = ModuleType("modules")
        vars(modules).update(
            paths=SimpleNamespace(script_path=str(folder), models_path=str(folder / "models")),
            scripts=SimpleNamespace(
                Script=type("Script", (), {}), AlwaysVisible=object(), scripts_data=[SimpleNamespace(module=self.axis)]
            ),
            script_callbacks=SimpleNamespace(on_before_ui=self.before_ui.append),
            sd_models=SimpleNamespace(model_path=str(folder / "models" / "Stable-diffusion")),
            shared=SimpleNamespace(cmd_opts=SimpleNamespace(ckpt_dir=None), opts=SimpleNamespace()),
        )
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        monkeypatch.setitem(sys.modules, "modules", modules)
        self.script = runpy.run_path(str(EXTENSION))["CrdiffScript"]()

    def picture(self, base: Path, size: Size = WIDE) -> Any:
        """A processing object; the UI drops changed patchers before each pass."""
        objects = SimpleNamespace(unet=Patcher(Unet(base)))
        p = SimpleNamespace(
            width=size.width, height=size.height, sd_model=SimpleNamespace(forge_objects=objects), comments=[],
            extra_generation_params={}, sampler=SimpleNamespace(model_wrap_cfg=SimpleNamespace(step=0, total_steps=4)),
        )  # fmt: skip
        p.comment = p.comments.append
        return p


def predict(p: Any) -> torch.Tensor:
    """Call the model as Forge does."""
    patcher = p.sd_model.forge_objects.unet
    hidden = torch.linspace(-1, 1, 4 * 2048).view(4, 2048)
    options: dict[str, Any] = {"transformer_options": {}, "control": {"middle": [1]}}
    wrapper = patcher.model_options.get("model_function_wrapper")
    with torch.inference_mode():
        result: torch.Tensor = (
            wrapper(patcher.model.apply_model, {"input": hidden, "timestep": None, "c": options})
            if wrapper else patcher.model.apply_model(hidden, None, **options)
        )  # fmt: skip
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base, an export for each size, a pack of both, and another model."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "Stable-diffusion").mkdir()
    (folder / "crdiff" / "mine").mkdir(parents=True)
    checkpoints = folder / "Stable-diffusion"
    shutil.copyfile(demo.path(), checkpoints / "demo.safetensors")
    pack = folder / "crdiff" / "mine" / "demo.crdiff"
    for name, size, ratio, weight in (("wide", WIDE, 0.4, WEIGHT), ("tall", TALL, 0.3, TALL_WEIGHT)):
        export(ExportRequest("demo", size, checkpoints / f"{name}.safetensors", ratio=ratio, poa_weight=weight))
        request = create.PackRequest((PlanRequest("demo", size, ratio=ratio, poa_weight=weight),), pack)
        job = create.prepare_more(request, open_pack(pack)) if pack.exists() else create.prepare_new(request)
        create.make(job, Silent())
    other = {name: weight * 1.5 for name, weight in safetensors.torch.load_file(demo.path()).items()}
    safetensors.torch.save_file(other, folder / "other.safetensors")
    return folder


@pytest.fixture
def stand_in(forge: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    (forge / "models").symlink_to(models, target_is_directory=True)
    yield StandIn(forge, monkeypatch)
    script._open_version.cache_clear()


def expected(models: Path, name: str, p: Any, weight: float) -> torch.Tensor:
    """What two models and the formula give."""
    objects = SimpleNamespace(unet=Patcher(Unet(models / "Stable-diffusion" / f"{name}.safetensors")))
    pruned = predict(SimpleNamespace(sd_model=SimpleNamespace(forge_objects=objects)))
    own = p.sd_model.forge_objects
    dense = predict(
        SimpleNamespace(sd_model=SimpleNamespace(forge_objects=SimpleNamespace(unet=Patcher(own.unet.model))))
    )
    return mix(dense, pruned, weight)


def test_a_picture_with_poa(stand_in: StandIn, models: Path) -> None:
    own, p = stand_in.script, stand_in.picture(demo.path())
    unet = p.sd_model.forge_objects.unet
    dense, before = predict(p), {key: tensor.clone() for key, tensor in unet.model.state_dict().items()}
    for values, weight in {
        ("wide.safetensors", True, 9.0, 0, 1): WEIGHT, ("wide.safetensors", False, 1.0, 0, 1): 1,
        ("wide.safetensors", False, 0.0, 0, 1): 0, ("wide.safetensors", False, 2.5, 0.5, 1): 0,
    }.items():  # fmt: skip
        own.before_process(p, *values)
        own.process(p, *values)
        own.process_before_every_sampling(p, *values, x=None)
        assert torch.equal(predict(p), expected(models, "wide", p, weight))
        own.postprocess(p, None, *values)
        assert p.sd_model.forge_objects.unet is unet
        assert torch.equal(predict(p), dense)
    now = unet.model.state_dict()
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())
    assert p.extra_generation_params["CR-Diff"] == "wide.safetensors"
    assert p.comments == stand_in.warnings == []


def test_poa_begins_where_it_is_told_to(stand_in: StandIn, models: Path) -> None:
    p = stand_in.picture(demo.path())
    stand_in.script.process_before_every_sampling(p, "wide.safetensors", False, 2.5, 0.5, 1)
    for step, weight in enumerate((0, 0, 2.5, 2.5)):
        p.sampler.model_wrap_cfg.step = step
        assert torch.equal(predict(p), expected(models, "wide", p, weight))


def test_a_pack_follows_the_size_of_each_pass(stand_in: StandIn, models: Path) -> None:
    p = stand_in.picture(demo.path())
    p.is_hr_pass, p.hr_upscale_to_x, p.hr_upscale_to_y = False, TALL.width, TALL.height
    values = ("mine/demo.crdiff", True, 1.5, 0, 1)
    stand_in.script.process_before_every_sampling(p, *values)
    assert torch.equal(predict(p), expected(models, "wide", p, WEIGHT))
    p.is_hr_pass = True
    stand_in.script.process_before_every_sampling(p, *values)
    assert torch.equal(predict(p), expected(models, "tall", p, TALL_WEIGHT))
    p.hr_upscale_to_x = p.hr_upscale_to_y = 64
    stand_in.script.process_before_every_sampling(p, *values)
    assert torch.equal(predict(p), expected(models, "tall", p, 0))
    assert "the model stays dense" in p.comments[0]
    assert stand_in.warnings == p.comments


@pytest.mark.parametrize(
    ("base", "file", "text"),
    [
        ("other.safetensors", "wide.safetensors", "are not those of"),
        ("other.safetensors", "mine/demo.crdiff", "are not those of"),
        ("Stable-diffusion/wide.safetensors", "wide.safetensors", "already"),
        ("Stable-diffusion/demo.safetensors", "gone.safetensors", "is not among this UI's models"),
    ],
)
def test_a_refusal_is_one_line_below_a_dense_picture(
    stand_in: StandIn, models: Path, base: str, file: str, text: str
) -> None:
    p = stand_in.picture(models / base)
    dense = predict(p)
    stand_in.script.process_before_every_sampling(p, file, True, 1.5, 0, 1)
    (line,) = p.comments
    assert stand_in.warnings == [line]
    assert line.startswith("CR-Diff is off: ")
    assert text in line
    assert "\n" not in line
    assert torch.equal(predict(p), dense)
    assert p.extra_generation_params == {}


def test_a_picture_that_failed_leaves_no_poa_to_the_next(stand_in: StandIn) -> None:
    p = stand_in.picture(demo.path())
    dense = predict(p)
    stand_in.script.process_before_every_sampling(p, "wide.safetensors", True, 1.5, 0, 1)
    copied = p.sd_model.forge_objects.unet.clone()  # another script's
    stand_in.script.before_process(p, "None", True, 1.5, 0, 1)
    assert torch.equal(predict(p), dense)
    p.sd_model.forge_objects.unet = copied
    assert torch.equal(predict(p), dense)


def test_the_accordion_lists_files_and_reads_an_infotext(stand_in: StandIn) -> None:
    file, *others = components = stand_in.script.ui(_is_img2img=False)
    assert sorted(file.args[0]) == ["None", "mine/demo.crdiff", "tall.safetensors", "wide.safetensors"]
    assert [field for field, _ in stand_in.script.infotext_fields] == components == [file, *others]
    entries = Settings("wide.safetensors", 2.25, 0.25).infotext()
    read = [key(entries) if callable(key) else entries[key] for _, key in stand_in.script.infotext_fields]
    assert read == ["wide.safetensors", False, "2.25", 0.25, 1.0]
    listed, own, *_ = (key for _, key in stand_in.script.infotext_fields)
    assert (listed({}), own({})) == ("None", True)
    assert listed({"CR-Diff": "gone.safetensors"}) == "None"
    assert stand_in.script.paste_field_names[0] == "CR-Diff"
    assert (stand_in.script.title(), stand_in.script.show(False)) == ("CR-Diff", stand_in.script.show(True))


def test_the_plot_has_an_axis_for_every_setting(stand_in: StandIn, models: Path) -> None:
    (add,) = stand_in.before_ui
    add()
    add()  # the page is made again
    axes = {option.label: option.apply for option in stand_in.axis.axis_options}
    assert list(axes) == ["[CR-Diff] file", "[CR-Diff] weight", "[CR-Diff] start", "[CR-Diff] stop"]
    assert len(stand_in.axis.axis_options) == 4
    p = stand_in.picture(demo.path())
    axes["[CR-Diff] file"](p, "wide.safetensors", [])
    axes["[CR-Diff] weight"](p, "2.5", [])
    stand_in.script.process_before_every_sampling(p, "None", True, 1.5, 0, 1)
    assert torch.equal(predict(p), expected(models, "wide", p, 2.5))
    axes["[CR-Diff] weight"](p, "much", [])
    stand_in.script.process_before_every_sampling(p, "None", True, 1.5, 0, 1)
    assert "'much' is no number" in p.comments[-1]


def test_a_pack_of_scaled_fp8_is_refused(tmp_path: Path) -> None:
    """These UIs keep codes and scales apart, so that a threshold would be compared with codes."""
    base = scaled_models.Scaled(scaled_models.UNET, "metadata", ("F16",)).write(tmp_path / "base.safetensors")
    pack = tmp_path / "base.crdiff"
    create.make(create.prepare_new(create.PackRequest((PlanRequest(str(base), WIDE, ratio=0.4),), pack)), Silent())
    with raises(PoaError, "base.crdiff: its base has fp8 codes with a scale"):
        PoaFile.open(pack).pruning({}, WIDE, Settings())


def test_a_file_of_somebody_else_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(CrdiffError):
        PoaFile.open(demo.path())


def test_an_older_python_is_told_in_the_accordion(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    sys.modules["gradio"].Markdown = shown.append  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(sys, "version", "3.9.18 (main)")
    own = runpy.run_path(str(EXTENSION))["CrdiffScript"]()
    assert own.ui(False) == []
    assert shown == ["CR-Diff needs Python 3.10 or newer, this UI runs on 3.9.18."]
    assert own.title() == "CR-Diff"


# What the package might take from the library of 3.11 while it is loaded.
NEW_IN_3_11 = {
    *(("typing", name) for name in ("Self", "Never", "NotRequired", "Required", "assert_never", "Unpack")),
    ("enum", "StrEnum"), ("hashlib", "file_digest"), ("contextlib", "chdir"), ("datetime", "UTC"),
}  # fmt: skip
OLD_PYTHON = """
import datetime, importlib, sys, tomllib, types
pip, vendor = types.ModuleType("pip"), types.ModuleType("pip._vendor")
sys.modules |= {"pip": pip, "pip._vendor": vendor, "pip._vendor.tomli": tomllib, "tomllib": None}
del datetime.UTC
for name in ("script", "source", "settings", "listing", "layers", "unet_clone", "reforge", "forge", "a1111"):
    importlib.import_module(f"crdiff_export.sampling.webui.{name}")
from pathlib import Path
from crdiff_export.sampling.webui.source import PoaFile
for path in sys.argv[1:]:
    PoaFile.open(Path(path))
print([str(Path(module.__file__)) for name, module in sys.modules.items() if name.startswith("crdiff_export")])
"""


def test_nothing_that_python_3_10_lacks_is_needed(tmp_path: Path) -> None:
    """Import the extension without the library's additions of 3.11, and parse its modules with the grammar of 3.10."""
    made = export(ExportRequest("demo", WIDE, tmp_path / "x.safetensors")).written.path
    request = create.PackRequest((PlanRequest("demo", WIDE),), tmp_path / "p.crdiff")
    pack = create.make(create.prepare_new(request), Silent())
    line = [sys.executable, "-c", OLD_PYTHON, str(made), str(pack.pack.path)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    loaded = ast.literal_eval(ran.stdout)
    assert len(loaded) > 60
    for path in [*map(Path, loaded), *EXTENSION.parent.glob("*.py"), *(PACKAGE / "sampling" / "poa").glob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))
        names = {
            (each.module, name.name) for each in tree.body if isinstance(each, ast.ImportFrom) for name in each.names
        }
        assert not names & NEW_IN_3_11, path


def test_files_of_somebody_else_are_not_listed(stand_in: StandIn) -> None:
    assert "demo.safetensors" not in listing.files()
    assert ui.detect(stand_in.folder).name == "Forge"
