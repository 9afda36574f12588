"""CLIPScore, PickScore and the aesthetic predictor: tiny random models, computed again by hand."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from crdiff_export import hub
from crdiff_export.errors import HubError, PlanError, ScorerError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.scorers import Scorer, aesthetic, clip, weights
from crdiff_export.evaluate.scorers.weights import Repo
from tests.support.loopback_hub import LoopbackHub
from tests.support.messages import raises
from tests.support.scoring import (
    DEVIATION,
    HEAD,
    MEAN,
    Fetched,
    Tensors,
    attended,
    cut,
    graded,
    linear,
    noise,
    normalised,
    patches,
    serve,
    values,
)

Factory = Callable[..., Scorer]
SIDE, PATCH, HEADS, EPS = 24, 8, 4, 1e-5
LETTERS = [chr(i) for i in range(ord("!"), ord("~") + 1)]
MARKERS = ["<|startoftext|>", "<|endoftext|>"]
VOCABULARY = {word: i for i, word in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *MARKERS])}
PROMPTS = ["a red cat", "dog", "a very long prompt " * 30, "", "a red cat"]


def write_words(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "do_rescale": True, "image_mean": MEAN, "image_std": DEVIATION, "resample": 3, "size": {"shortest_edge": SIDE},
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
    }  # fmt: skip
    words = {"bos_token": MARKERS[0], "eos_token": MARKERS[1], "pad_token": MARKERS[1], "unk_token": MARKERS[1]}
    tables = {
        "preprocessor_config.json": pictures,
        "tokenizer_config.json": {**words, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
        "vocab.json": VOCABULARY,
    }
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_model(folder: Path, seed: int) -> None:
    """A CLIP of random weights, none of which is 0 or 1."""
    from transformers import CLIPConfig, CLIPModel

    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(VOCABULARY) - 2, "eos_token_id": len(VOCABULARY) - 1}
    ends |= {"pad_token_id": len(VOCABULARY) - 1}
    text = {**encoder, **ends, "vocab_size": len(VOCABULARY), "max_position_embeddings": 77}
    config = CLIPConfig(
        text_config=text,
        vision_config={**encoder, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
        model.logit_scale.fill_(math.log(20.0))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories, by their ids; the words of PickScore are somewhere else."""
    folder = tmp_path_factory.mktemp("repos")
    with weights.quiet():
        for seed, repo in enumerate((clip.CLIP_L, clip.PICK_SCORE)):
            write_model(folder / repo.id, seed)
    for repo in (clip.CLIP_L, clip.CLIP_H):
        write_words(folder / repo.id)
    (folder / aesthetic.REPO.id).mkdir(parents=True)
    torch.save(head_of(16), folder / aesthetic.REPO.id / aesthetic.FILE)
    return folder


def head_of(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, wide in HEAD.items():
        tensors[f"layers.{name}.weight"] = torch.randn(wide, width, generator=generator) / math.sqrt(width)
        tensors[f"layers.{name}.bias"] = torch.randn(wide, generator=generator)
        width = wide
    return tensors


@pytest.fixture
def served(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    return serve(shelf, monkeypatch)


def pictures() -> list[Image.Image]:
    return noise([(24, 24), (40, 31), (7, 90), (100, 37), (5, 3)], seed=3)


# The same by hand


def encoded(x: Tensor, tensors: Tensors, name: str, mask: Tensor) -> Tensor:
    for layer in range(2):
        at = f"{name}.encoder.layers.{layer}"
        y = normalised(x, tensors, f"{at}.layer_norm1", EPS)
        q, k, v = (linear(y, tensors, f"{at}.self_attn.{which}_proj") for which in "qkv")
        x = x + linear(attended(q, k, v, HEADS, mask), tensors, f"{at}.self_attn.out_proj")
        y = linear(normalised(x, tensors, f"{at}.layer_norm2", EPS), tensors, f"{at}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), tensors, f"{at}.mlp.fc2")
    return x


def image_vector(image: Image.Image, tensors: Tensors) -> Tensor:
    at = "vision_model.embeddings"
    kernel = tensors[f"{at}.patch_embedding.weight"].reshape(32, -1)
    squares = patches(cut(image, SIDE, math.floor), PATCH)
    x = torch.cat([tensors[f"{at}.class_embedding"][None], squares @ kernel.T])
    x = normalised(x + tensors[f"{at}.position_embedding.weight"], tensors, "vision_model.pre_layrnorm", EPS)
    x = encoded(x, tensors, "vision_model", torch.zeros(()))
    x = linear(normalised(x[0], tensors, "vision_model.post_layernorm", EPS), tensors, "visual_projection")
    return functional.normalize(x, dim=0)


def text_vector(prompt: str, tensors: Tensors) -> Tensor:
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in prompt.split()]
    tokens = [VOCABULARY[token] for word in words for token in word][:75]
    tokens = [VOCABULARY[MARKERS[0]], *tokens, VOCABULARY[MARKERS[1]]]
    at = "text_model.embeddings"
    x = tensors[f"{at}.token_embedding.weight"][tokens] + tensors[f"{at}.position_embedding.weight"][: len(tokens)]
    x = encoded(x, tensors, "text_model", torch.full((len(x), len(x)), -math.inf).triu(1))
    x = linear(normalised(x[-1], tensors, "text_model.final_layer_norm", EPS), tensors, "text_projection")
    return functional.normalize(x, dim=0)


def weights_of(path: Path) -> Tensors:
    return {name: tensor.double() for name, tensor in load_file(path / clip.FILE).items()}


def by_hand(folder: Path, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    tensors = weights_of(folder)
    return [
        float(image_vector(image, tensors) @ text_vector(prompt, tensors))
        for image, prompt in zip(images, prompts, strict=True)
    ]


@pytest.fixture
def in_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches: each picture is computed by hand by itself, so what else is in its batch does not count."""
    for module in (clip, aesthetic):
        monkeypatch.setattr(module, "BATCH", 2)


def test_clip_score_is_the_cosine(shelf: Path, served: Fetched, in_twos: None) -> None:
    scorer = clip.clip_score("cpu", "fp32")
    expected = by_hand(shelf / clip.CLIP_L.id, pictures(), PROMPTS)
    assert len({round(value, 3) for value in expected}) == 5
    assert min(expected) < 0, "no clamp"
    assert values(scorer, pictures(), PROMPTS) == pytest.approx(expected, abs=1e-5)


def test_pick_score_is_the_logit(shelf: Path, served: Fetched, in_twos: None) -> None:
    scorer = clip.pick_score("cpu", "fp32")
    expected = [20 * cosine for cosine in by_hand(shelf / clip.PICK_SCORE.id, pictures(), PROMPTS)]
    assert values(scorer, pictures(), PROMPTS) == pytest.approx(expected, abs=2e-4)


def test_the_aesthetic_head(shelf: Path, served: Fetched, in_twos: None) -> None:
    scorer = aesthetic.aesthetic("cpu", "fp32")
    tensors = weights_of(shelf / clip.CLIP_L.id)
    head = {name: tensor.double() for name, tensor in head_of(16).items()}
    expected = [graded(image_vector(image, tensors), head, "layers.") for image in pictures()]
    scores = values(scorer, pictures(), PROMPTS)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert scores == pytest.approx(values(scorer, pictures(), ["another"] * 5)), "the prompt does not count"


def test_the_heads_published_size() -> None:
    layers = aesthetic.head(768)
    assert [type(layer).__name__ for layer in layers] == [
        *("Linear", "Dropout", "Linear", "Dropout", "Linear", "Dropout", "Linear", "Linear")
    ]
    assert {name: tuple(value.shape) for name, value in layers.named_parameters()} == {
        name.removeprefix("layers."): tuple(value.shape) for name, value in head_of(768).items()
    }
    assert not layers.training


SCORERS = pytest.mark.parametrize(
    "factory", [clip.clip_score, clip.pick_score, aesthetic.aesthetic], ids=["clip", "pick", "aesthetic"]
)


@SCORERS
def test_every_mode_is_seen_as_rgb(served: Fetched, factory: Factory) -> None:
    scorer = factory("cpu", "fp32")
    image = pictures()[1]
    clear = image.convert("RGBA")
    clear.putalpha(0)
    grey = image.convert("L")
    scores = values(scorer, [image, clear, grey, grey.convert("RGB")], ["a cat"] * 4)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[2] == pytest.approx(scores[3], abs=1e-4)
    assert abs(scores[0] - scores[2]) > 1e-3


def test_half_precision(served: Fetched) -> None:
    full = values(clip.clip_score("cpu", "fp32"), pictures(), PROMPTS)
    half = values(clip.clip_score("cpu", "bf16"), pictures(), PROMPTS)
    assert half != full
    assert half == pytest.approx(full, abs=0.1)


# Where the weights come from


def test_the_fingerprints(served: Fetched) -> None:
    records = [factory("cpu", "fp32").fingerprint() for factory in (clip.clip_score, clip.pick_score)]
    assert [record["name"] for record in records] == ["clip-score", "pick-score"]
    assert records[0]["weights"] == "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
    assert records[1]["preprocessing"].startswith("laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495")
    assert records[0]["formula"] != records[1]["formula"]
    for record in records:
        assert len(record["sha256"]) == 64
        assert {"torch", "transformers", "tokenizers", "numpy", "pillow", "device", "dtype"} < set(record)
        assert all(isinstance(value, str) for value in record.values())
    head = aesthetic.aesthetic("cpu", "bf16").fingerprint()
    assert head["head"] == "trl-lib/ddpo-aesthetic-predictor@e62d0b3d501a41272ad2c7d6454c99aefe8be459"
    assert head["dtype"] == "bf16"
    assert head["sha256"] == records[0]["sha256"] != head["head sha256"]


def test_load_fetches_from_the_hub(served: Fetched) -> None:
    for name in ("clip-score", "pick-score", "aesthetic"):
        scorer = scorers.load(name)
        assert len(scorer.score(pictures(), PROMPTS)) == 5
        scorer.close()
    assert set(served) == {
        (clip.CLIP_L.id, None, clip.CLIP_L.commit),
        (clip.CLIP_L.id, "model.safetensors", clip.CLIP_L.commit),
        (clip.PICK_SCORE.id, None, clip.PICK_SCORE.commit),
        (clip.PICK_SCORE.id, "model.safetensors", clip.PICK_SCORE.commit),
        (clip.CLIP_H.id, None, clip.CLIP_H.commit),
        (aesthetic.REPO.id, "sac+logos+ava1-l14-linearMSE.pth", aesthetic.REPO.commit),
    }
    assert all(len(str(commit)) == 40 for _, _, commit in served)


def test_the_real_client_fetches_and_keeps(
    loopback_hub: LoopbackHub, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a connection, and then without one."""
    loopback_hub.lead_here(monkeypatch, tmp_path / "cache")
    pinned = {}
    for repo in (clip.CLIP_L, aesthetic.REPO):
        files = {path.name: path.read_bytes() for path in (shelf / repo.id).iterdir()}
        pinned[repo.id] = Repo(repo.id, loopback_hub.add_repo(repo.id, files))
    monkeypatch.setattr(aesthetic, "CLIP_L", pinned[clip.CLIP_L.id])
    monkeypatch.setattr(aesthetic, "REPO", pinned[aesthetic.REPO.id])
    answers = []
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        scorer = scorers.load("aesthetic")
        answers.append((values(scorer, pictures(), PROMPTS), scorer.fingerprint()))
        assert bool(loopback_hub.requests) != offline
        loopback_hub.requests.clear()
    assert answers[0] == answers[1]
    assert answers[0][1]["head sha256"] == weights.sha256(shelf / aesthetic.REPO.id / aesthetic.FILE)


@pytest.mark.parametrize(
    ("name", "repo", "files"),
    [
        ("clip-score", clip.CLIP_L, "--include '*.json' --include '*.txt'"),
        ("aesthetic", aesthetic.REPO, "'sac+logos+ava1-l14-linearMSE.pth'"),
    ],
)
def test_weights_that_are_not_here(monkeypatch: pytest.MonkeyPatch, name: str, repo: Repo, files: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises(HubError, repo.id) as error:
        scorers.load(name)
    assert f"`hf download {repo.id} {files} --revision {repo.commit}`" in error.value.hint


def test_other_answers_of_the_hub_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object) -> Path:
        raise HubError("gated", "Log in.")

    monkeypatch.setattr(hub, "fetch_parts", gated)
    with raises(HubError, "gated") as error:
        scorers.load("clip-score")
    assert error.value.hint == "Log in."


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'transformers'", name=name)

    monkeypatch.setattr(weights, "import_module", fail)
    for name in ("clip-score", "pick-score", "image-reward", "aesthetic"):
        with raises(ScorerError, "transformers"):
            scorers.load(name)


def test_a_place_that_is_none(served: Fetched) -> None:
    with raises(ScorerError, "fp8"):
        clip.clip_score("cpu", "fp8")
    with pytest.raises(PlanError, match="cuda:99"):  # the rest is torch's
        clip.clip_score("cuda:99", "fp32")


def test_a_clip_with_other_weights(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(shelf / clip.CLIP_L.id, tmp_path / clip.CLIP_L.id)
    serve(tmp_path, monkeypatch)
    tensors = load_file(shelf / clip.CLIP_L.id / clip.FILE)
    positions = {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("text", "vision")}
    del tensors["visual_projection.weight"]
    save_file({**tensors, **positions, "extra": torch.zeros(2)}, folder / clip.FILE, {"format": "pt"})
    with raises(ScorerError, clip.CLIP_L, "visual_projection.weight", "extra"):
        clip.clip_score("cpu", "fp32")


@pytest.mark.parametrize("kind", ["empty", "text", "pickle", "list", "cut"])
def test_a_head_that_cannot_be_read(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "head.pth"
    monkeypatch.setattr(weights, "fetch", lambda *_: path)
    whole = (shelf / aesthetic.REPO.id / aesthetic.FILE).read_bytes()
    if kind in ("pickle", "list"):
        torch.save([1] if kind == "list" else {"a": Fraction(1, 2)}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"<html>", "cut": whole[:5000]}[kind])
    with raises(ScorerError, path):
        aesthetic.aesthetic("cpu", "fp32")


def test_a_head_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "head.pth"
    monkeypatch.setattr(weights, "fetch", lambda *_: path)
    tensors = head_of(16)
    tensors["layers.6.bias"] = torch.zeros(3)
    tensors["layers.9.bias"] = tensors.pop("layers.7.bias")
    torch.save(tensors, path)
    with pytest.raises(ScorerError) as error:
        aesthetic.aesthetic("cpu", "fp32")
    for text in (f"{aesthetic.REPO}/{aesthetic.FILE}", '"7.bias"', '"9.bias"', "size mismatch for 6.bias"):
        assert text in error.value.message
