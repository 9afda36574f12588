"""Drawing with each kind of pipeline: the table of a family says what the pipeline is called with."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crdiff_export.errors import PreviewError
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.hub.bases import Base
from crdiff_export.models.families import by_id, detect
from crdiff_export.models.families.model import Pipeline
from crdiff_export.prune.architecture import Architecture
from crdiff_export.sampling import pipelines
from crdiff_export.sampling.session import STEPS, Placement, Session, open_session, usual_batch
from crdiff_export.sizes import Size
from tests.support.calibrating import give_words, speaking, without_words
from tests.support.messages import raises
from tests.support.tiny_pipelines import KINDS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
]

SIZE = Size(64, 48)
PROMPT = "two red circles on grey"
# Fewer tokens of padding take less time.
SHORT = {"max_sequence_length": 32}
# The options of a picture, and what a plain call of the pipeline takes for them.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd3": ({}, {"guidance_scale": 7.0}),
    "chroma": ({"guidance": 2.0, "negative": "blue"}, {"guidance_scale": 2.0, "negative_prompt": "blue"}),
    "qwen": ({}, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
    "flux2": ({}, {"guidance_scale": 4.0}),
}  # fmt: skip


def drawn_plainly(pipe: Any, arguments: dict[str, Any]) -> bytes:
    noise = torch.Generator().manual_seed(3)
    drawn = pipe(prompt=PROMPT, generator=noise, num_inference_steps=1, width=64, height=48, **arguments)
    pixels: bytes = drawn.images[0].tobytes()
    return pixels


@pytest.mark.parametrize("kind", CALLS)
def test_a_picture_is_that_of_a_plain_call(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a file of the network alone, and all other parts in a folder but for the text encoders."""
    pipe = speaking(kind)
    pipe.set_progress_bar_config(disable=True)
    weights = KINDS[kind].save(pipe, tmp_path / "alone")
    without_words(pipe, monkeypatch).save_pretrained(tmp_path / "parts")
    for stored in (tmp_path / "parts" / "transformer").glob("*.safetensors"):
        stored.unlink()
    checkpoint = open_checkpoint(weights)
    opening = pipelines.choose(
        Base(weights, "alone"), checkpoint, detect(checkpoint.shapes), Architecture("", Size(64, 64)),
        config=str(tmp_path / "parts"), variant=None,
    )  # fmt: skip
    options, arguments = CALLS[kind]
    opening = replace(opening, pipeline=replace(opening.pipeline, arguments=SHORT))
    steps: list[int] = []
    with open_session(opening, Placement("cpu", "fp32"), "alone") as session:
        give_words(session.pipe, kind)
        (image,) = session.draw([PROMPT], [3], session.style(SIZE, 1, **options), lambda: steps.append(1))
    assert image.size == (64, 48)
    assert steps == [1]
    give_words(pipe, kind)
    assert image.tobytes() == drawn_plainly(pipe, {**arguments, **SHORT})


@pytest.mark.parametrize("part", ["pipeline", "network"])
def test_a_class_that_diffusers_does_not_have_is_named(part: str, tmp_path: Path) -> None:
    """Of a table for another version of diffusers, or with a slip."""
    pipe = speaking("flux")
    weights = KINDS["flux"].save(pipe, tmp_path / "alone")
    pipe.save_pretrained(tmp_path / "parts")
    checkpoint = open_checkpoint(weights)
    opening = pipelines.choose(
        Base(weights, "alone"), checkpoint, detect(checkpoint.shapes), Architecture("", Size(64, 64)),
        config=str(tmp_path / "parts"), variant=None,
    )  # fmt: skip
    unknown: dict[str, Any] = {part: "TomorrowsPipeline"}
    wrong = replace(opening, pipeline=replace(opening.pipeline, **unknown))
    with (
        raises(PreviewError, "alone", "TomorrowsPipeline"),
        open_session(wrong, Placement("cpu", "fp32"), "alone"),
    ):
        pass


class Fake:
    """A pipeline that only notes its arguments."""

    def __init__(self) -> None:
        self.called: dict[str, Any] = {}

    def __call__(self, prompt: list[str], guidance_scale: float | None = None, **arguments: Any) -> Any:
        self.called = {"guidance_scale": guidance_scale, **arguments}
        return SimpleNamespace(images=[])


def test_steps_and_guidance_are_the_tables_then_ours_and_those_of_diffusers() -> None:
    usage = by_id("flux-schnell").pipelines[""]
    style = Session(Fake(), usage).style(SIZE)
    assert (style.steps, style.guidance) == (4, 0.0)
    assert Session(Fake(), usage).style(SIZE, 9, 2.0).steps == 9
    assert Session(Fake(), replace(usage, steps=None)).style(SIZE).steps == STEPS
    with raises(PreviewError, "guidance_scale"):
        Session(Fake(), replace(usage, guidance=None)).style(SIZE)
    with raises(PreviewError, "scale"):
        Session(Fake(), replace(usage, guidance=None, guidance_argument="scale")).style(SIZE)


def test_further_arguments_are_the_tables() -> None:
    usage = Pipeline("X", "a/b", guidance=1.0, arguments={"use_resolution_binning": False})
    session = Session(Fake(), usage)
    session.draw([PROMPT], [3], session.style(SIZE))
    assert session.pipe.called["use_resolution_binning"] is False
    assert session.pipe.called["guidance_scale"] == 1.0
    assert "negative_prompt" not in session.pipe.called


def test_steps_are_counted_with_an_older_callback() -> None:
    class Older(Fake):
        def __call__(self, prompt: list[str], callback: Any, **arguments: Any) -> Any:  # type: ignore[override]
            callback(0, 1.0, None)
            return super().__call__(prompt, **arguments)

    steps: list[int] = []
    session = Session(Older(), by_id("chroma").pipelines[""])
    session.draw([PROMPT], [3], session.style(SIZE, 1, 2.0), lambda: steps.append(1))
    assert steps == [1]


def test_a_negative_prompt_is_the_users_or_the_tables() -> None:
    session = Session(Fake(), by_id("qwen-image").pipelines[""])
    for given, taken in ((None, " "), ("blurry", "blurry"), ("", "")):
        session.draw([PROMPT, PROMPT], [3, 4], session.style(SIZE, 1, 2.0, given))
        assert session.pipe.called["negative_prompt"] == [taken, taken]
        assert (session.pipe.called["true_cfg_scale"], session.pipe.called["guidance_scale"]) == (2.0, None)


def test_a_batch_is_the_tables_or_follows_the_device() -> None:
    usage = by_id("demo").pipelines[""]
    assert [usual_batch(usage, device) for device in ("cpu", "cuda")] == [16, 16]
    assert [usual_batch(replace(usage, batch=None), device) for device in ("cpu", "cuda")] == [1, 4]
