"""Exact denoisers to test against: E[x0 | alpha x0 + sigma noise = x] in float64, and models made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastdiff as fd

Level = Tensor | float


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians: ``weights`` [K] that sum to 1, ``means`` [K, d], ``stds`` [K]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def random(cls, dim: int, components: int = 3, seed: int = 0) -> Mixture:
        """A mixture on the scale of 1, the same for the same arguments."""
        generator = torch.Generator().manual_seed(seed)
        weights, stds = (torch.rand(components, generator=generator, dtype=torch.float64) for _ in range(2))
        means = torch.randn(components, dim, generator=generator, dtype=torch.float64)
        return cls((weights + 0.5) / (weights + 0.5).sum(), means, 0.3 + 0.3 * stds)

    def denoise(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """x ``[N, d]``, levels numbers or ``[N, 1]``: posterior means of the components by their posterior weights."""
        alpha, sigma = (torch.as_tensor(level, dtype=torch.float64) for level in (alpha, sigma))
        variance = (alpha * self.stds) ** 2 + sigma**2
        offset = x[:, None] - alpha[..., None] * self.means
        log_weight = self.weights.log() - offset.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log()
        gain = alpha * self.stds**2 / variance
        return (log_weight.softmax(-1)[..., None] * (self.means + gain[..., None] * offset)).sum(1)

    def cdf(self, x: Tensor, axis: int) -> Tensor:
        """The cumulative distribution of coordinate ``axis`` at the points ``x`` ``[N]``."""
        return (self.weights * torch.special.ndtr((x[:, None] - self.means[:, axis]) / self.stds)).sum(1)


@dataclass(frozen=True)
class Gaussian:
    """Independent N(mean, std**2) for every element of x, of any shape; ``std`` 0 is a point."""

    mean: float
    std: float

    def affine(self, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        """gain, offset of the denoiser gain * x + offset."""
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        return gain, self.mean * (1 - alpha * gain)

    def denoise(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        gain, offset = self.affine(alpha, sigma)
        return gain * x + offset

    def moments(self, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        """Mean and variance of alpha x0 + sigma noise."""
        return alpha * self.mean, (alpha * self.std) ** 2 + sigma**2


def predict(prediction: str, x: Tensor, x0: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """What a network of this prediction type gives that takes x0 for the data behind x."""
    noise = (x - alpha * x0) / sigma
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return (alpha * noise - sigma * x0) / (alpha**2 + sigma**2) ** 0.5
    return noise - x0


def model_of(data: Mixture | Gaussian, diffusion: fd.Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact model of ``data`` under a diffusion, called as samplers call networks: ``model(c_in x, c_noise)``."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 1))
        alpha, sigma, c_in = (level.reshape(shape) for level in levels_at(diffusion.schedule, t.double()))
        x = x.double() / c_in
        return predict(diffusion.prediction, x, data.denoise(x, alpha, sigma), alpha, sigma)

    return model


def levels_at(schedule: fd.Schedule, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and c_in behind what a network is told.

    Networks of EDM are told ln(sigma) / 4, those of flow 1000 sigma; others t, between whose whole numbers
    log(sigma / alpha) is linear, or sigma for flow.
    """
    name = schedule.config["name"]
    if name == "edm":
        sigma = torch.exp(4 * told)
        return torch.ones_like(sigma), sigma, (sigma**2 + schedule.config["sigma_data"] ** 2).rsqrt()
    if name == "flow" and "n" in schedule.config:
        return 1 - told / 1000, told / 1000, torch.ones_like(told)
    low, part = told.long(), told - told.long()
    high = (low + 1).clamp(max=len(schedule) - 1)
    ratio = (schedule.sigma / schedule.alpha)[low] ** (1 - part) * (schedule.sigma / schedule.alpha)[high] ** part
    alpha = torch.ones_like(ratio) if bool((schedule.alpha == 1).all()) else (1 + ratio**2).rsqrt()
    sigma = alpha * ratio
    if name == "flow":
        sigma = (1 - part) * schedule.sigma[low] + part * schedule.sigma[high]
        alpha = 1 - sigma
    whole = part == 0
    return torch.where(whole, schedule.alpha[low], alpha), torch.where(whole, schedule.sigma[low], sigma), 1 + 0 * told


def levels_schedule(alpha: Tensor, sigma: Tensor, name: str = "levels") -> fd.Schedule:
    """A schedule of exactly these levels, noisiest first as a run visits them; ``name`` "flow" marks rectified flow."""
    alpha, sigma = alpha.flip(0), sigma.flip(0)
    return fd.Schedule(alpha, sigma, torch.ones_like(alpha), torch.arange(len(alpha)), {"name": name})


def philox_integers(counter, key):
    """Philox4x32-10 of Salmon et al. 2011 on Python's unbounded integers."""
    x = list(counter)
    k = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


PHILOX_ANSWERS = [  # Random123's known answers: counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]
