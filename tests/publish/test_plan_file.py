"""Plan files: what one asks for, and that all of its problems are reported at once, each with its line."""

import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdiff_export.errors import PlanFileError
from crdiff_export.export import ExportRequest
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.hub import bases
from crdiff_export.models import families, recipe_files
from crdiff_export.models.families import by_id, table_of
from crdiff_export.publish.plan_file import PlanEntry, PlanFile, load, parse
from crdiff_export.publish.plan_keys import TABLES
from crdiff_export.sizes import Size
from tests.support.messages import golden

PLAN = """\
# what holds for every base
repo = "my-org/sdxl-crdiff"
name = "{base}-{size}.safetensors"
sizes = ["512", "400x560", "2048"]
private = true
tag = "v1"

[[base]]
base = "sdxl"
dtype = "fp16"
recipe = "my-sdxl.toml"
targets = ["attn", "ff"]

[[base]]
base = "hf://org/other/some/model.safetensors"
sizes = ["768"]
repo = "my-org/other"
revision = "fp16-{width}"
base_model = "org/other"

[[base.variant]]
size = "640x1536"
ratios = { down = 0.2, mid = 0.6, up = 0.4 }
poa_weight = 1.3
name = "tall/{base}-{height}.safetensors"
"""
BASE = '[[base]]\nbase = "sdxl"\nsizes = ["512"]\n'


@pytest.fixture
def folder(here: Path, tmp_path: Path) -> Path:
    """The plan file's folder, which is not the current one; what stands in either has its name."""
    plans = tmp_path / "plans"
    plans.mkdir()
    for alias in ("sdxl", "sd15"):
        (plans / f"my-{alias}.toml").write_bytes((recipe_files.builtin_path() / f"{alias}.toml").read_bytes())
    (plans / "models").mkdir()
    for path in ("plans/beside.safetensors", "plans/both.ckpt", "here/both.ckpt", "here/current.safetensors"):
        (tmp_path / path).touch()
    return plans


def entries(text: str, folder: Path = Path("/nowhere")) -> tuple[PlanEntry, ...]:
    return parse(text, "plan.toml", folder).entries


def wanted(base: str, size: Size, *, path: str, **values: Any) -> PlanEntry:
    """An entry, of which `values` are fields, or those of its export."""
    own = {field.name: values.pop(field.name) for field in fields(PlanEntry) if field.name in values}
    return PlanEntry(ExportRequest(base, size, force=True, given="in the plan file", **values), path, **own)


def problems(text: str, folder: Path = Path("/nowhere")) -> list[tuple[str, str]]:
    """The message, without the file's name, and the hint of each."""
    with pytest.raises(PlanFileError) as error:
        parse(text, "plan.toml", folder)
    found = [(problem.message, problem.hint) for problem in error.value.problems]
    for message, hint in found:
        check(message, hint)
    return [(message.removeprefix("plan.toml:"), hint) for message, hint in found]


def check(message: str, hint: str) -> None:
    for text in (message, hint):
        assert text.isprintable()
        assert len(text) <= 1000
    assert message.startswith("plan.toml:")
    assert hint[0].isupper() or hint[0] in "`0123456789"
    assert hint[-1] in ".?"


def only(text: str, folder: Path = Path("/nowhere")) -> tuple[str, str]:
    (problem,) = problems(text, folder)
    return problem


# --- what a plan says ---


def test_a_plan_has_an_entry_for_each_base_and_size(folder: Path) -> None:
    made = parse(PLAN, "plan.toml", folder)
    assert made.name == "plan.toml"
    one: dict[str, Any] = {
        "base": "sdxl", "repo": "my-org/sdxl-crdiff", "tag": "v1", "private": True, "dtype": "fp16",
        "recipe": folder / "my-sdxl.toml", "targets": ("attn", "ff"), "line": 4,
    }  # fmt: skip
    two: dict[str, Any] = {
        "base": "hf://org/other/some/model.safetensors", "repo": "my-org/other", "tag": "v1", "private": True,
        "base_model": "org/other",
    }  # fmt: skip
    tall: dict[str, Any] = {"ratios": {"down": 0.2, "mid": 0.6, "up": 0.4}, "poa_weight": 1.3, "line": 22}
    assert made.entries == (
        wanted(size=Size(512, 512), path="sdxl-512x512.safetensors", **one),
        wanted(size=Size(400, 560), path="sdxl-400x560.safetensors", **one),
        wanted(size=Size(2048, 2048), path="sdxl-2048x2048.safetensors", **one),
        wanted(size=Size(768, 768), path="model-768x768.safetensors", revision="fp16-768", line=16, **two),
        wanted(size=Size(640, 1536), path="tall/model-1536.safetensors", revision="fp16-640", **tall, **two),
    )


def test_little_is_enough() -> None:
    path = "sdxl-crdiff-512x512.safetensors"
    entry = wanted("sdxl", Size(512, 512), path=path, default_name=True, line=3)
    assert entries(BASE) == (entry,)
    assert str(entry) == "512x512 of sdxl"
    assert entries('base = [{ base = "sdxl", sizes = ["512"] }]')[0].path == entry.path


def test_every_key_can_be_given(folder: Path) -> None:
    shared = (
        'repo = "o/n"\nname = "a-{size}{dtype}"\nrevision = "r"\ntag = "t"\nprivate = false\ndtype = "bf16"\n'
        'weights = "ema"\nrecipe = "my-sd15.toml"\ntargets = ["ff"]\nallow_nonfinite = true\n'
        'criterion = "wanda:compare=row"\ncalibration = "own.safetensors"\n'
        'family = "own.toml"\nnative = "512"\n'
    )
    (folder / "own.safetensors").touch()
    (folder / "own.toml").write_text(table_of(by_id("sd15")).replace('"sd15"', '"own"'))
    base = 'base = "models"\n'
    variant = 'size = "64"\nratio = 0.5\nratios = { up = 0 }\npoa_weight = 2\n'
    plans = {
        "the plan": f'{shared}[[base]]\n{base}base_model = "a/b"\n[[base.variant]]\n{variant}',
        "[[base]]": f'[[base]]\n{shared}{base}base_model = "a/b"\n[[base.variant]]\n{variant}',
        "[[base.variant]]": f'[[base]]\n{base}base_model = "a/b"\n[[base.variant]]\n{shared}{variant}',
    }
    for text in plans.values():
        (entry,) = entries(text, folder)
        assert entry == wanted(
            str(folder / "models"), Size(64, 64), path="a-64x64bf16", repo="o/n", revision="r", tag="t", private=False,
            base_model="a/b", line=entry.line, dtype="bf16", variant="ema", recipe=folder / "my-sd15.toml", ratio=0.5,
            ratios={"up": 0.0}, poa_weight=2.0, targets=("ff",), allow_nonfinite=True, criterion="wanda:compare=row",
            calibration=folder / "own.safetensors", family=folder / "own.toml", native=Size(512, 512),
        )  # fmt: skip


def test_the_innermost_wins() -> None:
    text = 'tag = "a"\nrepo = "o/n"\n[[base]]\nbase = "sdxl"\nsizes = ["64"]\n[[base.variant]]\nsize = "128"\n'
    assert [entry.tag for entry in entries(text + 'tag = "c"')] == ["a", "c"]
    assert [entry.tag for entry in entries(text.replace("[[base]]", '[[base]]\ntag = "b"') + 'tag = "c"')] == ["b", "c"]


def test_variants_of_a_base_come_besides_the_sizes_for_all() -> None:
    text = 'sizes = ["64", "128"]\n[[base]]\nbase = "sdxl"\n[[base.variant]]\nsize = "96"\n'
    assert [str(entry.request.size) for entry in entries(text)] == ["64x64", "128x128", "96x96"]
    assert [str(entry.request.size) for entry in entries(text.split("\n", 1)[1])] == ["96x96"]


def test_a_pack_stands_behind_the_sizes_that_it_has() -> None:
    text = (
        'repo = "o/n"\ntag = "v1"\npack = "packs/{base}.crdiff"\n' + BASE + '[[base.variant]]\nsize = "64"\nratio = 0.5'
    )
    *files, pack = entries(text)
    assert [(str(entry), entry.pack) for entry in files] == [("512x512 of sdxl", ()), ("64x64 of sdxl", ())]
    assert (str(pack), pack.path, pack.repo, pack.tag, pack.line) == (
        "the pack of sdxl", "packs/sdxl.crdiff", "o/n", "v1", 4,
    )  # fmt: skip
    assert pack.pack == tuple(entry.request for entry in files)
    (alone,) = entries(f"{BASE}files = false\npack = 'a.crdiff'")
    assert [request.size for request in alone.pack] == [Size(512, 512)]
    assert kept('repo = "o/n"\nrevision = "a"\npack = "a.crdiff"\nfiles = false\n' + BASE) == ["a.crdiff"]


def test_a_pack_belongs_to_the_branch_of_its_base() -> None:
    """Variants may go elsewhere, one by one."""
    text = f'{BASE}repo = "o/n"\npack = "a.crdiff"\n[[base.variant]]\nsize = "64"\nrepo = "o/{{size}}"'
    assert [entry.repo for entry in entries(text)] == ["o/n", "o/64x64", "o/n"]


def test_a_calibration_of_another_size_is_not_for_a_pack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "seen.safetensors").touch()
    opened = SimpleNamespace(size=Size(512, 512))
    monkeypatch.setattr("crdiff_export.prune.criterion_choice.Calibration.open", lambda path: opened)
    text = f'pack = "a.crdiff"\ncriterion = "wanda"\ncalibration = "seen.safetensors"\n{BASE}'
    assert len(entries(text, folder)) == 2
    message, _ = only(text.replace('["512"]', '["512",\n"64"]'), folder)
    assert message == "7: calibration was made at 512x512, and the pack would have 64x64 by it"


def test_braces_can_be_written() -> None:
    (entry,) = entries('name = "{{{base}}}_{width}.{height}"\n' + BASE.replace("sdxl", "org/x"))
    assert entry.path == "{x}_512.512"


BASES = {
    "alias": ("sdxl", "sdxl", "sdxl"),
    "demo": ("demo", "demo", "demo"),
    "hub id": ("org/Some.Model-1.0", "org/Some.Model-1.0", "Some.Model-1.0"),
    "hub id and revision": ("org/name@refs/pr/1", "org/name@refs/pr/1", "name"),
    "hub place": ("hf://org/name", "hf://org/name", "name"),
    "hub place and revision": ("hf://org/name@refs/pr/1/", "hf://org/name@refs/pr/1/", "name"),
    "hub file": ("hf://org/name@v1/a/b.v2.safetensors", "hf://org/name@v1/a/b.v2.safetensors", "b.v2"),
    "beside the plan": ("beside.safetensors", "{plans}/beside.safetensors", "beside"),
    "in the current folder": ("current.safetensors", "{here}/current.safetensors", "current"),
    "in both": ("both.ckpt", "{plans}/both.ckpt", "both"),
    "above": ("../here/both.ckpt", "{plans}/../here/both.ckpt", "both"),
    "absolute": ("{here}/both.ckpt", "{here}/both.ckpt", "both"),
    "folder": ("models", "{plans}/models", "models"),
    "folder that looks like an id": ("models/.", "{plans}/models", "models"),
    "the plan's folder": (".", "{plans}", "plans"),
}


@pytest.mark.parametrize(("text", "base", "short"), BASES.values(), ids=BASES)
def test_a_base_is_found_and_named(text: str, base: str, short: str, folder: Path) -> None:
    places = {"plans": folder, "here": folder.parent / "here"}
    written = text.format(**places)
    (entry,) = entries(f'repo = "o/n"\ntag = "{{base}}"\n[[base]]\nbase = \'{written}\'\nsizes = ["512"]', folder)
    found, expected = Path(entry.request.base), base.format(**places)
    assert entry.tag == short
    assert entry.request.base == (str(Path(expected)) if found.exists() else expected)
    assert found.exists() == (bases.hub_uri(entry.request.base) is None and entry.request.base != "demo")
    assert entry.path == f"{short}-crdiff-512x512{'' if found.is_dir() else '.safetensors'}"
    if found.is_file():
        assert Checkpoint(found, "file", ()).stem == short


@pytest.mark.skipif(os.name != "posix", reason="asks for a home as POSIX has it")
def test_a_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (entry,) = entries('[[base]]\nbase = "~/models"\nsizes = ["64"]\nrecipe = "~/my-sd15.toml"')
    assert (entry.request.base, entry.request.recipe) == (str(folder / "models"), folder / "my-sd15.toml")


def test_an_index_of_shards_is_a_folder_to_be(folder: Path) -> None:
    (folder / "x.safetensors.index.json").touch()
    (entry,) = entries(BASE.replace("sdxl", "x.safetensors.index.json"), folder)
    assert (entry.path, entry.default_name) == ("x-crdiff-512x512", True)


# --- where results are kept ---


def kept(text: str) -> list[str]:
    made = parse(text, "plan.toml", Path())
    found = [made.local_path(entry) for entry in made.entries]
    assert all(isinstance(path, PurePosixPath) for path in found)
    return [str(path) for path in found]


def test_results_for_one_branch_are_kept_at_their_paths() -> None:
    text = 'name = "a/{base}"\nsizes = ["512"]\n[[base]]\nbase = "o/x"\n[[base]]\nbase = "o/y"\n'
    assert kept(text) == ["a/x", "a/y"]
    assert kept('repo = "o/n"\n' + text) == ["a/x", "a/y"]
    assert kept('repo = "o/n"\n' + text + 'revision = "main"') == ["a/x", "a/y"]


def test_results_for_several_branches_are_kept_apart() -> None:
    text = 'name = "m"\nsizes = ["512"]\n[[base]]\nbase = "o/x"\nrepo = "o/{base}"\n[[base]]\nbase = "o/y"\n'
    assert kept(text + 'repo = "o/y"') == ["o/x/m", "o/y/m"]
    assert kept(text + 'repo = "o/x"\nrevision = "a/b"') == ["o/x/main/m", "o/x/a/b/m"]
    assert kept(text) == ["o/x/m", "m"]


# --- what is wrong ---

# What is wrong, by the line and the key that it is about.
NOWHERE = Path("/nowhere")
WRONG = {
    "one name for all": ('name = "x"\nsizes = ["64", "128"]\n[[base]]\nbase = "o/n"', "2: 128x128 of n would be x"),
    "no such criterion": (f'criterion = "taste"\n{BASE}', "1: criterion: "),
    "an option of none": (f'criterion = "wanda:x=1"\n{BASE}', "1: criterion: "),
    "a calibration is missing": (f'criterion = "wanda"\n{BASE}', "1: criterion: wanda needs a calibration"),
    "empty": ("", " base"),
    "one table": (BASE.replace("[[base]]", "[base]"), "1: base"),
    "base alone": ('base = "sdxl"', "1: base"),
    "no tables": ("base = []", "1: base"),
    "no table": ("base = [\n1]", "2: base[0]"),
    "unknown": (f"tagg = 1\n{BASE}", "1: tagg"),
    "unprintable": (f'"\\u001b" = 1\n{BASE}', r"1: '\x1b'"),
    "inner key": (f"ratio = 0.2\n{BASE}", "1: ratio"),
    "no base": ('[[base]]\nsizes = ["64"]', "1: base"),
    "no sizes": ('[[base]]\nbase = "sdxl"', "1: nothing"),
    "sizes empty": ('sizes = []\n[[base]]\nbase = "sdxl"', "1: sizes"),
    "sizes text": ('sizes = "6"\n[[base]]\nbase = "sdxl"', "1: sizes"),
    "sizes number": (BASE.replace('"512"', "512"), "3: sizes[0]"),
    "size": (BASE.replace('"]', '",\n"abc"]'), "4: sizes[1]"),
    "size again": (BASE.replace('"]', '",\n"512x512"]'), "4: sizes[1]"),
    "off the grid": (BASE.replace("512", "511"), "3: 511x511"),
    "branch of nothing": (f'revision = "v"\n{BASE}', "1: revision"),
    "hub ckpt": (f'name = "a.PT"\n{BASE}'.replace("sdxl", "o/n"), "1: name"),
    "files without a pack": (f"files = false\n{BASE}", "1: files is false"),
    "a pack of one size": (f'pack = "{{base}}-{{size}}.crdiff"\n{BASE}', "1: pack has {size}"),
    "a pack in several repositories": (f'repo = "o/{{width}}"\npack = "a.crdiff"\n{BASE}', "1: repo has {width}"),
    "a pack on several branches": (
        f'repo = "o/n"\nrevision = "{{size}}"\npack = "a.crdiff"\n{BASE}', "2: revision has {size}",
    ),
    "a pack of moved weights": (
        f'pack = "a.crdiff"\ncriterion = "obs"\ncalibration = "{__file__}"\n{BASE}', "2: criterion obs moves",
    ),
    "a size twice in a pack": (
        f'pack = "a.crdiff"\n{BASE}[[base.variant]]\nsize = "512"\nname = "b.safetensors"',
        "6: the pack would have 512x512 twice (line 4)",
    ),
    "two dtypes in a pack": (
        f'pack = "a.crdiff"\n{BASE}[[base.variant]]\nsize = "64"\ndtype = "fp16"', "6: dtype is not the same",
    ),
    "one pack of two bases": (
        f'pack = "a.crdiff"\n{BASE}{BASE.replace("sdxl", "sd15")}',
        "5: the pack of sd15 would be a.crdiff, and so would the pack of sdxl (line 2)",
    ),
    "one pack of two bases of one name": (
        f'files = false\npack = "{{base}}.crdiff"\n{BASE.replace("sdxl", "o/x")}{BASE.replace("sdxl", "p/x")}',
        "6: the pack of x would be x.crdiff",
    ),
    "a pack of a variant": (f'{BASE}[[base.variant]]\nsize = "64"\npack = "a.crdiff"', "6: pack is not a key"),
    "a group": (f'{BASE}[[base.variant]]\nsize = "64"\nratios.block = 0'.replace("sdxl", "o/n"), "6: ratios.block"),
}  # fmt: skip
WRONG_BASES = [
    "sdlx", "a.safetensors", "org/a.CKPT", "./sdxl", "../sdxl", "/no/sdxl", "~noone~/x", "a/b/c", "a.b", "a\\\\b",
    "https://me:hf_secret@h/x", "hf://org", " ", "a\\u0000b",
]  # fmt: skip
# What stands behind BASE, by what is wrong in it.
ADDED = {
    "4: size": ['size = "64"', "[[base.variant]]\nratio = 0"],
    "4: variant": ['variant = "fp16"'],
    "5: size": ['[[base.variant]]\nsize = "x"'],
    "4: dtype": ['dtype = "fp61"', "dtype = 16"],
    "4: targets[0]": ['targets = ["at"]'],
    "4: targets[1]": ['targets = ["ff", "ff"]'],
    "4: targets": ['targets = ["attn2"]'],
    "5: private": ['repo = "o/n"\nprivate = "yes"'],
    "4: allow_nonfinite": ["allow_nonfinite = 1"],
    "4: family": ["family = 1", 'family = "nowhere.toml"'],
    "4: native": ["native = 1", 'native = "big"'],
    "4: base_model": ['base_model = "x"'],
    "4: weights": ['weights = ""'],
    "4: repo": ['repo = "n"', 'repo = "https://hf.co/o/n"', 'repo = "o/a..b"', 'repo = "o/{size}-"'],
    "5: revision": ['repo = "o/n"\nrevision = "a b"', 'repo = "o/n"\nrevision = "a/../b"'],
    "5: tag": ['repo = "o/n"\ntag = "-v"'],
    "4: tag": ['tag = "v"'],
    "4: private": ["private = true"],
    "4: name": [
        'name = "NUL.safetensors"', 'name = "a/con"', 'name = "Com1.x.safetensors"', 'name = ".safetensors"',
        'name = "../a"', 'name = "/a"', "name = 'a\\b'", 'name = "c:/a"', 'name = "a/"', 'name = "a//b"',
        'name = "a/./b"', f'name = "{"a" * 201}"', 'name = "a.ckpt"', 'name = "a"', 'name = "{sice}"',
        'name = "{width:04}"', 'name = "a}"', 'name = "{dtype}"',
    ],
    "4: pack": [
        "pack = 1", 'pack = "a.safetensors"', 'pack = ".crdiff"', 'pack = "a/../b.crdiff"', 'pack = "{dtype}.crdiff"',
        'pack = "{basis}.crdiff"', 'pack = "con.crdiff"', 'pack = "{base}{.crdiff"',
    ],
    "5: files": ['pack = "a.crdiff"\nfiles = "no"'],
    "4: recipe": ['recipe = "no.toml"', f'recipe = "{"a" * 300}"'],
    "6: ratio": ['[[base.variant]]\nsize = "64"\nratio = 1'],
    "6: poa_weight": ['[[base.variant]]\nsize = "64"\npoa_weight = 11'],
    "6: ratios": ['[[base.variant]]\nsize = "64"\nratios = 0.3', '[[base.variant]]\nsize = "64"\nratios = {}'],
    "6: ratios.up": ['[[base.variant]]\nsize = "64"\nratios.up = "a"'],
    "8: ratios.mid": ['[[base.variant]]\nsize = "64"\n[base.variant.ratios]\nup = 0\nmid = -1'],
    "6: ratios.upp": ['[[base.variant]]\nsize = "64"\nratios.upp = 0'],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *(pytest.param(*wrong, id=name) for name, wrong in WRONG.items()),
        *((BASE.replace("sdxl", base), "2: base") for base in WRONG_BASES),
        *((BASE + added, key) for key, texts in ADDED.items() for added in texts),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_said_with_its_line(text: str, key: str) -> None:
    message, hint = only(text, NOWHERE)
    assert message.startswith(key)
    assert "hf_secret" not in message
    golden(f"plan.toml:{message}\n{hint}")


def test_what_is_no_toml_is_said_in_the_words_of_its_reader() -> None:
    for text, start in (
        ("a = 1\nb = \n", "2: "), ('a = "', " "), (f"a = {'9' * 5000}", " "), (f"a = {'[' * 100_000}", " "),
    ):  # fmt: skip
        message, hint = only(text, NOWHERE)
        assert (message.startswith(start), "TOML" in hint) == (True, True)


def test_all_is_said_at_once_and_by_line(folder: Path) -> None:
    text = """\
sizes = ["512", "511", "x",
  7]
name = "{nmae}-{"
privat = true
[[base]]
base = "sdxl"
dtype = "fp8"
targets = ["attn2", "mlp"]
[[base]]
base = "sd14"
recipe = "no.toml"
name = "{dtype}.ckpt"
[[base]]
base = "sd15"
repo = "-"
recipe = "my-sdxl.toml"
name = "../{size}"
[[base.variant]]
ratio = 7
[base.variant.ratios]
upp = 0.5
down = 5
[[base.variant]]
size = "0"
poa_weight = -1
recipe = "my-sd15.toml"
[[bases]]
"""
    found = problems(text, folder)
    assert [" ".join(problem.split()[:2]).rstrip(":") for problem, _ in found] == [
        "1: sizes[2]", "1: 511x511", "2: sizes[3]", "3: name", "3: name", "4: privat", "7: dtype", "8: targets[1]",
        "8: targets", "10: base", "11: recipe", "12: name", "15: repo", "16: recipe", "17: name", "18: size",
        "19: ratio", "22: ratios.down", "24: size", "25: poa_weight", "27: bases",
    ]  # fmt: skip
    golden("\n".join(f"plan.toml:{problem}\n{hint}" for problem, hint in found))


def test_the_error_names_the_file_and_counts() -> None:
    with pytest.raises(PlanFileError, match=r"^plan.toml: 2 problems\n"):
        parse("a = 1\nb = 2\n" + BASE, "plan.toml", NOWHERE)
    with pytest.raises(PlanFileError, match=r"^pl\\nan.toml: one problem\n"):
        parse("", "pl\nan.toml", NOWHERE)


def test_what_is_said_for_all_is_wrong_once() -> None:
    text = 'dtype = "x"\nrepo = "o"\nsizes = ["511", "1024"]\n[[base]]\nbase = "sdxl"\n[[base]]\nbase = "sd15"\n'
    assert [problem for problem, _ in problems(text)] == [
        "1: dtype is 'x', no dtype",
        "2: repo is 'o', must be ORG/NAME",
        "3: 511x511 does not fit SDXL's latent grid (multiples of 8)",
        "3: 511x511 does not fit SD1.5's latent grid (multiples of 8)",
    ]


# --- recipes ---


def recipe(folder: Path, text: str) -> list[str]:
    (folder / "own.toml").write_text(text)
    plan = 'recipe = "own.toml"\n[[base]]\nbase = "org/any"\nsizes = ["512", "408"]\ntargets = ["attn2"]\n'
    plan += '[[base.variant]]\nsize = "64"\nratios = { blocks = 0.1 }\n'
    return [problem for problem, _ in problems(plan, folder)]


def test_a_recipe_tells_the_family(folder: Path) -> None:
    text = (recipe_files.builtin_path() / "flux-dev.toml").read_text("utf-8")
    off_grid = "4: 408x408 does not fit FLUX.1 dev's latent grid (multiples of 16)"
    assert recipe(folder, text) == [off_grid, "5: targets has attn2, which FLUX.1 dev does not have"]
    assert recipe(folder, text.replace("blocks", "block")) == [
        "1: recipe: flux-dev.toml: ratios.block is for a group that this model does not have".replace(
            "flux-dev", "own"
        ),
        off_grid,
        "5: targets has attn2, which FLUX.1 dev does not have",
    ]
    unknown = "1: recipe: no model family is called 'flux-def'"
    assert recipe(folder, text.replace('"flux-dev"', '"flux-def"')) == [unknown]
    assert recipe(folder, text.partition("[[variant]]")[0])[0] == "1: recipe: own.toml has no variant"
    assert recipe(folder, "family = 1") == ["1: recipe: own.toml: family is not a key of a recipe"]


# --- results that meet ---


def meetings(one: str, other: str, start: str = "") -> list[str]:
    """What is wrong with two bases, the size of the first on line 3 and that of the second on line 13."""
    tables = [f'[[base]]\nbase = "org/{name}"\nsizes = ["64"]\n{keys}' for name, keys in (("a", one), ("b", other))]
    text = f"{tables[0]:\n<{len(tables[0]) + 10 - tables[0].count(chr(10))}}{tables[1]}{start}"
    try:
        parse(text, "plan.toml", NOWHERE)
    except PlanFileError as error:
        return [problem.message.removeprefix("plan.toml:13: 64x64 of b would be ") for problem in error.problems]
    return []


@pytest.mark.parametrize("shared", ["", 'name = "{base}-{size}"\n', 'name = "{base}-{size}.safetensors"\n'])
def test_two_bases_of_one_name_are_told_what_helps(shared: str) -> None:
    text = f'{shared}sizes = ["64"]\n[[base]]\nbase = "org/a"\n[[base]]\nbase = "other/a"\n'
    ((_, hint),) = problems(text)
    match = re.search("`(.+)`", hint)
    assert match
    assert len(entries(text + match[1])) == 2, "the hint as it stands is right"


def test_one_name_for_two_bases_needs_a_placeholder() -> None:
    text = 'name = "x.safetensors"\nsizes = ["64"]\n[[base]]\nbase = "org/a"\n[[base]]\nbase = "org/b"\n'
    ((_, hint),) = problems(text)
    assert "{base}" in hint


def test_a_snapshot_is_called_as_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (entry,) = entries(f'[[base]]\nbase = "{snapshot.as_posix()}"\nsizes = ["64"]\n')
    assert entry.path == "name-crdiff-64x64"


SAME = "and so would 64x64 of a (line 3)"
WITHIN = "within what 64x64 of a (line 3) would be"
MEETINGS = [
    ('name = "x"', 'name = "x"', [f"x, {SAME}"]),
    ('name = "x/Y"', 'name = "X/y"', [f"X/y, {SAME}"]),
    ('name = "\\u00e9"', 'name = "e\\u0301"', [f"e\u0301, {SAME}"]),
    ('name = "x"', 'name = "y"', []),
    ('name = "x"', 'name = "X/y"', [f"X/y, {WITHIN}"]),
    ('name = "x"', 'name = "xy/z"', []),
    ('repo = "o/n"\nname = "x"', 'repo = "O/N"\nname = "x"\nrevision = "main"', [f"x, {SAME}"]),
    ('repo = "o/n"\nname = "x"', 'repo = "o/m"\nname = "x"', []),
    ('repo = "o/n"\nname = "x"', 'repo = "o/n"\nname = "x"\nrevision = "r"', []),
    ('repo = "o/n"\nname = "x"', 'name = "o/n/x"', [f"o/n/x, {SAME}"]),
    ('repo = "o/n"\nrevision = "r"\nname = "s/x"', 'repo = "o/n"\nrevision = "r/s"\nname = "x"', [f"x, {SAME}"]),
    ('name = "b-crdiff-64x64.safetensors"', "", [f"b-crdiff-64x64.safetensors, {SAME}"]),
    ('name = "b-crdiff-64x64"', "", [f"b-crdiff-64x64.safetensors, {SAME}"]),
]


@pytest.mark.parametrize(("one", "other", "found"), MEETINGS)
def test_no_two_results_may_meet(one: str, other: str, found: list[str]) -> None:
    assert meetings(one, other) == found


def test_a_result_within_another_is_found_in_any_order() -> None:
    expected = "plan.toml:3: 64x64 of a would be x/y, within what 64x64 of b (line 13) would be"
    assert meetings('name = "x/y"', 'name = "x"') == [expected]


@pytest.mark.parametrize(("one", "other"), [("private = true", ""), ("private = true", "private = false")])
def test_a_repository_is_private_or_not(one: str, other: str) -> None:
    found = meetings(f'repo = "o/n"\n{one}', f'repo = "O/n"\n{other}')
    assert found == ["plan.toml:13: private is not the same for 64x64 of b and 64x64 of a (line 3), both in O/n"]
    assert meetings(f'repo = "o/n"\n{one}', f'repo = "O/n"\n{one}') == []
    assert meetings(f'repo = "o/n"\n{one}', 'repo = "o/m"') == []


# --- files ---


def unread(path: Path) -> str:
    with pytest.raises(PlanFileError) as error:
        load(path)
    assert not error.value.problems
    assert error.value.hint.endswith((".", "?"))
    return error.value.message


def test_a_file_is_read_with_paths_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "variants.toml"
    path.write_bytes(b"\xef\xbb\xbf" + PLAN.replace("\n", "\r\n").encode())
    assert load(path) == parse(PLAN, "variants.toml", folder)
    monkeypatch.chdir(folder.parent)
    assert load(Path("plans/variants.toml")) == load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    assert unread(path) == f"{path}: no such plan file"
    assert unread(tmp_path) == f"{tmp_path}: a folder, not a plan file"
    path.write_bytes(b'a = "\xe4"')
    assert unread(path) == f"{path}: not UTF-8 at byte 5"
    assert unread(path / "more.toml").startswith(f"{path / 'more.toml'}: ")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert unread(path) == f"{path}: more than 1 MiB, too large for a plan file"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such names")
def test_an_odd_file_name_is_spelt(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError) as error:
        load(tmp_path / "a\x1b.toml")
    assert error.value.message.endswith(r"a\x1b.toml: no such plan file")
    with pytest.raises(PlanFileError):
        load(tmp_path / ("a" * 300))


def test_importing_this_room_is_cheap() -> None:
    code = "import sys, crdiff_export.publish.card; print(*({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    slow = {"torch", "numpy", "numba", "click", "rich", "huggingface_hub", "yaml", "jinja2", "markdown_it"}
    assert not slow & set(loaded)


# --- damaged on purpose ---

HOSTILE = [
    "1", "-1", "0x" + "f" * 4000, "9" * 30, "1e400", "nan", "-inf", "true", "[]", "{}", "[[]]", "[{}]", "[1, 'a']",
    '"\\u0000"', '"\\u001b[31m\\n\\u2028"', '"../.."', '"/"', '"."', '".."', '"~"', '"~~"', "'\\'", '"{"', '"}{"',
    '"{base}"', '"{{}}{size}"', '"hf://"', '"hf://a/b@c/d"', '"https://a"', '"sdxl"', '"sd3-medium"', '"512"', '"64x"',
    '["64", "96x128"]', '["64", "64", 1, []]', '["attn", "ff"]', '["attn", "attn2", 7]', "{ down = 0.1 }", "''",
    "{ '' = 1, blocks = 2 }", "{ a.b.c = [1] }", f'"{"a" * 5000}"', f'"{"../" * 500}"', '"o/n"', '"o/n.git"',
    "1979-05-27", '"""\n[[base]]\n"""', "07:32:00", '"\u00e9\u3000"', '"plan.toml"', '"512\\u00d764"',
    '[{ base = "sdxl", sizes = ["64"], variant = [{ size = "8" }] }]',
]  # fmt: skip
LINES = [
    *PLAN.splitlines(), "[[base]]", "[[base.variant]]", "[base.variant.ratios]", "[base]", "[x.y]", "# {", "up = 0.5",
    *(key.example for keys in TABLES.values() for key in keys.values() if "[[" not in key.example),
]  # fmt: skip
KEY_NAMES = sorted({key for keys in TABLES.values() for key in keys} | {"'\\u001b'", "a.b", "sizes.x", '""', "vairant"})


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anywhere")
    (folder / "my-sdxl.toml").write_bytes((recipe_files.builtin_path() / "sdxl.toml").read_bytes())
    return folder


def damaged(chance: random.Random) -> str:
    text = PLAN.splitlines()
    for _ in range(chance.choice((1, 2, 3, 8))):
        at, other = chance.randrange(len(text)), chance.randrange(len(text))
        key, is_key, value = text[at].partition(" = ")
        text[at] = chance.choice([
            *([f"{key} = {chance.choice(HOSTILE)}"] * 3 if is_key else ()),
            f"{chance.choice(KEY_NAMES)} = {value}",
            f"{chance.choice(LINES)}\n{text[at]}",
            text[other],
            "",
            text[at][: chance.randrange(len(text[at]) + 1)] + chance.choice(("", '"', "\x00", "]", "{", "é")),
        ])  # fmt: skip
    return "\n".join(text)


@settings(max_examples=200)
@given(chance=st.randoms(use_true_random=False))
def test_a_damaged_plan_is_read_or_refused(chance: random.Random, anywhere: Path) -> None:
    try:
        made = parse(damaged(chance), "plan.toml", anywhere)
    except PlanFileError as error:
        found = error.problems
    else:
        check_plan(made)
        return
    assert found
    assert len({problem.message for problem in found}) == len(found)
    for problem in found:
        check(problem.message, problem.hint)


def check_plan(made: PlanFile) -> None:
    places = [made.local_path(entry) for entry in made.entries]
    assert len({str(place).casefold() for place in places}) == len(places) > 0
    for entry, place in zip(made.entries, places, strict=True):
        assert not place.is_absolute()
        assert not {"..", "."} & set(place.parts)
        assert str(place).endswith(entry.path)
        assert entry.line is not None
        if known := recipe_files.by_alias(entry.request.base):
            family = families.by_id(known.family)
            assert entry.request.size.width % family.grid == entry.request.size.height % family.grid == 0
            assert set(entry.request.ratios) <= set(family.groups)
            assert set(entry.request.targets or ()) <= set(family.kinds)
