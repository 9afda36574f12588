"""Trying again, for as long as what stops a request may pass."""

from collections.abc import Callable
from typing import TypeVar

from crdiff_export.errors import HubError
from crdiff_export.hub.messages import no_answer, passes, retry_after, status

Result = TypeVar("Result")
TRIES = 5
# Somebody else's commit came first: 412 by the protocol, 409 while it is being made.
_RACED = (409, 412)
_LONGEST_WAIT = 120.0


def patiently(act: Callable[[], Result], sleep: Callable[[float], None]) -> Result:
    """What `act` returns at last; it has to be one that may be done twice."""
    from huggingface_hub import errors

    stopping: tuple[type[BaseException], ...] = (errors.HfHubHTTPError, HubError, *no_answer())
    for tries in range(1, TRIES + 1):
        try:
            return act()
        except stopping as error:
            cause = error.__cause__ if isinstance(error, HubError) else error
            seconds = _wait(tries, cause)
            if tries == TRIES or seconds is None:
                raise
            sleep(seconds)
    raise AssertionError


def _wait(tries: int, error: BaseException | None) -> float | None:
    """Seconds until the next try; None where none is to be made."""
    if error is None:
        return None
    if status(error) in _RACED:
        return 0.0
    asked = retry_after(error)
    if not passes(error) or (asked or 0.0) > _LONGEST_WAIT:
        return None
    return asked if asked is not None else 2.0 ** (tries - 1)
