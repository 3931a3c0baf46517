"""Classifier-free guidance: the conditional network against itself without a condition

Ho & Salimans 2022: one network, trained with a tenth of its labels dropped, sampled along (1 + w) ε(x, y) - w ε(x). The
paper's w = 0 is the conditional network alone, and guidance_scale = 1 + w. Algorithm 2's ancestral variance lies
between β̃ and β, here with exponent v = 0.3.
"""

from __future__ import annotations

from fastdiff import figures
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import IDDPM
from fastdiff.reproduce.studio import Studio
from fastdiff.reproduce.sweep import sweep

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
SHOWN = (0.0, 0.5, 2.0)  # those of the slides


def run(studio: Studio, page: Page) -> None:
    runs = studio.train_each(**IDDPM)
    drawn = {w: [studio.sample(each, "ddim", 50, guidance_scale=1 + w) for each in runs] for w in WEIGHTS}
    scores = {w: [studio.score(samples) for samples in each] for w, each in drawn.items()}
    ancestral = [studio.score(studio.sample(run, "ddpm", 50, guidance_scale=1.5, variance=0.3)) for run in runs]
    what = f"{studio.effort.count} samples by DDIM in 50 steps"
    sweep(page, "w", scores, 2.0, what, [("w = 0.5, ancestral, v = 0.3", ancestral)])
    for w in SHOWN:
        page.figure(f"samples-{w:g}.png", f"w = {w:g}", studio.grid, drawn[w][0])
        frames = studio.frames(runs[0], "ddim", 50, guidance_scale=1 + w)
        page.figure(f"denoising-{w:g}.gif", f"w = {w:g}, on the way", figures.animation, frames)
