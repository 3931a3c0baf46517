"""Model configurations by name, fitted to a data set; and models from configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastdiff import _io
from fastdiff.errors import InputError, check, choose
from fastdiff.models import MLP, Classifier, UNet
from fastdiff.training.data import LABELLED, Description

TYPES: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP, "classifier": Classifier}
PRESETS = ("auto", "mlp", "unet-tiny", "unet-small", "unet", "adm", "classifier")
#: training settings that suit a model, where they differ from TrainConfig's defaults; those of the papers for the large
RECIPES: dict[str, dict[str, Any]] = {
    "mlp": {"train_steps": 2500, "batch": 512, "learning_rate": 4e-3},
    "unet-tiny": {"learning_rate": 5e-3},
    "unet": {
        "train_steps": 800_000,
        "learning_rate": 2e-4,
        "warmup": 5000,
        "decay": "constant",
        "ema": "0.9999",
        "save_every": 10_000,
    },
    "adm": {
        "train_steps": 500_000,
        "batch": 256,
        "learning_rate": 1e-4,
        "warmup": 0,
        "decay": "constant",
        "ema": "0.9999",
        "save_every": 10_000,
    },
    "classifier": {"train_steps": 400},
}


def model_config(name: str, data: Description, *, learned_variance: bool = False) -> dict[str, Any]:
    """The configuration of a model for ``data``: ``{"type": one of TYPES, ...constructor arguments}``.

    Args:
        name: ``mlp`` for points; for images ``unet-small`` (about a million parameters, trains on a CPU), ``unet-tiny``
            (half its channels), ``unet`` (Ho et al. 2020, 35.7 million on CIFAR-10), ``adm`` (Dhariwal & Nichol 2021:
            AdaGN, residual up- and downsampling, more attention); ``auto`` is ``mlp`` or ``unet-small``;
            ``classifier``, the way down of ``unet-small``, for images with labels; or the path of a JSON file with a
            whole configuration.

    Raises:
        InputError: an unknown name, a file that is not such a configuration, a model that does not fit the data.
    """
    if name.endswith(".json"):
        config = _io.read_json(Path(name))
        if config.get("type") == "classifier":
            _check_classes(data, config.get("num_classes"))
        return config
    name = preset(name, data)
    if name == "classifier":
        _check_classes(data, len(data.classes))
    fits = (name == "mlp") == data.is_points
    check(fits, f"model {name} does not fit {data.name}, whose samples are {list(data.shape)}")
    classes = {"num_classes": len(data.classes) or None}
    if name == "mlp":
        return {"type": "mlp", "dim": data.shape[0], **classes, "learned_variance": learned_variance}
    channels, size = data.shape[:2]
    images = {"image_size": size, "in_channels": channels, **classes}
    if name == "classifier":
        return {"type": "classifier", **images, **_unet("unet-small", size), "num_head_channels": 32}
    return {"type": "unet", **images, "learned_variance": learned_variance, **_unet(name, size)}


def _check_classes(data: Description, classes: Any) -> None:
    check(data.classes, f"data set {data.name} has no labels, which a classifier needs: {LABELLED} have")
    count = len(data.classes)
    check(classes == count, f"the classifier's num_classes={classes!r} must be {count}, the classes of {data.name}")


def preset(name: str, data: Description) -> str:
    """The preset that ``name`` stands for, which is its own unless it is ``auto``."""
    if name == "auto":
        return "mlp" if data.is_points else "unet-small"
    if not name.endswith(".json"):
        choose("model", name, PRESETS)
    return name


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
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"model {kind}: {error}") from None


def _unet(name: str, size: int) -> dict[str, Any]:
    levels = 1
    while levels < 4 and size % 2**levels == 0 and size >> levels >= 4:
        levels += 1
    if name in ("unet-tiny", "unet-small"):
        sizes = [size >> level for level in range(levels)]
        return {
            "model_channels": 16 if name == "unet-tiny" else 32,
            "channel_mult": [1, 2, 2, 2][:levels],
            "num_res_blocks": 1,
            "attention_resolutions": sizes[-1:],
            "norm_groups": 8,
            "scale_shift": True,
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
