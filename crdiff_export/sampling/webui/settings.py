"""What a user chooses for a picture, and how the picture's infotext and the XYZ plot write it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import PoaError

if TYPE_CHECKING:
    from typing import Self

# The names in infotext.
FILE, WEIGHT, START, STOP = "CR-Diff", "CR-Diff weight", "CR-Diff start", "CR-Diff stop"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is taken for a picture.

    Attributes:
        file: The name of a baked file or pack in the UI's list; empty for none.
        weight: POA's w; None for the file's own, of a pack that of the size.
        start: The fraction of sampling at which POA begins.
        stop: The fraction at which it ends.
    """

    file: str = ""
    weight: float | None = None
    start: float = 0.0
    stop: float = 1.0

    def infotext(self) -> dict[str, str]:
        """Return the entries of the picture's infotext: what differs from the defaults."""
        numbers = {WEIGHT: (self.weight, None), START: (self.start, 0.0), STOP: (self.stop, 1.0)}
        entries = {name: f"{value:g}" for name, (value, usual) in numbers.items() if value not in (None, usual)}
        return {FILE: self.file, **entries} if self.file else {}

    @classmethod
    def from_infotext(cls, entries: Mapping[str, str]) -> "Self":
        """Read the entries of an infotext; what is missing or no number is as by default."""
        weight, start, stop = (_number(entries.get(name, "")) for name in (WEIGHT, START, STOP))
        return cls(entries.get(FILE, ""), weight, 0.0 if start is None else start, 1.0 if stop is None else stop)

    def changed(self, field: str, text: str) -> "Self":
        """Return the settings with the value of an axis of the XYZ plot.

        Args:
            field: `file`, `weight`, `start` or `stop`.
            text: The value as the user wrote it; for the weight, `file` or nothing is the file's own.

        Returns:
            New settings.

        Raises:
            PoaError: The text is no number where there has to be one.

        """
        text = text.strip()
        if field == "file":
            return replace(self, file="" if text == "None" else text)
        if field == "weight" and text in ("", "file"):
            return replace(self, weight=None)
        number = _number(text)
        if number is None:
            raise PoaError(f"{text!r} is no number for CR-Diff's {field}", "Write numbers, such as 1.5.")
        changes: dict[str, Any] = {field: number}
        return replace(self, **changes)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
