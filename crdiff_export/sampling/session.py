"""A pipeline at work: opened once, on a device, and every picture drawn with it, without the libraries' talk."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from crdiff_export.errors import OptionError, PlanError, PreviewError
from crdiff_export.formats.text import printable
from crdiff_export.models import demo
from crdiff_export.models.families.pipelines import BUNDLED, Pipeline
from crdiff_export.sampling.pipelines import Opening
from crdiff_export.sampling.poa.sampling import model_of
from crdiff_export.sampling.quiet import quiet_libraries
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Ours: enough to judge a picture by, and half of what diffusers takes.
STEPS = 25
# src: the model card of FLUX.1-schnell
FEW_STEPS, NO_GUIDANCE = 4, 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pipeline works, and in which dtype; `offload` keeps idle parts in main memory, `threads` are torch's.

    `advice` is what helps where memory is short, beside a smaller size.
    """

    device: str
    dtype: str
    offload: bool = False
    threads: int | None = None
    advice: str = "--offload, which keeps idle parts in main memory"


@dataclass(frozen=True, slots=True)
class Style:
    """How pictures are drawn."""

    size: Size
    steps: int
    guidance: float
    negative: str | None = None


class Session:
    """An open pipeline; `pipe` is diffusers'."""

    def __init__(self, pipe: Any, family: str) -> None:
        self.pipe = pipe
        self._family = family

    def style(
        self, size: Size, steps: int | None = None, guidance: float | None = None, negative: str | None = None
    ) -> Style:
        """What was asked for, with the family's usual steps and guidance where nothing was."""
        few = self._family == "flux-schnell"
        usual = inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default
        usual = NO_GUIDANCE if few else demo.GUIDANCE if self._family == "demo" else usual
        return Style(size, steps or usual_steps(self._family), float(usual if guidance is None else guidance), negative)

    @property
    def scheduler(self) -> str:
        """The name of what decides the steps."""
        return type(self.pipe.scheduler).__name__.removesuffix("Scheduler")

    def has_room(self) -> bool:
        """Whether pruned weights may be held beside the dense ones: on an accelerator, if as much again stays free."""
        model: Any = model_of(self.pipe)
        if model.device.type == "cpu":
            return True
        if model.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(model.device)
        return bool(2 * sum(weight.nbytes for weight in model.parameters()) < free)

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], style: Style, on_step: Callable[[], None] | None = None
    ) -> "list[Image]":
        """A picture of each prompt, in RGB, all drawn at once, each from the noise of its own seed."""

        def step(_pipe: Any, _number: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step:
                on_step()
            return tensors

        # On the CPU, so that the noise is the same on every machine.
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        negative = {"negative_prompt": [style.negative] * len(prompts)} if style.negative else {}
        drawn = self.pipe(
            list(prompts), generator=noise, callback_on_step_end=step, width=style.size.width,
            height=style.size.height, num_inference_steps=style.steps, guidance_scale=style.guidance, **negative,
        )  # fmt: skip
        return [image.convert("RGB") for image in drawn.images]


def usual_steps(family: str) -> int:
    """Steps of sampling unless someone asks for others."""
    return FEW_STEPS if family == "flux-schnell" else demo.STEPS if family == "demo" else STEPS


def usual_batch(family: str, device: str) -> int:
    """Pictures to draw at once where many are to be drawn."""
    return 16 if family == "demo" else 1 if device == "cpu" else 4


@contextlib.contextmanager
def session(opening: Opening, family: str, place: Place, name: str) -> Iterator[Session]:
    """Open a base; PreviewError where diffusers cannot, or where the memory is too small for it or for what follows."""
    folder = str(opening.here())
    with quiet_libraries("diffusers", "transformers"), _threads(place.threads), _enough_memory(place):
        pipe = _open(opening, folder, DTYPES[place.dtype], name)
        pipe.set_progress_bar_config(disable=True)
        if place.offload:
            pipe.enable_model_cpu_offload(device=place.device)
            pipe.vae.enable_tiling()
        else:
            pipe.to(place.device)
        yield Session(pipe, family)


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
def _threads(count: int | None) -> Iterator[None]:
    usual = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(usual)


@contextlib.contextmanager
def _enough_memory(place: Place) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        other = "--dtype bf16" if place.device == "cpu" else place.advice
        raise PreviewError(f"device {place.device}: not enough memory", f"Give a smaller --res, or {other}.") from error


def _is_memory(error: BaseException) -> bool:
    words = str(error).lower()
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(phrase in words for phrase in known)
