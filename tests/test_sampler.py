"""The loop: exact laws, noise addressing, guidance, what the model sees, state handling and bad input."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from oracles import Gaussian, Mixture, model_of, predict
from sampler_tools import LABELS, NULL, SAMPLING, Writer, classes_mlp, make, noise_of
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.noise import Stream
from fastdiff.sampler import State

NOISY = {"ddpm": {}, "euler_a": {}, "ddim": {"eta": 0.7}}
LINEAR_50 = fd.Schedule.linear(50, beta_start=2e-3, beta_end=0.3)


# ---- the exact discrete law of Gaussian data ------------------------------------------------


def gaussian_run(solver: str, prediction: str, **options: Any) -> tuple[fd.Sampler, Gaussian, list[tuple[float, ...]]]:
    """A sampler over the full chain of data N(1.3, 0.6²), and gain, shift, std of each of its rows."""
    data, diffusion = Gaussian(1.3, 0.6), fd.Diffusion(LINEAR_50, prediction)
    sampler = fd.Sampler(model_of(data, diffusion), diffusion, solver, 50, dtype=torch.float64, **options)
    recursion = []
    for row, t in zip(sampler.table.rows, sampler.table.timesteps.tolist(), strict=True):
        alpha, sigma = float(LINEAR_50.alpha[t]), float(LINEAR_50.sigma[t])
        at_0, at_1 = (predict(prediction, x, data.denoise(x, alpha, sigma), alpha, sigma) for x in (0.0, 1.0))
        recursion.append((row.a + row.b * (row.p + row.q * (at_1 - at_0)), row.b * row.q * at_0, row.s))
    return sampler, data, recursion


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5}), ("ddim", {})],
)
def test_a_sample_is_the_linear_combination_of_its_noises(
    solver: str, options: dict[str, Any], prediction: str
) -> None:
    """x_0 = sum of (coefficient of row j) z_j + (that of the start) x_T + constant, with the public noise."""
    sampler, _, recursion = gaussian_run(solver, prediction, **options)
    expected = fd.noise.normal((64, 3), seed=5, stream=Stream.INITIAL, dtype=torch.float64)
    expected = expected * math.prod(gain for gain, _, _ in recursion)
    for j, (_, shift, std) in enumerate(recursion):
        after = math.prod(gain for gain, _, _ in recursion[j + 1 :])
        expected = expected + after * (shift + std * noise_of((64, 3), j, seed=5))
    assert (sampler((64, 3), seed=5) - expected).abs().max() <= 1e-12


def exact_moments(recursion: list[tuple[float, ...]]) -> tuple[float, float]:
    mean, variance = 0.0, 1.0
    for gain, shift, std in recursion:
        mean, variance = gain * mean + shift, gain**2 * variance + std**2
    return mean, variance


def z_scores(draws: Tensor, mean: float, variance: float) -> tuple[float, float]:
    n = draws.numel()
    of_mean = (float(draws.mean()) - mean) / math.sqrt(variance / n)
    return of_mean, (float(draws.var()) / variance - 1) / math.sqrt(2 / (n - 1))


def check_gaussian_law(count: int) -> None:
    sampler, data, recursion = gaussian_run("ddpm", "epsilon")
    mean, variance = exact_moments(recursion)
    draws = sampler((50, count // 50), seed=11)
    assert all(abs(z) < 5 for z in z_scores(draws, mean, variance))
    # The draws do tell this law from the data's, which a finite number of steps misses.
    assert abs(z_scores(draws, data.mean, data.std**2)[1]) > 20


def test_sampled_moments_are_those_of_the_exact_law() -> None:
    check_gaussian_law(200_000)


@pytest.mark.slow
def test_sampled_moments_are_those_of_the_exact_law_at_length() -> None:
    check_gaussian_law(1_000_000)


MIXTURE = Mixture(
    torch.tensor([0.2, 0.5, 0.3]).double(),
    torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.5, -2.0]]).double(),
    torch.tensor([0.25, 0.35, 0.3]).double(),
)


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 250), ("heun", 40), ("dpmpp_2m", 60), ("euler_a", 250)])
def test_a_mixture_is_sampled_with_its_marginals_and_weights(solver: str, steps: int) -> None:
    count = 10_000
    diffusion = fd.Diffusion(fd.Schedule.linear())
    sampler = fd.Sampler(model_of(MIXTURE, diffusion), diffusion, solver, steps, dtype=torch.float64)
    draws = sampler((count, 2), seed=3)
    for axis in range(2):
        cdf = MIXTURE.cdf(draws[:, axis].sort().values, axis).numpy()
        assert scipy.stats.kstest(cdf, "uniform").pvalue > 1e-6
    mode = (draws[:, None] - MIXTURE.means).norm(dim=-1).argmin(1)
    for k, weight in enumerate(MIXTURE.weights.tolist()):
        z = (float((mode == k).double().mean()) - weight) / math.sqrt(weight * (1 - weight) / count)
        assert abs(z) < 5


# ---- noise and addresses --------------------------------------------------------------------


@pytest.mark.parametrize("solver", NOISY)
def test_sample_k_is_the_same_in_any_split_of_the_batch(solver: str) -> None:
    sampler = make(solver=solver, **NOISY[solver])
    whole = sampler((7, 3, 5), seed=9)
    for parts in ([1] * 7, [2, 5], [3, 3, 1]):
        ends = list(itertools.accumulate(parts))
        split = [sampler((n, 3, 5), seed=9, sample=range(end - n, end)) for n, end in zip(parts, ends, strict=True)]
        assert torch.equal(torch.cat(split), whole)
    reordered = sampler((3, 3, 5), seed=9, sample=torch.tensor([6, 0, 2]))
    assert torch.equal(reordered, whole[[6, 0, 2]])


@pytest.mark.parametrize("solver", NOISY)
def test_a_list_of_seeds_gives_each_seed_its_own_image(solver: str) -> None:
    sampler = make(solver=solver, **NOISY[solver])
    seeds = [4, -1, 2**62, 4]
    together = sampler((4, 2, 3), seed=seeds)
    for k, seed in enumerate(seeds):
        assert torch.equal(together[k : k + 1], sampler((1, 2, 3), seed=seed))
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(sampler((4, 2, 3), seed=torch.tensor(seeds)), together)


@pytest.mark.parametrize("solver", NOISY)
def test_row_i_adds_the_noise_of_step_i(solver: str) -> None:
    sampler = make(solver=solver, dtype=torch.float64, **NOISY[solver])
    ids = [3, 8, 1]
    states = list(sampler.iterate((3, 2), seed=21, sample=ids))
    x = fd.noise.normal((3, 2), seed=21, sample=ids, stream=Stream.INITIAL, dtype=torch.float64)
    for i, (row, state) in enumerate(zip(sampler.table.rows, states, strict=True)):
        z = noise_of((3, 2), i, seed=21, sample=ids)
        assert (state.x - (row.a * x + row.b * state.x0 + row.s * z)).abs().max() <= 1e-12
        x = state.x
    assert [bool(row.s) for row in sampler.table.rows] == [True] * (len(states) - 1) + [False]


@pytest.mark.parametrize(
    ("schedule", "scale"),
    [(fd.Schedule.linear(100), 1.0), (fd.Schedule.edm(100, sigma_max=50.0), 50.0), (fd.Schedule.flow(100), 1.0)],
)
def test_the_start_is_the_initial_stream_scaled_by_sigma_where_variance_explodes(
    schedule: fd.Schedule, scale: float
) -> None:
    model = Writer()
    make(model, schedule=schedule, dtype=torch.float64, steps=3)((2, 3), seed=5)
    noise = fd.noise.normal((2, 3), seed=5, stream=Stream.INITIAL, dtype=torch.float64)
    expected = float(schedule.c_in[-1]) * scale * noise
    assert (model.calls[0].x - expected).abs().max() <= 1e-14 * scale


def test_a_given_x_is_the_start_and_stays_as_it_was() -> None:
    model = Writer()
    x = torch.full((2, 3), 0.5)
    make(model)((2, 3), x=x)
    assert torch.equal(model.calls[0].x, x)
    assert torch.equal(x, torch.full((2, 3), 0.5))


def test_noise_of_the_seed_given_as_x_gives_the_same_samples() -> None:
    sampler = make(solver="ddpm")
    x = fd.noise.normal((4, 3), seed=8, stream=Stream.INITIAL)
    assert torch.equal(sampler((4, 3), seed=8, x=x), sampler((4, 3), seed=8))
    assert not torch.equal(sampler((4, 3), seed=8, x=x + 1), sampler((4, 3), seed=8))


@pytest.mark.parametrize("solver", SAMPLING)
def test_the_global_random_state_is_left_alone(solver: str) -> None:
    sampler = make(solver=solver)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler((2, 3), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sampler((2, 3), seed=1), first)


@pytest.mark.parametrize("solver", SAMPLING)
def test_threads_may_share_a_sampler_and_runs_leave_nothing_behind(solver: str) -> None:
    sampler = make(fd.MLP(3, width=16, depth=1).eval(), solver)
    for parameter in sampler.model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    alone = [sampler((4, 3), seed=seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        shared = list(pool.map(lambda seed: sampler((4, 3), seed=seed), range(32)))
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    assert not torch.equal(alone[0], alone[1])


TWO_PROCESSES = """
import sys
import torch
sys.path[:0] = sys.argv[2:]
from sampler_tools import SAMPLING, make
samples = {solver: make(solver=solver)((4, 3, 5), seed=7, sample=[4, 5, 6, 7]) for solver in SAMPLING}
torch.save(samples, sys.argv[1])
"""


def test_another_process_draws_the_same_samples(tmp_path: Path) -> None:
    """Samples 4 ... 7 there are samples 4 ... 7 of a batch of 9 here, bit for bit, of every solver."""
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    subprocess.run([sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "there.pt"), *here], check=True)
    there = torch.load(tmp_path / "there.pt", weights_only=True)
    for solver in SAMPLING:
        assert torch.equal(make(solver=solver)((9, 3, 5), seed=7)[4:8], there[solver]), solver


LITTLE_MEMORY = """
import resource, sys
import torch
sys.path[:0] = sys.argv[1:]
from sampler_tools import make
torch.set_num_threads(1)
sampler = make(solver="dpmpp_3m")
small, large = (4, 3), (4, 3, 1024, 1024)
expected = sampler(small, seed=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
failed = 0
for megabytes in range(10, 210, 10):
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        sampler(large, seed=1)
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error) or isinstance(error, MemoryError), error
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.equal(sampler(small, seed=1), expected)
print(failed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_a_run_out_of_memory_leaves_the_sampler_as_it_was() -> None:
    """Twenty caps on a run that needs 350 MB: an error that says so, and the next run is right."""
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", LITTLE_MEMORY, *here]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout) == 20


# ---- clipping, states, callbacks ------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.1, 1.0])
@pytest.mark.parametrize("solver", SAMPLING)
def test_clip_bounds_the_estimate_in_every_row(solver: str, clip: float) -> None:
    sampler = make(lambda x, t: -3 * x, solver, clip=clip)
    states = list(sampler.iterate((4, 3), seed=1))
    assert all(state.x0.abs().max() <= clip for state in states)
    free = list(make(lambda x, t: -3 * x, solver).iterate((4, 3), seed=1))
    assert any(state.x0.abs().max() > clip for state in free)


@pytest.mark.parametrize("solver", SAMPLING)
def test_callback_and_iterate_give_the_same_states(solver: str) -> None:
    sampler = make(solver=solver)
    seen: list[State] = []
    final = sampler((4, 3), seed=3, callback=seen.append)
    states = list(sampler.iterate((4, 3), seed=3))
    assert [state.step for state in seen] == list(range(len(sampler.table)))
    assert [state.timestep for state in states] == sampler.table.timesteps.tolist()
    for one, other in zip(seen, states, strict=True):
        assert (one.step, one.timestep) == (other.step, other.timestep)
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.x0, other.x0)
    assert torch.equal(final, states[-1].x)


def test_iterate_may_be_left_early_and_does_not_switch_gradients_off_for_the_caller() -> None:
    model = Writer()
    rows = make(model).iterate((2, 3))
    assert model.calls == []
    next(rows)
    assert torch.is_grad_enabled()
    next(rows)
    rows.close()
    assert torch.is_grad_enabled()
    assert [call.grad for call in model.calls] == [False, False]


def test_samples_carry_no_gradient_graph() -> None:
    sample = make(classes_mlp())((2, 2), y=torch.tensor([0, 1]))
    assert not sample.requires_grad


def test_progress_shows_a_bar_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    sampler = make(steps=4)
    sampler((2, 3))
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == ("", "")
    sampler((2, 3), progress=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.out + shown.err


# ---- a recorder, and rows one at a time -----------------------------------------------------


@pytest.mark.parametrize("what", ["x", "x0"])
@pytest.mark.parametrize(
    ("every", "capacity", "kept"),
    [
        (1, None, [*range(10)]),
        (3, None, [2, 5, 8]),
        (10, None, [9]),
        (11, None, []),
        (1, 4, [6, 7, 8, 9]),
        (2, 3, [5, 7, 9]),
        (3, 2, [5, 8]),
        (1, 20, [*range(10)]),
    ],
)
def test_a_recorder_keeps_the_last_states(every: int, capacity: int | None, kept: list[int], what: str) -> None:
    sampler, record = make(solver="dpmpp_2m_sde", steps=10), fd.Recorder(every, what, capacity)
    states = list(sampler.iterate((4, 3), seed=2))
    for _ in range(2):  # a recorder begins anew with each run
        result = sampler((4, 3), seed=2, record=record)
        assert record.steps == kept
        if kept:
            assert torch.equal(record.values, torch.stack([getattr(states[step], what) for step in kept]))
    assert torch.equal(result, states[-1].x)


def test_a_recorder_that_has_nothing() -> None:
    for record in (fd.Recorder(), fd.Recorder(every=100)):
        if record.every == 100:
            make()((4, 3), record=record)
        with pytest.raises(fd.InputError, match="nothing is recorded"):
            _ = record.values


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 1.5}, {"capacity": 0}, {"what": "noise"}], ids=str)
def test_a_bad_recorder_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(fd.InputError):
        fd.Recorder(**arguments)


@pytest.mark.parametrize("solver", SAMPLING)
def test_rows_one_at_a_time_give_the_run(solver: str) -> None:
    """What a step leaves is what the next one takes."""
    sampler = make(solver=solver, guidance_scale=2.5)
    call = {"seed": 7, "uncond": NULL, **LABELS}
    x, history, anchor = fd.noise.normal((4, 3), seed=7, stream=Stream.INITIAL), (), None
    for row, state in enumerate(sampler.iterate((4, 3), **call)):
        before = x.clone()
        step = sampler.step(x, row, history=history, anchor=anchor, **call)
        assert torch.equal(x, before)
        assert torch.equal(step.x, state.x)
        assert torch.equal(step.x0, state.x0)
        x, history, anchor = step.x, step.history, step.anchor


@pytest.mark.parametrize("solver", SAMPLING)
def test_samples_at_different_rows_share_a_batch(solver: str) -> None:
    """Each of the batch begins a row later than the one before it; each gets what it gets in a run for itself."""
    sampler = make(solver=solver)
    shape, rows = (3, 3), len(sampler.table)
    runs = [list(sampler.iterate((1, 3), seed=7, sample=[k])) for k in range(3)]
    fresh = fd.noise.normal(shape, seed=7, stream=Stream.INITIAL)
    x, history, anchor = fresh.clone(), tuple(torch.zeros(3, 3) for _ in range(sampler.table.history)), None
    anchor = torch.zeros(3, 3) if sampler.table.anchored else None
    for tick in range(rows + 2):
        row = torch.tensor([tick - k for k in range(3)])
        begins = (row == 0)[:, None]
        x = torch.where(begins, fresh, x)
        history = tuple(torch.where(begins, 0.0, h) for h in history)
        anchor = None if anchor is None else torch.where(begins, 0.0, anchor)
        step = sampler.step(x, row.clamp(0, rows - 1), history=history, anchor=anchor, seed=7)
        x, history, anchor = step.x, step.history, step.anchor
        for k in range(3):
            if 0 <= row[k] < rows:
                torch.testing.assert_close(x[k], runs[k][row[k]].x[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"row": 8},
        {"row": -1},
        {"row": 1.0},
        {"row": torch.tensor([0, 1, 2])},
        {"row": torch.tensor([0, 1, 2, 8])},
        {"row": torch.tensor([0.0, 1.0, 2.0, 3.0])},
        {"row": 0, "history": (torch.zeros(4, 3),) * 3},
        {"row": 0, "history": (torch.zeros(4, 2),)},
        {"row": 0, "anchor": torch.zeros(4, 3)},
        {"row": 0, "x": torch.zeros(4, 3, dtype=torch.int64)},
        {"row": 0, "x": torch.zeros(4)},
    ],
    ids=str,
)
def test_a_bad_step_is_refused_before_the_model_runs(arguments: dict[str, Any]) -> None:
    model = Writer()
    sampler = make(model, "dpmpp_2m")
    with pytest.raises(fd.InputError):
        sampler.step(**{"x": torch.zeros(4, 3), **arguments})
    assert model.calls == []


# ---- what the model sees and returns --------------------------------------------------------


@pytest.mark.parametrize(("solver", "evaluations"), [("heun", 15), ("ddim", 8), ("ddpm", 8), ("dpmpp_2m", 8)])
def test_the_number_of_network_evaluations(solver: str, evaluations: int) -> None:
    model = Writer()
    sampler = make(model, solver)
    sampler((2, 3))
    assert len(model.calls) == len(sampler.table) == evaluations


def test_the_model_is_told_the_timestep_of_each_row() -> None:
    model = Writer()
    make(model, steps=[90, 41, 7])((2, 3))
    assert [call.t.tolist() for call in model.calls] == [[90, 90], [41, 41], [7, 7]]
    assert model.calls[0].t.dtype == torch.int64


def test_edm_tells_log_sigma_and_scales_the_input_and_flow_tells_a_thousand_sigma() -> None:
    model, schedule = Writer(), fd.Schedule.edm(20, sigma_data=0.7)
    states = list(make(model, schedule=schedule, steps=5, dtype=torch.float64).iterate((2, 3)))
    sigma = schedule.sigma[schedule.timesteps(5)]
    assert (torch.stack([call.t[0] for call in model.calls]) - sigma.log() / 4).abs().max() <= 1e-14
    for call, state, s in zip(model.calls[1:], states, sigma[1:], strict=False):
        assert (call.x - state.x / (s**2 + 0.49).sqrt()).abs().max() <= 1e-14
    model = Writer()
    make(model, schedule=fd.Schedule.flow(20), steps=5)((2, 3))
    assert [round(float(call.t[0]), 3) for call in model.calls] == [1000, 800, 600, 400, 200]


def test_free_lists_of_timesteps() -> None:
    whole = make(steps=range(99, -1, -1))((2, 3))
    assert torch.equal(whole, make(steps=100)((2, 3)))
    assert torch.equal(make(steps=torch.tensor([80, 33, 2]))((2, 3)), make(steps=[80, 33, 2])((2, 3)))
    assert not torch.equal(make(steps=[80, 33, 2])((2, 3)), make(steps=[80, 33, 3])((2, 3)))
    assert make(steps=[5]).table.timesteps.tolist() == [5]


class Tiny(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), 0.25, dtype=dtype))
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen |= {x.dtype, t.dtype}
        return x * self.gain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_state_is_float32_and_the_network_gets_its_own_precision(dtype: torch.dtype) -> None:
    model = Tiny(dtype)
    states = list(make(model, "dpmpp_2m").iterate((2, 3), seed=4))
    assert model.seen == {dtype, torch.int64}
    assert {state.x.dtype for state in states} | {state.x0.dtype for state in states} == {torch.float32}
    exact = make(Tiny(torch.float64), "dpmpp_2m", dtype=torch.float64)((2, 3), seed=4)
    assert (states[-1].x - exact).abs().max() <= 8 * torch.finfo(dtype).eps


def test_float64_runs_the_whole_loop_in_float64() -> None:
    model = Writer()
    states = list(make(model, dtype=torch.float64).iterate((2, 3)))
    assert {state.x.dtype for state in states} | {call.x.dtype for call in model.calls} == {torch.float64}
    single = make()((2, 3))
    assert single.dtype == torch.float32
    assert 0 < (single - states[-1].x).abs().max() <= 1e-6


def test_an_object_with_sample_is_an_output() -> None:
    wrapped = make(lambda x, t: SimpleNamespace(sample=0.25 * x + 0.125))
    assert torch.equal(wrapped((2, 3), seed=6), make()((2, 3), seed=6))


@pytest.mark.parametrize("solver", SAMPLING)
def test_the_memory_format_of_the_output_changes_no_value(solver: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return (0.25 * x + 0.125).to(memory_format=torch.channels_last)

    def sliced(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack((0.25 * x + 0.125, x), -1)[..., 0]

    plain = make(solver=solver)((2, 3, 4, 5), seed=6)
    assert torch.equal(make(model, solver)((2, 3, 4, 5), seed=6), plain)
    assert torch.equal(make(sliced, solver)((2, 3, 4, 5), seed=6), plain)


@pytest.mark.parametrize("solver", SAMPLING)
def test_a_channels_last_start_stays_channels_last(solver: str) -> None:
    x = fd.noise.normal((2, 3, 4, 5), seed=6, stream=Stream.INITIAL)
    got = make(solver=solver)((2, 3, 4, 5), seed=6, x=x.to(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, make(solver=solver)((2, 3, 4, 5), seed=6, x=x))


# ---- learned variance -----------------------------------------------------------------------


def learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat((0.25 * x + 0.125, torch.sin(3 * x)), 1)


def test_learned_range_interpolates_the_logarithms_of_the_variances() -> None:
    schedule = fd.Schedule.cosine(100)
    sampler = make(learned, "ddpm", variance_of="learned_range", dtype=torch.float64)
    levels = [(float(schedule.alpha[t]) ** 2) for t in sampler.timesteps.tolist()] + [1.0]
    x = fd.noise.normal((3, 2, 2), seed=5, stream=Stream.INITIAL, dtype=torch.float64)
    for i, state in enumerate(sampler.iterate((3, 2, 2), seed=5)):
        bar, bar_next = levels[i], levels[i + 1]
        beta = 1 - bar / bar_next
        mean = bar_next**0.5 * beta / (1 - bar) * state.x0 + (1 - beta) ** 0.5 * (1 - bar_next) / (1 - bar) * x
        if bar_next < 1:
            small, f = beta * (1 - bar_next) / (1 - bar), (1 + torch.sin(3 * x)) / 2
            std = torch.exp((f * math.log(beta) + (1 - f) * math.log(small)) / 2)
            mean = mean + std * noise_of((3, 2, 2), i, seed=5)
        assert (state.x - mean).abs().max() <= 1e-12
        x = state.x
    assert i == 7


@pytest.mark.parametrize("options", [{}, {"eta": 0.6}])
def test_ddim_leaves_the_variance_channels_aside(options: dict[str, float]) -> None:
    wide = make(learned, variance_of="learned_range", **options)((3, 2, 2), seed=5)
    assert torch.equal(wide, make(**options)((3, 2, 2), seed=5))


def test_guidance_leaves_the_variance_to_the_conditional_model() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = y.reshape(-1, 1, 1).expand_as(x)
        return torch.cat((0.25 * x, level), 1)

    def run(scale: float, y: float) -> Tensor:
        sampler = make(model, "ddpm", variance_of="learned_range", guidance_scale=scale, dtype=torch.float64)
        null = torch.zeros(3, dtype=torch.float64)
        return sampler((3, 2, 2), seed=5, y=null + y, uncond={"y": null - y})

    assert torch.equal(run(4.0, 0.5), run(1.0, 0.5))
    assert not torch.equal(run(4.0, 0.5), run(4.0, -0.5))


def test_learned_variance_without_its_channels_is_refused() -> None:
    sampler = make(solver="ddpm", variance_of="learned_range")
    with pytest.raises(fd.InputError):
        sampler((3, 2, 2))


# ---- bad input ------------------------------------------------------------------------------

BAD_SAMPLERS = {
    "unknown solver": {"solver": "rk45"},
    "unknown spacing": {"spacing": "random"},
    "no steps": {"steps": 0},
    "more steps than timesteps": {"steps": 101},
    "a fraction of steps": {"steps": 2.5},
    "steps in words": {"steps": "ten"},
    "steps true": {"steps": True},
    "no timesteps": {"steps": []},
    "ascending timesteps": {"steps": [1, 2, 3]},
    "a timestep twice": {"steps": [5, 5, 1]},
    "a timestep outside": {"steps": [100, 5]},
    "a negative timestep": {"steps": [5, -1]},
    "an option the solver lacks": {"solver": "heun", "eta": 0.5},
    "eta too large": {"eta": 1.5},
    "eta negative": {"eta": -0.1},
    "eta in words": {"eta": "half"},
    "eta not a number": {"eta": math.nan},
    "unknown variance": {"solver": "ddpm", "variance": "fixed_smal"},
    "clip zero": {"clip": 0.0},
    "clip negative": {"clip": -1.0},
    "clip not a number": {"clip": math.nan},
    "scales for other steps": {"guidance_scale": [1.0, 2.0]},
    "scale infinite": {"guidance_scale": math.inf},
    "scale in words": {"guidance_scale": "strong"},
    "half precision state": {"dtype": torch.float16},
    "epsilon from pure noise": {"prediction": "epsilon", "schedule": fd.Schedule.flow(100)},
    "a model that is none": {"model": 3},
    "strength zero": {"strength": 0.0},
    "strength above one": {"strength": 1.5},
    "strength not a number": {"strength": math.nan},
    "strength in words": {"strength": "half"},
    "an interval the wrong way round": {"guidance_interval": (2.0, 1.0)},
    "an interval of one": {"guidance_interval": (2.0,)},
    "an interval that is a number": {"guidance_interval": 2.0},
    "an interval not a number": {"guidance_interval": (math.nan, 1.0)},
    "an unknown end": {"final": "last"},
    "resampling once too few": {"resample": (2, 0)},
    "resampling by a number": {"resample": 3},
    "resampling by fractions": {"resample": (1.5, 2)},
    "resampling what remembers": {"solver": "dpmpp_2m", "resample": (2, 2)},
    "resampling between the levels": {"solver": "heun", "resample": (2, 2)},
    "resampling learned noise": {"solver": "ddpm", "variance_of": "learned_range", "resample": (2, 2)},
}
BAD_CALLS = {
    "no channels": {"shape": (4,)},
    "no shape": {"shape": ()},
    "an empty batch": {"shape": (0, 3)},
    "a negative size": {"shape": (4, -3)},
    "a fraction of a sample": {"shape": (4.0, 3)},
    "a number for a shape": {"shape": 4},
    "seed a fraction": {"seed": 0.5},
    "seed in words": {"seed": "zero"},
    "seed beyond 64 bits": {"seed": 2**70},
    "seeds for another batch": {"seed": [1, 2, 3]},
    "ids for another batch": {"sample": [1, 2, 3]},
    "a negative id": {"sample": [0, 1, 2, -1]},
    "an id beyond 32 bits": {"sample": [0, 1, 2, 2**32]},
    "ids that are fractions": {"sample": [0.0, 1.0, 2.0, 3.5]},
    "x of another shape": {"x": torch.zeros(4, 2)},
    "x of whole numbers": {"x": torch.zeros(4, 3, dtype=torch.int64)},
    "x that is no tensor": {"x": [[0.0] * 3] * 4},
    "x and an image": {"x": torch.zeros(4, 3), "image": torch.zeros(4, 3)},
    "an image of another shape": {"image": torch.zeros(4, 2)},
    "kept without an image": {"keep": torch.ones(4, 3, dtype=torch.bool)},
    "kept by numbers": {"image": torch.zeros(4, 3), "keep": torch.ones(4, 3)},
    "kept by a list": {"image": torch.zeros(4, 3), "keep": [True, False, True]},
    "kept of another shape": {"image": torch.zeros(4, 3), "keep": torch.ones(4, 2, dtype=torch.bool)},
    "kept of more dimensions": {"image": torch.zeros(4, 3), "keep": torch.ones(1, 4, 3, dtype=torch.bool)},
    "an image of whole numbers": {"image": torch.zeros(4, 3, dtype=torch.int64)},
    "labels for another batch": {"y": torch.zeros(3), "uncond": NULL},
    "guidance without a condition": {"y": None},
    "guidance without a null": {"uncond": None},
    "a null of another name": {"uncond": {"label": 0.0}},
    "a null of another shape": {"uncond": {"y": torch.zeros(3)}},
    "bad seeds beside x": {"x": torch.zeros(4, 3), "seed": [1, 2, 3]},
    "bad ids beside x": {"x": torch.zeros(4, 3), "sample": [1, 2, 3]},
}


@pytest.mark.parametrize("case", BAD_SAMPLERS)
def test_a_bad_sampler_is_refused(case: str) -> None:
    with pytest.raises(fd.InputError):
        make(**BAD_SAMPLERS[case])


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_before_the_model_runs(case: str) -> None:
    model = Writer()
    sampler = make(model, "ddpm", guidance_scale=2.0)
    arguments = {"shape": (4, 3), "uncond": NULL, **LABELS, **BAD_CALLS[case]}
    arguments = {name: value for name, value in arguments.items() if name != "y" or value is not None}
    with pytest.raises(fd.InputError):
        sampler(**arguments)
    assert model.calls == []


def test_the_good_call_beside_the_bad_ones_works() -> None:
    model = Writer()
    assert make(model, "ddpm", guidance_scale=2.0)((4, 3), uncond=NULL, **LABELS).shape == (4, 3)
    assert len(model.calls) == 8


@pytest.mark.parametrize("output", [None, 3.0, (torch.zeros(4, 3),), SimpleNamespace(sample=None)])
def test_an_output_that_is_no_tensor_is_refused(output: object) -> None:
    with pytest.raises(fd.InputError, match="must return a tensor"):
        make(lambda x, t: output)((4, 3))


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (4, 9)])
def test_an_output_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(fd.InputError, match="out must be"):
        make(lambda x, t: torch.zeros(shape))((4, 3))


def test_ddim_inverse_starts_from_images() -> None:
    diffusion = fd.Diffusion(fd.Schedule.linear(100))
    sampler = fd.Sampler(lambda x, t: torch.zeros_like(x), diffusion, "ddim_inverse", 5)
    with pytest.raises(fd.InputError, match="ddim_inverse starts from images: pass them as x"):
        sampler((1, 2), seed=0)
    image = torch.ones(1, 2)
    assert torch.allclose(sampler((1, 2), x=image), image * float(diffusion.schedule.alpha[-1]))
