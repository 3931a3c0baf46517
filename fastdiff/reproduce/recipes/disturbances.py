"""Six disturbances: the Fréchet distance rises with each

Heusel et al. 2017, figure 3: Gaussian noise, Gaussian blur, black rectangles, swirl, salt and pepper, and images of
another set among the data, here the same digits mirrored and with black and white exchanged. One half of the data is
disturbed and compared with the other half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fastdiff as fd
from fastdiff import figures
from fastdiff.metrics.evaluation import FeatureSet
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.studio import Studio

LEVELS = (0.0, 0.25, 0.5, 0.75)


def gaussian_noise(x: Tensor, level: float, seed: int = 0) -> Tensor:
    return (1 - level) * x + level * fd.noise.normal(x.shape, seed=seed)


def gaussian_blur(x: Tensor, level: float, seed: int = 0) -> Tensor:
    """A deviation of a quarter of the side at level 1."""
    sigma = level * x.shape[-1] / 4
    if not sigma:
        return x
    reach = x.shape[-1] // 2
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.mT, groups=x.shape[1])


def black_rectangles(x: Tensor, level: float, seed: int = 0) -> Tensor:
    x, side = x.clone(), round(x.shape[-1] * level)
    places = _uniform((len(x), 2), seed) * (x.shape[-1] + 1 - side)
    for image, (top, left) in zip(x, places.long().tolist(), strict=True):
        image[:, top : top + side, left : left + side] = -1
    return x


def swirl(x: Tensor, level: float, seed: int = 0) -> Tensor:
    """Turned by an angle that falls with the distance from the middle."""
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *x.shape[2:]], align_corners=False)
    angle = 6 * level * torch.exp(-1.5 * grid.norm(dim=-1))
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((cos * grid[..., 0] - sin * grid[..., 1], sin * grid[..., 0] + cos * grid[..., 1]), -1)
    return F.grid_sample(x, turned.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)


def salt_and_pepper(x: Tensor, level: float, seed: int = 0) -> Tensor:
    u = _uniform(tuple(x.shape), seed)
    return torch.where(u < level / 2, -1.0, torch.where(u > 1 - level / 2, 1.0, x))


def contamination(x: Tensor, level: float, seed: int = 0) -> Tensor:
    other = (_uniform((len(x),), seed) < level)[:, None, None, None]
    return torch.where(other, -x.flip(3), x)


DISTURBANCES: tuple[Callable[..., Tensor], ...] = (
    *(gaussian_noise, gaussian_blur, black_rectangles),
    *(swirl, salt_and_pepper, contamination),
)


def run(studio: Studio, page: Page) -> None:
    x = studio.data.scale(studio.real)
    halves = [_divided(studio, x, seed) for seed in range(3 * studio.effort.seeds)]
    values = {
        disturb.__name__.replace("_", " "): [
            [
                studio.fid(studio.data.to_raw(disturb(half, level, seed)), other)
                for seed, (half, other) in enumerate(halves)
            ]
            for level in LEVELS
        ]
        for disturb in DISTURBANCES
    }
    page.figure(
        "fid.png",
        "FID by the level of disturbance, mean and 95 % interval over divisions of the data",
        plots.curves,
        {name: {name: levels} for name, levels in values.items()},
        LEVELS,
        "level",
    )
    page.table("FID", ["", *(f"level {level:g}" for level in LEVELS)], [[n, *v] for n, v in values.items()])
    for name, levels in values.items():
        rises = [min(b - a for a, b in itertools.pairwise(each)) for each in zip(*levels, strict=True)]
        page.claim(f"{name}: each level is farther away than the one before", rises, [0.0] * len(rises))
    shown = [(d.__name__.replace("_", " "), _shown(studio, x, d)) for d in DISTURBANCES]
    page.figure("images.png", "Two images at each level", figures.labelled_grid, shown, "disturbances")


def _divided(studio: Studio, x: Tensor, seed: int) -> tuple[Tensor, FeatureSet]:
    """One half of the data, and the features of the other."""
    half, other = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).chunk(2)
    return x[half], studio.features(studio.data.to_raw(x[other]))


def _shown(studio: Studio, x: Tensor, disturb: Callable[..., Tensor]) -> Tensor:
    return torch.cat([studio.data.to_raw(disturb(x[:2], level)) for level in LEVELS])


def _uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
