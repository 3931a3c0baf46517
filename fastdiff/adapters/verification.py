"""Is a fused run the textbook's? One run three times over: in float64, in plain PyTorch, and fused.

All three have the same network, timesteps and noise. What plain PyTorch loses in the same precision is what a fused run
may lose: its budget after each step is twice that and :data:`FLOOR` units in the last place of the state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import noise, ops
from fastdiff.diffusion import Diffusion, network_output
from fastdiff.sampler import Sampler

FLOOR = 16
#: the deterministic solvers of ours that diffusers takes any timesteps for, and its class
IN_DIFFUSERS = {
    "ddim": "EulerDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class Verification:
    """By row of the run.

    Attributes:
        timesteps: of each row.
        fused, plain: the largest difference of any state from the float64 run's.
        largest: value of the float64 run's states.
        rounding: of the network's output in its precision, in what a row makes of it.
        peers: what other libraries leave in the end, the largest difference from float64; or why they were not asked.
    """

    timesteps: list[float]
    fused: list[float]
    plain: list[float]
    largest: list[float]
    rounding: list[float]
    peers: dict[str, float | str]

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
    """Run a sampler in float64, in plain PyTorch and on a backend.

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
    peers = {"diffusers": _of_diffusers(model, sampler, shape, seed, cond, precision)}
    table = sampler.table.rows
    weights = abs(table.b * table.q) + abs(table.v * table.q)
    rounding = [torch.finfo(precision).eps * weight * value for weight, value in zip(weights, largest, strict=True)]
    return Verification(sampler.table.timesteps.double().tolist(), fused, plain, largest, rounding, peers)


def _far(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one of them is no number."""
    return float((a - b).abs().nan_to_num(nan=math.inf).max())


def _ulp(value: float) -> float:
    return math.ulp(value) * 2.0**29 if value else 2.0**-149


def _of_diffusers(
    model: nn.Module, sampler: Sampler, shape: Sequence[int], seed: int, cond: dict[str, Any], precision: torch.dtype
) -> float | str:
    """How far diffusers' loop ends from float64, both without a bound on x0; or why it was not asked."""
    diffusion, levels, name = sampler.diffusion, sampler.diffusion.schedule, IN_DIFFUSERS.get(sampler.solver)
    if find_spec("diffusers") is None:
        return "not installed"
    if name is None:
        return f"not asked: only {', '.join(IN_DIFFUSERS)} run at any timesteps there"
    if not levels.variance_preserving or levels.zero_terminal_snr or levels.c_noise.is_floating_point():
        return f"not asked: it has no {levels}"
    import diffusers

    bars = torch.cat((torch.ones(1, dtype=torch.float64), levels.alpha**2))
    config = {"trained_betas": (1 - bars[1:] / bars[:-1]).tolist(), "num_train_timesteps": len(levels)}
    scheduler = getattr(diffusers, name)(**config, prediction_type=diffusion.prediction)
    scheduler.set_timesteps(timesteps=sampler.timesteps.tolist())
    free = Sampler(sampler.model, diffusion, sampler.solver, sampler.timesteps, dtype=torch.float64)
    with ops.backend("reference"):
        exact = free(shape, seed=seed, **cond).cpu()
    return _far(_loop(copy.deepcopy(model).to(precision).eval(), scheduler, sampler, shape, seed, cond), exact)


@torch.no_grad()
def _loop(
    model: nn.Module, scheduler: Any, sampler: Sampler, shape: Sequence[int], seed: int, cond: dict[str, Any]
) -> Tensor:
    """diffusers' own loop, from the noise that the sampler starts from."""
    x = noise.normal(shape, seed=seed, stream=noise.Stream.INITIAL, device=sampler.device)
    if scheduler.init_noise_sigma != 1:  # a state over alpha
        x = x / float(sampler.diffusion.schedule.alpha[sampler.timesteps[0]])
    for t in scheduler.timesteps:
        asked = scheduler.scale_model_input(x, t).to(next(model.parameters()).dtype)
        out = network_output(model(asked, t.long().expand(len(x)).to(x.device), **cond))
        x = scheduler.step(out.float(), t, x).prev_sample
    return x.double().cpu()
