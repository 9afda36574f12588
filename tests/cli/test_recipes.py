"""`crdiff recipes`: the list, one recipe, and what is wrong with one."""

from pathlib import Path

import pytest

from crdiff_export.models import recipe_files
from tests.support.command_lines import UNTUNED, Line
from tests.support.isolation import Crdiff, Ran
from tests.support.messages import refused

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("command", ["recipes", "recipes list"])
def test_recipes_are_listed(line: Line, command: str) -> None:
    ran = line(command)
    assert (ran.code, ran.err) == (0, "")
    head, *rows = ran.out.splitlines()
    assert head.split() == ["alias", "model", "native", "ratios", "sizes"]
    assert tuple(row.split()[0] for row in rows) == recipe_files.aliases()
    demos = [row for row in rows if "starting-point" not in row]
    assert [row.split()[0] for row in demos] == ["demo", "demo-xl"]
    assert all("partly searched" in row for row in demos)


def test_recipes_are_listed_as_json(line: Line) -> None:
    found = line("recipes list --json").result["recipes"]
    assert [recipe["name"] for recipe in found] == [f"{alias}.toml" for alias in recipe_files.aliases()]
    searched = {recipe["family"] for recipe in found for one in recipe["variants"] if one["provenance"] == "searched"}
    assert searched == {"demo", "demo-xl"}


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
    assert "Mine\\x1b[31m" in ran.out
    assert "base:    none" in ran.out
    assert ran.out.splitlines()[-6:] == [
        "512x512: starting point, not tuned (a guess)",
        "768x768: searched (a search)",
        "",
        "size     down  mid   up  POA weight  prompt  ratios          measured",
        "512x512   0.1  0.2  0.3         1.5  a cat   starting point  -",
        "768x768   0.1  0.2  0.3           2  any     searched        pruned 0.5, scorer s, seeds 3",
    ]
    _, searched = line("recipes show own.toml --json").result["variants"]
    assert searched["evidence"] == {"scorer": "s", "pruned": 0.5, "seeds": 3}


def test_a_recipe_as_toml_is_a_recipe(line: Line, here: Path) -> None:
    (here / "own.toml").write_text(line("recipes show flux-dev --toml").out)
    assert line("recipes validate own.toml").out == "own.toml: a recipe for FLUX.1 dev with 4 variants\n"
    assert line("recipes validate own.toml -q") == Ran(0, "", "")
    assert line("recipes validate own.toml own.toml --json").result == {"schema": 1, "valid": ["own.toml", "own.toml"]}


@pytest.mark.parametrize("alias", recipe_files.aliases())
def test_the_built_in_recipes_are_valid(crdiff: Crdiff, alias: str) -> None:
    assert crdiff("recipes", "validate", recipe_files.builtin_path() / f"{alias}.toml").code == 0


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"sdxl"', '"sdxxl"', "own.toml: no model family is called 'sdxxl'"),
        ('"400x560"', '"401x560"', "own.toml: variant 1 (401x560): 401x560"),
        ("down =", "blocks =", "own.toml: variant 1 (400x560): ratios.blocks"),
        ("poa_weight", 'targets = ["attn2"]\npoa_weight', "own.toml: variant 1 (400x560): targets names attn2"),
        ("[model]", "[modell]", "own.toml: modell"),
        ("1.5", "1.5.1", "own.toml: "),
    ],
    ids=["family", "grid", "group", "targets", "key", "toml"],
)
def test_a_recipe_is_refused(line: Line, here: Path, old: str, new: str, key: str) -> None:
    (here / "own.toml").write_text(line("recipes show sdxl --toml").out.replace(old, new, 1))
    refused(line("recipes validate own.toml"), 1, f"crdiff: {key}")
