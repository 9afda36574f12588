"""`crdiff export`: what it writes, what it shows, and where each option ends up."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from crdiff_export.models import demo
from tests.support import makers
from tests.support.command_lines import UNTUNED, Line
from tests.support.isolation import Ran

pytestmark = pytest.mark.usefixtures("here")

DEMO_GROUPS = {"down": 327680, "mid": 262144, "up": 655360}


def test_a_thumbnail_is_drawn_into_the_header(line: Line, here: Path) -> None:
    ran = line("export demo --res 48 -o x.safetensors --thumbnail 'two red circles on grey'")
    assert ran.code == 0, ran.err
    header = makers.metadata_of(here / "x.safetensors")
    kind, _, data = header["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert (picture.format, picture.size) == ("JPEG", (256, 256))
    assert header["crdiff.thumbnail"].startswith(
        "two red circles on grey; seed 0, the pruned model at 48x48, drawn on cpu"
    )
    assert line("verify x.safetensors --base demo").code == 0
    assert line("export demo --res 48 -o y.safetensors --thumbnail x --dtype fp16 --dry-run").code == 2


def test_export_shows_what_was_done_group_by_group(line: Line, here: Path) -> None:
    """Its output is named after the base and the size."""
    ran = line("export demo --res 64x96")
    assert ran.code == 0
    head, *rows = ran.out.splitlines()
    assert head.split() == ["group", "ratio", "zeroed", "of", "share", "threshold"]
    assert [row.split()[0] for row in rows[:3]] == ["down", "mid", "up"]
    assert [row.split()[3] for row in rows[:3]] == ["327,680", "262,144", "655,360"]
    assert rows[3].split() == ["all", "373,687", "1,245,184", "0.3001"]
    assert rows[-2] == "next: crdiff preview demo --baked demo-crdiff-64x96.safetensors --prompt TEXT"
    facts = dict(row.split(":", 1) for row in rows[5:-2])
    assert facts.pop("written").split(" in ")[0].strip() == "10.10 MB"
    assert facts.pop("evidence").strip().startswith("no difference shown: pruned against dense -0.005")
    assert {name: text.strip() for name, text in facts.items()} == {
        "base": "demo (demo, native 64x64)",
        "pruned for": "64x96",
        "ratios": UNTUNED,
        "POA weight": "1.5 (not shown to help)",
        "zeroed": "373,687 weights, 7.4% of 5,017,291 in the file",
    }
    assert rows[-1] == "demo-crdiff-64x96.safetensors"
    assert [text.partition(":")[0] for text in ran.err.splitlines()] == ["counting", "writing"]
    assert [path.name for path in here.iterdir()] == ["demo-crdiff-64x96.safetensors"]
    assert makers.metadata_of(here / "demo-crdiff-64x96.safetensors")["crdiff.resolution.target"] == "64x96"


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


def test_a_threshold_of_zero_is_text_as_any_other(line: Line, here: Path) -> None:
    """The weights of a group may be zero in the base."""
    tensors = makers.read(demo.path())
    for name, (dtype, shape, data) in tensors.items():
        if ".middle_block." in name:
            tensors[name] = dtype, shape, bytes(len(data))
    makers.write(here / "zeros.safetensors", tensors)
    done = line("export zeros.safetensors --res 96x64 --native 64x64 --ratio 0.3 -o o.safetensors --json").result
    for result in (done, line("inspect o.safetensors --json").result):
        assert result["groups"]["mid"]["threshold"] == "0x0.0p+0"


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
    (note,) = plan["notes"]
    assert note.startswith("warning: no variant for 512x1024; its numbers are borrowed from 768x768, a starting point")
    assert plan["output"] == "dit-crdiff-512x1024.safetensors"
    assert plan["disk_needed"] > plan["bytes"]
    assert list(here.iterdir()) == []


def test_a_size_without_a_variant_is_noted_on_stderr(line: Line) -> None:
    ran = line("export demo --res 72 -o o.safetensors")
    note = ran.err.splitlines()[0]
    assert note == "note: no variant for 72x72; its numbers are borrowed from 80x80, a starting point"
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
    ("options", "keys"),
    [
        (
            "--targets ff,attn --poa-weight 2 --dtype fp32 --criterion magnitude --threads 1 --device cpu",
            {"targets": "attn,ff", "poa.weight": "2.0", "cast": "F32", "criterion": "magnitude", "family": "demo"},
        ),
        ("--targets ff --no-hash", {"targets": "ff", "source.hash_sha256": None, "source.file_sha256": None}),
    ],
    ids=["numbers", "no-hash"],
)
def test_options_reach_the_header(line: Line, here: Path, options: str, keys: Mapping[str, str | None]) -> None:
    assert line(f"export demo --res 64x96 -o o.safetensors {options}").code == 0
    metadata = makers.metadata_of(here / "o.safetensors")
    assert {key: metadata.get(f"crdiff.{key}") for key in keys} == keys
    assert ("modelspec.hash_sha256" in metadata) == ("--no-hash" not in options)


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
    *_, following, path = ran.out.splitlines()
    assert path == output
    options = f"--baked {output} --variant fp16 --prompt TEXT"
    assert following.endswith(options if "pipe" in base else f"crdiff inspect {output}")
    assert line(f"inspect {output}{'/diffusion_pytorch_model.safetensors.index.json' * ('shards' in base)}").code == 0
    assert [path.name for path in here.iterdir()] == [output]


def test_the_next_command_is_one_that_works(line: Line, here: Path) -> None:
    """No picture can be drawn with an inpainting model, which takes a picture and a mask."""
    unet = makers.tiny("sd15.diffusers-unet")
    dtype, (rows, inputs, *kernel), data = unet["conv_in.weight"]
    unet["conv_in.weight"] = (dtype, (rows, 9, *kernel), data[: len(data) // inputs] * 9)
    makers.write(here / "inpainting.safetensors", unet)
    ran = line("export inpainting.safetensors --res 600 --ratio 0.2 -o o.safetensors")
    assert ran.out.splitlines()[-2] == "next: crdiff inspect o.safetensors"


def test_a_sparse_base_is_noted(line: Line) -> None:
    ran = line("export {shelf}/sparse.safetensors --res 2048 --dry-run")
    assert "note: sparse.safetensors is mostly a hole: its weights read as zeros" in ran.err
    assert "6.94 GB" in ran.out
