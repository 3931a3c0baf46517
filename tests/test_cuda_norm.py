"""Proves the logic of the CUDA group norm without a GPU: its kernels, compiled for the host, give what the CPU's give.

Threads are fibers that meet at barriers, shared memory starts as NaN, clusters and devices of any size are made up
(``native/cuda/cuda_runtime.h``). Left for a GPU: the hardware's own exponential and its order of memory.
"""

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_tools import BF16, F16, F32, F64, FENCE, fence, lay_out, numpy_group_norm, randn, unit

from fastdiff import _C

ROOT = Path(__file__).parent.parent
FLAGS = ["-O2", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and ucontext")

# Shared memory of a block and of a multiprocessor, multiprocessors, clusters, architecture of the code; and what is
# expected of a launch there.
DEVICES = {
    "hopper": (232448, 233472, 132, 1, 90),
    "few multiprocessors": (232448, 233472, 1, 1, 90),
    "older code on hopper": (232448, 233472, 132, 1, 89),
    "ampere": (166912, 167936, 108, 0, 80),
    "clusters of small blocks": (8192, 15360, 2, 1, 90),
    "tiles in clusters": (3072, 6144, 2, 1, 90),
    "tiles": (6144, 12288, 2, 0, 75),
}
TYPES = {F32: 0, F64: 1, BF16: 2, F16: 3}
devices = pytest.mark.parametrize("device", DEVICES)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


class Launched(ctypes.Structure):
    NAMES = ("launches", "ranks", "threads", "bytes", "channels", "tiles")
    _fields_ = [
        ("blocks", ctypes.c_int64),
        *((name, ctypes.c_int) for name in NAMES),
        ("problem", ctypes.c_char_p),
    ]


class Given(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("type", "sample", "channel"))]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """``group_norm`` of the host's CUDA."""
    library = tmp_path_factory.mktemp("emulated") / "cuda_norm.so"
    native = ROOT / "tests" / "native"
    command = ["g++", *FLAGS, "-I", ROOT / "csrc", "-I", native / "cuda", native / "cuda_norm.cpp", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))


def given(tensor):
    if tensor is None:
        return Given()
    sample, channel = (0, tensor.stride(0)) if tensor.ndim == 1 else (tensor.stride(0), tensor.stride(1))
    return Given(tensor.data_ptr(), TYPES[tensor.dtype], sample, channel)


def launch(emulated, device, order, sizes, last, tensors, eps=1e-5, silu=True, moments=None, sums=None):
    """Runs a kernel on x, residual, weight, bias, scale, shift, grad, result, sum; what was launched, and the error."""
    told = Launched()
    emulated.use_device(*DEVICES[device])
    error = emulated.group_norm(
        (ctypes.c_int64 * 4)(*sizes),
        int(last),
        int(silu),
        ctypes.c_float(eps),
        (Given * 9)(*tensors),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (moments, sums)),
        list(DEVICES).index(device),
        order,
        ctypes.byref(told),
    )
    assert not told.problem, told.problem
    return told, error


def launch_on(emulated, device, order, groups, tensors, **more):
    x = tensors[0]
    sizes = (*x.shape[:2], x[0, 0].numel(), groups)
    return launch(emulated, device, order, sizes, not x.is_contiguous(), map(given, tensors), **more)


def planned(emulated, device, shape, groups, dtype=BF16, layout="channels_last", backward=False):
    """How a call would be divided; nothing runs."""
    n, channels, *positions = shape
    size = channels * math.prod(positions)
    tensor, last = Given(1 << 40, TYPES[dtype], size, 1), layout == "channels_last"
    tensors = (tensor, *(Given(),) * 5, tensor if backward else Given(), tensor, Given())
    return launch(emulated, device, 0, (n, channels, size // channels, groups), last, tensors)[0]


class Case:
    """Arguments of a call, the results of both its passes by the CPU, and what the CUDA kernels make of them."""

    def __init__(self, shape, groups, dtype=F32, layout="contiguous", parts="wbshr", silu=True, offset=0, mean=0.0):
        self.groups, self.silu, self.dtype = groups, silu, dtype
        n, channels = shape[:2]

        def like(seed, add=0.0):
            x = lay_out((randn(shape, seed, F64) + add).to(dtype), layout)
            memory = torch.full((x.numel() + 64,), torch.nan, dtype=dtype)  # whatever is read beside a tensor shows
            inner = memory[16 + offset : 16 + offset + x.numel()].as_strided(x.shape, x.stride())
            return inner.copy_(x)

        small = {
            "w": ((channels,), F32),
            "b": ((channels,), BF16),
            "s": ((n, channels), dtype),
            "h": ((n, channels), F64),
        }
        self.x, self.grad = like(0, mean), like(1)
        self.affine = [
            (randn(size, 2 + i, kind) if name in parts else None)
            for i, (name, (size, kind)) in enumerate(small.items())
        ]
        self.residual, self.more = (like(6 + i) if "r" in parts else None for i in range(2))
        self.expected = self.run(self.on_cpu)

    def run(self, passes):
        """The fenced result, sum, moments, gradient and sums of the channels."""
        n, channels = self.x.shape[:2]
        like = torch.empty_like(self.x)
        y, total, dx = (fence(like.fill_(torch.nan), 7.0) for _ in range(3))
        moments, sums = (fence(torch.full((n, size, 2), torch.nan), 7.0) for size in (self.groups, channels))
        h = self.x if self.residual is None else total[0]
        passes(y[0], None if self.residual is None else total[0], moments[0], h, dx[0], sums[0])
        made = (y, moments, dx, sums) if self.residual is None else (y, moments, dx, sums, total)
        for _, memory in made:
            assert (memory[:FENCE] == 7).all()
            assert (memory[-FENCE:] == 7).all()
        return [result for result, _ in made]

    def on_cpu(self, y, total, moments, h, dx, sums):
        w, b, s, t = self.affine
        given = (w, b, 1e-5, s, t, self.residual, self.silu)
        _C.group_norm_silu(self.x, self.groups, *given, y, total, moments, 2)
        given = (w, b, s, t, self.silu, self.more)
        _C.group_norm_silu_backward(self.grad, h, moments, self.groups, *given, dx, sums, 2)

    def on_cuda(self, emulated, device, order):
        told = []

        def passes(y, total, moments, h, dx, sums):
            more = {"silu": self.silu, "moments": moments}
            forward = (self.x, self.residual, *self.affine, None, y, total)
            backward = (h, self.more, *self.affine, self.grad, dx, None)
            for tensors, sums_ in ((forward, None), (backward, sums)):
                launched, error = launch_on(emulated, device, order, self.groups, tensors, sums=sums_, **more)
                assert error == 0
                told.append(launched)

        return self.run(passes), told

    def check(self, emulated, device):
        """Both orders of the threads give the same bits, which are the CPU's up to a rounding."""
        (first, told), (second, _) = (self.on_cuda(emulated, device, order) for order in (1, -1))
        count = self.x[0, 0].numel()
        for name, a, again, b in zip(("y", "moments", "dx", "sums", "h"), first, second, self.expected, strict=False):
            assert torch.equal(a, again), f"{name} depends on the order of the threads"
            error, size = (a.double() - b.double()).abs(), b.double().abs()
            rounding = 2.02 * unit(a.dtype) * size if a.dtype != F32 else 0
            bound = {"y": 1e-5, "moments": 1e-6, "dx": 1e-5, "sums": 2e-6 * count**0.5, "h": 0}[name]
            assert not a.isnan().any(), name
            assert (error <= bound * (1 + size) + rounding * (name != "h")).all(), f"{name} is off by {error.max()}"
        return told


SHAPES = [((2, 6, 1), 6), ((3, 12, 5, 7), 4), ((1, 36, 35), 3), ((2, 24, 10, 100), 2), ((2, 32, 4, 4), 32)]
SHAPES += [((1, 96, 16, 8), 8), ((5, 16, 1, 1), 1), ((1, 48, 8, 5), 48), ((1, 45, 9, 9), 9)]


@devices
@layouts
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_the_cuda_kernels_give_what_the_cpu_gives(emulated, device, shape, groups, layout):
    Case(shape, groups, BF16, layout).check(emulated, device)


@pytest.mark.parametrize("device", ["few multiprocessors", "clusters of small blocks", "tiles"])
@layouts
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_other_dtypes(emulated, device, shape, groups, dtype, layout):
    Case(shape, groups, dtype, layout).check(emulated, device)


@layouts
@pytest.mark.parametrize("parts", ["", "w", "b", "s", "h", "r", "wb", "sh"])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_parts_and_views_off_sixteen_bytes(emulated, parts, silu, offset, layout):
    Case((2, 24, 4, 6), 2, BF16, layout, parts, silu, offset).check(emulated, "clusters of small blocks")


# Sizes of a U-Net with 32 groups.
UNET = [(128, 32, 32), (256, 32, 32), (384, 32, 32), (256, 16, 16), (512, 16, 16), (512, 8, 8), (256, 4, 4)]


@pytest.mark.parametrize("shape", [UNET[0], UNET[2], UNET[5]], ids=str)
def test_samples_of_a_unet(emulated, shape):
    Case((1, *shape), 32, BF16, "channels_last").check(emulated, "few multiprocessors")


@pytest.mark.parametrize("shape", UNET, ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch", [1, 64, 1024])
def test_samples_of_a_unet_stay_on_chip(emulated, shape, backward, batch):
    """One tile in each block: device memory is read once and written once. Rows have 128 bytes, and two blocks fit."""
    told = planned(emulated, "hopper", (batch, *shape), 32, backward=backward)
    assert (told.tiles, told.launches) == (1, 1)
    assert told.channels * 2 >= 128
    assert 2 * (told.bytes + 1024) <= DEVICES["hopper"][1]
    assert told.blocks >= min(132, batch * 8) or math.prod(shape) <= 8192


@pytest.mark.parametrize("shape", UNET, ids=str)
@pytest.mark.parametrize("device", ["ampere", "tiles"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_cluster_where_there_are_none(emulated, shape, device, backward, layout):
    told = planned(emulated, device, (64, *shape), 32, F32, layout, backward)
    assert told.ranks == 1
    assert told.bytes <= DEVICES[device][0]
    assert told.tiles == 1 or device == "tiles" or backward
    assert told.channels * 4 >= 32 or layout == "contiguous"


def test_every_way_through_the_kernels_is_taken_above(emulated):
    """Clusters of each size; and in both layouts one block and eight, with one tile and with many."""
    ways = set()
    for device in DEVICES:
        for shape, groups in SHAPES:
            for layout in ("contiguous", "channels_last"):
                told = planned(emulated, device, shape, groups, BF16, layout)
                assert told.bytes <= DEVICES[device][0]
                ways.add((layout, told.ranks, told.tiles > 1))
    assert {ranks for _, ranks, _ in ways} == {1, 2, 4, 8}
    assert {(layout, n, more) for layout in ("contiguous", "channels_last") for n in (1, 8) for more in (0, 1)} <= ways


@pytest.mark.parametrize("shape", [(2**31 + 5, 1, 1), (2**29, 8, 1), (3, 2**20, 2**10)], ids=str)
@layouts
def test_grids_beyond_31_bits_are_several(emulated, shape, layout):
    told = planned(emulated, "hopper", shape, shape[1], layout=layout)
    assert told.launches == 1 + (told.blocks - 1) // (2**31 - 1)
    assert told.blocks >= shape[0]


@layouts
@devices
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_nothing_cancels_at_large_means(emulated, ratio, device, layout):
    case = Case((1, 12, 20, 30), 3, F32, layout, "", False, mean=ratio)
    y, moments = case.on_cuda(emulated, device, 1)[0][:2]
    truth, _ = numpy_group_norm(case.x, case.groups)
    eager = torch.nn.functional.group_norm(case.x.contiguous(), case.groups)
    error, theirs = (float(abs(v.double().contiguous().numpy() - truth).max()) for v in (y, eager))
    assert error <= min(8 * unit(F32) * (4 + ratio), 2 * theirs + 4 * unit(F32))
    flat = case.x.double().reshape(1, 3, -1)
    assert ((moments[..., 1] * flat.std(2, correction=0) - 1).abs() <= 2e-6 + 1e-5).all()


@layouts
def test_means_that_differ_between_blocks_and_tiles_do_not_cancel(emulated, layout):
    """The positions lie around means that are 1e4 deviations apart: what is merged is far from what each has."""
    case = Case((1, 8, 64, 10), 2, F32, layout, "", False)
    case.x += 1e4 * torch.arange(64.0)[:, None]
    truth, _ = numpy_group_norm(case.x, case.groups)
    for device in DEVICES:
        y = case.on_cuda(emulated, device, 1)[0][0]
        assert abs(y.double().contiguous().numpy() - truth).max() <= 2e-6


def test_samples_that_lie_far_apart(emulated):
    """More than 2^32 elements from one to the next, of which none but theirs are touched."""
    stride, shape = 2**32 + 64, (2, 8, 3, 5)
    memory = torch.empty(stride + 120, dtype=BF16)
    strided = {"size": shape, "stride": (stride, 1, 40, 8)}
    near = lay_out(randn(shape, 0, BF16), "channels_last")
    far, y, y_near = memory.as_strided(**strided), torch.empty_like(near), torch.empty_like(near)
    far.copy_(near)
    for x, result in ((far, y), (near, y_near)):
        assert launch_on(emulated, "hopper", 1, 2, (x, *(None,) * 6, result, None))[1] == 0
    assert torch.equal(y, y_near)
    far.fill_(torch.nan)
    launch_on(emulated, "hopper", 1, 2, (near, *(None,) * 6, far, None))
    assert torch.equal(far, y)


def test_groups_that_do_not_fit_are_refused(emulated):
    x = randn((1, 4096, 1), 0)
    y = torch.empty_like(x)
    assert launch_on(emulated, "tiles", 1, 1, (x, *(None,) * 6, y, None))[1] == -1
    assert launch_on(emulated, "hopper", 1, 1, (x, *(None,) * 6, y, None))[1] == 0
    assert torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 1)), atol=1e-5)
