"""Every way to misuse a command: the exit code, the error's code, what it names, and what is left alone."""

import shlex
import shutil
from pathlib import Path

import pytest

from crdiff_export.models import recipe_files
from tests.support.isolation import Crdiff
from tests.support.messages import golden, refused

# The command line, the exit code, the error's code, and what the message names.
REFUSALS = {
    "no base": ("export --res 64", 2, "usage", "'BASE'"),
    "no size": ("export demo", 2, "usage", "--res"),
    "size": ("export demo --res abc", 2, "usage", "'abc'"),
    "size too large": ("export demo --res 20000", 2, "usage", "20000x20000"),
    "size off the grid": ("export demo --res 97x64", 2, "usage", "97x64"),
    "ratio": ("export demo --res 64 --ratio 1", 2, "usage", "'--ratio': 1.0"),
    "ratio nan": ("export demo --res 64 --mid nan", 2, "usage", "'--mid': nan"),
    "ratio text": ("export demo --res 64 --up lots", 2, "usage", "'--up': 'lots'"),
    "POA weight": ("export demo --res 64 --poa-weight 11", 2, "usage", "'--poa-weight': 11.0"),
    "POA weight nan": ("export demo --res 64 --poa-weight nan", 2, "usage", "'--poa-weight': nan"),
    "guidance nan": ("preview demo --res 64 --prompt fox --guidance nan", 2, "usage", "'--guidance': nan"),
    "fraction nan": ("preview demo --res 64 --prompt fox --start nan", 2, "usage", "'--start': nan"),
    "hours nan": ("search demo --res 64 --hours nan", 2, "usage", "'--hours': nan"),
    "hours without end": ("search demo --res 64 --hours inf", 2, "usage", "'--hours': inf"),
    "range nan": ("search demo --res 64 --poa-range 1 nan", 2, "usage", "nan"),
    "bound nan": ("search demo --res 64 --high nan", 2, "usage", "'--high': nan"),
    "down of a transformer": ("export {shelf}/dit.safetensors --res 512 --down 0.2", 2, "usage", "'down'"),
    "targets": ("export demo --res 64 --targets attn,mlp", 2, "usage", "'--targets': 'mlp'"),
    "no targets": ("export demo --res 64 --targets ,", 2, "usage", "'--targets'"),
    "targets of others": ("export demo --res 64 --targets attn2", 2, "usage", "'attn2'"),
    "criterion": ("export demo --res 64 --criterion taste", 2, "usage", "'taste'"),
    "dtype": ("export demo --res 64 --dtype int8", 2, "usage", "'--dtype': 'int8'"),
    "device": ("export demo --res 64 --device gpu", 2, "usage", "'--device': 'gpu'"),
    "threads": ("export demo --res 64 --threads 0", 2, "usage", "'--threads': 0"),
    "command": ("exprt demo", 2, "usage", "'exprt'. Did you mean export?"),
    "command like no other": ("frobnicate", 2, "usage", "'frobnicate'"),
    "command of recipes": ("recipes lst", 2, "usage", "'lst'. Did you mean list?"),
    "two forms": ("recipes show demo --toml", 2, "usage", "--toml and --json"),
    "prompt of a file, beside another": (
        "evaluate demo --res 48 --prompt 'a large red circle on white' --prompts fox.txt", 1, "failed", "a fox",
    ),
    "push option": ("export demo --res 64 --tag v1", 2, "usage", "--tag"),
    "alias": ("export sdlx --res 512", 1, "checkpoint", "sdlx"),
    "recipe": ("recipes show sdlx", 2, "usage", "sdlx"),
    "recipe missing": ("export demo --res 64 --recipe own.toml", 1, "recipe", "own.toml"),
    "recipe folder": ("recipes validate {shelf}", 1, "recipe", "shelf"),
    "recipe of another family": ("export demo --res 64 --recipe sdxl.toml", 1, "recipe", "sdxl.toml"),
    "base missing": ("export model.safetensors --res 512", 1, "checkpoint", "model.safetensors"),
    "inspect missing": ("inspect model.safetensors", 1, "checkpoint", "model.safetensors"),
    "inspect empty": ("inspect {shelf}/empty.safetensors", 1, "checkpoint", "empty.safetensors"),
    "export of no checkpoint": ("export {shelf}/text.safetensors --res 512", 1, "checkpoint", "text.safetensors"),
    "folder without weights": ("export {shelf}/pipe/vae --res 512 --variant fp16", 1, "checkpoint", "vae"),
    "variant": ("export {shelf}/pipe --res 512 --variant ema", 1, "checkpoint", "'ema'"),
    "LoRA": ("export {shelf}/lora.safetensors --res 512", 1, "family", "lora_unet_0.lora_down.weight"),
    "unknown": ("export {shelf}/odd.safetensors --res 512", 1, "family", "odd.weight"),
    "quantised": ("export {shelf}/quantised.safetensors --res 512", 1, "plan", "a.qweight"),
    "pruned": ("export {shelf}/pruned.safetensors --res 64", 1, "plan", "pruned.safetensors"),
    "not finite": ("export {shelf}/infinite.safetensors --res 64", 1, "plan", "infinite.safetensors"),
    "dtype too narrow": ("export {shelf}/wide.safetensors --res 64 --dtype fp16", 1, "plan", "'betas'"),
    "target of another dtype": ("export {shelf}/bytes.safetensors --res 64", 1, "plan", "bytes.safetensors"),
    "target of another shape": ("export {shelf}/flat.safetensors --res 64", 1, "family", "attn1.to_q.weight"),
    "recipe that is a checkpoint": (
        "export demo --res 64 --recipe {shelf}/sd15.safetensors", 1, "recipe", "sd15.safetensors",
    ),
    "recipe in no UTF-8": ("recipes validate {shelf}/latin.toml", 1, "recipe", "latin.toml"),
    "recipe for no size": ("export demo --res 64 --recipe {shelf}/bare.toml", 1, "recipe", "bare.toml"),
    "recipe without a group": ("export demo --res 64 --recipe {shelf}/part.toml", 1, "recipe", "ratios.up"),
    "search that failed": ("recipes show {shelf}/config.json", 1, "recipe", "config.json"),
    "verify a plain file": ("verify {shelf}/sd15.safetensors", 1, "checkpoint", "sd15.safetensors"),
    "verify a hole": ("verify {shelf}/hole.safetensors", 3, "verify", "hole.safetensors"),
    "output exists": ("export demo --res 64 -o there.safetensors", 1, "plan", "there.safetensors"),
    "output is the base": (
        "export {shelf}/sd15.safetensors --res 512 -o {shelf}/sd15.safetensors --force", 1, "plan", "sd15.safetensors",
    ),
    "output in no folder": ("export demo --res 64 -o no/o.safetensors", 1, "plan", "no/o.safetensors"),
    "output in a folder exists": ("export demo --res 64 -o taken", 1, "plan", "taken/demo-crdiff-64x64.safetensors"),
    "output has another suffix": ("export demo --res 64 -o sdxl-1.5", 1, "plan", "sdxl-1.5"),
    "output is a pickle": ("export demo --res 64 -o o.ckpt", 1, "plan", "o.ckpt"),
    "output is no name": ("export demo --res 64 -o .safetensors", 1, "plan", ".safetensors"),
    "ratio in percent": ("export demo --res 64 --ratio 30%", 2, "usage", "'30%'"),
    "all in percent": ("export demo --res 64 --ratio 100%", 2, "usage", "A ratio is below 1."),
    "scorer": ("evaluate demo --res 48 --scorer clip", 2, "usage", "'clip'"),
    "scorers without a weight": ("evaluate demo --res 48 --scorer x*clip-score+aesthetic", 2, "usage", "'x'"),
    "scorer without a function": ("evaluate demo --res 48 --scorer own:", 2, "usage", "'own:'"),
    "alias to inspect": ("inspect sdxl", 1, "checkpoint", "sdxl"),
    "repository by its page": (
        "push {shelf}/pruned.safetensors https://huggingface.co/my-org/sdxl", 2, "usage", "https://huggingface.co",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("command", "exit_code", "code", "key"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal(
    crdiff: Crdiff, shelf: Path, here: Path, *, command: str, exit_code: int, code: str, key: str
) -> None:
    (here / "there.safetensors").write_text("mine")
    (here / "fox.txt").write_text("a fox\n")
    (here / "taken").mkdir()
    (here / "taken" / "demo-crdiff-64x64.safetensors").touch()
    shutil.copy(recipe_files.builtin_path() / "sdxl.toml", here)
    before = sorted(here.iterdir())
    ran = crdiff(*shlex.split(command.format(shelf=shelf)), "--json")
    assert (ran.code, ran.out, ran.error["code"]) == (exit_code, "", code)
    message, hint = ran.error["message"], ran.error["hint"]
    assert key in message
    assert hint[0].isupper() or hint[0] in "`0123456789"
    assert hint[-1] in ".?"
    golden(f"{message}\n{hint}")
    assert sorted(here.iterdir()) == before
    assert (here / "there.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["no size", "size off the grid", "verify a hole"])
def test_a_refusal_is_two_lines_for_people(crdiff: Crdiff, shelf: Path, here: Path, name: str) -> None:
    command, exit_code, _, key = REFUSALS[name]
    ran = crdiff(*shlex.split(command.format(shelf=shelf)))
    assert ran.out == ""
    complaint, hint = [text for text in ran.err.splitlines() if not text.startswith("counting: ")]
    assert complaint.startswith("crdiff: ")
    assert hint.startswith("  ")
    refused(ran, exit_code, key)
    assert list(here.iterdir()) == []


def test_a_misspelt_option_is_answered_with_the_nearest(crdiff: Crdiff) -> None:
    ran = crdiff("export", "demo", "--rec", 64, "--json")  # the words are click's, and differ with its version
    assert (ran.code, ran.error["code"]) == (2, "usage")
    assert "--recipe" in ran.error["message"]


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there(crdiff: Crdiff, device: str) -> None:
    torch = pytest.importorskip("torch")
    if (torch.cuda.is_available() and device == "cuda") or (torch.backends.mps.is_available() and device == "mps"):
        pytest.skip("this machine has one")
    ran = crdiff("export", "demo", "--res", 64, "--device", device, "--json")
    assert (ran.code, ran.error["code"]) == (1, "plan")
    assert ran.error["message"].startswith(f"device {device}: ")
    assert "--device" in ran.error["hint"]


def test_a_disk_that_is_too_full(crdiff: Crdiff, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert crdiff("export", "demo", "--res", 64, "--dry-run").code == 0
    refused(crdiff("export", "demo", "--res", 64), 1, "10.17 MB needed, 1.00 KB free")
