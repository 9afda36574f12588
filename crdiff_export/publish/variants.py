"""Put the files of a repository together to variants."""

import re
from collections.abc import Mapping

from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.hub.repository import RemoteFile
from crdiff_export.publish.card import CardVariant
from crdiff_export.sizes import Size

_MODEL = r"diffusion_pytorch_model(?:\.(?P<weights>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
_PIPELINE = re.compile(rf"(?P<folder>.*?)/?(?:unet|transformer)/{_MODEL}")
_SHARD = re.compile(r"(?P<folder>.*?)/?[^/]*-\d{5}-of-\d{5}(?:\.(?P<weights>[\w-]+))?\.safetensors")


def sheet_path(path: str, size: Size) -> str:
    """Return where the repository has the picture of a variant.

    Args:
        path: The variant's file or folder in the repository; "" for the root.
        size: The variant's size.

    Returns:
        The path of a PNG file.
    """
    return f"images/crdiff/{path.removesuffix('.safetensors') or size}.png"


def card_variants(files: Mapping[str, RemoteFile], headers: Mapping[str, Stamp]) -> list[CardVariant]:
    """List the variants of a repository: a single file, a pipeline folder and a set of shards are one each.

    Args:
        files: The files of the repository, by path.
        headers: The headers of those that crdiff baked, by path.

    Returns:
        The variants, by path.
    """
    groups: dict[tuple[str, str | None, bool], list[str]] = {}
    for path in sorted(headers):
        match = _PIPELINE.fullmatch(path) or _SHARD.fullmatch(path)
        key = (match["folder"], match["weights"], True) if match else (path, None, False)
        groups.setdefault(key, []).append(path)
    return [
        CardVariant(
            path=path,
            stamp=headers[members[0]],
            size=sum(files[member].size for member in members),
            sha256=None if in_folder else files[members[0]].sha256,
            weights=weights,
            sheet=sheet if (sheet := sheet_path(path, headers[members[0]].resolution)) in files else None,
        )
        for (path, weights, in_folder), members in groups.items()
    ]
