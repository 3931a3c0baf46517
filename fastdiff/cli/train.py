"""``fastdiff train``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff import ops
from fastdiff.cli import figures
from fastdiff.cli.options import (
    BackendName,
    DataName,
    DeviceName,
    ImageSize,
    OutDir,
    choose_device,
    with_fields,
)
from fastdiff.errors import check
from fastdiff.training.data import load
from fastdiff.training.presets import model_config
from fastdiff.training.trainer import TrainConfig, Trainer


@with_fields(TrainConfig)
def train(
    given: dict[str, Any],
    data: DataName = "digits",
    image_size: ImageSize = None,
    out: OutDir = None,
    classifier: Annotated[
        bool, typer.Option("--classifier", help="train what reads noised images, to guide sampling and for metrics")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> None:
    """Train a model into a run directory, by default runs/DATA, or runs/DATA-classifier."""
    if classifier:
        given.setdefault("model", "classifier")
    run = out or Path("runs") / (data.replace(":", "-").replace("/", "-") + ("-classifier" if classifier else ""))
    place = choose_device(device)
    with ops.backend(backend):
        samples = load(data, image_size=image_size)
        if classifier:
            kind = model_config(given["model"], samples).get("type")
            check(kind == "classifier", f"--classifier trains no {kind}: leave out --model {given['model']}")
        trainer = Trainer(TrainConfig.by_model(samples, **given), samples, run, device=place, resume=resume)
        began = time.perf_counter()
        trainer.train()
    figures.loss_curve(run / "loss.png", trainer.losses())
    print(f"trained to step {trainer.step} in {time.perf_counter() - began:.1f} s: {run}")
