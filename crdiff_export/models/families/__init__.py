"""Model families: how each one names its layers, and how a checkpoint's family is recognised. No weights are read."""

from crdiff_export.models.families.catalogue import all_families, by_id
from crdiff_export.models.families.detect import detect
from crdiff_export.models.families.model import Family, FamilyLayer, Kind, Match, Twin
from crdiff_export.models.families.quantised import quantisation

__all__ = [
    "Family",
    "FamilyLayer",
    "Kind",
    "Match",
    "Twin",
    "all_families",
    "by_id",
    "detect",
    "quantisation",
]
