"""Recognise quantised checkpoints, whose stored values are not weights and cannot be compared by magnitude."""

from collections.abc import Iterable, Mapping

from crdiff_export.formats.text import printable

# Tensors that quantisers add to a weight or put in its place: ComfyUI (scaled fp8, mixed precision), bitsandbytes,
# GPTQ and AWQ.
_TAILS = {
    "scaled_fp8": "scaled fp8",
    ".scale_weight": "scaled fp8",
    ".weight_scale": "scaled fp8",
    ".comfy_quant": "a ComfyUI quantisation",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ or AWQ",
}
_METADATA = "_quantization_metadata"


def quantisation(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Recognise a quantisation.

    Args:
        names: Names of tensors. Pass those with a match's prefix to ignore a quantised text encoder.
        metadata: The header's metadata.

    Returns:
        The kind and the key that shows it, such as `scaled fp8 (scaled_fp8)`; None for plain weights.
    """
    if _METADATA in metadata:
        return f"a ComfyUI quantisation (metadata {_METADATA})"
    names, tails = frozenset(names), tuple(_TAILS)
    for name in sorted(name for name in names if name.endswith((*tails, ".scale"))):
        if name.endswith(tails):
            return next(f"{title} ({printable(name)})" for tail, title in _TAILS.items() if name.endswith(tail))
        # SDNQ has X.scale beside X.weight; the norms of FLUX have a scale, but no weight.
        if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in names:
            return f"SDNQ ({printable(name)})"
    return None
