"""Opening a checkpoint: every form that it can have on disk; anything else is refused in one line."""

import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.weight_file import FileBytes
from tests.support import hostile, makers
from tests.support.hostile import FIRST, SECOND, Maker, sharded_with
from tests.support.messages import raises
from tests.support.weight_bytes import all_bytes, check_ranges

if TYPE_CHECKING:
    from tests.support.isolation import Crdiff

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")

# Each maker with what the message names beside the path.
FILES: dict[str, tuple[Maker, str]] = {
    "empty": (hostile.empty, "empty"),
    "cut-in-the-length": (hostile.holding(hostile.good()[:5]), "5 bytes"),
    "cut-in-the-header": (hostile.cut_in_the_header, "64 bytes, but the file has only 30"),
    "cut-in-the-data": (hostile.cut_in_the_data, "12 bytes of tensors, 7"),
    "trailing-bytes": (hostile.holding(hostile.good() + b"tail"), "4 bytes"),
    "zeros": (hostile.holding(bytes(4096)), "0 bytes"),
    "noise": (hostile.noise, f"{0x9B9B9B9B9B9B9B9B} bytes"),
    "negative-length": (hostile.holding(struct.pack("<q", -2) + hostile.good()[8:]), f"{2**64 - 2} bytes"),
    "gguf": (hostile.gguf, "GGUF"),
    "git-lfs-pointer": (hostile.git_lfs_pointer, "Git LFS"),
    "web-page": (hostile.web_page, "web page"),
    "error-message": (hostile.holding('{"error": "Invalid username or password — log in."}'.encode()), "text file"),
    "zip-archive": (hostile.zip_archive, "zip archive"),
    "bare-pickle-with-code": (hostile.bare_pickle_with_code, "pickle"),
    "pickled-code": (hostile.pickled_code, "pickle"),
    "folder": (hostile.folder, "diffusion_pytorch_model"),
    "nothing": (lambda path: path, "no such file"),
}
NO_FILES: dict[Maker, str] = {
    hostile.pipe: "pipe",
    hostile.endless_device: "device",
    hostile.link_in_a_circle: "symbolic links",
    hostile.link_to_nothing: "no such file",
}
INDEXES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "character 0"),
    "list": ("[]", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "cut": ('{"weight_map": {"a": "', "character 21"),
    "not-utf-8": (b'{"weight_map": "\xff"}', "byte 16"),
    "deep": ('{"weight_map":' + "[" * 200_000 + "]" * 200_000 + "}", "nests"),
    "enormous": ('{"weight_map":[' + "[]," * 3_000_000 + "[]]}", "more tensors"),
    "no-weight-map": ('{"metadata": {}}', "weight_map"),
    "weight-map-list": ('{"weight_map": ["a"]}', "weight_map"),
    "weight-map-empty": ('{"weight_map": {}}', "weight_map"),
    "key-twice": (f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}', "'a'"),
    "lone-surrogate": (r'{"weight_map": {"\udc00": "a.safetensors"}}', r"'\udc00'"),
    "pipeline-index": ('{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}', "weight_map"),
}
INDEX, WEIGHTS = "diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors"
COMPANION = "vae/notes.txt"
FOLDERS: dict[str, tuple[Maker, str]] = {
    "missing-shard": (hostile.missing_shard, SECOND),
    "key-that-the-shard-lacks": (sharded_with(lambda places: places.update(e=SECOND)), f"'e' is not in '{SECOND}'"),
    "key-that-the-index-lacks": (sharded_with(lambda places: places.pop("d")), f"'d' in '{SECOND}'"),
    "key-in-the-wrong-shard": (sharded_with(lambda places: places.update(a=SECOND)), f"'a' in '{FIRST}'"),
    "only-a-pickle": (hostile.folder_without_weights, "unet"),
}
# What makes the folder, a part of it that is then made of something else, and what the message names.
PARTS: dict[str, tuple[Maker, str, Maker, str]] = {
    "shard-is-a-folder": (hostile.missing_shard, SECOND, hostile.folder, f"{SECOND}: a folder"),
    "shard-is-empty": (hostile.missing_shard, SECOND, hostile.empty, f"{SECOND}: the file is empty"),
    "shard-is-cut": (hostile.missing_shard, SECOND, hostile.cut_in_the_header, SECOND),
    "index-is-a-folder": (hostile.folder, INDEX, hostile.folder, f"{INDEX}: a folder"),
    "weights-are-a-folder": (hostile.pipeline_without_weights, WEIGHTS, hostile.folder, f"{WEIGHTS}: a folder"),
    "weights-are-empty": (hostile.pipeline_without_weights, WEIGHTS, hostile.empty, f"{WEIGHTS}: the file is empty"),
}
NO_PARTS: dict[str, tuple[Maker, str, Maker, str]] = {
    "shard-is-a-pipe": (hostile.missing_shard, SECOND, hostile.pipe, f"{SECOND}: a pipe"),
    "shard-is-endless": (hostile.missing_shard, SECOND, hostile.endless_device, f"{SECOND}: a pipe"),
    "shard-in-a-circle": (hostile.missing_shard, SECOND, hostile.link_in_a_circle, SECOND),
    "shard-leads-nowhere": (hostile.missing_shard, SECOND, hostile.link_to_nothing, SECOND),
    "index-is-a-pipe": (hostile.folder, INDEX, hostile.pipe, f"{INDEX}: a pipe"),
    "index-is-endless": (hostile.folder, INDEX, hostile.endless_device, f"{INDEX}: a pipe"),
    "index-in-a-circle": (hostile.folder, INDEX, hostile.link_in_a_circle, INDEX),
    "weights-are-a-pipe": (hostile.pipeline_without_weights, WEIGHTS, hostile.pipe, f"{WEIGHTS}: a pipe"),
    "companion-is-a-pipe": (hostile.pipeline, COMPANION, hostile.pipe, f"{COMPANION}: a pipe"),
    "companion-in-a-circle": (hostile.pipeline, COMPANION, hostile.link_in_a_circle, COMPANION),
    "companion-leads-nowhere": (hostile.pipeline, COMPANION, hostile.link_to_nothing, COMPANION),
}
OUTSIDE = {
    "parent": "../model.safetensors",
    "parent-on-windows": "..\\model.safetensors",
    "absolute": "/etc/model.safetensors",
    "absolute-on-windows": "C:\\model.safetensors",
    "drive": "C:model.safetensors",
    "stream": "model.safetensors:other.safetensors",
    "share": "\\\\host\\model.safetensors",
    "folder-below": "unet/model.safetensors",
    "itself": "./model.safetensors",
    "device": "/dev/zero",
    "pickle": "pytorch_model.bin",
    "zero-byte": "a\0.safetensors",
    "line-break": "a\n.safetensors",
    "escape": "\x1b[2J.safetensors",
    "nothing": "",
    "suffix-only": ".safetensors",
    "endless": "x" * 100_000 + ".safetensors",
    "number": 1,
    "null": None,
    "list": [FIRST],
    "object": {"file": FIRST},
    "address": "https://host/model.safetensors",
}


def check_refusal(path: Path, *keys: object) -> None:
    """Assert that a checkpoint is refused in one printable line with these keys."""
    with raises(CheckpointError, *keys) as caught:
        open_checkpoint(path)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(("make", "key"), FILES.values(), ids=FILES)
def test_files_that_are_no_checkpoint(make: Maker, key: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model.safetensors")
    check_refusal(path, f"{path}: ", key)


@posix
@pytest.mark.parametrize(("make", "key"), NO_FILES.items(), ids=[make.__name__ for make in NO_FILES])
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.safetensors.index.json", "model"])
def test_a_special_file_is_refused_without_waiting(make: Maker, key: str, name: str, tmp_path: Path) -> None:
    path = make(tmp_path / name)
    check_refusal(path, f"{path}: ", key)


@pytest.mark.parametrize(("content", "key"), INDEXES.values(), ids=INDEXES)
def test_the_content_of_an_index(content: str | bytes, key: str, tmp_path: Path) -> None:
    path = hostile.sharded(tmp_path / "model")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refusal(path, f"{path}: ", key)


@pytest.mark.parametrize(("make", "key"), FOLDERS.values(), ids=FOLDERS)
def test_folders_whose_parts_do_not_fit_together(make: Maker, key: str, tmp_path: Path) -> None:
    check_refusal(make(tmp_path / "model"), tmp_path / "model", key)


@pytest.mark.parametrize(
    ("prepare", "part", "make", "key"),
    [
        *(pytest.param(*case, id=name) for name, case in PARTS.items()),
        *(pytest.param(*case, id=name, marks=posix) for name, case in NO_PARTS.items()),
    ],
)
def test_folders_with_a_bad_part(prepare: Maker, part: str, make: Maker, key: str, tmp_path: Path) -> None:
    path = prepare(tmp_path / "model")
    make(tmp_path / "model" / part)
    check_refusal(path, tmp_path / "model", key.replace("/", os.sep))


def test_an_index_larger_than_any(tmp_path: Path) -> None:
    path = hostile.sharded(tmp_path)
    with path.open("ab") as file:
        file.truncate((64 << 20) + 1)
    check_refusal(path, path, "larger")


@pytest.mark.parametrize("target", OUTSIDE.values(), ids=OUTSIDE)
def test_an_index_does_not_lead_out_of_its_folder(target: object, tmp_path: Path) -> None:
    path = sharded_with(lambda places: places.update(a=target))(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"'a' is placed in .*, not a file beside the index") as caught:
        open_checkpoint(path)
    assert caught.value.message.startswith(str(path))
    assert caught.value.message.isprintable()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is hidden from root")
@pytest.mark.parametrize("part", ["model.safetensors", "pipe", "pipe/unet", "pipe/vae", "model.ckpt"])
def test_what_may_not_be_read(part: str, tmp_path: Path) -> None:
    hostile.pipeline(tmp_path / "pipe")
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(hostile.good())
    hidden = tmp_path / part
    hidden.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="Permission denied") as caught:
            open_checkpoint(tmp_path / part.partition("/")[0])
    finally:
        hidden.chmod(0o700)
    assert caught.value.message.startswith(str(hidden))


def test_a_name_too_long_for_any_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        open_checkpoint(tmp_path / ("x" * 5000))


# The same through the command line: exit code 1, two lines on stderr, nothing on stdout.

COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "export": lambda path: ("export", path, "--res", "512"),
    "inspect": lambda path: ("inspect", path),
    "verify": lambda path: ("verify", path),
    "verify-base": lambda path: ("verify", path, "--base", path),
}
BAD_INPUTS = [
    pytest.param(hostile.cut_in_the_data, "model.safetensors", id="truncated"),
    pytest.param(hostile.empty, "model.safetensors", id="empty"),
    pytest.param(hostile.noise, "model.safetensors", id="noise"),
    pytest.param(hostile.web_page, "model.safetensors", id="web-page"),
    pytest.param(hostile.pickled_code, "model.ckpt", id="code"),
    pytest.param(hostile.pickled_code, "model.safetensors", id="code-under-another-name"),
    pytest.param(hostile.bare_pickle_with_code, "model.ckpt", id="bare-pickle"),
    pytest.param(hostile.missing_shard, "model", id="missing-shard"),
    pytest.param(hostile.folder_without_weights, "model", id="no-weights"),
    pytest.param(hostile.folder, "model.safetensors", id="folder"),
    pytest.param(hostile.truncated_archive, "model.ckpt", id="cut-archive"),
    pytest.param(hostile.pipe, "model.safetensors", id="pipe", marks=posix),
    pytest.param(hostile.endless_device, "model.ckpt", id="endless", marks=posix),
    pytest.param(hostile.link_in_a_circle, "model.safetensors", id="circle", marks=posix),
    pytest.param(hostile.link_to_nothing, "model.safetensors", id="leads-nowhere", marks=posix),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("make", "name"), BAD_INPUTS)
def test_every_command_refuses_in_two_lines(command: str, make: Maker, name: str, here: Path, crdiff: "Crdiff") -> None:
    path = make(here / name)
    ran = crdiff(*COMMANDS[command](path))
    assert (ran.code, ran.out) == (1, "")
    assert len(ran.err.splitlines()) == 2
    assert ran.err.startswith(f"crdiff: {path}")
    assert not any(hostile.MARKER in file.name or "crdiff" in file.name for file in here.rglob("*"))


# What can be opened.

TENSORS: makers.Tensors = {
    "scalar": ("F32", (), b"\1\2\3\4"),
    "empty": ("F16", (0, 4), b""),
    "weight": ("BF16", (3, 2), bytes(range(12))),
    "eight": ("F8_E4M3", (3,), b"\7\x08\x09"),
    "ids": ("I64", (1,), bytes(range(8))),
    "flags": ("BOOL", (2,), b"\0\1"),
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "MODEL.SafeTensors", "model", "model.fp16.sft", "模型 😀.safetensors"]
)
def test_one_file(name: str, tmp_path: Path) -> None:
    path = makers.write(tmp_path / name, TENSORS, {"format": "pt", "title": "ü"})
    checkpoint = open_checkpoint(path)
    (file,) = checkpoint.files
    assert (checkpoint.kind, checkpoint.path, checkpoint.companions, checkpoint.notes) == ("file", path, (), ())
    assert {t.name: (t.dtype, t.shape, all_bytes(file)[t.start : t.end]) for t in file.tensors} == TENSORS
    assert checkpoint.metadata == {"format": "pt", "title": "ü"}
    assert file.name == name
    assert file.data_start + file.data_size == path.stat().st_size
    assert checkpoint.stem == re.sub(r"\.(safetensors|sft)$", "", name, flags=re.IGNORECASE)


def test_bytes_in_any_range(tmp_path: Path) -> None:
    (file,) = open_checkpoint(makers.write(tmp_path / "model.safetensors", TENSORS)).files
    data = b"".join(raw for _, _, raw in TENSORS.values())
    check_ranges(file, data, combinations_with_replacement(range(len(data) + 1), 2))


def test_a_file_that_changes_before_it_is_read(tmp_path: Path) -> None:
    path = makers.write(tmp_path / "model.safetensors", TENSORS)
    (file,) = open_checkpoint(path).files
    with closing(file.open()) as source:
        os.truncate(path, file.data_start + 10)
        source.read_into(0, memoryview(bytearray(10)))
        with raises(CheckpointError, path, "shorter"):
            source.read_into(5, memoryview(bytearray(10)))
    path.unlink()
    with raises(CheckpointError, path, "No such file"):
        file.open()


def test_a_disk_that_fails(tmp_path: Path) -> None:
    """A folder stands for the disk: it opens, but reading from it fails."""
    with raises(CheckpointError, f"{tmp_path}: reading failed"):
        FileBytes(tmp_path, 0)


def test_the_length_of_a_header_may_begin_like_a_pickle(tmp_path: Path) -> None:
    """That of SD3.5-large does."""
    raw = makers.header(TENSORS)[8:].ljust(0x280)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in TENSORS.values()))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert len(open_checkpoint(path).shapes) == len(TENSORS)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.JSON"])
def test_shards(name: str, tmp_path: Path) -> None:
    index = hostile.sharded(tmp_path)
    path = index.rename(index.with_name(name))
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == "shards"
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    assert [path.as_posix() for path in checkpoint.companions] == [name]
    assert checkpoint.home == tmp_path
    assert list(checkpoint.shapes) == ["a", "b", "c", "d"]
    assert [number for number, _ in checkpoint.tensors()] == [0, 0, 1, 1]
    assert [all_bytes(file) for file in checkpoint.files] == [bytes(8) + b"\1" * 8, b"\2" * 8 + b"\3" * 8]
    assert checkpoint.metadata == {"format": "pt"}


def test_an_index_may_say_more(tmp_path: Path) -> None:
    def tell(index: dict[str, object]) -> None:
        index["metadata"] = {"total_size": 32.0, "mergekit_version": "0.1", "nested": [[{}]]}

    assert len(open_checkpoint(hostile.sharded(tmp_path, tell)).files) == 2


PIPELINE = ["model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors",
            "unet/config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_a_pipeline(component: str, tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe", component)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.stem, checkpoint.home) == ("folder", "pipe", path)
    assert [file.name for file in checkpoint.files] == [f"{component}/diffusion_pytorch_model.safetensors"]
    assert [str(path) for path in checkpoint.companions] == sorted(n.replace("unet", component) for n in PIPELINE)
    assert checkpoint.notes == ()


def test_a_folder_without_the_rest_of_a_pipeline(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hostile.pipeline(tmp_path / "pipe") / "unet")
    assert [file.name for file in checkpoint.files] == ["diffusion_pytorch_model.safetensors"]
    assert [str(path) for path in checkpoint.companions] == ["config.json"]
    hostile.sharded(tmp_path / "model")
    assert [file.name for file in open_checkpoint(tmp_path / "model").files] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("names", "variant", "chosen", "noted"),
    [
        pytest.param(("",), None, "", [], id="plain"),
        pytest.param(("", "fp16"), None, "", ["fp16"], id="plain-first"),
        pytest.param(("", "fp16"), "fp16", ".fp16", ["plain"], id="asked-for"),
        pytest.param(("fp16",), None, ".fp16", [], id="only-one"),
        pytest.param(("fp16", "bf16", "non_ema"), None, ".bf16", ["fp16", "non_ema"], id="several"),
        pytest.param(("", "fp16", "non-ema"), "non-ema", ".non-ema", ["plain", "fp16"], id="with-a-hyphen"),
    ],
)
def test_variants(names: tuple[str, ...], variant: str | None, chosen: str, noted: list[str], tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe", names=names)
    for twin in ("bin", "onnx", "msgpack"):
        (path / "unet" / f"diffusion_pytorch_model.{twin}").write_bytes(b"twin")
    (path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"of another component")
    checkpoint = open_checkpoint(path, variant)
    assert [file.name for file in checkpoint.files] == [f"unet/diffusion_pytorch_model{chosen}.safetensors"]
    *notes, beside = checkpoint.notes
    assert notes == [f"the {name} weights beside them are not in the output" for name in noted]
    assert beside.startswith("unet/diffusion_pytorch_model.bin, unet/diffusion_pytorch_model.msgpack, unet/")
    expected = sorted([*PIPELINE, "vae/diffusion_pytorch_model.bin"])
    assert [str(path) for path in checkpoint.companions] == expected


@pytest.mark.parametrize(
    ("names", "variant"), [(("",), "fp16"), (("fp16", ""), "fp61"), (("fp16",), "")], ids=["plain", "misspelt", "none"]
)
def test_variants_that_are_not_there(names: tuple[str, ...], variant: str, tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe", names=names)
    with raises(CheckpointError, path / "unet", repr(variant)):
        open_checkpoint(path, variant)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_sharded_variants(variant: str, tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe")
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for name, dtype in (("", "F32"), ("fp16", "F16")):
        tensors = {key: (dtype, (2,), bytes(2 * makers.SIZES[dtype])) for key in "abcd"}
        makers.write_shards(path / "unet", tensors, 2, variant=name)
    checkpoint = open_checkpoint(path, variant)
    middle = f".{variant}" if variant else ""
    shards = [f"unet/diffusion_pytorch_model{middle}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = f"unet/diffusion_pytorch_model.safetensors.index{middle}.json"
    assert [file.name for file in checkpoint.files] == shards
    assert [str(path) for path in checkpoint.companions] == sorted([*PIPELINE, index])
    assert list(checkpoint.notes) == [f"the {'plain' if variant else 'fp16'} weights beside them are not in the output"]
    assert {t.dtype for _, t in checkpoint.tensors()} == {"F16" if variant else "F32"}


@posix
def test_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    """Its files are links to blobs beside it."""
    home = tmp_path / "models--org--name"
    path = hostile.pipeline(home / "snapshots" / "0123abc")
    (home / "blobs").mkdir()
    expected = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for number, name in enumerate(expected):
        blob = home / "blobs" / f"{number:064x}"
        shutil.move(path / name, blob)
        (path / name).symlink_to(os.path.relpath(blob, (path / name).parent))
    checkpoint = open_checkpoint(path)
    assert [file.name for file in checkpoint.files] == ["unet/diffusion_pytorch_model.safetensors"]
    assert [str(path) for path in checkpoint.companions] == PIPELINE
    assert all_bytes(checkpoint.files[0]) == hostile.WEIGHT["weight"][2]
    link = path / "unet" / "diffusion_pytorch_model.safetensors"
    assert open_checkpoint(link).files[0].name == link.name


def test_hidden_files_and_folders(tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe")
    for name in (".gitattributes", "README.md", "vae/.hidden", ".git/config", ".cache/huggingface/x.lock", "a/.git/x"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    more = [".gitattributes", "README.md", "vae/.hidden"]
    assert [str(path) for path in open_checkpoint(path).companions] == sorted([*PIPELINE, *more])


@posix
def test_links_to_folders_are_left_out_and_noted(tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe")
    (path / "vae" / "up").symlink_to(path)
    (path / "everything").symlink_to("/")
    checkpoint = open_checkpoint(path)
    assert [str(path) for path in checkpoint.companions] == PIPELINE
    assert list(checkpoint.copy_notes) == [
        "everything is a link to a folder and is not in the output",
        "vae/up is a link to a folder and is not in the output",
    ]


@posix
def test_links_that_lead_out_are_noted(tmp_path: Path) -> None:
    """Those of the Hub's cache lead to its blobs, which belong to the snapshot."""
    path = hostile.pipeline(tmp_path / "models--org--pipe/snapshots/abc")
    (tmp_path / "secret.json").write_text("{}")
    blob = tmp_path / "models--org--pipe/blobs/0123"
    blob.parent.mkdir()
    blob.write_text("{}")
    (path / "vae/inside.json").symlink_to("config.json" if (path / "vae/config.json").exists() else path / PIPELINE[0])
    (path / "vae/blob.json").symlink_to(blob)
    (path / "vae/outside.json").symlink_to(tmp_path / "secret.json")
    (note,) = open_checkpoint(path, all_files=False).copy_notes
    assert note.startswith(f"vae/outside.json is a link to {tmp_path / 'secret.json'}")


@posix
def test_the_pruned_component_may_be_a_link(tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe")
    shutil.move(path / "unet", tmp_path / "elsewhere")
    (path / "unet").symlink_to(tmp_path / "elsewhere")
    checkpoint = open_checkpoint(path)
    assert [file.name for file in checkpoint.files] == ["unet/diffusion_pytorch_model.safetensors"]
    assert [str(path) for path in checkpoint.companions] == PIPELINE
    assert checkpoint.notes == ()


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    path = makers.write_sparse(tmp_path / "sdxl.safetensors", "sdxl.original")
    open_checkpoint(path)
    before = _bytes_read()
    (file,) = open_checkpoint(path).files
    assert _bytes_read() - before < file.data_start + (64 << 10)
    assert file.is_sparse
    assert path.stat().st_size > 6e9


def _bytes_read() -> int:
    """Count the bytes that this process has read so far; 0 where the system keeps no count."""
    if not sys.platform.startswith("linux"):
        return 0
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])
