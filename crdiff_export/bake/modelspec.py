"""The ModelSpec keys for people: what a baked file is, how to use it, a date and a picture.

Format: https://github.com/Stability-AI/ModelSpec, version 1.0.1. The other `modelspec.*` keys are made in `metadata`.
"""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from crdiff_export.errors import OptionError
from crdiff_export.formats.crdiff_keys import PAPER, Stamp, safe
from crdiff_export.models.evidence_text import evidence_text

THUMBNAIL: Final = "modelspec.thumbnail"
# Says how a thumbnail was made, which the exact bytes of the picture depend on.
THUMBNAIL_ORIGIN: Final = "crdiff.thumbnail"
# A time in seconds since 1970, for outputs that are to have a date (https://reproducible-builds.org/specs).
EPOCH: Final = "SOURCE_DATE_EPOCH"
_UTC = timezone.utc  # noqa: UP017  web UIs run Python 3.10, which has no datetime.UTC


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture for the header: a JPEG file of 256x256 pixels, and how it was drawn."""

    jpeg: bytes
    origin: str


def people_keys(stamp: Stamp, inherited: Mapping[str, str], thumbnail: Thumbnail | None = None) -> dict[str, str]:
    """Make the keys for people.

    Args:
        stamp: The stamp of the export.
        inherited: The base's metadata. Its texts are kept; ours are added to them.
        thumbnail: A picture for the header, on request.

    Returns:
        The keys: never the time of the clock, so that the same export gives the same bytes.
    """
    own, usage = inherited.get("modelspec.description"), inherited.get("modelspec.usage_hint")
    keys = {
        "modelspec.description": " ".join([_description(stamp), *([f"The base: {own}"] if own else [])]),
        "modelspec.usage_hint": " ".join([*([usage] if usage else []), _usage(stamp)]),
    }
    if (moment := date()) is not None:
        keys["modelspec.date"] = moment
    if thumbnail:
        picture = base64.b64encode(thumbnail.jpeg).decode("ascii")
        keys |= {THUMBNAIL: f"data:image/jpeg;base64,{picture}", THUMBNAIL_ORIGIN: thumbnail.origin}
    return {key: safe(text) for key, text in keys.items()}


def date() -> str | None:
    """Return the date for headers in ISO 8601: that of SOURCE_DATE_EPOCH, or None without it.

    Raises:
        OptionError: The variable is not a time.
    """
    text = os.environ.get(EPOCH)
    if not text:
        return None
    try:
        return datetime.fromtimestamp(int(text), _UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise OptionError(f"{EPOCH}={text[:40]!r} is not a time", "Give seconds since 1970, or unset it.") from error


def _description(stamp: Stamp) -> str:
    which = "the smallest" if not stamp.masked else "some"
    kinds = "attention and feed-forward" if {"attn", "ff"} <= set(stamp.targets) else "target"
    standing = evidence_text(stamp.evidence) if stamp.evidence else "not measured"
    return (
        f"Pruned for {stamp.resolution} with CR-Diff ({PAPER}): {which} {kinds} weights are zero, nothing was trained. "
        f"Measured against its base: {standing}."
    )


def _usage(stamp: Stamp) -> str:
    poa = f" With the base beside it, POA of weight {stamp.poa_weight:g} amplifies what pruning changes."
    return f"Draw at {stamp.resolution}." + (poa if stamp.poa_weight != 1 else "")
