"""The list of all families. It has a few thousand records, so it is built at the first call, not at import."""

from functools import cache

from crdiff_export.errors import FamilyError
from crdiff_export.models.families.dit import dit_families
from crdiff_export.models.families.model import Family
from crdiff_export.models.families.unet import unet_families


@cache
def all_families() -> tuple[Family, ...]:
    """Return every family, UNets first."""
    return unet_families() + dit_families()


def by_id(family_id: str) -> Family:
    """Return the family with this id.

    Raises:
        FamilyError: The id is unknown; the hint has the nearest one.
    """
    families = {family.id: family for family in all_families()}
    if family_id in families:
        return families[family_id]
    from difflib import get_close_matches  # its import takes longer than that of this package

    nearest = get_close_matches(family_id, families, n=1)
    question = f"Did you mean {nearest[0]}? " if nearest else ""
    raise FamilyError(f"no model family is called {family_id!r}", f"{question}The families are: {', '.join(families)}.")
