"""The list of all families, built when first asked for: a few thousand records that `--help` has no use for."""

from functools import cache

from crdiff_export.errors import FamilyError
from crdiff_export.models.families.dit import dit_families
from crdiff_export.models.families.model import Family
from crdiff_export.models.families.unet import unet_families


@cache
def all_families() -> tuple[Family, ...]:
    """Every family there is, UNets first."""
    return unet_families() + dit_families()


def by_id(family_id: str) -> Family:
    """The family of that id; an unknown id is answered with the nearest one."""
    families = {family.id: family for family in all_families()}
    if family_id in families:
        return families[family_id]
    from difflib import get_close_matches  # slower to import than all of this package

    nearest = get_close_matches(family_id, families, n=1)
    question = f"Did you mean {nearest[0]}? " if nearest else ""
    raise FamilyError(f"no model family is called {family_id!r}", f"{question}The families are: {', '.join(families)}.")
