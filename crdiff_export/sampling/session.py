"""An open diffusers pipeline on a device, and the pictures that it draws."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crdiff_export.errors import OptionError, PlanError, PreviewError, foreign_errors, is_out_of_memory
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.models.families.model import BUNDLED, Pipeline
from crdiff_export.models.prediction import V_SCHEDULER
from crdiff_export.sampling.pipelines import Opening
from crdiff_export.sampling.poa.handle import model_of
from crdiff_export.sampling.quiet import quiet_libraries
from crdiff_export.sampling.scheduler import scheduler_change
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Our choice: enough to judge a picture by, and half of diffusers' default.
STEPS = 25


@dataclass(frozen=True, slots=True)
class Placement:
    """The device and the dtype of a pipeline.

    Attributes:
        device: torch's name of the device.
        dtype: A key of `DTYPES`.
        offload: Whether idle parts wait in main memory.
        threads: How many threads torch uses; None leaves it as it is.
        advice: What helps if memory is short, beside a smaller size; for the hint of an error.
    """

    device: str
    dtype: str
    offload: bool = False
    threads: int | None = None
    advice: str = "--offload, which keeps idle parts in main memory"


@dataclass(frozen=True, slots=True)
class Style:
    """Size, steps, guidance and negative prompt of pictures."""

    size: Size
    steps: int
    guidance: float
    negative: str | None = None

    def at(self, size: Size) -> "Style":
        """Return the same for another size."""
        return replace(self, size=size)


class Session:
    """An open pipeline; `pipe` is diffusers', `usage` says how its family is drawn with."""

    def __init__(self, pipe: Any, usage: Pipeline) -> None:
        self.pipe = pipe
        self.usage = usage

    def style(
        self, size: Size, steps: int | None = None, guidance: float | None = None, negative: str | None = None
    ) -> Style:
        """Complete the options of a request with the family's usual steps and guidance.

        Args:
            size: The size of the pictures.
            steps: Steps of sampling, if given.
            guidance: The guidance scale, if given.
            negative: The negative prompt, if any.

        Returns:
            The style.

        Raises:
            PreviewError: No guidance is given, and neither the family's table nor diffusers has a usual one.

        """
        if guidance is None:
            guidance = self._usual_guidance() if self.usage.guidance is None else self.usage.guidance
        return Style(size, steps or self.usage.steps or STEPS, float(guidance), negative)

    def _usual_guidance(self) -> float:
        parameter = inspect.signature(self.pipe.__call__).parameters.get(self.usage.guidance_argument)
        if parameter is None or not isinstance(parameter.default, int | float):
            raise PreviewError(
                f"{type(self.pipe).__name__} has no usual {self.usage.guidance_argument}",
                "Give --guidance, or write guidance and guidance_argument in [pipeline] of the family's table.",
            )
        return float(parameter.default)

    @property
    def scheduler(self) -> str:
        """The name of the scheduler, without the word itself."""
        return type(self.pipe.scheduler).__name__.removesuffix("Scheduler")

    def has_room(self) -> bool:
        """Whether memory has room for pruned weights beside the dense ones; on a GPU as much again has to stay free."""
        model: Any = model_of(self.pipe)
        if model.device.type == "cpu":
            return True
        if model.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(model.device)
        return bool(2 * sum(weight.nbytes for weight in model.parameters()) < free)

    def image_to_image(self, what: str) -> Any:
        """Return a pipeline that draws on from a picture, with the parts of the open one.

        Args:
            what: What needs it, for an error.

        Returns:
            diffusers' pipeline.

        Raises:
            PreviewError: diffusers has none for this pipeline.

        """
        from diffusers import AutoPipelineForImage2Image

        name = type(self.pipe).__name__
        with foreign_errors(PreviewError, f"{what}: {name} has no image-to-image", "Leave it out."):
            made: Any = AutoPipelineForImage2Image.from_pipe(self.pipe)
        made.set_progress_bar_config(disable=True)
        return made

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        style: Style,
        on_step: Callable[[], None] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> "list[Image]":
        """Draw one picture of each prompt, all at once.

        Args:
            prompts: The prompts.
            seeds: A seed for the noise of each picture.
            style: Size, steps, guidance and negative prompt.
            on_step: Called after every step of sampling.
            more: Further arguments of the pipeline's call.

        Returns:
            The pictures in RGB.

        """
        call = self.call(prompts, seeds, style, on_step) | dict(more or {})
        hint = "Check that this base draws in diffusers at this size."
        with foreign_errors(PreviewError, f"{type(self.pipe).__name__} cannot draw", hint):
            drawn = self.pipe(**call)
        return [image.convert("RGB") for image in drawn.images]

    def call(
        self, prompts: Sequence[str], seeds: Sequence[int], style: Style, on_step: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """Make the arguments of the pipeline's call.

        Args:
            prompts: The prompts.
            seeds: A seed for the noise of each picture.
            style: Size, steps, guidance and negative prompt.
            on_step: Called after every step of sampling.

        Returns:
            The arguments by name; they are not all used up by a call, but its generators are.

        """

        def step(*arguments: Any) -> Any:
            if on_step:
                on_step()
            return arguments[-1]  # what the pipeline goes on with

        # Made on the CPU, so that the noise is the same on every machine.
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        usage = self.usage
        negative = usage.negative_prompt if style.negative is None else style.negative
        # PixArt's pipelines have the older one.
        is_new = "callback_on_step_end" in inspect.signature(self.pipe.__call__).parameters
        options: dict[str, Any] = {
            "prompt": list(prompts), "generator": noise, "width": style.size.width, "height": style.size.height,
            "num_inference_steps": style.steps, usage.guidance_argument: style.guidance,
            "callback_on_step_end" if is_new else "callback": step, **usage.arguments,
        }  # fmt: skip
        if negative is not None:
            options["negative_prompt"] = [negative] * len(prompts)
        return options


def usual_batch(pipeline: Pipeline, device: str) -> int:
    """Return how many pictures to draw at once by default.

    Args:
        pipeline: The family's pipeline.
        device: torch's name of the device.

    Returns:
        The number of pictures.

    """
    return pipeline.batch or (1 if device == "cpu" else 4)


@contextlib.contextmanager
def open_session(opening: Opening, placement: Placement, name: str) -> Iterator[Session]:
    """Open a base as a pipeline, and silence diffusers while it is open.

    Args:
        opening: How diffusers opens the base.
        placement: Device and dtype.
        name: The base's name for errors.

    Yields:
        The open pipeline.

    Raises:
        PreviewError: diffusers cannot open the base, or memory does not suffice for it or for the work in the `with`
            block.

    """
    folder = str(opening.config_folder())
    with quiet_libraries("diffusers", "transformers"), _threads(placement.threads), _enough_memory(placement):
        pipe = _open(opening, folder, DTYPES[placement.dtype], name)
        pipe.set_progress_bar_config(disable=True)
        if placement.offload:
            pipe.enable_model_cpu_offload(device=placement.device)
            pipe.vae.enable_tiling()
        else:
            pipe.to(placement.device)
        yield Session(pipe, opening.pipeline)


def choose_device(device: str, *, offload: bool) -> str:
    """Choose the device to draw on, and try it.

    Args:
        device: torch's name of a device, or `auto`.
        offload: Whether idle parts are to wait in main memory.

    Returns:
        torch's name of the device.

    Raises:
        PlanError: This machine has no such device.
        OptionError: `offload` on a CPU.

    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise PlanError(
            f"device {device}: {str(error).splitlines()[0]}", "Leave --device out to take what is there."
        ) from error
    if offload and device == "cpu":
        raise OptionError("--offload keeps parts off an accelerator, and there is none at work", "Leave it out.")
    return device


def choose_dtype(dtype: str | None, pipeline: Pipeline, device: str) -> str:
    """Choose the dtype to compute in: on an accelerator the family's, on a CPU the fastest.

    Args:
        dtype: The user's choice, if any.
        pipeline: The family's pipeline.
        device: torch's name of the device.

    Returns:
        A key of `DTYPES`.

    """
    return dtype or ("fp32" if device == "cpu" else "bf16" if pipeline.dtype == "bfloat16" else "fp16")


def _class(class_name: str, base: str) -> Any:
    import diffusers

    diffusers_class = getattr(diffusers, class_name, None)
    if diffusers_class is None:
        raise PreviewError(
            f"{base}: diffusers {diffusers.__version__} has no {class_name}",
            "Update diffusers, or correct [pipeline] of the family's table.",
        )
    return diffusers_class


def _open(opening: Opening, folder: str, precision: torch.dtype, name: str) -> Any:
    pipeline = _class(opening.pipeline.pipeline, name)
    options: dict[str, Any] = {"torch_dtype": precision, "local_files_only": True}
    # The safety checker would have to be downloaded.
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    accepted = inspect.signature(pipeline.__init__).parameters
    parts: dict[str, Any] = {part: value for part, value in unchecked.items() if part in accepted}
    hint = {
        "folder": "Save or download the folder again, with all of its parts as safetensors files.",
        "file": "Give the folder of this very model, as diffusers saves it, with --config.",
        "network": "The file is the UNet or transformer alone: the folder of --config has to hold all other parts.",
    }[opening.kind]
    change = _scheduler_change(opening, folder, name)
    with foreign_errors(PreviewError, f"{name}: diffusers cannot open it", hint):
        if opening.kind == "file":
            pipe = pipeline.from_single_file(str(opening.path), config=folder, **options, **parts)
        else:
            if opening.kind == "network":
                part = opening.pipeline.folder
                network = _class(opening.pipeline.network, name)
                parts[part] = network.from_single_file(_weights(opening), config=folder, subfolder=part, **options)
            else:
                options["variant"] = opening.variant
            pipe = pipeline.from_pretrained(folder, use_safetensors=True, **options, **parts)
        if change:
            pipe.scheduler = _scheduler(pipe.scheduler, *change)
        return pipe


def _scheduler_change(opening: Opening, folder: str, name: str) -> tuple[str, dict[str, Any]] | None:
    """Compare the configured scheduler with what the base predicts, before anything is loaded."""
    if opening.prediction is None:
        return None
    try:
        config = parse_object((Path(folder) / "scheduler" / "scheduler_config.json").read_bytes(), fractions=True)
    except (OSError, MalformedError):
        return None  # diffusers says what is wrong with it
    return scheduler_change(opening.prediction, config, name)


def _scheduler(configured: Any, name: str, settings: dict[str, Any]) -> Any:
    """Make the scheduler of this class with changed settings; diffusers' usual one if it does not know them."""
    import diffusers

    chosen = getattr(diffusers, name)
    if not settings.keys() <= inspect.signature(chosen.__init__).parameters.keys():
        chosen = getattr(diffusers, V_SCHEDULER)
    return chosen.from_config(configured.config, **settings)


def _weights(opening: Opening) -> Any:
    """Return the network in a form that `from_single_file` recognises: the file, or its tensors renamed."""
    expected = BUNDLED if opening.pipeline.folder == "unet" and opening.original else ""
    if opening.prefix == expected or (opening.original and opening.prefix == BUNDLED):
        return str(opening.path)
    from safetensors.torch import load_file

    tensors, prefix = load_file(opening.path), opening.prefix
    return {expected + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    usual = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(usual)


@contextlib.contextmanager
def _enough_memory(placement: Placement) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = f"Give a smaller --res, or {'--dtype bf16' if placement.device == 'cpu' else placement.advice}."
        raise PreviewError(f"device {placement.device}: not enough memory", hint) from error
