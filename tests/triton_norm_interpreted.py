"""The group norm's Triton kernels under Triton's interpreter; run by test_triton.py in a process of its own.

The contract's own tests run here on the Triton backend, in registers and in chunks, beside those of the two bodies.
"""

import math

import numpy as np
import op_tools
import pytest
import test_ops_norm
import torch
import triton
import triton.language as tl
from op_tools import BF16, F16, F32, F64, FENCE, assert_same_bits, exact, fence, lay_out, randn, unit
from test_ops_norm import (  # noqa: F401
    check_gradients,
    test_a_compiled_group_norm_is_eager_s,
    test_a_constant_group_is_its_bias,
    test_a_gradient_of_the_sum_alone_and_of_nothing_else,
    test_groups_of_one_element_are_their_bias,
    test_no_elements_have_gradients_of_zero,
)
from triton.runtime import interpreter

import fastdiff as fd
from fastdiff.errors import InputError, Refused
from fastdiff.ops import reference
from fastdiff.ops import triton as backend
from fastdiff.ops.triton import maths, norm, norm_bodies

CONVERT = interpreter._convert_float
DENSE = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what overflows as it should


def often(cases, count):
    """All of the cases, but those after the first so many only with the slow tests."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (i >= count)) for i, case in enumerate(cases)]


def convert(values, from_dtype, to_dtype, mode):
    """Triton's interpreter truncates to bfloat16, where a GPU rounds."""
    if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
        return CONVERT(values, from_dtype, to_dtype, mode)
    return torch.from_numpy(np.array(values)).to(BF16).view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(params=["registers", "chunks"], autouse=True)
def each_backend(request, monkeypatch):
    """Triton, in tiles that stay in registers and in chunks; several chunks and several of their joins."""
    monkeypatch.setattr(op_tools, "BACKENDS", ("reference", "triton"))
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    if request.param == "chunks":
        for name, value in {"FORWARD": 0, "BACKWARD": 0, "CHUNK": 32, "JOINED": 4}.items():
            monkeypatch.setattr(norm_bodies, name, value)
    with fd.backend("triton"):
        yield request.param


# ---- the contract ---------------------------------------------------------------------------

SHAPES = [((1, 3, 7, 5), 3, F32), ((2, 6, 7, 5), 2, BF16), ((1, 32, 5, 3), 8, F16), ((2, 24, 3, 4), 2, F32)]
SHAPES += [((1, 32, 3, 7), 2, BF16), ((1, 24, 9), 1, F16), ((2, 36, 1, 1), 3, F32), ((1, 22, 3, 3), 22, BF16)]
SHAPES += [((0, 4, 3, 3), 2, F32), ((2, 4, 3, 2, 3), 2, F16), ((2, 11), 11, F32), ((2, 3, 1, 1), 1, BF16)]
PARTS = [("", F32, "silu"), ("wb", BF16, "silu"), ("sh", F16, "none"), ("wbsh", F32, "none"), ("r", BF16, "silu")]
PARTS += [("w", F16, "silu"), ("bs", F32, "silu"), ("hr", F32, "none")]


@pytest.mark.parametrize(("shape", "groups", "dtype"), often(SHAPES, 2), ids=str)
@DENSE
def test_groups_of_any_width(shape, groups, dtype, layout):
    op_tools.check_group_norm(shape, groups, dtype, layout, "wbshr")
    if shape[0]:
        check_gradients(shape, groups, dtype, layout, "wbshr", "silu")


@pytest.mark.parametrize("layout", often([(layout,) for layout in op_tools.LAYOUTS[::-1]], 2))
def test_layouts(layout):
    op_tools.check_group_norm((2, 6, 4, 3), 2, layout=layout, parts="wbshr")
    check_gradients((2, 6, 4, 3), 2, F32, layout, "wbshr", "silu")


@pytest.mark.parametrize(("parts", "dtype", "activation"), often(PARTS[::-1], 1))
@DENSE
def test_each_part(parts, dtype, activation, layout):
    op_tools.check_group_norm((2, 6, 5, 7), 3, dtype, layout, parts, activation)
    check_gradients((2, 6, 5, 7), 3, dtype, layout, parts, activation)


@DENSE
@pytest.mark.parametrize("ratio", often([(1e4,), (0,)], 1))
def test_large_means(layout, ratio):
    test_ops_norm.test_group_norm_does_not_cancel_at_large_means(ratio, layout)
    test_ops_norm.test_group_norm_does_not_cancel_on_planes_of_one_element(max(ratio, 1), layout)


# ---- the bodies -----------------------------------------------------------------------------


def vectors(shape, seed, dtype=F32):
    """Weight and bias, and a scale and a shift that are halves of one tensor, all of them strided."""
    weight, bias = randn((2 * shape[1], 2), seed, dtype)[::2].T
    scale, shift = randn((shape[0], 2 * shape[1]), seed + 1, dtype).chunk(2, 1)
    return weight, bias, scale, shift


def forward(body, x, groups, weight, bias, scale, shift, residual=None, keep=True, silu=True):
    """The result, the moments and, if kept, the sum; between fences."""
    form = {"memory_format": torch.channels_last} if not x.is_contiguous() else {}
    tensors = [torch.full_like(x, math.nan, **form), torch.full((len(x), groups, 2), math.nan)]
    tensors += [torch.full_like(x, math.nan, **form)] if keep else []
    fenced = [fence(t, 7.0) for t in tensors]
    (result, _), (moments, _), *total = fenced
    total = total[0][0] if keep else None
    body.group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, residual, silu, result, total, moments)
    return within_fences(fenced)


def backward(body, grad, h, moments, groups, weight, bias, scale, shift, more=None, silu=True):
    """The gradient and the sums, between fences."""
    fenced = [fence(torch.full_like(h, math.nan), 7.0), fence(torch.full((*h.shape[:2], 2), math.nan), 7.0)]
    (result, _), (sums, _) = fenced
    body.group_norm_silu_backward(grad, h, moments, groups, weight, bias, scale, shift, silu, more, result, sums)
    return within_fences(fenced)


def within_fences(fenced):
    for _, memory in fenced:
        assert (memory[:FENCE] == 7).all()
        assert (memory[memory.numel() - FENCE :] == 7).all()
    return [t for t, _ in fenced]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        error = (a.double() - b.double()).abs().max() if a.numel() else 0
        assert error <= (4e-6 + 2 * unit(a.dtype) * (a.dtype != F32)) * (1 + b.double().abs().max())


@pytest.mark.parametrize(("dtype", "numbers"), often([(BF16, BF16), (F32, F64), (F16, F32)], 1))
@DENSE
@pytest.mark.parametrize("keep", [False, True])
def test_forward_is_the_reference_s(dtype, numbers, layout, keep):
    shape, groups = (2, 6, 7, 5), 2
    x, residual = (fence(lay_out(randn(shape, i, dtype), layout), math.nan)[0] for i in range(2))
    given = (x, groups, *vectors(shape, 3, numbers), residual, keep)
    ours, again, theirs = (forward(body, *given) for body in (backend, backend, reference))
    assert_close(ours, theirs)
    assert_same_bits(ours, again)
    if keep:
        assert_same_bits(ours[2], x + residual)


@pytest.mark.parametrize(("dtype", "silu"), often([(F32, True), (BF16, True), (F32, False), (F16, True)], 2))
@DENSE
@pytest.mark.parametrize("with_more", [False, True])
def test_backward_is_the_reference_s(dtype, silu, layout, with_more):
    shape, groups = (2, 6, 7, 5), 2
    h, grad, more = (fence(lay_out(randn(shape, i, dtype), layout), math.nan)[0] for i in range(3))
    moments = forward(reference, h, groups, *(None,) * 4, keep=False)[1]
    given = (grad, h, moments, groups, *vectors(shape, 3), more if with_more else None, silu)
    ours, again, theirs = (backward(body, *given) for body in (backend, backend, reference))
    assert_close(ours, theirs)
    assert_same_bits(ours, again)


@DENSE
@pytest.mark.parametrize("ratio", often([(1e4,), (0,), (1e2,)], 1))
def test_moments_at_large_means(layout, ratio):
    x = lay_out(randn((2, 12, 9, 11), 3) + ratio, layout)
    _, moments = forward(backend, x, 3, *(None,) * 4, keep=False)
    grouped = exact(x).reshape(2, 3, -1)
    mean, std = grouped.mean(2), np.sqrt(grouped.var(2) + np.longdouble(1e-5))
    assert (np.abs(exact(moments[..., 0]) - mean) <= unit(F32) * (np.abs(mean) + 0.5)).all()
    assert (np.abs(exact(moments[..., 1]) * std - 1) <= 8 * unit(F32)).all()


def test_arguments_that_lie_otherwise():
    """Each is brought to the layout of the result; conjugate views' negative bit counts."""
    shape, groups = (2, 6, 4, 5), 3
    x = lay_out(randn(shape, 0), "channels_last")
    for other in ("sliced", "transposed", "expanded", "contiguous"):
        r = lay_out(randn(shape, 1), other)
        result, _ = forward(backend, x, groups, *(None,) * 4, r, keep=False)
        assert_close([result], [reference.group_norm(x, groups, None, None, 1e-5, None, None, r, True)[0]])
    negative = torch.complex(randn(shape, 2), randn(shape, 3)).conj().imag
    assert negative.is_neg()
    weight = torch.complex(*randn((2, 6), 4)).conj().imag
    ours = fd.ops.group_norm_silu(negative, groups, weight)
    assert_close([ours], [reference.group_norm(negative, groups, weight, None, 1e-5, None, None, None, True)[0]])


def test_no_elements():
    x, moments, sums = torch.zeros(2, 4, 0, 3), torch.zeros(2, 2, 2), torch.full((2, 4, 2), math.nan)
    backend.group_norm_silu(x, 2, *(None,) * 2, 1e-5, *(None,) * 3, True, x, None, moments)
    assert moments.isnan().all()
    backend.group_norm_silu_backward(x, x, moments, 2, *(None,) * 4, True, None, x, sums)
    assert not sums.any()


def test_what_is_not_a_number_stays_in_its_group():
    x = randn((2, 4, 3, 3), 0)
    x[0, 1, 0, 0], x[1, 3, 2, 2] = math.nan, math.inf
    result = fd.ops.group_norm_silu(x, 2)
    bad = result.isnan().flatten(2).all(2)
    assert bad.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert result[0, 2:].isfinite().all()


def test_what_it_refuses():
    x, double = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=F64)
    for given, result in ((x, x.half()), (double, double), (x, torch.zeros(2, 4, 3, 6)[..., ::2])):
        with pytest.raises(Refused):
            forward_into(given, result, None)
    with pytest.raises(Refused):
        forward_into(x, x.clone(), lay_out(x, "channels_last"))
    with pytest.raises(Refused, match="channels to a group"):
        forward_into(torch.zeros(1, 32769), torch.zeros(1, 32769), None)
    with pytest.raises(InputError, match="float64"):
        fd.ops.group_norm_silu(double, 2)


def forward_into(x, result, total):
    backend.group_norm_silu(x, 1, None, None, 1e-5, None, None, None, True, result, total, None)


# ---- the parts ------------------------------------------------------------------------------


@triton.jit
def elements_of(result, sample, chunk, position, channel, positions, S: tl.constexpr):
    rows, own = tl.arange(0, S.P) < S.P, tl.arange(0, S.K) < S.K
    row, column = position + tl.arange(0, S.P), channel + tl.arange(0, S.K)
    tile = norm.Tile(tl.full([], sample, tl.int64), chunk, row, rows, column, own, None, None)
    at, _ = norm.elements(tile, positions, S)
    tl.store(result + tl.arange(0, S.P)[:, None] * S.K + tl.arange(0, S.K)[None, :], at)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("sample", "position", "channel"), [(0, 3, 2), (70_000, 5, 1), (3, 2**22 - 2, 1020)])
def test_elements_far_beyond_the_range_of_int32(last, sample, position, channel):
    channels, positions, result = 1024, 2**22, torch.empty(2, 4, dtype=torch.int64)
    spec = norm.Spec(channels, 4, 1, 2, 4, 1, last, True)
    elements_of[(1,)](result, sample, 0, position, channel, positions, S=spec)
    p, c = position + torch.arange(2)[:, None], channel + torch.arange(4)
    inner = p * channels + c if last else c * positions + p
    assert torch.equal(result, sample * channels * positions + inner)


@triton.jit
def activations(z, value, slope, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(value + at, maths.silu(tl.load(z + at)))
    tl.store(slope + at, maths.silu_slope(tl.load(z + at)))


def test_silu_and_its_slope():
    z = torch.linspace(-95, 95, 4096, dtype=F64).float()
    z[:4] = torch.tensor([0.0, -0.0, 3e38, math.nan])
    value, slope = torch.empty(2, 4096)
    activations[(1,)](z, value, slope, BLOCK=4096)
    wide = z.double()
    s = wide.sigmoid()
    torch.testing.assert_close(value.double(), wide * s, rtol=4e-7, atol=1e-35, equal_nan=True)
    torch.testing.assert_close(slope.double(), s * (1 + wide * (1 - s)), rtol=2e-6, atol=1e-6, equal_nan=True)
