"""A chain that keeps some timesteps of a schedule, by guided-diffusion's methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import noise as noises
from fastdiff import ops
from fastdiff._progress import progress as show
from fastdiff.adapters.guided_diffusion.estimate import CondFn, DenoisedFn, Estimate
from fastdiff.adapters.guided_diffusion.spacing import is_whole
from fastdiff.diffusion import Diffusion, Model, network_output, precision_of
from fastdiff.errors import check, choose
from fastdiff.likelihood import check_decoder
from fastdiff.losses import Tables, bound, visible
from fastdiff.ops.checks import check_floating
from fastdiff.sampler import Sampler
from fastdiff.schedule import Schedule

LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")
#: what the engine's own calls name, and so no condition may be called
RESERVED = frozenset(
    name for call in (Sampler.__call__, Diffusion.bits_per_dim) for name in signature(call).parameters if name != "cond"
) | {"t", "x_start"}


class SpacedDiffusion:
    """A chain that keeps some timesteps of a schedule, as guided-diffusion calls it.

    ``t`` is int64 ``[N]``, 0 ... num_timesteps - 1, and counts the kept timesteps. A model is called
    ``model(x, t, **model_kwargs)`` with the numbers that these have in the whole chain, int64, or times 1000 / T.

    Args:
        schedule: of the whole chain, variance-preserving.
        use_timesteps: what is kept, see :func:`space_timesteps`.
        prediction: ``epsilon`` or ``sample``.
        variance: ``fixed_small``, ``fixed_large`` or ``learned_range``.
        loss_type: of :meth:`training_losses`: ``mse`` | ``rescaled_mse`` | ``kl`` | ``rescaled_kl``.
        rescale_timesteps: whether the model is told t 1000 / T.

    Attributes:
        num_timesteps, original_num_steps: how many are kept, of how many.
        timestep_map: the kept ones, rising.
        alphas_cumprod, betas: of the kept ones, float64 numpy arrays.
        diffusion: the :class:`fastdiff.Diffusion` of the kept ones.

    Raises:
        InputError: unknown names, another process, timesteps outside of the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        use_timesteps: Iterable[int],
        *,
        prediction: str = "epsilon",
        variance: str = "fixed_large",
        loss_type: str = "mse",
        rescale_timesteps: bool = False,
    ) -> None:
        choose("prediction", prediction, ("epsilon", "sample"))
        choose("loss_type", loss_type, LOSSES)
        fits = isinstance(schedule, Schedule) and schedule.variance_preserving
        check(fits, f"schedule must be a variance-preserving Schedule, got {schedule!r}")
        self.loss_type, self.original_num_steps = loss_type, len(schedule)
        if rescale_timesteps and len(schedule) != 1000:
            schedule = replace(schedule, c_noise=schedule.c_noise.double() * (1000 / len(schedule)))
        kept = {*use_timesteps} if isinstance(use_timesteps, Iterable) else {None}
        check(all(map(is_whole, kept)), f"use_timesteps must be whole numbers, got {use_timesteps!r}")
        self._timesteps = schedule.timesteps(sorted(kept, reverse=True))
        self._whole = Diffusion(schedule, prediction, variance)
        spaced = schedule.spaced(self._timesteps)
        self.diffusion = Diffusion(spaced, prediction, variance)
        self.timestep_map: list[int] = self._timesteps.flip(0).tolist()
        self.num_timesteps = len(self.timestep_map)
        square = spaced.alpha**2
        self.alphas_cumprod = square.numpy()
        self.betas = (1 - square / torch.cat((square.new_ones(1), square[:-1]))).numpy()
        self._tables = Tables(spaced, prediction, variance)
        self._latest: tuple[Any, Sampler] | None = None

    # ---- sampling ---------------------------------------------------------------------------

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seed: noises.Seed | None = None,
    ) -> Tensor:
        """Ancestral samples ``[N, C, ...]`` (Ho et al. 2020, algorithm 2), float32, or float64 if ``noise`` is.

        Args:
            model: any callable; a network that has a form for inference is used in that.
            shape: ``[N, C, ...]``.
            noise: to start from, of this shape; left out, the seed's.
            clip_denoised: whether estimates of x0 are clamped to [-1, 1].
            denoised_fn: what estimates become before that.
            cond_fn: ``cond_fn(x, t, **model_kwargs)``, the gradient of log p(y | x) by x, which moves the mean by the
                variance times it (Dhariwal & Nichol 2021, algorithm 1), at the last step too.
            model_kwargs: for model and cond_fn; tensors have one row per sample.
            device: left out, the model's parameters', or the noise's.
            progress: show a progress bar on standard error.
            seed: of all noise, one or one per sample: ``fd.noise.normal`` says which. Left out, it is drawn.

        With ``denoised_fn`` or ``cond_fn`` rows are not captured as CUDA graphs, and run one by one.

        Raises:
            InputError: before the model runs, for what does not fit.
        """
        run = self._run("ddpm", model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, seed)
        return run.last(progress)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seed: noises.Seed | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Each step of :meth:`p_sample_loop`: ``sample`` and ``pred_xstart``, which cond_fn does not change."""
        run = self._run("ddpm", model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, seed)
        return run.each(progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seed: noises.Seed | None = None,
    ) -> Tensor:
        """DDIM samples (Song et al. 2021, eq. 12), ``eta`` in [0, 1]; the rest as in :meth:`p_sample_loop`.

        The gradient of ``cond_fn`` moves the score (Dhariwal & Nichol 2021, algorithm 2), of x0's estimate as it is
        after clamping, which is not clamped again.
        """
        given = noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, seed
        return self._run("ddim", model, shape, *given, eta=eta).last(progress)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seed: noises.Seed | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Each step of :meth:`ddim_sample_loop`: ``sample`` and ``pred_xstart``, to which the score was moved."""
        given = noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, seed
        return self._run("ddim", model, shape, *given, eta=eta).each(progress)

    def ddim_reverse_sample_loop(
        self,
        model: Model,
        x: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The noise that ``ddim_sample_loop(eta=0)`` makes images ``x`` of (Song et al. 2021, section 4.3).

        From the clean end to the last kept timestep; their single step takes x for noised to timestep 0 already.
        """
        check_floating("x", x)
        given = x, clip_denoised, denoised_fn, None, model_kwargs, device, 0
        return self._run("ddim_inverse", model, x.shape, *given).last(progress)

    def _run(
        self,
        solver: str,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        clip_denoised: bool,
        denoised_fn: DenoisedFn | None,
        cond_fn: CondFn | None,
        model_kwargs: Mapping[str, Any] | None,
        device: torch.device | str | None,
        seed: noises.Seed | None,
        **options: Any,
    ) -> _Run:
        cond = _conditions(model_kwargs)
        if noise is not None:
            check_floating("noise", noise)
            fits = isinstance(shape, Sequence) and noise.shape == tuple(shape)
            check(fits, f"noise must have shape {shape}, got {tuple(noise.shape)}")
        wide = noise is not None and noise.dtype == torch.float64
        clip = 1.0 if clip_denoised else None
        settings: dict[str, Any] = {
            "solver": solver,
            "clip": clip,
            "dtype": torch.float64 if wide else torch.float32,
            "device": _device(model, device, noise),
            **options,
        }
        given = {"seed": _seed(seed), "x": noise, **cond}
        if denoised_fn is None and cond_fn is None:
            return _Run(self._sampler(model, settings), shape, given)
        estimate = Estimate(model, self.diffusion, clip, denoised_fn, cond_fn, moves_mean=solver == "ddpm")
        settings |= {"clip": None, "graph": False}
        sampler = Sampler(estimate, replace(self._whole, prediction="sample"), steps=self._timesteps, **settings)
        return _Run(sampler, shape, given, estimate)

    def _sampler(self, model: Model, settings: dict[str, Any]) -> Sampler:
        """The latest one again where it fits: it holds the network's form for inference and its CUDA graphs."""
        latest, key = self._latest, (precision_of(model), settings)
        if latest is None or latest[0] != key or latest[1].model is not model:
            self._latest = latest = key, Sampler(model, self._whole, steps=self._timesteps, **settings)
        return latest[1]

    # ---- the process ------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t of ``x_start``, ``noise`` and ``t`` (Ho et al. 2020, eq. 4), in x_start's shape and dtype."""
        check_floating("x_start", x_start)
        return self.diffusion.add_noise(x_start, torch.randn_like(x_start) if noise is None else noise, t)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7), each of x_start's shape.

        The variance at t = 0 is 0, its logarithm that of t = 1.
        """
        mean, variance, log_variance = self.diffusion.posterior(x_start, x_t, t)
        return mean, variance.expand_as(mean), log_variance.expand_as(mean)

    # ---- losses and likelihood --------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of each sample, ``[N]``, with the gradient of ``loss``.

        ``loss`` is, by the ``loss_type``, ``mse``, to which learned variances add ``vb``, the term of the bound at t in
        bits per dimension, whose gradient goes to the variances alone (Nichol & Dhariwal 2021, eq. 16), times
        num_timesteps / 1000 for ``rescaled_mse``; or that term alone, times num_timesteps for ``rescaled_kl``.

        Args:
            x_start: ``[N, C, ...]``, in [-1, 1] where t = 0 has its term of the bound.
            t: int64 ``[N]``.
            noise: of x_start's shape.
        """
        check_floating("x_start", x_start)
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        out = network_output(model(*self.diffusion.model_input(x_t, t), **_mapping(model_kwargs)))
        self.diffusion.check_output(out, x_t)
        t = t.to(x_t.device)
        if self.loss_type in ("kl", "rescaled_kl"):
            scale = self.num_timesteps if self.loss_type == "rescaled_kl" else 1.0
            return {"loss": scale * self._bound(out, x_start, x_t, t)}
        _, _, f, g, weight = self._tables("simple", t)
        mse = ops.diffusion_loss(out, x_start, f, g, weight, noise)
        if self.diffusion.variance != "learned_range":
            return {"loss": mse, "mse": mse}
        prediction, fractions = out.chunk(2, 1)
        scale = self.num_timesteps / 1000 if self.loss_type == "rescaled_mse" else 1.0
        vb = scale * self._bound(torch.cat((prediction.detach(), fractions), 1), x_start, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _bound(self, out: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound at t, bits per dimension ``[N]``."""
        if visible(x_start):
            check_decoder("discrete", x_start[t == 0])
        return bound(out, x_start, x_t, self._tables("letters", t)[:-1].T, t == 0, "discrete")

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        seed: noises.Seed | None = None,
    ) -> dict[str, Tensor]:
        """The variational bound on -log2 p(x_start) per dimension (Ho et al. 2020, eq. 5), all terms, float64.

        Returns:
            ``total_bpd`` ``[N]``, the sum of ``prior_bpd`` ``[N]`` and of ``vb`` ``[N, T]`` over T = num_timesteps; and
            by timestep the mean squared errors of x0 and of the noise, ``xstart_mse`` and ``mse`` ``[N, T]``. Columns
            are in the order of sampling: the first is t = T - 1, the last t = 0.

        Raises:
            InputError: x_start that is empty, not finite or outside of [-1, 1].
        """
        check_floating("x_start", x_start)
        check(len(x_start) > 0, "x_start is empty")
        estimate, errors = Estimate(model, self.diffusion, 1.0 if clip_denoised else None), []

        def noted(x: Tensor, t: Tensor, x_start: Tensor, **cond: Any) -> Tensor:
            out = estimate(x, t, **cond)
            errors.append((estimate.x0 - x_start).double().square().flatten(1).mean(1))
            return out

        cond = _conditions(model_kwargs)
        process = replace(self.diffusion, prediction="sample")
        total, prior, terms = process.bits_per_dim(noted, x_start, seed=_seed(seed), x_start=x_start, **cond)
        xstart_mse = torch.cat(errors).reshape(self.num_timesteps, -1).T
        mse = process.schedule.snr.to(x_start.device) * xstart_mse  # both estimates are of one x_t
        by_time = {"vb": terms, "xstart_mse": xstart_mse, "mse": mse}
        return {"total_bpd": total, "prior_bpd": prior, **{name: value.flip(1) for name, value in by_time.items()}}


@dataclass(frozen=True)
class _Run:
    """A sampler and what it is to be called with."""

    sampler: Sampler
    shape: Sequence[int]
    given: dict[str, Any]
    estimate: Estimate | None = None

    def last(self, progress: bool) -> Tensor:
        return self.sampler(self.shape, progress=progress, **self.given)

    def each(self, progress: bool) -> Iterator[dict[str, Tensor]]:
        states = self.sampler.iterate(self.shape, **self.given)
        shown = show(states, len(self.sampler.table), "sampling", enabled=progress)
        return ({"sample": s.x, "pred_xstart": s.x0 if self.estimate is None else self.estimate.x0} for s in shown)


def _seed(seed: noises.Seed | None) -> noises.Seed:
    return int(torch.randint(2**63 - 1, ())) if seed is None else seed


def _mapping(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    mapping = model_kwargs is None or isinstance(model_kwargs, Mapping)
    check(mapping, f"model_kwargs must be {{name: value}}, got {type(model_kwargs).__name__}")
    return dict(model_kwargs or {})


def _conditions(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What goes through the engine's own calls beside their arguments."""
    cond = _mapping(model_kwargs)
    taken = ", ".join(sorted(cond.keys() & RESERVED))
    check(not taken, f"model_kwargs cannot name {taken}, which the engine does: give it to the model by a partial")
    return cond


def _device(model: Model, device: torch.device | str | None, noise: Tensor | None) -> torch.device | str:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    known = (place.device for place in (parameter, noise) if place is not None)
    return device or next(known, torch.device("cpu"))
