"""Where something is on the Hub: repository ids, `hf://` addresses and the names of branches and tags.

The Hub client decides what an id and an address are. It has no rule for branches and tags, so `REF` is ours.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

# Names that git, file systems and addresses all take: a part of what git-check-ref-format allows.
REF: Final = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))\w([\w./+-]{0,198}[\w+-])?")
# Endings of file names; `folder/model.safetensors` is no repository id though it could be one.
FILE_ENDINGS: Final = (".safetensors", ".ckpt", ".json", ".pt", ".pth", ".bin", ".gguf", ".sft")


@dataclass(frozen=True, slots=True)
class HubLocation:
    """A model repository on the Hub, or one file of it.

    Attributes:
        repo: The id, ORG/NAME.
        file: The path of the file in the repository; None for the repository itself.
        revision: A branch, tag or commit; None for the default branch.

    """

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        """Return the `hf://` address, as headers record it."""
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://{self.repo}{at}{f'/{self.file}' if self.file else ''}"


def cached_location(path: Path) -> HubLocation | None:
    """Read the repository and the commit off the path of a snapshot in the Hub client's cache.

    Args:
        path: Any path.

    Returns:
        The location; None for any other path.

    """
    *_, repository, snapshots, commit = ("", "", "", *path.absolute().parts)
    match = re.fullmatch(r"models--(.+?)--(.+)", repository)
    return HubLocation(f"{match[1]}/{match[2]}", revision=commit) if match and snapshots == "snapshots" else None


def parse_uri(text: str) -> HubLocation | None:
    """Parse `hf://ORG/NAME[@REVISION][/FILE]`.

    Args:
        text: Any text.

    Returns:
        The location; None for any other text, and for what is not a model (a data set, a space).

    """
    return _parse(text) if text.startswith("hf://") else None


def parse_page(text: str) -> HubLocation | None:
    """Parse the address of a model's page on the Hub, or of a file there.

    Args:
        text: Any text.

    Returns:
        The location, without a revision if that is `main`; None for any other text.

    """
    location = _parse(text) if text.startswith(("http://", "https://")) else None
    return replace(location, revision=None) if location and location.revision == "main" else location


def _parse(text: str) -> HubLocation | None:
    from huggingface_hub import errors, parse_hf_uri

    try:
        uri = parse_hf_uri(text)
    except errors.HfUriError:
        return None
    if uri.type != "model" or {".", ".."} & set(uri.path_in_repo.split("/")):
        return None
    return HubLocation(uri.id, uri.path_in_repo or None, uri.revision)


def parse_id(text: str) -> HubLocation | None:
    """Parse `ORG/NAME` or `ORG/NAME@REVISION`.

    Args:
        text: Any text.

    Returns:
        The repository; None for any other text, and for what has the name of a file.

    """
    repo, at, revision = text.partition("@")
    if text.lower().endswith(FILE_ENDINGS) or (at and not REF.fullmatch(revision)) or not is_repo_id(repo):
        return None
    return HubLocation(repo, None, revision or None)


def is_repo_id(text: str) -> bool:
    """Tell whether a text is a repository id with its owner.

    The Hub also has ids without an owner. A push to one would go to whoever the token belongs to.

    Args:
        text: Any text.

    Returns:
        Whether it is `ORG/NAME` by the Hub client's rules.

    """
    location = parse_uri(f"hf://{text}") if text.count("/") == 1 else None
    return location is not None and location.repo == text
