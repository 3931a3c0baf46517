"""Likelihood: the variational bound with its decoder, and the change of variables along the probability-flow ODE.

:class:`fastdiff.Diffusion` asks for both, ``bits_per_dim`` and ``log_likelihood``; here is their mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import noise as noises
from fastdiff import ops
from fastdiff.errors import InputError, check, choose
from fastdiff.ops import row as rows
from fastdiff.ops.forward import BOUND
from fastdiff.schedule import Schedule

LETTERS = BOUND[:-1]  # all of :data:`fastdiff.ops.forward.BOUND` but the weight
NO_SIGNAL = "an epsilon prediction says nothing about x0 at zero terminal SNR: use v_prediction or sample"
DECODERS = ("discrete", "gaussian")
DIVERGENCES = ("hutchinson", "exact")
NOISES = ("rademacher", "gaussian")
#: Runge-Kutta methods: what each stage adds to the state in steps of the slopes before it, and the slopes' weights.
SOLVERS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "heun": (((), (1.0,)), (1 / 2, 1 / 2)),
    "rk4": (((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
BIN = 2 / 255  # width of a byte's bin where bytes are scaled to [-1, 1]
AT_ONCE = 2**18  # numbers that go through the network at once, 85 images of CIFAR-10; half as many on a CPU
MOST = 4096  # samples that do
GRADING = 3  # of the steps along the flow

Network = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]  # what it is given, the time, conditions -> its output


class Likelihood(NamedTuple):
    """The variational bound in bits per dimension: ``total = prior + terms.sum(1)``."""

    total: Tensor  #: [N]
    prior: Tensor  #: [N], KL of q(x_T | x0) from the standard normal
    terms: Tensor  #: [N, T]; terms[:, 0] is the decoder, terms[:, t] the KL of step t

    @property
    def curve(self) -> Tensor:
        """The mean over samples of each timestep's term, bits per dimension ``[T]``; NaN for no samples."""
        return self.terms.mean(0)


class LogLikelihood(NamedTuple):
    """The likelihood of samples under the probability-flow ODE, float64."""

    total: Tensor  #: [N], -log2 p(x0) per dimension, in bits
    prior: Tensor  #: [N], the part of it that is the noise's which x0 becomes; the rest is the change of volume
    nats: Tensor  #: [N], ln p(x0) of the whole sample


# ---- the variational bound ------------------------------------------------------------------


def bound_table(schedule: Schedule, prediction: str, variance: str) -> Tensor:
    """What the terms of the bound are made of, by timestep: float64 ``[T, 7]``, the :data:`LETTERS`.

    alpha, sigma; p and q of x0's estimate; b, the posterior mean's weight of x0; the logarithms of the posterior
    variance and of the model's own, which for ``learned_range`` is the larger one, beta_t. At t = 0 the posterior
    variance is that of t = 1, for it would be 0, and so is that of ``fixed_large``, whose decoder would be too wide
    (Ho et al. 2020, section 3.2).
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    levels = alpha, sigma, torch.cat((alpha.new_ones(1), alpha[:-1])), torch.cat((sigma.new_zeros(1), sigma[:-1]))
    _, b, small = rows.posterior(*levels)
    large = rows.forward_variance(*levels)
    small = small[torch.arange(len(alpha)).clamp(min=min(1, len(alpha) - 1))]
    small = torch.where(small > 0, small, large)
    if variance == "fixed_large":
        large = torch.cat((small[:1], large[1:]))
    of_model = small if variance == "fixed_small" else large
    return torch.stack((alpha, sigma, *rows.to_x0(prediction, alpha, sigma), b, small.log(), of_model.log()), 1)


def finite_x0(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p, q of :func:`fastdiff.ops.row.to_x0`.

    Raises:
        InputError: levels at which the prediction says nothing about x0.
    """
    p, q = rows.to_x0(prediction, alpha, sigma)
    check(_is_finite(p, q), NO_SIGNAL)
    return p, q


def letters_at(table: Tensor, t: Tensor) -> Tensor:
    """Rows of a :func:`bound_table`; raises as :func:`finite_x0` does."""
    letters = table[t.cpu()]
    check(_is_finite(letters[:, 2:4]), NO_SIGNAL)
    return letters


def _is_finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


def check_decoder(decoder: str, x0: Tensor) -> None:
    choose("decoder", decoder, DECODERS)
    check(decoder == "gaussian" or not (x0.abs() > 1).any(), "the discrete decoder needs x0 in [-1, 1]")


def bound_terms(
    out: Tensor,
    x0: Tensor,
    x_t: Tensor,
    letters: Tensor,
    first: Tensor | slice,
    decoder: str,
    clip: float | None = None,
) -> Tensor:
    """The term of the bound at each sample's timestep, bits per dimension ``[N]``.

    Args:
        out: what the network gives for x_t, ``[N, C, ...]``, or ``[N, 2C, ...]`` with a learned variance.
        letters: ``[N, 7]``, each sample's row of the :func:`bound_table`.
        first: which samples are at t = 0, where the term is the decoder's.
    """
    channels, wide = x0.shape[1], torch.promote_types(x0.dtype, torch.float32)
    out, x0, x_t = (value.to(wide) for value in (out, x0, x_t))
    _, _, p, q, b, small, large = (spread(column, x0) for column in letters.unbind(1))
    estimate = p * x_t + q * out[:, :channels]
    if clip is not None:
        estimate = estimate.clamp(-clip, clip)
    share = (1 + out[:, channels:]) / 2  # of the larger variance (Nichol & Dhariwal 2021, eq. 15)
    log_variance = share * large + (1 - share) * small if share.numel() else large
    nats = _gaussian_kl(b * (x0 - estimate), small, log_variance)
    # The posterior mean at t = 0 is x0 itself.
    nll = _discrete_nll if decoder == "discrete" else _gaussian_nll
    nats[first] = nll(x0[first], estimate[first], log_variance[first])
    return _bits(nats)


def variational_bound(
    network: Network,
    x0: Tensor,
    schedule: Schedule,
    table: Tensor,
    *,
    decoder: str,
    clip: float | None,
    seed: noises.Seed,
    sample: Sequence[int] | Tensor | None,
    batch: int | None,
    cond: dict[str, Any],
) -> Likelihood:
    """All terms of the bound, see :meth:`fastdiff.Diffusion.bits_per_dim`: pairs of a sample and a timestep in batches.

    The pairs of t = 0 come first, so that no batch has to look for them on the device.
    """
    n, device = len(x0), x0.device
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    table, c_in, times = table.to(x0), schedule.c_in.to(x0), schedule.c_noise.to(device)
    seeds, ids = noises.sample_ids(n, seed, sample, device)
    scaled = bool((schedule.c_in != 1).any())
    terms = torch.empty(len(table), n, dtype=torch.float64, device=device)
    flat, size = terms.view(-1), batch_size(batch, x0)
    for start in range(0, len(flat), size):
        pairs = torch.arange(start, min(start + size, len(flat)), device=device)
        t, who = pairs // n, pairs % n
        data, letters = x0[who], table[t]
        noise = noises.Address(seeds[who], t, ids[who], noises.Stream.LIKELIHOOD)
        x_t = ops.add_noise(data, letters[:, 0], letters[:, 1], noise)
        out = network(spread(c_in[t], x_t) * x_t if scaled else x_t, times[t], conditions_of(who, cond, n))
        first = slice(max(n - start, 0))
        flat[start : start + size] = bound_terms(out, data, x_t, letters, first, decoder, clip)
    terms = terms.T.contiguous()
    prior = _prior_bits(x0, schedule).double()
    return Likelihood(prior + terms.sum(1), prior, terms)


def _prior_bits(x0: Tensor, schedule: Schedule) -> Tensor:
    """KL of q(x_T | x0) from what sampling starts with, mean bits per dimension ``[N]``."""
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    std = torch.ones_like(sigma) if schedule.variance_preserving else sigma
    return _bits(_gaussian_kl(alpha.to(x0) * x0, 2 * sigma.log().to(x0), 2 * std.log().to(x0)))


def _gaussian_kl(difference: Tensor, log_variance1: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) per element of Gaussians whose means have that difference, nats."""
    ratio = log_variance1 - log_variance2
    kl: Tensor = (ratio.expm1() - ratio + difference.square() * (-log_variance2).exp()) / 2
    return kl


def _gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    nll: Tensor = (math.log(2 * math.pi) + log_variance + (x - mean).square() * (-log_variance).exp()) / 2
    return nll


def _discrete_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass on x's bin, the outer bins open (Ho et al. 2020, eq. 13), nats."""
    upper, lower = ((x - mean + side * BIN / 2) * (-log_variance / 2).exp() for side in (1, -1))
    upper, lower = torch.where(x > 0.999, torch.inf, upper), torch.where(x < -0.999, -torch.inf, lower)
    # On the right flank both cumulative values round to 1: take the mirrored interval there.
    mirrored = lower + upper > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    share_below = (log_lower - log_upper).clamp(max=-1e-7).exp()
    nll: Tensor = -log_upper - torch.log1p(-share_below)
    return nll


# ---- the probability-flow ODE ---------------------------------------------------------------


class Stage(NamedTuple):
    """One question to the network on the way: it is given ``scale z`` at ``time``, and dz/dphi = a z + b out."""

    a: float
    b: float
    scale: float
    time: float


@dataclass(frozen=True)
class ProbabilityFlow:
    """The probability-flow ODE of a schedule (Song et al. 2021, eq. 13), by the angle phi = atan(sigma / alpha).

    The process on the circle, z = x / hypot(alpha, sigma) = cos(phi) x0 + sin(phi) noise, moves by its v-prediction:
    dz/dphi = v(z), for every schedule and finite at both ends. Steps are equal in phi^(1/3), finer where there is less
    noise (as Karras et al. 2022, eq. 5, grade sigma).

    Attributes:
        strides: of the steps, in phi.
        stages: of each step, by the method's nodes.
        shrink: z over x0 where the flow begins, cos(phi) of timestep 0.
        std: of the noise z that sampling starts from.
    """

    strides: list[float]
    stages: list[list[Stage]]
    shrink: float
    std: float

    @classmethod
    def of(cls, schedule: Schedule, prediction: str, steps: int, solver: str) -> ProbabilityFlow:
        """Raises InputError for a schedule without a way to go, or an epsilon prediction of one without signal."""
        no_signal = schedule.zero_terminal_snr
        check(not no_signal or prediction != "epsilon", NO_SIGNAL)
        # log-SNR, by which discrete schedules are interpolated, has no end there: the last step is left out.
        last = len(schedule) - (2 if no_signal and schedule.config["name"] != "flow" else 1)
        check(last >= 1, f"the probability flow needs timesteps to go through, this schedule has {len(schedule)}")
        ends = torch.atan2(schedule.sigma, schedule.alpha)[[0, last]]
        low, high = (ends ** (1 / GRADING)).tolist()
        angles = torch.linspace(low, high, steps + 1, dtype=torch.float64) ** GRADING
        nodes = torch.tensor([sum(weights) for weights in SOLVERS[solver][0]], dtype=torch.float64)
        phi = (angles[:-1, None] + nodes * angles.diff()[:, None]).clamp(max=float(ends[1]))
        std = 1.0 if schedule.variance_preserving else math.sin(float(ends[1]))
        stages = _stages(schedule, prediction, phi)
        return cls(angles.diff().tolist(), stages, math.cos(float(ends[0])), std)


def _stages(schedule: Schedule, prediction: str, phi: Tensor) -> list[list[Stage]]:
    """The stages at angles ``[steps, stages]``."""
    level = schedule.at(schedule.timestep_of(-2 * phi.flatten().tan().log()))
    norm = torch.hypot(level.alpha, level.sigma)
    p, q = rows.to_x0(prediction, level.alpha, level.sigma)
    # v = (cos(phi) z - x0) / sin(phi), and x0 = p x + q out with x = norm z
    a, b = (level.alpha - p * norm**2) / level.sigma, -q * norm / level.sigma
    columns = (a, b, norm * level.c_in, level.c_noise)
    flat = [Stage(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]
    return [flat[i : i + phi.shape[1]] for i in range(0, len(flat), phi.shape[1])]


@torch.inference_mode(False)
def log_likelihood(
    network: Network,
    x0: Tensor,
    flow: ProbabilityFlow,
    *,
    solver: str,
    divergence: str,
    probes: int,
    noise: str,
    dequantize: bool,
    seed: noises.Seed,
    sample: Sequence[int] | Tensor | None,
    batch: int | None,
    cond: dict[str, Any],
) -> LogLikelihood:
    """The log-density of samples under the flow, see :meth:`fastdiff.Diffusion.log_likelihood`."""
    n, d = len(x0), math.prod(x0.shape[1:])
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32)).clone()
    seeds, ids = noises.sample_ids(n, seed, sample, x0.device)
    prior, change = torch.empty(2, n, dtype=torch.float64, device=x0.device)
    if dequantize:
        place = noises.Address(seeds, 0, ids, noises.Stream.DEQUANTIZATION)
        x0 = x0 + (uniform(x0.shape, place, x0.device).to(x0) - 0.5) * BIN
    size = batch_size(batch, x0)
    for start in range(0, n, size):
        who = slice(start, start + size)
        draw = partial(_probes, divergence, probes, noise, noises.Address(seeds[who], 0, ids[who], noises.Stream.PROBE))
        ask = partial(_slope, network, conditions_of(who, cond, n), draw)
        z, change[who] = _integrated(ask, flow, solver, flow.shrink * x0[who])
        prior[who] = _log_normal(z, flow.std)
    # of x0 = z / shrink
    nats = prior + change + d * math.log(flow.shrink) + (d * math.log(BIN) if dequantize else 0)
    per_bit = -1 / (d * math.log(2)) if d else math.nan
    return LogLikelihood(per_bit * nats, per_bit * prior, nats)


Slope = Callable[[Tensor, Stage, int], tuple[Tensor, Tensor]]


def _integrated(slope: Slope, flow: ProbabilityFlow, solver: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """z at the end of the flow and the integral of its slope's divergence, float64 ``[N]``."""
    matrix, weights = SOLVERS[solver]
    change = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for step, (stride, stages) in enumerate(zip(flow.strides, flow.stages, strict=True)):
        slopes: list[Tensor] = []
        following = z
        for number, (stage, row, weight) in enumerate(zip(stages, matrix, weights, strict=True)):
            state = z
            for share, earlier in zip(row, slopes, strict=True):
                state = state + stride * share * earlier if share else state
            v, divergence = slope(state, stage, step * len(stages) + number)
            slopes.append(v)
            following, change = following + stride * weight * v, change + stride * weight * divergence
        z = following
    return z, change


@torch.enable_grad()
def _slope(
    network: Network,
    cond: dict[str, Any],
    draw: Callable[[Tensor, int], Iterator[tuple[float, Tensor]]],
    z: Tensor,
    stage: Stage,
    number: int,
) -> tuple[Tensor, Tensor]:
    """dz/dphi, and its divergence ``[N]`` by products of probes with the network's Jacobian."""
    given = (stage.scale * z).detach().requires_grad_()
    time = torch.full((len(z),), stage.time, dtype=torch.float64, device=z.device)
    out = network(given, time, cond)[:, : z.shape[1]]
    if not out.requires_grad:
        raise InputError("log_likelihood needs the derivative of the model's output by x: this model hides or has none")
    trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for weight, probe in draw(out, number):
        (product,) = torch.autograd.grad(out, given, probe, retain_graph=True, materialize_grads=True)
        trace += weight * (product * probe).flatten(1).sum(1, dtype=torch.float64)
    v = stage.a * z + stage.b * out.detach().to(z.dtype)
    return v, stage.a * z[0].numel() + stage.b * stage.scale * trace


def _probes(
    divergence: str, probes: int, noise: str, place: noises.Address, like: Tensor, number: int
) -> Iterator[tuple[float, Tensor]]:
    """Vectors v like a network's output, with weights for which the mean of all v v^T is the identity.

    ``exact``: the basis, one by one. ``hutchinson``: noise (Grathwohl et al. 2019, section 3.1), another for every
    question to the network: a sum of independent estimates varies less than one that is kept along the way.
    """
    if divergence == "exact":
        for element in range(like[0].numel()):
            basis = torch.zeros_like(like, memory_format=torch.contiguous_format)
            basis.flatten(1)[:, element] = 1
            yield 1.0, basis
        return
    for probe in range(probes):
        z = noises.at(like.shape, place._replace(step=number * probes + probe), like.device)
        yield 1 / probes, (z if noise == "gaussian" else torch.where(z < 0, -1.0, 1.0)).to(like.dtype)


def _log_normal(z: Tensor, std: float) -> Tensor:
    """ln N(z; 0, std**2) of each sample, float64 ``[N]``."""
    squares = (z.double() / std).square() + math.log(2 * math.pi * std**2)
    return -squares.flatten(1).sum(1) / 2


def uniform(shape: Sequence[int], place: noises.Address, device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1) of an address, float64: what the normal distribution makes of its normals."""
    numbers: Tensor = torch.special.ndtr(noises.at(shape, place, device).double())
    return numbers


# ---- batches --------------------------------------------------------------------------------


def batch_size(batch: int | None, x: Tensor) -> int:
    """How many samples like those of x go through the network at once."""
    if batch is not None:
        check(isinstance(batch, int) and batch >= 1, f"batch must be a whole number of at least 1, got {batch!r}")
        return batch
    numbers = AT_ONCE // 2 if x.device.type == "cpu" else AT_ONCE
    return min(max(1, numbers // max(1, math.prod(x.shape[1:]))), MOST)


def conditions_of(who: Tensor | slice, cond: dict[str, Any], n: int) -> dict[str, Any]:
    """The conditions of some of ``n`` samples: rows of what has one for each."""
    return {name: value[who] if _per_sample(value, n) else value for name, value in cond.items()}


def _per_sample(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def spread(value: Tensor, x: Tensor) -> Tensor:
    """``[N]`` as ``[N, 1, ...]`` in x's dtype and on its device."""
    return value.reshape(-1, *(1,) * (x.ndim - 1)).to(x)


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
