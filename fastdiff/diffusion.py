"""The diffusion process of a schedule and a prediction type: forward noising, posterior, losses, likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import noise as noises
from fastdiff import ops
from fastdiff.errors import InputError, check, choose
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_clip, check_floating, check_same
from fastdiff.ops.step import VARIANCES
from fastdiff.schedule import Schedule

LOSSES = ("simple", "vlb", "hybrid", "min_snr", "snr_sample")
HYBRID_WEIGHT = 1e-3  # lambda of Nichol & Dhariwal 2021, eq. 16
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4
Model = Callable[..., Any]


class Likelihood(NamedTuple):
    """The variational bound in bits per dimension: ``total = prior + terms.sum(1)``."""

    total: Tensor  #: [N]
    prior: Tensor  #: [N], KL of q(x_T | x0) from the standard normal
    terms: Tensor  #: [N, T]; terms[:, 0] is the decoder, terms[:, t] the KL of step t


@dataclass(frozen=True)
class Diffusion:
    """A schedule, what the network predicts, and the variance of the reverse process.

    Args:
        schedule: noise levels by timestep.
        prediction: what the network gives, ``epsilon`` | ``sample`` | ``v_prediction`` | ``flow_prediction``.
        variance: of the ancestral step, ``fixed_small`` (posterior variance) | ``fixed_large`` (beta_t)
            | ``learned_range`` (the network has 2C channels; the last C interpolate between the logarithms
            of the two, Nichol & Dhariwal 2021, eq. 15).

    Timesteps ``t`` are int64 ``[N]``, 0 ... T-1; ``t = 0`` is one noising step.
    Every method raises :class:`~fastdiff.errors.InputError` for what does not fit.
    """

    schedule: Schedule
    prediction: str = "epsilon"
    variance: str = "fixed_small"

    def __post_init__(self) -> None:
        check(isinstance(self.schedule, Schedule), f"schedule must be a Schedule, got {type(self.schedule).__name__}")
        choose("prediction", self.prediction, rows.PREDICTIONS)
        choose("variance", self.variance, VARIANCES)

    # ---- the process ------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise, in x0's shape and dtype (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._levels(t, x0)
        return ops.add_noise(x0, alpha, sigma, noise)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x0): mean (shape of x0), variance and log-variance ``[N, 1, ...]`` (Ho et al. 2020, eq. 7).

        The variance at t = 0 is 0; there the log-variance is that of t = 1, so that it stays finite.
        """
        check_floating("x0", x0)
        check_same("x_t", x_t, x0)
        a, b, variance = rows.posterior(*self._steps(t, x0))
        log_variance = self._log_variances(t, x0)[0]
        mean = _spread(a, x0) * x_t + _spread(b, x0) * x0
        return mean, _spread(variance, x0), _spread(log_variance, x0)

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, to: str, *, source: str | None = None) -> Tensor:
        """Turn a prediction of type ``source`` (default: this diffusion's) into type ``to``.

        The map goes through x0: epsilon is ill-conditioned where alpha is small and a sample where sigma is.
        Where it does not exist (epsilon at zero signal) this raises.
        """
        check_floating("value", value)
        check_same("x_t", x_t, value)
        choose("prediction", to, rows.PREDICTIONS)
        alpha, sigma = self._levels(t, value)
        p, q = (_spread(c, value) for c in _finite_x0(source or self.prediction, alpha, sigma))
        f, g = (_spread(c, value) for c in rows.target(to, alpha, sigma))
        x0 = p * x_t + q * value
        return f * x0 + g * ((x_t - _spread(alpha, value) * x0) / _spread(sigma, value))

    def predict_x0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that a network output stands for."""
        return self.convert(out, x_t, t, "sample")

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should give for x_t made of ``x0`` and ``noise``."""
        check_floating("x0", x0)
        check_same("noise", noise, x0)
        f, g = rows.target(self.prediction, *self._levels(t, x0))
        return _spread(f, x0) * x0 + _spread(g, x0) * noise

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: ``c_in x_t`` and the time it understands, ``[N]``."""
        self._check_t(t, x_t)
        times = self.schedule.c_noise[t.cpu()].to(x_t.device)
        return _spread(self.schedule.c_in[t.cpu()], x_t) * x_t, times.to(
            x_t.dtype
        ) if times.is_floating_point() else times

    def check_output(self, out: Tensor, x_t: Tensor) -> None:
        """Raise unless a network output has the channels that this prediction and variance ask for."""
        shape = (len(x_t), x_t.shape[1] * (2 if self.variance == "learned_range" else 1), *x_t.shape[2:])
        fits = out.shape == shape
        check(fits, f"the model's out must be {list(shape)} with variance={self.variance}, got {list(out.shape)}")

    # ---- losses -----------------------------------------------------------------------------

    def loss(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor | None = None,
        *,
        kind: str = "simple",
        decoder: str = "discrete",
        seed: int = 0,
        step: int = 0,
        sample: Sequence[int] | Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        """The training loss of a batch, a scalar.

        Args:
            model: ``model(x, t, **cond)``.
            x0: data ``[N, C, ...]``.
            t: int64 ``[N]``; drawn uniformly from (seed, step, sample) when left out.
            kind: ``simple``: mean squared error of the prediction (Ho et al. 2020, eq. 14);
                ``min_snr``: weighted by min(SNR, 5) in x0 space (Hang et al. 2023);
                ``snr_sample``: (SNR(t-1) - SNR(t)) / 2 times the squared error of x0 (Kingma et al. 2021,
                eq. 15), SNR(0) / 2 at t = 0 where SNR(-1) is infinite;
                ``vlb``: T times the term of the variational bound at t, bits per dimension: an unbiased
                estimate of all terms but the prior; ``hybrid``: simple + 0.001 vlb, the latter training only
                the variance (Nichol & Dhariwal 2021, eq. 16).
            decoder: of t = 0 in the bound, as in :meth:`bits_per_dim`.
            seed, step, sample: address of t and noise, see :mod:`fastdiff.noise`.
        """
        choose("loss", kind, LOSSES)
        check_floating("x0", x0)
        check(len(x0) > 0 and bool(torch.isfinite(x0).all()), "x0 is empty or holds NaN or infinite values")
        if t is None:
            t = self.draw_timesteps(len(x0), seed=seed, step=step, sample=sample)
        alpha, sigma = self._levels(t, x0)
        if kind in ("vlb", "hybrid"):
            _check_decoder(decoder, x0[t.to(x0.device) == 0])
        x_t = ops.add_noise(x0, alpha, sigma, seed=seed, step=step, sample=sample)
        out = self._evaluate(model, x_t, t, cond)
        if kind == "vlb":
            return len(self.schedule) * self._vlb_terms(out, x0, x_t, t, decoder).mean()
        weight = self._weight(kind, t).to(x0.device)
        f, g = rows.target(self.prediction, alpha, sigma)
        scale = HYBRID_WEIGHT * len(self.schedule)
        learned = kind == "hybrid" and self.variance == "learned_range"
        bound = self._bound(t, x0, scale) if learned else None
        loss = ops.diffusion_loss(out, x0, f, g, weight, bound=bound, seed=seed, step=step, sample=sample).mean()
        if kind == "hybrid":
            # What the op does not know: the decoder, and a bound that trains nothing.
            rest = (t == 0).to(x0.device) if learned else torch.ones_like(t, dtype=torch.bool, device=x0.device)
            prediction, fractions = out[rest].tensor_split([x0.shape[1]], 1)
            decoded = torch.cat((prediction.detach(), fractions), 1)
            terms = self._vlb_terms(decoded, x0[rest], x_t[rest], t[rest.to(t.device)], decoder)
            loss = loss + scale * terms.sum() / len(x0)
        return loss

    def _bound(self, t: Tensor, x0: Tensor, scale: float) -> Tensor:
        """What the hybrid objective needs of each timestep: the bound in bits, ``scale`` times, nothing at t = 0."""
        alpha, sigma = self._levels(t, x0)
        p, q = _finite_x0(self.prediction, alpha, sigma)
        b = rows.posterior(*self._steps(t, x0))[1]
        weight = (t != 0).to(x0.device, torch.float64) * (scale / math.log(2))
        return torch.stack((alpha, sigma, p, q, b, *self._log_variances(t, x0), weight), 1)

    def draw_timesteps(
        self, count: int, *, seed: int, step: int, sample: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Uniform timesteps, int64 ``[count]``, the same for (seed, step, sample) wherever they are drawn."""
        words = noises.uniform_words(count, seed=seed, step=step, sample=sample, stream=noises.Stream.TIMESTEP)
        return words * len(self.schedule) >> 32

    def _weight(self, kind: str, t: Tensor) -> Tensor:
        """Weight of the squared error in the network's own output, float64 ``[N]``."""
        alpha, sigma = self.schedule.alpha[t.cpu()], self.schedule.sigma[t.cpu()]
        if kind in ("simple", "hybrid"):
            return torch.ones_like(alpha)
        snr = (alpha / sigma) ** 2
        if kind == "min_snr" and self.prediction == "epsilon":
            return (MIN_SNR_GAMMA / snr).clamp(max=1)  # min(SNR, gamma) / SNR, with its limit 1 at SNR = 0
        _, q = _finite_x0(self.prediction, alpha, sigma)
        if kind == "min_snr":
            return snr.clamp(max=MIN_SNR_GAMMA) * q**2
        previous = self.schedule.snr[(t.cpu() - 1).clamp(min=0)]
        return torch.where(t.cpu() == 0, snr, previous - snr) / 2 * q**2

    # ---- likelihood -------------------------------------------------------------------------

    @torch.no_grad()
    def bits_per_dim(
        self,
        model: Model,
        x0: Tensor,
        *,
        decoder: str = "discrete",
        clip: float | None = None,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        batch: int = 256,
        **cond: Any,
    ) -> Likelihood:
        """The variational bound on -log2 p(x0) per dimension, every term of it (Ho et al. 2020, eq. 5).

        Args:
            decoder: of t = 0. ``discrete``: x0 is 8-bit images scaled to [-1, 1], the Gaussian is integrated over
                each of the 256 bins (eq. 13); ``gaussian``: its density, for continuous data.
            clip: bound of the estimate of x0, None for no bound.
            seed, sample: address of the noise; timestep t of sample k sees noise (seed, k, t).
            batch: how many (sample, timestep) pairs go through the network at once.
            cond: tensors with one row per sample, or anything else passed on as it is.

        Returns:
            total ``[N]``, prior ``[N]``, terms ``[N, T]``; one noise draw per term.
        """
        check_floating("x0", x0)
        check(bool(torch.isfinite(x0).all()), "x0 holds NaN or infinite values")
        _check_decoder(decoder, x0)
        check_clip(clip)
        check(batch >= 1, f"batch must be at least 1, got {batch}")
        n, total = len(x0), len(self.schedule)
        seeds, ids = noises.sample_ids(n, seed, sample)
        terms = torch.empty(n * total, dtype=torch.float64)
        for pairs in torch.arange(n * total).split(batch):
            who, t = pairs // total, pairs % total
            here = who.to(x0.device)
            data, some = x0[here], {k: v[here] if _per_sample(v, n) else v for k, v in cond.items()}
            stream = noises.Stream.LIKELIHOOD
            noise = noises.normal(
                data.shape, seed=seeds[who], step=t, sample=ids[who], stream=stream, device=x0.device, dtype=x0.dtype
            )
            x_t = self.add_noise(data, noise, t)
            out = self._evaluate(model, x_t, t, some)
            terms[pairs] = self._vlb_terms(out, data, x_t, t, decoder, clip).double().cpu()
        terms = terms.reshape(n, total).to(x0.device)
        prior = self._prior_bits(x0).double()
        return Likelihood(prior + terms.sum(1), prior, terms)

    def _prior_bits(self, x0: Tensor) -> Tensor:
        """KL of q(x_T | x0) from what sampling starts with, mean bits per dimension ``[N]``."""
        alpha, sigma = self.schedule.alpha[-1], self.schedule.sigma[-1]
        std = torch.ones_like(sigma) if self.schedule.variance_preserving else sigma
        return _bits(
            _gaussian_kl(alpha.to(x0) * x0, 2 * sigma.log().to(x0), torch.zeros_like(x0), 2 * std.log().to(x0))
        )

    def _vlb_terms(
        self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, decoder: str, clip: float | None = None
    ) -> Tensor:
        """The term of the bound at each sample's t, bits per dimension ``[N]``."""
        prediction, f = self._split(out, x0.shape[1])
        wide = torch.promote_types(x0.dtype, torch.float32)
        x0, x_t = x0.to(wide), x_t.to(wide)
        estimate = self.predict_x0(prediction.to(wide), x_t, t)
        if clip is not None:
            estimate = estimate.clamp(-clip, clip)
        a, b, _ = (_spread(c, x0) for c in rows.posterior(*self._steps(t, x0)))
        small, large = (_spread(v, x0) for v in self._log_variances(t, x0))
        fixed = small if self.variance == "fixed_small" else large
        log_variance = fixed if f is None else (f.to(wide) * large + (1 - f.to(wide)) * small)
        mean, true_mean = a * x_t + b * estimate, a * x_t + b * x0
        kl = _gaussian_kl(true_mean, small, mean, log_variance)
        nll = _discrete_nll(x0, mean, log_variance) if decoder == "discrete" else _gaussian_nll(x0, mean, log_variance)
        return _bits(torch.where(_spread(t.to(x0.device) == 0, x0), nll, kl))

    # ---- tables -----------------------------------------------------------------------------

    def _levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma at t, float64 on x's device."""
        self._check_t(t, x)
        at = t.cpu()
        return self.schedule.alpha[at].to(x.device), self.schedule.sigma[at].to(x.device)

    def _steps(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma at t and at t-1 (clean for t = 0), float64 on x's device."""
        alpha, sigma = self._levels(t, x)
        before = (t - 1).clamp(min=0).to(x.device)
        alpha_next, sigma_next = self._levels(before, x)
        clean = t.to(x.device) == 0
        return alpha, sigma, torch.where(clean, 1.0, alpha_next), torch.where(clean, 0.0, sigma_next)

    def _log_variances(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """log of the posterior variance and of beta, ``[N]``; the former at t = 0 is that of t = 1.

        beta at t = 0 is its own, or the posterior variance of t = 1 for ``fixed_large``, whose decoder would
        be too wide otherwise (Ho et al. 2020, section 3.2).
        """
        last = min(1, len(self.schedule) - 1)
        steps = self._steps(t.clamp(min=last), x)
        small, large = rows.posterior(*steps)[2], rows.forward_variance(*self._steps(t, x))
        small = torch.where(small > 0, small, large)
        if self.variance == "fixed_large":
            large = torch.where(t.to(x.device) == 0, small, large)
        return small.log(), large.log()

    def _check_t(self, t: Tensor, x: Tensor) -> None:
        if not isinstance(t, Tensor):
            raise InputError(f"t must be an int64 tensor [N], got {type(t).__name__}")
        check(t.dtype == torch.int64, f"t must be int64, got {t.dtype}")
        check(t.shape == x.shape[:1], f"t must hold one timestep per sample ({len(x)}), got {list(t.shape)}")
        if t.numel():
            low, high = int(t.min()), int(t.max())
            check(
                low >= 0 and high < len(self.schedule),
                f"t must lie in 0...{len(self.schedule) - 1}, got {low} to {high}",
            )

    def _evaluate(self, model: Model, x_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        x_in, times = self.model_input(x_t, t)
        out = network_output(model(x_in, times, **cond))
        self.check_output(out, x_t)
        return out

    def _split(self, out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """The prediction, and f in [0, 1] of the learned variance where there is one."""
        if self.variance != "learned_range":
            return out, None
        wide = torch.promote_types(out.dtype, torch.float32)
        return out[:, :channels], (1 + out[:, channels:].to(wide)) / 2


def network_output(result: Any) -> Tensor:
    """The tensor a model returned, or that of an object with ``.sample``."""
    if isinstance(result, Tensor):
        return result
    sample = getattr(result, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise InputError(f"the model must return a tensor or an object with .sample, got {type(result).__name__}")


def _check_decoder(decoder: str, x0: Tensor) -> None:
    choose("decoder", decoder, ("discrete", "gaussian"))
    check(decoder == "gaussian" or not (x0.abs() > 1).any(), "the discrete decoder needs x0 in [-1, 1]")


def _finite_x0(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    p, q = rows.to_x0(prediction, alpha, sigma)
    singular = not bool(torch.isfinite(p).all() and torch.isfinite(q).all())
    check(not singular, "an epsilon prediction says nothing about x0 at zero terminal SNR: use v_prediction or sample")
    return p, q


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """``[N]`` as ``[N, 1, ...]`` in x's dtype (bool stays bool)."""
    value = value.reshape(-1, *(1,) * (x.ndim - 1)).to(x.device)
    return value if value.dtype == torch.bool else value.to(dtype=x.dtype)


def _per_sample(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) per element, nats."""
    difference = log_variance1 - log_variance2
    kl: Tensor = (difference.expm1() - difference + (mean1 - mean2).square() * (-log_variance2).exp()) / 2
    return kl


def _gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    nll: Tensor = (math.log(2 * math.pi) + log_variance + (x - mean).square() * (-log_variance).exp()) / 2
    return nll


def _discrete_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass on x's bin of width 2/255, the outer bins open (Ho et al. 2020, eq. 13), nats."""
    upper, lower = ((x - mean + side / 255) * (-log_variance / 2).exp() for side in (1, -1))
    upper, lower = torch.where(x > 0.999, torch.inf, upper), torch.where(x < -0.999, -torch.inf, lower)
    # On the right flank both cumulative values round to 1: take the mirrored interval there.
    mirrored = lower + upper > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    share_below = (log_lower - log_upper).clamp(max=-1e-7).exp()
    nll: Tensor = -log_upper - torch.log1p(-share_below)
    return nll
