"""docs/json.md has the keys of `--json`, all of them and no others: real outputs are compared with its tables."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from huggingface_hub.utils.tqdm import progress_bar_states

from crdiff_export import cli, errors
from crdiff_export.bake import staging
from crdiff_export.cli.output import SCHEMA
from crdiff_export.cli.signals import Stopped
from crdiff_export.evaluate.scorers import inception
from crdiff_export.sampling.session import Session
from tests.support import DOCS, makers
from tests.support.command_lines import Line
from tests.support.evaluating import noise_for_pictures
from tests.support.json_page import JsonPage
from tests.support.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.support.publishing import BASE, CARD, REPO, checkpoint, plan
from tests.support.scoring import noise

FILE = DOCS / "json.md"
TEXT, PAGE = FILE.read_text("utf-8"), JsonPage(FILE)
# Outputs of a command, and the tables whose keys they show, beside the command's own.
Runs = Callable[["Bench"], Iterator[Any]]
RUNS: dict[str, tuple[Runs, tuple[str, ...]]] = {}
# What no run here shows, and why.
NOT_SHOWN: dict[str, dict[str, str]] = {
    "crdiff search": {"trials[].seconds: null": "only a trial that was written into the storage by hand has no end"},
}
# Commands whose object is that of another table, as the page says below their heading.
SAME = {"crdiff pack create": "crdiff pack show", "crdiff pack add": "crdiff pack show"}
# Commands that take several files.
SEVERAL = ("crdiff inspect", "crdiff verify")


def runs(name: str, *shared: str) -> Callable[[Runs], Runs]:
    """Let a function run the command that a table is of."""

    def add(function: Runs) -> Runs:
        RUNS[name] = function, shared
        return function

    return add


class Bench:
    """Command lines in this process, in an empty folder."""

    def __init__(self, request: pytest.FixtureRequest, line: Line, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
        self.request, self.line, self.monkeypatch, self.here = request, line, monkeypatch, here

    def __call__(self, text: str, code: int = 0) -> Any:
        """Give the object that a command line prints with --json; {shelf} is the folder of bases."""
        ran = self.line(f"{text} --json")
        assert (ran.code, ran.err) == (code, ""), ran
        return ran.result

    @property
    def baked(self) -> Path:
        path: Path = self.request.getfixturevalue("baked")
        return path

    def calibrate(self) -> None:
        """Make a calibration, wanda.safetensors."""
        self("calibrate demo --res 48 --limit 1 --steps 1 --criterion wanda -o wanda.safetensors")

    def draw_noise(self) -> None:
        """Draw noise in place of pictures."""
        self.monkeypatch.setattr(Session, "draw", noise_for_pictures)

    def scorer(self, name: str, code: str) -> str:
        """Write a scorer, and say how to name it."""
        (self.here / f"{name}.py").write_text(code)
        self.monkeypatch.delitem(sys.modules, name, raising=False)
        return f"{name}:score"

    def hub(self) -> LoopbackHub:
        """Lead this process to a Hub that has a base."""
        hub: LoopbackHub = self.request.getfixturevalue("loopback_hub")
        hub.lead_here(self.monkeypatch, self.here.parent / "cache")
        self.monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        self.monkeypatch.setitem(progress_bar_states, "_global", False)  # ruled by a variable when it is imported
        hub.add_repo("org/base", {"model.safetensors": checkpoint(), "README.md": CARD})
        return hub


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, line: Line, monkeypatch: pytest.MonkeyPatch, here: Path, one_thread: None
) -> Bench:
    return Bench(request, line, monkeypatch, here)


@runs("crdiff docs")
def docs(bench: Bench) -> Iterator[Any]:
    yield bench("docs")


@runs("crdiff docs PAGE")
def docs_page(bench: Bench) -> Iterator[Any]:
    yield bench("docs json")


@runs("crdiff env")
def env(bench: Bench) -> Iterator[Any]:
    bench.monkeypatch.setenv("CRDIFF_DEBUG", "0")
    yield bench("env")


@runs("crdiff export", "Several sizes")
def export(bench: Bench) -> Iterator[Any]:
    yield bench("export demo --res 48 --res 80 --dry-run")
    publish = staging.publish

    def appear(part: Path, path: Path, *, replace: bool) -> None:
        if "80x80" in path.name:
            path.write_text("mine")
        publish(part, path, replace=replace)

    bench.monkeypatch.setattr(staging, "publish", appear)
    yield bench("export demo --res 48 --res 80", 1)
    bench.monkeypatch.setattr(staging, "publish", publish)
    yield bench("export demo --res 96x64 -o searched.safetensors")
    yield bench("export demo --res 400x64 --residual sidecar -o borrowed.safetensors")
    yield bench("export demo --res 96x64 --layout diffusers -o unet")
    yield bench("export demo --res 96x64 --mid 0 --no-hash -o plain.safetensors")
    bench.calibrate()
    yield bench("export demo --res 48 --ratio 0.3 --criterion wanda --calibration wanda.safetensors -o w.safetensors")
    bench.hub()
    yield bench(f"export {BASE} --res 96x64 -o hub.safetensors --push {REPO}")


@runs("crdiff export --dry-run")
def export_dry_run(bench: Bench) -> Iterator[Any]:
    yield bench("export demo --res 96x64 --layout diffusers -o unet --dry-run")
    yield bench("export demo --res 96x64 --dry-run")
    bench.calibrate()
    yield bench("export demo --res 48 --criterion wanda --calibration wanda.safetensors --residual embed --dry-run")
    yield bench("export demo --res 400x64 --dtype fp32 --push my-org/demo --dry-run")
    bench("pack create demo --res 48")
    yield bench("export demo --res 48 --pack demo.crdiff --dry-run")


@runs("crdiff pack create --dry-run")
def pack_create_dry_run(bench: Bench) -> Iterator[Any]:
    yield bench("pack create demo --res 48 --res 400x64 --dry-run")
    yield bench("pack create demo --res 48 --criterion random --dry-run")
    bench("pack create demo --res 48")
    yield bench("pack add demo.crdiff --res 64x96 --dry-run")


@runs("crdiff pack remove")
def pack_remove(bench: Bench) -> Iterator[Any]:
    bench("pack create demo --res 48 --res 64x96")
    yield bench("pack remove demo.crdiff --res 48")


@runs("crdiff pack show")
def pack_show(bench: Bench) -> Iterator[Any]:
    yield bench("pack create demo --res 48 --res 400x64")
    yield bench("pack add demo.crdiff --res 64x96 --criterion random --mid 0")
    yield bench("pack show demo.crdiff")
    yield bench("pack show demo.crdiff --metadata")
    yield bench("inspect demo.crdiff")
    yield bench("pack create demo --res 48 --dtype fp32 -o cast.crdiff")
    bench.hub()
    yield bench(f"pack create {BASE} --res 48 -o hub.crdiff")


# The tensor whose width tells an inpainting model.
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@runs("crdiff inspect", "Several files")
def inspect(bench: Bench) -> Iterator[Any]:
    yield bench("inspect demo")
    yield bench(f"inspect {bench.baked} --metadata")
    bench("export demo --res 96x64 --mid 0 -o part.safetensors")
    yield bench("inspect part.safetensors")
    tensors = makers.tiny("sd15.original")
    dtype, (rows, _, *kernel), _ = tensors[FIRST]
    tensors[FIRST] = dtype, (rows, 9, *kernel), makers.weights(FIRST, dtype, (rows, 9, *kernel))
    makers.write(bench.here / "inpainting.safetensors", tensors)
    yield bench("inspect inpainting.safetensors")
    yield bench("inspect {shelf}/odd.safetensors {shelf}/quantised.safetensors nothing", 1)
    yield bench(f"inspect {bench.baked} --layers -o map.html")


@runs("crdiff diff")
def diff(bench: Bench) -> Iterator[Any]:
    yield bench(f"diff demo {bench.baked}")
    yield bench(f"diff {bench.baked} {bench.baked}")
    numbers = {"x.weight": ("F32", (2, 2)), "n": ("I64", (2,)), "s": ("F32", (2,)), "d": ("F32", (2,))}
    raw = {name: (dtype, shape, makers.weights(name, dtype, shape)) for name, (dtype, shape) in numbers.items()}
    makers.write(bench.here / "a.safetensors", {**raw, "a": ("F32", (1,), b"abcd")}, {"only": "here"})
    other = {**raw, "b": ("F32", (1,), b"abcd"), "n": ("I64", (2,), bytes(16)), "s": ("F32", (1,), b"abcd")}
    makers.write(bench.here / "b.safetensors", {**other, "d": ("F16", (2,), b"abcd")})
    yield bench("diff a.safetensors b.safetensors")


@runs("crdiff verify")
def verify(bench: Bench) -> Iterator[Any]:
    yield bench(f"verify {bench.baked}")
    yield bench(f"verify {bench.baked} --base demo")
    yield bench(f"verify {bench.baked} {bench.here} --base demo", 1)


@runs("crdiff verify PACK")
def verify_pack(bench: Bench) -> Iterator[Any]:
    bench("pack create demo --res 48")
    bench.calibrate()
    bench("pack add demo.crdiff --res 48 --force --criterion wanda --calibration wanda.safetensors")
    yield bench("verify demo.crdiff")
    yield bench("verify demo.crdiff --base demo")
    yield bench("verify demo.crdiff --base demo --calibration wanda.safetensors")


@runs("crdiff convert")
def convert(bench: Bench) -> Iterator[Any]:
    yield bench("convert demo --layout diffusers -o unet --dry-run")
    yield bench("convert demo --layout diffusers -o unet")
    yield bench("convert unet --layout original -o back.safetensors")


@runs("crdiff restore")
def restore(bench: Bench) -> Iterator[Any]:
    bench("export demo --res 96x64 --residual embed -o both.safetensors")
    yield bench("restore both.safetensors -o base.safetensors")
    bench.hub()
    bench(f"export {BASE} --res 96x64 --residual embed -o hub.safetensors")
    yield bench("restore hub.safetensors -o hub-base.safetensors")


@runs("crdiff preview")
def preview(bench: Bench) -> Iterator[Any]:
    bench.draw_noise()
    yield bench('preview demo --res 400x64 --steps 1 --prompt "a red circle on grey"')
    options = f'--baked {bench.baked} --steps 1 --negative blue --prompt "a red circle on grey" -o p.png'
    yield bench(f"preview demo {options} --beside two-pass")


@runs("crdiff evaluate", "model", "estimate")
def evaluate(bench: Bench) -> Iterator[Any]:
    bench.draw_noise()
    yield bench("evaluate demo --res 72 --limit 8 --steps 1")
    yield bench("evaluate demo --res 48 --limit 8 --steps 1 --no-native --beside two-pass")
    network = SimpleNamespace(
        features=lambda images: (torch.rand(1, 4).double().numpy() for _ in images),
        fingerprint=lambda: {"network": "x"},
    )
    bench.monkeypatch.setattr(inception, "check", lambda _: None)
    bench.monkeypatch.setattr(inception, "absent", lambda: None)
    bench.monkeypatch.setattr(inception, "load", lambda *_: network)
    (bench.here / "pictures").mkdir()
    for seed in range(2):
        noise([(48, 48)], seed)[0].save(bench.here / f"pictures/{seed}.png")
    own = bench.scorer("own", "def score(images, prompts): return [1.0 for _ in images]")
    options = "--res 48 --limit 2 --steps 1 --no-native"
    yield bench(f"evaluate demo {options} --fid dense --scorer {own} -o e.html")
    yield bench(f"evaluate demo {options} --fid pictures")


# The brightness of a picture; raises while there is a file `broken`.
BRIGHTNESS = """
from pathlib import Path

def score(images, prompts):
    assert not Path("broken").exists()
    return [sum(image.convert("L").tobytes()) for image in images]
"""


@runs("crdiff search")
def search(bench: Bench) -> Iterator[Any]:
    bright = bench.scorer("bright", BRIGHTNESS)
    options = f"--res 48 --limit 2 --held-out-limit 2 --steps 1 --batch 2 --no-native --method sobol --scorer {bright}"
    yield bench(f"search demo {options} --trials 2 --poa -o found.toml")
    (bench.here / "broken").touch()
    assert bench.line(f"search demo {options} --trials 3 --poa -o found.toml --worker").code == 1
    (bench.here / "broken").unlink()
    yield bench(f"search demo {options} --trials 3 --poa -o found.toml --worker")


@runs("crdiff calibrate")
def calibrate(bench: Bench) -> Iterator[Any]:
    yield bench("calibrate demo --res 48 --limit 1 --steps 1 --criterion wanda")


@runs("crdiff push")
def push(bench: Bench) -> Iterator[Any]:
    hub = bench.hub()
    yield bench(f"push {bench.baked} {REPO} --tag v1")
    yield bench(f"push {bench.baked} {REPO}")
    hub.add_repo("org/shared")
    yield bench(f"push {bench.baked} org/shared --create-pr")


@runs("crdiff push --dry-run")
def push_dry_run(bench: Bench) -> Iterator[Any]:
    bench.hub()
    yield bench(f"push {bench.baked} {REPO} --dry-run")
    yield bench(f"push {bench.baked} {REPO} --tag v1 --dry-run")
    yield bench(f"push {bench.baked} {REPO} --base-model org/nothing --dry-run")


@runs("crdiff card")
def card(bench: Bench) -> Iterator[Any]:
    bench.hub()
    yield bench(f"card {bench.baked}")
    yield bench(f"card {bench.baked} {REPO} --base-model org/nothing")


@runs("crdiff publish --dry-run")
def publish_dry_run(bench: Bench) -> Iterator[Any]:
    write_plan(bench)
    yield bench("publish plan.toml --dry-run", 4)
    bench("publish plan.toml --no-push", 4)
    yield bench("publish plan.toml --dry-run", 4)


@runs("crdiff publish")
def publish(bench: Bench) -> Iterator[Any]:
    write_plan(bench)
    yield bench("publish plan.toml", 4)
    (bench.here / "pull.toml").write_text(plan("48x48", base="demo", more='pack = "{base}.crdiff"'))
    yield bench("publish pull.toml --create-pr")


def write_plan(bench: Bench) -> None:
    """Write a plan with a variant that goes nowhere, one that is for another size, and one that fails."""
    bench.calibrate()
    bench.hub()
    (bench.here / "plan.toml").write_text(f"""
name = "{{base}}-{{size}}.safetensors"
pack = "{{base}}.crdiff"
[[base]]
base = "demo"
sizes = ["48"]
criterion = "wanda"
calibration = "wanda.safetensors"
[[base]]
base = "{BASE}"
repo = "{REPO}"
sizes = ["400x64"]
tag = "v1"
[[base]]
base = "org/nothing"
repo = "{REPO}"
sizes = ["400x64"]
tag = "v2"
""")


@runs("crdiff comfyui install")
def comfyui_install(bench: Bench) -> Iterator[Any]:
    for folder in ("comfy", "custom_nodes/crdiff"):
        (bench.here / folder).mkdir(parents=True)
    yield bench("comfyui install . --force")
    yield bench("comfyui install . --link")


@runs("crdiff comfyui uninstall")
def comfyui_uninstall(bench: Bench) -> Iterator[Any]:
    for folder in ("comfy", "custom_nodes"):
        (bench.here / folder).mkdir()
    yield bench("comfyui uninstall .")
    bench("comfyui install . --link")
    yield bench("comfyui uninstall .")


@runs("crdiff webui install")
def webui_install(bench: Bench) -> Iterator[Any]:
    _web_ui(bench, "extensions/sd-webui-crdiff")
    yield bench("webui install . --force")
    yield bench("webui install .")


@runs("crdiff webui uninstall")
def webui_uninstall(bench: Bench) -> Iterator[Any]:
    _web_ui(bench, "extensions")
    yield bench("webui uninstall .")
    bench("webui install .")
    yield bench("webui uninstall .")


def _web_ui(bench: Bench, *folders: str) -> None:
    for folder in ("modules_forge", "backend/patcher", *folders):
        (bench.here / folder).mkdir(parents=True)


@runs("crdiff recipes list")
def recipes_list(bench: Bench) -> Iterator[Any]:
    yield bench("recipes list")


RECIPE = """
[model]
family = "demo"
title = "demo"
native = "64x64"
[[variant]]
resolution = "96x64"
prompt = "two red circles on grey"
targets = ["ff"]
ratios = { down = 0.1, mid = 0.2, up = 0.4 }
poa_weight = 1.2
provenance = "starting-point"
source = "a guess"
"""


@runs("crdiff recipes show")
def recipes_show(bench: Bench) -> Iterator[Any]:
    (bench.here / "own.toml").write_text(RECIPE)
    yield from map(bench, ("recipes show own.toml", "recipes show sdxl", "recipes show demo"))


@runs("crdiff recipes validate")
def recipes_validate(bench: Bench) -> Iterator[Any]:
    (bench.here / "own.toml").write_text(RECIPE)
    yield bench("recipes validate own.toml")
    yield bench("recipes validate own.toml nothing.toml", 1)


@runs("crdiff families list")
def families_list(bench: Bench) -> Iterator[Any]:
    yield bench("families list")


@runs("crdiff families show")
def families_show(bench: Bench) -> Iterator[Any]:
    yield from map(bench, ("families show sdxl", "families show unet"))


@runs("crdiff families validate")
def families_validate(bench: Bench) -> Iterator[Any]:
    shown = bench.line("families show demo").out
    (bench.here / "own.toml").write_text(re.sub("(?m)^(architecture|native) = .*$", "", shown))
    yield bench("families validate own.toml")
    (bench.here / "sd3.toml").write_text(bench.line("families show sd3-medium").out)
    yield bench("families validate sd3.toml {shelf}/dit.safetensors")


@runs("Errors", "error")
def failures(bench: Bench) -> Iterator[Any]:
    (bench.here / "plan.toml").write_text("[[base]]\n")
    for line in ("export demo --json", "publish plan.toml --json", "inspect nothing --json --debug"):
        ran = bench.line(line)
        assert ran.out == ""
        yield json.loads(ran.err)


@pytest.mark.parametrize("name", RUNS)
def test_outputs_are_as_the_page_says(name: str, bench: Bench) -> None:
    run, shared = RUNS[name]
    page = JsonPage(FILE)
    for output in run(bench):
        assert output["schema"] == SCHEMA
        page.check("Every object", {"schema": output.pop("schema")})
        for part, value in parts(name, output):
            page.check(part, value)
    for table in (name, *shared):
        assert page.unseen(table) == set(NOT_SHOWN.get(table, ())), table


def parts(name: str, output: Any) -> Iterator[tuple[str, Any]]:
    """The objects in an output, each with the table that it is compared with."""
    if name.startswith("crdiff export") and "variants" in output:
        variants = output["variants"]
        keys = "resolution", "error"
        short = [{key: variant[key] for key in keys if key in variant} for variant in variants]
        yield "Several sizes", {**output, "variants": short}
        table, more = ("crdiff export --dry-run", {}) if "dry_run" in output else (name, {"seconds": output["seconds"]})
        yield from ((table, {**variant, **more}) for variant in variants if "error" not in variant)
        return
    if name not in SEVERAL or not isinstance(output.get("files"), list):
        yield name, output
        return
    files = output["files"]
    yield "Several files", {"files": [e if "error" in e else {"file": e["file"]} for e in files]}
    yield from ((name, entry) for entry in files if "error" not in entry)


def test_every_command_has_a_table_and_runs() -> None:
    assert set(PAGE.commands) == {name for name in RUNS if name.startswith("crdiff ")}
    without_options = {re.sub(r" (--[a-z-]+|[A-Z]+)$", "", name) for name in PAGE.commands}
    assert without_options | SAME.keys() == set(commands(cli.crdiff, "crdiff"))
    for name, other in SAME.items():
        assert f"## {name}\n\nThe object of [{other}](#{other.replace(' ', '-')})" in TEXT


def test_the_number_of_the_schema_is_that_of_the_code() -> None:
    assert f"| `schema` | always | whole | {SCHEMA};" in TEXT


def commands(group: click.Group, path: str) -> Iterator[str]:
    """The commands with --json, those in groups, too."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        elif command and any(param.name == "json" for param in command.params):
            yield f"{path} {name}"


def test_codes_of_errors_are_those_of_the_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CrdiffError)]
    codes = {kind.code: str(kind.exit_code) for kind in kinds}
    for signum in (signal.SIGINT, signal.SIGTERM):
        stopped = Stopped(signum)
        codes[stopped.word] = str(stopped.exit_code)
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+)[,\d ]* \|", TEXT, re.MULTILINE)
    assert dict(rows) == codes


def test_links_inside_of_the_page_lead_to_headings() -> None:
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#(.+?)\)", TEXT)) <= headings


# --- the comparison itself ---

SMALL = """
## crdiff small

| key | present | type | meaning |
|---|---|---|---|
| `groups` | always | object | Groups. |
| `groups.<group>.ratio` | always | number | A share. |
| `files` | always | list of object | Files. |
| `files[].path` | always | text or null | A path. |
| `files[].error` | where it fails | [error](#error) | An error. |
| `size` | always | size | A size. |

### error

| key | present | type | meaning |
|---|---|---|---|
| `code` | always | text | A word. |
"""
GOOD: dict[str, Any] = {"groups": {"up": {"ratio": 1}}, "files": [{"path": "a"}], "size": "1x2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "the page does not have the key more"),
        ({"size": None}, "size is None, not size"),
        ({"size": "1 x 2"}, "size is '1 x 2', not size"),
        ({"groups": {"up": {}}}, "groups: up: the output has no ratio"),
        ({"groups": {"up": {"ratio": True}}}, "ratio is True, not number"),
        ({"groups": {"up": {"ratio": 1, "more": 1}}}, "the page does not have the key more"),
        ({"files": [{"path": 1}]}, "path is 1, not text or null"),
        ({"files": ["a"]}, "not list of object"),
        ({"files": [{"path": None, "error": {"code": None}}]}, "code is None, not text"),
    ],
)
def test_an_output_that_is_otherwise_fails(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(SMALL)
    page = JsonPage(tmp_path / "page.md")
    page.check("crdiff small", GOOD)
    assert page.unseen("crdiff small") == {"files[].path: null", "files[].error"}
    with pytest.raises(AssertionError, match=re.escape(message)):
        page.check("crdiff small", GOOD | change)
