"""Proves group_norm_silu against two passes in extended precision; at large means too."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from op_tools import (
    BF16,
    F16,
    F32,
    F64,
    FENCE,
    LAYOUTS,
    assert_kept_format,
    assert_within,
    check_group_norm,
    exact,
    fence,
    lay_out,
    numpy_group_norm,
    randn,
    unit,
)

import fastdiff as fd
from fastdiff import _C, backends
from fastdiff.ops import library

layouts = pytest.mark.parametrize("layout", LAYOUTS)


GROUPED = [((0, 4, 3, 3), 2), ((2, 3, 1, 1), 1), ((3, 6, 5), 3), ((2, 4, 3, 2, 3), 2), ((2, 6, 7, 5), 3), ((2, 8), 2)]
GROUPED += [((1, 8, 16, 16), 8), ((2, 5, 3, 3), 5), ((2, 7, 3), 1), ((1, 64, 8, 8), 32)]


@pytest.mark.parametrize(("shape", "groups"), GROUPED, ids=str)
@layouts
def test_group_norm_shapes_and_layouts(shape, groups, layout):
    check_group_norm(shape, groups, layout=layout)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_group_norm_dtypes(dtype, activation):
    check_group_norm((2, 8, 5, 3), 4, dtype, activation=activation)


@pytest.mark.parametrize("parts", ["", "w", "b", "wb", "s", "h", "sh", "ws", "bh", "r", "wbshr"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_group_norm_with_and_without_each_part(parts, layout, dtype):
    check_group_norm((2, 6, 4, 3), 2, dtype, layout=layout, parts=parts)


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 320, 20, 17), 32), ((3, 96, 9, 33), 32), ((2, 512, 8, 8), 32)], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_of_many_pieces(shape, groups, layout):
    """Several pieces of rows and of runs, fewer samples than threads, widths that no vector divides."""
    check_group_norm(shape, groups, layout=layout)
    check_gradients(shape, groups, F32, layout, "wbshr", "silu")


def formula(x, groups, weight, bias, scale, shift, residual, activation):
    """In float64, by torch's own operations: the result and the sum."""
    h = x if residual is None else x + residual
    y = torch.nn.functional.group_norm(h.contiguous(), groups, weight, bias, 1e-5)
    each = (*y.shape[:2], *(1,) * (y.ndim - 2))
    y = y if scale is None else y * (1 + scale.reshape(each))
    y = y if shift is None else y + shift.reshape(each)
    return (torch.nn.functional.silu(y) if activation == "silu" else y), h


def check_gradients(shape, groups, dtype, layout, parts, activation, keep_sum=True):
    """Every gradient against float64; a half-precision sum is rounded before it is normalised."""
    names, sizes = ["x", "w", "b", "s", "h", "r"], (shape, shape[1:2], shape[1:2], shape[:2], shape[:2], shape)
    tensors = [
        lay_out(randn(size, i, dtype), layout) if size == shape else randn(size, i) for i, size in enumerate(sizes)
    ]
    tensors = [t if name == "x" or name in parts else None for name, t in zip(names, tensors, strict=True)]
    grads = [lay_out(randn(shape, 7 + i, dtype), layout) for i in range(2)]
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    x, w, b, s, h, r = leaves
    more = {"scale": s, "shift": h, "residual": r, "activation": activation, "keep_sum": True}
    y, total = fd.ops.group_norm_silu(x, groups, w, b, **more)
    wanted = [t for t in leaves if t is not None]
    ours = torch.autograd.grad((y, total) if keep_sum else y, wanted, grads if keep_sum else grads[0])
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, w, b, s, h, r = wide
    rounded = None if r is None else r + ((tensors[0] + tensors[5]).double() - (x + r)).detach()
    results = formula(x, groups, w, b, s, h, rounded, activation)
    wanted = [t for t in wide if t is not None]
    truth = torch.autograd.grad(
        results if keep_sum else results[0], wanted, [g.double() for g in grads[: 1 + keep_sum]], retain_graph=True
    )
    for name, a, t in zip([n for n, v in zip(names, tensors, strict=True) if v is not None], ours, truth, strict=True):
        size = t.abs().max()
        assert a.dtype == (dtype if name in "xr" else F32)
        assert (a.double() - t).abs().max() <= (3e-6 + 2 * unit(a.dtype) * (a.dtype != F32)) * (1 + size), name
        if name == "x":
            assert_kept_format(a, layout)


@pytest.mark.parametrize("parts", ["", "wb", "sh", "wbsh", "r", "wbshr"])
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_gradients_of_group_norm(parts, activation, layout, dtype, each_backend):
    check_gradients((2, 6, 5, 7), 3, dtype, layout, parts, activation)


@pytest.mark.parametrize(("shape", "groups"), GROUPED[1:], ids=str)
def test_gradients_of_group_norm_shapes(shape, groups, each_backend):
    check_gradients(shape, groups, F32, "contiguous", "wbshr", "silu", keep_sum=False)


def test_a_gradient_of_the_sum_alone_and_of_nothing_else(each_backend):
    x, r = (randn((2, 4, 3), i).requires_grad_() for i in range(2))
    _, total = fd.ops.group_norm_silu(x, 2, residual=r, keep_sum=True)
    assert all(torch.equal(g, torch.ones_like(x)) for g in torch.autograd.grad(total.sum(), (x, r)))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_no_elements_have_gradients_of_zero(shape):
    x, w = torch.zeros(shape, requires_grad=True), torch.ones(4, requires_grad=True)
    gx, gw = torch.autograd.grad(fd.ops.group_norm_silu(x, 2, w).sum(), (x, w))
    assert gx.shape == x.shape
    assert not gw.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("channels", "groups"), [(48, 16), (52, 13), (7, 7)])
def test_every_level_and_any_number_of_threads_give_the_same_bits(layout, dtype, batch, channels, groups):
    x, w, b = lay_out(randn((batch, channels, 23, 29), 0, dtype), layout), randn((channels,), 1), randn((channels,), 2)
    grad = lay_out(randn(x.shape, 3, dtype), layout)
    results = []
    for level in _C.levels():
        for threads in (1, 2, 3):
            _C.use(level)
            y, dx = torch.empty_like(x), torch.empty_like(x)
            moments, sums = torch.empty(batch, groups, 2), torch.empty(batch, channels, 2)
            _C.group_norm_silu(x, groups, w, b, 1e-5, None, None, None, True, y, None, moments, threads)
            _C.group_norm_silu_backward(grad, x, moments, groups, w, b, None, None, True, None, dx, sums, threads)
            results.append((y, moments, dx, sums))
    _C.use(_C.levels()[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_lie_between_their_fences(layout):
    x, r = (lay_out(randn((3, 12, 7, 5), i), layout) for i in range(2))
    y, total, dx = (fence(torch.full_like(x, np.nan), 7.0) for _ in range(3))
    moments, sums = (fence(torch.full((3, size, 2), np.nan), 7.0) for size in (4, 12))
    none = (None,) * 4
    _C.group_norm_silu(fence(x, np.nan)[0], 4, *none[:2], 1e-5, *none[:2], r, True, y[0], total[0], moments[0], 2)
    _C.group_norm_silu_backward(y[0], total[0], moments[0], 4, *none, True, None, dx[0], sums[0], 2)
    for result, memory in (y, total, dx, moments, sums):
        assert result.isfinite().all()
        assert (memory[:FENCE] == 7).all()
        assert (memory[-FENCE:] == 7).all()


@pytest.mark.usefixtures("each_backend")
def test_a_compiled_group_norm_is_eager_s():
    x, w, b = (randn(s, i).requires_grad_() for i, s in enumerate([(2, 6, 5, 5), (6,), (6,)]))

    def block(x, w, b):
        y, total = fd.ops.group_norm_silu(x.sin(), 3, w, b, residual=x, keep_sum=True)
        return (y + total).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for f in (block, compiled):
        found = [f(x, w, b), *torch.autograd.grad(f(x, w, b), (x, w, b))]
        for a, t in zip(found, [block(x, w, b), *torch.autograd.grad(block(x, w, b), (x, w, b))], strict=True):
            torch.testing.assert_close(a, t)


@pytest.mark.parametrize(("shape", "groups"), [((1, 1), 1), ((1, 4, 1, 1), 4), ((2, 4, 1, 1), 4)])
def test_groups_of_one_element_are_their_bias(shape, groups):
    x, bias = randn(shape, 0), randn(shape[1:2], 1)
    result = fd.ops.group_norm_silu(x, groups, None, bias, activation="none")
    rounding = 4 * unit(F32) * (1 + x.abs() / 1e-5**0.5)
    assert ((result.flatten(1) - bias).abs() <= rounding.flatten(1)).all()


def test_a_constant_group_is_its_bias():
    bias = randn((4,), 1)
    result = fd.ops.group_norm_silu(torch.full((2, 4, 5, 5), 7.0), 2, torch.ones(4), bias, activation="none")
    assert (result - bias[:, None, None]).abs().max() <= 4 * unit(F32) * 7 / 1e-5**0.5


def norm_error(x, groups, result):
    return float(np.abs(exact(result) - numpy_group_norm(x, groups)[0]).max())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("ratio", [0, 1, 10, 100, 1e3, 1e4])
def test_group_norm_does_not_cancel_at_large_means(ratio, layout):
    x = lay_out(randn((2, 8, 16, 16), 3) + ratio, layout)
    error = norm_error(x, 4, fd.ops.group_norm_silu(x, 4, activation="none"))
    assert error <= 8 * unit(F32) * (4 + ratio)
    eager = norm_error(x, 4, torch.nn.functional.group_norm(x.contiguous(), 4))
    assert error <= 2 * eager + 4 * unit(F32)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_group_norm_statistics_are_not_taken_in_half_precision(dtype):
    x = (randn((2, 4, 16, 16), 5) * 100 + 200).to(dtype)
    truth, _ = numpy_group_norm(x, 2)
    assert_within(fd.ops.group_norm_silu(x, 2, activation="none"), truth, 1.01 * unit(dtype) * np.abs(truth) + 1e-5)


def test_each_sample_is_normalised_alone():
    x = randn((5, 6, 4, 4), 0)
    whole = fd.ops.group_norm_silu(x, 3)
    for k in range(5):
        assert (whole[k] - fd.ops.group_norm_silu(x[k : k + 1], 3)[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_group_norm_does_not_cancel_on_planes_of_one_element(ratio, layout):
    """Such a tensor is contiguous in both formats, and ATen may take the wrong one."""
    x = lay_out(randn((2, 64, 1, 1), 3) + ratio, layout)
    error = norm_error(x, 2, fd.ops.group_norm_silu(x, 2, activation="none"))
    assert error <= 8 * unit(F32) * (4 + ratio)


def test_the_backward_pass_runs_on_the_backend_of_the_forward_pass(monkeypatch, each_backend):
    """On a GPU another thread runs it, which does not know what this one asked for."""
    asked, run = [], library._run_group_norm_silu_backward

    def spy(*arguments):
        asked.append(backends.choice())
        return run(*arguments)

    monkeypatch.setattr(library, "_run_group_norm_silu_backward", spy)
    y = fd.ops.group_norm_silu(randn((2, 4, 3, 3), 0, F32).requires_grad_(), 2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(y.sum().backward).result()
    assert asked == [each_backend]
