"""Proves the noise: Philox bit for bit, normals to 2 ulp, addresses free of the batch, and the statistics."""

import contextlib
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from oracles import PHILOX_ANSWERS, philox_integers, words
from scipy import stats

import fastdiff as fd
from fastdiff.noise import Stream, normal, philox4x32, uniform_words

MASK = 2**32 - 1
LARGEST = MASK


# ---- Philox ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_ANSWERS)
def test_random123_known_answers(counter, key, expected):
    assert philox4x32(torch.tensor(words(counter)), torch.tensor(words(key))).tolist() == words(expected)
    assert philox_integers(words(counter), words(key)) == words(expected), "the test's own oracle"


def test_a_thousand_random_counters_and_keys():
    draws = np.random.default_rng(0).integers(0, 2**32, (1003, 6))
    draws[::10, :4] = LARGEST - draws[::10, :4] % 3  # next to the wrap
    actual = philox4x32(torch.from_numpy(draws[:, :4].copy()), torch.from_numpy(draws[:, 4:].copy()))
    assert actual.dtype == torch.int64
    assert actual.tolist() == [philox_integers(row[:4], row[4:]) for row in draws.tolist()]


def test_keys_broadcast_against_counters():
    counter = torch.arange(24).reshape(2, 3, 4)
    key = torch.tensor([[1, 2], [3, 4]])[:, None]
    together = philox4x32(counter, key)
    assert together.shape == (2, 3, 4)
    for i in range(2):
        assert torch.equal(together[i], philox4x32(counter[i], key[i, 0]))


# ---- normals --------------------------------------------------------------------------------


def word_table(count, elements, seed, step, ids, stream):
    """The words that belong to a batch, one list of quads after the other."""
    key = seed % 2**64 % 2**32, seed % 2**64 >> 32
    quads = math.ceil(elements / 4)
    table = [philox_integers((quad, step, ids[k], stream), key) for k in range(count) for quad in range(quads)]
    return np.array(table, np.uint64).reshape(count, quads, 4)


def box_muller(table, elements):
    """Float64 normals of a table of words, by numpy."""
    u = ((table[..., 0::2] >> np.uint64(8)).astype(np.float64) + 0.5) / 2**24
    angle = 2 * np.pi * (table[..., 1::2].astype(np.float64) / 2**32)
    radius = np.sqrt(-2 * np.log(u))
    z = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return z.reshape(len(table), -1)[:, :elements]


ADDRESSES = [
    {"seed": 0, "step": 0, "ids": [0, 1, 2], "stream": Stream.STEP},
    {"seed": 1, "step": 7, "ids": [5, 0, 9], "stream": Stream.INITIAL},
    {"seed": -1, "step": LARGEST, "ids": [LARGEST, 2**31, 1], "stream": Stream.TRAINING},
    {"seed": 2**63 - 1, "step": 2**31, "ids": [3, 4, 5], "stream": Stream.LIKELIHOOD},
    {"seed": -(2**63), "step": 12345, "ids": [0, 1, 2], "stream": Stream.DROPOUT},
    {"seed": 0x0123456789ABCDEF, "step": 3, "ids": [7, 8, 2**24], "stream": Stream.STEP},
]


def addressed(address, shape, dtype):
    """The normals of an address, by the package and by the test's own words, ``[N, elements]``."""
    ids, elements = address["ids"], math.prod(shape[1:])
    place = {"seed": address["seed"], "step": address["step"], "sample": ids, "stream": address["stream"]}
    table = word_table(len(ids), elements, address["seed"], address["step"], ids, int(address["stream"]))
    return normal(shape, **place, dtype=dtype).numpy().reshape(len(ids), -1), box_muller(table, elements)


@pytest.mark.parametrize("shape", [(3, 1), (3, 37), (3, 3, 5, 7)])
@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: str(address["seed"]))
def test_float32_normals_are_within_2_ulp(address, shape):
    actual, truth = addressed(address, shape, torch.float32)
    assert (np.abs(actual - truth) <= 2 * np.spacing(np.abs(truth).astype(np.float32))).all()


@pytest.mark.parametrize("shape", [(3, 1), (3, 37), (3, 3, 5, 7)])
@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: str(address["seed"]))
def test_float64_normals_have_float64_digits(address, shape):
    actual, truth = addressed(address, shape, torch.float64)
    assert np.abs(actual - truth).max() <= 1e-13


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: str(address["seed"]))
def test_uniform_words_are_the_first_words_bit_for_bit(address):
    ids, place = address["ids"], {key: address[key] for key in ("seed", "step", "stream")}
    table = word_table(3, 1, place["seed"], place["step"], ids, int(place["stream"]))
    assert uniform_words(3, sample=ids, **place).tolist() == table[:, 0, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_normals_are_the_float64_ones_rounded_once(dtype):
    with fd.backend("reference"):
        wide = normal((4, 33), seed=3, dtype=torch.float64)
        assert torch.equal(normal((4, 33), seed=3, dtype=dtype), wide.to(dtype))


def test_the_extreme_words_give_finite_normals():
    corners = torch.tensor([[a, b, c, d] for a in (0, MASK) for b in (0, MASK) for c in (0, MASK) for d in (0, MASK)])
    z = fd.noise.box_muller(corners)
    assert torch.isfinite(z).all()
    assert float(z.abs().max()) == pytest.approx(math.sqrt(50 * math.log(2)), rel=1e-12)


# ---- addresses ------------------------------------------------------------------------------

SHAPES = [(1,), (2,), (5,), (8,), (3, 7), (1, 1, 1), (2, 3, 5)]


@pytest.mark.parametrize("chunk", [1, 3, 64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_may_be_drawn_in_parts(shape, chunk):
    whole = normal((257, *shape), seed=5, step=3)
    parts = [normal((len(ids), *shape), seed=5, step=3, sample=ids) for ids in torch.arange(257).split(chunk)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("batch", [1, 2, 3, 17, 63, 64, 65, 128, 257])
def test_batch_size_does_not_matter(batch):
    assert torch.equal(normal((batch, 3, 5), seed=-7), normal((257, 3, 5), seed=-7)[:batch])


@pytest.mark.parametrize("case", range(10))
def test_any_subset_in_any_order(case):
    whole = normal((40, 11), seed=2)
    ids = np.random.default_rng(case).integers(0, 40, 1 + 5 * case)
    assert torch.equal(normal((len(ids), 11), seed=2, sample=ids.tolist()), whole[ids])
    assert torch.equal(normal((len(ids), 11), seed=2, sample=torch.from_numpy(ids)), whole[ids])


def test_a_seed_per_sample_gives_what_the_seed_gives_alone():
    seeds = [0, 7, -7, 2**63 - 1]
    together = normal((4, 3, 5), seed=seeds, step=2)
    alone = [normal((1, 3, 5), seed=seed, step=2) for seed in seeds]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(normal((4, 3, 5), seed=torch.tensor(seeds), step=2), together)


def test_a_seed_and_an_id_per_sample():
    together = normal((3, 6), seed=[1, 2, 1], sample=[4, 4, 5])
    alone = [normal((1, 6), seed=seed, sample=[k]) for seed, k in ((1, 4), (2, 4), (1, 5))]
    assert torch.equal(together, torch.cat(alone))


def test_a_step_per_sample():
    steps = [9, 0, LARGEST]
    together = normal((3, 6), seed=1, step=torch.tensor(steps))
    alone = [normal((1, 6), seed=1, step=step, sample=[k]) for k, step in enumerate(steps)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 6, 7, 9, 15])
def test_fewer_elements_are_the_first_of_more(elements):
    assert torch.equal(normal((6, elements), seed=1), normal((6, 16), seed=1)[:, :elements])


@pytest.mark.parametrize("shape", [(30,), (5, 6), (2, 3, 5), (1, 30, 1), (5, 1, 2, 3)])
def test_only_the_order_of_elements_matters(shape):
    assert torch.equal(normal((4, *shape), seed=9).flatten(1), normal((4, 30), seed=9))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0), (0,), (0, 0)])
def test_no_elements(shape):
    assert normal(shape, seed=0).shape == shape
    assert normal(shape, seed=0).dtype == torch.float32


@pytest.mark.parametrize("seeds", [[], torch.tensor([], dtype=torch.int64)])
def test_no_samples_with_a_seed_each(seeds):
    assert normal((0, 3), seed=seeds, sample=[]).shape == (0, 3)


def test_no_two_addresses_share_noise():
    base = {"seed": 3, "step": 4, "sample": [5], "stream": Stream.STEP}
    changes = [
        {},
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"seed": -3},
        {"step": 5},
        {"step": 4 + 2**31},
        {"sample": [6]},
        *({"stream": stream} for stream in Stream if stream != Stream.STEP),
    ]
    draws = [normal((1, 64), **{**base, **change}).flatten().tolist() for change in changes]
    values = [value for draw in draws for value in draw]
    assert len(set(values)) == len(values) == 64 * (len(Stream) + 6)


@pytest.mark.slow
def test_no_two_of_six_million_addresses_share_a_counter(monkeypatch):
    """Different counters of one key give different blocks of noise, for Philox is a permutation of them."""
    blocks = []
    monkeypatch.setattr(fd.noise, "philox4x32", lambda counter, key: blocks.append(counter.numpy()) or counter)
    numbers = np.random.default_rng(0)
    steps, ids = (numbers.choice(2**32, count, replace=False) for count in (50, 65))
    for stream in Stream:
        for step in steps.tolist():
            fd.noise.draw((65, 1000), fd.noise.address(65, "cpu", seed=3, step=step, sample=ids, stream=stream), "cpu")
    words = [np.unique(column, return_inverse=True)[1] for column in np.concatenate(blocks).reshape(-1, 4).T]
    packed = np.ravel_multi_index(words, [int(word.max()) + 1 for word in words])
    assert len(np.unique(packed)) == len(packed) == 8 * 50 * 65 * 250


def test_no_stream_is_another_by_a_second_name():
    assert sorted(int(stream) for stream in Stream.__members__.values()) == list(range(len(Stream)))


def test_torch_s_own_generator_is_neither_used_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = normal((4, 4), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normal((4, 4), seed=1), first)


# ---- statistics -----------------------------------------------------------------------------

N = 1_000_000


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["reference", "native"])
def draws(request):
    """A thousand samples of a thousand normals: float64 is the reference's, float32 the extension's."""
    return normal((1000, 1000), seed=2024, step=1, dtype=request.param).double().numpy()


@pytest.fixture(scope="module")
def raw():
    """A million 32-bit words of consecutive steps and quads."""
    quads, steps = torch.meshgrid(torch.arange(2500), torch.arange(100), indexing="ij")
    counter = torch.stack((quads, steps, torch.zeros_like(quads), torch.zeros_like(quads)), -1)
    return philox4x32(counter, torch.tensor([7, 0])).numpy()


def test_normals_pass_kolmogorov_smirnov(draws):
    assert stats.kstest(draws.flatten(), "norm").pvalue > 1e-4


def test_anderson_darling(draws):
    z = np.sort(draws.flatten()[:100_000])
    i = np.arange(1, len(z) + 1)
    statistic = -len(z) - np.mean((2 * i - 1) * (stats.norm.logcdf(z) + stats.norm.logsf(z[::-1])))
    assert statistic < 6.0  # p = 0.001 for a fully specified distribution


def check_p_values(streams, elements, dtype):
    """Kolmogorov-Smirnov of each stream; the p-values are themselves uniform."""
    p = [stats.kstest(normal((1, elements), seed=k, dtype=dtype)[0].numpy(), "norm").pvalue for k in range(streams)]
    assert min(p) > 1e-7
    assert stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_p_values_of_many_streams_are_uniform(dtype):
    check_p_values(60, 2000, dtype)


@pytest.mark.slow
def test_p_values_of_two_hundred_streams_of_a_million():
    check_p_values(200, 1_000_000, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [4, 5, 5.5])
def test_tails_of_a_billion_normals(bound):
    """Up to 5.5: the smallest radius word cuts the tail off at 5.89."""
    mean = 1e9 * 2 * stats.norm.sf(bound)
    count = sum(int((normal((1, 10_000_000), seed=seed).abs() > bound).sum()) for seed in range(100))
    assert abs(count - mean) <= 5 * mean**0.5


@pytest.mark.slow
def test_a_thousand_pairs_of_neighbouring_streams_are_uncorrelated():
    for place in ("seed", "step", "sample"):
        for k in range(1000):
            a, b = (
                normal(
                    (1, 100_000),
                    **{"seed": 0, "step": 0, "sample": [0], place: [k + i] if place == "sample" else k + i},
                )
                for i in (0, 1)
            )
            assert correlations(a.double().numpy(), b.double().numpy()) < 5.5


@pytest.mark.parametrize(
    ("power", "expected", "deviation"), [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]
)
def test_moments(draws, power, expected, deviation):
    assert abs((draws**power).mean() - expected) < 5 * deviation / N**0.5


@pytest.mark.parametrize("bound", [2, 3, 4, 5])
def test_tails_have_the_right_weight(draws, bound):
    mean = N * 2 * stats.norm.sf(bound)
    count = int((np.abs(draws) > bound).sum())
    assert stats.poisson.sf(count - 1, mean) > 1e-5
    assert stats.poisson.cdf(count, mean) > 1e-5


def test_each_place_of_a_quad_is_normal(draws):
    for place in range(4):
        assert stats.kstest(draws[:, place::4].flatten(), "norm").pvalue > 1e-5


def correlations(a, b):
    """Of rows, each with n entries: the largest in units of 1 / sqrt(n)."""
    return float(np.abs((a * b).mean(-1)).max() * a.shape[-1] ** 0.5)


@pytest.mark.parametrize("lag", [*range(1, 17), 32, 64])
def test_serial_correlation(draws, lag):
    flat = draws.flatten()
    assert correlations(flat[:-lag], flat[lag:]) < 5
    assert correlations(flat[:-lag] ** 2 - 1, (flat[lag:] ** 2 - 1) / 2) < 5


def test_neighbouring_samples_are_uncorrelated(draws):
    assert correlations(draws[:-1], draws[1:]) < 5


@pytest.mark.parametrize("word", ["seed", "step", "stream"])
def test_neighbouring_streams_are_uncorrelated(word):
    place = {"seed": 8, "step": 8, "stream": 0}
    a, b = (normal((200, 1000), **{**place, word: place[word] + i}, dtype=torch.float64).numpy() for i in (0, 1))
    assert correlations(a, b) < 5


def test_bytes_of_the_words_are_uniform(raw):
    flat = raw.flatten()
    for shift in (0, 8, 16, 24):
        assert stats.chisquare(np.bincount(flat >> shift & 255, minlength=256)).pvalue > 1e-5


def test_bits_of_the_words_are_fair(raw):
    flat = raw.flatten()
    for bit in range(32):
        assert abs((flat >> bit & 1).mean() - 0.5) < 5 * 0.5 / N**0.5


def test_words_are_uniform(raw):
    assert stats.kstest(raw.flatten() / 2**32, "uniform").pvalue > 1e-4


def test_words_repeat_no_more_than_by_chance(raw):
    repeats = N - len(np.unique(raw))
    expected = N**2 / 2**33
    assert abs(repeats - expected) < 5 * expected**0.5


def test_blocks_are_unique_over_consecutive_calls(raw):
    low = raw[..., 0].astype(np.uint64) << np.uint64(32) | raw[..., 1].astype(np.uint64)
    high = raw[..., 2].astype(np.uint64) << np.uint64(32) | raw[..., 3].astype(np.uint64)
    assert len(np.unique(low)) == len(np.unique(high)) == N // 4


# ---- an external battery --------------------------------------------------------------------

BATTERY = [  # of dieharder's tests: all those that it does not call suspect, as long as all together take a few minutes
    *("-d 0", "-d 1", "-d 2", "-d 3", "-d 4", "-d 8", "-d 9", "-d 10", "-d 11", "-d 12", "-d 13", "-d 15", "-d 16"),
    *("-d 17 -p 10", "-d 100", "-d 101", "-d 102", *(f"-d 200 -n {n} -p 20" for n in (2, 4, 8))),
    *(*(f"-d 201 -n {n} -p 100" for n in (2, 3, 4)), *(f"-d 202 -n {n}" for n in (3, 4, 5))),
    *(*(f"-d 203 -n {n} -p 20" for n in (0, 1, 3, 4, 15)), "-d 204", "-d 205", "-d 206", "-d 207", "-d 208", "-d 209"),
]
DEFECTS = {  # what is wrong with the words, and the test that sees it
    "a word in a thousand repeats the one before": (
        "-d 2 -p 20",
        lambda words: np.where(np.arange(words.size) % 1000, words, np.roll(words, 1)),
    ),
    "each quad twice": ("-d 8", lambda words: np.repeat(words.reshape(-1, 4), 2, 0)),
    "a bit that is seldom 1": ("-d 100", lambda words: words & np.roll(words, 1) | words & ~np.uint32(1 << 9)),
}
battery = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dieharder") is None, reason="needs the program dieharder, a package of Debian"),
]


def raw_words(seed):
    """The words of a seed as the extension makes them, without end: of samples of 65,536 elements."""
    philox = pytest.importorskip("fastdiff._C").philox
    counters, keys, words = (np.zeros((2**14, width), np.uint32) for width in (4, 2, 4))
    counters[:, 0], keys[:, 0] = np.arange(2**14), seed
    for sample in range(2**32):
        counters[:, 2] = sample
        philox(counters, keys, words)
        yield words.flatten()


def assessments(test, blocks):
    """The p-values of one of dieharder's tests, each with what it says of it: PASSED, WEAK or FAILED (p < 1e-6)."""
    command = ["dieharder", "-g", "200", "-c", ",", "-D", "pvalues", "-D", "assessment", *test.split()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as battery:
        with contextlib.suppress(BrokenPipeError):  # it has read enough
            for block in blocks:
                battery.stdin.write(block.astype("<u4").tobytes())
        lines = battery.stdout.read().decode().splitlines()
    verdicts = [[part.strip() for part in line.split(",")] for line in lines if "," in line]
    print(*verdicts)
    return [verdict for _, verdict in verdicts]


@pytest.mark.parametrize("test", [pytest.param(test, marks=battery) for test in BATTERY])
def test_the_words_pass_an_external_battery(test):
    verdicts = assessments(test, raw_words(BATTERY.index(test)))
    assert verdicts
    assert set(verdicts) <= {"PASSED", "WEAK"}  # of a hundred, one is weak by chance


@pytest.mark.parametrize("defect", [pytest.param(defect, marks=battery) for defect in DEFECTS])
def test_the_battery_sees_a_planted_defect(defect):
    test, spoil = DEFECTS[defect]
    assert "FAILED" in assessments(test, map(spoil, raw_words(0)))


# ---- who uses it ----------------------------------------------------------------------------


def test_the_sampler_adds_the_noise_of_seed_sample_and_row():
    diffusion = fd.Diffusion(fd.Schedule.cosine(20), "sample")
    sampler = fd.Sampler(lambda x, t: 0 * x, diffusion, "ddpm", 6, dtype=torch.float64)
    ids = torch.tensor([4, 0])
    x = normal((2, 3, 5), seed=6, sample=ids, stream=Stream.INITIAL, dtype=torch.float64)
    for state in sampler.iterate((2, 3, 5), seed=6, sample=ids):
        row = sampler.table.rows[state.step]
        z = normal((2, 3, 5), seed=6, step=state.step, sample=ids, stream=Stream.STEP, dtype=torch.float64)
        assert (state.x - (row.a * x + row.s * z)).abs().max() <= 1e-12
        assert (row.s > 0) == (state.step < 5)
        x = state.x


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in():
    sampler = fd.Sampler(lambda x, t: 0.1 * x, fd.Diffusion(fd.Schedule.cosine(20)), "ddpm", 5)
    whole = sampler((6, 2, 3), seed=3)
    parts = [sampler((len(ids), 2, 3), seed=3, sample=ids) for ids in torch.arange(6).split(4)]
    assert torch.equal(torch.cat(parts), whole)
    alone = sampler((1, 2, 3), seed=11)
    assert torch.equal(sampler((2, 2, 3), seed=[3, 11])[1:], alone)


# ---- what does not fit ----------------------------------------------------------------------

BAD = {
    "negative size": (lambda: normal((2, -1), seed=0), "shape"),
    "no batch": (lambda: normal((), seed=0), "shape"),
    "fractional seed": (lambda: normal((2, 1), seed=0.5), "seed"),
    "seed of a word": (lambda: normal((2, 1), seed="a"), "seed"),
    "seed beyond 64 bits": (lambda: normal((2, 1), seed=2**64), "seed"),
    "too few seeds": (lambda: normal((2, 1), seed=[1]), "seed"),
    "too many seeds": (lambda: normal((2, 1), seed=[1, 2, 3]), "seed"),
    "matrix of seeds": (lambda: normal((2, 1), seed=[[1, 2]]), "seed"),
    "boolean seed": (lambda: normal((2, 1), seed=True), "seed"),
    "negative step": (lambda: normal((2, 1), seed=0, step=-1), "step"),
    "step beyond 32 bits": (lambda: normal((2, 1), seed=0, step=2**32), "step"),
    "fractional step": (lambda: normal((2, 1), seed=0, step=1.5), "step"),
    "too many steps": (lambda: normal((2, 1), seed=0, step=torch.arange(3)), "step"),
    "negative sample": (lambda: normal((2, 1), seed=0, sample=[0, -1]), "sample"),
    "sample beyond 32 bits": (lambda: normal((2, 1), seed=0, sample=[0, 2**32]), "sample"),
    "too few samples": (lambda: normal((2, 1), seed=0, sample=[0]), "sample"),
    "fractional samples": (lambda: normal((2, 1), seed=0, sample=[0.5, 1.0]), "sample"),
    "one sample id": (lambda: normal((2, 1), seed=0, sample=3), "sample"),
    "counter type": (lambda: philox4x32(torch.zeros(4), torch.tensor([0, 0])), "counter"),
    "counter width": (lambda: philox4x32(torch.tensor([0, 0, 0]), torch.tensor([0, 0])), "counter"),
    "key type": (lambda: philox4x32(torch.tensor([0] * 4), torch.zeros(2, dtype=torch.int32)), "key"),
    "key width": (lambda: philox4x32(torch.tensor([0] * 4), torch.tensor([0])), "key"),
    "key without words": (lambda: philox4x32(torch.tensor([0] * 4), torch.tensor(0)), "key"),
    "integer normals": (lambda: normal((2, 1), seed=0, dtype=torch.int64), "dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()
