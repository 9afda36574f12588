"""Detect files that only look like checkpoints, from their first bytes."""

import codecs
from pathlib import Path

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import gguf

# The number of first bytes that `refuse_other` needs.
SIZE = 64
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins like a safetensors header: a length of at most 100 MB, then an object."""
    return start[4:9] == b"\0\0\0\0{"


def is_pickle(start: bytes) -> bool:
    """Whether a file begins like a zip archive or a bare pickle, which are what torch saves."""
    return start.startswith((b"PK\x03\x04", *_PICKLES))


def refuse_other(start: bytes, path: Path) -> None:
    """Refuse a file of a known other kind; return for a file of no known kind.

    A safetensors file can begin with the same bytes, so check `is_safetensors` first.

    Args:
        start: The first bytes of the file, `SIZE` of them if it has so many.
        path: The file, for messages.

    Raises:
        CheckpointError: The file is a GGUF file, a pickle, a Git LFS pointer, a web page or a text.
    """
    if start.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path}: a GGUF file; its weights {gguf.why_not(path)}",
            "Use the fp16 or bf16 checkpoint that it was made from.",
        )
    if is_pickle(start):
        raise CheckpointError(
            f"{path}: a pickle or zip archive under another name, not a safetensors file",
            "Rename it to .ckpt if it is a torch checkpoint; it is then read without running any code in it.",
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the checkpoint itself", "Fetch the file with `git lfs pull`."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path}: a web page, not a checkpoint",
            "The download saved a login or an error page; fetch the file again.",
        )
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return
    if len(start) >= 8 and all(letter.isprintable() or letter in "\t\r\n" or letter > "\x7f" for letter in text):
        raise CheckpointError(
            f"{path}: a text file, not a checkpoint", "Look into it: a failed download leaves its message there."
        )
