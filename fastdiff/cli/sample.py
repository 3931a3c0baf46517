"""``fastdiff sample``."""

from __future__ import annotations

import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from fastdiff import _io, figures, noise, ops
from fastdiff._progress import progress
from fastdiff.cli.drawing import Drawing, is_conditional
from fastdiff.cli.options import (
    BackendName,
    CheckpointPath,
    DeviceName,
    OutDir,
    choose_device,
    with_fields,
)
from fastdiff.errors import InputError, check, choose
from fastdiff.metrics.evaluation import share
from fastdiff.schedule import SPACINGS, Schedule
from fastdiff.solvers import SOLVERS
from fastdiff.training.checkpoint import FOLDER
from fastdiff.training.config import PRECISIONS, option
from fastdiff.training.data import points
from fastdiff.training.distributed import Group, on_processes, placed, together
from fastdiff.training.picture import image_grid
from fastdiff.training.run import ClassifierRun, Run, load_classifier, load_run

#: defaults for points, which are small and come in clouds
FROM_NOISE = [name for name in SOLVERS if name != "ddim_inverse"]
POINTS = {"count": 5000, "batch": 5000, "steps": 100, "solver": "dpmpp_2m"}


@dataclass(frozen=True)
class SampleConfig:
    """What determines a set of samples, given a checkpoint. Each field's meaning is its help text."""

    count: int = option(100, "how many samples; of points 5000")
    labels: str = option("", "class labels, for instance 3 or 0,1,2, repeated in turn; default: all classes in turn")
    solver: str = option("ddim", f"{', '.join(FROM_NOISE)}; for points dpmpp_2m")
    steps: int = option(50, "sampling steps; for points 100")
    spacing: str = option("trailing", f"of the timesteps: {', '.join(SPACINGS)}")
    guidance_scale: float = option(1.0, "classifier-free guidance: 1 is the conditional model alone")
    classifier_scale: float = option(1.0, "guidance by --classifier: 0 is the model alone")
    seed: int = option(0, "sample k of a seed starts from the same noise in any batch")
    batch: int = option(250, "samples that go through the network at once")
    precision: str = option("fp32", "of the network: fp32, bf16")

    def __post_init__(self) -> None:
        check(self.count >= 1, f"count must be at least 1, got {self.count}")
        check(self.batch >= 1, f"batch must be at least 1, got {self.batch}")
        check(math.isfinite(self.classifier_scale), f"classifier_scale must be finite, got {self.classifier_scale}")
        choose("precision", self.precision, PRECISIONS)
        noise.check_seed(self.seed)

    def label_tensor(self, classes: int) -> Tensor | None:
        """The label of each sample, int64 ``[count]``, or None for a model without classes."""
        if not classes:
            check(not self.labels, "--labels: this model is not class-conditional")
            return None
        try:
            chosen = [int(part) for part in self.labels.split(",")] if self.labels else list(range(classes))
        except ValueError:
            raise InputError(f"--labels must be whole numbers with commas, got {self.labels!r}") from None
        check(
            all(0 <= label < classes for label in chosen), f"--labels must lie in 0...{classes - 1}, got {self.labels}"
        )
        return torch.tensor(chosen).repeat(-(-self.count // len(chosen)))[: self.count]


@dataclass(frozen=True)
class Request:
    """What each process is told."""

    given: dict[str, Any]
    checkpoint: Path
    classifier: Path | None
    ema: str | None
    place: Path
    device: torch.device
    backend: str


@with_fields(SampleConfig)
def sample(
    given: dict[str, Any],
    checkpoint: CheckpointPath = Path("runs/demo"),
    classifier: Annotated[
        Path | None, typer.Option(help="a run of fastdiff train --classifier, to guide by in place of --guidance-scale")
    ] = None,
    ema: Annotated[
        str | None, typer.Option(help="average of weights: a decay, or power:SIGMA_REL; default the first")
    ] = None,
    out: OutDir = None,
    processes: Annotated[int, typer.Option(help="that share the samples; torchrun may start them instead")] = 1,
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> None:
    """Sample from a trained run: samples.npz and a picture, by default into the run's samples/."""
    place = out or run_directory(checkpoint) / "samples"
    request = Request(given, checkpoint, classifier, ema, place, choose_device(device), backend)
    on_processes(processes, _sample, request)


def _sample(request: Request) -> None:
    """In each process; the first one writes."""
    run, config, guide = together(lambda: _opened(request))
    began = time.perf_counter()
    with ops.backend(request.backend):
        drawn = draw(run, config, guide)
    if drawn is not None:
        _write(request, run, config, drawn, time.perf_counter() - began)


def _opened(request: Request) -> tuple[Run, SampleConfig, ClassifierRun | None]:
    run = load_run(request.checkpoint, device=placed(request.device), ema=request.ema)
    guide = _guide(run, request.classifier, request.given)
    if run.data.is_points:
        figures.require_matplotlib()
    return run, SampleConfig(**({**POINTS, **request.given} if run.data.is_points else request.given)), guide


def _write(request: Request, run: Run, config: SampleConfig, drawn: Drawn, seconds: float) -> None:
    place = request.place
    write_samples(place, drawn.samples, drawn.labels)
    if drawn.samples.ndim == 2:
        _draw_points(place / "samples.png", run, drawn)
    else:
        image_grid(place / "samples.png", drawn.samples[:100])
    settings = {
        **asdict(config),
        "checkpoint": str(request.checkpoint),
        "classifier": None if request.classifier is None else str(request.classifier),
        "ema": request.ema,
        "training_step": run.step,
        "backend": request.backend,
    }
    _io.replace_json(
        place / "samples.json", {"seconds": seconds, "samples_per_second": config.count / seconds, "settings": settings}
    )
    print(f"{config.count} samples in {seconds:.1f} s: {place}")


def _guide(run: Run, path: Path | None, given: dict[str, Any]) -> ClassifierRun | None:
    """The classifier to guide ``run`` by.

    Raises:
        InputError: options that do not apply, a classifier that was trained for other images, levels or classes.
    """
    if path is None:
        check("classifier_scale" not in given, "--classifier-scale needs --classifier")
        return None
    check("guidance_scale" not in given, "--guidance-scale is not that of --classifier, which is --classifier-scale")
    guide = load_classifier(path, device=next(run.model.parameters()).device)
    its, mine = guide.data, run.data
    reads = f"--classifier {path} reads"
    check(its.shape == mine.shape, f"{reads} samples of {list(its.shape)}, the model makes {list(mine.shape)}")
    levels = guide.diffusion.schedule, run.diffusion.schedule
    check(_equal(*levels), f"{reads} the noise levels of {levels[0]}, the model has those of {levels[1]}")
    numbers = tuple(map(str, range(len(its.classes))))  # of a model that was converted
    check(
        not is_conditional(run) or mine.classes in (its.classes, numbers),
        f"{reads} the classes of {its.name}, the model has those of {mine.name}",
    )
    return guide


def _equal(a: Schedule, b: Schedule) -> bool:
    tables = [(getattr(a, name).double(), getattr(b, name).double()) for name in ("alpha", "sigma", "c_in", "c_noise")]
    return all(mine.shape == its.shape and torch.allclose(mine, its) for mine, its in tables)


def run_directory(path: Path) -> Path:
    """The run that a checkpoint, or a file in one, belongs to."""
    path = path if path.is_dir() else path.parent
    return path.parent.parent if path.parent.name == FOLDER else path


@dataclass(frozen=True)
class Drawn:
    """Samples in data units, uint8 images ``[N, C, H, W]`` or float points ``[N, D]``; their labels; and the
    states of the first batch on the way, in data units."""

    samples: Tensor
    labels: Tensor | None
    trajectory: list[Tensor]


def draw(run: Run, config: SampleConfig, guide: ClassifierRun | None = None, *, frames: int = 6) -> Drawn | None:
    """Draw ``config.count`` samples from a run, in batches, and keep about ``frames`` states of the first.

    Each process of ``torch.distributed`` draws its share; the first one gets all, the others None.

    Args:
        guide: the classifier to guide by, of the same images, noise levels and, if the model has any, classes.
    """
    group = Group.of_all()
    drawing = Drawing(run, config, guide)
    last = len(drawing.sampler.table) - 1
    moments = {round(i * last / (frames - 1)) for i in range(frames)}
    mine = torch.tensor(share(config.count, group.rank, group.world), dtype=torch.int64)
    batches = [ids for ids in mine.split(config.batch) if len(ids)]
    states = (state for ids in batches for state in drawing.states(ids))
    finished: list[Tensor] = []
    trajectory: list[Tensor] = []
    for state in progress(states, len(batches) * (last + 1), "sampling", enabled=group.is_first):
        if state.step in moments and len(trajectory) < len(moments):
            trajectory.append(drawing.to_raw(state.x))
        if state.step == last:
            finished.append(drawing.to_raw(state.x))
    parts = group.everyone(finished)
    whole = torch.cat([part for each in parts for part in each])
    return Drawn(whole, drawing.labels, trajectory) if group.is_first else None


def _draw_points(path: Path, run: Run, drawn: Drawn) -> None:
    fresh = run.data.scale(points(run.data.name, len(drawn.trajectory[0]), seed=1))
    figures.point_trajectories(path, run.diffusion, fresh, run.data.to_raw, drawn.trajectory)


def write_samples(place: Path, samples: Tensor, labels: Tensor | None) -> None:
    """``samples.npz``: ``arr_0`` uint8 NHWC images or float32 points, ``arr_1`` int64 labels where there are any."""
    array = samples.numpy() if samples.ndim == 2 else samples.permute(0, 2, 3, 1).contiguous().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, array, *([] if labels is None else [labels.numpy()]))
    _io.replace(place / "samples.npz", buffer.getvalue())
