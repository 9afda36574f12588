"""What `crdiff publish` finds out before it does anything, where a process would be too coarse."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import BakeError, CrdiffError, HubError, PlanFileError, VerifyError
from crdiff_export.hub import remote_headers
from crdiff_export.hub.remote_headers import RemoteBase
from crdiff_export.hub.repository import RemoteFile
from crdiff_export.packs import open_pack
from crdiff_export.progress import Progress, Silent
from crdiff_export.publish.card.snippets import kind, recreate
from crdiff_export.publish.plan_file import PlanEntry
from crdiff_export.publish.run import Outcome, TagResult, exit_code, publish
from crdiff_export.publish.upload import collect
from crdiff_export.publish.variants import card_variants
from crdiff_export.publish.worklist import PublishRequest, WorkItem, Worklist, make_worklist
from crdiff_export.verify import open_baked
from tests.support import makers
from tests.support.messages import raises
from tests.support.publishing import checkpoint, plan
from tests.support.scaled_models import UNET, Scaled

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


def worklist(text: str, watched: Watched | None = None, **request: Any) -> Worklist:
    Path("plan.toml").write_text(text)
    return make_worklist(PublishRequest(Path("plan.toml"), Path(), **request), watched or Watched())


def made(base: Path, size: str, output: str, **more: Any) -> Path:
    given = {"ratio": 0.3, "given": "in the plan file", **more}
    baked = export(ExportRequest(str(base), Size.parse(size), Path(output), **given))
    return baked.written.path


PLAN = 'repo = "tester/out"\n[[base]]\nbase = "{}"\n[[base.variant]]\nsize = "48"\nratio = 0.3\nname = "{}"\n'


def test_a_base_is_hashed_only_where_it_matters(base: Path) -> None:
    text = plan("48x48", "96x64", "96x96", base=base.name)
    watched = Watched()
    assert [item.action for item in worklist(text, watched, push=False).items] == ["make"] * 3
    assert watched.stages == []
    for size in ("48x48", "96x64"):
        export(ExportRequest(str(base), Size.parse(size), Path(f"{size}.safetensors")))
    assert [item.action for item in worklist(text, watched, push=False).items] == ["skip", "skip", "make"]
    assert watched.stages == ["hashing"]
    base.write_bytes(checkpoint(1))
    reasons = [item.reason for item in worklist(text, watched, push=False).items]
    assert reasons == ["changed: source.hash_sha256", "changed: source.hash_sha256", "new"]
    assert watched.stages == ["hashing"] * 2


def test_a_base_whose_hash_nobody_knows_is_made_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(base, "48", "x.safetensors")
    (item,) = worklist(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("skip", "unchanged")
    look = remote_headers.read_headers

    def elsewhere(name: str, variant: str | None = None) -> RemoteBase:
        found = look(name, variant)
        files = tuple(replace(file, info=None) for file in found.checkpoint.files)
        return replace(found, checkpoint=replace(found.checkpoint, files=files))

    monkeypatch.setattr(remote_headers, "read_headers", elsewhere)
    (item,) = worklist(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("make", "changed: source.hash_sha256")
    made(base, "48", "x.safetensors", hashing=False, force=True)
    (item,) = worklist(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("make", "its base's hash is not known")
    assert item.digest is None


def test_scales_are_expected(here: Path) -> None:
    base = Scaled(UNET, "scaled_fp8").write(here / "base.safetensors")
    made(base, "48", "x.safetensors")
    (item,) = worklist(PLAN.format(base.name, "x.safetensors"), push=False).items
    assert (item.action, item.reason) == ("skip", "unchanged")


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
    (item,) = worklist(PLAN.format(base.name, name), push=False).items
    assert item.action == "fail"
    assert item.reason.endswith(reason)
    assert item.error
    assert item.error.hint
    assert base.read_bytes() == checkpoint()


@pytest.mark.parametrize(
    ("errors", "tags", "code"),
    [
        ([], [], 0),
        ([None, None], [None], 0),
        ([HUB, None], [], 4),
        ([HUB, HUB], [HUB], 4),
        ([None], [HUB], 4),
        ([HUB, BAKE], [], 1),
        ([BAKE, None], [], 1),
        ([VERIFY], [], 1),
        ([BAKE], [HUB], 1),
    ],
)
def test_the_exit_code(errors: list[CrdiffError | None], tags: list[CrdiffError | None], code: int) -> None:
    request = ExportRequest("base", Size(64, 64), Path("x.safetensors"))
    item = WorkItem(PlanEntry(request, "x.safetensors"), request, "x.safetensors")
    outcomes = [Outcome(item, "failed", error=error) for error in errors]
    assert exit_code(outcomes, [TagResult("o/n", "v1", error=error) for error in tags]) == code


LAYOUT = """\
layout = "{}"
[[base]]
base = "{}"
pack = "demo.crdiff"
[[base.variant]]
size = "48"
ratio = 0.3
"""


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_another_layout_than_the_base_s(layout: str, here: Path) -> None:
    table = "demo.diffusers-unet" if layout == "original" else "demo.original-unet"
    base = makers.write(here / "base.safetensors", makers.tiny(table))
    text, before = LAYOUT.format(layout, base.name), base.read_bytes()
    work = worklist(text, push=False)
    outcomes = list(publish(work, Silent()))
    assert [outcome.status for outcome in outcomes] == ["written", "written"]
    files = {outcome.item.target.name: outcome.item.target for outcome in outcomes}
    output = files["base-crdiff-48x48.safetensors" if layout == "original" else "base-crdiff-48x48"]
    plain = made(base, "48", "plain" if layout == "diffusers" else "plain.safetensors", layout=layout)
    assert open_baked(output).stamp == open_baked(plain).stamp
    assert open_pack(files["demo.crdiff"]).common.layout != layout
    assert [(item.action, item.reason) for item in worklist(text, push=False).items] == [("skip", "unchanged")] * 2
    if layout == "diffusers":
        (output / "config.json").unlink()
        assert worklist(text, push=False).items[0].reason == "incomplete"
    changed = worklist(text.replace("0.3", "0.4"), push=False).items
    assert {item.action for item in changed} == {"make"}
    assert base.read_bytes() == before


def test_a_layout_that_is_none(here: Path) -> None:
    with raises(PlanFileError, "plan.toml") as caught:
        worklist(LAYOUT.format("ldm", "demo"))
    assert isinstance(caught.value, PlanFileError)
    assert [problem.message for problem in caught.value.problems if "layout" in problem.message]


@pytest.mark.parametrize("below", ["", "unets/small"])
def test_a_folder_of_a_network_that_was_one_file_is_one_variant(below: str, here: Path) -> None:
    output = export(ExportRequest("demo", Size(96, 64), here / "x", layout="diffusers")).written.path
    files = collect(output, below, Silent())
    remote = {path: RemoteFile(path, file.size, file.sha256, "") for path, file in files.items()}
    (variant,) = card_variants(remote, {path: file.header for path, file in files.items() if file.header})
    assert (variant.path, kind(variant)) == (below, "component")
    assert "--layout diffusers" in recreate(variant)
    assert not recreate(variant).endswith(".safetensors")
