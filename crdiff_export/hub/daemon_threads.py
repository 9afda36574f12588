"""Run work in daemon threads, so that a signal ends the program even while the Hub is silent.

The client's own threads and hf_xet's calls outside of Python would keep the main thread waiting until they are done.
While a thread of this module is alive, the command line ends without waiting for any thread.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")
THREAD = "crdiff-hub"
# Seconds between two looks for a signal; Windows delivers none during a wait.
_POLL = 0.5


def run_in_daemon_thread(function: Callable[[], Result]) -> Result:
    """Run a function in a daemon thread.

    Args:
        function: The work.

    Returns:
        What the function returns; what it raises is raised here.

    """
    return _wait(_start(function))


def map_in_threads(function: Callable[[Argument], Result], arguments: Iterable[Argument], at_once: int) -> list[Result]:
    """Call a function for each argument in several daemon threads; the first error ends the work and is raised.

    Args:
        function: The work for one argument.
        arguments: The arguments.
        at_once: How many threads to use.

    Returns:
        The results, in the order of the arguments.

    """
    todo = list(arguments)
    results: dict[int, Result] = {}
    indices = iter(range(len(todo)))  # shared: an idle thread takes the next

    def work() -> None:
        try:
            for index in indices:
                results[index] = function(todo[index])
        except BaseException:
            for _ in indices:  # leave nothing to the other threads
                pass
            raise

    for future in [_start(work) for _ in range(min(at_once, len(todo)))]:
        _wait(future)
    return [results[index] for index in range(len(todo))]


def _start(function: Callable[[], Result]) -> "Future[Result]":
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    return future


def _wait(future: "Future[Result]") -> Result:
    while not wait([future], _POLL).done:
        pass
    return future.result()
