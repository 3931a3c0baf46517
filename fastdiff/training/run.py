"""A trained run, ready to sample from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff import _io
from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError
from fastdiff.models import UNet
from fastdiff.schedule import Schedule
from fastdiff.training import checkpoint
from fastdiff.training.data import GREY, Description
from fastdiff.training.presets import build_model
from fastdiff.training.trainer import load_weights


@dataclass(frozen=True)
class Run:
    """The averaged model of a checkpoint, in evaluation mode, with its process and what its data looked like.

    Attributes:
        data: what the training data looked like, and the way back to its units.
        config: the whole configuration of the run.
    """

    model: nn.Module
    diffusion: Diffusion
    data: Description
    config: dict[str, Any]
    step: int


def load_run(path: Path | str, *, device: torch.device | str = "cpu") -> Run:
    """Load the newest whole checkpoint of a run directory, or the checkpoint at ``path``.

    Raises:
        InputError: nothing there, damaged, from a newer version, or a configuration that does not build.
    """
    saved = checkpoint.load(path)
    config = saved.json("config")
    try:
        process = config["diffusion"]
        diffusion = Diffusion(Schedule.from_config(process["schedule"]), process["prediction"], process["variance"])
        model, data = build_model(config["model"]), Description.from_json(config["data"])
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {saved.path}: config.json lacks {error}") from None
    load_weights(model, saved, "ema")
    return Run(model.eval().to(device), diffusion, data, config, saved.step)


def save_run(path: Path, unet: UNet, diffusion: Diffusion) -> None:
    """Write a new run directory of a network that was trained elsewhere, whole or not at all.

    Its data are images of the network's size and channels in [-1, 1]; classes have their numbers for names.

    Raises:
        InputError: the path exists.
    """
    shape, classes = (unet.in_channels, *2 * (unet.config["image_size"],)), range(unet.config["num_classes"] or 0)
    grey = unet.in_channels * (GREY,)
    config = {
        "data": Description("converted", shape, tuple(map(str, classes)), grey, grey).to_json(),
        "model": {"type": "unet", **unet.config},
        "diffusion": {
            "schedule": diffusion.schedule.config,
            "prediction": diffusion.prediction,
            "variance": diffusion.variance,
        },
    }
    with _io.new_directory(path) as run:
        checkpoint.save(run, 0, {"ema": unet.state_dict()}, {"config": config})
        _io.write(run / "config.json", _io.to_json(config))
