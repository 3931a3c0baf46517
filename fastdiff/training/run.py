"""A trained run, ready to sample from, or to read images with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import _io
from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError, check
from fastdiff.metrics.features import Features, check_images
from fastdiff.models import Classifier, UNet
from fastdiff.training import checkpoint, posthoc
from fastdiff.training.data import GREY, Description
from fastdiff.training.ema import files_of, sigma_rel_in
from fastdiff.training.presets import build_model
from fastdiff.training.process import attach_schedule, detach_process


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


@dataclass(frozen=True)
class ClassifierRun(Run):
    """The run of a classifier, whose ``model`` can guide samplers, and which is itself an extractor for metrics.

    Called with uint8 images ``[N, *data.shape]`` it gives their :class:`~fastdiff.metrics.features.Features` at t = 0:
    ``pool`` ``[N, D]`` and ``logits`` ``[N, classes]``, float32, on the model's device.

    Attributes:
        settings: what its features depend on; ``weights`` is the SHA-256 of the weights' file.

    Raises:
        InputError: images of another dtype, size or number of channels.
    """

    model: Classifier
    settings: dict[str, str]

    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        shape, need = list(self.data.shape), f"this classifier of {self.data.name} reads images"
        check(list(images.shape[1:]) == shape, f"{need} [N, {', '.join(map(str, shape))}], got {list(images.shape)}")
        x = self.data.scale(images.to(next(self.model.parameters()).device))
        with torch.no_grad():
            t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            pool, logits = self.model.read(*self.diffusion.model_input(x, t))
        return Features(pool, None, logits)


def load_run(path: Path | str, *, device: torch.device | str = "cpu", ema: str | None = None) -> Run:
    """Load the newest whole checkpoint of a run directory, or the checkpoint at ``path``.

    Args:
        ema: which average of weights; the first one of the run if left out. ``power:SIGMA_REL`` may be any, if the run
            has snapshots: it is made of them (:mod:`fastdiff.training.posthoc`).

    Raises:
        InputError: nothing there, damaged, from a newer version, a configuration that does not build, a classifier, no
            such average.
    """
    run = _load(checkpoint.load(path), device, ema)
    check(not isinstance(run.model, Classifier), f"{path} holds a classifier: give the run of a diffusion model")
    return run


def load_classifier(path: Path | str, *, device: torch.device | str = "cpu") -> ClassifierRun:
    """Load a run of ``fastdiff train --classifier``, as :func:`load_run` does.

    Raises:
        InputError: as :func:`load_run`; a run that is not of a classifier.
    """
    saved = checkpoint.load(path)
    run = _load(saved, device)
    fits = isinstance(run.model, Classifier)
    check(fits, f"{path} holds no classifier but a {type(run.model).__name__}: fastdiff train --classifier makes one")
    assert isinstance(run.model, Classifier)
    weights = hashlib.sha256(saved.files["ema.safetensors"]).hexdigest()
    model = run.model.requires_grad_(False).prepared()
    settings = {"features": "classifier", "weights": weights, "resize": "none"}
    return ClassifierRun(model, run.diffusion, run.data, run.config, run.step, settings)


def _load(saved: checkpoint.Checkpoint, device: torch.device | str, ema: str | None = None) -> Run:
    config = saved.json("config")
    try:
        model, data = build_model(config["model"]), Description.from_json(config["data"])
        attach_schedule(model, config["diffusion"]["schedule"])
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {saved.path}: config.json lacks {error}") from None
    checkpoint.load_tensors(model, _average(saved, config, ema), saved.path)
    diffusion = detach_process(model, config["diffusion"])
    return Run(model.eval().to(device), diffusion, data, config, saved.step)


def _average(saved: checkpoint.Checkpoint, config: dict[str, Any], ema: str | None) -> dict[str, Tensor]:
    if ema is None:
        return saved.tensors("ema")
    kept = files_of(config["training"]["ema"]) if "training" in config else {}
    name = ema.replace(":", "-")
    if name in kept:
        return saved.tensors(kept[name])
    check(
        ema.startswith("power:"), f"{saved.path} holds no average {ema}, but {', '.join(kept) or 'one without a name'}"
    )
    found = posthoc.snapshots(saved.path.parent.parent)
    return posthoc.reconstruct(found, sigma_rel_in(ema), step=saved.step)


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
