"""Proves that a training step keeps little, and that what it makes again is what it did not keep."""

import gc

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastdiff as fd
from fastdiff.models.layers import GroupNormSiLU

BF16 = torch.bfloat16
SETTINGS = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 2, "attention_resolutions": (8,)}
ADM = {"scale_shift": True, "resblock_updown": True, "num_classes": 5}
precisions = pytest.mark.parametrize("enabled", [False, True], ids=["float32", "bfloat16"])


def unet(**settings):
    torch.manual_seed(0)
    model = fd.UNet(16, **{**SETTINGS, **settings}, norm_groups=8)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def run(model, enabled, n=4):
    x = torch.randn((n, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    cond = {} if model.label is None else {"y": torch.arange(n) % 5}
    with torch.autocast("cpu", BF16, enabled=enabled):
        return model(x, torch.linspace(0, 999, n), **cond)


def everything_is_kept():
    """Hooks of the caller's."""
    return torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)


@precisions
@pytest.mark.parametrize("settings", [{}, ADM, {"dropout": 0.5}], ids=["ddpm", "adm", "dropout"])
def test_the_gradients_are_those_of_what_was_not_kept(settings, enabled):
    model = unet(**settings)
    torch.manual_seed(2)
    grads = torch.autograd.grad(run(model, enabled).square().sum(), model.parameters())
    torch.manual_seed(2)
    with everything_is_kept():
        out = run(model, enabled)
    for got, want in zip(grads, torch.autograd.grad(out.square().sum(), model.parameters()), strict=True):
        assert torch.equal(got, want)


def doubled(model):
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return list(model.parameters()), lambda: run(model, True)


def swapped(model):
    others = {name: (p.detach() * 1.5 + 0.1).requires_grad_() for name, p in model.named_parameters()}
    x, t = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1)), torch.arange(2)
    return list(others.values()), lambda: torch.func.functional_call(model, others, (x, t))


@pytest.mark.parametrize("change", [doubled, swapped])
def test_what_is_made_again_is_what_was(change):
    """Whatever hooks did to it, and with the parameters it was made of."""
    parameters, forward = change(unet())
    grads = torch.autograd.grad(forward().square().sum(), parameters)
    with everything_is_kept():
        out = forward()
    for got, want in zip(grads, torch.autograd.grad(out.square().sum(), parameters), strict=True):
        assert torch.equal(got, want)


def live(function):
    """The bytes that PyTorch's allocator holds more at the end and at most, while ``function`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    del result
    return held, highest


@precisions
def test_less_than_four_fifths_is_kept(enabled):
    model = unet()
    kept, _ = live(lambda: run(model, enabled))
    with everything_is_kept():
        everything, _ = live(lambda: run(model, enabled))
    assert kept < 0.8 * everything


def test_a_step_takes_at_most_four_fifths_of_the_memory_of_diffusers():
    torch.manual_seed(0)
    theirs = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    ours = fd.UNet.from_diffusers(theirs)
    theirs.to(memory_format=torch.channels_last)
    x, t = torch.randn(8, 3, 16, 16), torch.arange(8)

    def step(model):
        with torch.autocast("cpu", BF16):
            out = model(x, t)
        out = out if isinstance(out, torch.Tensor) else out.sample
        out.float().square().mean().backward()
        model.zero_grad()

    highest = []
    for model in (ours, theirs):
        step(model)
        highest.append(live(lambda model=model: step(model))[1])
    assert highest[0] < 0.8 * highest[1]


def test_second_derivatives_go_through_what_is_made_again():
    model = unet(attention_resolutions=(), middle_attention=False).double()  # PyTorch's attention has none on a CPU
    second = []
    for hooks in (None, everything_is_kept()):
        x = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x.requires_grad_()
        if hooks is None:
            out = model(x, torch.arange(2))
        else:
            with hooks:
                out = model(x, torch.arange(2))
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True))
    for got, want in zip(*second, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 + 1e-12 * float(want.abs().max()))


def test_hooks_that_are_forbidden_are_not_asked_for():
    model = unet()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        run(model, True).square().sum().backward()


@precisions
def test_it_nests_in_checkpoints(enabled):
    model = unet()
    grads = torch.autograd.grad(run(model, enabled).square().sum(), model.parameters())
    out = checkpoint(lambda: run(model, enabled), use_reentrant=False)
    for got, want in zip(torch.autograd.grad(out.square().sum(), model.parameters()), grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("which", ["norm1.weight", "norm2.bias"])
def test_what_is_used_again_and_was_changed_between_the_passes_is_an_error(which):
    model = unet()
    loss = run(model, True).square().sum()
    with torch.no_grad():
        model.down[0][0].get_parameter(which).add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        loss.backward()


def test_an_input_changed_in_place_is_an_error():
    norm, conv = GroupNormSiLU(8, 2, 1e-5), nn.Conv2d(8, 8, 3)
    x = torch.randn(1, 8, 4, 4, requires_grad=True) * 1.0
    y = norm.then(conv, x)
    x.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(y.sum(), conv.weight)


def test_nothing_stays_after_the_step():
    model = unet()

    def step():
        run(model, True).square().sum().backward()
        model.zero_grad()

    step()
    gc.disable()
    try:
        assert live(step)[0] < 1 << 16
    finally:
        gc.enable()
