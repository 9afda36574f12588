"""A fork server (`fork_server.py`) whose jobs have an environment, `env`, each of its own.

The Hub's client is loaded after the fork, so that every run has one that knows its Hub, as a new process would.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is run as a script

import huggingface_hub.hf_api

from tests.support import fork_server

CLIENT = huggingface_hub.__name__
GUARD = str(Path(__file__).resolve().parent / "guard" / "sitecustomize.py")
fork = fork_server.run


def forget() -> None:
    """Keep loaded what the client is made of, but not the client, which has read the environment."""
    for name in [name for name in sys.modules if name.partition(".")[0] == CLIENT]:
        del sys.modules[name]


def run(job: dict[str, Any]) -> None:
    """In the child; never returns."""
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    assert CLIENT not in sys.modules
    runpy.run_path(GUARD)  # a new process would load it by itself
    fork(job)


if __name__ == "__main__":
    forget()
    fork_server.run = run
    fork_server.serve()
