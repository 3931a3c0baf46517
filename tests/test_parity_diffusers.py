"""Parity with the schedulers of diffusers where they are right, and a small test for each case where they are not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, model_of
from torch import Tensor

import fastdiff as fd
from fastdiff.noise import Stream

pytest.importorskip("diffusers")
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
)

DDPM, DDIM = scheduling_ddpm.DDPMScheduler, scheduling_ddim.DDIMScheduler
Euler, Heun = scheduling_euler_discrete.EulerDiscreteScheduler, scheduling_heun_discrete.HeunDiscreteScheduler
DPM = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler
MODULES = (
    scheduling_ddpm,
    scheduling_ddim,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
    scheduling_dpmsolver_multistep,
)

SCHEDULES = {
    "linear": (fd.Schedule.linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        fd.Schedule.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (fd.Schedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
DATA = Mixture.random(2, seed=4)
SHAPE, SEED = (3, 2), 17


class InFloat64:
    """A module for which float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers builds its tables in float32 and casts the sample to it: here they are float64, by the same code."""
    for module in MODULES:
        monkeypatch.setattr(module, "torch", InFloat64(torch))
        monkeypatch.setattr(module, "np", InFloat64(np))


def start() -> Tensor:
    return fd.noise.normal(SHAPE, seed=SEED, stream=Stream.INITIAL, dtype=torch.float64)


def row_noise(row: int) -> Tensor:
    return fd.noise.normal(SHAPE, seed=SEED, step=row, dtype=torch.float64)


def whole(timesteps: Tensor) -> list[int]:
    assert torch.equal(timesteps, timesteps.round())
    return [int(t) for t in timesteps]


def run_theirs(scheduler: Any, model: Callable[..., Tensor], x: Tensor, **options: Any) -> Iterator[Tensor]:
    """x after each step; ``variance_noise`` by step."""
    noises = options.pop("variance_noise", None)
    for i, t in enumerate(scheduler.timesteps):
        extra = {} if noises is None else {"variance_noise": noises(i)}
        out = model(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(out, t, x, **options, **extra).prev_sample
        yield x


def run_ours(
    schedule: fd.Schedule, prediction: str, solver: str, timesteps: list[int], **options: Any
) -> tuple[fd.Sampler, list[Tensor]]:
    diffusion = fd.Diffusion(schedule, prediction)
    model = options.pop("model", None) or model_of(DATA, diffusion)
    sampler = fd.Sampler(model, diffusion, solver, timesteps, dtype=torch.float64, **options)
    return sampler, [state.x for state in sampler.iterate(SHAPE, seed=SEED)]


def check_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float64
        assert (one - other).abs().max() <= 1e-9  # 1 / alpha, up to 2e4, and their 1 - alpha-bar cost digits


def alpha_after(sampler: fd.Sampler) -> list[float]:
    """alpha of the level at which each row leaves x: that of the next row, and 1 after the last."""
    return [*sampler.diffusion.schedule.alpha[sampler.table.timesteps[1:]].tolist(), 1.0]


def prepared(scheduler: Any, steps: int, schedule: fd.Schedule) -> Any:
    """Their timesteps, or ours where theirs fall between the timesteps of the schedule."""
    scheduler.set_timesteps(steps)
    if not torch.equal(scheduler.timesteps, scheduler.timesteps.round()):
        scheduler.set_timesteps(timesteps=schedule.timesteps(steps, scheduler.config.timestep_spacing).tolist())
    return scheduler


grid = pytest.mark.parametrize(
    ("name", "prediction", "spacing", "steps"), list(itertools.product(SCHEDULES, PREDICTIONS, SPACINGS, (20, 13)))
)


# ---- parity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_are_the_same(name: str, wide: None) -> None:
    schedule, betas = SCHEDULES[name]
    theirs = DDPM(**betas).alphas_cumprod
    assert theirs.dtype == torch.float64
    assert (schedule.alpha**2 / theirs - 1).abs().max() <= 1e-12
    assert (schedule.sigma**2 / (1 - theirs) - 1).abs().max() <= 1e-11


def exact_halves(spacing: str, steps: int) -> Tensor:
    """Which timesteps lie exactly between two whole numbers: theirs are rounded after a rounding of floats."""
    if spacing == "leading" or steps == 1:
        return torch.zeros(steps, dtype=torch.bool)
    down = torch.arange(steps, 0, -1)
    over, under = (1000 * down, steps) if spacing == "trailing" else (999 * (down - 1), steps - 1)
    return (2 * over % under == 0) & (over % under != 0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_spacings_are_the_same(spacing: str) -> None:
    """leading where N divides T, linspace from two steps on, trailing where float error adds no timestep to theirs."""
    schedule, theirs = fd.Schedule.linear(), DDPM(timestep_spacing=spacing)
    counts = [n for n in range(2, 1001) if spacing != "leading" or 1000 % n == 0]
    compared = 0
    for steps in counts:
        theirs.set_timesteps(steps)
        if spacing != "trailing" or len(theirs.timesteps) == steps:
            difference = schedule.timesteps(steps, spacing) - theirs.timesteps
            assert (difference.abs() <= exact_halves(spacing, steps).long()).all(), steps
            compared += 1
    assert compared >= 0.9 * len(counts)


@grid
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(
    variance: str,
    name: str,
    prediction: str,
    spacing: str,
    steps: int,
    wide: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule, betas = SCHEDULES[name]
    theirs = DDPM(
        **betas, variance_type=variance, clip_sample=False, prediction_type=prediction, timestep_spacing=spacing
    )
    theirs.set_timesteps(steps)
    sampler, ours = run_ours(schedule, prediction, "ddpm", whole(theirs.timesteps), variance=variance)
    draws = iter([*(row_noise(i) for i in range(steps - 1)), torch.zeros(SHAPE, dtype=torch.float64)])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: next(draws))
    check_equal(ours, list(run_theirs(theirs, sampler.model, start())))


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_with_learned_range_and_clipping(name: str, wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, betas = SCHEDULES[name]
    theirs = DDPM(**betas, variance_type="learned_range", clip_sample=True, clip_sample_range=0.8)
    theirs.set_timesteps(20)
    diffusion = fd.Diffusion(schedule, variance="learned_range")
    exact = model_of(DATA, diffusion)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((exact(x, t), torch.sin(3 * x)), 1)

    sampler = fd.Sampler(model, diffusion, "ddpm", whole(theirs.timesteps), clip=0.8, dtype=torch.float64)
    draws = (row_noise(i) for i in range(20))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: next(draws))
    ours = [state.x for state in sampler.iterate(SHAPE, seed=SEED)]
    check_equal(ours, list(run_theirs(theirs, model, start())))


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("leading", 13), ("trailing", 20)])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim(name: str, prediction: str, eta: float, spacing: str, steps: int, wide: None) -> None:
    """Where their stride T // N meets their own timesteps: not linspace, and trailing only where N divides T."""
    schedule, betas = SCHEDULES[name]
    theirs = DDIM(**betas, clip_sample=False, prediction_type=prediction, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    sampler, ours = run_ours(schedule, prediction, "ddim", whole(theirs.timesteps), eta=eta)
    check_equal(ours, list(run_theirs(theirs, sampler.model, start(), eta=eta, variance_noise=row_noise)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_clipping(name: str, wide: None) -> None:
    schedule, betas = SCHEDULES[name]
    theirs = DDIM(**betas, clip_sample=True, clip_sample_range=0.5)
    theirs.set_timesteps(20)
    sampler, ours = run_ours(schedule, "epsilon", "ddim", whole(theirs.timesteps), clip=0.5)
    check_equal(ours, list(run_theirs(theirs, sampler.model, start(), use_clipped_model_output=True)))


@grid
def test_euler(name: str, prediction: str, spacing: str, steps: int, wide: None) -> None:
    """Theirs is x / alpha at noise level sigma / alpha."""
    schedule, betas = SCHEDULES[name]
    theirs = prepared(Euler(**betas, prediction_type=prediction, timestep_spacing=spacing), steps, schedule)
    sampler, ours = run_ours(schedule, prediction, "euler", whole(theirs.timesteps))
    x = start() / schedule.alpha[sampler.timesteps[0]]
    states = run_theirs(theirs, sampler.model, x)
    check_equal(ours, [a * x for a, x in zip(alpha_after(sampler), states, strict=True)])


@grid
def test_heun(name: str, prediction: str, spacing: str, steps: int, wide: None) -> None:
    """Theirs is x / alpha at noise level sigma / alpha, each timestep but the first twice."""
    schedule, betas = SCHEDULES[name]
    theirs = prepared(Heun(**betas, prediction_type=prediction, timestep_spacing=spacing), steps, schedule)
    once = [theirs.timesteps[0], *theirs.timesteps[1::2]]
    sampler, ours = run_ours(schedule, prediction, "heun", whole(torch.stack(once)))
    assert sampler.table.timesteps.tolist() == whole(theirs.timesteps)
    x = start() / schedule.alpha[sampler.timesteps[0]]
    states = run_theirs(theirs, sampler.model, x)
    check_equal(ours, [a * x for a, x in zip(alpha_after(sampler), states, strict=True)])


@grid
def test_dpmpp_2m(name: str, prediction: str, spacing: str, steps: int, wide: None) -> None:
    schedule, betas = SCHEDULES[name]
    theirs = DPM(**betas, prediction_type=prediction, timestep_spacing=spacing, solver_order=2)
    assert (theirs.config.algorithm_type, theirs.config.solver_type) == ("dpmsolver++", "midpoint")
    assert theirs.config.final_sigmas_type == "zero"
    theirs.set_timesteps(steps)
    sampler, ours = run_ours(schedule, prediction, "dpmpp_2m", whole(theirs.timesteps))
    check_equal(ours, list(run_theirs(theirs, sampler.model, start())))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 15, 50])
def test_dpmpp_2m_at_every_kind_of_length(steps: int, wide: None) -> None:
    theirs = DPM(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    sampler, ours = run_ours(fd.Schedule.linear(), "epsilon", "dpmpp_2m", whole(theirs.timesteps))
    check_equal(ours, list(run_theirs(theirs, sampler.model, start())))


# ---- where diffusers is wrong ---------------------------------------------------------------


def skip_if(fixed: bool, what: str) -> None:
    if fixed:
        pytest.skip(f"this version of diffusers is right: {what}")


def test_bug_fixed_large_log_is_nan() -> None:
    """The logarithm of the variance is taken for the variance, and the root of a negative number for the deviation."""
    theirs = DDPM(variance_type="fixed_large_log", clip_sample=False)
    theirs.set_timesteps(10)
    out = theirs.step(torch.zeros(1, 4), theirs.timesteps[0], torch.ones(1, 4)).prev_sample
    skip_if(bool(out.isfinite().all()), "fixed_large_log is finite")
    assert out.isnan().all()
    sampler, ours = run_ours(fd.Schedule.linear(), "epsilon", "ddpm", whole(theirs.timesteps), variance="fixed_large")
    bar = fd.Schedule.linear().alpha[sampler.timesteps] ** 2
    assert np.abs(sampler.table.rows.s[:-1] ** 2 - (1 - bar[:-1] / bar[1:]).numpy()).max() <= 1e-14
    assert all(x.isfinite().all() for x in ours)


def levels_missed(schedule: fd.Schedule, timesteps: list[int], states: list[Tensor]) -> float:
    """With one data point at 0.5 the state at a level is alpha 0.5 + sigma noise: the largest distance from it."""
    alpha, sigma = ([*table[timesteps].tolist(), end] for table, end in ((schedule.alpha, 1.0), (schedule.sigma, 0.0)))
    noise = (start() - alpha[0] * 0.5) / sigma[0]
    levels = zip(alpha[1:], sigma[1:], strict=True)
    return max(float((x - a * 0.5 - s * noise).abs().max()) for (a, s), x in zip(levels, states, strict=True))


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 50), ("linspace", 30), ("trailing", 30)])
def test_bug_ddim_steps_to_timesteps_that_are_not_in_its_list(spacing: str, steps: int, wide: None) -> None:
    """It goes from t to t - T // N whatever timestep comes next."""
    schedule = fd.Schedule.linear()
    point = model_of(Gaussian(0.5, 0.0), fd.Diffusion(schedule))
    theirs = DDIM(clip_sample=False, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    timesteps = whole(theirs.timesteps)
    _, ours = run_ours(schedule, "epsilon", "ddim", timesteps, model=point)
    assert levels_missed(schedule, timesteps, ours) <= 1e-11
    missed = levels_missed(schedule, timesteps, list(run_theirs(theirs, point, start())))
    skip_if(missed <= 1e-11, "DDIM goes to the next timestep of its list")
    assert missed > 1e-3


@pytest.mark.parametrize("steps", [61, 103, 121, 201])
def test_bug_trailing_has_one_timestep_too_many(steps: int) -> None:
    schedule, theirs = fd.Schedule.linear(), DDIM(timestep_spacing="trailing")
    ours = schedule.timesteps(steps, "trailing")
    assert (len(ours), int(ours[0])) == (steps, 999)
    assert ours[-1] >= 0
    theirs.set_timesteps(steps)
    skip_if(len(theirs.timesteps) == steps, "trailing has N timesteps")
    assert len(theirs.timesteps) == steps + 1
    assert theirs.timesteps[-1] == -1


def test_trailing_has_n_timesteps_for_every_n() -> None:
    schedule = fd.Schedule.linear()
    for steps in range(1, 1001):
        timesteps = schedule.timesteps(steps, "trailing")
        assert (len(timesteps), int(timesteps[0])) == (steps, 999)
        assert timesteps[-1] >= 0
        assert (timesteps.diff() < 0).all()


def test_bug_one_step_of_linspace_starts_at_the_clean_end() -> None:
    theirs = DDPM(timestep_spacing="linspace")
    theirs.set_timesteps(1)
    assert fd.Schedule.linear().timesteps(1, "linspace").tolist() == [999]
    skip_if(int(theirs.timesteps[0]) == 999, "one step of linspace starts from noise")
    assert theirs.timesteps.tolist() == [0]


def test_bug_leading_with_offset_leaves_the_table() -> None:
    theirs = DDIM(timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(1000)
    skip_if(int(theirs.timesteps[0]) < 1000, "leading with steps_offset=1 stays in the table")
    with pytest.raises(IndexError):
        theirs.step(torch.zeros(1, 4), theirs.timesteps[0], torch.zeros(1, 4))
    for steps in (1000, 999, 500, 1):
        timesteps = fd.Schedule.linear().timesteps(steps, "leading")
        assert len(timesteps) == steps
        assert timesteps[0] <= 999


@pytest.mark.parametrize("steps", [20, 30, 50])
def test_bug_karras_on_cosine_has_duplicates_and_runs_out_of_levels(steps: int) -> None:
    schedule = fd.Schedule.cosine()
    ours = schedule.timesteps(steps, "karras")
    assert len(ours.unique()) == steps
    theirs = DPM(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    theirs.set_timesteps(steps)
    skip_if(len(theirs.timesteps.unique()) == steps, "Karras levels on cosine have timesteps of their own")
    with pytest.raises(IndexError):
        list(run_theirs(theirs, lambda x, t: torch.zeros_like(x), torch.zeros(1, 4)))
    _, states = run_ours(schedule, "v_prediction", "dpmpp_2m", ours.tolist())
    assert all(x.isfinite().all() for x in states)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bug_bf16_add_noise_adds_none_at_the_first_timesteps(name: str) -> None:
    """1 - alpha-bar after alpha-bar is rounded to bf16 is 0 for ten timesteps and more."""
    schedule, betas = SCHEDULES[name]
    theirs, diffusion = DDPM(**betas), fd.Diffusion(schedule)
    x0, noise = torch.full((10, 3), 0.0).bfloat16(), torch.ones(10, 3).bfloat16()
    ours = diffusion.add_noise(x0, noise, torch.arange(10))
    assert (ours[:, 0].double() / schedule.sigma[:10] - 1).abs().max() <= 2**-8
    wrong = theirs.add_noise(x0, noise, torch.arange(10))
    skip_if(bool((wrong != 0).all()), "add_noise keeps its noise in bf16")
    assert (wrong[: {"linear": 10, "scaled_linear": 2, "cosine": 10}[name]] == 0).all()


def test_bug_ddpm_adds_noise_to_the_finished_sample(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks whether t > 0, not whether the step ends at the clean image: trailing ends above 0."""
    schedule = fd.Schedule.linear()
    theirs = DDPM(variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing", prediction_type="sample")
    theirs.set_timesteps(10)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.ones(shape, dtype=torch.float64))

    def point(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 0.5)

    _, ours = run_ours(schedule, "sample", "ddpm", whole(theirs.timesteps), model=point, variance="fixed_large")
    assert (ours[-1] - 0.5).abs().max() <= 1e-14
    *_, last = run_theirs(theirs, point, start())
    skip_if(bool((last - 0.5).abs().max() <= 1e-9), "DDPM adds no noise in its last step")
    assert (last - 0.5 - schedule.sigma[99]).abs().max() <= 1e-12
