"""What was measured of ratios, as a sentence: a model is better or worse only where its interval says so."""

import math
from collections.abc import Mapping
from typing import Final

from crdiff_export.formats.text import plural, printable

_NUMBERS: Final = ("pruned", "dense", "prompts", "poa", "poa_low", "poa_high")


def evidence_text(values: Mapping[str, object]) -> str:
    """Describe a measurement in one sentence.

    Args:
        values: The values of `[variant.evidence]` in a recipe, or of `crdiff.evidence.*` in a header, where all are
            text and may be anything.

    Returns:
        Such as "no difference shown: pruned against dense -0.002 (95 %: -0.013 to +0.007), 162 prompts, scorer demo".
        Without the scores of both models, the values as they are.
    """
    numbers = {key: _number(values.get(key)) for key in _NUMBERS}
    pruned, dense, poa, prompts = (numbers[key] for key in ("pruned", "dense", "poa", "prompts"))
    if pruned is None or dense is None:
        return printable(", ".join(f"{key} {values[key]}" for key in sorted(values)))
    parts = [_difference("pruned", pruned - dense, _interval(values.get("interval")))]
    if poa is not None:
        low, high = numbers["poa_low"], numbers["poa_high"]
        parts.append(_difference("POA", poa - dense, None if low is None or high is None else (low, high)))
    count = [plural(int(prompts), "prompt")] if prompts is not None and prompts == int(prompts) else []
    scorer = [f"scorer {printable(str(values['scorer']))}"] if "scorer" in values else []
    return ", ".join(["; ".join(parts), *count, *scorer])


def poa_note(values: Mapping[str, object]) -> str:
    """Say what was measured of POA at the recommended weight, to stand behind that weight.

    Args:
        values: As in `evidence_text`.

    Returns:
        Such as " (not shown to help)"; empty where POA was not measured, or is better.
    """
    poa, dense, low, high = (_number(values.get(key)) for key in ("poa", "dense", "poa_low", "poa_high"))
    if poa is None or dense is None or low is None or high is None or low > 0:
        return ""
    return " (worse than dense, as measured)" if high < 0 else " (not shown to help)"


def decimals(width: float) -> int:
    """Return the decimals that show two digits of an interval of this width: a scorer's scale may be small."""
    return min(9, max(3, 2 - math.ceil(math.log10(width)))) if width > 0 else 3


def _difference(name: str, change: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"no interval: {name} against dense {change:+.3g}"
    low, high = interval
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    form = f"+.{decimals(high - low)}f"
    return f"{verdict}: {name} against dense {change:{form}} (95 %: {low:{form}} to {high:{form}})"


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _interval(value: object) -> tuple[float, float] | None:
    """Read the ends of an interval: two numbers, or text such as `[-0.1, 0.2]`."""
    ends = value.strip("[]()").split(",") if isinstance(value, str) else value
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = map(_number, ends)
    return None if low is None or high is None else (low, high)
