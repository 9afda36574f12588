"""Anybody's text, made fit for a place in a card: a Markdown line, a literal in code, a word in a shell, a link."""

import re
import shlex
from urllib.parse import quote

HUB = "https://huggingface.co"
# A character reference is never markup (CommonMark 2.5), and GFM's tables do not split cells at one.
_MARKUP = {ord(char): f"&#{ord(char)};" for char in "\\`*[]|~$<>"} | {ord("&"): "&amp;"}
# What an address may have and a link's destination as well: no brackets, quotes, spaces or pipes.
_IN_ADDRESSES = "/:?#@!$&*+,;=%~"
# Between letters or digits an underscore is only itself.
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def prose(text: str, limit: int = 300) -> str:
    """The text as it reads, on one line of Markdown or in a table's cell: nothing in it is markup."""
    line = " ".join(text.split())
    short = line if len(line) <= limit else f"{line[:limit]}…"
    return _EMPHASIS.sub("&#95;", _printable(short).translate(_MARKUP))


def quoted(text: str) -> str:
    """The text as a string literal that means the same in Python and in YAML."""
    return '"' + _printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def word(text: str) -> str:
    """The text as one word for a shell."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + _printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"  # bash, zsh


def page(repo: str, path: str = "", revision: str = "main") -> str:
    """The address of a repository's page on the Hub, or of a file in it."""
    return f"{HUB}/{_address(repo)}" + (f"/blob/{quote(revision, safe='')}/{_address(path)}" if path else "")


def link(text: str, address: str) -> str:
    """A Markdown link that shows the text."""
    return f"[{prose(text)}]({quote(address, safe=_IN_ADDRESSES)})"


def _address(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="/")


def _printable(text: str) -> str:
    """Escapes in place of what cannot be seen, or would reorder what is seen around it."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "\\n"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
