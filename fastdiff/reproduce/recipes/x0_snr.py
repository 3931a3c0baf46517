"""Predicting x0, weighted by the difference of SNRs, on a parabola, moons and circles

The 2-D tutorial: T = 200, a network that predicts the original point, the weight (SNR(t-1) - SNR(t)) / 2 of the bound
(Kingma et al. 2021, eq. 15), and sampling that takes several steps at once. What a network should say is known: the
mean of all data points by their likelihood, exp(-|x_t - α x0|² / 2σ²). (The cosine schedule: betas from 1e-4 to 0.02
leave a seventh of the signal's power after 200 steps.)
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.metrics import energy_distance
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.studio import Studio
from fastdiff.training.data import load, points
from fastdiff.training.run import Run

SETS = ("parabola", "moons-circles")
SETTINGS = {"schedule": "cosine", "prediction": "sample", "loss": "snr_sample", "timesteps": 200}
STEPS = (5, 10, 20, 50, 200)
TIMES = (0, 25, 50, 100, 150, 199)


def run(studio: Studio, page: Page) -> None:
    count = studio.effort.points
    for name in SETS:
        runs = studio.train_each(name, **SETTINGS)
        fresh = points(name, count, 1)
        between = [energy_distance(points(name, count, 2 + seed), fresh) for seed in studio.seeds]
        drawn = {n: [studio.sample(r, "ddpm", n, count=count, seed=i) for i, r in enumerate(runs)] for n in STEPS}
        distances = [[energy_distance(samples, fresh) for samples in drawn[n]] for n in STEPS]
        rows = [[f"{n} steps", values] for n, values in zip(STEPS, distances, strict=True)]
        page.table(f"{name}: energy distance to data", ["", "distance"], [*rows, ["another draw of the data", between]])
        page.claim(f"{name}: 200 steps are nearer to the data than 5", distances[0], distances[-1])
        page.figure(
            f"{name}.png",
            f"{name}: data, and samples in 200, 20 and 5 steps",
            plots.scatters,
            {"data": fresh, **{f"{n} steps": drawn[n][0] for n in (200, 20, 5)}},
        )
        _against_exact(page, name, runs)
        recorder = fd.Recorder(every=5)
        fd.Sampler(runs[0].model, runs[0].diffusion, "ddpm", 200)((count, 2), seed=0, record=recorder)
        way = [runs[0].data.to_raw(x) for x in recorder.values]
        page.figure(f"{name}.gif", f"{name} on its way", plots.point_animation, way)


def _against_exact(page: Page, name: str, runs: list[Run]) -> None:
    of_all = runs[0].data.scale(load(name).raw(torch.arange(20_000))[0])
    fresh, noise = runs[0].data.scale(points(name, 500, 9)), fd.noise.normal((500, 2), seed=5)
    levels = runs[0].diffusion.schedule
    errors, blind = [], []
    for t in TIMES:
        alpha, sigma = float(levels.alpha[t]), float(levels.sigma[t])
        x_t = alpha * fresh + sigma * noise
        exact = exact_x0(of_all, x_t, alpha, sigma)
        errors.append([_rms(_said(run, x_t, t) - exact) for run in runs])
        blind.append([_rms(exact)] * len(runs))
    page.figure(
        f"{name}-exact.png",
        f"{name}: root mean square difference of the network's x0 from the exact one, and of the data's mean from it",
        plots.curves,
        {"difference": {"network": errors, "mean of the data": blind}},
        TIMES,
        "t",
    )
    page.claim(f"{name}: at t = 50 the network is nearer to the exact x0 than the data's mean", blind[2], errors[2])


@torch.no_grad()
def _said(run: Run, x_t: Tensor, t: int) -> Tensor:
    said: Tensor = run.model(x_t, torch.full((len(x_t),), t))
    return said


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def exact_x0(data: Tensor, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x0 | x_t] where x0 is one of the points ``data`` ``[M, D]``, for ``x_t`` ``[N, D]``, in float64."""
    data, x_t = data.double(), x_t.double()
    log_weights = -((x_t[:, None] - alpha * data) ** 2).sum(2) / (2 * sigma**2)
    return log_weights.softmax(1) @ data
