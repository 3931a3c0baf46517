"""Model configurations by name, fitted to a data set; and models from configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.errors import InputError, check, choose
from fastdiff.models import MLP, UNet
from fastdiff.training.data import Data

TYPES: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP}
PRESETS = ("auto", "mlp", "unet-small", "unet", "adm")


def model_config(name: str, data: Data, *, learned_variance: bool = False) -> dict[str, Any]:
    """The configuration of a model for ``data``: ``{"type": "unet" | "mlp", ...constructor arguments}``.

    Args:
        name: ``mlp`` for points; for images ``unet-small`` (about a million parameters, trains on a CPU), ``unet``
            (Ho et al. 2020, 35.7 million on CIFAR-10), ``adm`` (Dhariwal & Nichol 2021: AdaGN, residual
            up- and downsampling, more attention); ``auto`` is ``mlp`` or ``unet-small``; or the path of a JSON file
            with a whole configuration.

    Raises:
        InputError: an unknown name, a file that is not such a configuration, a model that does not fit the data.
    """
    if name.endswith(".json"):
        return _from_file(Path(name))
    choose("model", name, PRESETS)
    if name == "auto":
        name = "mlp" if data.is_points else "unet-small"
    check(
        (name == "mlp") == data.is_points,
        f"model {name} does not fit {data.name}, whose samples are {list(data.shape)}",
    )
    common = {"num_classes": len(data.classes) or None, "learned_variance": learned_variance}
    if name == "mlp":
        return {"type": "mlp", "dim": data.shape[0], **common}
    return {
        "type": "unet",
        "image_size": data.shape[1],
        "in_channels": data.shape[0],
        **common,
        **_unet(name, data.shape[1]),
    }


def build_model(config: dict[str, Any]) -> nn.Module:
    """The model a configuration describes.

    Raises:
        InputError: an unknown type, unknown or unfit arguments.
    """
    arguments = dict(config)
    kind = arguments.pop("type", None)
    choose("model type", kind, TYPES)
    try:
        return TYPES[str(kind)](**arguments)
    except TypeError as error:
        raise InputError(f"model {kind}: {error}") from None


def _unet(name: str, size: int) -> dict[str, Any]:
    levels = 1
    while levels < 4 and size % 2**levels == 0 and size >> levels >= 4:
        levels += 1
    if name == "unet-small":
        sizes = [size >> level for level in range(levels)]
        return {
            "model_channels": 32,
            "channel_mult": [1, 2, 2, 2][:levels],
            "attention_resolutions": sizes[-1:],
            "norm_groups": 8,
        }
    if name == "unet":
        attention = [size >> level for level in range(levels) if size >> level == 16] or [size >> levels - 1]
        return {
            "model_channels": 128,
            "channel_mult": [1, 2, 2, 2][:levels],
            "attention_resolutions": attention,
            "dropout": 0.1,
        }
    return {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4][:levels],
        "num_res_blocks": 3,
        "attention_resolutions": [s for s in (size >> level for level in range(levels)) if s <= 32],
        "num_head_channels": 64,
        "dropout": 0.1,
        "scale_shift": True,
        "resblock_updown": True,
    }


def _from_file(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model {path} cannot be read as JSON: {error}") from None
    check(isinstance(config, dict), f"model {path} must hold an object with type and arguments")
    return dict(config)
