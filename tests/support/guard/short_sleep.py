"""Waits take a hundredth of their time, and are noted in a file, where CRDIFF_TEST_HURRY is set."""

import os
import time
from pathlib import Path
from typing import SupportsIndex

_sleep = time.sleep


def sleep(seconds: float | SupportsIndex) -> None:
    """Wait as `time.sleep` does, or in a hurry."""
    if "CRDIFF_TEST_HURRY" not in os.environ:
        _sleep(seconds)
        return
    if seconds:
        with Path(os.environ["CRDIFF_TEST_SLEPT"]).open("a") as file:
            print(seconds, file=file)
    _sleep(float(seconds) / 100)


time.sleep = sleep
