"""Signs that a checkpoint is quantised: its targets are not plain weights then, and magnitudes mean nothing."""

from collections.abc import Iterable, Mapping

from crdiff_export.formats.text import printable

# What quantisers put beside or in place of a weight: ComfyUI (scaled fp8, mixed precision), bitsandbytes, GPTQ and AWQ.
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
    """How a checkpoint is quantised and which key says so, as `scaled fp8 (scaled_fp8)`; None for a plain one.

    Judges all names it is given: pass those behind a `Match`'s prefix to let a quantised text encoder be.
    """
    if _METADATA in metadata:
        return f"a ComfyUI quantisation (metadata {_METADATA})"
    names, tails = frozenset(names), tuple(_TAILS)
    for name in sorted(name for name in names if name.endswith((*tails, ".scale"))):
        if name.endswith(tails):
            return next(f"{title} ({printable(name)})" for tail, title in _TAILS.items() if name.endswith(tail))
        # SDNQ keeps X.scale beside X.weight; the norms of FLUX have a scale too, but no weight.
        if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in names:
            return f"SDNQ ({printable(name)})"
    return None
