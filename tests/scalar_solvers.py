"""Every solver again, as a plain loop on floats, to compare the tables with.

``levels`` are (alpha, sigma) from the start to the end; ``estimate(i, x)`` is the network's x0 at level i, and
``estimate(i, x, level)`` at another level within step i. After each evaluation a solver yields (x, x0). The space is
y = x / scale of level sigma / scale: scale alpha, where diffusion is adding noise of that level to the data, or
alpha + sigma for flow and where the start holds no signal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.integrate import fixed_quad

Level = tuple[float, float]
Levels = list[Level]
Estimate = Callable[..., float]
Steps = Iterator[tuple[float, float]]


class Path:
    """The levels of a run as numbers."""

    def __init__(self, levels: Levels, flow: bool = False, **_: Any) -> None:
        self.levels, self.n = levels, len(levels) - 1
        self.straight = flow or levels[0][0] == 0
        self.scale = [self.scale_of(level) for level in levels]
        self.at = [sigma / scale for (_, sigma), scale in zip(levels, self.scale, strict=True)]
        self.lam = [half_log_snr(level) for level in levels]

    def scale_of(self, level: Level) -> float:
        return sum(level) if self.straight else level[0]

    def level_of(self, ratio: float) -> Level:
        """The level of a ratio sigma / alpha in the process that these levels belong to."""
        alphas = {alpha for alpha, sigma in self.levels if sigma}
        if alphas == {1.0}:
            return 1.0, ratio
        alpha, sigma = self.levels[min(1, self.n - 1)]
        if abs(alpha + sigma - 1) < 1e-9:
            return 1 / (1 + ratio), ratio / (1 + ratio)
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)

    def slope(self, i: int, x: float, x0: float) -> float:
        return (x / self.scale[i] - x0) / self.at[i]


def ratio_of(level: Level) -> float:
    return level[1] / level[0] if level[0] else math.inf


def half_log_snr(level: Level) -> float:
    ratio = ratio_of(level)
    return math.inf if ratio == 0 else -math.log(ratio)


# ---- one evaluation a step ------------------------------------------------------------------


def ddim(levels: Levels, x: float, estimate: Estimate, noise: list[float], eta: float = 0.0, **_: Any) -> Steps:
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        before, after = ratio_of(level), ratio_of(following)
        up = eta * after * math.sqrt(1 - (after / before) ** 2)
        down = math.sqrt(after**2 - up**2)
        x = following[0] * (x0 + down * (x - level[0] * x0) / level[1] + up * noise[i])
        yield x, x0


def ddpm(
    levels: Levels, x: float, estimate: Estimate, noise: list[float], variance: str = "fixed_small", **_: Any
) -> Steps:
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        before, after = ratio_of(level), ratio_of(following)
        left = (after / before) ** 2
        mean = x0 + after**2 / before * (x - level[0] * x0) / level[1]
        std = level[1] if variance == "fixed_large" else following[1]
        x = following[0] * mean + (std * math.sqrt(1 - left) * noise[i] if after else 0.0)
        yield x, x0


def ddim_inverse(levels: Levels, x: float, estimate: Estimate, noise: list[float], **settings: Any) -> Steps:
    path = Path(levels, **settings)
    for i in reversed(range(path.n)):
        seen = min(i + 1, path.n - 1)
        x0 = estimate(seen, x)
        slope = (x - path.scale[seen] * x0) / levels[seen][1]
        x = path.scale[i] * (x / path.scale[i + 1] + (path.at[i] - path.at[i + 1]) * slope)
        yield x, x0


def lcm(levels: Levels, x: float, estimate: Estimate, noise: list[float], times: list[float], **_: Any) -> Steps:
    for i, (alpha, sigma) in enumerate(levels[1:]):
        x0 = estimate(i, x)
        scaled = 10.0 * times[i]
        denoised = 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * x0
        x = alpha * denoised + sigma * noise[i]
        yield x, x0


# ---- two evaluations a step -----------------------------------------------------------------


def heun(levels: Levels, x: float, estimate: Estimate, noise: list[float], **settings: Any) -> Steps:
    path = Path(levels, **settings)
    for i in range(path.n):
        y, h = x / path.scale[i], path.at[i + 1] - path.at[i]
        x0 = estimate(i, x)
        slope = (y - x0) / path.at[i]
        trial = y + h * slope
        x = path.scale[i + 1] * trial
        yield x, x0
        if path.at[i + 1] > 0:
            x0 = estimate(i + 1, x)
            y = y + h * (slope + (trial - x0) / path.at[i + 1]) / 2
            x = path.scale[i + 1] * y
            yield x, x0


def edm(
    levels: Levels,
    x: float,
    estimate: Estimate,
    noise: list[float],
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
    **settings: Any,
) -> Steps:
    path = Path(levels, **settings)
    row = 0

    def raised(i: int) -> float:
        ratio = ratio_of(levels[i])
        more = min(s_churn / path.n, math.sqrt(2) - 1) if s_tmin <= ratio <= s_tmax else 0.0
        highest = max(filter(math.isfinite, map(ratio_of, levels)))
        return ratio * (1 + more) if ratio * (1 + more) <= highest else ratio

    def churned(i: int, x: float, z: float) -> float:
        before, after = ratio_of(levels[i]), raised(i)
        if i == path.n or after == before:
            return x
        return path.level_of(after)[0] * (x / levels[i][0] + s_noise * math.sqrt(after**2 - before**2) * z)

    for i in range(path.n):
        level = levels[i] if raised(i) == ratio_of(levels[i]) else path.level_of(raised(i))
        scale = path.scale_of(level)
        y, at, following = x / scale, level[1] / scale, path.at[i + 1]
        x0 = estimate(i, x, level)
        slope = (y - x0) / at
        trial = y + (following - at) * slope
        x = path.scale[i + 1] * trial
        row += 1
        if following > 0:
            yield x, x0
            x0 = estimate(i + 1, x)
            y = y + (following - at) * (slope + (trial - x0) / following) / 2
            x = churned(i + 1, path.scale[i + 1] * y, noise[row])
            row += 1
        yield x, x0


def middle_of(path: Path, i: int) -> Level | None:
    """Half a step of log-SNR further, if the step is finite."""
    if math.isinf(path.lam[i]) or math.isinf(path.lam[i + 1]):
        return None
    return path.level_of(math.exp(-(path.lam[i] + path.lam[i + 1]) / 2))


def dpm2(levels: Levels, x: float, estimate: Estimate, noise: list[float], **settings: Any) -> Steps:
    path = Path(levels, **settings)
    for i in range(path.n):
        middle = middle_of(path, i)
        y, x0 = x / path.scale[i], estimate(i, x)
        slope = path.slope(i, x, x0)
        if middle is not None:
            scale = path.scale_of(middle)
            at = middle[1] / scale
            x = scale * (y + (at - path.at[i]) * slope)
            yield x, x0
            x0 = estimate(i, x, middle)
            slope = (x / scale - x0) / at
        x = path.scale[i + 1] * (y + (path.at[i + 1] - path.at[i]) * slope)
        yield x, x0


def singlestep(
    levels: Levels, x: float, estimate: Estimate, noise: list[float], eta: float = 0.0, **settings: Any
) -> Steps:
    """DPM-Solver++(2S) and its SDE form, whose two noises in a step are those of one path."""
    path, row = Path(levels, **settings), 0

    def transfer(sigma: float, to: Level, h: float, x: float, x0: float) -> float:
        return to[1] / sigma * math.exp(-eta * h) * x - to[0] * math.expm1(-(1 + eta) * h) * x0

    def std(to: Level, h: float) -> float:
        return to[1] * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0

    for i, ((_, sigma), following) in enumerate(itertools.pairwise(levels)):
        h, middle = path.lam[i + 1] - path.lam[i], middle_of(path, i)
        x0 = estimate(i, x)
        if middle is None:
            x = transfer(sigma, following, h, x, x0) + std(following, h) * noise[row]
        else:
            first = std(middle, h / 2) * noise[row]
            inside = transfer(sigma, middle, h / 2, x, x0) + first
            yield inside, x0
            row += 1
            x0 = estimate(i, inside, middle)
            carried = following[1] / middle[1] * math.exp(-eta * h / 2) * first
            x = transfer(sigma, following, h, x, x0) + carried + std(following, h / 2) * noise[row]
        row += 1
        yield x, x0


# ---- several evaluations remembered ---------------------------------------------------------


def dpmpp_2m(levels: Levels, x: float, estimate: Estimate, noise: list[float], eta: float = 0.0, **_: Any) -> Steps:
    last_x0, last_h = 0.0, math.inf
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        h = half_log_snr(following) - half_log_snr(level)
        plain = last_h == math.inf or h == math.inf or (len(levels) <= 15 and i == len(levels) - 2)
        slope = 0.0 if plain else (x0 - last_x0) / last_h
        ahead = x0 + h / 2 * slope if slope else x0
        x = following[1] / level[1] * (math.exp(-eta * h) if eta else 1.0) * x
        x = x - following[0] * math.expm1(-(1 + eta) * h) * ahead
        x = x + (following[1] * math.sqrt(-math.expm1(-2 * eta * h)) * noise[i] if eta else 0.0)
        last_x0, last_h = x0, h
        yield x, x0


def dpmpp_3m(levels: Levels, x: float, estimate: Estimate, noise: list[float], true: bool = False, **_: Any) -> Steps:
    """The published update in its own terms; the true one as an integral of the parabola, by quadrature."""
    lam, kept = [half_log_snr(level) for level in levels], []
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        kept = [(lam[i], x0), *kept[:2]]
        h = lam[i + 1] - lam[i]
        known = [(at, m) for at, m in kept if math.isfinite(at)] if math.isfinite(h) else []
        known = known[: len(levels) - 1 - i] if len(levels) <= 15 else known
        linear = following[1] / level[1] * x
        if len(known) < 2:
            x = linear - following[0] * math.expm1(-h) * x0
        elif len(known) == 2:
            slope = (x0 - known[1][1]) / (lam[i] - known[1][0])
            x = linear - following[0] * math.expm1(-h) * (x0 + h / 2 * slope)
        elif true:
            ahead = [(at - lam[i + 1], m) for at, m in known]
            x = linear + following[0] * integral(np.exp, ahead, -h, 0.0)
        else:
            (t0, m0), (t1, m1), (t2, m2) = known
            r0, r1 = (t0 - t1) / h, (t1 - t2) / h
            near, far = (m0 - m1) / r0, (m1 - m2) / r1
            first, second = near + r0 / (r0 + r1) * (near - far), (near - far) / (r0 + r1)
            e = math.expm1(-h)
            x = linear - following[0] * (e * m0 - (e / h + 1) * first + ((e + h) / h**2 - 0.5) * second)
        yield x, x0


def integral(
    weight: Callable[[np.ndarray], np.ndarray], points: list[tuple[float, float]], low: float, high: float
) -> float:
    """Of the weight times the polynomial through the points."""
    nodes, values = zip(*points, strict=True)

    def curve(at: np.ndarray) -> np.ndarray:
        basis = [math.prod((at - other) / (node - other) for other in nodes if other != node) for node in nodes]
        return weight(at) * sum(b * v for b, v in zip(basis, values, strict=True))

    return float(fixed_quad(curve, low, high, n=40)[0])


def unipc(
    levels: Levels,
    x: float,
    estimate: Estimate,
    noise: list[float],
    order: int = 2,
    variant: str = "bh2",
    **_: Any,
) -> Steps:
    """Predictor and corrector apart (Zhao et al. 2023, algorithms 1 and 2)."""
    lam, kept, before = [half_log_snr(level) for level in levels], [], x
    used = 0

    def advance(i: int, x: float, known: list[tuple[float, float]], more: list[tuple[float, float]]) -> float:
        """From level i to i + 1 by the estimates known there and, for a corrector, the one at i + 1."""
        h = lam[i + 1] - lam[i]
        (at, m0), others = known[0], [*known[1:], *more]
        y = levels[i + 1][1] / levels[i][1] * x - levels[i + 1][0] * math.expm1(-h) * m0
        if not others:
            return y
        nodes = np.array([(t - at) / h for t, _ in others])
        scale = -h if variant == "bh1" else math.expm1(-h)
        phi, moments = math.expm1(-h) / -h - 1, []
        for k in range(1, len(nodes) + 1):
            moments.append(phi * math.factorial(k) / scale)
            phi = phi / -h - 1 / math.factorial(k + 1)
        solved = np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
        shares = [0.5] if len(nodes) == 1 else solved
        differences = [(m - m0) / r for (_, m), r in zip(others, nodes, strict=True)]
        return y - levels[i + 1][0] * scale * math.fsum(s * d for s, d in zip(shares, differences, strict=True))

    for i in range(len(levels) - 1):
        x0 = estimate(i, x)
        if i and math.isfinite(lam[i - 1]):
            x = advance(i - 1, before, kept[:used], [(lam[i], x0)])
        before, kept = x, [(lam[i], x0), *kept[:2]]
        finite = [pair for pair in kept if math.isfinite(pair[0])]
        used = max(1, min(order, len(finite), len(levels) - 1 - i))
        if math.isinf(lam[i]) or math.isinf(lam[i + 1]):
            used = 1
        x = advance(i, x, kept[:used], [])
        yield x, x0


def adams(
    levels: Levels,
    x: float,
    estimate: Estimate,
    noise: list[float],
    order: int,
    logarithmic: bool,
    **settings: Any,
) -> Steps:
    """Adams-Bashforth over the level or its logarithm, integrated by quadrature."""
    path, kept = Path(levels, **settings), []
    for i in range(path.n):
        x0 = estimate(i, x)
        kept = [(path.at[i], path.slope(i, x, x0)), *kept[: order - 1]]
        low, high = path.at[i], path.at[i + 1]
        if logarithmic and high == 0:
            step = (high - low) * kept[0][1]
        elif logarithmic:
            left = path.n - i if path.n < 15 else order
            points = [(math.log(at), slope) for at, slope in kept[:left]]
            step = integral(np.exp, points, math.log(low), math.log(high))
        else:
            step = integral(np.ones_like, kept, low, high)
        x = path.scale[i + 1] * (x / path.scale[i] + step)
        yield x, x0


def pndm(levels: Levels, x: float, estimate: Estimate, noise: list[float], **settings: Any) -> Steps:
    """The linear multistep form, as a loop with a list of slopes."""
    path, slopes = Path(levels, **settings), []
    for i in range(path.n):
        x0 = estimate(i, x)
        slopes = [path.slope(i, x, x0), *slopes[:3]]
        y, h = x / path.scale[i], path.at[i + 1] - path.at[i]
        if len(slopes) == 1 and path.n > 1:
            trial = path.scale[i + 1] * (y + h * slopes[0])
            yield trial, x0
            x0 = estimate(i + 1, trial)
            mean = (slopes[0] + path.slope(i + 1, trial, x0)) / 2
        else:
            shares = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}
            last = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
            mean = math.fsum(a * b for a, b in zip(shares.get(len(slopes), last), slopes, strict=True))
        x = path.scale[i + 1] * (y + h * mean)
        yield x, x0


SCALAR: dict[str, tuple[str, dict[str, Any], Callable[..., Steps], dict[str, Any]]] = {
    "ddpm": ("ddpm", {}, ddpm, {}),
    "ddpm, large variance": ("ddpm", {"variance": "fixed_large"}, ddpm, {}),
    "ddim": ("ddim", {}, ddim, {}),
    "ddim, eta 1/2": ("ddim", {"eta": 0.5}, ddim, {}),
    "ddim, eta 1": ("ddim", {"eta": 1.0}, ddim, {}),
    "ddim_inverse": ("ddim_inverse", {}, ddim_inverse, {}),
    "euler": ("euler", {}, ddim, {}),
    "euler_a": ("euler_a", {"eta": 1.0}, ddim, {}),
    "lcm": ("lcm", {}, lcm, {}),
    "heun": ("heun", {}, heun, {}),
    "edm": ("edm", {}, edm, {}),
    "edm, much churn": ("edm", {"s_churn": 100.0, "s_tmin": 0.0, "s_tmax": 1e9, "s_noise": 1.0}, edm, {}),
    "dpm2": ("dpm2", {}, dpm2, {}),
    "dpmpp_2s": ("dpmpp_2s", {}, singlestep, {}),
    "dpmpp_sde": ("dpmpp_sde", {}, singlestep, {"eta": 1.0}),
    "dpmpp_sde, eta 1/2": ("dpmpp_sde", {"eta": 0.5}, singlestep, {}),
    "dpmpp_2m": ("dpmpp_2m", {}, dpmpp_2m, {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, dpmpp_2m, {"eta": 1.0}),
    "dpmpp_2m_sde, eta 1/2": ("dpmpp_2m_sde", {"eta": 0.5}, dpmpp_2m, {}),
    "dpmpp_3m": ("dpmpp_3m", {}, dpmpp_3m, {}),
    "dpmpp_3m_true": ("dpmpp_3m_true", {}, dpmpp_3m, {"true": True}),
    "unipc": ("unipc", {}, unipc, {}),
    "unipc, order 1": ("unipc", {"order": 1}, unipc, {}),
    "unipc, order 3": ("unipc", {"order": 3}, unipc, {}),
    "unipc, bh1": ("unipc", {"order": 3, "variant": "bh1"}, unipc, {}),
    "deis": ("deis", {}, adams, {"order": 3, "logarithmic": True}),
    "deis, order 4": ("deis", {"order": 4}, adams, {"logarithmic": True}),
    "lms": ("lms", {}, adams, {"order": 4, "logarithmic": False}),
    "lms, order 2": ("lms", {"order": 2}, adams, {"logarithmic": False}),
    "pndm": ("pndm", {}, pndm, {}),
}
