"""Where a push goes: checked, and made if it has to be, before any heavy work."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from crdiff_export.errors import HubError
from crdiff_export.hub.messages import explained, passes, status
from crdiff_export.hub.retry import patiently

MAIN = "main"


@dataclass(frozen=True, slots=True)
class Destination:
    """A revision of a repository that may be written to. `pull_request` is the title of one to open or to continue."""

    repo: str
    revision: str = MAIN
    pull_request: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PullRequest:
    """An open pull request: the revision that commits to it go to, and its page."""

    revision: str
    page: str


def prepare(destination: Destination, *, private: bool, why_private: str | None = None) -> Destination:
    """Make sure that the destination exists and may be written to; HubError says what is in the way.

    A repository that is not there is created, `private` or not. With a pull request read access is enough.
    """
    with explained(destination.repo, access="write"):
        return patiently(lambda: _open(destination, private=private, why_private=why_private), time.sleep)


def _open(destination: Destination, *, private: bool, why_private: str | None) -> Destination:
    from huggingface_hub import HfApi, errors

    repo, for_request = destination.repo, destination.revision.startswith("refs/pr/") or destination.pull_request
    try:
        HfApi().auth_check(repo, write=destination.pull_request is None)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError as error:
        if status(error) == 401:  # the client cannot tell; a token that is no good has another error
            raise HubError(f"{repo}: nobody is logged in", "Run `hf auth login` or set HF_TOKEN.") from error
        if for_request:
            raise HubError(
                f"{repo}: no such repository, or a private one, to open a pull request for",
                "Check the id, run `hf auth login`, or leave --create-pr out to create it.",
            ) from error
        destination = _create(destination, private=private, why_private=why_private)
    if destination.pull_request:
        _me()  # to look takes no token, to open a request does
    _branch(destination)
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
    why = f", as {why_private}" if private and why_private else ""
    return replace(destination, notes=(*destination.notes, f"created {repo}, {kind}{why}"))


def _branch(destination: Destination) -> None:
    """Make the branch of a destination if there is none such; a pull request has to be there."""
    from huggingface_hub import HfApi

    api = HfApi()
    if destination.revision == MAIN:
        return
    if destination.revision.startswith("refs/pr/"):
        api.model_info(destination.repo, revision=destination.revision)
    elif destination.revision not in _names(api.list_repo_refs(destination.repo).branches):
        api.create_branch(destination.repo, branch=destination.revision, exist_ok=True)


def _names(refs: Iterable[object]) -> set[str]:
    return {str(getattr(ref, "name", "")) for ref in refs}


def find_pull_request(destination: Destination) -> PullRequest | None:
    """Our open pull request of the destination's title, so that a second run continues it; None where there is none."""
    from huggingface_hub import HfApi

    with explained(destination.repo, access="write"):
        found = HfApi().get_repo_discussions(
            destination.repo, author=_me(), discussion_type="pull_request", discussion_status="open"
        )
        mine = [one for one in found if one.title == destination.pull_request and one.git_reference]
    if not mine:
        return None
    oldest = min(mine, key=lambda one: one.num)
    return PullRequest(str(oldest.git_reference), oldest.url)


def _me() -> str | None:
    """Who the token belongs to; None where it is not for the Hub to say."""
    from huggingface_hub import HfApi, errors

    try:
        return str(HfApi().whoami(cache=True)["name"])
    except errors.HfHubHTTPError as error:
        if passes(error):
            raise
        return None
