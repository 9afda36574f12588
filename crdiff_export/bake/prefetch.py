"""Run generators in parallel: each stage of a stream has its own thread and works a few items ahead of the next."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

# Items that may wait between two stages.
DEPTH = 1


class _End(Generic[T]):
    """Marks the end of a stage, with the exception that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterable[T], depth: int = DEPTH) -> Generator[T, None, None]:
    """Yield items while another thread produces the next ones.

    An exception in the producer is raised here. Closing this generator stops the producer, waits for it and closes
    `items`, so that nothing keeps running after an error further down.

    Args:
        items: What to produce.
        depth: How many items may wait.

    Yields:
        The items, in order.
    """
    waiting: queue.Queue[T | _End[T]] = queue.Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        end: _End[T] = _End()
        try:
            for item in items:
                if not _put(waiting, item, stopped):
                    break
        except BaseException as error:  # noqa: BLE001  the consumer raises it
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
        if producer.is_alive():  # an interrupt can come before it has started
            producer.join()


def _put(waiting: "queue.Queue[T | _End[T]]", item: "T | _End[T]", stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            waiting.put(item, timeout=0.05)
        except queue.Full:
            continue
        return True
    return False
