"""Noise schedules: linear, sigmoid, cosine

Nichol & Dhariwal 2021, figures 3 and 4: on small images the linear schedule destroys too early what it should keep, and
its last steps do nothing. One network for each schedule, all else equal.
"""

from __future__ import annotations

from statistics import fmean

import torch

import fastdiff as fd
from fastdiff import figures
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import DDPM
from fastdiff.reproduce.studio import Studio

KINDS = ("linear", "sigmoid", "cosine")
STEPS = (5, 10, 20, 50)


def run(studio: Studio, page: Page) -> None:
    values: dict[str, list[list[list[float]]]] = {}
    for kind in KINDS:
        runs = studio.train_each(**DDPM | {"schedule": kind})
        scores = [[studio.score(studio.sample(r, "ddpm", n, variance="fixed_small")) for r in runs] for n in STEPS]
        values[kind] = [[[score[i] for score in each] for each in scores] for i in (0, 1)]
    panels = {name: {kind: values[kind][i] for kind in KINDS} for i, name in enumerate(("FID", "Inception Score"))}
    page.figure(
        "curves.png",
        "FID and Inception Score by the number of steps, mean and 95 % interval over networks",
        plots.curves,
        panels,
        STEPS,
        "steps",
        logx=True,
    )
    for name, lines in panels.items():
        page.table(name, ["", *map(str, STEPS)], [[kind, *each] for kind, each in lines.items()])
    fids = {kind: [fmean(each) for each in zip(*lines, strict=True)] for kind, lines in panels["FID"].items()}
    for better, worse in (("cosine", "linear"), ("cosine", "sigmoid"), ("sigmoid", "linear")):
        page.claim(f"{better} is better than {worse} (mean FID of the curve)", fids[worse], fids[better])
    length = studio.effort.timesteps
    schedules = {kind: getattr(fd.Schedule, kind)(length) for kind in KINDS}
    at = [i / max(1, length - 1) for i in range(length)]
    shares = {kind: [[value] for value in (schedule.alpha**2).tolist()] for kind, schedule in schedules.items()}
    page.figure("signal.png", "The signal's share of the variance, α²", plots.curves, {"α²": shares}, at, "t / T")
    one = studio.data.batch(torch.tensor([0, 1]))[0]
    for kind, schedule in schedules.items():
        page.figure(
            f"{kind}.png",
            f"{kind}: two images on their way to noise",
            figures.noising_strip,
            fd.Diffusion(schedule),
            one,
            studio.data.to_raw,
            kind,
        )
