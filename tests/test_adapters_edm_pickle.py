"""Network pickles as EDM and EDM2 write them, read bit for bit with nothing of theirs imported."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.adapters import edm_pickle
from fastdiff.adapters.edm import PickledObject, read_pickle

pytestmark = pytest.mark.usefixtures("one_thread")

CANARY = "canary"  # a file that hostile pickles try to write, in the directory that a test runs in
SOURCE = f"open({CANARY!r}, 'w').close()  # whoever executes this module leaves a trace\n"

# ---- the real format, written by classes that stand for theirs ---------------------------------


class EasyDict(dict):
    """dnnlib's dict."""


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("their loader was called")


class Persistent:
    """Pickled as a persistent class is: by source text, name and state."""

    def __reduce__(self) -> Any:
        state = dict(self.__dict__)
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": type(self).__name__, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


class Layer(Persistent, nn.Module):
    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (width,), {"bias": bias}
        self.weight = nn.Parameter(torch.randn(width, width + 1))
        self.bias = nn.Parameter(torch.randn(width)) if bias else None
        self.register_buffer("resample_filter", torch.rand(1, 1, 2, 2))
        self.register_buffer("none", None)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


class Precond(Persistent, nn.Module):
    def __init__(self, img_resolution: int, label_dim: int = 0, **kwargs: Any) -> None:
        super().__init__()
        self._init_args = (img_resolution,)
        self._init_kwargs = {"label_dim": label_dim, **kwargs}
        self.img_resolution, self.label_dim, self.sigma_max = img_resolution, label_dim, float("inf")
        self.skip = None
        self.gain = nn.Parameter(torch.tensor(float("nan")))
        self.enc = nn.ModuleDict({"8x8_conv": Layer(3), "8x8_block0": Layer(2, bias=False)})
        self.more = nn.ModuleList([Layer(1), nn.Identity(), nn.Sequential(Layer(2))])
        self.register_buffer("steps", torch.arange(5))


class Loss(Persistent):
    def __init__(self) -> None:
        self.P_mean, self._init_args, self._init_kwargs = -1.2, (), {}


class Encoder(Persistent):
    def __init__(self) -> None:
        self.scale, self.std = np.float32([1.5, -0.25]), np.float64(0.1)
        self.order, self.none = np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 3), np.float16)
        self._init_args = self._init_kwargs = None


@pytest.fixture
def written() -> Iterator[None]:
    """Their modules, so that pickle finds the names; a test removes them before it reads."""
    modules = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib.util")}
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    modules["dnnlib"] = types.ModuleType("dnnlib")
    names = (_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")
    own = _reconstruct_persistent_obj.__module__
    sys.modules.update(modules)
    for named, module in names:
        named.__module__ = module
    yield
    for named, _ in names:
        named.__module__ = own
    gone(modules)


def gone(names: Any = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")) -> None:
    for name in names:
        sys.modules.pop(name, None)


def network(dtype: torch.dtype = torch.float32) -> Precond:
    torch.manual_seed(0)
    return Precond(8, label_dim=10, channel_mult=[1, 2], nested={"a": (1, None, b"x")}).eval().to(dtype)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    alike = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
    return alike and ours.contiguous().numpy(force=True).tobytes() == theirs.detach().contiguous().numpy().tobytes()


def assert_read(file: Path, net: Precond, entry: str = "ema") -> PickledObject:
    gone()
    data = read_pickle(file)
    read, state = data[entry], net.state_dict()
    assert list(read.tensors) == list(state)
    assert all(same_bits(tensor, state[name]) for name, tensor in read.tensors.items())
    assert not any(tensor.requires_grad for tensor in read.tensors.values())
    assert (read.class_name, read.source) == ("Precond", SOURCE)
    assert (read.args, read.kwargs) == (net._init_args, net._init_kwargs)
    assert not Path(CANARY).exists()
    fresh = Precond(*read.args, **read.kwargs).to(net.gain.dtype)
    fresh.load_state_dict(read.tensors)
    assert all(same_bits(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    return read


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_edm(protocol):
    net, settings = network(), {"path": "cifar10.zip", "use_labels": True, "xflip": False, "max_size": 50_000}
    file, data = Path("edm.pkl"), {"ema": net, "loss_fn": Loss(), "augment_pipe": None, "dataset_kwargs": settings}
    file.write_bytes(pickle.dumps(data, protocol))
    read = assert_read(file, net)
    assert read.state["img_resolution"] == 8
    assert read.state["sigma_max"] == float("inf")
    whole = read_pickle(file)
    assert list(whole) == list(data)
    assert whole["dataset_kwargs"] == settings
    assert whole["augment_pipe"] is None
    loss = whole["loss_fn"]
    assert (loss.class_name, loss.state["P_mean"], loss.tensors, loss.args, loss.kwargs) == ("Loss", -1.2, {}, (), {})


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_edm2(protocol):
    net, encoder, file = network(torch.float16), Encoder(), Path("edm2.pkl")
    data = EasyDict(encoder=encoder, dataset_kwargs=EasyDict(path="x"), loss_fn=Loss(), ema=net)
    file.write_bytes(pickle.dumps(data, protocol))
    assert_read(file, net)
    read = read_pickle(file)["encoder"]
    assert (read.args, read.kwargs) == ((), {})
    for name in ("scale", "std", "order", "none"):
        ours, theirs = read.state[name], getattr(encoder, name)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        assert type(ours) is type(theirs)
    assert read.state["order"].flags.f_contiguous
    assert type(read_pickle(file)["dataset_kwargs"]) is dict


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("dtype", [*edm_pickle.STORAGES.values()], ids=str)
def test_every_dtype_and_every_view(dtype):
    base = (torch.arange(24) % 7).to(dtype)
    views = {
        "whole": base,
        "turned": base.reshape(4, 6).t(),
        "part": base[5:17:3],
        "scalar": base[3],
        "empty": base[:0].reshape(0, 3),
        "channels_last": base.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    Path("views.pkl").write_bytes(pickle.dumps({"views": views}))
    read = read_pickle("views.pkl")["views"]
    for name, theirs in views.items():
        assert read[name].dtype == dtype
        assert read[name].stride() == theirs.stride()
        assert torch.equal(
            read[name].contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8)
        )


@pytest.mark.usefixtures("written")
def test_modules_that_are_shared_have_both_names_and_odd_values_keep_their_bits():
    net = network()
    net.enc["again"] = net.more[0]
    net.enc["8x8_conv"].weight.data[0] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    file = Path("shared.pkl")
    file.write_bytes(pickle.dumps({"net": net}))
    gone()
    read, state = read_pickle(file)["net"].tensors, net.state_dict()
    assert list(read) == list(state)
    assert all(same_bits(tensor, state[name]) for name, tensor in read.items())


@pytest.mark.usefixtures("written")
def test_what_is_read_is_there_to_change():
    """And does not share memory with the file or with another reading."""
    Path("edm.pkl").write_bytes(pickle.dumps({"ema": network()}))
    first, second = (read_pickle("edm.pkl")["ema"].tensors["enc.8x8_conv.weight"] for _ in range(2))
    first.add_(1)
    assert not torch.equal(first, second)
    gc.collect()
    assert torch.equal(second, network().enc["8x8_conv"].weight)


@pytest.mark.usefixtures("written")
def test_every_cut_and_many_flips():
    """A file that is cut anywhere is refused; one whose bits flip is refused or read, and nothing else."""
    layer = Layer(1)
    whole = pickle.dumps({"ema": layer})
    gone()
    for end in range(0, len(whole), 7):
        Path("cut.pkl").write_bytes(whole[:end])
        with pytest.raises(fd.InputError, match=r"cut\.pkl cannot be read as a network pickle of EDM: "):
            read_pickle("cut.pkl")
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 500).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        Path("flipped.pkl").write_bytes(damaged)
        with suppress(fd.InputError):
            read_pickle("flipped.pkl")
    assert sorted(os.listdir()) == ["cut.pkl", "flipped.pkl"]


def test_a_file_that_is_not_there():
    with pytest.raises(fd.InputError, match="does not exist"):
        read_pickle("none.pkl")


def test_an_object_that_is_changed_after_it_was_read():
    for name in ("_init_args", "_init_kwargs"):
        with pytest.raises(fd.InputError, match=name):
            _ = getattr(PickledObject("N", state={name: 1}), name.removeprefix("_init_"))
