"""ImageReward: a tiny random one under the names of ImageReward.pt, against the same network written out in torch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.scorers import Scorer, blip, image_reward, weights
from tests.support.messages import raises
from tests.support.scoring import fetch_from, noise, serve, values

Tensors = dict[str, Tensor]
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
    for place, shape in {0: (1024, head), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        pair(f"mlp.layers.{place}", *shape)
    return found


def sizes() -> dict[str, int]:
    return {name: value for name, value in CONFIG.items() if isinstance(value, int)}


def random_weights(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(TINY, sizes(), WIDE).items():
        around = 1.0 if ("norm" in name.lower() and name.endswith("weight")) else 0.0
        scale = 1 / math.sqrt(shape[-1]) if name.startswith("mlp") else 0.3
        if any(part in name for part in ("cls_token", "pos_embed", "patch_embed")):
            scale = 0.003  # so small that what a norm adds to the variance is seen
        found[name] = around + scale * torch.randn(shape, generator=generator)
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return found


# The same network, written out


def norm(x: Tensor, at: str, tensors: Tensors, eps: float) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * tensors[f"{at}.weight"] + tensors[f"{at}.bias"]


def linear(x: Tensor, at: str, tensors: Tensors) -> Tensor:
    return x @ tensors[f"{at}.weight"].T + tensors[f"{at}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    seen = []
    for head in range(heads):
        wide = q.shape[-1] // heads
        part = slice(head * wide, (head + 1) * wide)
        seen.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(wide) + mask, -1) @ v[:, part])
    return torch.cat(seen, -1)


def seen_by_hand(pixels: Tensor, tensors: Tensors) -> Tensor:
    at, patch = "blip.visual_encoder", TINY["patch_size"]
    rows = range(0, TINY["image_size"], patch)
    patches = torch.stack([pixels[:, y : y + patch, x : x + patch].reshape(-1) for y in rows for x in rows])
    x = patches @ tensors[f"{at}.patch_embed.proj.weight"].reshape(TINY["hidden_size"], -1).T
    x = torch.cat([tensors[f"{at}.cls_token"][0], x + tensors[f"{at}.patch_embed.proj.bias"]])
    x = x + tensors[f"{at}.pos_embed"][0]
    for i in range(TINY["num_hidden_layers"]):
        block = f"{at}.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", tensors, 1e-6), f"{block}.attn.qkv", tensors).chunk(3, -1)
        x = x + linear(attend(q, k, v, TINY["num_attention_heads"], torch.zeros(())), f"{block}.attn.proj", tensors)
        y = gelu(linear(norm(x, f"{block}.norm2", tensors, 1e-6), f"{block}.mlp.fc1", tensors))
        x = x + linear(y, f"{block}.mlp.fc2", tensors)
    return norm(x, f"{at}.norm", tensors, 1e-6)


def read_by_hand(tokens: list[int], mask: list[int], seen: Tensor, tensors: Tensors) -> Tensor:
    at, eps = "blip.text_encoder", 1e-12
    x = tensors[f"{at}.embeddings.word_embeddings.weight"][tokens]
    x = x + tensors[f"{at}.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x, f"{at}.embeddings.LayerNorm", tensors, eps)
    hidden = (1 - torch.tensor(mask, dtype=x.dtype)) * -10000.0
    for i in range(LAYERS):
        for kind, source, allowed in (("attention", None, hidden), ("crossattention", seen, torch.zeros(()))):
            own = f"{at}.encoder.layer.{i}.{kind}"
            other = x if source is None else source
            q = linear(x, f"{own}.self.query", tensors)
            k, v = (linear(other, f"{own}.self.{which}", tensors) for which in ("key", "value"))
            y = linear(attend(q, k, v, HEADS, allowed), f"{own}.output.dense", tensors)
            x = norm(y + x, f"{own}.output.LayerNorm", tensors, eps)
        layer = f"{at}.encoder.layer.{i}"
        y = linear(gelu(linear(x, f"{layer}.intermediate.dense", tensors)), f"{layer}.output.dense", tensors)
        x = norm(y + x, f"{layer}.output.LayerNorm", tensors, eps)
    return x[0]


def tokens_by_hand(prompt: str) -> tuple[list[int], list[int]]:
    words: list[str] = []
    for word in prompt.replace(",", " , ").split():
        words += [word] if word in WORDS else [word.removesuffix("s"), "##s"]
    numbers = [WORDS.index(word) for word in ("[CLS]", *words[:33], "[SEP]")]
    return numbers + [0] * (35 - len(numbers)), [1] * len(numbers) + [0] * (35 - len(numbers))


def pixels_by_hand(image: Image.Image, side: int) -> Tensor:
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        image = image.resize((side, int(side * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(side * width / height), side), Image.Resampling.BICUBIC)
    values = np.asarray(image).astype(np.float64) / 255
    top, left = (round((length - side) / 2.0) for length in values.shape[:2])
    values = values[top : top + side, left : left + side]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((values - mean) / deviation).permute(2, 0, 1)


def by_hand(image: Image.Image, prompt: str, tensors: Tensors) -> float:
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = read_by_hand(*tokens_by_hand(prompt), seen_by_hand(pixels_by_hand(image, TINY["image_size"]), tensors), tensors)
    for place in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{place}", tensors)
    return (float(x) - 0.16717362830052426) / 1.0333394966054072


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


@pytest.fixture
def fetch(shelf: Path) -> weights.Fetch:
    return fetch_from(shelf)


@pytest.fixture
def scorer(fetch: weights.Fetch) -> Scorer:
    return image_reward.image_reward("cpu", "fp32", fetch, TINY)


def pictures() -> list[Image.Image]:
    return noise([(32, 32), (47, 33), (9, 100), (101, 40), (1, 1)], seed=4)


def in_place_of(path: Path, name: str, fetch: weights.Fetch) -> weights.Fetch:
    """The same repositories with another file of this name."""
    return lambda repo, file: path if file == name else fetch(repo, file)


def test_it_is_the_network_written_out(scorer: Scorer) -> None:
    tensors = random_weights()
    expected = [by_hand(image, prompt, tensors) for image, prompt in zip(pictures(), PROMPTS, strict=True)]
    assert len({round(value, 2) for value in expected}) == 5
    assert values(scorer, pictures(), PROMPTS) == pytest.approx(expected, abs=1e-5)


def test_prompt_and_picture_both_count(scorer: Scorer) -> None:
    first, second = pictures()[1:3]
    found = values(scorer, [first, first, second], ["a cat", "a dog", "a cat"])
    assert len({round(value, 3) for value in found}) == 3


def test_neither_batch_nor_order_matters(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(), PROMPTS
    together = values(scorer, images, prompts)
    alone = [values(scorer, [image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert values(scorer, images[::-1], prompts[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    monkeypatch.setattr(image_reward, "BATCH", 2)
    assert values(scorer, images, prompts) == pytest.approx(together, abs=1e-5)


def test_words_beyond_the_35th_token_do_not_count(scorer: Scorer) -> None:
    image = pictures()[1]
    found = values(scorer, [image] * 3, ["red " * 33, "red " * 33 + "cat dog", "red " * 32])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert abs(found[0] - found[2]) > 1e-4


def test_every_mode_is_seen_as_rgb(scorer: Scorer) -> None:
    image = pictures()[1]
    clear = image.convert("RGBA")
    clear.putalpha(7)
    few = image.quantize(16)
    found = values(scorer, [image, clear, few, few.convert("RGB")], ["a cat"] * 4)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[2] == pytest.approx(found[3], abs=1e-5)


def test_half_precision(fetch: weights.Fetch, scorer: Scorer) -> None:
    half = values(image_reward.image_reward("cpu", "bf16", fetch, TINY), pictures(), PROMPTS)
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


def test_transformers_has_those_places_and_no_others(fetch: weights.Fetch) -> None:
    found = dict(blip.rename_tensors(random_weights()))
    tensors = {name: tensor for name, tensor in random_weights().items() if not blip.UNUSED.fullmatch(name)}
    assert len(found) == len(tensors)
    needed = {name: value for name, value in CONFIG.items() if name in blip.TEXT_CONFIG}
    reward = blip.open_reward(random_weights(), needed, TINY, "x")
    for name, parameter in reward._module.named_parameters():
        assert torch.equal(parameter, found[name]), name
    assert not any(part.training for part in reward._module.modules())


def test_without_the_unused_ones(tmp_path: Path, fetch: weights.Fetch, scorer: Scorer) -> None:
    path = tmp_path / image_reward.FILE
    torch.save({name: tensor for name, tensor in random_weights().items() if not blip.UNUSED.fullmatch(name)}, path)
    other = image_reward.image_reward("cpu", "fp32", in_place_of(path, image_reward.FILE, fetch), TINY)
    assert values(other, pictures(), PROMPTS) == values(scorer, pictures(), PROMPTS)
    assert other.fingerprint()["sha256"] != scorer.fingerprint()["sha256"]


def test_a_file_with_other_weights(tmp_path: Path, fetch: weights.Fetch) -> None:
    tensors = random_weights()
    del tensors["blip.visual_encoder.blocks.1.attn.proj.bias"]
    tensors["blip.text_encoder.pooler.dense.bias"] = torch.zeros(2)
    tensors["blip.visual_encoder.blocks.7.norm1.bias"] = torch.zeros(2)
    tensors["mlp.layers.7.bias"] = torch.zeros(2)
    path = tmp_path / image_reward.FILE
    torch.save(tensors, path)
    wrong = (
        'Missing key(s) in state_dict: "vision.encoder.layers.1.self_attn.projection.bias"',
        "Unexpected key(s) in state_dict: ",
        '"text.pooler.dense.bias"',
        '"vision.encoder.layers.7.layer_norm1.bias"',
        "size mismatch for head.7.bias",
    )
    with pytest.raises(ScorerError) as error:
        image_reward.image_reward("cpu", "fp32", in_place_of(path, image_reward.FILE, fetch), TINY)
    for text in (f"{image_reward.REPO}/ImageReward.pt", *wrong):
        assert text in error.value.message


def test_another_size_is_refused(fetch: weights.Fetch) -> None:
    with pytest.raises(ScorerError, match=r"vision\.encoder\.layers\.3\.self_attn\.qkv\.weight"):
        image_reward.image_reward("cpu", "fp32", fetch, {**TINY, "num_hidden_layers": 4})


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"),
     (json.dumps({**CONFIG, "vocab_size": 99}), "its last word is number 15")],
    ids=["cut", "list", "empty", "other words"],
)  # fmt: skip
def test_another_configuration_is_refused(tmp_path: Path, fetch: weights.Fetch, text: str, error: str) -> None:
    path = tmp_path / image_reward.CONFIG
    path.write_text(text)
    with raises(ScorerError, image_reward.REPO, error):
        image_reward.image_reward("cpu", "fp32", in_place_of(path, image_reward.CONFIG, fetch), TINY)


def test_the_fingerprint(scorer: Scorer) -> None:
    record = scorer.fingerprint()
    assert record["weights"] == "THUDM/ImageReward@c63dec8373b5c3728b1d250865c402c9546be210"
    assert record["words"] == "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
    assert len(record["sha256"]) == 64
    assert "35 tokens" in record["preprocessing"]


def test_it_is_closed_twice(scorer: Scorer) -> None:
    scorer.close()
    scorer.close()


def test_load_fetches_three_things(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = serve(shelf, monkeypatch)
    monkeypatch.setattr(blip, "VISION", TINY)
    scorer = scorers.load("0.5*image-reward")
    assert [(repo, file) for repo, file, _ in fetched] == [
        (image_reward.REPO.id, "med_config.json"),
        (image_reward.BERT.id, None),
        (image_reward.REPO.id, "ImageReward.pt"),
    ]
    (found,) = scorer.score(pictures()[:1], PROMPTS[:1])
    assert found.parts["image-reward"] == pytest.approx(by_hand(pictures()[0], PROMPTS[0], random_weights()), abs=1e-5)
    scorer.close()


@pytest.mark.parametrize("size", [(32, 32), (45, 33), (33, 45), (200, 37), (3, 64), (64, 3)])
def test_pictures_are_cut_as_torchvision_does(size: tuple[int, int]) -> None:
    (image,) = noise([size], seed=1)
    found = image_reward.pixels_of(image, 32)
    assert found.shape == (3, 32, 32)
    assert functional.l1_loss(found.double(), pixels_by_hand(image, 32)) < 1e-6
