"""The hashes of what is beside a pipeline's model, which searches and calibrations that go on compare."""

import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from crdiff_export.sampling import fingerprint


def pipeline() -> Any:
    """A model, and two parts beside it with one number each."""
    made = {name: nn.Linear(1, 1, bias=False) for name in ("vae", "unet", "text_encoder")}
    for number, part in enumerate(made.values()):
        nn.init.constant_(part.weight, number)
    config = {"beta_end": 0.5, "steps": None, "_class_name": "Euler"}
    scheduler = SimpleNamespace(config=config)
    return SimpleNamespace(**made, scheduler=scheduler, components={**made, "scheduler": scheduler, "tokenizer": None})


def file(number: bytes) -> bytes:
    """A safetensors file of one float32, whose tensor has no name."""
    head = b'{"":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + number


def short(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def test_the_parts_beside_the_model() -> None:
    """Spelt out: studies of earlier versions hold these values."""
    pipe = pipeline()
    one = b"text_encoder.weight" + file(b"\0\0\0\x40")
    other = b"vae.weight" + file(b"\0\0\0\0")
    assert fingerprint.other_parts(pipe, pipe.unet) == short(one + other)
    nn.init.constant_(pipe.unet.weight, 7)
    assert fingerprint.other_parts(pipe, pipe.unet) == short(one + other)
    with torch.no_grad():
        pipe.vae.weight.add_(1)
    assert fingerprint.other_parts(pipe, pipe.unet) != short(one + other)


def test_the_scheduler_with_its_settings() -> None:
    pipe = pipeline()
    config = b'{"beta_end": 0.5, "steps": null}'
    assert fingerprint.scheduler(pipe) == f"SimpleNamespace {short(config)}"
