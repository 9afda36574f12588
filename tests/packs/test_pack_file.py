"""The file itself: read by docs/metadata.md alone, damaged, forged, and the same for the same request."""

import contextlib
import hashlib
import itertools
import json
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdiff_export import Size
from crdiff_export.cli import pack_text
from crdiff_export.cli.blocks import Facts, Table
from crdiff_export.errors import CheckpointError, CrdiffError, PackError, VerifyError
from crdiff_export.export import ExportRequest, prepare
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.packs import Pack, create, open_pack, write
from crdiff_export.packs.check import verify_pack
from crdiff_export.packs.write import Contents, Entry
from crdiff_export.progress import Silent
from crdiff_export.sizes import MAX_SIDE
from tests.support import makers, mixed_models, oracle
from tests.support.exporting import SIZE, bake
from tests.support.messages import raises
from tests.support.packing import HASH, add_sizes, changed, from_pack, hash_of, identity_of, new_pack, read
from tests.support.scaled_models import UNET, Scaled

OTHER = Size(384, 640)
RATIOS = {"down": 0.3, "mid": 0.55, "up": 0.1}
FUSED = "sd3-medium.original-transformer"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow UNet. No test may change it."""
    return makers.write(tmp_path_factory.mktemp("base") / "base.safetensors", makers.tiny("demo.diffusers-unet"))


@pytest.fixture(scope="module")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of thresholds and of masks. No test may change it."""
    path = tmp_path_factory.mktemp("pack") / "sizes.crdiff"
    new_pack(base, path, SIZE, ratios=RATIOS, prompt=None)
    add_sizes(base, path, OTHER, ratios=RATIOS, criterion="random")
    return path


# --- a reader of docs/metadata.md, "Packs" ---


class Reader:
    """A pack, read by its specification."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        self.keys: dict[str, str] = header.pop("__metadata__")
        data = raw[8 + length :]
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        assert all(entry["dtype"] == "U8" for _, entry in entries)
        self.tensors = {name: data[slice(*entry["data_offsets"])] for name, entry in entries}
        self.shapes = {name: entry["shape"] for name, entry in entries}

    def hash(self) -> str:
        others = {key: text for key, text in sorted(self.keys.items()) if key != "crdiff.pack.hash_sha256"}
        text = json.dumps(others, separators=(",", ":"), ensure_ascii=False).encode()
        identity = b"".join(data for name, data in self.tensors.items() if name.startswith("identity/"))
        return "0x" + hashlib.sha256(text + identity).hexdigest()

    def size(self, size: str) -> dict[str, str]:
        """The keys of a size, as a header has them."""
        return {key.removeprefix(f"{size}/"): text for key, text in self.keys.items() if key.startswith(f"{size}/")}

    def masks(self, size: str) -> dict[str, bytes]:
        return {name.removeprefix(f"{size}/"): d for name, d in self.tensors.items() if name.startswith(f"{size}/")}

    def masks_hash(self, size: str) -> str:
        return "0x" + hashlib.sha256(b"".join(self.masks(size).values())).hexdigest()


def diffusers_name(piece: oracle.Slice, part: int) -> str:
    """What diffusers calls a layer of SD3's original layout; layers of diffusers' layouts keep their names."""
    name = piece.tensor.removeprefix("model.diffusion_model.")
    match = re.fullmatch(r"joint_blocks\.(\d+)\.x_block\.(.+)\.weight", name)
    if not match:
        return name
    last = {"attn.qkv": f"attn.to_{'qkv'[part]}", "attn.proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj"}
    return f"transformer_blocks.{match[1]}.{last.get(match[2], 'ff.net.2')}.weight"


def layers_of(tensors: makers.Tensors, kinds: Sequence[str], *, dit: bool) -> dict[str, oracle.Slice]:
    """The layers of a base by their names in diffusers' layout, in the order of the base."""
    return {
        diffusers_name(piece, part): piece
        for name, (_, shape, _) in tensors.items()
        for part, piece in enumerate(oracle.slices(0, name, shape, kinds, dit=dit))
    }


def rounded(dtype: str, data: bytes, column: str) -> bytes:
    """Weights in another dtype, by NumPy, and those of 8 bits by torch."""
    if dtype == column:
        return data
    wide = oracle.decode(dtype, data).astype(np.float32)
    if column == "F32":
        return wide.tobytes()
    if column == "F16":
        return wide.astype(np.float16).tobytes()
    if column == "BF16":
        bits = wide.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    into = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[column]
    return torch.from_numpy(wide).to(into).view(torch.uint8).numpy().tobytes()


def derive(reader: Reader, size: str, tensors: makers.Tensors, *, dit: bool) -> dict[str, bytes]:
    """The pruned tensors of a size, from the base's."""
    keys, made = reader.size(size), {name: bytearray(data) for name, (_, _, data) in tensors.items()}
    layers = layers_of(tensors, keys["crdiff.targets"].split(","), dit=dit)
    masks = reader.masks(size)
    limits: Mapping[str, str] = {}
    if "crdiff.thresholds" in keys:
        limits = dict(zip(sorted(layers), json.loads(keys["crdiff.thresholds"]), strict=True))
    for name, piece in layers.items():
        dtype, _, data = tensors[piece.tensor]
        width = makers.SIZES[dtype]
        bits: NDArray[Any] = np.frombuffer(made[piece.tensor], f"<u{width}")[piece.start : piece.stop]
        if "crdiff.mask" in keys:
            if name in masks:
                bits[np.unpackbits(np.frombuffer(masks[name], np.uint8), count=len(bits), bitorder="little") == 1] = 0
            continue
        limit = limits.get(name) or keys[f"crdiff.threshold.{piece.group}"]
        if limit != "none":
            bits[np.abs(oracle.decode(dtype, data)[piece.start : piece.stop]) <= float.fromhex(limit)] = 0
    return {name: bytes(data) for name, data in made.items()}


CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "a UNet's thresholds": ("demo.diffusers-unet", None, {"ratios": RATIOS}),
    "a UNet's thresholds, wide": ("demo.diffusers-unet", "F32", {"ratios": RATIOS, "targets": ("ff",)}),
    "a UNet's masks": ("demo.diffusers-unet", "BF16", {"ratios": RATIOS, "criterion": "random:compare=row"}),
    "a UNet's masks in some groups": (
        "demo.diffusers-unet",
        None,
        {"ratio": 0.4, "ratios": {"mid": 0}, "criterion": "random"},
    ),
    "layers' thresholds": ("flux-dev.diffusers-transformer", None, {"ratio": 0.3}),
    "fused layers' thresholds": (FUSED, "F32", {"ratio": 0.3, "targets": ("ff", "attn")}),
    "fused layers' masks": (FUSED, None, {"ratio": 0.3, "targets": ("ff", "attn"), "criterion": "random"}),
    "several dtypes": ("", None, {"ratios": RATIOS}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_specification_is_enough_to_read_it(case: str, tmp_path: Path) -> None:
    table, dtype, options = CASES[case]
    tensors = makers.tiny(table, dtype) if table else mixed_models.unet()
    base, dit = makers.write(tmp_path / "base.safetensors", tensors), "transformer" in table
    path = tmp_path / "sizes.crdiff"
    new_pack(base, path, OTHER, SIZE, **options)
    reader = Reader(path)
    assert reader.keys["crdiff.pack"] == "1"
    assert reader.keys["crdiff.pack.sizes"] == "384x640,512x512"
    assert reader.hash() == reader.keys["crdiff.pack.hash_sha256"]
    assert reader.keys["file/base.safetensors/crdiff.source.hash_sha256"] == oracle.sha256(base)
    check_identity(reader, tensors, dit=dit)
    for size in (OTHER, SIZE):
        output = bake(base, tmp_path / f"{size}.safetensors", size, **options)
        plain = oracle.read(output)
        assert derive(reader, str(size), tensors, dit=dit) == {name: d for name, (_, _, d) in plain.tensors().items()}
        keys = reader.size(str(size))
        if "crdiff.mask" in keys:
            assert reader.masks_hash(str(size)) == keys.pop("crdiff.pack.masks_sha256")
            assert list(reader.masks(str(size))) == sorted(reader.masks(str(size)))
        said = {key: text for key, text in plain.metadata.items() if key.startswith("crdiff.")}
        for key in ("crdiff.residual", "crdiff.source.hash_sha256"):
            said.pop(key)
        shared = {key: text for key, text in reader.keys.items() if "/" not in key and ".pack" not in key}
        assert not keys.keys() & shared.keys()
        if "crdiff.thresholds" in keys:
            ordered = dict(
                zip(
                    layers_of(tensors, keys["crdiff.targets"].split(","), dit=dit),
                    json.loads(said.pop("crdiff.thresholds")),
                    strict=True,
                )
            )
            assert json.loads(keys.pop("crdiff.thresholds")) == [ordered[name] for name in sorted(ordered)]
        assert keys | shared == said


def check_identity(reader: Reader, tensors: makers.Tensors, *, dit: bool) -> None:
    """Hash the first weights of every layer in every dtype."""
    layers = layers_of(tensors, reader.keys["crdiff.pack.targets"].split(","), dit=dit)
    stored = [tensors[layers[name].tensor][0] for name in sorted(layers)]
    said = reader.keys["crdiff.pack.dtypes"].split(",")
    assert (said * len(stored) if len(said) == 1 else said) == stored
    columns = {name.removeprefix("identity/") for name in reader.tensors if name.startswith("identity/")}
    assert columns == {*stored, "F16", "BF16", "F8_E4M3", "F8_E5M2"}
    for column in columns:
        assert reader.shapes[f"identity/{column}"] == [len(layers), 8]
        hashes = b""
        for name in sorted(layers):
            piece = layers[name]
            dtype, _, data = tensors[piece.tensor]
            width = makers.SIZES[dtype]
            first = data[piece.start * width : min(piece.stop, piece.start + 16_384) * width]
            hashes += hashlib.sha256(rounded(dtype, first, column)).digest()[:8]
        assert hashes == reader.tensors[f"identity/{column}"], column


def test_only_the_first_weights_of_a_layer_are_hashed(tmp_path: Path) -> None:
    narrow = makers.narrow("demo.diffusers-unet", 1)
    tensors = {name: (dtype, shape, makers.weights(name, dtype, shape)) for name, (dtype, shape) in narrow.items()}
    base = makers.write(tmp_path / "base.safetensors", tensors)
    new_pack(base, tmp_path / "sizes.crdiff", ratios=RATIOS)
    check_identity(Reader(tmp_path / "sizes.crdiff"), tensors, dit=False)


def test_codes_with_a_scale_are_hashed_as_they_are(tmp_path: Path) -> None:
    made = Scaled(UNET, "comfy_quant")
    base = made.write(tmp_path / "base.safetensors")
    new_pack(base, tmp_path / "sizes.crdiff", ratios=RATIOS)
    reader = Reader(tmp_path / "sizes.crdiff")
    columns = {name.removeprefix("identity/") for name in reader.tensors}
    assert columns == {made.tensors[name][0] for name in made.scales}
    own = dict.fromkeys(columns, 0)
    for name in made.scales:
        dtype, _, data = made.tensors[name]
        wide = makers.SIZES[dtype]
        first = hashlib.sha256(data[: 16_384 * wide]).digest()[:8]
        own[dtype] += first in reader.tensors[f"identity/{dtype}"]
    assert sum(own.values()) == len(made.scales)


# --- the same request, the same bytes ---


def test_the_same_request_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for criterion in ("magnitude", "random"):
        paths = [tmp_path / f"{criterion}-{number}.crdiff" for number in range(2)]
        for path in paths:
            new_pack(base, path, SIZE, OTHER, ratios=RATIOS, criterion=criterion)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_order_of_adding_does_not_matter(base: Path, tmp_path: Path) -> None:
    steps: list[tuple[Size, dict[str, Any]]] = [
        (Size(64, 64), {"ratios": RATIOS}), (SIZE, {"ratio": 0.2, "criterion": "random"}),
        (OTHER, {"ratio": 0.1, "targets": ("ff",)}), (Size(640, 384), {"ratio": 0.3, "criterion": "random:seed=1"}),
    ]  # fmt: skip
    found = set()
    for number, order in enumerate(itertools.islice(itertools.permutations(steps), 0, None, 5)):
        path = tmp_path / f"{number}.crdiff"
        for step, (size, options) in enumerate(order):
            (add_sizes if step else new_pack)(base, path, size, **options)
        found.add(path.read_bytes())
        assert list(open_pack(path).variants) == [Size(64, 64), OTHER, SIZE, Size(640, 384)]
    assert len(found) == 1


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_what_is_added_and_removed_leaves_no_trace(criterion: str, base: Path, pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.crdiff"
    path.write_bytes(pack.read_bytes())
    more = add_sizes(base, path, Size(64, 64), Size(96, 64), ratio=0.2, criterion=criterion)
    assert len(more.variants) == 4
    left = create.remove(more, [Size(64, 64), Size(96, 64)], Silent())
    assert path.read_bytes() == pack.read_bytes()
    assert list(left.variants) == [OTHER, SIZE]
    once = create.remove(left, [SIZE], Silent())
    assert [size for size, stamp in once.variants.items() if stamp.masked] == [OTHER]


@pytest.mark.parametrize("table", ["demo.diffusers-unet", ""])
def test_the_hashes_of_layers_are_those_of_its_sizes(table: str, tmp_path: Path) -> None:
    """Sizes with more kinds of layers bring theirs, and take them away again."""
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table) if table else mixed_models.unet())
    path, alone = tmp_path / "o.crdiff", tmp_path / "alone.crdiff"
    for targets, others in ((("ff",), ("attn",)), (("attn",), ("attn", "ff"))):
        before = new_pack(base, path, SIZE, ratios=RATIOS, targets=targets, force=True)
        raw = path.read_bytes()
        more = add_sizes(base, path, OTHER, ratios=RATIOS, targets=others)
        assert more.kinds == ("attn", "ff")
        assert verify_pack(path, str(base), Silent()).unranked == ()
        create.remove(more, [OTHER], Silent())
        assert path.read_bytes() == raw
        new_pack(base, alone, SIZE, ratios=RATIOS, targets=others, force=True)
        replaced = add_sizes(base, path, SIZE, ratios=RATIOS, targets=others, force=True)
        assert path.read_bytes() == alone.read_bytes()
        assert set(replaced.kinds) == set(others) != set(before.kinds)


def test_the_room_for_the_header_does_not_depend_on_the_way(base: Path, tmp_path: Path) -> None:
    """Counts are written behind the masks; wherever a page ends, a pack that is written again is the same."""
    made = new_pack(base, tmp_path / "one.crdiff", ratios=RATIOS, criterion="random")
    layers = tuple((tensor.name.partition("/")[2], 8 * tensor.nbytes) for tensor in made.masks(SIZE))

    def written(stamp: Stamp, draft: Stamp) -> bytes:
        entry = Entry(SIZE, draft, layers, lambda: (stamp, (bits for _, bits in made.read_masks(SIZE))))
        path, contents = tmp_path / "again.crdiff", Contents(made.kinds, made.files, made.identity, (entry,))
        write.write(path, contents, Silent(), replace=True)
        return path.read_bytes()

    sizes = set()
    for length in range(0, 4096, 256):
        stamp = Stamp.from_metadata({**made.common.to_metadata(), "crdiff.prompt": "x" * length}, "")
        assert written(stamp, stamp) == written(stamp, _without_counts(stamp)), length
        sizes.add((tmp_path / "again.crdiff").stat().st_size)
    assert len(sizes) == 2


def _without_counts(stamp: Stamp) -> Stamp:
    keys = {key: "0" if key.startswith("crdiff.pruned.") else text for key, text in stamp.to_metadata().items()}
    return Stamp.from_metadata(keys, "")


# --- damage ---


def opened(path: Path) -> Pack:
    """Open a pack and check all that it says of itself."""
    return verify_pack(path, None, Silent()).pack


def test_any_byte_that_is_changed_is_found(pack: Path, tmp_path: Path) -> None:
    """All but a space of the padding that becomes another space."""
    raw, rng, path = pack.read_bytes(), random.Random(7), tmp_path / "x.crdiff"
    (length,) = struct.unpack("<Q", raw[:8])
    text = len(raw[: 8 + length].rstrip())
    places = [
        *range(8), *rng.sample(range(8, text), 180), *rng.sample(range(text, 8 + length), 20),
        *rng.sample(range(8 + length, len(raw)), 100), len(raw) - 1,
    ]  # fmt: skip
    for place in places:
        other = bytearray(raw)
        other[place] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        path.write_bytes(other)
        try:
            opened(path)
        except CrdiffError as error:
            assert "x.crdiff" in error.message  # noqa: PT017  one of many
        else:
            assert raw[place] == ord(" "), place
            assert other[place] in b"\t\n\r", place


def test_a_truncated_file(pack: Path, tmp_path: Path) -> None:
    raw, rng, path = pack.read_bytes(), random.Random(8), tmp_path / "x.crdiff"
    for size in (0, 1, 7, 8, 9, 100, len(raw) - 1, *rng.sample(range(len(raw)), 20)):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"x\.crdiff"):
            opened(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CheckpointError, match=r"x\.crdiff"):
        opened(path)


def test_other_files_under_a_packs_name(base: Path, shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.crdiff"
    path.write_bytes(base.read_bytes())
    with raises(PackError, "x.crdiff"):
        open_pack(path)
    path.unlink()
    torch.save({"a": torch.zeros(2)}, path)
    with raises(CheckpointError, "x.crdiff"):
        open_pack(path)
    path.unlink()
    path.symlink_to(shelf / "shards")
    with raises(PackError, "x.crdiff"):
        open_pack(path)
    path.unlink()
    path.mkdir()
    with raises(CheckpointError, "x.crdiff"):
        open_pack(path)
    with raises(CheckpointError, "none.crdiff"):
        open_pack(tmp_path / "none.crdiff")
    with raises(PackError, "base.safetensors"):
        open_pack(base)


def test_a_later_schema(pack: Path, tmp_path: Path) -> None:
    for schema in ("2", "one", ""):
        with raises(PackError, "schema", schema):
            open_pack(changed(pack, tmp_path / "x.crdiff", {"crdiff.pack": schema}))


# --- forged packs: changed, and hashed again ---

HOSTILE = (
    "", " ", "0", "1", "-1", "0.5", "1e308", "1e999", "nan", "inf", "none", "9" * 30, "{", " {", "[]", '["none"]',
    "[" * 5000,
    '["0x1.0p-3"]', "0x1.0p-3", "0x1.0p+9999", "-0x1.0p-3", "0x0.0p+0", f"0x{'0' * 64}", "true", "zeros", "magnitude",
    "uniform", "wanda:compare=row", "nothing:a=b,c", "attn", "ff", "attn2", "attn,attn", "ff,attn", "block-wise",
    "layer-wise", "original", "diffusers", "sdxl", "unet", "F32", "F16,F32", "512x512", "99999x99999", "16385x16385",
    f"{MAX_SIDE}x{MAX_SIDE}", "0x1", "384x640,512x512,512x512", "512x512,384x640", "\0\x1b[31m\n", "\u202e\u2028",
    "../../etc/passwd", "hf://org/name", 'id = "x"\n', "x" * 300_000,
)  # fmt: skip


ADDED = (
    "crdiff.family.table", "crdiff.special", "512x512/crdiff.mask", "512x512/crdiff.thresholds", "512x512/crdiff.cast",
    "512x512/crdiff.nonfinite.down", "512x512/crdiff.family", "512x512/crdiff.prompt", "512x512/crdiff.evidence.pruned",
    "512x512/modelspec.architecture", "384x640/crdiff.moved", "384x640/crdiff.scaled",
    "384x640/crdiff.calibration.size", "64x64/crdiff.schema", "file/../x/crdiff.source.hash_sha256",
    "file/x/crdiff.source.file_sha256",
)  # fmt: skip


def forged(pack: Path, path: Path) -> Iterator[tuple[str, str | None]]:
    """Write the pack with another value of each of its keys by turns; the key and the value."""
    rng = random.Random(9)
    metadata, tensors = read(pack)
    identity = identity_of(tensors)
    for key in (*metadata, *ADDED):
        for value in (None, *rng.sample(HOSTILE, 6)):
            keys = {name: text for name, text in {**metadata, key: value}.items() if text is not None}
            if key != HASH:
                keys[HASH] = hash_of(keys, identity)
            makers.write(path, tensors, keys)
            yield key, value


def test_a_forged_key_is_refused_or_harmless(base: Path, pack: Path, tmp_path: Path) -> None:
    """Whatever a pack says, nothing but a CrdiffError comes of it, and nothing that is shown controls a terminal.

    A few of those that are accepted are followed to the last byte of an export.
    """
    path, output = tmp_path / "x.crdiff", tmp_path / "o.safetensors"
    plain = makers.read(bake(base, tmp_path / "plain.safetensors", SIZE, ratios=RATIOS))
    accepted = exported = 0
    for key, value in forged(pack, path):
        try:
            made = opened(path)
        except CrdiffError as error:
            assert "x.crdiff" in error.message, (key, value)  # noqa: PT017  one of many
            continue
        accepted += 1
        assert_printable(made)
        with contextlib.suppress(CrdiffError):
            for size in made.variants:
                prepare(ExportRequest(str(base), size, output, pack=made, force=True))
            if accepted % 10 == 0:
                from_pack(base, made, output, force=True)
                exported += 1
                assert makers.read(output) == plain or key.startswith("512x512/crdiff.t"), (key, value)
    assert accepted > 50
    assert exported > 4


def assert_printable(pack: Pack) -> None:
    result = pack_text.describe(pack, metadata=True)
    json.dumps(result.json, allow_nan=False)
    for block in result.text:
        texts: list[str] = []
        if isinstance(block, Table):
            texts = [*block.columns, *(cell for row in block.rows for cell in row)]
        elif isinstance(block, Facts):
            texts = [
                text
                for pair in (block.pairs.items() if isinstance(block.pairs, Mapping) else block.pairs)
                for text in pair
            ]
        else:
            texts = [block]
        assert all(text.isprintable() for text in texts), texts


FORGED_TENSORS = {
    "an identity less": lambda t: t.pop("identity/F8_E5M2"),
    "a layer less": lambda t: t.update({"identity/F16": ("U8", (41, 8), t["identity/F16"][2][8:])}),
    "an identity of another dtype": lambda t: t.update({"identity/I64": t.pop("identity/BF16")}),
    "an identity of other numbers": lambda t: t.update({"identity/F16": ("I8", *t["identity/F16"][1:])}),
    "a longer identity": lambda t: t.update({"identity/F16": ("U8", (42, 9), bytes(42 * 9))}),
    "a huge identity": lambda t: t.update({"identity/F64": ("U8", (9 << 20,), bytes(9 << 20))}),
    "a foreign tensor": lambda t: t.update({"weights": ("U8", (2,), b"ab")}),
    "a mask of no size": lambda t: t.update({"64x64/x.weight": ("U8", (2,), b"ab")}),
    "a mask of no usable size": lambda t: t.update({"99999x99999/x.weight": ("U8", (2,), b"ab")}),
    "a mask of no layer": lambda t: t.update({"384x640/x.weight": ("U8", (2,), b"ab")}),
    "a mask of a size of thresholds": lambda t: t.update({f"512x512/{mask(t)[8:]}": t[mask(t)]}),
    "a mask in two dimensions": lambda t: t.update({mask(t): ("U8", (1, len(t[mask(t)][2])), t[mask(t)][2])}),
    "a mask of other numbers": lambda t: t.update({mask(t): ("BOOL", *t[mask(t)][1:])}),
}  # fmt: skip


def mask(tensors: makers.Tensors) -> str:
    """The first mask of a pack."""
    return next(name for name in tensors if name.startswith("384x640/"))


@pytest.mark.parametrize("case", FORGED_TENSORS)
def test_forged_tensors(case: str, pack: Path, tmp_path: Path) -> None:
    forge: Any = FORGED_TENSORS[case]
    path = changed(pack, tmp_path / "x.crdiff", tensors=forge)
    if case == "an identity less":  # loaders of that dtype cannot tell the base, but nothing is wrong
        opened(path)
        return
    with raises(PackError, "x.crdiff"):
        opened(path)


def masks_again(pack: Path, path: Path, keys: Mapping[str, str], change: Any) -> Path:
    """A pack with other masks, all of its hashes made again."""
    metadata, tensors = read(pack)
    change(tensors)
    ordered = b"".join(data for name, (_, _, data) in tensors.items() if name.startswith("384x640/"))
    metadata |= {"384x640/crdiff.pack.masks_sha256": f"0x{hashlib.sha256(ordered).hexdigest()}", **keys}
    metadata[HASH] = hash_of(metadata, identity_of(tensors))
    return makers.write(path, tensors, metadata)


def invert(tensors: Any) -> None:
    name = mask(tensors)
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, bytes(byte ^ 255 for byte in data)


def shorten(tensors: Any) -> None:
    name = mask(tensors)
    dtype, (size,), data = tensors[name]
    tensors[name] = dtype, (size - 1,), data[:-1]


def swap(tensors: Any) -> None:
    """Give two masks of one shape each other's names."""
    names = [name for name in tensors if name.startswith("384x640/")]
    first, other = next(p for p in itertools.combinations(names, 2) if tensors[p[0]][1] == tensors[p[1]][1])
    renamed = {{first: other, other: first}.get(name, name): entry for name, entry in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def lose(tensors: Any) -> None:
    del tensors[mask(tensors)]


@pytest.mark.parametrize("change", [invert, shorten, swap, lose])
def test_forged_masks(change: Any, base: Path, pack: Path, tmp_path: Path) -> None:
    """The counts of a group tell it, or the base's layers do; nothing is written by a mask that does not fit."""
    path = masks_again(pack, tmp_path / "x.crdiff", {}, change)
    with pytest.raises((PackError, VerifyError), match=r"x\.crdiff"):
        opened(path)
    counts = Reader(path)
    pruned = dict.fromkeys(("down", "mid", "up"), 0)
    for name, data in counts.masks("384x640").items():
        pruned[name.partition("_")[0]] += int(np.unpackbits(np.frombuffer(data, np.uint8)).sum())
    keys = {f"384x640/crdiff.pruned.{name}": str(count) for name, count in pruned.items()}
    path = masks_again(pack, tmp_path / "x.crdiff", keys, change)
    with pytest.raises((PackError, VerifyError), match=r"x\.crdiff"):
        verify_pack(path, str(base), Silent())
    if change is not invert:
        with pytest.raises(PackError, match=r"x\.crdiff"):
            from_pack(base, open_pack(path), tmp_path / "o.safetensors", OTHER)


def test_bits_behind_the_last_weight(tmp_path: Path) -> None:
    """Layers whose weights do not fill their last byte."""
    table = """
        id = "odd"
        title = "odd"
        grid = 8
        [transformer]
        kinds = ["ff"]
        default = ["ff"]
        channels = 4
        [transformer.diffusers]
        first = "img_in.weight"
        marks = [{ tensor = "txt_norm.weight" }]
        [[target]]
        kind = "ff"
        diffusers = "blocks.{0..3}.w.weight"
    """
    (tmp_path / "own.toml").write_text(table)
    shapes = {"img_in.weight": (4, 4), "txt_norm.weight": (2,), **{f"blocks.{n}.w.weight": (3, 7) for n in range(4)}}
    tensors = {name: ("F16", shape, makers.weights(name, "F16", shape)) for name, shape in shapes.items()}
    base = makers.write(tmp_path / "base.safetensors", tensors)
    options: dict[str, Any] = {"family": tmp_path / "own.toml", "native": Size(64, 64)}
    pack = new_pack(base, tmp_path / "o.crdiff", OTHER, ratio=0.5, criterion="random", **options)
    assert {tensor.nbytes for tensor in pack.masks(OTHER)} == {3}

    def fill(tensors: Any) -> None:
        name = mask(tensors)
        dtype, shape, data = tensors[name]
        tensors[name] = dtype, shape, data[:-1] + bytes([data[-1] | 0x80])

    total = sum(group.pruned for group in pack.common.groups.values())
    path = masks_again(pack.path, tmp_path / "x.crdiff", {"384x640/crdiff.pruned.blocks": str(total + 1)}, fill)
    opened(path)  # how many weights a layer has only the base tells
    with raises(PackError, "blocks.0.w"):
        from_pack(base, open_pack(path), tmp_path / "o.safetensors", OTHER)
    with raises(VerifyError, "blocks.0.w"):
        verify_pack(path, str(base), Silent())


TAMPERED = {
    "a threshold": {"512x512/crdiff.threshold.down": "0x1.0p-4"},
    "a count": {"512x512/crdiff.pruned.down": "5"},
    "a total": {"512x512/crdiff.total.down": "5"},
    "a count above its total": {"512x512/crdiff.pruned.mid": "999999999"},
    "a ratio": {"512x512/crdiff.ratio.down": "0.9"},
    "a count of what is not finite": {"512x512/crdiff.nonfinite.up": "3"},
    "no threshold": {"512x512/crdiff.threshold.down": "none"},
    "a cast": {"512x512/crdiff.cast": "BF16"},
    "a scale": {"512x512/crdiff.scaled": "true", "384x640/crdiff.scaled": "true"},
    "the native size": {"crdiff.resolution.native": "256x256"},
    "what says the native size": {"crdiff.resolution.native.source": "config.json"},
    "a kind of model": {"crdiff.special": "inpainting"},
    "a prediction": {"crdiff.prediction": "v"},
    "the base's hash": {"file/base.safetensors/crdiff.source.hash_sha256": f"0x{'0' * 64}"},
    "the hash of the whole file": {"file/base.safetensors/crdiff.source.file_sha256": f"0x{'0' * 64}"},
    "another file": {"file/more.safetensors/crdiff.source.hash_sha256": f"0x{'0' * 64}"},
    "the hash of masks": {"384x640/crdiff.pack.masks_sha256": f"0x{'0' * 64}"},
    "the criterion of masks": {"384x640/crdiff.criterion": "random:seed=2"},
}


@pytest.mark.parametrize("case", TAMPERED)
def test_its_base_proves_what_a_pack_says(case: str, base: Path, pack: Path, tmp_path: Path) -> None:
    path = changed(pack, tmp_path / "x.crdiff", TAMPERED[case])
    with pytest.raises(VerifyError, match=r"x\.crdiff|base\.safetensors"):
        verify_pack(path, str(base), Silent())


def test_an_identity_that_is_not_its_bases(base: Path, pack: Path, tmp_path: Path) -> None:
    def change(name: str) -> Path:
        def flip(tensors: Any) -> None:
            dtype, shape, data = tensors[name]
            tensors[name] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]

        return changed(pack, tmp_path / "x.crdiff", tensors=flip)

    with raises(VerifyError, "x.crdiff"):
        verify_pack(change("identity/F16"), str(base), Silent())
    with raises(VerifyError, "x.crdiff"):
        verify_pack(change("identity/BF16"), str(base), Silent())
