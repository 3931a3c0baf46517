"""Proves how training draws timesteps: distributions, weights and histories against what is written out here."""

import math
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusion_tools import SCHEDULES, OnGPU, randn
from graph_tools import Tape
from scipy import stats
from torch._subclasses import FakeTensorMode

import fastdiff as fd
from fastdiff.noise import Stream, uniform_words
from fastdiff.training.timesteps import SAMPLERS, LogNormal, LossTable, SecondMoment, Stratified, Timesteps

W = 2**32
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def of_length(timesteps):
    return fd.Schedule.linear(timesteps, beta_end=0.15)


def learned(timesteps=20, scale=None, **options):
    """A sampler that has seen each timestep ten times, with losses about ``scale`` of it."""
    sampler = SecondMoment(of_length(timesteps), batch=10 * timesteps, **options)
    scale = 1 + torch.arange(timesteps) ** 2 if scale is None else scale
    t = torch.arange(timesteps).repeat(10)
    sampler.update(t, scale.repeat(10) * (1 + 0.1 * randn((len(t),), 5)).float())
    return sampler


def words_as_positions(sampler):
    """The sampler, with the words to draw from given as positions."""
    sampler._words = lambda positions, step: positions
    return sampler


# ---- Diffusion's own draws ------------------------------------------------------------------


def test_the_loss_draws_its_timesteps_from_the_address():
    diffusion, seen = fd.Diffusion(SCHEDULES["linear"]), []

    def model(x, t):
        seen.append(t)
        return x

    x0 = randn((64, 2, 3), 0)
    diffusion.loss(model, x0, seed=5, step=6)
    words = uniform_words(64, seed=5, step=6, stream=Stream.TIMESTEP)
    assert seen[0].tolist() == [int(word) * 100 // W for word in words]
    assert torch.equal(seen[0], diffusion.draw_timesteps(64, seed=5, step=6))


def test_drawn_timesteps_are_uniform():
    diffusion = fd.Diffusion(SCHEDULES["linear"])
    t = torch.cat([diffusion.draw_timesteps(1000, seed=0, step=step) for step in range(100)])
    counts = np.bincount(t.numpy(), minlength=100)
    assert len(counts) == 100
    assert stats.chisquare(counts).pvalue > 1e-4


def test_drawn_timesteps_do_not_depend_on_the_batch():
    diffusion = fd.Diffusion(SCHEDULES["linear"])
    whole = diffusion.draw_timesteps(10, seed=2, step=3)
    assert torch.equal(diffusion.draw_timesteps(3, seed=2, step=3, sample=[7, 0, 7]), whole[[7, 0, 7]])
    assert fd.Diffusion(of_length(1)).draw_timesteps(5, seed=0, step=0).tolist() == [0] * 5


# ---- all samplers ---------------------------------------------------------------------------


def sampler_of(name, seed=3, device="cpu"):
    return learned(seed=seed) if name == "second_moment" else SAMPLERS[name](of_length(20), batch=200, seed=seed)


@every_sampler
def test_a_draw_belongs_to_seed_step_and_position(name):
    sampler, positions = sampler_of(name), torch.arange(200)
    t, weight = sampler.draw(positions, step=7)
    assert t.dtype == torch.int64
    assert weight.dtype == torch.float32
    assert t.shape == weight.shape == (200,)
    assert int(t.min()) >= 0
    assert int(t.max()) < 20
    for part in (positions[150:], positions[[9, 0, 120]], positions[:0]):
        found = sampler.draw(part, step=7)
        assert torch.equal(found[0], t[part])
        assert torch.equal(found[1], weight[part])
    assert not torch.equal(sampler.draw(positions, step=8)[0], t)
    assert not torch.equal(sampler_of(name, seed=4).draw(positions, step=7)[0], t)


@pytest.mark.parametrize("name", ["uniform", "lognormal", "second_moment"])
def test_draws_follow_the_probabilities(name):
    sampler = sampler_of(name)
    t = torch.cat([sampler.draw(torch.arange(200), step=step)[0] for step in range(100)])
    expected = len(t) * sampler.probabilities.numpy()
    found, enough = np.bincount(t.numpy(), minlength=20), expected > 5
    assert enough.sum() > 5
    observed, wanted = (np.append(v[enough], v[~enough].sum()) for v in (found, expected))
    assert ((observed - wanted) ** 2 / (wanted + 1)).sum() < stats.chi2.isf(1e-4, enough.sum())
    assert float(sampler.probabilities.sum()) == 1


@every_sampler
def test_nothing_waits_for_a_gpu(name):
    schedule = of_length(20)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sampler, table = SAMPLERS[name](schedule, batch=6, device="cuda"), LossTable(20, "cuda")
        positions = torch.zeros(6, dtype=torch.int64, device="cuda")
        with OnGPU():
            t, weight = sampler.draw(positions, step=3)
            sampler.update(t, weight)
            table.add(t, weight)
            state = sampler.state()
        assert t.device.type == weight.device.type == "cuda"
        assert all(value.device.type == "cuda" for value in state.values())


@every_sampler
def test_a_state_continues_the_draws(name):
    first, positions = sampler_of(name), torch.arange(200)
    state = first.state()
    second = SAMPLERS[name](of_length(20), batch=200, seed=3)
    second.load({key: value.clone() for key, value in state.items()})
    for step in range(3):
        draws = [sampler.draw(positions, step=step) for sampler in (first, second)]
        assert torch.equal(draws[0][0], draws[1][0])
        assert torch.equal(draws[0][1], draws[1][1])
        for sampler, (t, _) in zip((first, second), draws, strict=True):
            sampler.update(t, t + 0.1 * step)
    assert first.learns == bool(state)
    assert not first.learns or not torch.equal(first.state()["history"], state["history"]), "a state stays what it was"


# ---- uniform --------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [1, 2, 3, 100, 999, 1000])
def test_uniform_draws_are_those_of_the_diffusion(timesteps):
    schedule = of_length(timesteps)
    t, weight = Timesteps(schedule, batch=500, seed=9).draw(torch.arange(500), step=4)
    assert torch.equal(t, fd.Diffusion(schedule).draw_timesteps(500, seed=9, step=4))
    assert (weight == 1).all()


@pytest.mark.parametrize("timesteps", [1, 2, 3, 7, 64, 1000])
def test_a_word_s_timestep_is_its_part_of_all_words(timesteps):
    sampler = words_as_positions(Timesteps(of_length(timesteps), batch=1))
    edges = [k * W // timesteps + i for k in range(timesteps + 1) for i in (-2, -1, 0, 1)]
    words = torch.tensor([word for word in edges if 0 <= word < W])
    assert sampler.draw(words, step=0)[0].tolist() == [int(word) * timesteps // W for word in words]
    owned = [-(-(k + 1) * W // timesteps) - -(-k * W // timesteps) for k in range(timesteps)]
    assert sampler.probabilities.tolist() == [count / W for count in owned]


# ---- stratified -----------------------------------------------------------------------------

SIZES = [(1000, 128), (1000, 1000), (1000, 3000), (7, 64), (3, 5), (1, 4), (100, 1), (4096, 2**20)]


@pytest.mark.parametrize(("timesteps", "batch"), SIZES)
def test_stratified_draws_are_the_formula(timesteps, batch):
    positions = torch.arange(batch)[:: max(1, batch // 500)]
    for step, seed in ((0, 0), (5, 17)):
        t, weight = Stratified(of_length(timesteps), batch=batch, seed=seed).draw(positions, step=step)
        u = Fraction(int(uniform_words(1, seed=seed, step=step, stream=Stream.TIMESTEP)), W)
        assert t.tolist() == [math.floor(timesteps * ((u + Fraction(i, batch)) % 1)) for i in positions.tolist()]
        assert (weight == 1).all()


@pytest.mark.parametrize(("timesteps", "batch"), [(1000, 1000), (1000, 125), (100, 300), (1, 5)])
def test_each_stratum_has_exactly_one_draw(timesteps, batch):
    sampler = Stratified(of_length(timesteps), batch=batch, seed=1)
    for step in range(20):
        t = sampler.draw(torch.arange(batch), step=step)[0]
        if batch >= timesteps:
            assert torch.bincount(t).tolist() == [batch // timesteps] * timesteps
        else:
            assert sorted((t * batch // timesteps).tolist()) == list(range(batch))


@pytest.mark.parametrize("word", [0, 1, W - 1, W // 2])
def test_strata_at_the_ends_of_the_words(word):
    sampler = Stratified(of_length(5), batch=5)
    sampler._words = lambda positions, step: positions.new_full((1,), word)
    assert sorted(sampler.draw(torch.arange(5), step=0)[0].tolist()) == list(range(5))


def test_stratified_means_vary_less():
    loss = torch.linspace(3, 0, 100).exp()
    spread = {}
    for name in ("uniform", "stratified"):
        sampler = SAMPLERS[name](of_length(100), batch=16, seed=2)
        means = [loss[sampler.draw(torch.arange(16), step=step)[0]].mean() for step in range(300)]
        spread[name] = float(torch.stack(means).var())
    assert spread["stratified"] < spread["uniform"] / 10


# ---- log-normal -----------------------------------------------------------------------------


def log_ratios(schedule):
    return (schedule.sigma / schedule.alpha).log().numpy()


@pytest.mark.parametrize("name", ["cosine", "linear", "edm", "flow", "zero_snr"])
@pytest.mark.parametrize("options", [{}, {"mean": 0.5, "std": 2.0}])
def test_log_normal_levels_go_to_the_nearest_timestep(name, options):
    sampler = words_as_positions(LogNormal(SCHEDULES[name], batch=1, **options))
    words = torch.arange(0, W, W // 5000)[1:]
    level = options.get("mean", -1.2) + options.get("std", 1.2) * stats.norm.ppf(words.numpy() / W)
    t, weight = sampler.draw(words, step=0)
    distance = np.abs(log_ratios(SCHEDULES[name]) - level[:, None])
    nearest = np.sort(distance, 1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-9
    assert clear.mean() > 0.99
    assert np.array_equal(t.numpy()[clear], distance.argmin(1)[clear])
    assert (weight == 1).all()


def test_log_normal_probabilities():
    ratios, sampler = log_ratios(SCHEDULES["edm"]), LogNormal(SCHEDULES["edm"], batch=1)
    ends = stats.norm.cdf((ratios[1:] + ratios[:-1]) / 2, -1.2, 1.2)
    p = sampler.probabilities.numpy()
    assert np.abs(p - np.diff(ends, prepend=0, append=1)).max() <= 1 / W
    mean = (p * ratios).sum()
    assert mean == pytest.approx(-1.2, abs=0.01)
    assert (p * (ratios - mean) ** 2).sum() ** 0.5 == pytest.approx(1.2, abs=0.01)
    assert float(LogNormal(SCHEDULES["zero_snr"], batch=1).probabilities[-1]) == 0, "noise alone is infinitely far"


# ---- second moment --------------------------------------------------------------------------


def test_second_moment_probabilities():
    sampler = learned()
    size = sampler.state()["history"].double().numpy()
    size = np.sqrt((size**2).mean(1))
    expected = 0.999 * size / size.sum() + 0.001 / 20
    assert np.abs(sampler.probabilities.numpy() - expected).max() <= 20 / W


@pytest.mark.parametrize("timesteps", [1, 2, 20, 1000])
@pytest.mark.parametrize("power", [0, 1, 6])
def test_the_weighted_mean_is_the_uniform_one(timesteps, power):
    sampler = learned(timesteps, (1 + torch.arange(timesteps)).double() ** power)
    p, weight = sampler.probabilities, sampler._weights.double()
    assert float(p.sum()) == 1
    assert float(p.min()) > 0.0009 / timesteps
    assert float((p * weight * timesteps - 1).abs().max()) <= 2.0**-23, "what the rounding to float32 leaves"
    for seed in range(3):
        losses = randn((timesteps,), seed).exp()
        assert float((p * weight * losses).sum()) == pytest.approx(float(losses.mean()), rel=2.0**-23)


def test_draws_carry_the_weight_of_their_timestep():
    sampler = learned()
    t, weight = sampler.draw(torch.arange(200), step=0)
    exact = [Fraction(W, 20 * round(p * W)) for p in sampler.probabilities.tolist()]
    assert weight.tolist() == [float(np.float32(float(exact[k]))) for k in t.tolist()]


def variance(p, weight, losses):
    return float((p * (weight * losses) ** 2).sum() - losses.mean() ** 2)


def test_weighted_losses_vary_less():
    scale = 1 + torch.arange(20).double() ** 2
    sampler = learned(20, scale)
    plain = variance(torch.full((20,), 1 / 20), 1, scale)
    assert variance(sampler.probabilities, sampler._weights.double(), scale) < plain / 100


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_each_timestep_remembers_its_ten_latest_losses(batch):
    sampler, wanted = SecondMoment(of_length(5), batch=batch), [deque(maxlen=10) for _ in range(5)]
    generator = torch.Generator().manual_seed(batch)
    for step in range(max(6, 80 // batch)):
        t = torch.randint(0, 5 if step % 2 else 2, (batch,), generator=generator)
        losses = torch.rand(batch, generator=generator)
        sampler.update(t, losses)
        for k, loss in zip(t.tolist(), losses.tolist(), strict=True):
            wanted[k].append(loss)
        state = sampler.state()
        for k, history in enumerate(wanted):
            latest = state["history"][k, : len(history)].tolist()
            assert sorted(latest) == sorted(history)
    assert max(state["count"].tolist()) > 10


def test_no_place_is_written_twice_at_once():
    sampler = SecondMoment(of_length(2), batch=64)
    with Tape() as tape:
        sampler.update(torch.arange(64) // 40, torch.rand(64))
    (places,) = (args[1][0] for func, args, _, _ in tape.calls if func.overloadpacket.__name__ == "index_put_")
    kept = places[places < 20].tolist()
    assert sorted(kept) == list(range(20)), "a GPU would leave either value"


def test_uniform_until_all_have_a_history():
    sampler, uniform = (SAMPLERS[name](of_length(4), batch=4) for name in ("second_moment", "uniform"))
    positions, t = torch.arange(4), torch.arange(4)
    for step in range(9):
        sampler.update(t, 1.0 + t)
        assert torch.equal(sampler.draw(positions, step=step)[0], uniform.draw(positions, step=step)[0])
    sampler.update(t[[0, 1, 2, 2]], 1.0 + t)
    assert torch.equal(sampler.probabilities, uniform.probabilities)
    assert (sampler.draw(positions, step=9)[1] == 1).all()
    sampler.update(t[3:], 1.0 + t[3:])
    assert (sampler.probabilities.diff() > 0.05).all()


@pytest.mark.parametrize("loss", [0.0, math.nan, math.inf])
def test_losses_that_say_nothing_leave_the_draws_uniform(loss):
    sampler = SecondMoment(of_length(4), batch=40)
    losses = torch.zeros(40) if loss == 0 else torch.ones(40)
    losses[7] = loss
    sampler.update(torch.arange(4).repeat(10), losses)
    assert sampler.probabilities.tolist() == [0.25] * 4
    assert (sampler.draw(torch.arange(4), step=0)[1] == 1).all()


# ---- the table ------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_the_table_holds_the_mean_loss_of_each_part(bins):
    table, all_t, all_losses = LossTable(1000, bins=bins), [], []
    for seed in range(3):
        losses, t = randn((50,), seed).float(), torch.arange(50) * 20 - seed % 2 + 1
        table.add(t, losses.requires_grad_())
        all_t.append(t.numpy())
        all_losses.append(losses.detach().double().numpy())
    t, losses = np.concatenate(all_t), np.concatenate(all_losses)
    expected = [losses[(t >= k * 1000 / bins) & (t < (k + 1) * 1000 / bins)].mean() for k in range(bins)]
    assert table.means() == pytest.approx(expected, rel=1e-12)
    table.reset()
    table.add(torch.tensor([999]), torch.tensor([2.0]))
    *empty, last = table.means()
    assert last == 2
    assert all(math.isnan(mean) for mean in empty)


def test_a_loss_that_is_not_finite_shows_in_its_own_part():
    table = LossTable(8)
    table.add(torch.arange(8), torch.tensor([1.0, 3, math.nan, 1, 2, 2, math.inf, 1]))
    first, second, third, fourth = table.means()
    assert (first, third, fourth) == (2, 2, math.inf)
    assert math.isnan(second)


# ---- what does not fit ----------------------------------------------------------------------

TEN = of_length(10)
BAD = {
    "batch": (lambda: Timesteps(TEN, batch=0), "batch"),
    "seed": (lambda: Timesteps(TEN, batch=1, seed=0.5), "seed"),
    "positions": (lambda: Timesteps(TEN, batch=4).draw(torch.tensor([0.5]), step=0), "sample"),
    "step": (lambda: Timesteps(TEN, batch=4).draw(torch.arange(4), step=-1), "step"),
    "std": (lambda: LogNormal(TEN, batch=4, std=0), "std"),
    "no state": (lambda: SecondMoment(TEN, batch=4).load({}), "history"),
    "another state": (lambda: Timesteps(TEN, batch=4).load(SecondMoment(TEN, batch=4).state()), "nothing"),
    "another length": (lambda: SecondMoment(TEN, batch=4).load(learned(9).state()), r"\[10, 10\]"),
    "no bins": (lambda: LossTable(10, bins=0), "bins"),
    "more bins": (lambda: LossTable(3), "bins"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()
