"""The arguments of a model's forward: copied for a second pass, or doubled for one pass over both halves of a batch."""

import inspect
from typing import Any, NamedTuple

from torch import Tensor, cat, nn

# Arguments of UNets and transformers with a batch dimension in front, by name (diffusers' `forward` signatures).
BATCHED = {
    "sample", "encoder_hidden_states", "encoder_hidden_states_mask", "class_labels", "timestep_cond", "attention_mask",
    "encoder_attention_mask",
    "mid_block_additional_residual", "down_block_additional_residuals", "down_intrablock_additional_residuals",
    "text_embeds", "time_ids", "image_embeds",
    "hidden_states", "pooled_projections", "guidance", "block_controlnet_hidden_states", "controlnet_block_samples",
    "controlnet_single_block_samples",
}  # fmt: skip
# Arguments that both halves share.
SHARED = {"img_ids", "txt_ids", "return_dict", "scale", "ip_adapter_masks", "controlnet_blocks_repeat"}
NESTED = {"added_cond_kwargs", "cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"}
# Lists with an entry for each of the batch.
LISTED = {"img_shapes"}


def copy(value: Any) -> Any:
    """Copy lists and dicts but not their tensors: some models take items out of those that they are given."""
    if isinstance(value, dict):
        return {key: copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy(item) for item in value)
    return value


class DoubledCall(NamedTuple):
    """The arguments of a call by name, with the batch twice, and the size of that batch."""

    arguments: dict[str, Any]
    size: int


def double(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DoubledCall | None:
    """Double the batch of a call; None if an argument may have a batch dimension or not."""
    from diffusers.utils.torch_utils import unwrap_module  # of a model that torch.compile has wrapped

    names = list(inspect.signature(unwrap_module(model).forward).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names):
        return None
    try:
        arguments = {name: _double(name, value) for name, value in named.items()}
    except _UnknownError:
        return None
    first = arguments.get("sample", arguments.get("hidden_states"))
    return DoubledCall(arguments, len(first)) if isinstance(first, Tensor) else None


class _UnknownError(Exception):
    """An argument of an unknown kind."""


def _double(name: str, value: Any) -> Any:
    if value is None or name in SHARED:
        return value
    if name == "timestep":
        # One for all, or one for each of the batch.
        return cat((value, value)) if isinstance(value, Tensor) and value.ndim and len(value) > 1 else value
    if name in NESTED and isinstance(value, dict):
        return {key: _double(key, item) for key, item in value.items()}
    if name in LISTED and isinstance(value, list):
        return [*value, *value]
    if name in BATCHED and isinstance(value, Tensor):
        return cat((value, value))
    if name in BATCHED and isinstance(value, list | tuple):
        return type(value)(_double(name, item) for item in value)
    raise _UnknownError
