"""lucidrains' look-alike against the papers' formulas and plain loops in float64, and its checkpoints."""

from __future__ import annotations

import copy
import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.adapters import lucidrains as L
from fastdiff.noise import Stream

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SIZE = (3, 8, 6)


class Net(nn.Module):
    """A small network with their attributes; a different function of every timestep."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        assert x_self_cond is None
        assert t.dtype == torch.int64
        return self.mix(torch.sin(x + (t + 1)[:, None, None, None].to(x.dtype) / 9)) + x / 3


def make(model: nn.Module | None = None, **options: Any) -> L.GaussianDiffusion:
    return L.GaussianDiffusion(model or Net(), **{"image_size": SIZE[1:], "timesteps": 25, **options})


def alpha_bars(name: str, total: int) -> list[float]:
    """alpha-bar after 1 ... T steps, by the formulas on floats."""
    if name == "linear":
        ends = 1e-4 * 1000 / total, 0.02 * 1000 / total
        betas = [ends[0] + (ends[1] - ends[0]) * i / (total - 1) for i in range(total)]
    else:
        curve = cosine_curve if name == "cosine" else sigmoid_curve
        betas = [min(0.999, 1 - curve((i + 1) / total) / curve(i / total)) for i in range(total)]
    return [math.prod(1 - beta for beta in betas[: i + 1]) for i in range(total)]


def cosine_curve(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def sigmoid_curve(t: float, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> float:
    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value / tau))

    return (sigmoid(end) - sigmoid(start + t * (end - start))) / (sigmoid(end) - sigmoid(start))


@pytest.mark.parametrize("total", [25, 300, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_schedules_are_the_formulas(name, total):
    schedule = make(timesteps=total, beta_schedule=name).diffusion.schedule
    expected = torch.tensor(alpha_bars(name, total), dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha**2, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(schedule.sigma**2, 1 - expected, rtol=1e-9, atol=1e-15)


def test_schedules_take_options():
    got = make(schedule_fn_kwargs={"start": 0, "end": 3, "tau": 0.7}).diffusion.schedule
    assert float(got.alpha[9]) ** 2 == pytest.approx(sigmoid_curve(10 / 25, 0.0, 3.0, 0.7), rel=1e-9)
    got = make(beta_schedule="cosine", schedule_fn_kwargs={"s": 0.1}).diffusion.schedule
    assert got.config == fd.Schedule.cosine(25, s=0.1).config


# ---- the loss -------------------------------------------------------------------------------


def images(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def loss_by_hand(model: nn.Module, x0: Tensor, t: int, noise: Tensor, objective: str, gamma: float | None) -> Tensor:
    """Of one image, ``[1, C, H, W]``: eq. 14 of Ho et al. 2020 with the weights of Hang et al. 2023."""
    bar = alpha_bars("sigmoid", 25)[t]
    out = model(math.sqrt(bar) * x0 + math.sqrt(1 - bar) * noise, torch.tensor([t]))
    snr = bar / (1 - bar)
    kept = snr if gamma is None else min(snr, gamma)
    if objective == "pred_noise":
        return kept / snr * ((out - noise) ** 2).mean()
    if objective == "pred_x0":
        return kept * ((out - x0) ** 2).mean()
    v = math.sqrt(bar) * noise - math.sqrt(1 - bar) * x0
    return kept / (snr + 1) * ((out - v) ** 2).mean()


@pytest.mark.parametrize("gamma", [None, 5.0, 1.5])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_formula(objective, gamma):
    model, t = Net().double(), torch.tensor([0, 3, 12, 24])
    options = {} if gamma is None else {"min_snr_loss_weight": True, "min_snr_gamma": gamma}
    diffusion = make(model, objective=objective, **options)
    x0, noise = 2 * images(4) - 1, torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(2)).double()
    one_by_one = zip(x0.split(1), t.tolist(), noise.split(1), strict=True)
    expected = torch.stack([loss_by_hand(model, *each, objective, gamma) for each in one_by_one])
    torch.testing.assert_close(diffusion.p_losses(x0, t, noise, loss_reduction="none"), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(diffusion.p_losses(x0, t, noise), expected.mean(), rtol=1e-10, atol=0)
    # A call takes images in [0, 1].
    torch.testing.assert_close(diffusion(images(4), noise, times=t), expected.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        make(model, objective=objective, auto_normalize=False, **options)(x0, noise, times=t), expected.mean()
    )

    (ours,) = torch.autograd.grad(diffusion.p_losses(x0, t, noise), model.mix.weight)
    (theirs,) = torch.autograd.grad(expected.mean(), model.mix.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_what_a_call_draws_is_decided_by_torchs_seed():
    diffusion = make()
    torch.manual_seed(5)
    first, second = diffusion(images(4, torch.float32)), diffusion(images(4, torch.float32))
    torch.manual_seed(5)
    assert torch.equal(diffusion(images(4, torch.float32)), first)
    assert not torch.equal(first, second)
    same = images(4, torch.float32), torch.tensor([1, 2, 3, 4])
    assert not torch.equal(diffusion.p_losses(*same), diffusion.p_losses(*same))
    losses = torch.stack([diffusion(images(64, torch.float32), loss_reduction="none") for _ in range(20)]).detach()
    by_hand = diffusion.p_losses(*each_timestep(diffusion, 60), loss_reduction="none").detach()
    assert float(losses.mean()) == pytest.approx(
        float(by_hand.mean()), rel=0.05
    )  # timesteps and noise are the right ones


def each_timestep(diffusion: L.GaussianDiffusion, times: int) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.arange(25).repeat(times)
    x0 = diffusion.normalize(images(64, torch.float32))[torch.arange(len(t)) % 64]
    return x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))


def test_noising_is_the_formula():
    t, x0 = torch.tensor([0, 7, 20]), 2 * images(3) - 1
    noise = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(4)).double()
    bars = torch.tensor(alpha_bars("sigmoid", 25), dtype=torch.float64)[t][:, None, None, None]
    torch.testing.assert_close(make().q_sample(x0, t, noise), bars.sqrt() * x0 + (1 - bars).sqrt() * noise)
    assert make().q_sample(x0, t).shape == x0.shape


# ---- sampling -------------------------------------------------------------------------------


def x0_by_hand(model: nn.Module, x: Tensor, t: int, bar: float, objective: str) -> Tensor:
    out = model(x, torch.full((len(x),), t))
    if objective == "pred_noise":
        out = (x - math.sqrt(1 - bar) * out) / math.sqrt(bar)
    elif objective == "pred_v":
        out = math.sqrt(bar) * x - math.sqrt(1 - bar) * out
    return out.clamp(-1, 1)


@torch.no_grad()
def ddpm_by_hand(model: nn.Module, x: Tensor, noises: list[Tensor], objective: str) -> list[Tensor]:
    """Algorithm 2 of Ho et al. 2020 with the posterior of its eq. 7."""
    bars, states = [1.0, *alpha_bars("sigmoid", 25)], [x]
    for t in reversed(range(25)):
        bar, before = bars[t + 1], bars[t]
        beta = 1 - bar / before
        x0 = x0_by_hand(model, x, t, bar, objective)
        mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)
        x = mean + math.sqrt(beta * (1 - before) / (1 - bar)) * noises[24 - t]
        states.append(x)
    return states


@torch.no_grad()
def ddim_by_hand(
    model: nn.Module, x: Tensor, noises: list[Tensor], objective: str, steps: int, eta: float
) -> list[Tensor]:
    """Eq. 12 and 16 of Song et al. 2021, the noise being that of the clamped estimate."""
    bars, states = [1.0, *alpha_bars("sigmoid", 25)], [x]
    times = [25 * k // steps for k in range(steps, -1, -1)]  # numbers of noising steps
    for i, (now, then) in enumerate(itertools.pairwise(times)):
        bar, after = bars[now], bars[then]
        x0 = x0_by_hand(model, x, now - 1, bar, objective)
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        std = eta * math.sqrt((1 - after) / (1 - bar) * (1 - bar / after))
        x = math.sqrt(after) * x0 + math.sqrt(1 - after - std**2) * epsilon + std * noises[i]
        states.append(x)
    return states


def drawn(n: int, rows: int) -> tuple[Tensor, list[Tensor]]:
    """The noise of seed 9: where a run starts, and that of its rows."""
    first = fd.noise.normal((n, *SIZE), seed=9, stream=Stream.INITIAL, dtype=torch.float64)
    return first, [fd.noise.normal((n, *SIZE), seed=9, step=row, dtype=torch.float64) for row in range(rows)]


def assert_same_images(got: Tensor, states: list[Tensor]) -> None:
    expected = (torch.stack(states, 1) + 1) / 2
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    assert float(got[:, -1].min()) >= 0
    assert float(got[:, -1].max()) <= 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_whole_chain_is_the_papers(objective):
    diffusion, (x, noises) = make(objective=objective), drawn(2, 25)
    states = ddpm_by_hand(Net().double(), x, noises, objective)
    assert not diffusion.is_ddim_sampling
    assert_same_images(diffusion.sample(2, return_all_timesteps=True, seed=9), states)
    assert torch.equal(diffusion.sample(2, seed=9), diffusion.sample(2, return_all_timesteps=True, seed=9)[:, -1])
    torch.testing.assert_close(diffusion.sample(1, seed=9), diffusion.sample(2, seed=9)[:1])


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (7, 0.0), (24, 0.0), (7, 0.6), (10, 1.0)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddim_is_the_papers(objective, steps, eta):
    diffusion = make(objective=objective, sampling_timesteps=steps, ddim_sampling_eta=eta)
    x, noises = drawn(2, steps)
    states = ddim_by_hand(Net().double(), x, noises, objective, steps, eta)
    assert diffusion.is_ddim_sampling
    assert_same_images(diffusion.sample(2, return_all_timesteps=True, seed=9), states)
    assert torch.equal(diffusion.ddim_sample((2, *SIZE), seed=9), diffusion.sample(2, seed=9))


def test_without_a_seed_samples_start_from_torchs_noise():
    diffusion = make(sampling_timesteps=5)
    torch.manual_seed(11)
    got = diffusion.sample(2, return_all_timesteps=True)
    torch.manual_seed(11)
    x = torch.randn(2, *SIZE)
    assert_same_images(got, ddim_by_hand(Net().double(), x.double(), [torch.zeros(1)] * 5, "pred_v", 5, 0.0))
    assert not torch.equal(diffusion.sample(2), diffusion.sample(2))


def test_images_of_other_ranges_and_sizes():
    assert make(image_size=8).sample(1, seed=0).shape == (1, 3, 8, 8)
    raw = make(auto_normalize=False).sample(2, seed=0)
    torch.testing.assert_close((raw + 1) / 2, make().sample(2, seed=0))


def test_it_trains_and_is_copied_as_a_module():
    diffusion = make(beta_schedule="cosine", objective="pred_noise")
    average = copy.deepcopy(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = diffusion(images(8, torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    average.load_state_dict(diffusion.state_dict())
    assert torch.equal(average.sample(1, seed=0), diffusion.sample(1, seed=0))
    assert diffusion.device == torch.device("cpu")


# ---- checkpoints ----------------------------------------------------------------------------


def their_file(path: Any, net: Net, averaged: Net, **changes: Any) -> Any:
    """What their trainer saves: weights beside tables of the process, an averaged copy with its counters."""
    tables = {"betas": torch.zeros(25), "loss_weight": torch.ones(25)}

    def below(prefix: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"{prefix}{name}": value for name, value in {**tables, **weights(module)}.items()}

    optimizer = torch.optim.Adam(net.parameters())
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    ema = {**below("ema_model.", averaged), **below("online_model.", net)}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(700)}
    data = {
        "step": 7000,
        "model": below("", net),
        "opt": optimizer.state_dict(),
        "ema": ema,
        "scaler": None,
        "version": "2.3.4",
    }
    torch.save({key: value for key, value in {**data, **changes}.items() if value != "absent"}, path)
    return path


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in net.state_dict().items()}


def test_a_checkpoint_comes_back(tmp_path):
    net, averaged = Net(), Net()
    nn.init.constant_(averaged.mix.bias, 0.5)
    found = L.read_checkpoint(their_file(tmp_path / "model-7.pt", net, averaged))
    assert (found.step, found.version) == (7000, "2.3.4")
    assert found.model.keys() == found.ema.keys() == net.state_dict().keys()
    for state, source in ((found.model, net), (found.ema, averaged)):
        fresh = Net()
        fresh.load_state_dict(state)
        for parameter, expected in zip(fresh.parameters(), source.parameters(), strict=True):
            assert torch.equal(parameter, expected)
    older = L.read_checkpoint(str(their_file(tmp_path / "older.pt", net, averaged, version="absent")))
    assert older.version is None


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": "absent"}, "has no ema"),
        ({"step": "absent", "model": "absent"}, "has no step, model"),
        ({"model": [1, 2]}, "model must be tensors by name"),
        ({"model": {"model.a": 1}}, "model must be tensors by name"),
        ({"ema": {"other": torch.zeros(1)}}, "ema holds no tensor whose name begins with ema_model.model."),
        ({"step": None}, "step must be a whole number"),
        ({"opt": Trap()}, "cannot be read as a checkpoint"),
    ],
)
def test_other_files_are_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = their_file(tmp_path / "wrong.pt", Net(), Net(), **changes)
    with pytest.raises(fd.InputError, match=message) as raised:
        L.read_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert not os.path.exists("trapped")


def test_what_is_no_file_of_torchs_is_refused(tmp_path):
    for name, content in (("empty.pt", b""), ("text.pt", b"no weights here"), ("zip.pt", b"PK\x03\x04 torn")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(fd.InputError, match="cannot be read as a checkpoint"):
            L.read_checkpoint(tmp_path / name)
    whole = their_file(tmp_path / "whole.pt", Net(), Net()).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fd.InputError, match="cannot be read as a checkpoint"):
        L.read_checkpoint(tmp_path / "half.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(fd.InputError, match="it has no step, model, ema"):
        L.read_checkpoint(tmp_path / "list.pt")
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(fd.InputError, match="does not exist"):
            L.read_checkpoint(missing)


# ---- what does not fit ----------------------------------------------------------------------


def net_with(**attributes: Any) -> Net:
    net = Net()
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": net_with(self_condition=True)}, "self-conditioning is not supported"),
        ({"model": net_with(out_dim=6)}, "channels and out_dim must be equal"),
        ({"model": nn.Linear(1, 1)}, "no channels, out_dim, self_condition"),
        ({"model": lambda x, t: x}, "model must be a module"),
        ({"objective": "pred_score"}, "unknown objective"),
        ({"beta_schedule": "laplace"}, "unknown beta_schedule"),
        ({"schedule_fn_kwargs": {"nonsense": 1}}, "schedule_fn_kwargs"),
        ({"schedule_fn_kwargs": {"start": 3, "end": -3}}, "start < end"),
        ({"offset_noise_strength": 0.1}, "offset_noise_strength must be 0"),
        ({"immiscible": True}, "immiscible"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"timesteps": 0}, "timesteps"),
        ({"timesteps": 20, "beta_schedule": "linear"}, "timesteps must be a whole number above 20"),
        ({"sampling_timesteps": 26}, "sampling_timesteps must lie in 1...25"),
        ({"sampling_timesteps": 0}, "sampling_timesteps must lie in 1...25"),
        ({"ddim_sampling_eta": 1.5}, "ddim_sampling_eta"),
        ({"min_snr_gamma": 0}, "min_snr_gamma"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(fd.InputError, match=message):
        make(**options)


def test_calls_that_do_not_fit():
    diffusion, x0, t = make(), images(2, torch.float32), torch.tensor([0, 1])
    for wrong in (x0[:, :1], x0[..., :5], (255 * x0).to(torch.uint8), x0[0]):
        with pytest.raises(fd.InputError, match="img must be"):
            diffusion(wrong)
    for how, message in (
        ({"t": torch.tensor([0, 25])}, "t must lie in 0...24"),
        ({"t": t, "noise": x0[:1]}, "noise must have shape"),
        ({"t": t, "offset_noise_strength": 0.1}, "offset_noise_strength"),
        ({"t": t, "loss_reduction": "sum"}, "loss_reduction"),
    ):
        with pytest.raises(fd.InputError, match=message):
            diffusion.p_losses(x0, **how)
    diffusion.model.forward = lambda x, t: x[:, :1]
    with pytest.raises(fd.InputError, match="the model's out must be"):
        diffusion(x0)
