"""Short text files that people write: read whole, decoded as UTF-8, bounded in size."""

from pathlib import Path

from crdiff_export.errors import CrdiffError

MAX_BYTES = 1 << 20


def read_text_file(path: Path, kind: str, hint: str, error_type: type[CrdiffError]) -> str:
    """Read a text file of at most 1 MiB.

    Args:
        path: The file.
        kind: What the file should be, such as `recipe`, for messages.
        hint: What to do where it is missing, a folder or unreadable.
        error_type: The class of the error.

    Returns:
        The text, without a byte order mark.

    Raises:
        CrdiffError: An `error_type`; the file is missing, a folder, unreadable, too large or not UTF-8.

    """
    try:
        if path.is_dir():
            raise error_type(f"{path}: a folder, not a {kind} file", hint)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise error_type(f"{path}: more than 1 MiB, too large for a {kind} file", hint)
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise error_type(f"{path}: no such {kind} file", hint) from error
    except OSError as error:
        raise error_type(f"{path}: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: not UTF-8 at byte {error.start}", "Save it as UTF-8 text.") from error
