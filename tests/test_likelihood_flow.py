"""The likelihood by the probability-flow ODE: exact densities, order of convergence, estimates of the divergence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from op_tools import randn as randn_of
from oracles import Gaussian, Mixture, model_of
from scipy import stats
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.likelihood import SOLVERS
from fastdiff.noise import Stream, normal
from fastdiff.ops.row import PREDICTIONS

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
DATA = Gaussian(0.4, 0.7)
ORDER = {"heun": 2, "rk4": 4}
SCHEDULES = {
    "linear": fd.Schedule.linear(100, beta_end=0.15),
    "cosine": fd.Schedule.cosine(1000),
    "zero_snr": fd.Schedule.cosine(200).rescale_zero_terminal_snr(),
    "edm": fd.Schedule.edm(40),
    "flow": fd.Schedule.flow(100, shift=3.0),
    "two": fd.Schedule.linear(2, beta_start=0.01, beta_end=0.9),
}
PAIRS = [
    (name, prediction)
    for name, schedule in SCHEDULES.items()
    for prediction in PREDICTIONS
    if prediction != "epsilon" or not schedule.zero_terminal_snr
]
EXACT: dict[str, Any] = {"divergence": "exact"}


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return randn_of(shape, seed, F64)


def ratio_of(schedule: fd.Schedule, t: int) -> float:
    return float(schedule.sigma[t] / schedule.alpha[t])


def log_density(data: Mixture, x: Tensor, ratio: float) -> Tensor:
    """ln p of x0 + ratio noise, ``[N]``."""
    variance = data.stds**2 + ratio**2
    squares = (x[:, None] - data.means).square().sum(-1) / variance
    return (data.weights.log() - squares / 2 - x.shape[1] / 2 * (2 * math.pi * variance).log()).logsumexp(1)


def points(data: Mixture, count: int) -> Tensor:
    component = torch.arange(count) % len(data.weights)
    return data.means[component] + data.stds[component, None] * randn((count, data.means.shape[1]), 1)


def gaussian_log_density(schedule: fd.Schedule, x: Tensor) -> np.ndarray:
    """ln p(x0) ``[N]`` where the noise that sampling starts with goes back along the exact flow of ``DATA``.

    The flow keeps (y - mean) / std of y = x0 + (sigma / alpha) noise.
    """
    last = len(schedule) - (2 if schedule.zero_terminal_snr and schedule.config["name"] != "flow" else 1)
    alpha, sigma = float(schedule.alpha[last]), float(schedule.sigma[last])
    std = 1.0 if schedule.variance_preserving else sigma
    slope = math.hypot(alpha * DATA.std, sigma) / math.hypot(DATA.std, ratio_of(schedule, 0))
    end = alpha * DATA.mean + slope * (x.numpy() - DATA.mean)
    return (stats.norm.logpdf(end, 0, std) + math.log(slope)).reshape(len(x), -1).sum(1)


# ---- exact densities ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_gaussian_data_have_their_exact_density(name: str, prediction: str) -> None:
    shape = (3, 1, 2, 2) if prediction == "sample" else (5, 2)
    diffusion, x0 = fd.Diffusion(SCHEDULES[name], prediction), DATA.mean + DATA.std * randn(shape, 2)
    result = diffusion.log_likelihood(model_of(DATA, diffusion), x0, steps=32, solver="rk4", **EXACT)
    d, expected = math.prod(shape[1:]), gaussian_log_density(diffusion.schedule, x0)
    assert np.abs(result.nats.numpy() - expected).max() <= 2e-6 * d
    torch.testing.assert_close(result.total, -result.nats / (d * math.log(2)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_prior_is_that_of_the_noise_at_the_end(name: str) -> None:
    """A model without error keeps x0 where it is: the end is cos(phi) x0 + sin(phi) times the noise of the start, 0."""
    schedule = SCHEDULES[name]
    x0, diffusion = randn((4, 2), 0), fd.Diffusion(schedule, "v_prediction")
    result = diffusion.log_likelihood(model_of(DATA, diffusion), x0, steps=64, solver="rk4", **EXACT)
    last = len(schedule) - (2 if name == "zero_snr" else 1)
    norm = math.hypot(float(schedule.alpha[last]), float(schedule.sigma[last]))
    spread = math.hypot(float(schedule.alpha[last]) * DATA.std, float(schedule.sigma[last])) / norm
    end = float(schedule.alpha[last]) / norm * DATA.mean + spread * (x0 - DATA.mean) / math.hypot(
        DATA.std, ratio_of(schedule, 0)
    )
    std = 1.0 if schedule.variance_preserving else float(schedule.sigma[last]) / norm
    expected = -stats.norm.logpdf(end.numpy(), 0, std).mean(1) / math.log(2)
    assert np.abs(result.prior.numpy() - expected).max() <= 1e-6


#: Processes whose end is the noise that sampling starts with, to five digits.
PROCESSES = {
    "vp": (fd.Schedule.linear(1000, beta_end=0.06), "v_prediction"),
    "ve": (fd.Schedule.edm(1000, sigma_max=1e6), "sample"),
    "flow": (fd.Schedule.flow(1000), "flow_prediction"),
}


@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("process", PROCESSES)
def test_mixtures_have_their_exact_density_at_256_steps(process: str, dim: int) -> None:
    schedule, prediction = PROCESSES[process]
    data, diffusion = Mixture.random(dim), fd.Diffusion(schedule, prediction)
    x0 = points(data, 48)
    result = diffusion.log_likelihood(model_of(data, diffusion), x0, **EXACT)
    error = (result.nats - log_density(data, x0, ratio_of(schedule, 0))) / dim
    assert float(error.abs().max()) <= 1e-4


def test_every_solver_states_its_order() -> None:
    assert ORDER.keys() == SOLVERS.keys()


@pytest.mark.parametrize(("process", "solver"), [("vp", "heun"), ("ve", "heun"), ("flow", "heun"), ("flow", "rk4")])
def test_order_of_convergence(process: str, solver: str) -> None:
    schedule, prediction = PROCESSES[process]
    data, diffusion = Mixture.random(2), fd.Diffusion(schedule, prediction)
    model, x0 = model_of(data, diffusion), points(data, 24)
    steps = [32, 64, 128] if solver == "heun" else [16, 32, 64]
    truth = diffusion.log_likelihood(model, x0, steps=192, solver="rk4", **EXACT).nats
    results = (diffusion.log_likelihood(model, x0, steps=n, solver=solver, **EXACT).nats for n in steps)
    errors = [float((nats - truth).abs().mean()) for nats in results]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDER[solver], abs=0.12 if solver == "heun" else 0.3)


def test_the_density_is_of_data_with_the_noise_of_timestep_0() -> None:
    """And so that of the data themselves if that is little."""
    data, x0 = Mixture.random(2), points(Mixture.random(2), 24)
    schedule = fd.Schedule.edm(100, sigma_min=1e-4, sigma_max=1e6)
    diffusion = fd.Diffusion(schedule, "sample")
    result = diffusion.log_likelihood(model_of(data, diffusion), x0, steps=96, solver="rk4", **EXACT)
    assert float((result.nats - log_density(data, x0, 0.0)).abs().max()) <= 1e-4


# ---- the bound ------------------------------------------------------------------------------


def test_the_variational_bound_lies_above_and_tightens_with_more_timesteps() -> None:
    """From one level of noise to another, for the exact model with the forward variance."""
    x0, gaps = DATA.mean + DATA.std * randn((32, 128), 3), []
    for n in (8, 32, 128):
        diffusion = fd.Diffusion(fd.Schedule.edm(n, sigma_min=0.05), "sample", "learned_range")
        exact = model_of(DATA, diffusion)
        model = lambda x, t, exact=exact: torch.cat((exact(x, t), torch.ones_like(x)), 1)  # noqa: E731
        bound = diffusion.bits_per_dim(model, x0, decoder="gaussian").total
        flow = diffusion.log_likelihood(model, x0, steps=64).total
        gaps.append(float((bound - flow).mean()))
        assert gaps[-1] > 5 * float((bound - flow).std()) / math.sqrt(len(x0))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.4


# ---- estimates of the divergence ------------------------------------------------------------


def correlated(x: Tensor, t: Tensor) -> Tensor:
    """A network whose Jacobian is neither diagonal nor constant."""
    return torch.tanh(x.roll(1, 1) + 0.5 * x) - 0.3 * x


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_s_estimate_is_unbiased(noise: str) -> None:
    diffusion = fd.Diffusion(SCHEDULES["cosine"], "v_prediction")
    x0 = randn((1, 4), 0)
    exact = float(diffusion.log_likelihood(correlated, x0, steps=8, **EXACT).nats)
    nats = diffusion.log_likelihood(correlated, x0.expand(4096, 4), steps=8, noise=noise).nats
    error = float(nats.std()) / 64
    assert abs(float(nats.mean()) - exact) <= 4.5 * error
    assert 0 < error <= 0.02


def test_the_mean_of_many_probes_is_the_exact_divergence() -> None:
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "v_prediction"), randn((64, 4), 0)
    exact = diffusion.log_likelihood(correlated, x0, steps=4, **EXACT).nats
    spread = {
        probes: float((diffusion.log_likelihood(correlated, x0, steps=4, probes=probes).nats - exact).std())
        for probes in (1, 16, 256)
    }
    assert spread[1] / spread[16] == pytest.approx(4, rel=0.3)
    assert spread[16] / spread[256] == pytest.approx(4, rel=0.3)


def test_signs_are_exact_for_a_diagonal_jacobian_and_vary_less() -> None:
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "epsilon"), DATA.mean + DATA.std * randn((64, 5), 0)
    model = model_of(DATA, diffusion)
    exact, signs, normals = (
        diffusion.log_likelihood(model, x0, steps=16, **how).nats
        for how in (EXACT, {"noise": "rademacher"}, {"noise": "gaussian"})
    )
    assert float((signs - exact).abs().max()) <= 1e-10
    assert float((normals - exact).std()) > 0.01


def test_probes_have_addresses() -> None:
    """So that a sample's estimate depends neither on the batch nor on its place in it."""
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "v_prediction"), randn((7, 4), 0)
    whole = diffusion.log_likelihood(correlated, x0, steps=4, seed=3, probes=2)
    for batch in (1, 3, 7):
        again = diffusion.log_likelihood(correlated, x0, steps=4, seed=3, probes=2, batch=batch)
        torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-12)
    ids = [5, 0]
    some = diffusion.log_likelihood(correlated, x0[ids], steps=4, seed=3, probes=2, sample=ids)
    torch.testing.assert_close(some.nats, whole.nats[ids], rtol=1e-12, atol=1e-12)
    other = diffusion.log_likelihood(correlated, x0, steps=4, seed=4, probes=2)
    assert (other.nats != whole.nats).all()


def test_every_question_has_its_own_probes() -> None:
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(grad.clone())
            return grad

    diffusion = fd.Diffusion(SCHEDULES["cosine"], "v_prediction")
    diffusion.log_likelihood(lambda x, t: Spy.apply(x), randn((2, 9), 0), steps=2, probes=2, seed=5, sample=[3, 8])
    expected = [normal((2, 9), seed=5, step=k, sample=[3, 8], stream=Stream.PROBE).sign().double() for k in range(8)]
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)


# ---- bytes ----------------------------------------------------------------------------------

BYTES = (torch.arange(256, dtype=F64) / 127.5 - 1).reshape(64, 4)


def test_bytes_are_spread_over_their_bins() -> None:
    diffusion = fd.Diffusion(SCHEDULES["flow"], "v_prediction")
    model, how = model_of(DATA, diffusion), {"steps": 16, **EXACT}
    result = diffusion.log_likelihood(model, BYTES, dequantize=True, seed=7, **how)
    share = torch.special.ndtr(normal(BYTES.shape, seed=7, stream=Stream.DEQUANTIZATION).double())
    assert 0 <= float(share.min()) < 0.1 < 0.9 < float(share.max()) <= 1
    expected = diffusion.log_likelihood(model, BYTES + (share - 0.5) / 127.5, **how)
    assert float((result.total - expected.total - math.log2(127.5)).abs().max()) <= 1e-12
    assert float((result.prior - expected.prior).abs().max()) <= 1e-12
    assert float((result.nats + result.total * 4 * math.log(2)).abs().max()) <= 1e-12


def test_the_density_of_spread_bytes_bounds_their_probability() -> None:
    """Jensen's inequality, and for a density that hardly changes within a bin it is tight."""
    diffusion = fd.Diffusion(fd.Schedule.edm(50, sigma_max=1e5), "sample")
    model, x0 = model_of(DATA, diffusion), BYTES.reshape(4, 64)
    nats = [
        diffusion.log_likelihood(model, x0, dequantize=True, seed=seed, steps=32, solver="rk4").nats.sum()
        for seed in range(40)
    ]
    width = math.hypot(DATA.std, ratio_of(diffusion.schedule, 0))
    edges = stats.norm.cdf(x0.numpy()[..., None] + np.array([-1, 1]) / 255, DATA.mean, width)
    truth = np.log(edges[..., 1] - edges[..., 0]).sum()
    mean, error = float(torch.stack(nats).mean()), float(torch.stack(nats).std()) / math.sqrt(40)
    assert abs(mean - truth) <= 4.5 * error
    assert error <= 0.05


# ---- how the network is asked ---------------------------------------------------------------


def test_the_network_is_told_times_of_the_schedule() -> None:
    for name, schedule in SCHEDULES.items():
        seen: list[Tensor] = []

        def model(x: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(t)
            return 0.1 * x

        fd.Diffusion(schedule, "v_prediction").log_likelihood(model, randn((3, 2), 0), steps=5)
        told = torch.stack(seen)
        assert told.shape == (10, 3)
        last = -2 if name == "zero_snr" else -1
        first, end = float(schedule.c_noise[0]), float(schedule.c_noise[last])
        assert float(told[0, 0]) == pytest.approx(first, abs=1e-9)
        assert float(told[-1, 0]) == pytest.approx(end, rel=1e-9)
        assert bool((told[1::2] > told[::2]).all())
        torch.testing.assert_close(told[1:-1:2], told[2::2], msg="a step's end is where the next begins")


def test_conditions_follow_their_samples() -> None:
    diffusion = fd.Diffusion(SCHEDULES["flow"], "sample")
    means, y, x0 = torch.tensor([-0.5, 0.1, 0.9], dtype=F64), torch.tensor([2, 0, 1, 1, 2]), randn((5, 2), 0)

    def model(x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        alpha, sigma = 1 - t[:, None] / 1000, t[:, None] / 1000
        gain = alpha * scale**2 / ((alpha * scale) ** 2 + sigma**2)
        return means[y][:, None] * (1 - alpha * gain) + gain * x

    result = diffusion.log_likelihood(model, x0, steps=32, solver="rk4", batch=2, y=y, scale=0.5, **EXACT)
    width = math.hypot(0.5, ratio_of(diffusion.schedule, 0))
    expected = stats.norm.logpdf(x0.numpy(), means[y].numpy()[:, None], width).sum(1)
    assert np.abs(result.nats.numpy() - expected).max() <= 1e-5


def test_the_channels_of_a_learned_variance_are_left_alone() -> None:
    x0, schedule = randn((4, 3), 0), SCHEDULES["cosine"]
    both = lambda x, t: torch.cat((correlated(x, t), x**3), 1)  # noqa: E731
    fixed = fd.Diffusion(schedule, "v_prediction").log_likelihood(correlated, x0, steps=4, **EXACT)
    learned = fd.Diffusion(schedule, "v_prediction", "learned_range").log_likelihood(both, x0, steps=4, **EXACT)
    torch.testing.assert_close(learned, fixed, rtol=1e-13, atol=1e-13)


def small_unet() -> fd.UNet:
    torch.manual_seed(0)
    unet = fd.UNet(4, 1, model_channels=8, channel_mult=(1, 2), attention_resolutions=(2,), norm_groups=4)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_own_network_by_itself_and_prepared_whatever_the_mode(mode: Any) -> None:
    unet, diffusion = small_unet(), fd.Diffusion(SCHEDULES["cosine"], "v_prediction")
    with mode():
        x0 = randn((2, 1, 4, 4), 0).float()
        ours = diffusion.log_likelihood(unet, x0, steps=2, **EXACT)
    assert not ours.nats.requires_grad
    assert all(parameter.grad is None for parameter in unet.parameters())
    plain = diffusion.log_likelihood(lambda x, t: unet.double()(x, t), randn((2, 1, 4, 4), 0), steps=2, **EXACT)
    assert float((ours.total - plain.total).abs().max()) <= 1e-4


def test_points_in_float32_and_bfloat16() -> None:
    torch.manual_seed(0)
    mlp, diffusion = fd.MLP(width=16, depth=1, frequencies=1), fd.Diffusion(SCHEDULES["cosine"], "v_prediction")
    x0 = randn((8, 2), 0)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.1)
    wide = diffusion.log_likelihood(mlp, x0, steps=16, **EXACT)
    narrow = diffusion.log_likelihood(mlp, x0.float(), steps=16, **EXACT)
    assert narrow.nats.dtype == F64
    assert float((narrow.total - wide.total).abs().max()) <= 1e-4
    half = diffusion.log_likelihood(mlp.bfloat16(), x0, steps=16, **EXACT)
    again = diffusion.log_likelihood(mlp, x0.float(), steps=16, **EXACT)
    assert 0 < float((half.total - wide.total).abs().max()) <= 0.2
    assert float((half.total - again.total).abs().max()) <= 0.05


def test_likelihood_of_no_samples() -> None:
    result = fd.Diffusion(SCHEDULES["flow"], "sample").log_likelihood(correlated, torch.zeros(0, 3, 2))
    assert [value.shape for value in result] == [(0,)] * 3


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 4)
D = fd.Diffusion(fd.Schedule.linear(10), "v_prediction")
BAD: dict[str, Any] = {
    "solver": ({"solver": "euler"}, "unknown solver 'euler': choose from heun, rk4"),
    "divergence": ({"divergence": "trace"}, "unknown divergence 'trace': choose from hutchinson, exact"),
    "noise": ({"noise": "normal"}, "unknown noise 'normal': choose from rademacher, gaussian"),
    "steps": ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    "steps fraction": ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
    "probes": ({"probes": 0}, "probes must be a whole number of at least 1, got 0"),
    "batch": ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
    "sample": ({"sample": [1]}, "sample must hold one id per sample"),
    "integer x0": ({"x0": X.long()}, "x0 must be a floating-point tensor"),
    "NaN": ({"x0": X * math.nan}, "x0 holds NaN or infinite values"),
    "bytes": ({"x0": X + 2, "dequantize": True}, r"dequantize needs x0 in \[-1, 1\]"),
    "no model": ({"model": 3}, "model must be callable, got int"),
    "no derivative": ({"model": torch.no_grad()(correlated)}, "log_likelihood needs the derivative of the model's"),
    "channels": ({"model": lambda x, t: torch.cat((x, x), 1)}, "variance=fixed_small, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(fd.InputError, match=message) as error:
        D.log_likelihood(**{"model": correlated, "x0": X, "steps": 2, **arguments})
    assert "\n" not in str(error.value)


def test_schedules_without_a_way_are_refused() -> None:
    with pytest.raises(fd.InputError, match="an epsilon prediction says nothing about x0 at zero terminal SNR"):
        fd.Diffusion(SCHEDULES["zero_snr"]).log_likelihood(correlated, X)
    for schedule in (fd.Schedule.linear(1), fd.Schedule.linear(2).rescale_zero_terminal_snr()):
        with pytest.raises(fd.InputError, match="the probability flow needs timesteps to go through"):
            fd.Diffusion(schedule, "sample").log_likelihood(correlated, X)
