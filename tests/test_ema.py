"""Averages of weights have their closed forms; those made after training are what training would have made."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch import distributed, nn

from fastdiff import InputError, _io
from fastdiff.training.ema import EMA, PowerEMA, averages, check_averages, gamma_of, sigma_rel_of
from fastdiff.training.parallel import part_of
from fastdiff.training.posthoc import Profile, inner, reconstruct, snapshot, snapshots, weights

F64 = torch.float64
ONE = EMA, 0.9
KINDS = [(EMA, 0.0), (EMA, 0.5), ONE, (EMA, 0.9999), (PowerEMA, 0.02), (PowerEMA, 0.1), (PowerEMA, 0.25)]
kinds = pytest.mark.parametrize(("kind", "value"), KINDS)


def linear(dtype=F64):
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return nn.Linear(3, 2).to(dtype)


def walk(steps, model, seed=0):
    """Weights on a random walk: yields the step after each move."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                part = part_of(p)
                part.add_(torch.randn(part.shape, generator=generator, dtype=F64).to(part))
        yield step


def trained(model, average, steps):
    """Update along a walk; returns the weights at the start and after every step."""
    history = [model.weight.detach().clone()]
    for step in walk(steps, model):
        average.update(model, step)
        history.append(model.weight.detach().clone())
    return torch.stack(history)


def profile_shares(gamma, steps):
    """What a power profile holds of each of so many steps: its integral over them."""
    edges = (torch.arange(steps + 1, dtype=F64) / steps) ** (gamma + 1)
    return edges.diff()


# ---- running averages -----------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_the_average_is_the_sum_of_the_history_by_products_of_factors(kind, value, steps):
    model = linear()
    average = kind(model, value)
    history = trained(model, average, steps)
    if kind is EMA:
        factors = [min(value, (1 + step) / (10 + step)) for step in range(steps)]
    else:
        factors = [(1 - 1 / t) ** (gamma_of(value) + 1) for t in range(1, steps + 1)]
    # sum over k of (1 - d_k) d_{k+1} ... d_n w_k, with the initial weights as the zeroth
    shares = [math.prod(factors)] + [(1 - d) * math.prod(factors[k + 1 :]) for k, d in enumerate(factors)]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    expected = torch.tensordot(torch.tensor(shares, dtype=F64), history, 1)
    assert (average.tensors["weight"] - expected).abs().max() <= 1e-12 * history.abs().max()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_a_power_average_is_the_integral_of_the_history_with_its_profile(sigma_rel):
    model = linear()
    average = PowerEMA(model, sigma_rel)
    history = trained(model, average, 200)
    expected = torch.tensordot(profile_shares(gamma_of(sigma_rel), 200), history[1:], 1)
    assert (average.tensors["weight"] - expected).abs().max() <= 1e-12 * history.abs().max()


def test_ema_has_the_bits_of_one_update_after_the_other_in_float32():
    model = linear(torch.float32)
    ema, slow = EMA(model, 0.999), copy.deepcopy(model)
    for step in walk(50, model):
        ema.update(model, step)
        with torch.no_grad():
            for mine, theirs in zip(slow.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - min(0.999, (1 + step) / (10 + step)))
    assert all(torch.equal(ema.tensors[name], value) for name, value in slow.state_dict().items())


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.2, 12**-0.5])
def test_the_profile_is_as_wide_as_asked_for(sigma_rel):
    gamma = gamma_of(sigma_rel)
    moments = [quad(lambda x, n=n: (gamma + 1) * x ** (gamma + n), 0.5, 1)[0] for n in range(3)]
    moments = [m + quad(lambda x, n=n: (gamma + 1) * x ** (gamma + n), 0, 0.5)[0] for n, m in enumerate(moments)]
    assert moments[0] == pytest.approx(1, abs=1e-9)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)


def test_the_width_grows_with_training():
    for steps in (500, 2000):
        shares, middle = profile_shares(gamma_of(0.1), steps), torch.arange(steps, dtype=F64) + 0.5
        mean = (shares * middle).sum()
        assert (shares * (middle - mean) ** 2).sum().sqrt() == pytest.approx(0.1 * steps, rel=2e-5)


def test_the_powers_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.005)


class Buffered(nn.Module):
    """Tied parameters, buffers of both kinds, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("unsaved", torch.ones(1), persistent=False)


@kinds
def test_raw_weights_keep_their_bits_and_buffers_are_copied(kind, value):
    model = Buffered()
    average = kind(model, value)
    model.norm.running_mean.fill_(3.0)
    model.norm.num_batches_tracked.fill_(7)
    for step in walk(3, model):
        before = copy.deepcopy(model.state_dict())
        average.update(model, step)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert average.tensors.keys() == model.state_dict().keys()
    assert average.tensors["norm.running_mean"].eq(3).all()
    assert average.tensors["norm.num_batches_tracked"] == 7
    assert torch.equal(average.tensors["a.weight"], average.tensors["b.weight"])
    assert not any(tensor.requires_grad for tensor in average.tensors.values())
    assert all(tensor.dtype == before[name].dtype for name, tensor in average.tensors.items())
    model.load_state_dict(average.tensors)


def test_several_at_once_are_each_as_if_alone():
    setting = "0.999, 0.9,power:0.05,power:0.1"
    model, alone = linear(), linear()
    several = averages(model, setting)
    assert list(several) == ["0.999", "0.9", "power-0.05", "power-0.1"]
    for step in walk(20, model):
        for each in several.values():
            each.update(model, step)
    for entry, each in zip(setting.split(","), several.values(), strict=True):
        alone = linear()
        (one,) = averages(alone, entry).values()
        trained(alone, one, 20)
        assert type(one) is type(each)
        assert all(torch.equal(each.tensors[name], tensor) for name, tensor in one.tensors.items())


def test_a_compiled_model_has_the_names_of_the_plain_one():
    model = linear()
    compiled = torch.compile(model)
    average, plain = EMA(compiled, 0.5), EMA(model, 0.5)
    assert list(average.tensors) == ["weight", "bias"]
    for step in walk(3, model):
        average.update(compiled, step)
        plain.update(model, step)
    assert torch.equal(average.tensors["weight"], plain.tensors["weight"])


@kinds
def test_an_average_goes_on_from_what_was_saved(kind, value):
    model = linear()
    whole = kind(model, value)
    for step in walk(6, model):
        if step == 3:
            resumed = kind(model, value)
            resumed.load({name: tensor.clone() for name, tensor in whole.tensors.items()})
        whole.update(model, step)
        if step >= 3:
            resumed.update(model, step)
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())


def test_what_does_not_fit_is_not_loaded():
    average = EMA(linear(), 0.5)
    with pytest.raises(InputError, match="bias, more"):
        average.load({"weight": torch.zeros(2, 3), "more": torch.zeros(1)})
    with pytest.raises(InputError, match=r"weight of the average is \[3, 2\], of the model \[2, 3\]"):
        average.load({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, math.nan])
def test_decays_out_of_range_are_refused(decay):
    with pytest.raises(InputError, match="decay"):
        EMA(nn.Linear(1, 1), decay)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, math.nan, math.inf])
def test_widths_out_of_range_are_refused(sigma_rel):
    with pytest.raises(InputError, match="sigma_rel"):
        PowerEMA(nn.Linear(1, 1), sigma_rel)


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "x",
        "0.9,",
        "1.0",
        "nan",
        "power",
        "power:",
        "power:0.3",
        ":0.9",
        "ema:0.9",
        "0.9,0.90",
        "power:0.1,power:.1",
    ],
)
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(InputError, match=r"no average of weights|twice"):
        check_averages(setting)
    with pytest.raises(InputError):
        averages(nn.Linear(1, 1), setting)


@pytest.fixture
def mesh(tmp_path):
    """A group of this one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@kinds
def test_sharded_weights_are_averaged_where_they_are(kind, value, mesh, tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, plain = linear(torch.float32), linear(torch.float32)
    fully_shard(model, mesh=mesh)
    sharded, average = kind(model, value), kind(plain, value)
    for mine, theirs in zip(walk(5, model), walk(5, plain), strict=True):
        sharded.update(model, mine)
        average.update(plain, theirs)
    assert all(isinstance(tensor, DTensor) for tensor in sharded.tensors.values())
    assert all(torch.equal(tensor.full_tensor(), average.tensors[name]) for name, tensor in sharded.tensors.items())
    again = kind(model, value)
    again.load(average.tensors)
    assert torch.equal(again.tensors["weight"].full_tensor(), average.tensors["weight"])
    assert isinstance(again.tensors["weight"], DTensor)
    if kind is PowerEMA:
        snapshot(tmp_path, 5, {"a": sharded})
        assert torch.equal(reconstruct(snapshots(tmp_path), value)["weight"], average.tensors["weight"])


# ---- averages after training ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [((6.9, 10), (16.9, 10)), ((6.9, 10), (16.9, 7)), ((0.0, 3), (2.0, 9)), ((0.7, 1000), (0.7, 1000))],
)
def test_inner_products_are_integrals(one, other):
    def profile(gamma, time):
        return lambda tau: (gamma + 1) * tau**gamma / time ** (gamma + 1)

    p, q = profile(*one), profile(*other)
    truth = quad(lambda tau: p(tau) * q(tau), 0, min(one[1], other[1]))[0]
    numbers = [torch.tensor(float(number), dtype=F64) for number in (*one, *other)]
    assert float(inner(*numbers)) == pytest.approx(truth, rel=1e-8)
    assert float(inner(*numbers[2:], *numbers[:2])) == pytest.approx(truth, rel=1e-8)


def test_inner_products_of_long_training_do_not_overflow():
    numbers = [torch.tensor(number, dtype=F64) for number in (900.0, 1e7, 950.0, 1e7)]
    assert float(inner(*numbers)) == pytest.approx(901 * 951 / 1851 / 1e7, rel=1e-9)


def grid(count, steps, widths=(0.05, 0.1)):
    """Profiles of two averages at equal distances in training."""
    return [Profile(gamma_of(width), steps * (i + 1) // count) for i in range(count) for width in widths]


@pytest.mark.parametrize("count", [1, 4, 64])
def test_a_stored_profile_is_its_own_reconstruction(count):
    profiles = grid(count, 4096)
    for i in (0, len(profiles) // 2, -1):
        found, unit = weights(profiles, profiles[i]), torch.zeros(len(profiles), dtype=F64)
        unit[i] = 1
        assert (found - unit).abs().max() < 1e-8


def test_weights_solve_the_least_squares_problem():
    """No other combination with the sum 1 is nearer: its distance does not fall in any direction."""
    profiles, target = grid(6, 600), Profile(gamma_of(0.15), 600)
    found = weights(profiles, target)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    tau = (torch.arange(200_000, dtype=F64) + 0.5) * (600 / 200_000)

    def density(gamma, time):
        return torch.where(tau <= time, (gamma + 1) * (tau / time) ** gamma / time, 0.0)

    table = torch.stack([density(*profile) for profile in profiles])
    slope = table @ (found @ table - density(*target)) * (600 / 200_000)
    assert (slope - slope.mean()).abs().max() < 1e-3 * slope.abs().max()


@pytest.mark.parametrize(("sigma_rel", "last"), [(0.07, 2e-6), (0.15, 5e-6), (0.03, 5e-5)])
def test_the_error_falls_as_snapshots_grow_dense(sigma_rel, last):
    """On a random walk of 4096 steps, twice the snapshots of (0.05, 0.1) make a fifth of the error or less."""
    steps, errors = 4096, []
    path = torch.randn(steps, 64, generator=torch.Generator().manual_seed(1), dtype=F64).cumsum(0)

    def direct(gamma, time):
        return profile_shares(gamma, time) @ path[:time]

    truth = direct(gamma_of(sigma_rel), steps)
    for count in (8, 16, 32, 64):
        profiles = grid(count, steps)
        stored = torch.stack([direct(*profile) for profile in profiles])
        made = weights(profiles, Profile(gamma_of(sigma_rel), steps)) @ stored
        errors.append(float((made - truth).norm() / truth.norm()))
    assert all(later < earlier / 5 for earlier, later in pairwise(errors))
    assert errors[-1] < last


def write(run, *, steps=64, every=8, dtype=torch.float32, setting="power:0.05,power:0.1,0.9"):
    """Train a model on a random walk with snapshots; returns it, and averages of other widths made on the way."""
    model = nn.Sequential(linear(torch.float32), nn.BatchNorm1d(2))
    stored, direct = averages(model, setting), {width: PowerEMA(model, width) for width in (0.05, 0.07, 0.15)}
    for step in walk(steps, model):
        model[1].num_batches_tracked.fill_(step)
        for each in (*stored.values(), *direct.values()):
            each.update(model, step)
        if (step + 1) % every == 0:
            snapshot(run, step + 1, stored, dtype=dtype)
    return direct


def far(found, truth):
    return max(
        float((found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1))
        for name, value in truth.items()
    )


@pytest.mark.parametrize(
    ("dtype", "stored", "between"), [(torch.float32, 1e-7, 2e-4), (torch.float16, 5e-4, 1e-3), (F64, 1e-7, 2e-4)]
)
def test_a_run_gives_the_average_that_training_would_have_made(tmp_path, dtype, stored, between):
    direct = write(tmp_path, dtype=dtype, every=2)
    found = snapshots(tmp_path)
    assert [each.profile.time for each in found] == [t for t in range(2, 65, 2) for _ in range(2)]
    for width, bound in ((0.05, stored), (0.07, between), (0.15, between)):
        made = reconstruct(found, width)
        assert far(made, direct[width].tensors) < bound
        assert made.keys() == direct[width].tensors.keys()
        assert made["1.num_batches_tracked"] == 63
        assert made["0.weight"].dtype == (F64 if dtype == F64 else torch.float32)
    assert made["1.running_var"].sub(1).abs().max() < (1e-12 if dtype == F64 else 1e-6)  # which never changed


def test_an_earlier_step_can_be_asked_for(tmp_path):
    write(tmp_path)
    earlier = write(tmp_path / "half", steps=32)
    found = reconstruct(list(reversed(snapshots(tmp_path))), 0.05, step=32)
    assert far({**found, "1.num_batches_tracked": torch.tensor(31)}, earlier[0.05].tensors) < 2e-7
    for step in (0, 65):
        with pytest.raises(InputError, match=r"1\.\.\.64"):
            reconstruct(snapshots(tmp_path), 0.05, step=step)


def test_a_snapshot_is_whole_or_not_there(tmp_path, monkeypatch):
    write(tmp_path, steps=8)
    (target,) = (tmp_path / "averages").iterdir()
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert sorted(manifest["files"]) == ["power-0.05.safetensors", "power-0.1.safetensors"]
    original, calls = _io.write, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(_io, "write", full)
    with pytest.raises(OSError, match="No space"):
        snapshot(tmp_path, 16, {"a": PowerEMA(linear(), 0.1), "b": PowerEMA(linear(), 0.2)})
    assert [path.name for path in (tmp_path / "averages").iterdir()] == ["step-00000008"]


def test_a_snapshot_takes_the_place_of_one_from_before_resuming(tmp_path):
    write(tmp_path, steps=8)
    litter = tmp_path / "averages" / ".unfinished-step-00000004-abc"
    litter.mkdir()
    model = linear()
    snapshot(tmp_path, 8, {"other": PowerEMA(model, 0.2)})
    (found,) = snapshots(tmp_path)
    assert found.file.name == "other.safetensors"
    assert found.profile == Profile(gamma_of(0.2), 8)
    assert not litter.exists()
    assert torch.equal(reconstruct([found], 0.2)["weight"], model.weight.float())


DAMAGE = {
    "a bit": (lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])), "damaged"),
    "the end": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "damaged"),
    "the file": (lambda file: file.unlink(), "cannot be read"),
    "the manifest": (lambda file: (file.parent / "manifest.json").unlink(), r"manifest\.json"),
    "its words": (
        lambda file: (file.parent / "manifest.json").write_text('{"step": 8, "files": 3}'),
        r"manifest\.json",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(tmp_path, what):
    write(tmp_path, steps=16)
    damage, message = DAMAGE[what]
    damage(tmp_path / "averages" / "step-00000008" / "power-0.1.safetensors")
    with pytest.raises(InputError, match=f"step-00000008.*{message}"):
        reconstruct(snapshots(tmp_path), 0.07)


def test_what_cannot_be_stored_or_made_is_refused(tmp_path):
    model = linear()
    with pytest.raises(InputError, match="power:SIGMA_REL"):
        snapshot(tmp_path, 1, averages(model, "0.9"))
    with pytest.raises(InputError, match="step 0"):
        snapshot(tmp_path, 0, averages(model, "power:0.1"))
    with torch.no_grad():
        model.weight.fill_(1e6)
    with pytest.raises(InputError, match="weight of an average is not finite"):
        snapshot(tmp_path, 1, averages(model, "power:0.1"), dtype=torch.float16)
    assert not any((tmp_path / "averages").iterdir())
    with pytest.raises(InputError, match="no snapshots"):
        snapshots(tmp_path)
    with pytest.raises(InputError, match="no snapshots"):
        reconstruct([], 0.1)
    snapshot(tmp_path, 1, averages(model, "power:0.1"))
    with pytest.raises(InputError, match="sigma_rel"):
        reconstruct(snapshots(tmp_path), 0.5)


def test_snapshots_of_another_network_are_not_mixed_in(tmp_path):
    snapshot(tmp_path, 1, averages(linear(), "power:0.1"))
    snapshot(tmp_path, 2, averages(nn.BatchNorm1d(2), "power:0.1"))
    with pytest.raises(InputError, match="has not the tensors of the others"):
        reconstruct(snapshots(tmp_path), 0.1)
