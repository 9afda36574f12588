"""What each model family calls its layers, and which family a checkpoint belongs to. Data and names; no weights."""

from crdiff_export.models.families.catalogue import all_families, by_id
from crdiff_export.models.families.detect import detect
from crdiff_export.models.families.model import (
    Family,
    Kind,
    Layer,
    Layout,
    Mark,
    Match,
    Twin,
)
from crdiff_export.models.families.quantised import quantisation

__all__ = [
    "Family",
    "Kind",
    "Layer",
    "Layout",
    "Mark",
    "Match",
    "Twin",
    "all_families",
    "by_id",
    "detect",
    "quantisation",
]
