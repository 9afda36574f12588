"""Push one baked checkpoint or pack to the Hub: check the request, prepare the repository, collect and send files."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from crdiff_export.errors import OptionError
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.hashing import hash_file
from crdiff_export.formats.text import amount
from crdiff_export.hub.location import REF, is_repo_id, parse_uri
from crdiff_export.packs import SUFFIX, is_pack, open_pack
from crdiff_export.progress import Progress, Silent
from crdiff_export.publish import target
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import LocalFile, Upload, collect, open_whole
from crdiff_export.publish.variants import sheet_path

# huggingface_hub's FORBIDDEN_FOLDERS, and parts that are no names of files.
_NOT_NAMES = ("", ".", "..", ".git", ".cache")
# The first and last bytes of a PNG file: signature and header chunk, and the chunk that ends it (ISO/IEC 15948).
_BEGINS, _ENDS = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"
# Ours: what a visitor of a card downloads without being asked.
LARGEST_SHEET = 20_000_000
NO_PICTURE = "Push the picture with the exported file of its size."


@dataclass(frozen=True, slots=True)
class PushRequest:
    """A push that somebody wants.

    Attributes:
        repo: The repository, ORG/NAME.
        path: The path in the repository. Default: the name of a file, the root for a folder.
        revision: The branch; None for main.
        create_pr: Whether to commit to a pull request.
        message: The message of the commit.
        tag: The tag to set.
        private: Whether to create a private repository; None to decide by the base's licence.
        base_model: The Hub id of a base that was a local file.
        relation: The Hub's `base_model_relation`.
        sheet: A picture for the card, as `crdiff preview` draws it; a PNG file.
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
    sheet: Path | None = None


def check_request(request: PushRequest) -> None:
    """Refuse what no Hub could do, without asking the Hub.

    Args:
        request: The push.

    Raises:
        OptionError: If the request cannot be right.
    """
    if not is_repo_id(request.repo):
        page = re.match(r"(?:https?://[^/@]+|hf:/)/(?:models/)?([\w.-]+/[\w.-]+)/?$", request.repo)
        raise OptionError(f"{request.repo!r} is not a repository", f"Write {page[1] if page else 'ORG/NAME'}.")
    if request.base_model and not is_repo_id(request.base_model):
        raise OptionError(f"{request.base_model!r} is not a repository", "Write --base-model ORG/NAME.")
    if request.create_pr and request.revision:
        raise OptionError("--create-pr and --revision do not go together", "A pull request is one against main.")
    if request.create_pr and request.tag:
        raise OptionError("--create-pr and --tag do not go together", "Tag the commit when the request is merged.")
    for option, name in (("--revision", request.revision), ("--tag", request.tag)):
        if name and not REF.fullmatch(name):
            raise OptionError(f"{option} {name!r} is not a name for it", "Use letters, digits, and - . _ / in between.")
    if request.message and not request.message.strip():
        raise OptionError("--message says nothing", "Leave it out, or say what is new.")
    if request.path:
        _check_path(request.path, folder=request.path.endswith("/"))
    if request.sheet:
        _check_sheet(request.sheet)


def check_sheet_of(request: PushRequest, path: Path) -> None:
    """Refuse a picture for a pack, which holds many sizes and has no place for one.

    Args:
        request: The push.
        path: The file or folder here.

    Raises:
        OptionError: There is a picture, and the path names a pack.
    """
    if request.sheet and is_pack(path):
        raise OptionError(f"--sheet {request.sheet}: shows one size, {path.name} is a pack of several", NO_PICTURE)


def _check_sheet(sheet: Path) -> None:
    hint = "Draw one with `crdiff preview BASE --baked FILE --prompt TEXT -o sheet.png`."
    try:
        with sheet.open("rb") as file:
            size = sheet.stat().st_size
            begins = file.read(len(_BEGINS))
            file.seek(max(size - len(_ENDS), 0))
            ends = file.read(len(_ENDS))
    except OSError as error:
        raise OptionError(f"{sheet}: cannot be read: {error.strerror}", hint) from error
    if (begins, ends) != (_BEGINS, _ENDS):
        raise OptionError(f"{sheet}: not a whole PNG file", hint)
    if size > LARGEST_SHEET:
        raise OptionError(f"{sheet}: {amount(size)}, which is too large for a card", "Draw fewer prompts.")


def path_in_repository(request: PushRequest, path: Path) -> str:
    """Decide where a file or folder goes in the repository, without asking the Hub.

    Args:
        request: The push.
        path: The file or folder here.

    Returns:
        The path; "" for the root.

    Raises:
        OptionError: If it cannot go there.
    """
    if path.is_dir():
        return request.path or ""
    wanted = request.path if request.path is not None else path.name
    wanted += path.name if wanted.endswith("/") else ""
    ending, kind = (SUFFIX, "pack") if is_pack(path) else (".safetensors", "safetensors file")
    if PurePosixPath(wanted).suffix != ending:
        hint = f"Write {wanted or path.stem}{ending}, or {wanted}/ for a folder." if wanted else "Leave it out."
        raise OptionError(f"{wanted!r} is not a name for a {kind}", hint)
    _check_path(wanted)
    return wanted


def _check_path(path: str, *, folder: bool = False) -> None:
    parts = path.split("/")[: -1 if folder else None]
    if not path.isprintable() or "\\" in path or any(part in _NOT_NAMES for part in parts):
        raise OptionError(f"{path!r} is not a path in a repository", "Write it like folder/name.safetensors.")


def prepare(request: PushRequest, source_name: str, name: str) -> Destination:
    """Make sure that the Hub will take a push, before anything heavy is done.

    Args:
        request: The push.
        source_name: What the header will call the base.
        name: The name of the file or folder.

    Returns:
        Where to push.

    Raises:
        OptionError: As in `check_request`.
        HubError: If the Hub does not let the token write there.
    """
    check_request(request)
    # The same for an export, which does not know yet whether it will be a file.
    title = _message(request, name.removesuffix(".safetensors")).partition("\n")[0] if request.create_pr else None
    destination = Destination(request.repo, request.revision or target.MAIN, title)
    location = parse_uri(source_name)
    return target.prepare(destination, request.private, [location.repo if location else request.base_model])


def make_upload(request: PushRequest, path: Path, progress: Progress, *, checked: bool = False) -> Upload:
    """Collect and hash the files of a push.

    Args:
        request: The push.
        path: The file or folder here.
        progress: Told how far the hashing is.
        checked: Whether the bytes have just been written.

    Returns:
        What to push.

    Raises:
        OptionError: If a file cannot go where it is wanted.
        CheckpointError: As in `collect`.
        PackError: As in `collect`.
        VerifyError: As in `collect`.
    """
    check_sheet_of(request, path)
    wanted = path_in_repository(request, path)
    files = collect(path, wanted, progress, checked=checked)
    if request.sheet:
        stamp = next(file.header for file in files.values() if isinstance(file.header, Stamp))
        sheet = request.sheet
        _check_sheet(sheet)
        files[sheet_path(wanted, stamp.resolution)] = LocalFile(sheet, sheet.stat().st_size, hash_file(sheet, Silent()))
    for name in files:
        _check_path(name)
    message = _message(request, wanted or path.name)
    return Upload(files, message, request.base_model, request.relation, request.tag)


def _message(request: PushRequest, name: str) -> str:
    return (request.message or "").strip() or f"Upload {name} with crdiff"


def read_source_name(path: Path) -> str:
    """Read what the header of a baked checkpoint or of a pack calls its base.

    Raises:
        CheckpointError: crdiff did not bake the checkpoint.
        PackError: The pack is damaged.
    """
    if is_pack(path):
        return open_pack(path).common.source_name
    checkpoint = open_whole(path)
    return Stamp.from_metadata(checkpoint.metadata, str(path)).source_name
