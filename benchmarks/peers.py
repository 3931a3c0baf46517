"""The peers in their best fair form: diffusers as its pipelines call it, PyTorch compiled and eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Arrays, Bind, Call, Peer

STEPS, ROW, SCALE = 50, 25, 4.0  # a step in the middle of a run, and its guidance scale
Formula = Callable[[Arrays], Sequence[Tensor]]


class State(NamedTuple):
    """The arrays a step reads, in their order."""

    x: Tensor
    output: Tensor
    uncond: Tensor | None = None
    h1: Tensor | None = None


# ---- PyTorch ----------------------------------------------------------------------------------


def compiled(formula: Formula, *, new: bool, tolerance: float | None = 1e-5) -> Peer:
    """The formula through torch.compile, giving new tensors or writing to those of the set."""
    return Peer("torch.compile", partial(_compile, formula if new else partial(_into, formula)), tolerance, slow=True)


def _compile(function: Formula) -> Bind:
    torch.compiler.reset()
    run = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda arrays: partial(run, arrays)


def _into(formula: Formula, arrays: Arrays) -> tuple[Tensor, ...]:
    for result, value in zip(arrays.writes, formula(arrays), strict=True):
        result.copy_(value)
    return arrays.writes


def eager(name: str, run: Callable[[Arrays], Any], tolerance: float | None = 1e-5) -> Peer:
    return Peer(name, lambda: lambda arrays: partial(run, arrays), tolerance)


# ---- diffusers --------------------------------------------------------------------------------


def diffusers_step(name: str, device: torch.device, tolerance: float | None = 1e-4) -> Peer:
    """``scheduler.step`` of DDIM, DDPM, DPM++2M or Euler, after the guidance its pipelines do."""
    return Peer(f"diffusers {name}", partial(_diffusers_step, name, device), tolerance)


def _diffusers_step(name: str, device: torch.device) -> Bind:
    scheduler = make_scheduler(name, device)
    options = {"generator": torch.Generator(device).manual_seed(0)} if name == "DDPM" else {}
    step = partial(scheduler.step, timestep=scheduler.timesteps[ROW], return_dict=False, **options)
    rewind = {"DPM++2M": _rewind_multistep, "Euler": _rewind}.get(name)
    return lambda arrays: _diffusers_call(step, partial(rewind, scheduler) if rewind else None, State(*arrays.reads))


def _diffusers_call(step: Callable[..., Any], rewind: Callable[[State], None] | None, state: State) -> Call:
    def call() -> Any:
        if rewind is not None:
            rewind(state)
        output = state.output
        if state.uncond is not None:
            output = state.uncond + SCALE * (state.output - state.uncond)
        return step(model_output=output, sample=state.x)

    return call


def _rewind(scheduler: Any, _: State) -> None:
    scheduler._step_index = ROW


def _rewind_multistep(scheduler: Any, state: State) -> None:
    """Back to the middle of the run: the last estimate of x0 is known, so the step is of second order."""
    scheduler._step_index, scheduler.lower_order_nums = ROW, 1
    scheduler.model_outputs = [None, state.x if state.h1 is None else state.h1]


def make_scheduler(name: str, device: torch.device) -> Any:
    """A scheduler on the linear schedule that has taken up its timesteps."""
    import diffusers

    classes: dict[str, Callable[..., Any]] = {
        "DDIM": partial(diffusers.DDIMScheduler, clip_sample=False),
        "DDPM": partial(diffusers.DDPMScheduler, clip_sample=False),
        "DPM++2M": partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2),
        "Euler": diffusers.EulerDiscreteScheduler,
    }
    scheduler = classes[name](beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS, device=device)
    scheduler.is_scale_input_called = True
    return scheduler


def diffusers_add_noise(timesteps: Tensor, *, draws: bool) -> Peer:
    """``scheduler.add_noise`` of given noise, the second array, or of noise it draws first."""
    name = "torch.randn + diffusers" if draws else "diffusers add_noise"
    return Peer(name, partial(_diffusers_add_noise, timesteps, draws), None if draws else 1e-4)


def _diffusers_add_noise(timesteps: Tensor, draws: bool) -> Bind:
    add_noise = make_scheduler("DDPM", timesteps.device).add_noise
    if draws:
        return lambda arrays: lambda: add_noise(arrays.reads[0], torch.randn_like(arrays.reads[0]), timesteps)
    return lambda arrays: partial(add_noise, *arrays.reads, timesteps)


def diffusers_objective(timesteps: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A training step's noising and the loss of its v-prediction, as diffusers' examples write it."""
    scheduler = make_scheduler("DDPM", timesteps.device)

    def objective(output: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        noisy, target = scheduler.add_noise(x0, noise, timesteps), scheduler.get_velocity(x0, noise, timesteps)
        return noisy, torch.nn.functional.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    return objective
