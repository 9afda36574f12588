"""`crdiff calibrate`: sums against recorded inputs, files that do not depend on how they came to be, and refusals."""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file

from crdiff_export import Size
from crdiff_export.bake import staging
from crdiff_export.calibrate import CalibrateRequest, calibrate, collect, folder, memory, prepare, runner
from crdiff_export.calibrate import setting as names
from crdiff_export.calibrate.setting import LayerSpec, Setting
from crdiff_export.cli.options import BYTES
from crdiff_export.cli.signals import Stopped
from crdiff_export.errors import BakeError, CalibrationError, OptionError
from crdiff_export.progress import Silent
from crdiff_export.prune.criteria import calibration
from crdiff_export.prune.criteria.calibration import STATISTICS, Calibration
from crdiff_export.sampling import prompts
from tests.support import DOCS, makers
from tests.support.calibrating import NATIVE, PROMPTS, SIZE, Tiny, plan_of, setting, speaking, tiny
from tests.support.command_lines import Line
from tests.support.forks import Forks
from tests.support.isolation import Crdiff
from tests.support.messages import check, raises, refused

DEMO = CalibrateRequest("demo", Size(48, 48), ("wanda",), limit=3, steps=1, batch=2, samples=1)
ALL = ("wanda", "obs", "taylor", "taylor:form=abs", "adverse")
# Two groups of gradients, of one sample of each of two pictures.
LITTLE = replace(DEMO, criteria=("taylor",), limit=2, layers=30)
# For what happens around the files.
SHORT = replace(DEMO, limit=1)
QUICK = "calibrate demo --res 48 --limit 2 --steps 1 --loss-samples 1"

pytestmark = pytest.mark.usefixtures("one_thread")


class Stages(Silent):
    """What was begun; ends with a signal at a given stage and step."""

    def __init__(self, stop: str = "", after: int = 1) -> None:
        self.titles: list[str] = []
        self.done: dict[str, int] = defaultdict(int)
        self.sizes: dict[str, int] = {}
        self._stop, self._after = stop, after

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        self.titles.append(title)
        self.sizes[title] = size

    def advance(self, size: int) -> None:
        title = self.titles[-1]
        self.done[title] += size
        if title == self._stop:
            self._after -= 1
            if not self._after:
                raise Stopped(signal.SIGINT)


# --- what layers see ---


def recorded(made: Tiny, wanted: Setting) -> dict[str, list[tuple[int, np.ndarray[Any, Any]]]]:
    """Every input of every layer with the step it was seen at, from diffusers alone."""
    seen: dict[str, list[tuple[int, np.ndarray[Any, Any]]]] = defaultdict(list)
    number = 0

    def step(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        number += 1
        return tensors

    def hook(name: str) -> Any:
        def after(_module: Any, args: tuple[torch.Tensor], _output: Any) -> None:
            seen[name].append((number, args[0].double().numpy().reshape(-1, args[0].shape[-1])))

        return after

    handles = [
        module.register_forward_hook(hook(f"{name}.weight"))
        for name, module in made.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    for start in range(0, len(wanted.pairs), wanted.batch):
        part = wanted.pairs[start : start + wanted.batch]
        number = 0
        made.pipe(
            [prompt for prompt, _ in part], width=SIZE.width, height=SIZE.height, num_inference_steps=wanted.steps,
            generator=[torch.Generator().manual_seed(seed) for _, seed in part], callback_on_step_end=step,
        )  # fmt: skip
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("kind", "count", "steps"), [("sd15", 3, 3), ("sdxl", 2, 2), ("sd3", 1, 2), ("flux", 1, 2)])
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_norms_and_products_are_those_of_recorded_inputs(kind: str, count: int, steps: int, tmp_path: Path) -> None:
    made = tiny(kind, tmp_path)
    wanted = setting("norm", "gram", count=count, steps=steps)
    made.collect(tmp_path / "c.safetensors", wanted)
    tensors = load_file(tmp_path / "c.safetensors")
    # As OBS-Diff's public code computes them: weights that grow, in reverse.
    alphas = (0.8 + (1.2 - 0.8) / np.log(steps) * np.log(1 + np.arange(steps)))[::-1]
    seen = recorded(made, wanted)
    layers = {name.partition("/")[2] for name in tensors}
    assert len(layers) == len(made.plan.targets)
    for layer in layers:
        assert {step for step, _ in seen[layer]} == set(range(steps))
        norm = sum((inputs**2).sum(axis=0) for _, inputs in seen[layer])
        gram = sum(alphas[step] * inputs.T @ inputs for step, inputs in seen[layer])
        assert tensors[f"norm/{layer}"].dtype == torch.float64
        assert tensors[f"gram/{layer}"].dtype == torch.float32
        np.testing.assert_allclose(tensors[f"norm/{layer}"].numpy(), norm, rtol=1e-9)
        np.testing.assert_allclose(tensors[f"gram/{layer}"].numpy(), gram, rtol=1e-4, atol=2e-6 * np.abs(gram).max())


def test_inputs_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = tiny("sd15", tmp_path)
    made.collect(tmp_path / "a.safetensors", setting("norm", "gram", count=1))
    monkeypatch.setattr(collect, "ROWS", 7)
    made.collect(tmp_path / "b.safetensors", setting("norm", "gram", count=1))
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [1.2]), (2, [1.2, 0.8]), (4, [1.2, 0.8 + 0.4 * math.log(3) / math.log(4), 1.0, 0.8])],
)
def test_weights_of_steps(steps: int, expected: list[float]) -> None:
    assert [names.step_weight(step, steps) for step in range(steps)] == pytest.approx(expected)
    # A scheduler that calls back more often than it has steps.
    assert names.step_weight(steps + 1, steps) == pytest.approx(expected[-1])


def test_a_layer_that_never_runs(tmp_path: Path) -> None:
    made = tiny("sd15", tmp_path)
    made.pipe.unet.mid_block.attentions[0].transformer_blocks[0].forward = lambda hidden, **_: hidden
    with raises(CalibrationError, "mid_block.attentions.0"):
        made.collect(tmp_path / "c.safetensors", setting("norm", count=1))


# --- the file ---


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    made = calibrate(replace(DEMO, output=tmp_path / "c.safetensors", negative="grey"))
    opened = Calibration.open(made.path)
    planned = prepare(replace(DEMO, output=tmp_path / "other.safetensors")).plan
    assert (opened.family, opened.base, opened.size, opened.native) == ("demo", "demo", Size(48, 48), Size(64, 64))
    assert opened.statistics == ("norm",)
    assert dict(made.facts) == dict(opened.facts)
    assert opened.check(planned, ("norm",)) == ()
    facts = opened.facts
    assert facts["prompts"].startswith("3, sha256 ")
    assert {name: facts[name] for name in ("seeds", "scheduler", "steps", "guidance", "dtype", "negative")} == {
        "seeds": "0 to 2", "scheduler": "DDIM", "steps": "1", "guidance": "4", "dtype": "float32", "negative": "grey",
    }  # fmt: skip
    assert (facts["torch"], facts["device"]) == (version("torch"), "cpu")
    metadata = makers.metadata_of(made.path)
    assert str(tmp_path) not in json.dumps(metadata)
    tensors = makers.read(planned.checkpoint.path)
    for target in planned.targets:
        data = tensors[target.source.name][2]
        width = len(data) // target.source.count
        digest = hashlib.sha256(data[target.start * width : target.stop * width]).hexdigest()
        name = target.layer.diffusers
        assert opened.layers[name] == digest[:16]
        assert opened.read(name, "norm").shape == (target.source.shape[-1],)


def test_every_statistic_has_its_shape(whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "c.safetensors"
    target.write_bytes(whole)
    opened = Calibration.open(target)
    planned = prepare(replace(DEMO, output=tmp_path / "other.safetensors")).plan
    assert set(opened.statistics) >= {"norm", "gram", "gradient", "gradient_abs", "gradient_square", "native_gradient"}
    assert list(opened.statistics) == [name for name in STATISTICS if name in opened.statistics]
    assert opened.check(planned, opened.statistics) == ()
    for layer in opened.layers:
        for statistic in opened.statistics:
            opened.read(layer, statistic)
    mean, absolute, square = (
        opened.read(next(iter(opened.layers)), name) for name in ("gradient", "gradient_abs", "gradient_square")
    )
    assert bool((mean.abs() <= absolute * (1 + 1e-5)).all())
    assert bool((absolute.square() <= square * (1 + 1e-4)).all())


def test_fused_tensors_are_split_by_rows(tmp_path: Path) -> None:
    """FLUX in the original layout keeps q, k and v in one tensor; each part is hashed alone."""
    base = makers.write(tmp_path / "flux.safetensors", makers.tiny("flux-dev.original-transformer"))
    planned = plan_of(base)
    base_id = runner.identify(planned, Silent())
    parts = [layer for layer in base_id.layers if layer.name.startswith("transformer_blocks.0.attn.to_")]
    assert {layer.name.split(".")[-2] for layer in parts} >= {"to_q", "to_k", "to_v"}
    assert len({layer.hash for layer in parts}) == len(parts)
    assert len(base_id.layers) == len(planned.targets) == len({layer.name for layer in base_id.layers})


def test_the_hash_of_the_base_is_that_of_its_data(tmp_path: Path) -> None:
    tensors = makers.tiny("sd15.diffusers-unet")
    one = runner.identify(plan_of(makers.write(tmp_path / "a.safetensors", tensors)), Silent())
    data = b"".join(data for _, _, data in tensors.values())
    assert one.hash == f"0x{hashlib.sha256(data).hexdigest()}"
    shards = runner.identify(plan_of(makers.write_shards(tmp_path / "s", tensors, 3)), Silent())
    assert shards.hash != one.hash
    assert {layer.name: layer.hash for layer in shards.layers} == {layer.name: layer.hash for layer in one.layers}


# --- groups, runs, and what they do not change ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """All statistics, made in one go and in groups that are as large as can be."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    target = tmp_path_factory.mktemp("whole") / "c.safetensors"
    calibrate(replace(DEMO, criteria=ALL, output=target, memory=10**12))
    torch.set_num_threads(usual)
    return target.read_bytes()


def test_the_memory_that_is_given_decides_the_groups(target: Path) -> None:
    with pytest.raises(Stopped):
        calibrate(replace(SHORT, output=target, memory=1), Stages("sampling 1/42"))


def test_another_seed_is_another_calibration(whole: bytes, target: Path) -> None:
    calibrate(replace(DEMO, criteria=("wanda", "taylor"), output=target, seed=1))
    usual = load(whole)
    assert not [name for name, tensor in load_file(target).items() if torch.equal(tensor, usual[name])]


def test_a_run_that_is_stopped_again_and_again_goes_on(whole: bytes, target: Path, tmp_path: Path) -> None:
    request = replace(DEMO, criteria=ALL, output=target, layers=14)
    runs = []
    for stage, after, layers in (
        ("sampling 2/3", 1, 14), ("drawing", 1, 14), ("drawing", 2, 14), ("gradients 1/3", 2, 14),
        ("native gradients 2/3", 3, 14), ("writing", 2, 20),
    ):  # fmt: skip
        runs.append(Stages(stage, after))
        with pytest.raises(Stopped):
            calibrate(replace(request, layers=layers), runs[-1])
        assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors.part"]
    last = Stages()
    made = calibrate(request, last)
    assert target.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [target]
    assert made.resumed == 3 + 3 + 3, "groups of inputs, of gradients, and of gradients at the native size"
    assert runs[3].sizes["drawing"] == 1, "the first batch of two pictures was kept"
    assert "drawing" not in runs[4].titles
    assert last.titles == ["hashing", "writing"]


def test_a_process_that_a_signal_ended_goes_on(drawing: Forks, here: Path) -> None:
    """SIGKILL, then SIGINT between two groups: in the end the bytes are those of an uninterrupted command."""
    words = f"{QUICK} --criterion wanda --layers-at-once 9 -o"
    assert drawing.start(here, *shlex.split(f"{words} a.safetensors")).end().code == 0
    part = here / "b.safetensors.part"
    for signum, code, group in ((signal.SIGKILL, -signal.SIGKILL, "0001"), (signal.SIGINT, 130, "0003")):
        run = drawing.start(here, *shlex.split(f"{words} b.safetensors"))
        while not (part / f"{group}.safetensors").exists():
            assert run.running, run.err
            time.sleep(0.005)
        run.kill(signum)
        ran = run.end()
        assert ran.code == code
        assert not (here / "b.safetensors").exists()
    assert part.name in ran.err
    assert "Traceback" not in ran.err
    assert "kept from before:" in drawing.start(here, *shlex.split(f"{words} b.safetensors")).end().out
    assert (here / "b.safetensors").read_bytes() == (here / "a.safetensors").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["a.safetensors", "b.safetensors"]


def stopped(request: CalibrateRequest, stage: str) -> Path:
    """Begin a run that stops in a stage; return its folder."""
    with pytest.raises(Stopped):
        calibrate(request, Stages(stage))
    assert request.output
    return request.output.with_name(f"{request.output.name}.part")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of DEMO that stopped after its first group of layers."""
    return stopped(
        replace(DEMO, output=tmp_path_factory.mktemp("sampled") / "c.safetensors", layers=14), "sampling 2/3"
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of LITTLE that stopped after its first group of gradients."""
    return stopped(replace(LITTLE, output=tmp_path_factory.mktemp("measured") / "c.safetensors"), "gradients 2/2")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "c.safetensors"


@pytest.fixture
def part(target: Path) -> Path:
    return target.with_name("c.safetensors.part")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other_schedule(pipe: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.013)


def other_part(name: str, pipe: Any) -> None:
    with torch.no_grad():
        next(getattr(pipe, name).parameters()).flatten()[0].add_(1)


def half(pipe: Any) -> None:
    pipe.unet.bfloat16()


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"steps": 3}, "steps 1, now 3"),
    ({"pairs": ((PROMPTS[0], 9),)}, "seeds 7 to 7, now 9 to 9"),
    ({"pairs": ((PROMPTS[1], 7),)}, "prompts 1, sha256"),
    ({"size": Size(64, 64)}, "size 96x64, now 64x64"),
    ({"native": Size(96, 96)}, "native 64x64, now 96x96"),
    ({"statistics": ("gram",)}, "statistics norm, now gram"),
    ({"negative": "fog"}, "negative not given, now fog"),
    ({"guidance": 2.0}, "guidance 7.5, now 2"),
    ({"batch": 3}, "batch 2, now 3"),
]
OTHERS: list[tuple[Callable[[Any], None], str]] = [
    (half, "dtype float32, now bfloat16"),
    (other_schedule, "scheduler settings DDIMScheduler sha256:"),
    (partial(other_part, "text_encoder"), "other parts sha256:"),
    (partial(other_part, "vae"), "other parts sha256:"),
]


def test_other_settings_are_refused_or_start_over(target: Path, part: Path, tmp_path: Path) -> None:
    """So is another pipeline around the same model."""
    made, wanted = tiny("sd15", tmp_path), setting("norm", count=1, steps=1)
    with pytest.raises(Stopped):
        made.collect(target, wanted, Stages("writing"))
    before = content(part)
    for changes, key in CHANGES:
        with raises(CalibrationError, part, key):
            made.collect(target, replace(wanted, **changes))
    fewer = replace(made.plan, targets=made.plan.targets[1:])
    with raises(CalibrationError, part, f"layers {len(made.plan.targets)}, sha256"):
        Tiny("sd15", made.pipe, fewer).collect(target, wanted)
    for change, key in OTHERS:
        pipe = speaking("sd15")
        change(pipe)
        other = Tiny("sd15", pipe, made.plan)
        with raises(CalibrationError, part, key):
            other.collect(target, wanted)
    assert content(part) == before
    result = other.collect(target, wanted, replace=True)
    assert (result.resumed, part.exists()) == (0, False)


def test_force_goes_on_where_nothing_changed(sampled: Path, target: Path, part: Path) -> None:
    target.write_bytes(b"old")
    shutil.copytree(sampled, part)
    assert stopped(replace(DEMO, output=target, force=True, layers=14), "writing") == part
    assert target.read_bytes() == b"old"
    assert calibrate(replace(DEMO, output=target, force=True)).resumed == 3
    assert Calibration.open(target).statistics == ("norm",)


def test_a_foreign_folder_stays(target: Path, part: Path) -> None:
    part.mkdir()
    (part / "mine.txt").write_text("mine")
    with raises(CalibrationError, part):
        calibrate(replace(SHORT, output=target, force=True))
    assert content(part) == {"mine.txt": b"mine"}


def test_a_folder_that_was_just_begun_is_begun_again(target: Path, part: Path) -> None:
    part.mkdir()
    assert calibrate(replace(SHORT, output=target)).resumed == 0


def test_a_folder_without_its_record(measured: Path, target: Path, part: Path) -> None:
    """Its deletion was stopped: its files have our names, but their settings are unknown."""
    request = replace(SHORT, output=target)
    shutil.copytree(measured, part)
    (part / "run.json").unlink()
    assert content(part).keys() > {"0001.safetensors", "picture-00000.png"}
    with raises(CalibrationError, part, "run.json"):
        calibrate(request)
    (part / "0001.safetensors.bak").write_text("mine")
    with raises(CalibrationError, part):
        calibrate(replace(request, force=True))
    (part / "0001.safetensors.bak").unlink()
    made = calibrate(replace(request, force=True))
    assert (made.resumed, part.exists()) == (0, False)


@pytest.mark.parametrize("changes", [{"limit": 2, "force": True}, {}], ids=["starting over", "at the end"])
def test_the_record_is_deleted_last(
    changes: dict[str, Any], sampled: Path, target: Path, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sampled, part)
    gone: list[str] = []
    unlink, iterdir = Path.unlink, Path.iterdir

    def noted(path: Path, missing_ok: bool = False) -> None:
        if path.parent == part and not path.name.startswith("."):
            gone.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    # The order of the file system does not matter.
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(iterdir(path), key=lambda file: file.suffix)))
    calibrate(replace(DEMO, output=target, **changes))
    assert not part.exists()
    first = gone[: gone.index("run.json") + 1]
    assert "0001.safetensors" in first


def test_a_record_that_cannot_be_read(target: Path, part: Path) -> None:
    part.mkdir()
    (part / "run.json").write_text("{")
    with raises(CalibrationError, part, "run.json"):
        calibrate(replace(SHORT, output=target))


def garbled() -> bytes:
    """A picture as large as real ones, whose second piece of data has lost its name: a SyntaxError of Pillow's."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)).save(out, "PNG")
    head, first, rest = out.getvalue().split(b"IDAT", 2)
    return head + b"IDAT" + first + b"\0\1\2\3" + rest


def test_a_damaged_file_is_named(measured: Path, target: Path, part: Path) -> None:
    shutil.copytree(measured, part)
    kept, files = folder.Folder(part), content(part)
    tensors, picture = "0001.safetensors", "picture-00000.png"
    for name, damaged, read in (
        (tensors, files[tensors][:-1], kept.finished),
        (picture, files[picture][: len(files[picture]) // 2], partial(kept.picture, 0)),
        (picture, garbled(), partial(kept.picture, 0)),
        (picture, b"none", partial(kept.picture, 0)),
    ):
        (part / name).write_bytes(damaged)
        with raises(CalibrationError, part, name):
            read()
    (part / tensors).unlink()
    (part / picture).unlink()
    assert calibrate(replace(LITTLE, output=target)).resumed == 0


def test_two_runs_do_not_meet(target: Path, part: Path) -> None:
    part.mkdir()
    handle = os.open(part, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with raises(CalibrationError, part):
            calibrate(replace(SHORT, output=target))
    finally:
        os.close(handle)


def test_a_full_disk_keeps_what_is_finished(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = staging.publish

    def full(part: Path, to: Path, *, replace: bool = True) -> None:
        if to.name == "0002.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(part, to, replace=replace)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "publish", full)
        with raises(CalibrationError, "0002.safetensors"):
            calibrate(replace(SHORT, output=target, layers=14))
    assert calibrate(replace(SHORT, output=target)).resumed == 1


def test_no_right_to_write() -> None:
    error = PermissionError(errno.EACCES, "Permission denied")
    check(folder.explained(error, Path("c"), Path("c.part")), CalibrationError, "c: ")


def test_a_file_that_appears_in_the_meantime_stays(target: Path) -> None:
    class Meanwhile(Stages):
        def stage(self, title: str, size: int, unit: str = "bytes") -> None:
            super().stage(title, size, unit)
            if title == "writing":
                target.write_bytes(b"other")

    with raises(CalibrationError, target):
        calibrate(replace(SHORT, output=target), Meanwhile())
    assert target.read_bytes() == b"other"
    assert not list(target.parent.glob(".*"))


def test_a_file_that_does_not_read_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crdiff_export.formats.safetensors.serialise", lambda *_: b"\x02" + bytes(7) + b"{}")
    with pytest.raises(BakeError, match="does not open again"):
        calibrate(replace(SHORT, output=target))
    assert not target.exists()


def test_a_base_is_read_once_for_many_sizes(tmp_path: Path) -> None:
    made = tiny("sd15", tmp_path)
    base_id = runner.identify(made.plan, Silent())
    stages = Stages()
    wanted = setting("norm", count=1, steps=1)
    made.collect(tmp_path / "a.safetensors", wanted, stages, identity=base_id)
    assert "hashing" not in stages.titles
    made.collect(tmp_path / "b.safetensors", wanted)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_black_pictures_are_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(_self: Any, prompts: list[str], *_: Any) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64))] * len(prompts)

    monkeypatch.setattr("crdiff_export.sampling.session.Session.draw", black)
    (note,) = calibrate(replace(LITTLE, output=tmp_path / "c.safetensors")).notes
    assert note.startswith("2 pictures are all black")


# --- memory ---

GB = 10**9


def system(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MEMINFO = f"MemTotal: {10**8} kB\nMemAvailable: {2 * 10**7} kB\nHugePages_Total: 0\n"
LIMITS: dict[str, tuple[dict[str, str], int | None]] = {
    "nothing": ({}, None),
    "machine": ({"proc/meminfo": MEMINFO}, 20_480_000_000),
    "no cgroup has a limit": (
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n",
         "cgroup/memory.current": f"{GB}\n"},
        20_480_000_000,
    ),
    "container": (
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "cgroup/memory.max": f"{8 * GB}\n",
         "cgroup/memory.current": f"{3 * GB}\n"},
        5 * GB,
    ),
    "files that were read count as free": (
        {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": f"{8 * GB}", "cgroup/memory.current": f"{8 * GB}",
         "cgroup/memory.stat": f"anon 5\ninactive_file {6 * GB}\nactive_file 7\n"},
        6 * GB,
    ),
    "a service, and what it is in": (
        {"proc/self/cgroup": "0::/a.slice/b.service\n",
         "cgroup/a.slice/memory.max": f"{4 * GB}", "cgroup/a.slice/memory.current": f"{3 * GB}",
         "cgroup/a.slice/b.service/memory.max": f"{3 * GB}", "cgroup/a.slice/b.service/memory.current": f"{GB}"},
        GB,
    ),
    "version 1": (
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "3:cpu:/x\n4:memory:/x\n0::/\n",
         "cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}", "cgroup/memory/memory.usage_in_bytes": f"{GB}",
         "cgroup/memory/x/memory.limit_in_bytes": f"{7 * GB}", "cgroup/memory/x/memory.usage_in_bytes": f"{5 * GB}",
         "cgroup/memory/x/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\n"},
        3 * GB,
    ),
    "a container of version 1, which is called otherwise outside": (
        {"proc/self/cgroup": "4:memory:/docker/abc\n", "cgroup/memory/memory.limit_in_bytes": f"{7 * GB}",
         "cgroup/memory/memory.usage_in_bytes": f"{5 * GB}"},
        2 * GB,
    ),
    "more than there may be": (
        {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": f"{GB}", "cgroup/memory.current": f"{2 * GB}"}, 0
    ),
    "not what it should be": ({"proc/meminfo": "MemAvailable: much", "proc/self/cgroup": ""}, None),
}  # fmt: skip


@pytest.mark.parametrize(("files", "host"), LIMITS.values(), ids=LIMITS)
def test_what_is_free(files: dict[str, str], host: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    system(tmp_path, files)
    assert memory.free(torch.device("cpu")) == (4 * GB if host is None else host)
    for own in (GB // 2, 100 * GB):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, own=own: (own, 10**12))
        right = own if host is None else min(own, host)
        assert memory.free(torch.device("cuda")) == right, "a group is copied to main memory"


class OnGpu(torch.nn.Module):
    """Says that its weight is on a GPU."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("cuda"))


def test_a_gpu_is_asked_for_kernels_that_repeat() -> None:
    cudnn = torch.backends.cudnn
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    with runner._repeatable(OnGpu()):
        assert (torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark) == (1, True, False)
    assert (torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark) == before


# --- the document ---

DOCUMENT = (DOCS / "calibration.md").read_text("utf-8")


def test_the_documents_example(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "wanda.safetensors 42\n"
    assert Calibration.open(here / "wanda.safetensors").size == Size(48, 48)


def test_the_document_has_every_key_and_statistic() -> None:
    metadata = set(
        calibration.header(
            family="f", base="b", base_hash="0x", size=SIZE, native=NATIVE, statistics=(), layers={}, facts={}
        )
    )
    assert all(f"`{key}`" in DOCUMENT or f"`.{key.rpartition('.')[2]}`" in DOCUMENT for key in metadata)
    table = re.findall(r"^\| `(\w+)`, ?…? \||^\| `(\w+)` \| float", DOCUMENT, re.MULTILINE)
    documented = {first or second for first, second in table}
    assert {name for name in STATISTICS if not name.startswith("native_")} <= documented


# --- groups of layers ---

LAYERS = tuple(LayerSpec(str(i), 10, 20, "") for i in range(7))


@pytest.mark.parametrize(
    ("statistics", "limit", "most", "sizes"),
    [
        (("norm",), 10**6, None, [7]), (("norm",), 3 * 160, None, [3, 3, 1]), (("norm",), 3 * 160, 2, [2, 2, 2, 1]),
        (("gram",), 2 * 1600, None, [2, 2, 2, 1]), (("norm", "gram"), 1, None, [1] * 7),
        (("gradient",), 2 * 3 * 800, None, [2, 2, 2, 1]), (("gradient", "gradient_abs"), 10**9, 4, [4, 3]),
    ],
    ids=["all", "memory", "both", "products", "too little", "gradients", "layers"],
)  # fmt: skip
def test_groups_fit(statistics: tuple[str, ...], limit: int, most: int | None, sizes: list[int]) -> None:
    groups = list(names.groups(LAYERS, statistics, limit, most))
    assert [len(group) for group in groups] == sizes
    assert tuple(layer for group in groups for layer in group) == LAYERS


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("12KB", 12_000), ("1TB", 10**12), ("64", 64),
     ("64B", 64)],
)  # fmt: skip
def test_amounts(text: str, size: int) -> None:
    assert BYTES.convert(text, None, None) == size


@pytest.mark.parametrize("name", ["norms", "", "gradient_cube"])
def test_there_is_no_such_statistic(name: str) -> None:
    with raises(CalibrationError, repr(name)):
        setting("norm", name)


# --- the command ---


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


def test_the_command_shows_facts_and_the_file(line: Line, here: Path) -> None:
    ran = line(f"{QUICK} --criterion wanda --criterion taylor")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "demo-48x48-calibration.safetensors"
    assert "statistics:   norm, gradient_square" in ran.out
    assert "loss samples: 1 of each picture" in ran.out
    assert "note: norm, gradient_square of 42 layers" in ran.err
    assert "note: 2 pictures of 2 prompts, on cpu in fp32" in ran.err
    for stage in ("hashing", "sampling", "drawing", "gradients", "writing"):
        assert f"\n{stage}: " in f"\n{ran.err}"
    again = line(f"{QUICK} --criterion wanda")
    refused(again, 1, "demo-48x48-calibration.safetensors")
    assert line(f"{QUICK} --criterion wanda --force").code == 0


def test_quiet_and_json(line: Line, here: Path) -> None:
    (here / "p.txt").write_text("\n".join([*prompts.to_search(2), ""]))
    ran = line(f"{QUICK} --criterion wanda --prompts p.txt --pictures 2 -o q.safetensors -q")
    assert (ran.code, ran.out, ran.err) == (0, "q.safetensors\n", "")
    ran = line(f"{QUICK} --criterion obs:damping=0.1 --seed 5 --targets attn -o j.safetensors --json")
    assert ran.err == ""
    result = ran.result
    assert (result["schema"], result["file"], result["statistics"], result["criteria"]) == (
        1, "j.safetensors", ["gram"], ["obs:damping=0.1"]
    )  # fmt: skip
    assert (result["resolution"], result["native"], result["resumed"]) == ("48x48", "64x64", 0)
    assert result["facts"]["seeds"] == "5 to 6"
    assert result["size"] == (here / "j.safetensors").stat().st_size
    assert Calibration.open(here / "q.safetensors").facts["pictures"] == "4"


REFUSED = {
    "no-size": ("calibrate demo --criterion wanda", 2, "--res"),
    "no-criterion": ("calibrate demo --res 48", 2, "--criterion"),
    "magnitude": (f"{QUICK} --criterion magnitude --criterion random", 2, "no calibration"),
    "misspelt": (f"{QUICK} --criterion wander", 2, "'wander'"),
    "bad-option": (f"{QUICK} --criterion taylor:form=cube", 2, "'cube'"),
    "bad-memory": (f"{QUICK} --criterion wanda --memory much", 2, "'much'"),
    "no-memory": (f"{QUICK} --criterion wanda --memory 0", 2, "'0'"),
    "no-prompts": ("calibrate sd15.safetensors --res 512 --criterion wanda", 2, "--prompts"),
    "no-file": (f"{QUICK} --criterion wanda --prompts none.txt", 1, "none.txt"),
    "not-a-scene": (f"{QUICK} --criterion wanda --prompts fox.txt", 1, "fox"),
    "off-grid": ("calibrate demo --res 50 --criterion wanda", 2, "50x50"),
    "last-seeds": (f"{QUICK} --criterion wanda --seed 18446744073709551615", 2, "--seed"),
    "no-kind": (f"{QUICK} --criterion wanda --targets ff,conv", 2, "'conv'"),
    "strange-output": (f"{QUICK} --criterion wanda -o c.toml", 2, "c.toml"),
    "no-folder": (f"{QUICK} --criterion wanda -o no/c.safetensors", 1, "folder no"),
    "the-base": ("calibrate sd15.safetensors {} --config conf --force -o sd15.safetensors", 1, "the base itself"),
    "negative": ("calibrate flux.safetensors {} --negative fog", 2, "negative prompt"),
    "baked": ("calibrate baked.safetensors {}", 1, "baked.safetensors: its header says"),
}
BASES = {"sd15": "sd15.original", "flux": "flux-dev.original-transformer", "baked": "demo.diffusers-unet"}


@pytest.mark.parametrize(("words", "code", "key"), REFUSED.values(), ids=REFUSED)
def test_refused_commands(words: str, code: int, key: str, line: Line, here: Path) -> None:
    (here / "fox.txt").write_text("two red circles on grey\na red fox\n")
    (here / "p.txt").write_text("a red fox\n")
    (here / "conf").mkdir()
    (here / "conf" / "model_index.json").write_text("{}")
    for name, table in BASES.items():
        if f"{name}.safetensors" in words:
            metadata = {"crdiff.schema": "1"} if name == "baked" else None
            makers.write(here / f"{name}.safetensors", makers.tiny(table), metadata)
    before = set(here.iterdir())
    refused(line(words.format("--res 512 --criterion wanda --prompts p.txt")), code, key)
    assert set(here.iterdir()) == before


def test_a_device_that_is_not_there(line: Line) -> None:
    ran = line(f"{QUICK} --criterion wanda --device cuda:7")
    assert ran.code == 1
    assert "device cuda:7" in ran.err


@pytest.mark.parametrize(
    "changes",
    [{"criteria": ()}, {"samples": 0}, {"seed": -1}, {"memory": 0}, {"prompts": (" ",)}],
    ids=str,
)
def test_refused_requests(changes: dict[str, Any], tmp_path: Path) -> None:
    with raises(OptionError):
        prepare(replace(DEMO, output=tmp_path / "c.safetensors", **changes))
