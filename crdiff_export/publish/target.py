"""Prepare where a push goes: check it, and create it if needed, before any heavy work."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crdiff_export.errors import HubError
from crdiff_export.hub.messages import as_hub_error, is_temporary, status
from crdiff_export.hub.retry import retry
from crdiff_export.publish import licence

if TYPE_CHECKING:
    from huggingface_hub import Discussion

MAIN = "main"


@dataclass(frozen=True, slots=True)
class Destination:
    """A branch of a repository.

    Attributes:
        repo: ORG/NAME.
        revision: The branch.
        pull_request: The title of a pull request to open or to continue instead.
        notes: What people should know of how it was prepared.
    """

    repo: str
    revision: str = MAIN
    pull_request: str | None = None
    notes: tuple[str, ...] = ()


def prepare(destination: Destination, private: bool | None, bases: Iterable[str | None]) -> Destination:
    """Make sure that a destination exists and that the token may write there; read access is enough for pull requests.

    Args:
        destination: Where to push.
        private: Whether a repository that has to be created is private; None for private where `why_private` has a
            reason for one of the bases.
        bases: The Hub ids of the bases of what goes there, as far as they are known.

    Returns:
        The destination, with notes.

    Raises:
        HubError: If nothing can be pushed there.
    """
    repos = dict.fromkeys(bases) if private is None else ()
    why = next((why for repo in repos if (why := licence.why_private(licence.look_up(repo)[0]))), None)
    with as_hub_error(destination.repo, access="write"):
        return retry(lambda: _open(destination, private=private or why is not None, why_private=why), time.sleep)


def _open(destination: Destination, *, private: bool, why_private: str | None) -> Destination:
    from huggingface_hub import HfApi, errors

    repo, for_request = destination.repo, destination.revision.startswith("refs/pr/") or destination.pull_request
    try:
        HfApi().auth_check(repo, write=destination.pull_request is None)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError as error:
        if status(error) == 401:  # without a login; an invalid token raises another error
            raise HubError(f"{repo}: you are not logged in", "Run `hf auth login` or set HF_TOKEN.") from error
        if for_request:
            raise HubError(
                f"{repo}: no such repository, or a private one, to open a pull request for",
                "Check the id, run `hf auth login`, or leave --create-pr out to create it.",
            ) from error
        destination = _create(destination, private=private, why_private=why_private)
    if destination.pull_request:
        _user()  # reading takes no token, opening a pull request does
    _create_branch(destination)
    return destination


def _create(destination: Destination, *, private: bool, why_private: str | None) -> Destination:
    from huggingface_hub import HfApi, errors

    repo = destination.repo
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
    except errors.HfHubHTTPError as error:
        if status(error) == 403:
            raise HubError(
                f"{repo}: no such repository, and the token may not create it",
                "Create it on the Hub first, or give a token that may create repositories there.",
            ) from error
        raise
    kind = "private" if private else "public"
    why = f", as {why_private}" if why_private else ""
    return replace(destination, notes=(*destination.notes, f"created {repo}, {kind}{why}"))


def _create_branch(destination: Destination) -> None:
    """Create the branch of a destination if needed; the ref of a pull request must exist."""
    from huggingface_hub import HfApi

    api = HfApi()
    if destination.revision == MAIN:
        return
    if destination.revision.startswith("refs/pr/"):
        api.model_info(destination.repo, revision=destination.revision)
    elif all(branch.name != destination.revision for branch in api.list_repo_refs(destination.repo).branches):
        api.create_branch(destination.repo, branch=destination.revision, exist_ok=True)


def find_pull_request(destination: Destination) -> "Discussion | None":
    """Find our open pull request with the destination's title, so that a second run continues it; raises HubError."""
    from huggingface_hub import HfApi

    with as_hub_error(destination.repo, access="write"):
        requests = HfApi().get_repo_discussions(
            destination.repo, author=_user(), discussion_type="pull_request", discussion_status="open"
        )
        ours = [request for request in requests if request.title == destination.pull_request and request.git_reference]
    return min(ours, key=lambda request: request.num, default=None)


def _user() -> str | None:
    """The user that the token belongs to; None if the Hub does not tell."""
    from huggingface_hub import HfApi, errors

    try:
        return str(HfApi().whoami(cache=True)["name"])
    except errors.HfHubHTTPError as error:
        if is_temporary(error):
            raise
        return None
