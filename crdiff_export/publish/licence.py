"""The bases that variants were made from, as the Hub describes them."""

from collections.abc import Sequence

from crdiff_export.errors import HubError
from crdiff_export.hub import repository
from crdiff_export.publish.card import BaseModel, Origin, Row


def bases_of(rows: Sequence[Row], named: str | None) -> tuple[tuple[BaseModel, ...], list[str]]:
    """What the Hub says of every base that the rows name, and notes on those that it does not know.

    `named` is the one of variants whose base was a local file.
    """
    origins = [Origin.parse(row.stamp.source_name) for row in rows]
    repos = dict.fromkeys(origin.repo if origin else named for origin in origins)
    bases, notes = [], []
    for repo in repos:
        base, note = look_up(repo)
        bases.append(base)
        notes += [note] if note else []
    return tuple(bases), notes


def look_up(repo: str | None) -> tuple[BaseModel, str | None]:
    """A base as the Hub describes it, or as far as its name is known, with a note on why it is no more."""
    if repo is None:
        return BaseModel(None), None
    try:
        return repository.base_model(repo), None
    except HubError as error:
        return BaseModel(repo), f"the licence of the base is not known: {error.message}"


def why_private(base: BaseModel) -> str | None:
    """Why a repository with variants of a base is private unless somebody says otherwise; None where it need not be."""
    if base.gated:
        return "its base is gated"
    if base.license is None:
        return "the licence of its base is not known"
    return "its base has a licence of its own kind (other)" if base.license == "other" else None
