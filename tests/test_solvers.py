"""Solvers: order of convergence on exact scores, weak order, identities between tables, parity with scalar forms."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, levels_at, levels_schedule, model_of, predict
from scalar_solvers import SCALAR, Estimate, Level, Levels
from torch import Tensor

import fastdiff as fd
from fastdiff.noise import Stream
from fastdiff.ops.row import LETTERS, PREDICTIONS
from fastdiff.schedule import SPACINGS
from fastdiff.solvers import SOLVERS, Grid, dpmpp_2m
from fastdiff.table import build_table

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = ("ddpm", "ddim", "ddim_inverse", "euler", "euler_a")
SECOND = ("heun", "edm", "dpm2", "dpmpp_2s", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "pndm")
HIGHER = {"dpmpp_3m_true": 3, "unipc": 3, "deis": 3, "lms": 4}
#: of convergence; weak for those that add noise. lcm has none: it takes its network for the solution.
ORDER = dict.fromkeys(FIRST, 1) | dict.fromkeys(SECOND, 2) | HIGHER | {"lcm": 0}
BETWEEN = {"edm", "dpm2", "dpmpp_2s", "dpmpp_sde"}  # which go between the timesteps
F64 = torch.float64
STOCHASTIC = {"ddpm", "euler_a", "edm", "lcm", "dpmpp_sde", "dpmpp_2m_sde"}
DETERMINISTIC = sorted(ORDER.keys() - STOCHASTIC - {"ddim_inverse"})
GRIDS = ("uniform", "edm", "alternating")
PROCESSES = {"vp": "v_prediction", "ve": "epsilon", "flow": "flow_prediction"}
LONGEST, SHORTEST = 80.0, 0.05  # noise-to-signal ratios that a run of the order tests goes through


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
    end = runge_kutta(data, start, 2048)
    assert (end - fine_heun(data, start, 8192)).abs().max() < 1e-6
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
    least = {"dpmpp_3m": 128, "deis": 128, "dpmpp_3m_true": 256}.get(solver, 64)
    steps = [least, 2 * least, 4 * least]
    return slope(steps, [final_error(solver, process, grid, dim, n) for n in steps])


def quick(grid: str, process: str, dim: int) -> bool:
    """The hostile grid in each process, and each grid once."""
    return dim == 2 and (process == "vp" or grid == "alternating")


@pytest.mark.parametrize(
    ("grid", "process", "dim"),
    [
        case if quick(*case) else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(GRIDS, PROCESSES, (2, 8))
    ],
)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_order_of_convergence(solver: str, grid: str, process: str, dim: int) -> None:
    """The numbers of pndm are those of equal steps; on others it is of first order."""
    order = 1 if (solver, grid) == ("pndm", "alternating") else ORDER[solver]
    far = {"dpmpp_3m": 0.2, "dpmpp_3m_true": 0.2, "unipc": 0.2, "deis": 0.2, "lms": 0.3}.get(solver, 0.12)
    if (solver, process, dim) == ("lms", "flow", 8):
        far = 1.5  # its first steps, of lower order, are seen
    assert fitted_order(solver, process, grid, dim) == pytest.approx(order, abs=far)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
def test_an_image_is_found_again_from_its_noise(process: str, grid: str) -> None:
    """There by ddim_inverse and back by ddim, in twice the steps with half the error."""
    data, errors = Mixture.random(2, seed=2), []
    image = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for steps in (64, 128, 256):
        diffusion = fd.Diffusion(schedule_through(process, ratios(grid, steps)), PROCESSES[process])
        model = model_of(data, diffusion)
        there, back = (fd.Sampler(model, diffusion, s, steps, dtype=torch.float64) for s in ("ddim_inverse", "ddim"))
        errors.append(float((back(image.shape, x=there(image.shape, x=image)) - image).abs().max()))
    assert slope([64, 128, 256], errors) == pytest.approx(1, abs=0.12)


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
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
}
#: of other laws on the way, which a run that starts from the true law keeps
OTHER = {
    "ddim, eta 1/2": ("ddim", {"eta": 0.5}),
    "euler_a, eta 1/2": ("euler_a", {"eta": 0.5}),
    "dpmpp_sde, eta 1/2": ("dpmpp_sde", {"eta": 0.5}),
    "dpmpp_2m_sde, eta 1/2": ("dpmpp_2m_sde", {"eta": 0.5}),
    "edm": ("edm", {"s_churn": 20.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}),
}


def law(
    diffusion: fd.Diffusion, data: Gaussian, solver: str, options: dict[str, object], mean: float, variance: float
) -> tuple[float, float]:
    """Mean and variance where a run over the whole schedule arrives at its last level, by its rows.

    For Gaussian data x0 is affine in x, and a row a linear map of the state: x, h1, h2, h3, the anchor, and 1.
    """
    schedule = diffusion.schedule
    table = build_table(diffusion, schedule.timesteps(len(schedule)), solver, final="minimal", **options)
    moments = np.zeros((6, 6))  # of the state, about zero
    moments[0, 0], moments[0, 5], moments[5, 0], moments[5, 5] = variance + mean**2, mean, mean, 1
    x, one = np.eye(6)[[0, 5]]
    for row in table.rows:
        alpha, sigma, _ = (float(level) for level in levels_at(schedule, torch.tensor(row.t)))
        at_0, at_1 = (predict(diffusion.prediction, y, data.denoise(y, alpha, sigma), alpha, sigma) for y in (0.0, 1.0))
        x0 = row.p * x + row.q * ((at_1 - at_0) * x + at_0 * one)
        state = np.stack((row.a * x + row.b * x0, row.u * x + row.v * x0, *np.eye(6)[1:3], row.m * x + row.n * x0, one))
        state[0, 1:5] = row.c1, row.c2, row.c3, row.e
        state[4, 4] += row.k
        moments = state @ moments @ state.T
        moments[0, 0] += row.s**2
    return moments[0, 5], moments[0, 0] - moments[0, 5] ** 2


def reverse_moments(data: Gaussian, mean: float, variance: float) -> tuple[float, float]:
    """Of the reverse SDE from LONGEST to SHORTEST in x / alpha, exactly: deviations shrink by v_end / v_start."""
    v_start, v_end = (data.std**2 + ratio**2 for ratio in (LONGEST, SHORTEST))
    shrink = v_end / v_start
    return data.mean + shrink * (mean - data.mean), v_end + shrink**2 * (variance - v_start)


def weak_errors(name: str, process: str, grid: str, start: str, steps: int) -> tuple[float, float]:
    """Errors of mean and variance of x / alpha at the last level, from the true law or from a point far away."""
    solver, options = (WEAK | OTHER)[name]
    data = Gaussian(1.3, 0.6)
    mean, variance = (data.mean, data.std**2 + LONGEST**2) if start == "law" else (data.mean + 100.0, 0.0)
    schedule = schedule_through(process, ratios(grid, steps))
    diffusion = fd.Diffusion(schedule, PROCESSES[process])
    alpha, alpha_end = float(schedule.alpha[-1]), float(schedule.alpha[0])
    got = law(diffusion, data, solver, options, alpha * mean, alpha**2 * variance)
    expected = reverse_moments(data, mean, variance)
    return abs(got[0] / alpha_end - expected[0]), abs(got[1] / alpha_end**2 - expected[1])


@pytest.mark.parametrize(
    ("grid", "process"),
    [
        case if quick(*case, 2) else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(GRIDS, PROCESSES)
    ],
)
@pytest.mark.parametrize(
    ("name", "start"), [*itertools.product(WEAK, ("law", "point")), *((name, "law") for name in OTHER)]
)
def test_weak_order(name: str, start: str, process: str, grid: str) -> None:
    """Of the variance; the mean is exact, for the steps are linear in x0, whose mean on a path does not change.

    On flow's levels, which are others than its churn is made for, edm errs by 1e-5 of either sign.
    """
    steps = [64, 128, 256]
    errors = [weak_errors(name, process, grid, start, n) for n in steps]
    assert max(mean for mean, _ in errors) < 1e-11
    fitted = slope(steps, [variance for _, variance in errors])
    if (name, process) == ("edm", "flow"):
        assert errors[-1][1] < 3e-5
    else:
        assert fitted == pytest.approx(ORDER[(WEAK | OTHER)[name][0]], abs=0.12)


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
    evaluations = {"pndm": 11} | dict.fromkeys(("heun", "edm", "dpm2", "dpmpp_2s", "dpmpp_sde"), 19)
    assert len(table) == len(table.rows) == len(table.timesteps) == evaluations.get(solver, 10)
    assert np.array_equal(table.rows.t, table.timesteps.double().numpy())
    assert table.timesteps.dtype == (F64 if solver in BETWEEN else torch.int64)
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
        ("heun", 10, 1, False),
        ("heun", 1, 0, False),
        ("dpmpp_2m", 10, 1, False),
        ("dpmpp_2m", 2, 0, False),
        ("dpmpp_sde", 10, 1, False),
        ("dpmpp_3m", 10, 2, False),
        ("unipc", 10, 2, False),
        ("deis", 10, 2, False),
        ("lms", 10, 3, False),
        ("pndm", 10, 3, True),
        ("dpm2", 10, 1, False),
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
        whole = table.timesteps == table.timesteps.round()
        assert bool(whole.all()) or solver in BETWEEN
        rows, at = table.rows[whole.numpy()], table.timesteps[whole].long()
        assert np.array_equal(rows.t, schedule.c_noise[at].double().numpy())
        assert np.array_equal(rows.c_in, schedule.c_in[at].numpy())


@pytest.mark.parametrize("schedule", [fd.Schedule.edm(30), fd.Schedule.flow(30, shift=3.0), fd.Schedule.linear(30)])
def test_between_timesteps_the_network_is_told_the_level_it_is_given(schedule: fd.Schedule) -> None:
    """In the middle of a step of log-SNR, by what networks of each process learned from."""
    diffusion = fd.Diffusion(schedule, "v_prediction")
    table = build_table(diffusion, schedule.timesteps(7, "linspace")[1:], "dpmpp_2s")
    levels = schedule.at(table.timesteps)
    before, middle, after = (levels.alpha / levels.sigma)[:9].log().unfold(0, 3, 2).unbind(1)
    torch.testing.assert_close(middle, (before + after) / 2, atol=1e-12, rtol=1e-12)
    for got, expected in zip(
        (levels.alpha, levels.sigma, levels.c_in), levels_at(schedule, levels.c_noise), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert np.array_equal(table.rows.t, levels.c_noise.numpy())


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_scales_belong_to_the_timesteps(solver: str) -> None:
    """Each step's scale is that of its timestep, in every row that evaluates the network there."""
    schedule = fd.Schedule.linear(100)
    timesteps, scales = schedule.timesteps(5), [1.0, 2.0, 3.0, 4.0, 5.0]
    table = build_table(fd.Diffusion(schedule), timesteps, solver, guidance_scale=scales)
    at = dict(zip(timesteps.tolist(), scales, strict=True))
    for w, t in zip(table.rows.w.tolist(), table.timesteps.tolist(), strict=True):
        nearest = {at[step] for step in timesteps.tolist() if abs(step - t) < 20}
        assert (w == at[t]) if t in at else (w in nearest)
    assert set(table.rows.w) == set(scales) - ({1.0} if solver == "ddim_inverse" else set())


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
    levels = schedule.at(sampler.table.timesteps.double())
    for state, alpha, sigma in zip(states[:-1], levels.alpha[1:], levels.sigma[1:], strict=True):
        assert (state.x - alpha * point - sigma * noise).abs().max() <= 1e-11 * float(schedule.sigma.max().clamp(min=1))
    assert (states[-1].x - point).abs().max() <= 1e-11


def test_a_run_may_end_at_the_schedule_s_lowest_level() -> None:
    """There the network is asked for the last time by Heun's corrector, and by others not at all."""
    schedule = fd.Schedule.edm(30)
    diffusion = fd.Diffusion(schedule, "sample")
    point, noise = torch.tensor([[-0.7, 0.4]]).double(), torch.tensor([[1.1, -2.0]]).double()
    for solver in DETERMINISTIC:
        for spacing in ("trailing", "linspace"):
            sampler = fd.Sampler(
                lambda x, t: point.expand_as(x), diffusion, solver, 7, spacing, final="minimal", dtype=torch.float64
            )
            x = sampler((1, 2), x=schedule.alpha[-1] * point + schedule.sigma[-1] * noise)
            assert (x - schedule.alpha[0] * point - schedule.sigma[0] * noise).abs().max() <= 1e-12
            assert (0 in sampler.table.timesteps) == (solver == "heun")
    with pytest.raises(fd.InputError, match="needs one above it"):
        build_table(diffusion, torch.tensor([0]), "ddim", final="minimal")
    with pytest.raises(fd.InputError, match="unknown final 'last': choose from zero, minimal"):
        build_table(diffusion, torch.tensor([3]), "ddim", final="last")


@pytest.mark.parametrize("solver", SOLVERS)
def test_levels_that_repeat_are_named(solver: str) -> None:
    ratio = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    schedule = schedule_through("ve", ratio)
    with pytest.raises(fd.InputError, match=r"timesteps \[2, 1\] have the same log-SNR"):
        build_table(fd.Diffusion(schedule), schedule.timesteps(4), solver)


BAD_OPTIONS = {
    "unipc order": ("unipc", {"order": 4}, "order must be 1, 2 or 3, got 4"),
    "unipc variant": ("unipc", {"variant": "bh3"}, "variant must be bh1 or bh2"),
    "deis order": ("deis", {"order": 0}, "order must lie in 1...4"),
    "lms order": ("lms", {"order": 5}, "order must lie in 1...4"),
    "lcm data": ("lcm", {"sigma_data": 0.0}, "sigma_data must be positive"),
    "edm churn": ("edm", {"s_churn": -1.0}, "s_churn and s_noise must not be negative"),
    "sde eta": ("dpmpp_sde", {"eta": -0.1}, "eta must not be negative"),
    "2m sde eta": ("dpmpp_2m_sde", {"eta": -0.1}, "eta must not be negative"),
    "unknown": ("lms", {"steps": 3}, "solver lms: .*steps"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_named(case: str) -> None:
    solver, options, message = BAD_OPTIONS[case]
    schedule = fd.Schedule.linear(10)
    with pytest.raises(fd.InputError, match=message):
        build_table(fd.Diffusion(schedule), schedule.timesteps(4), solver, **options)


# ---- parity with scalar forms, step by step -------------------------------------------------
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


def test_every_solver_has_a_scalar_form() -> None:
    assert {solver for solver, *_ in SCALAR.values()} == set(SOLVERS)


def two_points(x, alpha, sigma, side, tanh):
    """The exact estimate of x0 for data at +-side with a spread of 0.3, on floats or tensors."""
    variance = (0.3 * alpha) ** 2 + sigma**2
    gain = 0.09 * alpha / variance
    return gain * x + (1 - alpha * gain) * side * tanh(alpha * side * x / variance)


def traced_model(diffusion: fd.Diffusion) -> Callable[..., Tensor]:
    """Data at +-0.9 for y = 1 and +-0.4 for y = 0."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma, c_in = (float(level) for level in levels_at(diffusion.schedule, t[0].double()))
        x = x / c_in
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
    def estimate(i: int, x: float, level: Level | None = None) -> float:
        level, scale = level or levels[i], scales[min(i, len(scales) - 1)]
        cond, uncond = (predict(prediction, x, two_points(x, *level, side, math.tanh), *level) for side in (0.9, 0.4))
        x0 = to_x0(prediction, x, uncond + scale * (cond - uncond) if scale != 1 else cond, level)
        return x0 if clip is None else min(max(x0, -clip), clip)

    return estimate


def trace_difference(name: str, chain: str, config: tuple, dtype: torch.dtype = torch.float64) -> float:
    """Largest difference of x and x0 after any row, relative to the largest of 1, x, x0 and the terms of their sums."""
    spacing, prediction, steps, clip, scales, final = config
    solver, options, scalar, settings = SCALAR[name]
    schedule = TRACED[chain]
    diffusion = fd.Diffusion(schedule, prediction)
    sampler = fd.Sampler(
        traced_model(diffusion), diffusion, solver, steps, spacing, scales, clip, final=final, dtype=dtype, **options
    )
    condition = {"y": torch.ones(1, dtype=dtype), "uncond": {"y": torch.zeros(1, dtype=dtype)}}
    start = fd.noise.normal((1, 2), seed=steps, stream=Stream.INITIAL, dtype=dtype)
    image = {"x": start} if solver == "ddim_inverse" else {}
    states = list(sampler.iterate((1, 2), seed=steps, **image, **condition))

    at = sampler.timesteps if final == "zero" else sampler.timesteps[sampler.timesteps > 0]
    end = (1.0, 0.0) if final == "zero" else (float(schedule.alpha[0]), float(schedule.sigma[0]))
    levels = [*zip(schedule.alpha[at].tolist(), schedule.sigma[at].tolist(), strict=True), end]
    noise = fd.noise.normal(
        (len(states), 2), seed=steps, step=torch.arange(len(states)), sample=[0] * len(states), dtype=dtype
    ).tolist()
    scale = 1.0 if schedule.variance_preserving or image else levels[0][1]
    estimate = scalar_estimate(prediction, levels, scales, clip)
    settings = {**options, **settings, "flow": chain == "flow", "times": at.tolist()}
    worst, size = 0.0, 1.0
    for element in range(2):
        draws = [z[element] for z in noise]
        x = scale * float(start[0, element])
        expected = list(scalar(levels, x, estimate, draws, **settings))
        for row, state, pair in zip(sampler.table.rows, states, expected, strict=True):
            got = float(state.x[0, element]), float(state.x0[0, element])
            assert math.isfinite(got[0] + got[1])
            worst = max(worst, abs(got[0] - pair[0]), abs(got[1] - pair[1]))
            size = max(size, abs(pair[0]), abs(pair[1]), *np.abs((row.a * x, row.c1, row.c2, row.c3)))
            x = pair[0]
    return worst / size


def configurations(name: str, chain: str, count: int) -> list[tuple]:
    """``count`` of the combinations of spacing, prediction, N = 1...50, clip, guidance and end, evenly drawn."""
    draw = random.Random(f"{name} {chain} {count}")
    found: list[tuple] = []
    while len(found) < count:
        spacing, prediction = SPACINGS[len(found) % len(SPACINGS)], PREDICTIONS[draw.randrange(4)]
        steps, clip = int(51 ** draw.random()), draw.choice([None, None, 0.8])
        scales = draw.choice([[1.0] * steps, [2.5] * steps, [1.0 + i % 3 for i in range(steps)]])
        final = draw.choice(["zero", "zero", "minimal"]) if steps > 1 else "zero"
        if prediction == "epsilon" and TRACED[chain].alpha[TRACED[chain].timesteps(steps, spacing)[0]] == 0:
            continue  # epsilon says nothing about x0 there, see test_epsilon_cannot_start_without_signal
        found.append((spacing, prediction, steps, clip, scales, final))
    return found


def bound(name: str, chain: str) -> float:
    """The cosine schedule starts at a ratio of 20,000, from which plain sums over that ratio lose four digits more."""
    return 1e-9 if chain == "cosine" and SCALAR[name][0] in ("heun", "edm", "dpm2", "deis", "lms", "pndm") else 1e-10


@pytest.mark.parametrize("chain", TRACED)
@pytest.mark.parametrize("name", SCALAR)
def test_step_by_step_parity_with_the_scalar_form(name: str, chain: str) -> None:
    for config in configurations(name, chain, 4):
        assert trace_difference(name, chain, config) <= bound(name, chain), config


@pytest.mark.slow
@pytest.mark.parametrize("chain", TRACED)
@pytest.mark.parametrize("name", SCALAR)
def test_step_by_step_parity_with_the_scalar_form_at_length(name: str, chain: str) -> None:
    for config in configurations(name, chain, 50):
        assert trace_difference(name, chain, config) <= bound(name, chain), config


@pytest.mark.parametrize("chain", TRACED)
@pytest.mark.parametrize("name", SCALAR)
def test_step_by_step_parity_in_float32(name: str, chain: str) -> None:
    """Without epsilon, whose estimate of x0 divides the rounding of the network's input by alpha."""
    for config in configurations(name, chain, 4):
        if config[1] != "epsilon":
            assert trace_difference(name, chain, config, torch.float32) <= 2e-5, config


@pytest.mark.parametrize("chain", ["zero_snr", "flow"])
@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "ddim_inverse"])
def test_epsilon_cannot_start_without_signal(solver: str, chain: str) -> None:
    schedule = TRACED[chain]
    with pytest.raises(fd.InputError, match="zero terminal SNR"):
        build_table(fd.Diffusion(schedule, "epsilon"), schedule.timesteps(10), solver)
