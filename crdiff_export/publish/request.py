"""Push one baked checkpoint to the Hub: check that it may go there, then send it."""

import re
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.errors import OptionError
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.progress import Progress
from crdiff_export.publish import licence, target
from crdiff_export.publish.card import Origin
from crdiff_export.publish.commit import Pushed
from crdiff_export.publish.commit import push as send
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import Upload, collect, open_whole

# huggingface_hub's REPO_ID_REGEX, with an owner: a push without one would go to whoever the token belongs to.
_REPO = re.compile(r"[\w-][\w.-]*/\w[\w.-]*", re.ASCII)
# What git can call a branch or a tag (git-check-ref-format), as far as anybody would.
_REF = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)|[./]$))[\w+][\w+./@=-]*", re.ASCII)
# huggingface_hub's FORBIDDEN_FOLDERS, and what is no name of a file.
_NOT_NAMES = ("", ".", "..", ".git", ".cache")


@dataclass(frozen=True, slots=True)
class PushRequest:
    """Where something is to go, and how. `private` None leaves it to the base's licence.

    `path` is that in the repository: of a file its name by default, of a folder the root. `base_model` is the Hub id of
    a base that was a local file.
    """

    repo: str
    path: str | None = None
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    tag: str | None = None
    private: bool | None = None
    base_model: str | None = None
    relation: str = "finetune"


def check_request(request: PushRequest) -> None:
    """OptionError for what no Hub could do; asks nobody."""
    if not _REPO.fullmatch(request.repo):
        raise OptionError(f"{request.repo!r} is not a repository", "Write ORG/NAME.")
    if request.base_model and not _REPO.fullmatch(request.base_model):
        raise OptionError(f"{request.base_model!r} is not a repository", "Write --base-model ORG/NAME.")
    if request.create_pr and request.revision:
        raise OptionError("--create-pr and --revision do not go together", "A pull request is one against main.")
    if request.create_pr and request.tag:
        raise OptionError("--create-pr and --tag do not go together", "Tag the commit when the request is merged.")
    for option, name in (("--revision", request.revision), ("--tag", request.tag)):
        if name and not _REF.fullmatch(name):
            raise OptionError(f"{option} {name!r} is not a name for it", "Use letters, digits, and - . _ / in between.")
    if request.message and not request.message.strip():
        raise OptionError("--message says nothing", "Leave it out, or say what is new.")
    if request.path:
        _check_path(request.path, folder=request.path.endswith("/"))


def place(request: PushRequest, path: Path) -> str:
    """Where what is at `path` goes in the repository; OptionError where it cannot, asking nobody."""
    wanted = request.path if request.path is not None else "" if path.is_dir() else path.name
    if path.is_dir():
        return wanted
    wanted += path.name if wanted.endswith("/") else ""
    if not wanted.endswith(".safetensors"):
        hint = f"Write {wanted or path.stem}.safetensors, or {wanted}/ for a folder." if wanted else "Leave it out."
        raise OptionError(f"{wanted!r} is not a name for a safetensors file", hint)
    _check_path(wanted)
    return wanted


def _check_path(path: str, *, folder: bool = False) -> None:
    parts = path.split("/")[: -1 if folder else None]
    if not path.isprintable() or "\\" in path or any(part in _NOT_NAMES for part in parts):
        raise OptionError(f"{path!r} is not a path in a repository", "Write it like folder/name.safetensors.")


def prepare(request: PushRequest, source_name: str, name: str) -> Destination:
    """Make sure that the Hub will take `name`, made from the base `source_name`, before anything heavy is done."""
    check_request(request)
    why = None
    if request.private is None:
        origin = Origin.parse(source_name)
        base, _ = licence.look_up(origin.repo if origin else request.base_model)
        why = licence.why_private(base)
    # The same for an export, which does not know yet whether it will be a file.
    title = _message(request, name.removesuffix(".safetensors")).partition("\n")[0] if request.create_pr else None
    wanted = Destination(request.repo, request.revision or target.MAIN, title)
    private = request.private if request.private is not None else why is not None
    return target.prepare(wanted, private=private, why_private=why)


def upload(request: PushRequest, path: Path, progress: Progress, *, checked: bool = False) -> Upload:
    """What is to be sent: the files at `path`, hashed, and held against their headers' hashes unless `checked`."""
    wanted = place(request, path)
    files = collect(path, wanted, progress, checked=checked)
    for name in files:
        _check_path(name)
    message = _message(request, wanted or path.name)
    return Upload(files, message, request.base_model, request.relation, request.tag)


def _message(request: PushRequest, name: str) -> str:
    return (request.message or "").strip() or f"Upload {name} with crdiff"


def source_name(path: Path) -> str:
    """What the header of a baked checkpoint calls its base; CheckpointError for one that is not baked."""
    checkpoint = open_whole(path)
    return Stamp.from_metadata(checkpoint.metadata, str(path)).source_name


__all__ = ["PushRequest", "Pushed", "check_request", "place", "prepare", "send", "source_name", "upload"]
