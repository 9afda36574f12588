"""Try a request to the Hub again while the reason for its failure may pass."""

from collections.abc import Callable
from typing import TypeVar

from crdiff_export.errors import HubError
from crdiff_export.hub.messages import connection_errors, is_temporary, retry_after, status

Result = TypeVar("Result")
TRIES = 5
# Another commit came first: 412 by the protocol, 409 while the Hub is making that commit.
_RACE_LOST = (409, 412)
_LONGEST_WAIT = 120.0


def retry(function: Callable[[], Result], sleep: Callable[[float], None]) -> Result:
    """Call a function until it succeeds, at most five times.

    Args:
        function: The work; it must be safe to do twice.
        sleep: Waits for a number of seconds.

    Returns:
        What the function returns; an error that does not pass is raised at once.

    """
    from huggingface_hub import errors

    kinds: tuple[type[BaseException], ...] = (errors.HfHubHTTPError, HubError, *connection_errors())
    for attempt in range(1, TRIES + 1):
        try:
            return function()
        except kinds as error:
            seconds = _wait(attempt, error.__cause__ if isinstance(error, HubError) else error)
            if attempt == TRIES or seconds is None:
                raise
            sleep(seconds)
    raise AssertionError


def _wait(attempt: int, error: BaseException | None) -> float | None:
    """Seconds until the next try; None to give up."""
    if error is None:
        return None
    if status(error) in _RACE_LOST:
        return 0.0
    wanted = retry_after(error)
    if not is_temporary(error) or (wanted or 0.0) > _LONGEST_WAIT:
        return None
    return wanted if wanted is not None else 2.0 ** (attempt - 1)
