"""A diffusers folder and the one file that crdiff makes of it, both loaded by ComfyUI, on the CPU.

    python -m tests.support.comfyui_layouts COMFYUI WORK FOLDER FILE

ComfyUI has a loader of its own for diffusers folders. Prints one JSON object: what ComfyUI logged of keys that it
missed or did not know while it loaded the file, and how far conditioning, latents after two steps and the decoded
picture are from those of the folder.
"""

import json
import logging
import sys
from typing import Any

from tests.support.comfyui_start import far

# isort: split
import comfy.diffusers_load
import comfy.sample
import comfy.samplers
import comfy.sd
import torch

FOLDER, FILE = sys.argv[1:3]
SIDE = 8


def draw(model: Any, clip: Any, vae: Any) -> dict[str, torch.Tensor]:
    """What a prompt becomes: its conditioning, latents after two steps, and pixels."""
    tokens = clip.tokenize("a lighthouse on a cliff")
    cond = clip.encode_from_tokens_scheduled(tokens)
    latent = torch.zeros(1, 4, SIDE, SIDE)
    noise = comfy.sample.prepare_noise(latent, 3)
    samples = comfy.sample.sample(
        model, noise, 2, 2.0, "euler", "normal", cond, cond, latent, disable_pbar=True, seed=3
    )
    return {"cond": cond[0][0], "pooled": cond[0][1]["pooled_output"], "latent": samples, "pixels": vae.decode(samples)}


class Heard(logging.Handler):
    """Keeps what ComfyUI logs about keys."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if any(word in text for word in ("missing", "unexpected", "left over")):
            self.lines.append(text[:2000])


def main() -> None:
    heard = Heard()
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger().addHandler(heard)
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(FILE)
    lines = list(heard.lines)
    ours = draw(model, clip, vae)
    del model, clip, vae
    folder = draw(*comfy.diffusers_load.load_diffusers(FOLDER))
    distances = {name: far(ours[name].detach().float(), folder[name].detach().float()) for name in folder}
    sys.stdout.write(json.dumps({"keys": lines, **distances}) + "\n")


main()
