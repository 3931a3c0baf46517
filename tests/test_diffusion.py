"""Proves the diffusion process and its losses against closed forms written out here."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import fastdiff as fd
from fastdiff.noise import Stream, normal, uniform_words
from fastdiff.ops import row as rows

F64 = torch.float64
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
KINDS = ("simple", "vlb", "hybrid", "min_snr", "snr_sample")
SCHEDULES = {
    "linear": fd.Schedule.linear(100, beta_end=0.15),
    "scaled_linear": fd.Schedule.scaled_linear(100, beta_end=0.1),
    "cosine": fd.Schedule.cosine(100),
    "sigmoid": fd.Schedule.sigmoid(100, beta_end=0.15),
    "laplace": fd.Schedule.laplace(100),
    "zero_snr": fd.Schedule.linear(100, beta_end=0.15).rescale_zero_terminal_snr(),
    "edm": fd.Schedule.edm(100),
    "flow": fd.Schedule.flow(100),
}
VARIANCE_PRESERVING = [name for name, schedule in SCHEDULES.items() if schedule.variance_preserving]
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def randn(shape, seed, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def at(table, t, ndim=3):
    return table[t].reshape(-1, *(1,) * (ndim - 1))


def largest(difference):
    return float(difference.detach().abs().max())


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


def truth(prediction, x0, noise, alpha, sigma):
    """The four targets by their definitions."""
    norm = (alpha**2 + sigma**2) ** 0.5
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": (alpha * noise - sigma * x0) / norm,
        "flow_prediction": noise - x0,
    }[prediction]


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


# ---- losses ---------------------------------------------------------------------------------


def network(x, t):
    """A network that is neither right nor constant."""
    return 0.3 * x - 0.1 * torch.tanh(x) + 0.001 * t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def with_variance(x, t):
    """The same with variance channels that reach outside of [-1, 1]."""
    return torch.cat((network(x, t), 1.5 * torch.sin(3 * x)), 1)


def flow_x0(x_t, out, alpha, sigma):
    return (x_t - sigma * out) / (alpha + sigma)


def x0_of(prediction, x_t, out, alpha, sigma):
    """The estimate of x0 of the variance-preserving and the straight process."""
    return {
        "epsilon": (x_t - sigma * out) / alpha if (alpha > 0).all() else math.nan * out,
        "sample": out,
        "v_prediction": alpha * x_t - sigma * out,
        "flow_prediction": flow_x0(x_t, out, alpha, sigma),
    }[prediction]


def process_of(prediction):
    return SCHEDULES["flow" if prediction == "flow_prediction" else "linear"]


LATE = torch.tensor([1, 2, 30, 60, 97, 98])


class Drawn:
    """A batch as the loss draws it: x_t from the training noise of its address."""

    def __init__(self, schedule, prediction, t, address):
        shape = (len(t), 2, 3)
        self.x0 = randn(shape, 0).clamp(-1, 1)
        self.noise = normal(shape, **address, stream=Stream.TRAINING, dtype=F64)
        self.alpha, self.sigma = at(schedule.alpha, t), at(schedule.sigma, t)
        self.x_t = self.alpha * self.x0 + self.sigma * self.noise
        self.out = network(self.x_t, 1000 * schedule.sigma[t] if prediction == "flow_prediction" else t)
        self.target = truth(prediction, self.x0, self.noise, self.alpha, self.sigma)
        self.error = ((self.out - self.target) ** 2).mean((1, 2))
        self.x0_error = ((x0_of(prediction, self.x_t, self.out, self.alpha, self.sigma) - self.x0) ** 2).mean((1, 2))
        self.snr = (schedule.alpha[t] / schedule.sigma[t]) ** 2


ADDRESS = {"seed": 4, "step": 17, "sample": [3, 1, 4, 15, 9, 2]}


@every_prediction
def test_simple_loss(prediction):
    schedule = process_of(prediction)
    batch = Drawn(schedule, prediction, LATE, ADDRESS)
    loss = fd.Diffusion(schedule, prediction).loss(network, batch.x0, LATE, **ADDRESS)
    assert loss.shape == ()
    assert abs(float(loss - batch.error.mean())) <= 1e-12


@every_prediction
def test_min_snr_loss_has_the_closed_form_weights(prediction):
    schedule, t = process_of(prediction), torch.tensor([0, 2, 30, 60, 97, 99])
    if prediction == "flow_prediction":
        t[-1] = 98  # the last level of the straight process has no signal
    batch = Drawn(schedule, prediction, t, ADDRESS)
    capped = batch.snr.clamp(max=5)
    weight = {
        "epsilon": capped / batch.snr,
        "sample": capped,
        "v_prediction": capped / (batch.snr + 1),
        "flow_prediction": capped * schedule.sigma[t] ** 2,
    }[prediction]
    loss = fd.Diffusion(schedule, prediction).loss(network, batch.x0, t, kind="min_snr", **ADDRESS)
    assert abs(float(loss - (weight * batch.error).mean())) <= 1e-12
    assert {True, False} == set((batch.snr > 5).tolist()), "the case must have both sides of the cap"


@every_prediction
def test_snr_sample_loss_is_the_bound_in_x0_space(prediction):
    schedule, t = process_of(prediction), torch.tensor([0, 1, 2, 30, 60, 98])
    batch = Drawn(schedule, prediction, t, ADDRESS)
    weight = torch.stack([schedule.snr[i - 1] - schedule.snr[i] if i else schedule.snr[0] for i in t.tolist()]) / 2
    loss = fd.Diffusion(schedule, prediction).loss(network, batch.x0, t, kind="snr_sample", **ADDRESS)
    expected = float((weight * batch.x0_error).mean())
    assert float(loss) == pytest.approx(expected, rel=1e-11)


@every_prediction
def test_vlb_loss_is_the_kl_in_closed_form(prediction):
    schedule = process_of(prediction)
    batch = Drawn(schedule, prediction, LATE, ADDRESS)
    weight = (schedule.snr[LATE - 1] - schedule.snr[LATE]) / 2
    loss = fd.Diffusion(schedule, prediction).loss(network, batch.x0, LATE, kind="vlb", **ADDRESS)
    expected = 100 * float((weight * batch.x0_error).mean()) / math.log(2)
    assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_one_term_of_the_vlb_loss_is_that_term_of_bits_per_dim():
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "v_prediction", "learned_range"), randn((3, 2, 3), 5)
    t = torch.tensor([1, 40, 99])
    terms = [diffusion.loss(with_variance, x0[[k]], t[[k]], kind="vlb", seed=1, sample=[k]) / 100 for k in range(3)]
    noise = normal(x0.shape, seed=1, stream=Stream.TRAINING, dtype=F64)
    x_t = diffusion.add_noise(x0, noise, t)
    expected = learned_kl(diffusion.schedule, x0, x_t, t, with_variance(x_t, t)) / math.log(2)
    assert np.abs(torch.stack(terms).numpy() - expected.numpy()).max() <= 1e-10


def learned_kl(schedule, x0, x_t, t, out):
    """KL of the true posterior from the model's of a v-prediction with learned range, nats per dimension, t > 0."""
    alpha, sigma, before, sigma_before = (
        at(table, i) for i in (t, t - 1) for table in (schedule.alpha, schedule.sigma)
    )
    beta = 1 - (alpha / before) ** 2
    small = beta * sigma_before**2 / sigma**2
    estimate, f = alpha * x_t - sigma * out[:, :2], (out[:, 2:] + 1) / 2
    log_variance = f * beta.log() + (1 - f) * small.log()
    difference = before * beta / sigma**2 * (x0 - estimate)
    kl = 0.5 * (log_variance - small.log() - 1 + (small + difference**2) / log_variance.exp())
    return kl.mean((1, 2))


@every_prediction
def test_hybrid_loss_is_simple_plus_a_thousandth_of_the_bound(prediction):
    diffusion, x0 = fd.Diffusion(process_of(prediction), prediction, "learned_range"), randn((6, 2, 3), 0)
    simple, vlb, hybrid = (diffusion.loss(with_variance, x0, LATE, kind=kind, **ADDRESS) for kind in KINDS[:3])
    assert float(hybrid) == pytest.approx(float(simple) + 1e-3 * float(vlb), rel=1e-12)


def gradient(diffusion, kind, out, x0, t):
    leaf = out.clone().requires_grad_()
    diffusion.loss(lambda x, times: leaf, x0, t, kind=kind, decoder="gaussian", **ADDRESS).backward()
    return leaf.grad[:, :2], leaf.grad[:, 2:]


def test_the_bound_in_the_hybrid_loss_trains_only_the_variance():
    diffusion, t = fd.Diffusion(SCHEDULES["cosine"], "epsilon", "learned_range"), torch.tensor([0, 1, 5, 30, 60, 95])
    x0, out = randn((6, 2, 3), 0), randn((6, 4, 3), 1)
    simple, vlb, hybrid = (gradient(diffusion, kind, out, x0, t) for kind in KINDS[:3])
    assert torch.equal(hybrid[0], simple[0])
    assert largest(simple[1]) == 0
    assert largest(vlb[0]) > 0, "the bound alone does train the prediction"
    assert (hybrid[1] != 0).all()
    assert largest(hybrid[1] - 1e-3 * vlb[1]) <= 1e-12 * largest(hybrid[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_the_ends_of_the_byte_range_are_finite(kind):
    diffusion = fd.Diffusion(SCHEDULES["cosine"], "epsilon", "learned_range")
    x0 = torch.tensor([-1.0, 1.0, 0.0]).repeat(4, 2, 1)
    out = randn((4, 4, 3), 2, torch.float32).requires_grad_()
    diffusion.loss(lambda x, t: 20 * out, x0, torch.zeros(4, dtype=torch.int64), kind=kind).backward()
    assert torch.isfinite(out.grad).all()
    assert largest(out.grad) > 0


def t_first_and_last(schedule):
    return torch.tensor([0, len(schedule) - 1])


@every_schedule
@every_prediction
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_losses_are_finite_at_both_ends(name, prediction, kind, variance):
    schedule, t = SCHEDULES[name], t_first_and_last(SCHEDULES[name])
    diffusion, x0 = fd.Diffusion(schedule, prediction, variance), randn((2, 2, 3), 0, torch.float32).clamp(-1, 1)
    model = with_variance if variance == "learned_range" else network
    if prediction == "epsilon" and schedule.zero_terminal_snr and kind in ("vlb", "hybrid", "snr_sample"):
        with pytest.raises(fd.InputError, match="zero terminal SNR"):
            diffusion.loss(model, x0, t, kind=kind)
    else:
        assert torch.isfinite(diffusion.loss(model, x0, t, kind=kind))


@every_prediction
def test_min_snr_weights_at_zero_terminal_snr(prediction):
    diffusion, t = fd.Diffusion(SCHEDULES["zero_snr"], prediction), torch.tensor([99])
    x0 = randn((1, 2, 3), 0)
    simple, weighted = (float(diffusion.loss(network, x0, t, kind=kind)) for kind in ("simple", "min_snr"))
    assert simple > 0
    assert weighted == (simple if prediction == "epsilon" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_does_not_depend_on_how_a_batch_is_split(kind):
    diffusion = fd.Diffusion(SCHEDULES["cosine"], "v_prediction", "learned_range")
    x0, place = randn((12, 2, 3), 0).clamp(-1, 1), {"kind": kind, "seed": 3, "step": 8}
    whole = diffusion.loss(with_variance, x0, **place)
    for size in (1, 3, 4):
        parts = [diffusion.loss(with_variance, x0[ids], sample=ids, **place) for ids in torch.arange(12).split(size)]
        assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-12)
    assert float(whole) != float(diffusion.loss(with_variance, x0, **{**place, "step": 9}))


def test_the_loss_draws_its_timesteps_from_the_address():
    diffusion, seen = fd.Diffusion(SCHEDULES["linear"]), []

    def model(x, t):
        seen.append(t)
        return x

    x0 = randn((64, 2, 3), 0)
    diffusion.loss(model, x0, seed=5, step=6)
    words = uniform_words(64, seed=5, step=6, stream=Stream.TIMESTEP)
    assert seen[0].tolist() == [int(word) * 100 // 2**32 for word in words]
    assert torch.equal(seen[0], diffusion.draw_timesteps(64, seed=5, step=6))


def test_drawn_timesteps_are_uniform():
    diffusion = fd.Diffusion(SCHEDULES["linear"])
    t = torch.cat([diffusion.draw_timesteps(1000, seed=0, step=step) for step in range(100)])
    counts = np.bincount(t.numpy(), minlength=100)
    assert len(counts) == 100
    assert stats.chisquare(counts).pvalue > 1e-4


def test_drawn_timesteps_do_not_depend_on_the_batch():
    diffusion = fd.Diffusion(SCHEDULES["linear"])
    whole = diffusion.draw_timesteps(10, seed=2, step=3)
    assert torch.equal(diffusion.draw_timesteps(3, seed=2, step=3, sample=[7, 0, 7]), whole[[7, 0, 7]])
    assert fd.Diffusion(fd.Schedule.linear(1)).draw_timesteps(5, seed=0, step=0).tolist() == [0] * 5


def test_conditions_reach_the_model():
    seen = {}

    def model(x, t, **cond):
        seen.update(cond)
        return x

    x0, labels = randn((4, 2), 0), torch.arange(4)
    fd.Diffusion(SCHEDULES["linear"]).loss(model, x0, y=labels, mode="fast")
    assert torch.equal(seen["y"], labels)
    assert seen["mode"] == "fast"


def test_a_model_may_return_an_object_with_a_sample():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    diffusion, x0 = fd.Diffusion(SCHEDULES["linear"]), randn((4, 2), 0)
    assert diffusion.loss(lambda x, t: Output(x), x0) == diffusion.loss(lambda x, t: x, x0)


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


def test_diffusers_min_snr_weight_is_not_a_number_at_zero_terminal_snr():
    diffusers = pytest.importorskip("diffusers")
    training_utils = pytest.importorskip("diffusers.training_utils")
    snr = training_utils.compute_snr(diffusers.DDPMScheduler(rescale_betas_zero_snr=True), torch.tensor([999]))
    assert torch.isnan(snr.clamp(max=5) / snr).all()
    schedule = fd.Schedule.linear().rescale_zero_terminal_snr()
    loss = fd.Diffusion(schedule).loss(network, randn((1, 4), 0), torch.tensor([999]), kind="min_snr")
    assert torch.isfinite(loss)


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
TIMES = torch.tensor([0, 9])
D = fd.Diffusion(fd.Schedule.linear(10))
LEARNED = fd.Diffusion(fd.Schedule.linear(10), variance="learned_range")
NAN = torch.full_like(X, math.nan)
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
    "loss kind": (lambda: D.loss(network, X, kind="l1"), "loss"),
    "loss x0": (lambda: D.loss(network, X.long()), "x0"),
    "loss NaN": (lambda: D.loss(network, NAN), "x0"),
    "loss infinite": (lambda: D.loss(network, X + math.inf), "x0"),
    "loss one dimension": (lambda: D.loss(network, X[:, 0, 0]), "x0"),
    "loss sample ids": (lambda: D.loss(network, X, sample=[1]), "sample"),
    "loss channels": (lambda: D.loss(with_variance, X), "variance=fixed_small"),
    "loss variance channels": (lambda: LEARNED.loss(network, X), "variance=learned_range"),
    "loss model": (lambda: D.loss(lambda x, t: None, X), "model"),
    "loss decoder": (lambda: D.loss(network, X, TIMES, kind="vlb", decoder="bytes"), "decoder"),
    "loss bytes": (lambda: D.loss(network, X + 2, TIMES, kind="vlb"), "x0"),
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
