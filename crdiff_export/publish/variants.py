"""Put the files of a repository together to variants."""

import re
from collections.abc import Mapping

from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.hub.repository import RemoteFile
from crdiff_export.packs import PackHeader
from crdiff_export.publish.card import CardPack, CardVariant
from crdiff_export.publish.headers import MadeHeader
from crdiff_export.sizes import Size

_MODEL = r"diffusion_pytorch_model(?:\.(?P<weights>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
_PIPELINE = re.compile(rf"(?P<folder>.*?)/?(?:unet|transformer)/{_MODEL}")
_COMPONENT = re.compile(rf"(?:(?P<folder>.*)/)?{_MODEL}")
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


def card_variants(files: Mapping[str, RemoteFile], headers: Mapping[str, MadeHeader]) -> list[CardVariant]:
    """List the variants of a repository: a single file, a pipeline folder and a set of shards are one each.

    Args:
        files: The files of the repository, by path.
        headers: The headers of those that crdiff made, by path.

    Returns:
        The variants, by path.
    """
    stamps = {path: header for path, header in headers.items() if isinstance(header, Stamp)}
    groups: dict[tuple[str, str | None, bool], list[str]] = {}
    for path in sorted(stamps):
        # The folder of a UNet or transformer that was made of one file has no folder of that name in it.
        alone = _COMPONENT.fullmatch(path) if stamps[path].source_layout == "original" else None
        match = alone or _PIPELINE.fullmatch(path) or _SHARD.fullmatch(path)
        key = (match["folder"] or "", match["weights"], True) if match else (path, None, False)
        groups.setdefault(key, []).append(path)
    return [
        CardVariant(
            path=path,
            stamp=stamps[members[0]],
            size=sum(files[member].size for member in members),
            sha256=None if in_folder else files[members[0]].sha256,
            weights=weights,
            sheet=sheet if (sheet := sheet_path(path, stamps[members[0]].resolution)) in files else None,
        )
        for (path, weights, in_folder), members in groups.items()
    ]


def card_packs(files: Mapping[str, RemoteFile], headers: Mapping[str, MadeHeader]) -> list[CardPack]:
    """List the packs of a repository.

    Args:
        files: The files of the repository, by path.
        headers: The headers of those that crdiff made, by path.

    Returns:
        The packs, by path.
    """
    return [
        CardPack(path, header, files[path].size, files[path].sha256, _base_weights(header))
        for path, header in sorted(headers.items())
        if isinstance(header, PackHeader)
    ]


def _base_weights(header: PackHeader) -> str | None:
    """Return diffusers' name for the weights of the base that is a folder, as in `*.fp16.safetensors`."""
    match = _PIPELINE.fullmatch(header.files[0].name)
    return match["weights"] if match else None
