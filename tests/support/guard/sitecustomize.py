"""Python loads this first in every process that has its folder on PYTHONPATH: it reaches nothing but this machine.

Where CRDIFF_TEST_HURRY is set, `short_sleep.py` is loaded, too.
"""

import importlib
import ipaddress
import os
import sys
from typing import Any

# The exit code of a process that reached for another machine.
ELSEWHERE = 97


def other_machine(event: str, args: tuple[Any, ...]) -> str | None:
    """Return the other machine that an audited call reaches for.

    Args:
        event: The name of the event (https://docs.python.org/3/library/audit_events.html).
        args: Its arguments.

    Returns:
        A host; None for other events, for a path (AF_UNIX) and for a host on this machine.
    """
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = args
    else:
        return None
    host = address[0] if isinstance(address, tuple) and address else None
    text = host.decode() if isinstance(host, bytes) else str(host or "")
    if text in ("", "localhost"):
        return None
    try:
        return None if ipaddress.ip_address(text.partition("%")[0]).is_loopback else text
    except ValueError:
        return text


def end_process(event: str, args: tuple[Any, ...]) -> None:
    """End the process if it reaches for another machine."""
    if host := other_machine(event, args):
        os.write(2, f"reached for {host}\n".encode())
        os._exit(ELSEWHERE)


if __name__ == "sitecustomize":
    sys.addaudithook(end_process)
    if "CRDIFF_TEST_HURRY" in os.environ:
        importlib.import_module("short_sleep")
