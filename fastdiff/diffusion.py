"""The diffusion process of a schedule and a prediction type: forward noising, posterior, losses, likelihood."""

from __future__ import annotations

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
from fastdiff.losses import (
    HYBRID_WEIGHT,
    Tables,
    bound,
    brought,
    check_data,
    check_says_x0,
    decoder_of_variance,
    timestep_words,
    visible,
)
from fastdiff.losses import LOSSES as LOSSES
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_clip, check_floating, check_same, is_finite
from fastdiff.ops.step import VARIANCES
from fastdiff.schedule import Schedule

LEVELS = ("alpha", "sigma")
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
    Every method raises :class:`~fastdiff.errors.InputError` for what does not fit. :meth:`add_noise`,
    :meth:`draw_timesteps`, :meth:`loss` and :meth:`losses` do not wait for a GPU, and so do not look at values there.
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
        alpha, sigma = self.levels(t, x0)
        return ops.add_noise(x0, alpha, sigma, noise)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x0): mean (shape of x0), variance and log-variance ``[N, 1, ...]`` (Ho et al. 2020, eq. 7).

        The variance at t = 0 is 0; there the log-variance is that of t = 1, so that it stays finite.
        """
        check_floating("x0", x0)
        check_same("x_t", x_t, x0)
        t = self._checked(t, x0)
        a, b, variance = rows.posterior(*self._steps(t))
        log_variance = self._at("letters", t)[likelihood.LETTERS.index("lo")]
        mean = spread(a, x0) * x_t + spread(b, x0) * x0
        return mean, spread(variance, x0), spread(log_variance, x0)

    def levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, float64 ``[N]`` on x's device."""
        t = self._checked(t, x)
        return self._at("alpha", t), self._at("sigma", t)

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, to: str, *, source: str | None = None) -> Tensor:
        """Turn a prediction of type ``source`` (default: this diffusion's) into type ``to``.

        The map goes through x0: epsilon is ill-conditioned where alpha is small and a sample where sigma is.
        Where it does not exist (epsilon at zero signal) this raises.
        """
        check_floating("value", value)
        check_same("x_t", x_t, value)
        choose("prediction", to, rows.PREDICTIONS)
        alpha, sigma = self.levels(t, value)
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
        f, g = rows.target(self.prediction, *self.levels(t, x0))
        return spread(f, x0) * x0 + spread(g, x0) * noise

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: ``c_in x_t``, x_t itself where c_in is 1, and the time it understands, ``[N]``."""
        return self._input(x_t, self._checked(t, x_t))

    def _input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        times = self._at("c_noise", t)
        times = times.to(x_t.dtype) if times.is_floating_point() else times
        return spread(self._at("c_in", t), x_t) * x_t if self._scaled else x_t, times

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
        step: int | Tensor = 0,
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
        where: dict[str, Any] = {"seed": seed, "step": step, "sample": sample}
        return self.losses(model, x0, t, kind=kind, decoder=decoder, **where, **cond).mean()

    def losses(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor | None = None,
        *,
        kind: str = "simple",
        decoder: str = "discrete",
        seed: int = 0,
        step: int | Tensor = 0,
        sample: Sequence[int] | Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        """The loss of each sample, ``[N]``, float32 (float64 for float64), of which :meth:`loss` is the mean."""
        choose("loss", kind, LOSSES)
        check_floating("x0", x0)
        t = self._timesteps(x0, t, seed, step, sample)
        where: dict[str, Any] = {"seed": seed, "step": step, "sample": sample}
        alpha, sigma, f, g, weight = self._at(kind, t)
        if kind == "snr_sample":
            check_says_x0(weight)
        letters = self._letters(x0, t, decoder) if kind in ("vlb", "hybrid") else None
        x_t = ops.add_noise(x0, alpha, sigma, **where)
        # The bound asks for x_t again, and a network may write to what it is given.
        out = self._evaluate(model, x_t if letters is None else x_t.clone(), t, cond)
        if letters is None:
            return ops.diffusion_loss(out, x0, f, g, weight, **where)
        terms = out, x0, x_t, letters.T[:, :-1], t == 0, decoder
        if kind == "vlb":
            return len(self.schedule) * bound(*terms)
        learned = self.variance == "learned_range"
        loss = ops.diffusion_loss(out, x0, f, g, weight, bound=letters.T if learned else None, **where)
        # What the op does not know: the decoder, and a bound that trains nothing.
        rest = decoder_of_variance(*terms) if learned else bound(out.detach(), *terms[1:])
        return loss + HYBRID_WEIGHT * len(self.schedule) * rest

    def _timesteps(
        self, x0: Tensor, t: Tensor | None, seed: int, step: int | Tensor, sample: Sequence[int] | Tensor | None
    ) -> Tensor:
        """Timesteps of the data, beside them; raises for data that cannot be trained on."""
        check_data(x0)
        if t is None:
            return self.draw_timesteps(len(x0), seed=seed, step=step, sample=sample, device=x0.device)
        return self._checked(t, x0)

    def _letters(self, x0: Tensor, t: Tensor, decoder: str) -> Tensor:
        """What the bound needs of each timestep, ``[8, N]``."""
        choose("decoder", decoder, likelihood.DECODERS)
        if visible(x0):
            likelihood.check_decoder(decoder, x0[t == 0])
        letters = self._at("letters", t)
        check_says_x0(letters[2:4])
        return letters

    def draw_timesteps(
        self,
        count: int,
        *,
        seed: int,
        step: int | Tensor,
        sample: Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Uniform timesteps, int64 ``[count]``, the same for (seed, step, sample) wherever they are drawn."""
        words = timestep_words(count, seed=seed, step=step, sample=sample, device=device)
        return words * len(self.schedule) >> 32

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
                quarter of a million numbers (85 images of 3x32x32), on a CPU half of that, at most 4096.
            cond: tensors with one row per sample, or anything else passed on as it is.

        Returns:
            total ``[N]``, prior ``[N]``, terms ``[N, T]``; one noise draw per term. ``curve`` ``[T]`` is the mean of
            the terms.
        """
        check_floating("x0", x0)
        check(is_finite(x0), "x0 holds NaN or infinite values")
        likelihood.check_decoder(decoder, x0)
        check_clip(clip)
        table = likelihood.bound_table(self.schedule, self.prediction, self.variance)
        table = likelihood.letters_at(table, torch.arange(len(table)))
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
        check(is_finite(x0), "x0 holds NaN or infinite values")
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

    # ---- tables -----------------------------------------------------------------------------

    @cached_property
    def _at(self) -> Tables:
        return Tables(self.schedule, self.prediction, self.variance)

    @cached_property
    def _scaled(self) -> bool:
        return bool((self.schedule.c_in != 1).any())

    def _steps(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma at t and at t-1 (clean for t = 0), float64."""
        alpha, sigma, *following = (self._at(name, at) for at in (t, (t - 1).clamp(min=0)) for name in LEVELS)
        alpha_next, sigma_next = (v.masked_fill(t == 0, clean) for v, clean in zip(following, (1.0, 0.0), strict=True))
        return alpha, sigma, alpha_next, sigma_next

    def _checked(self, t: Tensor, x: Tensor) -> Tensor:
        """t on x's device."""
        if not isinstance(t, Tensor):
            raise InputError(f"t must be an int64 tensor [N], got {type(t).__name__}")
        if t.dtype != torch.int64:
            raise InputError(f"t must be int64, got {t.dtype}")
        if t.shape != x.shape[:1]:
            raise InputError(f"t must hold one timestep per sample ({len(x)}), got {list(t.shape)}")
        if visible(t) and t.numel():
            low, high = map(int, t.aminmax())
            if low < 0 or high >= len(self.schedule):
                raise InputError(f"t must lie in 0...{len(self.schedule) - 1}, got {low} to {high}")
        return brought(t, x.device)

    def _evaluate(self, model: Model, x_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        x_in, times = self._input(x_t, t)
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
