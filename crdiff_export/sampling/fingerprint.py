"""Short hashes of a pipeline's parts beside the model that is pruned: results depend on them, too."""

import hashlib
import json
from typing import Any


def digest(data: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of some bytes, after `sha256:`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def scheduler(pipe: Any) -> str:
    """Return the class of a pipeline's scheduler and the hash of its settings."""
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return f"{type(pipe.scheduler).__name__} {digest(json.dumps(config, sort_keys=True, default=str).encode())}"


def other_parts(pipe: Any, model: Any) -> str:
    """Hash the weights of a pipeline's other parts (text encoders, VAE) as they are in memory.

    Args:
        pipe: A diffusers pipeline.
        model: Its UNet or transformer, which is left out.

    Returns:
        The hash, as `digest` gives it.

    """
    from safetensors.torch import save

    digest = hashlib.sha256()
    for part, component in sorted(pipe.components.items()):
        if component is model or not hasattr(component, "state_dict"):
            continue
        for name, tensor in sorted(component.state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(save({"": tensor.cpu().contiguous()}))
    return f"sha256:{digest.hexdigest()[:16]}"
