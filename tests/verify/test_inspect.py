"""What is told of a checkpoint from its headers alone, whoever made it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CheckpointError
from crdiff_export.models import demo
from crdiff_export.verify.inspect import GROUP_COLUMNS, Inspection, group_rows, inspect, provenance
from tests.support import makers
from tests.support.isolation import Crdiff

INDEX = "shards/diffusion_pytorch_model.safetensors.index.json"


def facts(inspection: Inspection) -> dict[str, str]:
    return dict(inspection.facts())


@pytest.mark.parametrize(
    ("name", "file", "family", "prefix"),
    [
        ("sd15.safetensors", "one file, 1133 tensors, 1.13 MB", "SD1.5 (original layout)", "model.diffusion_model."),
        ("dit.safetensors", "one file, 491 tensors, 1.25 MB", "SD3-medium (original layout)", "model.diffusion_model."),
        (INDEX, "shards, 3 files of weights, 686 tensors, 1.02 MB", "SD1.5 (diffusers layout)", "none"),
        ("pipe", "diffusers folder, 286 tensors, 156.71 KB", "demo (diffusers layout)", "none"),
        ("sparse.safetensors", "one file, 2515 tensors, 6.94 GB", "SDXL (original layout)", "model.diffusion_model."),
    ],
    ids=["file", "transformer", "shards", "folder", "sparse"],
)
def test_a_base(shelf: Path, name: str, file: str, family: str, prefix: str) -> None:
    inspection = inspect(shelf / name)
    report = facts(inspection)
    assert report["file"] == f"{shelf / name} ({file})"
    assert (report["family"], report["prefix"]) == (family, prefix)
    assert report["crdiff"] == "not made by crdiff"
    assert inspection.columns == ("group", "layers", "weights")
    assert [row[0] for row in inspection.rows] == list(inspection.groups)
    assert inspection.as_json()["crdiff"] is None


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora.safetensors", "no known model family: this is a LoRA, not a checkpoint, e.g. "),
        ("vae.safetensors", "no known model family: this is a VAE, not a diffusion model, e.g. "),
        ("odd.safetensors", "no known model family: none of 1 tensors is named like one of theirs, e.g. odd.weight"),
    ],
)
def test_a_file_of_no_known_family(shelf: Path, name: str, what: str) -> None:
    inspection = inspect(shelf / name)
    assert facts(inspection)["family"].startswith(what)
    assert (inspection.rows, inspection.groups, inspection.match) == ([], {}, None)
    assert inspection.as_json()["unknown"].startswith(what)


def test_one_tensor_is_one_and_none_are_tensors(shelf: Path, tmp_path: Path) -> None:
    assert facts(inspect(shelf / "odd.safetensors"))["file"].endswith("(one file, 1 tensor, 8 bytes)")
    report = facts(inspect(makers.write(tmp_path / "none.safetensors", {})))
    assert report["file"].endswith("(one file, 0 tensors, 0 bytes)")
    assert report["dtypes"] == "none"
    assert report["family"] == "no known model family: the file has no tensors"


def test_a_hole_is_told(shelf: Path) -> None:
    inspection = inspect(shelf / "sparse.safetensors")
    assert facts(inspection)["note"] == "sparse.safetensors is sparse: mostly a hole, without weights"
    assert inspection.as_json()["sparse"] is True
    assert inspect(shelf / "sd15.safetensors").as_json()["sparse"] is False


def test_dtypes_come_with_their_sizes_largest_first(tmp_path: Path) -> None:
    tensors: Mapping[str, tuple[str, makers.Shape, bytes]] = {
        "a": ("F32", (2,), bytes(8)), "b": ("BF16", (2000,), bytes(4000)), "c": ("F8_E4M3", (9,), bytes(9)),
    }  # fmt: skip
    inspection = inspect(makers.write(tmp_path / "a.safetensors", tensors))
    assert facts(inspection)["dtypes"] == "BF16 4.00 KB, F8_E4M3 9 bytes, F32 8 bytes"
    assert list(inspection.as_json()["dtypes"].items()) == [("BF16", 4000), ("F8_E4M3", 9), ("F32", 8)]


def test_an_inpainting_model_and_an_ema_copy_are_told(tmp_path: Path) -> None:
    tensors = makers.tiny("sd15.original")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    dtype, (out, _, *rest), data = tensors[name]
    tensors[name] = (dtype, (out, 9, *rest), data[:2] * out * 9 * 9)
    tensors["model_ema.diffusion_modelout2bias"] = ("F16", (1,), bytes(2))
    report = facts(inspect(makers.write(tmp_path / "a.safetensors", tensors)))
    assert report["family"] == "SD1.5 (original layout, inpainting)"
    assert report["note"] == "1 tensors of an EMA copy (model_ema.*)"


def test_quantised_weights_are_told(tmp_path: Path) -> None:
    tensors = {**makers.tiny("demo.original-unet"), "model.diffusion_model.scaled_fp8": ("F32", (), bytes(4))}
    inspection = inspect(makers.write(tmp_path / "a.safetensors", tensors))
    assert facts(inspection)["quantised"].endswith("with one scale for each tensor")
    assert inspection.as_json()["quantised"]


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("100% Ünïcödé 模型, 'quoted'", "100% Ünïcödé 模型, 'quoted'"),
        ("red \x1b[31m", r"red \x1b[31m"),
        ("long " * 100, ("long " * 40) + "… (500 characters)"),
    ],
    ids=["plain", "escape", "long"],
)
def test_a_title_is_shown_as_it_is_where_it_can_be(tmp_path: Path, title: str, shown: str) -> None:
    path = makers.write(tmp_path / "a.safetensors", makers.tiny("demo.original-unet"), {"modelspec.title": title})
    assert facts(inspect(path))["title"] == shown
    assert inspect(path).as_json()["title"] == title


# --- files that crdiff made ---


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("baked") / "o.safetensors"
    return export(ExportRequest("demo", Size(96, 64), target, dtype="bf16")).written.path


def test_a_baked_file_says_all_about_itself(baked: Path) -> None:
    stamp = makers.metadata_of(baked)
    report = facts(inspect(baked))
    assert report["title"] == "crdiff demo CR-Diff 96x64"
    assert report["pruned for"] == "96x64 (native 64x64 by its modelspec.resolution)"
    assert report["ratios"].startswith("searched (crdiff search: tpe, seed 42, ")
    assert report["recipe"] == "demo.toml 96x64"
    assert report["targets"] == "attn, ff by magnitude, cast to BF16"
    assert report["POA weight"] == "1.8259 (not shown to help)"
    base, own = stamp["crdiff.source.hash_sha256"], stamp["modelspec.hash_sha256"]
    assert report["base"] == f"demo ({base}, AutoV3 {base[2:14].upper()})"
    assert report["hash"] == f"{own} (AutoV3 {own[2:14].upper()})"
    assert report["made by"] == f"crdiff {stamp['crdiff.version']}"


def test_a_baked_file_has_a_row_for_each_group(baked: Path) -> None:
    inspection = inspect(baked)
    stamp = makers.metadata_of(baked)
    assert inspection.stamp is not None
    assert (inspection.columns, inspection.rows) == (GROUP_COLUMNS, group_rows(inspection.stamp))
    for name, ratio, zeroed, of, share, threshold in inspection.rows:
        assert (ratio, zeroed, of) == (
            f"{float(stamp[f'crdiff.ratio.{name}']):g}",
            f"{int(stamp[f'crdiff.pruned.{name}']):,}",
            f"{inspection.groups[name]['total']:,}",
        )
        assert float(share) == pytest.approx(float(ratio), abs=0.01)
        assert float(threshold) == pytest.approx(float.fromhex(stamp[f"crdiff.threshold.{name}"]), rel=1e-5)


def test_a_baked_file_is_told_to_machines(baked: Path) -> None:
    report = inspect(baked).as_json()
    assert report["crdiff"] == {
        key.removeprefix("crdiff."): text
        for key, text in makers.metadata_of(baked).items()
        if key.startswith("crdiff.")
    }
    assert set(report["groups"]) == {"down", "mid", "up"}


def test_thresholds_of_layers_are_not_a_groups(shelf: Path, tmp_path: Path) -> None:
    request = ExportRequest(str(shelf / "dit.safetensors"), Size(512, 512), tmp_path / "o.safetensors", hashing=False)
    inspection = inspect(export(request).written.path)
    assert inspection.rows[0][-1] == "per layer"
    assert (facts(inspection)["hash"], facts(inspection)["base"]) == ("none", "dit.safetensors (not hashed)")


def test_a_group_that_was_left_alone_has_no_threshold(tmp_path: Path) -> None:
    request = ExportRequest("demo", Size(64, 64), tmp_path / "o.safetensors", ratios={"mid": 0})
    rows = {row[0]: row for row in inspect(export(request).written.path).rows}
    assert rows["mid"][1:] == ["0", "0", "262,144", "0.0000", "-"]


def edited(**keys: str) -> Callable[[Path, Path], Path]:
    def make(source: Path, target: Path) -> Path:
        metadata = {k: v for k, v in (makers.metadata_of(source) | keys).items() if v != "gone"}
        return makers.write(target, makers.read(source), metadata)

    return make


def measured(**said: str) -> Callable[[Path, Path], Path]:
    """With this evidence and no other."""

    def make(source: Path, target: Path) -> Path:
        kept = {k: v for k, v in makers.metadata_of(source).items() if not k.startswith("crdiff.evidence.")}
        return makers.write(target, makers.read(source), kept | {f"crdiff.evidence.{k}": v for k, v in said.items()})

    return make


@pytest.mark.parametrize(
    ("make", "key", "shown"),
    [
        (edited(**{"crdiff.source.name": "a\x1b]0;b"}), "base", r"a\x1b]0;b (0x"),
        (edited(**{"crdiff.version": "\u202e1"}), "made by", r"crdiff \u202e1"),
        (edited(**{"crdiff.prompt": "a cat"}), "prompt", "a cat"),
        (measured(scorer="IR", pruned="1"), "evidence", "pruned 1, scorer IR"),
        (
            edited(**{"crdiff.provenance": "searched", "crdiff.provenance.source": "a search"}),
            "ratios",
            "searched (a search)",
        ),
        (edited(**{"modelspec.hash_sha256": "gone"}), "hash", "none"),
    ],
    ids=["base", "version", "prompt", "evidence", "searched", "no hash"],
)
def test_what_a_header_says_is_shown_safely(
    baked: Path, tmp_path: Path, make: Callable[[Path, Path], Path], key: str, shown: str
) -> None:
    assert facts(inspect(make(baked, tmp_path / "a.safetensors")))[key].startswith(shown)


def test_a_header_of_ours_that_was_damaged_is_refused(baked: Path, tmp_path: Path) -> None:
    path = edited(**{"crdiff.pruned.up": "many"})(baked, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"crdiff.pruned.up is 'many', not a whole number"):
        inspect(path)


def test_inspect_reads_headers_only(crdiff: Crdiff, tmp_path: Path) -> None:
    raw = demo.path().read_bytes()
    (tmp_path / "a.safetensors").write_bytes(raw[:-4] + b"\xff\xff\xff\xff")
    ran = crdiff("inspect", tmp_path / "a.safetensors", "--json")
    assert ran.result["bytes"] == len(raw) - 8 - int.from_bytes(raw[:8], "little")


# --- words ---


def test_what_nobody_tuned_says_so() -> None:
    assert provenance("starting-point", "a guess") == "starting point, not tuned (a guess)"
    assert provenance("published", "a paper") == "published (a paper)"
