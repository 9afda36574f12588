"""Turn the Hub client's exceptions into a HubError; their own texts may hold signed links and are never shown."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from crdiff_export.errors import HubError

Access = Literal["read", "write"]

# Time-outs, rate limits, restarts of a server.
_PASSING = (408, 429, 500, 502, 503, 504)
_LOG_IN = "run `hf auth login` or set HF_TOKEN"
_UNDONE = "Run it again; what has been transferred is kept."
# IETF draft-ietf-httpapi-ratelimit-headers: requests that remain, and seconds until there are more.
_RATE_LIMIT = re.compile(r"r=0;t=([0-9]+)")


@contextlib.contextmanager
def as_hub_error(repo: str, file: str | None = None, access: Access = "read") -> Iterator[None]:
    """Turn what the client raises in this block into a HubError.

    Args:
        repo: The repository that the block is about.
        file: The file of it, if it is about one.
        access: What the block does there; decides the hints.

    Yields:
        Nothing.

    Raises:
        HubError: With one line on what is wrong and one on what to do.

    """
    from huggingface_hub import errors

    place = f"{repo}/{file}" if file else repo
    kinds = _client_errors(repo, access)
    try:
        yield
    except tuple(kind for kind, _, _ in kinds) as error:
        what, hint = next((what, hint) for kind, what, hint in kinds if isinstance(error, kind))
        raise HubError(f"{place}: {what}", hint) from error
    except errors.HfHubHTTPError as error:
        code = status(error)
        what = f"{place}: the Hub answered {code or 'with an error'}{_hub_message(error)}"
        raise HubError(what, _hint(error, access)) from error
    except no_answer() as error:
        if access == "write" and _is_xet(error):
            # Also where a Hub has no Xet (huggingface_hub#4507); an upload does not fall back.
            hint = f"{_UNDONE[:-1]}, and HF_HUB_DISABLE_XET=1 takes another way."
            raise HubError(f"{place}: the Hub's Xet storage does not answer", hint) from error
        raise HubError(f"{place}: the Hub cannot be reached", "Check the connection, then run it again.") from error
    except json.JSONDecodeError as error:
        hint = "Check HF_ENDPOINT, and whether the network wants you to log in."
        raise HubError(f"{place}: somebody else answers in place of the Hub", hint) from error
    except OSError as error:  # the cache's disk
        if access == "write":
            raise HubError(f"{place}: the upload failed: {error.strerror or type(error).__name__}", _UNDONE) from error
        raise HubError(
            f"{place}: cannot be kept in the local cache: {error.strerror or type(error).__name__}",
            "Free some space, or set HF_HOME to a folder on another disk.",
        ) from error


def status(error: BaseException) -> int | None:
    """Return the HTTP status behind an exception of the client; None if there was no answer."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def retry_after(error: BaseException | None) -> float | None:
    """Return the seconds that the Hub asks to wait (RFC 9110, or its rate limit); None for no number or a date."""
    headers = _headers(error)
    limit = _RATE_LIMIT.search(str(headers.get("RateLimit", "")).replace(" ", ""))
    text = limit[1] if limit else str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() and math.isfinite(float(text)) else None


def may_pass(error: BaseException) -> bool:
    """Tell whether the reason for a failed request may be over by the next try."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return status(error) in _PASSING
    lasting = isinstance(error, errors.OfflineModeIsEnabled) or _is_xet(error)
    return isinstance(error, no_answer()) and not lasting


def _is_xet(error: BaseException) -> bool:
    """Whether hf_xet gave up after minutes of trying."""
    return type(error) is ConnectionError


def _headers(error: BaseException | None) -> Any:
    return getattr(getattr(error, "response", None), "headers", None) or {}


def _hub_message(error: BaseException) -> str:
    """The Hub's own message about a request that it refuses."""
    text = " ".join(str(_headers(error).get("X-Error-Message", "")).split())
    return f": {text[:200]}" if text else ""


def no_answer() -> tuple[type[BaseException], ...]:
    """Return the exceptions that mean that the Hub cannot be reached.

    The client lets through those of the HTTP library that its version uses: requests, httpx or httpx2. Its own error
    for HTTP inherits from the most general one of that library.
    """
    from huggingface_hub import errors

    own = ("builtins", errors.__name__)
    ancestors = [c for c in errors.HfHubHTTPError.__mro__ if c.__module__ not in own and issubclass(c, BaseException)]
    return (*ancestors[-1:], ConnectionError, TimeoutError)


def _client_errors(repo: str, access: Access) -> tuple[tuple[type[Exception], str, str], ...]:
    """List the client's exceptions, the narrower ones first, each with what is wrong and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    offline = "Unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "Check the connection and run it again"
    absent = "not in the local cache, and the Hub cannot be reached", f"{offline}, or give a path to a file you have."
    xet = "HF_HUB_DISABLE_XET=1 takes another way."
    failed = (
        ("the download failed", f"Run it again; {xet}")
        if access == "read"
        else ("the upload failed", f"{_UNDONE[:-1]}, and {xet}")
    )
    cut_off = absent if access == "read" else ("the Hub is off: HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE.")
    return (
        (errors.GatedRepoError, "gated; your account has no access", f"Accept its terms at {page}, then {_LOG_IN}."),
        (errors.LocalEntryNotFoundError, *absent),
        (errors.LocalTokenNotFoundError, "nobody is logged in", f"R{_LOG_IN[1:]}."),
        (errors.OfflineModeIsEnabled, *cut_off),
        (errors.RepositoryNotFoundError, "no such repository, or a private one", f"Check the id, or {_LOG_IN}."),
        (errors.RevisionNotFoundError, "no such revision", "Check the branch, tag or commit."),
        (errors.EntryNotFoundError, "no such file in the repository", f"See {page}/tree/main."),
        (errors.HFValidationError, "not a Hub id", "Write ORG/NAME or hf://ORG/NAME/FILE."),
        (errors.OIDCError, "trusted publishing failed", "See the workflow in docs/publishing.md, or set HF_TOKEN."),
        (errors.SafetensorsParsingError, "not a safetensors file", "Give another file of the repository."),
        (errors.XetDownloadError, *failed),
        (RuntimeError, *failed),  # what hf_xet raises
    )


def _hint(error: BaseException, access: Access) -> str:
    """Say what to do after an HTTP error."""
    code = status(error)
    if code in (401, 403) and access == "read":
        return "Run `hf auth login` or set HF_TOKEN; the token needs read access."
    if code == 401:
        return "Run `hf auth login`, or set HF_TOKEN to a token that is valid and may write there."
    if code == 403:
        return "The token may not write there: give one that may, or --create-pr to propose the change."
    if code == 429:
        seconds = retry_after(error)
        return f"Wait {seconds:.0f} s, then run it again." if seconds else "Wait a little, then run it again."
    if code and code // 100 == 4 and code not in _PASSING:
        return "Change what it refuses, then run it again."
    return _UNDONE if access == "write" else "Run it again; finished parts are kept."
