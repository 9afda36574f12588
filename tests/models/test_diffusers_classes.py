"""Every transformer and every UNet of the installed diffusers, at its default size: recognised rightly, or refused.

The table in docs/families.md says which. A class that a newer diffusers adds is expected to be refused.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from crdiff_export.errors import FamilyError
from crdiff_export.models import families
from tests.support import ROOT

# The classes that cannot be made without arguments.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32,
        "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
        "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32),
        "max_resolution": (128, 128),
    },
    "LatteTransformer3DModel": {
        "in_channels": 4, "sample_size": 64, "patch_size": 2, "cross_attention_dim": 1152, "caption_channels": 4096
    },
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"}
    },
    "Transformer2DModel": {"in_channels": 320, "cross_attention_dim": 768},
    "TransformerTemporalModel": {"in_channels": 320, "cross_attention_dim": 768},
}  # fmt: skip
REFUSED = "refused"
ROW = re.compile(r"\| `(\w+)` \| ([^|]+) \|")
DOCUMENT = ROOT / "docs" / "families.md"


def verdicts() -> dict[str, str]:
    """The table of the document."""
    return {name: verdict.strip() for name, verdict in ROW.findall(DOCUMENT.read_text("utf-8"))}


def classes() -> Iterator[tuple[str, type]]:
    import diffusers

    for name in dir(diffusers):
        if "Transformer" in name or "UNet" in name:
            found = getattr(diffusers, name)
            if inspect.isclass(found) and issubclass(found, torch.nn.Module):
                yield name, found


def verdict(name: str, found: type) -> str:
    """What a model of a class is taken for; its weights are never made."""
    with torch.device("meta"):
        model = found(**ARGUMENTS.get(name, {}))
    try:
        return families.detect({key: tuple(weight.shape) for key, weight in model.state_dict().items()}).title
    except FamilyError:
        return REFUSED


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_every_class_of_diffusers_is_recognised_rightly_or_refused() -> None:
    listed, seen = verdicts(), dict(classes())
    assert len(seen.keys() & listed.keys()) > 40
    found = {name: verdict(name, each) for name, each in seen.items()}
    assert found == {name: listed.get(name, REFUSED) for name in found}


# Models of diffusers with the layers of a family, as they are published.
PUBLISHED: dict[str, tuple[str, dict[str, Any], str]] = {
    "SD2.1 unCLIP": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 1024, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048,
         "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        "sd21 unclip",
    ),
    "instruct-pix2pix": ("UNet2DConditionModel", {"cross_attention_dim": 768, "in_channels": 8}, "sd15 edit"),
    "inpainting": ("UNet2DConditionModel", {"cross_attention_dim": 768, "in_channels": 9}, "sd15 inpainting"),
    "Marigold": (
        "UNet2DConditionModel", {"cross_attention_dim": 1024, "in_channels": 8, "use_linear_projection": True},
        "sd21 8-channels",
    ),
    "SD2 depth": ("UNet2DConditionModel", {"cross_attention_dim": 1024, "in_channels": 5}, "sd21 depth"),
    "SD1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768}, "sd15 "),
    "GLIGEN": ("UNet2DConditionModel", {"cross_attention_dim": 768, "attention_type": "gated"}, "unet "),
    "learned variance": ("UNet2DConditionModel", {"cross_attention_dim": 768, "out_channels": 8}, "sd15 8-outputs"),
    "AnimateDiff": ("UNetMotionModel", {"cross_attention_dim": 768, "use_motion_mid_block": False}, REFUSED),
    "SD1.5 with classes": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 768, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 640},
        "sd15 vector-640",
    ),
    "FLUX Canny": ("FluxTransformer2DModel", {"guidance_embeds": True, "in_channels": 128}, "flux-dev control"),
    "FLUX Fill": ("FluxTransformer2DModel", {"guidance_embeds": True, "in_channels": 384}, "flux-dev inpainting"),
    "Flex.2": (
        "FluxTransformer2DModel", {"guidance_embeds": True, "num_layers": 8, "in_channels": 196}, "flux-lite flex-2"
    ),
    "FLUX dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, "flux-dev "),
    "Z-Image Omni": ("ZImageTransformer2DModel", {"siglip_feat_dim": 1152}, "z-image omni"),
    "PixArt-Alpha for 1024": (
        "PixArtTransformer2DModel", {"caption_channels": 4096, "use_additional_conditions": True},
        "pixart-sigma alpha-1024",
    ),
    "SANA-Sprint": (
        "SanaTransformer2DModel", {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, "sana-1600m sprint"
    ),
    "CogView4 control": (
        "CogView4Transformer2DModel", {"num_layers": 28, "in_channels": 32}, "cogview4 128-channels"
    ),
    "Cosmos-Predict2 for videos": (
        "CosmosTransformer3DModel", {"in_channels": 17, "extra_pos_embed_type": None}, REFUSED
    ),
    "CogView3-Plus": ("CogView3PlusTransformer2DModel", {}, REFUSED),
    "FLUX with other text": ("FluxTransformer2DModel", {"joint_attention_dim": 3584}, REFUSED),
    "FLUX of less depth": ("FluxTransformer2DModel", {"num_layers": 8}, REFUSED),
    "SD3 with other text": ("SD3Transformer2DModel", {"num_layers": 24, "joint_attention_dim": 2048}, REFUSED),
}  # fmt: skip
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}  # fmt: skip
PUBLISHED |= {
    f"SDXL {name}": ("UNet2DConditionModel", {**SDXL, **changes}, expected)
    for name, changes, expected in (
        ("base", {}, "sdxl "),
        ("edit", {"in_channels": 8}, "sdxl edit"),
        ("inpainting", {"in_channels": 9}, "sdxl inpainting"),
        ("Kolors", {"projection_class_embeddings_input_dim": 5632, "encoder_hid_dim_type": "text_proj",
                    "encoder_hid_dim": 4096}, "sdxl kolors"),
        ("Kolors inpainting", {"projection_class_embeddings_input_dim": 5632, "encoder_hid_dim_type": "text_proj",
                               "encoder_hid_dim": 4096, "in_channels": 9}, "sdxl kolors-inpainting"),
        ("of other text", {"projection_class_embeddings_input_dim": 2048}, "sdxl vector-2048"),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_channels_and_projections_tell_what_kind_of_model_it_is(name: str) -> None:
    import diffusers

    of_class, config, expected = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(diffusers, of_class)(**config)
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    if expected == REFUSED:
        with pytest.raises(FamilyError):
            families.detect(shapes)
        return
    match = families.detect(shapes)
    assert f"{match.family.id} {match.special.id if match.special else ''}" == expected
    if match.special:
        assert match.special.architecture != match.family.architecture
