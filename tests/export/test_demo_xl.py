"""The trained small SDXL in what an SDXL goes through: exports, layouts, packs, POA, cards, criteria."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

from crdiff_export.models import demo
from crdiff_export.sampling import poa
from tests.support.isolation import Crdiff

BASE = demo.path("demo-xl")
PROMPT = "a red circle right of a blue square on white"


def opened(file: Path) -> diffusers.StableDiffusionXLPipeline:
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(demo.config("demo-xl")), local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: diffusers.StableDiffusionXLPipeline) -> np.ndarray:
    seed = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, width=72, height=56, num_inference_steps=2, guidance_scale=4.0, generator=seed).images[0]
    return np.asarray(image)


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from crdiff_export import ExportRequest, Size, export

    target = tmp_path_factory.mktemp("baked") / "pruned.safetensors"
    return export(ExportRequest("demo-xl", Size(72, 56), target, ratio=0.3)).written.path


@pytest.mark.usefixtures("one_thread")
def test_poa_on_the_base_is_between_it_and_the_baked_file(baked: Path) -> None:
    """With weight 1 it is the baked file, which diffusers opens as any SDXL."""
    dense, pruned = picture(opened(BASE)), picture(opened(baked))
    assert (dense != pruned).any()
    pipe = opened(BASE)
    poa.enable(pipe, baked, weight=1.0)
    assert np.array_equal(picture(pipe), pruned)
    poa.disable(pipe)
    poa.enable(pipe, baked, weight=2.0)
    amplified = picture(pipe)
    poa.disable(pipe)
    assert (amplified != dense).any()
    assert (amplified != pruned).any()
    assert np.array_equal(picture(pipe), dense)


def test_the_file_verifies_and_is_described(baked: Path, crdiff: Crdiff) -> None:
    assert crdiff("verify", baked, "--base", "demo-xl").code == 0
    facts = json.loads(crdiff("inspect", baked, "--json").out)
    assert facts["crdiff"]["family"] == "demo-xl"
    assert facts["crdiff"]["prediction"] == "v-zsnr"
    card = crdiff("card", baked)
    assert card.code == 0
    assert "`crdiff preview demo-xl`" in card.out


def test_there_and_back_in_the_other_layout(here: Path, crdiff: Crdiff) -> None:
    assert crdiff("convert", "demo-xl", "--layout", "diffusers", "-qo", here / "unet").code == 0
    unet = diffusers.UNet2DConditionModel.from_pretrained(here / "unet")
    weights = opened(BASE).unet.state_dict()
    assert set(unet.state_dict()) == set(weights)
    assert [name for name, weight in unet.state_dict().items() if not torch.equal(weight.float(), weights[name])] == []
    pipe = opened(BASE).to(torch.float16)
    pipe.save_pretrained(here / "folder")
    assert crdiff("convert", here / "folder", "--layout", "original", "-qo", here / "back.safetensors").code == 0
    back, tensors = (safetensors.torch.load_file(file) for file in (here / "back.safetensors", BASE))
    assert set(back) == set(tensors)
    assert [name for name, weight in tensors.items() if not torch.equal(weight, back[name])] == []


def test_a_pack_gives_the_same_files(baked: Path, here: Path, crdiff: Crdiff) -> None:
    assert (
        crdiff("pack", "create", "demo-xl", "--res", "72x56", "--res", "160", "--ratio", 0.3, "-qo", "p.crdiff").code
        == 0
    )
    assert crdiff("export", "demo-xl", "--pack", "p.crdiff", "--res", "72x56", "-qo", "again.safetensors").code == 0
    again, direct = (safetensors.torch.load_file(file) for file in (here / "again.safetensors", baked))
    assert all(torch.equal(again[name], weight) for name, weight in direct.items())
    assert crdiff("verify", "p.crdiff", "--base", "demo-xl").code == 0


def test_prompts_of_its_own(crdiff: Crdiff, here: Path) -> None:
    """It needs no --prompts, knows all relations, and `demo` still knows two."""
    drawing = ("--res", "56x72", "--ratio", 0.3, "--steps", 1, "--limit", 2, "--batch", 2)
    evaluated = crdiff("evaluate", "demo-xl", *drawing, "--no-native", "--json")
    assert evaluated.code == 0
    assert json.loads(evaluated.out)["scorer"] == "demo"
    sheet = ("--res", "56x72", "--ratio", 0.3, "--steps", 1, "--prompt", PROMPT, "-o", "p.png", "--force")
    assert "right of" not in crdiff("preview", "demo-xl", *sheet).err
    assert "right of" in crdiff("preview", "demo", *sheet).err


def test_it_is_calibrated_for_adverse(crdiff: Crdiff, here: Path) -> None:
    calibrated = crdiff("calibrate", "demo-xl", "--res", "56x72", "--criterion", "adverse", "--limit", 2, "--steps", 2,
                        "-qo", "c.safetensors")  # fmt: skip
    assert calibrated.code == 0
    exported = crdiff("export", "demo-xl", "--res", "56x72", "--ratio", 0.3, "--criterion", "adverse", "--calibration",
                      "c.safetensors", "-qo", "o.safetensors")  # fmt: skip
    assert exported.code == 0
    verified = crdiff("verify", "o.safetensors", "--base", "demo-xl", "--calibration", "c.safetensors")
    assert verified.code == 0
