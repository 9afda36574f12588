"""What a push would do and what its card would say, and the picture that it takes along."""

import io
from pathlib import Path

import pytest
from PIL import Image

from crdiff_export.publish.request import LARGEST_SHEET
from tests.support import makers
from tests.support.isolation import Crdiff
from tests.support.publishing import NAME, REPO, Desk, Made, digest, refused

SHEET = "images/crdiff/one.png"


def picture(folder: Path, colour: str = "red") -> Path:
    """A PNG file of one colour."""
    path = folder / f"{colour}.png"
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def test_a_sheet_goes_along_and_stands_on_the_card(desk: Desk, made: Made, tmp_path: Path) -> None:
    red = picture(tmp_path)
    ran = desk.push(made.one, REPO, "--sheet", red, "--json")
    assert ran.code == 0, ran.err
    assert {file["path"] for file in ran.result["files"]} == {NAME, SHEET}
    assert desk.hub.read(REPO, SHEET) == red.read_bytes()
    card = desk.hub.read(REPO, "README.md").decode()
    assert f"](https://huggingface.co/{REPO}/resolve/main/{SHEET})" in card
    # Another variant keeps it, and another picture replaces it.
    assert desk.push(made.other, REPO, "--path-in-repo", "two.safetensors").code == 0
    assert f"/resolve/main/{SHEET})" in desk.hub.read(REPO, "README.md").decode()
    ran = desk.push(made.one, REPO, "--sheet", picture(tmp_path, "blue"))
    assert ran.out.splitlines()[-1].endswith(f"/{NAME}")  # the address is that of the weights
    assert desk.hub.read(REPO, SHEET) != red.read_bytes()
    before = desk.titles()
    assert desk.push(made.one, REPO, "--sheet", tmp_path / "blue.png").code == 0
    assert desk.titles() == before  # nothing new, no commit


def test_a_sheet_is_drawn_on_request(desk: Desk) -> None:
    prompt = "two red circles on grey"
    ran = desk.run("export", "demo", "--res", "48", "-o", "x.safetensors", "--push", REPO, "--preview", prompt)
    assert ran.code == 0, ran.err
    drawn = Image.open(io.BytesIO(desk.hub.read(REPO, "images/crdiff/x.png")))
    assert prompt in drawn.text["parameters"]  # type: ignore[attr-defined]
    assert desk.files() == {"x.safetensors"}  # the picture was not left here
    ran = desk.run("push", "x.safetensors", REPO, "--preview", prompt, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert {file["path"] for file in ran.result["files"]} == {"x.safetensors", "images/crdiff/x.png", "README.md"}


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(desk: Desk, made: Made) -> None:
    ran = desk.push(made.one, REPO, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert not ran.result["exists"]
    assert {file["path"]: file["state"] for file in ran.result["files"]} == {NAME: "new", "README.md": "new"}
    assert ran.result["files"][0]["sha256"] == digest(made.one)
    assert not desk.asked("POST")
    assert REPO not in desk.hub.repositories

    assert desk.push(made.one, REPO).code == 0
    assert desk.hub.read(REPO, "README.md").decode() == ran.result["card"]
    before = desk.titles()
    for path, name, state, card in (
        (made.one, NAME, "unchanged", "unchanged"),
        (made.other, NAME, "changed", "changed"),
        (made.other, "two.safetensors", "new", "changed"),
    ):
        ran = desk.push(path, REPO, "--dry-run", "--json", "--path-in-repo", name)
        assert {file["path"]: file["state"] for file in ran.result["files"]} == {name: state, "README.md": card}
    assert desk.titles() == before
    ran = desk.push(made.one, REPO, "--dry-run")
    assert "would send nothing" in ran.out


def test_the_card_is_printed_without_a_push(desk: Desk, made: Made) -> None:
    ran = desk.run("card", made.one, REPO)
    assert ran.code == 0, ran.err
    assert desk.push(made.one, REPO).code == 0
    assert desk.hub.read(REPO, "README.md").decode() == ran.out
    (text, *_) = desk.run("card", made.one).out.partition("\n# ")
    assert "resolution:96x64" in text
    assert len(desk.titles()) == 1


def test_the_cards_command_makes_the_same_weights(crdiff: Crdiff, here: Path) -> None:
    assert crdiff("export", "demo", "--res", "48", "--targets", "attn", "-o", "a.safetensors").code == 0
    card = crdiff("card", "a.safetensors").out
    (line,) = [line for line in card.splitlines() if line.startswith("crdiff export")]
    assert crdiff(*line.replace("a.safetensors", "b.safetensors").split()[1:]).code == 0
    first, again = (
        makers.metadata_of(here / name)["modelspec.hash_sha256"] for name in ("a.safetensors", "b.safetensors")
    )
    assert first == again


def test_variants_of_like_names_have_sheets_of_their_own(desk: Desk, made: Made, tmp_path: Path) -> None:
    red = picture(tmp_path)
    assert desk.push(made.one, REPO, "--path-in-repo", "a/b.safetensors", "--sheet", red).code == 0
    assert desk.push(made.other, REPO, "--path-in-repo", "a-b.safetensors").code == 0
    card = desk.hub.read(REPO, "README.md").decode()
    assert [line.count("/images/crdiff/a/b.png") for line in card.splitlines() if line.startswith("![")] == [1]


@pytest.mark.parametrize("name", ["none.png", "text.png", "cut.png", "large.png", "."])
def test_a_sheet_must_be_a_whole_picture(name: str, crdiff: Crdiff, made: Made, here: Path) -> None:
    (here / "text.png").write_text("a picture")
    raw = picture(here).read_bytes()
    (here / "cut.png").write_bytes(raw[:-4])
    (here / "large.png").write_bytes(raw[:40] + bytes(LARGEST_SHEET) + raw[-20:])
    refused(crdiff("push", made.one, REPO, "--sheet", name), 2, name)


def test_a_sheet_is_given_or_drawn(crdiff: Crdiff, made: Made, here: Path) -> None:
    refused(crdiff("push", made.one, REPO, "--sheet", picture(here), "--preview", "a fox"), 2, "--preview")
    # The path of a base that was a local file is unknown.
    refused(crdiff("push", made.one, REPO, "--preview", "a fox"), 2, "--preview")
    refused(crdiff("export", "demo", "--res", "48", "--preview", "a fox"), 2, "--preview")
