"""The work on a device: open the pipeline once, draw every picture with it, and keep the libraries' talk off stderr."""

import contextlib
import inspect
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from crdiff_export import poa
from crdiff_export.errors import OptionError, PlanError, PreviewError
from crdiff_export.families.pipelines import BUNDLED, Pipeline
from crdiff_export.inspection import printable
from crdiff_export.poa import Schedule
from crdiff_export.preview.opening import Opening
from crdiff_export.preview.wording import Column, Picture, Taken
from crdiff_export.progress import Progress

if TYPE_CHECKING:
    from crdiff_export.preview import Job

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Ours: enough to judge a picture by, and half of what diffusers takes.
STEPS = 25
# src: the model card of FLUX.1-schnell
FEW_STEPS, NO_GUIDANCE = 4, 0.0


def device(asked: str, *, offload: bool) -> str:
    """The device to draw on; PlanError for one that this machine does not have."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise PlanError(
            f"device {asked}: {str(error).splitlines()[0]}", "Leave --device out to take what is there."
        ) from error
    if offload and asked == "cpu":
        raise OptionError("--offload keeps parts off an accelerator, and there is none at work", "Leave it out.")
    return asked


def dtype(asked: str | None, pipeline: Pipeline, place: str) -> str:
    """The dtype to draw in: on an accelerator the family's, on a CPU the one in which it computes fastest."""
    return asked or ("fp32" if place == "cpu" else "bf16" if pipeline.dtype == "bfloat16" else "fp16")


def take(job: "Job", source: poa.Source, progress: Progress) -> Taken:
    """Every picture, row by row; PreviewError where the pipeline cannot be opened or the memory is too small."""
    folder = str(job.opening.here())
    with _hushed(), _threads(job), _enough_memory(job.device):
        pipe = _open(job.opening, folder, DTYPES[job.dtype], job.base.name)
        pipe.set_progress_bar_config(disable=True)
        if job.request.offload:
            pipe.enable_model_cpu_offload(device=job.device)
            pipe.vae.enable_tiling()
        else:
            pipe.to(job.device)
        return _Camera(job, pipe, progress).take(source)


class _Camera:
    """A pipeline and how it is called."""

    def __init__(self, job: "Job", pipe: Any, progress: Progress) -> None:
        request, quick = job.request, job.plan.match.family.id == "flux-schnell"
        usual = NO_GUIDANCE if quick else inspect.signature(pipe.__call__).parameters["guidance_scale"].default
        self._job, self._pipe, self._progress = job, pipe, progress
        self._steps = request.steps or (FEW_STEPS if quick else STEPS)
        self._guidance = float(usual if request.guidance is None else request.guidance)
        self._options = {
            "width": job.size.width, "height": job.size.height, "num_inference_steps": self._steps,
            "guidance_scale": self._guidance, **({"negative_prompt": request.negative} if request.negative else {}),
        }  # fmt: skip

    def take(self, source: poa.Source) -> Taken:
        """All pictures. Those of the base come last and without POA: what does not fit it is refused before any."""
        job = self._job
        rows = len(job.request.prompts) * len(job.request.seeds)
        self._progress.stage("drawing", rows * sum(map(self._passes, job.columns)), "passes")
        dense, *others = job.columns
        columns = []
        with poa.enabled(self._pipe, source, 1.0) as on:
            for column in others:
                on.schedule = self._schedule(column)
                columns.append(self._column(column))
        columns.insert(0, self._column(dense))
        pictures = tuple(picture for row in zip(*columns, strict=True) for picture in row)
        scheduler = type(self._pipe.scheduler).__name__.removesuffix("Scheduler")
        return Taken(pictures, self._steps, self._guidance, scheduler)

    def _schedule(self, column: Column) -> Schedule:
        request = self._job.request
        return Schedule(column.weight) if column.weight == 1 else Schedule(column.weight, request.start, request.stop)

    def _passes(self, column: Column) -> int:
        """Calls of the model for a picture: two a step where POA is at work."""
        request = self._job.request
        twice = 0 if column.weight in (0, 1) else round(self._steps * (request.stop - request.start))
        return self._steps + twice

    def _column(self, column: Column) -> list[Picture]:
        request = self._job.request
        return [self._picture(column, prompt, seed) for prompt in request.prompts for seed in request.seeds]

    def _picture(self, column: Column, prompt: str, seed: int) -> Picture:
        left = self._passes(column)
        each = -(-left // self._steps)

        def step(_pipe: Any, _number: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal left
            done = min(each, left)
            left -= done
            self._progress.advance(done)
            return tensors

        began = time.monotonic()
        # On the CPU, so that the noise is the same on every machine.
        noise = torch.Generator("cpu").manual_seed(seed)
        image = self._pipe(prompt, generator=noise, callback_on_step_end=step, **self._options).images[0]
        self._progress.advance(left)
        return Picture(column, prompt, seed, image.convert("RGB"), time.monotonic() - began)


def _open(opening: Opening, folder: str, precision: torch.dtype, name: str) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    made = getattr(diffusers, opening.pipeline.pipeline)
    options: dict[str, Any] = {"torch_dtype": precision, "local_files_only": True}
    # It looks at pictures, not at models, and would have to be fetched.
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    known = inspect.signature(made.__init__).parameters
    parts: dict[str, Any] = {part: value for part, value in unchecked.items() if part in known}
    try:
        if opening.kind == "file":
            return made.from_single_file(str(opening.path), config=folder, **options, **parts)
        if opening.kind == "network":
            inside = opening.pipeline.folder
            network = getattr(diffusers, opening.pipeline.network)
            parts[inside] = network.from_single_file(_weights(opening), config=folder, subfolder=inside, **options)
        else:
            options["variant"] = opening.variant
        return made.from_pretrained(folder, use_safetensors=True, **options, **parts)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SingleFileComponentError) as error:
        if _is_memory(error):
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = {
            "folder": "Save or download the folder again, with all of its parts as safetensors files.",
            "file": "Give the folder of this very model, as diffusers saves it, with --config.",
            "network": "The file is the UNet or transformer alone: the folder of --config has to hold all other parts.",
        }[opening.kind]
        raise PreviewError(f"{name}: diffusers cannot open it: {printable(said.strip())}", hint) from error


def _weights(opening: Opening) -> Any:
    """What `from_single_file` knows as a UNet or a transformer: the file, or its tensors under other names."""
    known = BUNDLED if opening.pipeline.folder == "unet" and opening.original else ""
    if opening.prefix == known or (opening.original and opening.prefix == BUNDLED):
        return str(opening.path)
    from safetensors.torch import load_file

    found, prefix = load_file(opening.path), opening.prefix
    return {known + name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what diffusers and transformers tell people who program with them, and without their bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        libraries = (of_diffusers, of_transformers)
        before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
        try:
            for library in libraries:
                library.set_verbosity(library.CRITICAL)
                library.disable_progress_bar()
            yield
        finally:
            for library, (verbosity, bars) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()


@contextlib.contextmanager
def _threads(job: "Job") -> Iterator[None]:
    """One for the demo model: its layers are so small that threads only wait for each other, on a busy machine long."""
    usual = torch.get_num_threads()
    try:
        if job.plan.match.family.id == "demo":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(usual)


@contextlib.contextmanager
def _enough_memory(place: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        other = "--dtype bf16" if place == "cpu" else "--offload, which keeps idle parts in main memory"
        raise PreviewError(f"device {place}: not enough memory", f"Give a smaller --res, or {other}.") from error


def _is_memory(error: BaseException) -> bool:
    words = str(error).lower()
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(phrase in words for phrase in known)
