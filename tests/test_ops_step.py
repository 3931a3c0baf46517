"""Proves guidance and the solver steps against their formulas, over hostile shapes, dtypes and layouts."""

import math

import numpy as np
import pytest
import torch
from op_tools import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    PROCESS,
    SHAPES,
    assert_kept_format,
    assert_same_bits,
    assert_within,
    check_affine_step,
    check_guide,
    exact,
    lay_out,
    on_each_backend,
    randn,
    random_table,
    twice,
    unit,
)

import fastdiff as fd
from fastdiff.noise import Stream, normal

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
levels = pytest.mark.parametrize("per_sample", [False, True], ids=["scalar", "per_sample"])


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
@pytest.mark.parametrize("output_dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_affine_step_takes_a_network_of_any_dtype(dtype, output_dtype, learned):
    check_affine_step((2, 3, 5, 3), dtype, output_dtype, guided=True, learned=learned)


@pytest.mark.parametrize("stored", [0, 1, 2, 3])
@pytest.mark.parametrize("anchored", [False, True], ids=["no_anchor", "anchor"])
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("noisy", [False, True], ids=["quiet", "noisy"])
def test_affine_step_with_and_without_each_part(stored, anchored, guided, noisy):
    check_affine_step((3, 2, 4, 3), stored=stored, anchored=anchored, guided=guided, noisy=noisy)


def test_a_row_per_sample_is_that_row_for_each_sample(each_backend):
    x, output, noise = (randn((5, 2, 3), i) for i in range(3))
    table, row = random_table(5, 3, F32), torch.tensor([4, 0, 2, 2, 1])
    together = fd.ops.affine_step(x, output, table, row, noise=noise)
    for k, i in enumerate(row.tolist()):
        alone = fd.ops.affine_step(x[k : k + 1], output[k : k + 1], table, i, noise=noise[k : k + 1])
        assert torch.equal(together.x[k], alone.x[0])


@pytest.mark.parametrize(
    ("dtype", "each_backend"), [(F32, "reference"), (F64, "reference"), (F32, "native")], indirect=["each_backend"]
)
def test_affine_step_draws_the_noise_of_its_row(dtype, each_backend):
    x, output, table = randn((3, 2, 5), 0, dtype), randn((3, 2, 5), 1, dtype), random_table(4, 2, dtype)
    drawn = fd.ops.affine_step(x, output, table, 2, seed=9, sample=[5, 1, 0])
    noise = normal((3, 2, 5), seed=9, step=2, sample=[5, 1, 0], stream=Stream.STEP, dtype=dtype)
    assert torch.equal(drawn.x, fd.ops.affine_step(x, output, table, 2, noise=noise).x)
    later = fd.ops.affine_step(x, output, table, 2, seed=9, step=7, sample=[5, 1, 0])
    noise = normal((3, 2, 5), seed=9, step=7, sample=[5, 1, 0], stream=Stream.STEP, dtype=dtype)
    assert torch.equal(later.x, fd.ops.affine_step(x, output, table, 2, noise=noise).x)
    rows = torch.tensor([3, 0, 2])
    each = fd.ops.affine_step(x, output, table, rows, seed=9)
    noise = normal((3, 2, 5), seed=9, step=rows, stream=Stream.STEP, dtype=dtype)
    assert torch.equal(each.x, fd.ops.affine_step(x, output, table, rows, noise=noise).x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_drawn_noise_keeps_the_memory_format(layout, each_backend):
    x = lay_out(randn((2, 3, 4, 5), 0), layout)
    table = random_table(1, 0, F32)
    assert_kept_format(fd.ops.affine_step(x, x, table, 0, seed=0).x, layout)
    assert_kept_format(fd.ops.add_noise(x, 0.5, 0.5, seed=0), layout)
    contiguous = fd.ops.affine_step(x.contiguous(), x.contiguous(), table, 0, seed=0)
    assert torch.equal(fd.ops.affine_step(x, x, table, 0, seed=0).x, contiguous.x)


# ---- ddim_step ------------------------------------------------------------------------------

OF_PREDICTION = {"epsilon": "vp", "sample": "vp", "v_prediction": "vp", "flow_prediction": "flow"}


def x0_formula(prediction, x, output, alpha, sigma):
    """Of Ho et al. 2020, Salimans & Ho 2022 (variance preserving) and Liu et al. 2023 (alpha = 1 - sigma)."""
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return output if prediction == "sample" else x - sigma * output


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
    x, output, uncond, noise = (randn((3, 2, 5), i, F64) for i in range(4))
    more = {"prediction": prediction, "eta": eta, "clip": clip, "uncond": uncond, "guidance_scale": 2.5, "noise": noise}
    step = twice(
        lambda: fd.ops.ddim_step(x, output, alpha, sigma, alpha_next, sigma_next, **more), x, output, uncond, noise
    )
    x0 = x0_formula(prediction, x, uncond + 2.5 * (output - uncond), alpha, sigma)
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
    x, output, noise = (randn((3, 2), i, F64) for i in range(3))
    step = fd.ops.ddim_step(
        x, output, alpha, sigma, alpha_next, sigma_next, prediction=prediction, eta=eta, noise=noise
    )
    x0 = x0_formula(prediction, x, output, alpha, sigma)
    s = eta * churn("edm", alpha, sigma, alpha_next, sigma_next)
    assert (step.x - (x0 + math.sqrt(sigma_next**2 - s**2) * (x - x0) / sigma + s * noise)).abs().max() <= 1e-12


@pytest.mark.parametrize("op", [fd.ops.ddim_step, fd.ops.posterior_step])
def test_levels_per_sample_are_the_levels_of_each_sample(op):
    x, output, noise = (randn((4, 2, 3), i, F64) for i in range(3))
    rows = [*PROCESS["vp"], (0.5, 0.75**0.5, 0.8, 0.6), *PROCESS["vp"][:1]]
    together = op(x, output, *torch.tensor(rows, dtype=F64).T, noise=noise)
    for k, level in enumerate(rows):
        alone = op(x[k : k + 1], output[k : k + 1], *level, noise=noise[k : k + 1])
        assert (together.x[k] - alone.x[0]).abs().max() <= 1e-14
        assert (together.x0[k] - alone.x0[0]).abs().max() <= 1e-14


@pytest.mark.parametrize("op", [fd.ops.ddim_step, fd.ops.posterior_step])
def test_steps_draw_the_noise_of_their_address(op):
    x, output = randn((3, 2, 5), 0, F64), randn((3, 2, 5), 1, F64)
    more = {"eta": 1.0} if op is fd.ops.ddim_step else {}
    drawn = op(x, output, *PROCESS["vp"][0], seed=[4, 5, 4], step=3, sample=[0, 1, 2], **more)
    noise = normal((3, 2, 5), seed=[4, 5, 4], step=3, sample=[0, 1, 2], stream=Stream.STEP, dtype=F64)
    assert torch.equal(drawn.x, op(x, output, *PROCESS["vp"][0], noise=noise, **more).x)


@shapes
@layouts
def test_ddim_step_shapes_and_layouts_in_float32(shape, layout):
    x, output = lay_out(randn(shape, 0), layout), lay_out(randn(shape, 1, BF16), layout)
    steps = on_each_backend(F32, lambda: fd.ops.ddim_step(x, output, *PROCESS["vp"][0]), x, output)
    assert_same_bits(*steps)
    step = steps[-1]
    x0 = (exact(x) - 0.8 * exact(output)) / 0.6
    truth = 0.8 * x0 + 0.6 * (exact(x) - 0.6 * x0) / 0.8
    size = 4 * (np.abs(exact(x)) + np.abs(exact(output)))
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
    output, uncond = randn((3, channels, 5), 2, F64), randn((3, channels, 5), 3, F64)
    more = {"prediction": prediction, "variance": variance, "clip": clip, "uncond": uncond, "guidance_scale": 0.5}
    step = twice(lambda: fd.ops.posterior_step(x, output, *level, noise=noise, **more), x, output, uncond, noise)
    x0 = x0_formula(prediction, x, (uncond + 0.5 * (output - uncond))[:, :2], level[0], level[1])
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    if last:
        std = 0.0
    elif variance == "learned_range":
        f = (output[:, 2:] + 1) / 2
        std = torch.exp((f * math.log(beta) + (1 - f) * math.log(small)) / 2)
    else:
        std = math.sqrt(small if variance == "fixed_small" else beta)
    assert (step.x0 - x0).abs().max() <= 1e-12
    assert (step.x - (of_x * x + of_x0 * x0 + std * noise)).abs().max() <= 1e-12


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(value):
    x, noise = randn((2, 3, 4), 0, F64), randn((2, 3, 4), 1, F64)
    prediction = randn((2, 3, 4), 2, F64)
    output = torch.cat((prediction, torch.full_like(prediction, value)), 1)
    learned = fd.ops.posterior_step(x, output, *PROCESS["vp"][0], variance="learned_range", noise=noise)
    name = "fixed_large" if value > 0 else "fixed_small"
    fixed = fd.ops.posterior_step(x, prediction, *PROCESS["vp"][0], variance=name, noise=noise)
    assert (learned.x - fixed.x).abs().max() <= 1e-12


def test_ddim_with_eta_one_is_the_posterior_step():
    x, output, noise = (randn((3, 2, 5), i, F64) for i in range(3))
    for level in PROCESS["vp"]:
        a = fd.ops.ddim_step(x, output, *level, eta=1.0, noise=noise)
        b = fd.ops.posterior_step(x, output, *level, noise=noise)
        assert (a.x - b.x).abs().max() <= 1e-12


def test_learned_variance_without_its_channels_is_refused():
    x = randn((2, 3, 4), 0)
    with pytest.raises(fd.InputError, match="output"):
        fd.ops.posterior_step(x, x, *PROCESS["vp"][0], variance="learned_range", noise=x)
