"""The learned schedule: monotone between exact ends, and its loss against closed forms for Gaussian data."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from op_tools import randn as randn_of
from oracles import Gaussian, predict
from scipy import stats
from torch import Tensor

import fastdiff as fd
from fastdiff.learned_schedule import LearnedSchedule, low_discrepancy, variational_loss
from fastdiff.noise import Stream, normal, uniform_words
from fastdiff.solvers import SOLVERS

F64 = torch.float64
LOG2 = math.log(2)
VP = ("epsilon", "sample", "v_prediction", "flow_prediction")


def randn(shape, seed):
    return randn_of(shape, seed, F64)


def scattered(seed: int, scale: float = 1.0, **ends: float) -> LearnedSchedule:
    """A schedule with random weights inside."""
    learned = LearnedSchedule(**ends, hidden=64).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in learned.named_parameters():
            if name.startswith("l"):
                weight.add_(scale * torch.randn(weight.shape, generator=generator, dtype=F64))
    return learned


def exact_model(data: Gaussian, learned: LearnedSchedule, prediction: str = "epsilon", seen: list | None = None) -> Any:
    """The network that knows the data and, of the noise, what it is told: 0 ... 1000 between the ends at the start."""
    low, high = learned.config["gamma_min"], learned.config["gamma_max"]

    def model(z: Tensor, told: Tensor) -> Tensor:
        gamma = (low + (high - low) * told.double() / 1000).reshape(-1, *(1,) * (z.ndim - 1))
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        if seen is not None:
            seen.append((z, told))
        return predict(prediction, z.double(), data.denoise(z.double(), alpha, sigma), alpha, sigma)

    return model


def span(data: Gaussian, low: float, high: float) -> float:
    """The integral of s²/(s² + e^gamma) over gamma: twice the diffusion loss of exact predictions, nats per dimension.

    s²/(s² + e^gamma) is the variance of the noise given z: that of N(mean, s²) in alpha x + sigma noise.
    """
    return (high - low) - math.log((data.std**2 + math.exp(high)) / (data.std**2 + math.exp(low)))


# ---- the schedule ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_gamma_rises_whatever_the_weights(seed, scale):
    learned = scattered(seed, scale)
    t = torch.linspace(0, 1, 2001, dtype=F64, requires_grad=True)
    gamma = learned.gamma(t)
    assert (gamma.diff() > 0).all()
    share, slope = learned.interior(t)
    (truth,) = torch.autograd.grad(share.sum(), t)
    assert (slope - truth).abs().max() <= 1e-10 * truth.abs().max()
    assert (slope > 0).all()
    assert 0 <= share.min() <= share.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (7,), (64,), (3, 5)])
def test_the_ends_are_exact(shape, dtype):
    learned = scattered(1)
    for low, high in ((-13.3, 5.0), (-7.7, 3.3), (-0.7, 0.1), (1e-3, 1e3 / 7)):
        learned.gamma_min.data.fill_(low)
        learned.gamma_max.data.fill_(high)
        for end, at in ((low, 0.0), (high, 1.0)):
            t = torch.rand(shape, dtype=dtype)
            t.view(-1)[-1] = at
            gamma = learned.gamma(t)
            assert (gamma.shape, gamma.dtype) == (t.shape, F64)
            assert gamma.view(-1)[-1] == end


def test_it_starts_nearly_straight_and_keeps_no_other_numbers():
    learned = LearnedSchedule()
    t = torch.linspace(0, 1, 101, dtype=F64)
    assert (learned.gamma(t) - (-13.3 + 18.3 * t)).abs().max() < 0.2
    assert (learned.c_noise(learned.gamma(t)) - 1000 * t).abs().max() < 11
    sizes = {name: p.numel() for name, p in learned.named_parameters()}
    assert sizes == {"gamma_min": 1, "gamma_max": 1, "l1": 1, "l2": 1024, "l2_bias": 1024, "l3": 1024}
    alpha, sigma = learned.alpha_sigma(t)
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-15
    assert (torch.log(alpha**2 / sigma**2) - learned.log_snr(t)).abs().max() < 1e-11


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (-math.inf, 1.0), (0.0, math.nan)])
def test_ends_out_of_order_are_refused(ends):
    with pytest.raises(fd.InputError, match="gamma_min must lie below gamma_max"):
        LearnedSchedule(*ends)


# ---- as a table -----------------------------------------------------------------------------


def test_the_table_is_the_schedule_and_outlives_it():
    learned = scattered(2)
    frozen = learned.schedule(33)
    gamma = learned.gamma(torch.linspace(0, 1, 33, dtype=F64))
    assert (frozen.log_snr + gamma).abs().max() < 1e-10
    assert torch.equal(frozen.c_noise, learned.c_noise(gamma))
    assert not frozen.alpha.requires_grad
    assert frozen.variance_preserving
    again = fd.Schedule.from_config(json.loads(json.dumps(frozen.config)))
    for name in ("alpha", "sigma", "c_in", "c_noise"):
        assert torch.equal(getattr(again, name), getattr(frozen, name))
    assert repr(again) == "Schedule.from_log_snr()"
    terminal = fd.Schedule.from_config({**frozen.config, "zero_terminal_snr": True})
    assert terminal.zero_terminal_snr
    assert torch.equal(terminal.c_noise, frozen.c_noise)


def test_any_log_snr_makes_a_schedule():
    laplace = fd.Schedule.laplace(50)
    same = fd.Schedule.from_log_snr(laplace.log_snr)
    assert (same.alpha / laplace.alpha - 1).abs().max() < 1e-13
    assert (same.sigma / laplace.sigma - 1).abs().max() < 1e-13
    assert same.c_noise.tolist() == list(range(50))
    assert torch.equal(fd.Schedule.from_config(json.loads(json.dumps(same.config))).alpha, same.alpha)


BAD = {
    "rising": (([1.0, 2.0],), {}, "fall"),
    "repeated": (([1.0, 1.0],), {}, "fall"),
    "infinite": (([1.0, -math.inf],), {}, "finite"),
    "not a number": (([math.nan, -1.0],), {}, "finite"),
    "empty": (([],), {}, "not empty"),
    "a matrix": (([[2.0, 1.0]],), {}, "one-dimensional"),
    "words": ((["a"],), {}, "log_snr must be a sequence"),
    "times of others": (([2.0, 1.0],), {"c_noise": [1.0]}, "each of 2"),
    "infinite times": (([2.0, 1.0],), {"c_noise": [1.0, math.inf]}, "finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_log_snrs_that_make_no_schedule_are_refused(case):
    arguments, options, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        fd.Schedule.from_log_snr(*arguments, **options)


def test_a_table_needs_both_ends():
    with pytest.raises(fd.InputError, match="at least 2"):
        LearnedSchedule(hidden=2).schedule(1)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("ddim_inverse", "lcm")])
def test_every_solver_samples_from_the_table(solver):
    """Gaussian data come out again with the network told what it was told in training."""
    data, learned = Gaussian(0.3, 0.5), scattered(3, 0.3, gamma_min=-8.0, gamma_max=4.0)
    sampler = fd.Sampler(
        exact_model(data, learned), fd.Diffusion(learned.schedule(400)), solver=solver, steps=60, dtype=F64
    )
    x = sampler((1000, 2), seed=1)
    assert float(x.mean()) == pytest.approx(data.mean, abs=0.05)
    assert float(x.std()) == pytest.approx(data.std, abs=0.05)


# ---- times ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_times_are_equally_far_apart_from_a_random_start(count):
    starts = []
    for step in range(100):
        words = low_discrepancy(count, seed=3, step=step).sort().values
        gaps = torch.cat((words, words[:1] + 2**32)).diff()
        assert (gaps - 2**32 // count).abs().max() <= 2
        assert 0 <= words.min() <= words.max() < 2**32
        starts.append(float(words[0]) / 2**32 * count)
    assert stats.kstest(starts, "uniform").pvalue > 1e-3


def test_times_belong_to_places_in_the_batch():
    whole = low_discrepancy(12, seed=1, step=5)
    parts = [low_discrepancy(4, seed=1, step=5, sample=range(i, i + 4), batch=12) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole[0] == uniform_words(1, seed=1, step=5, stream=Stream.TIMESTEP)
    assert not torch.equal(whole, low_discrepancy(12, seed=2, step=5))


def test_the_parts_of_a_batch_have_its_losses():
    learned, data = scattered(4), Gaussian(0.2, 0.6)
    x0, model = data.mean + data.std * randn((12, 3), 0), exact_model(data, learned)
    whole = variational_loss(model, learned, x0, decoder="gaussian", seed=4, step=2)
    for i in (0, 4, 8):
        place = {"seed": 4, "step": 2, "sample": range(i, i + 4), "batch": 12}
        part = variational_loss(model, learned, x0[i : i + 4], decoder="gaussian", **place)
        assert torch.equal(part.total, whole.total[i : i + 4])


# ---- the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [None, 1, 5, 1000])
@pytest.mark.parametrize("prediction", VP)
@pytest.mark.parametrize("decoder", ["gaussian", "discrete"])
def test_every_part_is_its_formula_at_the_state_drawn(prediction, timesteps, decoder):
    learned, n, d = scattered(5, gamma_min=-6.0, gamma_max=2.0), 9, 4
    learned.gamma_min.data.sub_(0.5)
    learned.gamma_max.data.add_(0.25)
    x0, seen = torch.tanh(randn((n, d), 1)), []
    data = Gaussian(0.1, 0.5)
    how = {"prediction": prediction, "timesteps": timesteps, "decoder": decoder}
    model = exact_model(data, learned, prediction, seen)
    loss = variational_loss(model, learned, x0, **how, seed=7, step=3)
    noise = normal((n, d), seed=7, step=3, stream=Stream.TRAINING, dtype=F64)
    words = low_discrepancy(n, seed=7, step=3).double()
    if timesteps is None:
        t = ((words + 0.5) / 2**32).requires_grad_()
        gamma = learned.gamma(t)
        (rate,) = torch.autograd.grad(gamma.sum(), t)
        weight = rate / 2
    else:
        number = (words * timesteps / 2**32).floor() + 1
        gamma = learned.gamma(number / timesteps)
        weight = timesteps / 2 * torch.expm1(gamma - learned.gamma((number - 1) / timesteps))
    alpha, sigma = torch.sigmoid(-gamma).sqrt()[:, None], torch.sigmoid(gamma).sqrt()[:, None]
    z = alpha * x0 + sigma * noise
    error = noise - (z - alpha * data.denoise(z, alpha, sigma)) / sigma
    diffusion = weight * error.square().mean(1) / LOG2
    assert len(seen) == 1
    assert (seen[0][0] - z).abs().max() < 1e-12
    assert (seen[0][1] - 1000 * (gamma + 6) / 8).abs().max() < 1e-9
    assert (loss.diffusion / diffusion - 1).abs().max() < 1e-9
    low, high = float(learned.gamma_min.detach()), float(learned.gamma_max.detach())
    share = 1 / (1 + math.exp(high))  # alpha² at the end
    prior = (share * x0**2 - share - math.log(1 - share)).mean(1) / (2 * LOG2)
    assert (loss.prior - prior).abs().max() < 1e-12
    std = math.exp(low / 2)
    given = stats.norm(x0.numpy() + std * noise.numpy(), std)
    bins = given.cdf(np.where(x0 > 0.999, np.inf, x0 + 1 / 255)) - given.cdf(
        np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
    )
    decoded = -given.logpdf(x0.numpy()) if decoder == "gaussian" else -np.log(bins)
    assert np.abs(loss.reconstruction.detach().numpy() - decoded.mean(1) / LOG2).max() < 1e-9
    assert torch.equal(loss.total, loss.prior + loss.reconstruction + loss.diffusion)


@pytest.mark.parametrize("timesteps", [1, 6])
@pytest.mark.parametrize("prediction", VP)
def test_the_terms_of_a_discrete_bound_are_those_of_bits_per_dim(prediction, timesteps, monkeypatch):
    """A sample for each of the T times, with the noise of bits_per_dim: the mean is the sum of its terms, and every
    one is its own. The decoders differ: that of bits_per_dim asks the network once more."""
    learned = scattered(6, gamma_min=-5.0, gamma_max=3.0)
    x0 = randn((1, 3), 2)

    def model(z, told):
        return 0.3 * z - 0.1 * torch.tanh(z) + 0.001 * told[:, None]

    diffusion = fd.Diffusion(learned.schedule(timesteps + 1), prediction)
    truth = diffusion.bits_per_dim(model, x0, decoder="gaussian", seed=11, sample=[5])
    number = (low_discrepancy(timesteps, seed=1, step=0) * timesteps >> 32) + 1
    assert sorted(number.tolist()) == list(range(1, timesteps + 1))
    where = {"step": number, "sample": [5] * timesteps, "stream": Stream.LIKELIHOOD}
    drawn = normal((timesteps, 3), seed=11, **where, dtype=F64)
    monkeypatch.setattr(fd.noise, "normal", lambda *_, **__: drawn)
    how = {"prediction": prediction, "timesteps": timesteps, "decoder": "gaussian"}
    loss = variational_loss(model, learned, x0.expand(timesteps, -1), **how, seed=1, step=0)
    assert (loss.diffusion / (timesteps * truth.terms[0, number]) - 1).abs().max() < 1e-9
    assert float(loss.diffusion.detach().mean()) == pytest.approx(float(truth.terms[0, 1:].sum()), rel=1e-10)
    assert (loss.prior - truth.prior).abs().max() < 1e-10


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_the_continuous_loss_knows_only_the_ends(std):
    """E of the diffusion loss over x0 and noise is gamma' v(gamma) / 2, whose integral over t is that over gamma."""
    data, ends = Gaussian(0.4, std), {"gamma_min": -7.0, "gamma_max": 2.5}
    t = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    truth = span(data, -7.0, 2.5) / 2
    found = []
    for seed in (0, 1):
        learned = scattered(seed, 0.5, **ends)
        with torch.no_grad():
            share, slope = learned.interior(t)
            gamma = learned.between(share)
            found.append(float((slope * 9.5 * std**2 / (std**2 + gamma.exp())).mean() / 2))
        loss = expectation(data, learned)
        assert abs(loss["diffusion"][0] - truth / LOG2) < 4 * loss["diffusion"][1] + 1e-4
    assert found == pytest.approx([truth, truth], rel=1e-8)


def expectation(data: Gaussian, learned: LearnedSchedule, *, batches: int = 20, **how: Any) -> dict:
    """Mean and standard error of each part of the loss with the exact network."""
    found, model = [], exact_model(data, learned)
    for step in range(batches):
        x0 = data.mean + data.std * normal((512, 4), seed=99, step=step, dtype=F64)
        with torch.no_grad():
            loss = variational_loss(model, learned, x0, decoder="gaussian", seed=5, step=step, **how)
        found.append([float(part.mean()) for part in loss])
    table = np.array(found)
    return dict(zip(loss._fields, zip(table.mean(0), table.std(0, ddof=1) / batches**0.5, strict=True), strict=True))


def test_the_bound_of_gaussian_data_in_continuous_time():
    """Its parts in closed form; their sum is the entropy, and the divergences that the two ends leave."""
    data, low, high = Gaussian(0.4, 0.7), -4.0, 2.0
    loss = expectation(data, scattered(8, 0.5, gamma_min=low, gamma_max=high))
    power, share = data.mean**2 + data.std**2, 1 / (1 + math.exp(high))
    truth = {
        "prior": (share * power - share - math.log(1 - share)) / 2,
        "reconstruction": (math.log(2 * math.pi * math.e) + low) / 2,
        "diffusion": span(data, low, high) / 2,
    }
    for part, nats in truth.items():
        mean, error = loss[part]
        assert abs(mean - nats / LOG2) < 4 * error + 1e-9, part
    entropy = math.log(2 * math.pi * math.e * data.std**2) / 2
    variance = share * data.std**2 + 1 - share
    divergence = (variance + share * data.mean**2 - 1 - math.log(variance)) / 2
    blur = math.log1p(math.exp(low) / data.std**2) / 2
    assert sum(truth.values()) == pytest.approx(entropy + divergence + blur, abs=1e-12)


def test_x0_in_half_precision_and_networks_of_ours():
    learned, mlp = LearnedSchedule(hidden=8), fd.MLP(2, width=8, depth=1, frequencies=1, num_classes=3)
    torch.nn.init.normal_(mlp.out.weight)
    x0, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(6) % 3
    loss = variational_loss(mlp, learned, x0, prediction="v_prediction", decoder="gaussian", y=y)
    assert [part.dtype for part in loss] == 4 * [F64]
    loss.total.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*learned.parameters(), *mlp.parameters()))
    again = variational_loss(mlp, learned, x0.float(), prediction="v_prediction", decoder="gaussian", y=y)
    assert torch.equal(again.total, loss.total)


REFUSED = {
    "prediction": ({"prediction": "score"}, "unknown prediction"),
    "decoder": ({"decoder": "laplace"}, "unknown decoder"),
    "range": ({"x0": torch.full((2, 2), 1.5)}, "discrete decoder"),
    "nothing": ({"x0": torch.zeros(0, 2)}, "empty"),
    "not a number": ({"x0": torch.full((2, 2), math.nan)}, "NaN"),
    "whole numbers": ({"x0": torch.zeros(2, 2, dtype=torch.int64)}, "x0"),
    "no steps": ({"timesteps": 0}, "timesteps must be at least 1"),
    "half a step": ({"timesteps": 1.5}, "timesteps must be at least 1"),
    "no batch": ({"batch": 0}, "batch must be at least 1"),
    "shape": ({"model": lambda z, t: z[:, :1]}, "the model's out must have shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    given, message = REFUSED[case]
    how = {"model": lambda z, t: z, "learned": LearnedSchedule(hidden=2), "x0": torch.zeros(2, 2), **given}
    with pytest.raises(fd.InputError, match=message):
        variational_loss(**how)


# ---- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [None, 5])
@pytest.mark.parametrize("prediction", VP)
def test_one_pass_gives_the_gradients_of_two(timesteps, prediction):
    learned, x0 = scattered(9, gamma_min=-4.0, gamma_max=3.0), 0.5 * randn((7, 2), 3)
    scale = torch.nn.Parameter(torch.tensor([0.3, -0.1], dtype=F64))
    calls = []

    def model(z, told):
        calls.append(z)
        return scale[0] * z + scale[1] * torch.tanh(z) * (1 + told[:, None] / 1000)

    how = {"prediction": prediction, "timesteps": timesteps, "decoder": "gaussian", "seed": 2, "step": 8}
    ends = [learned.gamma_min, learned.gamma_max, scale]
    inside = [p for name, p in learned.named_parameters() if name.startswith("l")]
    plain = variational_loss(model, learned, x0, **how)
    truth = torch.autograd.grad(plain.total.mean(), ends, retain_graph=True)
    truth += torch.autograd.grad(plain.diffusion.square().mean(), inside)
    calls.clear()
    loss = variational_loss(model, learned, x0, **how, minimise_variance=True)
    found = torch.autograd.grad(loss.total.mean(), ends + inside)
    assert len(calls) == 1
    assert all(torch.equal(mine, its) for mine, its in zip(loss, plain, strict=True))
    for mine, its in zip(found, truth, strict=True):
        assert its.abs().max() > 0
        assert (mine - its).abs().max() <= 1e-11 * its.abs().max()


def test_the_gradient_of_the_ends_is_that_of_the_closed_form():
    """In continuous time ends fall and rise for ever, ever more slowly: the bound has no best ones inside."""
    data, low, high = Gaussian(0.5, 0.8), -2.0, 1.0
    learned, found = scattered(10, 0.3, gamma_min=low, gamma_max=high), []
    model = exact_model(data, learned)
    for step in range(30):
        x0 = data.mean + data.std * normal((512, 4), seed=98, step=step, dtype=F64)
        loss = variational_loss(model, learned, x0, decoder="gaussian", seed=6, step=step).total.mean()
        found.append([float(g) for g in torch.autograd.grad(loss, [learned.gamma_min, learned.gamma_max])])
    table, s2 = np.array(found) * LOG2, data.std**2
    mean, error = table.mean(0), table.std(0, ddof=1) / 30**0.5
    at_low = 0.5 * math.exp(low) / (s2 + math.exp(low))
    share, power = 1 / (1 + math.exp(high)), s2 + data.mean**2
    at_high = 0.5 * (s2 / (s2 + math.exp(high)) - share * (1 - share) * (power - 1) - share)
    assert at_low > 0 > at_high
    assert abs(mean[0] - at_low) < 4 * error[0]
    assert abs(mean[1] - at_high) < 4 * error[1]
    assert error.max() < 0.02


def train(learned: LearnedSchedule, data: Gaussian, steps: int, rate: float, **how: Any) -> None:
    """Adam on the schedule alone, the network exact, the rate falling to 0."""
    model = exact_model(data, learned)
    optimizer = torch.optim.Adam([p for p in learned.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        x0 = data.mean + data.std * normal((256, 8), seed=97, step=step)
        loss = variational_loss(model, learned, x0, decoder="gaussian", step=step, minimise_variance=True, **how)
        optimizer.zero_grad()
        loss.total.mean().backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()


@pytest.mark.parametrize("s2", [4.0, 6.0])
def test_training_finds_the_best_ends(s2):
    """One step between x0 and the prior, data N(0, s²): the bound has its least in closed form.

    With u = e^gamma_max, c = s² - 1 and the best decoder e^gamma_min = u s²/(u + s²), its excess over the entropy is
    (c/(1+u) + ln((1+u)/(s²+u)) + u/(s²+u)) / 2, least where s² (1+u)² - c² (1+u) - c³ = 0.
    """
    data, c = Gaussian(0.0, s2**0.5), s2 - 1
    u = (c**2 + math.sqrt(c**4 + 4 * s2 * c**3)) / (2 * s2) - 1
    best = math.log(u * s2 / (u + s2)), math.log(u)
    learned = LearnedSchedule(-1.0, 3.0, hidden=4).double()
    train(learned, data, 250, 0.15, timesteps=1)
    ends = float(learned.gamma_min.detach()), float(learned.gamma_max.detach())
    assert ends == pytest.approx(best, abs=0.02)
    excess = (c / (1 + u) + math.log((1 + u) / (s2 + u)) + u / (s2 + u)) / 2
    mean, error = expectation(data, learned, timesteps=1)["total"]
    bits = (excess + math.log(2 * math.pi * math.e * s2) / 2) / LOG2
    assert abs(mean - bits) < 4 * error + 1e-3


def variances(data: Gaussian, learned: LearnedSchedule, d: int) -> tuple[float, float]:
    """The variance of a sample's diffusion loss with the exact network, and the least that any inside can have.

    Given t, 2 loss / gamma' is v chi²_d / d with v = s²/(s² + e^gamma). The mean of its square over t,
    (1 + 2/d) (gamma' v)², is least where gamma' v is the same everywhere: there the loss is as large at all times.
    """
    t = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    with torch.no_grad():
        low, high = learned.ends
        share, slope = learned.interior(t)
        rate = slope * (high - low) * data.std**2 / (data.std**2 + learned.between(share).exp())
    mean = span(data, float(low), float(high)) / 2
    square = float((1 + 2 / d) * rate.square().mean() / 4)
    return (square - mean**2) / LOG2**2, mean**2 * 2 / d / LOG2**2


def measured(data: Gaussian, learned: LearnedSchedule, d: int) -> float:
    x0 = data.mean + data.std * normal((8000, d), seed=96)
    with torch.no_grad():
        loss = variational_loss(exact_model(data, learned), learned, x0, decoder="gaussian", seed=8)
    return float(loss.diffusion.var())


def test_training_takes_the_variance_to_its_least():
    data, learned = Gaussian(0.0, 1.0), LearnedSchedule(-6.0, 2.0)
    for end in (learned.gamma_min, learned.gamma_max):
        end.requires_grad_(False)
    start, least = variances(data, learned, 8)
    assert start > 1.8 * least
    assert measured(data, learned, 8) == pytest.approx(start, rel=0.05)
    train(learned, data, 120, 0.03)
    end, _ = variances(data, learned, 8)
    assert least < end < 1.04 * least
    assert measured(data, learned, 8) == pytest.approx(end, rel=0.05)
    # gamma' v the same everywhere, solved for gamma
    t = torch.linspace(0, 1, 101, dtype=F64)
    first, last = (-math.log1p(math.exp(-g)) for g in (-6.0, 2.0))
    best = -torch.log(torch.expm1(-(first + (last - first) * t)))
    assert (learned.gamma(t) - best).detach().abs().mean() < 0.1
