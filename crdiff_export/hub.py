"""The Hugging Face Hub; the only module that may open a socket. Tokens are left to huggingface_hub, unseen."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from crdiff_export.errors import HubError

# What a pipeline folder needs besides its weights.
_SMALL_FILES = ("*.json", "*.txt", "*.model")
# diffusers' `_add_variant`: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_WEIGHTS = re.compile(r"(?P<folder>.+)/[^/.]+(\.(?P<variant>[^/.]+?))?(-\d{5}-of-\d{5})?\.safetensors")


def fetch(repo: str, file: str | None, revision: str | None, variant: str | None) -> Path:
    """The path in huggingface_hub's cache of one file of a repository, or of its diffusers folder where `file` is None.

    Only what is needed is downloaded; with HF_HUB_OFFLINE, or without a connection, only the cache is looked at.
    HubError says what to do next.
    """
    with _explained(repo, file):
        from huggingface_hub import hf_hub_download

        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        return _fetch_folder(repo, revision, variant)


def _fetch_folder(repo: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    files, offline = _list(repo, revision)
    if any(name.startswith(("unet/", "transformer/")) for name in files):
        wanted = [*_SMALL_FILES, *_weights(files, variant)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=offline))
    single = [name for name in files if name.endswith(".safetensors")]
    if len(single) == 1:
        return Path(hf_hub_download(repo, single[0], revision=revision, local_files_only=offline))
    if not single:
        raise HubError(f"{repo}: has no checkpoint in safetensors format", "Give another repository.")
    shown = ", ".join(f"hf://{repo}/{name}" for name in single[:4])
    raise HubError(f"{repo}: has {len(single)} checkpoints", f"Choose one: {shown}{', …' if len(single) > 4 else ''}.")


def _list(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """The names of a repository's files, and whether they had to come from the cache."""
    from huggingface_hub import HfApi, constants, errors

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().list_repo_files(repo, revision=revision), False
        except errors.HfHubHTTPError:  # an answer
            raise
        except _no_answer():
            pass  # as hf_hub_download does
    return _cached(repo, revision), True


def _cached(repo: str, revision: str | None) -> list[str]:
    """The names of a repository's files as of the last time that they were asked for."""
    import huggingface_hub
    from huggingface_hub import errors

    # From 2.0 on; there a snapshot of which only a part was wanted counts as incomplete.
    listing = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listing is not None:
        with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
            return [file.path for file in listing(repo, revision=revision)]
    folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _weights(files: list[str], variant: str | None) -> list[str]:
    """The weights of one variant in every component's folder: that variant's where it has one, else the plain ones."""
    folders: dict[str, dict[str, str | None]] = {}
    for name in files:
        if match := _WEIGHTS.fullmatch(name):
            folders.setdefault(match["folder"], {})[name] = match["variant"]
    chosen: list[str] = []
    for _, inside in sorted(folders.items()):
        special = [name for name, kind in inside.items() if variant and kind == variant]
        plain = [name for name, kind in inside.items() if kind is None]
        chosen += special or plain or inside
    return chosen


def _no_answer() -> tuple[type[BaseException], ...]:
    """What the client lets through where nobody answers: a class of the HTTP library that its version uses.

    That is requests, httpx or httpx2; the client's own error for HTTP has the library's most general one as ancestor.
    """
    from huggingface_hub import errors

    own = ("builtins", errors.__name__)
    ancestors = [c for c in errors.HfHubHTTPError.__mro__ if c.__module__ not in own and issubclass(c, BaseException)]
    return (*ancestors[-1:], ConnectionError, TimeoutError)


@contextlib.contextmanager
def _explained(repo: str, file: str | None) -> Iterator[None]:
    """Turn the client's exceptions into one line and what to do next; their own texts may hold signed links."""
    from huggingface_hub import errors

    place = f"{repo}/{file}" if file else repo
    known = _known(repo)
    try:
        yield
    except tuple(kind for kind, _, _ in known) as error:
        what, hint = next((what, hint) for kind, what, hint in known if isinstance(error, kind))
        raise HubError(f"{place}: {what}", hint) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise HubError(f"{place}: the Hub answered {status or 'with an error'}", _after(status)) from error
    except _no_answer() as error:
        raise HubError(f"{place}: the Hub cannot be reached", "Check the connection, then run it again.") from error
    except OSError as error:  # the cache's disk
        raise HubError(
            f"{place}: cannot be kept in the local cache: {error.strerror or type(error).__name__}",
            "Free some space, or set HF_HOME to a folder on another disk.",
        ) from error


def _known(repo: str) -> tuple[tuple[type[Exception], str, str], ...]:
    """The client's exceptions that say what is wrong, the narrower ones first, with what it is and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    log_in = "run `hf auth login` or set HF_TOKEN"
    offline = "Unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "Check the connection and run it again"
    absent = "not in the local cache, and the Hub cannot be reached", f"{offline}, or give a path to a file you have."
    failed = "the download failed", "Run it again; HF_HUB_DISABLE_XET=1 takes another way."
    return (
        (errors.GatedRepoError, "gated; your account has no access", f"Accept its terms at {page}, then {log_in}."),
        (errors.LocalEntryNotFoundError, *absent),
        (errors.OfflineModeIsEnabled, *absent),
        (errors.RepositoryNotFoundError, "no such repository, or a private one", f"Check the id, or {log_in}."),
        (errors.RevisionNotFoundError, "no such revision", "Check the branch, tag or commit after the @."),
        (errors.EntryNotFoundError, "no such file in the repository", f"See {page}/tree/main."),
        (errors.HFValidationError, "not a Hub id", "Write ORG/NAME or hf://ORG/NAME/FILE."),
        (errors.XetDownloadError, *failed),
        (RuntimeError, *failed),  # what hf_xet raises
    )


def _after(status: int | None) -> str:
    if status in (401, 403):
        return "Run `hf auth login` or set HF_TOKEN; the token needs read access."
    if status == 429:
        return "Wait a little, then run it again."
    return "Run it again; finished parts are kept."
