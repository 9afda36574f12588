"""Tiny pipelines with text encoders, and runs of the calibration's runner over them."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers

from crdiff_export import ExportRequest, Size
from crdiff_export.calibrate import Setting, runner
from crdiff_export.calibrate.setting import CalibrationResult
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.models import demo
from crdiff_export.models.families import by_id
from crdiff_export.prune import plan as plan_module
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling.session import Session
from tests.support.tiny_pipelines import FAMILIES, KINDS, MISTRAL, POOLED, QWEN, T5, Kind

NATIVE, SIZE = Size(64, 64), Size(96, 64)
PROMPTS = ("two red circles on grey", "a blue square on white", "a green circle on black")


@cache
def tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(str(demo.config() / "tokenizer"))


def clip(width: int, projection: int | None = None) -> Any:
    """A CLIP text encoder of that width."""
    words = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, projection_dim=projection or width,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    made = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return made(config).eval()


def t5(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer()), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


@dataclass(frozen=True)
class States:
    """The hidden states of layers that are not there."""

    first: torch.Tensor

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.first * (1 + layer % 32) / 32


class Words(torch.nn.Module):
    """Stands for a language model, of which a pipeline takes hidden states: each is a word's own vector, scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(64, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.words.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.words.weight.device

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=States(self.words(input_ids % len(self.words.weight))))


class Chat:
    """Stands for the processor of FLUX.2's language model."""

    def apply_chat_template(self, messages: list[Any], max_length: int, **_: Any) -> Any:
        texts = [" ".join(part["text"] for turn in chat for part in turn["content"]) for chat in messages]
        return tokenizer()(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")


ENCODERS: dict[str, Any] = {
    "sd15": lambda: {"text_encoder": clip(768)},
    "sdxl": lambda: {"text_encoder": clip(768), "text_encoder_2": clip(1280, POOLED)},
    "sd3": lambda: {"text_encoder": clip(6, POOLED // 2), "text_encoder_2": clip(6, POOLED // 2)},
    "flux": lambda: {"text_encoder": clip(POOLED), "text_encoder_2": t5(T5)},
    "chroma": lambda: {"text_encoder": t5(T5)},
    "qwen": lambda: {"text_encoder": Words(QWEN)},
    "flux2": lambda: {"text_encoder": Words(MISTRAL // 3)},
}


def speaking(kind: str) -> Any:
    """A tiny pipeline that understands prompts, the same every time."""
    pipe = KINDS[kind].make()
    give_words(pipe, kind)
    if kind == "sd15":
        pipe.scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, beta_schedule="scaled_linear")
    for part in (pipe.vae, getattr(pipe, "unet", None) or pipe.transformer):
        part.eval()
    return pipe


def give_words(pipe: Any, kind: str) -> None:
    """Give a pipeline the text encoders that it lacks."""
    torch.manual_seed(1)
    encoders = ENCODERS[kind]()
    words = {name.replace("text_encoder", "tokenizer"): tokenizer() for name in encoders}
    if kind == "flux2":
        words["tokenizer"] = Chat()
    pipe.register_modules(**encoders, **words)
    if kind in ("sd3", "flux"):
        pipe.tokenizer_max_length = tokenizer().model_max_length  # looked up when the pipeline is made


def without_words(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Take a pipeline's text encoders away, and let its class be opened without any."""
    nothing = {name: None for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))}
    opened = type(pipe).from_pretrained
    monkeypatch.setattr(type(pipe), "from_pretrained", partial(opened, **nothing))
    pipe.register_modules(**nothing)
    return pipe


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline, open, and the plan of its base."""

    kind: str
    pipe: Any
    plan: Plan

    @property
    def model(self) -> Any:
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    @property
    def session(self) -> Session:
        return Session(self.pipe, by_id(FAMILIES[self.kind]).pipelines[""])

    def collect(self, target: Path, setting: Setting, progress: Any = None, **options: Any) -> CalibrationResult:
        return runner.collect(self.session, self.plan, setting, target, progress, base=self.kind, **options)


def plan_of(base: Path, size: Size = SIZE) -> Plan:
    """Of all of its layers, whatever the recipe takes."""
    kinds = plan_module.recognise(open_checkpoint(base)).family.kinds
    return plan_variant(ExportRequest(str(base), size, ratio=0.3, targets=tuple(kinds)), open_checkpoint(base))


def tiny(kind: str, folder: Path, pipe: Any = None) -> Tiny:
    made: Kind = KINDS[kind]
    pipe = pipe or speaking(kind)
    return Tiny(kind, pipe, plan_of(made.save(pipe, folder)))


def setting(*statistics: str, count: int = 2, **options: Any) -> Setting:
    pairs = tuple((prompt, 7 + number) for number, prompt in enumerate(PROMPTS[:count]))
    return Setting(SIZE, NATIVE, statistics, pairs, **{"steps": 2, "batch": 2, "samples": 2, **options})
