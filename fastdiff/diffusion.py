"""The diffusion process of a schedule and a prediction type: forward noising, posterior, losses, likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdiff import likelihood, ops
from fastdiff import noise as noises
from fastdiff.errors import InputError, check, choose
from fastdiff.likelihood import Likelihood, LogLikelihood, finite_x0, spread
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_clip, check_floating, check_same
from fastdiff.ops.step import VARIANCES
from fastdiff.schedule import Schedule

LOSSES = ("simple", "vlb", "hybrid", "min_snr", "snr_sample")
HYBRID_WEIGHT = 1e-3  # lambda of Nichol & Dhariwal 2021, eq. 16
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4
Model = Callable[..., Any]


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
        log_variance = self._table[t.cpu(), likelihood.LETTERS.index("lo")]
        mean = spread(a, x0) * x_t + spread(b, x0) * x0
        return mean, spread(variance, x0), spread(log_variance, x0)

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, to: str, *, source: str | None = None) -> Tensor:
        """Turn a prediction of type ``source`` (default: this diffusion's) into type ``to``.

        The map goes through x0: epsilon is ill-conditioned where alpha is small and a sample where sigma is.
        Where it does not exist (epsilon at zero signal) this raises.
        """
        check_floating("value", value)
        check_same("x_t", x_t, value)
        choose("prediction", to, rows.PREDICTIONS)
        alpha, sigma = self._levels(t, value)
        p, q = (spread(c, value) for c in finite_x0(source or self.prediction, alpha, sigma))
        f, g = (spread(c, value) for c in rows.target(to, alpha, sigma))
        x0 = p * x_t + q * value
        return f * x0 + g * ((x_t - spread(alpha, value) * x0) / spread(sigma, value))

    def predict_x0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that a network output stands for."""
        return self.convert(out, x_t, t, "sample")

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should give for x_t made of ``x0`` and ``noise``."""
        check_floating("x0", x0)
        check_same("noise", noise, x0)
        f, g = rows.target(self.prediction, *self._levels(t, x0))
        return spread(f, x0) * x0 + spread(g, x0) * noise

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: ``c_in x_t`` and the time it understands, ``[N]``."""
        self._check_t(t, x_t)
        times = self.schedule.c_noise[t.cpu()].to(x_t.device)
        return spread(self.schedule.c_in[t.cpu()], x_t) * x_t, times.to(
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
            likelihood.check_decoder(decoder, x0[t.to(x0.device) == 0])
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
        weight = (t.cpu() != 0).double() * (scale / math.log(2))
        return torch.cat((likelihood.letters_at(self._table, t), weight[:, None]), 1).to(x0.device)

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
        _, q = finite_x0(self.prediction, alpha, sigma)
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
        batch: int | None = None,
        **cond: Any,
    ) -> Likelihood:
        """The variational bound on -log2 p(x0) per dimension, every term of it (Ho et al. 2020, eq. 5).

        Args:
            model: as of :class:`fastdiff.Sampler`; a network that has a form for inference is used in that.
            decoder: of t = 0. ``discrete``: x0 is 8-bit images scaled to [-1, 1], the Gaussian is integrated over
                each of the 256 bins (eq. 13); ``gaussian``: its density, for continuous data.
            clip: bound of the estimate of x0, None for no bound.
            seed, sample: address of the noise; timestep t of sample k sees noise (seed, k, t).
            batch: how many (sample, timestep) pairs go through the network at once; default, as many as hold a
                quarter of a million numbers (85 images of 3x32x32), at most 4096.
            cond: tensors with one row per sample, or anything else passed on as it is.

        Returns:
            total ``[N]``, prior ``[N]``, terms ``[N, T]``; one noise draw per term. ``curve`` ``[T]`` is the mean of
            the terms.
        """
        check_floating("x0", x0)
        check(bool(torch.isfinite(x0).all()), "x0 holds NaN or infinite values")
        likelihood.check_decoder(decoder, x0)
        check_clip(clip)
        table = likelihood.letters_at(self._table, torch.arange(len(self.schedule)))
        how: dict[str, Any] = {"decoder": decoder, "clip": clip, "seed": seed, "sample": sample, "batch": batch}
        return likelihood.variational_bound(self._inference(model), x0, self.schedule, table, cond=cond, **how)

    def log_likelihood(
        self,
        model: Model,
        x0: Tensor,
        *,
        steps: int = 256,
        solver: str = "heun",
        divergence: str = "hutchinson",
        probes: int = 1,
        noise: str = "rademacher",
        dequantize: bool = False,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        batch: int | None = None,
        **cond: Any,
    ) -> LogLikelihood:
        """The likelihood of x0 by the change of variables along the probability-flow ODE (Song et al. 2021, eq. 39).

        What has this density is a sample with the little noise of timestep 0, x0 + (sigma / alpha) noise: where data
        are finer than that, let the schedule begin with less. The network is asked two or four times a step, between
        the timesteps too, and its derivative by x each time: it has to have one.

        Args:
            model: as of :class:`fastdiff.Sampler`.
            x0: ``[N, C, ...]``.
            steps: of the solver, from timestep 0 to the last (of a discrete schedule with zero terminal SNR, the last
                but one); graded towards the data.
            solver: ``heun``, of second order, or ``rk4``, of fourth order with twice the questions a step.
            divergence: ``exact``: as many derivatives as dimensions; ``hutchinson``: an unbiased estimate by ``probes``
                of them (FFJORD, Grathwohl et al. 2019), drawn anew each time.
            noise: the probes', ``rademacher`` (signs, of less variance) or ``gaussian``.
            dequantize: x0 is 8-bit images scaled to [-1, 1]. Uniform noise fills their bins of width 2/255, and the
                density becomes a bound of the bytes' probability (Theis et al. 2016, section 3.1): log2(127.5) = 6.99
                bits per dimension more, to be compared with the discrete :meth:`bits_per_dim`. (Song et al. have bins
                of 1/128 and 7 bits.)
            seed, sample: address of probes and uniform noise.
            batch: how many samples go through the network at once; default as of :meth:`bits_per_dim`.
            cond: tensors with one row per sample, or anything else passed on as it is.

        Returns:
            total ``[N]`` and its part prior ``[N]``, bits per dimension; nats ``[N]``, ln p(x0), float64.
        """
        check_floating("x0", x0)
        check(bool(torch.isfinite(x0).all()), "x0 holds NaN or infinite values")
        choose("solver", solver, likelihood.SOLVERS)
        choose("divergence", divergence, likelihood.DIVERGENCES)
        choose("noise", noise, likelihood.NOISES)
        for name, value in (("steps", steps), ("probes", probes)):
            check(isinstance(value, int) and value >= 1, f"{name} must be a whole number of at least 1, got {value!r}")
        check(not dequantize or not (x0.abs() > 1).any(), "dequantize needs x0 in [-1, 1]")
        flow = likelihood.ProbabilityFlow.of(self.schedule, self.prediction, steps, solver)
        how: dict[str, Any] = {"divergence": divergence, "probes": probes, "noise": noise, "dequantize": dequantize}
        where: dict[str, Any] = {"seed": seed, "sample": sample, "batch": batch, "cond": cond}
        return likelihood.log_likelihood(self._inference(model), x0, flow, solver=solver, **how, **where)

    def _inference(self, model: Model) -> likelihood.Network:
        """The model in its form for inference; it gets its input in its own precision, times in at least 32 bits."""
        check(callable(model), f"model must be callable, got {type(model).__name__}")
        network, own = inference_form(model), precision_of(model)

        def ask(x_in: Tensor, times: Tensor, cond: dict[str, Any]) -> Tensor:
            x_in = x_in.to(own or x_in.dtype)
            if times.is_floating_point():
                times = times.to(torch.promote_types(x_in.dtype, torch.float32))
            out = network_output(network(x_in, times, **cond))
            self.check_output(out, x_in)
            return out

        return ask

    def _vlb_terms(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, decoder: str) -> Tensor:
        """The term of the bound at each sample's t, bits per dimension ``[N]``."""
        letters, first = (v.to(x0.device) for v in (likelihood.letters_at(self._table, t), t == 0))
        return likelihood.bound_terms(out, x0, x_t, letters, first, decoder)

    # ---- tables -----------------------------------------------------------------------------

    @cached_property
    def _table(self) -> Tensor:
        return likelihood.bound_table(self.schedule, self.prediction, self.variance)

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


def inference_form(model: Model) -> Model:
    """The form for inference that a model has, see :meth:`fastdiff.UNet.prepared`, or itself."""
    prepared = getattr(type(model), "prepared", None)  # of the model itself, not of what a wrapper passes on
    return cast(Model, prepared(model)) if prepared else model


def precision_of(model: Model) -> torch.dtype | None:
    """The dtype of a network's parameters, None for what has none."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return parameter.dtype if parameter is not None and parameter.is_floating_point() else None


def network_output(result: Any) -> Tensor:
    """The tensor a model returned, or that of an object with ``.sample``."""
    if isinstance(result, Tensor):
        return result
    sample = getattr(result, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise InputError(f"the model must return a tensor or an object with .sample, got {type(result).__name__}")
