"""ImageReward: a tiny random one under the names of ImageReward.pt, against the same network written out in torch."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.scorers import Scorer, blip, image_reward
from tests.support.messages import raises
from tests.support.scoring import (
    HEAD,
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

TINY = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
WIDE, HEADS, LAYERS = 24, 3, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "very", "##s", "on", ",", "blue"]
CONFIG = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_size": WIDE,
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "intermediate_size": 40, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40, "model_type": "bert", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(WORDS) + 2, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip
PROMPTS = ["a red cat", "dogs", "very, very blue", "a " + "red " * 60 + "cat", ""]


def shapes(vision: dict[str, int], text: dict[str, int], head: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of ImageReward.pt, as the modules of its authors name them."""
    found: dict[str, tuple[int, ...]] = {}

    def pair(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    wide, at = vision["hidden_size"], "blip.visual_encoder"
    found[f"{at}.cls_token"] = (1, 1, wide)
    found[f"{at}.pos_embed"] = (1, 1 + (vision["image_size"] // vision["patch_size"]) ** 2, wide)
    pair(f"{at}.patch_embed.proj", wide, 3, vision["patch_size"], vision["patch_size"])
    for i in range(vision["num_hidden_layers"]):
        block = f"{at}.blocks.{i}"
        pair(f"{block}.norm1", wide)
        pair(f"{block}.attn.qkv", 3 * wide, wide)
        pair(f"{block}.attn.proj", wide, wide)
        pair(f"{block}.norm2", wide)
        pair(f"{block}.mlp.fc1", 4 * wide, wide)
        pair(f"{block}.mlp.fc2", wide, 4 * wide)
    pair(f"{at}.norm", wide)
    width, between, at = text["hidden_size"], text["intermediate_size"], "blip.text_encoder"
    found[f"{at}.embeddings.position_ids"] = (1, text["max_position_embeddings"])
    found[f"{at}.embeddings.word_embeddings.weight"] = (text["vocab_size"], width)
    found[f"{at}.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], width)
    pair(f"{at}.embeddings.LayerNorm", width)
    for i in range(text["num_hidden_layers"]):
        layer = f"{at}.encoder.layer.{i}"
        for kind, source in (("attention", width), ("crossattention", wide)):
            pair(f"{layer}.{kind}.self.query", width, width)
            pair(f"{layer}.{kind}.self.key", width, source)
            pair(f"{layer}.{kind}.self.value", width, source)
            pair(f"{layer}.{kind}.output.dense", width, width)
            pair(f"{layer}.{kind}.output.LayerNorm", width)
        pair(f"{layer}.intermediate.dense", between, width)
        pair(f"{layer}.output.dense", width, between)
        pair(f"{layer}.output.LayerNorm", width)
    pair("blip.vision_proj", 256, wide)
    pair("blip.text_proj", 256, width)
    for name, wide in HEAD.items():
        pair(f"mlp.layers.{name}", wide, head)
        head = wide
    return found


def sizes() -> dict[str, int]:
    return {name: value for name, value in CONFIG.items() if isinstance(value, int)}


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(TINY, sizes(), WIDE).items():
        around = 1.0 if ("norm" in name.lower() and name.endswith("weight")) else 0.0
        scale = 1 / math.sqrt(shape[-1]) if name.startswith("mlp") else 0.3
        if any(part in name for part in ("cls_token", "pos_embed", "patch_embed")):
            scale = 0.003  # so small that what a norm adds to the variance is seen
        tensors[name] = around + scale * torch.randn(shape, generator=generator)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


# The same network, written out


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def seen_by_hand(pixels: Tensor, tensors: Tensors) -> Tensor:
    at = "blip.visual_encoder"
    kernel = tensors[f"{at}.patch_embed.proj.weight"].reshape(TINY["hidden_size"], -1)
    x = patches(pixels, TINY["patch_size"]) @ kernel.T
    x = torch.cat([tensors[f"{at}.cls_token"][0], x + tensors[f"{at}.patch_embed.proj.bias"]])
    x = x + tensors[f"{at}.pos_embed"][0]
    for i in range(TINY["num_hidden_layers"]):
        block = f"{at}.blocks.{i}"
        q, k, v = linear(normalised(x, tensors, f"{block}.norm1", 1e-6), tensors, f"{block}.attn.qkv").chunk(3, -1)
        y = attended(q, k, v, TINY["num_attention_heads"], torch.zeros(()))
        x = x + linear(y, tensors, f"{block}.attn.proj")
        y = gelu(linear(normalised(x, tensors, f"{block}.norm2", 1e-6), tensors, f"{block}.mlp.fc1"))
        x = x + linear(y, tensors, f"{block}.mlp.fc2")
    return normalised(x, tensors, f"{at}.norm", 1e-6)


def read_by_hand(tokens: list[int], mask: list[int], seen: Tensor, tensors: Tensors) -> Tensor:
    at, eps = "blip.text_encoder", 1e-12
    x = tensors[f"{at}.embeddings.word_embeddings.weight"][tokens]
    x = x + tensors[f"{at}.embeddings.position_embeddings.weight"][: len(tokens)]
    x = normalised(x, tensors, f"{at}.embeddings.LayerNorm", eps)
    hidden = (1 - torch.tensor(mask, dtype=x.dtype)) * -10000.0
    for i in range(LAYERS):
        for kind, source, allowed in (("attention", None, hidden), ("crossattention", seen, torch.zeros(()))):
            own = f"{at}.encoder.layer.{i}.{kind}"
            other = x if source is None else source
            q = linear(x, tensors, f"{own}.self.query")
            k, v = (linear(other, tensors, f"{own}.self.{which}") for which in ("key", "value"))
            y = linear(attended(q, k, v, HEADS, allowed), tensors, f"{own}.output.dense")
            x = normalised(y + x, tensors, f"{own}.output.LayerNorm", eps)
        layer = f"{at}.encoder.layer.{i}"
        y = linear(gelu(linear(x, tensors, f"{layer}.intermediate.dense")), tensors, f"{layer}.output.dense")
        x = normalised(y + x, tensors, f"{layer}.output.LayerNorm", eps)
    return x[0]


def tokens_by_hand(prompt: str) -> tuple[list[int], list[int]]:
    words: list[str] = []
    for word in prompt.replace(",", " , ").split():
        words += [word] if word in WORDS else [word.removesuffix("s"), "##s"]
    numbers = [WORDS.index(word) for word in ("[CLS]", *words[:33], "[SEP]")]
    return numbers + [0] * (35 - len(numbers)), [1] * len(numbers) + [0] * (35 - len(numbers))


def by_hand(image: Image.Image, prompt: str, tensors: Tensors) -> float:
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    seen = seen_by_hand(cut(image, TINY["image_size"], round), tensors)
    reward = graded(read_by_hand(*tokens_by_hand(prompt), seen, tensors), tensors, "mlp.layers.")
    return (reward - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repos")
    reward, bert = folder / image_reward.REPO.id, folder / image_reward.BERT.id
    for path in (reward, bert):
        path.mkdir(parents=True)
    torch.save(random_weights(), reward / image_reward.FILE)
    (reward / image_reward.CONFIG).write_text(json.dumps(CONFIG))
    (bert / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    (bert / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.fixture(autouse=True)
def served(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    return serve(shelf, monkeypatch)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blip, "VISION", TINY)


@pytest.fixture
def scorer(tiny: None) -> Scorer:
    return image_reward.image_reward("cpu", "fp32")


def pictures() -> list[Image.Image]:
    return noise([(32, 32), (47, 33), (9, 100), (101, 40), (1, 1)], seed=4)


@pytest.fixture
def other(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test may put another file of weights."""
    serve(shelf, monkeypatch, ImageReward=tmp_path / image_reward.FILE)
    return tmp_path / image_reward.FILE


def test_it_is_the_network_written_out(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    """Of every picture by itself: what else is in its batch does not count, nor a word after the 35th token."""
    monkeypatch.setattr(image_reward, "BATCH", 2)
    scorer = image_reward.image_reward("cpu", "fp32")
    tensors = random_weights()
    expected = [by_hand(image, prompt, tensors) for image, prompt in zip(pictures(), PROMPTS, strict=True)]
    assert len({round(value, 2) for value in expected}) == 5
    assert values(scorer, pictures(), PROMPTS) == pytest.approx(expected, abs=1e-5)


def test_every_mode_is_seen_as_rgb(scorer: Scorer) -> None:
    image = pictures()[1]
    clear = image.convert("RGBA")
    clear.putalpha(7)
    few = image.quantize(16)
    scores = values(scorer, [image, clear, few, few.convert("RGB")], ["a cat"] * 4)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[2] == pytest.approx(scores[3], abs=1e-5)


def test_half_precision(scorer: Scorer) -> None:
    half = values(image_reward.image_reward("cpu", "bf16"), pictures(), PROMPTS)
    full = values(scorer, pictures(), PROMPTS)
    assert half != full
    assert half == pytest.approx(full, abs=0.5)


def test_the_names_of_the_published_size_all_have_a_place() -> None:
    """625 tensors of so many bytes: with a zip's own, 1786880927 as the Hub says of ImageReward.pt."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text |= {"max_position_embeddings": 512, "vocab_size": 30524}
    published = shapes(blip.VISION, text, 768)
    numbers = sum(math.prod(shape) for name, shape in published.items() if not name.endswith("position_ids"))
    assert len(published) == 625
    assert 4 * numbers + 8 * 512 == 1_786_667_908
    found = dict(blip.rename_tensors(dict.fromkeys(published, torch.zeros(()))))
    assert len(found) == 625 - 5
    full = {**CONFIG, **text, "num_attention_heads": 12}
    with torch.device("meta"):
        network = blip.network({name: full[name] for name in blip.TEXT_CONFIG}, blip.VISION)
    sizes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    needed = {name: shape for name, shape in published.items() if not blip.UNUSED.fullmatch(name)}
    assert sizes == dict(zip(found, needed.values(), strict=True))


def test_without_the_unused_ones(scorer: Scorer, other: Path) -> None:
    torch.save({name: tensor for name, tensor in random_weights().items() if not blip.UNUSED.fullmatch(name)}, other)
    without = image_reward.image_reward("cpu", "fp32")
    assert values(without, pictures(), PROMPTS) == values(scorer, pictures(), PROMPTS)
    assert without.fingerprint()["sha256"] != scorer.fingerprint()["sha256"]


def test_a_file_with_other_weights(tiny: None, other: Path) -> None:
    tensors = random_weights()
    del tensors["blip.visual_encoder.blocks.1.attn.proj.bias"]
    tensors["blip.text_encoder.pooler.dense.bias"] = torch.zeros(2)
    tensors["blip.visual_encoder.blocks.7.norm1.bias"] = torch.zeros(2)
    tensors["mlp.layers.7.bias"] = torch.zeros(2)
    torch.save(tensors, other)
    wrong = (
        'Missing key(s) in state_dict: "vision.encoder.layers.1.self_attn.projection.bias"',
        "Unexpected key(s) in state_dict: ",
        '"text.pooler.dense.bias"',
        '"vision.encoder.layers.7.layer_norm1.bias"',
        "size mismatch for head.7.bias",
    )
    with pytest.raises(ScorerError) as error:
        image_reward.image_reward("cpu", "fp32")
    for text in (f"{image_reward.REPO}/ImageReward.pt", *wrong):
        assert text in error.value.message


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"),
     (json.dumps({**CONFIG, "vocab_size": 99}), "its last word is number 15")],
    ids=["cut", "list", "empty", "other words"],
)  # fmt: skip
def test_another_configuration_is_refused(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: str
) -> None:
    (tmp_path / image_reward.CONFIG).write_text(text)
    serve(shelf, monkeypatch, med_config=tmp_path / image_reward.CONFIG)
    with raises(ScorerError, image_reward.REPO, error):
        image_reward.image_reward("cpu", "fp32")


def test_the_fingerprint(scorer: Scorer) -> None:
    record = scorer.fingerprint()
    assert record["weights"] == "THUDM/ImageReward@c63dec8373b5c3728b1d250865c402c9546be210"
    assert record["words"] == "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
    assert len(record["sha256"]) == 64
    assert "35 tokens" in record["preprocessing"]


def test_load_fetches_three_things(tiny: None, served: Fetched) -> None:
    scorer = scorers.load("0.5*image-reward")
    assert [(repo, file) for repo, file, _ in served] == [
        (image_reward.REPO.id, "med_config.json"),
        (image_reward.BERT.id, None),
        (image_reward.REPO.id, "ImageReward.pt"),
    ]
    (score,) = scorer.score(pictures()[:1], PROMPTS[:1])
    assert score.parts["image-reward"] == pytest.approx(by_hand(pictures()[0], PROMPTS[0], random_weights()), abs=1e-5)
    scorer.close()
    scorer.close()


@pytest.mark.parametrize("size", [(32, 32), (45, 33), (33, 45), (200, 37), (3, 64), (64, 3)])
def test_pictures_are_cut_as_torchvision_does(size: tuple[int, int]) -> None:
    (image,) = noise([size], seed=1)
    found = image_reward.pixels_of(image, 32)
    assert found.shape == (3, 32, 32)
    assert (found.double() - cut(image, 32, round)).abs().max() < 1e-5
