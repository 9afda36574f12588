"""The list of all families. It has a few thousand records, so it is built at the first call, not at import."""

from functools import cache

from crdiff_export.errors import FamilyError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.models.families.dit import dit_families
from crdiff_export.models.families.model import Family
from crdiff_export.models.families.structure import GROUPS
from crdiff_export.models.families.unet import any_unet, unet_families


@cache
def all_families() -> tuple[Family, ...]:
    """Return every family, UNets first."""
    return unet_families() + dit_families()


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
