"""Guided diffusion: a classifier of noised images steers a network that knows no classes

Dhariwal & Nichol 2021: the residual blocks are told of time and class by scale and shift of their norms (AdaGN); the
mean of each ancestral step moves by s Σ ∇ log p(y | x_t) (algorithm 1). The network is asked with its null label, so
that all it knows of classes comes from the classifier. The score's own classifier is another than the one that guides.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import IDDPM
from fastdiff.reproduce.studio import Studio
from fastdiff.reproduce.sweep import sweep
from fastdiff.training.run import Run

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = 50


def run(studio: Studio, page: Page) -> None:
    count = studio.effort.chain_count
    guide = fd.guidance.ClassifierGuidance(studio.train_classifier(seed=1).model)
    runs = studio.train_each(**IDDPM)
    y = studio.labels(count)
    drawn = {scale: [_guided(studio, run, guide, scale, y) for run in runs] for scale in SCALES}
    scores = {scale: [studio.score(samples, y) for samples in each] for scale, each in drawn.items()}
    sweep(page, "s", scores, 4.0, f"{count} samples by DDPM in {STEPS} steps")
    for scale in (SCALES[0], SCALES[-1]):
        page.figure(
            f"samples-{scale:g}.png",
            f"s = {scale:g}, a row for each class that was asked for",
            studio.grid,
            drawn[scale][0],
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
