"""Escape any text for its place in a card: a Markdown line, a literal in code, a word in a shell, a link."""

import re
import shlex
from urllib.parse import quote

HUB = "https://huggingface.co"
# A character reference is never markup (CommonMark 2.5), and GFM's tables do not split cells at one.
_MARKUP = {ord(char): f"&#{ord(char)};" for char in "\\`*[]|~$<>"} | {ord("&"): "&amp;"}
# Characters that both an address and a Markdown link's destination may have.
_IN_ADDRESSES = "/:?#@!$&*+,;=%~"
# An underscore between letters or digits is never markup.
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def prose(text: str, limit: int = 300) -> str:
    """Escape a text for one line of Markdown or a table's cell, so that nothing in it is markup."""
    line = " ".join(text.split())
    short = line if len(line) <= limit else f"{line[:limit]}…"
    return _EMPHASIS.sub("&#95;", _printable(short).translate(_MARKUP))


def quoted(text: str) -> str:
    """Return the text as a string literal for Python and YAML alike."""
    return '"' + _printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def word(text: str) -> str:
    """Return the text as one word for a shell."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + _printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"  # bash, zsh


def page(repo: str, path: str = "", revision: str = "main") -> str:
    """Return the address of a repository's page on the Hub, or of a file in it."""
    return f"{HUB}/{_address(repo)}" + (f"/blob/{quote(revision, safe='')}/{_address(path)}" if path else "")


def image(text: str, repo: str, path: str, revision: str) -> str:
    """Return a Markdown image of a file in a repository."""
    address = page(repo, path, revision).replace("/blob/", "/resolve/", 1)
    return f"![{prose(text)}]({quote(address, safe=_IN_ADDRESSES)})"


def link(text: str, address: str) -> str:
    """Return a Markdown link."""
    return f"[{prose(text)}]({quote(address, safe=_IN_ADDRESSES)})"


def _address(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="/")


def _printable(text: str) -> str:
    """Escape characters that cannot be seen, or that reorder the text around them."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "\\n"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
