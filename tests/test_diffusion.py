"""Proves the diffusion process against closed forms written out here."""

import numpy as np
import pytest
import torch
from diffusion_tools import (
    F64,
    PREDICTIONS,
    SCHEDULES,
    VARIANCE_PRESERVING,
    at,
    every_prediction,
    every_schedule,
    largest,
    randn,
    truth,
)
from scipy import stats

import fastdiff as fd
from fastdiff.ops import row as rows

# ---- the process ----------------------------------------------------------------------------


@every_schedule
def test_add_noise_is_equation_4(name):
    schedule, t = SCHEDULES[name], torch.tensor([0, 1, 50, 98, 99])
    x0, noise = randn((5, 2, 3), 0), randn((5, 2, 3), 1)
    x_t = fd.Diffusion(schedule).add_noise(x0, noise, t)
    for k, level in enumerate(t.tolist()):
        expected = float(schedule.alpha[level]) * x0[k] + float(schedule.sigma[level]) * noise[k]
        assert largest(x_t[k] - expected) <= 1e-14 * (1 + float(schedule.sigma[level]))


def posterior_letters(schedule):
    """a, b, variance and log-variance of every timestep, asked from the public posterior."""
    t = torch.arange(len(schedule))
    one, zero = torch.ones(len(t), 1, dtype=F64), torch.zeros(len(t), 1, dtype=F64)
    diffusion = fd.Diffusion(schedule)
    a, variance, log_variance = diffusion.posterior(zero, one, t)
    b = diffusion.posterior(one, zero, t)[0]
    return (column[:, 0].numpy() for column in (a, b, variance, log_variance))


def betas_of(schedule):
    """1 - alpha-bar(t) / alpha-bar(t-1) in extended precision, and alpha-bar before each step."""
    alpha_bar = schedule.alpha.numpy().astype(np.longdouble) ** 2
    before = np.concatenate(([np.longdouble(1)], alpha_bar[:-1]))
    return 1 - alpha_bar / before, alpha_bar, before


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_posterior_is_equation_7(name):
    a, b, variance, log_variance = posterior_letters(SCHEDULES[name])
    beta, alpha_bar, before = betas_of(SCHEDULES[name])
    assert np.abs(b - np.sqrt(before) * beta / (1 - alpha_bar)).max() <= 1e-11
    assert np.abs(a - np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)).max() <= 1e-11
    small = beta * (1 - before) / (1 - alpha_bar)
    assert np.abs(variance - small).max() <= 1e-12
    assert variance[0] == 0
    assert np.abs(log_variance[1:] - np.log(small[1:])).max() <= 1e-9
    assert log_variance[0] == log_variance[1]


def test_posterior_from_the_betas_themselves():
    beta = np.linspace(1e-4, 0.02, 1000, dtype=np.longdouble)
    a, b, variance, _ = posterior_letters(fd.Schedule.linear(1000))
    alpha_bar = np.cumprod(1 - beta)
    before = np.concatenate(([np.longdouble(1)], alpha_bar[:-1]))
    assert np.abs(b - np.sqrt(before) * beta / (1 - alpha_bar)).max() <= 1e-12
    assert np.abs(a - np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)).max() <= 1e-12
    assert np.abs(variance - beta * (1 - before) / (1 - alpha_bar)).max() <= 1e-12


@every_schedule
def test_the_posterior_over_x_t_is_the_marginal_one_step_earlier(name):
    schedule = SCHEDULES[name]
    a, b, variance, _ = posterior_letters(schedule)
    alpha, sigma = schedule.alpha.numpy(), schedule.sigma.numpy()
    alpha_before, sigma_before = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
    scale = np.maximum(1, sigma_before**2)
    assert (np.abs(a * alpha + b - alpha_before) <= 1e-12 * scale).all()
    assert (np.abs(a**2 * sigma**2 + variance - sigma_before**2) <= 1e-12 * scale).all()
    assert (variance[1:] > 0).all()
    assert (variance <= sigma_before**2).all()


@every_schedule
def test_one_step_after_another_is_the_marginal(name):
    schedule = SCHEDULES[name]
    levels = schedule.alpha[1:], schedule.sigma[1:], schedule.alpha[:-1], schedule.sigma[:-1]
    ratio = levels[0] / levels[2]
    composed = ratio**2 * levels[3] ** 2 + rows.forward_variance(*levels)
    assert ((composed - levels[1] ** 2).abs() <= 1e-12 * levels[1] ** 2).all()
    if schedule.variance_preserving:
        assert largest(rows.forward_variance(*levels) - (1 - ratio**2)) <= 1e-12


@pytest.mark.parametrize("name", ["linear", "cosine", "laplace"])
def test_bayes_rule_holds_pointwise(name):
    schedule, t = SCHEDULES[name], torch.arange(1, 100, 7)
    x0, before, x_t = (randn((len(t), 1), i) for i in range(3))
    mean, variance, _ = fd.Diffusion(schedule).posterior(x0, x_t, t)
    ratio = at(schedule.alpha, t, 2) / at(schedule.alpha, t - 1, 2)

    def log_density(x, mean, variance):
        return stats.norm.logpdf(x.numpy(), mean.numpy(), np.sqrt(variance.numpy()))

    def marginal(x, t):
        return log_density(x, at(schedule.alpha, t, 2) * x0, at(schedule.sigma, t, 2) ** 2)

    joint_forward = log_density(x_t, ratio * before, 1 - ratio**2) + marginal(before, t - 1)
    joint_backward = log_density(before, mean, variance) + marginal(x_t, t)
    assert np.abs(joint_forward - joint_backward).max() <= 1e-7 * np.abs(joint_forward).max()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4, 5), (3, 1, 2, 2, 2)])
def test_posterior_shapes(shape, dtype):
    x0, x_t = randn(shape, 0, dtype), randn(shape, 1, dtype)
    mean, variance, log_variance = fd.Diffusion(SCHEDULES["linear"]).posterior(x0, x_t, torch.tensor([0, 5, 99]))
    assert mean.shape == shape
    assert variance.shape == log_variance.shape == (3, *(1,) * (len(shape) - 1))
    assert mean.dtype == variance.dtype == log_variance.dtype == dtype
    assert largest(mean[0] - x0[0]) == 0, "at t = 0 the previous step is the data itself"


# ---- conversions ----------------------------------------------------------------------------


def well_conditioned(schedule):
    """Timesteps at which both the data and the noise can be read from x_t."""
    good = (schedule.alpha >= 0.1) & (schedule.sigma >= 0.1) & (schedule.sigma <= 10)
    return torch.arange(len(schedule))[good]


@every_schedule
@every_prediction
@pytest.mark.parametrize("to", PREDICTIONS)
def test_conversions_are_the_definitions_and_invert(name, prediction, to):
    schedule = SCHEDULES[name]
    diffusion, t = fd.Diffusion(schedule, prediction), well_conditioned(schedule)
    x0, noise = randn((len(t), 2, 3), 0), randn((len(t), 2, 3), 1)
    x_t, levels = diffusion.add_noise(x0, noise, t), (at(schedule.alpha, t), at(schedule.sigma, t))
    value = truth(prediction, x0, noise, *levels)
    converted = diffusion.convert(value, x_t, t, to)
    assert largest(converted - truth(to, x0, noise, *levels)) <= 1e-12
    assert largest(diffusion.convert(converted, x_t, t, prediction, source=to) - value) <= 1e-12


@every_schedule
@every_prediction
def test_target_and_predict_x0_agree(name, prediction):
    schedule = SCHEDULES[name]
    diffusion, t = fd.Diffusion(schedule, prediction), well_conditioned(schedule)
    x0, noise = randn((len(t), 2, 3), 0), randn((len(t), 2, 3), 1)
    target = diffusion.target(x0, noise, t)
    assert largest(target - truth(prediction, x0, noise, at(schedule.alpha, t), at(schedule.sigma, t))) <= 1e-13
    assert largest(diffusion.predict_x0(target, diffusion.add_noise(x0, noise, t), t) - x0) <= 1e-12


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow_prediction"])
def test_x0_is_found_where_no_signal_is_left(prediction):
    diffusion, t = fd.Diffusion(SCHEDULES["zero_snr"], prediction), torch.tensor([99, 99])
    x0, noise = randn((2, 3), 0), randn((2, 3), 1)
    assert torch.equal(diffusion.add_noise(x0, noise, t), noise)
    assert largest(diffusion.predict_x0(diffusion.target(x0, noise, t), noise, t) - x0) <= 1e-14


def test_the_network_s_input_by_process():
    t, x = torch.tensor([0, 50, 99]), randn((3, 2), 0)
    for name, schedule in SCHEDULES.items():
        x_in, times = fd.Diffusion(schedule).model_input(x, t)
        single, told = fd.Diffusion(schedule).model_input(x.float(), t)
        assert single.dtype == torch.float32
        assert told.dtype == (torch.float32 if times.is_floating_point() else torch.int64)
        sigma = schedule.sigma[t]
        if name == "edm":
            assert largest(x_in - x / torch.sqrt(sigma**2 + 0.25)[:, None]) <= 1e-14
            assert largest(times - sigma.log() / 4) <= 1e-14
            continue
        assert torch.equal(x_in, x)
        if name == "flow":
            assert largest(times - 1000 * sigma) <= 1e-10
        else:
            assert times.dtype == torch.int64
            assert torch.equal(times, t)


# ---- peers ----------------------------------------------------------------------------------


def test_diffusers_large_log_variance_is_not_a_number():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(10)
    x = torch.ones(1, 1)
    assert torch.isnan(scheduler.step(x, scheduler.timesteps[3], x).prev_sample).all()
    alpha, sigma = (table[[500, 400]].tolist() for table in (fd.Schedule.linear().alpha, fd.Schedule.linear().sigma))
    ours = fd.ops.posterior_step(x, x, alpha[0], sigma[0], alpha[1], sigma[1], variance="fixed_large", noise=x)
    assert torch.isfinite(ours.x).all()


def test_diffusers_adds_no_noise_at_all_to_early_bfloat16():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler()
    t, zero = torch.arange(10), torch.zeros(10, 1, dtype=torch.bfloat16)
    assert (scheduler.add_noise(zero, zero + 1, t) == 0).all()
    schedule = fd.Schedule.linear()
    ours = fd.Diffusion(schedule).add_noise(zero, zero + 1, t)
    assert ours.dtype == torch.bfloat16
    assert ((ours[:, 0].double() / schedule.sigma[t] - 1).abs() <= 2.0**-8).all()


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
TIMES = torch.tensor([0, 9])
D = fd.Diffusion(fd.Schedule.linear(10))
BAD = {
    "schedule": (lambda: fd.Diffusion("cosine"), "schedule"),
    "prediction": (lambda: fd.Diffusion(D.schedule, "eps"), "prediction"),
    "variance": (lambda: fd.Diffusion(D.schedule, variance="learned"), "variance"),
    "t too large": (lambda: D.add_noise(X, X, torch.tensor([0, 10])), "0...9"),
    "t negative": (lambda: D.add_noise(X, X, torch.tensor([-1, 0])), "0...9"),
    "t fractional": (lambda: D.add_noise(X, X, torch.tensor([0.0, 1.0])), "t must"),
    "t int32": (lambda: D.add_noise(X, X, TIMES.int()), "t must"),
    "t list": (lambda: D.add_noise(X, X, [0, 1]), "t must"),
    "t length": (lambda: D.add_noise(X, X, torch.tensor([1])), "t must"),
    "noise shape": (lambda: D.add_noise(X, X[:1], TIMES), "noise"),
    "no noise": (lambda: D.add_noise(X, None, TIMES), "noise"),
    "x_t shape": (lambda: D.posterior(X, X[..., :1], TIMES), "x_t"),
    "integer x0": (lambda: D.posterior(X.long(), X, TIMES), "x0"),
    "target noise": (lambda: D.target(X, X[:, :1], TIMES), "noise"),
    "convert to": (lambda: D.convert(X, X, TIMES, "noise"), "prediction"),
    "convert from": (lambda: D.convert(X, X, TIMES, "sample", source="noise"), "prediction"),
    "convert x_t": (lambda: D.convert(X, X[:1], TIMES, "sample"), "x_t"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()


def test_epsilon_says_nothing_about_x0_without_signal():
    diffusion = fd.Diffusion(SCHEDULES["zero_snr"])
    with pytest.raises(fd.InputError, match="zero terminal SNR"):
        diffusion.predict_x0(X, X, torch.tensor([0, 99]))
