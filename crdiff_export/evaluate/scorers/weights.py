"""What the scorers with a neural network share: published weights, where they come from, and the libraries for them.

Every repository is pinned to a commit, so that a score can be computed again. `crdiff_export.hub` fetches its files
into the Hub client's cache.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.errors import CheckpointError, HubError, ScorerError
from crdiff_export.formats import torch_zip
from crdiff_export.formats.text import did_you_mean, printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGES: Final = ("torch", "transformers", "tokenizers", "numpy", "Pillow")
# The errors of the Hub client for a file that is not in its cache and cannot be fetched.
_NOT_HERE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled")


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of the Hub at one commit."""

    id: str
    commit: str

    def __str__(self) -> str:
        return f"{self.id}@{self.commit}"


def fetch(repo: Repo, file: str | None) -> Path:
    """Return the path of a file in the Hub client's cache, after a download if need be.

    Args:
        repo: The repository.
        file: A file of it, or None for its small files: configurations and vocabularies.

    Returns:
        The file, or the folder of the small files.

    Raises:
        HubError: It is not in the cache and cannot be fetched; the hint says what to do.
    """
    from crdiff_export import hub
    from crdiff_export.hub.location import HubLocation

    try:
        location = HubLocation(repo.id, file, repo.commit)
        return hub.fetch(location) if file else hub.fetch_parts(location)
    except HubError as error:
        if type(error.__cause__).__name__ not in _NOT_HERE:
            raise
        wanted = f" '{file}'" if file else " --include '*.json' --include '*.txt'"
        hint = f"Run `hf download {repo.id}{wanted} --revision {repo.commit}` where there is a connection, or unset "
        raise HubError(error.message, f"{hint}HF_HUB_OFFLINE; then it is taken from the cache.") from error


def sha256(path: Path) -> str:
    """Return a weight file's SHA-256 in hex: what the cache knows of it, or else read from the file."""
    from crdiff_export import hub
    from crdiff_export.formats.hashing import hash_file
    from crdiff_export.progress import Silent

    return hub.cached_hashes(path).get(path.name) or hash_file(path, Silent())


def transformers() -> Any:
    """Import the library; ScorerError where it is not installed, or broken."""
    try:
        return import_module("transformers")
    except ImportError as error:
        message = f"this scorer needs transformers and torch: {error}"
        raise ScorerError(message, '`python -m pip install "transformers>=5"`.') from error


def place(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """Return torch's device and dtype; PlanError for a device that is not there, ScorerError for an unknown dtype."""
    transformers()
    import torch

    from crdiff_export.sampling import session

    if dtype not in session.DTYPES:
        hint = did_you_mean(dtype, tuple(session.DTYPES), "dtypes")
        raise ScorerError(f"a scorer cannot compute in {dtype!r}", hint)
    return torch.device(session.choose_device(device, offload=False)), session.DTYPES[dtype]


def quiet() -> contextlib.AbstractContextManager[None]:
    """Silence transformers inside the block; ScorerError where it is not installed."""
    from crdiff_export.sampling.quiet import quiet_libraries

    transformers()
    return quiet_libraries("transformers")


def read_pickle(path: Path) -> "dict[str, Tensor]":
    """Read the tensors of a torch pickle as data: nothing in it is run, whatever it names."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    tensors: dict[str, Tensor] = {}
    try:
        source = torch_zip.open_pickle(path)
        with contextlib.closing(source.open()) as reader:
            for spec in source.tensors:
                data = bytearray(spec.end - spec.start)
                reader.read_into(spec.start, memoryview(data))
                tensors[spec.name] = torch.frombuffer(data, dtype=dtypes[spec.dtype]).reshape(spec.shape)
    except (CheckpointError, KeyError, OSError) as error:
        why = error.message if isinstance(error, CheckpointError) else f"{path}: a tensor is {error}"
        raise ScorerError(
            why, "The download did not finish, or it is another file; delete it and run again."
        ) from error
    return tensors


def fill(module: "torch.nn.Module", tensors: "Mapping[str, Tensor]", source: str) -> None:
    """Copy tensors into a module's parameters, one for each; ScorerError if one is missing, left over or misshapen."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise other_weights(source, " ".join(str(error).split())) from error


def other_weights(source: str, problem: str) -> ScorerError:
    """Make the error for weights that do not belong to a model."""
    message = f"{source}: not the weights that belong here: {printable(problem, limit=1000)}"
    return ScorerError(message, "Delete the file from the cache, and run this again.")


def fingerprint(name: str, device: str, dtype: str, **more: str) -> dict[str, str]:
    """Return the record of a scorer: its name, facts of its own, where it computes, and its libraries' versions."""
    versions = {package.lower(): version(package) for package in PACKAGES}
    return {"name": name, **more, "device": device.partition(":")[0], "dtype": dtype, **versions}
