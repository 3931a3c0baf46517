"""Proves on an NVIDIA GPU that CUDA C++ and Triton give what the CPU gives, on any stream and in a captured graph."""

from functools import partial

import pytest
import torch
from op_tools import BF16, CALLS, F16, F32, LAYOUTS, agree, call_of, flat, lay_out, randn, random_table

import fastdiff as fd

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
