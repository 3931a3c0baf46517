"""Noise levels of a run, and the schedule and the diffusion on which a denoiser is a network of ours."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError, check
from fastdiff.schedule import Levels, Schedule, karras_levels


class SigmaSchedule(Schedule):
    """Levels of data plus noise (alpha is 1) that the network is told as they are."""

    @property
    def variance_preserving(self) -> bool:
        return False

    def at(self, t: Tensor) -> Levels:
        levels = super().at(t)
        return replace(levels, c_noise=levels.sigma)


def sigma_schedule(sigmas: Tensor) -> SigmaSchedule:
    """The schedule of ``sigmas``, float ``[n]`` or ``[n + 1]`` with a 0 at the end, strictly descending.

    Raises:
        InputError: sigmas that do not descend, a first one of 0.
    """
    levels = checked(sigmas, least=1)
    sigma = levels[levels > 0].flip(0)
    ones = torch.ones_like(sigma)
    return SigmaSchedule(ones, sigma, ones, sigma, {"name": "sigmas", "n": len(sigma)})


def sigma_diffusion(sigmas: Tensor) -> Diffusion:
    """The diffusion on which a denoiser is a network for :class:`fastdiff.Sampler`, as it is.

    ``fd.Sampler(denoiser, sigma_diffusion(sigmas), "dpmpp_2m", steps=n)`` visits all n sigmas above 0; with fewer
    steps, some of them. Every solver of ours runs on it, with addressed noise and, on a GPU, in the captured loop.

    Raises:
        InputError: as :func:`sigma_schedule`.
    """
    return Diffusion(sigma_schedule(sigmas), "sample")


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """``[n + 1]`` levels, equidistant in sigma^(1/rho), and 0 (Karras et al. 2022, eq. 5), in torch's default dtype."""
    _check_ends(n, sigma_min, sigma_max)
    return ended(karras_levels(n, sigma_min, sigma_max, rho), device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """``[n + 1]`` levels, equidistant in log(sigma), and 0, in torch's default dtype."""
    _check_ends(n, sigma_min, sigma_max)
    ends = math.log(sigma_max), math.log(sigma_min)
    return ended(torch.linspace(*ends, n, dtype=torch.float64).exp(), device)


def _check_ends(n: int, sigma_min: float, sigma_max: float) -> None:
    check(isinstance(n, int) and n >= 1, f"n must be a whole number of at least 1, got {n!r}")
    check(0 < sigma_min < sigma_max, f"0 < sigma_min < sigma_max must hold, got {sigma_min}, {sigma_max}")


def ended(levels: Tensor, device: torch.device | str) -> Tensor:
    return torch.cat((levels, levels.new_zeros(1))).to(device, torch.get_default_dtype())


def checked(sigmas: object, least: int = 2) -> Tensor:
    """The levels in float64 on the host."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        raise InputError(f"sigmas must be a floating-point tensor, got {getattr(sigmas, 'dtype', type(sigmas))}")
    check(sigmas.ndim == 1 and len(sigmas) >= least, f"sigmas must hold {least} levels or more, got {sigmas.shape}")
    levels = sigmas.detach().to("cpu", torch.float64)
    fits = bool(levels.isfinite().all() and (levels.diff() < 0).all() and levels[0] > 0 and levels[-1] >= 0)
    check(fits, f"sigmas must be finite and descend from above 0 to 0 or more, got {levels.tolist()}")
    return levels
