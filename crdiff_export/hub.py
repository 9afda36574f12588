"""The Hugging Face Hub; the only module that may open a socket. Tokens are left to huggingface_hub, unseen."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from crdiff_export.errors import HubError

# What a pipeline folder needs besides its weights.
_SMALL_FILES = ("*.json", "*.txt", "*.model")


def fetch(repo: str, file: str | None, revision: str | None, variant: str | None) -> Path:
    """The path in huggingface_hub's cache of one file of a repository, or of its diffusers folder where `file` is None.

    Only what is needed is downloaded; with HF_HUB_OFFLINE only the cache is looked at. HubError says what to do next.
    """
    with _explained(repo, file):
        from huggingface_hub import hf_hub_download

        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        return _fetch_folder(repo, revision, variant)


def _fetch_folder(repo: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    if constants.is_offline_mode():
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    else:
        files = HfApi().list_repo_files(repo, revision=revision)
    if any(name.startswith(("unet/", "transformer/")) for name in files):
        wanted = [*_SMALL_FILES, *_weights(files, variant)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    single = [name for name in files if name.endswith(".safetensors")]
    if len(single) == 1:
        return Path(hf_hub_download(repo, single[0], revision=revision))
    if not single:
        raise HubError(f"{repo}: has no checkpoint in safetensors format", "Give another repository.")
    shown = ", ".join(f"hf://{repo}/{name}" for name in single[:4])
    raise HubError(f"{repo}: has {len(single)} checkpoints", f"Choose one: {shown}{', …' if len(single) > 4 else ''}")


def _weights(files: list[str], variant: str | None) -> list[str]:
    """The weights of one variant in every component's folder: that variant's where it has one, else the plain ones."""
    chosen: list[str] = []
    for folder in sorted({name.rpartition("/")[0] for name in files if "/" in name}):
        inside = [n for n in files if n.rpartition("/")[0] == folder and n.endswith(".safetensors")]
        special = [n for n in inside if variant and f".{variant}." in n.rpartition("/")[2].replace("-", ".")]
        plain = [n for n in inside if n.rpartition("/")[2].split("-0")[0].count(".") <= 1]
        chosen += special or plain or inside
    return chosen


@contextlib.contextmanager
def _explained(repo: str, file: str | None) -> Iterator[None]:
    """Turn the client's exceptions into one line and what to do next."""
    from huggingface_hub import errors

    place = f"{repo}/{file}" if file else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{place}: gated; your account has not been given access",
            f"Accept its terms at https://huggingface.co/{repo}, then run `hf auth login` or set HF_TOKEN.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{place}: not in the local cache, and the Hub cannot be reached",
            "Unset HF_HUB_OFFLINE and check the connection, or give a path to a file you have.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{place}: no such repository, or a private one", "Check the id; for a private one run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{place}: no such revision", "Check the branch, tag or commit after the @.") from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"{place}: no such file in the repository", f"See https://huggingface.co/{repo}/tree/main."
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{place}: not a Hub id", "Write ORG/NAME or hf://ORG/NAME/FILE.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = "Wait a little, then run it again." if status == 429 else "Run it again; finished parts are kept."
        raise HubError(f"{place}: the Hub answered {status or 'with an error'}", hint) from error
    except (ConnectionError, TimeoutError) as error:
        raise HubError(f"{place}: the Hub cannot be reached", "Check the connection, then run it again.") from error
