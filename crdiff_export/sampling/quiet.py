"""Silence for diffusers and transformers: their warnings and progress bars are for programmers."""

import contextlib
import warnings
from collections.abc import Iterator
from importlib import import_module


@contextlib.contextmanager
def quiet_libraries(*names: str) -> Iterator[None]:
    """Silence libraries inside the block: no warnings, no log below `critical`, no progress bars.

    Args:
        *names: Libraries of Hugging Face that are installed, such as `diffusers` and `transformers`.

    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logs = [import_module(f"{name}.utils.logging") for name in names]
        before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
        try:
            for log in logs:
                log.set_verbosity(log.CRITICAL)
                log.disable_progress_bar()
            yield
        finally:
            for log, (verbosity, bars) in zip(logs, before, strict=True):
                log.set_verbosity(verbosity)
                if bars:
                    log.enable_progress_bar()
