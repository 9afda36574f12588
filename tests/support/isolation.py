"""What a command line gives in a test, and the rule that no test reaches beyond this machine."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# An address where nobody listens: a subprocess, which no fixture reaches, gets an error instead of the Hub.
NOWHERE = "http://127.0.0.1:9"


class NetworkUsed(RuntimeError):
    """A test reached for another machine.

    Not an OSError, which the code under test might take for a network that is down.
    """


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The one JSON object on stdout."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> Any:
        """The one JSON object on stderr."""
        (line,) = self.err.splitlines()
        value = json.loads(line)
        assert value["schema"] == 1
        return value["error"]


Crdiff = Callable[..., Ran]
