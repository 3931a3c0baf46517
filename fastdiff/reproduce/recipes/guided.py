"""Guided diffusion: a classifier of noised images steers a network that knows no classes

Dhariwal & Nichol 2021: the residual blocks are told of time and class by scale and shift of their norms (AdaGN); the
mean of each ancestral step moves by s Σ ∇ log p(y | x_t) (algorithm 1). The network is asked with its null label, so
that all it knows of classes comes from the classifier. The score's own classifier is another than the one that guides.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import IDDPM
from fastdiff.reproduce.studio import Score, Studio
from fastdiff.training.run import Run

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = 50


def run(studio: Studio, page: Page) -> None:
    count = studio.effort.chain_count
    guide = fd.guidance.ClassifierGuidance(studio.train_classifier(seed=1).model)
    runs = [studio.train(**IDDPM, seed=seed) for seed in studio.seeds]
    y = studio.labels(count)
    drawn = [[_guided(studio, each, guide, scale, y) for each in runs] for scale in SCALES]
    scores = [[studio.score(samples, y) for samples in each] for each in drawn]
    values = {name: [[score[i] for score in each] for each in scores] for i, name in enumerate(Score._fields)}
    page.figure(
        "scale.png",
        "More guidance: more of what was asked for, less variety (mean and 95 % interval over networks)",
        plots.curves,
        {name: {name: each} for name, each in values.items()},
        SCALES,
        "scale s",
    )
    rows = [[f"s = {scale:g}", *(values[name][i] for name in values)] for i, scale in enumerate(SCALES)]
    page.table(f"{count} samples, DDPM in {STEPS} steps", ["", *values], rows)
    accuracy, diversity = values["accuracy"], values["diversity"]
    page.claim("Guidance by s = 4 raises the share that is read as asked for", accuracy[3], accuracy[0])
    page.claim("Guidance by s = 4 lowers the diversity within a class", diversity[0], diversity[3])
    for i, scale in enumerate(SCALES[::4]):
        page.figure(
            f"samples-{scale:g}.png",
            f"s = {scale:g}, a row for each class that was asked for",
            studio.grid,
            drawn[4 * i][0],
        )


def _guided(studio: Studio, run: Run, guide: fd.guidance.Guidance, scale: float, y: Tensor) -> Tensor:
    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        null = torch.full((len(x),), len(studio.data.classes), device=x.device)
        output: Tensor = run.model(x, t, y=null)
        return output

    steps = min(STEPS, len(run.diffusion.schedule))
    sampler = fd.Sampler(
        *(unconditional, run.diffusion, "ddpm", steps),
        guidance=guide,
        guidance_scale=scale,
        clip=1.0,
        device=studio.device,
    )
    return studio.data.to_raw(sampler((len(y), *studio.data.shape), seed=0, y=y.to(studio.device))).cpu()
