"""Parse the text of a criterion: `NAME[:option=value[,option=value]]`, such as `wanda:compare=row`.

Names are the built-in ones and those of the entry-point group `crdiff.criteria`; another package cannot replace a
built-in name. This module imports no criterion.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import OptionError
from crdiff_export.formats.text import did_you_mean

if TYPE_CHECKING:
    from typing import Self

GROUP: Final = "crdiff.criteria"
# Criteria that rank by |w| and have thresholds instead of scores.
MAGNITUDES: Final = ("magnitude", "uniform")
SCORED: Final = {
    "random": "crdiff_export.prune.criteria.random:random",
    "wanda": "crdiff_export.prune.criteria.wanda:wanda",
    "taylor": "crdiff_export.prune.criteria.taylor:taylor",
    "obs": "crdiff_export.prune.criteria.obs:obs",
    "adverse": "crdiff_export.prune.criteria.adverse:adverse",
}


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its default, and its valid values, or a description of them and a function that spells one."""

    default: str
    values: tuple[str, ...] = ()
    what: str = ""
    spell: Callable[[str], str] = str

    def __str__(self) -> str:
        return "|".join(self.values) or self.what


def _whole(text: str) -> str:
    number = int(text)
    if not 0 <= number < 1 << 63:
        raise ValueError(text)
    return str(number)


def _positive(text: str) -> str:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return repr(number)


COMPARE: Final = Option("block", ("block", "row"))
OPTIONS: Final[Mapping[str, Mapping[str, Option]]] = {
    "magnitude": {},
    "uniform": {},
    "random": {"compare": COMPARE, "seed": Option("0", what="a whole number from 0 on", spell=_whole)},
    "wanda": {"compare": COMPARE},
    "taylor": {"compare": COMPARE, "form": Option("square", ("square", "abs"))},
    "obs": {
        "compare": Option("block", ("block", "row", "layer")),
        "compensate": Option("on", ("on", "off")),
        "damping": Option("0.01", what="a number above 0", spell=_positive),
    },
    "adverse": {
        "compare": COMPARE,
        "form": Option("small", ("small", "steady", "signed", "guarded", "second", "channel", "coin")),
    },
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A criterion's name and its options; `str` is its canonical spelling, which leaves defaults out."""

    name: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Self":
        """Parse the text of a criterion.

        For another package's criterion only `compare` is checked here; its factory checks the other options.

        Raises:
            OptionError: The name, an option or a value is unknown.
        """
        name, colon, rest = text.strip().partition(":")
        if name not in OPTIONS and name not in installed():  # installed() looks at every package, which takes time
            what = f"no criterion is called {name!r}" if name else f"{text!r} has no name of a criterion"
            raise OptionError(what, did_you_mean(name, names(), "criteria"))
        given: dict[str, str] = {}
        for part in rest.split(",") if colon else ():
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not (key and equals and value):
                raise OptionError(f"{text!r}: {part!r} is not option=value", _takes(name))
            if key in given:
                raise OptionError(f"{text!r}: {key} is given twice", "Give it once.")
            given[key] = _value(name, key, value)
        options = {key: option.default for key, option in _options(name).items()} | given
        if options.get("compare") == "layer" and options["compensate"] == "off":
            raise OptionError(
                f"{name}: compare=layer chooses while it compensates, so compensate=off is not for it",
                f"Leave one of the two out, as in {name}:compare=layer.",
            )
        return cls(name, options)

    def __str__(self) -> str:
        defaults = {(key, option.default) for key, option in _options(self.name).items()}
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items() - defaults))
        return f"{self.name}:{options}" if options else self.name

    @property
    def values(self) -> dict[str, str]:
        """The options for the factory: all but `compare`, which does not concern scores."""
        return {key: value for key, value in self.options.items() if key != "compare"}


def names() -> tuple[str, ...]:
    """Return all names, the built-in ones first."""
    return (*MAGNITUDES, *SCORED, *sorted(installed()))


def installed() -> dict[str, EntryPoint]:
    """Return the criteria of other packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in OPTIONS}


def _options(name: str) -> Mapping[str, Option]:
    return OPTIONS.get(name, {"compare": COMPARE})


def _value(name: str, key: str, value: str) -> str:
    """Return the canonical spelling of an option's value."""
    option = _options(name).get(key)
    if option is None:
        if name not in OPTIONS:
            return value
        raise OptionError(f"{name} has no option {key!r}", _takes(name))
    try:
        spelt = option.spell(value)
    except ValueError:
        spelt = ""
    if not spelt or (option.values and spelt not in option.values):
        raise OptionError(
            f"{name}: {key} is {' or '.join(option.values) or option.what}, not {value!r}",
            f"Write {name}:{key}={option.default}, or leave it out.",
        )
    return spelt


def _takes(name: str) -> str:
    options = [f"{key}={option}" for key, option in _options(name).items()]
    if name not in OPTIONS:
        options.append("what its package says")
    return f"Options of {name}: {', '.join(options) or 'none'}."
