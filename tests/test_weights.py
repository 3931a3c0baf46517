"""Networks of diffusers and guided-diffusion become ours and come back: same outputs, same gradients, same bits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guided_diffusion_unet as guided
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from weights_tools import FLAGS, Config, arguments, own, peer, randomise

import fastdiff as fd
from fastdiff.models import diffusers as names_diffusers
from fastdiff.models import guided_diffusion as names_guided
from fastdiff.models import weights
from fastdiff.models.weights import Entry

pytestmark = pytest.mark.usefixtures("one_thread")


def labels(count: int | None) -> Config:
    return {} if count is None else {"y": torch.tensor([count - 1, 0])}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def far(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """The largest difference as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.abs().max() + floor))


class Pair:
    """A network of a peer and what was made of it: outputs and gradients of both for the same input."""

    def __init__(self, theirs: nn.Module, ours: fd.UNet, table: list[Entry], call: Callable[..., Tensor]) -> None:
        self.theirs, self.ours, self.table, self.call = theirs.eval(), ours, table, call

    def errors(self, shape: tuple[int, ...], dtype: torch.dtype, **cond: Tensor) -> tuple[float, float]:
        """Relative errors of the output, and of the gradients of x and all parameters."""
        self.ours.to(dtype)
        self.theirs.to(dtype)
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        x = drawn(*shape).to(dtype)
        t = torch.tensor([3, 917])
        mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = self.ours(mine, t, **cond), self.call(self.theirs, its, t, **cond)
        weight = drawn(*b.shape, seed=2).to(dtype)
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        its_grads = {name: p.grad for name, p in self.theirs.named_parameters()}
        largest = max(float(g.abs().max()) for g in its_grads.values())
        assert {e.theirs for e in self.table} == set(its_grads)
        pairs = [(e.give(self.ours.get_parameter(e.ours).grad), its_grads[e.theirs]) for e in self.table]
        # a bias in front of a norm of a single channel has no gradient: what both get is rounding
        grads = [far(mine.grad, its.grad), *(far(a, b, 0.01 * largest) for a, b in pairs)]
        self.ours.zero_grad()
        self.theirs.zero_grad()
        return far(a.detach(), b.detach()), max(grads)

    def check(self, name: str, shape: tuple[int, ...], **cond: Tensor) -> None:
        before = {k: v.clone() for k, v in self.ours.state_dict().items()}
        out, grad = self.errors(shape, torch.float32, **cond)
        wide_out, wide_grad = self.errors(shape, torch.float64, **cond)
        self.ours.float()
        self.theirs.float()
        assert all(torch.equal(v, before[k]) for k, v in self.ours.state_dict().items())
        print(f"{name}: float32 {out:.1e} gradients {grad:.1e}, float64 {wide_out:.1e} gradients {wide_grad:.1e}")
        assert out < 1e-5
        assert grad < 1e-4
        assert wide_out < 1e-9
        assert wide_grad < 1e-9


def covers(unet: fd.UNet, table: list[Entry]) -> bool:
    """Whether each element of each parameter is in exactly one entry."""
    counts = {name: torch.zeros(p.shape) for name, p in unet.named_parameters()}
    for entry in table:
        taken = torch.zeros_like(counts[entry.ours])
        entry.take(taken, torch.ones(entry.shape))
        counts[entry.ours] += taken
    return all(bool((count == 1).all()) for count in counts.values())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---- diffusers ----------------------------------------------------------------------------------

RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
ADM = {**RESNET, "resnet_time_scale_shift": "scale_shift"}
DIFFUSERS: dict[str, Config] = {
    "defaults": peer("paa", (8, 16, 24)),
    "ddpm": peer(
        "pap",
        (8, 16, 16),
        attention_head_dim=None,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        norm_eps=1e-6,
        layers_per_block=2,
    ),
    "adm": peer("raa", (8, 16, 16), num_class_embeds=5, out_channels=6, layers_per_block=2, **ADM),
    "classes": peer("pa", (8, 16), num_class_embeds=3),
    "scale_shift": peer("pa", (8, 16), resnet_time_scale_shift="scale_shift", attention_head_dim=4),
    "scale_shift, norm in the middle": peer(
        "pa", (8, 16), resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4
    ),
    "resnet": peer("rra", (8, 8, 16), **RESNET),
    "attention everywhere, resnet": peer("aaa", (8, 16, 24), **ADM, dropout=0.1),
    "attention everywhere, conv": peer("aaa", (8, 16, 24), attention_head_dim=4, layers_per_block=2),
    "no attention at all": peer("ppp", (20, 12, 28), add_attention=False),
    "no attention in the middle": peer("ap", (16, 20), add_attention=False, attention_head_dim=16),
    "odd widths, three layers": peer("pa", (24, 40), norm_num_groups=8, layers_per_block=3),
    "not square": peer("pap", (8, 8, 16), sample_size=[16, 24], layers_per_block=2),
    "not square, padding 0": peer("ap", (8, 16), sample_size=[12, 20], downsample_padding=0),
    "odd embedding, sines first": peer("pa", (9, 15), norm_num_groups=3, flip_sin_to_cos=False, attention_head_dim=5),
    "sines first, shift": peer("pa", (8, 16), flip_sin_to_cos=False, freq_shift=1),
    "shift": peer("pa", (10, 20), norm_num_groups=5, freq_shift=1, attention_head_dim=10),
    "channels": peer("pa", (8, 16), in_channels=1, out_channels=4, time_embedding_dim=20),
    "learned variance, no size": peer("pp", (12, 8), in_channels=2, out_channels=4, sample_size=None),
    "one level": peer("a", (16,), norm_num_groups=8, attention_head_dim=2, sample_size=17),
    "narrower inside": peer("pap", (32, 16, 8), norm_num_groups=8, num_class_embeds=1),
}


@pytest.fixture(scope="module")
def unet_2d():
    return pytest.importorskip("diffusers.models.unets.unet_2d").UNet2DModel


def make(unet_2d, config: Config) -> Any:
    model = unet_2d(**config)
    randomise(model)
    return model.eval()


def spatial(config: Config) -> tuple[int, int]:
    size = config["sample_size"] or 8
    height, width = size if isinstance(size, list) else (size, size)
    return height // 4 * 4, width // 4 * 4


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_network_of_diffusers(name, unet_2d):
    config = DIFFUSERS[name]
    theirs = make(unet_2d, config)
    ours = fd.UNet.from_diffusers(theirs)
    flip = config.get("flip_sin_to_cos", True)
    table = names_diffusers.table(ours, flip)
    assert covers(ours, table)
    assert not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert ours.config["learned_variance"] == (theirs.config.out_channels == 2 * theirs.config.in_channels)
    pair = Pair(theirs, ours, table, lambda m, x, t, y=None: m(x, t, y).sample)
    pair.check(name, (2, theirs.config.in_channels, *spatial(config)), **labels(config.get("num_class_embeds")))
    settings, state = ours.to_diffusers(flip_sin_to_cos=flip)
    assert equal(state, theirs.state_dict())
    _same_settings(settings, theirs.config)


def _same_settings(settings: Config, theirs: Config) -> None:
    """All settings come back, but for the size that is rounded and a last level's type, which changes nothing."""
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items() if not k.startswith("_")}
    assert settings.keys() == expected.keys()
    assert settings == json.loads(json.dumps(settings))
    differing = {k for k in settings if settings[k] != expected[k]}
    if settings["downsample_type"] == "conv" or not set(settings["down_block_types"]) & {names_diffusers.DOWN[2]}:
        assert not differing - {"sample_size"}
    assert not differing - {"sample_size", "down_block_types", "up_block_types"}


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_takes_what_is_exported(name, flip, unet_2d):
    config = DIFFUSERS[name]
    ours = fd.UNet.from_diffusers(make(unet_2d, config))
    settings, state = ours.to_diffusers(flip_sin_to_cos=flip)
    theirs = unet_2d(**settings).eval()
    theirs.load_state_dict(state, strict=True)
    x = drawn(2, ours.in_channels, *spatial(config))
    cond = labels(config.get("num_class_embeds"))
    t = torch.tensor([0, 999])
    with torch.no_grad():
        assert far(ours(x, t, **cond), theirs(x, t, *cond.values()).sample) < 1e-5


# ---- guided-diffusion ---------------------------------------------------------------------------


ADM_GUIDED = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16}
GUIDED: dict[str, Config] = {
    "plain": arguments(),
    "older heads": arguments(num_heads=4),
    "newer heads": arguments(num_heads=4, use_new_attention_order=True),
    "heads of a width": arguments(num_head_channels=8, attention_resolutions=[1, 2]),
    "newer heads of a width": arguments(
        num_head_channels=16, use_new_attention_order=True, attention_resolutions=[1, 2]
    ),
    "adm": arguments(**ADM_GUIDED, out_channels=6, num_classes=7, num_res_blocks=2),
    "adm, newer": arguments(**ADM_GUIDED, out_channels=6, num_classes=7, use_new_attention_order=True),
    "iddpm": arguments(
        use_scale_shift_norm=True, num_heads=4, num_res_blocks=2, channel_mult=[1, 2, 2], attention_resolutions=[2, 4]
    ),
    "resblock_updown": arguments(resblock_updown=True, num_heads=2),
    "no conv_resample": arguments(conv_resample=False, channel_mult=[1, 1, 2], num_heads=2),
    "classes": arguments(num_classes=3, num_heads=2),
    "low resolution": arguments(num_heads=2),
    "low resolution, adm": arguments(**ADM_GUIDED, out_channels=6, num_classes=7),
    "other condition": arguments(in_channels=5),
    "fractions": arguments(channel_mult=[0.5, 1.5, 1], model_channels=64, num_res_blocks=2, num_heads_upsample=1),
    "one level, three blocks": arguments(channel_mult=[2], num_res_blocks=3, attention_resolutions=[], num_heads=4),
    "rates that do not occur": arguments(attention_resolutions=[2, 8, 32], num_heads=2, num_heads_upsample=2),
    "odd size": arguments(image_size=7, channel_mult=[1, 1, 2], attention_resolutions=[4], in_channels=1),
}


def make_guided(name: str) -> nn.Module:
    model = (guided.SuperResModel if "low" in name else guided.UNetModel)(**GUIDED[name])
    randomise(model)
    return model.eval()


def call_guided(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None = None, condition: Any = None) -> Tensor:
    if isinstance(model, guided.SuperResModel):
        return model(x, t, low_res=condition, y=y)
    return model(x if condition is None else torch.cat([x, condition], 1), t, y)


def conditions(ours: fd.UNet, config: Config, size: int) -> Config:
    cond = labels(config.get("num_classes"))
    if ours.condition_channels:
        size = size // 2 if ours.condition_channels == ours.in_channels else size
        cond["condition"] = drawn(2, ours.condition_channels, size, size)
    return cond


@pytest.mark.parametrize("name", GUIDED)
def test_a_network_of_guided_diffusion(name):
    config, theirs = GUIDED[name], make_guided(name)
    ours = fd.UNet.from_guided_diffusion(theirs.state_dict(), config)
    newer = config.get("use_new_attention_order", False)
    table = names_guided.table(ours, newer)
    assert covers(ours, table)
    assert ours.config["learned_variance"] == (config["out_channels"] == 6)
    pair = Pair(theirs, ours, table, call_guided)
    pair.check(name, (2, ours.in_channels, 8, 8), **conditions(ours, config, 8))
    settings, state = ours.to_guided_diffusion(new_attention_order=newer)
    assert equal(state, theirs.state_dict())
    moot = {"num_heads_upsample": -1}
    if name == "odd size":
        moot["image_size"] = 8
    if name == "rates that do not occur":
        moot["attention_resolutions"] = [2]
    assert settings == settings | config | moot
    assert settings == json.loads(json.dumps(settings))


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion_takes_what_is_exported(name, newer):
    ours = fd.UNet.from_guided_diffusion(make_guided(name).state_dict(), GUIDED[name])
    settings, state = ours.to_guided_diffusion(new_attention_order=newer)
    theirs = (guided.SuperResModel if "low" in name else guided.UNetModel)(**settings).eval()
    theirs.load_state_dict(state, strict=True)
    x, t = drawn(2, ours.in_channels, 8, 8), torch.tensor([0, 999])
    cond = conditions(ours, settings, 8)
    with torch.no_grad():
        assert far(ours(x, t, **cond), call_guided(theirs, x, t, **cond)) < 1e-5


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {"attention_resolutions": "32,16,8", "learn_sigma": True, "class_cond": True, "num_head_channels": 64},
            {
                "image_size": 64,
                "out_channels": 3,
                "learned_variance": True,
                "num_classes": 1000,
                "null_label": False,
                "channel_mult": [1, 2, 3, 4],
                "attention_resolutions": [32, 16, 8],
                "num_head_channels": 64,
                "scale_shift": True,
            },
        ),
        ({}, {"attention_resolutions": [16, 8], "num_heads": 4, "num_head_channels": None, "num_classes": None}),
        ({"image_size": 256}, {"channel_mult": [1, 1, 2, 2, 4, 4], "attention_resolutions": [16, 8]}),
        ({"image_size": 512}, {"channel_mult": [0.5, 1, 1, 2, 2, 4, 4]}),
        ({"image_size": 32, "channel_mult": "1,2", "diffusion_steps": 4000}, {"channel_mult": [1, 2]}),
        ({"large_size": 512, "small_size": 128}, {"image_size": 512, "channel_mult": [1, 1, 2, 2, 4, 4]}),
    ],
)
def test_flags_of_guided_diffusion(flags, expected):
    config = {**FLAGS, **flags}
    found = names_guided.arguments(names_guided.constructor(config), "large_size" in config)
    assert found == found | expected
    assert found["model_channels"] == 32
    assert found["condition_channels"] == (3 if "large_size" in config else 0)


@pytest.mark.parametrize(("size", "millions"), [(64, 296), (128, 422), (256, 554), (512, 559)])
def test_published_networks_have_their_published_sizes(size, millions):
    """Dhariwal & Nichol 2021, the ImageNet models of section 5, by the flags they were trained with."""
    own_flags = {
        64: {"num_channels": 192, "num_res_blocks": 3, "use_new_attention_order": True},
        128: {"num_heads": 4, "num_head_channels": -1},
    }
    flags = {
        "image_size": size,
        "num_channels": 256,
        "num_res_blocks": 2,
        "num_head_channels": 64,
        "attention_resolutions": "32,16,8",
        "class_cond": True,
        "learn_sigma": True,
        "resblock_updown": True,
        **own_flags.get(size, {}),
    }
    unet = weights.empty(fd.UNet, names_guided.arguments(names_guided.constructor(flags), False))
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == millions


def test_weights_of_flags():
    model = guided.UNetModel(8, 3, 32, 6, 1, [2], channel_mult=[1, 2], num_classes=1000, num_heads=4)
    randomise(model)
    flags = {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1,2",
        "attention_resolutions": "4",
        "learn_sigma": True,
        "class_cond": True,
        "use_scale_shift_norm": False,
        "use_fp16": True,
        "noise_schedule": "cosine",
    }
    ours = fd.UNet.from_guided_diffusion(model.state_dict(), flags)
    x, t, y = drawn(2, 3, 8, 8), torch.tensor([5, 600]), torch.tensor([999, 0])
    with torch.no_grad():
        assert far(ours(x, t, y), model.eval()(x, t, y)) < 1e-5


# ---- our own networks ---------------------------------------------------------------------------


def test_a_null_label_is_the_last_class_of_a_peer():
    ours = own(num_classes=4)
    assert ours.to_diffusers()[0]["num_class_embeds"] == 5
    settings, state = ours.to_guided_diffusion()
    assert settings["num_classes"] == 5
    again = fd.UNet.from_guided_diffusion(state, settings)
    x, t, null = drawn(1, 3, 8, 8), torch.tensor([3]), torch.tensor([4])
    assert torch.equal(ours(x, t, null), again(x, t, null))
    with pytest.raises(fd.InputError, match="no null label"):
        again.null_condition({"y": null})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_heads": 4},
        {"num_head_channels": 8, "scale_shift": True, "resblock_updown": True, "learned_variance": True},
        {"condition_channels": 3},
        {"condition_channels": 1, "out_channels": 3},
    ],
)
def test_one_peer_to_the_other_through_ours(settings):
    """Weights that went once around are the same bits, and compute the same."""
    first = own(**settings)
    there = fd.UNet.from_guided_diffusion(*reversed(first.to_guided_diffusion(new_attention_order=True)))
    assert equal(there.state_dict(), first.state_dict())
    assert there.condition_channels == first.condition_channels
    if "condition_channels" not in settings:
        again = fd.UNet.from_guided_diffusion(*reversed(there.to_guided_diffusion()))
        assert equal(again.state_dict(), first.state_dict())
        assert again.to_diffusers()[0] == first.to_diffusers()[0]


def test_importing_leaves_the_random_state_and_the_source_alone():
    state = own().to_guided_diffusion()
    before, copies = torch.get_rng_state(), {k: v.clone() for k, v in state[1].items()}
    unet = fd.UNet.from_guided_diffusion(*reversed(state))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert equal(state[1], copies)
    exported = unet.to_diffusers()[1]
    exported["conv_in.bias"].fill_(7)
    assert not unet.conv_in.bias.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision_become_float32(dtype, tmp_path):
    settings, state = own().to_guided_diffusion()
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    unet = fd.UNet.from_guided_diffusion(tmp_path / "model.safetensors", settings)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert equal(unet.to_guided_diffusion()[1], {name: tensor.float() for name, tensor in state.items()})


def test_an_imported_network_trains_and_prepares():
    unet = fd.UNet.from_guided_diffusion(*reversed(own().to_guided_diffusion()))
    x, t = drawn(2, 3, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        assert far(unet.prepared()(x, t), unet(x, t)) < 1e-5
    unet(x, t).sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# ---- files --------------------------------------------------------------------------------------


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that attention had in diffusers before 0.15, and matrices as convolutions."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(?<=\.)(to_q|to_k|to_v|to_out\.0)(?=\.)")
    return {
        pattern.sub(lambda m: new[m[0]], k): v[..., None, None] if "attentions" in k and v.ndim == 2 else v
        for k, v in state.items()
    }


def write_plain(folder: Path, state: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")


def write_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "diffusion_pytorch_model.bin")


def write_old(folder: Path, state: dict[str, Tensor]) -> None:
    write_bin(folder, old_names(state))


def write_shards(folder: Path, state: dict[str, Tensor]) -> None:
    places = {name: f"diffusion_pytorch_model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        safetensors.torch.save_file({k: v for k, v in state.items() if places[k] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("write", [write_plain, write_bin, write_old, write_shards])
@pytest.mark.parametrize("place", ["", "unet", "else/where"])
def test_directories_of_diffusers(write, place, tmp_path):
    first = own(num_classes=3)
    settings, state = first.to_diffusers(flip_sin_to_cos=False)
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0", **settings})
    )
    write(folder, state)
    if place == "unet":
        (tmp_path / "model_index.json").write_text("{}")
    if place == "":
        (tmp_path / "model_index.json").write_text("{}")  # as the oldest pipelines, all in one directory
    subfolder = {"subfolder": place} if place == "else/where" else {}
    unet = fd.UNet.from_diffusers(str(tmp_path), **subfolder)
    assert equal(unet.state_dict(), first.state_dict())


def test_diffusers_reads_what_is_saved(unet_2d, tmp_path):
    ours = own(num_classes=3, scale_shift=True, resblock_updown=True, num_head_channels=8)
    ours.save_diffusers(tmp_path / "new" / "unet")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["unet"]
    theirs = unet_2d.from_pretrained(tmp_path / "new" / "unet")
    x, t, y = drawn(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([3, 0])
    with torch.no_grad():
        assert far(ours(x, t, y), theirs(x, t, y).sample) < 1e-5
    again = fd.UNet.from_diffusers(tmp_path / "new" / "unet")
    assert equal(again.state_dict(), ours.state_dict())


def test_from_pretrained_and_save_pretrained(unet_2d, tmp_path):
    theirs = make(unet_2d, DIFFUSERS["adm"])
    for options in ({}, {"safe_serialization": False}, {"max_shard_size": "20KB"}):
        folder = tmp_path / f"{len(options)}{next(iter(options), '')}"
        theirs.save_pretrained(folder, **options)
        assert equal(fd.UNet.from_diffusers(folder).to_diffusers()[1], theirs.state_dict())


def test_saving_is_whole_or_nothing(tmp_path, monkeypatch):
    unet = own()
    unet.save_diffusers(tmp_path / "unet")
    before = {p.name: p.read_bytes() for p in (tmp_path / "unet").iterdir()}
    with pytest.raises(fd.InputError, match="already exists"):
        own(num_classes=2).save_diffusers(tmp_path / "unet")
    assert {p.name: p.read_bytes() for p in (tmp_path / "unet").iterdir()} == before

    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr("fastdiff._io.write", full)
    with pytest.raises(OSError, match="no space"):
        unet.save_diffusers(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["unet"]
