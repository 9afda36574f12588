"""A model's arguments: copied for a second pass, or doubled for one pass over both halves of a batch."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn

# What of the UNets' and transformers' arguments has a batch in front, by name (diffusers' `forward` signatures).
BATCHED = {
    "sample", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask",
    "mid_block_additional_residual", "down_block_additional_residuals", "down_intrablock_additional_residuals",
    "text_embeds", "time_ids", "image_embeds",
    "hidden_states", "pooled_projections", "guidance", "block_controlnet_hidden_states", "controlnet_block_samples",
    "controlnet_single_block_samples",
}  # fmt: skip
# What serves both halves as it is.
SHARED = {"img_ids", "txt_ids", "return_dict", "scale", "ip_adapter_masks", "controlnet_blocks_repeat"}
NESTED = {"added_cond_kwargs", "cross_attention_kwargs", "joint_attention_kwargs"}


def copied(value: Any) -> Any:
    """The same tensors in lists and dicts of their own: some models take items out of those that they are given."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


@dataclass(frozen=True, slots=True)
class Doubled:
    """A call's arguments by name, with the batch twice, and how many it then has."""

    arguments: dict[str, Any]
    size: int


def double(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Doubled | None:
    """The arguments with the batch twice; None where one of them cannot be told to be batched or not."""
    names = list(inspect.signature(_plain(model).forward).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names):
        return None
    try:
        doubled = {name: _doubled(name, value) for name, value in named.items()}
    except _UnknownError:
        return None
    first = doubled.get("sample", doubled.get("hidden_states"))
    return Doubled(doubled, len(first)) if isinstance(first, Tensor) else None


def _plain(model: nn.Module) -> nn.Module:
    """The model itself, of one that torch.compile has wrapped."""
    from diffusers.utils.torch_utils import unwrap_module

    plain: nn.Module = unwrap_module(model)
    return plain


class _UnknownError(Exception):
    """An argument of a kind that this module does not know."""


def _doubled(name: str, value: Any) -> Any:
    if value is None or name in SHARED:
        return value
    if name == "timestep":
        # One for all, or one for each of the batch.
        return cat((value, value)) if isinstance(value, Tensor) and value.ndim and len(value) > 1 else value
    if name in NESTED and isinstance(value, dict):
        return {key: _doubled(key, item) for key, item in value.items()}
    if name in BATCHED and isinstance(value, Tensor):
        return cat((value, value))
    if name in BATCHED and isinstance(value, list | tuple):
        return type(value)(_doubled(name, item) for item in value)
    raise _UnknownError
