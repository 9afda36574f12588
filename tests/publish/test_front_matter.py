"""Front matter that somebody wrote gains what we have to say, and keeps every other byte."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.errors import CardError
from crdiff_export.publish.card import front_matter
from crdiff_export.publish.card.front_matter import Changes, edit, scalar, split
from tests.support.messages import raises

TAGS = ("pruned", "resolution:64x96")
OURS = Changes(
    units={"license": {"license": "other", "license_name": "flux-1", "license_link": "https://h/a b#c"}},
    items={"base_model": ("org/base",), "tags": TAGS},
    stale={"tags": frozenset({"resolution:8x8"})},
    single=frozenset({"base_model"}),
    order=("license", "license_name", "license_link", "base_model", "tags"),
)
LIST = "tags:\n- pruned\n- resolution:64x96\n"
LINE = 'tags: [pruned, "resolution:64x96"]'
ALL = f'license: other\nlicense_name: flux-1\nlicense_link: "https://h/a b#c"\nbase_model: org/base\n{LIST}'
FLOW = f'license: other, license_name: flux-1, license_link: "https://h/a b#c", base_model: org/base, {LINE}'
SET = "license: mit\nbase_model: org/base\n"

# What stands there, and what it becomes.
EDITS: Mapping[str, tuple[str, str]] = {
    "nothing": ("", ALL),
    "comments": ("# a\n\n# b\n", f"# a\n\n# b\n{ALL}"),
    "all there": (f"{SET}tags: [ pruned,'resolution:64x96' ]\n", f"{SET}tags: [ pruned,'resolution:64x96' ]\n"),
    "licence set": ("license: mit # mine\n", f"license: mit # mine\nbase_model: org/base\n{LIST}"),
    "part of a licence": ("license_link: x\n", f"license_link: x\nbase_model: org/base\n{LIST}"),
    "block list": (f"{SET}tags:\n- a # first\n# between\n- 'b'\n\nz: 1\n",
                   f"{SET}tags:\n- a # first\n# between\n- 'b'\n- pruned\n- resolution:64x96\n\nz: 1\n"),
    "indented list": (f"{SET}tags:\n    -   a   \nz: 1\n",
                      f"{SET}tags:\n    -   a   \n    - pruned\n    - resolution:64x96\nz: 1\n"),
    "as other lists": (f"{SET}language:\n  - en\n",
                       f"{SET}language:\n  - en\ntags:\n  - pruned\n  - resolution:64x96\n"),
    "flow list": (f'{SET}tags: [a, "b"] # mine\n', f'{SET}tags: [a, "b", pruned, "resolution:64x96"] # mine\n'),
    "flow list with a comma": (f"{SET}tags: [a , ]\n", f'{SET}tags: [a, pruned, "resolution:64x96" , ]\n'),
    "flow list of lines": (f"{SET}tags: [\n  a, # x\n  b # y\n]\n",
                           f'{SET}tags: [\n  a, # x\n  b,\n  pruned,\n  "resolution:64x96" # y\n]\n'),
    "empty list": (f"{SET}tags: [ ]\n", f"{SET}{LINE}\n"),
    "no value": (f"{SET}tags:  # none yet\nz: 1\n", f"{SET}{LINE}  # none yet\nz: 1\n"),
    "null": (f"{SET}tags: ~\n", f"{SET}{LINE}\n"),
    "empty text": (f"{SET}tags: ''\n", f"{SET}{LINE}\n"),
    "one tag": (f"{SET}tags: a # mine\nz: 1\n", f"{SET}tags:\n- a # mine\n- pruned\n- resolution:64x96\nz: 1\n"),
    "tags that are no text": (f"{SET}tags:\n- 1.0\n- yes\n-\n",
                              f"{SET}tags:\n- 1.0\n- yes\n-\n- pruned\n- resolution:64x96\n"),
    "stale in block": (f"{SET}tags:\n- resolution:8x8\n- a\n- 'resolution:8x8' # old\nz: 1\n",
                       f"{SET}tags:\n- a\n- pruned\n- resolution:64x96\nz: 1\n"),
    "stale alone in block": (f"{SET}tags:\n - resolution:8x8\n", f"{SET}tags:\n - pruned\n - resolution:64x96\n"),
    "stale in flow": (f"{SET}tags: [ resolution:8x8, a, resolution:8x8, b, 'resolution:8x8' ]\n",
                      f'{SET}tags: [ a, b, pruned, "resolution:64x96" ]\n'),
    "stale alone in flow": (f"{SET}tags: [resolution:8x8]\n", f"{SET}{LINE}\n"),
    "stale and nothing new": (f"{SET}tags: [pruned, resolution:8x8, resolution:64x96, resolution:8x8]\n",
                              f"{SET}tags: [pruned, resolution:64x96]\n"),
    "other sizes": (f"{SET}tags: [resolution:9x9]\n", f'{SET}tags: [resolution:9x9, pruned, "resolution:64x96"]\n'),
    "another base": (f"license: mit\nbase_model: 'a/b'   # mine\n{LIST}",
                     f"license: mit\nbase_model:\n- 'a/b'   # mine\n- org/base\n{LIST}"),
    "another base, indented": (f"license: mit\nl:\n  - x\nbase_model : a/b\n{LIST}",
                               f"license: mit\nl:\n  - x\nbase_model :\n  - a/b\n  - org/base\n{LIST}"),
    "bases": (f"license: mit\nbase_model:\n  - a/b\n{LIST}",
              f"license: mit\nbase_model:\n  - a/b\n  - org/base\n{LIST}"),
    "base without a value": (f"license: mit\nbase_model:\n{LIST}", f"license: mit\nbase_model: org/base\n{LIST}"),
    "the Hub's template": ("# see the docs\n{}\n", f"# see the docs\n{ALL}"),
    "in braces": ("{license: mit, tags: [a], base_model: a/b,}\n",
                  '{license: mit, tags: [a, pruned, "resolution:64x96"], base_model: [a/b, org/base],}\n'),
    "in braces, to be added": ('{"z": 1}\n', f'{{"z": 1, {FLOW}}}\n'),
    "in braces, last": ("{license: mit, base_model: , tags: [a]}\n",
                        '{license: mit, base_model: org/base , tags: [a, pruned, "resolution:64x96"]}\n'),
    "indented": ("  license: mit\n  base_model: org/base\n",
                 "  license: mit\n  base_model: org/base\n  tags:\n  - pruned\n  - resolution:64x96\n"),
    "text of many lines": (f"{SET}extra: |+\n  tags:\n  - a\n\n\ntags:\n- a\n",
                           f"{SET}extra: |+\n  tags:\n  - a\n\n\ntags:\n- a\n- pruned\n- resolution:64x96\n"),
    "text of many lines at the end": (f"{SET}extra: |+\n  text\n\n\n", f"{SET}extra: |+\n  text\n\n\n{LIST}"),
    "quoted keys": ("'license': mit\n\"base_model\": org/base\n? tags\n: - a\n",
                    "'license': mit\n\"base_model\": org/base\n? tags\n: - a\n  - pruned\n  - resolution:64x96\n"),
}  # fmt: skip


def made(text: str, changes: Changes = OURS, newline: str = "\n") -> str:
    return edit(text, changes, newline, 2)


@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_edit(case: str, newline: str) -> None:
    before, after = (text.replace("\n", newline) for text in EDITS[case])
    assert made(before, newline=newline) == after
    assert made(after, newline=newline) == after


# What is refused, and the line that it is in.
REFUSED: Mapping[str, tuple[str, int]] = {
    "no yaml": ("a: 1\nb: [c\n", 4),
    "tab": ("a:\n\t- b\n", 3),
    "control": ("a: \x00\n", 2),
    "deep": ("a: " + "[" * 600 + "]" * 600 + "\n", 2),
    "a list": ("# x\n- a\n", 3),
    "text": ("some text\n", 2),
    "twice": ("tags: [a]\nz: 1\ntags: [b]\n", 4),
    "merge": ("a: 1\n<<: {b: 2}\n", 3),
    "anchor": ("a: 1\ntags: &t [a]\n", 3),
    "alias": ("a: &x b\ntags: *x\n", 2),
    "tag": ("tags: !!set {a}\n", 2),
    "tags are a mapping": ("z: 1\ntags: {a: b}\n", 3),
    "tags are a block of keys": ("tags:\n  a: b\n", 3),
    "tags are a number": ("tags: 5\n", 2),
    "tags in tags": ("tags:\n- a\n- - b\n", 4),
    "a block among tags": ("tags:\n- |\n  a\n- b\n", 3),
    "bases are a mapping": ("tags: []\nbase_model:\n  repo: a/b\n", 4),
    "base below": ("base_model:\n  a/b\n", 3),
    "base behind a comment": ("base_model: # x\n  a/b\n", 3),
    "stale beside its key": ("? tags\n: - resolution:8x8\n  - a\n", 3),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuse(case: str) -> None:
    text, line = REFUSED[case]
    with raises(CardError, f"README.md, line {line}: "):
        made(text)


def test_an_end_before_the_end_is_refused() -> None:
    """In PyYAML's words for what comes after it, where it has some."""
    with pytest.raises(CardError):
        made("a: 1\n...\n")


def test_a_wrong_edit_is_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("license: mit\ntags: [b]\n", "tags: [a]\nlicense: mit\n", "license: no\ntags: [a]\n"):
        monkeypatch.setattr(front_matter._Edits, "apply", lambda _self, wrong=wrong: wrong)
        with pytest.raises(CardError, match="cannot edit safely"):
            made("license: mit\ntags: [a]\n", Changes())


# Where it is.

HUGE = "---\n" * 3 + "a\n" * 100_000


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("---\na: 1\n---\nb\n", ("---\n", "a: 1\n", "---\nb\n")),
        ("---\r\na: 1\r\n---\r\nb", ("---\r\n", "a: 1\r\n", "---\r\nb")),
        ("\ufeff---\na: 1\n---", ("\ufeff---\n", "a: 1\n", "---")),
        ("\n \n---\na: 1\n---  \n---\n", ("\n \n---\n", "a: 1\n", "---  \n---\n")),
        ("---\n---\n", ("---\n", "", "---\n")),
        ("---\n---", ("---\n", "", "---")),
        ("---\n\n---\n", ("---\n", "\n", "---\n")),
        ("---\na: |\n  ---\n---\n", ("---\n", "a: |\n  ---\n", "---\n")),
        ("---\n---a\n---\n", ("---\n", "---a\n", "---\n")),
        (HUGE, ("---\n", "", HUGE[4:])),
        ("", None),
        ("# Title\n---\na: 1\n---\n", None),
        ("----\na: 1\n----\n", None),
        ("--- a\n---\n", None),
    ],
    ids=range(14),
)
def test_split(text: str, parts: tuple[str, str, str] | None) -> None:
    assert split(text) == parts


@given(st.text(st.sampled_from("-- \n\r\ta:#\ufeff")).map("---".__add__) | st.text(st.sampled_from("- \n\ra")))
def test_split_as_the_hub_does(text: str) -> None:
    """With the client's pattern as the judge, which has no BOM and wants something between the lines."""
    try:
        parts = split(text)
    except CardError:
        assert not REGEX_YAML_BLOCK.search(text)
        return
    if parts is not None:
        assert "".join(parts) == text
    match = REGEX_YAML_BLOCK.search(text)
    if parts is None or not parts[1] or "\ufeff" in parts[0]:
        assert not match or (parts is not None and not parts[1])
    else:
        assert match
        assert (match[1], match[2]) == (parts[0], parts[1].rstrip("\r\n")) or parts[1].startswith(match[2])


@pytest.mark.parametrize(
    ("text", "line"), [("---\na: 1\n", 1), ("\n\n---", None), ("\n--- \na: 1\n---\n", 2), ("---\na: 1\n--- x\n", 1)]
)
def test_what_only_looks_like_front_matter_is_refused(text: str, line: int | None) -> None:
    if line is None:  # a rule at the end of a text is no beginning
        assert split(text) is None
        return
    with pytest.raises(CardError) as caught:
        split(text)
    assert caught.value.message.startswith(f"README.md: line {line} begins front matter (---)")


# Scalars.

ODD = [
    "", "no", "Yes", "null", "~", "1", "1e3", "0x1", "0o7", ".5", "2001-01-01", "12:30:45", "resolution:512x512",
    "a: b", "a #b", "#a", "- a", "a,b", "[a]", "{a}", "'", '"', "\\", "%a", "@a", "`a", "!a", "&a", "*a", "|", ">",
    "a\nb", "a\tb", " a", "a ", "\x07", "\x85", "\u2028", "\ufeff", "😀", "é", "=", "<<", "a:b", "---", "...",
    "org/1.0",
]  # fmt: skip


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("text", ODD)
def test_scalar(text: str, flow: bool) -> None:
    written = scalar(text, flow=flow)
    assert written.isprintable()
    document = f"[{written}, {{{written}: {written}}}]" if flow else f"- {written}\n- ? {written}\n  : {written}\n"
    assert yaml.safe_load(document) == [text, {text: text}]


@given(st.text(), st.booleans())
def test_any_scalar(text: str, flow: bool) -> None:
    document = f"[{scalar(text, flow=True)}]" if flow else f"- {scalar(text)}"
    assert yaml.safe_load(document) == [text]


def test_values_of_every_kind() -> None:
    form = {"Name": "text", "I agree: yes": "checkbox", "Use": {"type": "select", "options": ["a", {"label": "no"}]},
            "Empty": {}, "None": [], "Age": 18, "Old": True, "many\nlines": "a\n\n  b\n"}  # fmt: skip
    unit = {"extra_gated_fields": form, "extra_gated_prompt": "one\ntwo"}
    for before in ("z: 1\n", "{z: 1}\n", "z:\n  - 1\n", "  z: 1\n"):
        after = yaml.safe_load(made(before, Changes(units={"extra_gated_": unit})))
        assert after == {**yaml.safe_load(before), **unit}


# Anything that can stand there.

WORDS = st.sampled_from(["a", "B c", "pruned", "resolution:8x8", "resolution:1x1", "é", "x/y"])
QUOTED = WORDS.flatmap(lambda word: st.sampled_from([word, f"'{word}'", f'"{word}"']))
ENDS = st.sampled_from(["", "  ", " # note: [x]", "   #"])
BETWEEN = st.sampled_from(["", "", "\n", "# tags: [x]\n", "\n# - x\n\n"])


@st.composite
def values(draw: st.DrawFn) -> str:
    """A value as it stands after its key and colon, to the end of its last line."""
    items = draw(st.lists(QUOTED, max_size=4))
    kind = draw(st.sampled_from(["one", "flow", "lines", "block", "nothing"]))
    if kind == "one":
        return f" {draw(QUOTED)}{draw(ENDS)}\n"
    if kind == "nothing" or not items:
        return f"{draw(st.sampled_from(['', ' []', ' ~', ' null', ' [ ]']))}{draw(ENDS)}\n"
    flow = [f"'{item}'" if item.startswith("resolution") else item for item in items]
    if kind == "flow":
        return f" [{', '.join(flow)}{draw(st.sampled_from(['', ',', ' ']))}]{draw(ENDS)}\n"
    if kind == "lines":
        comma = draw(st.sampled_from(["", ","]))
        return " [\n" + ",\n".join(f"    {item}" for item in flow) + f"{comma}{draw(ENDS)}\n  ]\n"
    indent = " " * draw(st.integers(0, 3))
    return draw(ENDS) + "\n" + "".join(f"{draw(BETWEEN)}{indent}-  {item}{draw(ENDS)}\n" for item in items)


OTHERS = st.sampled_from([
    "language: en\n", "widget:\n- text: x # y\n  output: {url: a.png}\n", "inference: false\n", "license: mit\n",
    "extra_gated_prompt: >-\n  tags:\n  - x\n\n  more\n", "thumbnail: 'a: b'\n", "datasets: [a,\n  b]\n",
    "a: |+\n  x\n\n",
])  # fmt: skip


@st.composite
def blocks(draw: st.DrawFn) -> list[tuple[str, bool]]:
    """Front matter of anybody in parts, those of our two lists with True, in any order."""
    others = draw(st.lists(OTHERS, unique_by=lambda text: text.partition(":")[0], max_size=4))
    ours = [f"{name}:{draw(values())}" for name in draw(st.sets(st.sampled_from(["tags", "base_model"])))]
    parts = draw(st.permutations([(part, part in ours) for part in others + ours]))
    between = [(draw(BETWEEN), False) for _ in range(len(parts) + 1)]
    return [part for pair in zip(between, [*parts, ("", False)], strict=True) for part in pair]


def merged(old: Any, new: tuple[str, ...], stale: tuple[str, ...] = ()) -> list[Any]:
    """The intended list, found anew."""
    there = [item for item in (old if isinstance(old, list) else [old] if old else []) if item not in stale]
    return there + [item for item in new if item not in there]


def contains(text: str, parts: Iterable[str]) -> bool:
    """Whether the text has the parts whole and in their order, with something or nothing between them."""
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


@given(blocks(), st.sampled_from(["\n", "\r\n"]))
def test_any_front_matter(parts: list[tuple[str, bool]], newline: str) -> None:
    changes = Changes(items=OURS.items, stale=OURS.stale, single=OURS.single)
    before = "".join(part for part, _ in parts)
    old = yaml.safe_load(before) or {}
    try:
        after = made(before.replace("\n", newline), changes, newline).replace(newline, "\n")
    except CardError:
        assert old["tags"] == "resolution:8x8"  # we never wrote one tag alone
        return
    new = yaml.safe_load(after)
    rest = {key: value for key, value in new.items() if key not in OURS.items}
    assert rest == {key: value for key, value in old.items() if key not in OURS.items}
    assert [key for key in new if key in old] == list(old)
    assert new["tags"] == merged(old.get("tags"), TAGS, ("resolution:8x8",))
    assert merged(new["base_model"], ()) == merged(old.get("base_model"), ("org/base",))
    assert made(after, changes) == after
    assert contains(after, (part for part, ours in parts if not ours))
    for part in (part for part, ours in parts if ours):
        if not re.search(r"8x8|null|~|\[ ?\]", part):  # nothing but what we put in
            assert contains(after, part)
        assert contains(after, (line for line in part.splitlines(keepends=True) if line.startswith("#")))
