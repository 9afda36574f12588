"""Model families: how each one names its layers, and how a checkpoint's family is recognised. No weights are read."""

from crdiff_export.models.families.catalogue import all_families, by_id, installed_families, is_built_in, table_of
from crdiff_export.models.families.detect import detect, detect_baked
from crdiff_export.models.families.model import Family, FamilyLayer, Kind, LayoutName, Match, Twin
from crdiff_export.models.families.quantised import Quantisation, quantisation
from crdiff_export.models.families.table import TABLE_KEY, load_family

__all__ = [
    "TABLE_KEY",
    "Family",
    "FamilyLayer",
    "Kind",
    "LayoutName",
    "Match",
    "Quantisation",
    "Twin",
    "all_families",
    "by_id",
    "detect",
    "detect_baked",
    "installed_families",
    "is_built_in",
    "load_family",
    "quantisation",
    "table_of",
]
