"""Solvers: a solver is a function (grid, options) -> letters of a table of rows.

A grid holds the levels a run visits: alpha and sigma at its timesteps and, last, where it ends. Everything is float64
on the host. To add a solver, write its row builder, enter it in ``SOLVERS`` and state its order in the
order-of-convergence test.

Two forms of the probability-flow ODE are solved here. In level = sigma / scale, ``d(x / scale) / d level = slope`` with
``slope = (x - scale x0) / sigma``: scale alpha makes it the noise (Karras et al. 2022, eq. 4), scale alpha + sigma the
velocity of rectified flow, which has a level even where there is no signal. In lambda = log(alpha / sigma) the linear
part is solved exactly and x0 is what is extrapolated (Lu et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import check, choose
from fastdiff.ops import row as rows
from fastdiff.ops.step import posterior_letters
from fastdiff.schedule import Levels, Schedule

Letters = dict[str, Tensor]
FEW = 15  #: a run of fewer steps ends with steps of lower order by default, where the solver is Lu et al.'s or DEIS


@dataclass(frozen=True)
class Grid:
    """The levels of a run, ``[N+1]`` from the noisiest to the end, and their timesteps ``t`` (-1 is the clean end)."""

    alpha: Tensor
    sigma: Tensor
    t: Tensor
    schedule: Schedule

    @property
    def steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma before and after each step, ``[N]`` each."""
        return self.alpha[:-1], self.sigma[:-1], self.alpha[1:], self.sigma[1:]

    @property
    def straight(self) -> bool:
        """Whether the scale is alpha + sigma: for flow, which is straight in it, and for a start without signal."""
        return self.schedule.config["name"] == "flow" or bool(self.alpha[0] == 0)

    @property
    def scale(self) -> Tensor:
        """``[N+1]``"""
        return self.scale_of(self.alpha, self.sigma)

    def scale_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What x is measured in at other levels."""
        return alpha + sigma if self.straight else alpha

    @property
    def level(self) -> Tensor:
        """sigma / scale ``[N+1]``."""
        return self.sigma / self.scale

    @property
    def h(self) -> Tensor:
        """Steps ``[N]`` of lambda = log(alpha / sigma); infinite to the clean end and from a start without signal."""
        return (self.alpha / self.sigma).log().diff()

    def middle(self) -> tuple[Levels, Tensor]:
        """Levels and timesteps ``[N]`` in the middle of each step of lambda, or where an infinite one begins."""
        log_snr = 2 * (self.alpha[:-1] / self.sigma[:-1]).log() + self.h
        t = torch.where(torch.isfinite(self.h), self.schedule.timestep_of(log_snr), self.t[:-1])
        return self.schedule.at(t), t


def in_order(first: Letters, second: Letters, both: Tensor) -> Letters:
    """The rows of steps that take two evaluations where ``both``, and the first alone elsewhere."""
    kept = torch.stack((torch.ones_like(both), both), 1)
    zeros = torch.zeros(len(both), dtype=torch.float64)
    names = first.keys() | second.keys()
    return {name: torch.stack((first.get(name, zeros), second.get(name, zeros)), 1)[kept] for name in names}


def slope_of(scale: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What x and x0 are multiplied by in the slope (x - scale x0) / sigma."""
    return 1 / sigma, -scale / sigma


# ---- one evaluation a step ------------------------------------------------------------------


def ddpm(grid: Grid, *, variance: str | float = "fixed_small") -> Letters:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any sub-sequence of the timesteps.

    A ``variance`` v between 0 and 1 is small^(1-v) large^v (Ho & Salimans 2022, algorithm 2).
    """
    return posterior_letters(*grid.steps, variance=variance)


def ddim(grid: Grid, *, eta: float = 0.0) -> Letters:
    """DDIM (Song et al. 2021, eq. 12): eta = 0 is deterministic, eta = 1 is ddpm."""
    check(0 <= eta <= 1, f"eta must lie in [0, 1], got {eta}")
    a, b, s = rows.ddim(*grid.steps, eta)
    return {"a": a, "b": b, "s": s}


def ddim_inverse(grid: Grid) -> Letters:
    """DDIM backwards, from an image to the noise that ddim makes it of (Song et al. 2021, section 4.3).

    A step goes along the slope that the network sees where it begins; the first, from the clean end, which the network
    does not know, along that of the lowest level.
    """
    scale, level, sigma, t = grid.scale.flip(0), grid.level.flip(0), grid.sigma.flip(0), grid.t.flip(0)
    at = torch.arange(len(t) - 1).clamp(min=1)
    u, v = slope_of(scale[at], sigma[at])
    way = scale[1:] * level.diff()
    return {"a": scale[1:] / scale[:-1] + way * u, "b": way * v, "t": t[at]}


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


def lcm(grid: Grid, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Letters:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): to the clean end, and noised again.

    The estimate is c_skip x + c_out x0, of which c_skip is next to nothing but at the lowest timesteps.
    """
    check(sigma_data > 0, f"sigma_data must be positive, got {sigma_data}")
    _, _, alpha, sigma = grid.steps
    scaled = timestep_scaling * grid.t[:-1]
    norm = torch.hypot(scaled, torch.full_like(scaled, sigma_data))
    return {"a": alpha * (sigma_data / norm) ** 2, "b": alpha * scaled / norm, "s": sigma}


# ---- two evaluations a step -----------------------------------------------------------------


def heun(grid: Grid) -> Letters:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); the step to the clean end is Euler's.

    The levels are sigma / alpha; for flow and where the start holds no signal they are sigma / (alpha + sigma).
    """
    return _trapezoid(grid, grid.alpha[:-1], grid.sigma[:-1], grid.t[:-1])


def edm(
    grid: Grid, *, s_churn: float = 40.0, s_tmin: float = 0.05, s_tmax: float = 50.0, s_noise: float = 1.003
) -> Letters:
    """Heun's method with churn (Karras et al. 2022, algorithm 2; the defaults are theirs for ImageNet, table 5).

    A step between the levels s_tmin and s_tmax first adds noise, to a level that is at most (sqrt 2) - 1 higher and not
    above the first that holds signal. That noise is the last thing in the row before.
    """
    check(s_churn >= 0 and s_noise >= 0, f"s_churn and s_noise must not be negative, got {s_churn}, {s_noise}")
    ratio, most = (grid.sigma / grid.alpha)[:-1], min(s_churn / len(grid.h), math.sqrt(2) - 1)
    raised = torch.where((ratio >= s_tmin) & (ratio <= s_tmax), (1 + most) * ratio, ratio)
    raised = torch.where(raised > ratio.nan_to_num(posinf=0.0).max(), ratio, raised)
    t = torch.where(raised > ratio, grid.schedule.timestep_of(-2 * raised.log()), grid.t[:-1])
    levels = grid.schedule.at(t)
    letters = _trapezoid(grid, levels.alpha, levels.sigma, t)
    last = torch.arange(1, len(raised)) * 2 - 1
    rise = levels.alpha[1:] / grid.alpha[1:-1]
    for letter in ("a", "b", "c1"):
        letters[letter][last] *= rise
    s = torch.zeros_like(letters["a"])
    s[last] = s_noise * levels.alpha[1:] * (raised[1:] ** 2 - ratio[1:] ** 2).sqrt()
    return {**letters, "s": s}


def _trapezoid(grid: Grid, alpha: Tensor, sigma: Tensor, t: Tensor) -> Letters:
    """Steps of Heun from given levels to those of the grid.

    The second slope differs from the first by the two estimates of x0 over the level, on which the correction is made:
    half a step along the difference.
    """
    a, b, _ = rows.ddim(alpha, sigma, grid.alpha[1:], grid.sigma[1:])
    level, both, step = sigma / grid.scale_of(alpha, sigma), grid.sigma[1:] > 0, torch.arange(len(a))
    more = torch.where(both, grid.scale[1:] * (grid.level[1:] - level) / (2 * grid.level[1:]), 0.0)
    predictor = {"a": a, "b": b, "v": torch.ones_like(a), "t": t, "step": step}
    corrector = {"a": torch.ones_like(a), "b": -more, "c1": more, "t": grid.t[1:], "step": step + 1}
    return in_order(predictor, corrector, both)


def dpm2(grid: Grid) -> Letters:
    """The midpoint method, the middle being that of lambda (DPM-Solver-2 as Karras et al. 2022 compare with it).

    Its first half is Euler's step to the middle; the step to the clean end is Euler's alone.
    """
    alpha, sigma, alpha_next, sigma_next = grid.steps
    both = torch.isfinite(grid.h)
    middle, t = grid.middle()
    alpha_to, sigma_to = torch.where(both, middle.alpha, alpha_next), torch.where(both, middle.sigma, sigma_next)
    a, b, _ = rows.ddim(alpha, sigma, alpha_to, sigma_to)
    level, scale_next = middle.sigma / grid.scale_of(middle.alpha, middle.sigma), grid.scale[1:]
    # From the middle on along the first slope, and the whole step along the difference of the second from it.
    second = {
        "a": sigma_next / middle.sigma,
        "b": -scale_next * grid.level.diff() / level,
        "c1": scale_next * (1 - grid.level[:-1] / level),
        "t": t,
    }
    return in_order({"a": a, "b": b, "v": torch.ones_like(a), "t": grid.t[:-1]}, second, both)


def dpmpp_2s(grid: Grid) -> Letters:
    """DPM-Solver++(2S) with the evaluation in the middle (Lu et al. 2022, algorithm 1, r = 1/2)."""
    return _singlestep(grid, 0.0)


def dpmpp_sde(grid: Grid, *, eta: float = 1.0) -> Letters:
    """SDE-DPM-Solver++ of one step with the evaluation in the middle (Lu et al. 2022, section 5; eta scales its noise).

    Both evaluations of a step are on one path: the noise of its first half is carried through the second.
    """
    check(eta >= 0, f"eta must not be negative, got {eta}")
    return _singlestep(grid, eta)


def _singlestep(grid: Grid, eta: float) -> Letters:
    _, sigma, alpha_next, sigma_next = grid.steps
    both = torch.isfinite(grid.h)
    h = torch.where(both, grid.h / 2, grid.h)
    middle, t = grid.middle()
    alpha_to, sigma_to = torch.where(both, middle.alpha, alpha_next), torch.where(both, middle.sigma, sigma_next)
    a, b, s = _transfer(sigma, alpha_to, sigma_to, h, eta)
    a_more, _, s_more = _transfer(middle.sigma, alpha_next, sigma_next, h, eta)
    whole = -alpha_next * torch.expm1(-2 * (1 + eta) * h)
    first = {"a": a, "b": b, "s": s, "v": torch.ones_like(a), "t": grid.t[:-1]}
    return in_order(first, {"a": a_more, "b": whole, "c1": -a_more * b, "s": s_more, "t": t}, both)


def _transfer(
    sigma: Tensor, alpha_to: Tensor, sigma_to: Tensor, h: Tensor, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, s of a step h of lambda on which x0 is constant; eta = 0 the ODE, 1 the reverse SDE."""
    away = torch.exp(-eta * h) if eta else torch.ones_like(h)
    std = (-torch.expm1(-2 * eta * h)).sqrt() if eta else torch.zeros_like(h)
    return sigma_to / sigma * away, -alpha_to * torch.expm1(-(1 + eta) * h), sigma_to * std


# ---- several evaluations remembered ---------------------------------------------------------


def dpmpp_2m(grid: Grid, *, form: str = "midpoint", lower_order_final: bool | None = None) -> Letters:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x0 extrapolated in lambda from the last two estimates.

    First order in the first step and in the last, whose step of lambda is infinite. ``form`` says how a step weighs
    the difference of the two: as if in its ``midpoint``, or, as in ``heun``'s method, by the exact integral.
    ``lower_order_final``: whether a run ends with lower orders; by default one of fewer than 15 steps.
    """
    return _multistep(grid, [_first, _second_order(form)], 0.0, lower_order_final)


def dpmpp_2m_sde(
    grid: Grid, *, eta: float = 1.0, form: str = "midpoint", lower_order_final: bool | None = None
) -> Letters:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5); eta scales its noise, 0 is dpmpp_2m."""
    check(eta >= 0, f"eta must not be negative, got {eta}")
    return _multistep(grid, [_first, _second_order(form)], eta, lower_order_final)


def dpmpp_3m(grid: Grid, *, form: str = "midpoint", lower_order_final: bool | None = None) -> Letters:
    """The multistep third-order update as it is published in code; it converges with order 2.

    Its second difference enters with half the weight that the integral gives it: see dpmpp_3m_true.
    """
    return _multistep(grid, [_first, _second_order(form), partial(_third, share=1.0)], 0.0, lower_order_final)


def dpmpp_3m_true(
    grid: Grid, *, eta: float = 0.0, form: str = "midpoint", lower_order_final: bool | None = None
) -> Letters:
    """DPM-Solver++(3M) of third order: the parabola through the last three estimates, integrated exactly.

    eta scales the noise of the SDE's form (Lu et al. 2022, section 5), 0 is the ODE's.
    """
    check(eta >= 0, f"eta must not be negative, got {eta}")
    return _multistep(grid, [_first, _second_order(form), partial(_third, share=2.0)], eta, lower_order_final)


def _multistep(
    grid: Grid, orders: list[Callable[..., list[Tensor]]], eta: float, lower_order_final: bool | None
) -> Letters:
    """Steps on x0 extrapolated from those that are remembered: as many as there are, none over a step that is infinite
    or no step.
    """
    _, sigma, alpha_next, sigma_next = grid.steps
    h, usable = grid.h, torch.isfinite(grid.h) & (grid.h > 0)
    a, b, s = _transfer(sigma, alpha_next, sigma_next, h, eta)
    weights = torch.zeros(3, len(h), dtype=torch.float64)
    for order, weigh in enumerate(orders, 1):
        at = torch.arange(len(h))[order - 1 : len(h) - order + 1 if _gentle(grid, lower_order_final) else None]
        at = at[torch.stack([usable[at - back] for back in range(order)]).all(0) | (order == 1)]
        of = weigh((1 + eta) * h[at], *(h[at] / h[at - back] for back in range(1, order)))
        weights[:order, at] = torch.stack(of)
    b, c1, c2 = alpha_next * weights
    return {"a": a, "b": b, "c1": c1, "c2": c2, "s": s, "v": torch.ones_like(a)}


def _gentle(grid: Grid, lower_order_final: bool | None) -> bool:
    """Whether a run ends with lower orders."""
    return len(grid.h) < FEW if lower_order_final is None else lower_order_final


def _first(h: Tensor) -> list[Tensor]:
    return [-torch.expm1(-h)]


def _second(h: Tensor, back: Tensor) -> list[Tensor]:
    """Along the line through two estimates; ``back`` is this step by the last."""
    gain = -torch.expm1(-h)
    return [gain * (1 + back / 2), -gain * back / 2]


def _second_order(form: str) -> Callable[..., list[Tensor]]:
    forms = {"midpoint": _second, "heun": _second_exact}
    choose("form", form, forms)
    return forms[form]


def _second_exact(h: Tensor, back: Tensor) -> list[Tensor]:
    """Along the same line, integrated exactly."""
    line = (torch.expm1(-h) / h + 1) * back
    return [-torch.expm1(-h) + line, -line]


def _third(h: Tensor, back: Tensor, further: Tensor, share: float) -> list[Tensor]:
    """Along the parabola through three estimates, as divided differences; ``further`` is this step by that before."""
    gain = torch.expm1(-h)
    line, parabola = gain / h + 1, -share * ((gain + h) / h**2 - 0.5)
    reach = 1 / back + 1 / further
    first = line * (1 + 1 / (back * reach)) + parabola / reach
    second = -line / (back * reach) - parabola / reach
    return [-gain + first * back, -first * back + second * further, -second * further]


def unipc(grid: Grid, *, order: int = 2, variant: str = "bh2") -> Letters:
    """UniPC with predictors of order 1, 2 or 3 (Zhao et al. 2023), whose corrector, of one order more, costs nothing.

    A row corrects the state it is given and predicts the next: what its predictor had added is known from the history.
    """
    check(order in (1, 2, 3), f"order must be 1, 2 or 3, got {order}")
    check(variant in ("bh1", "bh2"), f"variant must be bh1 or bh2, got {variant!r}")
    _, sigma, alpha_next, sigma_next = grid.steps
    h, n = grid.h, len(grid.h)
    lam = (grid.alpha / grid.sigma).log()
    letters = torch.zeros(4, n, dtype=torch.float64)  # of x0 and h1, h2, h3
    correction = torch.zeros(4, dtype=torch.float64)
    for i in range(n):
        known = next((back for back in range(i + 1) if not torch.isfinite(h[i - back])), i + 1)
        used = max(1, min(order, known, n - i))
        nodes = (lam[i - torch.arange(1, used)] - lam[i]) / h[i]
        predictor = alpha_next[i] * _unified(h[i], nodes, variant)
        carried = sigma_next[i] / sigma[i] * correction
        letters[:, i] = carried
        letters[:used, i] += predictor
        correction.zero_()
        if torch.isfinite(h[i]):
            corrector = alpha_next[i] * _unified(h[i], torch.cat((nodes, torch.ones(1))), variant)
            correction[0] = corrector[-1]
            correction[1 : used + 1] = corrector[:-1] - predictor
    b, c1, c2, c3 = letters
    return {"a": sigma_next / sigma, "b": b, "c1": c1, "c2": c2, "c3": c3, "v": torch.ones_like(b)}


def _unified(h: Tensor, nodes: Tensor, variant: str) -> Tensor:
    """Weights of x0 where a step begins and at ``nodes``, counted in steps (Zhao et al. 2023, eq. 8 and table 7)."""
    if not torch.isfinite(h) or not len(nodes):
        return -torch.expm1(-h)[None]
    scale = torch.expm1(-h) if variant == "bh2" else -h
    phi, moments = torch.expm1(-h) / -h - 1, []
    for k in range(1, len(nodes) + 1):
        moments.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    powers = nodes ** torch.arange(len(nodes))[:, None]
    each = torch.linalg.solve(powers, torch.stack(moments)) if len(nodes) > 1 else torch.tensor([0.5]).double()
    each = -scale * each / nodes
    return torch.cat((-torch.expm1(-h)[None] - each.sum(), each))


def deis(grid: Grid, *, order: int = 3, lower_order_final: bool | None = None) -> Letters:
    """DEIS of order 1 to 4 (Zhang & Chen 2023, the log-rho form): Adams-Bashforth on the slope over log(level).

    ``lower_order_final``: whether a run ends with lower orders; by default one of fewer than 15 steps.
    """
    check(order in (1, 2, 3, 4), f"order must lie in 1...4, got {order}")
    return _adams(grid, order, torch.log, torch.exp, gentle=_gentle(grid, lower_order_final))


def lms(grid: Grid, *, order: int = 4) -> Letters:
    """Linear multistep of order 1 to 4: Adams-Bashforth on the slope over the level, on any grid."""
    check(order in (1, 2, 3, 4), f"order must lie in 1...4, got {order}")
    return _adams(grid, order, lambda level: level, torch.ones_like)


def _adams(
    grid: Grid,
    order: int,
    variable: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    gentle: bool = False,
) -> Letters:
    """The integral over the level of the polynomial in ``variable`` through the slopes that are remembered.

    ``inverse`` is the derivative of the level by the variable. Gauss's rule is exact here to the last digits. A
    ``gentle`` run ends with lower orders.
    """
    scale, scale_next = grid.scale[:-1], grid.scale[1:]
    u, v = slope_of(scale, grid.sigma[:-1])
    x, (places, shares) = variable(grid.level), torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(16)))
    weights = torch.zeros(4, len(u), dtype=torch.float64)
    weights[0] = grid.level.diff()
    for i in range(1, len(u)):
        left = len(u) - i if gentle else order
        used = min(order, i + 1, left) if torch.isfinite(x[i + 1]) else 1
        if used > 1:
            nodes, half = x[i - torch.arange(used)], (x[i + 1] - x[i]) / 2
            at = x[i] + half * (1 + places)
            weights[:used, i] = lagrange(nodes, at) @ (half * shares * inverse(at))
    c0, c1, c2, c3 = scale_next * weights
    return {"a": scale_next / scale + c0 * u, "b": c0 * v, "c1": c1, "c2": c2, "c3": c3, "u": u, "v": v}


def lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """The basis polynomials of the nodes, each at all places ``[nodes, places]``."""
    others = ~torch.eye(len(nodes), dtype=torch.bool)
    rows = [((at - nodes[o, None]) / (node - nodes[o, None])).prod(0) for node, o in zip(nodes, others, strict=True)]
    return torch.stack(rows)


def pndm(grid: Grid) -> Letters:
    """PNDM as pipelines run it, by its linear multistep form (Liu et al. 2022, eq. 9 and 12).

    The first step is taken twice, the second time along the mean of the slopes at its ends. Then Adams-Bashforth of
    order 2, 3 and 4, with the numbers of equal steps.
    """
    n = len(grid.t) - 1
    step, at = ([0, *range(n)], [0, 1, *range(1, n)]) if n > 1 else ([0], [0])
    u, v = slope_of(grid.scale[at], grid.sigma[at])
    way, on = (grid.scale[1:] * grid.level.diff())[step], (grid.scale[1:] / grid.scale[:-1])[step]
    # Of the slopes of this row, of h1, h2, h3, and of the first one, which the anchor keeps.
    start = [[1, 0, 0, 0, 0], [0] * 5, [3 / 2, 0, 0, 0, -1 / 2], [23 / 12, -16 / 12, 0, 0, 5 / 12]]
    fourth = [[55 / 24, -59 / 24, 37 / 24, 0, -9 / 24], *[[55 / 24, -59 / 24, 37 / 24, -9 / 24, 0]] * n]
    c0, c1, c2, c3, e = (way[:, None] * torch.tensor(start + fourth, dtype=torch.float64)[: len(at)]).unbind(1)
    letters = {"a": on + c0 * u, "b": c0 * v, "c1": c1, "c2": c2, "c3": c3, "e": e, "u": u.clone(), "v": v.clone()}
    letters |= {"k": torch.ones_like(u), "m": torch.zeros_like(u), "n": torch.zeros_like(u)}
    letters["k"][0], letters["m"][0], letters["n"][0] = 0, u[0], v[0]
    if n > 1:  # the second row: half of the first step along the difference of the slopes, which is one of x0
        letters["u"][0], letters["v"][0] = 0, 1
        more = way[0] / grid.level[1] / 2
        letters["a"][1], letters["b"][1], letters["c1"][1] = 1, -more, more
    return {**letters, "t": grid.t[at]}


SOLVERS: dict[str, Callable[..., Letters]] = {
    solver.__name__: solver
    for solver in (
        *(ddpm, ddim, ddim_inverse, euler, euler_a, lcm),
        *(heun, edm, dpm2, dpmpp_2s, dpmpp_sde),
        *(dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_true, unipc, deis, lms, pndm),
    )
}
