"""Network pickles of EDM and EDM2 as data: nothing that they name is imported, and nothing in them is called.

Such a file holds objects together with the source code of their classes, which their own loader executes. Here a stack
machine of our own reads it. It makes dicts, lists, numbers, text and :class:`PickledObject`; a global is a name to it,
and the few names in ``MAKERS`` stand for functions below. So there is no way from a file to a call of anything else.
Memory is bounded by the size of the file: operations are counted, and what is copied out of it is charged to it.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError, check

OPERATIONS = 2_000_000  #: most that a file may take; EDM2's largest network takes a few ten thousand
PARTS = 100_000  #: most tensors and modules that an object may be made of, each counted where it is found again
LETTERS = 1_000  #: most of a tensor's name
MAGIC = 0x1950A86A20F9469CFC6C  #: what torch's old format begins with
MODULE_NAMES = "torch.nn.modules."  #: torch's own modules: objects without source
EASY_DICT = "dnnlib.util.EasyDict"
STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}


@dataclass(eq=False)
class PickledObject:
    """An object of a pickle, as data.

    Attributes:
        class_name: ``EDMPrecond``, say, or for torch's own modules the whole name.
        source: text of the Python module that defines the class. It has not been executed, and whoever executes it
            trusts the file's author.
        state: the object's attributes by name, what it is made of included.
    """

    class_name: str
    source: str = field(default="", repr=False)
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments that the object was made with."""
        args = self.state.get("_init_args") or ()
        check(isinstance(args, tuple | list), f"_init_args is a {type(args).__name__}")
        return tuple(args)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The named arguments that the object was made with."""
        return self._part("_init_kwargs")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers as ``state_dict`` names and orders them, bit for bit, on the CPU.

        ``network.load_state_dict(tensors)`` of the same class takes them. Empty for what is no module.

        Raises:
            InputError: modules that hold something else, or each other.
        """
        tensors: dict[str, Tensor] = {}
        waiting, parts = [("", self)], 0
        while waiting:
            prefix, module = waiting.pop()
            check(isinstance(module, PickledObject), f"module {prefix!r:.80} is a {type(module).__name__}")
            inner = module._part("_modules")
            parts += 1 + len(inner) + len(module._part("_parameters")) + len(module._part("_buffers"))
            check(parts <= PARTS and len(prefix) <= LETTERS, "modules that hold too many others, or each other")
            tensors |= {f"{prefix}{name}": value for name, value in module._named().items()}
            waiting += [(f"{prefix}{name}.", child) for name, child in reversed(inner.items()) if child is not None]
        return tensors

    def _named(self) -> dict[str, Tensor]:
        """The tensors of this module alone."""
        hidden = self.state.get("_non_persistent_buffers_set") or ()
        buffers = {name: value for name, value in self._part("_buffers").items() if name not in hidden}
        named = {name: v for name, v in (self._part("_parameters") | buffers).items() if v is not None}
        others = [name for name, value in named.items() if not isinstance(value, Tensor)]
        check(not others, f"{others[:1]} is no tensor")
        return named

    def _part(self, name: str) -> dict[str, Any]:
        part = self.state.get(name) or {}
        check(isinstance(part, dict), f"{name} is a {type(part).__name__}")
        return dict(part)


def read_pickle(path: str | PathLike[str]) -> dict[str, Any]:
    """What a network pickle of EDM or EDM2 holds, without running any of it.

    Args:
        path: ``edm-cifar10-32x32-uncond-vp.pkl``, say. Reading it takes about three times its size of memory.

    Returns:
        Its entries by name: objects (``ema``, ``loss_fn``, ``augment_pipe``, ``encoder``) as :class:`PickledObject`,
        others (``dataset_kwargs``) as the dicts, lists, numbers and numpy arrays that they are.

    Raises:
        InputError: no such file; damaged; another kind of pickle; anything named that is not on the list of what such
            files need, which the message gives.
    """
    file = Path(path)
    check(file.is_file(), f"{path} does not exist")
    try:
        entries = _Reader(file.read_bytes()).read()
        check(type(entries) is dict and all(type(name) is str for name in entries), "it holds no entries by name")
        for value in entries.values():
            if isinstance(value, PickledObject):
                _ = value.tensors  # once here, so that a file is refused before anybody uses it
    except Exception as error:  # a damaged file can fail anywhere
        reason = " ".join(("" if isinstance(error, InputError) else type(error).__name__, *str(error).splitlines()[:1]))
        raise InputError(f"{path} cannot be read as a network pickle of EDM: {reason.strip():.1000}") from None
    return dict(entries)


# ---- the machine ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """What a pickle names: no more than its name."""

    name: str


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class _Machine:
    """The stack machine of pickle (PEP 307, 3154 and 574), as far as plain data need it.

    ``allowed`` says whether a global may be named; what becomes of it, :meth:`reduce` and :meth:`new` and
    :meth:`build` say, which refuse all here.
    """

    allowed: Callable[[str], bool] = STORAGES.__contains__
    listed = "torch's storages"

    def __init__(self, stream: io.BytesIO) -> None:
        self.stream = stream
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run up to the end of a pickle; what it leaves."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(self.stream)):
            check(count < OPERATIONS, f"more than {OPERATIONS} operations")
            self.step(operation.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in LITERALS:
                stack.append(argument)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case _ if name in EMPTY:
                stack.append(EMPTY[name]())
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.marked()
            case "TUPLE":
                items = self.marked()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.popped(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self.popped(1) if name == "APPEND" else self.marked()
                self.top(list).extend(items)
            case "ADDITEMS":
                items = self.marked()
                self.top(set).update(map(_key, items))
            case "SETITEM" | "SETITEMS":
                items = self.popped(2) if name == "SETITEM" else self.marked()
                self.top(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "GLOBAL":
                stack.append(self.named(str(argument).replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(self.named(".".join(self.popped(2))))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self.popped(2)
                right = type(function) is _Global and type(arguments) is tuple
                check(right, f"{name} of a {type(function).__name__}, which is not called")
                stack.append((self.reduce if name == "REDUCE" else self.new)(function.name, arguments))
            case "BUILD":
                (state,) = self.popped(1)
                self.build(stack[-1], state)
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case _:
                raise InputError(f"the operation {name}, which such files do not need")

    def popped(self, count: int) -> list[Any]:
        check(len(self.stack) >= count, "its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def marked(self) -> list[Any]:
        """What has come since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def top(self, kind: type) -> Any:
        check(type(self.stack[-1]) is kind, f"items for a {type(self.stack[-1]).__name__}, not a {kind.__name__}")
        return self.stack[-1]

    def named(self, name: str) -> _Global:
        check(self.allowed(name), f"it names {name!r:.200}; such files may name {self.listed}")
        return _Global(name)

    def reduce(self, name: str, arguments: tuple[Any, ...]) -> Any:
        raise InputError(f"a call of {name}, which is not called")

    def new(self, name: str, arguments: tuple[Any, ...]) -> Any:
        raise InputError(f"a new {name}, which is not made")

    def build(self, target: Any, state: Any) -> None:
        raise InputError(f"a state for a {type(target).__name__}")

    def persistent(self, identity: Any) -> Any:
        """What lies outside of the pickle: here that it does, as it is described."""
        return identity


def _key(value: Any) -> str | int:
    """A key that has a hash of its own: nested tuples would be hashed again and again."""
    right = type(value) is str or (type(value) is int and abs(value) < 1 << 32)
    check(right, f"a key of type {type(value).__name__}")
    return value  # type: ignore[no-any-return]


class _Reader(_Machine):
    """The machine of the whole file."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.left = len(content)

    @staticmethod
    def allowed(name: str) -> bool:
        return name in MAKERS or name in (EASY_DICT, "numpy.ndarray") or name.startswith(MODULE_NAMES)

    @property
    def listed(self) -> str:  # type: ignore[override]
        return ", ".join((*MAKERS, EASY_DICT, "numpy.ndarray", f"{MODULE_NAMES}*"))

    def read(self) -> Any:
        return self.run()

    def charge(self, content: object) -> bytes:
        """Bytes that are copied; all together may not be more than the file has."""
        check(isinstance(content, bytes | bytearray), f"a {type(content).__name__} in place of bytes")
        assert isinstance(content, bytes | bytearray)
        self.left -= len(content)
        check(self.left >= 0, "more data than the file has")
        return bytes(content)

    def reduce(self, name: str, arguments: tuple[Any, ...]) -> Any:
        check(name in MAKERS, f"a call of {name}, which is not called")
        return MAKERS[name](self, *arguments)

    def new(self, name: str, arguments: tuple[Any, ...]) -> Any:
        check(
            not arguments and (name == EASY_DICT or name.startswith(MODULE_NAMES)), f"a new {name}, which is not made"
        )
        return {} if name == EASY_DICT else PickledObject(name)

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, PickledObject):
            target.state = _state(state)
        elif isinstance(target, np.ndarray):
            _fill(self, target, *state)
        else:  # numbers as they lie in memory here, which they are already
            native = isinstance(target, np.dtype) and state[1] in ("<", "|") and set(state[2:5]) == {None}
            check(native, f"a state for a {type(target).__name__}")

    def persistent(self, identity: Any) -> Any:
        raise InputError("something outside of the file")


# ---- what the names stand for -----------------------------------------------------------------


def _ordered_dict(reader: _Reader) -> dict[Any, Any]:
    return {}


def _object(reader: _Reader, meta: Any) -> PickledObject:
    """An object of a persistent class, whose module stays text."""
    check(type(meta) is dict and meta.get("type") == "class", "an object without its class")
    name, source = meta.get("class_name"), meta.get("module_src")
    check(type(name) is str and type(source) is str, "an object whose class has no name or source")
    return PickledObject(name, source, _state(meta.get("state")))


def _state(state: Any) -> dict[str, Any]:
    check(state is None or type(state) is dict, f"attributes in a {type(state).__name__}")
    return state or {}


def _storage(reader: _Reader, content: Any) -> Tensor:
    """The numbers of a storage, flat: in torch's old format five pickles, how many there are, and their bytes."""
    stream = io.BytesIO(reader.charge(content))
    magic, _, _, saved, _ = (_Machine(stream).run() for _ in range(5))
    check(magic == MAGIC and type(saved) is tuple and len(saved) == 6, "tensors in another than torch's old format")
    kind, name, _, _, count, view = saved
    check(kind == "storage" and type(name) is _Global and view is None, "a storage that is part of another")
    (written,), dtype, size = struct.unpack("<q", stream.read(8)), STORAGES[name.name], len(content) - stream.tell()
    fits = type(count) is int and count == written and count * dtype.itemsize == size
    check(fits, f"a storage of {written} numbers in {size} bytes")
    numbers = torch.empty(count, dtype=dtype, device="cpu")
    stream.readinto(numbers.view(torch.uint8).numpy().data)
    return numbers


def _tensor(
    reader: _Reader, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, *metadata: Any
) -> Tensor:
    """A view of a storage. One that repeats numbers (stride 0) could stand for any size of memory."""
    storage = _is_tensor(storage)
    whole = [offset, *size, *stride]
    valid = all(type(n) is int and n >= 0 for n in whole) and len(size) == len(stride) and not any(metadata)
    check(valid, "a tensor that is none")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = math.prod(size) == 0 or (last < len(storage) and math.prod(size) <= len(storage))
    check(inside, f"a tensor of {math.prod(size)} numbers in a storage of {len(storage)}")
    view: Tensor = storage.as_strided(size, stride, offset)
    return view


def _parameter(reader: _Reader, data: Any, gradient: Any, hooks: Any) -> Tensor:
    return _is_tensor(data)


def _is_tensor(value: Any) -> Tensor:
    check(isinstance(value, Tensor), f"a {type(value).__name__} in place of a tensor")
    assert isinstance(value, Tensor)
    return value


def _dtype(reader: _Reader, code: Any, align: Any, copy: Any) -> np.dtype[Any]:
    check(type(code) is str and re.fullmatch("[biufc][0-9]{1,2}", code), f"numbers of type {code!r:.80}")
    return np.dtype(str(code))


def _array(reader: _Reader, kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """An array that a state will fill."""
    return np.empty(0)


def _fill(
    reader: _Reader, array: np.ndarray[Any, Any], version: Any, shape: Any, dtype: Any, fortran: Any, data: Any
) -> None:
    filled = _from_buffer(reader, data, dtype, shape, "F" if fortran is True else "C")
    check(array.shape == (0,), "an array that has numbers")
    state: Any = filled.__reduce__()[2]
    array.__setstate__(state)  # the array itself, which others may hold


def _from_buffer(reader: _Reader, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    check(isinstance(dtype, np.dtype) and type(shape) is tuple, "an array that is none")
    return np.frombuffer(bytearray(reader.charge(data)), dtype).reshape(shape, order=order)


def _scalar(reader: _Reader, dtype: Any, data: Any) -> Any:
    return _from_buffer(reader, data, dtype, (), "C")[()]


MAKERS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": _ordered_dict,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
}
