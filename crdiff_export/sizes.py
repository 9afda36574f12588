"""Image sizes in pixels: their limits, and the grid that a model's latents impose."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import OptionError, RecipeError

if TYPE_CHECKING:
    from typing import Self

MAX_SIDE: Final = 16384


@dataclass(frozen=True, slots=True)
class Size:
    """An image size in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> "Self":
        """Read `2048`, a square, or `400x560`.

        Raises:
            RecipeError: The text is no size, or a side is 0 or larger than MAX_SIDE.

        """
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*[xX\u00d7]\s*([0-9]{1,9}))?\s*", text)
        if not match:
            hint = "Write one side, as in 2048, or width x height, as in 400x560."
            raise RecipeError(f"{text[:40]!r} is not a size", hint)
        size = cls(int(match[1]), int(match[2] or match[1]))
        if not (1 <= size.width <= MAX_SIDE and 1 <= size.height <= MAX_SIDE):
            raise RecipeError(f"{size} is not a usable size", f"Each side must be 1 to {MAX_SIDE} pixels.")
        return size

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        """How many pixels it has."""
        return self.width * self.height

    def is_far_below(self, other: "Size") -> bool:
        """Whether it has at most 0.6 times the pixels of another size, a bound of our own."""
        return 5 * self.pixels <= 3 * other.pixels

    def is_far_above(self, other: "Size") -> bool:
        """Whether it has at least 1.5 times the pixels of another size, a bound of our own."""
        return 2 * self.pixels >= 3 * other.pixels


def check_grid(target: Size, grid: int, title: str) -> None:
    """Refuse a size that the model's latents cannot have.

    Args:
        target: The size that is wanted.
        grid: Pixels of which each side must be a multiple.
        title: The model family's name, for the message.

    Raises:
        OptionError: A side is no multiple of the grid; the hint names the nearest size that fits.

    """
    fit = Size(*(max(1, (side + grid // 2) // grid) * grid for side in (target.width, target.height)))
    if fit != target:
        raise OptionError(f"{target} does not fit {title}'s latent grid (multiples of {grid})", f"Use {fit}.")
