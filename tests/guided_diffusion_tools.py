"""What tests of guided-diffusion's interface share: the process once more, in float64, from the papers."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sampler_tools import noise_of
from torch import Tensor

from fastdiff.adapters.guided_diffusion import SpacedDiffusion, create_gaussian_diffusion

F64 = torch.float64
SHAPE = (3, 2, 4)
VARIANCES = {"fixed_small": {"sigma_small": True}, "fixed_large": {}, "learned_range": {"learn_sigma": True}}
every_variance = pytest.mark.parametrize("variance", VARIANCES)


def randn(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spread(value: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(value).reshape(-1, *(1,) * (x.ndim - 1))


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, by the largest value where that is above 1."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / max(1.0, float(b.detach().abs().max())))


def betas_of(steps: int, noise_schedule: str) -> np.ndarray:
    if noise_schedule == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps)
    bar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)])


def chain_of(kept: list[int], steps: int = 1000, noise_schedule: str = "linear") -> SimpleNamespace:
    """Ho et al. 2020, eq. 4 and 7, of the kept timesteps: alpha-bar, that before, and the two variances."""
    bar = np.cumprod(1 - betas_of(steps, noise_schedule))[kept]
    before = np.append(1.0, bar[:-1])
    beta = 1 - bar / before
    small = beta * (1 - before) / (1 - bar)
    clipped = np.append(small[1:2], small[1:]) if len(bar) > 1 else beta
    return SimpleNamespace(bar=bar, before=before, beta=beta, small=small, clipped=clipped, kept=kept, n=len(kept))


def variance_of(chain: SimpleNamespace, i: int, name: str, raw: Tensor) -> Tensor:
    """The model's own variance at step i (Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, eq. 15)."""
    if name == "fixed_small":
        return torch.tensor(chain.small[i])
    if name == "fixed_large":
        return torch.tensor(chain.clipped[0] if i == 0 else chain.beta[i])
    v = (raw + 1) / 2
    return torch.exp(v * math.log(chain.beta[i]) + (1 - v) * math.log(chain.clipped[i]))


def plain_steps(chain: SimpleNamespace, model: Any, x: Tensor, how: SimpleNamespace) -> Any:
    """Ancestral steps (Ho et al. 2020, algorithm 2) or, where ``eta`` is a number, DDIM's (Song et al. 2021, eq. 12).

    Guided by a gradient as in Dhariwal & Nichol 2021, algorithms 1 and 2.
    """
    for row, i in enumerate(reversed(range(chain.n))):
        t = torch.full((len(x),), chain.kept[i])
        out = model(x, t)
        out, raw = out[:, : x.shape[1]], out[:, x.shape[1] :]
        bar, before = chain.bar[i], chain.before[i]
        x0 = out if how.prediction == "sample" else (x - math.sqrt(1 - bar) * out) / math.sqrt(bar)
        x0 = how.denoised_fn(x0) if how.denoised_fn else x0
        x0 = x0.clamp(-1, 1) if how.clip else x0
        gradient = how.cond_fn(x, t) if how.cond_fn else torch.zeros_like(x)
        z = noise_of(tuple(x.shape), row, seed=how.seed) if i else torch.zeros_like(x)
        if how.eta is None:
            mean = math.sqrt(before) * chain.beta[i] / (1 - bar) * x0
            mean = mean + math.sqrt(bar / before) * (1 - before) / (1 - bar) * x
            variance = variance_of(chain, i, how.variance, raw)
            x = mean + variance * gradient + variance.sqrt() * z
        else:
            epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar) - math.sqrt(1 - bar) * gradient
            x0 = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
            sigma = how.eta * math.sqrt((1 - before) / (1 - bar) * chain.beta[i])
            x = math.sqrt(before) * x0 + math.sqrt(max(1 - before - sigma**2, 0)) * epsilon + sigma * z
        yield x, x0


def network(prediction: str, variance: str) -> Any:
    """A network that is neither right nor constant, with variances outside of [-1, 1] too."""

    def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        out = 0.9 * x + 0.2 * torch.sin(3 * x) + 0.1 * torch.cos(spread(t.to(x.dtype), x) / 100)
        out = 0.6 * torch.sin(x) + 0.1 * out if prediction == "sample" else out
        out = out if y is None else out + spread(y.to(x.dtype), x)
        return torch.cat((out, 1.5 * torch.sin(2 * x)), 1) if variance == "learned_range" else out

    return model


def made(variance: str = "fixed_large", prediction: str = "epsilon", **flags: Any) -> SpacedDiffusion:
    return create_gaussian_diffusion(predict_xstart=prediction == "sample", **VARIANCES[variance], **flags)


def asked(eta: float | None = None, variance: str = "fixed_large", prediction: str = "epsilon", **more: Any) -> Any:
    given = {"clip": True, "seed": 5, "cond_fn": None, "denoised_fn": None, **more}
    return SimpleNamespace(eta=eta, variance=variance, prediction=prediction, **given)
