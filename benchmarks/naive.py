"""The public code's way with one file: load everything, concatenate, kthvalue, mask, save. SOURCE OUTPUT RATIO."""

import sys

import torch
from safetensors.torch import load_file, save_file

GROUPS = {"down": "input_blocks.", "mid": "middle_block.", "up": "output_blocks."}


def main(source: str, output: str, ratio: float) -> None:
    """Prune an original-layout UNet checkpoint."""
    tensors = load_file(source)
    for block in GROUPS.values():
        start = "model.diffusion_model." + block
        names = [
            name
            for name, tensor in tensors.items()
            if name.startswith(start) and name.endswith(".weight") and tensor.ndim > 1
            if ".attn1." in name or ".ff." in name
        ]
        magnitudes = torch.cat([tensors[name].abs().flatten() for name in names])
        threshold = magnitudes.kthvalue(max(1, int(len(magnitudes) * ratio))).values
        del magnitudes
        for name in names:
            tensors[name].mul_(tensors[name].abs() > threshold)
    save_file(tensors, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
