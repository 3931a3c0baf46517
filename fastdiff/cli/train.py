"""``fastdiff train``."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdiff import figures, ops
from fastdiff.cli.options import (
    BackendName,
    DataName,
    DeviceName,
    ImageSize,
    OutDir,
    choose_device,
    with_fields,
)
from fastdiff.errors import check, choose
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.data import load
from fastdiff.training.distributed import first_alone, on_processes, placed, rank, together
from fastdiff.training.presets import model_config
from fastdiff.training.saving import Signals
from fastdiff.training.trainer import Trainer

RESUMES = ("no", "yes", "auto")


@dataclass(frozen=True)
class Request:
    """What each process is told."""

    given: dict[str, Any]
    operation: Operation
    data: str
    image_size: int | None
    run: Path
    classifier: bool
    resume: str
    device: torch.device
    backend: str


@with_fields(TrainConfig, Operation)
def train(
    given: dict[str, Any],
    data: DataName = "digits",
    image_size: ImageSize = None,
    out: OutDir = None,
    classifier: Annotated[
        bool, typer.Option("--classifier", help="train what reads noised images, to guide sampling and for metrics")
    ] = False,
    resume: Annotated[str, typer.Option(help="yes: continue the run in --out; auto: if there is one")] = "no",
    processes: Annotated[int, typer.Option(help="that share each batch; torchrun may start them instead")] = 1,
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> int:
    """Train a model into a run directory, by default runs/DATA, or runs/DATA-classifier.

    SIGTERM and SIGUSR1 save and end with status 143: --resume auto goes on from there.
    """
    choose("resume", resume, RESUMES)
    own = {field.name for field in fields(Operation)}
    operation = Operation(**{name: value for name, value in given.items() if name in own})
    settings = {name: value for name, value in given.items() if name not in own}
    if classifier:
        settings.setdefault("model", "classifier")
    run = out or Path("runs") / (data.replace(":", "-").replace("/", "-") + ("-classifier" if classifier else ""))
    place = choose_device(device)
    request = Request(settings, operation, data, image_size, run, classifier, resume, place, backend)
    patience = timedelta(seconds=operation.timeout)
    return on_processes(processes, _train, request, device=place, timeout=patience)


def _train(request: Request) -> int:
    """In each process: the exit status."""
    given, device = request.given, placed(request.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    corrupt = given.get("corrupt", TrainConfig.corrupt)
    with ops.backend(request.backend):
        data = first_alone(lambda: load(request.data, image_size=request.image_size, corrupt=corrupt))
        config = together(lambda: TrainConfig.by_model(data, **given))
        if request.classifier:
            kind = model_config(given["model"], data).get("type")
            check(kind == "classifier", f"--classifier trains no {kind}: leave out --model {given['model']}")
        resume: bool | str = {"no": False, "yes": True}.get(request.resume, request.resume)
        how: dict[str, Any] = {"resume": resume, "operation": request.operation}
        trainer = Trainer(config, data, request.run, device=device, **how)
        began = time.perf_counter()
        finished = trainer.train()
    if rank() == 0:
        figures.loss_curve(request.run / "loss.png", trainer.losses())
        done = "trained" if finished else "asked to end, saved"
        print(f"{done} to step {trainer.step} in {time.perf_counter() - began:.1f} s: {request.run}")
    return 0 if finished else Signals.STATUS
