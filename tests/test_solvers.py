"""Solvers: order of convergence on exact scores, weak order, identities between tables, parity with scalar forms."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, levels_schedule, model_of, predict
from torch import Tensor

import fastdiff as fd
from fastdiff.noise import Stream
from fastdiff.ops.row import LETTERS, PREDICTIONS
from fastdiff.solvers import SOLVERS, Grid, build_table, dpmpp_2m

ORDER = {"ddpm": 1, "ddim": 1, "euler": 1, "euler_a": 1, "heun": 2, "dpmpp_2m": 2}
STOCHASTIC = {"ddpm", "euler_a"}
DETERMINISTIC = sorted(ORDER.keys() - STOCHASTIC)
GRIDS = ("uniform", "edm", "alternating")
PROCESSES = {"vp": "v_prediction", "ve": "epsilon", "flow": "flow_prediction"}
LONGEST, SHORTEST = 10.0, 0.05  # noise-to-signal ratios that a run of the order tests goes through


def test_every_solver_states_its_order() -> None:
    assert ORDER.keys() == SOLVERS.keys()


def test_solvers_that_add_noise_are_those_of_the_weak_order_test() -> None:
    diffusion = fd.Diffusion(fd.Schedule.linear(20))
    timesteps = diffusion.schedule.timesteps(5)
    noisy = {name for name in SOLVERS if build_table(diffusion, timesteps, name).rows.s.any()}
    assert noisy == STOCHASTIC


# ---- levels of the order tests --------------------------------------------------------------


def ratios(grid: str, steps: int) -> Tensor:
    """steps + 1 noise-to-signal ratios from LONGEST to SHORTEST."""
    if grid == "edm":
        ends = LONGEST ** (1 / 7), SHORTEST ** (1 / 7)
        return torch.linspace(*ends, steps + 1, dtype=torch.float64) ** 7
    strides = torch.ones(steps, dtype=torch.float64)
    if grid == "alternating":
        strides[1::2] = 3
    path = torch.cat((torch.zeros(1, dtype=torch.float64), strides.cumsum(0))) / strides.sum()
    return torch.exp(math.log(LONGEST) + path * math.log(SHORTEST / LONGEST))


def schedule_through(process: str, ratio: Tensor) -> fd.Schedule:
    alpha = {"vp": (1 + ratio**2).rsqrt(), "ve": torch.ones_like(ratio), "flow": 1 / (1 + ratio)}[process]
    return levels_schedule(alpha, alpha * ratio, process)


def test_grids_end_where_they_should_and_the_alternating_ratio_does_not_tend_to_one() -> None:
    for grid in GRIDS:
        ratio = ratios(grid, 64)
        torch.testing.assert_close(ratio[[0, -1]], torch.tensor([LONGEST, SHORTEST]).double())
    strides = ratios("alternating", 512).log().diff()
    torch.testing.assert_close(strides[1::2] / strides[::2], torch.full((256,), 3.0).double())


# ---- deterministic solvers: order on exact mixture scores -----------------------------------


@functools.cache
def problem(dim: int) -> tuple[Mixture, Tensor, Tensor]:
    """A mixture, where 16 trajectories x / alpha start, and where the exact ODE takes them."""
    data = Mixture.random(dim, seed=dim)
    generator = torch.Generator().manual_seed(1)
    start = LONGEST * torch.randn(16, dim, generator=generator, dtype=torch.float64)
    end = runge_kutta(data, start, 1024)
    assert (end - fine_heun(data, start, 4096)).abs().max() < 1e-6
    return data, start, end


def runge_kutta(data: Mixture, y: Tensor, steps: int) -> Tensor:
    """The classical fourth-order method in u = log(level): dy/du = y - D(y)."""
    u, h = math.log(LONGEST), math.log(SHORTEST / LONGEST) / steps

    def slope(y: Tensor, u: float) -> Tensor:
        return y - data.denoise(y, 1.0, math.exp(u))

    for _ in range(steps):
        k1 = slope(y, u)
        k2 = slope(y + h / 2 * k1, u + h / 2)
        k3 = slope(y + h / 2 * k2, u + h / 2)
        k4 = slope(y + h * k3, u + h)
        y, u = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), u + h
    return y


def fine_heun(data: Mixture, y: Tensor, steps: int) -> Tensor:
    levels = ratios("uniform", steps).tolist()
    for level, following in itertools.pairwise(levels):
        slope = (y - data.denoise(y, 1.0, level)) / level
        trial = y + (following - level) * slope
        y = y + (following - level) / 2 * (slope + (trial - data.denoise(trial, 1.0, following)) / following)
    return y


def final_error(solver: str, process: str, grid: str, dim: int, steps: int) -> float:
    """Largest error of x / alpha at the last level: the state before the row that goes on to the clean end."""
    data, start, end = problem(dim)
    schedule = schedule_through(process, ratios(grid, steps))
    diffusion = fd.Diffusion(schedule, PROCESSES[process])
    sampler = fd.Sampler(model_of(data, diffusion), diffusion, solver, steps + 1, dtype=torch.float64)
    *_, state, _ = sampler.iterate(start.shape, x=schedule.alpha[-1] * start)
    return float((state.x / schedule.alpha[0] - end).abs().max())


def slope(steps: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def fitted_order(solver: str, process: str, grid: str, dim: int) -> float:
    steps = [64, 128, 256]
    return slope(steps, [final_error(solver, process, grid, dim, n) for n in steps])


@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_order_of_convergence(solver: str, process: str, grid: str, dim: int) -> None:
    assert fitted_order(solver, process, grid, dim) == pytest.approx(ORDER[solver], abs=0.12)


def without_step_ratio(grid: Grid) -> dict[str, Tensor]:
    """dpmpp_2m with the ratio of neighbouring steps taken to be 1: half a step of extrapolation wherever any is."""
    letters = dpmpp_2m(grid)
    gain = letters["b"] + letters["c1"]
    weight = torch.where(letters["c1"] != 0, 0.5, 0.0)
    return {**letters, "b": gain * (1 + weight), "c1": -gain * weight}


@pytest.mark.parametrize(("grid", "order"), [("uniform", 2), ("edm", 2), ("alternating", 1)])
def test_only_the_alternating_grid_sees_a_missing_step_ratio(
    grid: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVERS, "dpmpp_2m", without_step_ratio)
    assert fitted_order("dpmpp_2m", "vp", grid, 2) == pytest.approx(order, abs=0.12)


# ---- the exact law of a table on Gaussian data ----------------------------------------------

WEAK = {
    "ddpm": ("ddpm", {}),
    "ddpm, large variance": ("ddpm", {"variance": "fixed_large"}),
    "ddim, eta 1": ("ddim", {"eta": 1.0}),
    "euler_a": ("euler_a", {}),
}
HALF_NOISE = {"ddim, eta 1/2": ("ddim", {"eta": 0.5}), "euler_a, eta 1/2": ("euler_a", {"eta": 0.5})}


def law(
    diffusion: fd.Diffusion, data: Gaussian, solver: str, options: dict[str, object], mean: float, variance: float
) -> tuple[float, float]:
    """Mean and variance at the last level of a run over the whole schedule, by its rows: x' = gain x + shift + s z."""
    schedule = diffusion.schedule
    rows = build_table(diffusion, schedule.timesteps(len(schedule)), solver, **options).rows
    levels = zip(schedule.alpha.flip(0).tolist(), schedule.sigma.flip(0).tolist(), strict=True)
    for row, level in zip(rows[:-1], levels, strict=False):
        at_0, at_1 = (predict(diffusion.prediction, x, data.denoise(x, *level), *level) for x in (0.0, 1.0))
        gain, shift = row.a + row.b * (row.p + row.q * (at_1 - at_0)), row.b * row.q * at_0
        mean, variance = gain * mean + shift, gain**2 * variance + row.s**2
    return mean, variance


def reverse_moments(data: Gaussian, mean: float, variance: float) -> tuple[float, float]:
    """Of the reverse SDE from LONGEST to SHORTEST in x / alpha, exactly: deviations shrink by v_end / v_start."""
    v_start, v_end = (data.std**2 + ratio**2 for ratio in (LONGEST, SHORTEST))
    shrink = v_end / v_start
    return data.mean + shrink * (mean - data.mean), v_end + shrink**2 * (variance - v_start)


def weak_errors(name: str, process: str, grid: str, start: str, steps: int) -> tuple[float, float]:
    """Errors of mean and variance of x / alpha at the last level, from the true law or from a point far away."""
    solver, options = (WEAK | HALF_NOISE)[name]
    data = Gaussian(1.3, 0.6)
    mean, variance = (data.mean, data.std**2 + LONGEST**2) if start == "law" else (data.mean + 100.0, 0.0)
    schedule = schedule_through(process, ratios(grid, steps))
    diffusion = fd.Diffusion(schedule, PROCESSES[process])
    alpha, alpha_end = float(schedule.alpha[-1]), float(schedule.alpha[0])
    got = law(diffusion, data, solver, options, alpha * mean, alpha**2 * variance)
    expected = reverse_moments(data, mean, variance)
    return abs(got[0] / alpha_end - expected[0]), abs(got[1] / alpha_end**2 - expected[1])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("name", "start"), [*itertools.product(WEAK, ("law", "point")), *((name, "law") for name in HALF_NOISE)]
)
def test_weak_order(name: str, start: str, process: str, grid: str) -> None:
    """The variance is of order 1; the mean is exact, for a posterior is linear in the estimate of x0."""
    steps = [64, 128, 256]
    errors = [weak_errors(name, process, grid, start, n) for n in steps]
    assert max(mean for mean, _ in errors) < 1e-11
    assert slope(steps, [variance for _, variance in errors]) == pytest.approx(1, abs=0.12)


# ---- identities between tables --------------------------------------------------------------

CHAINS = {
    "linear": fd.Schedule.linear,
    "cosine": fd.Schedule.cosine,
    "sigmoid": fd.Schedule.sigmoid,
    "laplace": fd.Schedule.laplace,
    "zero_snr": lambda: fd.Schedule.scaled_linear().rescale_zero_terminal_snr(),
    "edm": fd.Schedule.edm,
    "flow": fd.Schedule.flow,
}


def table_of(schedule: fd.Schedule, prediction: str, solver: str, steps: int, **options: object) -> np.recarray:
    diffusion = fd.Diffusion(schedule, prediction)
    return build_table(diffusion, schedule.timesteps(steps), solver, **options).rows


def largest_difference(one: np.recarray, other: np.recarray) -> float:
    letters = [letter for letter in ("t", *LETTERS) if letter != "clip"]
    return max(float(np.abs(one[letter] - other[letter]).max()) for letter in letters)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("chain", CHAINS)
def test_ddim_with_eta_1_is_ddpm_over_the_full_chain(chain: str, prediction: str) -> None:
    schedule = CHAINS[chain]()
    one = table_of(schedule, prediction, "ddim", len(schedule), eta=1.0)
    other = table_of(schedule, prediction, "ddpm", len(schedule))
    assert len(one) == len(other) == len(schedule)
    assert largest_difference(one, other) <= 1e-12 * float(schedule.sigma.max().clamp(min=1))


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("chain", CHAINS)
def test_euler_is_ddim_and_euler_a_is_ddim_with_noise(chain: str, steps: int) -> None:
    schedule = CHAINS[chain]()
    tables = {
        name: table_of(schedule, "v_prediction", solver, steps, **options)
        for name, solver, options in (
            ("euler", "euler", {}),
            ("ddim", "ddim", {}),
            ("euler_a", "euler_a", {}),
            ("ddim_1", "ddim", {"eta": 1.0}),
            ("euler_a_0.3", "euler_a", {"eta": 0.3}),
            ("ddim_0.3", "ddim", {"eta": 0.3}),
        )
    }
    for one, other in (("euler", "ddim"), ("euler_a", "ddim_1"), ("euler_a_0.3", "ddim_0.3")):
        assert largest_difference(tables[one], tables[other]) <= 1e-12


# ---- the table itself -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_a_record_array_by_the_letters(solver: str) -> None:
    schedule = fd.Schedule.linear(100)
    table = build_table(fd.Diffusion(schedule), schedule.timesteps(10), solver, clip=2.5)
    assert table.rows.dtype.names == ("t", *LETTERS)
    assert all(table.rows[letter].dtype == np.float64 for letter in LETTERS)
    assert len(table) == len(table.rows) == len(table.timesteps) == (19 if solver == "heun" else 10)
    assert np.array_equal(table.rows.t, table.timesteps.double().numpy())
    assert (table.rows["clip"] == 2.5).all()
    tensor = table.tensor(torch.device("cpu"), torch.float64)
    assert all(np.array_equal(tensor[:, i], table.rows[letter]) for i, letter in enumerate(LETTERS))


@pytest.mark.parametrize("letter", ["t", *(letter for letter in LETTERS if letter != "clip")])
def test_letters_are_attributes_of_the_rows(letter: str) -> None:
    """All but clip, which is a method of numpy arrays and is read as rows["clip"]."""
    schedule = fd.Schedule.linear(100)
    rows = build_table(fd.Diffusion(schedule), schedule.timesteps(10), "heun", clip=2.5).rows
    assert np.array_equal(getattr(rows, letter), rows[letter])
    assert getattr(rows[3], letter) == rows[letter][3]


@pytest.mark.parametrize(
    ("solver", "steps", "history", "anchored"),
    [
        ("ddpm", 10, 0, False),
        ("ddim", 10, 0, False),
        ("euler", 10, 0, False),
        ("euler_a", 10, 0, False),
        ("heun", 10, 0, True),
        ("heun", 1, 0, False),
        ("dpmpp_2m", 10, 1, False),
        ("dpmpp_2m", 2, 0, False),
    ],
)
def test_the_table_says_what_the_rows_store(solver: str, steps: int, history: int, anchored: bool) -> None:
    schedule = fd.Schedule.cosine(100)
    table = build_table(fd.Diffusion(schedule), schedule.timesteps(steps), solver)
    assert (table.history, table.anchored) == (history, anchored)


@pytest.mark.parametrize("schedule", [fd.Schedule.edm(30), fd.Schedule.flow(30, shift=3.0), fd.Schedule.linear(30)])
def test_rows_tell_the_network_time_and_input_scale_of_the_schedule(schedule: fd.Schedule) -> None:
    timesteps = schedule.timesteps(7, "linspace")
    for solver in SOLVERS:
        table = build_table(fd.Diffusion(schedule, "v_prediction"), timesteps, solver)
        assert np.array_equal(table.rows.t, schedule.c_noise[table.timesteps].double().numpy())
        assert np.array_equal(table.rows.c_in, schedule.c_in[table.timesteps].numpy())


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_scales_belong_to_the_timesteps(solver: str) -> None:
    """Each step's scale is that of its timestep, in every row that evaluates the network there."""
    schedule = fd.Schedule.linear(100)
    timesteps, scales = schedule.timesteps(5), [1.0, 2.0, 3.0, 4.0, 5.0]
    table = build_table(fd.Diffusion(schedule), timesteps, solver, guidance_scale=scales)
    at = dict(zip(timesteps.tolist(), scales, strict=True))
    assert table.rows.w.tolist() == [at[t] for t in table.timesteps.tolist()]
    assert set(table.rows.w) == set(scales)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_point_data_is_solved_exactly_at_every_level(solver: str, chain: str) -> None:
    """With one data point c the solution is alpha c + sigma noise, a straight line in every solver's space."""
    schedule = CHAINS[chain]()
    diffusion, point = fd.Diffusion(schedule, "sample"), torch.tensor([[-0.7, 0.4]]).double()
    sampler = fd.Sampler(lambda x, t: point.expand_as(x), diffusion, solver, 9, dtype=torch.float64)
    noise = torch.tensor([[1.1, -2.0], [0.3, 0.0]]).double()
    at = sampler.timesteps[0]
    states = list(sampler.iterate((2, 2), x=schedule.alpha[at] * point + schedule.sigma[at] * noise))
    for state, t in zip(states[:-1], sampler.table.timesteps[1:], strict=True):
        expected = schedule.alpha[t] * point + schedule.sigma[t] * noise
        assert (state.x - expected).abs().max() <= 1e-11 * float(schedule.sigma.max().clamp(min=1))
    assert (states[-1].x - point).abs().max() <= 1e-14


# ---- parity with scalar forms, step by step -------------------------------------------------
# Plain functions on floats, in the space x / alpha with noise level sigma / alpha, where diffusion is adding noise of
# that level to the data; for flow and where the start holds no signal heun uses x / (alpha + sigma).

Levels = list[tuple[float, float]]
Estimate = Callable[[int, float], float]
Steps = Iterator[tuple[float, float]]  # (x, x0) after each network evaluation


def direction(x: float, x0: float, level: tuple[float, float]) -> float:
    """dy/dlevel: the noise that the estimate of x0 leaves in x."""
    alpha, sigma = level
    return (x - alpha * x0) / sigma


def ratio_of(level: tuple[float, float]) -> float:
    return level[1] / level[0] if level[0] else math.inf


def scalar_ddim(levels: Levels, x: float, estimate: Estimate, noise: list[float], eta: float = 0.0) -> Steps:
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        before, after = ratio_of(level), ratio_of(following)
        up = eta * after * math.sqrt(1 - (after / before) ** 2)
        down = math.sqrt(after**2 - up**2)
        x = following[0] * (x0 + down * direction(x, x0, level) + up * noise[i])
        yield x, x0


def scalar_ddpm(
    levels: Levels, x: float, estimate: Estimate, noise: list[float], variance: str = "fixed_small"
) -> Steps:
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        before, after = ratio_of(level), ratio_of(following)
        left = (after / before) ** 2
        mean = x0 + after**2 / before * direction(x, x0, level)
        std = level[1] if variance == "fixed_large" else following[1]
        x = following[0] * mean + (std * math.sqrt(1 - left) * noise[i] if after else 0.0)
        yield x, x0


def scalar_heun(levels: Levels, x: float, estimate: Estimate, noise: list[float], flow: bool = False) -> Steps:
    scales = [alpha + sigma if flow or levels[0][0] == 0 else alpha for alpha, sigma in levels]
    times = [sigma / scale for (_, sigma), scale in zip(levels, scales, strict=True)]
    for i in range(len(levels) - 1):
        y, h = x / scales[i], times[i + 1] - times[i]
        x0 = estimate(i, x)
        slope = (y - x0) / times[i]
        trial = y + h * slope
        x = scales[i + 1] * trial
        yield x, x0
        if times[i + 1] > 0:
            x0 = estimate(i + 1, x)
            y = y + h * (slope + (trial - x0) / times[i + 1]) / 2
            x = scales[i + 1] * y
            yield x, x0


def scalar_dpmpp_2m(levels: Levels, x: float, estimate: Estimate, noise: list[float]) -> Steps:
    def half_log_snr(level: tuple[float, float]) -> float:
        ratio = ratio_of(level)
        return math.inf if ratio == 0 else -math.log(ratio)

    last_x0, last_h = 0.0, math.inf
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x0 = estimate(i, x)
        h = half_log_snr(following) - half_log_snr(level)
        slope = 0.0 if last_h == math.inf or h == math.inf else (x0 - last_x0) / last_h
        x = following[1] / level[1] * x - following[0] * math.expm1(-h) * (x0 + h / 2 * slope if slope else x0)
        last_x0, last_h = x0, h
        yield x, x0


SCALAR = {
    "ddpm": ("ddpm", {}, scalar_ddpm),
    "ddpm, large variance": ("ddpm", {"variance": "fixed_large"}, scalar_ddpm),
    "ddim": ("ddim", {}, scalar_ddim),
    "ddim, eta 1/2": ("ddim", {"eta": 0.5}, scalar_ddim),
    "ddim, eta 1": ("ddim", {"eta": 1.0}, scalar_ddim),
    "euler": ("euler", {}, scalar_ddim),
    "euler_a": ("euler_a", {"eta": 1.0}, scalar_ddim),
    "heun": ("heun", {}, scalar_heun),
    "dpmpp_2m": ("dpmpp_2m", {}, scalar_dpmpp_2m),
}
TRACED = {
    "linear": fd.Schedule.linear(),
    "scaled_linear": fd.Schedule.scaled_linear(),
    "cosine": fd.Schedule.cosine(),
    "sigmoid": fd.Schedule.sigmoid(400),
    "laplace": fd.Schedule.laplace(),
    "zero_snr": fd.Schedule.linear().rescale_zero_terminal_snr(),
    "edm": fd.Schedule.edm(),
    "flow": fd.Schedule.flow(shift=3.0),
}
SPACINGS = ("leading", "trailing", "linspace", "karras")


def test_every_solver_has_a_scalar_form() -> None:
    assert {solver for solver, _, _ in SCALAR.values()} == set(SOLVERS)


def two_points(x, alpha, sigma, side, tanh):
    """The exact estimate of x0 for data at +-side with a spread of 0.3, on floats or tensors."""
    variance = (0.3 * alpha) ** 2 + sigma**2
    gain = 0.09 * alpha / variance
    return gain * x + (1 - alpha * gain) * side * tanh(alpha * side * x / variance)


def traced_model(diffusion: fd.Diffusion) -> Callable[..., Tensor]:
    """Data at +-0.9 for y = 1 and +-0.4 for y = 0."""
    schedule = diffusion.schedule
    times = schedule.c_noise.double()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        at = int((times - t[0]).abs().argmin())
        alpha, sigma = float(schedule.alpha[at]), float(schedule.sigma[at])
        x = x / float(schedule.c_in[at])
        x0 = two_points(x, alpha, sigma, (0.4 + 0.5 * y)[:, None], torch.tanh)
        return predict(diffusion.prediction, x, x0, alpha, sigma)

    return model


def to_x0(prediction: str, x: float, out: float, level: tuple[float, float]) -> float:
    alpha, sigma = level
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    if prediction == "sample":
        return out
    if prediction == "v_prediction":
        return (alpha * x - sigma * math.hypot(alpha, sigma) * out) / (alpha**2 + sigma**2)
    return (x - sigma * out) / (alpha + sigma)


def scalar_estimate(prediction: str, levels: Levels, scales: list[float], clip: float | None) -> Estimate:
    def estimate(i: int, x: float) -> float:
        cond, uncond = (
            predict(prediction, x, two_points(x, *levels[i], side, math.tanh), *levels[i]) for side in (0.9, 0.4)
        )
        out = uncond + scales[i] * (cond - uncond) if scales[i] != 1 else cond
        x0 = to_x0(prediction, x, out, levels[i])
        return x0 if clip is None else min(max(x0, -clip), clip)

    return estimate


def trace_difference(name: str, chain: str, config: tuple, dtype: torch.dtype = torch.float64) -> float:
    """Largest difference of x and x0 after any row, relative to the largest of 1, x, x0 and the terms of their sums."""
    spacing, prediction, steps, clip, scales = config
    solver, options, scalar = SCALAR[name]
    schedule = TRACED[chain]
    diffusion = fd.Diffusion(schedule, prediction)
    sampler = fd.Sampler(
        traced_model(diffusion), diffusion, solver, steps, spacing, scales, clip, dtype=dtype, **options
    )
    condition = {"y": torch.ones(1, dtype=dtype), "uncond": {"y": torch.zeros(1, dtype=dtype)}}
    states = list(sampler.iterate((1, 2), seed=steps, **condition))

    at = sampler.timesteps
    levels = [*zip(schedule.alpha[at].tolist(), schedule.sigma[at].tolist(), strict=True), (1.0, 0.0)]
    noise = fd.noise.normal(
        (len(states), 2), seed=steps, step=torch.arange(len(states)), sample=[0] * len(states), dtype=dtype
    ).tolist()
    start = fd.noise.normal((1, 2), seed=steps, stream=Stream.INITIAL, dtype=dtype)[0].tolist()
    scale = 1.0 if schedule.variance_preserving else levels[0][1]
    estimate = scalar_estimate(prediction, levels, scales, clip)
    options = {**options, "flow": True} if (solver, chain) == ("heun", "flow") else options
    worst, size = 0.0, 1.0
    for element in range(2):
        draws = [z[element] for z in noise]
        x = scale * start[element]
        expected = list(scalar(levels, x, estimate, draws, **options))
        for row, state, pair in zip(sampler.table.rows, states, expected, strict=True):
            got = float(state.x[0, element]), float(state.x0[0, element])
            assert math.isfinite(got[0] + got[1])
            worst = max(worst, abs(got[0] - pair[0]), abs(got[1] - pair[1]))
            size = max(size, abs(pair[0]), abs(pair[1]), abs(row.a * x))
            x = pair[0]
    return worst / size


def configurations(name: str, chain: str, count: int) -> list[tuple]:
    """``count`` of the combinations of spacing, prediction, N = 1...50, clip and guidance that exist, evenly drawn."""
    draw = random.Random(f"{name} {chain} {count}")
    found: list[tuple] = []
    while len(found) < count:
        spacing, prediction = SPACINGS[len(found) % 4], PREDICTIONS[draw.randrange(4)]
        steps, clip = int(51 ** draw.random()), draw.choice([None, None, 0.8])
        scales = draw.choice([[1.0] * steps, [2.5] * steps, [1.0 + i % 3 for i in range(steps)]])
        if prediction == "epsilon" and TRACED[chain].alpha[TRACED[chain].timesteps(steps, spacing)[0]] == 0:
            continue  # epsilon says nothing about x0 there, see test_epsilon_cannot_start_without_signal
        found.append((spacing, prediction, steps, clip, scales))
    return found


@pytest.mark.parametrize("chain", TRACED)
@pytest.mark.parametrize("name", SCALAR)
def test_step_by_step_parity_with_the_scalar_form(name: str, chain: str) -> None:
    for config in configurations(name, chain, 28):
        assert trace_difference(name, chain, config) <= 1e-10, config


@pytest.mark.slow
@pytest.mark.parametrize("chain", TRACED)
@pytest.mark.parametrize("name", SCALAR)
def test_step_by_step_parity_with_the_scalar_form_at_length(name: str, chain: str) -> None:
    for config in configurations(name, chain, 100):
        assert trace_difference(name, chain, config) <= 1e-10, config


@pytest.mark.parametrize("chain", TRACED)
@pytest.mark.parametrize("name", SCALAR)
def test_step_by_step_parity_in_float32(name: str, chain: str) -> None:
    """Without epsilon, whose estimate of x0 divides the rounding of the network's input by alpha."""
    for config in configurations(name, chain, 4):
        if config[1] != "epsilon":
            assert trace_difference(name, chain, config, torch.float32) <= 2e-5, config


@pytest.mark.parametrize("chain", ["zero_snr", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_epsilon_cannot_start_without_signal(solver: str, chain: str) -> None:
    schedule = TRACED[chain]
    with pytest.raises(fd.InputError, match="zero terminal SNR"):
        build_table(fd.Diffusion(schedule, "epsilon"), schedule.timesteps(10), solver)
