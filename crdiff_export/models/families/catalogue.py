"""The built-in families, from their tables in `data/`. They have a few thousand records: the first call reads them."""

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from crdiff_export.errors import FamilyError, foreign_errors
from crdiff_export.formats.text import nearest
from crdiff_export.models.families.model import Family
from crdiff_export.models.families.table import load_family, parse_family
from crdiff_export.models.families.unet import any_unet

GROUP: Final = "crdiff.families"
_UNET_TABLE: Final = """\
# Any UNet that is none of the others: its layers are read from the names of its tensors. A file that is made of one has
# a table of them in its header: crdiff["family.table"] of `crdiff inspect FILE --json`, to start your own from.
"""
_DATA = Path(__file__).parent / "data"


@cache
def all_families() -> tuple[Family, ...]:
    """Return every built-in family, UNets first."""
    paths = sorted(_DATA.glob("*.toml"))
    families = [parse_family(path.read_text(encoding="utf-8"), path.name) for path in paths]
    return tuple(sorted(families, key=lambda family: (family.scope == "layer", family.id)))


@cache
def installed_families() -> tuple[Family, ...]:
    """Return the families of other packages: each entry point of `crdiff.families` gives the path of a table."""
    families = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        with foreign_errors(FamilyError, f"{entry.name}: {entry.value} cannot be loaded", "Install its package again."):
            families.append(load_family(Path(entry.load())))
    return tuple(families)


def is_built_in(family_id: str) -> bool:
    """Whether a family has a table here; `unet` and those of users and packages have none."""
    return any(family.id == family_id for family in all_families())


def table_of(family: Family) -> str:
    """Return the text of a family's table; of `unet`, of which every model has another one, where that is."""
    path = _DATA / f"{family.id}.toml"
    if family.table or not path.exists():
        return family.table or _UNET_TABLE
    return path.read_text(encoding="utf-8")


def by_id(family_id: str) -> Family:
    """Return the family with this id; of a UNet that is none of the others, with all groups.

    Raises:
        FamilyError: The id is unknown; the hint has the nearest one.
    """
    families = {family.id: family for family in (*all_families(), any_unet())}
    if family_id not in families:
        families |= {family.id: family for family in installed_families()}
    if family_id not in families:
        message = f"no model family is called {family_id!r}"
        guess = nearest(family_id, tuple(families))
        hint = f"Did you mean {guess}? " if guess else ""
        raise FamilyError(message, f"{hint}`crdiff families` lists them.")
    return families[family_id]
