"""What `crdiff preview` and `crdiff evaluate` refuse: with an error that names it, before a file is written."""

import shlex
from pathlib import Path

import pytest

from tests.support.isolation import Crdiff
from tests.support.messages import refused

FOX = "--prompt 'a red fox' --steps 1"
REFUSED = {
    "no-prompt": ("preview demo --res 64", 2, "prompt"),
    "no-such-seed": (f"preview demo --res 64 --seed -1 {FOX}", 2, "seed"),
    "no-size": (f"preview demo {FOX}", 2, "size"),
    "off-grid": (f"preview demo --res 97 {FOX}", 2, "97x97"),
    "no-steps": ("preview demo --res 64 --prompt a --steps 0", 2, "--steps"),
    "heavy-weight": (f"preview demo --res 64 {FOX} --poa-weight 11", 2, "--poa-weight"),
    "backwards": (f"preview demo --res 64 {FOX} --start 0.6 --stop 0.5", 2, "0.6 to 0.5"),
    "no-ratio": (f"preview demo --res 64 {FOX} --ratio 0", 2, "ratios"),
    "no-such-base": (f"preview nowhere.safetensors --res 64 {FOX}", 1, "nowhere.safetensors"),
    "not-text": ("preview demo --res 64 --prompts {shelf}/sd15.safetensors", 1, "sd15.safetensors"),
    "strange-output": (f"preview demo --res 64 {FOX} -o o.jpg", 2, "o.jpg"),
    "taken": (f"preview demo --res 64 {FOX} -o taken.png", 1, "taken.png"),
    "a-folder": (f"preview demo --res 64 {FOX} -o folder.png --force", 1, "folder.png"),
    "huge": ("preview demo --res 16384 --prompt a", 1, "16384x16384"),
    "dit-alone": ("preview {shelf}/dit.safetensors --res 512 " + FOX, 4, "dit.safetensors"),
    "shards": ("preview {shelf}/shards/diffusion_pytorch_model.safetensors.index.json --res 64 " + FOX, 1, "shards"),
    "half-a-folder": ("preview {shelf}/pipe/unet --res 64 " + FOX, 1, "model_index.json"),
    "config-of-folder": ("preview {shelf}/pipe --res 64 --config x " + FOX, 2, "configuration"),
    "no-config": (f"preview demo --res 64 {FOX} --config no/where/at/all", 1, "no/where/at/all"),
    "config-is-file": (f"preview demo --res 64 {FOX} --config taken.png", 1, "model_index.json"),
    "baked-and-ratio": (f"preview demo --baked taken.png --ratio 0.3 {FOX}", 2, "--baked"),
    "baked-and-criterion": (f"preview demo --baked taken.png --criterion random {FOX}", 2, "--baked"),
    "no-calibration": (f"preview demo --res 64 --criterion wanda {FOX}", 2, "wanda"),
    "baked-not": (f"preview demo --baked taken.png {FOX}", 1, "taken.png"),
    "offload-on-cpu": (f"preview demo --res 64 {FOX} --offload --device cpu", 2, "--offload"),
    "device": (f"preview demo --res 64 {FOX} --device cuda:7", 1, "cuda:7"),
    "lora": ("preview {shelf}/lora.safetensors --res 64 " + FOX, 1, "LoRA"),
    "evaluate-no-size": ("evaluate demo", 2, "size"),
    "no-scorer": ("evaluate {shelf}/sd15.safetensors --res 512 --prompt x", 2, "scorer"),
    "evaluate-no-such-seed": ("evaluate demo --res 48 --seed 18446744073709551616", 2, "seeds"),
    "last-seeds": ("evaluate demo --res 48 --limit 2 --seed 18446744073709551615", 2, "seeds"),
    "blank-file": ("evaluate demo --res 48 --prompts blank.txt", 1, "blank.txt"),
    "one-bad-scene": ("evaluate demo --res 48 --prompts bad.txt", 1, "a red fox"),
    "bad-sum": ("evaluate demo --res 48 --scorer 0.5*", 2, "0.5*"),
    "bad-command": ("evaluate demo --res 48 --scorer command:", 2, "command:"),
    "scorer-device": ("evaluate demo --res 48 --scorer-device cuda:7", 1, "cuda:7"),
    "no-prompts": ("evaluate {shelf}/sd15.safetensors --res 512 --scorer aesthetic", 2, "prompts"),
    "empty-prompt": ("evaluate demo --res 48 --prompt ' '", 2, "prompt"),
    "not-a-scene": ("evaluate demo --res 48 --prompt fox --limit 1 --steps 1", 1, "fox"),
    "no-such-scorer": ("evaluate demo --res 48 --scorer beauty", 2, "'beauty'"),
    "too-many": ("evaluate demo --res 48 --limit 1000", 2, "162"),
    "evaluate-off-grid": ("evaluate demo --res 50", 2, "50x50"),
    "no-folder": ("evaluate demo --res 48 -o no/e.html", 1, "no/e.html"),
}


@pytest.mark.parametrize(("text", "code", "key"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_and_what_to_do(
    text: str, code: int, key: str, crdiff: Crdiff, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (here / "taken.png").write_text("taken")
    (here / "folder.png").mkdir()
    (here / "blank.txt").write_text(" \n\n")
    (here / "bad.txt").write_text("two red circles on grey\na red fox\n")
    before = set(here.iterdir())
    ran = crdiff(*shlex.split(text.format(shelf=shelf)))
    if key == "cuda:7":  # the rest is torch's
        assert (ran.code, key in ran.err, "Leave --device out" in ran.err) == (code, True, True)
    else:
        refused(ran, code, key)
    assert ran.out == ""
    assert set(here.iterdir()) == before
    assert (here / "taken.png").read_text() == "taken"
