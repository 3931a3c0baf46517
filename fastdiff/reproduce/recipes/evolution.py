"""The evolution of the score: four configurations

The slides' last figure: DDPM, improved DDPM, improved DDPM sampled by DDIM, and all of it with classifier-free
guidance, by Inception Score and FID, at 50 steps each, the first of them also over its whole chain.
"""

from __future__ import annotations

from typing import Any

from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import DDPM, IDDPM
from fastdiff.reproduce.studio import SCORES, Score, Studio

#: network, solver, further settings of the sampler
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "DDPM": (DDPM, "ddpm", {}),
    "IDDPM": (IDDPM, "ddpm", {}),
    "IDDPM + DDIM": (IDDPM, "ddim", {}),
    "IDDPM + DDIM + guidance": (IDDPM, "ddim", {"guidance_scale": 1.5}),
}


def run(studio: Studio, page: Page) -> None:
    scores: dict[str, list[Score]] = {}
    for name, (settings, solver, options) in CONFIGURATIONS.items():
        runs = studio.train_each(**settings)
        drawn = [studio.sample(run, solver, 50, seed=seed, **options) for seed, run in enumerate(runs)]
        scores[name] = [studio.score(samples) for samples in drawn]
        page.figure(f"{len(scores)}.png", name, studio.grid, drawn[0])
    columns = {name: list(zip(*each, strict=True)) for name, each in scores.items()}
    panels = {"Inception Score": {n: c[1] for n, c in columns.items()}, "FID": {n: c[0] for n, c in columns.items()}}
    page.figure("bars.png", "50 steps each, mean and 95 % interval", plots.bars, panels)
    rows = [[name, *values] for name, values in columns.items()]
    page.table(f"{studio.effort.count} samples in 50 steps", ["", *SCORES], rows)
    first, *_, last = columns.values()
    page.claim("The last has a higher Inception Score than the first", last[1], first[1])
    page.claim("The last has a lower FID than the first", first[0], last[0])
