"""What hostile pickles get from the reader of network pickles: one line, and nothing of theirs is run."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import struct
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.adapters import edm_pickle
from fastdiff.adapters.edm import read_pickle

CANARY = "canary"  # a file that hostile pickles try to write, in the directory that a test runs in
SOURCE = f"open({CANARY!r}, 'w').close()  # whoever executes this module leaves a trace\n"


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- forms -----------------------------------------------------------------------------------


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


WRITE = f"open({CANARY!r}, 'w').close()"
SHELL = f"touch {CANARY}"


def named(name: str, protocol: int = 4) -> bytes:
    """A global, by opcode."""
    module, _, attribute = name.partition(":")
    if protocol < 4:
        return f"c{module}\n{attribute}\n".encode()
    return text(module) + text(attribute) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def call(name: str, argument: bytes, protocol: int = 4) -> bytes:
    return named(name, protocol) + argument + b"\x85R"


def old_format(saved: bytes, tail: bytes = b"") -> bytes:
    """What torch's old format looks like, with anything in the place of the storage."""
    head = [edm_pickle.MAGIC, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + saved + pickle.dumps(["0"], 2) + tail


def storage(count: int = 1, tail: bytes = struct.pack("<qf", 1, 1.0), name: str = "FloatStorage") -> bytes:
    saved = text("storage") + f"ctorch\n{name}\n".encode() + text("0") + text("cpu") + pickle.dumps(count, 2)[2:-1]
    return old_format(b"\x80\x02(" + saved + b"NtQ.", tail)


def loaded(content: bytes) -> bytes:
    return call("torch.storage:_load_from_bytes", data(content))


def tensor(offset: int = 0, size: tuple[int, ...] = (1,), stride: tuple[int, ...] = (1,)) -> bytes:
    rest = b"".join(pickle.dumps(v, 2)[2:-1] for v in (offset, size, stride)) + b"\x89N"
    return named("torch._utils:_rebuild_tensor_v2") + b"(" + loaded(storage()) + rest.replace(b"q\x00", b"") + b"tR"


def persistent(state: bytes, kind: str = "class") -> bytes:
    meta = text("type") + text(kind) + text("class_name") + text("N") + text("module_src") + text(SOURCE)
    return call("torch_utils.persistence:_reconstruct_persistent_obj", b"}(" + meta + text("state") + state + b"u")


def doubled(times: int, end: bytes = b"\x86") -> bytes:
    """Pairs of pairs of pairs: two to the power of ``times`` leaves in memory for ``times``."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + end for i in range(times))


def modules_doubled(times: int) -> bytes:
    module, result = "torch.nn.modules.container:ModuleDict", named("torch.nn.modules.container:ModuleDict") + b")\x81"
    for i in range(times):
        children = b"}(" + b"".join(text(name) + b"h" + bytes([i]) for name in "ab") + b"u"
        result += b"q" + bytes([i]) + b"0" + named(module) + b")\x81}" + text("_modules") + children + b"sb"
    return result


CANARY_CALL = call("builtins:exec", text(WRITE))
NUMPY = call("numpy.core.multiarray:_reconstruct", b"")[:-2] + named("numpy:ndarray") + b"K\x00\x85C\x01b\x87R"
DTYPE = named("numpy:dtype") + text("f4") + b"\x89\x88\x87R"
CALLS: dict[str, Any] = {
    "os.system": Call(os.system, SHELL),
    "exec": Call(exec, WRITE),
    "eval": Call(eval, f"open({CANARY!r}, 'w')"),
    "open": Call(open, CANARY, "w"),
    "__import__": Call(__import__, "os"),
    "getattr": Call(getattr, Call(__import__, "os"), "system"),
    "torch.load": Call(torch.load, CANARY),
    "partial": Call(functools.partial, os.system, SHELL),
    "a state that is set": Call(Path, state={"a": 1}),
    "a call in a key": {Call(str, "x"): 1},
    "an object of Python": types.SimpleNamespace(a=1),
    "a class": Path,
    "complex": 1j,
    "numpy of objects": np.array([Call(os.system, SHELL), None], dtype=object),
    "numpy of fields": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "big-endian": np.zeros(2, ">f4"),
    "a slice": slice(1),
    "copied": copy.copy,
}
STREAMS: dict[str, bytes] = {
    **{
        f"{name} by {'GLOBAL' if protocol < 4 else 'STACK_GLOBAL'}": call(name, text(SHELL), protocol)
        for protocol in (2, 4)
        for name in (
            *("os:system", "posix:system", "nt:system", "subprocess:call", "subprocess:Popen", "os:popen", "pty:spawn"),
            *("builtins:exec", "__builtin__:eval", "builtins:getattr", "builtins:__import__", "runpy:run_path"),
            *("importlib:import_module", "importlib.util:find_spec", "codecs:encode", "_codecs:encode", "pickle:loads"),
            *(
                "torch:load",
                "torch.hub:load",
                "torch.serialization:load",
                "numpy:load",
                "torch.jit:load",
                "copyreg:_reconstructor",
            ),
            *("operator:attrgetter", "operator:methodcaller", "functools:partial", "functools:reduce", "builtins:map"),
            *("types:FunctionType", "types:CodeType", "code:InteractiveInterpreter", "bdb:Bdb", "pydoc:pipepager"),
            *("torch.storage:UntypedStorage", "torch._utils:_rebuild_tensor", "torch.nn:Module", "socket:socket"),
        )
    },
    "dotted": call("torch.storage:_load_from_bytes.__globals__", text("os")),
    "dotted module": call("torch.storage.os:system", text(SHELL)),
    "dotted through what is allowed": call("collections:OrderedDict.fromkeys", text(SHELL)),
    "a name with a space": call("os system x:y", text(SHELL), 2),
    "a name that is no text": b"K\x01" + text("system") + b"\x93.",
    "INST": b"(" + text(SHELL) + b"ios\nsystem\n",
    "OBJ": b"(" + named("os:system", 2) + text(SHELL) + b"o",
    "OBJ of nothing named": b"(" + text("os") + text(SHELL) + b"o",
    "NEWOBJ": named("builtins:exec") + text(WRITE) + b"\x85\x81",
    "NEWOBJ of what is reduced": named("collections:OrderedDict") + b")\x81",
    "NEWOBJ with arguments": named("torch.nn.modules.container:ModuleDict") + text("x") + b"\x85\x81",
    "NEWOBJ_EX": named("dnnlib.util:EasyDict") + b")}\x92",
    "REDUCE of a module": call("torch.nn.modules.linear:Linear", b"K\x03"),
    "REDUCE of a class that is new": named("dnnlib.util:EasyDict") + b")R",
    "REDUCE of text": text("os.system") + text(SHELL) + b"\x85R",
    "REDUCE of what is made": named("collections:OrderedDict") + b")R" + text(SHELL) + b"\x85R",
    "REDUCE of an array": NUMPY + b")R",
    "too many arguments": call("collections:OrderedDict", b"]"),
    "arguments in a list": named("collections:OrderedDict") + b"]R",
    "BUILD with __setstate__": b"}" + text("__setstate__") + named("os:system") + b"sb",
    "BUILD of a global": named("collections:OrderedDict") + b"}" + text("update") + text("x") + b"sb",
    "BUILD of a global with slots": named("dnnlib.util:EasyDict") + b"N}" + text("__new__") + text("x") + b"s\x86b",
    "BUILD of a dict": b"}}b",
    "BUILD of a module with slots": named("torch.nn.modules.linear:Identity") + b")\x81N}" + b"\x86b",
    "BUILD of a list": b"]}b",
    "BUILD of a type of numbers": DTYPE + b"(K\x03" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pos.system\n",
    "BINPERSID": text("storage") + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"C\x01x\x98",
    "protocol 0": b"(dp0\nV" + CANARY.encode() + b"\np1\nI1\ns",
    "source that would run": persistent(b"}") + CANARY_CALL + b"\x86",
    "module_src that is called": call("torch_utils.persistence:_src_to_module", text(SOURCE)),
    "another kind of persistence": persistent(b"}", "function"),
    "an object without a class": call("torch_utils.persistence:_reconstruct_persistent_obj", b"}"),
    "an object of text": call("torch_utils.persistence:_reconstruct_persistent_obj", text(SOURCE)),
    "a state of text": persistent(text("x")),
    "modules that are numbers": persistent(b"}" + text("_modules") + b"}" + text("a") + b"K\x01ss"),
    "modules in a list": persistent(b"}" + text("_modules") + b"]K\x01as"),
    "parameters that are numbers": persistent(b"}" + text("_parameters") + b"}" + text("a") + b"K\x01ss"),
    "a call inside of an object": persistent(b"}" + text("_parameters") + CANARY_CALL + b"s"),
    "nested: exec": loaded(old_format(b"\x80\x02" + call("builtins:exec", text(WRITE), 2) + b".")),
    "nested: a pickle alone": loaded(pickle.dumps(Call(os.system, SHELL))),
    "nested: exec in place of the magic": loaded(b"\x80\x02" + call("os:system", text(SHELL), 2) + b"." + storage()),
    "nested: what is allowed outside": loaded(old_format(b"\x80\x02" + named("collections:OrderedDict", 2) + b")R.")),
    "nested: a tensor": loaded(old_format(b"\x80\x02" + tensor() + b".")),
    "nested: itself": loaded(loaded(storage())),
    "nested: another storage": loaded(storage(name="QInt8Storage")),
    "nested: no storage": loaded(storage(name="FloatTensor")),
    "nested: the new format": loaded(b"PK\x03\x04" + bytes(64)),
    "nested: another magic number": loaded(pickle.dumps(7, 2) + storage().partition(b".")[2]),
    "nested: text": call("torch.storage:_load_from_bytes", text("x")),
    "nested: nothing": loaded(b""),
    "nested: cut": loaded(storage()[:-1]),
    "nested: more": loaded(storage() + b"x"),
    "nested: a huge count": loaded(storage(1 << 60, struct.pack("<qf", 1 << 60, 1.0))),
    "nested: a negative count": loaded(storage(-1, struct.pack("<qf", -1, 1.0))),
    "nested: two counts": loaded(storage(2, struct.pack("<qf", 1, 1.0))),
    "a tensor beyond its storage": tensor(size=(2,)),
    "a tensor before its storage": tensor(offset=-1),
    "a tensor beside its storage": tensor(offset=1),
    "a tensor of stride 0": tensor(size=(1 << 40,), stride=(0,)),
    "a tensor of negative size": tensor(size=(-1,)),
    "a tensor of negative stride": tensor(size=(1,), stride=(-1,)),
    "a tensor whose sizes overflow": tensor(size=(1 << 62, 4), stride=(1 << 62, 1)),
    "a tensor that is something else, too": tensor()[:-2] + b"}" + text("conj") + b"\x88stR",
    "a tensor of another rank": tensor(size=(1,), stride=()),
    "a parameter of text": named("torch._utils:_rebuild_parameter") + text("x") + b"\x88}\x87R",
    "numbers of another type": named("numpy:dtype") + text("O") + b"\x89\x88\x87R",
    "numbers by a long name": named("numpy:dtype") + text("f4,(1000000000,)f8") + b"\x89\x88\x87R",
    "an array beyond its bytes": NUMPY + b"(K\x01J\xff\xff\xff\x7f\x85" + DTYPE + b"\x89C\x04abcdtb",
    "an array of no type": NUMPY + b"(K\x01K\x01\x85" + text("O") + b"\x89]tb",
    "an array filled twice": NUMPY + 2 * (b"(K\x01K\x01\x85" + DTYPE + b"\x89C\x04abcdtb"),
    "the same bytes again and again": data(bytes(100_000))
    + b"q\x00"
    + 50 * (b"0" + NUMPY + b"(K\x01" + b"M\xa8a\x85" + DTYPE + b"\x89h\x00tb"),
    "the same storage again and again": data(storage(10_000, struct.pack("<q", 10_000) + bytes(40_000)))
    + b"q\x00"
    + 50 * (b"0" + named("torch.storage:_load_from_bytes", 2) + b"h\x00\x85R"),
    "a memo of four thousand million": b"Nr\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff",
    "a memo that is not there": b"h\x07",
    "a key of pairs of pairs": b"}" + doubled(40) + b"Ns",
    "a set of pairs of pairs": b"\x8f(" + doubled(40) + b"\x90",
    "modules of modules of modules": modules_doubled(60),
    "modules in themselves": named("torch.nn.modules.container:ModuleDict")
    + b")\x81q\x00}"
    + text("_modules")
    + b"}"
    + text("a")
    + b"h\x00ssb",
    "a key that cannot be one": b"}]Ns",
    "a frozen set": b"(\x91",
    "a hundred thousand marks": b"(" * 100_000,
    "a list in a list in a list": b"]" * 100_000 + b"a" * 100_000,
    "too many operations": b"N0" * (edm_pickle.OPERATIONS // 2) + b"N",
    "a huge text": b"X\xff\xff\xff\xff",
    "huge bytes": b"\x8e" + struct.pack("<Q", 1 << 50) + b"x",
    "a huge array of bytes": b"\x96" + struct.pack("<Q", 1 << 50) + b"x",
    "a huge frame": b"\x95" + struct.pack("<Q", 1 << 62),
    "a huge number": b"\x8b\xff\xff\xff\x7f",
    "a negative size": b"\x8b\xff\xff\xff\xff",
    "bad text": b"X\x01\x00\x00\x00\xff",
    "an operation that is none": b"\xff",
    "nothing on the stack": b"0",
    "no mark": b"t",
    "an odd number of items": b"}(Nu",
    "items for a number": b"K\x01(NNu",
    "another protocol": b"\x80\x07}b",
}


def wrapped(stream: bytes) -> bytes:
    """As the network of a file that is right otherwise."""
    return b"\x80\x04}" + text("ema") + stream + b"s."


def assert_refused(content: bytes) -> str:
    Path("hostile.pkl").write_bytes(content)
    with pytest.raises(fd.InputError) as caught:
        read_pickle("hostile.pkl")
    message = str(caught.value)
    assert message.startswith("hostile.pkl cannot be read as a network pickle of EDM: ")
    assert "\n" not in message
    assert len(message) < 1200
    assert os.listdir() == ["hostile.pkl"]
    return message


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_call_is_not_made(name, protocol):
    assert_refused(pickle.dumps({"ema": CALLS[name]}, protocol))


@pytest.mark.parametrize("name", STREAMS)
def test_a_hostile_stream(name):
    assert_refused(wrapped(STREAMS[name]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os:system by STACK_GLOBAL", "it names 'os.system'"),
        ("nested: exec", "it names 'builtins.exec'; such files may name torch's storages"),
        ("nested: a huge count", "a storage of 1152921504606846976 numbers in 4 bytes"),
        ("nested: another magic number", "tensors in another than torch's old format"),
        ("a tensor that is something else, too", "a tensor that is none"),
        ("a tensor of stride 0", "a tensor of 1099511627776 numbers in a storage of 1"),
        ("REDUCE of a module", "a call of torch.nn.modules.linear.Linear"),
        ("BUILD of a global with slots", "a state for a _Global"),
        ("EXT1", "the operation EXT1"),
        ("the same storage again and again", "more data than the file has"),
        ("a key of pairs of pairs", "a key of type tuple"),
        ("modules of modules of modules", "modules that hold too many others"),
        ("modules in themselves", "modules that hold too many others"),
        ("too many operations", "more than 2000000 operations"),
        ("a memo of four thousand million", "KeyError"),
    ],
)
def test_a_hostile_stream_is_refused_for_what_it_is(name, reason):
    assert reason in assert_refused(wrapped(STREAMS[name]))


def test_the_canary_sings():
    """The same forms are run by pickle itself, so that these tests would see it."""
    for content in (pickle.dumps(CALLS["exec"]), b"\x80\x04" + CANARY_CALL + b"."):
        pickle.loads(content)
        assert Path(CANARY).exists()
        Path(CANARY).unlink()


def test_what_hostile_streams_are_made_of_is_right_where_it_is_not_hostile():
    right = {
        "tensor": tensor(),
        "object": persistent(b"}"),
        "module": modules_doubled(2),
        "array": NUMPY,
        "pairs": doubled(40),
    }
    for name, stream in right.items():
        Path("right.pkl").write_bytes(wrapped(stream))
        assert list(read_pickle("right.pkl")) == ["ema"], name
    Path("right.pkl").write_bytes(wrapped(tensor()))
    assert read_pickle("right.pkl")["ema"].tolist() == [1.0]


def test_a_message_names_the_global_and_what_is_allowed():
    message = assert_refused(pickle.dumps({"ema": Call(os.system, SHELL)}))
    assert f"'{os.system.__module__}.system'" in message
    assert all(name in message for name in (*edm_pickle.MAKERS, "dnnlib.util.EasyDict", "torch.nn.modules.*"))


@pytest.mark.parametrize("content", [b"", b"\x80", b".", b"PK\x03\x04", b"N.", b"].", b"}K\x01Ns.", b"\x80\x04K\x01."])
def test_no_network_pickle(content):
    assert_refused(content)
