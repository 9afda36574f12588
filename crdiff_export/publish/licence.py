"""Look up the bases of variants on the Hub: their licences, and whether a repository with variants must be private."""

from collections.abc import Sequence
from typing import Any

from crdiff_export.errors import HubError
from crdiff_export.hub.location import parse_uri
from crdiff_export.hub.messages import as_hub_error
from crdiff_export.publish.card import BaseModel


def bases_of(names: Sequence[str], local_base: str | None) -> tuple[tuple[BaseModel, ...], list[str]]:
    """Look up the bases of a repository's variants.

    Args:
        names: What the headers call the bases.
        local_base: The Hub id of a base that was a local file.

    Returns:
        The bases, and notes on those that the Hub does not describe.
    """
    locations = [parse_uri(name) for name in names]
    repos = dict.fromkeys(location.repo if location else local_base for location in locations)
    bases = [look_up(repo) for repo in repos]
    return tuple(base for base, _ in bases), [note for _, note in bases if note]


def look_up(repo: str | None) -> tuple[BaseModel, str | None]:
    """Look up a base on the Hub; if it does not describe it, a note says why."""
    if repo is None:
        return BaseModel(None), None
    try:
        return _base_model(repo), None
    except HubError as error:
        return BaseModel(repo), f"the licence of the base is not known: {error.message}"


def why_private(base: BaseModel) -> str | None:
    """Say why a repository with variants of a base is private by default; None if it is public."""
    if base.gated:
        return "its base is gated"
    if base.license is None:
        return "the licence of its base is not known"
    return "its base has a licence of its own kind (other)" if base.license == "other" else None


def _base_model(repo: str) -> BaseModel:
    from huggingface_hub import HfApi

    with as_hub_error(repo):
        info = HfApi().model_info(repo)
        to_dict: Any = info.card_data.to_dict if info.card_data else dict
        data = to_dict()
        names = [sibling.rfilename for sibling in info.siblings or ()]
    return BaseModel.from_front_matter(repo, bool(info.gated), data, pipeline="model_index.json" in names)
