"""What the tests of evaluations share: one evaluation that really draws, noise for pictures, and command lines."""

import shlex
from pathlib import Path

import pytest
import torch

from crdiff_export.evaluate import Evaluation, evaluate
from crdiff_export.sampling.session import Session
from tests.support.evaluating import REQUEST, Line, noise_for_pictures
from tests.support.isolation import Crdiff


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    """The evaluation of `REQUEST`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = evaluate(REQUEST)
    torch.set_num_threads(threads)
    return made


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    """Runs a command line that is written as in a shell."""
    return lambda text: crdiff(*shlex.split(text))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in place of pictures."""
    monkeypatch.setattr(Session, "draw", noise_for_pictures)
