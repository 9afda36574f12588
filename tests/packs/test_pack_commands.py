"""`crdiff pack`, and what other commands do with a pack."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crdiff_export import Size
from crdiff_export.models import demo
from tests.support import criteria_makers, makers, packing
from tests.support.command_lines import Line
from tests.support.isolation import Crdiff
from tests.support.messages import golden, refused

SIZES = "--res 48 --res 96x64"


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The bytes of packs that were made once."""
    folder, found = tmp_path_factory.mktemp("kept"), dict[str, bytes]()

    def get(name: str) -> bytes:
        if name not in found:
            path, options = folder / name, {"criterion": "random"} if name == "masks.crdiff" else {}
            packing.new_pack("demo", path, Size(48, 48), Size(96, 64), criterion=options.get("criterion", "magnitude"))
            found[name] = path.read_bytes()
        return found[name]

    return get


@pytest.fixture
def sizes(kept: Callable[[str], bytes], here: Path) -> Path:
    """A pack of the demo with thresholds for 48x48 and 96x64."""
    path = here / "sizes.crdiff"
    path.write_bytes(kept(path.name))
    return path


@pytest.fixture
def masks(kept: Callable[[str], bytes], here: Path) -> Path:
    """A pack of the demo with masks for 48x48 and 96x64."""
    path = here / "masks.crdiff"
    path.write_bytes(kept(path.name))
    return path


# --- create, add, remove, show ---


def test_create_shows_what_it_made(line: Line, here: Path, sizes: Path) -> None:
    ran = line(f"pack create demo {SIZES}")
    assert ran.code == 0, ran.err
    assert (here / "demo.crdiff").read_bytes() == sizes.read_bytes()
    assert ran.out.splitlines()[0] == "pack:    demo.crdiff (2 sizes, 5.44 KB)"
    (header, *rows), _ = (part.splitlines() for part in ran.out.split("\n\n")[1:])
    assert header.split()[:3] == ["size", "down/mid/up", "zeroed"]
    assert [row.split()[0] for row in rows] == ["48x48", "96x64"]
    assert ran.out.replace("demo.crdiff", "sizes.crdiff") == line("pack show sizes.crdiff").out
    assert line("inspect sizes.crdiff").out == line("pack show sizes.crdiff").out
    assert "counting: " in ran.err


def test_create_names_the_pack_after_its_base(line: Line, here: Path, shelf: Path) -> None:
    for base, name in {
        shelf / "sd15.safetensors": "sd15.crdiff", shelf / "pipe": "pipe.crdiff", f"{shelf}/pipe/": "pipe.crdiff",
    }.items():  # fmt: skip
        ran = line(f"pack create {base} --res 512 --force -q")
        assert (ran.code, ran.out) == (0, f"{name}\n"), ran.err
    assert sorted(path.name for path in here.iterdir()) == ["pipe.crdiff", "sd15.crdiff"]


def test_a_dry_run_writes_nothing(line: Line, here: Path) -> None:
    ran = line(f"pack create demo {SIZES} --criterion random --dry-run")
    assert ran.code == 0
    assert "would write: demo.crdiff" in ran.out
    assert "note: random needs a mask of one bit a weight" in ran.err
    planned = line(f"pack create demo {SIZES} --criterion random --dry-run --json").result
    assert planned["mask_bytes"] == 2 * (327_680 + 262_144 + 655_360) // 8
    assert list(here.iterdir()) == []


def test_add_takes_the_base_that_the_pack_names(line: Line, sizes: Path) -> None:
    before = sizes.read_bytes()
    assert line("pack add sizes.crdiff --res 64x96 --ratio 0.2 -q").out == "sizes.crdiff\n"
    shown = line("pack show sizes.crdiff --json").result
    assert [variant["resolution"] for variant in shown["variants"]] == ["48x48", "64x96", "96x64"]
    ran = line("pack remove sizes.crdiff --res 64x96")
    assert (ran.code, ran.out) == (0, "sizes.crdiff: without 64x96; it has 48x48, 96x64\n")
    assert sizes.read_bytes() == before
    assert line("pack add sizes.crdiff --res 64x96 --dry-run").code == 0
    assert sizes.read_bytes() == before


def test_add_keeps_a_native_size_that_was_given(line: Line, here: Path) -> None:
    assert line("pack create demo --res 48 --native 256 -q").code == 0
    assert line("pack add demo.crdiff --res 96x64 -q").code == 0
    refused(line("pack add demo.crdiff --res 64x96 --native 128 -q"), 1, "64x96")
    assert line("verify demo.crdiff --base demo").code == 0


def test_force_replaces_a_size(line: Line, sizes: Path) -> None:
    before = sizes.read_bytes()
    refused(line("pack add sizes.crdiff --res 48 --res 64x96 --ratio 0.1"), 2, "sizes.crdiff", "48x48")
    assert sizes.read_bytes() == before
    assert line("pack add sizes.crdiff --res 48 --ratio 0.1 --criterion random --force -q").code == 0
    (first, second) = line("pack show sizes.crdiff --json").result["variants"]
    assert (first["groups"]["mid"]["ratio"], first["criterion"]) == (0.1, "random")
    assert second["criterion"] == "magnitude"
    assert line("pack add sizes.crdiff --res 48 --force -q").code == 0
    assert sizes.read_bytes() == before


def test_show_has_all_metadata_on_request(line: Line, masks: Path) -> None:
    ran = line("pack show masks.crdiff --metadata")
    assert "\ncrdiff.pack.sizes: 48x48,96x64\n" in ran.out
    assert "mask, 155.65 KB" in ran.out
    shown = line("inspect masks.crdiff --metadata --json").result
    assert shown["metadata"] == makers.metadata_of(masks)
    assert line("pack show masks.crdiff -q").out == line("pack show masks.crdiff").out


def test_a_pack_among_several_files(line: Line, sizes: Path) -> None:
    entries = line("inspect sizes.crdiff demo none.crdiff --json")
    assert entries.code == 1
    first, second, third = entries.result["files"]
    assert (first["pack"], "pack" in second, third["error"]["code"]) == (True, False, "checkpoint")
    ran = line("verify sizes.crdiff demo --base demo")
    assert ran.code == 1
    assert ran.out.startswith("sizes.crdiff: holds what its header says (2 sizes, its SHA-256, thresholds and masks")


# --- export ---


@pytest.mark.parametrize("name", ["sizes", "masks"])
def test_export_gives_the_bytes_of_a_plain_export(
    name: str, line: Line, here: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    ran = line(f"export demo --pack {name}.crdiff {SIZES} -o p-{{size}}.safetensors")
    assert ran.code == 0, ran.err
    assert "counting: " not in ran.err
    criterion = "random" if name == "masks" else "magnitude"
    assert line(f"export demo {SIZES} --criterion {criterion} -o o-{{size}}.safetensors -q").code == 0
    for size in ("48x48", "96x64"):
        assert (here / f"p-{size}.safetensors").read_bytes() == (here / f"o-{size}.safetensors").read_bytes()
    assert line("verify p-48x48.safetensors --base demo").code == 0


def test_a_dry_run_names_the_pack(line: Line, sizes: Path, masks: Path) -> None:
    planned = line("export demo --pack masks.crdiff --res 48 --dry-run --json").result
    assert (planned["pack"], planned["criterion"]) == ("masks.crdiff", "random")
    assert "with the masks of masks.crdiff (random)" in line("export demo --pack masks.crdiff --res 48 --dry-run").out
    ran = line("export demo --pack sizes.crdiff --res 48 --dry-run")
    assert "with the thresholds of sizes.crdiff (magnitude)" in ran.out
    ran = line("export demo --pack sizes.crdiff --res 48 --dtype bf16 --dry-run")
    assert "with the ratios of sizes.crdiff (magnitude)" in ran.out


NUMBERS = (
    "--recipe x.toml", "--ratio 0.3", "--down 0.1", "--mid 0.1", "--up 0.1", "--prompt x", "--poa-weight 1.2",
    "--criterion magnitude", "--calibration x", "--targets ff", "--family x.toml", "--native 64", "--no-hash",
)  # fmt: skip


@pytest.mark.parametrize("option", NUMBERS)
def test_what_a_pack_has_decided_cannot_be_given(option: str, line: Line, here: Path, sizes: Path) -> None:
    refused(line(f"export demo --pack sizes.crdiff --res 48 {option}"), 2, option.partition(" ")[0])
    assert list(here.iterdir()) == [sizes]


def test_nor_in_the_environment(line: Line, sizes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRDIFF_EXPORT_RATIO", "0.3")
    assert line("export demo --pack sizes.crdiff --res 48").code == 2


# --- verify ---


def test_verify_with_the_base(line: Line, sizes: Path, masks: Path) -> None:
    for name in ("sizes", "masks"):
        ran = line(f"verify {name}.crdiff --base demo")
        assert (ran.code, ran.out.count("thresholds and masks against")) == (0, 1), ran.err
        assert line(f"verify {name}.crdiff").out == (
            f"{name}.crdiff: holds what its header says (2 sizes, its SHA-256)\n"
        )
        assert line(f"verify {name}.crdiff --base demo -q").out == ""


def test_verify_with_another_base(line: Line, here: Path, sizes: Path) -> None:
    name = next(name for name in makers.entries_of(demo.path()) if name.endswith("time_embed.0.weight"))
    makers.changed(demo.path(), name, {3: b"\x55"}, here / "other.safetensors")
    refused(line("verify sizes.crdiff --base other.safetensors -q"), 3, "sizes.crdiff", "the hash of the tensors")
    name = next(name for name in makers.entries_of(demo.path()) if name.endswith("attn1.to_q.weight"))
    makers.changed(demo.path(), name, {3: b"\x55"}, here / "other.safetensors")
    refused(line("verify sizes.crdiff --base other.safetensors -q"), 3, "other.safetensors", "sizes.crdiff")


def test_verify_finds_a_threshold_that_is_not_the_bases(line: Line, here: Path, sizes: Path) -> None:
    """Its hash was made again, so that nothing but the base tells."""
    packing.changed(sizes, here / "x.crdiff", {"48x48/crdiff.threshold.mid": "0x1.0000000000000p-5"})
    assert line("verify x.crdiff").code == 0
    shutil.copyfile(demo.path(), here / "base.safetensors")
    refused(line("verify x.crdiff --base base.safetensors -q"), 3, "x.crdiff", "mid at 48x48")
    ran = line("verify x.crdiff --base demo --json")
    assert (ran.code, ran.error["code"]) == (3, "verify")


def test_verify_finds_a_mask_that_is_not_the_bases(line: Line, here: Path, masks: Path) -> None:
    raw = masks.read_bytes()
    (here / "x.crdiff").write_bytes(raw[:-1] + bytes([raw[-1] ^ 3]))
    refused(line("verify x.crdiff -q"), 3, "x.crdiff", "96x64")
    refused(line("export demo --pack x.crdiff --res 96x64 -q"), 1, "x.crdiff")
    assert line("export demo --pack x.crdiff --res 48 -q").code == 0
    refused(line("pack remove x.crdiff --res 48 -q"), 1, "x.crdiff")
    assert (here / "x.crdiff").stat().st_size == len(raw)


def test_verify_needs_the_calibration_of_masks(line: Line, here: Path, sizes: Path) -> None:
    found = criteria_makers.planned(here / "base.safetensors", makers.read(demo.path()), size=Size(64, 96))
    statistics = criteria_makers.calibrated(found, ("norm",))
    for name, seed in (("cal", 0), ("other", 1)):
        statistics = criteria_makers.calibrated(found, ("norm",), seed=seed)
        criteria_makers.write_calibration(here / f"{name}.safetensors", found, statistics, {"size": "64x96"})
    assert line("pack add sizes.crdiff --res 64x96 --criterion wanda --calibration cal.safetensors -q").code == 0
    refused(line("pack add sizes.crdiff --res 80 --criterion wanda --calibration cal.safetensors"), 2, "80x80", "64x96")
    refused(line("pack add sizes.crdiff --res 80 --criterion wanda"), 2, "wanda")
    ran = line("verify sizes.crdiff --base demo")
    assert ran.code == 0
    assert "its SHA-256, the base's hash and what goes at 48x48, 96x64 against" in ran.out
    assert "64x96: that wanda would choose this mask was not checked: give --calibration" in ran.err
    assert line("verify sizes.crdiff --base demo --json").result["unranked"] == ["64x96"]
    ran = line("verify sizes.crdiff --base demo --calibration cal.safetensors")
    assert (ran.code, "note" in ran.err) == (0, False)
    assert "thresholds and masks against" in ran.out
    refused(line("verify sizes.crdiff --base demo --calibration other.safetensors -q"), 2, "other.safetensors")
    refused(line("verify sizes.crdiff --calibration cal.safetensors"), 2, "cal.safetensors")
    assert line("export demo --pack sizes.crdiff --res 64x96 -o p.safetensors -q").code == 0
    options = "--criterion wanda --calibration cal.safetensors -o o.safetensors -q"
    assert line(f"export demo --res 64x96 {options}").code == 0
    assert (here / "p.safetensors").read_bytes() == (here / "o.safetensors").read_bytes()


def test_verify_says_what_it_could_not_rank(line: Line, here: Path, masks: Path) -> None:
    packing.changed(masks, here / "x.crdiff", {"48x48/crdiff.criterion": "another:seed=1"})
    ran = line("verify x.crdiff --base demo")
    assert ran.code == 0, ran.err
    assert "48x48: that another:seed=1 would choose this mask was not checked: it is not installed" in ran.err
    assert "the base's hash and what goes at 96x64 against" in ran.out


def test_verify_finds_the_weights_that_a_pack_was_made_from(line: Line, shelf: Path) -> None:
    assert line(f"pack create {shelf}/pipe --variant fp16 --res 512 -q").out == "pipe.crdiff\n"
    assert line(f"verify pipe.crdiff --base {shelf}/pipe").code == 0
    assert line(f"export {shelf}/pipe --variant fp16 --pack pipe.crdiff --res 512 -q").code == 0


# --- what is refused ---

REFUSALS = {
    "no size": ("pack create demo", 2, "usage", "--res"),
    "no base": ("pack create --res 48", 2, "usage", "BASE"),
    "no pack": ("pack show", 2, "usage", "PACK"),
    "command": ("pack crate demo", 2, "usage", "create"),
    "another ending": ("pack create demo --res 48 -o x.safetensors", 1, "plan", "x.safetensors"),
    "no name": ("pack create demo --res 48 -o .crdiff", 1, "plan", "NAME.crdiff"),
    "empty name": ("pack create demo --res 48 -o ''", 1, "plan", "NAME.crdiff"),
    "there already": ("pack create demo --res 48 -o sizes.crdiff", 1, "plan", "sizes.crdiff"),
    "no folder": ("pack create demo --res 48 -o no/x.crdiff", 1, "plan", "no/x.crdiff"),
    "a folder": ("pack create demo --res 48 -o folder.crdiff --force", 1, "plan", "folder.crdiff"),
    "no such base": ("pack create model.safetensors --res 48", 1, "checkpoint", "model.safetensors"),
    "a pack as base": ("pack create sizes.crdiff --res 48", 1, "plan", "sizes.crdiff"),
    "a pack as base of an export": ("export sizes.crdiff --res 48", 1, "plan", "--pack"),
    "weights that move": ("pack create demo --res 48 --criterion obs", 2, "usage", "obs"),
    "no calibration": ("pack create demo --res 48 --criterion wanda", 2, "usage", "wanda"),
    "no such criterion": ("pack create demo --res 48 --criterion taste", 2, "usage", "taste"),
    "size off the grid": ("pack create demo --res 50", 2, "usage", "50x50"),
    "size off the grid, added": ("pack add sizes.crdiff --res 50", 2, "usage", "50x50"),
    "size that is there": ("pack add sizes.crdiff --res 48", 2, "usage", "48x48"),
    "size that is not there": ("pack remove sizes.crdiff --res 64", 1, "pack", "64x64"),
    "every size": ("pack remove sizes.crdiff --res 48 --res 96x64", 2, "usage", "sizes.crdiff"),
    "add to nothing": ("pack add none.crdiff --res 48", 1, "checkpoint", "none.crdiff"),
    "add from another base": ("pack add sizes.crdiff --res 64 --base {shelf}/sd15.safetensors", 1, "pack", "sd15"),
    "show of no pack": ("pack show text.crdiff", 1, "checkpoint", "text.crdiff"),
    "show of a folder": ("pack show folder.crdiff", 1, "checkpoint", "folder.crdiff"),
    "show of a checkpoint": ("pack show {shelf}/sd15.safetensors", 1, "pack", "sd15.safetensors"),
    "layers of a pack": ("inspect sizes.crdiff --layers", 2, "usage", "--layers"),
    "difference of packs": ("diff sizes.crdiff {shelf}/sd15.safetensors", 2, "usage", "sizes.crdiff"),
    "restore": ("restore sizes.crdiff -o x.safetensors", 1, "checkpoint", "sizes.crdiff"),
    "picture of a pack": ("push sizes.crdiff my-org/x --preview fox", 2, "usage", "sizes.crdiff"),
    "export with no pack": ("export demo --pack none.crdiff --res 48", 1, "checkpoint", "none.crdiff"),
    "export of another size": ("export demo --pack sizes.crdiff --res 64", 1, "pack", "64x64"),
    "export of several, one not there": ("export demo --pack sizes.crdiff --res 48 --res 64", 1, "pack", "64x64"),
    "export of another family": ("export {shelf}/sd15.safetensors --pack sizes.crdiff --res 48", 1, "pack", "sd15"),
    "verify of another family": ("verify sizes.crdiff --base {shelf}/dit.safetensors", 3, "verify", "dit.safetensors"),
    "verify with a calibration alone": ("verify sizes.crdiff --calibration x", 2, "usage", "--calibration"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal(case: str, line: Line, here: Path, sizes: Path, shelf: Path) -> None:
    words, exit_code, code, key = REFUSALS[case]
    (here / "folder.crdiff").mkdir()
    (here / "text.crdiff").write_text("<html>")
    before = sizes.read_bytes()
    ran = line(f"{words.format(shelf=shelf)} --json")
    assert (ran.code, ran.out, ran.error["code"]) == (exit_code, "", code)
    assert key in ran.error["message"] + ran.error["hint"]
    golden(f"{ran.error['message']}\n{ran.error['hint']}")
    assert sorted(path.name for path in here.iterdir()) == ["folder.crdiff", "sizes.crdiff", "text.crdiff"]
    assert sizes.read_bytes() == before


def test_the_base_is_never_replaced(line: Line, here: Path, shelf: Path) -> None:
    raw = (shelf / "sd15.safetensors").read_bytes()
    (here / "base.crdiff").write_bytes(raw)
    (here / "link.crdiff").symlink_to("base.crdiff")
    for name in ("base.crdiff", "link.crdiff"):
        refused(line(f"pack create base.crdiff --res 512 -o {name} --force"), 1, name)
    assert (here / "base.crdiff").read_bytes() == raw


def test_a_base_that_is_not_here_is_to_be_given(line: Line, here: Path, shelf: Path) -> None:
    assert line(f"pack create {shelf}/sd15.safetensors --res 512 -q").code == 0
    refused(line("pack add sd15.crdiff --res 384"), 1, "sd15.safetensors", "--base")
    assert line(f"pack add sd15.crdiff --res 384 --base {shelf}/sd15.safetensors -q").code == 0


def test_what_a_stranger_wrote_cannot_control_a_terminal(line: Line, here: Path, sizes: Path) -> None:
    keys = {
        key: f"\x1b]0;x\x07{text}\n\u202e"
        for key, text in makers.metadata_of(sizes).items()
        if key.endswith((".name", ".version", ".provenance", ".source", ".recipe", ".scorer"))
    }
    packing.changed(sizes, here / "x.crdiff", keys)
    for words in ("pack show x.crdiff --metadata", "verify x.crdiff", "export demo --pack x.crdiff --res 48 --dry-run"):
        ran = line(words)
        assert ran.code == 0, ran.err
        assert not {"\x1b", "\x07", "\u202e"} & set(ran.out + ran.err)
    assert json.dumps(line("pack show x.crdiff --json").result)
