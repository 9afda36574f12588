"""The built-in families, from their tables in `data/`. They have a few thousand records: the first call reads them."""

from functools import cache
from pathlib import Path

from crdiff_export.errors import FamilyError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.models.families.model import Family
from crdiff_export.models.families.structure import GROUPS
from crdiff_export.models.families.table import parse_family
from crdiff_export.models.families.unet import any_unet

_DATA = Path(__file__).parent / "data"


@cache
def all_families() -> tuple[Family, ...]:
    """Return every built-in family, UNets first."""
    paths = sorted(_DATA.glob("*.toml"))
    families = [parse_family(path.read_text(encoding="utf-8"), path.name) for path in paths]
    return tuple(sorted(families, key=lambda family: (family.scope == "layer", family.id)))


def by_id(family_id: str) -> Family:
    """Return the family with this id; of a UNet that is none of the others, with all groups.

    Raises:
        FamilyError: The id is unknown; the hint has the nearest one.
    """
    families = {family.id: family for family in (*all_families(), any_unet(GROUPS, None))}
    if family_id not in families:
        message = f"no model family is called {family_id!r}"
        raise FamilyError(message, did_you_mean(family_id, tuple(families), "families"))
    return families[family_id]
