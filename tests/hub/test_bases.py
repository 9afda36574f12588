"""From what a user calls a base to a path: aliases, files, and the Hub by way of its cache; no network at all."""

import hashlib
import importlib
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from crdiff_export.errors import CheckpointError, HubError
from crdiff_export.hub import download, location, messages
from crdiff_export.hub.bases import Base, hub_uri, locate
from crdiff_export.hub.location import HubLocation
from crdiff_export.models import demo, recipe_files
from tests.support import makers
from tests.support.hub_runs import TOKEN, answer
from tests.support.isolation import NOWHERE, Crdiff, NetworkUsed
from tests.support.messages import raises, refused


def fetch(repo: str, file: str | None = None, revision: str | None = None, variant: str | None = None) -> Path:
    return download.fetch(HubLocation(repo, file, revision), variant)


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


# --- what is on this machine ---


def test_the_demo_is_made_where_it_is_not() -> None:
    for name in demo.NAMES:
        assert locate(name) == Base(demo.path(name), name)
        assert hub_uri(name) is None


@pytest.mark.parametrize("base", ["sd15.safetensors", "./sd15.safetensors", "pipe", "pipe/unet", "pipe/"])
def test_a_path_is_itself(shelf: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.chdir(shelf)
    assert locate(base) == Base(Path(base), Path(base).name)
    assert hub_uri(base) is None


@pytest.mark.parametrize(("base", "name"), [(".", "unet"), ("..", "pipe"), ("../unet/..", "pipe")])
def test_a_folder_without_a_name_of_its_own_has_one(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, base: str, name: str
) -> None:
    monkeypatch.chdir(shelf / "pipe/unet")
    assert locate(base).name == name


def test_a_link_keeps_its_own_name(shelf: Path, here: Path) -> None:
    (here / "mine.safetensors").symlink_to(shelf / "sd15.safetensors")
    assert locate("mine.safetensors").name == "mine.safetensors"


def test_a_home_folder_is_known(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shelf))
    monkeypatch.setenv("USERPROFILE", str(shelf))
    assert locate("~/sd15.safetensors").path == shelf / "sd15.safetensors"


def test_an_alias_wins_over_a_file(here: Path) -> None:
    (here / "sdxl").touch()
    (here / "demo").touch()
    assert hub_uri("sdxl") == "hf://stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors"
    assert locate("demo").path == demo.path()
    assert (hub_uri("./sdxl"), locate("./sdxl").path) == (None, Path("sdxl"))
    assert locate("./demo").path == Path("demo")


def test_a_folder_wins_over_a_hub_id(here: Path) -> None:
    (here / "org/name").mkdir(parents=True)
    assert (hub_uri("org/name"), locate("org/name").path) == (None, Path("org/name"))


@pytest.mark.parametrize("alias", [alias for alias in recipe_files.aliases() if alias not in demo.NAMES])
def test_every_alias_is_a_place_on_the_hub(alias: str) -> None:
    assert re.fullmatch(r"hf://[\w.-]+/[\w.-]+(/.+)?", hub_uri(alias) or "")


@pytest.mark.parametrize(
    ("base", "key"),
    [
        ("", "empty"),
        (" ", "empty"),
        *((name, name) for name in ("model.safetensors", "models/model.safetensors", "models/model.CKPT")),
        *((name, name) for name in ("/no/such/folder", "a/b/c", "~nobody-of-that-name/x", "x" * 300, "sdlx", "SDXL")),
        *((name, name) for name in ("hf://name", "hf://", "hf://datasets/a/b", "hf://my--org/b")),
        *((name, name) for name in ("hf://org/name/../x.safetensors", "hf://org/name/a/./x.safetensors")),
        ("https://huggingface.co/org/name/resolve/main/a/b.safetensors?download=true", "/a/b.safetensors:"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("https://me:password@example.org/api/download/1?token=secret", "https://example.org/api/download/1:"),
    ],
)
def test_what_is_nowhere(here: Path, base: str, key: str) -> None:
    with raises(CheckpointError, key):
        locate(base)


# --- places on the Hub ---


@pytest.mark.parametrize(
    ("base", "place"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name@v1", ("org/name", None, "v1")),
        ("org/name@refs/pr/3", ("org/name", None, "refs/pr/3")),
        ("hf://org/name", ("org/name", None, None)),
        ("hf://org/name/", ("org/name", None, None)),
        ("hf://org/name@main", ("org/name", None, "main")),
        ("hf://org/name/a.safetensors", ("org/name", "a.safetensors", None)),
        ("hf://org/name/a/b c.safetensors", ("org/name", "a/b c.safetensors", None)),
        ("hf://org/name@v1/a.safetensors", ("org/name", "a.safetensors", "v1")),
        ("hf://org/name@refs/pr/3/a.safetensors", ("org/name", "a.safetensors", "refs/pr/3")),
        ("hf://org/name@feature%2Fx/a.safetensors", ("org/name", "a.safetensors", "feature/x")),
    ],
)
def test_a_place_on_the_hub(
    here: Path, monkeypatch: pytest.MonkeyPatch, base: str, place: tuple[str, str | None, str | None]
) -> None:
    asked: list[tuple[HubLocation, str | None]] = []

    def fetch(location: HubLocation, variant: str | None) -> Path:
        asked.append((location, variant))
        return here if location.file is None else here / "a"

    monkeypatch.setattr(download, "fetch", fetch)
    found = locate(base, "fp16")
    assert asked == [(HubLocation(*place), "fp16")]
    assert found.name == hub_uri(base)
    assert found.stem == ("name" if place[1] is None else None)
    assert locate(found.name, "fp16") == found  # what the header says leads back
    assert asked[1] == asked[0]


def test_a_hub_id_is_looked_for_in_the_cache_alone_when_offline(crdiff: Crdiff, cache: "Cache", here: Path) -> None:
    cache.add("org/name", "unet/diffusion_pytorch_model.safetensors", makers.tiny("demo.diffusers-unet"))
    cache.add("org/name", "model_index.json", b"{}")
    ran = crdiff("export", "org/name", "--res", 64, "--no-hash")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "name-crdiff-64x64")
    assert ran.err.splitlines()[0] == "note: hf://org/name comes from the Hub, unless it is in the local cache"
    header = makers.metadata_of(here / "name-crdiff-64x64/unet/diffusion_pytorch_model.safetensors")
    assert header["crdiff.source.name"] == "hf://org/name"
    assert crdiff("verify", "name-crdiff-64x64", "--base", "org/name", "-q").code == 0


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("export org/name --res 64", True),
        ("export org/name --res 64 -q", False),
        ("export org/name --res 64 --json", False),
        ("verify {demo} --base hf://org/name", True),
        ("export {demo} --res 64 --dry-run", False),
    ],
)
def test_a_download_is_announced(
    crdiff: Crdiff, cache: "Cache", here: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: bool
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    ran = crdiff(*shlex.split(command.format(demo=demo.path())))
    assert ("note: hf://org/name comes from the Hub, unless it is in the local cache" in ran.err) == said
    # No bars in a log: the client reads this when it is imported.
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1"


def test_an_alias_is_found_in_the_cache(crdiff: Crdiff, cache: "Cache", here: Path) -> None:
    recipe = recipe_files.by_alias("sd15")
    assert recipe
    assert recipe.repo
    assert recipe.file
    cache.add(recipe.repo, recipe.file, makers.tiny("sd15.original"))
    ran = crdiff("export", "sd15", "--res", 512, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.result["output"] == f"{Path(recipe.file).stem}-crdiff-512x512.safetensors"
    assert makers.metadata_of(here / ran.result["output"])["crdiff.source.name"] == f"hf://{recipe.repo}/{recipe.file}"


class Cache:
    """huggingface_hub's cache, filled by hand: refs, blobs and links to them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        repo: str,
        name: str,
        content: makers.Tensors | bytes,
        revision: str = "main",
        blob: str | None = None,
    ) -> Path:
        home = self.root / f"models--{repo.replace('/', '--')}"
        path = home / "snapshots" / SHA / name
        for folder in (home / "refs", home / "blobs", path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(SHA)
        there = home / "blobs" / (blob or name.replace("/", "_"))
        if isinstance(content, bytes):
            there.write_bytes(content)
        else:
            makers.write(there, content)
        path.symlink_to(os.path.relpath(there, path.parent))
        return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty cache, and no way to fill it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Cache(tmp_path / "hub")


def test_one_file_of_a_repository(cache: Cache) -> None:
    path = cache.add("org/name", "a.safetensors", b"x", revision="v1")
    for revision in ("v1", SHA):
        assert fetch("org/name", "a.safetensors", revision) == path


def test_the_only_checkpoint_of_a_repository(cache: Cache) -> None:
    path = cache.add("org/name", "a.safetensors", b"x", revision="v1")
    cache.add("org/name", "README.md", b"x", revision="v1")
    assert fetch("org/name", None, "v1") == path


@pytest.mark.parametrize("letters", ["", "ab", "abcde"])
def test_a_repository_without_one_checkpoint(cache: Cache, letters: str) -> None:
    for name in ["a.ckpt", "README.md", *(f"{letter}.safetensors" for letter in letters)]:
        cache.add("org/name", name, b"x")
    with raises(HubError, "org/name", f"{len(letters)} checkpoints" if letters else "no checkpoint"):
        fetch("org/name")


def test_of_several_the_one_of_the_variant(cache: Cache) -> None:
    cache.add("org/name", "a.safetensors", b"x")
    path = cache.add("org/name", "a.fp16.safetensors", b"y")
    assert fetch("org/name", None, None, "fp16") == path
    with pytest.raises(HubError, match="has 2 checkpoints"):
        fetch("org/name", None, None, "fp8")


def test_the_hubs_hash_of_a_base_is_known(crdiff: Crdiff, cache: Cache, here: Path) -> None:
    """The cache calls a file by its ETag, which is the SHA-256 of what is in LFS, and another hash of the rest."""
    content = makers.write(here / "content.safetensors", makers.tiny("demo.original-unet")).read_bytes()
    known = hashlib.sha256(content).hexdigest()
    cache.add("org/name", "a.safetensors", content, blob=known)
    cache.add("org/other", "a.safetensors", content, blob="ab" * 20)
    assert (locate("org/name").hashes, locate("org/other").hashes) == ({"a.safetensors": known}, {})
    assert crdiff("export", "org/name", "--res", 64, "-o", "a.safetensors").code == 0
    header = makers.metadata_of(here / "a.safetensors")
    assert header["crdiff.source.file_sha256"] == f"0x{known}"
    assert "crdiff.source.hash_sha256" not in header
    assert f"hf://org/name (file 0x{known}, AutoV2 {known[:10].upper()})" in crdiff("inspect", "a.safetensors").out
    assert crdiff("verify", "a.safetensors", "--base", "org/name").code == 0
    assert crdiff("verify", "a.safetensors", "--base", "content.safetensors").code == 0
    ran = crdiff("export", "org/name", "--res", 64, "-o", "b.safetensors", "--json")
    (file,) = ran.result["files"]
    assert (file["source_hash_sha256"], file["source_file_sha256"]) == (None, f"0x{known}")


def test_a_base_other_than_the_hub_said_is_found_out(crdiff: Crdiff, cache: Cache, here: Path) -> None:
    """Its hash is taken on trust until somebody verifies it."""
    content = makers.write(here / "content.safetensors", makers.tiny("demo.original-unet")).read_bytes()
    cache.add("org/name", "a.safetensors", content, blob="ab" * 32)
    assert crdiff("export", "org/name", "--res", 64, "-o", "a.safetensors").code == 0
    ran = crdiff("verify", "a.safetensors", "--base", "org/name")
    assert ran.code == 3
    assert f"its bytes hash to 0x{hashlib.sha256(content).hexdigest()}, crdiff.source.file_sha256" in ran.err


FILES = [
    "model_index.json",
    "README.md",
    "one.safetensors",
    "scheduler/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.onnx",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_fp16/diffusion_pytorch_model.fp16.safetensors",
]


# The weights that are fetched, by variant.
CHOSEN: dict[str | None, list[str]] = {
    None: [
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_fp16/diffusion_pytorch_model.fp16.safetensors",
    ],
    "fp16": [
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_fp16/diffusion_pytorch_model.fp16.safetensors",
    ],
}


@pytest.mark.parametrize("variant", CHOSEN)
def test_one_variant_of_each_components_weights_is_chosen(variant: str | None) -> None:
    assert download.choose_files("org/name", FILES, variant) == CHOSEN[variant]


@pytest.mark.parametrize("missing", [None, "tokenizer/merges.txt", "tokenizer/spiece.model", CHOSEN[None][-1]])
def test_a_folder_of_which_a_part_was_fetched_is_found_again(cache: Cache, missing: str | None) -> None:
    """As from 2.0 on, where the names of all files are kept and a snapshot without some of them counts as torn."""
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        pytest.skip("a client that does not keep the names")
    needed = {name for name in FILES if name.endswith((".json", ".txt", ".model")) or name in CHOSEN[None]}
    for name in needed - {missing}:
        cache.add("org/name", name, b"x", revision="v1")
    _keep_names(cache.root / "models--org--name")
    if missing is None:
        assert fetch("org/name", None, "v1") == cache.root / "models--org--name/snapshots" / SHA
    else:
        with pytest.raises(HubError, match="not in the local cache"):
            fetch("org/name", None, "v1")


def _keep_names(folder: Path) -> None:
    """What snapshot_download leaves, in the client's own format."""
    client: Any = importlib.import_module("huggingface_hub._snapshot_download")
    entry = client.TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    client.write_tree_cache(str(folder), SHA, dict.fromkeys(FILES, entry))


# --- when the Hub says no ---


RAISED: dict[str, Callable[[], BaseException]] = {
    "gated": lambda: answer("GatedRepoError", 403),
    "no such repository": lambda: answer("RepositoryNotFoundError", 404),
    "no such revision": lambda: answer("RevisionNotFoundError", 404),
    "no such file": lambda: answer("RemoteEntryNotFoundError", 404),
    "401": lambda: answer("HfHubHTTPError", 401),
    "429": lambda: answer("HfHubHTTPError", 429),
    "Wait 7 s": lambda: answer("HfHubHTTPError", 429, {"Retry-After": "7"}),
    "503": lambda: answer("HfHubHTTPError", 503),
    "not in the local cache": lambda: errors.LocalEntryNotFoundError(f"no {TOKEN}"),
    "the Hub cannot be reached": lambda: errors.OfflineModeIsEnabled("offline"),
    "not a Hub id": lambda: errors.HFValidationError("bad"),
    "HF_HUB_DISABLE_XET=1": lambda: errors.XetDownloadError("cas"),
    "the download failed": lambda: RuntimeError(f"Data processing error: {TOKEN}"),
    "cannot be reached": lambda: ConnectionResetError("reset"),
    "reached": lambda: TimeoutError("late"),
    "Check the connection": lambda: messages.connection_errors()[0](f"{TOKEN}"),
    "No space left on device": lambda: OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("key", RAISED)
@pytest.mark.parametrize("base", ["hf://org/name/a.safetensors", "org/name"], ids=["file", "folder"])
def test_the_hub_says_no(crdiff: Crdiff, here: Path, monkeypatch: pytest.MonkeyPatch, base: str, key: str) -> None:
    def fail(*_: object, **__: object) -> None:
        error = RAISED[key]()
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    ran = crdiff("export", base, "--res", 512)
    refused(ran, 4, f"crdiff: {base.removeprefix('hf://')}: ", key)
    assert (ran.out, TOKEN in ran.err, list(here.iterdir())) == ("", False, [])


def test_offline_is_told_from_a_broken_connection(crdiff: Crdiff, cache: Cache) -> None:
    ran = crdiff("export", "sdxl", "--res", 1024, "--json")
    assert (ran.code, ran.error["code"], "HF_HUB_OFFLINE" in ran.error["hint"]) == (4, "hub", True)
    assert crdiff("export", "org/name", "--res", 512).code == 4
    assert crdiff("verify", demo.path(), "--base", "sdxl").code == 1  # the file is judged first


def test_a_bug_of_ours_is_not_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(download, "_is_reachable", lambda *_: True)
    with pytest.raises(ZeroDivisionError):
        fetch("org/name", "a")


def test_without_a_connection_the_cache_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would try a download five times, for half a minute."""
    asked: list[bool] = []

    def local(*_: object, local_files_only: bool, **__: object) -> str:
        asked.append(local_files_only)
        raise errors.LocalEntryNotFoundError("not there")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    with pytest.raises(HubError):
        fetch("org/name", "a")
    assert asked == [True]


@pytest.mark.parametrize("command", ["recipes list", "inspect {demo}", "export demo --res 64 -q", "verify {demo}"])
def test_only_a_hub_id_opens_a_socket(
    crdiff: Crdiff, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.setattr(location, "_parse", lambda *_: pytest.fail("thought of the Hub"))
    crdiff(*shlex.split(command.format(demo=demo.path())))


def test_the_network_is_off_for_the_client_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises((NetworkUsed, errors.OfflineModeIsEnabled)):  # before 1.0 a session stays as it was made
        huggingface_hub.HfApi(endpoint="http://192.0.2.1").list_repo_files("org/name")
