"""Proves the convolutions: the fused upsampling is the textbook's, packed weights give what plain ones give."""

import pytest
import torch
from graph_tools import Tape
from torch.nn import functional as F

from fastdiff.models.convolution import Conv, Downsample, Linear, Upsample, packs

F64 = torch.float64
BF16 = torch.bfloat16
needs_onednn = pytest.mark.skipif(not packs(torch.float32), reason="this PyTorch has no oneDNN")


def make(kind, *arguments, dtype=F64, **settings):
    torch.manual_seed(0)
    return kind(*arguments, **settings).to(dtype)


def image(*shape, dtype=F64, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x.to(dtype, memory_format=torch.channels_last) if len(shape) == 4 else x.to(dtype)


def largest(difference):
    return float(difference.detach().abs().max())


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 4), (7, 3)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (8, 8)], ids=str)
def test_upsampling_is_doubling_and_convolving(channels, size):
    layer, x = make(Upsample, *channels), image(2, channels[0], *size).requires_grad_()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), layer.weight, layer.bias, padding=1)
    got = layer(x)
    assert got.shape == (2, channels[1], 2 * size[0], 2 * size[1])
    assert largest(got - expected) <= 1e-13
    grad, inputs = image(*got.shape, seed=2), (x, layer.weight, layer.bias)
    for mine, true in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert largest(mine - true) <= 1e-12


def test_upsampling_brings_no_numbers_from_the_host():
    layer, x = make(Upsample, 2, 3), image(1, 2, 4, 4)
    with Tape():  # as in a graph, where that is refused
        layer(x)


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (7, 5)], ids=str)
def test_downsampling_pads_both_sides_or_right_and_below(size):
    x = image(2, 3, *size)
    both, one = make(Downsample, 3), make(Downsample, 3, 0)
    assert largest(both(x) - F.conv2d(x, both.weight, both.bias, stride=2, padding=1)) == 0
    assert largest(one(x) - F.conv2d(F.pad(x, (0, 1, 0, 1)), one.weight, one.bias, stride=2)) == 0


LAYERS = {
    "3x3": lambda: make(Conv, 8, 16, 3, padding=1, dtype=torch.float32),
    "1x1": lambda: make(Conv, 8, 16, 1, dtype=torch.float32),
    "odd": lambda: make(Conv, 3, 5, 3, padding=1, dtype=torch.float32),
    "up": lambda: make(Upsample, 8, 16, dtype=torch.float32),
    "down": lambda: make(Downsample, 8, dtype=torch.float32),
    "down to the right": lambda: make(Downsample, 8, 0, dtype=torch.float32),
}


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [(3,), (2, 7), (64, 16)], ids=str)
@pytest.mark.parametrize("added", [False, True])
@torch.no_grad()
def test_packed_matrices_compute_the_same(dtype, rows, added):
    layer, x = make(Linear, 24, 40), image(*rows, 24, dtype=dtype)
    add = image(*rows, 40, dtype=dtype, seed=2) if added else None
    true = layer(x.double(), None if add is None else add.double())
    layer.float().pack(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert largest(layer(x, add) - true) <= tolerance * largest(true)


@needs_onednn
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("size", [(2, 6, 4), (1, 2, 2), (5, 16, 16)], ids=str)
@pytest.mark.parametrize("added", [False, True])
@torch.no_grad()
def test_packed_weights_compute_the_same(name, dtype, size, added):
    if not packs(dtype):
        pytest.skip("oneDNN has no kernels for it here")
    layer = LAYERS[name]()
    n, *sides = size
    x = image(n, layer.in_channels, *sides, dtype=dtype)
    true = layer.double()(x.double())
    add = image(*true.shape, dtype=dtype, seed=3) if added else None
    true = true if add is None else true + add
    layer.float().pack(dtype)
    got = layer(x, add)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    layer.packed = None
    plain = layer(x, add)
    scale = largest(true)
    # The weights round once, to bfloat16, on both ways; a sum within the kernel rounds once where two ops round twice.
    assert largest(got - true) <= max(1.5 * largest(plain - true), 1e-6 * scale)


@torch.no_grad()
@needs_onednn
def test_packed_weights_are_those_of_the_moment():
    layer = make(Conv, 4, 4, 3, padding=1, dtype=torch.float32)
    x = image(1, 4, 5, 5, dtype=torch.float32)
    layer.pack(torch.float32)
    before = layer(x)
    layer.weight.mul_(2)
    assert torch.equal(layer(x), before)
    layer.pack(torch.float32)
    assert largest(layer(x) - layer.bias[:, None, None] - 2 * (before - layer.bias[:, None, None])) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, BF16, F64])
def test_the_input_sets_the_precision(dtype):
    x = image(1, 4, 4, 4, dtype=dtype)
    assert make(Conv, 4, 4, 1, dtype=torch.float32)(x).dtype == dtype
    assert make(Linear, 4, 4, dtype=torch.float32)(x).dtype == dtype
