"""Classifier-free guidance: the conditional network against itself without a condition

Ho & Salimans 2022: one network, trained with a tenth of its labels dropped, sampled along (1 + w) ε(x, y) - w ε(x). The
paper's w = 0 is the conditional network alone, and guidance_scale = 1 + w. Algorithm 2's ancestral variance lies
between β̃ and β, here with exponent v = 0.3.
"""

from __future__ import annotations

from fastdiff import figures
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import IDDPM
from fastdiff.reproduce.studio import Score, Studio

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
SHOWN = (0.0, 0.5, 2.0)  # those of the slides


def run(studio: Studio, page: Page) -> None:
    runs = [studio.train(**IDDPM, seed=seed) for seed in studio.seeds]
    drawn = {w: [studio.sample(each, "ddim", 50, guidance_scale=1 + w) for each in runs] for w in WEIGHTS}
    scores = [[studio.score(samples) for samples in drawn[w]] for w in WEIGHTS]
    values = {name: [[score[i] for score in each] for each in scores] for i, name in enumerate(Score._fields)}
    page.figure(
        "sweep.png",
        "The sweep over w: DDIM in 50 steps, mean and 95 % interval over networks",
        plots.curves,
        {name: {name: each} for name, each in values.items()},
        WEIGHTS,
        "w",
    )
    rows = [[f"w = {w:g}", *(values[name][i] for name in values)] for i, w in enumerate(WEIGHTS)]
    ancestral = [studio.sample(each, "ddpm", 50, guidance_scale=1.5, variance=0.3) for each in runs]
    rows.append(["w = 0.5, ancestral, v = 0.3", *zip(*(studio.score(x) for x in ancestral), strict=True)])
    page.table(f"{studio.effort.count} samples", ["", *values], rows)
    accuracy, diversity = values["accuracy"], values["diversity"]
    page.claim("w = 2 raises the share that is read as asked for", accuracy[4], accuracy[0])
    page.claim("w = 2 lowers the diversity within a class", diversity[0], diversity[4])
    for w in SHOWN:
        page.figure(f"samples-{w:g}.png", f"w = {w:g}", studio.grid, drawn[w][0])
        frames = studio.frames(runs[0], "ddim", 50, guidance_scale=1 + w)
        page.figure(f"denoising-{w:g}.gif", f"w = {w:g}, on the way", figures.animation, frames)
