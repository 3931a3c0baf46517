"""How many steps: T = 500, 1000, 2000, and what each step adds

The slides' figures: FID and Inception Score of the state x_t, and of the estimate x0 in it, along the whole chain; and
the terms of the bound by timestep. Betas go from 1e-4 to 0.02 whatever T is, as in the slides: at T = 500 a hundred and
fiftieth of the signal's power is left at the end, which a run that begins with noise alone does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import fastdiff as fd
from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import DDPM
from fastdiff.reproduce.studio import Studio
from fastdiff.training.run import Run

PLACES = 9  # along a chain
CHAINS = 3  # networks whose chains are walked, which takes minutes for each


def run(studio: Studio, page: Page) -> None:
    lengths = [studio.effort.timesteps // 2, studio.effort.timesteps, studio.effort.timesteps * 2]
    panels: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    bounds = {}
    for length in lengths:
        runs = studio.train_each(**DDPM, timesteps=length)[:CHAINS]
        along = [_along(studio, each) for each in runs]
        for name in along[0]:
            panel = panels.setdefault(name, {})
            panel[f"T = {length}"] = list(zip(*(each[name] for each in along), strict=True))
        bounds[f"T = {length}"] = [_terms(studio, each) for each in runs]
    shares = [i / (PLACES - 1) for i in range(PLACES)]
    for what in ("x", "x0"):
        chosen = {name: lines for name, lines in panels.items() if name.endswith(f" {what}")}
        page.figure(
            f"along-{what}.png",
            f"Of {what} along the chain, mean and 95 % interval over networks",
            plots.curves,
            chosen,
            shares,
            "share of the steps",
        )
    page.figure(
        "bound.png",
        "Terms of the bound in bits per dimension times T, by timestep",
        plots.curves,
        {"bits per dimension x T": _by_tenth(bounds)},
        _tenths(),
        "t / T",
        logy=True,
    )
    ends = {name: lines[-1] for name, lines in panels["FID of x"].items()}
    totals = {name: [sum(terms) for terms in each] for name, each in bounds.items()}
    page.table(
        "The whole chain",
        ["", "FID", "IS", "bound without prior, bits per dimension"],
        [[name, ends[name], panels["IS of x"][name][-1], totals[name]] for name in ends],
    )
    first, *_, last = ends.values()
    page.claim(f"T = {lengths[-1]} is better than T = {lengths[0]} (FID)", first, last)
    counts = list(totals.values())
    page.claim(f"T = {lengths[-1]} has fewer bits than T = {lengths[0]}", counts[0], counts[-1])
    for name, line in panels["FID of x"].items():
        late, early = _gains(line, 0.5)
        page.claim(f"{name}: the last half of the steps gains more FID than the first", late, early)
        late, early = _gains(line, 0.75)
        page.claim(f"{name}: the last quarter gains more than the first three together", late, early)


def _gains(line: Sequence[Sequence[float]], share: float) -> list[list[float]]:
    """By how much FID falls after and before a share of the chain, for each network."""
    begin, middle, end = (line[round(at * (PLACES - 1))] for at in (0, share, 1))
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in ((middle, end), (begin, middle))]


def _along(studio: Studio, run: Run) -> dict[str, list[float]]:
    """FID and Inception Score of x and x0 at PLACES of the whole chain, the first after one step."""
    count = studio.effort.chain_count // 4
    sampler = fd.Sampler(run.model, run.diffusion, "ddpm", len(run.diffusion.schedule), clip=1.0)
    last = len(sampler.table) - 1
    wanted = {round(i * last / (PLACES - 1)) for i in range(PLACES)}
    y = studio.labels(count).to(studio.device)
    found: dict[str, list[float]] = {f"{metric} of {what}": [] for what in ("x", "x0") for metric in ("FID", "IS")}
    for state in sampler.iterate((count, *studio.data.shape), seed=0, y=y):
        for what in ("x", "x0") if state.step in wanted else ():
            score = studio.metrics(studio.data.to_raw(getattr(state, what)).cpu(), "fid", "is")
            found[f"FID of {what}"].append(score["fid"])
            found[f"IS of {what}"].append(score["is"])
    return found


def _terms(studio: Studio, run: Run) -> list[float]:
    """Mean terms by timestep."""
    x0, y = studio.some(min(16, studio.effort.chain_count))
    curve: list[float] = run.diffusion.bits_per_dim(run.model, x0, y=y).curve.tolist()
    return curve


def _tenths() -> list[float]:
    return [(i + 0.5) / 10 for i in range(10)]


def _by_tenth(bounds: dict[str, list[list[float]]]) -> plots.Lines:
    """Means over tenths of the timesteps, times T, so that lengths can be compared."""
    return {name: [[_part(terms, i) for terms in each] for i in range(10)] for name, each in bounds.items()}


def _part(terms: Sequence[float], i: int) -> float:
    part = terms[i * len(terms) // 10 : (i + 1) * len(terms) // 10]
    return sum(part) / len(part) * len(terms)
