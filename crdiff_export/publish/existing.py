"""Find out what the Hub and the disk hold of a plan's variants already."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from crdiff_export.errors import CheckpointError, CrdiffError, HubError, PlanError
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.crdiff_keys import Stamp, is_baked
from crdiff_export.formats.hashing import git_id, hash_file
from crdiff_export.hub import repository
from crdiff_export.hub.repository import RemoteFile
from crdiff_export.packs import PackHeader, open_pack
from crdiff_export.progress import Silent
from crdiff_export.publish.headers import MadeHeader, remote_headers
from crdiff_export.publish.plan_file import PlanFile
from crdiff_export.publish.target import Destination, find_pull_request


@dataclass(frozen=True, slots=True)
class Existing:
    """What exists of a variant, on the Hub or on the disk.

    Attributes:
        stamps: Its headers, in the order of the files' names.
        files: The files by their names in its folder; a variant that is one file has the name "".
    """

    stamps: tuple[Stamp, ...] = ()
    files: Mapping[str, RemoteFile | Path] = field(default_factory=dict)

    def has_content(self, name: str, content: str | None) -> bool:
        """Compare a file with a `RemoteFile.content`: a SHA-256 or git's id. Without one the file counts as equal."""
        file = self.files[name]
        if content is None:
            return True
        if isinstance(file, RemoteFile):
            return content == file.content
        return content == (hash_file(file, Silent()) if len(content) == 64 else git_id(file))


@dataclass(frozen=True, slots=True)
class HubBranch:
    """A branch of a repository: its commit, its files, and the headers of the plan's variants there, by path."""

    commit: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    headers: Mapping[str, MadeHeader] = field(default_factory=dict)

    def at(self, path: str, names: Sequence[str]) -> Existing:
        """Return what it holds of a variant; `names` are those of the variant's weights."""
        folder = f"{path}/"
        files = {name.removeprefix(folder): file for name, file in self.files.items() if name.startswith(folder)}
        if path in self.files:
            files[""] = self.files[path]
        headers = (self.headers.get(folder + name if name else path) for name in names)
        return Existing(tuple(header for header in headers if isinstance(header, Stamp)), files)

    def pack_at(self, path: str) -> PackHeader | None:
        """Return the header of the pack that it holds at a path; None if there is no pack."""
        header = self.headers.get(path)
        return header if isinstance(header, PackHeader) else None


class HubBranches:
    """The branches that a plan names; the Hub is asked once about each."""

    def __init__(self, plan: PlanFile, pull_request: str | None) -> None:
        """Prepare; with `pull_request`, a title, our open pull requests take the place of the branches."""
        self._plan, self._pull_request = plan, pull_request
        self._branches: dict[Destination, HubBranch | HubError] = {}

    def read(self, destination: Destination) -> HubBranch:
        """Read a branch; empty if it or its repository is yet to be made. Raises HubError, each time."""
        if destination not in self._branches:
            try:
                self._branches[destination] = self._read(destination)
            except HubError as error:
                missing = type(error.__cause__).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError")
                self._branches[destination] = HubBranch() if missing else error
        branch = self._branches[destination]
        if isinstance(branch, HubError):
            raise branch
        return branch

    def _read(self, destination: Destination) -> HubBranch:
        revision = destination.revision
        if self._pull_request:
            request = find_pull_request(replace(destination, pull_request=self._pull_request))
            revision = str(request.git_reference) if request else revision
        remote = repository.read(destination.repo, revision)
        names = {entry.path for entry in self._plan.entries if entry.repo == destination.repo}
        folders = tuple(f"{name.removesuffix('.safetensors')}/" for name in names)
        paths = [path for path in remote.files if path in names or path.startswith(folders)]
        return HubBranch(remote.commit, remote.files, remote_headers(remote, paths))


def read_local_output(target: Path) -> Existing:
    """Read what an earlier run left; PlanError for something that crdiff did not make, which is not replaced."""
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return Existing()
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}", "Give another name, or another -o.") from error
    try:
        checkpoint = open_checkpoint(target)
        if all(is_baked(file.metadata) for file in checkpoint.files):
            stamps = (Stamp.from_metadata(file.metadata, str(file.path)) for file in checkpoint.files)
            return Existing(tuple(stamps), {str(name): target / name for name in checkpoint.companions})
    except CheckpointError:
        pass
    raise _not_ours(target)


def read_local_pack(target: Path) -> PackHeader | None:
    """Read the pack that an earlier run left, if any; PlanError for anything else, which is not replaced."""
    if not os.path.lexists(target):
        return None
    try:
        return open_pack(target).header
    except CrdiffError as error:
        raise _not_ours(target) from error


def _not_ours(target: Path) -> PlanError:
    return PlanError(f"{target}: not made by crdiff, and so not replaced", "Remove it, or give another -o.")
