"""Turn the Hub client's exceptions into a HubError; their own texts may hold signed links and are never shown."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from crdiff_export.errors import HubError

Access = Literal["read", "write"]
_Kinds = type[BaseException] | tuple[type[BaseException], ...]

# Time-outs, rate limits, restarts of a server.
_TEMPORARY = (408, 429, 500, 502, 503, 504)
_LOG_IN = "run `hf auth login` or set HF_TOKEN"
_UPLOAD_AGAIN = "Run it again; what has been transferred is kept."
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
    subject = f"{repo}/{file}" if file else repo
    try:
        yield
    except Exception as error:
        for kinds, what, hint in _explanations(error, repo, access):
            if isinstance(error, kinds):
                raise HubError(f"{subject}: {what}", hint) from error
        raise


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


def is_temporary(error: BaseException) -> bool:
    """Tell whether the reason for a failed request may be over by the next try."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return status(error) in _TEMPORARY
    if isinstance(error, errors.OfflineModeIsEnabled) or _is_from_xet(error):
        return False
    return isinstance(error, connection_errors())


def _is_from_xet(error: BaseException) -> bool:
    """Whether hf_xet gave up after minutes of trying."""
    return type(error) is ConnectionError


def _headers(error: BaseException | None) -> Any:
    return getattr(getattr(error, "response", None), "headers", None) or {}


def _hub_message(error: BaseException) -> str:
    """The Hub's own message about a request that it refuses."""
    text = " ".join(str(_headers(error).get("X-Error-Message", "")).split())
    return f": {text[:200]}" if text else ""


def connection_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that mean that the Hub cannot be reached.

    The client lets through those of the HTTP library that its version uses: requests, httpx or httpx2. Its own error
    for HTTP inherits from the most general one of that library.
    """
    from huggingface_hub import errors

    own = ("builtins", errors.__name__)
    ancestors = [c for c in errors.HfHubHTTPError.__mro__ if c.__module__ not in own and issubclass(c, BaseException)]
    return (*ancestors[-1:], ConnectionError, TimeoutError)


def _explanations(error: Exception, repo: str, access: Access) -> Iterator[tuple[_Kinds, str, str]]:
    """Yield the client's exceptions, the narrower ones first, each with what is wrong and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    offline = "Unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "Check the connection and run it again"
    absent = "not in the local cache, and the Hub cannot be reached", f"{offline}, or give a path to a file you have."
    reason = getattr(error, "strerror", None) or type(error).__name__
    lost = "the Hub cannot be reached", "Check the connection, then run it again."
    if access == "read":
        failed = "the download failed", "Run it again; HF_HUB_DISABLE_XET=1 takes another way."
        cut_off = absent
        disk = "cannot be kept in the local cache", "Free some space, or set HF_HOME to a folder on another disk."
    else:
        failed = "the upload failed", f"{_UPLOAD_AGAIN[:-1]}, and HF_HUB_DISABLE_XET=1 takes another way."
        cut_off = "the Hub is off: HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE."
        disk = "the upload failed", _UPLOAD_AGAIN
        if _is_from_xet(error):  # also where a Hub has no Xet (huggingface_hub#4507); an upload does not fall back
            lost = "the Hub's Xet storage does not answer", failed[1]
    yield errors.GatedRepoError, "gated; your account has no access", f"Accept its terms at {page}, then {_LOG_IN}."
    yield errors.LocalEntryNotFoundError, *absent
    yield errors.LocalTokenNotFoundError, "you are not logged in", f"R{_LOG_IN[1:]}."
    yield errors.OfflineModeIsEnabled, *cut_off
    yield errors.RepositoryNotFoundError, "no such repository, or a private one", f"Check the id, or {_LOG_IN}."
    yield errors.RevisionNotFoundError, "no such revision", "Check the branch, tag or commit."
    yield errors.EntryNotFoundError, "no such file in the repository", f"See {page}/tree/main."
    yield errors.HFValidationError, "not a Hub id", "Write ORG/NAME or hf://ORG/NAME/FILE."
    yield errors.OIDCError, "trusted publishing failed", "See the workflow in docs/publishing.md, or set HF_TOKEN."
    yield errors.SafetensorsParsingError, "not a safetensors file", "Give another file of the repository."
    yield (errors.XetDownloadError, RuntimeError), *failed  # hf_xet raises RuntimeError
    answered = f"the Hub answered {status(error) or 'with an error'}{_hub_message(error)}"
    yield errors.HfHubHTTPError, answered, _hint(error, access)
    yield connection_errors(), *lost
    interception = "Check HF_ENDPOINT, and whether the network wants you to log in."
    yield json.JSONDecodeError, "somebody else answers in place of the Hub", interception
    yield OSError, f"{disk[0]}: {reason}", disk[1]


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
    if code and code // 100 == 4 and code not in _TEMPORARY:
        return "Change what it refuses, then run it again."
    return _UPLOAD_AGAIN if access == "write" else "Run it again; finished parts are kept."
