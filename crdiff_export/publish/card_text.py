"""The card of a repository with the files of a push: what it will say, from headers and what the Hub tells."""

from dataclasses import dataclass

from crdiff_export.hub import repository
from crdiff_export.hub.repository import RemoteFile, Repository
from crdiff_export.publish.card import Card, render
from crdiff_export.publish.headers import HeaderCache, remote_headers
from crdiff_export.publish.licence import bases_of
from crdiff_export.publish.target import MAIN
from crdiff_export.publish.upload import Upload
from crdiff_export.publish.variants import card_packs, card_variants

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class CardText:
    """A card: the text on the Hub, or None without a card there, the new text, and notes on unknown bases."""

    old: str | None
    new: str
    notes: tuple[str, ...] = ()


def write_card(remote: Repository, upload: Upload, branch: str, cache: HeaderCache) -> CardText:
    """Write the card of a repository with the files of a push.

    Args:
        remote: What the repository holds; without files for a new one.
        upload: What is pushed.
        branch: The branch, or the ref of a pull request, which is for main.
        cache: Headers of files that need no request; new ones are added.

    Returns:
        The card.

    Raises:
        HubError: The Hub does not answer.
        CardError: The card that is there cannot be changed safely.
    """
    sent = upload.files
    headers = remote_headers(remote, [path for path in remote.files if path not in sent], cache)
    headers |= {path: file.header for path, file in sent.items() if file.header}
    files = {**remote.files, **{path: RemoteFile(path, f.size, f.sha256, "") for path, f in sent.items()}}
    variants, packs = card_variants(files, headers), card_packs(files, headers)
    stamps = [*(variant.stamp for variant in variants), *(pack.header.common for pack in packs)]
    bases, notes = bases_of([stamp.source_name for stamp in stamps], upload.base_model)
    old = repository.read_text(remote, CARD)
    revision = MAIN if branch.startswith("refs/") else branch
    new = render(Card(remote.repo, tuple(variants), bases, upload.relation, revision, tuple(packs)), old)
    return CardText(old, new, tuple(notes))
