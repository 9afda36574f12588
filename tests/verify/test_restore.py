"""Restoring: what is said and done, and every file that is refused, with nothing left behind."""

import json
import os
import shlex
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crdiff_export import CrdiffError, ExportRequest, Size, export
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.errors import BakeError, CheckpointError, PlanError, VerifyError
from crdiff_export.formats import hashing
from crdiff_export.formats.weight_file import FileBytes
from crdiff_export.progress import Silent
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import verify
from tests.support import DOCS, makers, oracle
from tests.support.exporting import Interrupting, failing, names
from tests.support.isolation import Crdiff, Ran
from tests.support.messages import raises

TABLE = "demo.original-unet"
BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
TARGET, OTHER = BLOCK + "attn1.to_q.weight", BLOCK + "attn2.to_q.weight"
VALUES, HEAD = "zz_crdiff.residual", "zz_crdiff.header"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.write(tmp_path_factory.mktemp("base") / "base.safetensors", makers.tiny(TABLE), {"note": "kept"})


def bake(base: Path, folder: Path, way: str, **asked: Any) -> Path:
    asked.setdefault("ratio", 0.3)
    return export(ExportRequest(str(base), Size(96, 64), folder / "o.safetensors", residual=way, **asked)).written.path


def rewrite(path: Path, tensors: makers.Tensors) -> None:
    """Save other tensors with the same metadata, as another tool would."""
    makers.write(path, tensors, makers.metadata_of(path))


def said(path: Path, key: str, text: str | None = None) -> None:
    """Change or remove a key."""
    makers.said(path, {key: text}, path)


def rehashed(path: Path, key: str = "modelspec.hash_sha256") -> None:
    """Put the hash of a file's bytes into its header, as somebody would who means to deceive."""
    makers.said(path, {key: oracle.sha256(path)}, path)


def flip(path: Path, name: str, byte: int = 0) -> None:
    """One other bit in a tensor."""
    old = makers.read(path)[name][2][byte]
    makers.changed(path, name, {byte: bytes([old ^ 0x10])}, path)


def zero(path: Path, name: str) -> None:
    """One weight more that is zero."""
    tensors = makers.read(path)
    dtype, shape, data = tensors[name]
    place = next(i for i in range(0, len(data), 2) if data[i : i + 2] != b"\0\0")
    rewrite(path, {**tensors, name: (dtype, shape, data[:place] + b"\0\0" + data[place + 2 :])})


def drop(path: Path, name: str) -> None:
    rewrite(path, {n: t for n, t in makers.read(path).items() if n != name})


def reorder(path: Path) -> None:
    tensors = makers.read(path)
    rewrite(path, {VALUES: tensors.pop(VALUES), **tensors})


def edit(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a tensor of bytes, and the file's hash with it."""
    tensors = makers.read(path)
    data = change(tensors[name][2])
    rewrite(path, {**tensors, name: ("U8", (len(data),), data)})
    rehashed(path)


def other_head(path: Path) -> None:
    """The header of another file of the same length."""
    edit(path, HEAD, lambda data: data.replace(b"attn2.to_q", b"attn2.to_x"))


def no_head(path: Path) -> None:
    edit(path, HEAD, lambda data: bytes(len(data)))


def fewer_values(path: Path) -> None:
    edit(path, VALUES, lambda data: data[2:])


def more_values(path: Path) -> None:
    edit(path, VALUES, lambda data: data + b"ab")


def wrong_value(path: Path) -> None:
    flip(path, VALUES)
    rehashed(path)


def side(change: Change) -> Change:
    return lambda path: change(path.with_suffix(".crdiff-residual"))


def of_another(path: Path) -> None:
    """The sidecar of an export with another ratio."""
    folder = path.parent / "another"
    folder.mkdir()
    bake(path.parent / "base.safetensors", folder, "sidecar", ratio=0.4)
    (folder / "o.crdiff-residual").replace(path.with_suffix(".crdiff-residual"))
    (folder / "o.safetensors").unlink()
    folder.rmdir()


def a_model(path: Path) -> None:
    makers.write(path, makers.tiny(TABLE))


def stripped(path: Path) -> None:
    makers.write(path, makers.read(path))


def deceive(path: Path) -> None:
    flip(path, VALUES)
    rehashed(path, "crdiff.residual.hash_sha256")


# How the residual is kept, what is changed, and the class and key of the error.
REFUSED: Mapping[str, tuple[str, Change, type[CrdiffError], str]] = {
    "none": ("none", lambda _: None, PlanError, "crdiff.residual"),
    "weight changed": ("embed", lambda p: flip(p, OTHER), VerifyError, "its header says '0x"),
    "target changed": ("embed", lambda p: flip(p, TARGET), VerifyError, "hash to 0x"),
    "zero more": ("embed", lambda p: zero(p, TARGET), VerifyError, "hash to 0x"),
    "value changed": ("embed", lambda p: flip(p, VALUES), VerifyError, "hash to 0x"),
    "header changed": ("embed", lambda p: flip(p, HEAD, 40), VerifyError, ""),
    "saved in another order": ("embed", reorder, VerifyError, "residual is not where"),
    "residual dropped": ("embed", lambda p: drop(p, VALUES), VerifyError, VALUES),
    "metadata dropped": ("embed", stripped, CheckpointError, "not made by crdiff"),
    "hash dropped": ("embed", lambda p: said(p, "modelspec.hash_sha256"), VerifyError, "modelspec.hash_sha256"),
    "base's hash dropped": (
        "embed", lambda p: said(p, "crdiff.source.hash_sha256"), VerifyError, "crdiff.source.hash_sha256"
    ),
    "of a later version": ("embed", lambda p: said(p, "crdiff.residual", "elsewhere"), VerifyError, "'elsewhere'"),
    "header of other tensors": ("embed", other_head, VerifyError, "other tensors"),
    "header that is none": ("embed", no_head, VerifyError, HEAD),
    "fewer values": ("embed", fewer_values, VerifyError, "more of its weights are zero"),
    "more values": ("embed", more_values, VerifyError, "fewer of its weights are zero"),
    "wrong value": ("embed", wrong_value, VerifyError, "what it restores hashes to 0x"),
    "no sidecar": ("sidecar", side(Path.unlink), CheckpointError, "o.safetensors"),
    "sidecar of another": ("sidecar", of_another, VerifyError, "belongs to a file that hashes to '0x"),
    "sidecar that is none": ("sidecar", side(a_model), VerifyError, "crdiff.residual.of"),
    "sidecar that is empty": ("sidecar", side(lambda p: os.truncate(p, 0)), CheckpointError, "empty"),
    "sidecar changed": ("sidecar", side(lambda p: flip(p, VALUES)), VerifyError, "hash to 0x"),
    "sidecar deceives": ("sidecar", side(deceive), VerifyError, "what it restores hashes to 0x"),
    "sidecar without values": ("sidecar", side(lambda p: drop(p, VALUES)), VerifyError, "residual is not where"),
    "weight changed beside a sidecar": ("sidecar", lambda p: flip(p, OTHER), VerifyError, "hash to 0x"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused(case: str, base: Path, tmp_path: Path, crdiff: Crdiff) -> None:
    way, change, kind, key = REFUSED[case]
    (tmp_path / "base.safetensors").hardlink_to(base)
    output = bake(tmp_path / "base.safetensors", tmp_path, way)
    change(output)
    before = names(tmp_path)
    with pytest.raises(kind) as caught:
        restore(output, tmp_path / "back.safetensors")
    assert caught.value.message.startswith(str(output.with_suffix("")))
    assert key in caught.value.message
    assert caught.value.hint
    ran = crdiff("restore", output, "-o", tmp_path / "back.safetensors", "--json")
    assert (ran.code, ran.error["message"]) == (kind.exit_code, caught.value.message)
    assert names(tmp_path) == before


PLACES: Mapping[str, tuple[str, bool]] = {
    "exists": ("there.safetensors", False),
    "itself": ("o.safetensors", True),
    "folder": ("/", True),
    "suffix": ("back.ckpt", False),
    "nowhere": ("no/back.safetensors", False),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    name, force = PLACES[case]
    output = bake(base, tmp_path, "embed")
    (tmp_path / "there.safetensors").write_text("mine")
    with raises(PlanError, tmp_path / name):
        restore(output, tmp_path / name, force=force)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    restore(output, tmp_path / "there.safetensors", force=True)
    assert (tmp_path / "there.safetensors").read_bytes() == base.read_bytes()


def test_a_sidecar_itself_is_refused(base: Path, tmp_path: Path) -> None:
    bake(base, tmp_path, "sidecar")
    with raises(CheckpointError, "o.crdiff-residual"):
        restore(tmp_path / "o.crdiff-residual", tmp_path / "back.safetensors")


def touch(path: Path) -> Callable[..., None]:
    """Change a file's time at the last step of a restore."""
    finish = DirectWriter.finish

    def touched(writer: DirectWriter, size: int) -> None:
        os.utime(path, ns=(1, 1))
        finish(writer, size)

    return touched


@pytest.mark.parametrize(
    ("name", "step", "error"),
    [
        ("crdiff_export.bake.direct_writer.DirectWriter.write", lambda _: failing(), BakeError),
        ("crdiff_export.bake.direct_writer.DirectWriter.finish", touch, CheckpointError),
        ("crdiff_export.progress.Silent.advance", lambda _: Interrupting().advance, KeyboardInterrupt),
        ("crdiff_export.bake.destination.shutil.disk_usage", lambda _: lambda _: SimpleNamespace(free=1000), PlanError),
    ],
    ids=["full disk", "changed meanwhile", "interrupt", "full disk beforehand"],
)
def test_a_failure_leaves_nothing(
    name: str, step: Any, error: type[BaseException], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = bake(base, tmp_path, "embed")
    monkeypatch.setattr(name, step(output))
    with pytest.raises(error):
        restore(output, tmp_path / "back.safetensors")
    assert names(tmp_path) == ["o.safetensors"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE", 1 << 16)
    path = makers.write(tmp_path / "base.safetensors", makers.tiny("sdxl.original"))
    output = bake(path, tmp_path, "embed")
    restore(output, tmp_path / "back.safetensors", chunk=1 << 16)
    tracemalloc.start()
    try:
        restore(output, tmp_path / "back.safetensors", force=True, chunk=1 << 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert output.stat().st_size > 12_000_000
    assert peak < 2 * 2_500 * 2_000 + 20 * (1 << 16)  # two headers of 2500 tensors, as Python objects


def test_the_baked_file_is_read_twice_and_no_more(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to hash it and once to restore it."""
    output, read = bake(base, tmp_path, "embed"), 0
    read_into = FileBytes.read_into

    def counted(reader: FileBytes, offset: int, target: memoryview) -> None:
        nonlocal read
        read += len(target)
        read_into(reader, offset, target)

    monkeypatch.setattr(FileBytes, "read_into", counted)
    restore(output, tmp_path / "back.safetensors")
    assert read < 2.2 * output.stat().st_size


# The command.


Line = Callable[[str], Ran]


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


def test_the_command_says_what_it_gave_back(line: Line, here: Path) -> None:
    line("export demo --res 96x64 --residual embed -o o.safetensors")
    ran = line("restore o.safetensors -o base.safetensors")
    said = makers.metadata_of(here / "o.safetensors")["crdiff.source.hash_sha256"]
    assert (ran.code, ran.out) == (0, "base.safetensors\n")
    assert ran.err.splitlines()[-2:] == [
        f"note: base.safetensors: the base's tensors, bit by bit ({said})",
        "note: the base's header was restored, too; it was kept without a hash",
    ]
    assert line("restore o.safetensors -o quiet.safetensors -q") == Ran(0, "quiet.safetensors\n", "")
    size = (here / "base.safetensors").stat().st_size
    assert line("restore o.safetensors -o base.safetensors --force --json").result == {
        "schema": 1, "output": "base.safetensors", "bytes": size, "whole": True,
        "files": [{"path": "base.safetensors", "bytes": size, "hash_sha256": said, "whole": True}],
    }  # fmt: skip


def test_export_tells_of_it(line: Line, here: Path) -> None:
    ran = line("export demo --res 96x64 --residual sidecar -o o.safetensors --json")
    assert ran.result["residual"] == "sidecar"
    assert ran.result["files"][0]["sidecar"] == "o.crdiff-residual"
    assert ran.result["bytes"] == sum(path.stat().st_size for path in here.iterdir())
    plan = line("export demo --res 96x64 --residual embed --dry-run --json").result
    assert plan["residual"] == "embed"
    assert 0 < plan["residual_bytes"] < plan["disk_needed"] - plan["bytes"]
    text = line("export demo --res 96x64 --residual sidecar --dry-run").out
    assert "residual:    about " in text
    assert " in a sidecar\n" in text
    assert "residual:" not in line("export demo --res 96x64 --dry-run").out


def test_inspect_tells_of_it(base: Path, tmp_path: Path) -> None:
    embedded = bake(base, tmp_path, "embed")
    assert (inspect(embedded).residual or "").startswith("embedded, ")
    assert inspect(embedded).match
    embedded.unlink()
    beside = bake(base, tmp_path, "sidecar")
    assert (inspect(beside).residual or "").startswith("in a sidecar, ")
    side = inspect(tmp_path / "o.crdiff-residual")
    assert side.residual == (
        f"the sidecar of a file whose tensors hash to {makers.metadata_of(beside)['modelspec.hash_sha256']}"
    )
    assert ("crdiff", "not made by crdiff") not in list(side.facts())
    (tmp_path / "o.crdiff-residual").unlink()
    assert inspect(beside).residual == "in a sidecar, but there is no o.crdiff-residual"


# Verification.


@pytest.mark.parametrize("way", ["embed", "sidecar"])
def test_verify_holds(way: str, base: Path, tmp_path: Path) -> None:
    output, kept = bake(base, tmp_path, way), {"embed": "embedded", "sidecar": "sidecar"}[way]
    assert verify(output, None, Silent()).residual == verify(output, str(base), Silent()).residual == kept


def test_verify_without_the_sidecar(base: Path, tmp_path: Path, line: Line) -> None:
    output = bake(base, tmp_path, "sidecar")
    (tmp_path / "o.crdiff-residual").unlink()
    assert verify(output, str(base), Silent()).residual == "missing"
    said = "note: its residual is in a sidecar that is not beside it, and was not checked"
    assert line(f"verify {output}").err.splitlines()[-1] == said


# How the residual is kept, what is changed, and the key of the error, which takes the base only for the first four.
UNTRUE: Mapping[str, tuple[str, Change, str]] = {
    "wrong value": ("embed", wrong_value, VALUES),
    "fewer values": ("embed", fewer_values, VALUES),
    "more values": ("embed", more_values, VALUES),
    "other header": ("embed", other_head, HEAD),
    "no values": ("embed", lambda p: drop(p, VALUES), "hash to"),
    "sidecar changed": ("sidecar", side(lambda p: flip(p, VALUES)), "hash to"),
    "sidecar of another": ("sidecar", of_another, "hashes to"),
}


def test_names_that_were_swapped_are_not_those_of_the_base(base: Path, tmp_path: Path) -> None:
    """All bytes and hashes are as before; the base's header in the residual tells."""
    output = bake(base, tmp_path, "embed")
    size = struct.unpack("<Q", output.read_bytes()[:8])[0]
    header = json.loads(output.read_bytes()[8 : 8 + size])
    one, other = [name for name in header if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))][:2]
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    with output.open("r+b") as file:
        file.seek(8)
        file.write(text)
    with raises(VerifyError, HEAD):
        verify(output, None, Silent())


@pytest.mark.parametrize("case", UNTRUE)
def test_verify_fails(case: str, base: Path, tmp_path: Path) -> None:
    way, change, key = UNTRUE[case]
    (tmp_path / "base.safetensors").hardlink_to(base)
    output = bake(tmp_path / "base.safetensors", tmp_path, way)
    change(output)
    needs_base = key == VALUES
    if needs_base:
        verify(output, None, Silent())
    with pytest.raises(VerifyError, match=key):
        verify(output, str(base) if needs_base else None, Silent())


def test_the_specification_restores_it(base: Path, tmp_path: Path) -> None:
    """docs/metadata.md, section Residual, step by step, with names from its own tables."""
    text = (DOCS / "metadata.md").read_text(encoding="utf-8")
    section = text.partition("\n## Residual\n")[2].partition("\n## ")[0]
    names = [row.split("`")[1] for row in section.splitlines() if row.startswith("| `zz_")]
    keys = [row.split("`")[1] for row in section.splitlines() if row.startswith("| `crdiff.")]
    assert names == [VALUES, HEAD]
    output = bake(base, tmp_path, "sidecar")
    kept = output.with_suffix(".crdiff-residual")
    assert sorted(makers.metadata_of(kept)) == sorted(keys)
    tensors = makers.read(kept)
    values, restored = tensors[names[0]][2], tensors[names[1]][2]
    for name, (dtype, _, data) in makers.read(output).items():
        is_target = ".attn1.to_" in name or ".ff.net." in name
        if is_target and name.endswith(".weight"):
            assert dtype == "F16"
            found = [data[i : i + 2] for i in range(0, len(data), 2)]
            for i, weight in enumerate(found):
                if weight == b"\0\0":
                    found[i], values = values[:2], values[2:]
            restored += b"".join(found)
        else:
            restored += data
    assert not values
    assert restored == base.read_bytes()
