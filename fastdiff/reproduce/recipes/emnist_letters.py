"""Characters by class: one character on its way to noise and back

The plan of the 2-D tutorial's third part: a class-conditional U-Net for written characters (EMNIST's letters by
``--data emnist``), the corruption of one of them and its way back from noise, and what each class looks like.
"""

from __future__ import annotations

import torch

from fastdiff import figures
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import VELOCITY
from fastdiff.reproduce.studio import SCORES, Studio

SHOWN = 9


def run(studio: Studio, page: Page) -> None:
    runs = studio.train_each(**VELOCITY)
    drawn = [studio.sample(run, "dpmpp_2m", 20, seed=seed) for seed, run in enumerate(runs)]
    scores = [studio.score(samples) for samples in drawn]
    page.table(
        f"{len(drawn[0])} samples, DPM-Solver++ in 20 steps",
        ["", *SCORES],
        [["samples", *zip(*scores, strict=True)], ["all data", *studio.real_score]],
    )
    chance = [1 / len(studio.data.classes)] * len(runs)
    page.claim("Samples are read as asked for, beyond chance", [score.accuracy for score in scores], chance)
    page.figure("samples.png", "A row for each class", studio.grid, drawn[0])
    one = studio.data.batch(torch.tensor([len(studio.data) // 2]))[0]
    page.figure(
        "corruption.png",
        "The corruption of one character",
        figures.noising_strip,
        runs[0].diffusion,
        one,
        studio.data.to_raw,
        "forward",
    )
    frames = studio.frames(runs[0], "ddpm", 2000, count=len(studio.data.classes))
    strips = [frames[round(i * (len(frames) - 1) / SHOWN)] for i in range(SHOWN + 1)]
    rows = [(name, torch.stack([strip[y] for strip in strips])) for y, name in list(enumerate(studio.data.classes))[:4]]
    page.figure("denoising.png", "The way back", figures.labelled_grid, rows, "reverse")
    page.figure("denoising.gif", "One of each class", figures.animation, frames, columns=5)
