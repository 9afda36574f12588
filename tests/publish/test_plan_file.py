"""Plan files: what the matrix of one is, and that all that is wrong with one is said at once, each with its line."""

import os
import random
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdiff_export.errors import MatrixError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.hub import bases
from crdiff_export.models import families, recipe_files
from crdiff_export.publish.plan_file import Entry, Matrix, load, parse
from crdiff_export.publish.plan_keys import EXAMPLES, KEYS
from crdiff_export.sizes import Size

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


def entries(text: str, folder: Path = Path("/nowhere")) -> tuple[Entry, ...]:
    return parse(text, "plan.toml", folder).entries


def problems(text: str, folder: Path = Path("/nowhere")) -> list[tuple[str, str]]:
    """The message, without the file's name, and the hint of each."""
    with pytest.raises(MatrixError) as error:
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


def test_a_plan_is_a_matrix_of_bases_and_sizes(folder: Path) -> None:
    made = parse(PLAN, "plan.toml", folder)
    assert made.name == "plan.toml"
    one: dict[str, Any] = {
        "base": "sdxl", "repo": "my-org/sdxl-crdiff", "tag": "v1", "private": True, "dtype": "fp16",
        "recipe": folder / "my-sdxl.toml", "targets": ("attn", "ff"), "line": 4, "default_name": False,
    }  # fmt: skip
    two: dict[str, Any] = {
        "base": "hf://org/other/some/model.safetensors", "repo": "my-org/other", "tag": "v1", "private": True,
        "base_model": "org/other", "default_name": False,
    }  # fmt: skip
    tall: dict[str, Any] = {"ratios": {"down": 0.2, "mid": 0.6, "up": 0.4}, "poa_weight": 1.3, "line": 22}
    assert made.entries == (
        Entry(size=Size(512, 512), path="sdxl-512x512.safetensors", **one),
        Entry(size=Size(400, 560), path="sdxl-400x560.safetensors", **one),
        Entry(size=Size(2048, 2048), path="sdxl-2048x2048.safetensors", **one),
        Entry(size=Size(768, 768), path="model-768x768.safetensors", revision="fp16-768", line=16, **two),
        Entry(size=Size(640, 1536), path="tall/model-1536.safetensors", revision="fp16-640", **tall, **two),
    )


def test_little_is_enough() -> None:
    entry = Entry("sdxl", Size(512, 512), "sdxl-crdiff-512x512.safetensors", default_name=True, line=3)
    assert entries(BASE) == (entry,)
    assert str(entry) == "512x512 of sdxl"
    assert entries('base = [{ base = "sdxl", sizes = ["512"] }]')[0].path == entry.path


def test_every_key_can_be_given(folder: Path) -> None:
    shared = (
        'repo = "o/n"\nname = "a-{size}{dtype}"\nrevision = "r"\ntag = "t"\nprivate = false\ndtype = "bf16"\n'
        'weights = "ema"\nrecipe = "my-sd15.toml"\ntargets = ["ff"]\nallow_nonfinite = true\n'
        'criterion = "wanda:compare=row"\ncalibration = "own.safetensors"\n'
    )
    (folder / "own.safetensors").touch()
    base = 'base = "models"\n'
    variant = 'size = "64"\nratio = 0.5\nratios = { up = 0 }\npoa_weight = 2\n'
    plans = {
        "the plan": f'{shared}[[base]]\n{base}base_model = "a/b"\n[[base.variant]]\n{variant}',
        "[[base]]": f'[[base]]\n{shared}{base}base_model = "a/b"\n[[base.variant]]\n{variant}',
        "[[base.variant]]": f'[[base]]\n{base}base_model = "a/b"\n[[base.variant]]\n{shared}{variant}',
    }
    for text in plans.values():
        (entry,) = entries(text, folder)
        assert entry == Entry(
            str(folder / "models"), Size(64, 64), "a-64x64bf16", False, "o/n", "r", "t", False, "a/b", "bf16", "ema",
            folder / "my-sd15.toml", 0.5, {"up": 0.0}, 2.0, ("ff",), True, entry.line, "wanda:compare=row",
            folder / "own.safetensors",
        )  # fmt: skip
    assert set(EXAMPLES) == {key for keys in KEYS.values() for key in keys}


def test_the_innermost_wins() -> None:
    text = 'tag = "a"\nrepo = "o/n"\n[[base]]\nbase = "sdxl"\nsizes = ["64"]\n[[base.variant]]\nsize = "128"\n'
    assert [entry.tag for entry in entries(text)] == ["a", "a"]
    assert [entry.tag for entry in entries(text + 'tag = "c"')] == ["a", "c"]
    assert [entry.tag for entry in entries(text.replace("[[base]]", '[[base]]\ntag = "b"') + 'tag = "c"')] == ["b", "c"]


def test_variants_of_a_base_come_besides_the_sizes_for_all() -> None:
    text = 'sizes = ["64", "128"]\n[[base]]\nbase = "sdxl"\n[[base.variant]]\nsize = "96"\n'
    assert [str(entry.size) for entry in entries(text)] == ["64x64", "128x128", "96x96"]
    assert [str(entry.size) for entry in entries(text.split("\n", 1)[1])] == ["96x96"]


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
    found, expected = Path(entry.base), base.format(**places)
    assert entry.tag == short
    assert entry.base == (str(Path(expected)) if found.exists() else expected)
    assert found.exists() == (bases.remote(entry.base) is None and entry.base != "demo")
    assert entry.path == f"{short}-crdiff-512x512{'' if found.is_dir() else '.safetensors'}"
    if found.is_file():
        assert Checkpoint(found, "file", ()).stem == short


@pytest.mark.skipif(os.name != "posix", reason="asks for a home as POSIX has it")
def test_a_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (entry,) = entries('[[base]]\nbase = "~/models"\nsizes = ["64"]\nrecipe = "~/my-sd15.toml"')
    assert (entry.base, entry.recipe) == (str(folder / "models"), folder / "my-sd15.toml")


def test_an_index_of_shards_is_a_folder_to_be(folder: Path) -> None:
    (folder / "x.safetensors.index.json").touch()
    (entry,) = entries(BASE.replace("sdxl", "x.safetensors.index.json"), folder)
    assert (entry.path, entry.default_name) == ("x-crdiff-512x512", True)


# --- where results are kept ---


def kept(text: str) -> list[str]:
    made = parse(text, "plan.toml", Path())
    found = [made.local(entry) for entry in made.entries]
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


def test_nothing_is_kept_without_a_matrix() -> None:
    assert Matrix("plan.toml", ()).entries == ()


# --- what is wrong ---

NOWHERE = Path("/nowhere")
WRONG = {
    "empty": ("", " base is missing", 'Write [[base]], and below it base = "sdxl".'),
    "syntax": ("a = 1\nb = \n", "2: Invalid value, column 5", "A plan is TOML: one key = value in a line, "),
    "open text": ('a = "', " Unterminated string (at end of document)", "A plan is TOML"),
    "digits": (f"a = {'9' * 5000}", " Exceeds the limit", "A plan is TOML"),
    "depth": (f"a = {'[' * 100_000}", " ", "A plan is TOML"),
    "one table": (BASE.replace("[[base]]", "[base]"), "1: base is a table, must be an array of tables", "Write [["),
    "base alone": ('base = "sdxl"', "1: base is 'sdxl', must be an array of tables", "Write [[base]], and below"),
    "no tables": ("base = []", "1: base is empty", "Write [[base]], and below it"),
    "no table": ("base = [\n1]", "2: base[0] is 1, must be a table", "Write [[base]], and below it"),
    "unknown": (f"tagg = 1\n{BASE}", "1: tagg is not a key of the plan", "Did you mean tag? The keys are: sizes,"),
    "unprintable": (f'"\\u001b" = 1\n{BASE}', r"1: '\x1b' is not a key of the plan", "The keys are: "),
    "inner key": (f"ratio = 0.2\n{BASE}", "1: ratio is not a key of the plan", "It is a key of [[base.variant]]."),
    "no base": ('[[base]]\nsizes = ["64"]', "1: base is missing", 'Write base = "sdxl".'),
    "no sizes": ('[[base]]\nbase = "sdxl"', "1: nothing says for which sizes", 'Write sizes = ["512", "400x560"].'),
    "sizes empty": ('sizes = []\n[[base]]\nbase = "sdxl"', "1: sizes is empty", "Write sizes"),
    "sizes text": ('sizes = "6"\n[[base]]\nbase = "sdxl"', "1: sizes is '6', must be an array of texts", "Write s"),
    "sizes number": (BASE.replace('"512"', "512"), "3: sizes[0] is 512, must be a text", "Write sizes"),
    "size": (BASE.replace('"]', '",\n"abc"]'), "4: sizes[1]: 'abc' is not a size", "Write one side, as in 2048,"),
    "size again": (BASE.replace('"]', '",\n"512x512"]'), "4: sizes[1] is 512x512 again", "Keep one of the two."),
    "off the grid": (BASE.replace("512", "511"), "3: 511x511 does not fit SDXL's latent grid", "Use 512x512."),
    "branch of nothing": (f'revision = "v"\n{BASE}', "1: revision is for a repository, but there", "Write repo = "),
    "hub ckpt": (f'name = "a.PT"\n{BASE}'.replace("sdxl", "o/n"), "1: name is 'a.PT', must end in .safet", "Write"),
    "group of no model": (
        f'{BASE}[[base.variant]]\nsize = "64"\nratios.block = 0'.replace("sdxl", "o/n"),
        "6: ratios.block is for a group that no model has",
        "Did you mean blocks? The groups are: down, mid, up, blocks.",
    ),
}  # fmt: skip
GIVE = "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them."
WRONG_BASES = {
    "sdlx": ("is 'sdlx', no alias, file or folder", "Did you mean sdxl? The built-in recipes are: "),
    "a.safetensors": ("is 'a.safetensors', but there is no such file or folder", GIVE),
    "org/a.CKPT": ("is 'org/a.CKPT', but there is no such file or folder", GIVE),
    "./sdxl": ("is './sdxl', but there is no such file or folder", GIVE),
    "../sdxl": ("is '../sdxl', but there is no such file or folder", GIVE),
    "/no/sdxl": ("is '/no/sdxl', but there is no such file or folder", GIVE),
    "~noone~/x": ("is '~noone~/x', but there is no such file or folder", GIVE),
    "a/b/c": ("is 'a/b/c', but there is no such file or folder", GIVE),
    "a.b": ("is 'a.b', but there is no such file or folder", GIVE),
    "a\\\\b": (r"is 'a\\b', but there is no such file or folder", GIVE),
    "https://me:hf_secret@h/x": ("is a link", "Download the file and give its path, or write hf://ORG/NAME/FILE."),
    "hf://org": ("is 'hf://org', no place on the Hub", "Write hf://ORG/NAME or hf://ORG/NAME/FILE."),
    " ": ("is ' ', must be a text", "Write [[base]], and below it"),
    "a\\u0000b": (r"is 'a\x00b', which has a control character", "Write [[base]], and below it"),
}
# These lines behind those of BASE.
ADDED = {
    'size = "64"': ("4: size is not a key of [[base]]", "Did you mean sizes? The keys are: base, sizes, "),
    'variant = "fp16"': ("4: variant is 'fp16', must be an array of tables", "Write [[base.variant]] above each, or "),
    "[[base.variant]]\nratio = 0": ("4: size is missing", 'Write size = "640x1536".'),
    '[[base.variant]]\nsize = "x"': ("5: size: 'x' is not a size", "Write one side, as in 2048,"),
    'dtype = "fp61"': ("4: dtype is 'fp61', no dtype", "Did you mean fp16? The dtypes are: fp16, bf16, fp32."),
    "dtype = 16": ("4: dtype is 16, must be a text", 'Write dtype = "fp16".'),
    'targets = ["at"]': (
        "4: targets[0] is 'at', no kind of layer",
        "Did you mean attn? The kinds are: attn, ff, attn2.",
    ),
    'targets = ["ff", "ff"]': ("4: targets[1] is 'ff' again", "Keep one of the two."),
    'targets = ["attn2"]': ("4: targets has attn2, which SDXL does not have", "It has: attn, ff."),
    'repo = "o/n"\nprivate = "yes"': ("5: private is 'yes', must be true or false", "Write private = true."),
    "allow_nonfinite = 1": ("4: allow_nonfinite is 1, must be true or false", "Write allow_nonfinite = true."),
    'base_model = "x"': ("4: base_model is 'x', must be ORG/NAME", 'Write base_model = "ORG/NAME".'),
    'weights = ""': ("4: weights is '', must be a text", 'Write weights = "fp16".'),
    'repo = "n"': ("4: repo is 'n', must be ORG/NAME", 'Write repo = "my-org/sdxl-crdiff".'),
    'repo = "https://hf.co/o/n"': ("4: repo is 'https://hf.co/o/n', must be ORG/NAME", "Write repo = "),
    'repo = "o/a..b"': ("4: repo is 'o/a..b', must be ORG/NAME", "Write repo = "),
    'repo = "o/{size}-"': ("4: repo is 'o/512x512-', must be ORG/NAME", "Write repo = "),
    'repo = "o/n"\nrevision = "a b"': ("5: revision is 'a b', must be the name of a branch", "Write revision = "),
    'repo = "o/n"\nrevision = "a/../b"': ("5: revision is 'a/../b', must be the name of a b", "Write revision = "),
    'repo = "o/n"\ntag = "-v"': ("5: tag is '-v', must be the name of a tag", 'Write tag = "v1".'),
    'tag = "v"': ("4: tag is for a repository, but there is no repo", "Write repo = "),
    "private = true": ("4: private is for a repository, but there is no repo", "Write repo = "),
    'name = "../a"': ("4: name is '../a', must be a path that every system can have", "Write name = "),
    'name = "/a"': ("4: name is '/a', must be a path", "Write name = "),
    "name = 'a\\b'": (r"4: name is 'a\\b', must be a path", "Write name = "),
    'name = "c:/a"': ("4: name is 'c:/a', must be a path", "Write name = "),
    'name = "a/"': ("4: name is 'a/', must be a path", "Write name = "),
    'name = "a//b"': ("4: name is 'a//b', must be a path", "Write name = "),
    'name = "a/./b"': ("4: name is 'a/./b', must be a path", "Write name = "),
    f'name = "{"a" * 201}"': (f"4: name is '{'a' * 57}...', must be a path", "Write name = "),
    'name = "a.ckpt"': ("4: name is 'a.ckpt', must end in .safetensors", "Write name = "),
    'name = "a"': ("4: name is 'a', must end in .safetensors", "Write name = "),
    'name = "{sice}"': ("4: name has '{sice}', which stands for nothing", "Did you mean {size}? The placeholders are"),
    'name = "{width:04}"': ("4: name has '{width:04}', which stands for nothing", "Did you mean {width}? "),
    'name = "a}"': ("4: name has a } alone", "Write }} for the brace itself, or {size} for the size."),
    'name = "{dtype}"': ("4: name has {dtype}, but there is no dtype", 'Write dtype = "fp16", or leave {dtype} out.'),
    'recipe = "no.toml"': (f"4: recipe: {NOWHERE / 'no.toml'}: no such recipe file", "Name a recipe in TOML"),
    f'recipe = "{"a" * 300}"': ("4: recipe", ""),
    '[[base.variant]]\nsize = "64"\nratio = 1': ("6: ratio is 1.0, must be 0 <= ratio < 1", "0.3 sets 30 %"),
    '[[base.variant]]\nsize = "64"\npoa_weight = 11': ("6: poa_weight is 11.0, must be 0 <= ", "1 is the pruned"),
    '[[base.variant]]\nsize = "64"\nratios = 0.3': ("6: ratios is 0.3, must be a table", "Write ratios = { "),
    '[[base.variant]]\nsize = "64"\nratios = {}': ("6: ratios is empty", "Write ratios = { down = 0.2, "),
    '[[base.variant]]\nsize = "64"\nratios.up = "a"': ("6: ratios.up is 'a', must be a finite number", "Write up"),
    '[[base.variant]]\nsize = "64"\n[base.variant.ratios]\nup = 0\nmid = -1': ("8: ratios.mid is -1.0, must be ", "0"),
    '[[base.variant]]\nsize = "64"\nratios.upp = 0': (
        "6: ratios.upp is for a group that SDXL does not have",
        "Did you mean up? The groups are: down, mid, up.",
    ),
}


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        *(pytest.param(*wrong, id=name) for name, wrong in WRONG.items()),
        *((BASE.replace("sdxl", base), f"2: base {wrong}", hint) for base, (wrong, hint) in WRONG_BASES.items()),
        *((BASE + added, *wrong) for added, wrong in ADDED.items()),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_said_with_its_line(text: str, problem: str, hint: str) -> None:
    found = only(text, NOWHERE)
    assert found[0].startswith(problem)
    assert found[1].startswith(hint)
    assert "hf_secret" not in found[0]


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
    assert [problem for problem, _ in problems(text, folder)] == [
        "1: sizes[2]: 'x' is not a size",
        "1: 511x511 does not fit SDXL's latent grid (multiples of 8)",
        "2: sizes[3] is 7, must be a text",
        "3: name has '{nmae}', which stands for nothing",
        "3: name has a { alone",
        "4: privat is not a key of the plan",
        "7: dtype is 'fp8', no dtype",
        "8: targets[1] is 'mlp', no kind of layer",
        "8: targets has attn2, which SDXL does not have",
        "10: base is 'sd14', no alias, file or folder",
        f"11: recipe: {folder / 'no.toml'}: no such recipe file",
        "12: name has {dtype}, but there is no dtype",
        "15: repo is '-', must be ORG/NAME",
        "16: recipe is for SDXL, which sd15 is not",
        "17: name is '../512x512', must be a path that every system can have, with / between its parts",
        "18: size is missing",
        "19: ratio is 7.0, must be 0 <= ratio < 1",
        "22: ratios.down is 5.0, must be 0 <= ratio < 1",
        "24: size: 0x0 is not a usable size",
        "25: poa_weight is -1.0, must be 0 <= weight <= 10",
        "27: bases is not a key of the plan",
    ]


def test_the_error_names_the_file_and_counts() -> None:
    with pytest.raises(MatrixError, match=r"^plan.toml: 2 problems\n"):
        parse("a = 1\nb = 2\n" + BASE, "plan.toml", NOWHERE)
    with pytest.raises(MatrixError, match=r"^pl\\nan.toml: one problem\n"):
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
    except MatrixError as error:
        return [problem.message.removeprefix("plan.toml:13: 64x64 of b would be ") for problem in error.problems]
    return []


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


def test_one_name_for_all_meets_itself() -> None:
    text = 'name = "x"\nsizes = ["64", "128"]\n[[base]]\nbase = "o/n"'
    assert only(text) == (
        "2: 128x128 of n would be x, and so would 64x64 of n (line 2)",
        "Put {base} and {size} into name, or give one of them its own.",
    )


@pytest.mark.parametrize(("one", "other"), [("private = true", ""), ("private = true", "private = false")])
def test_a_repository_is_private_or_not(one: str, other: str) -> None:
    found = meetings(f'repo = "o/n"\n{one}', f'repo = "O/n"\n{other}')
    assert found == ["plan.toml:13: private is not the same for 64x64 of b and 64x64 of a (line 3), both in O/n"]
    assert meetings(f'repo = "o/n"\n{one}', f'repo = "O/n"\n{one}') == []
    assert meetings(f'repo = "o/n"\n{one}', 'repo = "o/m"') == []


# --- files ---


def unread(path: Path) -> str:
    with pytest.raises(MatrixError) as error:
        load(path)
    (problem,) = error.value.problems
    assert problem.hint.endswith((".", "?"))
    assert error.value.message == f"{path.name}: one problem"
    return problem.message


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
    with pytest.raises(MatrixError, match=r"^a\\x1b.toml: one problem\n") as error:
        load(tmp_path / "a\x1b.toml")
    assert error.value.problems[0].message.endswith(r"a\x1b.toml: no such plan file")
    with pytest.raises(MatrixError):
        load(tmp_path / ("a" * 300))


def test_importing_plans_is_cheap() -> None:
    code = "import sys, crdiff_export.publish.plan_file; print(*({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "numba", "click", "rich", "huggingface_hub"} & set(loaded)


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
    *(f"{key} = {example.partition(' = ')[2]}" for key, example in EXAMPLES.items() if key not in ("base", "variant")),
]  # fmt: skip
KEY_NAMES = sorted({key for keys in KEYS.values() for key in keys} | {"'\\u001b'", "a.b", "sizes.x", '""', "vairant"})


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anywhere")
    (folder / "my-sdxl.toml").write_bytes((recipe_files.builtin_path() / "sdxl.toml").read_bytes())
    return folder


def damaged(chance: random.Random) -> str:
    text = PLAN.splitlines()
    for _ in range(chance.choice((1, 2, 3, 8))):
        at = chance.randrange(len(text))
        key, is_key, value = text[at].partition(" = ")
        change = chance.choice(
            ("value", "value", "value", "line", "swap", "drop", "key", "cut") if is_key else ("drop",)
        )
        if change == "value":
            text[at] = f"{key} = {chance.choice(HOSTILE)}"
        elif change == "line":
            text.insert(at, chance.choice(LINES))
        elif change == "swap":
            other = chance.randrange(len(text))
            text[at], text[other] = text[other], text[at]
        elif change == "drop" and len(text) > 1:
            text.pop(at)
        elif change == "key":
            text[at] = f"{chance.choice(KEY_NAMES)} = {value}"
        else:
            text[at] = text[at][: chance.randrange(len(text[at]) + 1)] + chance.choice(("", '"', "\x00", "]", "{", "é"))
    return "\n".join(text)


@settings(max_examples=400)
@given(chance=st.randoms(use_true_random=False))
def test_a_damaged_plan_is_read_or_refused(chance: random.Random, anywhere: Path) -> None:
    try:
        made = parse(damaged(chance), "plan.toml", anywhere)
    except MatrixError as error:
        found = error.problems
    else:
        check_matrix(made)
        return
    assert found
    assert len({problem.message for problem in found}) == len(found)
    for problem in found:
        check(problem.message, problem.hint)


def check_matrix(made: Matrix) -> None:
    places = [made.local(entry) for entry in made.entries]
    assert len({str(place).casefold() for place in places}) == len(places) > 0
    for entry, place in zip(made.entries, places, strict=True):
        assert not place.is_absolute()
        assert not {"..", "."} & set(place.parts)
        assert str(place).endswith(entry.path)
        assert entry.line is not None
        if known := recipe_files.by_alias(entry.base):
            family = families.by_id(known.family)
            assert entry.size.width % family.grid == entry.size.height % family.grid == 0
            assert set(entry.ratios) <= set(family.groups)
            assert set(entry.targets or ()) <= set(family.kinds)
