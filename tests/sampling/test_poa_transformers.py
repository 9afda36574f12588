"""POA on tiny transformers of each class, without a pipeline: the mix is that of the dense and the pruned model."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crdiff_export import ExportRequest, Size, export, poa

WEIGHT = 1.5


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


HEADS = {"attention_head_dim": 8, "num_attention_heads": 4}
# The class, its configuration, and the arguments of a call; what a family is recognised by has its real size.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flux-2-klein-4b": (
        "Flux2Transformer2DModel",
        {**HEADS, "guidance_embeds": False, "num_layers": 5, "num_single_layers": 20, "joint_attention_dim": 7680,
         "axes_dims_rope": (2, 2, 2, 2)},
        {"hidden_states": numbers(1, 16, 128), "timestep": torch.tensor([0.3]),
         "encoder_hidden_states": numbers(1, 5, 7680), "img_ids": torch.zeros(1, 16, 4),
         "txt_ids": torch.zeros(1, 5, 4)},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"dim": 32, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [2, 2, 4], "axes_lens": [64, 32, 32]},
        {"x": [numbers(16, 1, 8, 8)], "t": torch.tensor([0.3]), "cap_feats": [numbers(5, 2560)]},
    ),
    "lumina-2": (
        "Lumina2Transformer2DModel",
        {"hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2, "cap_feat_dim": 2304, "multiple_of": 16,
         "axes_dim_rope": (4, 2, 2), "axes_lens": (64, 32, 32)},
        {"hidden_states": numbers(1, 16, 8, 8), "timestep": torch.tensor([0.3]),
         "encoder_hidden_states": numbers(1, 5, 2304), "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {**HEADS, "caption_projection_dim": 32, "pos_embed_max_size": 64, "sample_size": 8},
        {"hidden_states": numbers(1, 4, 8, 8), "timestep": torch.tensor([0.3]),
         "encoder_hidden_states": numbers(1, 5, 2048)},
    ),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {**HEADS, "cross_attention_dim": 32, "caption_channels": 4096, "use_additional_conditions": False,
         "sample_size": 8},
        {"hidden_states": numbers(1, 4, 8, 8), "timestep": torch.tensor([300]),
         "encoder_hidden_states": numbers(1, 5, 4096), "encoder_attention_mask": torch.ones(1, 5)},
    ),
    "sana-1600m": (
        "SanaTransformer2DModel",
        {**HEADS, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32},
        {"hidden_states": numbers(1, 32, 8, 8), "timestep": torch.tensor([300]),
         "encoder_hidden_states": numbers(1, 5, 2304), "encoder_attention_mask": torch.ones(1, 5)},
    ),
    "hidream-i1": (
        "HiDreamImageTransformer2DModel",
        {**HEADS, "patch_size": 2, "in_channels": 16, "caption_channels": [16, 4096], "text_emb_dim": 16,
         "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": [0] * 48,
         "force_inference_output": True},
        {"hidden_states": numbers(1, 16, 8, 8), "timesteps": torch.tensor([300]),
         "encoder_hidden_states_t5": numbers(1, 5, 16), "encoder_hidden_states_llama3": numbers(1, 1, 5, 4096),
         "pooled_embeds": numbers(1, 16)},
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {**HEADS, "num_layers": 28, "time_embed_dim": 16, "condition_dim": 8, "rope_axes_dim": (8, 8)},
        {"hidden_states": numbers(1, 16, 8, 8), "timestep": torch.tensor([300]),
         "encoder_hidden_states": numbers(1, 16, 4096), "original_size": torch.full((1, 2), 64.0),
         "target_size": torch.full((1, 2), 64.0), "crop_coords": torch.zeros(1, 2)},
    ),
    "cosmos2-2b": (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "extra_pos_embed_type": None, "adaln_lora_dim": 4,
         "max_size": (4, 32, 32)},
        {"hidden_states": numbers(1, 16, 1, 8, 8), "timestep": torch.tensor([0.3]),
         "encoder_hidden_states": numbers(1, 5, 1024), "padding_mask": torch.zeros(1, 1, 64, 64)},
    ),
}  # fmt: skip


def predict(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        prediction = model(**copy.deepcopy(arguments), return_dict=False)[0]
    return torch.cat([each.flatten() for each in prediction])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", MODELS)
def test_the_mix_is_that_of_both_models(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, config, arguments = MODELS[family]
    if family.startswith("cosmos"):  # it resizes its mask with torchvision, which need not be there
        resizing = Mock(functional=Mock(resize=lambda mask, size, **_: mask[..., : size[0], : size[1]]))
        monkeypatch.setattr(transformer_cosmos, "transforms", resizing, raising=False)
    torch.manual_seed(1)
    model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gates of zero would hide the blocks
            parameter.normal_(std=0.1)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "base.safetensors")
    request = ExportRequest(str(tmp_path / "base.safetensors"), Size(512, 512), tmp_path / "o.safetensors", ratio=0.5)
    baked = export(request)
    assert baked.job.plan.match.family.id == family
    dense = predict(model, arguments)
    model.load_state_dict(load_file(baked.written.path))
    pruned = predict(model, arguments)
    model.load_state_dict(weights)
    poa.enable(model, baked.written.path, WEIGHT)
    assert not torch.allclose(dense, pruned, rtol=1e-3)
    torch.testing.assert_close(predict(model, arguments), dense + WEIGHT * (pruned - dense), rtol=1e-4, atol=1e-4)
    poa.disable(model)
    assert torch.equal(predict(model, arguments), dense)
