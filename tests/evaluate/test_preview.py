"""`crdiff preview`: the pictures are diffusers' bit by bit, the files say how they came about, errors say why."""

import base64
import importlib.util
import io
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from crdiff_export import ExportRequest, Size, export, hub
from crdiff_export.cli.signals import Stopped
from crdiff_export.errors import PreviewError
from crdiff_export.evaluate.comparison import Pair, model_name
from crdiff_export.evaluate.preview import Preview, PreviewRequest, prepare, preview, run
from crdiff_export.evaluate.report import fonts, page
from crdiff_export.hub.location import HubLocation
from crdiff_export.models import demo
from crdiff_export.sampling import pipelines
from crdiff_export.sampling.quiet import quiet_libraries
from crdiff_export.sampling.session import Session
from tests.support import hub_runs, makers
from tests.support.evaluating import Line, Steps, draw_plainly, failing, open_plainly
from tests.support.isolation import Crdiff, Ran
from tests.support.loopback_hub import LoopbackHub
from tests.support.messages import raises, refused

SIZE, STEPS = Size(96, 64), 2
PROMPTS = ("a red fox", "лиса & <b>snow</b>")
WEIGHTS = (1.5, 2.5)
REQUEST = PreviewRequest(
    "demo", PROMPTS, SIZE, seeds=(0, 5), weights=WEIGHTS, ratio=0.4, steps=STEPS, guidance=3.0, negative="blurry"
)
ONE = replace(REQUEST, weights=(1.0,), prompts=PROMPTS[:1], seeds=(0,))
FOX = "--prompt 'a red fox' --steps 1"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Preview, Steps]:
    folder, steps = tmp_path_factory.mktemp("made"), Steps()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = preview(replace(REQUEST, outputs=(folder / "sheet.png", folder / "page.html")), steps)
    torch.set_num_threads(threads)
    return result, steps


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("baked") / "pruned.safetensors"
    export(ExportRequest("demo", SIZE, target, ratio=0.4))
    return target


@pytest.fixture(scope="module")
def dense() -> Any:
    return open_plainly(demo.path())


def drawn(pipe: Any, pair: Pair) -> bytes:
    """The pixels that the pipeline draws with the options of `REQUEST`."""
    (image,) = draw_plainly(pipe, [pair], SIZE, STEPS, guidance_scale=3.0, negative_prompt=["blurry"])
    return image


def column(made: Preview, weight: float) -> dict[Pair, bytes]:
    return {(p.prompt, p.seed): p.image.tobytes() for p in made.pictures if p.weight == weight}


def embedded(html: str) -> list[Any]:
    """The pictures of a page."""
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]


# --- the pictures ---


def test_rows_are_prompts_and_seeds_and_columns_are_models(made: tuple[Preview, Steps]) -> None:
    order = [(p.prompt, p.seed, model_name(p.weight)) for p in made[0].pictures]
    names = ("dense", "pruned", "POA 1.5", "POA 2.5")
    assert order == [(prompt, seed, name) for prompt in PROMPTS for seed in (0, 5) for name in names]
    assert len({p.image.tobytes() for p in made[0].pictures}) == 16
    steps = made[1]
    assert steps.stages["drawing"] == (4 * STEPS * (1 + 1 + 2 + 2), "passes")
    assert steps.done["drawing"] == steps.stages["drawing"][0]
    assert steps.stages["counting"][1] == "bytes"


def test_dense_and_pruned_pictures_are_those_of_plain_pipelines(
    made: tuple[Preview, Steps], dense: Any, baked: Path
) -> None:
    for weight, pipe in ((0, dense), (1, open_plainly(baked))):
        for pair, image in list(column(made[0], weight).items())[::3]:
            assert image == drawn(pipe, pair)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_poa_pictures_are_those_of_two_models_and_the_formula(
    weight: float, made: tuple[Preview, Steps], baked: Path, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, forward = open_plainly(baked).unet, dense.unet.forward

    def both(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return ((1 - weight) * forward(*args, **kwargs)[0] + weight * pruned(*args, **kwargs)[0],)

    monkeypatch.setattr(dense.unet, "forward", both)
    for pair, image in list(column(made[0], weight).items())[1:3]:
        assert image == drawn(dense, pair)


def test_a_baked_file_in_place_of_a_recipe(made: tuple[Preview, Steps], baked: Path, here: Path) -> None:
    result = preview(replace(ONE, ratio=None, size=None, weights=(1.5,), baked=baked))
    assert result.job.subject.size == SIZE
    for weight in (0, 1, 1.5):
        assert column(result, weight).items() <= column(made[0], weight).items()
    assert dict(result.facts)["baked file"] == "pruned.safetensors, pruned for 96x64"
    assert dict(result.facts)["size"] == "96x64, native 64x64"
    assert [path.name for path in sorted(here.iterdir())] == ["demo-preview-96x64.html", "demo-preview-96x64.png"]


def test_pruned_by_another_criterion_it_is_that_export(made: tuple[Preview, Steps], here: Path) -> None:
    request = ExportRequest("demo", SIZE, here / "random.safetensors", ratio=0.4, criterion="random:seed=3")
    target = export(request).written.path
    result = preview(replace(ONE, criterion="random:seed=3"))
    assert dict(result.facts)["criterion"] == "random:seed=3"
    ((pair, image),) = column(result, 1).items()
    assert image == drawn(open_plainly(target), pair)
    assert column(result, 0).items() <= column(made[0], 0).items()
    html = Path("demo-preview-96x64.html").read_text("utf-8")
    last = [image.text["parameters"].splitlines()[-1] for image in embedded(html)]
    assert [line.endswith('ratios: 0.4/0.4/0.4, criterion: "random:seed=3"') for line in last] == [False, True]
    again = prepare(replace(ONE, ratio=None, size=None, baked=target, force=True))
    assert again.criterion == "random:seed=3"


def test_a_folder_a_network_alone_and_half_precision(here: Path, dense: Any) -> None:
    dense.save_pretrained(here / "demo-pipe")
    tensors = safetensors.torch.load_file(demo.path())
    prefix = "model.diffusion_model."
    unet = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    safetensors.torch.save_file(unet, here / "unet.safetensors", {"format": "pt"})
    request = PreviewRequest("demo-pipe", PROMPTS[:1], Size(64, 64), steps=1, weights=(1.0,), outputs=(here / "a.png",))
    folder = preview(request)
    network = preview(replace(request, base="unet.safetensors", config="demo-pipe", outputs=(here / "b.png",)))
    whole = preview(replace(request, base="demo", outputs=(here / "c.png",)))
    assert column(network, 1) == column(whole, 1)
    assert column(folder, 0) == column(network, 0) == column(whole, 0)
    half = preview(replace(request, base="demo", dtype="bf16", start=0.5, outputs=(here / "d.png",)))
    assert column(half, 1) != column(whole, 1)
    assert dict(half.facts)["drawn on"] == "cpu, bf16"
    assert dict(half.facts)["POA"] == "from 0.5 to 1 of the steps"
    with pytest.raises(PreviewError) as error:
        preview(replace(request, base="unet.safetensors", outputs=(here / "e.png",)))
    assert "unet.safetensors" in error.value.message
    assert "has to hold all other parts" in error.value.hint
    assert not (here / "e.png").exists()


# --- the files ---


def test_the_sheet_has_the_pictures_and_says_what_they_are(made: tuple[Preview, Steps]) -> None:
    sheet, facts = Image.open(made[0].job.outputs[0]), dict(made[0].facts)
    text = sheet.text["parameters"]  # type: ignore[attr-defined]
    assert facts["base"] == "demo (demo)"
    assert facts["size"] == "96x64, native 64x64"
    assert facts["ratios"] == "down 0.4, mid 0.4, up 0.4: starting point, not tuned (given on the command line)"
    assert facts["sampling"] == "2 steps of DDIM, guidance 3"
    assert facts["negative"] == "blurry"
    assert facts["note"].startswith('"a red fox" is not a prompt of the demo model: it does not know fox; ')
    assert facts["drawn on"] == "cpu, fp32"
    for name, fact in facts.items():
        assert f"{name}: {fact}" in text
    assert "row 4: seed 5: лиса & <b>snow</b>" in text
    assert not re.search(r"improve|better|enhance", text)


def test_a_relation_that_the_demo_has_not_learnt_is_told() -> None:
    (note,) = run.demo_notes(["two red circles on grey", "a red circle right of a blue square on white"])
    assert note == 'the demo model has not learnt what "right of" means, only: left of, above'
    assert list(run.demo_notes(["a red circle left of a blue square on white"])) == []


def test_the_page_has_each_picture_with_its_parameters(made: tuple[Preview, Steps]) -> None:
    html = made[0].job.outputs[1].read_text("utf-8")
    images = embedded(html)
    assert [image.tobytes() for image in images] == [p.image.tobytes() for p in made[0].pictures]
    prompt, negative, last = images[2].text["parameters"].splitlines()
    assert (prompt, negative) == ("a red fox", "Negative prompt: blurry")
    start = "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 0, Size: 96x64, Model: demo, crdiff: POA 1.5, ratios: "
    assert last == start + "0.4/0.4/0.4"
    assert "starting point, not tuned" in html


@pytest.mark.parametrize("where", ["drawing", "writing"])
def test_an_interrupted_preview_leaves_nothing(where: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stopped(2)

    class Stopping(Steps):
        def advance(self, size: int) -> None:
            if where in self.stages:
                stop()

    monkeypatch.setattr(page, "render_sheet", stop)
    with pytest.raises(Stopped):
        preview(replace(ONE, steps=1), Stopping())
    assert list(here.iterdir()) == []


# --- the command ---


@pytest.fixture
def line(crdiff: Crdiff, shelf: Path, here: Path) -> Line:
    """Runs `crdiff preview` with a line of arguments; {shelf} is the folder of bases."""
    return lambda text: crdiff("preview", *shlex.split(text.format(shelf=shelf)))


def test_the_command_shows_facts_and_files(line: Line, here: Path) -> None:
    ran = line(f"demo --res 72 {FOX}")
    assert ran.code == 0
    told = dict(text.split(":", 1) for text in ran.out.splitlines()[:-2])
    assert list(told) == ["base", "size", "ratios", "measured", "sampling", "note", "drawn on", "made by", "pictures"]
    assert "starting point, borrowed from 80x80 (crdiff search: " in told["ratios"]
    assert re.fullmatch(r" 3 \(dense [\d.]+ s, pruned [\d.]+ s, POA 1.2519 [\d.]+ s each\)", told["pictures"])
    names = ["demo-preview-72x72.png", "demo-preview-72x72.html"]
    assert ran.out.splitlines()[-2:] == names
    assert sorted(path.name for path in here.iterdir()) == sorted(names)
    notes = ran.err.splitlines()
    assert notes[0].startswith("note: no variant for 72x72; its numbers are borrowed from ")
    assert notes[1].startswith('note: "a red fox" is not a prompt of the demo model: it does not know fox; ')
    assert notes[2] == "note: 3 pictures, 1 row of dense, pruned, POA 1.2519, on cpu in fp32"
    assert [text.partition(":")[0] for text in notes[3:]] == ["counting", "drawing"]
    assert re.fullmatch(r"drawing: 4 passes in [\d.]+ s(, [\d.]+/s)?", notes[4])


def test_the_command_as_json_with_prompts_from_a_file(line: Line, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "draw", lambda *_: [Image.new("RGB", (64, 64))])
    (here / "prompts.txt").write_text("a red fox\n\n  лиса \n", encoding="utf-8")
    (here / "o.html").write_text("old")
    monkeypatch.setattr(fonts, "SYSTEM", ())
    options = "--seed 3 --steps 1 --poa-weight 1 -o o.html -o o.png --force --json"
    ran = line(f"demo --res 64 --prompts prompts.txt {options}")
    assert (ran.code, ran.err) == (0, "")
    result = ran.result
    assert result["files"] == ["o.html", "o.png"]
    assert result["columns"] == [{"name": "dense", "poa_weight": 0.0}, {"name": "pruned", "poa_weight": 1.0}]
    assert [(p["column"], p["prompt"], p["seed"]) for p in result["pictures"]] == [
        ("dense", "a red fox", 3), ("pruned", "a red fox", 3), ("dense", "лиса", 3), ("pruned", "лиса", 3)
    ]  # fmt: skip
    assert (result["provenance"], result["borrowed_from"]) == ("starting-point", "56x56")
    assert result["ratios"] == {"down": 0.7394, "mid": 0.7556, "up": 0.0522}
    assert result["criterion"] == "magnitude"
    black, letters = result["notes"][-2:]
    assert black == "4 of 4 pictures are all black: try another --dtype, such as bf16 or fp32"
    assert letters.startswith("no font here has all letters of the prompts")
    assert (result["steps"], result["scheduler"], result["device"], result["dtype"]) == (1, "DDIM", "cpu", "fp32")
    assert "<!DOCTYPE html>" in (here / "o.html").read_text("utf-8")
    assert sorted(path.name for path in here.iterdir()) == ["o.html", "o.png", "prompts.txt"]


def test_quiet_leaves_the_paths_alone(line: Line, undrawn: None) -> None:
    assert line(f"demo --res 64 {FOX} -o o.png -q") == Ran(0, "o.png\n", "")


@pytest.mark.parametrize(
    ("geometry", "code", "key"),
    [("sdxl-refiner.original", 1, "SDXL refiner"), ("sd15.original", 4, "the configuration of base.safetensors")],
    ids=["refiner", "no-configuration"],
)
def test_a_local_file_of_another_model(
    geometry: str, code: int, key: str, here: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    makers.write(here / "base.safetensors", makers.tiny(geometry))
    ran = line(f"base.safetensors --res 512 {FOX}")
    assert ran.code == code
    assert key in ran.err
    if code == 4:
        place = "hf://stable-diffusion-v1-5/stable-diffusion-v1-5"
        assert f"note: what base.safetensors lacks comes from {place}" in ran.err
        assert "Or give it with --config: a folder for diffusers" in ran.err


def test_a_baked_file_of_another_family(here: Path, shelf: Path, line: Line) -> None:
    export(ExportRequest(str(shelf / "sd15.safetensors"), Size(512, 512), here / "sd15.safetensors"))
    refused(line(f"demo --baked sd15.safetensors {FOX} -q"), 1, "sd15.safetensors", "SD1.5")


def test_a_baked_file_of_another_base(here: Path, line: Line, baked: Path) -> None:
    tensors = safetensors.torch.load_file(demo.path())
    safetensors.torch.save_file(
        {name: value * 1.01 if value.is_floating_point() else value for name, value in tensors.items()},
        here / "other.safetensors", {"format": "pt"},
    )  # fmt: skip
    ran = line(f"other.safetensors --baked {baked} {FOX} -q")
    assert ran.code == 1
    assert re.search(r"the weights of down_blocks\S+ are not those of '?demo'?, which .*pruned.safetensors", ran.err)
    assert [path.name for path in here.iterdir()] == ["other.safetensors"]


def test_a_package_that_is_not_there(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(pipelines, "find_spec", lambda name: None if name == "transformers" else find(name))
    refused(line(f"demo --res 64 {FOX}"), 1, "transformers")


def test_too_little_memory(line: Line, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other failures are bugs, and keep their traceback."""
    monkeypatch.setattr(Session, "draw", failing(MemoryError()))
    refused(line(f"demo --res 64 {FOX} -q"), 1, "memory")
    assert list(here.iterdir()) == []
    monkeypatch.setattr(Session, "draw", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        preview(ONE)


def test_a_folder_that_asks_for_other_libraries_is_refused(here: Path) -> None:
    folder = shutil.copytree(demo.config(), here / "config")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers",\n    "DDIM', '"os",\n    "DDIM'))
    with raises(PreviewError, "model_index.json", "scheduler", "os"):
        prepare(replace(REQUEST, config=str(folder)))


def test_the_libraries_are_left_as_they_were() -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_libraries("diffusers", "transformers"):
        assert logging.get_verbosity() > before[0]
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- what comes from the Hub ---


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_network_lacks_comes_from_the_hub(
    fresh: bool,
    loopback_hub: LoopbackHub,
    crdiff: Crdiff,
    tmp_path: Path,
    here: Path,
    dense: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that has loaded nothing before shows no word of the libraries."""
    folder = tmp_path / "pipe"
    dense.save_pretrained(folder)
    shutil.copyfile(folder / "unet" / "diffusion_pytorch_model.safetensors", here / "base.safetensors")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    loopback_hub.add_repo("my/pipe", files)
    words = shlex.split(f"preview base.safetensors --config my/pipe --res 64 -o o.png {FOX}")
    if fresh:
        ran = hub_runs.run(loopback_hub, tmp_path / "home", here, *words, env={"PYTHONWARNINGS": ""})
    else:
        loopback_hub.lead_here(monkeypatch, tmp_path / "home")
        ran = crdiff(*words)
    assert ran.code == 0, ran.err
    assert ran.out.endswith("o.png\n")
    begins = {text.partition(":")[0] for text in ran.err.splitlines()}
    assert begins <= {"note", "counting", "drawing"} or not fresh
    assert "note: what base.safetensors lacks comes from hf://my/pipe, unless it is in the local cache" in ran.err
    (snapshot,) = (tmp_path / "home").rglob("snapshots/*")
    fetched = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    others = {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert fetched == {name for name in files if not name.endswith(".safetensors")} | others


def test_a_whole_file_lacks_only_its_configuration(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, str | None]] = []

    def fetch_parts(location: HubLocation, without: str | None = None) -> Path:
        fetched.append((location.repo, without))
        return demo.config()

    monkeypatch.setattr(hub, "fetch_parts", fetch_parts)
    shutil.copyfile(demo.path(), here / "base.safetensors")
    job = prepare(replace(ONE, base="base.safetensors", config="my/pipe"))
    assert job.drawing.opening.config_folder() == demo.config()
    assert fetched == [("my/pipe", None)]  # None: the weights of all parts stay there
