"""Opening a checkpoint: every shape that one can have on disk, and everything else, which is refused in one line."""

import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.weight_file import FileBytes, SourceFile
from tests.support import hostile, makers
from tests.support.hostile import FIRST, SECOND

if TYPE_CHECKING:
    from tests.support.isolation import Crdiff

Maker = Callable[[Path], Path]
DAMAGED = "The file is damaged or is not a safetensors checkpoint; fetch it again from its source."
TOO_LONG = "more than the 100000000 that the format allows"
INDEX = "The index is damaged or is not one of a sharded checkpoint; fetch it again."
APART = "The index and the shards are not of one checkpoint; fetch them again together."
FETCH = "Fetch the missing shard into the same folder."
FOLDER = "Put the file itself there."
NO_FILE = "Give a checkpoint file or a diffusers folder."
ACCESS = "Check the path and its permissions, then try again."
NOWHERE = "Check the path."
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")

FILES: dict[str, tuple[Maker, str, str]] = {
    "empty": (hostile.empty, "{}: the file is empty", DAMAGED),
    "cut-in-the-length": (hostile.cut_in_the_length, "{}: the file has 5 bytes, too few for a header", DAMAGED),
    "cut-in-the-header": (
        hostile.cut_in_the_header, "{}: the header's length is given as 64 bytes, but the file has only 30", DAMAGED,
    ),
    "cut-in-the-data": (
        hostile.cut_in_the_data, "{}: the file is truncated: the header describes 12 bytes of tensors, 7 are there",
        "Fetch the file again; its size should be 5 bytes more, or the last download did not finish.",
    ),
    "trailing-bytes": (
        hostile.trailing_bytes, "{}: 4 bytes after the last tensor belong to no tensor", DAMAGED,
    ),
    "zeros": (
        hostile.zeros, "{}: the header's length is given as 0 bytes, too few for any JSON object", DAMAGED,
    ),
    "noise": (
        hostile.noise, f"{{}}: the header's length is given as {0x9B9B9B9B9B9B9B9B} bytes, {TOO_LONG}", DAMAGED,
    ),
    "negative-length": (
        hostile.negative_length, f"{{}}: the header's length is given as {2**64 - 2} bytes, {TOO_LONG}", DAMAGED,
    ),
    "gguf": (
        hostile.gguf, "{}: a GGUF file; its weights are quantised and cannot be pruned by magnitude",
        "Use the fp16 or bf16 checkpoint that it was made from.",
    ),
    "git-lfs-pointer": (
        hostile.git_lfs_pointer, "{}: a Git LFS pointer, not the checkpoint itself",
        "Fetch the file with `git lfs pull`.",
    ),
    "web-page": (
        hostile.web_page, "{}: a web page, not a checkpoint",
        "The download saved a login or an error page; fetch the file again.",
    ),
    "error-message": (
        hostile.error_message, "{}: a text file, not a checkpoint",
        "Look into it: a failed download leaves its message there.",
    ),
    "zip-archive": (
        hostile.zip_archive, "{}: a pickle or zip archive under another name, not a safetensors file",
        "Rename it to .ckpt if it is a torch checkpoint; it is then read without running any code in it.",
    ),
    "bare-pickle-with-code": (
        hostile.bare_pickle_with_code, "{}: a pickle or zip archive under another name, not a safetensors file",
        "Rename it to .ckpt if it is a torch checkpoint; it is then read without running any code in it.",
    ),
    "pickled-code": (
        hostile.pickled_code, "{}: a pickle or zip archive under another name, not a safetensors file",
        "Rename it to .ckpt if it is a torch checkpoint; it is then read without running any code in it.",
    ),
    "folder": (
        hostile.folder, "{}: no diffusion_pytorch_model weights in safetensors format",
        "Give a diffusers folder with a unet/ or transformer/ part, or the checkpoint file itself.",
    ),
    "nothing": (lambda path: path, "{}: no such file or folder", NOWHERE),
}  # fmt: skip
NO_FILES: dict[str, tuple[Maker, str, str]] = {
    "pipe": (hostile.pipe, "{}: a pipe, device or socket, not a file", NO_FILE),
    "endless-device": (hostile.endless_device, "{}: a pipe, device or socket, not a file", NO_FILE),
    "link-in-a-circle": (
        hostile.link_in_a_circle, "{}: cannot be read: Too many levels of symbolic links", ACCESS,
    ),
    "link-to-nothing": (hostile.link_to_nothing, "{}: no such file or folder", NOWHERE),
}  # fmt: skip
INDEXES: dict[str, tuple[Maker, str, str]] = {
    "missing-shard": (hostile.missing_shard, f"{{}}: its shard '{SECOND}' is missing", FETCH),
    "key-that-the-shard-lacks": (hostile.key_that_the_shard_lacks, f"{{}}: 'e' is not in '{SECOND}'", APART),
    "key-that-the-index-lacks": (
        hostile.key_that_the_index_lacks, f"{{}}: does not place 'd' in '{SECOND}', which holds it", APART,
    ),
    "key-in-the-wrong-shard": (
        hostile.key_in_the_wrong_shard, f"{{}}: does not place 'a' in '{FIRST}', which holds it", APART,
    ),
    "empty": (hostile.index_that_says(""), "{}: the index is not JSON: Expecting value at character 0", INDEX),
    "list": (hostile.index_that_says("[]"), "{}: the index is not a JSON object", INDEX),
    "null": (hostile.index_that_says("null"), "{}: the index is not a JSON object", INDEX),
    "cut": (
        hostile.index_that_says('{"weight_map": {"a": "'),
        "{}: the index is not JSON: Unterminated string starting at at character 21", INDEX,
    ),
    "not-utf-8": (hostile.index_that_says(b'{"weight_map": "\xff"}'), "{}: the index is not UTF-8 (byte 16)", INDEX),
    "deep": (
        hostile.index_that_says('{"weight_map":' + "[" * 200_000 + "]" * 200_000 + "}"),
        "{}: the index nests too deeply", INDEX,
    ),
    "enormous": (
        hostile.index_that_says('{"weight_map":[' + "[]," * 3_000_000 + "[]]}"),
        "{}: the index describes more tensors than any checkpoint has", INDEX,
    ),
    "no-weight-map": (hostile.index_that_says('{"metadata": {}}'), "{}: has no weight_map", INDEX),
    "weight-map-list": (hostile.index_that_says('{"weight_map": ["a"]}'), "{}: has no weight_map", INDEX),
    "weight-map-empty": (hostile.index_that_says('{"weight_map": {}}'), "{}: has no weight_map", INDEX),
    "key-twice": (
        hostile.index_that_says(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'),
        "{}: the index has the key 'a' twice", INDEX,
    ),
    "lone-surrogate": (
        hostile.index_that_says(r'{"weight_map": {"\udc00": "a.safetensors"}}'),
        r"{}: the index has text that is not Unicode: '\udc00'", INDEX,
    ),
    "pipeline-index": (
        hostile.index_that_says('{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}'),
        "{}: has no weight_map", INDEX,
    ),
}  # fmt: skip
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
FOLDERS: dict[str, tuple[Maker, str, str]] = {
    "only-a-pickle": (
        hostile.folder_without_weights, "{}/unet: no diffusion_pytorch_model weights in safetensors format",
        "Give a diffusers folder with a unet/ or transformer/ part, or the checkpoint file itself.",
    ),
    "index-is-a-folder": (
        hostile.index_made_of(hostile.folder),
        "{}/diffusion_pytorch_model.safetensors.index.json: a folder, where a file should be", FOLDER,
    ),
    "weights-are-a-folder": (
        hostile.weights_made_of(hostile.folder),
        "{}/unet/diffusion_pytorch_model.safetensors: a folder, where a file should be", FOLDER,
    ),
    "weights-are-empty": (
        hostile.weights_made_of(hostile.empty),
        "{}/unet/diffusion_pytorch_model.safetensors: the file is empty", DAMAGED,
    ),
}  # fmt: skip
SHARDS: dict[str, tuple[Maker, str, str]] = {
    "folder": (hostile.folder, f"{SECOND}: a folder, where a file should be", FOLDER),
    "empty": (hostile.empty, f"{SECOND}: the file is empty", DAMAGED),
    "cut": (
        hostile.cut_in_the_header,
        f"{SECOND}: the header's length is given as 64 bytes, but the file has only 30", DAMAGED,
    ),
}  # fmt: skip
NO_SHARDS: dict[str, tuple[Maker, str, str]] = {
    "pipe": (hostile.pipe, f"{SECOND}: a pipe, device or socket, not a file", NO_FILE),
    "endless-device": (hostile.endless_device, f"{SECOND}: a pipe, device or socket, not a file", NO_FILE),
    "link-in-a-circle": (hostile.link_in_a_circle, f"the-index: its shard '{SECOND}' is missing", FETCH),
    "link-to-nothing": (hostile.link_to_nothing, f"the-index: its shard '{SECOND}' is missing", FETCH),
}  # fmt: skip
NO_PARTS: dict[str, tuple[Maker, str, str]] = {
    "index-is-a-pipe": (
        hostile.index_made_of(hostile.pipe),
        "{}/diffusion_pytorch_model.safetensors.index.json: a pipe, device or socket, not a file", NO_FILE,
    ),
    "index-is-endless": (
        hostile.index_made_of(hostile.endless_device),
        "{}/diffusion_pytorch_model.safetensors.index.json: a pipe, device or socket, not a file", NO_FILE,
    ),
    "index-in-a-circle": (
        hostile.index_made_of(hostile.link_in_a_circle),
        "{}/diffusion_pytorch_model.safetensors.index.json: cannot be read: Too many levels of symbolic links", ACCESS,
    ),
    "weights-are-a-pipe": (
        hostile.weights_made_of(hostile.pipe),
        "{}/unet/diffusion_pytorch_model.safetensors: a pipe, device or socket, not a file", NO_FILE,
    ),
    "companion-is-a-pipe": (
        hostile.companion_made_of(hostile.pipe), "{}/vae/notes.txt: a pipe, device or socket, not a file", NO_FILE,
    ),
    "companion-in-a-circle": (
        hostile.companion_made_of(hostile.link_in_a_circle), "{}/vae/notes.txt: a broken link",
        "Remove it, or fetch what it should lead to.",
    ),
    "companion-leads-nowhere": (
        hostile.companion_made_of(hostile.link_to_nothing), "{}/vae/notes.txt: a broken link",
        "Remove it, or fetch what it should lead to.",
    ),
}  # fmt: skip


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


@pytest.mark.parametrize(("make", "what", "hint"), FILES.values(), ids=FILES)
def test_files_that_are_no_checkpoint(make: Maker, what: str, hint: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model.safetensors")
    error = refusal(path)
    assert (error.message, error.hint) == (what.format(path), hint)


@posix
@pytest.mark.parametrize(("make", "what", "hint"), NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.safetensors.index.json", "model"])
def test_what_is_no_file_is_never_waited_for(make: Maker, what: str, hint: str, name: str, tmp_path: Path) -> None:
    path = make(tmp_path / name)
    error = refusal(path)
    assert (error.message, error.hint) == (what.format(path), hint)


@pytest.mark.parametrize(("make", "what", "hint"), INDEXES.values(), ids=INDEXES)
def test_indexes_that_do_not_hold(make: Maker, what: str, hint: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    error = refusal(path)
    assert (error.message, error.hint) == (what.format(path), hint)


def test_an_index_larger_than_any(tmp_path: Path) -> None:
    path = hostile.sharded(tmp_path)
    with path.open("ab") as file:
        file.truncate((64 << 20) + 1)
    error = refusal(path)
    assert (error.message, error.hint) == (f"{path}: larger than any index of shards", INDEX)


@pytest.mark.parametrize("place", OUTSIDE.values(), ids=OUTSIDE)
def test_an_index_does_not_lead_out_of_its_folder(place: object, tmp_path: Path) -> None:
    path = hostile.shard_placed_at(place)(tmp_path / "model")
    error = refusal(path)
    assert error.message.startswith(f"{path}: 'a' is placed in ")
    assert error.message.endswith(", not a file beside the index")
    assert error.hint == INDEX
    assert error.message.isprintable()


def _shard(make: Maker, what: str, hint: str, folder: Path) -> None:
    index = hostile.shard_made_of(make)(folder)
    error = refusal(index)
    expected = what.replace("the-index", index.name)
    assert (error.message, error.hint) == (str(folder / expected), hint)


@pytest.mark.parametrize(("make", "what", "hint"), SHARDS.values(), ids=SHARDS)
def test_shards_that_cannot_be_read(make: Maker, what: str, hint: str, tmp_path: Path) -> None:
    _shard(make, what, hint, tmp_path / "model")


@posix
@pytest.mark.parametrize(("make", "what", "hint"), NO_SHARDS.values(), ids=NO_SHARDS)
def test_shards_that_are_no_files(make: Maker, what: str, hint: str, tmp_path: Path) -> None:
    _shard(make, what, hint, tmp_path / "model")


def _folder(make: Maker, what: str, hint: str, folder: Path) -> None:
    path = make(folder)
    error = refusal(path)
    assert (error.message, error.hint) == (what.replace("/", os.sep).format(path), hint)


@pytest.mark.parametrize(("make", "what", "hint"), FOLDERS.values(), ids=FOLDERS)
def test_folders_that_cannot_be_read(make: Maker, what: str, hint: str, tmp_path: Path) -> None:
    _folder(make, what, hint, tmp_path / "model")


@posix
@pytest.mark.parametrize(("make", "what", "hint"), NO_PARTS.values(), ids=NO_PARTS)
def test_folders_of_what_is_no_file(make: Maker, what: str, hint: str, tmp_path: Path) -> None:
    _folder(make, what, hint, tmp_path / "model")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is hidden from root")
@pytest.mark.parametrize("part", ["model.safetensors", "pipe", "pipe/unet", "pipe/vae", "model.ckpt"])
def test_what_may_not_be_read(part: str, tmp_path: Path) -> None:
    hostile.pipeline(tmp_path / "pipe")
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(hostile.good())
    hidden = tmp_path / part
    hidden.chmod(0)
    try:
        error = refusal(tmp_path / part.partition("/")[0])
    finally:
        hidden.chmod(0o700)
    assert error.message.startswith(str(hidden))
    assert error.message.endswith(": cannot be read: Permission denied")
    assert error.hint == ACCESS


def test_a_name_too_long_for_any_file(tmp_path: Path) -> None:
    error = refusal(tmp_path / ("x" * 5000))
    assert error.message.startswith(str(tmp_path))
    assert error.hint


# The same through the command line: exit code 1, two lines on stderr, nothing on stdout.

COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "export": lambda path: ("export", path, "--res", "512"),
    "inspect": lambda path: ("inspect", path),
    "verify": lambda path: ("verify", path),
    "verify-base": lambda path: ("verify", path, "--base", path),
}
ENDS: dict[str, tuple[Maker, str]] = {
    "truncated": (hostile.cut_in_the_data, "model.safetensors"),
    "empty": (hostile.empty, "model.safetensors"),
    "noise": (hostile.noise, "model.safetensors"),
    "web-page": (hostile.web_page, "model.safetensors"),
    "code": (hostile.pickled_code, "model.ckpt"),
    "code-under-another-name": (hostile.pickled_code, "model.safetensors"),
    "bare-pickle": (hostile.bare_pickle_with_code, "model.ckpt"),
    "missing-shard": (hostile.missing_shard, "model"),
    "no-weights": (hostile.folder_without_weights, "model"),
    "folder": (hostile.folder, "model.safetensors"),
    "cut-archive": (hostile.truncated_archive, "model.ckpt"),
}
UNIX_ENDS: dict[str, tuple[Maker, str]] = {
    "pipe": (hostile.pipe, "model.safetensors"),
    "endless": (hostile.endless_device, "model.ckpt"),
    "circle": (hostile.link_in_a_circle, "model.safetensors"),
    "leads-nowhere": (hostile.link_to_nothing, "model.safetensors"),
}


def _end(command: str, make: Maker, name: str, folder: Path, crdiff: "Crdiff") -> None:
    path = make(folder / name)
    ran = crdiff(*COMMANDS[command](path))
    assert ran.code == 1
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 2
    assert ran.err.splitlines()[0].startswith(f"crdiff: {path}")
    assert "Traceback" not in ran.err
    assert not any(hostile.MARKER in found.name or "crdiff" in found.name for found in folder.rglob("*"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("make", "name"), ENDS.values(), ids=ENDS)
def test_every_command_refuses_in_two_lines(command: str, make: Maker, name: str, here: Path, crdiff: "Crdiff") -> None:
    _end(command, make, name, here, crdiff)


@posix
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("make", "name"), UNIX_ENDS.values(), ids=UNIX_ENDS)
def test_every_command_refuses_what_is_no_file(
    command: str, make: Maker, name: str, here: Path, crdiff: "Crdiff"
) -> None:
    _end(command, make, name, here, crdiff)


# What can be opened.


def all_bytes(file: SourceFile) -> bytes:
    target = bytearray(file.data_size)
    with closing(file.open()) as source:
        source.read_into(0, memoryview(target))
    return bytes(target)


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
    assert checkpoint.stem == name.removesuffix(".safetensors").removesuffix(".SafeTensors")


def test_bytes_at_any_place(tmp_path: Path) -> None:
    path = makers.write(tmp_path / "model.safetensors", TENSORS)
    (file,) = open_checkpoint(path).files
    data = b"".join(raw for _, _, raw in TENSORS.values())
    with closing(file.open()) as source:
        for start in range(len(data)):
            for stop in range(start, len(data) + 1):
                target = bytearray(b"\xaa" * (stop - start + 2))
                source.read_into(start, memoryview(target)[1:-1])
                assert target == b"\xaa" + data[start:stop] + b"\xaa"


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = makers.write(tmp_path / "model.safetensors", TENSORS)
    (file,) = open_checkpoint(path).files
    with closing(file.open()) as source:
        os.truncate(path, file.data_start + 10)
        source.read_into(0, memoryview(bytearray(10)))
        with pytest.raises(CheckpointError) as caught:
            source.read_into(5, memoryview(bytearray(10)))
    assert caught.value.message == f"{path}: the file became shorter while it was read"
    assert caught.value.hint == "Leave the file alone during the export, then run it again."


def test_a_file_that_goes_away_before_it_is_read(tmp_path: Path) -> None:
    path = makers.write(tmp_path / "model.safetensors", TENSORS)
    (file,) = open_checkpoint(path).files
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        file.open()
    assert caught.value.message == f"{path}: reading failed: No such file or directory"
    assert caught.value.hint


def test_a_disk_that_fails(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        FileBytes(tmp_path, 0)
    assert caught.value.message.startswith(f"{tmp_path}: reading failed: ")
    assert caught.value.hint == "Check the disk, or copy the file to another one."


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


def test_a_component(tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe") / "unet"
    checkpoint = open_checkpoint(path)
    assert [file.name for file in checkpoint.files] == ["diffusion_pytorch_model.safetensors"]
    assert [str(path) for path in checkpoint.companions] == ["config.json"]


def test_the_folder_of_an_index_by_another_name(tmp_path: Path) -> None:
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
    assert list(checkpoint.notes) == [f"the {name} weights beside them are not in the output" for name in noted]
    expected = sorted([*PIPELINE, "vae/diffusion_pytorch_model.bin"])
    assert [str(path) for path in checkpoint.companions] == expected


@pytest.mark.parametrize(("names", "variant", "there"), [
    pytest.param(("",), "fp16", "none (leave --variant out)", id="only-plain"),
    pytest.param(("fp16", ""), "fp61", "none (leave --variant out), fp16", id="misspelt"),
    pytest.param(("fp16",), "", "fp16", id="nothing"),
])  # fmt: skip
def test_variants_that_are_not_there(names: tuple[str, ...], variant: str, there: str, tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe", names=names)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, variant)
    assert caught.value.message == f"{path / 'unet'}: no {variant!r} variant of the weights"
    assert caught.value.hint == f"There are: {there}."


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
    assert list(checkpoint.notes) == [
        "everything is a link to a folder and is not in the output",
        "vae/up is a link to a folder and is not in the output",
    ]


@posix
def test_the_pruned_component_may_be_a_link(tmp_path: Path) -> None:
    path = hostile.pipeline(tmp_path / "pipe")
    shutil.move(path / "unet", tmp_path / "elsewhere")
    (path / "unet").symlink_to(tmp_path / "elsewhere")
    checkpoint = open_checkpoint(path)
    assert [file.name for file in checkpoint.files] == ["unet/diffusion_pytorch_model.safetensors"]
    assert [str(path) for path in checkpoint.companions] == PIPELINE
    assert checkpoint.notes == ()


def test_a_file_of_the_real_size_is_opened_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = makers.write_sparse(tmp_path / "sdxl.safetensors", "sdxl.original")
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
    best = min(_seconds_to_open(path) for _ in range(3))
    (file_of_weights,) = open_checkpoint(path).files
    assert path.stat().st_size > 6e9
    assert file_of_weights.is_sparse
    assert file_of_weights.data_start == 8 + size
    assert best < 0.3


def _seconds_to_open(path: Path) -> float:
    began = time.process_time()
    open_checkpoint(path)
    return time.process_time() - began


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts as Linux keeps them")
def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = makers.write_sparse(tmp_path / "sdxl.safetensors", "sdxl.original")
    open_checkpoint(path)
    before = _bytes_read()
    checkpoint = open_checkpoint(path)
    assert _bytes_read() - before < checkpoint.files[0].data_start + (64 << 10)


def _bytes_read() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])
