"""Numbers that belong elsewhere: borrowed from another size, found with other ratios, targets or criteria."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import PlanError
from crdiff_export.export import prepare
from crdiff_export.formats.safetensors import MAX_BYTES
from crdiff_export.formats.text import WARNING
from crdiff_export.models import demo
from crdiff_export.models.recipe import START_POA_WEIGHT
from crdiff_export.verify.inspect import inspect
from tests.support import makers
from tests.support.messages import raises

SEARCHED = Size(48, 48)  # the demo's recipe has a POA weight of 2.4365 for it
FAR = Size(1024, 1024)


def plan(size: Size = SEARCHED, **changes: Any) -> Any:
    return prepare(ExportRequest("demo", size, Path("o.safetensors"), **changes)).plan


def test_borrowed_numbers_say_so_in_header_and_inspect(here: Path) -> None:
    baked = export(ExportRequest("demo", FAR, Path("far.safetensors")))
    keys = makers.metadata_of(baked.written.path)
    assert keys["crdiff.provenance"] == "starting-point"
    assert keys["crdiff.provenance.borrowed_from"] == "96x96"
    assert not [key for key in keys if key.startswith("crdiff.evidence")]
    facts = dict(inspect(baked.written.path).facts())
    assert facts["ratios"].startswith("starting point, borrowed from 96x96 (")
    assert "evidence" not in facts
    assert [note for note in baked.job.plan.notes if note.startswith(WARNING)]


def test_the_size_of_a_variant_borrows_nothing(here: Path) -> None:
    keys = makers.metadata_of(export(ExportRequest("demo", SEARCHED, Path("own.safetensors"))).written.path)
    assert (keys["crdiff.provenance"], "crdiff.provenance.borrowed_from" in keys) == ("searched", False)
    assert keys["crdiff.evidence.scorer"] == "demo"


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({}, 2.4365),
        ({"ratio": 0.3}, START_POA_WEIGHT),
        ({"ratios": {"up": 0.1}}, START_POA_WEIGHT),
        ({"criterion": "random"}, START_POA_WEIGHT),
        ({"criterion": "uniform"}, START_POA_WEIGHT),
        ({"targets": ("ff",)}, START_POA_WEIGHT),
        ({"targets": ("ff", "attn")}, 2.4365),
        ({"ratio": 0.0}, 1.0),
        ({"ratio": 1e-9}, 1.0),
        ({"ratio": 0.3, "poa_weight": 2.0}, 2.0),
        ({"ratio": 0.0, "poa_weight": 2.0}, 2.0),
        ({"criterion": "random", "poa_weight": 2.4365}, 2.4365),
    ],
)
def test_a_poa_weight_goes_with_what_it_was_found_with(here: Path, changes: dict[str, Any], weight: float) -> None:
    variant = plan(**changes).variant
    assert variant.poa_weight == weight
    is_own = weight == 2.4365 and "criterion" not in changes
    assert (variant.provenance, bool(variant.evidence)) == (("searched", True) if is_own else ("starting-point", False))


def test_a_borrowed_poa_weight_stays_with_its_ratios(here: Path) -> None:
    assert plan(Size(48, 56)).variant.poa_weight == 2.4365
    assert plan(Size(40, 40), criterion="random").variant.poa_weight == START_POA_WEIGHT


@pytest.mark.parametrize("changes", [{"ratio": 0.0}, {"ratio": 1e-9}])
def test_an_export_that_prunes_nothing_says_so(here: Path, changes: dict[str, Any]) -> None:
    assert any("prune nothing" in note for note in plan(**changes).notes)
    assert not any("prune nothing" in note for note in plan().notes)


@pytest.mark.parametrize(
    ("table", "size", "says"),
    [
        ("demo.original-unet", "64x64", "native size"),
        ("demo.original-unet", "96x64", None),
        ("sd15.original", "512x512", "native size"),
        ("sd15.original", "512x544", "near"),
        ("sd15.original", "512x768", None),
        ("sd15.original", "704x376", None),  # the area, in another shape, which SD1.5 has not seen
        ("sd21.original", "512x512", "some SD2.1 models"),
        ("sd21.original", "768x768", "some SD2.1 models"),
        ("sdxl.original", "1024x1024", "native size"),
        ("sdxl.original", "1152x896", "near"),  # SDXL's buckets have many shapes
        ("sdxl.original", "640x1536", "near"),
        ("sdxl.original", "512x2048", "near"),
        ("sdxl.original", "2048x2048", None),
        ("sdxl.original", "512x512", None),
        ("flux-dev.original-transformer", "1024x1024", "native size"),
        ("flux-dev.original-transformer", "1408x704", None),
    ],
)
def test_a_size_at_or_beside_the_native_one_is_noted(here: Path, table: str, size: str, says: str | None) -> None:
    base = makers.write(here / "base.safetensors", makers.tiny(table))
    notes = prepare(ExportRequest(str(base), Size.parse(size), Path("o.safetensors"), ratio=0.3)).plan.notes
    native = [note for note in notes if "native size" in note]
    assert len(native) == (says is not None)
    assert all(says in note and size in note for note in native if says)


# --- what the base says of its size ---


@pytest.mark.parametrize(
    ("stated", "config", "native", "source"),
    [
        ("512x512", None, "512x512", "modelspec.resolution"),
        ("many", None, "1024x1024", "family"),
        (None, None, "1024x1024", "family"),
        (None, '{"sample_size": 64}', "512x512", "config.json"),
        (None, '{"sample_size": null}', "1024x1024", "family"),
        (None, '{"sample_size": true}', "1024x1024", "family"),
        (None, "not JSON", "1024x1024", "family"),
        ("768x768", '{"sample_size": 64}', "768x768", "modelspec.resolution"),
    ],
)
def test_the_native_size_is_the_bases_own(
    here: Path, stated: str | None, config: str | None, native: str, source: str
) -> None:
    header = {"modelspec.resolution": stated} if stated else {}
    base, output = here / "base.safetensors", here / "o.safetensors"
    if config is None:
        makers.write(base, makers.tiny("sdxl.original"), header)
    else:
        base, output = here / "base", here / "o"
        (base / "unet").mkdir(parents=True)
        (base / "unet/config.json").write_text(config)
        makers.write(base / "unet/diffusion_pytorch_model.safetensors", makers.tiny("sdxl.diffusers-unet"), header)
    written = export(ExportRequest(str(base), Size(2048, 2048), output, ratio=0.3)).written
    keys = makers.metadata_of(written.files[0].path)
    assert (keys["crdiff.resolution.native"], keys["crdiff.resolution.native.source"]) == (native, source)


@pytest.mark.parametrize(
    ("table", "part", "side", "vae", "native"),
    [
        ("sdxl.diffusers-unet", "unet", 64, '{"block_out_channels": [8, 8, 8]}', "256x256"),
        ("sana-1600m.diffusers-transformer", "transformer", 16,
         '{"encoder_block_out_channels": [8, 8, 8, 8, 8, 8]}', "512x512"),
        ("auraflow.diffusers-transformer", "transformer", 64, '{"block_out_channels": [8, 8, 8, 8]}', "1024x1024"),
    ],
)  # fmt: skip
def test_the_size_of_latents_is_that_of_the_folders_own_vae(
    here: Path, table: str, part: str, side: int, vae: str, native: str
) -> None:
    (here / "base" / part).mkdir(parents=True)
    (here / "base/vae").mkdir()
    (here / "base" / part / "config.json").write_text(json.dumps({"sample_size": side}))
    (here / "base/vae/config.json").write_text(vae)
    makers.write(here / "base" / part / "diffusion_pytorch_model.safetensors", makers.tiny(table))
    written = export(ExportRequest("base", Size(2048, 2048), here / "o", ratio=0.3)).written
    assert makers.metadata_of(written.files[0].path)["crdiff.resolution.native"] == native


# --- a header that would be too long ---


def test_a_header_beyond_the_limit_is_refused_in_the_plan(here: Path) -> None:
    raw = demo.path().read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = {"short": "", "long": ""}
    room = MAX_BYTES - len(json.dumps(header, separators=(",", ":")))
    header["__metadata__"]["long"] = "y" * room
    text = json.dumps(header, separators=(",", ":")).encode()
    (here / "huge.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with raises(PlanError, "huge.safetensors", f"{MAX_BYTES:,}") as error:
        prepare(ExportRequest("huge.safetensors", Size(48, 48), Path("h.safetensors")))
    assert "'long'" in error.value.hint
