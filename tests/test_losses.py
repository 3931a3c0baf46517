"""Proves the losses against closed forms written out here, each sample's and the mean."""

import math

import numpy as np
import pytest
import torch
from diffusion_tools import (
    EARLY,
    F64,
    KINDS,
    LATE,
    SCHEDULES,
    at,
    every_kind,
    every_prediction,
    every_schedule,
    every_variance,
    largest,
    network,
    process_of,
    randn,
    truth,
    with_variance,
    x0_of,
)
from scipy import special

import fastdiff as fd
from fastdiff.noise import Stream, normal


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


def test_the_bound_of_a_fixed_variance_trains_nothing():
    diffusion, x0, out = fd.Diffusion(SCHEDULES["cosine"], "epsilon"), randn((6, 2, 3), 0), randn((6, 2, 3), 1)
    simple, hybrid = (gradient(diffusion, kind, out, x0, EARLY)[0] for kind in ("simple", "hybrid"))
    assert torch.equal(hybrid, simple)


@every_kind
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
@every_kind
@every_variance
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


@every_kind
def test_the_loss_does_not_depend_on_how_a_batch_is_split(kind):
    diffusion = fd.Diffusion(SCHEDULES["cosine"], "v_prediction", "learned_range")
    x0, place = randn((12, 2, 3), 0).clamp(-1, 1), {"kind": kind, "seed": 3, "step": 8}
    whole = diffusion.loss(with_variance, x0, **place)
    for size in (1, 3, 4):
        parts = [diffusion.loss(with_variance, x0[ids], sample=ids, **place) for ids in torch.arange(12).split(size)]
        assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-12)
    assert float(whole) != float(diffusion.loss(with_variance, x0, **{**place, "step": 9}))


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


def test_diffusers_min_snr_weight_is_not_a_number_at_zero_terminal_snr():
    diffusers = pytest.importorskip("diffusers")
    training_utils = pytest.importorskip("diffusers.training_utils")
    snr = training_utils.compute_snr(diffusers.DDPMScheduler(rescale_betas_zero_snr=True), torch.tensor([999]))
    assert torch.isnan(snr.clamp(max=5) / snr).all()
    schedule = fd.Schedule.linear().rescale_zero_terminal_snr()
    loss = fd.Diffusion(schedule).loss(network, randn((1, 4), 0), torch.tensor([999]), kind="min_snr")
    assert torch.isfinite(loss)


# ---- one loss per sample --------------------------------------------------------------------


def by_hand(diffusion, kind, decoder, t, x0, noise, model):
    """The losses, each from the scalars of its own timestep."""
    samples = zip(t, x0, noise, strict=True)
    return torch.stack([loss_by_hand(diffusion, kind, decoder, *sample, model) for sample in samples])


def loss_by_hand(diffusion, kind, decoder, t, x0, noise, model):
    schedule, prediction = diffusion.schedule, diffusion.prediction
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    x_t = alpha * x0 + sigma * noise
    out, v = model(x_t[None], schedule.c_noise[t][None])[0].tensor_split([len(x0)])
    error = (out - truth(prediction, x0, noise, alpha, sigma)).square().mean()
    estimate = x0_of(prediction, x_t, out, alpha, sigma)
    of_x0, snr = (estimate - x0).square().mean(), (alpha / sigma) ** 2
    if kind == "simple":
        return error
    if kind == "min_snr":
        return min(snr, 5) * of_x0
    if kind == "snr_sample":
        return ((schedule.alpha[t - 1] / schedule.sigma[t - 1]) ** 2 - snr if t else snr) / 2 * of_x0
    bits = nats_by_hand(schedule, diffusion.variance, decoder, int(t), x0, estimate, v).mean() / math.log(2)
    return len(schedule) * bits if kind == "vlb" else error + 1e-3 * len(schedule) * bits


def variances(schedule, t):
    """Of the posterior and of the forward step, and the posterior mean's weight of x0."""
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    before, sigma_before = (schedule.alpha[t - 1], schedule.sigma[t - 1]) if t else (1, 0)
    large = sigma**2 - (alpha / before * sigma_before) ** 2
    return large * sigma_before**2 / sigma**2, large, before * large / sigma**2


def nats_by_hand(schedule, variance, decoder, t, x0, estimate, v):
    small, large, weight = variances(schedule, t)
    if t == 0:
        small, _, _ = variances(schedule, 1)
    large = small if variance == "fixed_small" or (variance == "fixed_large" and t == 0) else large
    f = (1 + v) / 2 if len(v) else 1
    log_variance = f * large.log() + (1 - f) * small.log() + 0 * x0
    if t:
        error = weight * (x0 - estimate)
        return (log_variance - small.log() - 1 + (small + error**2) / log_variance.exp()) / 2
    if decoder == "gaussian":
        return (math.log(2 * math.pi) + log_variance + (x0 - estimate) ** 2 / log_variance.exp()) / 2
    std, edges = (log_variance / 2).exp(), [x0 - 1 / 255 - estimate, x0 + 1 / 255 - estimate]
    low, high = (edge.div(std).numpy() for edge in edges)
    low, high = np.where(x0 <= -0.999, -np.inf, low), np.where(x0 >= 0.999, np.inf, high)
    flip = low + high > 0  # the mass is the same on the left flank, where it is not 1 - 1
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    return torch.from_numpy(-special.log_ndtr(high) - np.log1p(-np.exp(special.log_ndtr(low) - special.log_ndtr(high))))


@every_prediction
@every_variance
@every_kind
@pytest.mark.parametrize("decoder", ["discrete", "gaussian"])
def test_each_sample_s_loss_is_the_formula(prediction, variance, kind, decoder):
    diffusion, x0 = fd.Diffusion(process_of(prediction), prediction, variance), randn((6, 2, 3), 0).clamp(-1, 1)
    model = with_variance if variance == "learned_range" else network
    noise = normal(x0.shape, **ADDRESS, stream=Stream.TRAINING, dtype=F64)
    expected = by_hand(diffusion, kind, decoder, EARLY, x0, noise, model)
    losses = diffusion.losses(model, x0, EARLY, kind=kind, decoder=decoder, **ADDRESS)
    assert losses.shape == (6,)
    assert losses.dtype == F64
    assert float(((losses - expected) / expected).abs().max()) <= 1e-9
    single = diffusion.losses(model, x0.float(), EARLY, kind=kind, decoder=decoder, **ADDRESS)
    assert single.dtype == torch.float32
    assert float(((single - expected) / expected).abs().max()) <= 2e-3


@every_kind
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_loss_is_their_mean_and_so_is_its_gradient(kind, dtype):
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "epsilon", "learned_range"), randn((6, 2, 3), 0).clamp(-1, 1)
    x0, out, where = x0.to(dtype), randn((6, 4, 3), 1, dtype).requires_grad_(), {"kind": kind, **ADDRESS}
    losses, loss = (run(lambda x, t: out, x0, EARLY, **where) for run in (diffusion.losses, diffusion.loss))
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(losses.mean(), loss)
    (expected,) = torch.autograd.grad(loss, out, retain_graph=True)
    found = torch.zeros_like(out)
    for k in range(6):
        (gradient,) = torch.autograd.grad(losses[k], out, retain_graph=True)
        assert largest(gradient) == largest(gradient[k]), "of no other sample"
        found += gradient / 6
    assert largest(found - expected) <= {F64: 1e-15, torch.float32: 1e-6}.get(dtype, 1e-2) * largest(expected)


@every_kind
def test_a_network_may_write_to_its_input(kind):
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "epsilon"), randn((6, 2, 3), 0).clamp(-1, 1)
    losses, expected = (
        diffusion.losses(m, x0, EARLY, kind=kind) for m in (lambda x, t: x.mul_(0.5), lambda x, t: x / 2)
    )
    assert torch.equal(losses, expected)


@every_kind
@every_variance
def test_a_sample_s_loss_does_not_depend_on_the_others(kind, variance, each_backend):
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "v_prediction", variance), randn((12, 3, 8, 8), 0, torch.float32)
    model = with_variance if variance == "learned_range" else network
    x0, place = x0.clamp(-1, 1), {"kind": kind, "seed": 3, "step": 8}
    t = torch.arange(12) * 9  # 0 among them
    whole = diffusion.losses(model, x0, t, **place)
    for size in (1, 5):
        parts = [diffusion.losses(model, x0[i], t[i], sample=i, **place) for i in torch.arange(12).split(size)]
        assert torch.equal(torch.cat(parts), whole)
    drawn = diffusion.losses(model, x0, **place)
    assert torch.equal(diffusion.losses(model, x0[5:], sample=torch.arange(5, 12), **place), drawn[5:])


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
TIMES = torch.tensor([0, 9])
D = fd.Diffusion(fd.Schedule.linear(10))
LEARNED = fd.Diffusion(fd.Schedule.linear(10), variance="learned_range")
NAN = torch.full_like(X, math.nan)
BAD = {
    "kind": (lambda: D.loss(network, X, kind="l1"), "loss"),
    "x0": (lambda: D.loss(network, X.long()), "x0"),
    "NaN": (lambda: D.loss(network, NAN), "x0"),
    "infinite": (lambda: D.loss(network, X + math.inf), "x0"),
    "one dimension": (lambda: D.loss(network, X[:, 0, 0]), "x0"),
    "sample ids": (lambda: D.loss(network, X, sample=[1]), "sample"),
    "channels": (lambda: D.loss(with_variance, X), "variance=fixed_small"),
    "variance channels": (lambda: LEARNED.loss(network, X), "variance=learned_range"),
    "model": (lambda: D.loss(lambda x, t: None, X), "model"),
    "decoder": (lambda: D.loss(network, X, TIMES, kind="vlb", decoder="bytes"), "decoder"),
    "bytes": (lambda: D.loss(network, X + 2, TIMES, kind="vlb"), "x0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()
