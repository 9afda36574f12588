"""What else helps at a size, drawn beside the models: tricks that cost nothing, a LoRA, a function of the user's own.

A rival draws with the dense model of the open pipeline, so that its pictures come from the same prompts and noise.
"""

import inspect
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from crdiff_export.errors import OptionError, PreviewError, foreign_errors
from crdiff_export.evaluate.scorers.function import import_function
from crdiff_export.formats.text import printable
from crdiff_export.models.families.pipelines import better_rivals
from crdiff_export.sampling import pipelines
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.models.families.model import Pipeline
    from crdiff_export.sampling.session import Session, Style

Kind = Literal["native-size", "two-pass", "lora", "function"]
NAMES: Final = "native-size, two-pass, lora:FILE or module:function"
# Ours: half of the noise lets the second pass draw details anew and keeps what is where.
STRENGTH: Final = 0.5
RIVAL_NOTES: Final[Mapping[Kind, str]] = {
    "native-size": "crdiff's small SDXL drew 160x160 better when told its native size, which is free; no help of "
    "pruning was shown: --beside native-size draws that, too",
    "two-pass": "on crdiff's small demo models drawing at the native size and resizing scored far higher than pruning: "
    "--beside two-pass draws that, too",
}
_ADAPTER: Final = "crdiff_beside"
_RETURNED: Final = "Return as many PIL images as there are prompts."
# Draws as `Session.draw` does.
Draw = Callable[[Sequence[str], Sequence[int], "Style", Callable[[], None]], "list[Image]"]


@dataclass(frozen=True, slots=True)
class Rival:
    """Something to draw beside the models, as `--beside` names it. `value` is its file or function, if it has one."""

    kind: Kind
    value: str = ""
    is_one_of_many: bool = False

    @property
    def name(self) -> str:
        """What its column is called; of a file the name alone, unless another file has the same."""
        file = self.value if self.is_one_of_many else Path(self.value).name
        return {"lora": f"lora:{file}", "function": self.value}.get(self.kind, self.kind)


@dataclass(frozen=True, slots=True)
class RivalSizes:
    """What a rival has to know: the sizes that the base is good at and that is drawn, and the grid of sizes."""

    native: Size
    size: Size
    grid: int

    @property
    def first_size(self) -> Size:
        """The size of the first pass: as many pixels as the native size, in the shape of the target size."""
        scale = math.sqrt(self.native.pixels / self.size.pixels)
        width, height = (
            max(1, round(side * scale / self.grid)) * self.grid for side in (self.size.width, self.size.height)
        )
        return self.size if self.is_native else Size(width, height)

    @property
    def is_native(self) -> bool:
        """Whether the target size has as many pixels as the native size."""
        return self.native.pixels == self.size.pixels

    @property
    def is_larger(self) -> bool:
        """Whether the target size has more pixels than the native size."""
        return self.native.pixels < self.size.pixels


def parse(texts: Sequence[str]) -> tuple[Rival, ...]:
    """Read what `--beside` names.

    Args:
        texts: The names.

    Returns:
        The rivals, each once.

    Raises:
        OptionError: A name is none of those.
        PreviewError: A file or a function does not exist.
    """
    rivals = dict.fromkeys(map(_parse, texts))
    names = Counter(rival.name for rival in rivals)
    ordered = sorted(rivals, key=lambda rival: rival.kind == "function")  # which may change the pipeline
    return tuple(replace(rival, is_one_of_many=names[rival.name] > 1) for rival in ordered)


def _parse(text: str) -> Rival:
    kind, _, value = text.partition(":")
    if text in ("native-size", "two-pass"):
        return Rival("native-size" if text == "native-size" else "two-pass")
    if kind == "lora" and value:
        path = Path(value).expanduser()
        if not path.is_file():
            raise PreviewError(f"{value}: no such file", "Give --beside lora:FILE, a LoRA in safetensors.")
        if path.suffix != ".safetensors":
            raise PreviewError(f"{value}: not a safetensors file", "Give --beside lora:FILE, a LoRA in safetensors.")
        return Rival("lora", os.path.normpath(path))
    if value and kind != "lora":
        import_function(text, PreviewError, "Name a function (pipe, **call) of a module here, as in mine:draw.")
        return Rival("function", text)
    raise OptionError(f"--beside {printable(text)!r} is not known", f"Give {NAMES}.")


def check(rivals: Sequence[Rival], pipeline: str) -> None:
    """Refuse rivals that a pipeline cannot draw; for `native-size` this imports diffusers.

    Args:
        rivals: The rivals.
        pipeline: The class of the base's pipeline.

    Raises:
        OptionError: A rival needs another kind of model.
    """
    if not any(rival.kind == "native-size" for rival in rivals):
        return
    if not pipelines.call_arguments(pipeline) >= pipelines.TOLD_SIZES:
        raise OptionError(
            f"--beside native-size: {pipeline} is not told a size", "It is for SDXL; leave it out, or try two-pass."
        )


def rival_notes(rivals: Sequence[Rival], sizes: Iterable[Size], native: Size, pipeline: "Pipeline") -> Iterator[str]:
    """Yield a note for each rival that did better on the demo models at sizes like these, unless it is drawn.

    Args:
        rivals: What is drawn.
        sizes: The sizes that are drawn.
        native: The size that the base was trained for.
        pipeline: How the base is opened.
    """
    drawn: set[str] = {rival.kind for rival in rivals}
    if pipelines.told_size(pipeline) == native:
        drawn.add("native-size")
    better = {name for size in sizes for name in better_rivals(pipeline.pipeline, size, native)}
    yield from (note for kind, note in RIVAL_NOTES.items() if kind in better - drawn)


def facts(rivals: Sequence[Rival], setting: RivalSizes) -> Iterator[tuple[str, str]]:
    """Yield what everyone who sees the pictures should know of the rivals, as name and text."""
    first = setting.first_size
    texts = {
        "native-size": f"the dense model, told that it draws at {setting.native}",
        "two-pass": f"drawn at {first} by the dense model, resized"
        + (f", refined by image-to-image of strength {STRENGTH}" if setting.is_larger else ""),
        "lora": "the dense model with this LoRA",
        "function": "this function's pictures",
    }
    for rival in rivals:
        yield rival.name, texts[rival.kind]


def passes(rival: Rival, setting: RivalSizes, steps: int) -> int:
    """Return about how often the network runs for one picture."""
    return steps + (int(_refining_steps(steps) * STRENGTH) if rival.kind == "two-pass" and setting.is_larger else 0)


def _refining_steps(steps: int) -> int:
    """Return the steps to request of image-to-image, which takes a share STRENGTH of them: one step at least."""
    return max(steps, math.ceil(1 / STRENGTH))


def check_opening(rivals: Iterable[tuple[Rival, RivalSizes]], session: "Session") -> None:
    """Prepare the pipeline for each rival once, so that what cannot be drawn is refused before anything is drawn.

    Args:
        rivals: The rivals, each with its sizes.
        session: The open pipeline.

    Raises:
        PreviewError: A rival cannot be drawn with this pipeline.
    """
    for rival, setting in rivals:
        with opened(rival, session, setting):
            pass


@contextmanager
def opened(rival: Rival, session: "Session", setting: RivalSizes) -> Iterator[Draw]:
    """Prepare an open pipeline for a rival; it is as before after the block, unless a function has changed it.

    Args:
        rival: The rival.
        session: The open pipeline, in which nothing is pruned.
        setting: The sizes.

    Yields:
        A function that draws, as `Session.draw` does.

    Raises:
        PreviewError: The rival cannot be drawn with this pipeline.
    """
    if rival.kind == "native-size":
        told = dict.fromkeys(pipelines.TOLD_SIZES, (setting.native.height, setting.native.width))
        yield lambda prompts, seeds, style, on_step: session.draw(prompts, seeds, style, on_step, told)
    elif rival.kind == "two-pass":
        yield _two_pass(session, setting)
    elif rival.kind == "lora":
        with _lora(rival, session):
            yield session.draw
    else:
        yield _function(rival, session)


def _two_pass(session: "Session", setting: RivalSizes) -> Draw:
    from PIL import Image

    refining = session.image_to_image("--beside two-pass") if setting.is_larger else None
    shape = setting.size.width, setting.size.height

    def draw(
        prompts: Sequence[str], seeds: Sequence[int], style: "Style", on_step: Callable[[], None]
    ) -> "list[Image.Image]":
        images = session.draw(prompts, seeds, style.at(setting.first_size), on_step)
        images = [image.resize(shape, Image.Resampling.LANCZOS) for image in images]
        if not refining:
            return images
        call = session.call(prompts, seeds, style, on_step) | {"image": images, "strength": STRENGTH}
        call["num_inference_steps"] = _refining_steps(style.steps)
        with foreign_errors(PreviewError, "--beside two-pass", "Leave it out."):
            result = refining(**_taken(refining, call))
        return _images(result, "--beside two-pass")

    return draw


@contextmanager
def _lora(rival: Rival, session: "Session") -> Iterator[None]:
    from crdiff_export.sampling.quiet import quiet_libraries

    pipe, file = session.pipe, Path(rival.value)
    hint = "Check that it is a LoRA for this model, and that peft is installed: `python -m pip install peft`."
    with foreign_errors(PreviewError, f"{file}: diffusers does not load it", hint), quiet_libraries("diffusers"):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_ADAPTER, local_files_only=True)
    try:
        if not any(_ADAPTER in names for names in pipe.get_list_adapters().values()):
            raise PreviewError(f"{file}: has no layer of this model", "Give a LoRA that was trained for it.")
        yield
    finally:
        pipe.unload_lora_weights()


def _function(rival: Rival, session: "Session") -> Draw:
    function = import_function(rival.value, PreviewError, "Check the name.")

    def draw(
        prompts: Sequence[str], seeds: Sequence[int], style: "Style", on_step: Callable[[], None]
    ) -> "list[Image]":
        call = session.call(prompts, seeds, style, on_step)
        with foreign_errors(PreviewError, rival.name, _RETURNED):
            result = function(session.pipe, **call)
        images = _images(result, rival.name)
        wrong = [image.size for image in images if image.size != (style.size.width, style.size.height)]
        if wrong or len(images) != len(prompts):
            what = f"a picture of {wrong[0][0]}x{wrong[0][1]}" if wrong else f"{len(images)} pictures"
            raise PreviewError(
                f"{rival.name}: gave {what} for {len(prompts)} of {style.size}",
                "Return one PIL image of that size for each prompt.",
            )
        return images

    return draw


def _images(result: Any, name: str) -> "list[Image]":
    """Take the pictures of a pipeline's output, or of a list."""
    from PIL import Image

    given = getattr(result, "images", result)
    images = list(given) if isinstance(given, list | tuple | Iterator) else [given]
    for image in images:
        if not isinstance(image, Image.Image):
            raise PreviewError(f"{name}: returned {type(image).__name__}, not a PIL image", _RETURNED)
    return [image.convert("RGB") for image in images]


def _taken(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Keep the arguments that a pipeline's call takes."""
    parameters = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in call.items() if name in parameters}
