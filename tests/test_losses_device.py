"""Proves that losses and drawn timesteps do not wait for a GPU: on fake CUDA tensors, and on a CPU nobody looks at."""

import pytest
import torch
from diffusion_tools import (
    EARLY,
    SCHEDULES,
    OnGPU,
    every_kind,
    every_variance,
    largest,
    process_of,
    randn,
)
from graph_tools import Tape
from torch._subclasses import FakeTensorMode

import fastdiff as fd
from fastdiff.losses import brought


@pytest.fixture
def blind(monkeypatch):
    """The CPU as a device whose values nobody looks at."""
    for place in ("losses", "diffusion"):
        monkeypatch.setattr(f"fastdiff.{place}.visible", lambda x: False)


def losses_and_gradient(diffusion, **options):
    x0 = randn((6, 2, 3), 0).clamp(-1, 1)
    out = randn((6, 4 if diffusion.variance == "learned_range" else 2, 3), 1).requires_grad_()
    losses = diffusion.losses(lambda x, t: out, x0, EARLY, seed=1, step=2, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), out, allow_unused=True, materialize_grads=True)
    return losses, gradient


@every_kind
@every_variance
@pytest.mark.parametrize("decoder", ["discrete", "gaussian"])
def test_not_looking_changes_no_loss(kind, variance, decoder, monkeypatch, request):
    monkeypatch.setattr("fastdiff.ops.reference.draw", lambda shape, *_: randn(shape, 7))
    diffusion = fd.Diffusion(SCHEDULES["cosine"], "epsilon", variance)
    with fd.backend("reference"):
        seen = losses_and_gradient(diffusion, kind=kind, decoder=decoder)
        request.getfixturevalue("blind")
        with Tape():
            unseen = losses_and_gradient(diffusion, kind=kind, decoder=decoder)
    for a, b in zip(seen, unseen, strict=True):
        assert largest(a - b) <= 1e-13 * largest(a)


@every_kind
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
def test_losses_do_not_wait_for_a_gpu(kind, variance, prediction, monkeypatch):
    monkeypatch.setattr("fastdiff.ops.reference.draw", lambda shape, _, device: torch.zeros(shape, device=device))
    schedule = fd.Schedule.edm(100) if prediction == "sample" else process_of(prediction)
    diffusion, channels = fd.Diffusion(schedule, prediction, variance), 4 if variance == "learned_range" else 2
    diffusion.model_input(torch.zeros(1, 2), torch.tensor([0]))  # looks at the schedule, once
    with FakeTensorMode(allow_non_fake_inputs=True):
        x0, t = torch.zeros(6, 2, 3, device="cuda"), torch.zeros(6, dtype=torch.int64, device="cuda")
        out = torch.zeros(6, channels, 3, device="cuda", requires_grad=True)
        for guard in (torch.no_grad(), OnGPU()):  # tables come once
            with guard, torch.enable_grad():
                losses = diffusion.losses(lambda x, t: out, x0, t, kind=kind)
                diffusion.add_noise(x0, x0, t)
        assert losses.device.type == "cuda"
        assert losses.shape == (6,)


@pytest.mark.parametrize("kind", ["vlb", "hybrid"])
def test_what_is_not_the_decoder_s_gets_no_gradient_of_it(kind, blind):
    diffusion, x0 = fd.Diffusion(SCHEDULES["cosine"], "epsilon", "learned_range"), torch.zeros(4, 2, 3)
    scale = torch.tensor([1e8, 1e8, 1, 1])[:, None]  # so far off that the slope of a log-probability overflows
    out = (scale * randn((4, 4, 3), 2, torch.float32).tanh()).requires_grad_()
    diffusion.losses(lambda x, t: out, x0, torch.tensor([1, 1, 2, 90]), kind=kind, seed=1).sum().backward()
    assert torch.isfinite(out.grad).all()


def test_losses_draw_their_timesteps_where_the_data_are(monkeypatch):
    monkeypatch.setattr("fastdiff.ops.reference.draw", lambda shape, _, device: torch.zeros(shape, device=device))
    diffusion, seen = fd.Diffusion(SCHEDULES["linear"]), []
    diffusion.model_input(torch.zeros(1, 2), torch.tensor([0]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x0, ids = torch.zeros(6, 2, device="cuda"), torch.zeros(6, dtype=torch.int64, device="cuda")
        for guard in (torch.enable_grad(), OnGPU()):
            with guard:
                diffusion.losses(lambda x, t: seen.append(t) or x, x0, sample=ids)
    assert [t.device.type for t in seen] == ["cuda", "cuda"]


def test_timesteps_are_drawn_on_the_device():
    diffusion = fd.Diffusion(SCHEDULES["linear"])
    with FakeTensorMode():
        ids = torch.zeros(6, dtype=torch.int64, device="cuda")
        with OnGPU():
            t = diffusion.draw_timesteps(6, seed=3, step=1, sample=ids, device="cuda")
    assert t.device.type == "cuda"


def test_timesteps_are_the_same_where_numbers_are_made_on_the_device(request):
    diffusion, place = fd.Diffusion(SCHEDULES["linear"]), {"seed": -3, "step": 2**32 - 1, "sample": torch.arange(50)}
    seen = diffusion.draw_timesteps(50, **place)
    request.getfixturevalue("blind")
    assert torch.equal(diffusion.draw_timesteps(50, **place), seen)


def test_what_comes_from_the_host_comes_through_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with FakeTensorMode(), Tape() as tape:
        x = brought(torch.zeros(3), torch.device("cuda"))
        brought(x, torch.device("cuda"))
    assert x.device.type == "cuda"
    assert len(pinned) == 1
    assert [kwargs["non_blocking"] for func, _, kwargs, _ in tape.calls if "_to_copy" in str(func)] == [True]


def test_so_do_given_timesteps(monkeypatch):
    asked = []
    monkeypatch.setattr("fastdiff.diffusion.brought", lambda t, device: asked.append((t, device)) or t)
    x0, t = torch.zeros(1, 2), torch.tensor([3])
    fd.Diffusion(SCHEDULES["linear"]).add_noise(x0, x0, t)
    assert asked == [(t, x0.device)]
