"""The transformer families: Stable Diffusion 3 and 3.5, FLUX.1.

Only the image stream is ever a target; the text stream (`context_block`, `txt_*`, `add_*_proj`, `ff_context`) is not.
The original layouts fuse q, k and v (in FLUX's single blocks the MLP too) into one tensor; a layer is then a block of
its rows. Names: diffusers' `convert_sd3_transformer_checkpoint_to_diffusers` and
`convert_flux_transformer_checkpoint_to_diffusers`, ComfyUI's `mmdit_to_diffusers` and `flux_to_diffusers`.
"""

from collections.abc import Iterable
from typing import NamedTuple

from crdiff_export.models.families.model import Family, FamilyLayer, Kind, Layout, Mark


class _Weight(NamedTuple):
    """One layer: a tensor, or part of a fused one, in the original layout, and its tensor in the diffusers layout."""

    original: str
    part: int | None
    diffusers: str
    kind: Kind


class _Block(NamedTuple):
    """One block: its path in both layouts, and its weights that may be pruned."""

    original: str
    diffusers: str
    weights: tuple[_Weight, ...]


_JOINT = (
    _Weight("x_block.attn.qkv.weight", 0, "attn.to_q.weight", "attn"),
    _Weight("x_block.attn.qkv.weight", 1, "attn.to_k.weight", "attn"),
    _Weight("x_block.attn.qkv.weight", 2, "attn.to_v.weight", "attn"),
    _Weight("x_block.attn.proj.weight", None, "attn.to_out.0.weight", "attn"),
    _Weight("x_block.mlp.fc1.weight", None, "ff.net.0.proj.weight", "ff"),
    _Weight("x_block.mlp.fc2.weight", None, "ff.net.2.weight", "ff"),
)
_DUAL = (
    *_JOINT,
    _Weight("x_block.attn2.qkv.weight", 0, "attn2.to_q.weight", "attn2"),
    _Weight("x_block.attn2.qkv.weight", 1, "attn2.to_k.weight", "attn2"),
    _Weight("x_block.attn2.qkv.weight", 2, "attn2.to_v.weight", "attn2"),
    _Weight("x_block.attn2.proj.weight", None, "attn2.to_out.0.weight", "attn2"),
)
_DOUBLE = (
    _Weight("img_attn.qkv.weight", 0, "attn.to_q.weight", "attn"),
    _Weight("img_attn.qkv.weight", 1, "attn.to_k.weight", "attn"),
    _Weight("img_attn.qkv.weight", 2, "attn.to_v.weight", "attn"),
    _Weight("img_attn.proj.weight", None, "attn.to_out.0.weight", "attn"),
    _Weight("img_mlp.0.weight", None, "ff.net.0.proj.weight", "ff"),
    _Weight("img_mlp.2.weight", None, "ff.net.2.weight", "ff"),
)
_SINGLE = (
    _Weight("linear1.weight", 0, "attn.to_q.weight", "attn"),
    _Weight("linear1.weight", 1, "attn.to_k.weight", "attn"),
    _Weight("linear1.weight", 2, "attn.to_v.weight", "attn"),
)


def dit_families() -> tuple[Family, ...]:
    """Return every transformer family, in order of appearance."""
    return (
        _sd3("sd3-medium", "SD3-medium", "stable-diffusion-v3-medium", depth=24, dual=0),
        _sd3("sd35-medium", "SD3.5-medium", "stable-diffusion-v3.5-medium", depth=24, dual=13),
        _sd3("sd35-large", "SD3.5-large", "stable-diffusion-v3.5-large", depth=38, dual=0),
        _flux("flux-dev", "FLUX.1 dev", "flux-1-dev", guidance=True),
        _flux("flux-schnell", "FLUX.1 schnell", "flux-1-schnell", guidance=False),
    )


def _sd3(family_id: str, title: str, architecture: str, *, depth: int, dual: int) -> Family:
    """Describe a family of `depth` joint blocks, of which the first `dual` have a second self-attention, `attn2`."""
    weights = (_DUAL,) * dual + (_JOINT,) * (depth - dual)
    blocks = [_Block(f"joint_blocks.{i}", f"transformer_blocks.{i}", some) for i, some in enumerate(weights)]
    return Family(
        id=family_id,
        title=title,
        architecture=architecture,
        implementation="sgm",
        native=(1024, 1024),
        grid=16,
        groups=("blocks",),
        scope="layer",
        kinds=("ff", "attn", "attn2") if dual else ("ff", "attn"),
        default_kinds=("ff", "attn2") if dual else ("ff",),
        layouts=(
            Layout(
                "original",
                layers=_original_layers(blocks),
                marks=(Mark("joint_blocks.0.x_block.attn2.qkv.weight", present=dual > 0),),
            ),
            Layout(
                "diffusers",
                layers=_diffusers_layers(blocks),
                marks=(Mark("transformer_blocks.0.attn2.to_q.weight", present=dual > 0),),
            ),
        ),
    )


def _flux(family_id: str, title: str, architecture: str, *, guidance: bool) -> Family:
    """Describe FLUX.1 dev or schnell, which differ only in the guidance embedding. Chroma has the same blocks."""
    blocks = [
        *(_Block(f"double_blocks.{i}", f"transformer_blocks.{i}", _DOUBLE) for i in range(19)),
        *(_Block(f"single_blocks.{i}", f"single_transformer_blocks.{i}", _SINGLE) for i in range(38)),
    ]
    no_chroma = Mark("distilled_guidance_layer.in_proj.weight", present=False)
    return Family(
        id=family_id,
        title=title,
        architecture=architecture,
        implementation="https://github.com/black-forest-labs/flux",
        native=(1024, 1024),
        grid=16,
        groups=("blocks",),
        scope="layer",
        kinds=("ff", "attn"),
        default_kinds=("ff",),
        layouts=(
            Layout(
                "original",
                layers=_original_layers(blocks),
                marks=(Mark("guidance_in.in_layer.weight", present=guidance), no_chroma),
                inpainting=Mark("img_in.weight", axis=1, size=384, what="in-channels"),
            ),
            Layout(
                "diffusers",
                layers=_diffusers_layers(blocks),
                marks=(Mark("time_text_embed.guidance_embedder.linear_1.weight", present=guidance), no_chroma),
                inpainting=Mark("x_embedder.weight", axis=1, size=384, what="in-channels"),
            ),
        ),
        inpainting="Flux.1-dev/inpaint" if guidance else None,  # FLUX.1 Fill, in SwarmUI's spelling
    )


def _original_layers(blocks: Iterable[_Block]) -> tuple[FamilyLayer, ...]:
    return tuple(FamilyLayer(f"{b.original}.{w.original}", "blocks", w.kind, w.part) for b in blocks for w in b.weights)


def _diffusers_layers(blocks: Iterable[_Block]) -> tuple[FamilyLayer, ...]:
    return tuple(FamilyLayer(f"{b.diffusers}.{w.diffusers}", "blocks", w.kind) for b in blocks for w in b.weights)
