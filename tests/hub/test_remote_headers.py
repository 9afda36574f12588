"""Bases on the Hub: only what is needed is fetched, and what is known from headers needs no fetching."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from tests.support import makers
from tests.support.forks import Forks
from tests.support.hub_runs import Client, environment, finish, start
from tests.support.loopback_hub import EXPIRED_TOKEN, STRANGER_TOKEN, LoopbackHub
from tests.support.messages import refused
from tests.support.publishing import REPO, Desk, digest

SMALL = makers.tiny("demo.diffusers-unet")


@pytest.fixture
def desk(loopback_hub: LoopbackHub, tmp_path: Path, clients: Forks | None) -> Desk:
    return Desk(loopback_hub, tmp_path, clients)


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def pipeline(loopback_hub: LoopbackHub, shelf: Path) -> LoopbackHub:
    """A Hub with a pipeline, plain and fp16, beside files that nobody needs."""
    files = files_below(shelf / "pipe")
    extra = dict.fromkeys(("big.bin", "picture.png", "unet/diffusion_pytorch_model.bin", "whole.ckpt"), b"x" * 100)
    loopback_hub.add_repo("org/pipe", files | extra)
    return loopback_hub


def fetched(hub: LoopbackHub, repo: str = "org/pipe") -> set[str]:
    """The files that were asked for in full."""
    start = f"/{repo}/resolve/"
    asked = (a for a in hub.requests if a.method == "GET" and a.path.startswith(start) and a.status == 200)
    return {a.path.removeprefix(start).partition("/")[2] for a in asked}


@pytest.mark.parametrize(
    ("client", "variant", "weights"),
    [
        ("installed", [], "diffusion_pytorch_model.safetensors"),
        ("oldest", ["--variant", "fp16"], "diffusion_pytorch_model.fp16.safetensors"),
    ],
    ids=["plain", "fp16"],
)
def test_only_what_is_needed_of_a_pipeline_is_fetched(
    pipeline: LoopbackHub, desk: Desk, client: Client, variant: list[str], weights: str
) -> None:
    ran = desk.run("export", "org/pipe", "--res", 64, *variant, client=client, token=None)
    assert ran.code == 0, ran.err
    wanted = {"model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors", f"unet/{weights}"}
    same = {"unet/config.json", "model_index.json"}  # one content, which the client fetches once
    assert fetched(pipeline) | same == wanted
    assert fetched(pipeline) & same
    assert files_below(desk.folder / "pipe-crdiff-64x64").keys() == wanted


def test_an_export_and_a_publication_hold_the_same_files(loopback_hub: LoopbackHub, desk: Desk, shelf: Path) -> None:
    """A part that only has pickles, and what is no part of the pipeline."""
    index = json.dumps({"_class_name": "P", **dict.fromkeys(("unet", "vae", "text_encoder"), ("diffusers", "X"))})
    others = (
        "vae_1_0/diffusion_pytorch_model.safetensors", "vae_decoder/config.json", "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin.index.json", "unet/optimizer.bin", "whole.safetensors",
    )  # fmt: skip
    small = ("text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.bin.index.json", "text_encoder/config.json")
    files = files_below(shelf / "pipe") | {name: name.encode() for name in (*others, *small)}
    loopback_hub.add_repo("org/pipe", files | {"model_index.json": index.encode()})
    assert desk.run("export", "org/pipe", "--res", 64).code == 0
    exported = files_below(desk.folder / "pipe-crdiff-64x64")
    desk.plan(f'repo = "{REPO}"\nsizes = ["64"]\n[[base]]\nbase = "org/pipe"\n')
    assert desk.made() == {"pipe-crdiff-64x64": "published"}
    assert desk.names() - {"README.md", ".gitattributes"} == {f"pipe-crdiff-64x64/{name}" for name in exported}
    assert {*small, "model_index.json"} < exported.keys()
    assert not {*others} & exported.keys()
    assert desk.made() == {"pipe-crdiff-64x64": "unchanged"}


def test_variants_in_the_cache_do_not_mix(loopback_hub: LoopbackHub, tmp_path: Path, desk: Desk, shelf: Path) -> None:
    """What was fetched for another variant is no part of this one."""
    vae = makers.write(tmp_path / "vae.safetensors", {"a.weight": ("F16", (2,), b"\2" * 4)})
    files = files_below(shelf / "pipe") | {"vae/diffusion_pytorch_model.fp16.safetensors": vae.read_bytes()}
    loopback_hub.add_repo("org/pipe", files)
    for variant, name in ((None, "plain"), ("fp16", "half"), (None, "again")):
        asked = ["--variant", variant] if variant else []
        ran = desk.run("export", "org/pipe", "--res", 64, "-q", "-o", name, *asked)
        assert ran.code == 0, ran.err
    (plain,) = (desk.folder / "plain/vae").iterdir()
    (half,) = (desk.folder / "half/vae").iterdir()
    (again,) = (desk.folder / "again/vae").iterdir()
    assert (plain.name, again.name) == ("diffusion_pytorch_model.safetensors",) * 2
    assert half.name == "diffusion_pytorch_model.fp16.safetensors"


def test_one_file_of_many(pipeline: LoopbackHub, desk: Desk, shelf: Path) -> None:
    pipeline.commit("org/pipe", {"one/a.safetensors": shelf / "sd15.safetensors"})
    ran = desk.run("export", "hf://org/pipe/one/a.safetensors", "--res", 512, "-o", "a.safetensors")
    assert ran.code == 0, ran.err
    assert fetched(pipeline) == {"one/a.safetensors"}
    header = makers.metadata_of(desk.folder / "a.safetensors")
    assert header["crdiff.source.file_sha256"] == f"0x{digest(shelf / 'sd15.safetensors')}"


@pytest.mark.parametrize("command", ["export", "publish"])
def test_an_index_brings_its_shards(
    loopback_hub: LoopbackHub, tmp_path: Path, desk: Desk, shelf: Path, command: str
) -> None:
    files = files_below(shelf / "shards")
    index = next(name for name in files if name.endswith(".json"))
    loopback_hub.add_repo("org/shards", {f"sub/{name}": data for name, data in files.items()} | {"other.bin": b"x"})
    base = f"hf://org/shards/sub/{index}"
    if command == "export":
        ran = desk.run("export", base, "--res", 512, "-o", "out")
    else:
        (desk.folder / "plan.toml").write_text(f'name = "out"\n[[base]]\nbase = "{base}"\nsizes = ["512"]\n')
        ran = desk.run("publish", "plan.toml")
    assert ran.code == 0, ran.err
    assert fetched(loopback_hub, "org/shards") == {f"sub/{name}" for name in files}
    alone = export(ExportRequest(str(shelf / "shards" / index), Size(512, 512), tmp_path / "alone"))
    for name in files:
        if name.endswith(".safetensors"):
            assert makers.read(desk.folder / "out" / name) == makers.read(alone.written.path / name)
            header = makers.metadata_of(desk.folder / "out" / name)
            assert header["crdiff.source.file_sha256"] == f"0x{digest(files[name])}"


def test_a_download_goes_on_where_it_was_cut_off(loopback_hub: LoopbackHub, tmp_path: Path, desk: Desk) -> None:
    """The client keeps what has come; the file is whole in the end."""
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original"))
    loopback_hub.add_repo("org/base", {"base.safetensors": base})
    loopback_hub.fail("GET /org/base/resolve", status=503, times=1)
    ran = desk.run("export", "org/base", "--res", 512, "-q", "-o", "a.safetensors")
    if ran.code:  # the client gives a failed download up; the next run ends it
        assert ran.code == 4
        assert "run it again" in ran.err.lower()
        ran = desk.run("export", "org/base", "--res", 512, "-q", "-o", "a.safetensors")
    assert (ran.code, ran.out) == (0, "a.safetensors\n")
    assert desk.run("verify", "a.safetensors", "--base", "org/base").code == 0


@pytest.mark.parametrize(
    ("settings", "token", "key"),
    [
        ({"gated": "auto"}, STRANGER_TOKEN, "gated"),
        ({"private": True}, None, "private one"),
        ({"private": True}, EXPIRED_TOKEN, "the Hub answered 401"),
    ],
    ids=["gated", "private", "expired"],
)
def test_a_base_that_is_not_for_everyone(
    loopback_hub: LoopbackHub, desk: Desk, settings: dict[str, Any], token: str | None, key: str
) -> None:
    loopback_hub.add_repo("org/base", {"base.safetensors": b"x" * 100}, **settings)
    ran = desk.run("export", "org/base", "--res", 512, "-q", token=token)
    refused(ran, 4, "org/base", key)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_signal_ends_a_download_at_once(tmp_path: Path, here: Path, xet: bool) -> None:
    """Nothing is left but what the client keeps to go on from."""
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original"))
    with LoopbackHub(tmp_path / "storage" if xet else None) as hub:
        hub.add_repo("org/base", {"base.safetensors": base}, xet=xet)
        hold = hub.hold("xet-read-token" if xet else "GET /org/base/resolve/.*/base.safetensors")
        process = start(hub, tmp_path, here, "export", "org/base", "--res", 512, "-o", "a.safetensors", xet=xet)
        assert hold.reached.wait(60)
        process.send_signal(signal.SIGTERM)
        ran = finish(process, 15)
        hold.release()
    assert (ran.code, ran.out) == (143, "")
    assert ran.err.endswith("crdiff: terminated; nothing half-done was left behind\n")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("what", ["socket.create_connection(('192.0.2.1', 80), 1)", "socket.getaddrinfo('hf.co', 443)"])
def test_no_process_that_a_test_starts_reaches_another_machine(
    loopback_hub: LoopbackHub, tmp_path: Path, what: str
) -> None:
    env = environment(loopback_hub, tmp_path)
    program = f"import socket; {what}"
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.partition(" for ")[0]) == (97, "reached")
