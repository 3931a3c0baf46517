"""Faults of timesteps, by the number of sampling steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fastdiff.adapters.doctor.description import Description
from fastdiff.adapters.doctor.facts import SIGMAS
from fastdiff.adapters.doctor.finding import FAULT, WARNING, Finding
from fastdiff.adapters.doctor.noise_levels import VISIBLE, amount, tolerated

Timesteps = NDArray[np.float64]


def where(d: Description, bad: list[int]) -> str:
    """For which step counts."""
    if d.steps is not None:
        return f"with {d.steps} steps"
    some = ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5)
    return f"for {len(bad)} of {len(d.counts)} step counts ({some})"


def severity(d: Description, bad: list[int]) -> str:
    """A fault if it is the number that was asked for, or one in a hundred."""
    return FAULT if bad and (d.steps is not None or 100 * len(bad) >= len(d.counts)) else WARNING


def start(d: Description) -> Iterator[Finding]:
    """Sampling that begins below T - 1, where the network expects more of the image than noise holds."""
    share = {n: _expected(d, t) for n, t in d.timesteps.items() if n > 1 or d.steps == 1}
    bad = [n for n in share if share[n] > tolerated(d)]
    if not bad:
        return
    worst = max(bad, key=lambda n: share[n])
    first, spacing = d.timesteps[worst][0], d.values.get("timestep_spacing", "linspace")
    at = f"at t = {first:.0f}" + f" with {worst}" * (d.steps is None)
    problem = f"{spacing} spacing begins below t = {d.total - 1} {where(d, bad)}, {at}"
    cost = f"{share[worst]:.2%} of the image is expected there, {amount(d, share[worst])}, and noise holds none"
    level = severity(d, [n for n in bad if share[n] >= VISIBLE])
    changes = d.named({"timestep_spacing": "trailing"})
    yield Finding("start", level, problem, cost, changes, note="" if d.ours else "with steps that divide T")


def _expected(d: Description, t: Timesteps) -> float:
    """The share of the image at the first timestep, if that is below T - 1."""
    first = int(np.ceil(t[0]))
    return float(d.signal[max(first, 0)]) if first < d.total - 1 else 0.0


def stride(d: Description) -> Iterator[Finding]:
    """A previous timestep t - T // N that is not the next one in the list."""
    bad = d.bad_counts(lambda n, t: d.facts.fixed_stride and wrong_strides(d, n) > 0)
    if not bad:
        return
    worst = max(bad, key=lambda n: (noise_left(d, n), _gap(d, n)))
    spacing = d.values["timestep_spacing"]
    problem = f"each step leads to t - {d.total} // N, whatever {spacing} spacing has next: wrong {where(d, bad)}"
    left = f"; noise of std {noise_left(d, worst):.2g} is left in the image" if noise_left(d, worst) else ""
    cost = f"{wrong_strides(d, worst)} of {worst} strides with {worst} steps, by up to {_gap(d, worst)} timesteps{left}"
    changes = {"steps_offset": 0} if spacing == "leading" else {"timestep_spacing": "leading"}
    divides = "; trailing is right where N divides T" * (spacing == "trailing")
    yield Finding("stride", severity(d, bad), problem, cost, changes, note=d.drop_in + divides)


def wrong_strides(d: Description, n: int) -> int:
    """How many steps lead elsewhere than to the next timestep, or the last one elsewhere than to the clean end."""
    t, reached = d.timesteps[n], d.timesteps[n] - d.total // n
    clean = bool(d.values["set_alpha_to_one"]) or reached[-1] > 0  # otherwise t = 0 is where it is meant to end
    return int((reached[:-1] != t[1:]).sum()) + int(reached[-1] >= 0 and clean)


def noise_left(d: Description, n: int) -> float:
    """The standard deviation of the noise where the last step leads."""
    end = int(d.timesteps[n][-1]) - d.total // n
    return float(np.sqrt(1 - d.alpha_bar[end])) if end >= 0 else 0.0


def _gap(d: Description, n: int) -> int:
    return int(np.abs(d.timesteps[n][:-1] - d.total // n - d.timesteps[n][1:]).max(initial=0))


def one_too_many(d: Description) -> Iterator[Finding]:
    """Trailing spacing by repeated subtraction, whose rounding adds a timestep -1."""
    bad = d.bad_counts(lambda n, t: len(t) > n)
    if not bad:
        return
    divisor = next(n for n in range(bad[0], 0, -1) if d.total % n == 0)
    problem = f"trailing spacing makes N + 1 timesteps, the last of them -1, {where(d, bad)}"
    cost = "one evaluation more, at a timestep that no network has seen"
    cost += f", with the noisiest alpha-bar, {d.alpha_bar[-1]:.3g}, at the clean end" if _indexes(d) else ""
    note = f"num_inference_steps={divisor}, or another divisor of {d.total}, {d.drop_in}".rstrip(", ")
    yield Finding("one_too_many", severity(d, bad), problem, cost, note=note)


def _indexes(d: Description) -> bool:
    """Whether it looks alpha-bar up by the timestep."""
    return d.facts.points == "closed" and d.facts.casts


def out_of_range(d: Description) -> Iterator[Finding]:
    """``leading`` with an offset that leads past the last timestep."""
    bad = d.bad_counts(lambda n, t: t[0] > d.total - 1)
    if bad:
        most = max(d.timesteps[n][0] for n in bad)
        problem = f"leading spacing with steps_offset {d.values['steps_offset']} reaches t = {most:.0f} {where(d, bad)}"
        raises = "IndexError" if _indexes(d) else "the network is asked for what it has not seen"
        cost = f"the last timestep is {d.total - 1}: {raises}"
        yield Finding("out_of_range", severity(d, bad), problem, cost, {"steps_offset": 0})


def duplicates(d: Description) -> Iterator[Finding]:
    """Timesteps that come twice."""
    bad = d.bad_counts(lambda n, t: d.facts.whole and repeats(t) > 0)
    if not bad:
        return
    past = [n for n in bad if d.facts.looks_up and d.timesteps[n][0] == d.timesteps[n][1]]
    flat = [n for n in bad if d.facts.multistep and d.sigma_way is None and n not in past]
    most = max(bad, key=lambda n: repeats(d.timesteps[n]))
    costs = [f"{repeats(d.timesteps[most])} of {most} evaluations repeat a timestep"]
    if past:
        costs = [f"the loop begins at the second of two equal first ones and runs past the end {where(d, past)}"]
    if flat:
        costs.append(f"two equal noise levels: NaN {where(d, flat)}")
    changes = {key: False for key in SIGMAS if d.values.get(key)}
    note = (d.drop_in if past else "") if changes else f"num_inference_steps={min(bad) - 1} or fewer"
    problem = f"timesteps come twice {where(d, bad)}"
    yield Finding("duplicates", severity(d, past + flat), problem, "; ".join(costs), changes, note=note)


def repeats(t: Timesteps) -> int:
    """How many timesteps equal the one before."""
    return int((np.diff(t) == 0).sum())


def final_alpha(d: Description) -> Iterator[Finding]:
    """``set_alpha_to_one`` False: the last step does not lead to the clean image."""
    if d.values.get("set_alpha_to_one", True) or not d.alpha_bar.size:
        return
    left, still = float(np.sqrt(1 - d.alpha_bar[0])), d.bad_counts(lambda n, t: t[-1] == 0)
    problem = f"set_alpha_to_one is false: the last step leads to alpha-bar {d.alpha_bar[0]:.5f} of t = 0, not to 1"
    wasted = f"; it begins there too, and changes nothing, {where(d, still)}" if still else ""
    cost = f"noise of {amount(d, left)} is left in the sample{wasted}"
    yield Finding("final_alpha", WARNING, problem, cost, {"set_alpha_to_one": True})


def third_order(d: Description) -> Iterator[Finding]:
    """The third-order singlestep solver, whose last steps fall to first order where the last level is 0."""
    bad = [n for n in d.counts if n % 3 == 2]
    wanted = d.values.get("solver_order") == 3 and d.values.get("final_sigmas_type") == "zero"
    if d.name == "DPMSolverSinglestepScheduler" and wanted and bad:
        problem = f"solver_order 3 down to noise level 0 ends in log(0) {where(d, bad)}, which are 3n - 1"
        cost = "NaN, black images, before diffusers 0.32; since then the last two steps are of first order"
        note = f"or num_inference_steps={max(1, bad[0] - 1) if d.steps else '3n + 1'}"
        yield Finding("third_order", WARNING, problem, cost, {"solver_order": 2}, note=note)
