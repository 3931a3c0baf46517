"""Is a fused run the textbook's? One run three times over: in float64, in plain PyTorch, and fused.

All three have the same network, timesteps and noise. What plain PyTorch loses in the same precision is what a fused run
may lose: its budget after each step is twice that and :data:`FLOOR` units in the last place of the state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import noise, ops
from fastdiff.adapters.peers import PEERS, Estimate, Found, Request, ask, ends, version_of
from fastdiff.diffusion import Diffusion
from fastdiff.sampler import Sampler

FLOOR = 16
FOR_PEERS = ("guidance_scale", "clip")  #: the options that peers are given


@dataclass(frozen=True)
class Peer:
    """What another library makes of the run.

    Attributes:
        version: installed; None of a checkout, or where there is none.
        why_not: it was not compared, or None.
        rows: the last of each step.
        far: after each step, the largest difference from the float64 run.
        from_fused: the largest difference of its end from the fused run's.
        first_over: the first of its rows at which it is further away than its slack times the budget.
    """

    version: str | None
    why_not: str | None = None
    rows: list[int] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    from_fused: float | None = None
    first_over: int | None = None


@dataclass(frozen=True)
class Verification:
    """By row of the run.

    Attributes:
        timesteps: of each row.
        fused, plain: the largest difference of any state from the float64 run's.
        largest: value of the float64 run's states.
        rounding: of the network's output in its precision, in what a row makes of it.
        peers: what other libraries make of it.
    """

    timesteps: list[float]
    fused: list[float]
    plain: list[float]
    largest: list[float]
    rounding: list[float]
    peers: dict[str, Peer] = field(default_factory=dict)

    @property
    def ulps(self) -> list[float]:
        """``fused`` in units in the last place of the largest value, of float32."""
        return [error / _ulp(value) for error, value in zip(self.fused, self.largest, strict=True)]

    @property
    def budget(self) -> list[float]:
        """What plain PyTorch has lost so far, twice, and what is always allowed."""
        worst, rounded, found = 0.0, 0.0, []
        for error, value, rounding in zip(self.plain, self.largest, self.rounding, strict=True):
            worst, rounded = max(worst, error), rounded + rounding
            found.append(2 * worst + FLOOR * _ulp(value) + rounded)
        return found

    @property
    def first_over(self) -> int | None:
        """The first row over its budget."""
        over = (not error <= most for error, most in zip(self.fused, self.budget, strict=True))
        return next((row for row, is_over in enumerate(over) if is_over), None)


def verify(
    model: nn.Module,
    diffusion: Diffusion,
    shape: Sequence[int],
    *,
    solver: str = "ddim",
    steps: int | Sequence[int] = 50,
    spacing: str = "trailing",
    backend: str = "auto",
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    cond: dict[str, Any] | None = None,
    **options: Any,
) -> Verification:
    """Run a sampler in float64, in plain PyTorch and on a backend; and the loops of the peers that are installed.

    Args:
        model: a network that computes in any precision it is brought to.
        shape: ``[N, C, ...]``.
        precision: of the network in the latter two.
        cond: what the network is given beside x and t.
        options: of :class:`~fastdiff.Sampler`.

    Raises:
        InputError: as the sampler does; a backend that cannot serve.
    """
    how: dict[str, Any] = {"solver": solver, "steps": steps, "spacing": spacing, **options}
    cond = cond or {}

    def states(dtype: torch.dtype, network: torch.dtype, name: str) -> tuple[Sampler, list[Tensor]]:
        sampler = Sampler(copy.deepcopy(model).to(network).eval(), diffusion, dtype=dtype, **how)
        with ops.backend(name):
            return sampler, [state.x.double().cpu() for state in sampler.iterate(shape, seed=seed, **cond)]

    sampler, exact = states(torch.float64, torch.float64, "reference")
    runs = [states(torch.float32, precision, name)[1] for name in (backend, "reference")]
    fused, plain = ([_far(a, b) for a, b in zip(run, exact, strict=True)] for run in runs)
    largest = [float(x.abs().max()) for x in exact]
    table = sampler.table.rows
    weights = abs(table.b * table.q) + abs(table.v * table.q)
    rounding = [torch.finfo(precision).eps * weight * value for weight, value in zip(weights, largest, strict=True)]
    found = Verification(sampler.table.timesteps.double().tolist(), fused, plain, largest, rounding)
    theirs = _ask_all(sampler, shape, seed, cond, options)
    return replace(found, peers={name: _compare(name, x, exact, runs[0], found.budget) for name, x in theirs.items()})


def _far(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one of them is no number."""
    return float((a - b).abs().nan_to_num(nan=math.inf).max())


def _ulp(value: float) -> float:
    return math.ulp(value) * 2.0**29 if value else 2.0**-149


def _ask_all(
    sampler: Sampler, shape: Sequence[int], seed: int, cond: dict[str, Any], options: dict[str, Any]
) -> dict[str, Found]:
    """All peers, in float64 as far as they go."""
    more = [name for name in options if name not in FOR_PEERS]
    if more or not isinstance(options.get("guidance_scale", 1.0), Real):
        return dict.fromkeys(PEERS, f"not asked: not with {', '.join(more) or 'a guidance_scale for each step'}")
    schedule = sampler.diffusion.schedule
    start = noise.normal(shape, seed=seed, stream=noise.Stream.INITIAL, device=sampler.device, dtype=torch.float64) * (
        1.0 if schedule.variance_preserving else float(schedule.sigma[sampler.timesteps[0]])
    )
    estimate = Estimate(sampler.model, sampler.diffusion, cond, **options)
    request = Request(estimate, sampler.solver, sampler.timesteps, start)
    return {name: ask(name, request) for name in PEERS}


def _compare(name: str, theirs: Found, exact: list[Tensor], fused: list[Tensor], budget: list[float]) -> Peer:
    if isinstance(theirs, str):
        return Peer(version_of(name), theirs)
    rows = ends(len(exact), len(theirs))
    far = [_far(x, exact[row]) for x, row in zip(theirs, rows, strict=True)]
    over = [row for x, row in zip(far, rows, strict=True) if not x <= PEERS[name].slack * budget[row]]
    return Peer(version_of(name), None, rows, far, _far(theirs[-1], fused[-1]), over[0] if over else None)
