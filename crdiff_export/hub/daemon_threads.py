"""Work in threads that nothing waits for when the program ends: a signal ends it even while the Hub is silent.

The client's own threads, and hf_xet's calls outside of Python, would keep the main thread from it until they are done.
While one of these threads is alive, the command line ends without waiting for any (`commands.main`).
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREAD = "crdiff-hub"
# Seconds; on Windows a signal gets through only between two waits.
_LOOK_UP = 0.5


def aside(act: Callable[[], Result]) -> Result:
    """What `act` returns or raises; it runs in a thread of its own."""
    return _started(act)()


def each(act: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> list[Result]:
    """What `act` returns for each item, from so many threads at once; an error ends the work and is raised."""
    todo = list(items)
    made: dict[int, Result] = {}
    places = iter(range(len(todo)))  # one for all of them: whoever is free takes the next

    def work() -> None:
        try:
            for place in places:
                made[place] = act(todo[place])
        except BaseException:
            for _ in places:
                pass
            raise

    for finish in [_started(work) for _ in range(min(at_once, len(todo)))]:
        finish()
    return [made[place] for place in range(len(todo))]


def _started(act: Callable[[], Result]) -> Callable[[], Result]:
    """Begin, and give back what waits for the end."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            future.set_exception(error)

    def finish() -> Result:
        while not wait([future], _LOOK_UP).done:
            pass
        return future.result()

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    return finish
