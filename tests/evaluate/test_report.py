"""The contact sheet and the page: every picture where it should be and as it was, every label whole."""

import base64
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crdiff_export.evaluate.report import ContactSheet, SheetPicture, SheetRow, fonts, page, sheet
from crdiff_export.evaluate.report.contact import printable_prompt, shown_size
from crdiff_export.evaluate.report.sheet import PAPER, SheetLayout, TextLine
from tests.support.pages import ParsedPage
from tests.support.scoring import noise

COLUMNS = ("dense", "pruned", "POA 1.5")
FACTS = (("base", "demo"), ("ratios", "starting point, not tuned (" + "a long story " * 12 + "ends)"))
LONG = " ".join(f"word{number}" for number in range(120))
HOSTILE = '<script src="https://example.org/x.js">alert(1)</script> & "quotes" \u202e'


def contact(*prompts: str, seeds: tuple[int, ...] = (0, 7), size: tuple[int, int] = (96, 64)) -> ContactSheet:
    """A sheet of three columns, each picture with other noise."""
    images = iter(noise([size] * (3 * len(prompts) * len(seeds)), seed=0))
    rows = []
    for prompt in prompts:
        for seed in seeds:
            pictures = tuple(SheetPicture(next(images), f"{prompt}\nSeed: {seed}") for _ in COLUMNS)
            rows.append(SheetRow(prompt, seed, pictures))
    return ContactSheet("demo at 96x64", FACTS, COLUMNS, tuple(rows))


# --- the sheet ---


@pytest.mark.parametrize("size", [(96, 64), (64, 200), (700, 500)], ids=["small", "tall", "large"])
def test_every_picture_is_in_its_place_bit_by_bit(size: tuple[int, int]) -> None:
    made = contact("a red fox", "a blue fox", size=size)
    layout = SheetLayout(made)
    drawn = layout.draw()
    assert drawn.size == (layout.width, layout.height)
    for row, places in zip(made.rows, layout.corners, strict=True):
        assert len({y for _, y in places}) == 1
        for shot, (x, y) in zip(row.pictures, places, strict=True):
            width, height = shown_size(size)
            shown = drawn.crop((x, y, x + width, y + height))
            assert shown.resize(size, Image.Resampling.NEAREST).tobytes() == shot.image.tobytes()
            squares = np.asarray(shown).reshape(size[1], height // size[1], size[0], width // size[0], 3)
            assert (squares == squares[:, :1, :, :1]).all()  # each pixel is a square of one colour
    columns = [[x for x, _ in places] for places in layout.corners]
    assert all(column == columns[0] for column in columns)
    steps = np.diff(columns[0])
    assert steps.min() == steps.max() > shown_size(size)[0]  # a gap between them


def box(line: TextLine, height: float = 1.0) -> tuple[int, int, int, int]:
    """Where a line of text is: left, top, right, bottom."""
    size = round(line.font.size)
    return line.x, line.y, line.x + fonts.width(line.text, size), line.y + round(height * size)


@pytest.mark.parametrize("size", [(96, 64), (8, 8), (1024, 64)], ids=["small", "tiny", "wide"])
def test_nothing_covers_anything_or_leaves_the_sheet(size: tuple[int, int]) -> None:
    layout = SheetLayout(contact("a red fox", LONG, "x" * 400, size=size))
    corners = (corner for row in layout.corners for corner in row)
    width, height = shown_size(size)
    boxes = [*map(box, layout.lines), *((x, y, x + width, y + height) for x, y in corners)]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left <= right <= layout.width
        assert 0 <= top <= bottom <= layout.height
        for other in boxes[:i]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (boxes[i], other)


def test_every_label_is_there_whole() -> None:
    made = contact("a red fox", LONG)
    layout = SheetLayout(made)
    text = " ".join(line.text for line in layout.lines)
    facts = [word for fact in FACTS for word in fact]
    for part in (made.title, *COLUMNS, "a red fox", LONG, "seed 0", "seed 7", *facts):
        assert part in text
    assert "".join(line.text for line in SheetLayout(contact("x" * 400)).lines).count("x" * 400) == 1
    drawn = layout.draw()
    for line in layout.lines:
        colours = {colour for _, colour in drawn.crop(box(line, 1.3)).getcolors(1 << 16) or []}
        assert colours - {PAPER}, line.text


def test_letters_grow_with_the_sheet() -> None:
    small, large = (SheetLayout(contact("a", size=size)).lines[0].font.size for size in ((96, 64), (1024, 1024)))
    assert large > 1.5 * small


@pytest.mark.parametrize("prompt", ["狐", "лиса", "ثعلب", "🦊", "\udcff", "a\nb\tc\x00\x1b[31m", ""])
@pytest.mark.parametrize("installed", [True, False], ids=["system-fonts", "none"])
def test_any_prompt_can_be_drawn(prompt: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setattr(fonts, "SYSTEM", ())
    made = contact(prompt, seeds=(0,))
    assert sheet.render(made)
    (label,) = (line for line in SheetLayout(made).lines if line.text == (printable_prompt(prompt) or "(no prompt)"))
    assert label.text.isprintable() or prompt == "ثعلب"
    assert f"<h2>{label.text}</h2>" in page.render_sheet(made)


def test_a_font_of_the_system_helps_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fonts.pick("a red fox") == ""
    monkeypatch.setattr(fonts, "SYSTEM", ())
    assert fonts.pick("лиса") == ""
    assert fonts.lacks("лиса")
    assert not fonts.lacks("a red fox, 1.5")


def test_the_png_says_what_is_on_it(tmp_path: Path) -> None:
    made = contact("a red fox", "狐")
    (tmp_path / "sheet.png").write_bytes(sheet.render(made))
    text = Image.open(tmp_path / "sheet.png").text  # type: ignore[attr-defined]
    assert text["Title"] == "demo at 96x64"
    assert text["Software"] == "crdiff"
    assert text["parameters"].splitlines() == [
        "demo at 96x64", *(f"{name}: {said}" for name, said in FACTS), "columns: dense, pruned, POA 1.5",
        "row 1: seed 0: a red fox", "row 2: seed 7: a red fox", "row 3: seed 0: 狐", "row 4: seed 7: 狐",
    ]  # fmt: skip


# --- the page ---


def test_the_page_has_every_picture_bit_by_bit() -> None:
    made = contact("a red fox", HOSTILE)
    images = [image for image in ParsedPage(page.render_sheet(made)).all("img") if "src" in image]
    shots = [(shot, row) for row in made.rows for shot in row.pictures]
    assert len(images) == len(shots) == 12
    for image, (shot, row) in zip(images, shots, strict=True):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        decoded = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert decoded.tobytes() == shot.image.tobytes()
        assert decoded.text["parameters"] == shot.parameters  # type: ignore[attr-defined]
        assert image["alt"].endswith(f"seed {row.seed}: {printable_prompt(row.prompt)}")
        assert (image["width"], image["height"]) == ("288", "192")
    assert [image["alt"].split(",")[0] for image in images] == list(COLUMNS) * 4


def test_the_page_needs_nothing_and_runs_its_own_script_alone() -> None:
    found = ParsedPage(page.render_sheet(contact("a red fox", HOSTILE)))
    assert {tag for tag, _ in found.tags}.isdisjoint({"link", "iframe", "object", "embed", "a", "base"})
    (script,) = found.scripts
    assert HOSTILE not in script
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset", "style") for name in attributes)
        assert all(name != "src" or str(text).startswith("data:") for name, text in attributes.items())
    (policy,) = (meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = re.sub(
        r"data:image/png;base64,[^\"]+|<h2>.*</h2>|(alt|aria-label)=\"[^\"]*\"|<span.*?</span>|^ *//.*$",
        "",
        page.render_sheet(contact(HOSTILE)),
        flags=re.MULTILINE,
    )
    assert "//" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_shows_prompts_as_they_are() -> None:
    text = page.render_sheet(contact("a red fox", HOSTILE))
    assert text.count("<script") == 1
    words = ParsedPage(text).text
    assert printable_prompt(HOSTILE) in words
    for label in ("demo at 96x64", *COLUMNS, "seed 7", "ratios", FACTS[1][1], "a red fox"):
        assert label in words


def test_every_picture_can_be_made_large_and_small_again() -> None:
    found = ParsedPage(page.render_sheet(contact("a", "b")))
    ids = [radio["id"] for radio in found.all("input") if radio["type"] == "radio"]
    assert len(ids) == len(set(ids)) == 13
    targets = [label["for"] for label in found.all("label") if "for" in label]
    assert set(targets) == set(ids)
    assert targets.count("none") == 12
    assert "prefers-color-scheme: dark" in page.render_sheet(contact("a"))
