"""Every command, every way to misuse it: what stdout, stderr and the exit code say."""

import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from crdiff_export.cli import COMMANDS
from crdiff_export.cli import crdiff as group
from crdiff_export.models import demo, recipe_files
from tests.support import ROOT, makers
from tests.support.isolation import Crdiff, Ran

pytestmark = pytest.mark.usefixtures("here")

UNTUNED = (
    "starting point, tuned by nobody (search start of the CR-Diff public code: 0.3/0.3/0.3, POA weight 1.5; "
    "nobody tuned this size)"
)
DEMO_GROUPS = {"down": 327680, "mid": 262144, "up": 655360}


@pytest.fixture
def line(crdiff: Crdiff, shelf: Path) -> Callable[[str], Ran]:
    """Runs a command line as one would type it; {shelf} is the folder of bases."""
    return lambda text: crdiff(*shlex.split(text.format(shelf=shelf)))


Line = Callable[[str], Ran]


# --- export ---


def test_export_names_its_output_after_the_base_and_the_size(line: Line, here: Path) -> None:
    ran = line("export demo --res 96x64")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "demo-crdiff-96x64.safetensors"
    assert [path.name for path in here.iterdir()] == ["demo-crdiff-96x64.safetensors"]
    assert makers.metadata_of(here / "demo-crdiff-96x64.safetensors")["crdiff.resolution.target"] == "96x64"


def test_export_shows_what_was_done_group_by_group(line: Line) -> None:
    ran = line("export demo --res 64x96 -o o.safetensors")
    head, *rows = ran.out.splitlines()
    assert head.split() == ["group", "ratio", "zeroed", "of", "share", "threshold"]
    assert [row.split()[0] for row in rows[:3]] == ["down", "mid", "up"]
    assert [row.split()[3] for row in rows[:3]] == ["327,680", "262,144", "655,360"]
    assert rows[3:] == [
        "",
        "pruned for: 64x96",
        f"ratios:     {UNTUNED}",
        "size:       10.10 MB",
        "o.safetensors",
    ]
    assert [text.partition(":")[0] for text in ran.err.splitlines()] == ["counting", "writing"]


def test_export_as_json(line: Line, here: Path) -> None:
    ran = line("export demo --res 64x96 -o o.safetensors --json")
    assert (ran.code, ran.err) == (0, "")
    found = ran.result
    assert found["schema"] == 1
    assert found["output"] == "o.safetensors"
    assert found["bytes"] == (here / "o.safetensors").stat().st_size
    assert (found["family"], found["layout"], found["resolution"]) == ("demo", "original", "64x96")
    assert (found["provenance"], found["poa_weight"], found["notes"]) == ("starting-point", 1.5, [])
    assert {name: some["total"] for name, some in found["groups"].items()} == DEMO_GROUPS
    stamp = makers.metadata_of(here / "o.safetensors")
    for name, some in found["groups"].items():
        assert str(some["pruned"]) == stamp[f"crdiff.pruned.{name}"]
        assert some["threshold"] == stamp[f"crdiff.threshold.{name}"]
    (file,) = found["files"]
    assert file["hash_sha256"] == stamp["modelspec.hash_sha256"]
    assert file["source_hash_sha256"] == stamp["crdiff.source.hash_sha256"]


PROMPTED = """
[model]
family = "demo"
title = "demo"
native = "64x64"
[[variant]]
resolution = "96x64"
prompt = "two red circles on grey"
ratios = { down = 0.1, mid = 0.2, up = 0.4 }
poa_weight = 1.2
provenance = "starting-point"
source = "a guess"
"""


def test_an_export_takes_the_numbers_for_a_prompt(line: Line, here: Path) -> None:
    Path("own.toml").write_text(PROMPTED)
    ran = line("export demo --res 96x64 --recipe own.toml --prompt 'two red circles on grey' -o o.safetensors --json")
    assert (ran.code, ran.result["notes"]) == (0, [])
    metadata = line("inspect o.safetensors --metadata --json").result["metadata"]
    assert metadata["crdiff.prompt"] == "two red circles on grey"
    assert [metadata[f"crdiff.ratio.{group}"] for group in ("down", "mid", "up")] == ["0.1", "0.2", "0.4"]
    for asked in ("", "--prompt 'two blue circles on grey'"):
        ran = line(f"export demo --res 96x64 --recipe own.toml -o p.safetensors {asked}")
        assert ran.err.startswith("crdiff: own.toml has no variant for any prompt"), ran.err


@pytest.mark.parametrize("also", ["", "--dry-run"], ids=["done", "planned"])
def test_quiet_leaves_the_path_alone(line: Line, also: str) -> None:
    assert line(f"export demo --res 64x72 -q {also}") == Ran(0, "demo-crdiff-64x72.safetensors\n", "")


def test_dry_run_shows_the_plan_and_writes_nothing(line: Line, here: Path) -> None:
    ran = line("export {shelf}/sd15.safetensors --res 400x560 --dtype bf16 --dry-run")
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.splitlines()[:4] == [
        "group  layers  weights  ratio  to zero",
        "down       36   16,800    0.3    5,040",
        "mid         6    6,400    0.3    1,920",
        "up         54   25,200    0.3    7,560",
    ]
    told = dict(text.split(":", 1) for text in ran.out.splitlines()[5:])
    assert told["base"].endswith("sd15.safetensors (SD1.5, original layout)")
    assert told["targets"].strip() == "attn, ff in 96 layers, with a threshold for each group"
    assert told["dtype"].strip() == "BF16"
    assert told["would write"].strip() == "sd15-crdiff-400x560.safetensors"
    assert list(here.iterdir()) == []


def test_dry_run_as_json(line: Line, here: Path) -> None:
    ran = line("export {shelf}/dit.safetensors --res 512x1024 --dry-run --json")
    assert (ran.code, ran.err) == (0, "")
    plan = ran.result
    assert (plan["dry_run"], plan["family"], plan["variant"]) == (True, "sd3-medium", "768x768")
    assert plan["groups"]["blocks"]["layers"] == 48
    assert plan["groups"]["blocks"]["to_prune_at_least"] <= 0.3 * plan["groups"]["blocks"]["weights"]
    assert plan["notes"] == ["no variant for 512x1024; using the one for 768x768 (starting point)"]
    assert plan["output"] == "dit-crdiff-512x1024.safetensors"
    assert plan["disk_needed"] > plan["bytes"]
    assert list(here.iterdir()) == []


def test_a_size_without_a_variant_is_noted_on_stderr(line: Line) -> None:
    ran = line("export demo --res 72 -o o.safetensors")
    assert ran.err.splitlines()[0] == "note: no variant for 72x72; using the one for 80x80 (searched)"
    assert "no variant" not in ran.out


@pytest.mark.parametrize(
    ("options", "ratios"),
    [
        ("--ratio 0.5", {"down": 0.5, "mid": 0.5, "up": 0.5}),
        ("--down 0.1", {"down": 0.1, "mid": 0.4942, "up": 0.1461}),
        ("--down 0.1 --mid 0 --up 0.2", {"down": 0.1, "mid": 0.0, "up": 0.2}),
        ("--ratio 0.5 --up 0.2", {"down": 0.5, "mid": 0.5, "up": 0.2}),
    ],
    ids=["one", "part", "each", "each wins over one"],
)
def test_ratios_of_ones_own(line: Line, options: str, ratios: Mapping[str, float]) -> None:
    found = line(f"export demo --res 72 -o o.safetensors --json {options}").result
    assert {name: some["ratio"] for name, some in found["groups"].items()} == ratios
    assert found["provenance"] == "starting-point"
    # Only part of them are the nearest variant's in one case.
    assert bool(found["notes"]) == (options == "--down 0.1")
    for name, some in found["groups"].items():
        assert some["pruned"] >= int(ratios[name] * some["total"])
        assert (some["threshold"] is None) == (ratios[name] == 0)


def test_a_single_ratio_is_for_a_transformer_too(line: Line) -> None:
    found = line("export {shelf}/dit.safetensors --res 512 --ratio 0.1 --json").result
    assert found["groups"]["blocks"]["ratio"] == 0.1
    assert found["groups"]["blocks"]["threshold"] is None  # one for each layer, in the header


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ("--targets ff", "crdiff.targets", "ff"),
        ("--targets ff,attn", "crdiff.targets", "attn,ff"),
        ("--poa-weight 2", "crdiff.poa.weight", "2.0"),
        ("--dtype fp32", "crdiff.cast", "F32"),
        ("--criterion magnitude", "crdiff.criterion", "magnitude"),
        ("--threads 1 --device cpu", "crdiff.family", "demo"),
        ("--no-hash", "modelspec.hash_sha256", None),
        ("--no-hash", "crdiff.source.hash_sha256", None),
    ],
)
def test_an_option_reaches_the_header(line: Line, here: Path, options: str, key: str, text: str | None) -> None:
    assert line(f"export demo --res 64x96 -o o.safetensors {options}").code == 0
    assert makers.metadata_of(here / "o.safetensors").get(key) == text


def test_a_recipe_of_ones_own(line: Line, here: Path) -> None:
    made = (
        line("recipes show sd15 --toml").out.replace("down = 0.3", "down = 0.25").replace("nobody tuned", "I guessed")
    )
    (here / "own.toml").write_text(made)
    ran = line("export {shelf}/sd15.safetensors --res 400x560 --recipe own.toml --json")
    assert ran.code == 0
    assert ran.result["groups"]["down"]["ratio"] == 0.25
    assert ran.result["recipe"] == "own.toml 400x560"


def test_what_the_public_codes_search_leaves_is_a_recipe(line: Line, here: Path) -> None:
    found = {
        "model_config": {"name": "sd1.5", "width": 512, "height": 768},
        "best_avg_score": 0.42,
        "best_global_params_ratio": {"down_ratio": 0.1, "up_ratio": 0.2, "mid_ratio": 0.3},
    }
    (here / "config.json").write_text(json.dumps(found))
    ran = line("export {shelf}/sd15.safetensors --res 512x768 --recipe config.json --json")
    assert (ran.code, ran.err) == (0, "")
    assert {name: some["ratio"] for name, some in ran.result["groups"].items()} == {"down": 0.1, "mid": 0.3, "up": 0.2}
    assert ran.result["provenance"] == "searched"


def test_force_replaces(line: Line, here: Path) -> None:
    (here / "o.safetensors").write_text("old")
    assert line("export demo --res 64x96 -o o.safetensors").code == 1
    assert (here / "o.safetensors").read_text() == "old"
    assert line("export demo --res 64x96 -o o.safetensors --force").code == 0
    assert len(makers.read(here / "o.safetensors")) == 481


@pytest.mark.parametrize(
    ("base", "output"),
    [
        ("shards/diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-crdiff-400x560"),
        ("pipe --variant fp16", "pipe-crdiff-400x560"),
    ],
    ids=["shards", "folder"],
)
def test_a_base_of_several_files_becomes_a_folder(line: Line, here: Path, base: str, output: str) -> None:
    ran = line("export {shelf}/" + base + " --res 400x560")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == output
    assert line(f"inspect {output}{'/diffusion_pytorch_model.safetensors.index.json' * ('shards' in base)}").code == 0
    assert [path.name for path in here.iterdir()] == [output]


def test_a_sparse_base_is_noted(line: Line) -> None:
    ran = line("export {shelf}/sparse.safetensors --res 2048 --dry-run")
    assert "note: sparse.safetensors is mostly a hole: its weights read as zeros" in ran.err
    assert "6.94 GB" in ran.out


# --- inspect, verify ---


@pytest.mark.parametrize("name", ["sd15.safetensors", "pipe", "lora.safetensors", "sparse.safetensors"])
def test_inspect_says_what_a_file_is(line: Line, name: str) -> None:
    ran = line("inspect {shelf}/" + name)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("file:")
    assert line("inspect {shelf}/" + name + " --json").result["file"].endswith(name)


def test_inspect_shows_all_metadata_on_demand(line: Line) -> None:
    assert "modelspec.title: Tiny SD" in line("inspect {shelf}/sd15.safetensors --metadata").out
    assert line("inspect {shelf}/sd15.safetensors --metadata --json").result["metadata"] == {
        "modelspec.title": "Tiny SD"
    }


def test_verify_says_what_it_checked(line: Line) -> None:
    line("export demo --res 64x96 -o o.safetensors")
    ran = line("verify o.safetensors")
    assert (ran.code, ran.out) == (
        0, "o.safetensors: holds what its header says (1,245,184 target weights, the SHA-256)\n",
    )  # fmt: skip
    ran = line("verify o.safetensors --base demo")
    assert ran.out.endswith(f"(1,245,184 target weights, the SHA-256, every byte against {demo.path()})\n")
    assert line("verify o.safetensors -q") == Ran(0, "", "")
    assert line("verify o.safetensors --json --base demo").result == {
        "schema": 1, "verified": True, "file": "o.safetensors", "weights": 1245184, "hash": True,
        "base": str(demo.path()), "against_base": "all", "residual": "none",
    }  # fmt: skip


def test_verify_says_what_it_could_not_check(line: Line) -> None:
    line("export demo --res 64x96 -o o.safetensors --no-hash")
    ran = line("verify o.safetensors")
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == (
        "note: the header has no hash (--no-hash); bytes outside the target weights were not checked"
    )
    assert line("verify o.safetensors --json").result["hash"] is False


KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
OTHER = "model.diffusion_model.out.2.bias"


def header_with(**keys: str) -> Callable[[Path], None]:
    """Change keys of the header."""

    def change(path: Path) -> None:
        metadata = makers.metadata_of(path)
        assert keys.keys() <= metadata.keys()
        makers.write(path, makers.read(path), metadata | keys)

    return change


def weight(name: str, number: float) -> Callable[[Path], None]:
    """Put a number where a zero is in a pruned tensor, or over the first number of another."""

    def change(path: Path) -> None:
        tensors = makers.read(path)
        dtype, shape, data = tensors[name]
        values = np.frombuffer(data, "<f2").copy()
        values[int(np.argmin(np.abs(values))) if name == KEY else 0] = number
        makers.write(path, tensors | {name: (dtype, shape, values.tobytes())}, makers.metadata_of(path))

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (weight(KEY, 0.001), "", f"o.safetensors: '{KEY}' has 1 weights that should be zero"),
        (weight(KEY, 3), "", "o.safetensors: 78672 weights of mid are zero, crdiff.pruned.mid is 78673"),
        (weight(OTHER, 3), "", "o.safetensors: its bytes hash to 0x"),
        (weight(OTHER, 3), "--base demo", "o.safetensors: its bytes hash to 0x"),
        (header_with(**{"crdiff.pruned.up": "7"}), "", "o.safetensors: 196673 weights of up are zero, "),
        (header_with(**{"crdiff.total.up": "7"}), "", "o.safetensors: crdiff.total.up is 7, the layers have 655360"),
        (header_with(**{"crdiff.threshold.up": "none"}), "", "o.safetensors: the threshold of 'up' does not go with "),
        (header_with(**{"crdiff.family": "sdxl"}), "", "o.safetensors: crdiff.family is for 'sdxl', "),
        (header_with(**{"modelspec.hash_sha256": "0x" + "0" * 64}), "", "o.safetensors: its bytes hash to 0x"),
    ],
    ids=["left", "zero gone", "other byte", "base", "pruned", "total", "threshold", "family", "hash"],
)
def test_verify_fails(line: Line, here: Path, change: Callable[[Path], None], options: str, message: str) -> None:
    line("export demo --res 64x96 -o o.safetensors")
    change(here / "o.safetensors")
    ran = line(f"verify o.safetensors {options}")
    assert (ran.code, ran.out) == (3, "")
    complaint, hint = ran.err.splitlines()[-2:]
    assert complaint.startswith(f"crdiff: {message}")
    assert hint == "  Do not use the file; export it again from its base."
    ran = line(f"verify o.safetensors --json {options}")
    assert (ran.code, ran.out, ran.error["code"]) == (3, "", "verify")
    assert ran.error["message"].startswith(message)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{shelf}/sd15.safetensors", "SD1.5 (original), the file is demo (original)"),
        ("other.safetensors", "other.safetensors: gives 'down' the threshold "),
    ],
    ids=["family", "weights"],
)
def test_verify_fails_with_another_base(line: Line, here: Path, base: str, message: str) -> None:
    line("export demo --res 64x96 -o o.safetensors --no-hash")
    tensors = {
        name: (dtype, shape, data if name == "betas" else makers.weights(name, dtype, shape))
        for name, (dtype, shape, data) in makers.read(demo.path()).items()
    }
    makers.write(here / "other.safetensors", tensors)
    ran = line(f"verify o.safetensors --base {base}")
    assert ran.code == 3
    assert message in ran.err
    assert "`crdiff inspect` names it." in ran.err.splitlines()[-1]


# --- recipes ---


@pytest.mark.parametrize("command", ["recipes", "recipes list"])
def test_recipes_are_listed(line: Line, command: str) -> None:
    ran = line(command)
    assert (ran.code, ran.err) == (0, "")
    head, *rows = ran.out.splitlines()
    assert head.split() == ["alias", "model", "native", "ratios", "sizes"]
    assert tuple(row.split()[0] for row in rows) == recipe_files.aliases()
    assert all("starting-point" in row for row in rows)


def test_recipes_are_listed_as_json(line: Line) -> None:
    found = line("recipes list --json").result["recipes"]
    assert [recipe["name"] for recipe in found] == [f"{alias}.toml" for alias in recipe_files.aliases()]
    searched = {recipe["family"] for recipe in found for one in recipe["variants"] if one["provenance"] == "searched"}
    assert searched == {"demo"}


def test_a_recipe_is_shown(line: Line) -> None:
    ran = line("recipes show sdxl")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[:5] == [
        "model:  SDXL (sdxl), native 1024x1024",
        "base:   hf://stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors",
        f"ratios: {UNTUNED}",
        "",
        "size       down  mid   up  POA weight",
    ]
    assert line("recipes show sdxl --json").result["native"] == "1024x1024"
    assert line("recipes show demo").out.splitlines()[1].split() == ["base:", "built", "in"]


def test_a_recipe_is_shown_with_what_differs_between_its_variants(line: Line, here: Path) -> None:
    (here / "own.toml").write_text(
        '[model]\nfamily = "sdxl"\ntitle = "Mine\\u001b[31m"\nnative = "1024x1024"\n'
        '[[variant]]\nresolution = "512x512"\nratios = { down = 0.1, mid = 0.2, up = 0.3 }\npoa_weight = 1.5\n'
        'provenance = "starting-point"\nsource = "a guess"\nprompt = "a cat"\n'
        '[[variant]]\nresolution = "768x768"\nratios = { down = 0.1, mid = 0.2, up = 0.3 }\npoa_weight = 2\n'
        'provenance = "searched"\nsource = "a search"\n[variant.evidence]\nscorer = "s"\npruned = 0.5\nseeds = 3\n'
    )
    ran = line("recipes show own.toml")
    assert "'Mine\\x1b[31m'" in ran.out
    assert "base:  none" in ran.out
    assert ran.out.splitlines()[-3:] == [
        "size     down  mid   up  POA weight  prompt  ratios",
        "512x512   0.1  0.2  0.3         1.5  a cat   starting point, tuned by nobody (a guess)",
        "768x768   0.1  0.2  0.3           2  any     searched (a search)",
    ]
    _, searched = line("recipes show own.toml --json").result["variants"]
    assert searched["evidence"] == {"scorer": "s", "pruned": 0.5, "seeds": 3}


def test_a_recipe_is_shown_in_one_form(line: Line) -> None:
    ran = line("recipes show demo --toml --json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.error["message"] == "--toml and --json do not go together."


def test_a_recipe_as_toml_is_a_recipe(line: Line, here: Path) -> None:
    (here / "own.toml").write_text(line("recipes show flux-dev --toml").out)
    assert line("recipes validate own.toml").out == "own.toml: a recipe for FLUX.1 dev with 4 variants\n"
    assert line("recipes validate own.toml -q") == Ran(0, "", "")
    assert line("recipes validate own.toml own.toml --json").result == {"schema": 1, "valid": ["own.toml", "own.toml"]}


@pytest.mark.parametrize("alias", recipe_files.aliases())
def test_the_built_in_recipes_are_valid(crdiff: Crdiff, alias: str) -> None:
    assert crdiff("recipes", "validate", recipe_files.builtin_path() / f"{alias}.toml").code == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"sdxl"', '"sdxxl"', "own.toml: no model family is called 'sdxxl'"),
        ('"400x560"', '"401x560"', "own.toml: variant 1 (401x560): 401x560 does not fit SDXL's latent grid (mul"),
        (
            "down =",
            "blocks =",
            "own.toml: variant 1 (400x560): ratios.blocks is for a group that this model does not have",
        ),
        (
            "poa_weight",
            'targets = ["attn2"]\npoa_weight',
            "own.toml: variant 1 (400x560): targets names attn2, which SDXL",
        ),
        ("[model]", "[modell]", "own.toml: modell is not a key of a recipe"),
        ("1.5", "1.5.1", "own.toml: "),
    ],
    ids=["family", "grid", "group", "targets", "key", "toml"],
)
def test_a_recipe_is_refused(line: Line, here: Path, old: str, new: str, message: str) -> None:
    text = line("recipes show sdxl --toml").out
    (here / "own.toml").write_text(text.replace(old, new, 1))
    ran = line("recipes validate own.toml")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"crdiff: {message}")
    assert line("recipes validate own.toml --json").error["code"] == "recipe"


# --- refusals: the command line, exit code, code, message and hint ---

USAGE = "`crdiff export -h` explains it."
SIZE = "Write one side, as in 2048, or width x height, as in 400x560."
KINDS = "Give some of attn, ff, attn2, with commas between them."
REFUSALS = {
    "no base": ("export --res 64", 2, "usage", "Missing argument 'BASE'.", USAGE),
    "no size": ("export demo", 2, "usage", "Missing option '--res'.", USAGE),
    "size": (
        "export demo --res abc", 2, "usage", f"Invalid value for '--res': 'abc' is not a size. {SIZE}", USAGE,
    ),
    "size too large": (
        "export demo --res 20000", 2, "usage",
        "Invalid value for '--res': 20000x20000 is not a usable size. Each side must be 1 to 16384 pixels.", USAGE,
    ),
    "size off the grid": (
        "export demo --res 97x64", 1, "recipe", "97x64 does not fit demo's latent grid (multiples of 8)", "Use 96x64.",
    ),
    "ratio": (
        "export demo --res 64 --ratio 1", 2, "usage", "Invalid value for '--ratio': 1.0 is not in the range 0<=x<1.",
        USAGE,
    ),
    "ratio nan": (
        "export demo --res 64 --mid nan", 1, "recipe", "the ratio of mid is nan, must be 0 <= ratio < 1",
        "0.3 sets 30 % of the weights to zero, 0 none.",
    ),
    "ratio text": (
        "export demo --res 64 --up lots", 2, "usage", "Invalid value for '--up': 'lots' is not a valid float range.",
        USAGE,
    ),
    "POA weight": (
        "export demo --res 64 --poa-weight 11", 2, "usage",
        "Invalid value for '--poa-weight': 11.0 is not in the range 0<=x<=10.0.", USAGE,
    ),
    "POA weight nan": (
        "export demo --res 64 --poa-weight nan", 1, "recipe", "the POA weight is nan, must be 0 <= weight <= 10",
        "1 is the pruned model, 0 the dense one; the public code uses 1.5.",
    ),
    "down of a transformer": (
        "export {shelf}/dit.safetensors --res 512 --down 0.2", 2, "usage", "this model has no group 'down' to prune",
        "The groups are: blocks. --ratio is for all of them.",
    ),
    "targets": (
        "export demo --res 64 --targets attn,mlp", 2, "usage",
        f"Invalid value for '--targets': 'mlp' is no kind of layer. {KINDS}", USAGE,
    ),
    "no targets": (
        "export demo --res 64 --targets ,", 2, "usage",
        f"Invalid value for '--targets': nothing is named. {KINDS}", USAGE,
    ),
    "targets of others": (
        "export demo --res 64 --targets attn2", 1, "plan", "demo has no 'attn2' targets",
        "It has: attn, ff (--targets).",
    ),
    "criterion": (
        "export demo --res 64 --criterion taste", 2, "usage", "no criterion is called 'taste'",
        "The criteria are: magnitude, uniform, random, wanda, taylor, obs, adverse.",
    ),
    "dtype": (
        "export demo --res 64 --dtype int8", 2, "usage",
        "Invalid value for '--dtype': 'int8' is not one of 'fp16', 'bf16', 'fp32'.", USAGE,
    ),
    "device": (
        "export demo --res 64 --device gpu", 2, "usage",
        "Invalid value for '--device': 'gpu' is no device. Give auto, cpu, cuda, cuda:N or mps.", USAGE,
    ),
    "threads": (
        "export demo --res 64 --threads 0", 2, "usage", "Invalid value for '--threads': 0 is not in the range x>=1.",
        USAGE,
    ),
    "command": (
        "exprt demo", 2, "usage", "No such command 'exprt'. Did you mean export?", "`crdiff -h` explains it.",
    ),
    "command like no other": (
        "frobnicate", 2, "usage",
        f"No such command 'frobnicate'. There are: {', '.join(COMMANDS)}.",
        "`crdiff -h` explains it.",
    ),
    "command of recipes": (
        "recipes lst", 2, "usage", "No such command 'lst'. Did you mean list?", "`crdiff recipes -h` explains it.",
    ),
    "alias": (
        "export sdlx --res 512", 1, "checkpoint", "sdlx: no such file or folder",
        f"Did you mean sdxl? The built-in recipes are: {', '.join(recipe_files.aliases())}.",
    ),
    "recipe": (
        "recipes show sdlx", 1, "recipe", "sdlx: no such recipe file", "`crdiff recipes list` shows the built-in ones.",
    ),
    "recipe missing": (
        "export demo --res 64 --recipe own.toml", 1, "recipe", "own.toml: no such recipe file",
        "`crdiff recipes list` shows the built-in ones.",
    ),
    "recipe folder": (
        "recipes validate {shelf}", 1, "recipe", "{shelf}: a folder, not a recipe file", "Name one .toml file in it.",
    ),
    "recipe of another family": (
        "export demo --res 64 --recipe {recipes}/sdxl.toml", 1, "recipe",
        "{recipes}/sdxl.toml: not a recipe for demo, which demo is",
        "Leave --recipe out, or give one for this family.",
    ),
    "base missing": (
        "export model.safetensors --res 512", 1, "checkpoint", "model.safetensors: no such file or folder",
        "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them.",
    ),
    "inspect missing": (
        "inspect model.safetensors", 1, "checkpoint", "model.safetensors: no such file or folder", "Check the path.",
    ),
    "inspect empty": (
        "inspect {shelf}/empty.safetensors", 1, "checkpoint", "{shelf}/empty.safetensors: the file is empty", None,
    ),
    "export of no checkpoint": (
        "export {shelf}/text.safetensors --res 512", 1, "checkpoint", None, None,
    ),
    "folder without weights": (
        "export {shelf}/pipe/vae --res 512 --variant fp16", 1, "checkpoint", None, None,
    ),
    "variant": (
        "export {shelf}/pipe --res 512 --variant ema", 1, "checkpoint",
        "{shelf}/pipe/unet: no 'ema' variant of the weights", "There are: none (leave --variant out), fp16.",
    ),
    "LoRA": (
        "export {shelf}/lora.safetensors --res 512", 1, "family",
        "no known model family: this is a LoRA, not a checkpoint, e.g. lora_unet_0.lora_down.weight", None,
    ),
    "unknown": (
        "export {shelf}/odd.safetensors --res 512", 1, "family",
        "no known model family: none of 1 tensors is named like one of theirs, e.g. odd.weight", None,
    ),
    "quantised": (
        "export {shelf}/quantised.safetensors --res 512", 1, "plan", None,
        "Export from the fp16 or bf16 checkpoint, then quantise the result.",
    ),
    "pruned": (
        "export {shelf}/pruned.safetensors --res 64", 1, "plan", "{shelf}/pruned.safetensors: already pruned by crdiff",
        "Export from the base that it was made from; `crdiff inspect` names it.",
    ),
    "not finite": (
        "export {shelf}/infinite.safetensors --res 64", 1, "plan", None,
        "The checkpoint is damaged, or --dtype is too narrow for it; --allow-nonfinite keeps such weights.",
    ),
    "dtype too narrow": (
        "export {shelf}/wide.safetensors --res 64 --dtype fp16", 1, "plan",
        "{shelf}/wide.safetensors: 'betas' holds numbers that the new dtype cannot",
        "Choose --dtype bf16, which has the range of fp32, or leave --dtype out.",
    ),
    "target of another dtype": (
        "export {shelf}/bytes.safetensors --res 64", 1, "plan", None,
        "Targets may be F32, F16, BF16, F8_E4M3, F8_E5M2; export from the checkpoint before it was quantised.",
    ),
    "target of another shape": (
        "export {shelf}/flat.safetensors --res 64", 1, "family", None,
        "The file is damaged, packed by a quantiser, or of a model that only shares its names with a known one.",
    ),
    "recipe that is a checkpoint": (
        "export demo --res 64 --recipe {shelf}/sd15.safetensors", 1, "recipe",
        "{shelf}/sd15.safetensors: more than 1 MiB", "A recipe is a short text; is this the checkpoint?",
    ),
    "recipe in no UTF-8": (
        "recipes validate {shelf}/latin.toml", 1, "recipe", "{shelf}/latin.toml: not UTF-8 at byte 0",
        "Save it as UTF-8 text.",
    ),
    "recipe for no size": (
        "export demo --res 64 --recipe {shelf}/bare.toml", 1, "recipe", "bare.toml has no variant",
        "Add a [[variant]] for 64x64 to it, or give the ratios on the command line.",
    ),
    "recipe without a group": (
        "export demo --res 64 --recipe {shelf}/part.toml", 1, "recipe", "part.toml: ratios.up is missing",
        "Write ratios = {{ down = 0.1, mid = 0.1, up = 0.3 }}.",
    ),
    "search that failed": (
        "recipes show {shelf}/config.json", 1, "recipe", None,
        "That search counts a failed run as -2: mend it and run it again.",
    ),
    "verify a plain file": (
        "verify {shelf}/sd15.safetensors", 1, "checkpoint",
        "{shelf}/sd15.safetensors: not made by crdiff (no crdiff.schema in its header)",
        "`crdiff export` makes such files; `crdiff inspect` shows what this one is.",
    ),
    "verify a hole": (
        "verify {shelf}/hole.safetensors", 3, "verify", None, "Fetch the whole file, then verify it again.",
    ),
    "output exists": (
        "export demo --res 64 -o there.safetensors", 1, "plan", "there.safetensors: already exists",
        "Give another -o, or --force to replace it.",
    ),
    "output is the base": (
        "export {shelf}/sd15.safetensors --res 512 -o {shelf}/sd15.safetensors --force", 1, "plan",
        "{shelf}/sd15.safetensors: that is the base itself", "Give another place with -o; the base is never changed.",
    ),
    "output in no folder": (
        "export demo --res 64 -o no/o.safetensors", 1, "plan", "no/o.safetensors: the folder no does not exist",
        "Create it, or give another -o.",
    ),
    "output is a folder": (
        "export demo --res 64 -o {shelf}/pipe", 1, "plan", "{shelf}/pipe: a folder; the output is one file",
        "Give a file name: -o {shelf}/pipe/NAME.safetensors.",
    ),
    "output has another suffix": (
        "export demo --res 64 -o sdxl-1.5", 1, "plan", "sdxl-1.5: the output is a safetensors file",
        "Name it sdxl-1.5.safetensors.",
    ),
    "output is a pickle": (
        "export demo --res 64 -o o.ckpt", 1, "plan", "o.ckpt: the output is a safetensors file",
        "Name it o.safetensors.",
    ),
    "output is no name": (
        "export demo --res 64 -o ..", 1, "plan", "..: not a name for the output", "Give it one: -o ../NAME.",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shelf with some more that is wrong."""
    folder = tmp_path_factory.mktemp("more") / "shelf"
    shutil.copytree(shelf, folder, copy_function=os.link)
    (folder / "empty.safetensors").touch()
    (folder / "text.safetensors").write_text("<!DOCTYPE html><title>Log in</title>")
    tensors = makers.read(demo.path())
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    dtype, shape, data = tensors[name]
    infinite = b"\x00\x7c" + data[2:]
    makers.write(folder / "infinite.safetensors", tensors | {name: (dtype, shape, infinite)})
    makers.write(folder / "wide.safetensors", tensors | {"betas": ("F32", (1,), struct.pack("<f", 1e30))})
    makers.write(folder / "bytes.safetensors", tensors | {name: ("I8", shape, data[::2])})
    makers.write(folder / "flat.safetensors", tensors | {name: (dtype, (len(data) // 2,), data)})
    (folder / "latin.toml").write_bytes(b"\xe4")
    model = '[model]\nfamily = "demo"\ntitle = "demo"\nnative = "64x64"\n'
    (folder / "bare.toml").write_text(model)
    (folder / "part.toml").write_text(
        f'{model}[[variant]]\nresolution = "64x64"\nratios = {{ down = 0.1, mid = 0.1 }}\npoa_weight = 1.5\n'
        'provenance = "starting-point"\nsource = "a guess"\n'
    )
    searched = {"model_config": {"name": "sdxl", "width": 512, "height": 512}, "best_avg_score": -2}
    (folder / "config.json").write_text(json.dumps(searched))
    makers.write(
        folder / "quantised.safetensors", tensors | {"model.diffusion_model.scaled_fp8": ("F32", (), bytes(4))}
    )
    subprocess.run(
        [sys.executable, "-m", "crdiff_export", "export", "demo", "--res", "64", "-qo", folder / "pruned.safetensors"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    stamp = makers.metadata_of(folder / "pruned.safetensors")
    with (folder / "hole.safetensors").open("wb") as hole:
        hole.write(makers.header(tensors, stamp))
        hole.truncate(hole.tell() + sum(len(data) for _, _, data in tensors.values()))
    return folder


@pytest.mark.parametrize(("command", "exit_code", "code", "message", "hint"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal(
    crdiff: Crdiff,
    shelf: Path,
    here: Path,
    *,
    command: str,
    exit_code: int,
    code: str,
    message: str | None,
    hint: str | None,
) -> None:
    (here / "there.safetensors").write_text("mine")
    places = {"shelf": shelf, "recipes": recipe_files.builtin_path()}
    args = shlex.split(command.format(**places))
    ran = crdiff(*args)
    assert (ran.code, ran.out) == (exit_code, "")
    said = [text for text in ran.err.splitlines() if not text.startswith(("note: ", "counting: "))]
    complaint, advice = said
    assert complaint.startswith("crdiff: ")
    if message is not None:
        assert complaint == f"crdiff: {message.format(**places)}"
    if hint is not None:
        assert advice == f"  {hint.format(**places)}"
    assert advice[2].isupper() or advice[2] in "`0123456789"
    assert advice[-1] in ".?"
    ran = crdiff(*args, "--json")
    assert (ran.code, ran.out) == (exit_code, "")
    assert ran.error == {"code": code, "message": complaint.removeprefix("crdiff: "), "hint": advice.strip()}
    assert [path.name for path in here.iterdir()] == ["there.safetensors"]
    assert (here / "there.safetensors").read_text() == "mine"


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there(crdiff: Crdiff, device: str) -> None:
    torch = pytest.importorskip("torch")
    if (torch.cuda.is_available() and device == "cuda") or (torch.backends.mps.is_available() and device == "mps"):
        pytest.skip("this machine has one")
    ran = crdiff("export", "demo", "--res", 64, "--device", device, "--json")
    assert (ran.code, ran.error["code"]) == (1, "plan")
    assert ran.error["message"].startswith(f"device {device}: ")
    assert ran.error["hint"] == "Leave --device out: the CPU gives the same file."


def test_a_disk_that_is_too_full(crdiff: Crdiff, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert crdiff("export", "demo", "--res", 64, "--dry-run").code == 0
    ran = crdiff("export", "demo", "--res", 64)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-2].endswith("10.17 MB needed, 1.00 KB free")


# --- the shape of it all ---


def commands(inside: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, as words."""
    context = click.Context(inside)
    found = [path]
    for name in inside.list_commands(context):
        command = inside.get_command(context, name)
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


COMMAND_PATHS = commands(group)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("path", COMMAND_PATHS, ids=" ".join)
def test_help_has_an_example(crdiff: Crdiff, path: tuple[str, ...], option: str) -> None:
    ran = crdiff(*path, option)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: {' '.join(('crdiff', *path))} ")
    assert "\n  Example" in ran.out
    assert "\n    crdiff " in ran.out
    assert "\\b" not in ran.out
    assert "..." not in ran.out.partition("\n")[2].replace("[ARGS]...", "")  # no sentence was cut


def test_every_command_has_json_and_quiet() -> None:
    for path in COMMAND_PATHS:
        command: Any = group
        for name in path:
            command = command.get_command(click.Context(command), name)
        if not isinstance(command, click.Group):
            options = {text for option in command.params for text in option.opts}
            assert {"--json", "-q", "--quiet"} <= options, path


def test_help_says_which_ratio_wins(crdiff: Crdiff) -> None:
    assert " ".join(crdiff("export", "-h").out.split()).count("wins over --ratio") == 3


def test_the_list_of_commands_is_that_of_the_modules() -> None:
    folder = Path(sys.modules["crdiff_export.cli"].__file__ or "").parent
    assert set(COMMANDS) == {path.stem for path in folder.glob("*.py")} - {
        "__init__", "command", "drawing_options", "evaluation_json", "options", "output", "progress_display", "signals",
        "terminal",
    }  # fmt: skip


def test_without_arguments_help_is_shown(crdiff: Crdiff) -> None:
    ran = crdiff()
    assert ran.code in (0, 2)  # before and from click 8.2 on
    assert "Commands:" in ran.out + ran.err


def test_a_misspelt_option_is_answered_with_the_nearest(crdiff: Crdiff) -> None:
    ran = crdiff("export", "demo", "--rec", 64, "--json")
    assert (ran.code, ran.error["code"]) == (2, "usage")
    assert "--recipe" in ran.error["message"]


def test_version(crdiff: Crdiff) -> None:
    assert crdiff("--version").out.startswith("crdiff, version ")


@pytest.mark.parametrize(
    ("name", "text", "check"),
    [
        ("CRDIFF_EXPORT_RES", "96x64", lambda ran: "96x64" in ran.out),
        ("CRDIFF_EXPORT_JSON", "1", lambda ran: ran.result["dry_run"]),
        ("CRDIFF_EXPORT_QUIET", "true", lambda ran: ran.out == "demo-crdiff-64x64.safetensors\n"),
        ("CRDIFF_EXPORT_RATIO", "0.5", lambda ran: "0.5" in ran.out),
        ("CRDIFF_EXPORT_OUTPUT", "env.safetensors", lambda ran: "env.safetensors" in ran.out),
        ("CRDIFF_EXPORT_NO_HASH", "1", lambda ran: ran.code == 0),
    ],
)
def test_options_from_the_environment(
    crdiff: Crdiff, monkeypatch: pytest.MonkeyPatch, name: str, text: str, check: Callable[[Ran], bool]
) -> None:
    monkeypatch.setenv(name, text)
    res = [] if name.endswith("RES") else ["--res", "64"]
    assert check(crdiff("export", "demo", "--dry-run", *res))


def test_a_bad_variable_is_named(crdiff: Crdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRDIFF_EXPORT_RES", "abc")
    monkeypatch.setenv("CRDIFF_EXPORT_JSON", "yes")
    ran = crdiff("export", "demo")
    assert ran.code == 2
    assert "'abc' is not a size" in ran.error["message"]


def test_a_bug_keeps_its_traceback(crdiff: Crdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(recipe_files, "builtin", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        crdiff("recipes", "list")


# --- as a process ---


def process(*args: object, env: Mapping[str, str] | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """A crdiff of its own."""
    command = [sys.executable, "-m", "crdiff_export", *map(str, args)]
    return subprocess.run(
        command, env={**os.environ, **(env or {})}, text=True, check=False, **{"capture_output": True, **options}
    )


def modules_after(*args: str) -> set[str]:
    """What a command imports."""
    code = (
        "import sys, json\nfrom crdiff_export.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(ran.stderr.splitlines()[-1])
    return {name.partition(".")[0] for name in found}


HEAVY = {"numpy", "numba", "torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "httpx", "requests"}


@pytest.mark.parametrize(
    "command", ["--help", "export --help", "recipes list", "recipes show sdxl --json", "recipes validate own.toml"]
)
def test_a_light_command_imports_nothing_heavy(line: Line, here: Path, command: str) -> None:
    (here / "own.toml").write_text(line("recipes show sdxl --toml").out)
    assert not modules_after(*command.split()) & HEAVY


def test_inspect_reads_headers_without_heavy_modules(shelf: Path) -> None:
    assert not modules_after("inspect", str(shelf / "sd15.safetensors")) & HEAVY


def test_export_and_verify_on_the_cpu_need_no_torch() -> None:
    assert not modules_after("export", "demo", "--res", "64") & (HEAVY - {"numpy", "numba", "safetensors"})
    file = "demo-crdiff-64x64.safetensors"
    assert not modules_after("verify", file, "--base", "demo") & (HEAVY - {"numpy", "numba", "safetensors"})


@pytest.mark.parametrize("command", [[str(ROOT / "cli.py")], ["-m", "crdiff_export"]], ids=["cli.py", "module"])
def test_other_ways_to_start(here: Path, command: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, *command, "export", "demo", "--res", "64", "-q"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "demo-crdiff-64x64.safetensors\n", "")
    assert (here / "demo-crdiff-64x64.safetensors").exists()


def test_a_checkout_that_is_not_installed(here: Path, tmp_path: Path) -> None:
    """Without the package's metadata, which a checkout lacks."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nfind = m.distribution\n"
        "def distribution(name):\n    if name == 'crdiff-export':\n        raise m.PackageNotFoundError(name)\n"
        "    return find(name)\nm.distribution = distribution\n"
    )
    for args in (["--version"], ["export", "demo", "--res", "64", "-q"]):
        ran = subprocess.run(
            [sys.executable, ROOT / "cli.py", *args],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(hide)},
        )  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, "")
    assert "checkout" in makers.metadata_of(here / "demo-crdiff-64x64.safetensors")["crdiff.version"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's way to break a pipe")
@pytest.mark.parametrize("command", ["recipes list", "inspect demo-crdiff-64x64.safetensors --metadata", "-h"])
def test_a_reader_that_leaves_is_no_accident(crdiff: Crdiff, command: str) -> None:
    crdiff("export", "demo", "--res", 64)
    read, write = os.pipe()
    os.close(read)
    ran = process(*command.split(), capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        ran = process("recipes", "list", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert ran.stderr == (
        "crdiff: standard output: No space left on device\n  Free some space, or send the output elsewhere.\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's way to close a stream")
def test_closed_streams_are_no_accident(here: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m crdiff_export export demo --res 64 >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    assert len(makers.read(here / "demo-crdiff-64x64.safetensors")) == 481


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
def test_a_file_name_of_any_bytes(here: Path) -> None:
    name = os.fsdecode(b"\xff \x1b[31m.safetensors")
    ran = subprocess.run(
        [sys.executable, "-m", "crdiff_export", "export", "demo", "--res", "64", "-q", "-o", name],
        capture_output=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, os.fsencode(name) + b"\n", b"")
    found = process("inspect", name, "--json", env={"PYTHONIOENCODING": "utf-8"})
    assert json.loads(found.stdout)["file"] == name
    failed = process("export", "demo", "--res", 64, "-o", name)
    assert failed.stderr.splitlines()[0] == "crdiff: \\udcff \\x1b[31m.safetensors: already exists"


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["plain", "NO_COLOR", "dumb"])
@pytest.mark.parametrize(
    "command", ["recipes list", "export demo --res 72", "export demo --res 97", "export demo --res x", "-h"]
)
def test_no_escapes_in_a_pipe(command: str, env: Mapping[str, str]) -> None:
    ran = process(*command.split(), env=env)
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "\r" not in ran.stdout + ran.stderr


def complete(*words: str) -> list[str]:
    """What bash would offer for the last word: `type,value`."""
    env = {"_CRDIFF_COMPLETE": "bash_complete", "COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    ran = process(env=env)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["crdiff", "ex"], ["plain,export"]),
        (["crdiff", "recipes", "v"], ["plain,validate"]),
        (["crdiff", "export", "--no"], ["plain,--no-hash"]),
        (["crdiff", "export", "sdxl"], ["plain,sdxl", "plain,sdxl-refiner", "file,sdxl"]),
        (["crdiff", "export", "./my"], ["file,./my"]),
        (["crdiff", "recipes", "show", "flux"], ["plain,flux-dev", "plain,flux-schnell", "file,flux"]),
        (["crdiff", "verify", "x", "--base", "de"], ["plain,demo", "file,de"]),
        (["crdiff", "export", "demo", "--dtype", "b"], ["plain,bf16"]),
        (["crdiff", "export", "demo", "--device", "c"], ["plain,cpu", "plain,cuda"]),
        (["crdiff", "inspect", "a"], ["file,a"]),
    ],
    ids=" ".join,
)
def test_completion(words: list[str], offered: list[str]) -> None:
    assert complete(*words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_a_script(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    ran = process(env={"_CRDIFF_COMPLETE": f"{shell}_source"})
    assert ran.returncode == 0
    assert "_CRDIFF_COMPLETE" in ran.stdout
