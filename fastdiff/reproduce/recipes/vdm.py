"""Variational diffusion: the schedule is learned with the network

Kingma et al. 2021: a monotone network gives the log-SNR; its ends are trained by the bound, and what lies between by
the variance of the bound's estimate, for in continuous time the bound itself does not depend on it.
"""

from __future__ import annotations

import fastdiff as fd
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import COSINE
from fastdiff.reproduce.studio import Studio

LEARNED = {"schedule": "learned", "prediction": "epsilon", "loss": "vlb"}
FIXED = COSINE | {"loss": "vlb", "variance": "fixed_small"}


def run(studio: Studio, page: Page) -> None:
    learned = studio.train_each(**LEARNED)
    fixed = studio.train_each(**FIXED)
    x0, y = studio.some(64)
    bits = [
        [float(run.diffusion.bits_per_dim(run.model, x0, y=y).total.mean()) for run in runs]
        for runs in (learned, fixed)
    ]
    fids = [[studio.fid(studio.sample(run, "ddim", 50)) for run in runs] for runs in (learned, fixed)]
    page.table(
        "The bound over the whole chain, and samples by DDIM in 50 steps",
        ["", "bits per dimension", "FID"],
        [["learned schedule", bits[0], fids[0]], ["cosine schedule", bits[1], fids[1]]],
    )
    page.claim("A learned schedule has fewer bits than the cosine", bits[1], bits[0])
    length = len(learned[0].diffusion.schedule)
    at = [i / max(1, length - 1) for i in range(length)]
    kinds = {"cosine": fd.Schedule.cosine(length), "linear": fd.Schedule.linear(length)}
    levels = {"learned": list(zip(*(run.diffusion.schedule.log_snr.tolist() for run in learned), strict=True))}
    levels |= {name: [(value,) for value in schedule.log_snr.tolist()] for name, schedule in kinds.items()}
    page.figure(
        "schedule.png",
        "log-SNR over time: learned (mean and 95 % interval over networks), cosine and linear",
        plots.curves,
        {"log-SNR": levels},
        at,
        "t / T",
    )
    page.figure("samples.png", "Samples", studio.grid, studio.sample(learned[0], "ddim", 50))
