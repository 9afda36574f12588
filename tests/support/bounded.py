"""Readers of hostile input in a process of their own, with bounds on memory and processor time."""

import subprocess
import sys

import pytest

from tests.support import ROOT

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory as Linux keeps them")
# The input is built before the limit is set, and counts towards it.
CHILD = """
import resource, time
from crdiff_export.errors import CheckpointError
from crdiff_export.formats import safetensors
from crdiff_export.formats.unpickle import UnpickleError, unpickle
N = {size}
raw = ({raw})
resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
began = time.process_time()
try:
    {read}
    print("accepted")
except (CheckpointError, UnpickleError) as error:
    print(error)
assert time.process_time() - began < 10
"""


def read_bounded(read: str, raw: str, size: int) -> str:
    """Run a reader on large input, with 600 MB of memory and 10 s of processor time.

    Args:
        read: A statement that reads `raw`.
        raw: An expression for the input, which may use `N`.
        size: The value of `N`.

    Returns:
        The text of the error, or "accepted".
    """
    child = CHILD.format(read=read, raw=raw, size=size)
    ran = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", child], check=False, capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout
