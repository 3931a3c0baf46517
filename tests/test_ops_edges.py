"""Proves the ops at the edges: sizes around tiles and quads, every memory layout, extreme and non-finite values."""

import math

import pytest
import torch
from op_tools import (
    BACKENDS,
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    agree,
    assert_same_bits,
    call_of,
    check_add_noise,
    check_affine_step,
    check_diffusion_loss,
    check_group_norm,
    check_guide,
    flat,
    lay_out,
    randn,
    twice,
)

import fastdiff as fd

# ---- sizes ----------------------------------------------------------------------------------

LEDGER = [
    *((0, 1), (0, 3, 4, 4), (0, 3, 0), (1, 0, 3), (2, 0), (2, 3, 0, 5)),  # nothing
    *((1, 1), (1, 1, 1, 1), (2, 1, 1, 1), (5, 48, 1, 1), (3, 1, 7, 9), (257, 1), (1, 2, 1), (1, 256, 1, 3)),  # ones
    *((2, 2), (2, 3), (2, 4), (2, 5), (2, 3, 3), (1, 7, 1, 9)),  # about a quad
    *((2, 1023), (2, 1024), (2, 1025), (1, 2047), (1, 4, 512), (3, 2, 33, 31), (1, 3, 721), (1, 2163)),  # about a tile
    *((2, 255, 3, 5), (2, 256, 3, 3), (2, 257, 3, 3), (1, 1024, 2, 1), (1, 600, 3, 3)),  # about the widest channels
    *((65_536, 2), (65_537, 1, 1, 2), (1, 65_537)),  # beyond a grid of 65,535
    *((2, 3, 2, 3, 2), (2, 3, 2, 1, 2, 3), (1, 2, 1, 3, 2, 1, 2), (2, 2, 3, 2, 1, 2, 3)),  # three to seven dimensions
]
assert len(LEDGER) == 40
ledger = pytest.mark.parametrize("shape", LEDGER, ids=str)


@ledger
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ledger_of_shapes(shape, layout):
    check_add_noise(shape, F32, layout)
    check_add_noise(shape, BF16, layout, False, F16)
    check_guide(shape, BF16, layout)
    check_affine_step(shape, F32, BF16, layout, True, True, 1, True, True, False)
    if math.prod(shape[1:]):
        check_diffusion_loss(shape, F32, layout)


@pytest.mark.slow
@ledger
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_ledger_of_shapes_in_every_dtype(shape, dtype):
    work = F64 if dtype == F64 else F32
    check_add_noise(shape, dtype)
    check_guide(shape, dtype)
    check_affine_step(shape, work, dtype, "contiguous", True, True, 3, True, True, True)
    if math.prod(shape[1:]):
        check_diffusion_loss(shape, work, output_dtype=dtype)
    if math.prod(shape[1:]) > 1:
        check_group_norm(shape, 1, dtype)


@ledger
@pytest.mark.parametrize(
    "network", [pytest.param(F32, marks=pytest.mark.slow), BF16, pytest.param(F16, marks=pytest.mark.slow)]
)
def test_ledger_of_shapes_with_all_parts(shape, network):
    for op in CALLS:
        call, results = call_of(op, shape, network=network), []
        for name in BACKENDS:
            with fd.backend(name):
                results.append(call.run(**call.tensors))
        agree(call, *results)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_gradients_of_nothing_are_zero(shape, each_backend):
    output, x0 = torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    each = torch.ones(shape[0])
    fd.ops.diffusion_loss(output, x0, each, each, each, torch.zeros(shape)).nan_to_num().sum().backward()
    fd.ops.add_noise(x0, each, each, torch.zeros(shape)).sum().backward()
    assert output.grad.shape == x0.grad.shape == shape


# ---- layouts --------------------------------------------------------------------------------


def sliced(x, dim):
    wide = torch.full([*x.shape[:dim], 2 * x.shape[dim] + 2, *x.shape[dim + 1 :]], math.nan, dtype=x.dtype)
    part = wide.narrow(dim, 1, 2 * x.shape[dim] - 1)
    part = part[(slice(None),) * dim + (slice(None, None, 2),)]
    return part.copy_(x)


def narrowed(x, dim):
    wide = torch.full([*x.shape[:dim], x.shape[dim] + 3, *x.shape[dim + 1 :]], math.nan, dtype=x.dtype)
    return wide.narrow(dim, 2, x.shape[dim]).copy_(x)


def transposed(x, a, b):
    return x.transpose(a, b).contiguous().transpose(a, b)


def offset(x, by):
    return torch.empty(x.numel() + by, dtype=x.dtype)[by:].view(x.shape).copy_(x)


def last(x):
    return x.to(memory_format=torch.channels_last)


RELAID = {
    "contiguous": lambda x: x,
    "channels_last": last,
    **{f"sliced {d}": lambda x, d=d: sliced(x, d) for d in range(4)},
    **{f"narrowed {d}": lambda x, d=d: narrowed(x, d) for d in range(4)},
    **{f"transposed {a}{b}": lambda x, a=a, b=b: transposed(x, a, b) for b in range(4) for a in range(b)},
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    **{f"expanded {d}": lambda x, d=d: x.narrow(d, 0, 1).expand_as(x) for d in range(4)},
    **{f"offset {by}": lambda x, by=by: offset(x, by) for by in (1, 2, 3)},
    "channels_last narrowed": lambda x: narrowed(x.permute(0, 2, 3, 1), 3).permute(0, 3, 1, 2),
    "channels_last sliced": lambda x: sliced(x.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2),
}
SIZES = (3, 6, 19, 21)  # of more than two tiles, which end in the middle of a quad


def relay(tensors, layouts):
    """The tensors of full size in a layout each, the rest as they are."""
    layouts = iter(layouts)
    return {name: RELAID[next(layouts)](t) if t.ndim > 1 else t for name, t in tensors.items()}


def assert_layout_does_not_matter(call, tensors):
    strided = twice(lambda: call.run(**tensors), *tensors.values())
    plain = call.run(**{name: t.contiguous() for name, t in tensors.items()})
    if call.sums:
        torch.testing.assert_close(strided, plain, rtol=1e-6, atol=0)
    else:
        assert_same_bits(plain, strided)
    return strided


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("layout", RELAID)
def test_a_layout_of_everything(op, layout, each_backend):
    call = call_of(op, SIZES)
    strided = assert_layout_does_not_matter(call, relay(call.tensors, [layout] * 16))
    if layout in ("contiguous", "channels_last") and not op.startswith("diffusion_loss"):
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert all(t.is_contiguous(memory_format=form) for t in flat(strided))


def check_mixture(op, seed):
    """One random layout per tensor."""
    choice = torch.randint(len(RELAID), (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    call = call_of(op, SIZES, seed, (F32, BF16, F16)[seed % 3])
    assert_layout_does_not_matter(call, relay(call.tensors, [list(RELAID)[i] for i in choice]))


@pytest.mark.parametrize("op", CALLS)
def test_a_layout_per_argument(op, each_backend):
    for seed in range(20):
        check_mixture(op, seed)


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_a_layout_per_argument_at_length(op, each_backend):
    for seed in range(20, 1000):
        check_mixture(op, seed)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("state_last", [False, True], ids=["state_contiguous", "state_channels_last"])
@pytest.mark.parametrize("network", [F32, BF16, F16])
def test_a_state_and_a_network_in_different_layouts(op, state_last, network, each_backend):
    call = call_of(op, SIZES, 1, network)
    of_network = {"output", "uncond", "cond"}
    tensors = {k: last(t) if t.ndim > 1 and (k in of_network) != state_last else t for k, t in call.tensors.items()}
    assert_layout_does_not_matter(call, tensors)


@pytest.mark.parametrize("op", CALLS)
def test_channels_last_in_three_and_five_dimensions(op, each_backend):
    for shape in ((2, 5, 301), (2, 5, 7, 6, 9)):
        call = call_of(op, shape, 1, BF16)
        laid = {k: lay_out(t, "channels_last") if t.ndim == 5 else t for k, t in call.tensors.items()}
        laid = {k: transposed(t, 1, 2) if t.ndim == 3 else t for k, t in laid.items()}
        assert_layout_does_not_matter(call, laid)


def test_levels_and_addresses_of_any_stride(each_backend):
    x0 = randn((5, 3, 7), 0)
    each, ids = randn((5, 3), 1)[:, 1], torch.arange(20).reshape(10, 2)[::2, 1]
    assert_same_bits(
        fd.ops.add_noise(x0, each, each, seed=ids, step=ids, sample=ids),
        fd.ops.add_noise(x0, each.clone(), each.clone(), seed=ids.clone(), step=ids.clone(), sample=ids.clone()),
    )
    one = torch.tensor(7).expand(5)
    assert_same_bits(
        fd.ops.add_noise(x0, 1.0, 1.0, seed=one, step=one, sample=one),
        fd.ops.add_noise(x0, 1.0, 1.0, seed=[7] * 5, step=7, sample=[7] * 5),
    )


def test_a_negative_view_is_its_negated_values(each_backend):
    x = torch._neg_view(randn((2, 3, 4), 0))
    assert x.is_neg()
    for op in CALLS:
        call = call_of(op, (2, 3, 4), 1)
        negated = {k: torch._neg_view(-t) for k, t in call.tensors.items()}
        agree(call, call.run(**negated), call.run(**call.tensors))


# ---- magnitudes -----------------------------------------------------------------------------


def magnify(tensors, seed, strange):
    """Values of all magnitudes that float32 and bfloat16 hold, each sample up to one of its own; some not finite."""
    generator, share = torch.Generator().manual_seed(seed), strange * 0.1 ** (1 + seed % 3)
    for t in tensors.values():
        if t.ndim > 1:
            largest = torch.empty(len(t), *[1] * (t.ndim - 1)).uniform_(-30, 30, generator=generator)
            t.mul_(10 ** (largest - 20 * torch.rand(t.shape, generator=generator)).clamp(min=-30))
        where = torch.rand(t.shape, generator=generator)
        for part, value in ((1, math.inf), (2 / 3, -math.inf), (1 / 3, math.nan)):
            t[where < part * share] = value


def check_magnitudes(op, seed, strange):
    """On every backend what is NaN, infinite or negative is the same, and all bits where they can be."""
    call, results = call_of(op, (2, 3, 5, 7), seed, (F32, BF16, F16)[seed % 3]), []
    magnify(call.tensors, seed, strange)
    for name in BACKENDS:
        with fd.backend(name):
            results.append(call.run(**call.tensors))
    if call.bitwise and not call.sums:
        assert_same_bits(*results)
    for a, b in zip(*map(flat, results), strict=True):
        for mask in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(mask(a), mask(b)), seed


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("strange", [False, True], ids=["finite", "strange"])
def test_magnitudes_and_what_is_not_finite(op, strange):
    for seed in range(50):
        check_magnitudes(op, seed, strange)


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("strange", [False, True], ids=["finite", "strange"])
def test_magnitudes_and_what_is_not_finite_at_length(op, strange):
    for seed in range(50, 1000):
        check_magnitudes(op, seed, strange)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
def test_a_loss_of_what_is_not_finite(value, each_backend):
    output, zero, one = torch.zeros(2, 3, 5), torch.zeros(2), torch.ones(2)
    output[1, 2, 3] = value
    loss = fd.ops.diffusion_loss(output, torch.zeros(2, 3, 5), zero, one, one, torch.zeros(2, 3, 5))
    truth = torch.tensor([0.0, (torch.tensor(value) ** 2 / 15).item()])
    torch.testing.assert_close(loss, truth, equal_nan=True)


def test_a_loss_over_no_elements_is_the_same_on_every_backend():
    """Whatever it is, it is not what the memory held before."""
    for name in BACKENDS:
        with fd.backend(name):
            x, each = torch.zeros(64, 3, 0), torch.ones(64)
            trash = torch.full((64,), 7.0)
            del trash
            assert fd.ops.diffusion_loss(x, x, each, each, each, x).isnan().all()
