"""Cards of repositories with packs, alone and beside exported files."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml

from crdiff_export.formats.crdiff_keys import CalibrationStamp, GroupStamp, Stamp
from crdiff_export.packs import BaseFile, PackHeader
from crdiff_export.publish.card import Card, CardPack, CardVariant, render
from crdiff_export.sizes import Size
from tests.publish.test_card import HOSTILE, inner, tokens
from tests.support.card_makers import BASE, BEGIN, END, SDXL, body, front, row, stamp

DATA, WHOLE = (stamp().source_hash or "")[2:], (stamp().source_file_hash or "")[2:]
FILES = (BaseFile("sd_xl_base_1.0.safetensors", DATA, WHOLE),)
SIZES = (Size(512, 512), Size(768, 1024))


def pack(path: str = "sdxl.crdiff", *stamps: Stamp, files: tuple[BaseFile, ...] = FILES, **values: Any) -> CardPack:
    """A pack of SDXL; its headers have no hash of the base, which stands in a pack once."""
    stamps = stamps or tuple(stamp(resolution=size) for size in SIZES)
    variants = {one.resolution: replace(one, source_hash=None, source_file_hash=None) for one in stamps}
    return CardPack(path, PackHeader(files, variants), 41_216, **{"sha256": "a" * 64, **values})


def text_of(*packs: CardPack, files: tuple[CardVariant, ...] = (), **values: Any) -> str:
    return render(Card("me/x", files, (BASE,), packs=packs, **values), None)


def table(text: str) -> list[list[str]]:
    """The cells of the table of variants, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell.strip()) for cell in line.split("|")[1:-1]] for line in lines[1:]]


def code(text: str, kind: str) -> list[str]:
    return re.findall(f"```{kind}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    for block in code(text, "sh"):
        yield from (shlex.split(line, comments=True) for line in block.splitlines() if not line.startswith("#"))


def test_a_pack_alone() -> None:
    text = text_of(pack())
    assert table(text) == [
        ["sdxl.crdiff", str(size), "down 0.3, mid 0.3, up 0.3", "1.5", "in the pack"] for size in SIZES
    ]
    data = yaml.safe_load(front(text))
    assert data["tags"][-2:] == ["resolution:512x512", "resolution:768x1024"]
    assert (data["base_model"], data["license"], data["pipeline_tag"]) == (SDXL, "openrail++", "text-to-image")
    assert "library_name" not in data
    assert "41,216 bytes for 512x512 and 768x1024, and once the base, which you may have" in text
    assert "A file for each size" not in text
    assert list(commands(text)) == [
        ["hf", "download", "me/x", "sdxl.crdiff", "--local-dir", "ComfyUI/models/crdiff"],
        ["crdiff", "export", f"hf://{SDXL}/sd_xl_base_1.0.safetensors", "--pack", "hf://me/x/sdxl.crdiff", "--res",
         "512x512"],
        ["crdiff", "pack", "create", f"hf://{SDXL}/sd_xl_base_1.0.safetensors", "--res", "512x512", "--res",
         "768x1024", "--ratio", "0.3", "-o", "sdxl.crdiff"],
    ]  # fmt: skip
    assert render(Card("me/x", (), (BASE,), packs=(pack(),)), text) == text


def test_the_code_opens_the_base_and_takes_the_pack() -> None:
    (python,) = code(text_of(pack()), "python")
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)}
    download, enable = calls["hf_hub_download"], calls["poa.enable"]
    assert [ast.literal_eval(argument) for argument in download.args] == [SDXL, "sd_xl_base_1.0.safetensors"]
    assert ast.unparse(enable) == "poa.enable(pipe, 'hf://me/x/sdxl.crdiff')"
    assert python.index("poa.enable") < python.index("image = pipe(")


@pytest.mark.parametrize(
    ("changes", "files", "expected"),
    [
        ({"source_name": f"hf://{SDXL}@v1"}, "unet/diffusion_pytorch_model.fp16.safetensors",
         f'DiffusionPipeline.from_pretrained("{SDXL}", revision="v1", torch_dtype=torch.float16, variant="fp16")'),
        ({"source_name": "mine.safetensors"}, "mine.safetensors", "# pipe holds the base"),
        ({"source_name": f"hf://{SDXL}/x.safetensors.index.json"}, "x-1.safetensors", "# pipe holds the base"),
    ],
    ids=["a folder", "a local file", "shards"],
)  # fmt: skip
def test_other_bases(changes: dict[str, str], files: str, expected: str) -> None:
    layout = {"layout": "diffusers", "prefix": ""} if "unet/" in files else {}
    weights = "fp16" if "fp16" in files else None
    made = pack("x.crdiff", stamp(**changes, **layout), files=(BaseFile(files, DATA),), weights=weights)
    (python,) = code(text_of(made), "python")
    assert expected in python
    ast.parse(python)


def test_codes_with_a_scale_are_for_comfyui_and_exports() -> None:
    text = text_of(pack("x.crdiff", stamp(scaled=True)))
    assert code(text, "python") == []
    assert [words[:2] for words in commands(text)] == [["hf", "download"], ["crdiff", "export"], ["crdiff", "pack"]]


def test_what_a_file_and_a_pack_have_is_said_once() -> None:
    both = row("sdxl-512.safetensors")
    other = row("sdxl-2048.safetensors", resolution=Size(2048, 2048))
    text = text_of(pack(), files=(both, other))
    assert [cells[:2] + cells[-1:] for cells in table(text)] == [
        ["sdxl-512.safetensors, sdxl.crdiff", "512x512", "6,938,040,682"],
        ["sdxl.crdiff", "768x1024", "in the pack"],
        ["sdxl-2048.safetensors", "2048x2048", "6,938,040,682"],
    ]
    assert text.count("- **512x512, 768x1024 and 2048x2048**: not measured") == 1
    assert text.count("- Dense:") == 1
    assert "13,876,081,364 bytes for all 2" in text
    assert "41,216 bytes for 512x512 and 768x1024" in text
    assert yaml.safe_load(front(text))["library_name"] == "diffusion-single-file"


@pytest.mark.parametrize(
    "changes",
    [
        {"source_hash": "0x" + "1" * 64, "source_file_hash": None}, {"source_hash": None, "source_file_hash": None},
        {"poa_weight": 2.0}, {"cast": "F16"}, {"groups": {"down": GroupStamp(0.2, 1, 9)}}, {"recipe": "own.toml"},
    ],
    ids=str,
)  # fmt: skip
def test_other_numbers_or_another_base_stand_alone(changes: dict[str, Any]) -> None:
    files = (row("a.safetensors", **changes),)
    assert [cells[0] for cells in table(text_of(pack("p.crdiff", stamp()), files=files))] == [
        "a.safetensors", "p.crdiff",
    ]  # fmt: skip


def test_a_residual_and_a_hash_of_the_whole_file_change_no_numbers() -> None:
    (cells,) = table(
        text_of(pack("p.crdiff", stamp()), files=(row("a.safetensors", source_hash=None, residual="embedded"),))
    )
    assert cells[0] == "a.safetensors, p.crdiff"


def test_sizes_of_other_numbers_are_added_by_a_command_of_their_own() -> None:
    calibrated = [CalibrationStamp("0x" + digit * 64, size) for digit, size in zip("12", SIZES, strict=True)]
    masked = [
        stamp(resolution=size, criterion="wanda", calibrated=one, masked="block-wise", cast="BF16")
        for size, one in zip(SIZES, calibrated, strict=True)
    ]
    text = text_of(pack("a/b c.crdiff", *masked))
    made = [words for words in commands(text) if words[1] == "pack"]
    assert [words[2:4] for words in made] == [
        ["create", f"hf://{SDXL}/sd_xl_base_1.0.safetensors"],
        ["add", "b c.crdiff"],
    ]
    assert all(words[-2:] == ["--dtype", "bf16"] or "-o" in words for words in made)
    assert "The pack has the masks of the pruned layers, one bit for each weight" in text


def test_a_branch() -> None:
    text = text_of(pack(), revision="fp16/a")
    assert 'poa.enable(pipe, "hf://me/x@fp16%2Fa/sdxl.crdiff")' in text
    assert "/blob/fp16%2Fa/sdxl.crdiff" in text
    assert [
        "hf",
        "download",
        "me/x",
        "sdxl.crdiff",
        "--revision",
        "fp16/a",
        "--local-dir",
        "ComfyUI/models/crdiff",
    ] in [*commands(text)]


def test_verdicts_of_a_pack() -> None:
    evidence = {"prompts": "20", "scorer": "x", "dense": "0.1", "pruned": "0.3", "interval": "[0.1, 0.3]"}
    text = text_of(pack("p.crdiff", stamp(evidence=evidence), stamp(resolution=SIZES[1], borrowed_from=Size(640, 640))))
    assert "- **512x512**: better: pruned against dense +0.200" in text
    assert "- For 768x1024: **these ratios are borrowed from 640x640**" in text


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_names_are_only_names(text: str) -> None:
    """A header of a pack has the text wherever it has text, and the pack's path, too."""
    words = dict.fromkeys(
        ("source_name", "provenance", "provenance_source", "prompt", "recipe", "version", "prefix"), text
    )
    groups = {"down": GroupStamp(0.3, 1, 2), text: GroupStamp(0.5, 1, 2)}
    for layout in ("original", "diffusers"):
        wild = replace(
            stamp(**words, targets=(text,), groups=groups, evidence={text: text, "scorer": text}),
            layout=layout, cast=text, criterion=text, family_table=text,
        )  # fmt: skip
        packs = (pack(f"{text}.crdiff", wild, files=(BaseFile(text, text, text),), sha256=text), pack())
        made = text_of(*packs, files=(row(),))
        assert made.encode().decode() == made
        assert [line for line in body(made).splitlines() if line.strip() in (BEGIN, END)] == [BEGIN, END]
        parsed = list(inner(tokens(body(made))))
        assert not [t for t in parsed if t.type in ("html_inline", "image", "hr", "code_block", "blockquote_open")]
        assert len([t for t in parsed if t.type == "html_block"]) == 5
        assert [t.tag for t in parsed if t.type == "heading_open"] == ["h1", "h2", *["h3"] * 5]
        assert sum(t.type == "table_open" for t in parsed) == 1
        links = [str(t.attrs["href"]) for t in parsed if t.type == "link_open"]
        assert {link.split("/")[2] for link in links} == {"huggingface.co", "arxiv.org"}
        for fence in (t for t in parsed if t.type == "fence"):
            if fence.info == "python":
                ast.parse(fence.content)
            else:
                assert all(
                    line.startswith(("#", "hf download me/x ", "crdiff ")) for line in fence.content.splitlines()
                )
