"""Proves the schedules against exact arithmetic and closed forms, and every spacing for every number of steps."""

import json
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

import fastdiff as fd

Schedule = fd.Schedule
T = 1000
VARIANCE_PRESERVING = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "cosine": Schedule.cosine,
    "sigmoid": Schedule.sigmoid,
    "laplace": Schedule.laplace,
    "from_betas": lambda n=T: Schedule.from_betas(np.linspace(1e-4, 0.02, n)),
}
OTHERS = {"edm": Schedule.edm, "flow": Schedule.flow}
ALL = {**VARIANCE_PRESERVING, **OTHERS}
SPACINGS = ("leading", "trailing", "linspace", "karras")


def names(*groups):
    return pytest.mark.parametrize("name", [name for group in groups for name in group])


def relative(actual, truth):
    truth = np.asarray(truth, np.longdouble)
    return float(np.max(np.abs(actual.numpy().astype(np.longdouble) - truth) / np.abs(truth)))


# ---- identities -----------------------------------------------------------------------------


@names(VARIANCE_PRESERVING)
@pytest.mark.parametrize("n", [1, 2, 10, T])
def test_variance_is_preserved(name, n):
    schedule = VARIANCE_PRESERVING[name](n)
    assert (schedule.alpha**2 + schedule.sigma**2 - 1).abs().max() <= 1e-12
    assert schedule.variance_preserving


@names(OTHERS)
def test_other_processes_do_not_claim_to_preserve_variance(name):
    assert not ALL[name]().variance_preserving


@names(ALL)
@pytest.mark.parametrize("n", [2, 3, 10, T])
def test_snr_strictly_decreases(name, n):
    schedule = ALL[name](n)
    assert len(schedule) == n
    assert (schedule.log_snr.diff() < 0).all()
    assert (schedule.snr.diff() < 0).all()
    assert (schedule.sigma.diff() > 0).all()
    assert (schedule.alpha.diff() <= 0).all()


@names(ALL)
def test_snr_is_the_exponential_of_log_snr(name):
    schedule = ALL[name]()
    assert schedule.snr.numpy() == pytest.approx(np.exp(schedule.log_snr.numpy()), rel=1e-12)


@names(ALL)
def test_tables_are_float64_on_the_host(name):
    schedule = ALL[name](7)
    for table in (schedule.alpha, schedule.sigma, schedule.c_in, schedule.snr, schedule.log_snr):
        assert (table.dtype, table.device.type, table.shape) == (torch.float64, "cpu", (7,))


@names(VARIANCE_PRESERVING)
def test_a_discrete_schedule_tells_the_network_its_timestep(name):
    schedule = VARIANCE_PRESERVING[name](9)
    assert schedule.c_noise.dtype == torch.int64
    assert schedule.c_noise.tolist() == list(range(9))
    assert schedule.c_in.tolist() == [1.0] * 9


# ---- formulas -------------------------------------------------------------------------------


def formula_betas(name, n):
    ramp = np.linspace(0, 1, n, dtype=np.longdouble)
    if name == "linear":
        return np.longdouble(1e-4) + (np.longdouble(0.02) - np.longdouble(1e-4)) * ramp
    if name == "scaled_linear":
        low, high = np.sqrt(np.longdouble(0.00085)), np.sqrt(np.longdouble(0.012))
        return (low + (high - low) * ramp) ** 2
    if name == "sigmoid":
        argument = -6 + 12 * ramp
        return (np.longdouble(0.02) - np.longdouble(1e-4)) / (1 + np.exp(-argument)) + np.longdouble(1e-4)
    angle = (np.arange(n + 1, dtype=np.longdouble) / n + 0.008) / 1.008 * np.arccos(np.longdouble(-1)) / 2
    ratio = np.cos(angle[1:]) / np.cos(angle[:-1])
    return np.minimum(1 - ratio**2, np.longdouble(0.999))


@pytest.mark.parametrize("n", [1, 2, 7, T])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "cosine"])
def test_alpha_bar_is_the_product_of_one_minus_the_formula_betas(name, n):
    schedule = VARIANCE_PRESERVING[name](n)
    alpha_bar = np.cumprod(1 - formula_betas(name, n))
    assert relative(schedule.alpha**2, alpha_bar) <= 1e-12
    # The cosine betas are themselves a difference of nearly equal float64 numbers.
    assert relative(schedule.sigma**2, 1 - alpha_bar) <= (1e-10 if name == "cosine" else 1e-12)


def decimal_alpha_bar(n, start, end, power):
    """prod(1 - beta) with 60 digits; beta is a power of a line between two float64 ends."""
    with localcontext() as context:
        context.prec = 60
        low, high = (Decimal(end_) if power == 1 else Decimal(end_).sqrt() for end_ in (start, end))
        product, products = Decimal(1), []
        for t in range(n):
            product *= 1 - (low + (high - low) * t / (n - 1)) ** power
            products.append((product, 1 - product))
    return products


@pytest.mark.parametrize("n", [2, 50, T])
@pytest.mark.parametrize(
    ("name", "start", "end", "power"), [("linear", 1e-4, 0.02, 1), ("scaled_linear", 0.00085, 0.012, 2)]
)
def test_alpha_bar_has_all_digits_of_60_digit_arithmetic(name, start, end, power, n):
    schedule = VARIANCE_PRESERVING[name](n)
    truth = decimal_alpha_bar(n, start, end, power)
    for actual, column in ((schedule.alpha, 0), (schedule.sigma, 1)):
        expected = np.array([float(row[column]) for row in truth])
        assert np.max(np.abs((actual**2).numpy() / expected - 1)) <= 1e-12


def test_from_betas_equals_exact_fractions():
    betas = np.random.default_rng(0).uniform(1e-3, 0.5, 60)
    schedule = Schedule.from_betas(betas)
    product = Fraction(1)
    for t, beta in enumerate(betas.tolist()):
        product *= 1 - Fraction(beta)
        assert float(schedule.alpha[t]) ** 2 == pytest.approx(float(product), rel=1e-13)
        assert float(schedule.sigma[t]) ** 2 == pytest.approx(float(1 - product), rel=1e-13)


@pytest.mark.parametrize(
    "betas", [[0.1, 0.5], (0.1, 0.5), np.array([0.1, 0.5]), torch.tensor([0.1, 0.5], dtype=torch.float64)]
)
def test_from_betas_takes_any_sequence(betas):
    schedule = Schedule.from_betas(betas)
    assert schedule.alpha.square().tolist() == pytest.approx([0.9, 0.45], rel=1e-15)


def test_a_last_beta_of_one_leaves_no_signal():
    schedule = Schedule.linear(5, beta_end=1.0)
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1
    assert schedule.zero_terminal_snr


@pytest.mark.parametrize("n", [10, T])
def test_cosine_is_equation_17(n):
    schedule = Schedule.cosine(n)
    angle = (np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2
    alpha_bar = np.cos(angle) ** 2 / np.cos(angle[0]) ** 2
    assert np.abs((schedule.alpha**2).numpy()[:-1] - alpha_bar[1:-1]).max() <= 1e-12
    assert float(schedule.alpha[-1] ** 2) == pytest.approx(alpha_bar[-2] * 0.001, rel=1e-9)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (-1.5, 2.0)])
@pytest.mark.parametrize("n", [1, 2, 7, T])
def test_laplace_follows_the_quantile_function(n, mu, b):
    schedule = Schedule.laplace(n, mu=mu, b=b)
    quantiles = stats.laplace(mu, b).ppf(1 - (np.arange(n) + 0.5) / n)
    assert np.abs(schedule.log_snr.numpy() - quantiles).max() <= 1e-11
    snr = np.exp(quantiles)
    assert relative(schedule.alpha**2, snr / (1 + snr)) <= 1e-11


@pytest.mark.parametrize(("low", "high", "rho", "data"), [(0.002, 80.0, 7.0, 0.5), (0.1, 10.0, 3.0, 1.0)])
@pytest.mark.parametrize("n", [1, 2, 18, T])
def test_edm_levels_are_equation_5(n, low, high, rho, data):
    schedule = Schedule.edm(n, sigma_min=low, sigma_max=high, rho=rho, sigma_data=data)
    i = np.arange(n) / max(n - 1, 1)
    sigma = (high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    assert relative(schedule.sigma, sigma[::-1]) <= 1e-12
    assert (schedule.alpha == 1).all()
    assert relative(schedule.c_in, 1 / np.sqrt(sigma[::-1] ** 2 + data**2)) <= 1e-12
    assert np.abs(schedule.c_noise.numpy() - np.log(sigma[::-1]) / 4).max() <= 1e-12


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("n", [1, 10, T])
def test_flow_is_the_straight_line_between_data_and_noise(n, shift):
    schedule = Schedule.flow(n, shift=shift)
    s = np.arange(1, n + 1, dtype=np.longdouble) / n
    s = shift * s / (1 + (np.longdouble(shift) - 1) * s)
    assert np.abs(schedule.sigma.numpy() - s).max() <= 1e-12
    assert np.abs((schedule.alpha + schedule.sigma).numpy() - 1).max() <= 1e-15
    assert np.abs(schedule.c_noise.numpy() - 1000 * s).max() <= 1e-9


@pytest.mark.parametrize("shift", [0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 1.15, 3.0, 7.5])
def test_flow_ends_in_pure_noise_exactly(shift):
    schedule = Schedule.flow(10, shift=shift)
    assert (float(schedule.alpha[-1]), float(schedule.sigma[-1])) == (0.0, 1.0)
    assert schedule.zero_terminal_snr


# ---- zero terminal SNR ----------------------------------------------------------------------


@names(VARIANCE_PRESERVING)
@pytest.mark.parametrize("n", [2, 7, T])
def test_zero_terminal_snr(name, n):
    before = VARIANCE_PRESERVING[name](n)
    after = before.rescale_zero_terminal_snr()
    assert after.zero_terminal_snr
    assert not before.zero_terminal_snr
    assert (float(after.alpha[-1]), float(after.sigma[-1])) == (0.0, 1.0)
    assert after.log_snr[-1] == -math.inf
    assert torch.equal(after.alpha[:1], before.alpha[:1])
    assert torch.equal(after.sigma[:1], before.sigma[:1])
    assert (after.alpha**2 + after.sigma**2 - 1).abs().max() <= 1e-12
    assert (after.snr.diff() < 0).all()


def test_zero_terminal_snr_is_algorithm_1():
    before = Schedule.scaled_linear(T)
    root = np.sqrt(np.cumprod(1 - formula_betas("scaled_linear", T)))
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert np.abs(before.rescale_zero_terminal_snr().alpha.numpy() - expected).max() <= 1e-12


def test_rescaling_twice_changes_nothing():
    once = Schedule.linear(50).rescale_zero_terminal_snr()
    twice = once.rescale_zero_terminal_snr()
    assert (once.alpha - twice.alpha).abs().max() <= 1e-15
    assert twice.config == once.config


# ---- configuration --------------------------------------------------------------------------

CONFIGURED = {
    "linear": lambda: Schedule.linear(20, beta_start=1e-3, beta_end=0.3),
    "scaled_linear": lambda: Schedule.scaled_linear(20, beta_start=1e-3, beta_end=0.2),
    "cosine": lambda: Schedule.cosine(20, s=0.01, max_beta=0.9),
    "sigmoid": lambda: Schedule.sigmoid(20, beta_start=1e-3, beta_end=0.2),
    "laplace": lambda: Schedule.laplace(20, mu=-0.5, b=1.5),
    "from_betas": lambda: Schedule.from_betas([0.1, 0.25, 1 / 3]),
    "edm": lambda: Schedule.edm(20, sigma_min=0.01, sigma_max=50.0, rho=5.0, sigma_data=1.0),
    "flow": lambda: Schedule.flow(20, shift=3.0),
}


def assert_same_schedule(a, b):
    assert a.config == b.config
    for field in ("alpha", "sigma", "c_in", "c_noise"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field


@names(CONFIGURED)
def test_config_round_trip_through_json(name):
    schedule = CONFIGURED[name]()
    assert schedule.config["name"] == name
    assert_same_schedule(Schedule.from_config(json.loads(json.dumps(schedule.config))), schedule)


@names(sorted(set(CONFIGURED) - set(OTHERS)))
def test_config_remembers_zero_terminal_snr(name):
    schedule = CONFIGURED[name]().rescale_zero_terminal_snr()
    again = Schedule.from_config(json.loads(json.dumps(schedule.config)))
    assert again.zero_terminal_snr
    assert_same_schedule(again, schedule)


def test_from_config_leaves_its_argument_alone():
    config = {"name": "linear", "timesteps": 5, "zero_terminal_snr": True}
    Schedule.from_config(config)
    assert config == {"name": "linear", "timesteps": 5, "zero_terminal_snr": True}


@names(CONFIGURED)
def test_repr_names_the_schedule(name):
    assert repr(CONFIGURED[name]()).startswith(f"Schedule.{name}(")


# ---- spacings -------------------------------------------------------------------------------


def assert_valid(timesteps, steps, total):
    assert timesteps.dtype == torch.int64
    values = timesteps.tolist()
    assert len(values) == steps
    assert values == sorted(set(values), reverse=True)
    assert 0 <= values[-1] <= values[0] < total


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 999, 1000])
def test_every_number_of_steps(total, spacing):
    schedule = Schedule.linear(total)
    for steps in range(1, total + 1):
        timesteps = schedule.timesteps(steps, spacing)
        assert_valid(timesteps, steps, total)
        assert spacing == "leading" or timesteps[0] == total - 1
        assert spacing == "trailing" or timesteps[-1] == 0 or steps == 1
        assert spacing != "leading" or timesteps[-1] == 0
    assert schedule.timesteps(total, spacing).tolist() == list(range(total))[::-1]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 200])
@names(VARIANCE_PRESERVING, OTHERS, ["zero_terminal_snr"])
def test_karras_spacing_of_every_schedule(name, total):
    if name == "zero_terminal_snr":
        schedule = Schedule.linear(total, beta_start=0.1, beta_end=1.0) if total > 1 else Schedule.linear(1)
    else:
        schedule = ALL[name](total)
    for steps in range(1, total + 1):
        timesteps = schedule.timesteps(steps, "karras")
        assert_valid(timesteps, steps, total)
        assert timesteps[0] == total - 1
        assert timesteps[-1] == 0 or steps == 1


def exact(spacing, total, steps):
    """The spacings as exact fractions; round() takes halves to even."""
    if spacing == "leading":
        return [i * total // steps for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(Fraction(total * (steps - i), steps)) - 1 for i in range(steps)]
    return [round(Fraction((total - 1) * (steps - 1 - i), max(steps - 1, 1))) for i in range(steps)]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("total", "stride"), [(3, 1), (7, 1), (50, 1), (999, 83), (1000, 61)])
def test_spacings_are_exact_fractions(total, stride, spacing):
    schedule = Schedule.linear(total)
    for steps in range(2, total + 1, stride):
        assert schedule.timesteps(steps, spacing).tolist() == exact(spacing, total, steps)


def numpy_formula(spacing, total, steps):
    if spacing == "leading":
        return (np.arange(steps) * (total // steps)).round()[::-1]
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)) - 1
    return np.linspace(0, total - 1, steps).round()[::-1]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [12, 720, 1000])
def test_the_field_s_formulas_hold_where_steps_divide_the_timesteps(total, spacing):
    schedule = Schedule.linear(total)
    for steps in (n for n in range(2, total + 1) if total % n == 0):
        assert schedule.timesteps(steps, spacing).tolist() == numpy_formula(spacing, total, steps).tolist()


@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
@pytest.mark.parametrize("steps", [5, 8])
def test_karras_spacing_takes_the_nearest_noise_levels(name, steps):
    schedule = ALL[name]()
    with np.errstate(divide="ignore"):
        ratio = schedule.sigma.numpy() / schedule.alpha.numpy()
    low, high = ratio[0] ** (1 / 7), ratio[np.isfinite(ratio)][-1] ** (1 / 7)
    levels = np.log((high + np.arange(steps) / (steps - 1) * (low - high)) ** 7)
    nearest = [int(np.abs(np.log(ratio) - level).argmin()) for level in levels]
    assert len(set(nearest)) == steps, "the case must not need the rule for duplicates"
    assert schedule.timesteps(steps, "karras").tolist() == [T - 1, *nearest[1:]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_own_timesteps_of_any_integer_type(dtype):
    timesteps = Schedule.linear(100).timesteps(torch.tensor([90, 40, 3], dtype=dtype))
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == [90, 40, 3]


@pytest.mark.parametrize("given", [[9, 4, 0], (9, 4, 0), np.array([9, 4, 0])])
def test_own_timesteps_of_any_sequence(given):
    assert Schedule.linear(10).timesteps(given).tolist() == [9, 4, 0]


def test_numpy_integers_are_a_number_of_steps():
    assert Schedule.linear(10).timesteps(np.int64(2)).tolist() == [9, 4]


# ---- peers ----------------------------------------------------------------------------------


def peer(name, **settings):
    return getattr(pytest.importorskip("diffusers"), name)(**settings)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 10, 50, 250, 1000])
def test_diffusers_agrees_where_steps_divide_the_timesteps(steps, spacing):
    scheduler = peer("DDIMScheduler", timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == Schedule.linear().timesteps(steps, spacing).tolist()


@pytest.mark.parametrize("steps", [61, 103, 121, 122, 201, 206])
def test_diffusers_trailing_gives_one_timestep_too_many(steps):
    scheduler = peer("DDIMScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert (len(scheduler.timesteps), int(scheduler.timesteps[-1])) == (steps + 1, -1)
    assert_valid(Schedule.linear().timesteps(steps, "trailing"), steps, T)


def test_diffusers_leading_with_an_offset_leaves_the_table():
    scheduler = peer("DDIMScheduler", timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(T)
    assert int(scheduler.timesteps[0]) == T
    assert Schedule.linear().timesteps(T, "leading")[0] == T - 1


def test_diffusers_ddim_steps_to_timesteps_outside_its_own_list():
    scheduler = peer("DDIMScheduler", timestep_spacing="linspace", clip_sample=False, beta_schedule="linear")
    scheduler.set_timesteps(50)
    t, following = scheduler.timesteps[1:3].tolist()
    assert (t, following) == (979, 958)
    x = torch.ones(1, 1, dtype=torch.float64)
    scaled = float(scheduler.step(0 * x, t, x, eta=0.0).prev_sample)
    alpha = Schedule.linear().alpha
    assert scaled == pytest.approx(float(alpha[959] / alpha[979]), rel=1e-4)
    row = fd.Sampler(lambda x, t: 0 * x, fd.Diffusion(Schedule.linear()), "ddim", 50, "linspace").table.rows[1]
    assert row.a + row.b * row.p == pytest.approx(float(alpha[958] / alpha[979]), rel=1e-12)
    assert abs(float(alpha[959] / alpha[958]) - 1) > 1e-3, "the two must differ by more than the tolerances"


def test_diffusers_karras_repeats_timesteps_on_the_cosine_schedule():
    scheduler = peer("DPMSolverMultistepScheduler", beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    scheduler.set_timesteps(50)
    assert len(set(scheduler.timesteps.tolist())) < 50
    assert_valid(Schedule.cosine().timesteps(50, "karras"), 50, T)


# ---- what does not fit ----------------------------------------------------------------------

BAD_SCHEDULES = {
    "no timesteps": (lambda: Schedule.linear(0), "timesteps"),
    "negative timesteps": (lambda: Schedule.cosine(-1), "timesteps"),
    "fractional timesteps": (lambda: Schedule.sigmoid(2.5), "timesteps"),
    "boolean timesteps": (lambda: Schedule.flow(True), "timesteps"),
    "beta 0": (lambda: Schedule.linear(beta_start=0.0), "betas"),
    "beta above 1": (lambda: Schedule.linear(10, beta_end=1.5), "betas"),
    "negative beta": (lambda: Schedule.scaled_linear(beta_start=-1e-3), "betas"),
    "NaN beta": (lambda: Schedule.sigmoid(10, beta_end=math.nan), "betas"),
    "inner beta of 1": (lambda: Schedule.from_betas([0.1, 1.0, 0.5]), "timestep 1"),
    "no betas": (lambda: Schedule.from_betas([]), "betas"),
    "betas in a matrix": (lambda: Schedule.from_betas([[0.1, 0.2]]), "betas"),
    "betas of words": (lambda: Schedule.from_betas(["a"]), "betas"),
    "cosine offset": (lambda: Schedule.cosine(10, s=-0.1), "s must"),
    "cosine cap": (lambda: Schedule.cosine(10, max_beta=1.0), "max_beta"),
    "laplace width": (lambda: Schedule.laplace(10, b=0.0), "b must"),
    "edm order": (lambda: Schedule.edm(10, sigma_min=2.0, sigma_max=1.0), "sigma_min"),
    "edm from zero": (lambda: Schedule.edm(10, sigma_min=0.0), "sigma_min"),
    "edm rho": (lambda: Schedule.edm(10, rho=0.0), "rho"),
    "flow shift": (lambda: Schedule.flow(10, shift=0.0), "shift"),
    "rescaled edm": (lambda: Schedule.edm(10).rescale_zero_terminal_snr(), "variance-preserving"),
    "rescaled flow": (lambda: Schedule.flow(10).rescale_zero_terminal_snr(), "variance-preserving"),
    "rescaled after spacing": (lambda: Schedule.linear(10).spaced(5).rescale_zero_terminal_snr(), "then take some"),
    "rescaled single step": (lambda: Schedule.linear(1).rescale_zero_terminal_snr(), "one timestep"),
    "unknown name": (lambda: Schedule.from_config({"name": "karras"}), "choose from"),
    "no name": (lambda: Schedule.from_config({}), "choose from"),
    "private name": (lambda: Schedule.from_config({"name": "from_config"}), "choose from"),
    "unknown setting": (lambda: Schedule.from_config({"name": "linear", "gamma": 1}), "gamma"),
}


@pytest.mark.parametrize("case", BAD_SCHEDULES)
def test_bad_schedules_are_refused(case):
    build, message = BAD_SCHEDULES[case]
    with pytest.raises(fd.InputError, match=message):
        build()


BAD_TIMESTEPS = {
    "none": ((0,), "steps"),
    "negative": ((-3,), "steps"),
    "too many": ((11,), "steps"),
    "boolean": ((True,), "steps"),
    "fractional": ((2.0,), "timesteps"),
    "word": (("ten",), "steps"),
    "nothing": ((None,), "steps"),
    "unknown spacing": ((5, "uniform"), "spacing"),
    "empty list": (([],), "timesteps"),
    "ascending": (([1, 2],), "descending"),
    "repeated": (([5, 5],), "descending"),
    "beyond the table": (([10, 2],), "0...9"),
    "below zero": (([5, -1],), "0...9"),
    "fractions": (([5.0, 1.0],), "whole"),
    "booleans": (([True, False],), "whole"),
    "matrix": (([[5, 1]],), "whole"),
}


@pytest.mark.parametrize("case", BAD_TIMESTEPS)
def test_bad_timesteps_are_refused(case):
    arguments, message = BAD_TIMESTEPS[case]
    with pytest.raises(fd.InputError, match=message):
        Schedule.linear(10).timesteps(*arguments)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_spaced_schedule_has_the_levels_of_its_timesteps(name):
    whole = CONFIGURED[name]()
    kept = whole.timesteps(min(4, len(whole)), "leading").flip(0)
    spaced = whole.spaced(min(4, len(whole)), "leading")
    for table in ("alpha", "sigma", "c_in", "c_noise"):
        assert torch.equal(getattr(spaced, table), getattr(whole, table)[kept])
    twice = spaced.spaced([2, 0]) if len(whole) > 2 else spaced
    for one in (spaced, twice):
        again = Schedule.from_config(one.config)
        assert torch.equal(again.sigma, one.sigma)
        assert torch.equal(again.c_noise, one.c_noise)
        assert again.config == one.config


def test_the_bound_in_few_steps_is_that_of_the_spaced_schedule():
    """The bound of the exact network tightens with the steps, and stays one."""
    schedule = Schedule.cosine(100)
    s0 = 0.7

    def model(x, t):  # the exact noise of N(0, s0^2) data at the timesteps of the whole schedule
        alpha, sigma = (table[t].view(-1, 1).to(x) for table in (schedule.alpha, schedule.sigma))
        return x * sigma / (alpha**2 * s0**2 + sigma**2)

    x0 = s0 * fd.noise.normal((4000, 2), seed=1)
    entropy = math.log2(s0 * math.sqrt(2 * math.pi * math.e))
    bits = [
        float(
            fd.Diffusion(schedule.spaced(n, "leading"), "epsilon")
            .bits_per_dim(model, x0, decoder="gaussian")
            .total.mean()
        )
        for n in (5, 20, 100)
    ]
    assert bits[0] > bits[1] > bits[2] > entropy - 0.02, bits
