"""Collect a calibration with an open pipeline: pass by pass, group of layers by group, then write the file."""

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
from crdiff_export.calibrate import collect as collecting
from crdiff_export.calibrate import gradients, setting
from crdiff_export.calibrate import memory as free_memory
from crdiff_export.calibrate.denoise import Denoising
from crdiff_export.calibrate.folder import Folder, open_folder
from crdiff_export.calibrate.setting import CalibrationResult, LayerSpec, Pass, Setting
from crdiff_export.errors import CalibrationError, foreign_errors
from crdiff_export.formats.hashing import hash_data_once
from crdiff_export.formats.text import printable
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.criteria import calibration
from crdiff_export.prune.plan import Plan, open_targets
from crdiff_export.sampling import fingerprint, pipelines
from crdiff_export.sampling.poa.handle import model_of
from crdiff_export.sampling.session import Session, Style

if TYPE_CHECKING:
    from PIL.Image import Image

# Ours: the share of free memory that statistics may use; the rest is for the pass itself.
SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a base at every size: the hash of its weights, and its layers with their hashes."""

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
    memory: int | None = None,
    layers: int | None = None,
    replace: bool = False,
    identity: Identity | None = None,
) -> CalibrationResult:
    """Collect the statistics of every target of a plan with an open pipeline, and write them.

    An interrupted run with the same settings goes on.

    Args:
        opened: The open pipeline of the base.
        plan: The plan, whose targets are measured.
        wanted: The settings.
        target: The file to write.
        progress: Told of every stage.
        base: The name of the base, for the header.
        memory: Bytes of statistics that may be in memory at once; by default a share of the free memory.
        layers: Layers that may be measured at once.
        replace: Whether to replace an existing file.
        identity: The result of `identify`, to avoid reading the base again.

    Returns:
        The written calibration.

    Raises:
        CrdiffError: The pipeline lacks a layer, cannot compute a statistic or gives numbers that are not finite.
            Finished groups of layers are kept in the folder `target`.part.
    """
    shown = progress or Silent()
    modules = _modules(opened.pipe, plan)
    base_id = identity or identify(plan, shown)
    style = opened.style(wanted.size, wanted.steps, wanted.guidance, wanted.negative)
    facts = setting.facts(wanted, style.steps, style.guidance, opened.scheduler, _origin(opened.pipe))
    if told := pipelines.told_size(opened.usage):
        facts["told_size"] = str(told)
    run = _fingerprint(opened.pipe, plan, wanted, base_id, facts)
    with open_folder(target, run, force=replace) as folder:
        work = _Work(opened, wanted, modules, base_id.layers, folder, style, shown, memory, layers)
        resumed, notes = work.collect()
        metadata = calibration.header(
            family=plan.match.family.id, base=base, base_hash=base_id.hash, size=wanted.size, native=wanted.native,
            statistics=wanted.statistics, layers={layer.name: layer.hash for layer in base_id.layers}, facts=facts,
        )  # fmt: skip
        names = [f"{statistic}/{layer.name}" for statistic in wanted.statistics for layer in base_id.layers]
        size = folder.assemble(target, names, metadata, shown, replace=replace)
        folder.remove()
    return CalibrationResult(target, wanted.statistics, len(base_id.layers), size, tuple(facts.items()), notes, resumed)


def identify(plan: Plan, progress: Progress, *, rehash: bool = False) -> Identity:
    """Hash a base: SHA-256 of its data section, or of the hex hashes of several files.

    Args:
        plan: The plan of the base.
        progress: Told of every byte read.
        rehash: Compute the hash, whatever the user's cache has.

    Returns:
        The identity.
    """
    files = plan.checkpoint.files
    progress.stage("hashing", sum(file.data_size for file in files))
    hashes = [hash_data_once(file, progress, rehash=rehash) for file in files]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    with open_targets(plan.checkpoint) as read:
        layers = tuple(
            LayerSpec(target.layer.diffusers, *target.shape, hashlib.sha256(read(target)).hexdigest()[:16])
            for target in plan.targets
        )
    return Identity(f"0x{whole}", layers)


@dataclass(frozen=True, slots=True)
class _Work:
    """One run with an open pipeline."""

    opened: Session
    wanted: Setting
    modules: Mapping[str, nn.Linear]
    layers: Sequence[LayerSpec]
    folder: Folder
    style: Style
    progress: Progress
    memory: int | None
    most_layers: int | None

    def collect(self) -> tuple[int, tuple[str, ...]]:
        """Fill the folder; return the number of groups that existed before, and notes on the pictures."""
        finished = self.folder.finished()
        images: list[Image] = []
        for step in setting.passes(self.wanted):
            missing = [
                layer
                for layer in self.layers
                if any(f"{name}/{layer.name}" not in finished for name in step.statistics)
            ]
            if not missing:
                continue
            if not (step.samples_pictures or images):
                images = self._pictures()
            self._run(step, missing, images)
        black = sum(not image.getbbox() for image in images)
        notes = (f"{black} pictures are all black: try another --dtype, such as bf16 or fp32",) if black else ()
        return len({file.path for file, _ in finished.values()}), notes

    def _run(self, step: Pass, layers: Sequence[LayerSpec], images: "Sequence[Image]") -> None:
        """Run one pass, one group of layers after the other."""
        wanted, progress, model = self.wanted, self.progress, model_of(self.opened.pipe)
        examples: list[gradients.Example] = []
        denoising = None
        if not step.samples_pictures:
            denoising = Denoising(self.opened.pipe, step.size, self.style.guidance, self.opened.usage.arguments)
            with self._criterion_errors():
                calls = {prompt: denoising.embed(prompt) for prompt, _ in wanted.pairs}
                latents = denoising.encode(images)
            pairs = zip(latents, wanted.pairs, strict=True)
            examples = [gradients.Example(latent, calls[prompt]) for latent, (prompt, _) in pairs]
        limit = self.memory or int(SHARE * free_memory.free(next(model.parameters()).device))
        groups = list(setting.groups(layers, step.statistics, limit, self.most_layers))
        for number, group in enumerate(groups, 1):
            title = step.title if len(groups) == 1 else f"{step.title} {number}/{len(groups)}"
            with _repeatable(model):
                if denoising is None:
                    progress.stage(title, self.style.steps * len(wanted.pairs), "passes")
                    tensors = collecting.sample(self.opened, wanted, step, group, self.modules, progress)
                else:
                    progress.stage(title, wanted.samples * len(wanted.pairs), "samples")
                    with self._criterion_errors():
                        tensors = gradients.measure(denoising, wanted, step, examples, group, self.modules, progress)
            _check_finite(tensors, model)
            self.folder.keep(tensors)

    def _criterion_errors(self) -> contextlib.AbstractContextManager[None]:
        what = f"{type(self.opened.pipe).__name__} cannot compute its loss"
        return foreign_errors(CalibrationError, what, "Choose a criterion without gradients (wanda, obs).")

    def _pictures(self) -> "list[Image]":
        """Return the dense model's picture of every pair at its native size; draw those that do not exist yet."""
        wanted, batch = self.wanted, self.wanted.batch
        pictures = [self.folder.picture(number) for number in range(len(wanted.pairs))]
        starts = [start for start in range(0, len(pictures), batch) if None in pictures[start : start + batch]]
        style = self.opened.style(wanted.native, wanted.steps, wanted.guidance, wanted.negative)
        if starts:
            passes = sum(len(pictures[start : start + batch]) for start in starts) * style.steps
            self.progress.stage("drawing", passes, "passes")
        for start in starts:  # whole batches, because the batch decides the last bits
            part = wanted.pairs[start : start + batch]
            step = partial(self.progress.advance, len(part))
            drawn = self.opened.draw([prompt for prompt, _ in part], [seed for _, seed in part], style, step)
            for number, image in enumerate(drawn, start):
                self.folder.keep_picture(number, image)
                pictures[number] = image
        return [image for image in pictures if image is not None]


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Use deterministic kernels on a GPU, where torch has them."""
    if next(model.parameters()).device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    usual = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    try:
        torch.set_deterministic_debug_mode("warn")
        cudnn.deterministic, cudnn.benchmark = True, False
        with warnings.catch_warnings(action="ignore"):  # torch warns of operations without such a kernel
            yield
    finally:
        torch.set_deterministic_debug_mode(usual[0])
        cudnn.deterministic, cudnn.benchmark = usual[1:]


def _modules(pipe: Any, plan: Plan) -> dict[str, nn.Linear]:
    """Find every target's module in the pipeline; CalibrationError if one is missing or of another shape."""
    model = model_of(pipe)
    modules = {}
    for target in plan.targets:
        name = target.layer.diffusers
        try:
            module = model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != target.shape:
            raise CalibrationError(
                f"{type(model).__name__} has no layer {name} of {target.shape[0]} x {target.shape[1]} weights",
                "Open the base that is to be calibrated, unfused and unquantised.",
            )
        modules[name] = module
    return modules


def _origin(pipe: Any) -> dict[str, str]:
    """Return the dtype, the device and the versions of the software."""
    weight = next(model_of(pipe).parameters())
    name = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
    return {
        "dtype": str(weight.dtype).removeprefix("torch."), "device": name, "crdiff": tool_version(),
        "diffusers": version("diffusers"), "torch": version("torch"),
    }  # fmt: skip


def _fingerprint(pipe: Any, plan: Plan, wanted: Setting, base_id: Identity, facts: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that an interrupted run must share; groups of layers are not among them."""
    layers = "\n".join(f"{layer.name} {layer.hash}" for layer in base_id.layers)
    return {
        **facts, "version": calibration.VERSION, "family": plan.match.family.id, "base_hash": base_id.hash,
        "size": str(wanted.size), "native": str(wanted.native), "statistics": ", ".join(wanted.statistics),
        "scheduler_settings": fingerprint.scheduler(pipe), "other_parts": fingerprint.other_parts(pipe, model_of(pipe)),
        "layers": f"{len(base_id.layers)}, sha256 {hashlib.sha256(layers.encode()).hexdigest()}",
    }  # fmt: skip


def _check_finite(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise CalibrationError for the first layer with a number that is not finite."""
    dtype = next(model.parameters()).dtype
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            statistic, _, layer = name.partition("/")
            hint = "Give --dtype bf16 or fp32." if dtype == torch.float16 else "Give --dtype fp32."
            what = printable(f"{layer}: its {statistic.replace('_', ' ')} in {str(dtype).removeprefix('torch.')}")
            raise CalibrationError(f"{what} is not finite", hint if dtype != torch.float32 else _IN_FLOAT32)


_IN_FLOAT32 = "The base itself makes such numbers here: draw it with `crdiff preview`, or take other prompts."
