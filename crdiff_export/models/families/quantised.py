"""Recognise quantised checkpoints, whose stored values are not weights and cannot be compared by magnitude."""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from crdiff_export.formats.text import printable


class Quantisation(NamedTuple):
    """A kind of quantisation, with the key that shows it, and why its weights cannot be pruned exactly.

    `obstacle` is None for kinds whose codes have a zero: pruning them could be built, and is not.
    """

    kind: str
    obstacle: str | None = None

    def __str__(self) -> str:
        """Return what may follow "the weights"."""
        exactly = (
            f"cannot be pruned exactly: {self.obstacle}" if self.obstacle else "are not pruned: that is not built in"
        )
        return f"({self.kind}) {exactly}"


_LOW_RANK: Final = "a low-rank branch is added to them"
_ROTATED: Final = "they are rotated, so that their zeros are not the model's"
# Tensors that quantisers add to a weight or put in its place: ComfyUI (scaled fp8, mixed precision), bitsandbytes,
# nunchaku (SVDQuant, arXiv:2411.05007), GPTQ and AWQ. The first that fits names the kind.
_TAILS: Final[Mapping[str, tuple[str, str | None]]] = {
    ".wcscales": ("SVDQuant", _LOW_RANK),
    ".wtscale": ("SVDQuant", _LOW_RANK),
    ".smooth_factor": ("SVDQuant", _LOW_RANK),
    ".proj_down": ("SVDQuant", _LOW_RANK),
    "scaled_fp8": ("scaled fp8", None),
    ".scale_weight": ("scaled fp8", None),
    ".weight_scale": ("scaled fp8", None),
    ".comfy_quant": ("a ComfyUI quantisation", None),
    ".absmax": ("bitsandbytes", None),
    ".quant_map": ("bitsandbytes", None),
    ".quant_state.bitsandbytes__nf4": ("bitsandbytes nf4", None),
    ".quant_state.bitsandbytes__fp4": ("bitsandbytes fp4", None),
    ".SCB": ("bitsandbytes int8", None),
    ".qweight": ("GPTQ or AWQ", None),
}
_METADATA: Final = "_quantization_metadata"


def quantisation(names: Iterable[str], metadata: Mapping[str, str]) -> Quantisation | None:
    """Recognise a quantisation.

    Args:
        names: Names of tensors. Pass those with a match's prefix to ignore a quantised text encoder.
        metadata: The header's metadata.

    Returns:
        The kind and the key that shows it, such as `scaled fp8 (scaled_fp8)`; None for plain weights.
    """
    if _METADATA in metadata:
        obstacle = _ROTATED if "convrot" in metadata[_METADATA].lower() else None
        kind = "ConvRot" if obstacle else "a ComfyUI quantisation"
        return Quantisation(f"{kind} (metadata {_METADATA})", obstacle)
    names = frozenset(names)
    marked = sorted(name for name in names if name.endswith((*_TAILS, ".scale")))
    # A quantiser's own tensors say more than those that several of them have.
    for tail, (title, obstacle) in _TAILS.items():
        if obstacle and (shown := next((name for name in marked if name.endswith(tail)), None)):
            return Quantisation(f"{title} ({printable(shown)})", obstacle)
    for name in marked:
        quantiser = next((title for tail, (title, _) in _TAILS.items() if name.endswith(tail)), None)
        if quantiser:
            return Quantisation(f"{quantiser} ({printable(name)})")
        # SDNQ has X.scale beside X.weight; the norms of FLUX have a scale, but no weight.
        if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in names:
            return Quantisation(f"SDNQ ({printable(name)})")
    return None
