"""Proves the networks: shapes, start, parameter count, gradients, batch independence, refusal of misfits."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.models import layers

F64 = torch.float64


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def unet(*arguments, seed=0, **settings):
    torch.manual_seed(seed)
    small = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 8}
    return fd.UNet(*(arguments or (16,)), **{**small, "attention_resolutions": (8,), **settings}).eval()


def mlp(*arguments, seed=0, **settings):
    torch.manual_seed(seed)
    return fd.MLP(*arguments, **{"width": 16, "depth": 2, **settings})


def wake(module, seed=0):
    """Give every parameter that starts at zero a value, so that the output depends on all of them."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return module


def largest(difference):
    return float(difference.detach().abs().max())


# ---- shapes ---------------------------------------------------------------------------------

CONFIGURATIONS = {
    "ddpm": {},
    "adm": {"scale_shift": True, "resblock_updown": True, "num_head_channels": 16},
    "scale_shift": {"scale_shift": True},
    "resblock_updown": {"resblock_updown": True},
    "one level": {"channel_mult": (1,), "attention_resolutions": ()},
    "four levels": {"channel_mult": (1, 1, 2, 2), "attention_resolutions": (4, 2)},
    "narrowing": {"channel_mult": (2, 1)},
    "three blocks": {"num_res_blocks": 3},
    "several heads": {"num_heads": 4, "attention_resolutions": (16, 8)},
    "learned variance": {"learned_variance": True},
    "other output": {"out_channels": 5},
    "other output and variance": {"out_channels": 2, "learned_variance": True},
    "grey": {"in_channels": 1},
    "image condition": {"condition_channels": 2},
    "classes": {"num_classes": 10},
    "everything": {
        "scale_shift": True,
        "resblock_updown": True,
        "num_heads": 2,
        "num_classes": 3,
        "learned_variance": True,
        "condition_channels": 1,
        "dropout": 0.1,
    },
}
configurations = pytest.mark.parametrize("name", CONFIGURATIONS)


def inputs(model, n=2, size=(16, 16), seed=0, dtype=torch.float32):
    """x, t and the conditions a U-Net of this configuration takes."""
    config = model.config
    x = randn((n, config["in_channels"], *size), seed, dtype)
    cond = {}
    if config["num_classes"] is not None:
        cond["y"] = torch.arange(n) % config["num_classes"]
    if config["condition_channels"]:
        cond["condition"] = randn((n, config["condition_channels"], *size), seed + 1, dtype)
    return x, torch.linspace(0, 999, n).to(dtype), cond


def outputs_of(config):
    return (config["out_channels"] or config["in_channels"]) * (2 if config["learned_variance"] else 1)


@configurations
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 8)], ids=str)
def test_output_shapes_of_square_and_other_images(name, size):
    model = unet(**CONFIGURATIONS[name])
    x, t, cond = inputs(model, size=size)
    out = wake(model)(x, t, **cond)
    assert out.shape == (2, outputs_of(model.config), *size)
    assert torch.isfinite(out).all()


@configurations
def test_the_output_starts_as_zero(name):
    model = unet(**CONFIGURATIONS[name])
    x, t, cond = inputs(model)
    assert (model(x, t, **cond) == 0).all()


@configurations
def test_the_gradient_reaches_every_parameter(name):
    model = wake(unet(**CONFIGURATIONS[name])).train()
    x, t, cond = inputs(model, n=3)
    model(x, t, **cond).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


@configurations
def test_a_sample_s_output_does_not_depend_on_its_batch(name):
    model = wake(unet(**CONFIGURATIONS[name]))
    x, t, cond = inputs(model, n=5)
    with torch.no_grad():
        whole = model(x, t, **cond)
        for k in range(5):
            alone = model(x[k : k + 1], t[k : k + 1], **{key: value[k : k + 1] for key, value in cond.items()})
            assert largest(whole[k] - alone[0]) <= 1e-5 * max(1, largest(whole))


@configurations
def test_config_round_trip(name):
    model = wake(unet(**CONFIGURATIONS[name], seed=1))
    config = json.loads(json.dumps(model.config))
    again = fd.UNet(**config).eval()
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x, t, cond = inputs(model)
    assert torch.equal(again(x, t, **cond), model(x, t, **cond))


def test_no_samples():
    assert unet()(torch.zeros(0, 3, 16, 16), torch.zeros(0)).shape == (0, 3, 16, 16)


# ---- parameters -----------------------------------------------------------------------------


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_cifar_10_network_has_the_parameters_of_ho_et_al():
    with torch.device("meta"):
        model = fd.UNet(32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1)
    assert count(model) == 35_746_307


def test_parameters_of_the_options():
    base = count(unet())
    assert count(unet(learned_variance=True)) - base == 3 * (16 * 9 + 1)
    assert count(unet(condition_channels=2)) - base == 2 * 16 * 9
    assert count(unet(num_classes=10)) - base == 11 * 64
    assert count(unet(num_heads=4)) == base


# ---- times ----------------------------------------------------------------------------------


def numpy_embedding(t, dim):
    half = dim // 2
    angles = np.asarray(t, np.float64)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    return np.concatenate((np.cos(angles), np.sin(angles), np.zeros((len(t), dim % 2))), 1)


@pytest.mark.parametrize("dim", [2, 16, 33, 128])
@pytest.mark.parametrize("t", [[0, 1, 7, 999], [0.0, 0.25, 3.7, 998.5], [-1.55, 1.1]])
def test_timestep_embedding_is_the_formula(t, dim):
    embedding = layers.timestep_embedding(torch.tensor(t), dim)
    assert embedding.shape == (len(t), dim)
    # The angle itself is a float32 number of up to 1000.
    assert np.abs(embedding.numpy() - numpy_embedding(t, dim)).max() <= 3e-4


@pytest.mark.parametrize("make", [unet, mlp])
def test_fractional_times_are_told_apart(make):
    model = wake(make())
    x = randn((1, 3, 16, 16), 0) if make is unet else randn((1, 2), 0)
    outs = [model(x, torch.tensor([t])) for t in (3.0, 3.5, 4.0)]
    assert torch.equal(outs[0], model(x, torch.tensor([3])))
    assert largest(outs[0] - outs[1]) > 1e-4
    assert largest(outs[1] - outs[2]) > 1e-4


# ---- precision and layout -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "adm", "everything"])
def test_double_precision(name):
    model = wake(unet(**CONFIGURATIONS[name]))
    x, t, cond = inputs(model)
    narrow = model(x, t, **cond)
    cond = {key: value.double() if value.is_floating_point() else value for key, value in cond.items()}
    wide = model.double()(x.double(), t.double(), **cond)
    assert wide.dtype == F64
    assert largest(wide - narrow) <= 1e-4 * largest(wide)
    assert largest(wide - narrow) > 0, "float64 must not be float32 in disguise"


@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_channels_last_gives_the_same(name):
    model = wake(unet(**CONFIGURATIONS[name]))
    x, t, _ = inputs(model)
    expected = model(x, t)
    model = model.to(memory_format=torch.channels_last)
    out = model(x.to(memory_format=torch.channels_last), t)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert largest(out - expected) <= 1e-5 * max(1, largest(expected))


def test_dropout_acts_in_training_only():
    model = wake(unet(dropout=0.5))
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert largest(model(x, t) - model(x, t)) > 1e-3


# ---- the parts ------------------------------------------------------------------------------


def group_norm(x, groups, module):
    grouped = x.reshape(len(x), groups, -1)
    grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    return grouped.reshape(x.shape) * module.weight[:, None, None] + module.bias[:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_the_softmax_formula(heads):
    torch.manual_seed(0)
    attention = wake(layers.Attention(8, heads, 2, 1e-5)).double()
    x = randn((3, 8, 4, 5), 0, F64)
    tokens = group_norm(x, 2, attention.norm).flatten(2).transpose(1, 2)
    q, k, v = (part.reshape(3, 20, heads, 8 // heads) for part in attention.qkv(tokens).split(8, 2))
    weights = torch.softmax(torch.einsum("nihc,njhc->nhij", q, k) / math.sqrt(8 / heads), -1)
    mixed = torch.einsum("nhij,njhc->nihc", weights, v).reshape(3, 20, 8)
    expected = x + attention.out(mixed).transpose(1, 2).reshape(x.shape)
    assert largest(attention(x) - expected) <= 1e-12


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("outside", [8, 12])
def test_residual_block_is_the_formula(scale_shift, outside):
    torch.manual_seed(0)
    settings = {"groups": 4, "eps": 1e-5, "dropout": 0.0, "scale_shift": scale_shift}
    block = wake(layers.ResBlock(8, outside, **settings)).double()
    x, emb = randn((2, 8, 4, 6), 0, F64), randn((2, block.condition), 1, F64)
    h = block.conv1(silu(group_norm(x, 4, block.norm1)))
    condition = emb[:, :, None, None]
    given = emb if block.joined is None else emb + block.conv1.bias  # of the first convolution, with the condition
    if scale_shift:
        h = group_norm(h, 4, block.norm2) * (1 + condition[:, :outside]) + condition[:, outside:]
    else:
        h = group_norm(h + condition, 4, block.norm2)
    skip = x if outside == 8 else block.skip(x)
    assert largest(block(x, given) - (skip + block.conv2(silu(h)))) <= 1e-12


def test_resampling():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert layers.resample(x, -1).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(layers.resample(x, 0), x)
    assert torch.equal(layers.resample(layers.resample(x, 1), -1), x)
    assert layers.resample(x, 1)[0, 0, :2, :4].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_residual_blocks_resample_both_of_their_branches(direction):
    block = layers.ResBlock(8, 8, groups=4, eps=1e-5, dropout=0.0, scale_shift=True, resample=direction)
    x = randn((2, 8, 4, 6), 0)
    assert torch.equal(block(x, randn((2, 16), 1)), layers.resample(x, direction)), (
        "the residual branch starts as nothing"
    )


# ---- conditions -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (8, 4), (1, 1)], ids=str)
def test_a_smaller_condition_is_upsampled(size):
    model = wake(unet(condition_channels=2))
    x, t, _ = inputs(model)
    level = torch.tensor([0.3, -1.0])[None, :, None, None].expand(2, 2, 1, 1)
    out = model(x, t, condition=level.expand(2, 2, *size).contiguous())
    assert out.shape == (2, 3, 16, 16)
    assert largest(out - model(x, t, condition=level.expand(2, 2, 16, 16))) <= 1e-4


def test_the_condition_image_matters():
    model = wake(unet(condition_channels=2))
    x, t, cond = inputs(model)
    assert largest(model(x, t, **cond) - model(x, t, condition=-cond["condition"])) > 1e-3


@pytest.mark.parametrize("make", [unet, mlp])
def test_the_null_condition(make):
    model = wake(make(num_classes=4))
    x = randn((3, 3, 16, 16), 0) if make is unet else randn((3, 2), 0)
    t, image = torch.zeros(3), randn((3, 1), 1)
    cond = {"y": torch.tensor([0, 1, 3]), "condition": image}
    null = model.null_condition(cond)
    assert null["y"].tolist() == [4, 4, 4]
    assert null["y"].dtype == torch.int64
    assert null["condition"] is image
    assert cond["y"].tolist() == [0, 1, 3]
    with_label, without = model(x, t, cond["y"]), model(x, t, null["y"])
    assert all(largest(a - b) > 1e-4 for a, b in zip(with_label, without, strict=True))


@pytest.mark.parametrize("make", [unet, mlp])
def test_there_is_no_null_condition_without_a_label(make):
    with pytest.raises(fd.InputError, match="class-conditional"):
        make().null_condition({"y": torch.zeros(2)})
    with pytest.raises(fd.InputError, match="class-conditional"):
        make(num_classes=2).null_condition({})


# ---- the perceptron -------------------------------------------------------------------------

PERCEPTRONS = {
    "points": {},
    "vectors": {"dim": 7},
    "scalars": {"dim": 1},
    "odd width": {"width": 9, "depth": 1},
    "classes": {"num_classes": 3},
    "variance": {"learned_variance": True},
    "everything": {"dim": 5, "width": 24, "depth": 3, "num_classes": 2, "learned_variance": True},
}
perceptrons = pytest.mark.parametrize("name", PERCEPTRONS)


def mlp_inputs(model, n=4):
    classes = model.config["num_classes"]
    return randn((n, model.config["dim"]), 0), torch.linspace(0, 99, n), torch.arange(n) % classes if classes else None


@perceptrons
def test_mlp_shapes_and_starting_point(name):
    model = mlp(**PERCEPTRONS[name])
    out = model(*mlp_inputs(model))
    assert out.shape == (4, model.config["dim"] * (2 if model.config["learned_variance"] else 1))
    assert (out == 0).all()


@perceptrons
def test_mlp_gradient_reaches_every_parameter(name):
    model = wake(mlp(**PERCEPTRONS[name]))
    model(*mlp_inputs(model)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


@perceptrons
def test_mlp_samples_do_not_depend_on_their_batch(name):
    model = wake(mlp(**PERCEPTRONS[name]))
    x, t, y = mlp_inputs(model)
    whole = model(x, t, y)
    for k in range(4):
        assert largest(whole[k] - model(x[[k]], t[[k]], None if y is None else y[[k]])[0]) <= 1e-5


@perceptrons
def test_mlp_config_round_trip(name):
    model = wake(mlp(**PERCEPTRONS[name], seed=1))
    again = fd.MLP(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*mlp_inputs(model)), model(*mlp_inputs(model)))


def test_mlp_double_precision():
    model = wake(mlp())
    x, t, _ = mlp_inputs(model)
    narrow = model(x, t)
    wide = model.double()(x.double(), t.double())
    assert wide.dtype == F64
    assert 0 < largest(wide - narrow) <= 1e-4 * largest(wide)


# ---- what does not fit ----------------------------------------------------------------------

BAD_CONFIGURATIONS = {
    "groups": (lambda: unet(norm_groups=7), "norm_groups"),
    "no groups": (lambda: unet(norm_groups=0), "norm_groups"),
    "heads": (lambda: unet(num_heads=3), "heads"),
    "no heads": (lambda: unet(num_heads=0), "heads"),
    "wide heads": (lambda: unet(num_head_channels=64), "head"),
    "uneven heads": (lambda: unet(num_head_channels=24), "head"),
    "odd image": (lambda: unet(15), "image_size"),
    "small image": (lambda: unet(2, channel_mult=(1, 1, 1), attention_resolutions=()), "image_size"),
    "attention elsewhere": (lambda: unet(attention_resolutions=(7,)), "attention_resolutions"),
    "attention too fine": (lambda: unet(attention_resolutions=(32, 8)), "attention_resolutions"),
    "no levels": (lambda: unet(channel_mult=()), "channel_mult"),
    "dropout": (lambda: unet(dropout=1.5), "dropout"),
    "negative classes": (lambda: unet(num_classes=-1), "num_classes"),
    "no channels": (lambda: unet(model_channels=0), "model_channels"),
    "negative condition": (lambda: unet(condition_channels=-1), "condition_channels"),
    "no classes": (lambda: unet(num_classes=0), "num_classes=0 must be a whole number of at least 1 or None"),
    "words for numbers": (lambda: unet("32", dropout="much", norm_groups="8"), "image_size='32'.*norm_groups.*dropout"),
    "fractions of groups": (lambda: unet(norm_groups=8.0), "norm_groups=8.0"),
    "eps below zero": (lambda: unet(norm_eps=-1.0), "norm_eps=-1.0 must be a number of at least 0"),
    "eps not a number": (lambda: unet(norm_eps=math.nan), "norm_eps=nan"),
    "words for choices": (lambda: unet(scale_shift="no"), "scale_shift='no' must be True or False"),
    "padding": (lambda: unet(downsample_padding=2), "downsample_padding=2 must be 1 or 0"),
    "words for levels": (lambda: unet(channel_mult="12"), "channel_mult='12' must be a list"),
    "levels without width": (lambda: unet(channel_mult=(1, 0)), "channel_mult"),
    "levels of uneven width": (lambda: unet(channel_mult=(1, 1.03)), "a whole number of channels"),
    "too few sines": (lambda: unet(model_channels=2, frequency_shift=1), "at least 4"),
    "all at once": (lambda: unet(num_heads=0, in_channels=-1, embedding_channels=0), "in_.*num_heads.*embedding"),
    "mlp words": (lambda: mlp(width="16", learned_variance="no"), "width='16'.*learned_variance"),
    "mlp width": (lambda: mlp(width=1), "width"),
    "mlp depth": (lambda: mlp(depth=0), "depth"),
    "mlp dim": (lambda: mlp(dim=0), "dim"),
    "mlp classes": (lambda: mlp(num_classes=-1), "num_classes"),
}


@pytest.mark.parametrize("case", BAD_CONFIGURATIONS)
def test_bad_configurations_are_refused(case):
    build, message = BAD_CONFIGURATIONS[case]
    with pytest.raises(fd.InputError, match=message):
        build()


X, T, Y = torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 1])
IMAGE = torch.zeros(2, 1, 16, 16)
P = torch.zeros(2, 2)
BAD_INPUTS = {
    "x channels": (lambda: unet()(X[:, :2], T), "x must"),
    "x dimensions": (lambda: unet()(X[0], T), "x must"),
    "height": (lambda: unet()(X[:, :, :15], T), "divide by 2"),
    "width": (lambda: unet()(X[..., :7], T), "divide by 2"),
    "t length": (lambda: unet()(X, T[:1]), "t must"),
    "t dimensions": (lambda: unet()(X, T[:, None]), "t must"),
    "t scalar": (lambda: unet()(X, torch.tensor(1.0)), "t must"),
    "y without classes": (lambda: unet()(X, T, Y), "no labels"),
    "no y": (lambda: unet(num_classes=2)(X, T), "pass y"),
    "y length": (lambda: unet(num_classes=2)(X, T, Y[:1]), "y must"),
    "y type": (lambda: unet(num_classes=2)(X, T, Y.float()), "y must"),
    "y dimensions": (lambda: unet(num_classes=2)(X, T, Y[:, None]), "y must"),
    "y too large": (lambda: unet(num_classes=2)(X, T, Y + 2), "0...1"),
    "y negative": (lambda: unet(num_classes=2)(X, T, Y - 1), "0...1"),
    "condition without channels": (lambda: unet()(X, T, condition=IMAGE), "no condition"),
    "no condition": (lambda: unet(condition_channels=1)(X, T), "condition must"),
    "condition channels": (lambda: unet(condition_channels=2)(X, T, condition=IMAGE), "condition must"),
    "condition batch": (lambda: unet(condition_channels=1)(X, T, condition=IMAGE[:1]), "condition must"),
    "condition dimensions": (lambda: unet(condition_channels=1)(X, T, condition=IMAGE[0]), "condition must"),
    "x integers": (lambda: unet()(X.long(), T), "x must be a floating-point"),
    "x complex": (lambda: unet()(X + 0j, T), "x must be a floating-point"),
    "x array": (lambda: unet()(X.numpy(), T), "x must be a tensor, got ndarray"),
    "x sparse": (lambda: unet()(X.to_sparse(), T), "x must be a dense"),
    "x without height": (lambda: unet()(X[:, :, :0], T), "height and width"),
    "t number": (lambda: unet()(X, 3), "t must be a tensor"),
    "t meta": (lambda: unet()(X, T.to("meta")), "t must be on cpu"),
    "t complex": (lambda: unet()(X, T + 0j), "t must hold real numbers"),
    "y list": (lambda: unet(num_classes=2)(X, T, [0, 1]), "y must be a tensor"),
    "y scalar": (lambda: unet(num_classes=2)(X, T, torch.tensor(0)), "y must hold one number per sample"),
    "condition array": (
        lambda: unet(condition_channels=1)(X, T, condition=IMAGE.numpy()),
        "condition must be a tensor",
    ),
    "condition integers": (lambda: unet(condition_channels=1)(X, T, condition=IMAGE.long()), "floating-point"),
    "condition without pixels": (lambda: unet(condition_channels=1)(X, T, condition=IMAGE[..., :0]), "condition must"),
    "mlp x": (lambda: mlp()(P[:, :1], T), "x must"),
    "mlp x dimensions": (lambda: mlp()(P[0], T), "x must"),
    "mlp t": (lambda: mlp()(P, T[:1]), "t must"),
    "mlp y without classes": (lambda: mlp()(P, T, Y), "no labels"),
    "mlp no y": (lambda: mlp(num_classes=2)(P, T), "pass y"),
    "mlp y type": (lambda: mlp(num_classes=2)(P, T, Y.int()), "y must"),
    "mlp y too large": (lambda: mlp(num_classes=2)(P, T, Y + 2), "0...1"),
    "mlp y of one": (lambda: mlp(num_classes=2)(P, T, Y[:1]), "y must"),
    "mlp y of three": (lambda: mlp(num_classes=2)(P, T, torch.tensor([0, 1, 0])), "y must"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_refused(case):
    call, message = BAD_INPUTS[case]
    with pytest.raises(fd.InputError, match=message):
        call()
