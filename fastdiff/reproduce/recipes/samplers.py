"""Solvers: what a number of network evaluations is worth

All solvers on DDPM's networks, by the number of times that the network is asked: a step of Heun's asks twice. (On the
cosine schedule, whose ratio of noise to signal ends at 20,000 instead of 160, Heun, DPM2 and PNDM make nothing of so
few steps.) Networks of so little training seem to err alike at every step, which an ODE adds up and noise undoes:
solvers that follow the ODE well reach its samples in twenty evaluations, and those with noise end below them.
"""

from __future__ import annotations

import fastdiff as fd
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import DDPM
from fastdiff.reproduce.studio import Studio
from fastdiff.training.run import Run

BUDGETS = (5, 10, 20, 40)
SOLVERS = (
    *("ddpm", "ddim", "euler_a", "lcm", "heun", "edm", "dpm2", "dpmpp_2s", "dpmpp_sde"),
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_true", "unipc", "deis", "lms", "pndm"),
)


def run(studio: Studio, page: Page) -> None:
    runs = studio.train_each(**DDPM)
    values = {
        solver: [[_fid(studio, each, solver, n) for each in runs] for n in BUDGETS]
        for solver in SOLVERS
    }  # fmt: skip
    groups: dict[str, tuple[str, ...]] = {
        "of first order and by chance": ("ddpm", "ddim", "euler_a", "lcm", "edm", "dpmpp_sde", "dpmpp_2m_sde")
    }
    groups["of higher order"] = tuple(solver for solver in SOLVERS if solver not in groups[next(iter(groups))])
    for i, (name, solvers) in enumerate(groups.items()):
        lines = {solver: values[solver] for solver in solvers}
        page.figure(
            f"fid-{i}.png",
            f"Solvers {name}: FID by network evaluations, mean and 95 % interval over networks",
            plots.curves,
            {"FID": lines},
            BUDGETS,
            "network evaluations",
            logx=True,
            logy=True,
        )
    page.table("FID by network evaluations", ["", *map(str, BUDGETS)], [[n, *v] for n, v in values.items()])
    page.claim("More evaluations are better: DDPM, 40 against 5 (FID)", values["ddpm"][0], values["ddpm"][-1])
    page.claim("At 5 evaluations DPM-Solver++ 2M is better than DDPM (FID)", values["ddpm"][0], values["dpmpp_2m"][0])
    page.claim("At 10 evaluations DPM-Solver++ 2M is better than Heun (FID)", values["heun"][1], values["dpmpp_2m"][1])


def _fid(studio: Studio, run: Run, solver: str, budget: int) -> float:
    """With as many steps as ask the network at most ``budget`` times."""
    longest = min(budget, len(run.diffusion.schedule))

    def asked(steps: int) -> int:
        return len(fd.Sampler(run.model, run.diffusion, solver, steps).table)

    steps = next(n for n in range(longest, 0, -1) if asked(n) <= budget)
    return studio.fid(studio.sample(run, solver, steps, count=studio.effort.count // 2))
