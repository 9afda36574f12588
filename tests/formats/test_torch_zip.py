"""Torch pickles: read without torch, to the same bytes as with torch and safetensors; their code is never run."""

import collections
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from picklescan.scanner import SafetyLevel, scan_file_path
from safetensors.torch import save
from torch import nn

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import safetensors, torch_zip
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.unpickle import OTHER, UnpickleError, unpickle
from crdiff_export.formats.weight_file import SourceFile
from tests.support import ROOT, hostile
from tests.support.bounded import linux_only, read_bounded
from tests.support.hostile import Maker, archived, number, numbers, opcodes, state, storage, tensor, text
from tests.support.messages import raises
from tests.support.weight_bytes import all_bytes, check_ranges

if TYPE_CHECKING:
    from tests.support.isolation import Crdiff


def floats(weight: bytes) -> Maker:
    return archived(state(weight=weight))


# Code that a reader could run; nothing of it may happen.
CODE = {
    "code": hostile.pickled_code,
    "protocol-4": archived(pickle.dumps({"state_dict": {}, "x": hostile.Code()}, protocol=4)),
    "beside-weights": archived(
        state(weight=tensor(), x=b"cposix\nsystem\n(" + text(f"echo > {hostile.MARKER}") + b"tR")
    ),
    "bare": hostile.bare_pickle_with_code,
    "without-a-call": floats(tensor(tail=b"cbuiltins\neval\n")),
}
REFUSED: dict[str, tuple[Maker, str]] = {
    # code
    "code": (hostile.pickled_code, f"'{os.system.__module__}.system'"),
    "code-of-protocol-4": (CODE["protocol-4"], f"'{os.system.__module__}.system'"),
    "code-beside-weights": (CODE["beside-weights"], "'posix.system'"),
    "code-without-a-call": (CODE["without-a-call"], "'builtins.eval'"),
    # `torch.save(model)` instead of `torch.save(model.state_dict())`
    "network": (
        archived(opcodes(b"cdiffusers.models\nUNet2DConditionModel\n)\x81}b")),
        "'diffusers.models.UNet2DConditionModel'",
    ),
    "name-with-controls": (archived(opcodes(b"\x8c\x02\x1b[\x8c\x01\n\x93")), r"'\x1b[.\n'"),
    "name-endless": (archived(opcodes(b"c" + b"m" * 5000 + b"\nn\n")), "m" * 78 + "…"),
    "bare-code": (hostile.bare_pickle_with_code, "bare pickle"),
    "bare-pickle": (hostile.holding(pickle.dumps({"weight": [1.0, 2.0]}, protocol=2)), "bare pickle"),
    "legacy-torch": (hostile.legacy_torch, "bare pickle"),
    "torchscript": (archived(state(weight=tensor()), {"model/constants.pkl": b"\x80\x02)."}), "TorchScript"),
    # files of another kind
    "empty": (hostile.empty, "empty"),
    "safetensors": (hostile.holding(hostile.good()), "safetensors file under another name"),
    "gguf": (hostile.gguf, "GGUF"),
    "git-lfs-pointer": (hostile.git_lfs_pointer, "Git LFS"),
    "web-page": (hostile.web_page, "web page"),
    "noise": (hostile.noise, "'PK'"),
    # archives
    "nested-archive": (hostile.nested_archive, "not one that torch saves"),
    "zip-archive": (hostile.zip_archive, "not one that torch saves"),
    "two-pickles": (archived(state(weight=tensor()), {"other/data.pkl": b""}), "not one that torch saves"),
    "twice-the-same-file": (hostile.twice_the_same_file, "holds a file twice"),
    "truncated": (hostile.truncated_archive, "truncated zip archive"),
    "damaged": (hostile.damaged_archive, "truncated zip archive"),
    "endless-directory": (hostile.endless_directory, "truncated zip archive"),
    "compressed-bomb": (hostile.compressed_bomb, "model/data.pkl"),
    "compressed-storage": (hostile.compressed_storage, "model/data/0"),
    "big-endian": (archived(state(weight=tensor()), {"model/byteorder": b"big"}), "big-endian"),
    # pickles
    "no-pickle": (archived(b"\0"), "data.pkl"),
    "nothing": (archived(b""), "data.pkl"),
    "no-end": (archived(state(weight=tensor())[:-1]), "data.pkl"),
    "cut": (archived(state(weight=tensor())[:60]), "data.pkl"),
    "empty-stack": (archived(opcodes(b"0")), "data.pkl"),
    "no-mark": (archived(opcodes(b"t")), "data.pkl"),
    "below-the-mark": (archived(opcodes(b"N(\x85")), "data.pkl"),
    "no-memo": (archived(opcodes(b"j\xff\xff\xff\x7f")), "data.pkl"),
    "odd-dict": (archived(opcodes(b"}(NNNu")), "data.pkl"),
    "set-on-a-tensor": (archived(state(weight=tensor() + text("a") + b"Ns")), "data.pkl"),
    "set-on-a-number": (archived(opcodes(number(7) + text("a") + b"Ns")), "data.pkl"),
    "call-of-a-number": (archived(opcodes(number(7) + b")R")), "data.pkl"),
    "call-with-a-list": (archived(opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n]R")), "data.pkl"),
    "call-with-too-few": (archived(opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n)R")), "data.pkl"),
    "name-of-a-list": (archived(opcodes(b"](" * 5000 + b"N\x93")), "data.pkl"),
    "storage-of-a-number": (archived(opcodes(number(1) + b"Q")), "data.pkl"),
    "extension": (archived(opcodes(b"\x82\x01")), "EXT1"),
    "instance": (archived(opcodes(b"(ios\nsystem\n")), "INST"),
    "bytearray": (archived(opcodes(b"\x96" + struct.pack("<Q", 2) + b"ab")), "BYTEARRAY8"),
    "endless-text": (archived(opcodes(b"\x8d" + struct.pack("<Q", 2**63))), "data.pkl"),
    # contents
    "list": (archived(opcodes(b"]")), "no named weights"),
    "number": (archived(opcodes(number(1))), "no named weights"),
    "only-numbers": (archived(state(epoch=number(1))), "no tensors"),
    "textual-inversion": (archived(state(string_to_param=b"}" + text("*") + tensor() + b"s")), "textual inversion"),
    "two-of-equal-right": (
        archived(state(a=b"}" + text("x") + tensor() + b"s", b=b"}" + text("x") + tensor() + b"s")),
        "no tensors",
    ),
    "names-that-are-numbers": (archived(opcodes(b"}" + number(1) + tensor() + b"s")), "no tensors"),
    "lone-surrogate": (floats(b"N" + text("\ud800") + tensor()), r"'\ud800'"),
    "called-metadata": (archived(state(__metadata__=tensor())), "'__metadata__'"),
    # tensors
    "no-bytes": (floats(tensor(storage(key="7"))), "'weight' has no bytes"),
    "key-like-a-path": (floats(tensor(storage(key="../data.pkl"))), "'weight' has no bytes"),
    "too-few-bytes": (floats(tensor(storage(count=7))), "'weight' should have more bytes"),
    "too-many-elements": (floats(tensor(shape=(7,), strides=(1,))), "'weight' lies outside"),
    "offset-outside": (floats(tensor(offset=1)), "'weight' lies outside"),
    "stride-outside": (floats(tensor(strides=(4, 1))), "'weight' lies outside"),
    "wide-stride": (floats(tensor(strides=(2**62, 1))), "'weight' lies outside"),
    "expanded": (floats(tensor(shape=(2**40, 6), strides=(0, 1))), "'weight' repeats"),
    "expanded-scalar": (floats(tensor(shape=(2**62,) * 9, strides=(0,) * 9)), "'weight' repeats"),
    "65-dimensions": (floats(tensor(shape=(1,) * 65, strides=(1,) * 65)), "65 dimensions"),
    "negative-offset": (floats(tensor(offset=-1)), "data.pkl"),
    "negative-size": (floats(tensor(shape=(-2, 3))), "data.pkl"),
    "negative-stride": (floats(tensor(strides=(-3, 1))), "data.pkl"),
    "huge-size": (floats(tensor(shape=(2**63, 0))), "data.pkl"),
    "size-true": (floats(tensor().replace(numbers(2, 3), b"(\x88" + number(3) + b"t")), "data.pkl"),
    "sizes-without-strides": (floats(tensor(strides=(1,))), "data.pkl"),
    "negative-count": (floats(tensor(storage(count=-1))), "data.pkl"),
    "negated": (floats(tensor(tail=b"\x89N}" + text("neg") + b"\x88s")), "sign or conjugate"),
    "quantised": (floats(tensor(storage("QInt8Storage"))), "'torch.QInt8Storage'"),
    "complex-double": (floats(tensor(storage("ComplexDoubleStorage"))), "'torch.ComplexDoubleStorage'"),
    "sparse": (
        archived(state(weight=b"ctorch._utils\n_rebuild_sparse_tensor\n)R")),
        "'torch._utils._rebuild_sparse_tensor'",
    ),
}


@pytest.mark.parametrize(("make", "key"), REFUSED.values(), ids=REFUSED)
def test_archives_and_pickles_that_are_refused(make: Maker, key: str, here: Path) -> None:
    path = make(here / "model.ckpt")
    with raises(CheckpointError, f"{path}: ", key) as caught:
        open_checkpoint(path)
    assert caught.value.message.isprintable()
    assert not (here / hostile.MARKER).exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "MODEL.PTH", "model.safetensors", "model"])
@pytest.mark.parametrize("make", CODE.values(), ids=CODE)
def test_code_is_seen_by_a_judge_and_never_run(make: Maker, name: str, here: Path, crdiff: "Crdiff") -> None:
    path = make(here / name)
    found = scan_file_path(str(path))
    assert any(g.safety == SafetyLevel.Dangerous for g in found.globals) or found.scan_err
    ran = crdiff("inspect", path)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 2
    assert not (here / hostile.MARKER).exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("__builtin__", "apply"), ("os", "system"),
        ("nt", "system"), ("subprocess", "Popen"), ("runpy", "_run_code"), ("pickle", "loads"), ("_pickle", "loads"),
        ("torch", "load"), ("torch.serialization", "load"), ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.jit", "load"), ("numpy", "load"), ("numpy.testing._private.utils", "runstring"), ("webbrowser", "open"),
        ("operator", "attrgetter"), ("functools", "partial"), ("pip", "main"), ("pkgutil", "resolve_name"),
        ("collections", "OrderedDict.fromkeys"), ("torch._utils._rebuild_tensor_v2", ""), ("", ""), ("torch", "_utils"),
    ],
)  # fmt: skip
def test_names_that_are_not_weights(module: str, name: str) -> None:
    """What picklescan lists as dangerous, and neighbours of what is allowed."""
    old = f"c{module}\n{name}\n".encode() + b")R"
    new = b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"
    for made in (opcodes(old), opcodes(new)):
        with pytest.raises(UnpickleError) as caught:
            unpickle(made)
        assert repr(f"{module}.{name}") in str(caught.value)


def test_the_reader_imports_nothing(tmp_path: Path) -> None:
    """Neither torch nor anything that the file names."""
    path = saved(tmp_path, {"a": torch.ones(2)})
    code = (
        "import sys; from pathlib import Path; from crdiff_export.formats.checkpoint import open_checkpoint\n"
        "open_checkpoint(Path(sys.argv[1])); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "False False\n"


# Memory and time.

ENDLESS = "more than any checkpoint"
BOMBS = {
    "lists": ("b']' * N", ENDLESS),
    "doubling": ("b')' + b'q\\0h\\0\\x86' * 1_000_000", ENDLESS),
    "memo": ("b'Nr\\xff\\xff\\xff\\x7f' * 600_000", "accepted"),
    "number": ("b'\\x8b' + N.to_bytes(4, 'little') + b'\\x7f' * N", "accepted"),
    "wide-text": ("b'X' + N.to_bytes(4, 'little') + b'k' * (N - 4) + '\\U0001f600'.encode()", "accepted"),
    "deep": ("b']' * 900_000 + b'a' * 899_999", "accepted"),
    "deep-key": ("b'})' + b'\\x85' * 900_000 + b'Ns'", "accepted"),
}


@linux_only
@pytest.mark.parametrize(("opcodes", "key"), BOMBS.values(), ids=BOMBS)
def test_memory_and_time_are_bounded(opcodes: str, key: str) -> None:
    assert key in read_bounded("unpickle(raw)", f"b'\\x80\\x02' + {opcodes} + b'.'", 31 << 20)


def test_an_endless_data_pkl_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hostile.weights(tmp_path / "model.ckpt")
    monkeypatch.setattr(torch_zip, "MAX_PICKLE", 100)
    with raises(CheckpointError, path, "data.pkl"):
        open_checkpoint(path)


def test_an_endless_directory_is_not_read(tmp_path: Path) -> None:
    path = hostile.endless_directory(tmp_path / "model.ckpt")
    with torch_zip._Clamped(path) as archive:
        assert len(archive.read(1 << 40)) == torch_zip.MAX_DIRECTORY
        archive.seek(0)
        assert len(archive.read()) == torch_zip.MAX_DIRECTORY


# What torch saves.


def saved(folder: Path, value: Any, name: str = "model.ckpt", **options: Any) -> Path:
    path = folder / name
    torch.save(value, path, **options)
    return path


def as_safetensors(file: SourceFile) -> bytes:
    """As one file, its header padded as the library pads it."""
    body = safetensors.serialise(file.tensors, file.metadata)[8:].rstrip(b" ")
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body + all_bytes(file)


def by_the_library(tensors: dict[str, torch.Tensor]) -> bytes:
    """The file that safetensors writes of the same tensors."""
    return save({name: t.detach().contiguous().clone() for name, t in tensors.items()})


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(dtype)


class Described(torch.Tensor):
    """A tensor of a class of its own."""


SHARED = numbered(6, 8)
STATES: dict[str, dict[str, torch.Tensor]] = {
    "one": {"weight": numbered(3, 4)},
    "scalar": {"a": torch.tensor(3.0), "b": torch.tensor(7)},
    "empty": {"a": torch.zeros(0), "b": torch.zeros(0, 5).half(), "c": numbered(2), "d": torch.zeros(3, 0)},
    "transposed": {"a": numbered(5, 3).t(), "b": numbered(2, 3, 4).permute(2, 0, 1), "c": numbered(7)},
    "channels-last": {"a": numbered(2, 3, 4, 5).to(memory_format=torch.channels_last)},
    "slices": {
        "a": SHARED[:, 2:5], "b": SHARED[1::2], "c": SHARED[:, 3], "d": SHARED[2:4], "e": SHARED[1, 1:3], "f": SHARED,
    },
    "bytes-in-columns": {"a": numbered(9, 7, dtype=torch.uint8).t()[1:4]},
    "doubles-in-columns": {"a": numbered(9, 7, dtype=torch.float64).t()[1:4, ::2]},
    "size-one": {"a": numbered(4, 1, 3).transpose(0, 1), "b": torch.as_strided(numbered(9), (1, 3), (10**9, 2))},
    "one-element-of-many": {"a": numbered(1000)[-1:], "b": numbered(1000)[500]},
    "same-twice": {"a": SHARED, "b": SHARED},
    "overlapping": {"a": torch.as_strided(numbered(9), (3, 3), (2, 1))},
    "parameters": {"a": nn.Parameter(numbered(2, 2)), "b": nn.Parameter(numbered(3), requires_grad=False)},
    "names": {"": numbered(1), "b\n\0": numbered(2), "模型😀": numbered(3), "a" * 1000: numbered(1), "é": numbered(1)},
    "order-of-names": {name: numbered(1) for name in ("b", "a.10", "a.2", "B", "_", "\uffff", "😀")},
    "all-dtypes": {
        str(dtype): numbered(2, 3, dtype=dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
            torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64,
        )
    },
    "special-values": {"a": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])},
}  # fmt: skip


@pytest.mark.parametrize("tensors", STATES.values(), ids=STATES)
def test_the_same_file_as_the_library_writes(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (file,) = open_checkpoint(saved(tmp_path, tensors)).files
    assert as_safetensors(file) == by_the_library(tensors)
    assert (file.name, file.data_start, dict(file.metadata)) == ("model.safetensors", 0, {})
    data, rng = all_bytes(file), random.Random(5)
    ends = [sorted(rng.choices(range(len(data) + 1), k=2)) for _ in range(150)]
    check_ranges(file, data, [(0, len(data)), (len(data), len(data)), *((start, stop) for start, stop in ends)])


WEIGHTS = {"a": numbered(2, 3), "b": numbered(4, dtype=torch.float16)}
WRAPPED: dict[str, Any] = {
    "plain": WEIGHTS,
    "views-of-one-storage": {"a": numbered(6).reshape(2, 3), "b": WEIGHTS["b"]},
    "ordered": collections.OrderedDict(WEIGHTS),
    "state-dict": {"state_dict": WEIGHTS, "epoch": 7, "lr": 1e-4},
    "lightning": {"state_dict": WEIGHTS, "optimizer_states": [{"state": {0: {"exp_avg": numbered(9)}}}]},
    "deep": {"state_dict": {"state_dict": WEIGHTS}},
    "module": {"module": {"params": WEIGHTS}},
    "beside-settings": {"hyper": {"lr": 0.1}, "net": WEIGHTS, "more": {}},
    "model-state-dict": {"model_state_dict": WEIGHTS, "optimizer": {"a": numbered(3)}},
    "beside-other-things": {
        **WEIGHTS, "epoch": 3, "name": "x", "none": None, "list": [numbered(2)], "nested": {"c": numbered(2)},
        "true": True, "lr": 0.5, "big": 2**200, "bytes": b"xyz", "tuple": (1, "a"), 5: numbered(2),
        "size": torch.Size([2]), "dtype": torch.float16, "device": torch.device("cuda:1"), "numpy": np.float64(3.0),
        "array": np.arange(3),
        "set": {1, 2}, "complex": 1j, "counter": collections.Counter("aa"), "empty": {}, "memory": bytearray(b"x"),
        "default": collections.defaultdict(dict, {"x": 1}), "state": numbered(2).numpy().dtype,
    },
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_in_what_trainers_save(value: Any, protocol: int, tmp_path: Path) -> None:
    if protocol == 5 and isinstance(value, dict) and "memory" in value:
        value = {key: item for key, item in value.items() if key not in ("memory", "array")}
    (file,) = open_checkpoint(saved(tmp_path, value, pickle_protocol=protocol)).files
    assert as_safetensors(file) == by_the_library(WEIGHTS)


def test_a_network_with_buffers(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Conv2d(2, 2, 3))
    path = saved(tmp_path, {"state_dict": network.state_dict()})
    (file,) = open_checkpoint(path).files
    assert as_safetensors(file) == by_the_library(network.state_dict())


def test_the_first_stable_diffusion_names_a_callback(tmp_path: Path) -> None:
    """Which torch does not read without being told to trust it; here it stays a name."""
    callbacks = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    scalar = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R(K\x03" + text("<")
    scalar += (
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbc_codecs\nencode\n"
        + text("abcdefgh")
        + text("latin1")
        + b"\x86R\x86R"
    )
    weights = b"}" + text("weight") + tensor() + b"s"
    made = state(callbacks=b"}" + callbacks + b"}" + text("best") + scalar + b"ss", state_dict=weights)
    storages = {"0": np.arange(6, dtype="<f4").tobytes()}
    path = hostile.archive(tmp_path / "model.ckpt", made, storages, extra={"model/version": b"3\n"})
    (file,) = open_checkpoint(path).files
    assert as_safetensors(file) == by_the_library({"weight": numbered(2, 3)})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_what_torch_saves_besides_weights_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": numbered(2).as_subclass(Described)})
    with raises(CheckpointError, path, "torch._tensor._rebuild_from_type_v2"):
        open_checkpoint(path)
    path = saved(tmp_path, WEIGHTS, _use_new_zipfile_serialization=False)
    with raises(CheckpointError, path, "before 1.6"):
        open_checkpoint(path)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(nn.Linear(2, 2)).save(path)  # type: ignore[no-untyped-call,unused-ignore]
    with raises(CheckpointError, path, "TorchScript"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin", "MODEL.CKPT", "v1.5-pruned.ckpt"])
def test_names_of_pickles(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, WEIGHTS, name))
    assert (checkpoint.kind, checkpoint.stem) == ("file", name.rpartition(".")[0])
    assert checkpoint.files[0].name == f"{checkpoint.stem}.safetensors"


def test_a_checkpoint_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": numbered(1000)})
    (file,) = open_checkpoint(path).files
    with closing(file.open()) as source:
        os.truncate(path, 2000)
        with raises(CheckpointError, path, "shorter"):
            source.read_into(0, memoryview(bytearray(4000)))


def test_scattered_weights_are_read_by_rows(tmp_path: Path) -> None:
    """Each read copies the rows that it is in, not the tensor."""
    import tracemalloc

    path = saved(tmp_path, {"a": numbered(4096, 1024).t()})
    (file,) = open_checkpoint(path).files
    target = memoryview(bytearray(1 << 16))
    with closing(file.open()) as source:
        source.read_into(0, target)
        tracemalloc.start()
        source.read_into(5 << 20, target)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 18
    expected = numbered(4096, 1024).t().contiguous().numpy().tobytes()
    assert target == expected[5 << 20 : (5 << 20) + len(target)]


def test_torch_reads_the_same_values() -> None:
    """The whole value, against torch's own restricted reader."""
    value = {"a": [1, 2.5, "x", None, True, (1, (2,))], "b": {"c": -(2**70)}, "d": [[], {}, ()]}
    raw = io.BytesIO()
    torch.save(value, raw)
    with zipfile.ZipFile(raw) as archive:
        assert unpickle(archive.read("archive/data.pkl")) == value


def test_what_is_beside_the_weights_stays_closed() -> None:
    assert unpickle(opcodes(b"cbuiltins\nset\n]\x85R")) is OTHER
    assert unpickle(opcodes(b"ccollections\ndefaultdict\ncbuiltins\ndict\n\x85R" + text("a") + b"Ns")) is OTHER
