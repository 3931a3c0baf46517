"""Small networks and the settings of peers, for the tests of imported weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastdiff as fd
from fastdiff.models.diffusers import DOWN, UP

Config = dict[str, Any]
FLAGS = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "", "num_heads_upsample": -1}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random values everywhere, so that nothing hides behind the zeros and ones that a network starts with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
        start = parameter.detach().clone() if parameter.ndim == 1 else 0
        parameter.data.copy_(start + scale * torch.randn(parameter.shape, generator=generator))


def blocks(kinds: str) -> Config:
    """``p``lain, ``a``ttention, ``r``esidual blocks for changes of resolution; from the largest level."""
    chosen = ["par".index(kind) for kind in kinds]
    return {"down_block_types": [DOWN[i] for i in chosen], "up_block_types": [UP[i] for i in reversed(chosen)]}


def peer(kinds: str, widths: tuple[int, ...], **settings: Any) -> Config:
    return {
        "sample_size": 16,
        "block_out_channels": list(widths),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        **blocks(kinds),
        **settings,
    }


def arguments(**settings: Any) -> Config:
    return {
        "image_size": 8,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        **settings,
    }


def own(**settings: Any) -> fd.UNet:
    unet = fd.UNet(
        **{
            "image_size": 8,
            "model_channels": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),
            **settings,
        }
    )
    randomise(unet)
    return unet.eval()
