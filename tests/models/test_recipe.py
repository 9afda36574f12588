"""Recipes: their format, the variant that is chosen for a size, and the errors of wrong ones."""

import dataclasses
import json
import math
import random
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdiff_export.errors import OptionError, RecipeError
from crdiff_export.formats.text import WARNING, nearest
from crdiff_export.models import families, recipe_files
from crdiff_export.models.families import Kind
from crdiff_export.models.recipe import (
    START_POA_WEIGHT,
    TARGETS,
    Choice,
    Evidence,
    Recipe,
    Variant,
    borrow,
    check_groups,
    choose,
    override,
    override_poa_weight,
)
from crdiff_export.models.recipe_files import (
    aliases,
    builtin,
    builtin_path,
    by_alias,
    load,
    unknown_alias_hint,
)
from crdiff_export.models.recipe_toml import EVIDENCE_KEYS, dump, parse
from crdiff_export.sizes import MAX_SIDE, Size, check_grid
from tests.support.messages import raises

UNET = ("down", "mid", "up")
MODEL = """
[model]
family = "sdxl"
title = "SDXL"
native = "1024x1024"
"""
VARIANT = """
[[variant]]
resolution = "400x560"
ratios = { down = 0.3, mid = 0.2, up = 0.1 }
poa_weight = 1.5
provenance = "starting-point"
source = "a test"
"""
EVIDENCE = """
[variant.evidence]
scorer = "ImageReward"
pruned = 0.5
"""


def variant(size: str = "512x512", *, prompt: str | None = None, share: float = 0.3) -> Variant:
    return Variant(Size.parse(size), dict.fromkeys(UNET, share), 1.5, "starting-point", "a test", prompt=prompt)


def recipe(*variants: Variant) -> Recipe:
    return Recipe("sdxl", "SDXL", Size(1024, 1024), None, None, variants, "own.toml")


def changed(old: str, new: str, text: str = MODEL + VARIANT) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


# --- the built-in recipes ---


def test_there_is_one_recipe_per_family_under_its_id() -> None:
    assert aliases() == tuple(sorted(family.id for family in families.all_families()))
    assert [(made.name, made.family) for made in builtin()] == [(f"{alias}.toml", alias) for alias in aliases()]
    assert [made.family for made in builtin() if made.repo is None] == ["demo", "demo-xl"]


@pytest.mark.parametrize("made", builtin(), ids=lambda made: made.family)
def test_a_builtin_recipe_fits_its_family_and_claims_nothing(made: Recipe) -> None:
    family = families.by_id(made.family)
    assert (made.title, made.native) == (family.title, Size(*family.native or ()))
    opening = (builtin_path() / made.name).read_text("utf-8").splitlines()[0]
    measured = {"demo": 162, "demo-xl": 192}.get(made.family)  # those that docs/demo.md and docs/demo-xl.md have
    worth = "ratios that were searched for, and what they do." if measured else "starting points, not tuned values."
    assert opening.startswith("# ")
    assert opening.endswith(f": {worth}")
    if made.family in ("sd15", "sd21", "sdxl"):  # the sizes of the paper
        assert {"400x560", "480x360"} <= {str(each.resolution) for each in made.variants}
    assert made.variants
    for each in made.variants:
        assert (each.prompt, each.targets) == (None, None)
        if measured:
            assert each.evidence
            assert (each.evidence.scorer, each.evidence.prompts) == ("demo", measured)
            assert each.evidence.interval
        else:
            assert each.evidence is None
        if each.provenance == "searched":
            assert measured
            assert each.source.startswith("crdiff search: tpe, seed 42, ")
        else:
            assert each.provenance == "starting-point"
            assert "CR-Diff public code" in each.source
            assert each.ratios == dict.fromkeys(family.groups, 0.3)
            assert each.poa_weight == 1.5
        check_groups(each, family.groups, made.name)
        check_grid(each.resolution, family.grid, family.title)


@pytest.mark.parametrize("name", ["SDXL", "sdxl.toml", "../recipes/sdxl", "", "a/b", "sd1.5", "*"])
def test_what_is_no_alias_is_none(name: str) -> None:
    assert by_alias(name) is None


def test_an_unknown_alias_is_answered_with_the_nearest_and_all() -> None:
    assert unknown_alias_hint("SDLX") == f"Did you mean sdxl? The built-in recipes are: {', '.join(aliases())}."
    assert unknown_alias_hint("?") == f"The built-in recipes are: {', '.join(aliases())}."


def test_recipes_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "crdiff_export"
    package.mkdir(parents=True)
    monkeypatch.setattr(recipe_files, "__file__", str(package / "models" / "recipe_files.py"))
    with pytest.raises(RecipeError, match="built-in recipes are missing"):
        builtin_path()
    (tmp_path / "site" / "recipes").mkdir()
    assert builtin_path() == tmp_path / "site" / "recipes"
    (package / "recipes").mkdir()
    assert builtin_path() == package / "recipes"


def test_targets_are_the_kinds_that_families_know() -> None:
    assert set(TARGETS) == set(get_args(Kind))


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2048", Size(2048, 2048)),
        ("400x560", Size(400, 560)),
        (" 400 X 560 ", Size(400, 560)),
        ("400\u00d7560", Size(400, 560)),
        ("0064", Size(64, 64)),
        ("1", Size(1, 1)),
        (str(MAX_SIDE), Size(MAX_SIDE, MAX_SIDE)),
    ],
)
def test_size(text: str, size: Size) -> None:
    assert Size.parse(text) == size
    assert Size.parse(str(size)) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "400x", "400x560x3", "-400", "4.5", "1e3", "\u0664\u0660\u0660", "400\nx560\x1b", "9" * 5000),
        *("0x0", "512x0", "16385x16385", "999999999x8"),
    ],
)
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with raises(RecipeError, text if re.fullmatch(r"\d{1,9}x\d{1,9}", text) else repr(text[:40])):
        Size.parse(text)


@pytest.mark.parametrize(
    ("target", "grid", "use"),
    [("401x560", 8, "400x560"), ("404x564", 16, "400x560"), ("408x568", 16, "416x576"), ("1x3", 8, "8x8")],
)
def test_a_size_off_the_latent_grid_is_answered_with_the_nearest(target: str, grid: int, use: str) -> None:
    with raises(OptionError, target, "SDXL", grid) as error:
        check_grid(Size.parse(target), grid, "SDXL")
    assert use in error.value.hint
    check_grid(Size.parse(use), grid, "SDXL")


@given(st.integers(1, MAX_SIDE), st.integers(1, MAX_SIDE), st.sampled_from([8, 16]))
def test_the_size_to_use_is_valid_and_less_than_a_step_away(width: int, height: int, grid: int) -> None:
    try:
        check_grid(Size(width, height), grid, "SDXL")
    except RecipeError as error:
        use = Size.parse(error.hint.removeprefix("Use ").removesuffix("."))
        check_grid(use, grid, "SDXL")
        assert max(abs(use.width - width), abs(use.height - height)) < grid
    else:
        assert width % grid == height % grid == 0


# --- reading ---


def test_a_recipe_reads_as_written() -> None:
    text = changed("[[variant]]", 'repo = "o/n"\nfile = "a/b.safetensors"\n[[variant]]\ntargets = ["ff"]\nprompt = "p"')
    text += EVIDENCE + 'prompts = 16\ndense = 0\ninterval = [0.1, 1]\nsteps = 30\nsampler = "euler"\nheld_out = true\n'
    assert parse(text, "own.toml") == Recipe(
        family="sdxl",
        title="SDXL",
        native=Size(1024, 1024),
        repo="o/n",
        file="a/b.safetensors",
        variants=(
            Variant(
                resolution=Size(400, 560),
                ratios={"down": 0.3, "mid": 0.2, "up": 0.1},
                poa_weight=1.5,
                provenance="starting-point",
                source="a test",
                targets=("ff",),
                prompt="p",
                evidence=Evidence(
                    scorer="ImageReward",
                    pruned=0.5,
                    dense=0.0,
                    prompts=16,
                    interval=(0.1, 1.0),
                    extra={"steps": 30, "sampler": "euler", "held_out": True},
                ),
            ),
        ),
        name="own.toml",
    )


def test_a_recipe_may_have_no_variants() -> None:
    assert parse(MODEL, "own.toml").variants == ()


def test_one_size_may_have_a_variant_per_prompt() -> None:
    text = MODEL + VARIANT + VARIANT + 'prompt = "a"\n' + VARIANT + 'prompt = "b"\n'
    assert [each.prompt for each in parse(text, "own.toml").variants] == [None, "a", "b"]


def test_evidence_may_have_keys_like_those_it_uses() -> None:
    (each,) = parse(MODEL + VARIANT + EVIDENCE + "prompts = 16\nprompts_2 = 4", "own.toml").variants
    assert each.evidence == Evidence("ImageReward", 0.5, prompts=16, extra={"prompts_2": 4})


@pytest.mark.parametrize("provenance", ["searched", "published"])
def test_measured_numbers_are_read_with_their_evidence(provenance: str) -> None:
    (each,) = parse(changed("starting-point", provenance) + EVIDENCE, "own.toml").variants
    assert (each.provenance, each.evidence) == (provenance, Evidence("ImageReward", 0.5))


# The library that reads TOML words these, and words them otherwise in another version of Python.
NO_TOML = {
    "syntax": ("[model]\nfamily = \n", "line 2, column 10: "),
    "open string": ('[model]\nfamily = "', "end of document: "),
    "key twice": (changed('title = "SDXL"', 'title = "SDXL"\ntitle = "SDXL"'), "line 5, column 15: "),
    "deep": ("a = " + "[" * 100_000, ""),
    "digits": (f"a = {'9' * 5000}", ""),
}
BROKEN = {
    "empty": ("", "model is missing"),
    "model list": ("model = [1]", "model is an array"),
    "unknown table": (MODEL + "[variants]\n", "variants"),
    "unknown model key": (changed("title", "tittle"), "model.tittle"),
    "no family": (changed('family = "sdxl"', ""), "model.family is missing"),
    "no title": (changed('title = "SDXL"', ""), "model.title is missing"),
    "no native": (changed('native = "1024x1024"', ""), "model.native is missing"),
    "blank title": (changed('"SDXL"', '" "'), "model.title is ' '"),
    "family of a path": (changed('"sdxl"', '"../sdxl"'), "model.family is '../sdxl'"),
    "native off": (changed('"1024x1024"', '"1024x"'), "model.native: '1024x'"),
    "native number": (changed('"1024x1024"', "1024"), "model.native is 1024"),
    "repo url": (MODEL + 'repo = "https://hf.co/o/n"', "model.repo is 'https://hf.co/o/n'"),
    "file alone": (MODEL + 'file = "a"', "model.file is 'a'"),
    "file above": (MODEL + 'repo = "o/n"\nfile = "../a"', "model.file is '../a'"),
    "file of windows": (MODEL + 'repo = "o/n"\nfile = "a\\\\b"', r"model.file is 'a\\b'"),
    "long text": (
        changed('"sdxl"', f'"{"x " * 99}"'),
        "model.family is 'x x x x x x x x x x x x x x x x x x x x x x x x x x x x x...'",
    ),
    "file at root": (MODEL + 'repo = "o/n"\nfile = "/a"', "model.file is '/a'"),
    "one variant table": (changed("[[variant]]", "[variant]"), "variant is a table"),
    "variant list": ("variant = [1]\n" + MODEL, "variant is an array"),
    "no resolution": (changed('resolution = "400x560"', ""), "resolution is missing"),
    "bad resolution": (changed("400x560", "400 by 560"), "resolution: '400 by 560'"),
    "resolution too large": (changed("400x560", "400x99999"), "variant 1 (400x99999): resolution: 400x99999"),
    "resolution table": (changed('"400x560"', "{ w = 1 }"), "resolution is a table"),
    "unknown key": (changed("poa_weight", "poa_wieght"), "poa_wieght"),
    "unprintable key": (changed("poa_weight", '"\\u001b[31m"'), r"'\x1b[31m'"),
    "no ratios": (changed("ratios = { down = 0.3, mid = 0.2, up = 0.1 }", ""), "ratios is missing"),
    "empty ratios": (changed("{ down = 0.3, mid = 0.2, up = 0.1 }", "{}"), "ratios is empty"),
    "one ratio": (changed("{ down = 0.3, mid = 0.2, up = 0.1 }", "0.3"), "ratios is 0.3"),
    "ratio above": (changed("mid = 0.2", "mid = 1.2"), "ratios.mid is 1.2"),
    "ratio one": (changed("mid = 0.2", "mid = 1"), "ratios.mid is 1.0"),
    "ratio below": (changed("mid = 0.2", "mid = -0.1"), "ratios.mid is -0.1"),
    "ratio nan": (changed("mid = 0.2", "mid = nan"), "ratios.mid is nan"),
    "ratio text": (changed("mid = 0.2", 'mid = "a"'), "ratios.mid is 'a'"),
    "ratio true": (changed("mid = 0.2", "mid = true"), "ratios.mid is true"),
    "no weight": (changed("poa_weight = 1.5", ""), "poa_weight is missing"),
    "weight inf": (changed("1.5", "inf"), "poa_weight is inf"),
    "weight below": (changed("1.5", "-1"), "poa_weight is -1.0"),
    "weight above": (changed("1.5", "15"), "poa_weight is 15.0"),
    "weight date": (changed("1.5", "2026-01-01"), "poa_weight is 2026-01-01"),
    "weight of 20000 bits": (changed("1.5", "0x" + "f" * 5000), "poa_weight is a huge integer"),
    "provenance": (changed("starting-point", "tuned"), "provenance is 'tuned'"),
    "searched, no evidence": (changed("starting-point", "searched"), "provenance is 'searched'"),
    "published, no evidence": (changed("starting-point", "published"), "provenance is 'published'"),
    "no source": (changed('source = "a test"', ""), "source is missing"),
    "long source": (changed('"a test"', f'["{"s" * 99}"]'), "source is an array"),
    "targets text": (MODEL + VARIANT + 'targets = "ff"', "targets is 'ff'"),
    "targets none": (MODEL + VARIANT + "targets = []", "targets is an array"),
    "targets unknown": (MODEL + VARIANT + 'targets = ["ff", "mlp"]', "targets"),
    "targets twice": (MODEL + VARIANT + 'targets = ["ff", "ff"]', "targets"),
    "prompt empty": (MODEL + VARIANT + 'prompt = ""', "prompt is ''"),
    "third variant": (
        MODEL + VARIANT + 'prompt = "a"' + VARIANT + 'prompt = "b"' + VARIANT + "x = 1",
        "variant 3 (",
    ),
    "same size": (MODEL + VARIANT + VARIANT, "variant 2"),
    "same size, otherwise written": (MODEL + VARIANT + changed("400x560", "0400 x 560", VARIANT), "variant 2"),
    "evidence text": (MODEL + VARIANT + 'evidence = "seen"', "evidence is 'seen'"),
    "no scorer": (
        changed('scorer = "ImageReward"', "", MODEL + VARIANT + EVIDENCE),
        "evidence.scorer is missing",
    ),
    "no score": (changed("pruned = 0.5", "", MODEL + VARIANT + EVIDENCE), "evidence.pruned is missing"),
    "misspelt evidence": (MODEL + VARIANT + EVIDENCE + "promts = 16", "evidence.promts looks like prompts"),
    "evidence list": (MODEL + VARIANT + EVIDENCE + "seeds = [1]", "evidence.seeds is an array"),
    "evidence nan": (MODEL + VARIANT + EVIDENCE + "noise = nan", "evidence.noise is nan"),
    "evidence huge": (MODEL + VARIANT + EVIDENCE + f"seed = {2**63}", f"evidence.seed is {2**63}"),
    "prompts zero": (MODEL + VARIANT + EVIDENCE + "prompts = 0", "evidence.prompts is 0"),
    "prompts huge": (MODEL + VARIANT + EVIDENCE + f"prompts = {2**63}", f"evidence.prompts is {2**63}"),
    "prompts half": (MODEL + VARIANT + EVIDENCE + "prompts = 1.5", "evidence.prompts is 1.5"),
    "prompts true": (MODEL + VARIANT + EVIDENCE + "prompts = true", "evidence.prompts is true"),
    "interval of one": (MODEL + VARIANT + EVIDENCE + "interval = [1]", "evidence.interval is an array"),
    "interval of texts": (MODEL + VARIANT + EVIDENCE + 'interval = [1, "2"]', "evidence.interval is '2'"),
    "interval reversed": (MODEL + VARIANT + EVIDENCE + "interval = [2, 1]", "evidence.interval"),
}


@pytest.mark.parametrize(("text", "key"), NO_TOML.values(), ids=NO_TOML)
def test_text_that_is_no_toml_is_refused(text: str, key: str) -> None:
    with pytest.raises(RecipeError, match=f"^own.toml: {key}") as error:
        parse(text, "own.toml")
    assert "\n" not in error.value.message
    assert len(error.value.message) < 200


@pytest.mark.parametrize(("text", "key"), BROKEN.values(), ids=BROKEN)
def test_a_broken_recipe_is_refused(text: str, key: str) -> None:
    with raises(RecipeError, "own.toml: ", key) as error:
        parse(text, "own.toml")
    assert "\n" not in error.value.message
    assert len(error.value.message) < 200


@pytest.mark.parametrize(
    ("text", "example"),
    [
        (changed("poa_weight", "poa_wieght"), "poa_weight?"),
        (changed("poa_weight", "w"), "resolution, ratios, poa_weight, "),
        (changed("poa_weight = 1.5", ""), "poa_weight = 1.5"),
        (changed("mid = 0.2", "mid = true"), "mid = 0.3"),
        (changed("mid = 0.2", "mid = 1.2"), "30 %"),
        (changed('"400x560"', "1"), 'resolution = "400x560"'),
        (changed("starting-point", "searched"), 'provenance = "starting-point"'),
    ],
)
def test_the_hint_says_what_to_write(text: str, example: str) -> None:
    with raises(RecipeError) as error:
        parse(text, "own.toml")
    assert example in error.value.hint


# --- files ---


def test_a_file_is_read_under_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (MODEL + VARIANT).replace("\n", "\r\n").encode())
    assert load(path) == load(str(path)) == parse(MODEL + VARIANT, "own.toml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with raises(RecipeError, tmp_path / "own.toml"):
        load(tmp_path / "own.toml")


# --- writing ---

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
numbers = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.builds(Size, st.integers(1, MAX_SIDE), st.integers(1, MAX_SIDE))
extra_keys = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda key: key not in EVIDENCE_KEYS and nearest(key, EVIDENCE_KEYS, cutoff=0.8) is None
)
evidences = st.builds(
    Evidence,
    scorer=texts,
    pruned=numbers,
    dense=st.none() | numbers,
    prompts=st.none() | st.integers(1, 2**63 - 1),
    interval=st.none() | st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair))),
    extra=st.dictionaries(extra_keys, texts | numbers | st.booleans() | st.integers(-(2**63), 2**63 - 1), max_size=3),
)
variants = st.builds(
    Variant,
    resolution=sizes,
    ratios=st.dictionaries(texts, st.floats(0, 1, exclude_max=True), min_size=1, max_size=3),
    poa_weight=st.floats(0, 10),
    provenance=st.sampled_from(["starting-point", "searched", "published"]),
    source=texts,
    targets=st.none() | st.lists(st.sampled_from(TARGETS), unique=True, min_size=1).map(tuple),
    prompt=st.none() | texts,
    evidence=evidences,
)
recipes = st.builds(
    Recipe,
    family=st.sampled_from(["sdxl", "sd3-medium", "x.1"]),
    title=texts,
    native=sizes,
    repo=st.just("owner/name.1"),
    file=st.none() | st.just("a/b c.safetensors"),
    variants=st.lists(variants, max_size=3, unique_by=lambda each: (each.resolution, each.prompt)).map(tuple),
    name=st.just("own.toml"),
)


@settings(max_examples=150)
@given(recipes)
def test_what_is_written_reads_back_equal(made: Recipe) -> None:
    text = dump(made)
    assert parse(text, made.name) == made
    assert dump(parse(text, made.name)) == text
    assert parse(text.encode().decode(), made.name) == made


@pytest.mark.parametrize("made", builtin(), ids=lambda made: made.family)
def test_a_builtin_recipe_is_written_as_it_stands_but_for_comments_and_order(made: Recipe) -> None:
    assert tomllib.loads(dump(made)) == tomllib.loads((builtin_path() / made.name).read_text("utf-8"))


def test_the_written_form() -> None:
    each = dataclasses.replace(
        variant("400x560"),
        prompt='say "hi"\\\n\x00\x7f\u2028é',
        evidence=Evidence("ImageReward", 0.5, interval=(0.1, 1.0), extra={"a b": 1}),
    )
    assert dump(recipe(each)) == (
        '[model]\nfamily = "sdxl"\ntitle = "SDXL"\nnative = "1024x1024"\n\n'
        '[[variant]]\nresolution = "400x560"\nratios = { down = 0.3, mid = 0.3, up = 0.3 }\npoa_weight = 1.5\n'
        'prompt = "say \\"hi\\"\\\\\\u000a\\u0000\\u007f\u2028é"\nprovenance = "starting-point"\nsource = "a test"\n\n'
        '[variant.evidence]\nscorer = "ImageReward"\npruned = 0.5\ninterval = [0.1, 1.0]\n"a b" = 1\n'
    )


@given(
    st.text(max_size=60)
    | st.sampled_from([MODEL, VARIANT, EVIDENCE]).flatmap(lambda part: st.text(max_size=5).map(part.__add__))
)
def test_no_text_raises_anything_but_a_recipe_error(text: str) -> None:
    for read in (parse, recipe_files.from_public_config):
        try:
            read(text, "own.toml")
        except RecipeError as error:
            assert error.message.startswith("own.toml: ")  # noqa: PT017  # most texts are refused, not all


# --- the public code's config.json ---


def public(**changes: object) -> str:
    document: dict[str, object] = {
        "model_config": {"name": "sdxl", "width": 400, "height": 560},
        "best_avg_score": 0.735,
        "best_global_params_ratio": {"down_ratio": 0.41, "up_ratio": 0.22, "mid_ratio": 0.33},
    }
    return json.dumps({key: value for key, value in (document | changes).items() if value is not ...})


def of_model(**config: object) -> str:
    return public(model_config={"width": 8, "height": 8, **config})


def of_ratios(**ratios: float) -> str:
    return public(best_global_params_ratio=ratios)


def test_a_public_config_becomes_a_searched_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.JSON").write_text(public())
    made = load(tmp_path / "config.JSON")
    assert (made.family, made.title, made.native, made.name) == ("sdxl", "SDXL", Size(1024, 1024), "config.JSON")
    assert (made.repo, made.file) == (None, None)
    assert made.variants == (
        Variant(
            resolution=Size(400, 560),
            ratios={"down": 0.41, "mid": 0.33, "up": 0.22},
            poa_weight=1.5,
            provenance="searched",
            source="the ratio search of the CR-Diff public code, which never scores the dense model",
            evidence=Evidence("ImageReward", 0.735, extra={"model": "sdxl"}),
        ),
    )
    assert parse(dump(made), made.name) == made


@pytest.mark.parametrize(
    "ratios",
    [
        {"down": 0.41, "mid": 0.33, "up": 0.22},
        {"up_blocks": 0.22, "mid_block": 0.33, "down_blocks": 0.41},
        {"up_ratio": 0.22, "mid_ratio": 0.33, "down_ratio": 0.41},
        [0.41, 0.22, 0.33],
    ],
)
def test_the_ratios_of_a_public_config_in_every_spelling(ratios: object) -> None:
    (each,) = recipe_files.from_public_config(public(best_global_params_ratio=ratios), "config.json").variants
    assert each.ratios == {"down": 0.41, "mid": 0.33, "up": 0.22}


@pytest.mark.parametrize(
    ("name", "path", "family", "model"),
    [
        ("sd1.5", None, "sd15", "sd1.5"),
        ("sd2.1", None, "sd21", "sd2.1"),
        ("SD15", None, "sd15", "SD15"),
        (None, "runwayml/stable-diffusion-v1-5", "sd15", "runwayml/stable-diffusion-v1-5"),
        (None, "stabilityai/stable-diffusion-2-1", "sd21", "stabilityai/stable-diffusion-2-1"),
        (None, "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("mine", "/home/me/secret/sd_xl_refiner_1.0.safetensors", "sdxl-refiner", "sd_xl_refiner_1.0.safetensors"),
        ("mine", "C:\\models\\v1-5-pruned.safetensors", "sd15", "v1-5-pruned.safetensors"),
        ("sdxl", "/home/me/v2-1/", "sdxl", "v2-1"),
        ("sdxl", "/", "sdxl", "sdxl"),
    ],
)
def test_the_family_of_a_public_config(name: str | None, path: str | None, family: str, model: str) -> None:
    made = recipe_files.from_public_config(of_model(name=name, model_path=path), "config.json")
    (each,) = made.variants
    assert (made.family, each.evidence) == (family, Evidence("ImageReward", 0.735, extra={"model": model}))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sd3", "sd3-medium"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3-medium"),
        ("stabilityai/stable-diffusion-3.5-medium", "sd35-medium"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd35-large"),
        ("flux", "flux-dev"),
        ("black-forest-labs/FLUX.1-schnell", "flux-schnell"),
    ],
)
def test_the_shared_ratio_of_a_transformer(name: str, family: str) -> None:
    config = {"name": name, "width": 512, "height": 512}
    text = public(model_config=config, best_global_params_sd3={"shared_ratio": 0.25})
    made = recipe_files.from_public_config(text, "config.json")
    assert (made.family, made.variants[0].ratios) == (family, {"blocks": 0.25})


BROKEN_PUBLIC = {
    "list": ("[1]", "model_config"),
    "null": ("null", "model_config"),
    "no model": (public(model_config=...), "model_config"),
    "no name": (of_model(), "model_config.name"),
    "unknown name": (of_model(name="pony"), "model_config.name is 'pony'"),
    "sd3.5 of no size": (of_model(name="sd3.5"), "model_config.name is 'sd3.5'"),
    "a family far up the path": (
        of_model(model_path="/sdxl/mine/pony"),
        "model_config.model_path is '/sdxl/mine/pony'",
    ),
    "name list": (of_model(name=[]), "model_config.name is an array"),
    "lone surrogate": (of_model(name="sdxl\ud800"), r"model_config.name is 'sdxl\ud800'"),
    "no width": (public(model_config={"name": "sdxl", "height": 8}), "model_config.width"),
    "width text": (of_model(name="sdxl", width="512"), "model_config.width is '512'"),
    "width too large": (of_model(name="sdxl", width=20000), "(20000x8): resolution: 20000x8"),
    "no score": (public(best_avg_score=...), "best_avg_score"),
    "score null": (public(best_avg_score=None), "best_avg_score is null"),
    "score nan": (public(best_avg_score=math.nan), "best_avg_score is nan"),
    "all failed": (public(best_avg_score=-2.0), "best_avg_score is -2"),
    "thresholds": (public(pruning_method="magnitude"), "pruning_method is 'magnitude'"),
    "no ratios": (public(best_global_params_ratio=...), "best_global_params_ratio"),
    "two ratios": (public(best_global_params_ratio=[0.1, 0.2]), "best_global_params_ratio is an array"),
    "no mid": (of_ratios(down=0.1, up=0.1), "best_global_params_ratio.mid_ratio"),
    "mid twice": (of_ratios(down=0.1, up=0.1, mid=0.1, mid_block=0.2), "best_global_params_ratio.mid"),
    "other group": (of_ratios(down=0.1, up=0.1, mid=0.1, middle=0.2), "best_global_params_ratio.middle"),
    "ratio above": (public(best_global_params_ratio=[0.1, 0.2, 1]), "ratios.mid is 1.0"),
    "transformer without shared ratio": (of_model(name="flux"), "best_global_params_sd3"),
}


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["syntax", "deep"])
def test_a_public_config_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^config.json: not JSON: "):
        recipe_files.from_public_config(text, "config.json")


@pytest.mark.parametrize(("text", "key"), BROKEN_PUBLIC.values(), ids=BROKEN_PUBLIC)
def test_a_broken_public_config_is_refused(text: str, key: str) -> None:
    with raises(RecipeError, "config.json", key):
        recipe_files.from_public_config(text, "config.json")


# --- choosing ---


def test_a_size_without_a_variant_takes_the_nearest_and_says_so() -> None:
    assert choose(recipe(variant("512x512"), variant("400x560")), Size(400, 560)) == Choice(variant("400x560"))
    choice = choose(recipe(variant("2048x2048"), variant()), Size(576, 576))
    note = "no variant for 576x576; its numbers are borrowed from 512x512, a starting point"
    assert choice == Choice(variant(), note)


@pytest.mark.parametrize(
    ("target", "is_far"),
    [
        ("512x768", False),  # 1.5 times the area, and 1.5 times as high for its width
        ("512x776", True),
        ("624x624", False),
        ("632x632", True),  # 1.52 times the area
        ("416x416", True),  # as many times less
        ("632x416", True),  # the area, but 1.52 times as wide
        ("416x632", True),
    ],
)
def test_numbers_from_afar_come_with_a_warning(target: str, *, is_far: bool) -> None:
    note = choose(recipe(variant()), Size.parse(target)).note
    assert note
    assert note.startswith(WARNING) == is_far
    assert "borrowed from 512x512" in note


def test_borrowed_numbers_are_a_starting_point_without_evidence() -> None:
    assert borrow(SEARCHED, SEARCHED.resolution) is SEARCHED
    assert borrow(SEARCHED, Size(96, 64)) == dataclasses.replace(
        SEARCHED, provenance="starting-point", evidence=None, borrowed_from=SEARCHED.resolution
    )


@pytest.mark.parametrize(
    ("target", "sizes", "chosen"),
    [
        ("1024", ["512", "2048"], "512"),  # as far down as up: the smaller width
        ("24", ["8", "72"], "8"),  # the same, though the last digit of the logarithms says otherwise
        ("512", ["512x768", "768x512"], "512x768"),  # as far to portrait as to landscape
        ("512x896", ["512x768", "768x768"], "512x768"),
        ("900x500", ["512x768", "768x512"], "768x512"),
        ("600x400", ["600x800", "300x200"], "600x800"),  # hypot(ln 2, ln 2) against ln 4
        ("16384", ["1", "8192"], "8192"),
    ],
)
def test_nearest(target: str, sizes: list[str], chosen: str) -> None:
    made = [variant(size) for size in sizes]
    for order in (made, made[::-1]):
        assert choose(recipe(*order), Size.parse(target)).variant.resolution == Size.parse(chosen)


def oracle(size: Size, target: Size) -> float:
    """The distance from its definition, squared: areas and aspects as exact fractions, one logarithm each."""
    area = math.log(size.width * size.height / (target.width * target.height))
    aspect = math.log(size.width * target.height / (size.height * target.width))
    return area * area + aspect * aspect


@given(st.lists(sizes, min_size=1, max_size=6, unique=True), sizes, st.randoms(use_true_random=False))
def test_choosing_is_nearest_total_and_blind_to_order(made: list[Size], target: Size, chance: random.Random) -> None:
    choice = choose(recipe(*[variant(str(size)) for size in made]), target)
    assert choice.variant.resolution in made
    assert oracle(choice.variant.resolution, target) <= min(oracle(size, target) for size in made) + 1e-6
    assert (choice.note is None) == (target in made)
    chance.shuffle(made)
    assert choose(recipe(*[variant(str(size)) for size in made]), target) == choice


def test_a_prompt_takes_its_own_variant_and_no_other_prompt_does() -> None:
    made = recipe(variant(share=0.1), variant(prompt="a cat", share=0.2), variant("640", prompt="a dog", share=0.5))
    assert choose(made, Size(512, 512)).variant.ratios["mid"] == 0.1
    assert choose(made, Size(640, 640)).variant.ratios["mid"] == 0.1
    own = choose(made, Size(512, 512), prompt="a cat")
    assert (own.variant.ratios["mid"], own.note) == (0.2, None)
    other = choose(made, Size(512, 512), prompt="a fox")
    assert other.variant.ratios["mid"] == 0.1
    assert other.note == "no variant for 512x512 and this prompt; using the one for any prompt"


@pytest.mark.parametrize("variants", [(), (variant(prompt="a cat"),)], ids=["none", "for a prompt"])
def test_a_recipe_without_a_fitting_variant_is_refused(variants: tuple[Variant, ...]) -> None:
    with raises(RecipeError, "own.toml", "for any prompt" if variants else "no variant"):
        choose(recipe(*variants), Size(1024, 1024))


# --- the user's own numbers ---

SEARCHED = dataclasses.replace(
    variant(prompt="a cat"), provenance="searched", source="a search", poa_weight=2.5,
    evidence=Evidence("ImageReward", 0.5, extra={"poa": 0.6, "poa_low": 0.1, "poa_high": 0.2, "torch": "2"}),
)  # fmt: skip


def test_nothing_given_changes_nothing() -> None:
    assert override(SEARCHED, UNET) is SEARCHED


@pytest.mark.parametrize(
    ("numbers", "ratios"),
    [
        ({"ratio": 0.5}, (0.5, 0.5, 0.5)),
        ({"per_group": {"mid": 0}}, (0.3, 0, 0.3)),
        ({"ratio": 0.5, "per_group": {"up": 0.1}}, (0.5, 0.5, 0.1)),
    ],
    ids=["all", "one", "one wins over all"],
)
def test_a_ratio_of_the_user_ends_the_whole_claim(numbers: dict[str, Any], ratios: tuple[float, ...]) -> None:
    assert override(SEARCHED, UNET, **numbers) == dataclasses.replace(
        SEARCHED, ratios=dict(zip(UNET, ratios, strict=True)), provenance="starting-point",
        source="given on the command line", evidence=None, prompt=None, poa_weight=START_POA_WEIGHT,
    )  # fmt: skip


def test_the_poa_weight_goes_with_the_ratios_that_it_was_found_with() -> None:
    assert override(SEARCHED, UNET, ratio=0.3).poa_weight == SEARCHED.poa_weight
    assert override(SEARCHED, UNET, per_group={"up": 0.3}).poa_weight == SEARCHED.poa_weight
    assert override(SEARCHED, UNET, per_group={"up": 0.31}).poa_weight == START_POA_WEIGHT


def test_only_a_full_set_of_ratios_is_not_borrowed() -> None:
    borrowed = borrow(SEARCHED, Size(96, 64))
    assert override(borrowed, UNET, ratio=0.5).borrowed_from is None
    assert override(borrowed, UNET, per_group={"up": 0.5}).borrowed_from == SEARCHED.resolution


def test_a_full_set_needs_nothing_of_the_variant() -> None:
    assert override(SEARCHED, ("blocks",), ratio=0.5).ratios == {"blocks": 0.5}


def test_the_poa_weight_leaves_the_ratios_where_they_come_from() -> None:
    made = override_poa_weight(SEARCHED, 2)
    assert (made.poa_weight, made.provenance) == (2, "searched")
    assert made.evidence == Evidence("ImageReward", 0.5, extra={"torch": "2"})  # POA was measured at another weight
    assert override_poa_weight(SEARCHED, 2.5).evidence == SEARCHED.evidence
    assert made.source == "a search; POA weight given on the command line"
    assert override_poa_weight(override(SEARCHED, UNET, ratio=0.5), 2).source == "given on the command line"


@pytest.mark.parametrize(
    ("ratio", "per_group", "key"),
    [(1.0, {}, "down is 1.0"), (None, {"mid": -0.1}, "mid is -0.1"), (None, {"mid": math.nan}, "mid is nan")],
)
def test_ratios_out_of_bounds_are_refused(ratio: float | None, per_group: dict[str, float], key: str) -> None:
    with raises(RecipeError, key):
        override(SEARCHED, UNET, ratio, per_group)


@pytest.mark.parametrize("weight", [math.inf, math.nan, -1.0])
def test_a_poa_weight_out_of_bounds_is_refused(weight: float) -> None:
    with raises(RecipeError, f"POA weight is {weight}"):
        override_poa_weight(SEARCHED, weight)


def test_an_unknown_group_is_refused() -> None:
    with raises(OptionError, "'midd'"):
        override(SEARCHED, UNET, per_group={"midd": 0.1})


@pytest.mark.parametrize(
    ("groups", "key"),
    [(("blocks",), "ratios.down"), (("down", "mid"), "ratios.up"), (("down", "mid", "up", "out"), "ratios.out")],
)
def test_ratios_are_one_for_each_group(groups: tuple[str, ...], key: str) -> None:
    with raises(RecipeError, "own.toml", key):
        check_groups(variant(), groups, "own.toml")
