"""Pages in a real browser: light, dark and on a phone, and the slider with the keys and by touch.

Set CRDIFF_TEST_SCREENSHOTS to a folder to keep what the browser showed.
"""

from pathlib import Path

import pytest
from PIL import Image

from crdiff_export.evaluate import Evaluation, page
from crdiff_export.evaluate.report import ContactSheet, SheetPicture, SheetRow
from crdiff_export.evaluate.report import page as report_page
from tests.support import browser
from tests.support.browser import PHONE, Browser, check_looks, shown

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def evaluation_page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "evaluation.html"
    path.write_text(page.render(evaluation))
    return path


@pytest.fixture(scope="module")
def sheet_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one colour each: red, green and blue."""
    pictures = tuple(SheetPicture(Image.new("RGB", (96, 64), colour)) for colour in ("red", "lime", "blue"))
    rows = tuple(SheetRow("a red fox", seed, pictures) for seed in (1, 2))
    sheet = ContactSheet("demo at 96x64", (("base", "demo"),), ("dense", "pruned", "POA 1.5"), rows)
    path = tmp_path_factory.mktemp("pages") / "sheet.html"
    path.write_text(report_page.render_sheet(sheet))
    return path


def test_pages_fit_the_window_and_its_colours(chromium: Browser, evaluation_page: Path, sheet_page: Path) -> None:
    check_looks(chromium, evaluation_page, "evaluation")
    check_looks(chromium, sheet_page, "preview")


def test_the_first_screen_of_a_phone_has_the_verdict_in_words_and_in_the_table(
    chromium: Browser, evaluation_page: Path
) -> None:
    chromium.open(evaluation_page, PHONE)
    tops = chromium.run("[...document.querySelectorAll('.verdicts .verdict')].map(e => e.getBoundingClientRect().top)")
    assert tops
    assert tops[0] < PHONE[1] / 4
    ends = chromium.run("[...document.querySelectorAll('.numbers .verdict')].map(e => e.getBoundingClientRect().right)")
    assert ends
    assert max(ends) <= PHONE[0]


def test_a_small_picture_is_shown_large_and_sharp(chromium: Browser, sheet_page: Path) -> None:
    chromium.open(sheet_page)
    picture = "document.querySelector('img')"
    assert chromium.run(f"{picture}.width") == 3 * 96
    assert chromium.run(f"getComputedStyle({picture}).imageRendering") == "pixelated"


def colours(chromium: Browser, name: str) -> tuple[int, set[tuple[int, int, int]]]:
    """Where the slider's line is, in percent, and which pictures show left and right of it."""
    image = shown(chromium, name, whole=False)
    box = chromium.run("(({x, y, width, height}) => [x, y, width, height])(stage.getBoundingClientRect())")
    x, y, width, height = box
    above = int(y + height / 8)  # the line's handle is in the middle
    row = [image.getpixel((int(x + width * (number + 0.5) / 100), above)) for number in range(100)]
    first = row[0]
    position = next((number for number, colour in enumerate(row) if colour != first), 100)
    return position, {first, row[-1]}  # type: ignore[arg-type]


def test_the_slider_moves_with_the_keys(chromium: Browser, sheet_page: Path) -> None:
    chromium.open(sheet_page)
    chromium.run("document.querySelector('button.compare').focus()")
    chromium.press("Enter")
    position, pair = colours(chromium, "slider")
    assert pair == {(255, 0, 0), (0, 255, 0)}
    assert 47 <= position <= 52
    for _ in range(10):
        chromium.press("ArrowRight")
    assert 57 <= colours(chromium, "slider-right")[0] <= 62
    chromium.press("Home")
    assert colours(chromium, "slider-home")[1] == {(0, 255, 0)}
    chromium.run("right.value = 2; right.dispatchEvent(new Event('change'))")
    chromium.press("ArrowRight")
    chromium.press("End")
    assert colours(chromium, "slider-end")[1] == {(255, 0, 0)}
    chromium.press("Home")
    assert colours(chromium, "slider-other")[1] == {(0, 0, 255)}  # any two models of the row
    chromium.press("Escape")
    assert not chromium.run("slider.open")


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_slider_moves_by_touch(share: float, chromium: Browser, sheet_page: Path) -> None:
    chromium.open(sheet_page, PHONE)
    chromium.run("document.querySelector('button.compare').click()")
    x, y, width, height = chromium.run(
        "(({x, y, width, height}) => [x, y, width, height])(stage.getBoundingClientRect())"
    )
    assert 0 <= x < x + width <= PHONE[0]
    chromium.tap(x + share * width, y + height / 2)
    assert abs(colours(chromium, f"slider-touch-{share}")[0] - 100 * share) <= 3


def test_no_script_but_the_pages_own_runs(chromium: Browser, sheet_page: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed.html"
    text = sheet_page.read_text()
    path.write_text(text.replace("</body>", "<script>document.title = 'changed'</script></body>"))
    chromium.open(path)
    assert chromium.run("document.title") == "demo at 96x64"
    assert not chromium.run("document.querySelector('button.compare').hidden")
