"""Several variants of a base from one reading: the same bytes as one export each, and no variant harms another."""

import errno
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crdiff_export import ExportRequest, export
from crdiff_export.bake import direct_writer
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.errors import BakeError, PlanError
from crdiff_export.export import Baked, Failure, run_in_turn, run_together
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.formats.weight_file import FileBytes
from crdiff_export.progress import Silent
from crdiff_export.prune.criteria import magnitude
from tests.support import makers
from tests.support.exporting import SIZE, Interrupting, bake, content, failing, jobs, names, write_in_chunks
from tests.support.mixed_models import sd3, unet

UNET: Sequence[Mapping[str, Any]] = (
    {"ratios": {"down": 0.1, "mid": 0.0, "up": 0.7}},
    {"ratio": 0.0},
    {"ratio": 0.5, "targets": ("attn",), "poa_weight": 2.0},
)
DIT: Sequence[Mapping[str, Any]] = ({"ratio": 0.3}, {"ratio": 0.0}, {"ratio": 0.6, "targets": ("attn", "ff")})
RESIDUALS: Sequence[Mapping[str, Any]] = (
    {"ratio": 0.3, "residual": "embed"},
    {"ratio": 0.5},
    {"ratio": 0.2, "residual": "sidecar"},
    {"ratio": 0.6, "targets": ("attn",), "residual": "embed"},
)
BASES: Mapping[str, tuple[Callable[[], makers.Tensors], Sequence[Mapping[str, Any]], Mapping[str, Any]]] = {
    "unet": (unet, UNET, {}),
    "unet-cast": (unet, UNET, {"dtype": "fp32"}),
    "unet-unhashed": (unet, UNET, {"hashing": False}),
    "sd3": (sd3, DIT, {}),
    "residuals": (lambda: makers.tiny("demo.original-unet", "F32"), RESIDUALS, {}),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet"))


@pytest.mark.parametrize("name", [*BASES, "shards", "pipe"])
def test_each_is_what_it_is_alone(name: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: Sequence[Mapping[str, Any]] = [{"ratio": 0.2}, {"ratio": 0.5}]
    common: Mapping[str, Any] = {}
    base = shelf / name
    if name in BASES:
        make, requests, common = BASES[name]
        base = makers.write(tmp_path / "base.safetensors", make(), {"format": "pt"})
    write_in_chunks(monkeypatch, 8192)
    together = list(run_together(jobs(base, tmp_path / "together", requests, **common), Silent()))
    in_turn = list(run_in_turn(jobs(base, tmp_path / "in turn", requests, **common), Silent()))
    (tmp_path / "alone").mkdir()
    for request, first, second in zip(requests, together, in_turn, strict=True):
        assert isinstance(first, Baked)
        assert isinstance(second, Baked)
        target = tmp_path / "alone" / first.written.path.name
        alone = export(ExportRequest(str(base), SIZE, target, **common, **request))
        assert first.thresholds == second.thresholds == alone.thresholds
    assert content(tmp_path / "together") == content(tmp_path / "in turn") == content(tmp_path / "alone")


class Counted:
    """How many bytes of which passes were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        read_into = FileBytes.read_into

        def counted(reader: FileBytes, offset: int, target: memoryview) -> None:
            self.read += len(target)
            read_into(reader, offset, target)

        monkeypatch.setattr(FileBytes, "read_into", counted)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_the_base_is_read_as_for_one(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet", dtype))
    counted = Counted(monkeypatch)
    list(run_together(jobs(base, tmp_path / "one", [{"ratio": 0.3}]), Silent()))
    one, counted.read = counted.read, 0
    list(run_together(jobs(base, tmp_path / "four", [{"ratio": r} for r in (0.1, 0.2, 0.3, 0.4)]), Silent()))
    assert counted.read == one


def test_one_count_serves_all_ratios(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TensorSpec] = []
    count = magnitude.RankedMagnitudes._count

    def noted(self: Any, target: Any, weights: memoryview) -> None:
        seen.append(target.source)
        count(self, target, weights)

    monkeypatch.setattr(magnitude.RankedMagnitudes, "_count", noted)
    results = list(run_in_turn(jobs(base, tmp_path / "m", [{"ratio": r / 10} for r in range(8)]), Silent()))
    assert len(results) == 8
    assert len(seen) == len(set(seen)) > 10


# --- the Hub's hash of a base ---


def test_a_known_hash_is_not_computed_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    (job,) = jobs(base, tmp_path / "out", [{"ratio": 0.3}])
    counted = Counted(monkeypatch)
    (baked,) = run_together([job], Silent())
    without, counted.read = counted.read, 0
    (again,) = run_together(
        [replace(job, base=replace(job.base, hashes={base.name: digest}), target=tmp_path / "known.safetensors")],
        Silent(),
    )
    assert counted.read < without - base.stat().st_size // 2
    assert isinstance(baked, Baked)
    assert isinstance(again, Baked)
    ours, theirs = (makers.metadata_of(result.written.path) for result in (again, baked))
    assert ours["crdiff.source.file_sha256"] == f"0x{digest}"
    assert "crdiff.source.hash_sha256" not in ours
    assert "crdiff.source.file_sha256" not in theirs
    assert ours["modelspec.hash_sha256"] == theirs["modelspec.hash_sha256"]
    assert makers.read(again.written.path) == makers.read(baked.written.path)


def test_only_some_hashes_are_known(tmp_path: Path) -> None:
    makers.write_shards(tmp_path / "base", makers.tiny("sd15.diffusers-unet"), 3)
    alone = export(ExportRequest(str(tmp_path / "base"), SIZE, tmp_path / "alone"))
    (job,) = jobs(tmp_path / "base", tmp_path / "out", [{}])
    name = job.plan.outputs[1].source.name
    digest = hashlib.sha256((tmp_path / "base" / name).read_bytes()).hexdigest()
    (baked,) = run_together([replace(job, base=replace(job.base, hashes={name: digest}))], Silent())
    assert isinstance(baked, Baked)
    for file, other in zip(baked.written.files, alone.written.files, strict=True):
        assert file.hashes
        assert other.hashes
        mine = file.path.relative_to(baked.written.path).as_posix() == name
        assert file.hashes.source == (None if mine else other.hashes.source)
        assert file.hashes.source_file == (f"0x{digest}" if mine else None)
        assert file.hashes.output == other.hashes.output


# --- what goes wrong with one of them ---


@pytest.mark.parametrize("at", [0, 20])
def test_a_write_that_fails_ends_only_its_own(
    at: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_in_chunks(monkeypatch, 4096)
    planned = jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}, {"ratio": 0.3}])
    write = DirectWriter.write
    calls = 0

    def failing(writer: DirectWriter, data: memoryview, offset: int) -> None:
        nonlocal calls
        if ".1.safetensors." in writer.path.name:
            calls += 1
            if calls > at:
                raise OSError(errno.EIO, "Input/output error")
        write(writer, data, offset)

    monkeypatch.setattr(DirectWriter, "write", failing)
    first, second, third = run_together(planned, Silent())
    assert calls == at + 1  # nothing more is tried
    assert isinstance(second, Failure)
    assert isinstance(second.error, BakeError)
    assert second.error.message == f"{tmp_path / 'many/1.safetensors'}: Input/output error"
    assert names(tmp_path / "many") == ["0.safetensors", "2.safetensors"]
    for outcome, ratio in ((first, 0.1), (third, 0.3)):
        assert isinstance(outcome, Baked)
        alone = bake(base, tmp_path / "a.safetensors", ratio=ratio, force=True)
        assert outcome.written.path.read_bytes() == alone.read_bytes()


def test_when_all_fail_the_rest_is_not_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_chunks(monkeypatch, 4096)
    planned = jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}])
    monkeypatch.setattr(DirectWriter, "write", failing())
    outcomes = list(run_together(planned, Silent()))
    assert [type(outcome) for outcome in outcomes] == [Failure, Failure]
    assert names(tmp_path / "many") == []


@pytest.mark.parametrize("step", ["_check", "publish"])
def test_a_last_step_that_fails_ends_only_its_own(
    step: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}])
    if step == "publish":
        planned[0].target.write_bytes(b"it came there during the export")
    else:
        check, calls = direct_writer._check, []

        def failing(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 1:
                raise BakeError("0: does not open again", "This is a bug; please report it.")
            check(*args)

        monkeypatch.setattr(direct_writer, "_check", failing)
    first, second = run_together(planned, Silent())
    assert isinstance(first, Failure)
    assert isinstance(first.error, BakeError)
    assert isinstance(second, Baked)
    left = {p.name for p in (tmp_path / "many").iterdir()}
    assert left == ({"0.safetensors", "1.safetensors"} if step == "publish" else {"1.safetensors"})


def test_a_damaged_base_ends_all(tmp_path: Path) -> None:
    tensors = makers.tiny("demo.original-unet", "F32")
    name = next(n for n in tensors if n.endswith("attn1.to_q.weight"))
    dtype, shape, data = tensors[name]
    base = makers.write(tmp_path / "base.safetensors", {**tensors, name: (dtype, shape, b"\xff" * len(data))})
    with pytest.raises(PlanError, match="not finite"):
        list(run_together(jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}]), Silent()))
    assert names(tmp_path / "many") == []


def test_no_more_than_the_caller_keeps(base: Path, tmp_path: Path) -> None:
    """One by one, each may be taken away before the next is written."""
    planned = jobs(base, tmp_path / "many", [{"ratio": r} for r in (0.1, 0.2, 0.3)])
    for number, outcome in enumerate(run_in_turn(planned, Silent())):
        assert isinstance(outcome, Baked)
        assert [p.name for p in (tmp_path / "many").iterdir()] == [f"{number}.safetensors"]
        outcome.written.path.unlink()


def test_a_full_disk_is_told_before_each(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}])
    needed = planned[0].space.needed

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=needed * 3 // 2 - _used(tmp_path / "many"))

    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(PlanError, match=r"needed, .* free"):
        list(run_together(planned, Silent()))
    assert names(tmp_path / "many") == []
    first, second = run_in_turn(planned, Silent())
    assert isinstance(first, Baked)
    assert isinstance(second, Failure)
    assert isinstance(second.error, PlanError)
    assert second.error.message.endswith("free")


def _used(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def test_a_generator_that_is_left_leaves_nothing_running(base: Path, tmp_path: Path) -> None:
    outcomes = run_in_turn(jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}]), Silent())
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("crdiff")]
    assert [p.name for p in (tmp_path / "many").iterdir()] == ["0.safetensors"]


def test_staged_parts_go_when_one_is_interrupted(base: Path, tmp_path: Path) -> None:

    with pytest.raises(KeyboardInterrupt):
        list(run_together(jobs(base, tmp_path / "many", [{"ratio": 0.1}, {"ratio": 0.2}]), Interrupting("writing")))
    assert names(tmp_path / "many") == []
