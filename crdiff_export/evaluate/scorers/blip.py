"""ImageReward's network on transformers' BLIP, and what ImageReward.pt calls each of its tensors.

src: `vit.py` and `med.py` of salesforce/BLIP, `blip_pretrain.py` and `ImageReward.py` of THUDM/ImageReward.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.evaluate.scorers import weights
from crdiff_export.evaluate.scorers.aesthetic import head

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The picture's encoder, as transformers spells its size: ViT-L/16 at 224 pixels, the `large` of BLIP's `create_vit`.
VISION: Final = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16,
}  # fmt: skip
# What med_config.json decides; its dropouts are for training.
TEXT_CONFIG: Final = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
# Beginnings of names in the file, and in the network; within the text encoder and a linear layer they are the same.
RENAMED: Final = (
    (r"^blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.", r"vision.encoder.layers.\1.mlp.\2."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
# Tensors of the file that the reward does not need: BLIP's contrastive loss, and the numbers of the positions.
UNUSED: Final = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


def reward(parts: "torch.nn.ModuleDict", pixels: "Tensor", tokens: "Tensor", mask: "Tensor") -> "Tensor":
    """Compute the reward of each picture and the tokens of its prompt, before it is normalised.

    Args:
        parts: What `network` returned; the head computes in float32.
        pixels: [picture, 3, side, side].
        tokens: [picture, token].
        mask: [picture, token], 1 where there is a token.

    Returns:
        [picture], on the CPU.
    """
    picture_states = parts["vision"](pixel_values=pixels).last_hidden_state
    text_states = parts["text"](
        input_ids=tokens,
        attention_mask=mask,
        encoder_hidden_states=picture_states,
        is_decoder=False,  # every word sees every other
    )
    values: Tensor = parts["head"](text_states.last_hidden_state[:, 0].float())
    return values.squeeze(-1).cpu()


def network(config: Mapping[str, Any], vision: Mapping[str, int]) -> "torch.nn.ModuleDict":
    """Make the three parts, with random weights, in evaluation mode."""
    from torch import nn

    library = weights.transformers()
    with weights.quiet():
        vision_config = library.BlipVisionConfig(
            **vision,
            hidden_act="gelu",
            layer_norm_eps=1e-6,  # BLIP's own; transformers has 1e-5
            attn_implementation="eager",
        )
        # "is_decoder" is what makes transformers build the cross-attention.
        text_config = library.BlipTextConfig(
            **config, encoder_hidden_size=vision["hidden_size"], is_decoder=True, attn_implementation="eager"
        )
        parts = {
            "vision": library.BlipVisionModel(vision_config),
            "text": library.BlipTextModel(text_config, add_pooling_layer=False),
            "head": head(text_config.hidden_size),
        }
    return nn.ModuleDict(parts).eval()


def rename_tensors(tensors: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """Yield the tensors that the reward needs, by the network's names; a name without a rule stays as it is."""
    for name, tensor in tensors.items():
        if not UNUSED.fullmatch(name):
            renamed = name
            for pattern, new in RENAMED:
                renamed = re.sub(pattern, new, renamed)
            yield renamed, tensor
