"""What `crdiff publish` finds out before it does anything, where a process would be too coarse."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import BakeError, CrdiffError, HubError, VerifyError
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.hub import bases, repository
from crdiff_export.hub.bases import Looked
from crdiff_export.hub.repository import Found, RemoteFile, Repository
from crdiff_export.progress import Progress, Silent
from crdiff_export.publish.plan_file import Entry
from crdiff_export.publish.run import Outcome, exit_code
from crdiff_export.publish.worklist import Item, PublishRequest, Survey, survey
from tests.support import makers
from tests.support.publishing import checkpoint, plan

HUB, VERIFY, BAKE = HubError("no", "Wait."), VerifyError("no", "Wait."), BakeError("no", "Wait.")


@pytest.fixture
def base(here: Path) -> Path:
    path = here / "base.safetensors"
    path.write_bytes(checkpoint())
    return path


class Watched:
    """How often somebody was asked to watch, and what it was for."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    @contextmanager
    def __call__(self) -> Iterator[Progress]:
        outer = self

        class Noting(Silent):
            def stage(self, title: str, size: int, unit: str = "bytes") -> None:
                outer.stages.append(title)

        yield Noting()


def surveyed(text: str, watched: Watched | None = None, **request: Any) -> Survey:
    Path("plan.toml").write_text(text)
    return survey(PublishRequest(Path("plan.toml"), Path(), **request), watched or Watched())


def made(base: Path, size: str, output: str, **more: Any) -> Path:
    given = {"ratio": 0.3, "given": "in the plan file", **more}
    baked = export(ExportRequest(str(base), Size.parse(size), Path(output), **given))
    return baked.written.path


def on_the_hub(monkeypatch: pytest.MonkeyPatch, repo: str, files: Sequence[Path], root: Path) -> None:
    """Let a repository hold these files, without a Hub."""
    names = {path.relative_to(root).as_posix(): path for path in files}

    def read(asked: str, revision: str | None = None) -> Repository:
        assert asked == repo
        return Repository(repo, "c" * 40, {name: RemoteFile(name, 1, "0" * 64, "") for name in names})

    def baked(there: Repository, paths: Sequence[str]) -> dict[str, Found]:
        found = {name: makers.metadata_of(names[name]) for name in paths if name.endswith(".safetensors")}
        return {name: Found(Stamp.from_metadata(said, name)) for name, said in found.items() if "crdiff.schema" in said}

    monkeypatch.setattr(repository, "read", read)
    monkeypatch.setattr(repository, "baked", baked)


PLAN = 'repo = "tester/out"\n[[base]]\nbase = "{}"\n[[base.variant]]\nsize = "48"\nratio = 0.3\nname = "{}"\n'


def test_a_base_is_hashed_only_where_it_matters(base: Path) -> None:
    text = plan("48x48", "96x64", "96x96", base=base.name)
    watched = Watched()
    assert [item.action for item in surveyed(text, watched, push=False).items] == ["make"] * 3
    assert watched.stages == []
    for size in ("48x48", "96x64"):
        export(ExportRequest(str(base), Size.parse(size), Path(f"{size}.safetensors")))
    assert [item.action for item in surveyed(text, watched, push=False).items] == ["skip", "skip", "make"]
    assert watched.stages == ["hashing"]


def test_a_base_is_looked_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    look = bases.look

    def noted(name: str, variant: str | None = None) -> Looked:
        looks.append(name)
        return look(name, variant)

    monkeypatch.setattr(bases, "look", noted)
    text = (
        plan("48x48", "96x64", base=base.name) + f'[[base]]\nbase = "{base}"\nname = "x.safetensors"\nsizes = ["96"]\n'
    )
    found = surveyed(text, push=False)
    assert looks == [str(base)]
    assert [len(reading.items) for reading in found.readings] == [3]
    text += (
        f'dtype = "fp32"\n[[base]]\nbase = "{base}"\nallow_nonfinite = true\nname = "y.safetensors"\nsizes = ["96"]\n'
    )
    found = surveyed(text, push=False)
    assert [len(reading.items) for reading in found.readings] == [2, 1, 1]
    assert [item.entry.line for item in found.items] == sorted(item.entry.line or 0 for item in found.items)


def test_a_base_whose_hash_nobody_knows_is_made_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(base, "48", "x.safetensors")
    (item,) = surveyed(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("skip", "unchanged")
    look = bases.look

    def elsewhere(name: str, variant: str | None = None) -> Looked:
        found = look(name, variant)
        files = tuple(replace(file, info=None) for file in found.checkpoint.files)
        return replace(found, checkpoint=replace(found.checkpoint, files=files))

    monkeypatch.setattr(bases, "look", elsewhere)
    (item,) = surveyed(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("make", "changed: source.hash_sha256")
    made(base, "48", "x.safetensors", hashing=False, force=True)
    (item,) = surveyed(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("make", "its base's hash is not known")
    assert item.digest is None


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (None, "unchanged"),
        ("diffusion_pytorch_model-00002-of-00003.safetensors", "incomplete"),
        ("diffusion_pytorch_model.safetensors.index.json", "incomplete"),
        ("config.json", "incomplete"),
    ],
    ids=["nothing", "a shard", "the index", "another file"],
)
def test_what_is_there_in_part_is_made_again(
    lost: str | None, reason: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = makers.write_shards(here / "base/unet", makers.tiny("demo.diffusers-unet"), 3)
    (index.parent / "config.json").write_text("{}")
    (here / "out").mkdir()
    output = made(here / "base", "48", "out/x")
    files = [path for path in output.rglob("*") if path.is_file() and path.name != lost]
    assert len(files) == (5 if lost is None else 4)
    on_the_hub(monkeypatch, "tester/out", files, Path("out"))
    (item,) = surveyed(PLAN.format("base", "x")).items
    assert (item.action, item.reason) == ("skip" if lost is None else "make", reason)


@pytest.mark.parametrize(
    ("kind", "name", "message", "hint"),
    [
        ("file", "x", "x: the output is a safetensors file", "Name it x.safetensors."),
        ("folder", "x.safetensors", "x.safetensors: the base is a folder, and so is the output", "Name it x."),
    ],
)
def test_a_name_is_checked_when_the_headers_tell_what_a_base_is(
    kind: str, name: str, message: str, hint: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is fetched."""
    (base.parent / "folder/unet").mkdir(parents=True)
    makers.write(base.parent / "folder/unet/diffusion_pytorch_model.safetensors", makers.tiny("demo.diffusers-unet"))
    found = bases.look(str(base if kind == "file" else base.parent / "folder"))
    monkeypatch.setattr(bases, "look", lambda *_: found)
    (item,) = surveyed(PLAN.format("org/name", name), push=False).items
    assert item.error
    assert (item.action, item.error.message, item.error.hint) == ("fail", message, hint)
    (item,) = surveyed(PLAN.format("org/name", "x" if kind == "folder" else "x.safetensors"), push=False).items
    assert item.action == "make"
    text = 'repo = "tester/out"\n[[base]]\nbase = "org/name"\nsizes = ["48"]\n'
    (item,) = surveyed(text, push=False).items
    assert (item.action, item.path) == ("make", f"name-crdiff-48x48{'' if kind == 'folder' else '.safetensors'}")
    assert str(item.target) == item.path


@pytest.mark.parametrize(
    ("name", "held", "reason"),
    [
        ("x.safetensors", b"not a checkpoint", "not made by crdiff, and so not replaced"),
        ("x.safetensors", checkpoint(2), "not made by crdiff, and so not replaced"),
        ("base.safetensors", None, "not made by crdiff, and so not replaced"),
    ],
    ids=["a text", "another checkpoint", "the base itself"],
)
def test_what_cannot_be_written(name: str, held: bytes | None, reason: str, base: Path) -> None:
    if held is not None:
        Path(name).write_bytes(held)
    (item,) = surveyed(PLAN.format(base.name, name), push=False).items
    assert item.action == "fail"
    assert item.reason.endswith(reason)
    assert item.error
    assert item.error.hint
    assert base.read_bytes() == checkpoint()


@pytest.mark.parametrize(
    ("errors", "tagged", "code"),
    [
        ([], [], 0),
        ([None, None], ["c" * 40], 0),
        ([HUB, None], [], 4),
        ([HUB, HUB], [HUB], 4),
        ([None], [HUB], 4),
        ([HUB, BAKE], [], 1),
        ([BAKE, None], [], 1),
        ([VERIFY], [], 1),
        ([BAKE], [HUB], 1),
    ],
)
def test_the_exit_code(errors: list[CrdiffError | None], tagged: list[str | CrdiffError], code: int) -> None:
    entry = Entry("base", Size(64, 64), "x.safetensors", default_name=False)
    item = Item(entry, ExportRequest("base", entry.size), entry.path, Path(entry.path))
    assert exit_code([Outcome(item, "failed", error=error) for error in errors], tagged) == code
