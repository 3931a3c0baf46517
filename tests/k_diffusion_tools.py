"""k-diffusion's samplers again, as plain loops on floats and float64 tensors, to compare the look-alikes with.

Each is a function of x, the levels as floats, ``noise(sigma, sigma_next)`` and the sampler's options.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
    """Smooth, and between the data's mean and x as a denoiser is."""
    sigma = sigma[:, None] if isinstance(sigma, Tensor) else sigma
    return (x + sigma**2 * torch.sin(x / (1 + sigma))) / (1 + sigma**2)


def churned(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Karras et al. 2022, algorithm 2: noise of each step is drawn, and is added where there is churn."""

    def run(x, sigmas, noise, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
        for sigma, following in itertools.pairwise(sigmas):
            gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
            z = torch.randn(x.shape, dtype=noise.dtype).double()
            raised = sigma + gamma * sigma
            x = step(x + math.sqrt(raised**2 - sigma**2) * s_noise * z, raised, following)
        return x

    return run


def ancestral(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A deterministic step, of which eta of the posterior's standard deviation is taken off and put on as noise."""

    def run(x, sigmas, noise, eta=1.0, s_noise=1.0):
        for sigma, following in itertools.pairwise(sigmas):
            down, up = split(sigma, following, eta)
            x = step(x, sigma, down)
            x = x + s_noise * up * noise(sigma, following) if following else x
        return x

    return run


def split(sigma: float, following: float, eta: float) -> tuple[float, float]:
    up = min(following, eta * following * math.sqrt((sigma - following) * (sigma + following)) / sigma)
    return (following**2 / sigma if eta == 1 else math.sqrt(following**2 - up**2)), up


def euler_step(x, sigma, end):
    return x + (end - sigma) * (x - denoise(x, sigma)) / sigma


def heun_step(x, sigma, end):
    slope, trial = (x - denoise(x, sigma)) / sigma, euler_step(x, sigma, end)
    return trial if not end else x + (end - sigma) * (slope + (trial - denoise(trial, end)) / end) / 2


def midpoint_step(x, sigma, end):
    if not end:
        return euler_step(x, sigma, end)
    middle = math.sqrt(sigma * end)
    trial = euler_step(x, sigma, middle)
    return x + (end - sigma) * (trial - denoise(trial, middle)) / middle


def singlestep(x, sigma, end):
    """Lu et al. 2022, algorithm 1 with r = 1/2, alpha = 1."""
    if not end:
        return denoise(x, sigma)
    middle, h = math.sqrt(sigma * end), math.log(sigma / end)
    trial = middle / sigma * x - math.expm1(-h / 2) * denoise(x, sigma)
    return end / sigma * x - math.expm1(-h) * denoise(trial, middle)


def sde(x, sigmas, noise, eta=1.0, s_noise=1.0, r=0.5):
    """k-diffusion's form of the singlestep SDE solver."""
    for sigma, end in itertools.pairwise(sigmas):
        x0 = denoise(x, sigma)
        if not end:
            return x0
        middle = math.exp((1 - r) * math.log(sigma) + r * math.log(end))
        (near, up), (down, up_more) = split(sigma, middle, eta), split(sigma, end, eta)
        trial = x0 + near / sigma * (x - x0) + s_noise * up * noise(sigma, middle)
        x0 = x0 + (denoise(trial, middle) - x0) / (2 * r)
        x = x0 + down / sigma * (x - x0) + s_noise * up_more * noise(sigma, end)
    return x


def adams(x, sigmas, noise, order=4):
    """The weights that integrate powers of sigma exactly."""
    slopes: list[Tensor] = []
    for i, (sigma, end) in enumerate(itertools.pairwise(sigmas)):
        slopes.insert(0, (x - denoise(x, sigma)) / sigma)
        n, h = min(order, i + 1), end - sigma
        nodes = np.array([(sigmas[i - back] - sigma) / h for back in range(n)])
        powers = np.arange(n)
        weights = np.linalg.solve(nodes ** powers[:, None], 1 / (powers + 1))
        x = x + h * sum(weight * slope for weight, slope in zip(weights.tolist(), slopes, strict=False))
    return x


def multistep(order: int, form: str) -> Callable[..., Tensor]:
    """x0 as a polynomial of lambda through the last estimates, integrated by Gauss's rule, or taken at the middle.

    The parabola's square has half its weight, as in k-diffusion's code.
    """

    def run(x, sigmas, noise, eta=1.0, s_noise=1.0, solver_type=form):
        known: list[tuple[float, Tensor]] = []
        for sigma, end in itertools.pairwise(sigmas):
            at, x0 = -math.log(sigma), denoise(x, sigma)
            known = [(at, x0), *known][:order]
            if not end:
                return x0
            h, polynomial = -math.log(end) - at, newton([(lam - at, each) for lam, each in known])
            if solver_type == "midpoint":
                mean = -math.expm1(-(1 + eta) * h) * polynomial(h / 2)
            else:
                nodes, weights = np.polynomial.legendre.leggauss(40)
                places = h * (1 + nodes) / 2
                shares = h / 2 * weights * (1 + eta) * np.exp((1 + eta) * (places - h))
                mean = sum(share * polynomial(place) for share, place in zip(shares.tolist(), places, strict=True))
            x = end / sigma * math.exp(-eta * h) * x + mean
            x = x + s_noise * end * math.sqrt(-math.expm1(-2 * eta * h)) * noise(sigma, end) if eta else x
        return x

    return run


def newton(known: list[tuple[float, Tensor]]) -> Callable[[float], Tensor]:
    """The polynomial through one, two or three points, the first at 0; with half the square."""
    (_, f0), *rest = known
    if not rest:
        return lambda tau: f0
    (one, f1), *rest = rest
    slope = (f0 - f1) / -one
    if not rest:
        return lambda tau: f0 + slope * tau
    two, f2 = rest[0]
    bend = (slope - (f1 - f2) / (one - two)) / -two
    return lambda tau: f0 + (slope - bend * one) * tau + bend * tau**2 / 2


def ode(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, sigmas, noise: run(x, sigmas, noise, eta=0.0)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "sample_euler": churned(euler_step),
    "sample_heun": churned(heun_step),
    "sample_dpm_2": churned(midpoint_step),
    "sample_euler_ancestral": ancestral(euler_step),
    "sample_dpm_2_ancestral": ancestral(midpoint_step),
    "sample_dpmpp_2s_ancestral": ancestral(singlestep),
    "sample_dpmpp_sde": sde,
    "sample_lms": adams,
    "sample_dpmpp_2m": ode(multistep(2, "midpoint")),
    "sample_dpmpp_2m_sde": multistep(2, "midpoint"),
    "sample_dpmpp_3m_sde": multistep(3, "heun"),
}
