"""What a command line gives in a test, and the rule that no test reaches beyond this machine."""

import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# An address where nobody listens: a subprocess, which no fixture reaches, gets an error instead of the Hub.
NOWHERE = "http://127.0.0.1:9"


class NetworkUsed(RuntimeError):
    """Not an OSError, which the code under test might take for a network that is down."""


def is_local(address: Any) -> bool:
    """Whether a socket's address is on this machine: a path (AF_UNIX) or a loopback host."""
    if not isinstance(address, tuple):
        return True
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    try:
        return host in ("localhost", "") or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


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
