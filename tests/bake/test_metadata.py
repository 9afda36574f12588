"""The header: lossless, true to ModelSpec, kind to A1111 and SwarmUI, and as docs/metadata.md says.

The last part reads the tables of that document and derives pruned weights from a header and the dense base with them
alone, as the author of another loader would.
"""

import base64
import importlib.metadata
import json
import math
import os
import re
import struct
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake import metadata
from crdiff_export.bake.modelspec import Thumbnail
from crdiff_export.errors import OptionError
from crdiff_export.export import prepare, run
from crdiff_export.formats import safetensors
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.models.families import by_id, table_of
from crdiff_export.models.recipe import Evidence
from crdiff_export.progress import Silent
from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.threshold import Threshold
from crdiff_export.verify.verify import verify
from tests.support import DOCS, geometry_tables, makers, masking, oracle, scaled_models
from tests.support.family_rows import ROWS
from tests.support.messages import raises
from tests.support.scaled_models import SPELLINGS, Scaled

BASE = "demo.original-unet"
SIZE = Size(96, 64)


def bake(base: Path, output: Path, **request: Any) -> dict[str, str]:
    """Export a base with ratio 0.3 and give the metadata of the output, or of its first file."""
    written = export(ExportRequest(str(base), SIZE, output, ratio=request.pop("ratio", 0.3), **request)).written
    return makers.metadata_of(written.files[0].path)


def bake_tiny(folder: Path, table: str, header: Mapping[str, str] | None = None, **request: Any) -> dict[str, str]:
    """The metadata that an export of a narrow checkpoint gets with this metadata."""
    return bake(
        makers.write(folder / "base.safetensors", makers.tiny(table), header), folder / "out.safetensors", **request
    )


Exports = Callable[[str], tuple[Path, Path]]

# ModelSpec.


@pytest.mark.parametrize("table", geometry_tables.names())
def test_every_family_gets_the_keys_that_modelspec_wants(table: str, narrow_exports: Exports) -> None:
    family, layout = table.split(".")
    base, output = narrow_exports(table)
    header = makers.metadata_of(output)
    original = by_id(family).implementation
    marks = {"modelspec.prediction_type": "v"} if table == "demo-xl.original" else {}
    assert {key: text for key, text in header.items() if not key.startswith("crdiff.")} == {
        "format": "pt",
        "modelspec.architecture": ROWS[family].architecture or header["modelspec.architecture"],
        "modelspec.description": header["modelspec.description"],
        "modelspec.hash_sha256": oracle.sha256(output),
        "modelspec.implementation": "diffusers" if layout.startswith("diffusers") else original,
        "modelspec.merged_from": "base",
        "modelspec.resolution": "96x64",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "base CR-Diff 96x64",
        "modelspec.usage_hint": header["modelspec.usage_hint"],
        **marks,
    }
    assert "96x64" in header["modelspec.description"]
    assert "not measured" in header["modelspec.description"]
    assert header["modelspec.usage_hint"].startswith("Draw at 96x64.")
    assert header["crdiff.source.hash_sha256"] == oracle.sha256(base)


def like_objects(header: Mapping[str, str]) -> set[str]:
    """Keys of values that A1111 would read as JSON objects, and not be able to save again."""
    return {key for key, text in header.items() if text.startswith("{")}


KEPT = {
    "__spacer": "     ",
    "modelspec.architecture": "stable-diffusion-v1/special",
    "modelspec.author": "somebody",
    "modelspec.date": "2024-01-31",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.prediction_type": "v",
    "modelspec.unet_dtype": "fp16",
    "modelspec.vae_dtype": "bf16,fp32",
    "note": 'snow ☃, a tab \t, a quote " and a line\nbreak',
    "sd_merge_recipe": '{"type": "webui"}',
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_steps": "",
    "workflow": ' {"nodes": []}',
}
DROPPED = {
    "modelspec.hash_blake3": "0x00",
    "modelspec.hash_sha256": "0x11",
    "sshs_legacy_hash": "abcd",
    "sshs_model_hash": "ef01",
    "crdiff.demo": "of another tool of ours",
}
REPLACED = {
    "format": "np",
    "modelspec.merged_from": "one, two",
    "modelspec.resolution": "fantasy",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.title": "Model of Note",
}


def test_metadata_of_the_base_stay(tmp_path: Path) -> None:
    header = bake_tiny(tmp_path, BASE, {**KEPT, **DROPPED, **REPLACED})
    assert {key: text for key, text in header.items() if key in KEPT} == KEPT
    assert {key: text for key, text in header.items() if key in REPLACED} == {
        "format": "pt",
        "modelspec.merged_from": "Model of Note",
        "modelspec.resolution": "96x64",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "Model of Note CR-Diff 96x64",
    }
    assert header["modelspec.hash_sha256"] == oracle.sha256(tmp_path / "out.safetensors")
    assert like_objects(header) == like_objects(KEPT)
    assert not {"modelspec.hash_blake3", "sshs_legacy_hash", "sshs_model_hash", "crdiff.demo"} & set(header)


PICTURE = Thumbnail(b"\xff\xd8 a picture", "a red fox; drawn on cpu")


def test_a_thumbnail_is_the_only_thing_that_is_not_the_same_each_time(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(BASE), {"modelspec.thumbnail": "the base's"})
    without, again, picture = (tmp_path / f"{name}.safetensors" for name in ("without", "again", "with"))
    plain = bake(base, without)
    assert "modelspec.thumbnail" not in plain  # what the base draws is not what this file draws
    bake(base, again)
    assert again.read_bytes() == without.read_bytes()
    header = bake(base, picture, thumbnail=PICTURE)
    kind, _, data = header.pop("modelspec.thumbnail").partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", PICTURE.jpeg)
    assert header.pop("crdiff.thumbnail") == PICTURE.origin
    assert header == plain
    assert verify(picture, str(base), Silent()).against == "all"


def test_the_date_is_the_bases_or_the_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "modelspec.date" not in bake_tiny(tmp_path, BASE)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dated = makers.write(tmp_path / "dated.safetensors", makers.tiny(BASE), {"modelspec.date": "2024-01-31"})
    assert bake(dated, tmp_path / "given.safetensors")["modelspec.date"] == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert bake(dated, tmp_path / "kept.safetensors")["modelspec.date"] == "2024-01-31"
    for wrong in ("yesterday", "1e9", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with raises(OptionError, "SOURCE_DATE_EPOCH"):
            bake(dated, tmp_path / "wrong.safetensors")
    assert not (tmp_path / "wrong.safetensors").exists()


def test_texts_for_people_are_added_to_the_bases(tmp_path: Path) -> None:
    own = {"modelspec.description": "A model of foxes.", "modelspec.usage_hint": "Clip skip 2."}
    header = bake_tiny(tmp_path, BASE, {**own, "modelspec.license": "MIT"})
    assert header["modelspec.description"].endswith("The base: A model of foxes.")
    assert header["modelspec.usage_hint"].startswith("Clip skip 2. Draw at 96x64.")
    assert header["modelspec.license"] == "MIT"


@pytest.mark.parametrize("name", ["Flux.1-dev/kontext", "flux-1-krea-dev"])
def test_what_a_file_calls_itself_is_kept_where_its_tensors_cannot_tell(name: str, tmp_path: Path) -> None:
    said = {"modelspec.architecture": name, "modelspec.title": "Kontext"}
    header = bake_tiny(tmp_path, "flux-dev.original-transformer", said)
    assert (header["crdiff.family"], header["modelspec.architecture"]) == ("flux-dev", name)
    assert header["modelspec.title"].startswith("Kontext")


def test_stated_dtypes_go_with_a_cast(tmp_path: Path) -> None:
    header = bake_tiny(tmp_path, BASE, KEPT, dtype="bf16")
    assert set(KEPT) - set(header) == {"modelspec.unet_dtype", "modelspec.vae_dtype"}
    assert header["crdiff.cast"] == "BF16"


def test_without_hashes_there_are_none(tmp_path: Path) -> None:
    header = bake_tiny(tmp_path, BASE, DROPPED, hashing=False)
    assert not [key for key in header if "hash" in key]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("demo", "demo"),
        ("model.v1.5.safetensors", "model.v1.5"),
        ("old.ckpt", "old"),
        ("model.safetensors.index.json", "model"),
        ("a@b.safetensors", "a@b"),
        (".safetensors", ".safetensors"),
        ("hf://org/name", "name"),
        ("hf://org/name@main", "name"),
        ("hf://org/name/sub/model@1.safetensors", "model@1"),
    ],
)
def test_title_of_a_base_that_has_none(name: str, title: str) -> None:
    assert metadata._title(name) == title


@pytest.mark.parametrize(
    ("name", "title"),
    [("{curly}.safetensors", " {curly} CR-Diff 96x64"), (" {.safetensors", "  { CR-Diff 96x64")],
    ids=["brace", "space and brace"],
)
def test_name_that_begins_like_an_object(name: str, title: str, tmp_path: Path) -> None:
    header = bake(makers.write(tmp_path / name, makers.tiny(BASE)), tmp_path / "out.safetensors")
    assert header["modelspec.title"] == title
    assert Stamp.from_metadata(header, "file").source_name == name
    assert not like_objects(header)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems only have names that are text")
def test_name_that_is_no_text(tmp_path: Path) -> None:
    base = makers.write(tmp_path / os.fsdecode(b"caf\xe9.safetensors"), makers.tiny(BASE))
    header = bake(base, tmp_path / "out.safetensors")
    assert header["crdiff.source.name"] == "caf?.safetensors"
    assert header["modelspec.title"] == "caf? CR-Diff 96x64"


def test_recipe_that_is_no_text(tmp_path: Path) -> None:
    # JSON may spell half a surrogate pair, and the public code's recipes are JSON.
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(BASE))
    planned = prepare(ExportRequest(str(base), SIZE, tmp_path / "out.safetensors")).plan
    half = "\ud83d, and {no} more"
    evidence = Evidence(scorer=half, pruned=0.5, dense=0.25, prompts=4, interval=(0.1, 0.4), extra={half: True})
    variant = replace(planned.variant, prompt=half, source=half, evidence=evidence)
    none = tuple(Threshold(None, 0, scope.count) for scope in planned.scopes)
    made = metadata.stamp(
        replace(planned, variant=variant), Decision(none), "magnitude", "base", Architecture("an-id", Size(64, 64))
    )
    assert (made.prompt, made.provenance_source) == ("?, and {no} more", "?, and {no} more")
    assert made.evidence == {
        "scorer": "?, and {no} more", "pruned": "0.5", "dense": "0.25", "prompts": "4", "interval": "[0.1, 0.4]",
        "?, and {no} more": "True",
    }  # fmt: skip
    assert safetensors.serialise([], made.to_metadata())


def test_checkout_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert metadata.tool_version() == importlib.metadata.version("crdiff-export")
    monkeypatch.setattr(metadata, "version", missing)
    assert metadata.tool_version() == "0+checkout"


# docs/metadata.md, by its word.

DOCUMENT = (DOCS / "metadata.md").read_text(encoding="utf-8")


def rows(*columns: str) -> Iterator[dict[str, str]]:
    """The rows of the document's tables that have these columns."""
    current: list[str] = []
    for line in DOCUMENT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            current = []
        elif not current:
            current = cells
        elif current == list(columns) and not set(line) <= {"|", "-"}:
            yield dict(zip(columns, cells, strict=True))


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


FORMATS = {row["format"]: "|".join(code(row["looks like"])) for row in rows("format", "looks like")}
KEYS = {code(row["key"])[0]: row for row in rows("key", "present", "format", "meaning")}
BLOCKS = list(rows("block", "families", "layout", "group", "path"))
LAYERS = list(rows("block", "layout", "kind", "weight", "parts"))


def documented(key: str) -> dict[str, str] | None:
    """The document's row for a key."""
    for name, row in KEYS.items():
        if re.fullmatch(re.escape(name).replace("<group>", r"[a-z]+").replace("<name>", r".+"), key):
            return row
    return None


def test_document_names_every_key_and_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = "evidence = { scorer = 'x', pruned = 0.5, dense = 0.25, prompts = 3, interval = [0.1, 0.2] }"
    (tmp_path / "own.toml").write_text(
        "[model]\nfamily = 'demo'\ntitle = 'demo'\nnative = '64x64'\n[[variant]]\nresolution = '96x64'\n"
        "ratios = { down = 0.25, mid = 0, up = 1e-1 }\npoa_weight = 1.5\nprovenance = 'searched'\nsource = 'a test'\n"
        + evidence
    )
    broken = dict(makers.tiny(BASE))
    name = next(name for name in broken if name.endswith("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"))
    dtype, shape, data = broken[name]
    broken[name] = dtype, shape, b"\x00\x7e" + data[2:]  # a NaN
    base = makers.write(tmp_path / "broken.safetensors", broken)
    header = [
        bake(
            base,
            tmp_path / "a.safetensors",
            recipe=tmp_path / "own.toml",
            allow_nonfinite=True,
            dtype="fp32",
            ratio=None,
        ),
        bake_tiny(tmp_path, "sd35-medium.original-transformer"),
    ]
    job = prepare(ExportRequest(str(base), Size(72, 72), tmp_path / "borrowed.safetensors", allow_nonfinite=True))
    header.append(makers.metadata_of(run(job, Silent()).written.path))
    job = prepare(ExportRequest(str(base), SIZE, tmp_path / "hub.safetensors", allow_nonfinite=True))
    from_hub = replace(job, base=replace(job.base, hashes={base.name: "ab" * 32}))
    header.append(makers.metadata_of(run(from_hub, Silent()).written.path))
    special = dict(makers.tiny("sd15.original"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    special[first] = "F16", (5, 9, 3, 3), bytes(2 * 5 * 9 * 3 * 3)
    special["v_pred"] = "F32", (0,), b""
    header.append(bake(makers.write(tmp_path / "special.safetensors", special), tmp_path / "inpainting.safetensors"))
    masked = masking.base(tmp_path / "masked", "sd15.original")
    header.append(makers.metadata_of(export(masked.request(tmp_path / "obs.safetensors", "obs")).written.path))
    (tmp_path / "family.toml").write_text(table_of(by_id("sd3-medium")).replace('id = "sd3-medium"', 'id = "own"'))
    own = makers.write(tmp_path / "own.safetensors", makers.tiny("sd3-medium.original-transformer"))
    header.append(bake(own, tmp_path / "of-family.safetensors", family=tmp_path / "family.toml"))
    scaled = Scaled("sd15.original", "scaled_fp8").write(tmp_path / "scaled.safetensors")
    header.append(bake(scaled, tmp_path / "of-scaled.safetensors"))
    (tmp_path / "folder/unet").mkdir(parents=True)
    weights = tmp_path / "folder/unet/diffusion_pytorch_model.fp16.safetensors"
    makers.write(weights, makers.tiny("sd15.diffusers-unet"))
    header.append(bake(tmp_path / "folder", tmp_path / "of-folder.safetensors", layout="original", variant="fp16"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    header.append(bake(own, tmp_path / "picture.safetensors", thumbnail=PICTURE))
    assert header[0]["crdiff.threshold.mid"] == "none"
    assert header[0]["crdiff.nonfinite.down"] == "1"
    assert header[0]["crdiff.evidence.interval"] == "[0.1, 0.2]"
    seen = {"crdiff.prompt"}  # an export has no way to choose a recipe's variant for one prompt
    always = {name for name, row in KEYS.items() if row["present"] == "always"}
    for keys in header:
        named = set()
        for key, text in keys.items():
            row = documented(key)
            assert row is not None, key
            assert re.fullmatch(FORMATS[row["format"]], text, re.DOTALL), key
            named.add(code(row["key"])[0])
        assert always <= named
        seen |= named
    assert seen == set(KEYS)


def test_document_shows_a_real_header(tmp_path: Path) -> None:
    found = re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found
    header = makers.metadata_of(export(ExportRequest("demo", SIZE, tmp_path / "demo.safetensors")).written.path)
    assert header.pop("crdiff.version")
    assert json.loads(found[1]) == header


Tensor = tuple[str, makers.Shape, bytes]
# By file and name, in the order of the bytes.
Files = dict[str, dict[str, Tensor]]


def read(path: Path) -> Files:
    """All weights at a path: of the file, or of the folder's."""
    files = sorted(path.rglob("*.safetensors"), key=lambda file: file.as_posix()) if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): oracle.read(file).tensors() for file in files}


TORCH = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def values(tensor: Tensor) -> torch.Tensor:
    dtype, shape, data = tensor
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).reshape(shape)


def raw(weights: torch.Tensor) -> bytes:
    return bytes(weights.reshape(-1).view(torch.uint8).numpy())


def cast(files: Files, header: Mapping[str, str]) -> Files:
    """A copy of the files, with all float tensors in the dtype that a header gives, if it gives one."""

    def cast_one(tensor: Tensor) -> Tensor:
        dtype, shape, data = tensor
        if "crdiff.cast" not in header or dtype not in TORCH:
            return tensor
        wide = header["crdiff.cast"]
        return wide, shape, raw(values(tensor).float().to(TORCH[wide])) if data else data

    return {file: {name: cast_one(tensor) for name, tensor in files[file].items()} for file in sorted(files)}


class Rule(NamedTuple):
    """Whose name matches is a target, whole or by parts."""

    name: re.Pattern[str]
    group: str
    parts: Sequence[Sequence[int] | None]
    of: int | None = None

    def rows(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each part."""
        size = len(weights) // self.of if self.of else weights.shape[1]
        return [weights if part is None else weights[part[0] * size : (part[-1] + 1) * size] for part in self.parts]


def targets(header: Mapping[str, str], files: Files) -> Iterator[tuple[dict[str, Tensor], str, Rule]]:
    """The files' targets, in the order of their bytes: the tensors of its file, its name, and its rule."""
    known = list(rules(header))
    for tensors in files.values():
        for name in tensors:
            for rule in (rule for rule in known if rule.name.fullmatch(name)):
                yield tensors, name, rule


def rules(header: Mapping[str, str]) -> Iterator[Rule]:
    """What the document's tables call a target of a file with such a header, or else the table of its family."""
    if not any(header["crdiff.family"] in block["families"].split(", ") for block in BLOCKS):
        yield from rules_of_a_table(header)
    for block in BLOCKS:
        if header["crdiff.family"] not in block["families"].split(", ") or header["crdiff.layout"] != block["layout"]:
            continue
        for layer in LAYERS:
            fits = block["block"] in layer["block"].split(", ") and block["layout"] in layer["layout"].split(", ")
            if fits and layer["kind"] in header["crdiff.targets"].split(","):
                path, weight = code(block["path"])[0], code(layer["weight"])[0]
                pattern = re.compile(re.escape(header["crdiff.prefix"]) + path + re.escape(weight))
                parts = [None] if layer["parts"] == "all" else [[int(part)] for part in layer["parts"].split(", ")]
                yield Rule(pattern, block["group"], parts)


def scale(name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> float:
    """What the codes of a target are to be multiplied with; 1 for plain targets."""
    layer = name.removesuffix(".weight")
    formats = json.loads(header.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    quant = tensors.get(f"{layer}.comfy_quant")
    form = formats.get(layer) or (json.loads(quant[2]) if quant else None)
    if form:
        assert form["format"] in ("float8_e4m3fn", "float8_e5m2")
        return float(values(tensors[f"{layer}.weight_scale"]))
    old = tensors.get(f"{layer}.scale_weight")
    return float(values(old)) if old else 1.0


def rules_of_a_table(header: Mapping[str, str]) -> Iterator[Rule]:
    """The targets of a family's table, part by part."""
    text = header.get("crdiff.family.table") or table_of(by_id(header["crdiff.family"]))
    fused = header["crdiff.layout"] == "original"
    found = []
    for target in tomllib.loads(text)["target"]:
        name = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", target[header["crdiff.layout"]])
        assert name
        numbers = "|".join(map(str, range(int(name[2]), int(name[3]) + 1)))
        pattern = re.compile(f"{re.escape(header['crdiff.prefix'] + name[1])}({numbers}){re.escape(name[4])}")
        part = target["part"] if fused and "part" in target else None
        blocks = [part] if isinstance(part, int) else part
        if target["kind"] in header["crdiff.targets"].split(","):
            found.append(Rule(pattern, target.get("group", "blocks"), [blocks], target.get("of")))
    yield from sorted(found, key=lambda rule: (rule.parts[0] or [0])[0])


def derive(header: Mapping[str, str], base: Files) -> Files:
    """The pruned weights, from the header of a pruned file and the dense base."""
    assert header["crdiff.schema"] == ("2" if "crdiff.scaled" in header else "1")
    assert header["crdiff.criterion"] in ("magnitude", "uniform")
    assert "crdiff.mask" not in header
    queue = json.loads(header["crdiff.thresholds"]) if header["crdiff.method"] == "layer-wise" else None
    total: Counter[str] = Counter()
    pruned: Counter[str] = Counter()
    derived = cast(base, header)
    for tensors, name, rule in targets(header, derived):
        weights, group = values(tensors[name]), rule.group
        for rows in rule.rows(weights):
            text = queue.pop(0) if queue is not None else header[f"crdiff.threshold.{group}"]
            total[group] += rows.numel()
            if text != "none":
                numbers = rows.double() * scale(name, tensors, header)
                small = numbers.abs() <= float.fromhex(text)
                rows.view(torch.uint8).view(*rows.shape, -1)[small] = 0  # all bits of +0.0
                pruned[group] += int(small.sum())
        tensors[name] = (*tensors[name][:2], raw(weights))
    assert not queue
    for group, count in total.items():
        assert header[f"crdiff.total.{group}"] == str(count)
        assert header[f"crdiff.pruned.{group}"] == str(pruned[group])
    return derived


def assert_derived(base: Path, output: Path) -> None:
    """Every file of the output is what its own header and the base give."""
    baked, dense = read(output), read(base)
    for file in baked:
        header = makers.metadata_of(output / file if output.is_dir() else output)
        source = base / file if base.is_dir() else base
        assert header.get("crdiff.source.hash_sha256") == oracle.sha256(source)
        assert list(derive(header, dense).values()) == list(baked.values())


@pytest.mark.parametrize("table", geometry_tables.names())
def test_document_gives_the_pruned_weights(table: str, narrow_exports: Exports) -> None:
    assert_derived(*narrow_exports(table))


# Of families with a table of their own, one for each way of being fused is enough.
FUSED = [
    name
    for name in geometry_tables.names()
    if name in ("z-image.original-transformer", "lumina-2.original-transformer", "pixart-sigma.original-transformer")
    or any(block["group"] == "blocks" and name.split(".")[0] in block["families"].split(", ") for block in BLOCKS)
]


@pytest.mark.parametrize("table", FUSED)
def test_document_gives_every_kind_of_target(table: str, tmp_path: Path) -> None:
    kinds = by_id(table.partition(".")[0]).kinds
    header = bake_tiny(tmp_path, table, targets=kinds)
    assert header["crdiff.targets"] == ",".join(kinds)
    assert_derived(tmp_path / "base.safetensors", tmp_path / "out.safetensors")


def mixed() -> dict[str, tuple[str, makers.Shape, bytes]]:
    """Targets of one group in three dtypes, so that the threshold is no number of two of them."""
    made = [makers.tiny("sd15.original", dtype) for dtype in ("F32", "BF16", "F16")]
    return {name: made[i % 3 if "attn1" in name else 1][name] for i, name in enumerate(made[0])}


CASES: dict[str, tuple[Callable[[], dict[str, tuple[str, makers.Shape, bytes]]], dict[str, Any]]] = {
    "fp32": (lambda: makers.tiny("sd15.original", "F32"), {}),
    "fp8 e4m3": (lambda: makers.tiny("sd15.original", "F8_E4M3"), {}),
    "fp8 e5m2": (lambda: makers.tiny("flux-dev.original-transformer", "F8_E5M2"), {}),
    "mixed dtypes": (mixed, {}),
    "fp32 to bf16": (lambda: makers.tiny("sd15.original", "F32"), {"dtype": "bf16"}),
    "mixed to fp16": (mixed, {"dtype": "fp16"}),
    "bf16 to fp32": (lambda: makers.tiny("sd3-medium.original-transformer", "BF16"), {"dtype": "fp32"}),
    "one group": (lambda: makers.tiny("sdxl.original"), {"ratio": None, "ratios": {"down": 0, "mid": 0.5, "up": 0}}),
    "one kind": (lambda: makers.tiny("sdxl.original"), {"targets": ("ff",)}),
    "layers too small": (
        lambda: makers.tiny("sd3-medium.original-transformer"),
        {"ratio": 0.001, "targets": ("ff", "attn")},
    ),
    "prefix": (lambda: makers.tiny("flux-schnell.original-transformer", prefix="model.diffusion_model."), {}),
    "copy": (
        lambda: {
            **makers.tiny(BASE),
            **makers.tiny(BASE, prefix="model_ema."),
        },
        {},
    ),
    "backwards": (
        lambda: dict(reversed(makers.tiny("flux-dev.diffusers-transformer").items())),
        {"targets": ("attn",)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_document_gives_odd_files(case: str, tmp_path: Path) -> None:
    make, request = CASES[case]
    base = makers.write(tmp_path / "base.safetensors", make())
    bake(base, tmp_path / "out.safetensors", **request)
    assert_derived(base, tmp_path / "out.safetensors")


def test_document_keeps_what_is_not_finite(tmp_path: Path) -> None:
    tensors = makers.tiny("sd3-medium.original-transformer", "F32")
    for i, name in enumerate(name for name in tensors if name.endswith(".mlp.fc1.weight")):
        dtype, shape, data = tensors[name]
        odd = struct.pack("<4f", math.nan, -math.nan, math.inf, -math.inf)
        tensors[name] = dtype, shape, data[: 4 * i] + odd + data[4 * i + 16 :]
    base = makers.write(tmp_path / "base.safetensors", tensors)
    header = bake(base, tmp_path / "out.safetensors", allow_nonfinite=True)
    assert header["crdiff.nonfinite.blocks"] == "96"
    assert_derived(base, tmp_path / "out.safetensors")


def test_document_gives_thresholds_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    """Neither that of the JSON nor that of the blocks."""
    tensors = makers.tiny("sd3-medium.original-transformer")
    base = makers.write(tmp_path / "base.safetensors", dict(sorted(tensors.items(), key=lambda item: item[0][::-1])))
    content = base.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    body = json.dumps(dict(sorted(entries.items())), separators=(",", ":")).encode()
    base.write_bytes(makers.frame(body) + content[8 + length :])
    bake(base, tmp_path / "out.safetensors", targets=("ff", "attn"))
    assert_derived(base, tmp_path / "out.safetensors")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_document_gives_scaled_fp8(spelling: str, tmp_path: Path) -> None:
    table = scaled_models.FUSED if spelling == "metadata" else "sd15.original"
    base = Scaled(table, spelling, ("F32", "BF16")).write(tmp_path / "base.safetensors")
    bake(base, tmp_path / "out.safetensors")
    assert_derived(base, tmp_path / "out.safetensors")


@pytest.mark.parametrize("table", ["sdxl.diffusers-unet", "flux-dev.diffusers-transformer"])
def test_document_gives_shards(table: str, tmp_path: Path) -> None:
    makers.write_shards(tmp_path / "base", makers.tiny(table), 3)
    bake(tmp_path / "base", tmp_path / "out")
    assert len(read(tmp_path / "out")) == 3
    assert_derived(tmp_path / "base", tmp_path / "out")


def masked(header: Mapping[str, str], base: Files, output: Mapping[str, Tensor]) -> Files:
    """The pruned weights by what the document says of masks: from the base, and the zeros of the pruned file."""
    assert (header["crdiff.schema"], header["crdiff.mask"]) == ("1", "zeros")
    derived = cast(base, header)
    total: Counter[str] = Counter()
    for tensors, name, rule in targets(header, derived):
        total[rule.group] += sum(rows.numel() for rows in rule.rows(values(tensors[name])))
    pruned = dict.fromkeys(total, 0)
    for tensors, name, rule in targets(header, derived):
        weights = values(tensors[name])
        for own, other in zip(rule.rows(weights), rule.rows(values(output[name])), strict=True):
            count = total[rule.group] if header["crdiff.method"] == "block-wise" else own.numel()
            if int(count * float(header[f"crdiff.ratio.{rule.group}"])):
                zeros = (other.view(torch.uint8).view(*other.shape, -1) == 0).all(-1)
                pruned[rule.group] += int(zeros.sum())
                if "crdiff.moved" in header:
                    own[:] = other
                else:
                    own.view(torch.uint8).view(*own.shape, -1)[zeros] = 0
        tensors[name] = (*tensors[name][:2], raw(weights))
    assert {group: str(count) for group, count in pruned.items()} == {g: header[f"crdiff.pruned.{g}"] for g in total}
    return derived


@pytest.mark.parametrize(
    ("table", "criterion"),
    [
        ("sd15.original", "wanda"),
        ("sd15.original", "obs"),
        ("sd3-medium.original-transformer", "random:compare=row"),
        ("flux-dev.original-transformer", "wanda"),
    ],
)
def test_document_gives_masked_weights(table: str, criterion: str, tmp_path: Path) -> None:
    base = masking.base(tmp_path, table)
    ratios = {"blocks": 0.3} if base.dit else {"down": 0.0, "mid": 0.5, "up": 0.3}
    cases: list[dict[str, Any]] = [{}, {"dtype": "fp32"}]
    for number, options in enumerate(cases):
        request = base.request(tmp_path / f"{number}.safetensors", criterion, ratios=ratios, **options)
        output = export(request).written.path
        header = makers.metadata_of(output)
        assert header["crdiff.source.hash_sha256"] == oracle.sha256(base.path)
        ((_, pruned),) = read(output).items()
        assert list(masked(header, read(base.path), pruned).values()) == [pruned]
