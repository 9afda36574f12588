"""The accelerator that torch reaches, for tests that want one."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

Test = TypeVar("Test", bound=Callable[..., Any])


def accelerator() -> str | None:
    """torch's name for it; None where there is none."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def on_an_accelerator(test: Test) -> Test:
    """Mark a test `gpu`, and skip it where there is none."""
    absent = pytest.mark.skipif(accelerator() is None, reason="torch reaches no accelerator here")
    marked: Test = pytest.mark.gpu(absent(test))
    return marked
