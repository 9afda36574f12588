"""Fetch bases from the Hub into the Hub client's cache: only the files that are needed."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from crdiff_export.errors import HubError
from crdiff_export.formats.checkpoint import read_index
from crdiff_export.formats.pipeline_files import SMALL_FILES, component_weights
from crdiff_export.hub.daemon_threads import run_in_daemon_thread
from crdiff_export.hub.location import HubLocation
from crdiff_export.hub.messages import as_hub_error, connection_errors

INDEX = ".safetensors.index.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> str:
    """Return the folder in which the Hub client keeps files, as HF_HUB_CACHE, HF_HOME or its default says."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def fetch(location: HubLocation, variant: str | None = None) -> Path:
    """Fetch one file, or the diffusers folder or only checkpoint of a repository, with no more than is needed.

    With an index come its shards. With HF_HUB_OFFLINE, or without a connection, only the cache is used.

    Args:
        location: The file, or the repository.
        variant: The weights to take from a folder that has several, such as "fp16".

    Returns:
        The path in the Hub client's cache.

    Raises:
        HubError: If the repository has not what is needed, or the Hub does not give it.

    """
    with as_hub_error(location.repo, location.file):
        return run_in_daemon_thread(lambda: _fetch(location, variant))


def _fetch(location: HubLocation, variant: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    repo, file, revision = location.repo, location.file, location.revision
    if file is not None:
        offline = not _is_reachable(repo, revision)
        path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=offline))
        for shard in shard_names(file, path):
            hf_hub_download(repo, shard, revision=revision, local_files_only=offline)
        return path
    names, offline = _list_files(repo, revision)
    chosen = choose_files(repo, names, variant)
    if isinstance(chosen, str):
        return Path(hf_hub_download(repo, chosen, revision=revision, local_files_only=offline))
    return _fetch_snapshot(location, chosen, offline=offline)


def _is_reachable(repo: str, revision: str | None) -> bool:
    """Ask the Hub once. A download would try five times, for half a minute, before it looks into the cache."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(repo, revision=revision)
    except errors.HfHubHTTPError:  # an answer, which the download explains
        return True
    except connection_errors():
        return False
    return True


def _fetch_snapshot(location: HubLocation, weights: Sequence[str], *, offline: bool = False) -> Path:
    """Fetch the small files of a diffusers folder, and these weights."""
    from huggingface_hub import snapshot_download

    patterns = [*(f"*{ending}" for ending in SMALL_FILES), *weights]
    return Path(
        snapshot_download(location.repo, revision=location.revision, allow_patterns=patterns, local_files_only=offline)
    )


def shard_names(file: str, path: Path) -> list[str]:
    """List the shards of an index: their paths in the repository; empty for any other file.

    Args:
        file: The path of the index in the repository.
        path: The index on this machine.

    """
    if not file.endswith(INDEX):
        return []
    folder = PurePosixPath(file).parent
    return [str(folder / name) for name in sorted(set(read_index(path).values()))]


def fetch_parts(location: HubLocation, without: str | None = None) -> Path:
    """Fetch a diffusers folder without its weights, or with those of all components but one.

    Args:
        location: The repository.
        without: The component whose weights stay on the Hub; None to leave out all weights.

    Returns:
        The folder in the Hub client's cache.

    Raises:
        HubError: If the Hub does not give the files.

    """

    def act() -> Path:
        if without is None:
            return _fetch_snapshot(location, ())
        names, offline = _list_files(location.repo, location.revision)
        unwanted = (f"{without}/", "safety_checker/")
        weights = [name for name in component_weights(names, None) if not name.startswith(unwanted)]
        return _fetch_snapshot(location, weights, offline=offline)

    with as_hub_error(location.repo):
        return run_in_daemon_thread(act)


def cached_hashes(path: Path) -> Mapping[str, str]:
    """Read the SHA-256 of files in the Hub client's cache, as the Hub gave them.

    The cache stores a file under its ETag and links to it. On systems without links nothing is known.

    Args:
        path: A file or a folder from `fetch`.

    Returns:
        SHA-256 as hex by file name, for files in LFS.

    """
    home = path.parent if path.is_file() else path
    if path.name.endswith(INDEX):
        files = sorted(home.glob("*.safetensors"))
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    blobs = {file.relative_to(home).as_posix(): file.resolve().name for file in files if file.is_symlink()}
    return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}


def choose_files(repo: str, names: Sequence[str], variant: str | None) -> str | list[str]:
    """Choose the only checkpoint of a repository, or the weights of its diffusers folder; raises HubError."""
    if any(name.startswith(("unet/", "transformer/")) for name in names):
        return component_weights(names, variant)
    files = [name for name in names if name.endswith(".safetensors")]
    if variant and len(files) > 1:  # as in model.fp16.safetensors, model-fp16.safetensors, model_fp16.safetensors
        files = [name for name in files if re.search(rf"[._-]{re.escape(variant)}\.safetensors$", name)] or files
    if len(files) == 1:
        return files[0]
    if not files:
        raise HubError(f"{repo}: has no checkpoint in safetensors format", "Give another repository.")
    shown = ", ".join(f"hf://{repo}/{name}" for name in files[:4])
    raise HubError(f"{repo}: has {len(files)} checkpoints", f"Choose one: {shown}{', …' if len(files) > 4 else ''}.")


def _list_files(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """List the files of a repository, and tell whether only the cache could be asked."""
    from huggingface_hub import HfApi, constants, errors

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().list_repo_files(repo, revision=revision), False
        except errors.HfHubHTTPError:  # an answer
            raise
        except connection_errors():
            pass  # as hf_hub_download does
    return _list_cached_files(repo, revision), True


def _list_cached_files(repo: str, revision: str | None) -> list[str]:
    """List the files of a repository as of the last time that the Hub was asked."""
    import huggingface_hub
    from huggingface_hub import errors

    # Clients from 2.0 on keep a list; to them a snapshot without some of the files is incomplete.
    listing = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listing is not None:
        with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
            return [file.path for file in listing(repo, revision=revision)]
    folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
