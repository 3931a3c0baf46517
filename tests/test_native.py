"""Proves the extension itself: its noise at every instruction set, its number formats, threads, the GIL, bad calls."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from op_tools import CALLS, F16, F32, assert_same_bits, call_of, flat, lay_out, randn, same_bits
from oracles import PHILOX_ANSWERS, philox_integers, words

import fastdiff as fd
from fastdiff import _C
from fastdiff.noise import Stream, draw, normal
from fastdiff.ops import native

HERE = Path(__file__).parent
MASK = 2**32 - 1


@pytest.fixture(autouse=True)
def on_native():
    with fd.backend("native"):
        yield


@contextlib.contextmanager
def at_level(name):
    before = _C.level()
    _C.use(name)
    try:
        yield
    finally:
        _C.use(before)


@pytest.fixture(params=_C.levels())
def level(request):
    with at_level(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_best_level_is_the_one_in_use():
    assert _C.level() == _C.levels()[0]
    assert _C.levels()[-1] == "baseline"


# ---- Philox ---------------------------------------------------------------------------------


def native_words(counters, keys):
    counters, keys = (np.ascontiguousarray(table, np.uint32) for table in (counters, keys))
    result = np.zeros((len(counters), 4), np.uint32)
    _C.philox(counters, keys, result)
    return result.tolist()


def test_philox_gives_known_answers_and_those_of_unbounded_integers(level):
    draws = np.random.default_rng(1).integers(0, 2**32, (1006, 6))
    draws[:300:3, 0] = MASK - draws[:300:3, 0] % 70  # blocks of quads that wrap
    draws[1:300:3, :4] = MASK - draws[1:300:3, :4] % 3
    draws[:3] = [words(counter) + words(key) for counter, key, _ in PHILOX_ANSWERS]
    actual = native_words(draws[:, :4], draws[:, 4:])
    assert actual == [philox_integers(row[:4], row[4:]) for row in draws.tolist()]
    assert actual[:3] == [words(answer) for *_, answer in PHILOX_ANSWERS]


# ---- normals --------------------------------------------------------------------------------


def ulps(actual, truth):
    """The largest error in units of the last place of the truth in float32."""
    truth = truth.numpy()
    return float((np.abs(actual.double().numpy() - truth) / np.spacing(np.abs(truth).astype(np.float32))).max())


@pytest.fixture(scope="module")
def two_million():
    """Normals in float64 of an address, and those of the extension's best level."""
    shape, place = (64, 3, 10_923), {"seed": -77, "step": 5}
    return shape, place, draw(shape, fd.noise.address(64, torch.device("cpu"), **place), "cpu")


def test_two_million_normals_are_within_2_ulp_and_the_same_at_every_level(two_million):
    shape, place, truth = two_million
    results = []
    for name in _C.levels():
        with at_level(name):
            results.append(normal(shape, **place))
    assert_same_bits(*results)
    assert results[0].numel() > 2_000_000
    assert ulps(results[0], truth) <= 2


# Samples whose first quad of seed 0, step 0, stream 0 has an extreme word, found by going through 40 million.
EXTREMES = {
    "the largest radius": (18189822, 27055353, 33008474, 40369361, 40657998),
    "the smallest radius": (1205178, 12895450, 16037861, 17060736, 29136490, 34290445, 35366005),
    "the next radii": (296355, 30494644, 32317421, 41390885, 567928, 3552714, 5580154, 23820000, 30199417),
    "angles at an eighth of a circle": (35041976, 9758813, 17372124),
    "angles at an axis": (7284451, 30597561, 21172750, 3446357),
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_normals_of_extreme_words_are_within_2_ulp(kind, level):
    ids = EXTREMES[kind]
    quads = np.array([philox_integers((0, 0, i, 0), (0, 0)) for i in ids])
    radii, angles = quads[:, 0::2] >> 8, quads[:, 1::2]
    near = {
        "the largest radius": radii == 0,
        "the smallest radius": radii == 2**24 - 1,
        "the next radii": (radii == 1) | (radii == 2**24 - 2),
        "angles at an eighth of a circle": np.abs((angles + 2**28) % 2**29 - 2**28) <= 24,
        "angles at an axis": np.abs((angles + 2**29) % 2**30 - 2**29) <= 24,
    }[kind]
    assert near.any(1).all(), "the samples are those that were meant"
    truth = draw((len(ids), 4), fd.noise.address(len(ids), torch.device("cpu"), seed=0, sample=ids), "cpu")
    actual = normal((len(ids), 4), seed=0, sample=ids)
    assert torch.isfinite(actual).all()
    assert ulps(actual, truth) <= 2


@pytest.mark.slow
def test_a_hundred_million_normals_are_within_2_ulp():
    worst = 0.0
    for seed in range(50):
        place = fd.noise.address(64, torch.device("cpu"), seed=seed)
        worst = max(worst, ulps(normal((64, 32_768), seed=seed), draw((64, 32_768), place, "cpu")))
    assert worst <= 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 7, 9), (2, 3, 33, 35), (2, 300, 3, 3), (2, 3, 4, 5, 6)], ids=str)
def test_normals_in_any_layout(layout, shape, level):
    ids = torch.tensor([9, 4, 2**31])[: shape[0]]
    result = lay_out(torch.zeros(shape), layout)
    _C.normal(result, (7, 8, ids, 2), 1)
    assert same_bits(result, normal(shape, seed=7, step=8, sample=ids, stream=2))


@pytest.mark.parametrize("seed", [3, torch.tensor(3), torch.tensor([3, 3, 3])], ids=["int", "tensor", "each"])
@pytest.mark.parametrize("step", [2, torch.tensor(2), torch.tensor([2, 2, 2])], ids=["int", "tensor", "each"])
def test_an_address_means_on_native_what_it_means_on_the_reference(seed, step):
    ours = normal((3, 2, 5), seed=seed, step=step)
    with fd.backend("reference"):
        torch.testing.assert_close(ours, normal((3, 2, 5), seed=seed, step=step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["add_noise drawn", "affine_step drawn", "diffusion_loss drawn"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_noise_made_in_a_kernel_is_the_noise_of_the_address(op, layout, level):
    shape = (3, 4, 19, 21)
    call, given = call_of(op, shape, 1), call_of(op.split()[0], shape, 1)
    stream = Stream.STEP if op.startswith("affine") else Stream.TRAINING
    noise = normal(shape, **{k: call.run.keywords.get("more", call.run.keywords)[k] for k in PLACE}, stream=stream)
    tensors = {k: lay_out(t, layout) if t.ndim > 1 else t for k, t in call.tensors.items()}
    assert_same_bits(call.run(**tensors), given.run(**tensors, noise=lay_out(noise, layout)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("seeds", ["one seed", "a seed each"])
def test_noise_does_not_depend_on_what_it_is_drawn_with(layout, seeds, level):
    """Of 24 times 21 batches of 1 to 257 samples, in any order, cut anywhere; made alone and within an op."""
    numbers, shape = np.random.default_rng([*map(ord, layout + seeds + level)]), (257, 3, 5, 7)
    ids = torch.from_numpy(numbers.integers(0, 2**32, 257))
    each = torch.from_numpy(numbers.integers(-(2**63), 2**63, 257)) if seeds == "a seed each" else None
    with at_level("baseline"):
        whole = normal(shape, seed=5 if each is None else each, step=3, sample=ids, stream=Stream.TRAINING)
    for _ in range(21):
        batch = torch.from_numpy(numbers.permutation(257)[: numbers.integers(1, 258)])
        for part in batch.split(int(numbers.integers(1, len(batch) + 1))):
            seed = 5 if each is None else each[part]
            alone = lay_out(torch.empty(len(part), *shape[1:]), layout)
            _C.normal(alone, (seed, 3, ids[part], Stream.TRAINING), 1)
            x0 = lay_out(torch.zeros(alone.shape), layout)
            fused = fd.ops.add_noise(x0, 0.0, 1.0, seed=seed, step=3, sample=ids[part])
            assert_same_bits(whole[part], alone, fused)


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 64, 255])
def test_small_samples_drawn_together_have_the_noise_of_each(elements, level, threads):
    """Samples that end within a quad, and pieces that end within a sample."""
    at = {"seed": -2, "step": 5, "sample": torch.arange(3000).flip(0) * 7 + 2**31}
    large = normal((3000, 260), **at)[:, :elements].contiguous()  # these are drawn one by one
    x, table = randn((3000, elements), 0), torch.randn(2, 19)
    for count in (1, 2):
        threads(count)
        assert_same_bits(large, normal((3000, elements), **at))
        fused = fd.ops.affine_step(x, x, table, 1, **at)
        assert_same_bits(fused.x, fd.ops.affine_step(x, x, table, 1, noise=large).x)


PLACE = ("seed", "step", "sample")


@pytest.mark.parametrize("batch", [1, 2, 3, 17, 64, 65, 256, 257])
def test_a_batch_may_be_cut_anywhere(batch):
    x, table, ids = randn((257, 2, 3, 3), 0), torch.randn(2, 19), torch.arange(257)
    runs = (
        lambda x, ids: fd.ops.add_noise(x, 0.5, 0.5, seed=1, sample=ids),
        lambda x, ids: fd.ops.affine_step(x, x, table, 0, seed=1, sample=ids).x,
        lambda x, ids: fd.ops.diffusion_loss(x, x, *torch.ones(3, len(x)), seed=1, sample=ids),
    )
    for run in runs:
        parts = [run(x[part], part) for part in ids.split(batch)]
        assert_same_bits(run(x, ids), torch.cat(parts))


# ---- levels and threads ---------------------------------------------------------------------


@pytest.mark.parametrize("op", CALLS)
def test_every_level_gives_the_same_bits(op):
    call, results = call_of(op, (3, 4, 33, 35), 1, F16), []
    for name in _C.levels():
        with at_level(name):
            results.append(call.run(**call.tensors))
    assert_same_bits(*results)


@pytest.mark.parametrize("op", CALLS)
def test_any_number_of_threads_gives_the_same_bits(op, threads):
    call, results = call_of(op, (5, 3, 65, 67), 1, F16), []
    for count in (1, 2, 3):
        threads(count)
        results += [call.run(**call.tensors) for _ in range(3)]
    assert_same_bits(*results)
    threads(2)
    assert same_bits(normal((3, 50_001), seed=1)[2:], normal((1, 50_001), seed=1, sample=[2]))


def test_the_bodies_are_given_torch_s_number_of_threads(threads):
    seen = []
    body = native._body(lambda *arguments: seen.append(arguments[-1]))
    for count in (1, 3, 2):
        threads(count)
        body(torch.zeros(1))
    assert seen == [1, 3, 2]


TEAM = """
import os, torch
from fastdiff import _C
x = torch.zeros(4, 100_000)
counts = []
for threads in (1, 1, 3):
    _C.guide(x, x, 1.0, torch.empty_like(x), threads)
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0], counts[2] - counts[1])
"""


def python(code, **environment):
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_a_call_starts_as_many_threads_as_it_is_told():
    done = python(["-c", TEAM], OMP_NUM_THREADS="1")
    assert done.stdout.split() == ["0", "2"], done.stderr


def test_four_threads_at_once_get_the_bits_of_one():
    calls = [call_of(op, (3, 4, 9, 11), 1, F16) for op in CALLS]
    alone, wrong = [call.run(**call.tensors) for call in calls], []

    def hammer(first):
        with fd.backend("native"):
            for i in range(150):
                k = (first + i) % len(calls)
                result = calls[k].run(**calls[k].tensors)
                if not all(map(same_bits, flat(alone[k]), flat(result))):
                    wrong.append(k)

    team = [threading.Thread(target=hammer, args=(i,)) for i in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not wrong


def longest_silence(work):
    """The longest time, in seconds, for which another Python thread did not run during ``work``; and its length."""
    beats, done = [], threading.Event()

    def beat():
        while not done.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.001)

    heart = threading.Thread(target=beat)
    heart.start()
    time.sleep(0.02)
    begin = time.perf_counter()
    work()
    end = time.perf_counter()
    done.set()
    heart.join()
    beats = [begin, *(t for t in beats if begin < t < end), end]
    return max(np.diff(beats)), end - begin


def test_python_goes_on_while_a_kernel_runs():
    result = torch.empty(1, 12_000_000)
    with at_level("baseline"):
        silences = [longest_silence(lambda: _C.normal(result, (0, 0, None, 0), 1)) for _ in range(3)]
    assert min(length for _, length in silences) > 0.1, "long enough to tell"
    assert min(gap for gap, _ in silences) <= 0.05


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("op", ["add_noise drawn", "guide", "affine_step drawn", "diffusion_loss drawn"])
def test_ten_thousand_calls_leave_no_memory_behind(op):
    call = call_of(op, (3, 2, 5), 1)
    for _ in range(1000):
        call.run(**call.tensors)
    before = resident()
    for _ in range(10_000):
        call.run(**call.tensors)
    assert resident() - before <= 2**20


def test_refused_calls_leave_no_memory_behind():
    x = torch.zeros(2, 3)

    def refuse():
        with pytest.raises(ValueError, match="shape"):
            _C.guide(x, x[:1], 1.0, x, 1)

    for _ in range(200):
        refuse()
    before = resident()
    for _ in range(10_000):
        try:
            _C.guide(x, x[:1], 1.0, x, 1)
        except ValueError:
            continue
    assert resident() - before <= 2**20


# ---- number formats -------------------------------------------------------------------------


def cast(x, dtype):
    """x rounded to ``dtype`` by the extension: 1 x + 0 times -1, which keeps the sign of zero."""
    result = torch.empty(x.shape, dtype=dtype)
    _C.add_noise(x, 1.0, 0.0, torch.full_like(x, -1.0, dtype=F32), result, 1)
    return result


def halves(dtype):
    """All 65,536 values."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(256, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_half_precision_values_are_read_and_written_exactly(dtype, level):
    assert same_bits(cast(halves(dtype), F32), halves(dtype).float())
    assert same_bits(cast(halves(dtype).float(), dtype), halves(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_is_torch_s_next_to_every_tie(dtype, level):
    values = halves(dtype).float().flatten()
    values = values[torch.isfinite(values)].sort().values
    ties = (values[1:] + values[:-1]) / 2
    largest = torch.finfo(dtype).max * torch.tensor([1 + torch.finfo(dtype).eps / 4, 1.01])
    near = [torch.nextafter(ties, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    wide = torch.cat([ties, *near, largest, -largest])[None]
    assert same_bits(cast(wide, dtype), wide.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_every_float32(dtype):
    for start in range(-(2**31), 2**31, 2**24):
        wide = torch.arange(start, start + 2**24, dtype=torch.int64).to(torch.int32).view(F32)[None]
        assert same_bits(cast(wide, dtype), wide.to(dtype)), hex(start)


def test_float64_is_rounded_to_float32_once(level):
    wide = randn((3, 1000), 0, torch.float64) * 10 ** torch.linspace(-44, 39, 1000, dtype=torch.float64)
    assert same_bits(cast(wide, F32), wide.float())


def test_the_exponential_of_a_learned_variance_is_within_2_ulp(level):
    """A step of s exp(lo / 2) z alone, z = 1."""
    exponent = torch.cat((torch.linspace(-87, 88, 200_003), torch.tensor([0.0, -1e-30, 1e-8, 88.72, -87.3])))
    table = fd.ops.row.make_table(len(exponent), s=1.0, lo=2 * exponent.double()).float()
    x, output = torch.zeros(len(exponent), 1), torch.zeros(len(exponent), 2)
    output[:, 1] = -1  # f = 0
    step = fd.ops.affine_step(x, output, table, torch.arange(len(exponent)), noise=x + 1)
    assert ulps(step.x[:, 0], exponent.double().exp()) <= 2


@pytest.mark.parametrize(("exponent", "expected"), [(-200.0, 0.0), (-1e30, 0.0), (89.0, torch.inf), (1e30, torch.inf)])
def test_the_exponential_beyond_float32(exponent, expected, level):
    table = fd.ops.row.make_table(1, s=1.0, lo=2 * exponent).float()
    step = fd.ops.affine_step(torch.zeros(1, 1), torch.tensor([[0.0, -1.0]]), table, 0, noise=torch.ones(1, 1))
    assert step.x.item() == expected


# ---- bad calls ------------------------------------------------------------------------------


def test_hostile_arguments_are_refused_and_crash_nothing():
    done = python([str(HERE / "native" / "hostile.py")])
    *failures, count = done.stdout.splitlines()
    assert int(count.split()[0]) >= 500, done.stderr
    assert not failures, "\n".join(failures)
