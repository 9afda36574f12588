"""A reader for the pickle of a torch checkpoint that yields inert data: no name in it is imported or called.

`torch.load(weights_only=True)` has the same purpose. It ran code before torch 2.6 (CVE-2025-32434), corrupted memory
before 2.10 (CVE-2026-24747), and refuses the first Stable Diffusion because of the name of a Lightning callback.
Python's own Unpickler is not used because it allocates memory for any memo index: nine bytes of input took 4.1 GB.
Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py. Calls: torch/_utils.py, torch/serialization.py.
"""

import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from crdiff_export.formats.strict_json import show

# A tensor takes some 40 opcodes. Two million take 3 seconds and 0.3 GB.
MAX_OPCODES = 2_000_000


class UnpickleError(Exception):
    """A pickle that is damaged or describes something other than weights."""


class ForeignError(UnpickleError):
    """A pickle that names a class or function which is not known to be harmless."""


@dataclass(frozen=True, slots=True)
class Name:
    """The full name of a class or function."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes under one key of the archive: `count` elements of `dtype`, or bytes if it is None."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A view of a storage; offset and strides count elements, `dtype` is the safetensors name."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# Stands for any other value; it is kept on the stack and never inspected.
OTHER: Final = object()

# torch/storage.py, `_dtype_to_storage_type_map`, with the safetensors names of the dtypes.
_STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32", "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": None,
}  # fmt: skip
_DTYPES = {
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
}  # fmt: skip
_ORDERED_DICT = "collections.OrderedDict"
# Names that trainers store beside the weights. The first Stable Diffusion has the callback and NumPy scalars.
_HARMLESS = frozenset({
    "torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.float16", "torch.float32",
    "torch.bfloat16", "torch.float64", "torch.int64", "torch.int32", "torch.serialization._get_layout",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "_codecs.encode",
    "builtins.set", "builtins.bytearray", "builtins.complex", "builtins.dict",
    "__builtin__.set", "__builtin__.bytearray", "__builtin__.complex", "__builtin__.dict",
    "collections.Counter", "collections.defaultdict",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
})  # fmt: skip

_AS_READ = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINBYTES", "BINBYTES", "SHORT_BINSTRING", "BINSTRING",
})  # fmt: skip


def unpickle(raw: bytes) -> object:
    """Read a pickle. Memory and time are bounded by MAX_OPCODES and the length of `raw`.

    Args:
        raw: The pickle.

    Returns:
        A value made of dicts with text as keys, lists, tuples, numbers, text, StridedTensor and OTHER.

    Raises:
        UnpickleError: The pickle is damaged or describes more than any checkpoint holds.
        ForeignError: It names a class or function that is not known to be harmless.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # genops warns of odd escapes in names
            for opcode, argument, _ in islice(pickletools.genops(raw), MAX_OPCODES):
                if opcode.name == "STOP":
                    return machine.pop()[0]
                action = _ACTIONS.get(opcode.name)
                if action is None:
                    raise UnpickleError(f"uses the pickle opcode {opcode.name}, which no torch checkpoint needs")
                action(machine, argument)
    except (ValueError, LookupError, TypeError) as error:
        # genops raises ValueError for bytes that are not a pickle; the others come from a stack with wrong values.
        raise UnpickleError("is a damaged pickle") from error
    raise UnpickleError("describes more than any checkpoint holds")


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int = 1) -> list[Any]:
        """Take the last `count` values; TypeError if a mark or the bottom of the stack is among them."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise TypeError
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def fill(self, values: list[Any]) -> None:
        """Add values to the list or dict on top of the stack; keys that are not text name no weight and are dropped."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, dict):
            target.update(
                (key, value) for key, value in zip(values[::2], values[1::2], strict=True) if type(key) is str
            )
        elif target is not OTHER:
            raise TypeError

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        self.push(self.memo[key])

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self.push(_name(f"{module}.{name}"))

    def call(self) -> None:
        function, arguments = self.pop(2)
        self.push(_call(function, arguments))


_ACTIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys(_AS_READ, _Machine.push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push(OTHER),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.fill(machine.pop()),
    "APPENDS": lambda machine, _: machine.fill(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.fill(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.fill(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.pop_to_mark(),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop(2)),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.pop(),  # attributes of a dict or of another value: torch's own `_metadata`
    "BINPERSID": lambda machine, _: machine.push(_storage(*machine.pop())),
}


def _name(text: str) -> Name:
    if text in _STORAGES or text in _DTYPES or text in _HARMLESS or text in _CALLS or text == _ORDERED_DICT:
        return Name(text)
    raise ForeignError(f"names {show(text)}")


def _call(function: Any, arguments: Any) -> object:
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise TypeError
    if function.text in _CALLS:
        return _CALLS[function.text](*arguments)
    return {} if function.text == _ORDERED_DICT and not arguments else OTHER


def _storage(identity: Any) -> Storage:
    """Read a persistent id of torch: ('storage', class, key, device, count)."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise TypeError
    _, kind, key, _, count = identity[:5]
    if not isinstance(kind, Name) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise TypeError
    return Storage(key, _STORAGES[kind.text], count)


def _tensor(  # torch._utils._rebuild_tensor_v2
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, flags: Any = None
) -> StridedTensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise TypeError
    return _strided(storage, storage.dtype, offset, shape, strides, flags)


def _tensor_of_dtype(  # torch._utils._rebuild_tensor_v3, for the dtypes that have no storage class
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, flags: Any = None
) -> StridedTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, Name):
        raise TypeError
    return _strided(storage, _DTYPES[dtype.text], offset, shape, strides, flags)


def _strided(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, flags: Any) -> StridedTensor:
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise TypeError
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        raise TypeError
    if flags:
        raise UnpickleError("holds a tensor whose sign or conjugate is put off")
    return StridedTensor(storage, dtype, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> StridedTensor:
    if not isinstance(data, StridedTensor):
        raise TypeError
    return data


_CALLS: Mapping[str, Callable[..., StridedTensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
