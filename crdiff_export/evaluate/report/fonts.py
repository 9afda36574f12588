"""Fonts for any prompt: Pillow's own, which has little but ASCII, or a font of the system that has the letters."""

from functools import cache
from math import ceil

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

# Common fonts of Linux, Windows and macOS with many scripts; Pillow looks for them in the system's folders.
SYSTEM = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "wqy-microhei.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
    "Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc",
)  # fmt: skip
# Pillow's own font has no file; it goes by an empty name.
BUILT_IN = ""
# This code point is no letter, so every font draws its mark for a missing letter.
_NO_LETTER = "\uffff"
_PROBE_SIZE = 16


def pick(text: str) -> str:
    """Return the name of the first font that has all letters of a text, or else of the font that lacks the fewest."""
    if not _missing(BUILT_IN, text):
        return BUILT_IN
    return min((BUILT_IN, *filter(_is_installed, SYSTEM)), key=lambda name: _missing(name, text))


def lacks(text: str) -> bool:
    """Say whether even the best font draws a mark in place of some letter of a text."""
    return _missing(pick(text), text) > 0


@cache
def load(name: str, size: int) -> FreeTypeFont:
    """Load a font that `pick` has named, with letters of `size` pixels."""
    if name:
        # The basic layout is the same whether libraqm is installed or not.
        return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
    built_in = ImageFont.load_default(size)
    assert isinstance(built_in, FreeTypeFont)
    return built_in


def font_of(text: str, size: int) -> FreeTypeFont:
    """Return the best font for a text, with letters of `size` pixels."""
    return load(pick(text), size)


def width(text: str, size: int) -> int:
    """Return the width of a line in pixels."""
    return ceil(font_of(text, size).getlength(text))


@cache
def _is_installed(name: str) -> bool:
    try:
        load(name, _PROBE_SIZE)
    except OSError:
        return False
    return True


def _missing(name: str, text: str) -> int:
    """Count the different letters of a text that a font lacks."""
    return sum(not _has(name, letter) for letter in set(text) - {" "})


@cache
def _has(name: str, letter: str) -> bool:
    font = load(name, _PROBE_SIZE)
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))
