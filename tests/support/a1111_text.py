"""Stand-ins for the text encoders of SD2.1 and SDXL, which are too large for a check: numbers from a text's bytes."""

import zlib
from typing import Any

import torch
from sgm.modules.encoders.modules import AbstractEmbModel

TOKENS = 77


def numbers(texts: list[str], *shape: int) -> torch.Tensor:
    """Random numbers of this shape for each text."""
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) for text in texts]
    return torch.stack(made)


class Text(torch.nn.Module):
    """SD2.1's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def encode(self, texts: list[str]) -> torch.Tensor:
        return numbers(texts, TOKENS, self.width)

    def encode_embedding_init_text(self, text: str, _count: int) -> torch.Tensor:
        return numbers([text], self.width)


class TextXl(AbstractEmbModel):  # type: ignore[misc]  # it has no types
    """SDXL's two in one: [batch, 77, 2048], and [batch, 1280] for all of the text."""

    def forward(self, texts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return numbers(texts, TOKENS, 2048), numbers(texts, 1280)

    def encode_embedding_init_text(self, text: str, _count: int) -> torch.Tensor:
        return numbers([text], 2048)
