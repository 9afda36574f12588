"""What a pipeline consists of beside the model that is pruned, as short hashes: what was made with it depends on it."""

import hashlib
import json
from typing import Any


def digest(data: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def scheduler(pipe: Any) -> str:
    """The class of a pipeline's scheduler and the hash of its settings."""
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return f"{type(pipe.scheduler).__name__} {digest(json.dumps(config, sort_keys=True, default=str).encode())}"


def others(pipe: Any, model: Any) -> str:
    """The hash of what is beside the pipeline's `model`, as it is in memory: text encoders and VAE."""
    from safetensors.torch import save

    found = hashlib.sha256()
    for part, component in sorted(pipe.components.items()):
        if component is model or not hasattr(component, "state_dict"):
            continue
        for name, tensor in sorted(component.state_dict().items()):
            found.update(f"{part}.{name}".encode())
            found.update(save({"": tensor.cpu().contiguous()}))
    return f"sha256:{found.hexdigest()[:16]}"
