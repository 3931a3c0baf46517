"""DDPM: a U-Net that predicts the noise, and a thousand steps back

Ho, Jain & Abbeel 2020: linear betas, the simple loss, Σ = β, algorithm 2 over the whole chain.
"""

from __future__ import annotations

import torch

import fastdiff as fd
from fastdiff import figures
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import DDPM
from fastdiff.reproduce.studio import SCORES, Studio


def run(studio: Studio, page: Page) -> None:
    count = studio.effort.chain_count
    runs = studio.train_each(**DDPM)
    samples = [studio.sample(run, "ddpm", 2000, count=count, seed=seed) for seed, run in enumerate(runs)]
    scores = [studio.score(each) for each in samples]
    page.table(
        f"{count} samples of the whole chain; FID and IS by features of a classifier of the data",
        ["", *SCORES],
        [["DDPM", *zip(*scores, strict=True)], ["all data", *studio.real_score]],
    )
    noise = [studio.fid(_noise(studio, count, seed)) for seed in studio.seeds]
    page.claim("Samples are nearer to the data than noise is (FID)", noise, [score.fid for score in scores])
    page.figure("samples.png", "Samples, a row for each class", studio.grid, samples[0])
    page.figure(
        "denoising.gif",
        "Ancestral sampling, every state of which 40 are shown",
        figures.animation,
        studio.frames(runs[0], "ddpm", 2000),
    )
    few = studio.data.batch(torch.arange(6))[0]
    page.figure(
        "forward.png",
        "The forward process with linear betas",
        figures.noising_strip,
        runs[0].diffusion,
        few,
        studio.data.to_raw,
        "q(x_t | x_0)",
    )


def _noise(studio: Studio, count: int, seed: int) -> torch.Tensor:
    return studio.data.to_raw(fd.noise.normal((count, *studio.data.shape), seed=seed))
