"""Proves on an NVIDIA GPU that CUDA C++ and Triton give what the CPU gives, on any stream and in a captured graph."""

from functools import partial

import pytest
import torch
from op_tools import BF16, CALLS, F16, F32, LAYOUTS, agree, call_of, flat, lay_out, randn, random_table, unit

import fastdiff as fd
from fastdiff.backends import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
on_gpu = pytest.mark.parametrize("backend", ["native", "triton"])
SHAPES = [(1, 1), (5, 3), (3, 2, 5), (2, 2, 3, 2, 3), (2, 3, 7, 5), (4, 3, 32, 32), (300, 2), (2, 3, 129, 257)]


def moved(value):
    """A value, or what a dictionary or partial function holds, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {name: moved(part) for name, part in value.items()}
    return partial(value.func, **moved(value.keywords)) if isinstance(value, partial) else value


def compare(call, backend, layout="contiguous"):
    tensors = {name: lay_out(t, layout) if t.ndim > 1 else t for name, t in call.tensors.items()}
    with fd.backend("native"):
        expected = call.run(**tensors)
    with fd.backend(backend):
        gpu = {name: lay_out(t.cuda(), layout) if t.ndim > 1 else t.cuda() for name, t in call.tensors.items()}
        first, second = (moved(call.run)(**gpu) for _ in range(2))
    agree(call, [t.cpu() for t in flat(first)], expected)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


@on_gpu
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_equal_those_of_the_cpu(op, shape, backend):
    compare(call_of(op, shape, seed=3), backend)


@on_gpu
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", [F32, BF16, F16])
def test_layouts_and_dtypes(op, layout, network, backend):
    compare(call_of(op, (3, 3, 8, 6), seed=4, network=network), backend, layout)


@on_gpu
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 3, 32, 32), (3, 3, 257, 255)], ids=str)
@pytest.mark.parametrize("place", [{"seed": 7}, {"seed": -1, "step": 2**32 - 1}, {"seed": 2**40, "step": 5}], ids=str)
def test_normals_are_the_same_bits(shape, place, backend):
    with fd.backend("native"):
        expected = fd.noise.normal(shape, **place)
    with fd.backend(backend):
        assert torch.equal(fd.noise.normal(shape, device="cuda", **place).cpu(), expected)


@on_gpu
def test_a_captured_step_reads_its_row_from_the_device(backend):
    """One graph, replayed: the row and with it the noise come from a counter that the graph itself advances."""
    x, output, table = randn((4, 3, 8, 8), 0).cuda(), randn((4, 3, 8, 8), 1).cuda(), random_table(6, 2, F32).cuda()
    with fd.backend(backend):
        expected = x.clone()
        for i in range(6):
            expected = fd.ops.affine_step(expected, output, table, i, seed=9).x
        state, row = x.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
        out = fd.ops.Step(state)
        step = partial(fd.ops.affine_step, state, output, table, row, seed=9, out=out)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()  # whatever is loaded or compiled is so before the capture
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
            row += 1
        state.copy_(x), row.zero_()
        for _ in range(6):
            graph.replay()
    assert torch.equal(state, expected)


@on_gpu
def test_a_step_waits_for_its_stream(backend):
    x, table, side = torch.zeros(1 << 20, 4, device="cuda"), random_table(1, 0, F32).cuda(), torch.cuda.Stream()
    with fd.backend(backend):
        expected = fd.ops.affine_step(x + 1, x + 1, table, 0).x
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**8)
            x += 1
            result = fd.ops.affine_step(x, x, table, 0).x
        side.synchronize()
    assert torch.equal(result, expected)


# ---- group norm -----------------------------------------------------------------------------

# Sizes of U-Nets, with 32 groups; then what is hostile: odd widths of groups, odd positions, one and many of either.
UNET = [(128, 32, 32), (256, 32, 32), (384, 32, 32), (256, 16, 16), (512, 16, 16), (512, 8, 8), (256, 4, 4)]
NORMS = [((2, *shape), 32) for shape in UNET] + [((2, 6, 1, 1), 6), ((3, 12, 5, 7), 4), ((1, 36, 5, 7), 12)]
NORMS += [((2, 24, 10, 100), 2), ((5, 16, 1), 1), ((300, 8), 2), ((2, 8, 511, 513), 2), ((1, 2048, 3, 3), 1)]
NORMS += [((1, 4, 1024, 1024), 1), ((4, 96, 3, 5, 7), 8)]
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture(params=["native", "triton"])
def norm_backend(request):
    if not hasattr(load(request.param)[0], "group_norm_silu"):
        pytest.skip(f"{request.param} has no group norm")
    return request.param


def norm(x, groups, given, grads, **more):
    """The result, the sum and the gradients of everything that is given."""
    leaves = {name: value.detach().requires_grad_() for name, value in {"x": x, **given}.items()}
    results = fd.ops.group_norm_silu(leaves["x"], groups, **{k: v for k, v in leaves.items() if k != "x"}, **more)
    return [*flat(results), *torch.autograd.grad(results, tuple(leaves.values()), grads)]


def norm_arguments(shape, dtype, layout, parts):
    sizes = {"weight": shape[1:2], "bias": shape[1:2], "scale": shape[:2], "shift": shape[:2], "residual": shape}
    x, *grads = (lay_out(randn(shape, i, dtype), layout) for i in range(3))
    given = {
        name: lay_out(randn(size, 3 + i, dtype), layout) if size == shape else randn(size, 3 + i)
        for i, (name, size) in enumerate(sizes.items())
        if "wbshr"[i] in parts
    }
    return x, given, tuple(grads)


def check_norm(shape, groups, backend, dtype=BF16, layout="channels_last", parts="wbshr", activation="silu"):
    """Results and gradients are those of the CPU up to a rounding, and every repetition gives the same bits."""
    x, given, grads = norm_arguments(shape, dtype, layout, parts)
    with fd.backend("native"):
        expected = norm(x, groups, given, grads, activation=activation, keep_sum=True)
    with fd.backend(backend):
        laid = {name: lay_out(v.cuda(), layout) if v.shape == x.shape else v.cuda() for name, v in given.items()}
        gpu = lay_out(x.cuda(), layout), groups, laid, tuple(lay_out(g.cuda(), layout) for g in grads)
        first, *others = (norm(*gpu, activation=activation, keep_sum=True) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    terms = x.numel() / shape[1]  # of a gradient that sums over samples and positions
    for a, b in zip(first, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride() or b.numel() <= max(b.shape)
        bound = 1e-5 if b.shape == x.shape else 1e-5 * terms**0.5
        error, size = (a.cpu().double() - b.double()).abs(), b.double().abs()
        assert (error <= bound * (1 + size) + (2.02 * unit(dtype) * size if a.dtype == dtype != F32 else 0)).all()


@pytest.mark.parametrize(("shape", "groups"), NORMS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@layouts
def test_group_norm_is_that_of_the_cpu(shape, groups, dtype, layout, norm_backend):
    check_norm(shape, groups, norm_backend, dtype, layout)


@pytest.mark.parametrize("parts", ["", "w", "b", "s", "h", "r", "wb", "sh", "wbsh"])
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_with_and_without_each_part(parts, activation, layout, norm_backend):
    check_norm((3, 24, 9, 8), 3, norm_backend, BF16, layout, parts, activation)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
@pytest.mark.parametrize("shape", [(2, 64, 32, 32), (2, 12, 35, 5), (1, 8, 1024, 1024)], ids=str)
@layouts
def test_group_norm_does_not_cancel_at_large_means(shape, ratio, layout, norm_backend):
    x = lay_out(randn(shape, 0) + ratio, layout)
    truth = torch.nn.functional.group_norm(x.double().contiguous(), 4)
    with fd.backend(norm_backend):
        result = fd.ops.group_norm_silu(x.cuda(), 4, activation="none").cpu()
    assert (result.double() - truth).abs().max() <= 8 * unit(F32) * (4 + ratio)


@layouts
@pytest.mark.parametrize("samples", [1, 5])
def test_group_norm_beyond_31_bits(samples, layout, norm_backend):
    """One odd pattern again and again has its own moments: each of its copies gets the same result and gradient."""
    times = 2**31 // (samples * 8 * 63 * 1025) + 1
    pattern = lay_out(randn((1, 8, 63, 1025), 0, BF16), layout).cuda()
    if torch.cuda.mem_get_info()[0] < 10 * 2**32:
        pytest.skip("needs 40 GiB of free memory")
    x = lay_out(pattern, layout).repeat(samples, 1, times, 1)
    x = x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    assert x.numel() > 2**31
    with fd.backend(norm_backend):
        wanted = norm(pattern, 2, {}, pattern)
        made = norm(x, 2, {}, x)
    for a, b in zip(made, wanted, strict=True):
        for copy in (0, times // 2, times - 1):
            for sample in (0, samples - 1):
                torch.testing.assert_close(
                    a[sample : sample + 1, :, copy * 63 : (copy + 1) * 63], b, rtol=1e-2, atol=1e-3
                )


@layouts
def test_group_norm_in_a_captured_graph(layout, norm_backend):
    x, given, grads = norm_arguments((4, 128, 16, 16), BF16, layout, "wbshr")
    gpu = x.cuda(), 32, moved(given), tuple(moved(g) for g in grads)
    again = torch.randn_like(gpu[0])
    side = torch.cuda.Stream()
    with fd.backend(norm_backend):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            norm(*gpu, keep_sum=True)  # whatever is loaded or compiled is so before the capture
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = norm(*gpu, keep_sum=True)
        for value in (gpu[0].clone(), again):
            gpu[0].copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(captured, norm(*gpu, keep_sum=True), strict=True))
