"""Recognise quantised checkpoints from names and metadata; only scaled fp8 can be pruned (`prune/scaled_fp8.py`)."""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from crdiff_export.formats.text import printable


class Quantisation(NamedTuple):
    """A kind of quantisation, with the key that shows it, and why its weights cannot be pruned exactly.

    `obstacle` is None for kinds whose codes have a zero: pruning them could be built, and is not, except where each
    weight is a code times one number of its tensor (`scaled`, `prune/scaled_fp8.py`).
    """

    kind: str
    obstacle: str | None = None
    scaled: bool = False

    def __str__(self) -> str:
        """Return what may follow "the weights"."""
        if self.scaled:
            return f"({self.kind}) are pruned exactly if they are fp8 with one scale for each tensor"
        exactly = (
            f"cannot be pruned exactly: {self.obstacle}" if self.obstacle else "are not pruned: that is not built in"
        )
        return f"({self.kind}) {exactly}"


_LOW_RANK: Final = "a low-rank branch is added to them"
_ROTATED: Final = "they are rotated, so that their zeros are not the model's"
# Tensors that quantisers add to a weight or put in its place: bitsandbytes, nunchaku (SVDQuant, arXiv:2411.05007), GPTQ
# and AWQ. The first that is there names the kind.
_TAILS: Final[Mapping[str, Quantisation]] = {
    ".wcscales": Quantisation("SVDQuant", _LOW_RANK),
    ".wtscale": Quantisation("SVDQuant", _LOW_RANK),
    ".smooth_factor": Quantisation("SVDQuant", _LOW_RANK),
    ".proj_down": Quantisation("SVDQuant", _LOW_RANK),
    ".quant_state.bitsandbytes__nf4": Quantisation("bitsandbytes nf4"),
    ".quant_state.bitsandbytes__fp4": Quantisation("bitsandbytes fp4"),
    ".absmax": Quantisation("bitsandbytes"),
    ".quant_map": Quantisation("bitsandbytes"),
    ".SCB": Quantisation("bitsandbytes int8"),
    ".qweight": Quantisation("GPTQ or AWQ"),
    ".weight_scale_inv": Quantisation("fp8 with scales of blocks"),
}
# Tensors of ComfyUI's formats, of which `prune/scaled_fp8.py` reads some.
_SCALED: Final[Mapping[str, str]] = {
    "scaled_fp8": "scaled fp8",
    ".scale_weight": "scaled fp8",
    ".comfy_quant": "a ComfyUI quantisation",
    ".weight_scale": "scaled fp8",
}
METADATA: Final = "_quantization_metadata"


def quantisation(names: Iterable[str], metadata: Mapping[str, str]) -> Quantisation | None:
    """Recognise a quantisation.

    Args:
        names: Names of tensors. Pass those with a match's prefix to ignore a quantised text encoder.
        metadata: The header's metadata.

    Returns:
        The kind and the key that shows it, such as `scaled fp8 (scaled_fp8)`; None for plain weights.
    """
    if "convrot" in metadata.get(METADATA, "").lower():
        return Quantisation(f"ConvRot (metadata {METADATA})", _ROTATED)
    names = frozenset(names)
    marked = sorted(name for name in names if name.endswith((*_TAILS, *_SCALED, ".scale")))
    for tail, quantiser in _TAILS.items():
        if shown := next((name for name in marked if name.endswith(tail)), None):
            return quantiser._replace(kind=f"{quantiser.kind} ({printable(shown)})")
    for name in marked:
        # SDNQ has X.scale beside X.weight; the norms of FLUX have a scale, but no weight.
        if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in names:
            return Quantisation(f"SDNQ ({printable(name)})")
    if METADATA in metadata:
        return Quantisation(f"a ComfyUI quantisation (metadata {METADATA})", scaled=True)
    for tail, kind in _SCALED.items():
        if shown := next((name for name in marked if name.endswith(tail)), None):
            return Quantisation(f"{kind} ({printable(shown)})", scaled=True)
    return None
