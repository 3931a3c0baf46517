"""Plans: the rows of k-diffusion's samplers, made of those of our solvers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.adapters.k_diffusion.levels import sigma_schedule
from fastdiff.errors import check
from fastdiff.solvers import Grid, Letters, in_order

Solver = Callable[..., Letters]


class Plan(NamedTuple):
    """The rows of a run, ``[R]`` each: their letters, the level and the step at which the network is asked.

    ``reach`` is the level that the noise of a row leads to, NaN where none is drawn; ``first`` the standard deviation
    of the noise before the first row, None where none is drawn.
    """

    letters: Letters
    sigma: Tensor
    step: Tensor
    reach: Tensor
    first: float | None = None

    @property
    def history(self) -> int:
        return max((k for k in (1, 2, 3) if f"c{k}" in self.letters and self.letters[f"c{k}"].any()), default=0)


def stepwise(solver: Solver, start: Tensor, end: Tensor, up: Tensor, reach: Tensor, first: float | None = None) -> Plan:
    """Steps of a solver that remembers nothing: each is a run of its own from ``start`` to ``end``, and then noise
    of standard deviation ``up``."""
    runs = [_one_step(solver, *ends) for ends in zip(start.tolist(), end.tolist(), strict=True)]
    letters = {name: torch.cat([run[name] for run in runs]) for name in runs[0].keys() - {"t", "step", "s"}}
    sigma = letters.pop("sigma")
    sizes = torch.tensor([len(run["sigma"]) for run in runs])
    last = sizes.cumsum(0) - 1
    s, reached = torch.zeros_like(sigma), torch.full_like(sigma, torch.nan)
    s[last], reached[last] = up, reach
    return Plan({**letters, "s": s}, sigma, torch.arange(len(sizes)).repeat_interleave(sizes), reached, first)


@lru_cache(4096)  # the runs of a script have the same levels
def _one_step(solver: Solver, start: float, end: float) -> Letters:
    grid = _grid(torch.tensor((start, end), dtype=torch.float64))
    letters = {"t": grid.t[:-1], **solver(grid)}
    return {**letters, "sigma": grid.schedule.at(letters["t"]).sigma}


def churned(solver: Solver, sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Plan:
    """Noise before each step, to ``sigma_hat``: it ends the step before."""
    check(s_churn >= 0, f"s_churn must not be negative, got {s_churn}")
    level, end = sigmas[:-1], sigmas[1:]
    gamma = min(s_churn / len(level), math.sqrt(2) - 1)
    up = torch.where((s_tmin <= level) & (level <= s_tmax), math.sqrt((1 + gamma) ** 2 - 1) * level, 0.0)
    start, up = torch.hypot(level, up), s_noise * up
    following = torch.cat((up[1:], up.new_zeros(1)))
    reach, first = _reached(end, s_churn > 0), float(up[0]) if s_churn > 0 else None
    reach[-1] = torch.nan
    return stepwise(solver, start, end, following, reach, first)


def ancestral(solver: Solver, sigmas: Tensor, eta: float, s_noise: float) -> Plan:
    """Down to ``sigma_down``, and up again by noise."""
    start, end = sigmas[:-1], sigmas[1:]
    down, up = _down_and_up(start, end, eta)
    return stepwise(solver, start, down, s_noise * up, _reached(end))


def _down_and_up(start: Tensor, end: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """sigma_down, sigma_up with down² + up² = end²; eta = 1 is the posterior variance (Ho et al. 2020, eq. 7)."""
    check(eta >= 0, f"eta must not be negative, got {eta}")
    left = (end / start) ** 2
    down = end * (1 - eta**2 + eta**2 * left).clamp(min=0).sqrt()
    return down, torch.minimum(end, eta * end * (1 - left).sqrt())


def _reached(end: Tensor, noisy: bool = True) -> Tensor:
    return torch.where((end > 0) & noisy, end, torch.nan)


def multistep(solver: Solver, sigmas: Tensor, *, s_noise: float = 1.0, **options: Any) -> Plan:
    """Steps of a solver that remembers estimates."""
    letters = solver(_grid(sigmas), **options)
    letters["s"] = s_noise * letters.get("s", torch.zeros_like(sigmas[1:]))
    return Plan(letters, sigmas[:-1], torch.arange(len(sigmas) - 1), _reached(sigmas[1:], bool(options.get("eta"))))


def dpmpp_3m_sde(grid: Grid, *, eta: float) -> Letters:
    """The SDE's form of :func:`fastdiff.solvers.dpmpp_3m`, whose second step integrates the line exactly.

    The parabola through the estimates has half its weight, as there.
    """
    letters = solvers.dpmpp_2m_sde(grid, eta=eta, form="heun", lower_order_final=False)
    h = grid.h
    at = torch.arange(len(h))[2:]
    at = at[torch.isfinite(h[at])]
    last, before, scaled = h[at - 1] / h[at], h[at - 2] / h[at], (1 + eta) * h[at]
    line = torch.expm1(-scaled) / scaled + 1
    # The difference of the two slopes, whose weight the estimates share.
    bend = (line * last - line / scaled + 0.5) / (last + before)
    letters["b"][at] += bend / last
    letters["c1"][at] -= bend * (1 / last + 1 / before)
    letters["c2"][at] += bend / before
    return letters


def dpmpp_sde(sigmas: Tensor, eta: float, s_noise: float, r: float) -> Plan:
    """Both evaluations of a step start from its first state, which the anchor keeps."""
    check(0 < r <= 1, f"r must lie in (0, 1], got {r}")
    start, end, ones = sigmas[:-1], sigmas[1:], torch.ones_like(sigmas[1:])
    both, step = end > 0, torch.arange(len(end)).double()
    middle = torch.where(both, start ** (1 - r) * end**r, end)
    (near, up), (down, up_more) = (_down_and_up(start, level, eta) for level in (middle, end))
    first = {"a": near / start, "b": 1 - near / start, "s": s_noise * up, "v": ones, "m": ones}
    share = 1 / (2 * r)
    b = 1 - down / start
    second = {"e": down / start, "b": share * b, "c1": (1 - share) * b, "s": s_noise * up_more}
    first |= {"sigma": start, "reach": _reached(middle), "step": step}
    second |= {"sigma": middle, "reach": end, "step": step}
    letters = in_order(first, second, both)
    letters["k"] = torch.zeros_like(letters["a"])
    sigma, reach, step = (letters.pop(name) for name in ("sigma", "reach", "step"))
    return Plan(letters, sigma, step, reach)


def _grid(sigmas: Tensor) -> Grid:
    schedule = sigma_schedule(sigmas)
    top = len(schedule) - 1
    t = torch.arange(top, top - len(sigmas), -1, dtype=torch.float64)
    return Grid(torch.ones_like(sigmas), sigmas, t, schedule)
