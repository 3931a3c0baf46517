"""guided-diffusion's interface: noising, losses with their gradients, and the bound, by formulas and closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guided_diffusion_tools import (
    F64,
    SHAPE,
    asked,
    chain_of,
    every_variance,
    far,
    made,
    network,
    randn,
    spread,
    variance_of,
)
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.adapters.guided_diffusion import SpacedDiffusion, create_gaussian_diffusion, space_timesteps
from fastdiff.noise import Stream, normal

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the process ------------------------------------------------------------------------------


def test_noising_and_the_posterior() -> None:
    diffusion = made(timestep_respacing="10,15,20")
    chain, t = chain_of(diffusion.timestep_map), torch.tensor([0, 20, 44])
    x, noise, x_t = randn(1), randn(2), randn(3)
    bar, before, beta, small, clipped = (
        spread(torch.from_numpy(table)[t], x)
        for table in (chain.bar, chain.before, chain.beta, chain.small, chain.clipped)
    )
    assert far(diffusion.q_sample(x, t, noise), bar.sqrt() * x + (1 - bar).sqrt() * noise) <= 1e-14
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x, x_t, t)
    expected = (before.sqrt() * beta * x + (bar / before).sqrt() * (1 - before) * x_t) / (1 - bar)
    assert far(mean, expected) <= 1e-12
    assert far(variance, small.expand_as(x)) <= 1e-13
    assert far(log_variance, clipped.log().expand_as(x)) <= 1e-11
    torch.manual_seed(4)
    drawn = diffusion.q_sample(x, t)
    torch.manual_seed(4)
    assert torch.equal(drawn, diffusion.q_sample(x, t, torch.randn_like(x)))


# ---- losses -----------------------------------------------------------------------------------


def mean_of(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def plain_bound(
    chain: SimpleNamespace, how: SimpleNamespace, out: Tensor, x: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """The term of the bound at t in bits per dimension (Ho et al. 2020, eq. 5 and 13), and the estimate of x0."""
    out, raw = out[:, : x.shape[1]], out[:, x.shape[1] :]
    bits, estimates = [], []
    for k, i in enumerate(t.tolist()):
        bar, before = chain.bar[i], chain.before[i]
        x0 = out[k] if how.prediction == "sample" else (x_t[k] - math.sqrt(1 - bar) * out[k]) / math.sqrt(bar)
        x0 = x0.clamp(-1, 1) if clip else x0
        variance = variance_of(chain, i, how.variance, raw[k])
        if i == 0:
            variance = torch.tensor(chain.clipped[0]) if how.variance == "fixed_small" else variance
            upper, lower = ((x[k] - x0 + side / 255) / variance.sqrt() for side in (1, -1))
            upper = torch.where(x[k] > 0.999, math.inf, upper)
            lower = torch.where(x[k] < -0.999, -math.inf, lower)
            nats = -torch.log(torch.special.ndtr(upper) - torch.special.ndtr(lower))
        else:
            true, difference = chain.small[i], math.sqrt(before) * chain.beta[i] / (1 - bar) * (x[k] - x0)
            nats = (variance.log() - math.log(true) + (true + difference**2) / variance - 1) / 2
        bits.append(nats.mean() / math.log(2))
        estimates.append(x0)
    return torch.stack(bits), torch.stack(estimates)


class Trainable(nn.Module):
    """A network with a weight for each of its outputs, close to the noise or the data so that bytes are likely."""

    def __init__(self, how: SimpleNamespace, x: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.how, self.aim = how, x if how.prediction == "sample" else noise
        self.weights = nn.Parameter(0.01 * randn(8, (2, *x.shape)))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        out = self.aim + self.weights[0] * (1 + spread(shift, x) + x)
        variances = 0.8 * torch.sin(2 * x + self.weights[1])
        return torch.cat((out, variances), 1) if self.how.variance == "learned_range" else out


def plain_loss(
    chain: SimpleNamespace,
    how: SimpleNamespace,
    kind: str,
    out: Tensor,
    x: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
) -> dict[str, Tensor]:
    if kind in ("kl", "rescaled_kl"):
        bits, _ = plain_bound(chain, how, out, x, x_t, t)
        return {"loss": bits * (chain.n if kind == "rescaled_kl" else 1)}
    prediction = out[:, : x.shape[1]]
    mse = mean_of((prediction - (x if how.prediction == "sample" else noise)) ** 2)
    if how.variance != "learned_range":
        return {"loss": mse, "mse": mse}
    frozen = torch.cat((prediction.detach(), out[:, x.shape[1] :]), 1)
    vb = plain_bound(chain, how, frozen, x, x_t, t)[0] * (chain.n / 1000 if kind == "rescaled_mse" else 1)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


@pytest.mark.parametrize("respacing", ["", "10,15,20"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@every_variance
@pytest.mark.parametrize("kind", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
def test_losses_and_their_gradients(kind: str, variance: str, prediction: str, respacing: str) -> None:
    how, kept = asked(None, variance, prediction), sorted(space_timesteps(1000, respacing))
    whole = fd.Schedule.linear(1000)
    diffusion = SpacedDiffusion(whole, kept, prediction=prediction, variance=variance, loss_type=kind)
    chain = chain_of(kept)
    t = torch.tensor([0, 0, 1, 20, len(kept) - 1])
    x = torch.randint(256, (5, 2, 4), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    x[0, 0, :2] = torch.tensor([1.0, -1.0])
    noise, shift = randn(2, (5, 2, 4)), randn(3, (5,))
    model = Trainable(how, x, noise)
    losses = diffusion.training_losses(model, x, t, {"shift": shift}, noise)
    (gradient,) = torch.autograd.grad(losses["loss"].sum(), model.weights)
    bar = spread(torch.from_numpy(chain.bar)[t], x)
    x_t = bar.sqrt() * x + (1 - bar).sqrt() * noise
    expected = plain_loss(chain, how, kind, model(x_t, t, shift), x, x_t, noise, t)
    (exact,) = torch.autograd.grad(expected["loss"].sum(), model.weights)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].shape == (5,)
        assert far(losses[name], value) <= 1e-9
    assert far(gradient, exact) <= 1e-8
    assert float(exact[0].abs().max()) > 1e-4
    assert variance != "learned_range" or float(exact[1].abs().max()) > 1e-6
    narrow = diffusion.training_losses(
        Trainable(how, x.float(), noise.float()).float(), x.float(), t, {"shift": shift.float()}, noise.float()
    )
    assert narrow["loss"].dtype == torch.float32
    assert far(narrow["loss"].double(), expected["loss"]) <= 2e-3


def test_flags_choose_the_loss() -> None:
    for flags, kind in (
        ({}, "mse"),
        ({"rescale_learned_sigmas": True}, "rescaled_mse"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "rescaled_kl"),
    ):
        assert create_gaussian_diffusion(**flags).loss_type == kind


def test_training_draws_noise_of_torch_s_generator() -> None:
    diffusion, model, x = made("learned_range"), network("epsilon", "learned_range"), randn(0).clamp(-1, 1)
    t = torch.tensor([0, 500, 999])
    torch.manual_seed(3)
    drawn = diffusion.training_losses(model, x, t)
    torch.manual_seed(3)
    given = diffusion.training_losses(model, x, t, None, torch.randn_like(x))
    assert all(torch.equal(drawn[name], given[name]) for name in ("loss", "mse", "vb"))


# ---- likelihood -------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@every_variance
def test_every_term_of_the_bound(variance: str, prediction: str, clip: bool) -> None:
    """At the very states that are drawn; columns from t = T - 1 to 0."""
    diffusion, how = made(variance, prediction, timestep_respacing="10,15,20"), asked(None, variance, prediction)
    chain, model = chain_of(diffusion.timestep_map), network(prediction, variance)
    x, y = randn(0).mul(0.5).clamp(-1, 1), torch.tensor([0.0, 0.25, -0.125])
    told = []

    def spied(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told.extend(t.tolist())
        return model(x, t, y)

    result = diffusion.calc_bpd_loop(spied, x, clip, {"y": y}, seed=9)
    assert result.keys() == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    assert sorted(told) == sorted(chain.kept * 3)
    for column, i in enumerate(reversed(range(chain.n))):
        noise = normal(SHAPE, seed=9, step=i, stream=Stream.LIKELIHOOD, dtype=F64)
        t, bar = torch.full((3,), i), chain.bar[i]
        x_t = math.sqrt(bar) * x + math.sqrt(1 - bar) * noise
        out = model(x_t, torch.tensor(chain.kept[i]).expand(3), y)
        bits, x0 = plain_bound(chain, how, out, x, x_t, t, clip)
        epsilon = (x_t - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        if bits.isfinite().all():  # plain differences of distribution functions have no far ends
            assert far(result["vb"][:, column], bits) <= 1e-9
        assert far(result["xstart_mse"][:, column], mean_of((x0 - x) ** 2)) <= 1e-10
        assert far(result["mse"][:, column], mean_of((epsilon - noise) ** 2)) <= 1e-9
    last = chain.bar[-1]
    prior = mean_of(last * x**2 + (1 - last) - 1 - math.log(1 - last)) / 2 / math.log(2)
    assert far(result["prior_bpd"], prior) <= 1e-12
    assert far(result["total_bpd"], result["prior_bpd"] + result["vb"].sum(1)) <= 1e-12


def test_gaussian_data_have_their_closed_forms() -> None:
    """The exact model of N(mean, std²): the means over the noise of all terms and errors are known."""
    mean, std = 0.1, 0.15
    diffusion = made("fixed_small", "sample", timestep_respacing="20", steps=500)
    chain = chain_of(diffusion.timestep_map, 500)
    table = torch.zeros(500, dtype=F64)
    table[chain.kept] = torch.from_numpy(chain.bar)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        bar = spread(table[t], x)
        return mean + bar.sqrt() * std**2 / (bar * std**2 + 1 - bar) * (x - bar.sqrt() * mean)

    x = mean + std * randn(1, (200, 1, 100))
    assert x.abs().max() <= 1
    result = diffusion.calc_bpd_loop(exact, x, seed=2)
    left = std**2 * (1 - chain.bar) / (chain.bar * std**2 + 1 - chain.bar)  # variance of x0 given x_t
    snr = chain.bar / (1 - chain.bar)
    several = 5 * math.sqrt(2 / x.numel())  # standard deviations of a mean of squares
    for name, expected in (("xstart_mse", left), ("mse", left * snr)):
        assert np.abs(result[name].mean(0).flip(0).numpy() / expected - 1).max() <= several
    terms = (snr[:-1] - snr[1:]) / 2 * left[1:] / math.log(2)
    assert np.abs(result["vb"][:, :-1].mean(0).flip(0).numpy() / terms - 1).max() <= several
    width = math.sqrt(chain.clipped[0])  # of the decoder, far wider than a byte: its density times a byte's width
    decoder = math.log2(math.sqrt(2 * math.pi) * width * 127.5) + left[0] / width**2 / 2 / math.log(2)
    assert abs(float(result["vb"][:, -1].mean()) - decoder) <= several * left[0] / width**2 + 0.02
    last = chain.bar[-1]
    prior = (last * (std**2 + mean**2) - last - math.log(1 - last)) / 2 / math.log(2)
    assert float(result["prior_bpd"].mean()) == pytest.approx(prior, rel=0.1)


def test_a_seed_for_the_bound() -> None:
    diffusion, model = made(timestep_respacing="5"), network("epsilon", "fixed_large")
    x = randn(0).clamp(-1, 1).float()
    seeds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seeds.append(diffusion.calc_bpd_loop(model, x)["total_bpd"])
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])
    assert torch.equal(*(diffusion.calc_bpd_loop(model, x, seed=4)["vb"] for _ in range(2)))
