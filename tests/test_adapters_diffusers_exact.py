"""Our schedulers as they are by default: the textbook in float64, and each thing that they put right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scalar_solvers as plain
import torch

from fastdiff.adapters import diffusers as adapters

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
ONE = (1, 1, 1)
#: the plain loop that a scheduler is, its settings, and whether its state is divided by alpha
TEXTBOOK: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], bool]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, plain.ddpm, {}, False),
    "ddpm large": (
        "DDPMScheduler",
        {"clip_sample": False, "variance_type": "fixed_large_log"},
        plain.ddpm,
        {"variance": "fixed_large"},
        False,
    ),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, plain.ddim, {}, False),
    "ddim eta": ("DDIMScheduler", {"clip_sample": False}, plain.ddim, {"eta": 0.5}, False),
    "euler": ("EulerDiscreteScheduler", {}, plain.ddim, {}, True),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, plain.ddim, {"eta": 1.0}, True),
    "heun": ("HeunDiscreteScheduler", {"beta_start": 1e-4, "beta_end": 0.02}, plain.heun, {}, True),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, plain.dpmpp_2m, {}, False),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        plain.dpmpp_2m,
        {"eta": 1.0},
        False,
    ),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, plain.dpmpp_3m, {"true": True}, False),
    "unipc": ("UniPCMultistepScheduler", {}, plain.unipc, {}, False),
    "unipc 3": (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1"},
        plain.unipc,
        {"order": 3, "variant": "bh1"},
        False,
    ),
    "lms": ("LMSDiscreteScheduler", {}, plain.adams, {"order": 4, "logarithmic": False}, True),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, plain.pndm, {}, False),
}


def alpha_bar(schedule: str, timesteps: int = 1000) -> np.ndarray:
    """The product of 1 - beta, in 128 bits where there are."""
    if schedule == "squaredcos_cap_v2":
        bar = np.cos((np.arange(timesteps + 1, dtype=np.longdouble) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], np.longdouble(0.999))
    else:
        betas = np.linspace(1e-4, 0.02, timesteps, dtype=np.longdouble)
    return np.cumprod(1 - betas).astype(np.float64)


def levels_of(scheduler: Any, schedule: str, divided: bool) -> list[tuple[float, float]]:
    """The levels of a run as the textbook has them at the scheduler's timesteps, in float32 where it has ``sigmas``."""
    bars, t = alpha_bar(schedule), list(dict.fromkeys(scheduler.timesteps.tolist()))
    ratio = np.interp(t, np.arange(len(bars)), np.sqrt((1 - bars) / bars))
    if hasattr(scheduler, "sigmas"):
        rounded = torch.tensor(list(dict.fromkeys(scheduler.sigmas.tolist())), dtype=torch.float64)[:-1]
        assert torch.equal(rounded.float(), torch.from_numpy(ratio).float())
        ratio = rounded.numpy()
    alpha = np.ones_like(ratio) if divided else 1 / np.sqrt(1 + ratio**2)
    return [*zip(alpha.tolist(), (alpha * ratio).tolist(), strict=True), (1.0, 0.0)]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 61])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("case", TEXTBOOK)
def test_the_default_is_the_textbook(case: str, schedule: str, spacing: str, steps: int) -> None:
    name, config, loop, options, divided = TEXTBOOK[case]
    scheduler = getattr(adapters, name)(**config, beta_schedule=schedule, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    levels = levels_of(scheduler, schedule, divided)
    noise = np.random.default_rng(0).standard_normal(2 * steps + 2).tolist()

    def estimate(i: int, x: float, level: tuple[float, float] | None = None) -> float:
        alpha, sigma = level or levels[i]
        return float(np.tanh(0.3 * alpha * x / (alpha**2 + sigma**2) + 0.1 * i))

    state = 1.3 * levels[0][1]
    wanted = [x for x, _ in loop(levels, state, estimate, noise, **options)]
    x, found = torch.full(ONE, state, dtype=torch.float64), []
    extra = {"eta": options["eta"]} if name == "DDIMScheduler" and options else {}
    scheduler._drawn = lambda run, row, *_: torch.full(ONE, noise[row], dtype=torch.float64)
    for number, t in enumerate(scheduler.timesteps):
        i = which(case, number)
        alpha, sigma = levels[i]
        output = (x - alpha * estimate(i, float(x))) / sigma
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
        found.append(float(x))
    assert scheduler._run is not None
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9 * max(1, state))


def which(case: str, number: int) -> int:
    """The level of a step: Heun goes to the next one in between, PNDM takes its first step twice."""
    return (number + 1) // 2 if case == "heun" else max(0, number - 1) if case == "pndm" and number > 1 else number
