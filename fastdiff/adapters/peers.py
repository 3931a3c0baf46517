"""A run once more by the loops of other libraries, each with its own tables and steps.

A peer is a function of :class:`Request` that gives x_t after each step, or says why it was not asked. It is given the
estimate of x0, guided and bounded as in the run, so that what is compared is the recursion of the solver.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion, Model, network_output
from fastdiff.guidance import ClassifierFree
from fastdiff.schedule import SPACINGS, Schedule


@dataclass(frozen=True)
class Estimate:
    """The data's estimate x0 of a state and a timestep, float64, without the library's tables and rows.

    Args:
        model: a network in float64.
        clip: bound of the estimate, None for no bound.
    """

    model: Model
    diffusion: Diffusion
    cond: dict[str, Any]
    guidance_scale: float = 1.0
    clip: float | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float) -> Tensor:
        """x0 of x_t ``[N, C, ...]``; t may lie between two timesteps."""
        levels = self.diffusion.schedule.at(torch.tensor([t], dtype=torch.float64))
        alpha, sigma, told = float(levels.alpha), float(levels.sigma), levels.c_noise
        if t == int(t) and not self.diffusion.schedule.c_noise.is_floating_point():
            told = told.long()
        out = self._guided(float(levels.c_in) * x, told.expand(len(x)).to(x.device))[:, : x.shape[1]]
        x0 = _read(self.diffusion.prediction, x, out, alpha, sigma)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return network_output(self.model(x, t, **self.cond))
        guidance = ClassifierFree(batched=False)
        out, other = guidance.outputs(self.model, x, t, guidance.conditions(self.model, len(x), self.cond, None))
        return other + self.guidance_scale * (out - other)


def _read(prediction: str, x: Tensor, out: Tensor, alpha: float, sigma: float) -> Tensor:
    """x0 of what a network gives: by the definitions of the four predictions, solved for it."""
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    if prediction == "v_prediction":
        norm = math.hypot(alpha, sigma)
        return (alpha * x / norm - sigma * out) / norm
    return out if prediction == "sample" else (x - sigma * out) / (alpha + sigma)


@dataclass(frozen=True)
class Request:
    """A run that peers are asked to take.

    Attributes:
        solver: a name of :data:`fastdiff.solvers.SOLVERS`, with its defaults.
        timesteps: int64 ``[n]``, descending.
        start: x at the first of them, float64 ``[N, C, ...]``.
    """

    estimate: Estimate
    solver: str
    timesteps: Tensor
    start: Tensor

    @property
    def schedule(self) -> Schedule:
        return self.estimate.diffusion.schedule

    @property
    def alpha(self) -> list[float]:
        """``[n + 1]``, of the state before each step and at the end."""
        return [*self.schedule.alpha[self.timesteps].tolist(), 1.0]

    @property
    def betas(self) -> Tensor:
        """Of the whole schedule."""
        bars = torch.cat((torch.ones(1, dtype=torch.float64), self.schedule.alpha**2))
        return 1 - bars[1:] / bars[:-1]

    @property
    def usual(self) -> bool:
        """Whether the schedule is of betas below 1."""
        return self.schedule.variance_preserving and not self.schedule.zero_terminal_snr


Found = list[Tensor] | str


def ends(rows: int, steps: int) -> list[int]:
    """The last row of each step, where the first ``rows - steps`` steps take two."""
    return [step + min(step + 1, rows - steps) for step in range(steps)]


# ---- diffusers --------------------------------------------------------------------------------

#: solvers that are the same recursion there, without noise: class and settings
IN_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("EulerDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True, "prediction_type": "epsilon"}),
}


def in_diffusers(request: Request) -> Found:
    if request.solver not in IN_DIFFUSERS:
        return f"its solvers of the same recursion are {', '.join(IN_DIFFUSERS)}"
    if not request.usual:
        return f"it has no {request.schedule}"
    scheduler = _scheduler(request)
    if scheduler is None:
        return f"its {request.solver} does not run at these timesteps"
    scaled = scheduler.init_noise_sigma != 1  # whether its states are x over alpha
    x, states = request.start / (request.alpha[0] if scaled else 1), []
    for t in scheduler.timesteps:
        asked = scheduler.scale_model_input(x, t)
        x = scheduler.step(_told(scheduler, request, asked, t), t, x, return_dict=False)[0]
        states.append(x)
    states = [states[row] for row in ends(len(states), len(request.timesteps))]
    scales = request.alpha[1:] if scaled else [1.0] * len(states)
    return [scale * x for scale, x in zip(scales, states, strict=True)]


def _told(scheduler: Any, request: Request, x: Tensor, t: Tensor) -> Tensor:
    """x0, or the noise for a scheduler that averages what it is told at several levels."""
    x0 = request.estimate(x, float(t))
    if scheduler.config.prediction_type == "sample":
        return x0
    alpha, sigma = (float(table[int(t)]) for table in (request.schedule.alpha, request.schedule.sigma))
    return (x - alpha * x0) / sigma


def _scheduler(request: Request) -> Any:
    """Their scheduler at the run's timesteps, or None if there is none."""
    import diffusers

    name, settings = IN_DIFFUSERS[request.solver]
    known = {"trained_betas": request.betas.tolist(), "num_train_timesteps": len(request.schedule)}
    asked, kind = request.timesteps.tolist(), getattr(diffusers, name)
    if "timesteps" in signature(kind.set_timesteps).parameters:
        scheduler = kind(**known, **{"prediction_type": "sample", **settings})
        scheduler.set_timesteps(timesteps=asked)
        return scheduler
    stride = len(request.schedule) // len(asked)
    if request.solver == "pndm" and any(a - b != stride for a, b in itertools.pairwise([*asked, asked[-1] - stride])):
        return None
    for spacing in SPACINGS[:3]:
        scheduler = kind(**known, **{"prediction_type": "sample", "timestep_spacing": spacing, **settings})
        scheduler.set_timesteps(len(asked))
        if list(dict.fromkeys(scheduler.timesteps.tolist())) == asked:
            return scheduler
    return None


# ---- k-diffusion ------------------------------------------------------------------------------

#: solvers that are the same recursion there, without noise: function and settings
IN_K_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("sample_euler", {}),
    "euler": ("sample_euler", {}),
    "heun": ("sample_heun", {}),
    "dpm2": ("sample_dpm_2", {}),
    "dpmpp_2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0, "noise_sampler": lambda *levels: 0.0}),
    "dpmpp_2m": ("sample_dpmpp_2m", {}),
    "lms": ("sample_lms", {}),
}
ALONE = "_k_diffusion_samplers"


def in_k_diffusion(request: Request) -> Found:
    if request.solver not in IN_K_DIFFUSION:
        return f"its solvers of the same recursion are {', '.join(IN_K_DIFFUSION)}"
    schedule, first = request.schedule, request.alpha[0]
    if schedule.config["name"] == "flow" or first == 0:
        return f"it has no {schedule}"
    name, settings = IN_K_DIFFUSION[request.solver]
    states: list[Tensor] = []
    sigmas = (schedule.sigma / schedule.alpha)[request.timesteps]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        t = _near_whole(float(schedule.timestep_of(-2 * sigma[:1].cpu().log())))
        return request.estimate(float(schedule.at(torch.tensor([t], dtype=torch.float64)).alpha) * x, t)

    how = {"callback": lambda at: states.append(at["x"]), "disable": True, **settings}
    levels = torch.cat((sigmas, sigmas.new_zeros(1))).to(request.start.device)
    states.append(getattr(_k_samplers(), name)(denoise, request.start / first, levels, **how))
    return [alpha * x for alpha, x in zip(request.alpha[1:], states[1:], strict=True)]


def _near_whole(t: float) -> float:
    """A timestep that was found by its level."""
    return float(round(t)) if abs(t - round(t)) < 1e-6 else t


def _k_samplers() -> ModuleType:
    """Its samplers without the rest of the package, which would load all it can train with."""
    loaded = sys.modules.get("k_diffusion.sampling")
    if loaded is not None:
        return loaded
    spec = find_spec("k_diffusion")
    assert spec is not None
    package = sys.modules.setdefault(ALONE, ModuleType(ALONE))
    package.__path__ = list(spec.submodule_search_locations or [])
    return import_module(f"{ALONE}.sampling")


# ---- guided-diffusion -------------------------------------------------------------------------


def in_guided_diffusion(request: Request) -> Found:
    if request.solver not in ("ddim", "euler"):
        return "its solver of the same recursion is ddim"
    if not request.usual or len(request.timesteps) == 1:
        return f"it has no {request.schedule}" if not request.usual else "it has no run of one step"
    process, respace = (import_module(f"guided_diffusion.{name}") for name in ("gaussian_diffusion", "respace"))
    spaced = respace.SpacedDiffusion(
        set(request.timesteps.tolist()),
        betas=request.betas.numpy(),
        model_mean_type=process.ModelMeanType.START_X,
        model_var_type=process.ModelVarType.FIXED_LARGE,
        loss_type=process.LossType.MSE,
    )
    x, given = request.start, {"clip_denoised": False, "device": request.start.device, "eta": 0.0}
    steps = spaced.ddim_sample_loop_progressive(_at_one_time(request.estimate), tuple(x.shape), x, **given)
    return [step["sample"] for step in steps]


def _at_one_time(estimate: Estimate) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: estimate(x, float(t[0]))


class Library(NamedTuple):
    """A peer.

    Attributes:
        module: that is imported.
        loop: see the top of this file.
        slack: how many of the run's own budgets it may lose: by tables in float32, by states over alpha in float32.
    """

    module: str
    loop: Callable[[Request], Found]
    slack: float


#: by the name of the distribution
PEERS: dict[str, Library] = {
    "diffusers": Library("diffusers", in_diffusers, 1000),
    "k-diffusion": Library("k_diffusion", in_k_diffusion, 1),
    "guided-diffusion": Library("guided_diffusion", in_guided_diffusion, 10),
}


def ask(name: str, request: Request) -> Found:
    """x_t after each step ``[n]`` of a peer, float64; or in words why there is none."""
    if find_spec(PEERS[name].module) is None:
        return "not installed"
    try:
        found = PEERS[name].loop(request)
    except Exception as error:  # other people's code, of any version
        return f"failed: {type(error).__name__}: {error}"
    return f"not asked: {found}" if isinstance(found, str) else [x.double().cpu() for x in found]


def version_of(name: str) -> str | None:
    """Of an installed distribution; None of a checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
