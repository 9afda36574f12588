"""A pack as a value, and how it is read from its file, which docs/metadata.md specifies under "Packs".

The keys of each size are those of a baked file, so that one parser reads both.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, NoReturn

from crdiff_export.errors import CheckpointError, CrdiffError, PackError, RecipeError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.crdiff_keys import HASH, LAYER_WISE, PACK, PREFIX, Stamp
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.text import plural
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.hub import bases
from crdiff_export.models import families
from crdiff_export.models.families import Family, FamilyLayer
from crdiff_export.models.families.table import TABLE_KEY, parse_family
from crdiff_export.prune.criteria.spec import MAGNITUDES
from crdiff_export.prune.identity import HASH_BYTES, LayerHashes
from crdiff_export.sizes import Size
from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH

SUFFIX: Final = ".crdiff"
KEY: Final = PACK
SCHEMA: Final = "1"
SIZES: Final = f"{KEY}.sizes"
KINDS: Final = f"{KEY}.targets"
DTYPES: Final = f"{KEY}.dtypes"
PACK_HASH: Final = f"{KEY}.hash_sha256"
MASKS_HASH: Final = f"{KEY}.masks_sha256"
IDENTITY: Final = "identity/"
# Keys that are the same for all sizes of a pack, and stand in it once.
SHARED: Final = tuple(
    PREFIX + key
    for key in (
        "version", "paper", "family", "family.table", "layout", "prefix", "special", "prediction", "source.name",
        "resolution.native", "resolution.native.source",
    )
)  # fmt: skip
# An export decides whether it keeps a residual, so a pack says nothing of it.
NO_RESIDUAL: Final = {f"{PREFIX}residual": "none"}
DAMAGED: Final = "The pack is damaged or was changed after crdiff wrote it; fetch it again, or make it again."
GIVE_BASE: Final = "Give the base that the pack was made from; `crdiff pack show` names it."
_GIVE_PACK: Final = "Give a file that `crdiff pack create` has made."
_PIECE = 8 << 20
_SIZE_KEY = re.compile(r"([1-9][0-9]{0,4}x[1-9][0-9]{0,4})/(.+)", re.DOTALL)
_FILE_KEY = re.compile(r"file/(.+)/(crdiff\.source\.(?:hash|file)_sha256)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A file of the base: its name in the checkpoint, and the SHA-256 of its data section, and of all of it.

    The hashes are hex; that of the whole file is known only of files that come from the Hub.
    """

    name: str
    data_hash: str
    file_hash: str | None = None


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What the metadata of a pack says. Its hash can be checked only with the rest of the file.

    Attributes:
        files: The base's files of weights.
        variants: By size, what the header of its pruned checkpoint says, without the hash of the base.
    """

    files: tuple[BaseFile, ...]
    variants: Mapping[Size, Stamp]

    @property
    def common(self) -> Stamp:
        """Any of the variants, for what all have in common."""
        return next(iter(self.variants.values()))

    def digest(self) -> str:
        """Return the SHA-256, as hex, of the base's hashes and of `Stamp.request_keys` of every size."""
        sizes = {str(size): stamp.request_keys() for size, stamp in self.variants.items()}
        files = {file.name: file.file_hash or file.data_hash for file in self.files}
        return hashlib.sha256(json.dumps({"files": files, "sizes": sizes}, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Pack:
    """What turns one base into its pruned models, for several sizes.

    Attributes:
        path: The pack's file.
        file: Its header.
        family: The base's family.
        kinds: The kinds of the layers that `identity` has.
        files: The base's files of weights.
        identity: Hashes of the base's layers.
        variants: By size, what the header of its pruned checkpoint says. `thresholds` of layers are in the order of
            `layers`.
    """

    path: Path
    file: SourceFile
    family: Family
    kinds: tuple[str, ...]
    files: tuple[BaseFile, ...]
    identity: LayerHashes
    variants: Mapping[Size, Stamp]

    def check_size(self, size: Size) -> None:
        """Refuse a size that the pack does not have.

        Raises:
            PackError: It has no such size.
        """
        if size not in self.variants:
            has = ", ".join(map(str, self.variants))
            raise PackError(f"{self.path}: has no {size}", f"It has {has}; `crdiff pack add` adds a size.")

    @property
    def header(self) -> PackHeader:
        """What its metadata says."""
        return PackHeader(self.files, self.variants)

    @property
    def common(self) -> Stamp:
        """Any of the variants, for what all have in common."""
        return self.header.common

    @property
    def masked_sizes(self) -> tuple[Size, ...]:
        """The sizes that have masks instead of thresholds."""
        return tuple(size for size, stamp in self.variants.items() if stamp.masked)

    def layers(self, kinds: Sequence[str]) -> tuple[FamilyLayer, ...]:
        """Return the family's layers of some kinds, by their names in diffusers' layout, ascending."""
        return layers_of(self.family, self.common.layout, kinds)

    def thresholds(self, size: Size) -> dict[str, float | None]:
        """Return the threshold of every layer that may be pruned at a size, by its name in diffusers' layout."""
        stamp = self.variants[size]
        layers = self.layers(stamp.targets)
        if stamp.thresholds is None:
            return {layer.diffusers: stamp.groups[layer.group].threshold for layer in layers}
        return {layer.diffusers: value for layer, value in zip(layers, stamp.thresholds, strict=True)}

    def match_files(self, checkpoint: Checkpoint) -> tuple[tuple[SourceFile, BaseFile], ...]:
        """Pair the files of a checkpoint with those of the pack's base, in the order of their names.

        A file may have another name than the base's; its hash tells whether it is the base's.

        Args:
            checkpoint: The checkpoint.

        Returns:
            Each file of weights with what the pack says of it.

        Raises:
            PackError: The base has another number of files.
        """
        if len(checkpoint.files) != len(self.files):
            raise PackError(
                f"{checkpoint.path}: has {plural(len(checkpoint.files), 'file')} of weights, the base of {self.path} "
                f"has {len(self.files)}", GIVE_BASE,
            )  # fmt: skip
        ordered = sorted(checkpoint.files, key=lambda file: file.name)
        return tuple(zip(ordered, self.files, strict=True))

    def masks(self, size: Size) -> tuple[TensorSpec, ...]:
        """Return the tensors with the masks of a size, in the order of their bytes."""
        return self._masks.get(size, ())

    @cached_property
    def _masks(self) -> dict[Size, tuple[TensorSpec, ...]]:
        found: dict[Size, list[TensorSpec]] = {}
        for tensor in self.file.by_offset:
            if match := _SIZE_KEY.fullmatch(tensor.name):
                width, height = match[1].split("x")
                found.setdefault(Size(int(width), int(height)), []).append(tensor)
        return {size: tuple(tensors) for size, tensors in found.items()}

    def read_masks(self, size: Size) -> Iterator[tuple[str, bytearray]]:
        """Read the masks of a size: each layer's name in diffusers' layout, and its bits as `criteria.Mask` has them.

        Raises:
            PackError: The masks are not those that were written.
            CheckpointError: The file was changed since its header was read.
        """
        digest = hashlib.sha256()
        with contextlib.closing(self.file.open()) as reader:
            for tensor in self.masks(size):
                bits = bytearray(tensor.nbytes)
                reader.read_into(tensor.start, memoryview(bits))
                digest.update(bits)
                yield tensor.name.partition("/")[2], bits
        stated = self.file.metadata.get(f"{size}/{MASKS_HASH}")
        if stated != f"0x{digest.hexdigest()}":
            self.file.check_unchanged()  # another program may have replaced it since
            raise PackError(f"{self.path}: the masks of {size} hash to 0x{digest.hexdigest()}, not {stated}", DAMAGED)


def layers_of(family: Family, layout: str, kinds: Sequence[str]) -> tuple[FamilyLayer, ...]:
    """Return a family's layers of some kinds, by their names in diffusers' layout, ascending by code points."""
    layers = next(each for each in family.layouts if each.name == layout).layers
    return tuple(sorted((layer for layer in layers if layer.kind in kinds), key=lambda layer: layer.diffusers))


def by_width(size: Size) -> tuple[int, int]:
    """Return the key that sorts the sizes of a pack: by width, then height."""
    return size.width, size.height


def is_pack(path: Path) -> bool:
    """Whether a path names a pack, by its ending."""
    return path.suffix == SUFFIX


def find_pack(source: str | Path) -> Path | None:
    """Find a pack by its path or its address on the Hub, from which it is fetched; None for what names no pack."""
    if not is_pack(Path(source)):
        return None
    address = str(source)
    return bases.locate(address).path if address.startswith("hf://") else Path(source).expanduser()


def open_source(source: str) -> Pack:
    """Read and check a pack by its path or its address on the Hub, from which it is fetched.

    Raises:
        PackError: The text names no pack, or the pack is damaged.
        CrdiffError: It cannot be fetched or read.
    """
    path = find_pack(source)
    if path is None:
        raise PackError(f"{source}: not the name of a pack, which ends in {SUFFIX}", _GIVE_PACK)
    return open_pack(path)


def open_pack(path: Path) -> Pack:
    """Read and check a pack; of masks the header alone.

    Args:
        path: The file.

    Returns:
        The pack.

    Raises:
        PackError: The file is no pack, or is damaged.
        CheckpointError: It cannot be read as a safetensors file.
    """
    if path.suffix != SUFFIX:
        raise PackError(f"{path}: not the name of a pack, which ends in {SUFFIX}", _GIVE_PACK)
    checkpoint = open_checkpoint(path)
    if checkpoint.kind != "file":
        raise PackError(f"{path}: a folder, not a pack", _GIVE_PACK)
    return read_pack(path, checkpoint.files[0])


def read_pack(path: Path, file: SourceFile) -> Pack:
    """Read a pack whose header is parsed; see `open_pack`."""
    metadata = file.metadata
    _check_schema(path, metadata)
    tensors = [tensor for tensor in file.by_offset if tensor.name.startswith(IDENTITY)]
    identity_bytes = _read(file, tensors)
    _check_hash(path, metadata, identity_bytes)
    variants = _variants(path, metadata)
    common = next(iter(variants.values()))
    family = _family(path, metadata, common)
    kinds = _kinds(path, KINDS, metadata.get(KINDS, ""), family)
    identity = _identity(path, metadata, tensors, identity_bytes, layers_of(family, common.layout, kinds))
    pack = Pack(path, file, family, kinds, _files(path, metadata), identity, variants)
    for size, stamp in variants.items():
        _check_variant(pack, size, stamp)
    known = {tensor.name for tensor in tensors} | {t.name for size in variants for t in pack.masks(size)}
    if other := next((tensor.name for tensor in file.tensors if tensor.name not in known), None):
        _refuse(path, f"tensor {show(other)} belongs to no pack")
    return pack


def read_header(path: Path, metadata: Mapping[str, str]) -> PackHeader:
    """Parse the metadata of a pack of which nothing else is here.

    Args:
        path: What messages call the pack.
        metadata: Its metadata.

    Returns:
        What the metadata says.

    Raises:
        PackError: It is not that of a pack.
    """
    _check_schema(path, metadata)
    return PackHeader(_files(path, metadata), _variants(path, metadata))


def _check_schema(path: Path, metadata: Mapping[str, str]) -> None:
    if KEY not in metadata:
        raise PackError(f"{path}: not a pack: no {KEY} in its header", _GIVE_PACK)
    if metadata[KEY] != SCHEMA:
        raise PackError(
            f"{path}: a pack of schema {show(metadata[KEY])}, this crdiff reads {SCHEMA}", "Install a newer crdiff."
        )


def pack_hash(metadata: Mapping[str, str], identity: bytes) -> str:
    """Return the hash of a pack: SHA-256 of all of its other keys, as JSON, and of the bytes of its identity."""
    keys = {key: text for key, text in metadata.items() if key != PACK_HASH}
    text = json.dumps(keys, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"0x{hashlib.sha256(text.encode() + identity).hexdigest()}"


def _check_hash(path: Path, metadata: Mapping[str, str], identity: bytes) -> None:
    try:
        actual = pack_hash(metadata, identity)
    except UnicodeEncodeError:  # half a surrogate pair
        actual = "that of no text"
    if (stated := metadata.get(PACK_HASH)) != actual:
        _refuse(path, f"hashes to {actual}, its header says {show(stated) if stated else 'nothing'}")


def _read(file: SourceFile, tensors: Sequence[TensorSpec]) -> bytes:
    if sum(tensor.nbytes for tensor in tensors) > _PIECE:
        _refuse(file.path, "more hashes of layers than any model needs")
    pieces = []
    with contextlib.closing(file.open()) as reader:
        for tensor in tensors:
            data = bytearray(tensor.nbytes)
            reader.read_into(tensor.start, memoryview(data))
            pieces.append(bytes(data))
    return b"".join(pieces)


def _variants(path: Path, metadata: Mapping[str, str]) -> dict[Size, Stamp]:
    """Parse the keys of every size as those of a baked file."""
    shared = {key: text for key, text in metadata.items() if key in SHARED}
    own = {str(size): dict[str, str]() for size in _sizes(path, metadata.get(SIZES, ""))}
    for key, text in metadata.items():
        if match := _SIZE_KEY.fullmatch(key):
            if match[1] not in own:
                _refuse(path, f"{SIZES} does not have {match[1]}, which {show(key)} is for")
            if match[2] in SHARED or not match[2].startswith(PREFIX):
                _refuse(path, f"{show(key)} is not said of a single size")
            own[match[1]][match[2]] = text
    variants = {}
    for text, keys in own.items():
        size = Size.parse(text)
        try:
            stamp = Stamp.from_metadata({**keys, **shared, **NO_RESIDUAL}, f"{path}, {size}")
        except CheckpointError as error:
            raise PackError(error.message, DAMAGED) from error
        if stamp.resolution != size:
            _refuse(path, f"{size} has crdiff.resolution.target {stamp.resolution}")
        variants[size] = stamp
    return variants


def _sizes(path: Path, text: str) -> list[Size]:
    """Parse the list of sizes, which has one order and one spelling."""
    try:
        sizes = [Size.parse(part) for part in text.split(",")]
    except RecipeError as error:
        raise PackError(f"{path}: {SIZES} is {show(text)}, not sizes such as 512x512", DAMAGED) from error
    if ",".join(map(str, dict.fromkeys(sorted(sizes, key=by_width)))) != text:
        _refuse(path, f"{SIZES} is {show(text)}, not each size once, by width and height")
    return sizes


def _kinds(path: Path, key: str, text: str, family: Family) -> tuple[str, ...]:
    """Parse a list of kinds of layers, which has the family's order."""
    kinds = tuple(text.split(","))
    if not text or kinds != tuple(kind for kind in family.kinds if kind in kinds):
        _refuse(path, f"{key} is {show(text)}, not kinds of layers of {family.title}: {', '.join(family.kinds)}")
    return kinds


def _family(path: Path, metadata: Mapping[str, str], stamp: Stamp) -> Family:
    try:
        table = metadata.get(TABLE_KEY)
        found = parse_family(table, f"{path}: {TABLE_KEY}", foreign=True) if table else families.by_id(stamp.family)
    except CrdiffError as error:
        raise PackError(f"{path}: {error.message.removeprefix(f'{path}: ')}", error.hint) from error
    if found.id != stamp.family or stamp.layout not in {layout.name for layout in found.layouts}:
        _refuse(path, f"crdiff.family is {show(stamp.family)} in the layout {show(stamp.layout)}, its table has others")
    return found


def _files(path: Path, metadata: Mapping[str, str]) -> tuple[BaseFile, ...]:
    found: dict[str, dict[str, str]] = {}
    for key, text in metadata.items():
        if match := _FILE_KEY.fullmatch(key):
            if not HASH.fullmatch(text):
                _refuse(path, f"{show(key)} is {show(text)}, not 0x and 64 lowercase hex digits")
            found.setdefault(match[1], {})[match[2]] = text[2:]
    if missing := next((name for name, hashes in found.items() if DATA_HASH not in hashes), None):
        _refuse(path, f"no {DATA_HASH} of {show(missing)}")
    if not found:
        _refuse(path, "names no file of its base")
    return tuple(BaseFile(name, found[name][DATA_HASH], found[name].get(FILE_HASH)) for name in sorted(found))


def _identity(
    path: Path,
    metadata: Mapping[str, str],
    tensors: Sequence[TensorSpec],
    data: bytes,
    layers: Sequence[FamilyLayer],
) -> LayerHashes:
    names = tuple(layer.diffusers for layer in layers)
    stored = tuple(metadata.get(DTYPES, "").split(","))
    stored = stored * len(names) if len(stored) == 1 else stored
    if not names or len(stored) != len(names) or not set(stored) <= FORMATS.keys():
        _refuse(path, f"{KINDS} and {DTYPES} do not go with the layers of {show(metadata.get('crdiff.family', ''))}")
    hashes, start = {}, 0
    for tensor in tensors:
        dtype = tensor.name.removeprefix(IDENTITY)
        if dtype not in FORMATS or (tensor.dtype, tensor.shape) != ("U8", (len(names), HASH_BYTES)):
            _refuse(path, f"{show(tensor.name)} is not a hash of {HASH_BYTES} bytes for each of {len(names)} layers")
        hashes[dtype] = data[start : start + tensor.nbytes]
        start += tensor.nbytes
    if not set(stored) <= hashes.keys():
        _refuse(path, f"no {IDENTITY}{min(set(stored) - hashes.keys())}, the dtype of some of its layers")
    return LayerHashes(names, stored, hashes)


def _check_variant(pack: Pack, size: Size, stamp: Stamp) -> None:
    """Check that a size's keys go with the family and with its masks."""
    where, family = f"{size}/crdiff", pack.family
    layers = pack.layers(stamp.targets)
    targets = ",".join(stamp.targets)
    if not layers or not set(_kinds(pack.path, f"{where}.targets", targets, family)) <= set(pack.kinds):
        _refuse(pack.path, f"{where}.targets is {show(targets)}, which its identity does not have")
    if sorted(stamp.groups) != sorted(family.groups):
        _refuse(pack.path, f"{where}.ratio is not for the groups of {family.title}")
    if stamp.moved:
        _refuse(pack.path, f"{where}.moved: moved weights cannot be in a pack")
    if bool(stamp.masked) == (stamp.criterion in MAGNITUDES):
        _refuse(pack.path, f"{where}.mask does not go with {show(stamp.criterion)}")
    if (stamp.thresholds is not None or stamp.masked == LAYER_WISE) != (family.scope == "layer"):
        _refuse(pack.path, f"{where}.method is not that of {family.title}")
    if stamp.thresholds is not None and len(stamp.thresholds) != len(layers):
        _refuse(pack.path, f"{where}.thresholds are {len(stamp.thresholds)}, not those of {len(layers)} layers")
    _check_masks(pack, size, {layer.diffusers for layer in layers} if stamp.masked else set())


def _check_masks(pack: Pack, size: Size, names: Collection[str]) -> None:
    """Check that the masks of a size are of these layers; some may have none, of which nothing is pruned."""
    before = ""
    for tensor in pack.masks(size):
        name = tensor.name.partition("/")[2]
        if name not in names:
            _refuse(pack.path, f"{show(tensor.name)} is the mask of no layer that is pruned at {size}")
        if name < before:
            _refuse(pack.path, f"{show(tensor.name)} comes after the mask of {show(before)}")
        # How many weights a layer has only the base tells.
        if tensor.dtype != "U8" or len(tensor.shape) != 1:
            _refuse(pack.path, f"{show(tensor.name)} is not a list of bytes")
        before = name


def _refuse(path: Path, what: str) -> NoReturn:
    raise PackError(f"{path}: {what}", DAMAGED)


def with_thresholds_by_name(stamp: Stamp, layers: Sequence[str]) -> Stamp:
    """Put a stamp's thresholds of layers, which are in the order of these layers, into the order of their names."""
    if stamp.thresholds is None:
        return stamp
    by_name = dict(zip(layers, stamp.thresholds, strict=True))
    return replace(stamp, thresholds=tuple(by_name[layer] for layer in sorted(by_name)))
