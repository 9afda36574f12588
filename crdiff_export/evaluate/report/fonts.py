"""Fonts for any prompt: Pillow's own, which has ASCII and little else, or one of the system's that has the letters."""

from collections.abc import Iterator
from functools import cache
from math import ceil

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

# Common ones of Linux, Windows and macOS with many scripts; Pillow looks for them in the system's folders.
SYSTEM = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "wqy-microhei.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
    "Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc",
)  # fmt: skip
# No letter, so every font shows its mark for one that it lacks.
_NONE = "\uffff"
_PROBE = 16


def pick(text: str) -> str:
    """The name of a font that has every letter of a text; where there is none, of the one that has the most."""
    letters = frozenset(text) - {" "}
    lacking = {name: sum(not _has(name, letter) for letter in letters) for name in _until_all(letters)}
    return min(lacking, key=lambda name: lacking[name])


def lacks(text: str) -> bool:
    """Whether the font for a text has marks in place of some of its letters."""
    chosen = pick(text)
    return not all(_has(chosen, letter) for letter in frozenset(text) - {" "})


@cache
def load(name: str, size: int) -> FreeTypeFont:
    """A font that `pick` has named."""
    if name:
        # The basic layout is the same whether libraqm is installed or not.
        return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
    built_in = ImageFont.load_default(size)
    assert isinstance(built_in, FreeTypeFont)
    return built_in


def width(text: str, size: int) -> int:
    """The width of a line in pixels."""
    return ceil(load(pick(text), size).getlength(text))


def _until_all(letters: frozenset[str]) -> Iterator[str]:
    """The fonts there are, up to one that has all letters; the built-in one is called by no name."""
    yield ""
    for name in ("", *_installed(SYSTEM)):
        yield name
        if all(_has(name, letter) for letter in letters):
            return


@cache
def _installed(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if _is_there(name))


def _is_there(name: str) -> bool:
    try:
        ImageFont.truetype(name, _PROBE)
    except OSError:
        return False
    return True


@cache
def _has(name: str, letter: str) -> bool:
    chosen = load(name, _PROBE)
    return _mask(chosen, letter) != _mask(chosen, _NONE)


def _mask(chosen: FreeTypeFont, letter: str) -> bytes:
    return bytes(chosen.getmask(letter))
