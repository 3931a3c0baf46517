"""The Triton kernels under Triton's interpreter; run by test_triton.py in a process with TRITON_INTERPRET=1."""

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import fastdiff as fd
from fastdiff.noise import Address, Stream, normal, philox4x32
from fastdiff.ops import native
from fastdiff.ops import triton as backend
from fastdiff.ops.forward import BOUND
from fastdiff.ops.row import LETTERS, make_table
from fastdiff.ops.step import Step
from fastdiff.ops.triton import bodies, kernels, maths

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MASK = 2**32 - 1
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what overflows as it should
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def randn(shape, seed, dtype=F32, layout="contiguous"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    if layout == "channels_last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=dtype)
        wide[..., 1:-2:2] = x
        return wide[..., 1:-2:2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x[:1].expand(shape) if layout == "expanded" else x


def bits(x):
    """The bits of floating-point numbers, one NaN like another."""
    x = torch.where(x.isnan(), torch.tensor(math.nan, dtype=x.dtype), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(actual, expected):
    assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
    if actual.dtype == BF16:  # to which Triton's interpreter does not round but truncates
        assert ((bits(actual) - bits(expected)).abs() <= 1).all()
    else:
        assert torch.equal(bits(actual), bits(expected))


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


def compare(call, *others):
    """What a call gives through Triton is, bit for bit, what it gives through the other backends."""
    with fd.backend("triton"):
        actual = tensors(call())
    for other in others:
        with fd.backend(other):
            for ours, theirs in zip(actual, tensors(call()), strict=True):
                assert_same(ours, theirs)


# ---- noise ----------------------------------------------------------------------------------


@triton.jit
def philox_words(words, result, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    w = words + row * 6
    c0, c1, c2, c3 = (tl.load(w + 0), tl.load(w + 1), tl.load(w + 2), tl.load(w + 3))
    k0, k1 = tl.load(w + 4), tl.load(w + 5)
    c = maths.philox(
        c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    )
    for i in tl.static_range(4):
        tl.store(result + row * 4 + i, c[i].to(tl.int64))


def test_philox():
    known = [[0] * 6, [MASK] * 6, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]]
    answers = ["6627e8d5 e169c58d bc57ac4c 9b00dbd8", "408f276d 41c83b0e a20bc7c6 6d5451fd"]
    answers.append("d16cfe09 94fdcceb 5001e420 24126ea1")
    words = np.concatenate([known, np.random.default_rng(0).integers(0, 2**32, (1021, 6))])
    words[3::10, :4] = MASK - words[3::10, :4] % 3
    words = torch.from_numpy(words)
    result = torch.empty(1024, 4, dtype=torch.int64)
    philox_words[(1,)](words, result, BLOCK=1024)
    assert result[:3].tolist() == [[int(word, 16) for word in answer.split()] for answer in answers]
    assert torch.equal(result, philox4x32(words[:, :4].contiguous(), words[:, 4:].contiguous()))


ADDRESSES = [
    {"seed": 0},
    {"seed": -1, "step": MASK, "sample": [MASK, 2**31]},
    {"seed": 2**63 - 1, "step": MASK - 1, "stream": Stream.TRAINING},
    {"seed": -(2**63), "step": 2**31, "sample": [1, 2**31 - 1]},
    {"seed": 2**31, "step": torch.tensor(MASK), "stream": Stream.INITIAL},
    {"seed": [5, -7], "step": torch.tensor([3, 2**31]), "sample": [7, 16]},
    {"seed": [2**40 + 1, 1]},
]


@pytest.mark.parametrize("place", ADDRESSES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 5), (2, 3, 7, 5), (2, 3, 32, 32)], ids=str)
def test_normals(place, shape):
    compare(lambda: normal(shape, **place), "native")


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_normals_in_other_layouts_and_dtypes(layout, dtype):
    ours, theirs = (randn((2, 3, 7, 5), 0, dtype, layout) for _ in range(2))
    address = Address(3, torch.tensor(9), torch.tensor([4, 1]), Stream.STEP)
    backend.normal(ours, address)
    native.normal(theirs, address)
    assert_same(ours, theirs)


def test_many_normals():
    place = {"seed": 11, "step": 6, "sample": [1000, 7]}
    compare(lambda: normal((2, 16384), **place), "native")


# ---- forward process ------------------------------------------------------------------------

SHAPES = [(0, 3, 4), (1, 1), (5, 3), (3, 2, 5), (2, 3, 7, 5), (2, 2, 3, 2, 3), (2, 3, 16, 24)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_noise(shape, layout):
    x0, noise = randn(shape, 0, F32, layout), randn(shape, 1, F32, layout)
    alpha, sigma = randn(shape[:1], 2, F64), randn((2 * shape[0],), 3)[::2]
    compare(lambda: fd.ops.add_noise(x0, alpha, sigma, noise), "native", "reference")
    compare(lambda: fd.ops.add_noise(x0, 0.3, sigma, seed=4, step=torch.tensor(7)), "native")


@pytest.mark.parametrize(("dtype", "noise_dtype"), list(itertools.product([F32, BF16, F16], [F32, F64, BF16, F16])))
def test_add_noise_dtypes(dtype, noise_dtype):
    x0, noise = randn((3, 4, 5), 0, dtype, "sliced"), randn((3, 4, 5), 1, noise_dtype)
    compare(lambda: fd.ops.add_noise(x0, 0.6, 0.8, noise), "native", "reference")


def loss_arguments(shape, wide, dtype=F32, layout="contiguous"):
    """output, x0, f, g, weight, bound: with a bound where the output is wide."""
    outputs = (shape[0], shape[1] * (2 if wide else 1), *shape[2:])
    numbers = (randn(shape[:1], 2, F64), randn(shape[:1], 3), randn(shape[:1], 4).abs())
    bound = randn((shape[0], len(BOUND)), 7) * 2 if wide else None
    return randn(outputs, 0, dtype, layout), randn(shape, 1, F32, layout), *numbers, bound


WIDE_LAYOUTS = pytest.mark.parametrize(("wide", "layout"), list(zip([False, True, True, False], LAYOUTS, strict=False)))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 4)], ids=str)
@WIDE_LAYOUTS
def test_diffusion_loss(shape, wide, layout):
    *arguments, bound = loss_arguments(shape, wide, BF16 if wide else F32, layout)
    bound = bound if shape[1] else None
    place = {"seed": 1, "step": 2, "sample": range(5, 5 + shape[0]), "bound": bound}
    with fd.backend("triton"):
        actual, again = (fd.ops.diffusion_loss(*arguments, **place) for _ in range(2))
    with fd.backend("reference"):
        expected = fd.ops.diffusion_loss(*arguments, **place)
    assert torch.equal(bits(actual), bits(again))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0, equal_nan=True)


def kept_by(body, output, x0, f, g, weight, bound, source):
    """The residual and the slope that a body leaves."""
    dense = torch.channels_last if output.ndim == 4 and output.stride(1) == 1 else torch.contiguous_format
    residual = torch.full(x0.shape, math.nan, dtype=output.dtype).contiguous(memory_format=dense)
    slope = None if bound is None else torch.full_like(residual, math.nan, dtype=F32)
    body.diffusion_loss(output, x0, f, g, weight, bound, source, torch.empty(len(x0)), residual, slope)
    return [residual] if slope is None else [residual, slope]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16])
@WIDE_LAYOUTS
def test_residual_and_slope_of_the_loss(shape, wide, layout, dtype):
    *arguments, bound = loss_arguments(shape, wide, dtype, layout)
    for source in (randn(shape, 6), Address(3, 1, None, 2)):
        for given in (bound, None):
            ours, theirs = (kept_by(body, *arguments, given, source) for body in (backend, native))
            for a, b in zip(ours, theirs, strict=True):
                assert_same(a, b)


def test_the_divergence_of_almost_equal_variances():
    x0, one = torch.zeros(2, 2048), torch.ones(2)
    output = torch.cat((x0, 2 * randn(x0.shape, 0)), 1)
    bound = torch.tensor([[0, 0, 0, 0, 0, 0.0, 0.25, 1], [0, 0, 0, 0, 0, 0.25, 0.0, 1]])
    ours, theirs = (kept_by(body, output, x0, one, one, one, bound, x0) for body in (backend, native))
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


# ---- steps ----------------------------------------------------------------------------------


def table(clip=1.5):
    rows = randn((3, len(LETTERS)), 7, F64)
    letters = dict(zip(LETTERS, rows.T, strict=True)) | {"clip": torch.tensor([clip, math.inf, 0.5])}
    return make_table(3, **letters).to(F32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_guide(shape, layout):
    cond, uncond = randn(shape, 0, F32, layout), randn(shape, 1)
    compare(lambda: fd.ops.guide(cond, uncond, 7.5), "native", "reference")
    compare(lambda: fd.ops.guide(cond, uncond, randn(shape[:1], 2)), "native", "reference")


def step_arguments(shape, layout, i):
    """The i-th of many mixtures of what a step may be given."""
    wide = i % 2 == 1
    outputs = (shape[0], shape[1] * (1 + wide), *shape[2:])
    dtype = (F32, BF16, F16, F32)[i % 4]
    rows = (1, torch.tensor(2), torch.arange(shape[0]) % 3)[i % 3]
    options = {
        "uncond": randn(outputs, 1, dtype, layout) if i % 3 else None,
        "history": tuple(randn(shape, 10 + k, F32, layout if k else "contiguous") for k in range(i % 4)),
        "anchor": randn(shape, 2, F32, layout) if i % 5 < 2 else None,
        "keep_x0": i % 4 != 2,
        "input_dtype": (None, F32, BF16)[i % 3],
    }
    source = [{}, {"noise": randn(shape, 3, F32, layout)}, {"seed": 5}, {"seed": range(shape[0]), "step": MASK}][i % 4]
    arguments = randn(shape, 4, F32, layout), randn(outputs, 5, dtype, layout), table(), rows
    return arguments, options | source, not wide and "seed" not in source


@pytest.mark.parametrize("i", range(12))
@pytest.mark.parametrize(("shape", "layout"), list(zip(SHAPES[1:], [*LAYOUTS, "contiguous"], strict=True)), ids=str)
def test_affine_step(i, shape, layout):
    arguments, options, exact = step_arguments(shape, layout, i)
    compare(lambda: fd.ops.affine_step(*arguments, **options), "native", *(["reference"] if exact else []))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_step_may_write_over_what_it_reads(layout, k):
    def call():
        x, anchor, *history = (randn((2, 3, 4, 6), seed, F32, layout) for seed in range(5))
        out = Step(x, torch.empty_like(x), (history[k],), anchor)
        fd.ops.affine_step(x, randn(x.shape, 9), table(), 1, history=tuple(history), anchor=anchor, seed=3, out=out)
        return (*out[:2], *history, anchor)

    compare(call, "native")


def test_the_exponential_and_the_clamp_at_their_ends():
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 1e-40]).repeat(40, 1)
    ends = [-300, -210, -208, -207.3, -176, -1, -1e-20, 0, 1e-6, 1, 87, 177, 177.5, 178, 200, math.nan]
    v = torch.tensor(ends).repeat_interleave(5).reshape(40, 2).repeat(1, 4)
    # With hi = 1 and lo = -1 the exponent is v / 2.
    letters = make_table(1, q=0.5, clip=2.0, p=1.0, a=0.5, b=1.0, s=1.0, hi=1.0, lo=-1.0).to(F32)
    compare(lambda: fd.ops.affine_step(x, torch.cat((x, v), 1), letters, 0, seed=1), "native")
    with fd.backend("triton"):
        x0 = fd.ops.affine_step(x, x, letters, 0).x0
    assert torch.equal(x0[0].isnan(), x.isnan()[0])
    assert float(x0.nan_to_num().abs().max()) == 2


def test_the_exponential():
    x, noise = torch.zeros(2, 2048), torch.ones(2, 2048)
    fractions = torch.cat((randn((1, 2048), 0), 60 * randn((1, 2048), 1)))
    # With hi = 2 and lo = 0 the exponent is (1 + v) / 2.
    letters = make_table(1, s=1.0, hi=2.0).to(F32)
    compare(lambda: fd.ops.affine_step(x, torch.cat((x, fractions), 1), letters, 0, noise=noise).x, "native")


def test_a_row_outside_the_table_writes_nothing():
    x, output, result = randn((2, 3), 0), randn((2, 3), 1), torch.full((2, 3), 7.0)
    backend.affine_step(x, output, table(), torch.tensor([0, 3]), None, (), None, None, (result, *(None,) * 4))
    assert torch.equal(result[1], torch.full((3,), 7.0))
    assert not torch.equal(result[0], result[1])


# ---- the backend ----------------------------------------------------------------------------


def test_letters():
    names = ["C_IN", "W", "P", "Q", "CLIP", "A", "B", "C1", "C2", "C3", "E", "S", "LO", "HI", "U", "V", "K", "M", "N"]
    assert tuple(name.lower() for name in names) == LETTERS
    assert [getattr(kernels, name).value for name in names] == list(range(len(LETTERS)))
    names = ["ALPHA", "SIGMA", "BOUND_P", "BOUND_Q", "BOUND_B", "BOUND_LO", "BOUND_HI", "WEIGHT"]
    assert tuple(name.lower().removeprefix("bound_") for name in names) == BOUND
    assert [getattr(kernels, name).value for name in names] == list(range(kernels.BOUND_COLUMNS.value))


def test_what_it_refuses():
    assert bodies.INTERPRETED
    assert not backend.refuses("guide", "cpu", F32)
    assert backend.refuses("guide", "cpu", F64) == "computes in float32, not in float64"
    assert "runs on cuda" in backend.refuses("guide", "mps", F32)
    assert "affine_step" in dir(backend)
