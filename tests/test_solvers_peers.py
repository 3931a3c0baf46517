"""The same runs by diffusers' schedulers, where they are right; and a list of where they are not.

Theirs compute in float32, with tables from a float32 cumulative product: that bounds the agreement.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = fd.Schedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def noise_of(x: Tensor, t: float) -> Tensor:
    """A network that predicts noise: smooth in x and t, with an answer of the size of its input's noise."""
    return 0.9 * x + 0.3 * torch.sin(2 * x + t / 300)


def theirs(name: str, settings: dict[str, Any], x: Tensor, steps: int, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Their result of a run from ``x`` of unit variance, and the timesteps they visit."""
    scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    start = float(scheduler.init_noise_sigma)
    x = x * (1 if start == 1 else math.hypot(1, start))  # they start from sigma alone
    visited = []
    for i, t in enumerate(scheduler.timesteps):
        out = noise_of(scheduler.scale_model_input(x, t), float(t))
        noise = {"variance_noise": fd.noise.normal(x.shape, seed=seed, step=i)} if "sde" in str(settings) else {}
        x = scheduler.step(out, t, x, **noise, return_dict=False)[0]
        visited.append(float(t))
    return x, visited


def ours(solver: str, options: dict[str, Any], x: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    sampler = fd.Sampler(
        lambda x, t: noise_of(x, float(t[0])), fd.Diffusion(SCHEDULE), solver, steps, dtype=torch.float64, **options
    )
    return sampler(x.shape, x=x, seed=0), sampler.table.timesteps.tolist()


MULTISTEP = "DPMSolverMultistepScheduler"
PAIRS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ddim": ("ddim", {}, "DDIMScheduler", {"clip_sample": False}),
    "euler": ("euler", {}, "EulerDiscreteScheduler", {}),
    "heun": ("heun", {}, "HeunDiscreteScheduler", {}),
    "dpm2": ("dpm2", {}, "KDPM2DiscreteScheduler", {}),
    "lms": ("lms", {}, "LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmpp_2m", {}, MULTISTEP, {}),
    "dpmpp_2m, minimal": ("dpmpp_2m", {"final": "minimal"}, MULTISTEP, {"final_sigmas_type": "sigma_min"}),
    "dpmpp_3m": ("dpmpp_3m", {}, MULTISTEP, {"solver_order": 3}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("unipc", {}, "UniPCMultistepScheduler", {}),
    "unipc, order 3": ("unipc", {"order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}),
    "unipc, bh1": (
        "unipc",
        {"variant": "bh1", "final": "minimal"},
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ),
    "deis": ("deis", {"final": "minimal"}, "DEISMultistepScheduler", {"solver_order": 3}),
    "deis, order 2": ("deis", {"order": 2, "final": "minimal"}, "DEISMultistepScheduler", {}),
    "pndm": ("pndm", {}, "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("name", PAIRS)
def test_diffusers_goes_the_same_way(name: str, steps: int) -> None:
    solver, options, scheduler, settings = PAIRS[name]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (got, at), (expected, visited) = ours(solver, options, x, steps), theirs(scheduler, settings, x.float(), steps)
    assert at == pytest.approx(visited, abs=0.02)
    theirs_loses = 5e-4 if solver == "deis" else 2e-6  # differences of logarithms in float32
    assert float((got - expected).norm() / expected.norm()) < theirs_loses


NOT_FINITE = {
    "unipc, bh1 to zero": ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "unipc", {"variant": "bh1"}),
    "3M on Karras' levels to sigma_min": (
        MULTISTEP,
        {"solver_order": 3, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        "dpmpp_3m",
        {"spacing": "karras", "final": "minimal"},
    ),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_where_diffusers_is_not_finite(name: str) -> None:
    """Others of their faults, in timesteps, are in test_schedule.py."""
    scheduler, settings, solver, options = NOT_FINITE[name]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert theirs(scheduler, settings, x.float(), 20)[0].isnan().any()
    assert ours(solver, options, x, 20)[0].isfinite().all()
