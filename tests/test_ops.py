"""Proves every op against its formula in extended precision, over hostile shapes, dtypes and layouts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff as fd
from fastdiff.noise import Stream, normal
from fastdiff.ops.row import LETTERS, make_table

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = ("reference", "native")
SHAPES = [(0, 3, 4, 4), (1, 1), (5, 3), (2, 3, 1, 1), (3, 2, 5), (2, 2, 3, 2, 3), (2, 3, 7, 5), (1, 4, 16, 16)]
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")
TINY = {F16: 2.0**-25, BF16: 2.0**-133, F32: 2.0**-149, F64: 0.0}


@pytest.fixture(scope="module", autouse=True, params=BACKENDS)
def every_backend(request):
    with fd.backend(request.param):
        yield request.param


# ---- tools ----------------------------------------------------------------------------------


def unit(dtype):
    """Half an ulp of 1: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def randn(shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def lay_out(x, layout):
    """The values of x (of its first sample for ``expanded``) with other strides."""
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype)
        wide[..., 1:-2:2] = x
        return wide[..., 1:-2:2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def exact(x):
    return x.detach().to(F64).contiguous().numpy().astype(np.longdouble)


def column(values, x):
    """Numbers or ``[N]`` as an extended-precision array that broadcasts against x."""
    values = np.asarray(exact(values) if isinstance(values, torch.Tensor) else values, np.longdouble)
    return values.reshape(-1, *(1,) * (x.ndim - 1)) if values.ndim else values


def assert_within(actual, truth, bound):
    """Every element of ``actual`` is within ``bound`` of ``truth``; NaN is never within."""
    assert tuple(actual.shape) == truth.shape
    error = np.abs(exact(actual) - truth)
    worst = np.max(error / np.maximum(bound, np.longdouble(1e-300)), initial=0.0)
    assert (error <= bound).all(), (
        f"error {float(worst):.3g} of the bound, {float(np.max(error, initial=0)):.3g} absolute"
    )


def rounded(truth, magnitude, work, kept):
    """Bound of a result computed in ``work`` with terms of ``magnitude`` and kept in ``kept``."""
    computed = 8 * unit(work) * magnitude
    final = unit(kept) * (np.abs(truth) + computed) if kept != work else 0
    return computed + final + TINY[kept] + TINY[work]


def twice(call, *tensors):
    """The result of a call, which repeats bit for bit and leaves its arguments as they were."""
    before = [t.detach().clone() for t in tensors]
    first, second = call(), call()
    for a, b in zip(flat(first), flat(second), strict=True):
        assert torch.equal(a, b)
    for t, copy in zip(tensors, before, strict=True):
        assert torch.equal(t, copy)
    return first


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def wide_of(dtype):
    return F64 if dtype == F64 else F32


def memory_format(layout, ndim):
    if layout == "channels_last" and ndim in (4, 5):
        return torch.channels_last if ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


def assert_kept_format(result, layout):
    if layout in ("contiguous", "channels_last") and result.numel():
        assert result.is_contiguous(memory_format=memory_format(layout, result.ndim))


levels = pytest.mark.parametrize("per_sample", [False, True], ids=["scalar", "per_sample"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def scale(count, per_sample, seed, dtype=F64):
    """A number, or one per sample."""
    values = 0.1 + randn((max(count, 1),), seed, dtype).abs()
    return values[:count] if per_sample else float(values[0])


# ---- add_noise ------------------------------------------------------------------------------


def check_add_noise(shape, dtype, layout="contiguous", per_sample=True, noise_dtype=None, seed=0):
    x0 = lay_out(randn(shape, seed, dtype), layout)
    noise = lay_out(randn(shape, seed + 1, noise_dtype or dtype), layout)
    alpha, sigma = scale(shape[0], per_sample, seed + 2), scale(shape[0], per_sample, seed + 3)
    result = twice(lambda: fd.ops.add_noise(x0, alpha, sigma, noise), x0, noise)
    assert result.dtype == dtype
    signal, added = column(alpha, x0) * exact(x0), column(sigma, x0) * exact(noise)
    truth = signal + added
    assert_within(result, truth, rounded(truth, np.abs(signal) + np.abs(added), wide_of(dtype), dtype))
    assert_kept_format(result, layout)


@shapes
@layouts
@levels
def test_add_noise_shapes_and_layouts(shape, layout, per_sample):
    check_add_noise(shape, F32, layout, per_sample)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("noise_dtype", [F32, F64, BF16, F16])
def test_add_noise_dtypes(dtype, noise_dtype):
    check_add_noise((3, 4, 5, 7), dtype, noise_dtype=noise_dtype)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_add_noise_draws_the_training_noise_of_its_address(dtype):
    x0 = randn((3, 2, 5), 0, dtype)
    place = {"seed": 5, "step": 9, "sample": [7, 1, 2]}
    noise = normal((3, 2, 5), stream=Stream.TRAINING, dtype=wide_of(dtype), **place)
    drawn = fd.ops.add_noise(x0, 0.8, 0.6, **place)
    assert torch.equal(drawn, fd.ops.add_noise(x0, 0.8, 0.6, noise))
    assert not torch.equal(drawn, fd.ops.add_noise(x0, 0.8, 0.6, seed=5, step=8, sample=[7, 1, 2]))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_add_noise_takes_levels_of_any_float_type(dtype):
    x0, noise = randn((2, 3), 0), randn((2, 3), 1)
    alpha, sigma = torch.tensor([0.5, 0.25], dtype=dtype), torch.tensor([0.75, 1.0], dtype=dtype)
    expected = torch.stack([a * x + s * z for a, s, x, z in zip(alpha, sigma, x0, noise, strict=True)])
    assert torch.equal(fd.ops.add_noise(x0, alpha, sigma, noise), expected.float())
    assert torch.equal(fd.ops.add_noise(x0, alpha[0], sigma[0], noise)[0], expected.float()[0])


# ---- diffusion_loss -------------------------------------------------------------------------


def check_diffusion_loss(shape, dtype, layout="contiguous", out_dtype=None, seed=0):
    x0 = lay_out(randn(shape, seed, dtype), layout)
    noise = lay_out(randn(shape, seed + 1, dtype), layout)
    out = lay_out(randn(shape, seed + 2, out_dtype or dtype), layout)
    f, g, weight = (randn(shape[:1], seed + i, F64) for i in (3, 4, 5))
    weight = weight.abs()
    result = twice(lambda: fd.ops.diffusion_loss(out, x0, f, g, weight, noise), out, x0, noise)
    work = wide_of(dtype)
    assert result.dtype == work
    assert result.shape == shape[:1]
    data, added = column(f, x0) * exact(x0), column(g, x0) * exact(noise)
    given_out = exact(out.to(work))
    difference = given_out - data - added
    error = 6 * unit(work) * (np.abs(given_out) + np.abs(data) + np.abs(added))
    inner = tuple(range(1, len(shape)))
    mean = (difference**2).mean(inner)
    spread = (2 * np.abs(difference) * error + error**2).mean(inner)
    w = exact(weight)
    assert_within(result, w * mean, w * (spread + 32 * unit(work) * mean))


@shapes
@layouts
def test_diffusion_loss_shapes_and_layouts(shape, layout):
    check_diffusion_loss(shape, F32, layout)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("out_dtype", [F32, F64, BF16, F16])
def test_diffusion_loss_dtypes(dtype, out_dtype):
    check_diffusion_loss((3, 4, 5, 7), dtype, out_dtype=out_dtype)


def test_diffusion_loss_draws_the_noise_again_that_add_noise_drew():
    x0, one, zero = randn((4, 3, 5), 0), torch.ones(4), torch.zeros(4)
    place = {"seed": 1, "step": 2, "sample": [3, 0, 9, 4]}
    noise = fd.ops.add_noise(torch.zeros_like(x0), 0.0, 1.0, **place)
    assert torch.equal(fd.ops.diffusion_loss(noise, x0, zero, one, one, **place), zero)
    given_noise = fd.ops.diffusion_loss(0 * x0, x0, one, one, one, noise)
    assert torch.equal(fd.ops.diffusion_loss(0 * x0, x0, one, one, one, **place), given_noise)


# ---- guide ----------------------------------------------------------------------------------


def check_guide(shape, dtype, layout="contiguous", per_sample=True, seed=0):
    cond, uncond = (lay_out(randn(shape, seed + i, dtype), layout) for i in (0, 1))
    w = scale(shape[0], per_sample, seed + 2)
    w = 7.5 * w
    result = twice(lambda: fd.ops.guide(cond, uncond, w), cond, uncond)
    assert result.dtype == dtype
    c, u, s = exact(cond), exact(uncond), column(w, cond)
    truth = u + s * (c - u)
    assert_within(result, truth, rounded(truth, np.abs(u) + np.abs(s) * (np.abs(c) + np.abs(u)), wide_of(dtype), dtype))
    assert_kept_format(result, layout)


@shapes
@layouts
@levels
def test_guide_shapes_and_layouts(shape, layout, per_sample):
    check_guide(shape, F32, layout, per_sample)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_guide_dtypes(dtype):
    check_guide((3, 4, 5, 7), dtype)


def test_guidance_of_one_and_zero_are_the_two_outputs():
    cond, uncond = randn((4, 3, 5), 0, F64), randn((4, 3, 5), 1, F64)
    assert (fd.ops.guide(cond, uncond, 1.0) - cond).abs().max() <= 1e-15
    assert torch.equal(fd.ops.guide(cond, uncond, 0.0), uncond)
    mixed = fd.ops.guide(cond, uncond, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(mixed[::2], uncond[::2])
    assert (mixed[1::2] - cond[1::2]).abs().max() <= 1e-15


# ---- affine_step ----------------------------------------------------------------------------


def random_table(rows, seed, dtype, learned=False):
    """Rows in which every letter matters; ``clip`` bites now and then."""
    values = randn((rows, len(LETTERS)), seed, F64)
    table = make_table(rows, **{letter: values[:, i] for i, letter in enumerate(LETTERS)})
    table[:, LETTERS.index("clip")] = 0.5 + values[:, LETTERS.index("clip")].abs()
    table[:, LETTERS.index("s")] = values[:, LETTERS.index("s")].abs()
    table[:, [LETTERS.index("lo"), LETTERS.index("hi")]] *= learned
    return table.to(dtype)


def numpy_row(x, out, letters, uncond, history, anchor, noise):
    """One row by the letters in extended precision: each result with the bound of its rounding error."""
    work = x.dtype
    u, channels, big = unit(work), x.shape[1], exact(x)
    r = {letter: column(letters[..., i], x) for i, letter in enumerate(LETTERS)}
    given_out = exact(out.to(work))
    prediction, f = given_out[:, :channels], (1 + given_out[:, channels:]) / 2
    size = np.abs(prediction)
    if uncond is not None:
        without = exact(uncond.to(work))[:, :channels]
        size = np.abs(without) + np.abs(r["w"]) * (size + np.abs(without))
        prediction = without + r["w"] * (prediction - without)
    x0 = np.clip(r["p"] * big + r["q"] * prediction, -r["clip"], r["clip"])
    x0_error = 8 * u * (np.abs(r["p"] * big) + np.abs(r["q"]) * size)
    terms = [r["a"] * big, r["b"] * x0, *(r[f"c{i + 1}"] * exact(h) for i, h in enumerate(history))]
    stored = anchor
    if anchor is not None:
        terms.append(r["e"] * exact(anchor))
        parts = [r["k"] * exact(anchor), r["m"] * big, r["n"] * x0]
        stored = sum(parts), 8 * u * sum(map(np.abs, parts)) + np.abs(r["n"]) * x0_error
    if noise is not None:
        exponent = (f * r["hi"] + (1 - f) * r["lo"]) / 2 if f.size else np.longdouble(0)
        sloppy = 1 + np.abs(r["hi"]) * (1 + np.abs(f)) + np.abs(r["lo"]) * (1 + np.abs(f)) if f.size else 1
        terms.append(r["s"] * np.exp(exponent) * exact(noise))
    error = 12 * u * sum(map(np.abs, terms)) + np.abs(r["b"]) * x0_error
    if noise is not None:
        error = error + 8 * u * sloppy * np.abs(terms[-1])
    push = r["u"] * big + r["v"] * x0, 8 * u * (np.abs(r["u"] * big) + np.abs(r["v"] * x0)) + np.abs(r["v"]) * x0_error
    return {"x": (sum(terms), error), "x0": (x0, x0_error), "push": push, "anchor": stored}


def check_affine_step(
    shape,
    dtype=F32,
    out_dtype=F32,
    layout="contiguous",
    per_sample=False,
    guided=False,
    stored=0,
    anchored=False,
    noisy=True,
    learned=False,
    seed=0,
):
    x = lay_out(randn(shape, seed, dtype), layout)
    wide = (shape[0], shape[1] * (2 if learned else 1), *shape[2:])
    out = lay_out(randn(wide, seed + 1, out_dtype), layout)
    uncond = lay_out(randn(wide, seed + 2, out_dtype), layout) if guided else None
    history = tuple(lay_out(randn(shape, seed + 3 + i, dtype), layout) for i in range(stored))
    anchor = lay_out(randn(shape, seed + 6, dtype), layout) if anchored else None
    noise = lay_out(randn(shape, seed + 7, dtype), layout) if noisy else None
    table = random_table(5, seed + 8, dtype, learned)
    row = torch.randint(5, shape[:1], generator=torch.Generator().manual_seed(seed)) if per_sample else seed % 5
    given_vectors = [t for t in (x, out, uncond, *history, anchor, noise, table) if t is not None]
    more = {"uncond": uncond, "history": history, "anchor": anchor, "noise": noise}
    step = twice(lambda: fd.ops.affine_step(x, out, table, row, **more), *given_vectors)
    truth = numpy_row(x, out, table[row], uncond, history, anchor, noise)
    for name, result in (("x", step.x), ("x0", step.x0)):
        assert result.dtype == dtype
        assert_within(result, *(np.broadcast_to(part, shape) for part in truth[name]))
        assert_kept_format(result, layout)
    assert len(step.history) == stored
    if stored:
        assert_within(step.history[0], *(np.broadcast_to(part, shape) for part in truth["push"]))
        for new, old in zip(step.history[1:], history[:-1], strict=True):
            assert torch.equal(new, old)
    assert (step.anchor is None) == (not anchored)
    if anchored:
        assert_within(step.anchor, *truth["anchor"])


@shapes
@layouts
def test_affine_step_with_everything_in_any_layout(shape, layout):
    check_affine_step(shape, layout=layout, guided=True, stored=3, anchored=True, learned=True, per_sample=True)


@shapes
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_row", "row_per_sample"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_affine_step_rows(shape, dtype, per_sample):
    check_affine_step(shape, dtype, dtype, per_sample=per_sample, stored=2, anchored=True)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("out_dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_affine_step_takes_a_network_of_any_dtype(dtype, out_dtype, learned):
    check_affine_step((2, 3, 5, 3), dtype, out_dtype, guided=True, learned=learned)


@pytest.mark.parametrize("stored", [0, 1, 2, 3])
@pytest.mark.parametrize("anchored", [False, True], ids=["no_anchor", "anchor"])
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("noisy", [False, True], ids=["quiet", "noisy"])
def test_affine_step_with_and_without_each_part(stored, anchored, guided, noisy):
    check_affine_step((3, 2, 4, 3), stored=stored, anchored=anchored, guided=guided, noisy=noisy)


def test_a_row_per_sample_is_that_row_for_each_sample():
    x, out, noise = (randn((5, 2, 3), i) for i in range(3))
    table, row = random_table(5, 3, F32), torch.tensor([4, 0, 2, 2, 1])
    together = fd.ops.affine_step(x, out, table, row, noise=noise)
    for k, i in enumerate(row.tolist()):
        alone = fd.ops.affine_step(x[k : k + 1], out[k : k + 1], table, i, noise=noise[k : k + 1])
        assert torch.equal(together.x[k], alone.x[0])


def test_affine_step_draws_the_noise_of_its_row():
    x, out, table = randn((3, 2, 5), 0, F64), randn((3, 2, 5), 1, F64), random_table(4, 2, F64)
    drawn = fd.ops.affine_step(x, out, table, 2, seed=9, sample=[5, 1, 0])
    noise = normal((3, 2, 5), seed=9, step=2, sample=[5, 1, 0], stream=Stream.STEP, dtype=F64)
    assert torch.equal(drawn.x, fd.ops.affine_step(x, out, table, 2, noise=noise).x)
    later = fd.ops.affine_step(x, out, table, 2, seed=9, step=7, sample=[5, 1, 0])
    noise = normal((3, 2, 5), seed=9, step=7, sample=[5, 1, 0], stream=Stream.STEP, dtype=F64)
    assert torch.equal(later.x, fd.ops.affine_step(x, out, table, 2, noise=noise).x)
    rows = torch.tensor([3, 0, 2])
    each = fd.ops.affine_step(x, out, table, rows, seed=9)
    noise = normal((3, 2, 5), seed=9, step=rows, stream=Stream.STEP, dtype=F64)
    assert torch.equal(each.x, fd.ops.affine_step(x, out, table, rows, noise=noise).x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_drawn_noise_keeps_the_memory_format(layout):
    x = lay_out(randn((2, 3, 4, 5), 0), layout)
    table = random_table(1, 0, F32)
    assert_kept_format(fd.ops.affine_step(x, x, table, 0, seed=0).x, layout)
    assert_kept_format(fd.ops.add_noise(x, 0.5, 0.5, seed=0), layout)
    contiguous = fd.ops.affine_step(x.contiguous(), x.contiguous(), table, 0, seed=0)
    assert torch.equal(fd.ops.affine_step(x, x, table, 0, seed=0).x, contiguous.x)


# ---- ddim_step ------------------------------------------------------------------------------

PROCESS = {  # alpha, sigma, alpha_next, sigma_next of a step and of the last one, to the clean end
    "vp": [(0.6, 0.8, 0.8, 0.6), (0.96, 0.28, 1.0, 0.0)],
    "flow": [(0.25, 0.75, 0.5, 0.5), (0.75, 0.25, 1.0, 0.0)],
    "edm": [(1.0, 10.0, 1.0, 4.0), (1.0, 0.5, 1.0, 0.0)],
}
OF_PREDICTION = {"epsilon": "vp", "sample": "vp", "v_prediction": "vp", "flow_prediction": "flow"}


def x0_formula(prediction, x, out, alpha, sigma):
    """Of Ho et al. 2020, Salimans & Ho 2022 (variance preserving) and Liu et al. 2023 (alpha = 1 - sigma)."""
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * out
    return out if prediction == "sample" else x - sigma * out


def churn(process, alpha, sigma, alpha_next, sigma_next):
    """The noise of eta = 1: Song et al. 2021, eq. 16, and the ancestral step of the other processes."""
    if process == "vp":
        return sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
    if process == "edm":
        return sigma_next / sigma * math.sqrt(sigma**2 - sigma_next**2)
    level, level_next = sigma / alpha, sigma_next / alpha_next
    return alpha_next * level_next / level * math.sqrt(level**2 - level_next**2)


@pytest.mark.parametrize("prediction", OF_PREDICTION)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
def test_ddim_step_is_equation_12(prediction, eta, clip, last):
    process = OF_PREDICTION[prediction]
    alpha, sigma, alpha_next, sigma_next = PROCESS[process][last]
    x, out, uncond, noise = (randn((3, 2, 5), i, F64) for i in range(4))
    more = {"prediction": prediction, "eta": eta, "clip": clip, "uncond": uncond, "guidance_scale": 2.5, "noise": noise}
    step = twice(lambda: fd.ops.ddim_step(x, out, alpha, sigma, alpha_next, sigma_next, **more), x, out, uncond, noise)
    x0 = x0_formula(prediction, x, uncond + 2.5 * (out - uncond), alpha, sigma)
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    s = eta * churn(process, alpha, sigma, alpha_next, sigma_next)
    epsilon = (x - alpha * x0) / sigma
    expected = alpha_next * x0 + math.sqrt(sigma_next**2 - s**2) * epsilon + s * noise
    assert (step.x0 - x0).abs().max() <= 1e-12
    assert (step.x - expected).abs().max() <= 1e-12
    assert step.history == ()
    assert step.anchor is None


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_of_the_exploding_process(prediction, eta):
    alpha, sigma, alpha_next, sigma_next = PROCESS["edm"][0]
    x, out, noise = (randn((3, 2), i, F64) for i in range(3))
    step = fd.ops.ddim_step(x, out, alpha, sigma, alpha_next, sigma_next, prediction=prediction, eta=eta, noise=noise)
    x0 = x0_formula(prediction, x, out, alpha, sigma)
    s = eta * churn("edm", alpha, sigma, alpha_next, sigma_next)
    assert (step.x - (x0 + math.sqrt(sigma_next**2 - s**2) * (x - x0) / sigma + s * noise)).abs().max() <= 1e-12


@pytest.mark.parametrize("op", [fd.ops.ddim_step, fd.ops.posterior_step])
def test_levels_per_sample_are_the_levels_of_each_sample(op):
    x, out, noise = (randn((4, 2, 3), i, F64) for i in range(3))
    rows = [*PROCESS["vp"], (0.5, 0.75**0.5, 0.8, 0.6), *PROCESS["vp"][:1]]
    together = op(x, out, *torch.tensor(rows, dtype=F64).T, noise=noise)
    for k, level in enumerate(rows):
        alone = op(x[k : k + 1], out[k : k + 1], *level, noise=noise[k : k + 1])
        assert (together.x[k] - alone.x[0]).abs().max() <= 1e-14
        assert (together.x0[k] - alone.x0[0]).abs().max() <= 1e-14


@pytest.mark.parametrize("op", [fd.ops.ddim_step, fd.ops.posterior_step])
def test_steps_draw_the_noise_of_their_address(op):
    x, out = randn((3, 2, 5), 0, F64), randn((3, 2, 5), 1, F64)
    more = {"eta": 1.0} if op is fd.ops.ddim_step else {}
    drawn = op(x, out, *PROCESS["vp"][0], seed=[4, 5, 4], step=3, sample=[0, 1, 2], **more)
    noise = normal((3, 2, 5), seed=[4, 5, 4], step=3, sample=[0, 1, 2], stream=Stream.STEP, dtype=F64)
    assert torch.equal(drawn.x, op(x, out, *PROCESS["vp"][0], noise=noise, **more).x)


@shapes
@layouts
def test_ddim_step_shapes_and_layouts_in_float32(shape, layout):
    x, out = lay_out(randn(shape, 0), layout), lay_out(randn(shape, 1, BF16), layout)
    step = twice(lambda: fd.ops.ddim_step(x, out, *PROCESS["vp"][0]), x, out)
    x0 = (exact(x) - 0.8 * exact(out)) / 0.6
    truth = 0.8 * x0 + 0.6 * (exact(x) - 0.6 * x0) / 0.8
    size = 4 * (np.abs(exact(x)) + np.abs(exact(out)))
    assert_within(step.x0, x0, 8 * unit(F32) * size)
    assert_within(step.x, truth, 8 * unit(F32) * size)
    assert step.x.dtype == F32
    assert_kept_format(step.x, layout)


# ---- posterior_step -------------------------------------------------------------------------


def ho_posterior(alpha_bar, alpha_bar_next):
    """Coefficients of x and x0, posterior variance and beta: Ho et al. 2020, eq. 6 and 7."""
    alpha_t = alpha_bar / alpha_bar_next
    beta = 1 - alpha_t
    of_x0 = math.sqrt(alpha_bar_next) * beta / (1 - alpha_bar)
    of_x = math.sqrt(alpha_t) * (1 - alpha_bar_next) / (1 - alpha_bar)
    return of_x, of_x0, (1 - alpha_bar_next) / (1 - alpha_bar) * beta, beta


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
def test_posterior_step_is_equation_7(prediction, variance, clip, last):
    level = PROCESS["vp"][last]
    of_x, of_x0, small, beta = ho_posterior(level[0] ** 2, level[2] ** 2)
    channels = 4 if variance == "learned_range" else 2
    x, noise = randn((3, 2, 5), 0, F64), randn((3, 2, 5), 1, F64)
    out, uncond = randn((3, channels, 5), 2, F64), randn((3, channels, 5), 3, F64)
    more = {"prediction": prediction, "variance": variance, "clip": clip, "uncond": uncond, "guidance_scale": 0.5}
    step = twice(lambda: fd.ops.posterior_step(x, out, *level, noise=noise, **more), x, out, uncond, noise)
    x0 = x0_formula(prediction, x, (uncond + 0.5 * (out - uncond))[:, :2], level[0], level[1])
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    if last:
        std = 0.0
    elif variance == "learned_range":
        f = (out[:, 2:] + 1) / 2
        std = torch.exp((f * math.log(beta) + (1 - f) * math.log(small)) / 2)
    else:
        std = math.sqrt(small if variance == "fixed_small" else beta)
    assert (step.x0 - x0).abs().max() <= 1e-12
    assert (step.x - (of_x * x + of_x0 * x0 + std * noise)).abs().max() <= 1e-12


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(value):
    x, noise = randn((2, 3, 4), 0, F64), randn((2, 3, 4), 1, F64)
    prediction = randn((2, 3, 4), 2, F64)
    out = torch.cat((prediction, torch.full_like(prediction, value)), 1)
    learned = fd.ops.posterior_step(x, out, *PROCESS["vp"][0], variance="learned_range", noise=noise)
    name = "fixed_large" if value > 0 else "fixed_small"
    fixed = fd.ops.posterior_step(x, prediction, *PROCESS["vp"][0], variance=name, noise=noise)
    assert (learned.x - fixed.x).abs().max() <= 1e-12


def test_ddim_with_eta_one_is_the_posterior_step():
    x, out, noise = (randn((3, 2, 5), i, F64) for i in range(3))
    for level in PROCESS["vp"]:
        a = fd.ops.ddim_step(x, out, *level, eta=1.0, noise=noise)
        b = fd.ops.posterior_step(x, out, *level, noise=noise)
        assert (a.x - b.x).abs().max() <= 1e-12


def test_learned_variance_without_its_channels_is_refused():
    x = randn((2, 3, 4), 0)
    with pytest.raises(fd.InputError, match="out"):
        fd.ops.posterior_step(x, x, *PROCESS["vp"][0], variance="learned_range", noise=x)


# ---- group_norm_silu ------------------------------------------------------------------------


def numpy_group_norm(x, groups, eps=1e-5):
    """Two passes in extended precision; the normalised values, and the mean in units of their deviation."""
    grouped = exact(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    mean = grouped.mean(2, keepdims=True)
    deviation = np.sqrt(((grouped - mean) ** 2).mean(2, keepdims=True) + np.longdouble(eps))
    ratio = np.broadcast_to(np.abs(mean) / deviation, grouped.shape)
    return ((grouped - mean) / deviation).reshape(x.shape), ratio.reshape(x.shape)


def check_group_norm(shape, groups, dtype=F32, layout="contiguous", parts="wbsh", activation="silu", seed=0):
    work = wide_of(dtype)
    u = unit(work)
    x = lay_out(randn(shape, seed, dtype) * 3 + 1, layout)
    sizes = {"w": shape[1:2], "b": shape[1:2], "s": shape[:2], "h": shape[:2]}
    given_parts = {
        part: randn(size, seed + 1 + i, work) for i, (part, size) in enumerate(sizes.items()) if part in parts
    }
    weight, bias, scale_, shift = (given_parts.get(part) for part in "wbsh")
    more = {"scale": scale_, "shift": shift, "activation": activation}
    result = twice(lambda: fd.ops.group_norm_silu(x, groups, weight, bias, 1e-5, **more), x)
    assert result.dtype == dtype
    y, ratio = numpy_group_norm(x, groups)
    error = 16 * u * (1 + ratio) * (1 + np.abs(y))
    spread = {
        part: np.asarray(exact(value)).reshape(*((1,) * (2 - value.ndim)), *value.shape, *(1,) * (len(shape) - 2))
        for part, value in given_parts.items()
    }
    for gain, offset in ((spread.get("w", 1), spread.get("b", 0)), (1 + spread.get("s", 0), spread.get("h", 0))):
        error = error * np.abs(gain) + 4 * u * (np.abs(y) * (1 + np.abs(gain)) + np.abs(offset))
        y = y * gain + offset
    if activation == "silu":
        y = y / (1 + np.exp(-y))
        error = 1.2 * error + 8 * u * (1 + np.abs(y)) ** 2
    final = unit(dtype) * (np.abs(y) + error) if dtype != work else 0
    assert_within(result, np.broadcast_to(y, shape), error + final + TINY[dtype])
    assert_kept_format(result, layout)


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


@pytest.mark.parametrize("parts", ["", "w", "b", "wb", "s", "h", "sh", "ws", "bh"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_with_and_without_each_part(parts, layout):
    check_group_norm((2, 6, 4, 3), 2, layout=layout, parts=parts)


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


# ---- gradients ------------------------------------------------------------------------------


def leaf(shape, seed):
    return randn(shape, seed, F64).requires_grad_()


GRADIENTS = {
    "add_noise": lambda s: (fd.ops.add_noise, (leaf(s, 0), leaf(s[:1], 1), leaf(s[:1], 2), leaf(s, 3))),
    "diffusion_loss": lambda s: (
        fd.ops.diffusion_loss,
        (leaf(s, 0), leaf(s, 1), leaf(s[:1], 2), leaf(s[:1], 3), leaf(s[:1], 4), leaf(s, 5)),
    ),
    "guide": lambda s: (fd.ops.guide, (leaf(s, 0), leaf(s, 1), leaf(s[:1], 2))),
    "group_norm_silu": lambda s: (
        lambda x, w, b, scale_, shift: fd.ops.group_norm_silu(x, 2, w, b, scale=scale_, shift=shift),
        (leaf(s, 0), leaf(s[1:2], 1), leaf(s[1:2], 2), leaf(s[:2], 3), leaf(s[:2], 4)),
    ),
    "group_norm": lambda s: (lambda x: fd.ops.group_norm_silu(x, 2, activation="none"), (leaf(s, 0),)),
}


@pytest.mark.parametrize("op", GRADIENTS)
@pytest.mark.parametrize("shape", [(2, 4), (1, 2, 3), (2, 4, 2, 3), (1, 4, 2, 1, 2)], ids=str)
def test_gradients(op, shape):
    call, inputs = GRADIENTS[op](shape)
    assert torch.autograd.gradcheck(call, inputs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("op", GRADIENTS)
def test_second_derivatives(op):
    call, inputs = GRADIENTS[op]((2, 2, 3))
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-5, rtol=1e-3)


def test_the_loss_sends_its_gradient_to_the_network_in_the_network_s_dtype():
    out = randn((2, 3, 4), 0, BF16).requires_grad_()
    x0, f, g, w = randn((2, 3, 4), 1), torch.zeros(2), torch.ones(2), torch.tensor([1.0, 3.0])
    noise = randn((2, 3, 4), 2)
    fd.ops.diffusion_loss(out, x0, f, g, w, noise).sum().backward()
    truth = column(w, x0) * 2 * (exact(out) - exact(noise)) / 12
    assert out.grad.dtype == BF16
    assert_within(out.grad, truth, (unit(BF16) + 8 * unit(F32)) * np.abs(truth) + 1e-6)


# ---- properties -----------------------------------------------------------------------------

CASES = {
    "shape": st.lists(st.integers(1, 6), min_size=1, max_size=4).flatmap(
        lambda inner: st.integers(0, 4).map(lambda n: (n, *inner))
    ),
    "dtype": st.sampled_from([F32, F64]),
    "narrow": st.sampled_from([F32, F64, BF16, F16]),
    "layout": st.sampled_from(LAYOUTS),
    "flags": st.tuples(*[st.booleans()] * 5),
    "stored": st.integers(0, 3),
    "seed": st.integers(0, 2**31),
}


def property_add_noise(shape, dtype, narrow, layout, flags, stored, seed):
    check_add_noise(shape, narrow, layout, flags[0], dtype, seed)


def property_diffusion_loss(shape, dtype, narrow, layout, flags, stored, seed):
    check_diffusion_loss(shape, dtype, layout, narrow, seed)


def property_guide(shape, dtype, narrow, layout, flags, stored, seed):
    check_guide(shape, narrow, layout, flags[0], seed)


def property_affine_step(shape, dtype, narrow, layout, flags, stored, seed):
    check_affine_step(shape, dtype, narrow, layout, *flags[:2], stored, *flags[2:], seed=seed)


def property_group_norm_silu(shape, dtype, narrow, layout, flags, stored, seed):
    n, channels, *rest = shape
    parts = "".join(part for part, used in zip("wbsh", flags, strict=False) if used)
    activation = "silu" if flags[4] else "none"
    # At least two elements in each group: a group of one has its own test.
    check_group_norm((n, 2 * channels, *rest), channels, narrow, layout, parts, activation, seed)


PROPERTIES = {
    "add_noise": property_add_noise,
    "diffusion_loss": property_diffusion_loss,
    "guide": property_guide,
    "affine_step": property_affine_step,
    "group_norm_silu": property_group_norm_silu,
}
QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)
LONG = settings(QUICK, max_examples=10_000)
ops = pytest.mark.parametrize("op", PROPERTIES)


@ops
@QUICK
@given(case=st.fixed_dictionaries(CASES))
def test_properties(op, case):
    PROPERTIES[op](**case)


@pytest.mark.slow
@ops
@LONG
@given(case=st.fixed_dictionaries(CASES))
def test_properties_at_length(op, case):
    PROPERTIES[op](**case)


# ---- backends -------------------------------------------------------------------------------

OPS = ("add_noise", "posterior_step", "ddim_step", "guide", "affine_step", "diffusion_loss", "group_norm_silu")


def test_the_reference_serves_everything():
    with fd.backend("reference"):
        text = fd.explain()
        fd.ops.guide(torch.ones(1, 1), torch.ones(1, 1), 1.0)
    for op in OPS:
        line = next(line for line in text.splitlines() if line.startswith(op))
        assert line.split()[1] == "reference"


def test_explain_names_every_op_and_why_not_another_backend():
    with fd.backend("auto"):
        lines = fd.explain().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(OPS)
    assert "auto" in lines[0]
    for line in lines[1:]:
        chosen = line.split()[1]
        assert chosen in ("native", "triton", "reference")
        for other in {"native", "triton"} - {chosen}:
            assert chosen == "native" or f"not {other}: " in line


@pytest.mark.parametrize(
    ("name", "reason"), [("native", ": ."), ("triton", ": ."), ("cuda", "reference"), ("", "native")]
)
def test_a_backend_that_cannot_be_served_says_why(name, reason):
    with pytest.raises(fd.InputError, match=reason), fd.backend(name):
        pass


def fail_under(name):
    with fd.backend(name):
        raise RuntimeError(fd.explain().splitlines()[0])


def test_the_choice_ends_with_its_block_even_by_an_exception():
    with fd.backend("auto"):
        with pytest.raises(RuntimeError, match="choice: reference"):
            fail_under("reference")
        assert "choice: auto" in fd.explain()


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
W = torch.zeros(2)
TABLE = make_table(3)
VP = PROCESS["vp"][0]

BAD = {
    "add_noise: list": (lambda: fd.ops.add_noise([1.0], 1, 1, X), "x0"),
    "add_noise: integers": (lambda: fd.ops.add_noise(X.long(), 1, 1, X), "x0"),
    "add_noise: complex": (lambda: fd.ops.add_noise(X + 0j, 1, 1, X), "x0"),
    "add_noise: one dimension": (lambda: fd.ops.add_noise(W, 1, 1, W), "x0"),
    "add_noise: meta": (lambda: fd.ops.add_noise(X.to("meta"), 1, 1, seed=0), "x0"),
    "add_noise: noise shape": (lambda: fd.ops.add_noise(X, 1, 1, X[:1]), "noise"),
    "add_noise: noise device": (lambda: fd.ops.add_noise(X, 1, 1, X.to("meta")), "noise"),
    "add_noise: integer noise": (lambda: fd.ops.add_noise(X, 1, 1, X.int()), "noise"),
    "add_noise: noise list": (lambda: fd.ops.add_noise(X, 1, 1, [0.0]), "noise"),
    "add_noise: neither noise nor seed": (lambda: fd.ops.add_noise(X, 1, 1), "noise or seed"),
    "add_noise: both noise and seed": (lambda: fd.ops.add_noise(X, 1, 1, X, seed=0), "noise or seed"),
    "add_noise: alpha length": (lambda: fd.ops.add_noise(X, torch.ones(3), 1, X), "alpha"),
    "add_noise: alpha shape": (lambda: fd.ops.add_noise(X, torch.ones(2, 1), 1, X), "alpha"),
    "add_noise: alpha word": (lambda: fd.ops.add_noise(X, "a", 1, X), "alpha"),
    "add_noise: sigma list": (lambda: fd.ops.add_noise(X, 1, [1.0, 1.0], X), "sigma"),
    "add_noise: sigma none": (lambda: fd.ops.add_noise(X, 1, None, X), "sigma"),
    "add_noise: sample ids": (lambda: fd.ops.add_noise(X, 1, 1, seed=0, sample=[1]), "sample"),
    "add_noise: negative step": (lambda: fd.ops.add_noise(X, 1, 1, seed=0, step=-1), "step"),
    "loss: out shape": (lambda: fd.ops.diffusion_loss(X[:, :1], X, W, W, W, X), "out"),
    "loss: out type": (lambda: fd.ops.diffusion_loss(None, X, W, W, W, X), "out"),
    "loss: integer out": (lambda: fd.ops.diffusion_loss(X.long(), X, W, W, W, X), "out"),
    "loss: f length": (lambda: fd.ops.diffusion_loss(X, X, W[:1], W, W, X), "f must"),
    "loss: g shape": (lambda: fd.ops.diffusion_loss(X, X, W, X, W, X), "g must"),
    "loss: weight device": (lambda: fd.ops.diffusion_loss(X, X, W, W, W.to("meta"), X), "weight"),
    "loss: f a number": (lambda: fd.ops.diffusion_loss(X, X, 0.0, W, W, X), "f must"),
    "loss: weight a number": (lambda: fd.ops.diffusion_loss(X, X, W, W, 1.0, X), "weight"),
    "loss: both noise and seed": (lambda: fd.ops.diffusion_loss(X, X, W, W, W, X, seed=0), "noise or seed"),
    "guide: shape": (lambda: fd.ops.guide(X, X[:1], 1.0), "uncond"),
    "guide: dtype": (lambda: fd.ops.guide(X, X.double(), 1.0), "uncond"),
    "guide: cond integers": (lambda: fd.ops.guide(X.long(), X.long(), 1.0), "cond"),
    "guide: scale length": (lambda: fd.ops.guide(X, X, torch.ones(3)), "scale"),
    "guide: scale word": (lambda: fd.ops.guide(X, X, "strong"), "scale"),
    "affine: half state": (lambda: fd.ops.affine_step(X.half(), X, TABLE, 0), "x must"),
    "affine: out channels": (lambda: fd.ops.affine_step(X, torch.zeros(2, 5, 4), TABLE, 0), "out"),
    "affine: out device": (lambda: fd.ops.affine_step(X, X.to("meta"), TABLE, 0), "out"),
    "affine: uncond shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, uncond=torch.zeros(2, 6, 4)), "uncond"),
    "affine: table width": (lambda: fd.ops.affine_step(X, X, TABLE[:, 1:], 0), "table"),
    "affine: table device": (lambda: fd.ops.affine_step(X, X, TABLE.to("meta"), 0), "table"),
    "affine: table list": (lambda: fd.ops.affine_step(X, X, [[0.0]], 0), "table"),
    "affine: row too large": (lambda: fd.ops.affine_step(X, X, TABLE, 3), "row"),
    "affine: row negative": (lambda: fd.ops.affine_step(X, X, TABLE, -1), "row"),
    "affine: row fractional": (lambda: fd.ops.affine_step(X, X, TABLE, 0.5), "row"),
    "affine: row dtype": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, 1]).int()), "row"),
    "affine: rows length": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, 1, 2])), "row"),
    "affine: rows too large": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, 3])), "row"),
    "affine: rows negative": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, -1])), "row"),
    "affine: history of four": (lambda: fd.ops.affine_step(X, X, TABLE, 0, history=(X, X, X, X)), "history"),
    "affine: h2 shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, history=(X, X[:1])), "h2"),
    "affine: anchor shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, anchor=X[:, :1]), "anchor"),
    "affine: noise shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, noise=X[..., :2]), "noise"),
    "affine: both noise and seed": (lambda: fd.ops.affine_step(X, X, TABLE, 0, noise=X, seed=1), "noise or seed"),
    "ddim: eta above 1": (lambda: fd.ops.ddim_step(X, X, *VP, eta=1.5, noise=X), "eta"),
    "ddim: eta negative": (lambda: fd.ops.ddim_step(X, X, *VP, eta=-0.1, noise=X), "eta"),
    "ddim: eta NaN": (lambda: fd.ops.ddim_step(X, X, *VP, eta=math.nan, noise=X), "eta"),
    "ddim: eta without noise": (lambda: fd.ops.ddim_step(X, X, *VP, eta=0.5), "noise or seed"),
    "ddim: unknown prediction": (lambda: fd.ops.ddim_step(X, X, *VP, prediction="eps"), "prediction"),
    "ddim: no signal": (lambda: fd.ops.ddim_step(X, X, 0.0, 1.0, 0.6, 0.8), "finite"),
    "ddim: no noise": (lambda: fd.ops.ddim_step(X, X, 1.0, 0.0, 1.0, 0.0), "finite"),
    "ddim: level length": (lambda: fd.ops.ddim_step(X, X, torch.ones(3), *VP[1:]), "alpha"),
    "ddim: negative clip": (lambda: fd.ops.ddim_step(X, X, *VP, clip=-1.0), "clip"),
    "ddim: NaN clip": (lambda: fd.ops.ddim_step(X, X, *VP, clip=math.nan), "clip"),
    "ddim: NaN guidance": (lambda: fd.ops.ddim_step(X, X, *VP, uncond=X, guidance_scale=math.nan), "finite"),
    "posterior: without noise": (lambda: fd.ops.posterior_step(X, X, *VP), "noise or seed"),
    "posterior: unknown variance": (lambda: fd.ops.posterior_step(X, X, *VP, variance="learned", noise=X), "variance"),
    "posterior: bf16 state": (lambda: fd.ops.posterior_step(X.bfloat16(), X, *VP, noise=X), "x must"),
    "norm: groups": (lambda: fd.ops.group_norm_silu(X, 2), "groups"),
    "norm: no groups": (lambda: fd.ops.group_norm_silu(X, 0), "groups"),
    "norm: negative groups": (lambda: fd.ops.group_norm_silu(X, -3), "groups"),
    "norm: integers": (lambda: fd.ops.group_norm_silu(X.long(), 3), "x must"),
    "norm: one dimension": (lambda: fd.ops.group_norm_silu(W, 1), "x must"),
    "norm: weight length": (lambda: fd.ops.group_norm_silu(X, 3, torch.ones(2)), "weight"),
    "norm: bias shape": (lambda: fd.ops.group_norm_silu(X, 3, None, torch.ones(1, 3)), "bias"),
    "norm: scale shape": (lambda: fd.ops.group_norm_silu(X, 3, scale=torch.ones(3)), "scale"),
    "norm: shift shape": (lambda: fd.ops.group_norm_silu(X, 3, shift=torch.ones(2, 2)), "shift"),
    "norm: activation": (lambda: fd.ops.group_norm_silu(X, 3, activation="gelu"), "activation"),
    "table: unknown letter": (lambda: make_table(2, z=1.0), "letter"),
    "table: infinite letter": (lambda: make_table(2, a=math.inf), "coefficient a"),
    "table: NaN letter": (lambda: make_table(2, s=torch.tensor([0.0, math.nan])), "coefficient s"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()
