"""The transformer families: Stable Diffusion 3 and 3.5, FLUX.1.

Only the image stream is ever a target; the text stream (`context_block`, `txt_*`, `add_*_proj`, `ff_context`) is not.
The original layouts fuse q, k and v (in FLUX's single blocks the MLP too) into one tensor; a layer is then a block of
its rows. Names: diffusers' `convert_sd3_transformer_checkpoint_to_diffusers` and
`convert_flux_transformer_checkpoint_to_diffusers`, ComfyUI's `mmdit_to_diffusers` and `flux_to_diffusers`.
"""

from functools import partial

from crdiff_export.models.families.model import Block, BlockWeight, Family, Kind, Layout, Mark, Special, layout_of


def _fused(original: str, attention: Kind) -> tuple[BlockWeight, ...]:
    """Return q, k and v of an attention, which the original layout fuses into one tensor."""
    return tuple(
        BlockWeight(original, part, f"{attention}.to_{letter}.weight", attention) for part, letter in enumerate("qkv")
    )


_JOINT = (
    *_fused("x_block.attn.qkv.weight", "attn"),
    BlockWeight("x_block.attn.proj.weight", None, "attn.to_out.0.weight", "attn"),
    BlockWeight("x_block.mlp.fc1.weight", None, "ff.net.0.proj.weight", "ff"),
    BlockWeight("x_block.mlp.fc2.weight", None, "ff.net.2.weight", "ff"),
)
_DUAL = (
    *_JOINT,
    *_fused("x_block.attn2.qkv.weight", "attn2"),
    BlockWeight("x_block.attn2.proj.weight", None, "attn2.to_out.0.weight", "attn2"),
)
_DOUBLE = (
    *_fused("img_attn.qkv.weight", "attn"),
    BlockWeight("img_attn.proj.weight", None, "attn.to_out.0.weight", "attn"),
    BlockWeight("img_mlp.0.weight", None, "ff.net.0.proj.weight", "ff"),
    BlockWeight("img_mlp.2.weight", None, "ff.net.2.weight", "ff"),
)
_SINGLE = _fused("linear1.weight", "attn")

# T5's text. FLUX's relatives with the same blocks (LongCat, Bria, Chroma) have other text, or no pooled text beside it.
_text = partial(Mark, axis=1, sizes=(4096,), what="width of the text embedding")

_transformer = partial(Family, native=(1024, 1024), grid=16, groups=("blocks",), scope="layer")
_sd3 = partial(_transformer, implementation="sgm", buckets=True, channels=16)
_flux = partial(
    _transformer,
    channels=64,
    implementation="https://github.com/black-forest-labs/flux",
    kinds=("ff", "attn"),
    default_kinds=("ff",),
)


def dit_families() -> tuple[Family, ...]:
    """Return every transformer family, in order of appearance."""
    return (
        _sd3(
            id="sd3-medium", title="SD3-medium", architecture="stable-diffusion-v3-medium",
            kinds=("ff", "attn"), default_kinds=("ff",), layouts=_sd3_layouts(24),
        ),
        _sd3(
            id="sd35-medium", title="SD3.5-medium", architecture="stable-diffusion-v3.5-medium",
            kinds=("ff", "attn", "attn2"), default_kinds=("ff", "attn2"), layouts=_sd3_layouts(24, dual=13),
        ),
        _sd3(
            id="sd35-large", title="SD3.5-large", architecture="stable-diffusion-v3.5-large",
            kinds=("ff", "attn"), default_kinds=("ff",), layouts=_sd3_layouts(38),
        ),
        _flux(
            id="flux-dev", title="FLUX.1 dev", architecture="flux-1-dev", layouts=_flux_layouts(guidance=True),
            specials=(
                Special("inpainting", "inpainting", "Flux.1-dev/inpaint", channels=384),  # FLUX.1 Fill
                # SwarmUI has ids for Canny and for Depth, which only their metadata can tell apart.
                Special("control", "with a control picture, as Canny and Depth", "flux-1-dev/control", channels=128),
            ),
        ),
        _flux(
            id="flux-schnell", title="FLUX.1 schnell", architecture="flux-1-schnell",
            layouts=_flux_layouts(guidance=False),
        ),
    )  # fmt: skip


def _sd3_layouts(depth: int, dual: int = 0) -> tuple[Layout, ...]:
    """Describe `depth` joint blocks, of which the first `dual` have a second self-attention, `attn2`."""
    blocks = [
        Block("blocks", f"joint_blocks.{i}", f"transformer_blocks.{i}", _DUAL if i < dual else _JOINT)
        for i in range(depth)
    ]
    return (
        layout_of(
            "original", blocks,
            (
                Mark("joint_blocks.0.x_block.attn2.qkv.weight", present=dual > 0), _text("context_embedder.weight"),
                Mark("y_embedder.mlp.0.weight"),
            ),
            "x_embedder.proj.weight",
        ),
        layout_of(
            "diffusers", blocks,
            (
                Mark("transformer_blocks.0.attn2.to_q.weight", present=dual > 0), _text("context_embedder.weight"),
                Mark("time_text_embed.text_embedder.linear_1.weight"),
            ),
            "pos_embed.proj.weight",
        ),
    )  # fmt: skip


def _flux_layouts(*, guidance: bool) -> tuple[Layout, ...]:
    """Describe FLUX.1 dev or schnell, which differ only in the guidance embedding. Chroma has the same blocks."""
    blocks = [
        *(Block("blocks", f"double_blocks.{i}", f"transformer_blocks.{i}", _DOUBLE) for i in range(19)),
        *(Block("blocks", f"single_blocks.{i}", f"single_transformer_blocks.{i}", _SINGLE) for i in range(38)),
    ]
    no_chroma = Mark("distilled_guidance_layer.in_proj.weight", present=False)
    embedder = "time_text_embed.guidance_embedder.linear_1.weight"
    return (
        layout_of(
            "original", blocks,
            (
                Mark("guidance_in.in_layer.weight", present=guidance), no_chroma, _text("txt_in.weight"),
                Mark("vector_in.in_layer.weight"),
            ),
            "img_in.weight",
        ),
        layout_of(
            "diffusers", blocks,
            (
                Mark(embedder, present=guidance), no_chroma, _text("context_embedder.weight"),
                Mark("time_text_embed.text_embedder.linear_1.weight"),
            ),
            "x_embedder.weight",
        ),
    )  # fmt: skip
