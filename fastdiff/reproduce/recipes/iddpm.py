"""Improved DDPM: learned variance, cosine schedule, hybrid loss

Nichol & Dhariwal 2021: the network also says the variance between β̃ and β, log Σ = v log β + (1 - v) log β̃, trained by
L_simple + λ L_vlb or by the bound alone. The bound of a network in fewer steps is that of its spaced schedule.
"""

from __future__ import annotations

from dataclasses import replace

from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import COSINE, IDDPM
from fastdiff.reproduce.studio import Studio
from fastdiff.training.run import Run

STEPS = (10, 25, 50, 100, 250, 1000)
BOUND = IDDPM | {"loss": "vlb", "timestep_sampler": "second_moment"}
#: by name: settings of training, and the variance, of which only the learned one is trained
KINDS = {
    "simple, Σ = β̃": (COSINE, "fixed_small"),
    "simple, Σ = β": (COSINE, "fixed_large"),
    "hybrid, learned": (IDDPM, "learned_range"),
    "vlb, learned": (BOUND, "learned_range"),
}


def run(studio: Studio, page: Page) -> None:
    steps = [n for n in STEPS if n <= studio.effort.timesteps] or [studio.effort.timesteps]
    runs = {name: networks(studio, name) for name in KINDS}
    bits = {name: [[_bits(studio, run, n) for run in each] for n in steps] for name, each in runs.items()}
    page.figure(
        "bits.png",
        "The bound on the likelihood by the number of steps, mean and 95 % interval over networks",
        plots.curves,
        {"bits per dimension": bits},
        steps,
        "steps",
        logx=True,
        logy=True,
    )
    page.table("Bits per dimension", ["", *map(str, steps)], [[name, *values] for name, values in bits.items()])
    few = len(steps) // 3
    simple, large, hybrid, bound = bits.values()
    best = [min(pair) for pair in zip(simple[few], large[few], strict=True)]
    page.claim(f"At {steps[few]} steps a learned variance has fewer bits than either fixed one", best, hybrid[few])
    best = [min(pair) for pair in zip(simple[-1], large[-1], strict=True)]
    page.claim("Over the whole chain hybrid has fewer bits than simple", best, hybrid[-1])
    page.claim("Over the whole chain the bound alone has fewer bits than hybrid", hybrid[-1], bound[-1])
    count = studio.effort.chain_count
    rows = [
        [name, *([studio.fid(studio.sample(run, "ddpm", n, count=count)) for run in each] for n in (10, 50))]
        for name, each in runs.items()
    ]
    page.table(f"FID of ancestral sampling, {count} samples", ["", "10 steps", "50 steps"], rows)


def networks(studio: Studio, name: str) -> list[Run]:
    """Those of one of KINDS."""
    settings, variance = KINDS[name]
    return [replace(run, diffusion=replace(run.diffusion, variance=variance)) for run in studio.train_each(**settings)]


def _bits(studio: Studio, run: Run, steps: int) -> float:
    x0, y = studio.some(64)
    diffusion = replace(run.diffusion, schedule=run.diffusion.schedule.spaced(steps, "leading"))
    return float(diffusion.bits_per_dim(run.model, x0, y=y).total.mean())
