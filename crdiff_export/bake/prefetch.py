"""Generators that run side by side: each stage of a stream in a thread of its own, a few items ahead of the next."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 1


class _End(Generic[T]):
    """The last thing a stage says: that it is done, or the exception that ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def ahead(items: Iterable[T], depth: int = AHEAD) -> Generator[T, None, None]:
    """Yield `items`, produced in another thread, at most `depth` of them waiting.

    An exception of the producer is raised here. Closing this generator stops the producer and waits for it, so that
    nothing runs on after an error further down; `items` is closed with it.
    """
    waiting: queue.Queue[T | _End[T]] = queue.Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        end: _End[T] = _End()
        try:
            for item in items:
                if not _put(waiting, item, stopped):
                    break
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            end = _End(error)
        finally:
            if isinstance(items, Generator):
                items.close()
            _put(waiting, end, stopped)

    producer = threading.Thread(target=produce, name="crdiff-stage", daemon=True)
    try:
        producer.start()
        while not isinstance(item := waiting.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        if producer.is_alive():  # an interrupt can come before it is
            producer.join()


def _put(waiting: "queue.Queue[T | _End[T]]", item: "T | _End[T]", stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            waiting.put(item, timeout=0.05)
        except queue.Full:
            continue
        return True
    return False
