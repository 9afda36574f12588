"""A card that is made, and cards of other people: only our keys and our section change, and what they say is so."""

import ast
import difflib
import hashlib
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from crdiff_export.errors import CardError
from crdiff_export.formats.crdiff_keys import CalibrationStamp, GroupStamp
from crdiff_export.models import families
from crdiff_export.publish.card import BaseModel, Card, CardVariant, render
from crdiff_export.sizes import Size
from tests.support import SUPPORT
from tests.support.card_makers import (
    BASE,
    BEGIN,
    END,
    SDXL,
    around,
    body,
    card,
    front,
    row,
    section,
    shown_as_code,
    told,
)
from tests.support.messages import raises

CARDS = SUPPORT / "cards"
SEARCHED: dict[str, Any] = {
    "provenance": "searched",
    "provenance_source": "crdiff search, seed 0",
    "poa_weight": 1.25,
    "evidence": {
        "prompts": "20", "scorer": "ImageReward-v1.0", "dense": "-1.734", "pruned": "0.092", "interval": "[1.1, 2.4]",
    },
}  # fmt: skip
CARD = Card(
    "me/sdxl-cr-diff",
    (row("sdxl-2048x1024.safetensors", resolution=Size(2048, 1024), **SEARCHED), row()),
    (BASE,),
)
OUR_TAGS = ["cr-diff", "pruned", "sparse", "resolution:512x512", "resolution:2048x1024"]


def as_the_client_has_it(text: str) -> Any:
    """The metadata that huggingface_hub reads."""
    data: Any = ModelCard(text).data
    return data.to_dict()


# A new card.


def test_borrowed_numbers_are_said_to_be() -> None:
    lines = told(row(), row("b.safetensors", resolution=Size(2048, 1024), borrowed_from=Size(640, 640))).splitlines()
    (below,) = [line for line in lines if "640x640" in line]
    assert below.startswith("- For 2048x1024: **these ratios are borrowed from 640x640**")


def test_files_of_another_prediction_have_code_of_their_own() -> None:
    codes = re.findall("```python\n(.*?)\n```", told(row(), row("v.safetensors", prediction="v-zsnr")), re.DOTALL)
    assert ["v_prediction" in code for code in codes] == [False, True]


def test_a_size_that_an_sd2_states_does_not_make_it_the_base() -> None:
    text = told(row(family="sd21", native=Size(512, 512), native_source="modelspec.resolution"))
    assert "stable-diffusion-2-1-base" not in text


def test_a_new_card() -> None:
    text = render(CARD, None)
    assert text == (CARDS / "created.md").read_text(encoding="utf-8")
    assert render(CARD, text) == text
    assert render(CARD, "") == text
    assert re.findall("better|improve|best", text) == ["better"]
    verdicts = [line for line in text.splitlines() if line.startswith("- **")]
    assert verdicts[0].startswith("- **512x512**: not measured")
    assert verdicts[1].startswith("- **2048x1024**: better: pruned against dense")
    assert text.index(verdicts[1]) < text.index("Each variant is its base")  # the answer comes first


@pytest.mark.parametrize(
    ("card", "keys"),
    [
        (Card("a/b", (row("", layout="diffusers", prefix=""),), (BASE,)), {"library_name": "diffusers"}),
        (Card("a/b", (row("", prefix=""),), (BASE,)), {"library_name": "diffusion-single-file"}),
        (Card("a/b", (row("unet", layout="diffusers"),), (BASE,)), {"library_name": "diffusion-single-file"}),
        (Card("a/b", (row(),), (BASE,), relation="quantized"), {"base_model_relation": "quantized"}),
        (Card("a/b", (row(source_name="x"),), (BaseModel(None, "mit"),)), {"base_model": None, "license": "mit",
         "base_model_relation": None, "pipeline_tag": "text-to-image"}),
        (Card("a/b", (row(family="sdxl-refiner"),), (BaseModel("o/r"),)), {"pipeline_tag": "image-to-image",
         "license": None}),
        (Card("a/b", (row(), row("r", family="sdxl-refiner")), (BASE, BaseModel("o/r", pipeline_tag="x"))), {
         "pipeline_tag": "text-to-image", "base_model": [SDXL, "o/r"]}),
        (Card("a/b", (), ()), {"base_model": None, "license": None, "tags": ["cr-diff", "pruned", "sparse"]}),
    ],
)  # fmt: skip
def test_keys(card: Card, keys: Mapping[str, Any]) -> None:
    data = yaml.safe_load(front(render(card, None)))
    assert {key: data.get(key) for key in keys} == keys


FLUX = {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": "LICENSE.md"}
FLUX_LINK = "https://huggingface.co/o/flux/blob/main/LICENSE.md"


def bases(*datas: Mapping[str, Any] | str) -> tuple[BaseModel, ...]:
    found = [{"license": data} if isinstance(data, str) else data for data in datas]
    repos = ["o/flux", "o/other"]
    return tuple(BaseModel.from_front_matter(repo, False, data) for repo, data in zip(repos, found, strict=False))


@pytest.mark.parametrize(
    ("of", "keys", "said"),
    [
        (bases("mit"), {"license": "mit"}, "Its licence is mit, and"),
        (bases("mit", "mit"), {"license": "mit"}, "Its licence is mit, and"),
        (bases({"license": ["mit"]}), {"license": "mit"}, "Its licence is mit, and"),
        (bases({"license": "mit", "license_name": "x", "license_link": "y"}), {"license": "mit"}, "licence is [x]("),
        (bases("no"), {"license": "no"}, "Its licence is no, and"),
        (bases(FLUX), FLUX | {"license_link": FLUX_LINK}, f"[{FLUX['license_name']}]({FLUX_LINK})"),
        (bases("other"), {"license": "other", "license_name": "see-the-base", "license_link":
         "https://huggingface.co/o/flux"}, "Its licence is other, and"),
        (bases("mit", "openrail"), {"license": "other", "license_name": "see-the-bases", "license_link":
         "https://huggingface.co/me/x/blob/main/README.md"}, "Its licence is openrail, and"),
        (bases(FLUX, {**FLUX, "license_name": "else"}), {"license": "other", "license_name": "see-the-bases",
         "license_link": "https://huggingface.co/me/x/blob/main/README.md"}, f"[{FLUX['license_name']}]({FLUX_LINK})"),
        (bases("mit", {}), {}, "The Hub names no licence for it; whatever it is, its variants stay under it."),
        (bases({"license": 5}), {}, "The Hub names no licence for it;"),
        (bases({"license": ["mit", "gpl"]}), {}, "The Hub names no licence for it;"),
        ((BaseModel(None),), {}, "Its licence is not known here; whatever it is, its variants stay under it."),
        ((BaseModel(None, "other"),), {"license": "other", "license_name": "see-the-base"}, "Its licence is other"),
    ],
)  # fmt: skip
def test_licences(of: tuple[BaseModel, ...], keys: Mapping[str, str], said: str) -> None:
    text = render(card(row(), of=of), None)
    data = yaml.safe_load(front(text))
    assert {key: value for key, value in data.items() if key.startswith("license")} == keys
    assert said in section(text)
    assert render(card(row(), of=of), "---\nlicense_name: mine\n---\n").count("license_name: mine") == 1
    kept = yaml.safe_load(front(render(card(row(), of=of), "---\nlicense_name: mine\n---\n")))
    assert {key for key in kept if key.startswith("license")} == {"license_name"}


OPTIONS = ["Research", {"label": "no", "value": 1}]
GATING = {
    "extra_gated_prompt": "By clicking “Agree”:\n\n  1. you agree\n",
    "extra_gated_fields": {"Name": "text", "Use": {"type": "select", "options": OPTIONS}},
}


def test_a_gated_base() -> None:
    shared = GATING["extra_gated_fields"]
    data = {"license": "mit", **GATING, "extra_gated_more": [shared, shared], "extra_gated_odd": None, "gated": "auto"}
    base = BaseModel.from_front_matter("o/gated", gated="manual", data=data)
    text = render(card(row(), of=(BASE, base)), None)
    found = yaml.safe_load(front(text))
    assert {key: found[key] for key in found if key.startswith("extra_gated_")} == {
        **GATING, "extra_gated_more": [shared, shared]
    }  # fmt: skip
    assert "It is gated: accept its terms on its page first." in section(text)
    open_base = BaseModel.from_front_matter("o/g", gated=False, data=data)
    assert "gated" not in render(card(row(), of=(open_base,)), None)
    assert "extra_gated" not in render(card(row(), of=(replace(base, gated=False),)), None)
    theirs = "---\nextra_gated_heading: mine\n---\n"
    assert "extra_gated_prompt" not in render(card(row(), of=(base,)), theirs)
    assert render(card(row(), of=(BASE, base)), text) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)
BASE_KEYS = [
    *("license", "license_name", "license_link", "pipeline_tag"),
    *("extra_gated_prompt", "extra_gated_fields", "extra_gated_"),
]


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(BASE_KEYS) | st.text() | st.integers(), JSON), st.booleans())
def test_any_base(data: dict[Any, Any], gated: bool) -> None:
    base = BaseModel.from_front_matter("o/b", gated, data)
    text = render(card(row(), of=(base,)), None)
    assert render(card(row(), of=(base,)), text) == text
    found = as_the_client_has_it(text)
    assert found.get("license") == base.license
    assert as_the_client_has_it(render(card(row(), of=(base,)), "# x\n")) == found
    assert all(found[key] == value for key, value in base.gating.items())


# Other people's cards. What of their front matter goes, and what comes; all other lines of it stay.

NEW = ["base_model_relation: finetune", "library_name: diffusion-single-file", "pipeline_tag: text-to-image"]
TAG_LINES = [f"- {tag}" for tag in OUR_TAGS]
FLOW = 'cr-diff, pruned, sparse, "resolution:512x512", "resolution:2048x1024"'
FLOW_TAGS = "tags: [stable-diffusion, \"text-to-image\", 'a, b'"
BRACES = '{"license": "mit", "tags": ["a", "resolution:8x8"'
CHANGES: Mapping[str, tuple[list[str], list[str]]] = {
    "comments": ([], [*TAG_LINES, f"base_model: {SDXL}", *NEW]),
    "no-front-matter": ([], ["license: openrail++", f"base_model: {SDXL}", *NEW, "tags:", *TAG_LINES]),
    "flow-tags": (
        [f"{FLOW_TAGS}, ] # keep", "base_model: runwayml/stable-diffusion-v1-5"],
        [f"{FLOW_TAGS}, {FLOW}, ] # keep", "base_model:", "- runwayml/stable-diffusion-v1-5", f"- {SDXL}", NEW[0]],
    ),
    "base-models": ([], [f"  - {SDXL}", *NEW[1:], "tags:", *(f"  {line}" for line in TAG_LINES)]),
    "empty": ([], ["license: openrail++", f"base_model: {SDXL}", *NEW, "tags:", *TAG_LINES]),
    "template": (["{}"], ["license: openrail++", f"base_model: {SDXL}", *NEW, "tags:", *TAG_LINES]),
    "only-front-matter": ([], [f"base_model: {SDXL}", *NEW, "tags:", *TAG_LINES]),
    "braces": (
        [f"{BRACES}],", ' "widget": [{"text": "x"}]}'],
        [f"{BRACES}, {FLOW}],", f' "widget": [{{"text": "x"}}], base_model: {SDXL}, {", ".join(NEW)}}}'],
    ),
    "old-section": (
        ["- resolution:768x768", '- "resolution:999x999"   # gone from the table'],
        [*(line for line in TAG_LINES if line != "- pruned"), f"base_model: {SDXL}", *NEW],
    ),
    "code": ([], [f"base_model: {SDXL}", *NEW, "tags:", *TAG_LINES]),
}  # fmt: skip
STYLES = {
    "lf": lambda text: text,
    "crlf": lambda text: text.replace("\n", "\r\n"),
    "bom": lambda text: "\ufeff" + text,
    "no-end": lambda text: text.removesuffix("\n"),
}


def test_every_card_is_read() -> None:
    assert {path.stem for path in CARDS.glob("*.md")} == {*CHANGES, "created"}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CHANGES)
def test_somebody_elses_card(name: str, style: str) -> None:
    before = STYLES[style]((CARDS / f"{name}.md").read_bytes().decode())
    after = render(CARD, before)
    assert render(CARD, after) == after
    newline = "\r\n" if style == "crlf" else "\n"
    assert newline == "\n" or not re.search(r"(?<!\r)\n", after)
    assert after.startswith("\ufeff") == (style == "bom")
    assert "\r" not in after or style == "crlf"

    diff = list(difflib.ndiff(front(before).splitlines(), front(after).splitlines()))
    gone, new = ([line[2:] for line in diff if line[0] == mark] for mark in "-+")
    assert (gone, sorted(new)) == (CHANGES[name][0], sorted(CHANGES[name][1]))
    assert [line for line in new if line in NEW] == [line for line in NEW if line in new]

    check_section(before, after, newline, lead=newline if name == "no-front-matter" else "")
    found = as_the_client_has_it(after.removeprefix("\ufeff"))  # which it does not know
    assert found == yaml.safe_load(front(after))
    assert set(OUR_TAGS) <= set(found["tags"])


def check_section(before: str, after: str, newline: str, lead: str = "") -> None:
    """All around our section is as it was, and the section is what it is in a new card."""
    theirs, ours = around(body(before)), around(body(after))
    assert ours
    if theirs:
        assert (ours[0], ours[2]) == (theirs[0], theirs[2])
    else:
        start = body(before)
        ends = "" if start.endswith(newline) or not start else newline
        blank = newline if not start or start.splitlines()[-1].strip() else ""
        assert ours[0] == f"{lead}{start}{ends}{blank}{BEGIN}{newline}"
        assert ours[2] == END + newline
    assert ours[1].replace("\r\n", "\n") == section(render(CARD, None))


def test_a_key_that_somebody_set_stays() -> None:
    keys = "license: mit\npipeline_tag: image-to-image\nlibrary_name: x\nbase_model_relation: merge\nlanguage: no\n"
    mine = f"---\n{keys}---\n"
    after = front(render(CARD, mine))
    assert after.startswith(front(mine))
    assert after[len(front(mine)) :] == f"base_model: {SDXL}\ntags:\n" + "".join(f"- {tag}\n" for tag in OUR_TAGS)


def test_variants_come_and_go() -> None:
    """Tags follow the table; those that the table never had stay, and so does what people write around the section."""
    first = render(CARD, None)
    mine = first.replace("- sparse\n", "- sparse\n- resolution:640x640\n").replace("openrail++", "mit # mine", 1)
    mine = mine.replace("2048x1024\n---", "2048x1024\n- last\n---")
    mine = mine.replace(f"\n{BEGIN}", f"\nMy words.\n\n{BEGIN}") + "\n## Thanks\n"
    fewer = Card(CARD.repo, CARD.variants[1:], CARD.bases)
    after = render(fewer, mine)
    gone = [line[2:] for line in difflib.ndiff(front(mine).splitlines(), front(after).splitlines()) if line[0] in "-+"]
    assert gone == ["- resolution:2048x1024"]
    assert "sdxl-2048x1024" not in after
    assert after.endswith(f"{END}\n\n## Thanks\n")
    assert "My words." in after
    back = render(CARD, after)
    common, small, large = OUR_TAGS[:3], OUR_TAGS[3], OUR_TAGS[4]
    assert yaml.safe_load(front(back))["tags"] == [*common, "resolution:640x640", small, "last", large]
    assert section(back) == section(first)


def test_another_base_comes_in() -> None:
    other = Card(CARD.repo, (row(source_name="mine.safetensors"),), (BaseModel("o/mine", "mit"),))
    data = yaml.safe_load(front(render(other, render(CARD, None))))
    assert data["base_model"] == [SDXL, "o/mine"]
    assert data["license"] == "openrail++"


# Markers.

PAIR = f"{BEGIN}\n{END}\n"
UNPAIRED = {
    "no end": (f"a\n{BEGIN}\n", f"{BEGIN} in line 2"),
    "no begin": (f"---\na: 1\n---\n\n{END}\n", f"{END} in line 5"),
    "end first": (f"{END}\n\n{BEGIN}\n", f"{END} in line 1, {BEGIN} in line 3"),
    "two pairs": (PAIR + PAIR, f"{BEGIN} in line 1, {END} in line 2, {BEGIN} in line 3, {END} in line 4"),
    "two begins": (f"{BEGIN}\n{PAIR}", f"{BEGIN} in line 1, {BEGIN} in line 2, {END} in line 3"),
    "end in code": (f"{BEGIN}\n```\n{END}\n", f"{BEGIN} in line 1; the code that begins in line 2 never ends"),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_unpaired_markers_are_refused(case: str) -> None:
    text, told = UNPAIRED[case]
    for style in (text, text.replace("\n", "\r\n")):
        with raises(CardError, told):
            render(CARD, style)


def test_nothing_can_follow_code_that_never_ends() -> None:
    with raises(CardError, "README.md, line 6: "):
        render(CARD, "---\nlicense: mit\n---\n# x\n\n~~~~sh\na\n~~~\n")


LINES = st.sampled_from([
    "", "", "text", "# head", "    code", "- item", "  - inner", "1. one", "2. two", "   more", "> quote", "<p>",
    "<br>", "* * *", "| a |", "<!-- note -->", "<!--", "-->", "```", "```md", "   ```", "~~~", "````", "- ```", "  ```",
    "\tcode", "---", BEGIN, f"  {BEGIN} ", END, f"    {END}", f"> {BEGIN}", f"`{END}`", f"- {BEGIN}", f"{END}.",
])  # fmt: skip


@given(st.lists(LINES, max_size=9), st.sampled_from(["\n", "\r\n"]), st.booleans())
@example(["text", "2. two", "", f"    {END}"], "\n", True)  # a list begins with 1 where it follows text
@example(["- item", "lazy", "   ```", "```", BEGIN, "```"], "\n", True)
@example(["- ```", BEGIN, "", "~~~", END, "~~~", END], "\n", True)
@example(["<p>", "```", BEGIN, "</p>", "", END], "\n", True)
@example(["text", f"    {BEGIN}", "", "- ~~~", f"  {END}", f"    {END}", "  ~~~", "  ", f"  {END}"], "\n", False)
def test_any_markdown(lines: list[str], newline: str, ends: bool) -> None:
    """Whatever surrounds our section survives; which markers count is for a parser of CommonMark to say."""
    text = "title\n\n" + "\n".join(lines) + "\n" * ends
    code = shown_as_code(text)
    lines = text.split("\n")
    found = [line.strip() for n, line in enumerate(lines) if line.strip() in (BEGIN, END) and n not in code]
    before = f"---\nlicense: mit\n---\n{text}".replace("\n", newline)
    try:
        after = render(CARD, before)
    except CardError as error:
        if "nothing can follow" in error.message:
            assert not found
            assert text.count("\n") + 1 in shown_as_code(f"{text}\n{BEGIN}\n")
        else:
            assert found not in ([], [BEGIN, END])
        return
    assert found in ([], [BEGIN, END])
    assert render(CARD, after) == after
    check_section(before, after, newline)


# What anybody may have written into a header or a name.

HOSTILE = [
    END, f"\n{END}\n", f"{BEGIN}\n", "<!--", "-->", "<script>alert(1)</script>", "&lt;&amp;", "<https://evil.example>",
    "a|b", "\\|", "| a | size |", "512x512", "`x`", "```\n", "~~~", "*a* _b_ __c__ ~d~", "$$x$$", "\\", "\\\n", "---",
    "[x](https://evil.example)", "![x](https://evil.example)", "# x", "- x", "1. x", "> x", "\r\n\r\n## x", "x" * 5000,
    "a\tb", "\x00\x07\x1b[31m", "\u202egnp", "\u2028", "é😀", "\ud800", " ", "", "{x}", "{0.width}", "%s", "../..",
    "$(rm -rf ~)", "'; rm -rf ~; '", '"""', '"); import os; ("', "hf://a/b/`|", "hf://a/b@c/<!--", "a b.safetensors",
]  # fmt: skip


def hostile(text: str, layout: str, path: str) -> Card:
    """A variant whose header and name have the text wherever they have text, between others."""
    words = dict.fromkeys(
        ("source_name", "provenance", "provenance_source", "prompt", "recipe", "version", "residual", "prefix"), text
    )
    groups = {"down": GroupStamp(0.3, 1, 2), text: GroupStamp(0.5, 1, 2)}
    stamped = row(path, **words, targets=(text,), groups=groups, evidence={text: text, "scorer": text}).stamp
    stamped = replace(stamped, layout=layout, cast=text, source_hash=text, source_file_hash=text)
    tame = row("tame.safetensors")
    rows = (CardVariant(path, stamped, 1, None), CardVariant(f"{text}.safetensors", tame.stamp, 1, text), tame)
    return card(*rows, of=(BASE, BaseModel(None, license=text, license_name=text)))


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def inner(found: Iterable[Token]) -> Iterator[Token]:
    for token in found:
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_names_are_only_names(text: str) -> None:
    for layout, path in (
        ("original", f"{text}.safetensors"),
        ("diffusers", f"{text}/{text}.safetensors"),
        ("diffusers", text.rstrip("/") or "x"),
        ("original", f"{text}/unet"),
    ):
        found = hostile(text, layout, path)
        made = render(found, None)
        assert made.encode().decode() == made
        assert render(found, made) == made
        assert [line for line in body(made).splitlines() if line.strip() in (BEGIN, END)] == [BEGIN, END]
        assert yaml.safe_load(front(made))["tags"] == OUR_TAGS[:4]

        parsed = list(inner(tokens(body(made))))
        blocks = [t.content[:12] for t in parsed if t.type == "html_block"]
        details = ["<details>\n<s", "</details>\n"]
        assert blocks == ["<!-- crdiff:", "<!-- What is", *details, "<!-- crdiff:"]
        assert not [t for t in parsed if t.type in ("html_inline", "image", "hr", "code_block", "blockquote_open")]
        assert [t.tag for t in parsed if t.type == "heading_open"] == ["h1", "h2", "h3", "h3", "h3", "h3", "h3"]
        cells = [after.content for t, after in pairwise(parsed) if t.type in ("th_open", "td_open")]
        assert len(cells) == 6 * (1 + len(found.variants))
        assert {cells[n] for n in range(6 + 5, len(cells), 6)} == {"1", "6,938,040,682"}  # too much is not shown
        assert sum(t.type == "table_open" for t in parsed) == 1
        links = [str(t.attrs["href"]) for t in parsed if t.type == "link_open"]
        assert {link.split("/")[2] for link in links} == {"huggingface.co", "arxiv.org"}
        for fence in (t for t in parsed if t.type == "fence"):
            assert fence.info in ("python", "sh")
            if fence.info == "python":
                ast.parse(fence.content)
            else:
                check_commands(fence.content, {r.path for r in found.variants})


def check_commands(code: str, names: set[str]) -> None:
    for line in code.splitlines():
        if line.startswith("#"):
            continue
        if "$'" in line:  # what only bash reads
            assert line.isprintable()
            continue
        words = shlex.split(line)
        if words[0] == "crdiff":
            assert words[1] in ("export", "preview")
            assert not words[2].startswith("-")  # the base; then options and values alternate
            assert all(word.startswith("-") for word in words[3::2])
            continue
        assert (words[:3], words[4]) == (["hf", "download", "me/x"], "--local-dir")
        assert words[3] in names
        assert len(words) == 6


def test_bash_reads_names_as_they_are() -> None:
    for text in (t for t in HOSTILE if "\x00" not in t and "\ud800" not in t):
        name = f"{text}.safetensors"
        made = told(row(name))
        line = next(line for line in made.splitlines() if line.startswith("hf download"))
        echo = line.replace("hf download", "printf '%s\\0'", 1)
        ran = subprocess.run(["bash", "-c", echo], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
        assert ran.stdout.decode().split("\0")[1] == name


def test_python_reads_names_as_they_are() -> None:
    for text in HOSTILE:
        name = f"{text}.safetensors"
        made = told(row(name))
        (code,) = re.findall("```python\n(.*?)\n```", made, re.DOTALL)
        strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert name in strings


def test_what_is_shown_reads_as_it_is() -> None:
    """A text's own characters come out of the Markdown again, but for runs of spaces."""
    for text in (t for t in HOSTILE if t.isprintable() and len(t) < 300):
        made = told(row(provenance_source=f"a {text} b"))
        shown = "".join(t.content for t in inner(tokens(made)) if t.type.startswith("text") and not t.children)
        assert " ".join(f"(a {text} b)".split()) in shown


# What it says.


def test_evidence_is_shown_and_no_more() -> None:
    bare = told(row(provenance="published", provenance_source="a paper"))
    assert "the ratios are published ones (a paper). No measurement is recorded." in bare
    odd = told(row(provenance="guessed", provenance_source="x"))
    assert "the ratios are called guessed (x). No measurement is recorded." in odd
    both = told(row(evidence={"scorer": "S", "pruned": "1"}, prompt="a *cat*"))
    assert "**these ratios are not tuned**" in both
    only = "They are for one prompt: “a &#42;cat&#42;”. Its header records the measurement at the top, and no other."
    assert "pruned 1, scorer S." in both
    assert only in both


def test_the_table() -> None:
    other = row("b.safetensors", resolution=Size(512, 512), source_name="mine.ckpt", cast="F16")
    flux = row("unet", family="flux-dev", layout="diffusers", prefix="", targets=("ff", "attn"), source_name="hf://o/F")
    text = told(*CARD.variants, other, flux, of=(BASE, BaseModel(None), BaseModel("o/f", "mit")))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["file", "base", "size", "ratios", "POA weight", "bytes"]
    at = "https://huggingface.co/me/x"
    large, small, tall = CARD.variants[0].path, CARD.variants[1].path, "2048x1024"
    base = f"[{SDXL}](https://huggingface.co/{SDXL})"
    unet = "down 0.3, mid 0.3, up 0.3"
    size = "6,938,040,682"
    assert rows[2:] == [
        [f"[unet/]({at}/tree/main/unet)", "[o/f](https://huggingface.co/o/f)", "512x512", "blocks 0.3", "1.5",
         size],
        [f"[b.safetensors]({at}/blob/main/b.safetensors)", "mine.ckpt", "512x512", unet, "1.5", size],
        [f"[{small}]({at}/blob/main/{small})", base, "512x512", unet, "1.5", size],
        [f"[{large}]({at}/blob/main/{large})", base, tall, unet, "1.25", size],
    ]  # fmt: skip
    hidden = text[text.index("<details>") : text.index("</details>")]
    assert "[unet/]" in hidden
    assert "several files" in hidden
    for variant in (other, *CARD.variants):
        assert f"SHA-256 `{variant.sha256}`, AutoV2 `{str(variant.sha256)[:10].upper()}`" in hidden
    assert "the recommended *w* is in the table." in text
    assert "all other weights are the base's, partly cast to F16." in text
    assert "smallest weights of the attention and feed-forward layers" in text
    assert "- Base: mine.ckpt, which is not known on the Hub." in text
    assert "For SDXL 512x512 and SDXL 2048x1024." in text


def test_order_of_rows_is_no_matter() -> None:
    assert render(Card(CARD.repo, CARD.variants[::-1], CARD.bases), None) == render(CARD, None)


def test_where_the_dense_weights_are() -> None:
    def dense(**changes: Any) -> str:
        text = told(row(changes.pop("path", "x.safetensors"), **changes))
        (line,) = [line for line in text.splitlines() if line.startswith("- Dense: ")]
        return line

    page = f"[{SDXL}/sd_x.st](https://huggingface.co/{SDXL}/blob/main/sd_x.st)"
    file, tensors = (hashlib.sha256(of).hexdigest() for of in (b"file", b"tensors"))
    name = f"hf://{SDXL}/sd_x.st"
    assert dense(source_name=name) == (
        f"- Dense: {page}, SHA-256 `{file}`, AutoV2 `{file[:10].upper()}`, "
        f"SHA-256 of its tensors' bytes `{tensors}`, AutoV3 `{tensors[:12].upper()}`."
    )
    alone = f"- Dense: {page}, SHA-256 `{file}`, AutoV2 `{file[:10].upper()}`."
    assert dense(source_name=name, source_hash=None) == alone
    assert dense(source_name="x.ckpt", source_file_hash=None) == (
        f"- Dense: x.ckpt of [{SDXL}](https://huggingface.co/{SDXL}), SHA-256 of its tensors' bytes `{tensors}`, "
        f"AutoV3 `{tensors[:12].upper()}`."
    )
    assert dense(source_hash=None, source_file_hash=None).endswith(
        ", no hash was recorded, so nothing tells whether a copy is the right one."
    )
    assert dense(path="", layout="diffusers", prefix="", source_name=f"hf://{SDXL}@main") == (
        f"- Dense: [{SDXL}](https://huggingface.co/{SDXL}). The header of each file of weights has the SHA-256 of the "
        "one that it was made from."
    )


def test_pictures_stand_at_the_top() -> None:
    text = told(replace(row(), sheet="images/sdxl-512x512.png"), row("b.safetensors"))
    (line,) = [line for line in text.splitlines() if line.startswith("![")]
    assert line.endswith("(https://huggingface.co/me/x/resolve/main/images/sdxl-512x512.png)")
    assert text.index("- **512x512**") < text.index(line) < text.index("Each variant is its base")


def commands(text: str) -> list[list[str]]:
    """The command lines of crdiff in a card."""
    return [shlex.split(line) for line in text.splitlines() if line.startswith(("crdiff export", "crdiff preview"))]


def test_commands_make_it_again() -> None:
    groups = {"down": GroupStamp(0.1, 1, 2), "mid": GroupStamp(0.2, 1, 2), "up": GroupStamp(0.30000000000000004, 1, 2)}
    export, preview = commands(
        told(
            row(
                "a b.safetensors", groups=groups, source_name="my model's.ckpt", targets=("ff",), cast="BF16",
                residual="embedded", native=Size(768, 768), native_source="given",
            )
        )
    )  # fmt: skip
    assert export == [
        "crdiff", "export", "my model's.ckpt", "--res", "512x512", "--native", "768x768", "--down", "0.1", "--mid",
        "0.2", "--up", "0.30000000000000004", "--targets", "ff", "--dtype", "bf16", "--residual", "embed",
        "-o", "a b.safetensors",
    ]  # fmt: skip
    assert preview == [
        "crdiff", "preview", "my model's.ckpt", "--baked", "a b.safetensors", "--beside", "two-pass",
        "--prompt", "TEXT",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "changes", "offered"),
    [
        ([(1024, 1024), (512, 512)], {}, ["two-pass"]),
        ([(1152, 896), (1024, 1024)], {}, []),
        ([(1152, 896), (2048, 1024)], {}, ["two-pass", "native-size"]),
        ([(512, 512), (2048, 1024)], {}, ["two-pass", "native-size"]),
        ([(2048, 2048)], {"family": "sd15"}, ["two-pass"]),
        ([(2048, 1024)], {"family": "lumina-2"}, []),
        ([(2048, 1024), (512, 512)], {"family": "lumina-2"}, ["two-pass"]),
    ],
)
def test_what_did_better_is_offered_far_from_the_native_size(
    sizes: list[tuple[int, int]], changes: dict[str, Any], offered: list[str]
) -> None:
    stamps = {"native": Size(1024, 1024), **changes}
    text = told(*(row(f"{width}.safetensors", resolution=Size(width, height), **stamps) for width, height in sizes))
    assert re.findall(r"`--beside (\S+)`", text) == offered
    (preview,) = (words for words in commands(text) if words[1] == "preview")
    assert ("two-pass" in preview) == ("two-pass" in offered)


@pytest.mark.parametrize(
    ("stamp", "is_drawn"),
    [
        ({}, True), ({"special": "inpainting"}, False), ({"special": "edit"}, False), ({"special": "kolors"}, False),
        ({"prediction": "edm"}, True), ({"prediction": "edm", "family": "sd15"}, False),
        ({"family": "sdxl-refiner"}, False), ({"family": "unet"}, True),
    ],
)  # fmt: skip
def test_a_picture_is_offered_where_one_can_be_drawn(stamp: dict[str, Any], is_drawn: bool) -> None:
    """A refiner needs a picture, as inpainting does; another variant of the card is drawn then."""
    one = row("one.safetensors", **stamp)
    one = replace(one, stamp=replace(one.stamp, native=Size(1024, 1024), resolution=Size(512, 512)))
    text = told(one)
    assert [words[1] for words in commands(text)] == ["export"] + ["preview"] * is_drawn
    assert ("crdiff evaluate" in text) == ("--beside two-pass" in text) == is_drawn
    both = told(one, row("two.safetensors", family="vega", native=Size(1024, 1024)))
    (preview,) = (words for words in commands(both) if words[1] == "preview")
    assert is_drawn or "two.safetensors" in preview


def test_of_a_family_that_is_not_known_here_a_picture_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is known, and has no pipeline, none is; a UNet's folder may name one."""
    one = row()
    other = replace(one, stamp=replace(one.stamp, family="mine"))
    assert [words[1] for words in commands(told(other))] == ["export", "preview"]
    for alias, scope in (("flux-dev", "layer"), ("sdxl", "group")):
        family = replace(families.by_id(alias), pipelines={})
        assert family.scope == scope
        with monkeypatch.context() as patch:
            patch.setattr(families, "by_id", lambda _, family=family: family)
            assert [words[1] for words in commands(told(other))] == ["export"] + ["preview"] * (scope == "group")


def test_the_command_names_the_weights_of_a_folder() -> None:
    folder = row("sdxl", layout="diffusers", prefix="")
    lines = commands(told(replace(folder, weights="fp16")))
    assert all(words[words.index("--variant") + 1] == "fp16" for words in lines)
    broken = {"down": GroupStamp(0.3, 1, 2, nonfinite=1), "mid": GroupStamp(0.3, 1, 2), "up": GroupStamp(0.3, 1, 2)}
    assert "--allow-nonfinite" in commands(told(row(groups=broken)))[0]
    assert "--allow-nonfinite" not in commands(told(row()))[0]


# --- other criteria than magnitude ---

CALIBRATED = CalibrationStamp("0x" + "ab" * 32, Size(512, 512))


def masked(path: str = "wanda.safetensors", **changes: Any) -> CardVariant:
    groups = {group: GroupStamp(0.3, 31, 100) for group in ("down", "mid", "up")}
    values = {"criterion": "wanda:compare=row", "masked": "block-wise", "groups": groups, "calibrated": CALIBRATED}
    return row(path, **{**values, **changes})


def test_a_criterion_has_a_column_where_it_is_not_the_papers() -> None:
    assert "weights go by" not in told(row())
    text = told(row(), masked(), masked("obs.safetensors", criterion="obs", moved=True))
    assert "| file | size | ratios | weights go by | POA weight |" in text
    assert f"wanda:compare=row, calibrated at 512x512 (`{'ab' * 32}`)" in text
    assert "; the others were moved" in text
    assert "| magnitude |" in text
    both = told(masked(), of=(BASE, BaseModel("org/other")))
    assert "| file | base | size | ratios | weights go by |" in both


def test_what_decided_is_not_called_small() -> None:
    plain, mixed, alone = told(row()), told(row(), masked()), told(masked())
    assert "with the smallest weights of" in plain
    assert "has the exact thresholds" in plain
    for text in (mixed, alone):
        assert "with some weights of" in text
        assert "the zeros of the pruned layers are the mask" in text
        assert "all other weights are the base's." in text
    assert "Where the header has no thresholds, the zeros" in mixed
    assert "In each file the zeros" in alone
    moved = told(masked(moved=True))
    assert "the base's but for those of the pruned layers where the table says so" in moved
