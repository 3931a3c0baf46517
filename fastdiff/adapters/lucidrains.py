"""The interface of lucidrains' denoising-diffusion-pytorch over our engine, and its checkpoints.

A script of theirs changes one import::

    from fastdiff.adapters.lucidrains import GaussianDiffusion

Training is the fused forward process and loss, sampling the rows of :class:`fastdiff.Sampler`. Noise belongs to a seed;
where none is given it is drawn from torch's generator of the CPU, so that ``torch.manual_seed`` decides it. Samples
start from ``torch.randn`` as theirs do: the same seed gives the same images by DDIM with ``ddim_sampling_eta`` 0.

What is refused, by name: self-conditioning, offset noise, immiscible pairing, learned variances.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import noise as noises
from fastdiff import ops
from fastdiff.diffusion import Diffusion, network_output
from fastdiff.errors import InputError, check, choose
from fastdiff.models.weights import as_path, state_dict
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_floating
from fastdiff.sampler import Recorder, Sampler
from fastdiff.schedule import MAX_BETA, Schedule

# ---- schedules ------------------------------------------------------------------------------


def linear_schedule(timesteps: int) -> Schedule:
    """Betas linear from 0.1 / T to 20 / T: those of Ho et al. 2020 at T = 1000. T is more than 20."""
    valid = isinstance(timesteps, int) and timesteps > 20
    check(valid, f"timesteps must be a whole number above 20 (the last beta is 20 / T), got {timesteps!r}")
    return Schedule.linear(timesteps, beta_start=0.1 / timesteps, beta_end=20 / timesteps)


def cosine_schedule(timesteps: int, s: float = 0.008) -> Schedule:
    """alpha-bar = cos²((t/T + s)/(1 + s) π/2), betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    return Schedule.cosine(timesteps, s=s)


def sigmoid_schedule(timesteps: int, start: float = -3, end: float = 3, tau: float = 1.0) -> Schedule:
    """alpha-bar falls from 1 to 0 along a sigmoid of t/T between ``start`` and ``end`` at temperature ``tau``
    (Jabri et al. 2022, algorithm 4), betas at most 0.999. :meth:`fastdiff.Schedule.sigmoid` has betas along one."""
    check(isinstance(timesteps, int) and timesteps >= 1, f"timesteps must be a whole number, got {timesteps!r}")
    check(start < end and tau > 0, f"start < end and tau > 0 must hold, got {start}, {end}, {tau}")
    curve = torch.sigmoid(torch.linspace(start / tau, end / tau, timesteps + 1, dtype=torch.float64))
    alpha_bar = (curve[-1] - curve) / (curve[-1] - curve[0])
    return Schedule.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA))


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule, "sigmoid": sigmoid_schedule}
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}

# ---- the process ----------------------------------------------------------------------------


class GaussianDiffusion(nn.Module):
    """lucidrains' class of that name: ``diffusion(images)`` is the loss, ``diffusion.sample(n)`` gives images.

    Args:
        model: ``model(x, t)``, t int64 ``[N]``, with attributes ``channels``, ``out_dim`` (the same number) and
            ``self_condition`` (False).
        image_size: of a square, or height and width.
        timesteps: T.
        sampling_timesteps: fewer than T for sampling by DDIM; T, or left out, for the whole chain of DDPM.
        objective: what the model gives, ``pred_noise`` | ``pred_x0`` | ``pred_v``.
        beta_schedule: ``linear`` | ``cosine`` | ``sigmoid``, in float64.
        schedule_fn_kwargs: of :func:`cosine_schedule` and :func:`sigmoid_schedule`.
        ddim_sampling_eta: 0 ... 1, the noise of DDIM (Song et al. 2021, eq. 16).
        auto_normalize: whether images lie in [0, 1], and not in [-1, 1].
        min_snr_loss_weight, min_snr_gamma: whether the SNR in the weight of the loss is clamped to gamma (Hang et al.
            2023).

    Attributes:
        diffusion: the :class:`fastdiff.Diffusion`, for everything else of ours.

    Raises:
        InputError: what is refused or cannot be, by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: Mapping[str, Any] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
    ) -> None:
        super().__init__()
        _check_model(model)
        choose("objective", objective, OBJECTIVES)
        _refuse_offset(offset_noise_strength)
        check(not immiscible, "immiscible pairing of noise and images is not supported: leave immiscible out")
        check(min_snr_gamma > 0, f"min_snr_gamma must be positive, got {min_snr_gamma}")
        check(0 <= ddim_sampling_eta <= 1, f"ddim_sampling_eta must lie in [0, 1], got {ddim_sampling_eta}")
        schedule = _schedule(beta_schedule, timesteps, schedule_fn_kwargs or {})
        self.model, self.channels, self.self_condition = model, int(model.channels), False  # type: ignore[arg-type]
        self.image_size, self.objective = _image_size(image_size), objective
        self.diffusion = Diffusion(schedule, OBJECTIVES[objective])
        self.num_timesteps = timesteps
        self.sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        valid = isinstance(self.sampling_timesteps, int) and 1 <= self.sampling_timesteps <= timesteps
        check(valid, f"sampling_timesteps must lie in 1...{timesteps}, got {sampling_timesteps!r}")
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.ddim_sampling_eta, self.auto_normalize = ddim_sampling_eta, auto_normalize
        self.max_snr = min_snr_gamma if min_snr_loss_weight else None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def normalize(self, images: Tensor) -> Tensor:
        """[0, 1] to [-1, 1], with ``auto_normalize``."""
        return 2 * images - 1 if self.auto_normalize else images

    def unnormalize(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return (x + 1) / 2 if self.auto_normalize else x

    # ---- training ---------------------------------------------------------------------------

    def forward(self, img: Tensor, *args: Any, times: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The loss of images ``[N, channels, height, width]``, at ``times`` int64 ``[N]`` or uniformly drawn ones.

        The other arguments are those of :meth:`p_losses`.
        """
        check_floating("img", img)
        shape = (self.channels, *self.image_size)
        check(img.shape[1:] == shape, f"img must be [N, {', '.join(map(str, shape))}], got {list(img.shape)}")
        if times is None:
            times = self.diffusion.draw_timesteps(len(img), seed=_drawn_seed(), step=0, device=img.device)
        return self.p_losses(self.normalize(img), times, *args, **kwargs)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Weighted mean squared error of what the model gives of x_t (Ho et al. 2020, eq. 14).

        The weight is 1 for noise, the SNR for x0 and SNR / (SNR + 1) for v, which is one and the same error of x0 times
        the SNR; with ``min_snr_loss_weight``, all of them times min(SNR, gamma) / SNR.

        Args:
            x_start: ``[N, C, ...]``, normalized.
            t: int64 ``[N]``.
            noise: like ``x_start``; left out, it is drawn, and never stored.
            loss_reduction: ``mean`` for a scalar, ``none`` for the loss of each sample ``[N]``.
        """
        _refuse_offset(offset_noise_strength)
        choose("loss_reduction", loss_reduction, ("mean", "none"))
        alpha, sigma = self.diffusion.levels(t, x_start)
        source: dict[str, Any] = {"seed": _drawn_seed()} if noise is None else {"noise": noise}
        x_t = ops.add_noise(x_start, alpha, sigma, **source)
        out = network_output(self.model(x_t, t.to(x_t.device)))
        self.diffusion.check_output(out, x_t)
        f, g = rows.target(self.diffusion.prediction, alpha, sigma)
        losses = ops.diffusion_loss(out, x_start, f, g, self._weight((alpha / sigma) ** 2), **source)
        return losses if loss_reduction == "none" else losses.mean()

    def _weight(self, snr: Tensor) -> Tensor:
        weight = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}[self.objective]
        return weight if self.max_snr is None else weight * (self.max_snr / snr).clamp(max=1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t ``[N, C, ...]`` of normalized images at t int64 ``[N]`` (Ho et al. 2020, eq. 4)."""
        return self.diffusion.add_noise(x_start, torch.randn_like(x_start) if noise is None else noise, t)

    # ---- sampling ---------------------------------------------------------------------------

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False, *, seed: int | None = None) -> Tensor:
        """Images ``[batch_size, channels, height, width]``; by DDIM where ``sampling_timesteps`` are fewer than T.

        The estimate of x0 is clamped to [-1, 1] in every step. The model is used as it is: call ``eval`` first.

        Args:
            return_all_timesteps: all states, ``[batch_size, steps + 1, channels, height, width]`` from the noise on.
            seed: of all noise, sample k of which is the same in any batch; left out, torch's generators decide it.
        """
        way = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return way((batch_size, self.channels, *self.image_size), return_all_timesteps, seed=seed)

    def p_sample_loop(
        self, shape: Sequence[int], return_all_timesteps: bool = False, *, seed: int | None = None
    ) -> Tensor:
        """The whole chain with the posterior's variance (Ho et al. 2020, algorithm 2); arguments of :meth:`sample`."""
        sampler = Sampler(self.model, self.diffusion, "ddpm", self.num_timesteps, clip=1.0)
        return self._run(sampler, shape, return_all_timesteps, seed)

    def ddim_sample(
        self, shape: Sequence[int], return_all_timesteps: bool = False, *, seed: int | None = None
    ) -> Tensor:
        """``sampling_timesteps`` steps of DDIM (Song et al. 2021, eq. 12); arguments as of :meth:`sample`."""
        # Their float32 numbers, rounded down: where an exact one is whole, they may lie one below it.
        levels = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1, dtype=torch.float32)
        steps = levels.int()[1:].flip(0)
        sampler = Sampler(self.model, self.diffusion, "ddim", steps, clip=1.0, eta=self.ddim_sampling_eta)
        return self._run(sampler, shape, return_all_timesteps, seed)

    def _run(self, sampler: Sampler, shape: Sequence[int], return_all_timesteps: bool, seed: int | None) -> Tensor:
        if seed is None:
            x = torch.randn(tuple(shape), device=self.device)
        else:
            x = noises.normal(shape, seed=seed, stream=noises.Stream.INITIAL, device=self.device)
        record = Recorder() if return_all_timesteps else None
        result = sampler(shape, x=x, seed=_drawn_seed() if seed is None else seed, record=record)
        if record is not None:
            result = torch.cat((x[None], record.values)).transpose(0, 1)
        return self.unnormalize(result)


def _drawn_seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


def _schedule(name: str, timesteps: int, options: Mapping[str, Any]) -> Schedule:
    choose("beta_schedule", name, SCHEDULES)
    try:
        schedule: Schedule = SCHEDULES[name](timesteps, **options)
    except TypeError as error:
        raise InputError(f"schedule_fn_kwargs: {error}") from None
    return schedule


def _check_model(model: object) -> None:
    check(isinstance(model, nn.Module), f"model must be a module, got {type(model).__name__}")
    lacking = [name for name in ("channels", "out_dim", "self_condition") if not hasattr(model, name)]
    check(not lacking, f"the model must have the attributes channels, out_dim, self_condition: no {', '.join(lacking)}")
    channels, out_dim = (getattr(model, name) for name in ("channels", "out_dim"))
    check(channels == out_dim, f"channels and out_dim must be equal (no learned variance), got {channels}, {out_dim}")
    refused = getattr(model, "self_condition", False)
    check(not refused, "self-conditioning is not supported: the model's self_condition must be False")


def _refuse_offset(strength: float | None) -> None:
    check(not strength, f"offset noise is not supported: offset_noise_strength must be 0, got {strength}")


def _image_size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    valid = len(sides) == 2 and all(isinstance(side, int) and side >= 1 for side in sides)
    check(valid, f"image_size must be a whole number, or height and width, got {size!r}")
    return sides[0], sides[1]


# ---- checkpoints ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Their trainer's file: the step, and the network's weights by its own names, as trained and averaged."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    version: str | None = None


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read what their ``Trainer.save`` wrote, ``model-{milestone}.pt``; no code in it is run.

    ``network.load_state_dict(read_checkpoint(path).ema)`` loads the averaged weights, on the CPU.

    Raises:
        InputError: no such file, damaged, or anything else than such a checkpoint.
    """
    path = as_path(path)
    check(path.is_file(), f"{path} does not exist")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in its reader
        lines = [] if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()  # which advises to run it
        reason = f": {lines[0]}" if lines else ""
        raise InputError(f"{path} cannot be read as a checkpoint (code in pickles is never run){reason}") from None
    lacking = [key for key in ("step", "model", "ema") if not isinstance(found, Mapping) or key not in found]
    check(not lacking, f"{path} is no checkpoint of denoising-diffusion-pytorch: it has no {', '.join(lacking)}")
    step, version = found["step"], found.get("version")
    check(isinstance(step, int), f"{path}: step must be a whole number, got {type(step).__name__}")
    model = _below("model.", found["model"], f"{path}: model")
    ema = _below("ema_model.model.", found["ema"], f"{path}: ema")
    return Checkpoint(step, model, ema, None if version is None else str(version))


def _below(prefix: str, state: object, what: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it: the rest are tables of the process and counters."""
    tensors = state_dict(state, what)
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    check(found, f"{what} holds no tensor whose name begins with {prefix}")
    return found
