"""Weights and settings of peers that do not fit: one line that names all of it, nothing run, nothing half-made."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights_tools import DOWN, FLAGS, Config, arguments, blocks, own, peer

import fastdiff as fd

pytestmark = pytest.mark.usefixtures("one_thread")


def refused(call: Callable[[], Any], *words: str) -> None:
    """One line that names each of ``words``."""
    with pytest.raises(fd.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


class Live:
    """What a live network of diffusers shows."""

    def __init__(self, config: Config, state: dict[str, Tensor] | None = None) -> None:
        self.config, self._state = config, state or {}

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def test_all_settings_that_do_not_fit_are_named():
    config = peer(
        "paa",
        (8, 16, 24),
        act_fn="gelu",
        center_input_sample=True,
        time_embedding_type="fourier",
        freq_shift=2,
        mid_block_type=None,
        mid_block_scale_factor=1.4,
        downsample_padding=2,
        downsample_type="fir",
        class_embed_type="timestep",
        resnet_time_scale_shift="ada_group",
        attn_norm_num_groups=2,
        attention_head_dim=5,
        dropout="much",
        cross_attention_dim=64,
    )
    config["up_block_types"][0] = "UpBlock2D"
    names = ("act_fn", "center_input_sample", "time_embedding_type", "freq_shift", "mid_block_type", "downsample_type")
    more = ("mid_block_scale_factor=1.4 must be 1", "downsample_padding=2 must be 1 or 0", "class_embed_type")
    together = ("attention or none at levels [2]", "attention_head_dim=5 must divide the widths [16, 24]")
    last = ("attn_norm_num_groups=2", "norm_num_groups=4", "dropout='much'", "cross_attention_dim is not known")
    refused(lambda: fd.UNet.from_diffusers(Live(config)), *names, *more, *together, *last, "ada_group")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]}, "down_block_types SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types [2, 2, 1]"),
        ({**blocks("rp"), **blocks("pa"), "down_block_types": [DOWN[2], DOWN[1]]}, "conv resnet one up_block_types"),
        ({**blocks("aa"), "downsample_type": "resnet"}, "conv resnet one downsample_type"),
        ({"norm_num_groups": 16}, "norm_num_groups=16 [8]"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"block_out_channels": "8,16"}, "block_out_channels"),
        ({"block_out_channels": [8, -16]}, "block_out_channels"),
        ({"sample_size": "large"}, "sample_size"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"in_channels": True}, "in_channels=True"),
        ({"dropout": 1.5}, "dropout"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel UNet2DModel"),
    ],
)
def test_a_setting_of_diffusers_that_does_not_fit(change, words):
    refused(lambda: fd.UNet.from_diffusers(Live({**peer("pa", (8, 16)), **change})), *words.split())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dims": 3}, "dims=3"),
        ({"num_heads": 4, "num_heads_upsample": 2}, "num_heads_upsample=2 num_heads=4"),
        ({"model_channels": "many"}, "model_channels='many'"),
        ({"image_size": None, "num_classes": -1, "width": 3}, "image_size num_classes=-1 width known"),
        ({"attention_resolutions": "16,8"}, "attention_resolutions"),
        ({"channel_mult": [1, 0]}, "channel_mult"),
        ({"channel_mult": ""}, "channel_mult"),
        ({"model_channels": 48, "channel_mult": [1]}, "48 32"),
        ({"learn_sigma": True}, "learn_sigma"),
    ],
)
def test_arguments_of_guided_diffusion_that_do_not_fit(change, words):
    refused(lambda: fd.UNet.from_guided_diffusion({}, {**arguments(), **change}), *words.split())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 100}, "channel_mult 512, 256, 128, 64"),
        ({"large_size": 128}, "channel_mult 512, 256, 64"),
        ({"attention_resolutions": "16;8"}, "attention_resolutions"),
        ({"attention_resolutions": "0"}, "attention_resolutions"),
        ({"channel_mult": "1,two"}, "channel_mult"),
        ({"channel_mult": "nan"}, "channel_mult"),
        ({"batch_size": 4, "model_path": "x"}, "batch_size model_path"),
    ],
)
def test_flags_of_guided_diffusion_that_do_not_fit(change, words):
    refused(lambda: fd.UNet.from_guided_diffusion({}, {**FLAGS, **change}), *words.split())


def damaged(state: dict[str, Tensor], bias: str) -> dict[str, Tensor]:
    name = next(iter(state))
    changed = {k: v for k, v in state.items() if k != name}
    return {**changed, bias: state[bias][:-1], "more.weight": torch.ones(2)}


def test_tensors_that_do_not_fit_are_named(tmp_path):
    settings, state = own().to_guided_diffusion()
    first = next(iter(state))
    bad = damaged(state, "out.2.bias")
    words = (f"1 missing: {first}", "1 not expected: more.weight", "1 of another shape: out.2.bias [2] instead of [3]")
    refused(lambda: fd.UNet.from_guided_diffusion(bad, settings), *words)
    settings, state = own().to_diffusers()
    first = next(iter(state))
    bad = damaged(state, "conv_out.bias")
    words = (f"1 missing: {first}", "1 not expected: more.weight", "1 of another shape: conv_out.bias [2]")
    refused(lambda: fd.UNet.from_diffusers(Live(settings, bad)), *words)
    refused(lambda: fd.UNet.from_diffusers(Live(settings, {})), f"{len(state)} missing", f"{len(state) - 10} more")
    whole = {**state, "conv_out.bias": torch.ones(3, dtype=torch.int8)}
    refused(lambda: fd.UNet.from_diffusers(Live(settings, whole)), "1 not floating: conv_out.bias")
    wide = {**state, "conv_out.weight": state["conv_out.weight"].transpose(0, 1)}
    refused(lambda: fd.UNet.from_diffusers(Live(settings, wide)), "conv_out.weight [32, 3, 3, 3] instead of [3, 32")


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (open, (str(self.canary), "w"))


def test_code_in_a_pickle_is_never_run(tmp_path):
    settings, _ = own().to_guided_diffusion()
    for path, write in [(tmp_path / "a.pt", torch.save), (tmp_path / "b.pt", _pickle)]:
        write({"input_blocks.0.0.weight": Payload(tmp_path / "canary")}, path)
        refused(lambda path=path: fd.UNet.from_guided_diffusion(path, settings), str(path), "never run")
    folder = tmp_path / "unet"
    own().save_diffusers(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Payload(tmp_path / "canary"), folder / "diffusion_pytorch_model.bin")
    refused(lambda: fd.UNet.from_diffusers(folder), "never run")
    assert not (tmp_path / "canary").exists()


def _pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def test_files_that_cannot_be_read(tmp_path):
    settings, state = own().to_guided_diffusion()
    refused(lambda: fd.UNet.from_diffusers(tmp_path / "nothing"), "nothing is not a directory")
    refused(lambda: fd.UNet.from_diffusers("google/ddpm-cifar10-32"), "is not a directory")
    refused(lambda: fd.UNet.from_diffusers(3), "expected a path, got int")
    refused(lambda: fd.UNet.from_diffusers(tmp_path, subfolder=3), "expected a path, got int")
    refused(lambda: fd.UNet.from_diffusers(tmp_path), "config.json")
    (tmp_path / "config.json").write_text("[1]")
    refused(lambda: fd.UNet.from_diffusers(tmp_path), "must hold an object")
    (tmp_path / "config.json").write_text(json.dumps(own().to_diffusers()[0]))
    refused(lambda: fd.UNet.from_diffusers(tmp_path), "has no diffusion_pytorch_model.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    refused(lambda: fd.UNet.from_diffusers(tmp_path), "weight_map")
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    refused(lambda: fd.UNet.from_diffusers(tmp_path), "b.safetensors does not exist")
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    refused(lambda: fd.UNet.from_diffusers(tmp_path), "b.safetensors cannot be read")
    for name, content in {"empty.pt": b"", "cut.pt": b"PK\x03\x04", "text.pt": b"hello world, no pickle"}.items():
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: fd.UNet.from_guided_diffusion(tmp_path / name, settings), name, "cannot be read")
    torch.save({"model": state, "step": 3}, tmp_path / "nested.pt")
    refused(lambda: fd.UNet.from_guided_diffusion(tmp_path / "nested.pt", settings), "'model' is dict", "'step' is int")
    refused(lambda: fd.UNet.from_guided_diffusion(state, tmp_path / "no.json"), "no.json cannot be read as JSON")
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    refused(lambda: fd.UNet.from_guided_diffusion(state, tmp_path / "deep.json"), "deep.json cannot be read as JSON")
    torch.save({**state, 3: torch.ones(1)}, tmp_path / "numbered.pt")
    refused(lambda: fd.UNet.from_guided_diffusion(tmp_path / "numbered.pt", settings), "3 is Tensor")


def test_what_has_no_values_is_refused():
    unet = own()
    settings, state = unet.to_guided_diffusion()
    name = "out.2.weight"
    for tensor in (state[name].to("meta"), state[name].to_sparse()):
        refused(lambda tensor=tensor: fd.UNet.from_guided_diffusion({**state, name: tensor}, settings), name, "values")
    with torch.device("meta"):
        hollow = own()
    refused(hollow.to_diffusers, "meta")
    refused(hollow.to_guided_diffusion, "meta")
    refused(lambda: fd.UNet.from_diffusers(Live(unet.to_diffusers()[0], hollow.state_dict())), "missing")
    refused(lambda: fd.UNet.from_diffusers(Live(None)), "has no configuration")
    refused(lambda: fd.UNet.from_diffusers(Live(unet.to_diffusers()[0], {"a": 3})), "'a' is int")
    huge = {**unet.to_diffusers()[0], "block_out_channels": [2**40, 2**40]}
    refused(lambda: fd.UNet.from_diffusers(Live(huge)), "no network can be that large")


def test_networks_that_no_peer_has():
    odd = own(norm_groups=8, norm_eps=1e-6, frequency_shift=1, middle_attention_norm=False, downsample_padding=0)
    words = (
        "norm_groups=8 must be 32",
        "norm_eps",
        "frequency_shift=1",
        "middle_attention_norm",
        "downsample_padding=0",
    )
    refused(odd.to_guided_diffusion, *words)
    refused(own(middle_attention=False, embedding_channels=64).to_guided_diffusion, "middle_attention", "64 must be")
    refused(odd.to_diffusers, "middle_attention_norm must be True without scale_shift")
    refused(own(channel_mult=(2, 1)).to_diffusers, "channel_mult must begin with 1")
    bad = own(conv_resample=False, num_heads=4, attention_resolutions=(8, 4))
    refused(bad.to_diffusers, "conv_resample must be True", "num_heads=4", "[8, 16]")
    refused(lambda: bad.save_diffusers(3), "expected a path")
