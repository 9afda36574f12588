"""What is written for a scorer, and what comes of it: names, functions, sums, the demo's judge."""

import math
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crdiff_export.errors import OptionError, ScorerError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.scorers import Score, spec
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.evaluate.scorers.score import Checked, FunctionScorer
from crdiff_export.models.demo.drawing import draw
from crdiff_export.models.demo.scenes import EXAMPLE, Scene
from tests.support.messages import raises
from tests.support.scoring import values

GREY = Image.new("RGB", (8, 8), (128, 128, 128))

SCORERS = """
from crdiff_export.evaluate.scorers import Score

def width(images, prompts):
    return [image.width for image in images]

def letters(images, prompts):
    return [len(prompt) for prompt in prompts]

def wrong(images, prompts):
    return [float("nan")] * len(images)

def few(images, prompts):
    return [1.0]

def lone(images, prompts):
    return 1.0

number = 3

def alone(device):
    return 7

def nothing(device, dtype):
    return 7

class Made:
    opened = []
    def __init__(self, device, dtype):
        self.name, self.where, self.closed = "made", (device, dtype), 0
        Made.opened.append(self)
    def score(self, images, prompts):
        return [Score(2.5, {"half": 1.25}) for _ in images]
    def fingerprint(self):
        return {"name": "made", "device": self.where[0], "dtype": self.where[1]}
    def close(self):
        self.closed += 1

class bag:
    made = Made

def make(device, dtype):
    return Made(device, dtype)

def odd(device, dtype):
    made = Made(device, dtype)
    made.score = lambda images, prompts: [1.0]
    return made

def infinite(device, dtype):
    made = Made(device, dtype)
    made.score = lambda images, prompts: [Score(1.0, {"half": float("inf")}) for _ in images]
    return made
"""


@pytest.fixture
def module(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of scorers in the current folder."""
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (here / "mine.py").write_text(SCORERS)
    return here / "mine.py"


# What is written


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("demo", [(1.0, "demo")]),
        ("2*demo", [(2.0, "demo")]),
        ("0.5*clip-score+0.5*image-reward", [(0.5, "clip-score"), (0.5, "image-reward")]),
        (" demo + -0.5 * a.b:c ", [(1.0, "demo"), (-0.5, "a.b:c")]),
        ("1e-3*demo+aesthetic", [(1e-3, "demo"), (1.0, "aesthetic")]),
        ("command:score a*b+c:d", [(1.0, "command:score a*b+c:d")]),
        ("2*demo+.5*command:score --x=1*2+3", [(2.0, "demo"), (0.5, "command:score --x=1*2+3")]),
        ("2* demo + .5 * command:score a+b ", [(2.0, "demo"), (0.5, "command:score a+b")]),
    ],
)
def test_a_text_is_a_sum(text: str, members: list[tuple[float, str]]) -> None:
    assert spec.parse(text) == members


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("demo", "demo"),
        ("mine:width", "mine:width"),
        ("0.5*clip-score+0.5*mine:width", "0.5*clip-score+0.5*mine:width"),
        ("command:score", "command:score"),
        ("command:/home/somebody/bin/python3 /home/somebody/score.py --token hf_abc", "command:python3"),
        ("command:'/home/some body/my judge' --token=hf_abc", "command:my judge"),
        ("command:./score", "command:score"),
        (" command: score a ", "command:score"),
        ("command:env TOKEN=hf_abc python score.py", "command:env"),
        ("2*demo+0.5*command:/opt/score demo+2*demo", "2*demo+0.5*command:score"),
        ("2*demo + .5 * command:/opt/score a+b", "2*demo + .5 * command:score"),
    ],
)
def test_what_others_may_read(text: str, shown: str) -> None:
    assert spec.public(text) == shown


@pytest.mark.parametrize("text", ["", "demo+", "2*", "a*demo", "0*demo", "nan*demo", "inf*demo", "demo+2*demo"])
def test_a_text_that_is_no_sum(text: str) -> None:
    with raises(OptionError, repr(text)):
        spec.parse(text)


def test_an_unknown_name() -> None:
    with raises(OptionError, "'clipscore'") as error:
        scorers.load("clipscore")
    assert error.value.hint.startswith("Did you mean clip-score? ")


def test_names_and_entry_points(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scorers.names() == ("clip-score", "pick-score", "image-reward", "aesthetic", "demo")
    monkeypatch.syspath_prepend(module.parent)
    offered = [
        EntryPoint("theirs", "mine:make", spec.GROUP),
        EntryPoint("demo", "mine:make", spec.GROUP),
        EntryPoint("gone", "mine:gone", spec.GROUP),
    ]
    monkeypatch.setattr(spec, "entry_points", lambda group: [entry for entry in offered if entry.group == group])
    assert scorers.names() == ("clip-score", "pick-score", "image-reward", "aesthetic", "demo", "gone", "theirs")
    theirs = scorers.load("theirs", "cuda", "fp16")
    assert theirs.fingerprint() == {"name": "made", "device": "cuda", "dtype": "fp16"}
    assert scorers.load("demo").fingerprint()["name"] == "demo", "a built-in name is ours"
    with raises(ScorerError, "gone", "mine:gone"):
        scorers.load("gone")


def test_built_in_names_lead_somewhere() -> None:
    for name, value in spec.BUILT_IN.items():
        assert callable(EntryPoint(name, value, spec.GROUP).load())


def test_nothing_heavy_is_imported_to_begin_with() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'PIL', 'huggingface_hub', 'subprocess'}"
    code = f"import sys, crdiff_export.evaluate.scorers as s; s.names(); print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


# Functions


def test_a_function(module: Path) -> None:
    path = list(sys.path)
    scorer = scorers.load("mine:width")
    assert sys.path == path
    assert values(scorer, [GREY, GREY.resize((3, 5))], ["a", "b"]) == [8, 3]
    record = scorer.fingerprint()
    assert record["name"] == scorer.name == "mine:width"
    assert len(record["module"].removeprefix("sha256:")) == 64
    scorer.close()


def test_the_fingerprint_follows_the_module(module: Path) -> None:
    before = scorers.load("mine:width").fingerprint()
    module.write_text(SCORERS + "\n# changed\n")
    assert scorers.load("mine:width").fingerprint() != before


@pytest.mark.parametrize("text", ["mine:make", "mine:bag.made", "mine:Made"])
def test_a_factory(module: Path, text: str) -> None:
    scorer = scorers.load(text, "cuda:1", "bf16")
    assert scorer.score([GREY], ["a"]) == [Score(2.5, {"half": 1.25})]
    assert scorer.fingerprint() == {"name": "made", "device": "cuda:1", "dtype": "bf16"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a-b:c", "'a-b:c'"),
        ("mine:", "'mine:'"),
        ("nowhere:f", "nowhere:f: there is no module 'nowhere'"),
        ("broken:f", "broken:f: cannot be imported"),
        ("failing:f", "failing:f: cannot be imported: ValueError: boom"),
        ("mine:gone", "'gone'"),
        ("mine:alone", "(images, prompts) nor (device, dtype)"),
        ("math:hypot", "(images, prompts) nor (device, dtype)"),
        ("mine:number", "mine:number"),
        ("mine:nothing", "int has no name, score, fingerprint, close"),
    ],
)
def test_a_text_that_names_no_scorer(module: Path, text: str, key: str) -> None:
    (module.parent / "broken.py").write_text("import missing_thing\n")
    (module.parent / "failing.py").write_text("raise ValueError('boom')\n")
    is_typed = key in ("'a-b:c'", "'mine:'")
    with raises(OptionError if is_typed else ScorerError, key):
        scorers.load(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("mine:wrong", "picture 1 is nan"),
        ("mine:few", "1 scores for 2 pictures"),
        ("mine:lone", "float"),
        ("mine:odd", "list of scores"),
        ("mine:infinite", "half of picture 1 is inf"),
    ],
)
def test_a_wrong_answer(module: Path, text: str, key: str) -> None:
    with raises(ScorerError, key):
        scorers.load(text).score([GREY] * 2, ["a"] * 2)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, iter])
def test_an_answer_may_be_an_array(kind: Callable[[list[float]], Any]) -> None:
    scorer = Checked(FunctionScorer({"name": "f"}, lambda images, prompts: kind([0.5] * len(images)), batch=2))
    assert [score.value for score in scorer.score([GREY] * 5, ["a"] * 5)] == [0.5] * 5


@pytest.mark.parametrize("answer", [{0: 1.0}, "1", b"1", 1.0, None])
def test_what_is_no_list_of_numbers(answer: Any) -> None:
    with pytest.raises(ScorerError, match="no list of numbers"):
        Checked(FunctionScorer({"name": "f"}, lambda images, prompts: answer)).score([GREY], ["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", None, 10**400, 1j, np.ones(1), [0.5]])
def test_what_is_no_number(value: Any) -> None:
    scorer = FunctionScorer({"name": "f"}, lambda images, prompts: [value])
    with pytest.raises(ScorerError, match="the score of picture 1 is"):
        Checked(scorer).score([GREY], ["a"])


# Sums


def test_a_sum(module: Path) -> None:
    scorer = scorers.load("2*mine:width+mine:letters+-0.5*mine:make")
    first, second = scorer.score([GREY, GREY.resize((3, 5))], ["ab", "abcd"])
    assert first.value == pytest.approx(2 * 8 + 2 - 1.25)
    assert second.value == pytest.approx(2 * 3 + 4 - 1.25)
    assert first.parts == {"mine:width": 8, "mine:letters": 2, "made": 2.5, "made.half": 1.25}
    record = scorer.fingerprint()
    assert record["name"] == scorer.name == "2*mine:width+mine:letters+-0.5*mine:make"
    assert [record[f"{n}.weight"] for n in (1, 2, 3)] == ["2.0", "1.0", "-0.5"]
    assert record["3.device"] == "cpu"


def test_a_sum_closes_its_members(module: Path) -> None:
    scorer = scorers.load("2*mine:make")
    scorer.close()
    assert sys.modules["mine"].Made.opened[-1].closed == 1
    with pytest.raises(OptionError):
        scorers.load("2*mine:make+nobody")
    assert sys.modules["mine"].Made.opened[-1].closed == 1, "where a later one cannot be opened, too"


# The demo's judge


def test_the_judge() -> None:
    """It sees RGB, and knows its own language only."""
    scene = Scene.parse(EXAMPLE)
    images = [Image.fromarray(draw(scene, 96, 64, seed)) for seed in range(3)] + [Image.new("RGB", (64, 64))]
    prompts = [scene.prompt] * 3 + ["a large red circle on white"]
    scorer = scorers.load("demo", "cuda", "fp16")
    scores = scorer.score([image.convert("RGBA") for image in images], prompts)
    assert scores == [judge(np.asarray(i), Scene.parse(p)) for i, p in zip(images, prompts, strict=True)]
    assert [score.parts["right"] for score in scores] == [1.0, 1.0, 1.0, 0.0]
    assert set(scores[0].parts) == {"right", "background", "count", "colours", "shapes", "relation", "purity"}
    assert "size" in scores[3].parts
    record = scorer.fingerprint()
    assert set(record) == {"name", "judge", "crdiff", "numpy"}
    assert record == scorers.load("demo").fingerprint()
    with raises(ScorerError, "demo", '"a cat"'):
        scorer.score([GREY, GREY], [EXAMPLE, "a cat"])
    scorer.close()
