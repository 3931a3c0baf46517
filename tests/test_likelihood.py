"""The variational bound: every term against closed forms, the bound against the truth, the decoder's bins."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_tools import randn as randn_of
from oracles import Gaussian, model_of
from scipy import special, stats
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.likelihood import AT_ONCE, MOST, batch_size
from fastdiff.noise import Stream, normal

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no part of the package

from benchmarks import harness
from benchmarks import likelihood as benchmark

F64 = torch.float64


def randn(shape, seed):
    return randn_of(shape, seed, F64)


def at(table, t, ndim=3):
    return table[t].reshape(-1, *(1,) * (ndim - 1))


def largest(difference):
    return float(difference.detach().abs().max())


def network(x, t):
    """A network that is neither right nor constant."""
    return 0.3 * x - 0.1 * torch.tanh(x) + 0.001 * t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def with_variance(x, t):
    """The same with variance channels that reach outside of [-1, 1]."""
    return torch.cat((network(x, t), 1.5 * torch.sin(3 * x)), 1)


# ---- every term -----------------------------------------------------------------------------

MU, S = 0.4, 0.7
DATA = Gaussian(MU, S)
LIKELIHOODS = {
    "linear": (fd.Schedule.linear(20, beta_start=0.01, beta_end=0.4), ("epsilon", "sample", "v_prediction")),
    "cosine": (fd.Schedule.cosine(20), ("epsilon", "sample", "v_prediction")),
    "zero_snr": (fd.Schedule.cosine(20).rescale_zero_terminal_snr(), ("sample", "v_prediction")),
    "edm": (fd.Schedule.edm(20, sigma_min=0.05), ("epsilon", "sample", "v_prediction", "flow_prediction")),
    "flow": (fd.Schedule.flow(20), ("sample", "v_prediction", "flow_prediction")),
}
PAIRS = [(name, prediction) for name, (_, predictions) in LIKELIHOODS.items() for prediction in predictions]
pairs = pytest.mark.parametrize(("name", "prediction"), PAIRS)


def denoise(x, alpha, sigma):
    return DATA.denoise(x, alpha, sigma)


def exact_model(schedule, prediction, variance_channel=None):
    """The network that knows the data; ``variance_channel`` gives its raw variance output by timestep."""
    exact = model_of(DATA, fd.Diffusion(schedule, prediction))

    def model(x_in, times):
        out = exact(x_in, times)
        if variance_channel is None:
            return out
        t = (schedule.c_noise.double() - times.double()[:, None]).abs().argmin(1)
        return torch.cat((out, at(variance_channel, t, out.ndim).expand_as(out)), 1)

    return model


def drawn_states(schedule, x0, seed):
    """x_t of every timestep as bits_per_dim draws them, ``[N, T, d]``."""
    noise = [
        normal(x0.shape, seed=seed, step=t, stream=Stream.LIKELIHOOD, dtype=F64).numpy() for t in range(len(schedule))
    ]
    alpha, sigma = schedule.alpha.numpy(), schedule.sigma.numpy()
    return np.stack([alpha[t] * x0.numpy() + sigma[t] * noise[t] for t in range(len(schedule))], 1)


def variances(schedule):
    """The posterior variance and the forward variance of every t, in extended precision."""
    alpha, sigma = (table.numpy().astype(np.longdouble) for table in (schedule.alpha, schedule.sigma))
    alpha_before, sigma_before = np.append(np.longdouble(1), alpha[:-1]), np.append(np.longdouble(0), sigma[:-1])
    large = sigma**2 - (alpha / alpha_before) ** 2 * sigma_before**2
    return large * sigma_before**2 / sigma**2, large


def kl_terms(schedule, x0, x_t, variance):
    """KL of every step t > 0 at the very states drawn, nats per dimension ``[N, T-1]``: Gaussians, by hand."""
    alpha, sigma = (table.numpy().astype(np.longdouble)[:, None] for table in (schedule.alpha, schedule.sigma))
    small, large = (v[1:, None] for v in variances(schedule))
    estimate = denoise(x_t, alpha, sigma)[:, 1:]
    difference = alpha[:-1] * large / sigma[1:] ** 2 * (x0.numpy()[:, None] - estimate)
    chosen = small if variance == "fixed_small" else large
    kl = 0.5 * (np.log(chosen / small) - 1 + (small + difference**2) / chosen)
    return kl.mean(2)


@pairs
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_every_term_is_the_closed_form_at_the_state_drawn(name, prediction, variance):
    schedule, x0 = LIKELIHOODS[name][0], MU + S * randn((4, 6), 3)
    diffusion = fd.Diffusion(schedule, prediction, variance)
    result = diffusion.bits_per_dim(exact_model(schedule, prediction), x0, decoder="gaussian", seed=9)
    x_t = drawn_states(schedule, x0, 9)
    expected = kl_terms(schedule, x0, x_t, variance) / np.log(2)
    assert np.abs(result.terms[:, 1:].numpy() - expected).max() <= 1e-10 * max(1, float(np.abs(expected).max()))
    width = np.sqrt(variances(schedule)[0][1])
    centre = denoise(x_t[:, 0], schedule.alpha[0].item(), schedule.sigma[0].item())
    decoder = -stats.norm.logpdf(x0.numpy(), centre, float(width)).mean(1) / np.log(2)
    assert np.abs(result.terms[:, 0].numpy() - decoder).max() <= 1e-10 * max(1, np.abs(decoder).max())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_term_has_the_closed_form_mean(name):
    schedule, predictions = LIKELIHOODS[name]
    x0 = MU + S * randn((128, 96), 4)
    diffusion = fd.Diffusion(schedule, predictions[-1])
    result = diffusion.bits_per_dim(exact_model(schedule, predictions[-1]), x0, decoder="gaussian", batch=1024)
    alpha, sigma, snr = (table.numpy() for table in (schedule.alpha, schedule.sigma, schedule.snr))
    left = S**2 * sigma**2 / (alpha**2 * S**2 + sigma**2)  # variance of x0 given x_t
    expected = (snr[:-1] - snr[1:]) / 2 * left[1:] / np.log(2)
    # Each element's term is its mean times a chi² of one degree of freedom.
    tolerance = 5 * expected * np.sqrt(2 / x0.numel())
    assert (np.abs(result.terms.mean(0)[1:].numpy() - expected) <= tolerance).all()
    width = float(variances(schedule)[0][1])
    decoder = 0.5 * (math.log(2 * math.pi * width) + left[0] / width) / math.log(2)
    spread = left[0] / width / 2 / math.log(2) * math.sqrt(2 / x0.numel())
    assert abs(float(result.terms[:, 0].mean()) - decoder) <= 5 * spread


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_prior_is_the_closed_form(name):
    schedule, predictions = LIKELIHOODS[name]
    x0 = MU + S * randn((5, 2, 3), 4)
    model = exact_model(schedule, predictions[0])
    prior = fd.Diffusion(schedule, predictions[0]).bits_per_dim(model, x0, decoder="gaussian").prior
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    if name == "edm":
        expected = x0**2 / (2 * sigma**2)
    else:
        expected = (alpha**2 * x0**2 + sigma**2 - 1 - math.log(sigma**2)) / 2
    assert largest(prior - expected.mean((1, 2)) / math.log(2)) <= 1e-12


def test_total_is_prior_and_terms_whatever_the_shape():
    for shape in ((3, 5), (2, 1, 4, 4), (1, 2, 3)):
        diffusion = fd.Diffusion(LIKELIHOODS["cosine"][0])
        result = diffusion.bits_per_dim(network, randn(shape, 0).clamp(-1, 1))
        assert result.total.shape == result.prior.shape == shape[:1]
        assert result.terms.shape == (shape[0], 20)
        assert largest(result.total - result.prior - result.terms.sum(1)) <= 1e-12 * largest(result.total)


def test_the_number_of_pairs_at_once_does_not_matter():
    schedule, x0 = LIKELIHOODS["cosine"][0], randn((5, 2, 3), 0).clamp(-1, 1)
    diffusion = fd.Diffusion(schedule, "v_prediction", "learned_range")
    whole = diffusion.bits_per_dim(with_variance, x0, seed=3)
    for batch in (1, 7, 99, 100, 1000):
        again = diffusion.bits_per_dim(with_variance, x0, seed=3, batch=batch)
        assert largest(again.terms - whole.terms) <= 1e-12 * largest(whole.terms)


def test_a_sample_s_likelihood_does_not_depend_on_the_batch():
    diffusion, x0 = fd.Diffusion(LIKELIHOODS["cosine"][0]), randn((6, 2, 3), 0).clamp(-1, 1)
    whole = diffusion.bits_per_dim(network, x0, seed=3).terms
    ids = [4, 0, 5]
    some = diffusion.bits_per_dim(network, x0[ids], seed=3, sample=ids).terms
    assert largest(some - whole[ids]) <= 1e-12 * largest(whole)


def test_likelihood_conditions_follow_their_samples():
    x0 = torch.arange(5, dtype=F64)[:, None].repeat(1, 3) / 10
    table, schedule = torch.arange(5, dtype=F64) / 10, fd.Schedule.cosine(4)
    model = lambda x, t, y, mode: table[y][:, None].expand_as(x)  # noqa: E731
    diffusion = fd.Diffusion(schedule, "sample")
    result = diffusion.bits_per_dim(model, x0, decoder="gaussian", y=torch.arange(5), mode="x", batch=3)
    assert largest(result.terms[:, 1:]) == 0, "a model that is given the data by its label has no error"


def test_clipping_bounds_the_estimate():
    schedule, x0 = fd.Schedule.cosine(4), randn((3, 2), 0).clamp(-1, 1)
    far, near = (lambda x, t, v=v: torch.full_like(x, v) for v in (3.0, 1.0))
    diffusion = fd.Diffusion(schedule, "sample")
    clipped, bound = diffusion.bits_per_dim(far, x0, clip=1.0), diffusion.bits_per_dim(near, x0)
    assert largest(clipped.terms - bound.terms) == 0
    assert largest(diffusion.bits_per_dim(far, x0).terms - bound.terms) > 0


def test_likelihood_of_no_samples():
    result = fd.Diffusion(fd.Schedule.cosine(4)).bits_per_dim(network, torch.zeros(0, 3, 2))
    assert (result.total.shape, result.prior.shape, result.terms.shape) == ((0,), (0,), (0, 4))


# ---- the bound and the truth ----------------------------------------------------------------


def raw_channel(schedule, log_variance):
    """The network's raw variance output that means ``log_variance [T]``."""
    small, large = variances(schedule)
    low = np.log(np.append(small[1], small[1:]))
    f = (log_variance - low) / (np.log(large) - low)
    return torch.from_numpy((2 * f - 1).astype(np.float64))


def exact_log_variance(schedule):
    """log Var[x_{t-1} | x_t] of data N(MU, S²), by the joint Gaussian."""
    alpha, sigma = schedule.alpha.numpy(), schedule.sigma.numpy()
    alpha_before, sigma_before = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
    before = alpha_before**2 * S**2 + sigma_before**2
    now = alpha**2 * S**2 + sigma**2
    covariance = alpha / alpha_before * before
    return np.log(before - covariance**2 / now)


@pytest.mark.parametrize(
    "schedule",
    [fd.Schedule.cosine(6), fd.Schedule.linear(8, beta_start=0.05, beta_end=0.7), fd.Schedule.edm(7, sigma_min=0.1)],
    ids=["cosine", "linear", "edm"],
)
def test_the_bound_of_the_exact_model_is_the_true_likelihood_at_any_number_of_steps(schedule):
    x0 = MU + S * randn((256, 128), 5)
    model = exact_model(schedule, "epsilon", raw_channel(schedule, exact_log_variance(schedule)))
    diffusion = fd.Diffusion(schedule, "epsilon", "learned_range")
    result = diffusion.bits_per_dim(model, x0, decoder="gaussian", batch=4096)
    nll = -stats.norm.logpdf(x0.numpy(), MU, S).mean(1) / np.log(2)
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    now, start = alpha**2 * S**2 + sigma**2, 1.0 if schedule.variance_preserving else sigma**2
    mismatch = 0.5 * ((now + alpha**2 * MU**2) / start - 1 - math.log(now / start)) / math.log(2)
    gap = result.total.numpy() - nll - mismatch
    assert abs(gap.mean()) <= 5 * gap.std() / 16
    assert 5 * gap.std() / 16 <= 0.05, "the case must be sharp enough to see an error of a few percent"


def gap_of_the_forward_variance(schedule):
    """Mean bits between the bound and the truth when the exact mean goes with the variance beta: KL of Gaussians."""
    ratio = np.exp(exact_log_variance(schedule)) / variances(schedule)[1].astype(np.float64)
    prior = (S**2 + MU**2) / float(schedule.sigma[-1]) ** 2 - np.log1p(S**2 / float(schedule.sigma[-1]) ** 2)
    return ((ratio - 1 - np.log(ratio)).sum() + prior) / 2 / np.log(2)


def test_the_bound_approaches_the_truth_from_above_as_steps_grow():
    x0 = MU + S * randn((64, 128), 6)
    nll = -stats.norm.logpdf(x0.numpy(), MU, S).mean(1) / np.log(2)
    gaps = []
    for n in (8, 32, 128, 512):
        schedule = fd.Schedule.edm(n, sigma_min=0.05)
        model = exact_model(schedule, "sample", torch.ones(n, dtype=F64))
        diffusion = fd.Diffusion(schedule, "sample", "learned_range")
        result = diffusion.bits_per_dim(model, x0, decoder="gaussian", batch=4096)
        gap = result.total.numpy() - nll
        assert abs(gap.mean() - gap_of_the_forward_variance(schedule)) <= 5 * gap.std() / 8
        gaps.append(gap.mean())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 8 * gaps[3] > 0
    assert gaps[3] < 0.1


# ---- the discrete decoder -------------------------------------------------------------------

BYTES = torch.arange(256, dtype=F64)[:, None] / 127.5 - 1


def byte_nats(mean, log_variance, values=BYTES):
    """-log probability of each byte under the decoder of a model that says ``mean`` and ``log_variance``."""
    schedule = fd.Schedule.cosine(2)
    raw = raw_channel(schedule, np.full(2, log_variance))

    def model(x, t):
        return torch.cat((torch.full_like(x, mean), at(raw, t, 2).to(x).expand_as(x)), 1)

    diffusion = fd.Diffusion(schedule, "sample", "learned_range")
    return diffusion.bits_per_dim(model, values).terms[:, 0].numpy() * math.log(2)


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.999, -0.5, 0.0, 0.3, 1.0, 1.5, 40.0])
@pytest.mark.parametrize("log_variance", [-20.0, -11.0, -8.0, -5.0, -1.0, 0.0, 4.0, 8.0])
def test_the_probabilities_of_all_bytes_sum_to_one(mean, log_variance):
    assert np.exp(-byte_nats(mean, log_variance)).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("log_variance", [-9.0, -5.0, -2.0, 1.0])
def test_byte_probabilities_are_the_mass_of_the_bins(mean, log_variance):
    x, std = BYTES[:, 0].numpy(), math.exp(log_variance / 2)
    with np.errstate(divide="ignore"):
        upper = np.where(np.arange(256) == 255, np.inf, (x + 1 / 255 - mean) / std)
        lower = np.where(np.arange(256) == 0, -np.inf, (x - 1 / 255 - mean) / std)
    flip = lower > 0  # the same mass in the flank where it has all its digits
    high, low = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
    expected = -(special.log_ndtr(high) + np.log1p(-np.exp(special.log_ndtr(low) - special.log_ndtr(high))))
    assert np.abs(byte_nats(mean, log_variance) - expected).max() <= 1e-9 * max(1, np.abs(expected).max())


def test_the_byte_decoder_is_symmetric():
    there, back = byte_nats(0.37, -6.0), byte_nats(-0.37, -6.0)[::-1]
    assert np.abs(there - back).max() <= 1e-9 * np.abs(there).max()


@pytest.mark.parametrize("mean", [-1.0, 0.2, 1.0])
def test_the_byte_decoder_in_float32(mean):
    for log_variance in (-16.0, -8.0, -2.0, 30.0):
        narrow = byte_nats(mean, log_variance, BYTES.float())
        wide = byte_nats(mean, log_variance)
        likely = wide < 20
        assert np.isfinite(narrow).all()
        assert np.abs(np.exp(-narrow) - np.exp(-wide))[likely].max() <= 2e-3


@pytest.mark.parametrize(("value", "name"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(value, name):
    schedule, x0 = LIKELIHOODS["cosine"][0], randn((3, 4), 0).clamp(-1, 1)
    model = lambda x, t: torch.cat((network(x, t), torch.full_like(x, value)), 1)  # noqa: E731
    learned = fd.Diffusion(schedule, variance="learned_range").bits_per_dim(model, x0, seed=2).terms
    fixed = fd.Diffusion(schedule, variance=name).bits_per_dim(network, x0, seed=2).terms
    assert largest(learned[:, 1:] - fixed[:, 1:]) <= 1e-12 * largest(fixed)
    if name == "fixed_small":
        assert largest(learned[:, 0] - fixed[:, 0]) <= 1e-12 * largest(fixed)


def test_both_fixed_variances_share_the_decoder():
    schedule, x0 = LIKELIHOODS["cosine"][0], randn((3, 4), 0).clamp(-1, 1)
    small, large = (
        fd.Diffusion(schedule, variance=name).bits_per_dim(network, x0).terms for name in ("fixed_small", "fixed_large")
    )
    assert largest(small[:, 0] - large[:, 0]) <= 1e-12 * largest(small)
    assert (small[:, 1:] != large[:, 1:]).all()


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_true_posterior_does_not_depend_on_the_model_s_variance(variance):
    schedule, t = LIKELIHOODS["cosine"][0], torch.arange(20)
    x0, x_t = randn((20, 2), 0), randn((20, 2), 1)
    small, other = (fd.Diffusion(schedule, variance=v).posterior(x0, x_t, t) for v in ("fixed_small", variance))
    assert all(map(torch.equal, small, other))


# ---- how the network is asked ---------------------------------------------------------------


def test_the_curve_is_the_mean_of_each_timestep_s_term():
    result = fd.Diffusion(fd.Schedule.cosine(20)).bits_per_dim(network, randn((5, 2, 3), 0).clamp(-1, 1))
    assert result.curve.shape == (20,)
    assert largest(result.curve - sum(result.terms) / 5) <= 1e-12 * largest(result.curve)
    assert float(result.prior.mean() + result.curve.sum()) == pytest.approx(float(result.total.mean()), rel=1e-12)


def test_by_default_a_quarter_of_a_million_numbers_go_through_the_network_at_once():
    sizes = []

    def model(x, t):
        sizes.append(len(x))
        return x

    diffusion = fd.Diffusion(fd.Schedule.linear(600), "sample")
    diffusion.bits_per_dim(model, torch.zeros(2, 3, 16, 16))
    most = AT_ONCE // 2 // 768
    assert sizes == [most] * 7 + [1200 - 7 * most]
    assert batch_size(None, torch.zeros(1, 3, 32, 32)) == 42
    assert batch_size(None, torch.zeros(1, 3, 32, 32, device="meta")) == 85
    assert batch_size(None, torch.zeros(1, 2)) == MOST
    assert batch_size(None, torch.zeros(1, 3, 1, 1).expand(1, 3, 512, 512)) == 1


class Scaled(nn.Module):
    """A network in bfloat16 with a form for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        self.seen: list[Any] = []

    def prepared(self) -> Scaled:
        form = Scaled()
        form.weight, form.seen = self.weight, self.seen
        form.is_prepared = True
        return form

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, t.dtype, getattr(self, "is_prepared", False), torch.is_grad_enabled()))
        return self.weight * x


@pytest.mark.parametrize(("name", "time"), [("cosine", torch.int64), ("edm", torch.float32)])
def test_a_network_is_asked_in_its_form_for_inference_and_its_precision(name, time):
    model = Scaled()
    result = fd.Diffusion(LIKELIHOODS[name][0], "sample").bits_per_dim(model, randn((2, 3), 0).clamp(-1, 1))
    assert set(model.seen) == {(torch.bfloat16, time, True, False)}
    assert result.terms.dtype == F64
    if name == "cosine":
        ours = fd.Diffusion(LIKELIHOODS[name][0], "sample").bits_per_dim
        close = ours(lambda x, t: x / 2, randn((2, 3), 0).clamp(-1, 1))
        assert 0 < largest(result.terms - close.terms) <= 2e-2 * largest(close.terms)


def test_an_own_unet_has_the_same_bound_prepared_or_not():
    torch.manual_seed(0)
    unet = fd.UNet(8, model_channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    diffusion, x0 = fd.Diffusion(fd.Schedule.cosine(10), "v_prediction"), randn((2, 3, 8, 8), 0).float().clamp(-1, 1)
    ours = diffusion.bits_per_dim(unet, x0)
    plain = diffusion.bits_per_dim(lambda x, t: unet(x, t), x0)
    assert largest(ours.terms - plain.terms) <= 1e-4 * largest(plain.terms)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_in_float32_the_terms_keep_their_digits(variance):
    schedule = fd.Schedule.linear(1000)
    diffusion, x0 = fd.Diffusion(schedule, "epsilon", variance), randn((4, 3, 8), 0).clamp(-1, 1)
    model = with_variance if variance == "learned_range" else network
    wide, narrow = diffusion.bits_per_dim(model, x0), diffusion.bits_per_dim(model, x0.float())
    assert largest((narrow.terms - wide.terms) / wide.terms) <= 2e-3
    assert largest(narrow.total / wide.total - 1) <= 1e-5


def test_the_benchmark_s_loop_of_one_timestep_after_another_is_the_same_bound():
    case = next(case for case in benchmark.cases(torch.device("cpu"), quick=True) if len(case.shape) == 2)
    arrays = harness.make_arrays(case, torch.device("cpu"))
    assert harness.gate(case, arrays, harness.truth(case, arrays)) <= 1e-5
    setting = benchmark.Setting(20, (2, 1, 4, 4), F64, torch.device("cpu"))
    model, x0 = nn.Conv2d(1, 1, 3, padding=1).double(), randn(setting.shape, 0).clamp(-1, 1)
    asked = Asked(model)
    for ours, loop in zip(
        benchmark.fastdiff(setting, asked, x0), benchmark.loop(setting, asked, x0, benchmark.addressed), strict=True
    ):
        assert largest(ours - loop) <= 1e-7 * largest(loop)


class Asked(nn.Module):
    """A network that does not look at the time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x)


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
D = fd.Diffusion(fd.Schedule.linear(10))
BAD = {
    "decoder": (lambda: D.bits_per_dim(network, X, decoder="bytes"), "unknown decoder 'bytes': choose from discrete"),
    "bytes": (lambda: D.bits_per_dim(network, X + 1.5), "the discrete decoder needs x0 in"),
    "integer x0": (lambda: D.bits_per_dim(network, X.long()), "x0 must be a floating-point tensor"),
    "NaN": (lambda: D.bits_per_dim(network, X * math.nan), "x0 holds NaN or infinite values"),
    "batch": (lambda: D.bits_per_dim(network, X, batch=0), "batch must be a whole number of at least 1, got 0"),
    "batch fraction": (lambda: D.bits_per_dim(network, X, batch=2.5), "batch must be a whole number"),
    "sample ids": (lambda: D.bits_per_dim(network, X, sample=[0, -1]), "sample"),
    "clip": (lambda: D.bits_per_dim(network, X, clip=-1.0), "clip must be positive or None"),
    "no model": (lambda: D.bits_per_dim(None, X), "model must be callable, got NoneType"),
    "no output": (lambda: D.bits_per_dim(lambda x, t: None, X), "the model must return a tensor"),
    "channels": (lambda: D.bits_per_dim(with_variance, X), "variance=fixed_small, got"),
    "no signal": (
        lambda: fd.Diffusion(LIKELIHOODS["zero_snr"][0]).bits_per_dim(network, X),
        "an epsilon prediction says nothing about x0 at zero terminal SNR",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
