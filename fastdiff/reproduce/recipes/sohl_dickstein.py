"""Diffusion in 2015: a swiss roll, an MLP for mean and variance, the whole bound

Sohl-Dickstein et al. 2015, figure 1: points of a swiss roll are noised until nothing of it is left, and a network that
says mean and variance of each step back is trained on all terms of the variational bound. Above data on their way to
noise, below noise on its way to samples.
"""

from __future__ import annotations

from torch import Tensor

import fastdiff as fd
from fastdiff import figures
from fastdiff.metrics import energy_distance
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.studio import Studio
from fastdiff.training.data import points
from fastdiff.training.run import Run

SETTINGS = {"schedule": "cosine", "prediction": "v_prediction", "variance": "learned_range", "loss": "vlb"}


def run(studio: Studio, page: Page) -> None:
    count = studio.effort.points
    runs = studio.train_each("swiss-roll", timesteps=100, **SETTINGS)
    fresh = points("swiss-roll", count, 1)
    distances, bounds = [], []
    for seed, each in enumerate(runs):
        samples = studio.sample(each, "ddpm", 100, count=count, seed=seed)
        distances.append(energy_distance(samples, fresh))
        x0 = each.data.scale(fresh[:500])
        bounds.append(float(each.diffusion.bits_per_dim(each.model, x0, decoder="gaussian").total.mean()))
    between = [energy_distance(points("swiss-roll", count, 2 + seed), fresh) for seed in studio.seeds]
    page.table(
        f"{count} samples against data of another seed",
        ["", "energy distance", "bound, bits per dimension"],
        [["samples", distances, bounds], ["another draw of the data", between, None]],
    )
    noise = [energy_distance(_gaussian(runs[0], count, seed), fresh) for seed in studio.seeds]
    page.claim("Samples are nearer to the swiss roll than noise of its mean and variance", noise, distances)
    first, frames = runs[0], fd.Recorder(every=5)
    sampler = fd.Sampler(first.model, first.diffusion, "ddpm", 100)
    sampler((count, 2), seed=0, record=frames)
    way = [first.data.to_raw(x) for x in frames.values]
    data = first.data.scale(fresh)
    page.figure(
        "trajectories.png",
        "Forward (above, from left to right more noise) and reverse (below, from right to left less)",
        figures.point_trajectories,
        first.diffusion,
        data,
        first.data.to_raw,
        [way[i] for i in (0, 4, 9, 14, 19)],
    )
    page.figure("denoising.gif", f"{count} points on their way back", plots.point_animation, way)


def _gaussian(run: Run, count: int, seed: int) -> Tensor:
    return run.data.to_raw(fd.noise.normal((count, 2), seed=seed))
