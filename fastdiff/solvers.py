"""Solvers: a solver is a function (grid, options) -> letters of a table of rows.

A grid holds the levels a run visits: alpha and sigma at its timesteps and, last, the clean end (1, 0).
Everything is float64 on the host. To add a solver, write its row builder, enter it in ``SOLVERS`` and state
its order in the order-of-convergence test.

``x`` in a solver's own space is x / alpha for a noise level sigma / alpha: there the probability-flow ODE is
dx/dlevel = (x - x0) / level (Karras et al. 2022, eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError, check, choose
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_clip
from fastdiff.ops.step import posterior_letters
from fastdiff.schedule import Schedule

Letters = dict[str, Tensor]


@dataclass(frozen=True)
class Grid:
    """The levels of a run: ``alpha`` and ``sigma`` of ``[N+1]``, from the noisiest to the clean end."""

    alpha: Tensor
    sigma: Tensor
    flow: bool = False

    @classmethod
    def of(cls, schedule: Schedule, timesteps: Tensor) -> Grid:
        clean = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        levels = schedule.alpha[timesteps], schedule.sigma[timesteps]
        alpha, sigma = (torch.cat(pair) for pair in zip(levels, clean, strict=True))
        return cls(alpha, sigma, schedule.config["name"] == "flow")

    @property
    def steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma before and after each step, ``[N]`` each."""
        return self.alpha[:-1], self.sigma[:-1], self.alpha[1:], self.sigma[1:]


@dataclass(frozen=True)
class StepTable:
    """The rows of a run, for people and tests to read, and as the device table of the loop.

    Attributes:
        rows: numpy record array, float64, one record per network evaluation: ``rows.a``, ``rows[0].b`` ... by
            the letters of :mod:`fastdiff.ops.row` (``clip``, which is also a method, as ``rows["clip"]``), and
            ``rows.t``, the time the network is told.
        timesteps: int64 ``[R]``, the schedule's timestep of each row.
        history, anchored: how many of h1 h2 h3 the rows use, and whether they use the anchor.
    """

    rows: np.recarray[Any, Any]
    timesteps: Tensor
    history: int
    anchored: bool

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The letters ``[R, len(LETTERS)]`` on the device, rounded once."""
        columns = [torch.from_numpy(np.ascontiguousarray(self.rows[letter])) for letter in rows.LETTERS]
        return torch.stack(columns, 1).to(device, dtype)


def build_table(
    diffusion: Diffusion,
    timesteps: Tensor,
    solver: str = "ddim",
    *,
    guidance_scale: float | Sequence[float] = 1.0,
    clip: float | None = None,
    **options: Any,
) -> StepTable:
    """The table of a run: the solver's letters, and guidance, prediction type and clipping.

    Args:
        timesteps: int64 ``[N]``, strictly descending.
        guidance_scale: one, or one for each step.
        clip: bound of the estimate of x0, None for no bound.
        options: the solver's own, for instance ``eta``.

    Raises:
        InputError: an unknown solver or option, scales that do not match the steps, a singular start.
    """
    choose("solver", solver, SOLVERS)
    schedule = diffusion.schedule
    grid = Grid.of(schedule, timesteps)
    if solver == "ddpm":
        options = {"variance": diffusion.variance, **options}
        learned = options["variance"] == "learned_range"
        check(not learned or diffusion.variance == "learned_range", "this diffusion has no learned_range variance")
    try:
        letters = SOLVERS[solver](grid, **options)
    except TypeError as error:
        raise InputError(f"solver {solver}: {error}") from None
    at = letters.pop("at", torch.arange(len(timesteps)))
    alpha, sigma = grid.alpha[at], grid.sigma[at]
    check(
        diffusion.prediction != "epsilon" or bool((alpha > 0).all()),
        "an epsilon prediction cannot start from zero terminal SNR: train with v_prediction or sample",
    )
    p, q = rows.to_x0(diffusion.prediction, alpha, sigma)
    w = _scales(guidance_scale, len(timesteps))[at]
    table = rows.make_table(len(at), p=p, q=q, w=w, c_in=schedule.c_in[timesteps][at], clip=check_clip(clip), **letters)
    return _step_table(table, schedule.c_noise[timesteps][at], timesteps[at])


# ---- the solvers ----------------------------------------------------------------------------


def ddpm(grid: Grid, *, variance: str = "fixed_small") -> Letters:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any sub-sequence of the timesteps."""
    return posterior_letters(*grid.steps, variance=variance)


def ddim(grid: Grid, *, eta: float = 0.0) -> Letters:
    """DDIM (Song et al. 2021, eq. 12): eta = 0 is deterministic, eta = 1 is ddpm."""
    check(0 <= eta <= 1, f"eta must lie in [0, 1], got {eta}")
    a, b, s = rows.ddim(*grid.steps, eta)
    return {"a": a, "b": b, "s": s}


def euler(grid: Grid) -> Letters:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn).

    Linear in the noise level, hence the same numbers as DDIM with eta = 0, in every process.
    """
    return ddim(grid)


def euler_a(grid: Grid, *, eta: float = 1.0) -> Letters:
    """Euler with ancestral noise: down to sigma_down, then up by sigma_up.

    sigma_up² is the posterior variance, hence the same numbers as DDIM with this eta.
    """
    return ddim(grid, eta=eta)


def heun(grid: Grid) -> Letters:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); two evaluations a step, one in the last.

    The trapezoid's first half is kept in the anchor. The levels are sigma / alpha; for flow and where the
    start holds no signal they are sigma / (alpha + sigma), in which rectified flow is straight.
    """
    alpha, sigma, alpha_next, sigma_next = grid.steps
    if grid.flow or bool(alpha[0] == 0):
        scale, scale_next = alpha + sigma, alpha_next + sigma_next
    else:
        scale, scale_next = alpha, alpha_next
    level, level_next = sigma / scale, sigma_next / scale_next
    half = (level_next - level) / 2
    a, b, _ = rows.ddim(*grid.steps)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    predictor = {
        "a": a,
        "b": b,
        "e": zero,
        "k": zero,
        "m": scale_next / scale * (1 + half / level),
        "n": -scale_next * half / level,
    }
    slope = torch.where(level_next > 0, half / level_next, 0.0)
    corrector = {"a": slope, "b": -scale_next * slope, "e": one, "k": one, "m": zero, "n": zero}
    letters = {name: torch.stack((predictor[name], corrector[name]), 1).flatten()[:-1] for name in predictor}
    return {**letters, "at": torch.arange(2 * len(a) - 1).add(1) // 2}


def dpmpp_2m(grid: Grid) -> Letters:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x0 extrapolated in log-SNR from the last two estimates.

    First order in the first step and in the last, whose log-SNR is infinite.
    """
    _, sigma, alpha_next, sigma_next = grid.steps
    half_log_snr = (grid.alpha / grid.sigma).log()
    h = half_log_snr.diff()
    weight = torch.zeros_like(h)
    weight[1:-1] = h[1:-1] / h[:-2] / 2
    gain = -alpha_next * torch.expm1(-h)
    return {"a": sigma_next / sigma, "b": gain * (1 + weight), "c1": -gain * weight, "v": torch.ones_like(h)}


SOLVERS: dict[str, Callable[..., Letters]] = {
    solver.__name__: solver for solver in (ddpm, ddim, euler, euler_a, heun, dpmpp_2m)
}


# ---- assembling -----------------------------------------------------------------------------


def _scales(guidance_scale: float | Sequence[float], steps: int) -> Tensor:
    try:
        scales = torch.as_tensor(guidance_scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"guidance_scale must be a number or one for each step: {error}") from None
    check(
        scales.ndim == 0 or scales.shape == (steps,),
        f"guidance_scale must be one or one for each of {steps} steps, got {list(scales.shape)}",
    )
    check(bool(torch.isfinite(scales).all()), f"guidance_scale must be finite, got {guidance_scale}")
    return scales.expand(steps)


def _step_table(table: Tensor, times: Tensor, timesteps: Tensor) -> StepTable:
    columns = (times.double(), *table.unbind(1))
    record = np.rec.fromarrays(  # type: ignore[call-overload]
        [column.numpy() for column in columns], names=("t", *rows.LETTERS)
    )
    used = [letter for letter in ("c1", "c2", "c3") if np.any(record[letter])]
    anchored = bool(np.any(record.e))
    return StepTable(record, timesteps, int(used[-1][1]) if used else 0, anchored)
