"""The work on an open pipeline: what decides the numbers, then pass by pass and group by group, then the file."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crdiff_export.bake.metadata import tool_version
from crdiff_export.calibrate import collect as hooks
from crdiff_export.calibrate import gradients, memory, setting
from crdiff_export.calibrate.denoise import Denoising
from crdiff_export.calibrate.folder import Folder, begun
from crdiff_export.calibrate.setting import Calibrated, LayerSpec, Pass, Room, Setting
from crdiff_export.errors import CalibrationError
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.text import printable
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.criteria import calibration
from crdiff_export.prune.layer_names import diffusers_name
from crdiff_export.prune.plan import Plan, Target
from crdiff_export.sampling import fingerprint
from crdiff_export.sampling.poa.sampling import model_of
from crdiff_export.sampling.session import Session, Style

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Identity:
    """The base that numbers are of: a hash of all of it, and its layers with theirs. The same for every size."""

    hash: str
    layers: tuple[LayerSpec, ...]


def collect(
    opened: Session,
    plan: Plan,
    wanted: Setting,
    target: Path,
    progress: Progress | None = None,
    *,
    base: str,
    room: Room | None = None,
    replace: bool = False,
    identity: Identity | None = None,
) -> Calibrated:
    """Collect the statistics of every target of the plan with an open pipeline of its base, and write them to `target`.

    Goes on where a run with the same settings was stopped. `identity`, from `identify`, spares reading the base again.
    A CrdiffError, with finished groups kept in `target`.part, where the pipeline lacks a layer, cannot do what the
    statistics ask for or makes numbers that are not finite.
    """
    shown = progress or Silent()
    modules = _modules(opened.pipe, plan)
    known = identity or identify(plan, shown)
    style = opened.style(wanted.size, wanted.steps, wanted.guidance, wanted.negative)
    facts = setting.facts(wanted, style.steps, style.guidance, opened.scheduler, _place(opened.pipe))
    run = _fingerprint(opened.pipe, plan, wanted, known, facts)
    with begun(target, run, force=replace) as folder:
        work = _Work(opened, wanted, modules, known.layers, folder, room or Room(), style, shown)
        resumed, notes = work.collect()
        metadata = calibration.header(
            family=plan.match.family.id, base=base, base_hash=known.hash, size=wanted.size, native=wanted.native,
            statistics=wanted.statistics, layers={layer.name: layer.hash for layer in known.layers}, facts=facts,
        )  # fmt: skip
        names = [f"{statistic}/{layer.name}" for statistic in wanted.statistics for layer in known.layers]
        size = folder.assemble(target, names, metadata, shown, replace=replace)
        folder.remove()
    return Calibrated(target, wanted.statistics, len(known.layers), size, tuple(facts.items()), notes, resumed)


def identify(plan: Plan, progress: Progress) -> Identity:
    """Read a base through, once: SHA-256 of its data section, 0x…; of several files that of their hashes in hex."""
    files = plan.checkpoint.files
    progress.stage("hashing", sum(file.data_size for file in files))
    hashes = [hash_data(file, progress) for file in files]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    readers = [file.open() for file in files]
    try:
        layers = tuple(_layer(plan, target, readers[target.file]) for target in plan.targets)
    finally:
        for reader in readers:
            reader.close()
    return Identity(f"0x{whole}", layers)


def _layer(plan: Plan, target: Target, reader: Any) -> LayerSpec:
    start, stop = target.span(target.source)
    data = memoryview(bytearray(stop - start))
    reader.read_into(start, data)
    columns = target.source.shape[-1]
    digest = hashlib.sha256(data).hexdigest()[:16]
    return LayerSpec(diffusers_name(plan, target), target.count // columns, columns, digest)


class _Work:
    """One run over an open pipeline."""

    def __init__(
        self,
        opened: Session,
        wanted: Setting,
        modules: Mapping[str, nn.Linear],
        layers: Sequence[LayerSpec],
        folder: Folder,
        room: Room,
        style: Style,
        progress: Progress,
    ) -> None:
        self._opened, self._wanted, self._modules, self._layers = opened, wanted, modules, layers
        self._folder, self._room, self._style, self._progress = folder, room, style, progress

    def collect(self) -> tuple[int, tuple[str, ...]]:
        """Fill the folder; how many groups were there, and what is to be said of the pictures."""
        finished = self._folder.finished()
        resumed = len(set(finished.values()))
        black = 0
        images: list[Image] = []
        for step in setting.passes(self._wanted):
            missing = [
                layer
                for layer in self._layers
                if any(f"{name}/{layer.name}" not in finished for name in step.statistics)
            ]
            if not missing:
                continue
            if not (step.samples_pictures or images):
                images = self._pictures()
                black = sum(not image.getbbox() for image in images)
            self._run(step, missing, images)
        notes = (f"{black} pictures are all black: try another --dtype, such as bf16 or fp32",) if black else ()
        return resumed, notes

    def _run(self, step: Pass, layers: Sequence[LayerSpec], images: "Sequence[Image]") -> None:
        """One pass, a group of layers after the other."""
        examples: list[gradients.Example] = []
        denoising = None
        if not step.samples_pictures:
            denoising = Denoising(self._opened.pipe, step.size, self._style.guidance)
            told = {prompt: denoising.embed(prompt) for prompt, _ in self._wanted.pairs}
            examples = [
                gradients.Example(latents, told[prompt])
                for latents, (prompt, _) in zip(denoising.encode(images), self._wanted.pairs, strict=True)
            ]
        free = memory.free(next(model_of(self._opened.pipe).parameters()).device)
        groups = list(setting.groups(layers, step.statistics, self._room, free))
        for number, group in enumerate(groups, 1):
            title = step.title if len(groups) == 1 else f"{step.title} {number}/{len(groups)}"
            with _repeatable(model_of(self._opened.pipe)):
                if denoising is None:
                    self._progress.stage(title, self._style.steps * len(self._wanted.pairs), "passes")
                    found = hooks.sample(self._opened, self._wanted, step, group, self._modules, self._progress)
                else:
                    self._progress.stage(title, self._wanted.samples * len(self._wanted.pairs), "samples")
                    found = gradients.measure(
                        denoising, self._wanted, step, examples, group, self._modules, self._progress
                    )
            _check_finite(found, self._opened.pipe)
            self._folder.keep(found)

    def _pictures(self) -> "list[Image]":
        """The dense model's pictures of every pair at its native size: those that are there, and the others."""
        pairs, batch = self._wanted.pairs, self._wanted.batch
        found = [self._folder.picture(number) for number in range(len(pairs))]
        starts = [start for start in range(0, len(pairs), batch) if None in found[start : start + batch]]
        style = self._opened.style(
            self._wanted.native, self._wanted.steps, self._wanted.guidance, self._wanted.negative
        )
        if starts:
            passes = sum(len(pairs[start : start + batch]) for start in starts) * style.steps
            self._progress.stage("drawing", passes, "passes")
        for start in starts:  # whole batches: what is drawn together decides the last bits
            part = pairs[start : start + batch]
            step = partial(self._progress.advance, len(part))
            drawn = self._opened.draw([prompt for prompt, _ in part], [seed for _, seed in part], style, step)
            for number, image in enumerate(drawn, start):
                self._folder.keep_picture(number, image)
                found[number] = image
        return [image for image in found if image is not None]


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """On a GPU, kernels whose sums come out the same every time, as far as torch has them."""
    if next(model.parameters()).device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    usual = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    try:
        torch.set_deterministic_debug_mode("warn")
        cudnn.deterministic, cudnn.benchmark = True, False
        with warnings.catch_warnings(action="ignore"):  # what there is no such kernel for
            yield
    finally:
        torch.set_deterministic_debug_mode(usual[0])
        cudnn.deterministic, cudnn.benchmark = usual[1:]


def _modules(pipe: Any, plan: Plan) -> dict[str, nn.Linear]:
    """Every target's layer in the pipeline; CalibrationError where it has none such."""
    model = model_of(pipe)
    found = {}
    for target in plan.targets:
        name = diffusers_name(plan, target)
        shape = (target.count // target.source.shape[-1], target.source.shape[-1])
        try:
            module = model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape:
            raise CalibrationError(
                f"{type(model).__name__} has no layer {name} of {shape[0]} x {shape[1]} weights",
                "Open the base that is to be calibrated, unfused and unquantised.",
            )
        found[name] = module
    return found


def _place(pipe: Any) -> dict[str, str]:
    """Where and with what the numbers are made."""
    weight = next(model_of(pipe).parameters())
    name = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
    return {
        "dtype": str(weight.dtype).removeprefix("torch."), "device": name, "crdiff": tool_version(),
        "diffusers": version("diffusers"), "torch": version("torch"),
    }  # fmt: skip


def _fingerprint(pipe: Any, plan: Plan, wanted: Setting, known: Identity, facts: Mapping[str, str]) -> dict[str, str]:
    """What a run must share with one that it goes on with. The groups are not in it: they change no number."""
    layers = "\n".join(f"{layer.name} {layer.hash}" for layer in known.layers)
    return {
        **facts, "version": calibration.VERSION, "family": plan.match.family.id, "base_hash": known.hash,
        "size": str(wanted.size), "native": str(wanted.native), "statistics": ", ".join(wanted.statistics),
        "scheduler_settings": fingerprint.scheduler(pipe), "other_parts": fingerprint.others(pipe, model_of(pipe)),
        "layers": f"{len(known.layers)}, sha256 {hashlib.sha256(layers.encode()).hexdigest()}",
    }  # fmt: skip


def _check_finite(found: Mapping[str, Tensor], pipe: Any) -> None:
    """CalibrationError for the first layer with a number that is none."""
    dtype = next(model_of(pipe).parameters()).dtype
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            statistic, _, layer = name.partition("/")
            hint = "Give --dtype bf16 or fp32." if dtype == torch.float16 else "Give --dtype fp32."
            said = printable(f"{layer}: its {statistic.replace('_', ' ')} in {str(dtype).removeprefix('torch.')}")
            raise CalibrationError(f"{said} is not finite", hint if dtype != torch.float32 else _IN_FLOAT32)


_IN_FLOAT32 = "The base itself makes such numbers here: draw it with `crdiff preview`, or take other prompts."
