"""Proves the U-Net's fast path: precision decided once, weights prepared once, no layout changed, compiled whole."""

import copy
import math
import pickle

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastdiff as fd
from fastdiff.models.convolution import Layer, packs

BF16, LAST = torch.bfloat16, torch.channels_last
DDPM = {"downsample_padding": 0, "frequency_shift": 1}
ADM = {"scale_shift": True, "resblock_updown": True, "num_head_channels": 16, "num_classes": 5}
CONFIGURATIONS = {"ddpm": DDPM, "adm": ADM}
configurations = pytest.mark.parametrize("name", CONFIGURATIONS)
in_bf16 = pytest.mark.skipif(not packs(BF16), reason="oneDNN has no bfloat16 here")


def unet(name="ddpm", **settings):
    torch.manual_seed(0)
    small = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
    model = fd.UNet(16, **{**small, "norm_groups": 8, **CONFIGURATIONS[name], **settings}).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model, n=3, dtype=torch.float32):
    x = torch.randn((n, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(dtype)
    cond = {} if model.label is None else {"y": torch.arange(n) % 5}
    return x, torch.linspace(0, 999, n), cond


def largest(difference):
    return float(difference.detach().abs().max())


# ---- precision ------------------------------------------------------------------------------


@configurations
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("state", [torch.float32, BF16])
def test_the_output_has_the_dtype_and_layout_of_the_state(name, layout, state):
    for model in (unet(name), unet(name).to(BF16), unet(name).prepared(BF16)):
        x, t, cond = inputs(model)
        out = model(x.to(state, memory_format=layout), t, **cond)
        assert out.dtype == state
        assert out.is_contiguous(memory_format=layout)


@configurations
def test_autocast_and_bfloat16_weights_are_the_same_precision(name):
    model = unet(name)
    x, t, cond = inputs(model)
    true = model.double()(x.double(), t, **cond)
    model.float()
    with torch.autocast("cpu", BF16):
        cast = model(x, t, **cond)
    narrow = unet(name).to(BF16)(x, t, **cond)
    for out in (cast, narrow):
        assert out.dtype == torch.float32
        assert 1e-4 < largest(out - true) / largest(true) < 3e-2


def test_half_precision_gradients_reach_float32_weights():
    model = unet("adm").train()
    x, t, cond = inputs(model)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", BF16, enabled=enabled):
            out = model(x, t, **cond)
        grads.append(torch.autograd.grad(out.square().sum(), model.parameters()))
    for (parameter_name, parameter), exact, rounded in zip(model.named_parameters(), *grads, strict=True):
        assert rounded.dtype == parameter.dtype == torch.float32
        # Not the largest element but the whole: single elements may cancel.
        assert float((rounded - exact).norm() / exact.norm()) < 0.1, parameter_name


# ---- prepared weights -----------------------------------------------------------------------


@configurations
@torch.no_grad()
def test_the_prepared_network_computes_the_same(name):
    model = unet(name)
    x, t, cond = inputs(model)
    expected = model(x, t, **cond)
    assert largest(model.prepared()(x, t, **cond) - expected) <= 1e-5 * largest(expected)


@in_bf16
@configurations
@torch.no_grad()
def test_prepared_bfloat16_errs_no_more_than_plain_bfloat16(name):
    model = unet(name)
    x, t, cond = inputs(model, n=8)
    true = model.double()(x.double(), t, **cond)
    model.float()
    plain, prepared = (net(x, t, **cond) - true for net in (unet(name).to(BF16), model.prepared(BF16)))
    assert float(prepared.norm()) <= 1.2 * float(plain.norm())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@torch.no_grad()
def test_refreshing_takes_new_weights_into_the_same_memory(dtype):
    model = unet()
    x, t, _ = inputs(model)
    fast = model.prepared(dtype)
    places = [p.data_ptr() for p in fast.parameters()]
    before = fast(x, t)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # such a change no version counter tells of
    assert torch.equal(fast(x, t), before)
    fast.refresh(model)
    assert torch.equal(fast(x, t), model.prepared(dtype)(x, t))
    assert largest(fast(x, t) - before) > 1e-3
    assert [p.data_ptr() for p in fast.parameters()] == places


def test_the_prepared_network_is_for_inference():
    model = unet(dropout=0.5).train()
    fast = model.prepared()
    assert not fast.training
    assert model.training
    assert not any(p.requires_grad for p in fast.parameters())
    x, t, _ = inputs(model)
    x.requires_grad_()
    assert largest(torch.autograd.grad(fast(x, t).sum(), x)[0]) > 0, "guidance takes the gradient of the input"


def test_a_prepared_network_is_prepared_once_and_copied_without_its_arrangement():
    model, (x, t, _) = unet().prepared(), inputs(unet())
    assert model.prepared() is model
    want, diffusion = model(x, t), fd.Diffusion(fd.Schedule.linear(1000))
    samples = [fd.Sampler(network, diffusion, steps=2)((2, 3, 16, 16), seed=0) for network in (model, unet())]
    assert torch.equal(*samples)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.prepared(torch.float64)):
        assert largest(copied(x.to(copied.emb.weight.dtype), t) - want) < 1e-5 * largest(want)
    other = unet("ddpm", norm_eps=1e-5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    assert largest(model(x, t) - other(x, t)) < 1e-5 * largest(want)
    assert model.to(torch.float64)(x.double(), t).dtype == torch.float64


@in_bf16
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_prepared_network_runs_in_another_precision_and_has_derivatives():
    model = unet(attention_resolutions=(), middle_attention=False)
    x, t, _ = inputs(model)
    with torch.autocast("cpu", BF16):
        assert torch.equal(model.prepared()(x, t), model(x, t))
    slopes = [torch.func.jvp(lambda x, m=m: m(x, t), (x,), (x,))[1] for m in (model, model.prepared())]
    assert largest(slopes[0] - slopes[1]) < 1e-5 * largest(slopes[0])


def test_a_compiled_network_is_sampled_as_it_is():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    compiled = torch.compile(unet(), backend=backend)
    fd.Sampler(compiled, fd.Diffusion(fd.Schedule.linear(1000)), steps=2)((2, 3, 16, 16), seed=0)
    assert calls


def test_refreshing_needs_the_same_configuration_and_changes_nothing_else():
    model, other = unet().prepared(torch.float64), unet(num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for given, said in ((other, "label.weight"), (unet(model_channels=16), "differs in"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(fd.InputError, match=said):
            model.refresh(given)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_refreshing_takes_buffers_too():
    model = unet()
    nn.utils.parametrizations.spectral_norm(model.conv_out)
    fast, (x, t, _) = model.prepared(), inputs(model)
    model.train()
    for _ in range(3):  # each call is a step of the power iteration
        model(x, t)
    model.eval()
    fast.refresh(model)
    assert largest(fast(x, t) - model(x, t)) < 1e-5


def test_it_is_prepared_under_inference_mode():
    model = unet()
    x, t, _ = inputs(model)
    diffusion = fd.Diffusion(fd.Schedule.linear(1000))
    with torch.inference_mode():
        fast, sampler = model.prepared(), fd.Sampler(model, diffusion, steps=2)
        within = sampler((2, 3, 16, 16), seed=0)
    assert largest(fast(x, t) - model(x, t)) < 1e-5
    assert torch.equal(sampler((2, 3, 16, 16), seed=0), within)
    fast.refresh(model)
    assert fast.prepared(torch.float64)(x.double(), t).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func_maps_it_over_a_batch_of_batches():
    model = unet(num_classes=3)
    x, t, cond = inputs(model)
    y = cond["y"]
    xs = torch.stack((x, 2 * x, x.flip(0)))
    mapped = torch.func.vmap(lambda x: model(x, t, y))(xs)
    assert largest(mapped - torch.stack([model(x, t, y) for x in xs])) < 1e-5
    slopes = torch.func.vmap(torch.func.grad(lambda x: model(x, t, y).square().sum()))(xs)
    want = torch.stack([torch.func.grad(lambda x: model(x, t, y).square().sum())(x) for x in xs])
    assert largest(slopes - want) < 1e-4 * largest(want)


def test_a_sampler_uses_the_weights_of_the_moment():
    model = unet()
    sampler = fd.Sampler(model, fd.Diffusion(fd.Schedule.linear()), steps=2)
    before = sampler((2, 3, 16, 16), seed=0)
    assert torch.equal(sampler((2, 3, 16, 16), seed=0), before)
    with torch.no_grad():
        model.conv_out.bias.add_(1)
    assert largest(sampler((2, 3, 16, 16), seed=0) - before) > 1e-2


# ---- a sampling run -------------------------------------------------------------------------


def samples(network, count, dtype=torch.float32):
    """Of so many seeds in 50 steps of DDIM."""
    sampler = fd.Sampler(network, fd.Diffusion(fd.Schedule.linear(1000)), solver="ddim", steps=50, dtype=dtype)
    return sampler((count, 3, 16, 16), seed=torch.arange(count))


@in_bf16
@pytest.mark.parametrize("count", [4, pytest.param(64, marks=pytest.mark.slow)])
@configurations
def test_after_fifty_steps_bfloat16_errs_no_more_than_pytorch_s(name, count):
    model = unet(name, num_classes=None)
    settings, state = model.to_diffusers()
    theirs = UNet2DModel(**settings)
    theirs.load_state_dict(state)
    theirs.to(BF16, memory_format=LAST)
    true = samples(copy.deepcopy(model).double(), count, torch.float64)
    plain = samples(lambda x, t: theirs(x.to(BF16, memory_format=LAST), t).sample.to(x.dtype), count)
    errors = [(got - true).flatten(1).norm(dim=1) for got in (samples(model.prepared(BF16), count), plain)]
    assert (errors[0] <= 2 * errors[1]).all()
    assert errors[0].mean() <= 1.2 * errors[1].mean()


@configurations
def test_after_fifty_steps_the_backends_agree(name):
    model = unet(name, num_classes=None)
    true = samples(copy.deepcopy(model).double(), 3, torch.float64)
    for backend in ("reference", "native"):
        with fd.backend(backend):
            assert largest(samples(model, 3) - true) < 1e-4 * largest(true)


# ---- layouts --------------------------------------------------------------------------------


def copies(run):
    """The sizes of what a run copies, beside what it pads before a strided convolution and biases it adds to."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        run()
    found = [event for event in record.events() if event.name == "aten::copy_"]
    others = ("aten::constant_pad_nd", "aten::addmm")
    return [math.prod(event.input_shapes[0]) for event in found if event.cpu_parent.name not in others]


def watch(model):
    """What of a network's convolutions is not channels-last, filled while it runs."""
    others = []

    def look(module, arguments, out):
        if not out.is_contiguous(memory_format=LAST) or not arguments[0].is_contiguous(memory_format=LAST):
            others.append((module, list(out.shape)))

    for module in model.modules():
        if isinstance(module, Layer) and module.weight.ndim == 4:
            module.register_forward_hook(look)
    return others


@configurations
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=in_bf16)])
@torch.no_grad()
def test_inference_copies_the_image_on_its_way_in_and_out_and_nothing_else(name, dtype):
    model = unet(name).prepared(dtype)
    others = watch(model)
    x, t, cond = inputs(model, n=4)
    model(x, t, **cond)
    moved = copies(lambda: model(x, t, **cond))
    assert [size for size in moved if size >= x.numel()] == [x.numel()] * 2
    assert not others


@configurations
def test_training_changes_no_layout(name):
    model = unet(name).train()
    others = watch(model)
    x, t, cond = inputs(model, n=7)  # no number of weights divides by 7
    losses = []
    moved = copies(lambda: losses.append(model(x, t, **cond).square().mean()))
    assert [size for size in moved if size % 7 == 0 and size >= x.numel()] == [x.numel()] * 2
    assert not others
    moved = copies(losses[0].backward)
    # The gradients of what was joined are parts of one, and are made whole for the convolutions before them.
    assert len([size for size in moved if size % 7 == 0 and size > x.numel()]) <= 2 * len(model.up)
    assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.ndim == 4)


# ---- torch.compile --------------------------------------------------------------------------


@pytest.mark.slow
@configurations
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_it_compiles_whole(name, dtype):
    model = unet(name)
    x, t, cond = inputs(model)
    expected = model(x, t, **cond)
    gradient = torch.autograd.grad(expected.square().sum(), model.parameters())
    run = torch.compile(model, fullgraph=True)
    with torch.autocast("cpu", dtype, enabled=dtype == BF16):
        out = run(x, t, **cond)
    found = torch.autograd.grad(out.square().sum(), model.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert largest(out - expected) <= tolerance * largest(expected)
    for mine, true in zip(found, gradient, strict=True):
        assert float((mine - true).norm()) <= 10 * tolerance * float(true.norm())


@configurations
def test_it_is_traced_without_a_break(name):
    model = unet(name)
    x, t, cond = inputs(model)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(x, t, **cond)
    assert largest(run(x, t, **cond) - expected) <= 1e-5 * largest(expected)
    with torch.autocast("cpu", BF16):
        assert torch.isfinite(run(x, t, **cond)).all()
    with torch.no_grad():
        fast = model.prepared()
        compiled = torch.compile(fast, fullgraph=True, backend="eager")
        assert largest(compiled(x, t, **cond) - expected) <= 1e-5 * largest(expected)
