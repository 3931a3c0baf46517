"""``fastdiff demo``: the main job from end to end, on real handwritten digits."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fastdiff import _io, figures, ops
from fastdiff.cli.options import BackendName, DeviceName, choose_device
from fastdiff.cli.sample import SampleConfig, draw, write_samples
from fastdiff.errors import check
from fastdiff.reproduce.studio import spread
from fastdiff.training import checkpoint
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Data, load
from fastdiff.training.run import load_run
from fastdiff.training.trainer import Trainer

TRAINING = TrainConfig(train_steps=400, save_every=400)
SAMPLING = SampleConfig(count=1000, steps=50, guidance_scale=1.25)


def demo(
    out: Annotated[Path, typer.Option("--out", help="directory for everything that is written")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="two runs with one seed give the same images on one machine")] = 0,
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> None:
    """Train a class-conditional U-Net on digits, sample it with guidance, judge the samples, leave pictures."""
    figures.require_matplotlib()
    data, place = load("digits"), choose_device(device)
    training, sampling = replace(TRAINING, seed=seed), replace(SAMPLING, seed=seed)
    with ops.backend(backend):
        _make_way(out)
        trainer = Trainer(training, data, out, device=place)
        train_seconds = _timed(trainer.train)[0]
        run = load_run(out, device=place)
        sample_seconds, drawn = _timed(lambda: draw(run, sampling, frames=26))
    assert drawn is not None
    assert drawn.labels is not None
    write_samples(out, drawn.samples, drawn.labels)
    report = {
        **judge(drawn.samples, drawn.labels, data),
        "train_seconds": round(train_seconds, 2),
        "sample_seconds": round(sample_seconds, 2),
        "images_per_second": round(sampling.count / sample_seconds, 2),
        "settings": {
            "training": asdict(trainer.config),
            "sampling": asdict(sampling),
            "device": str(place),
            "backend": backend,
        },
    }
    _draw_pictures(out, trainer, drawn.samples, drawn.labels, drawn.trajectory)
    _io.replace_json(out / "report.json", report)
    print(
        f"{report['class_accuracy']:.1%} of {sampling.count} generated digits are read as the class asked for "
        f"(real held-out digits: {report['real_class_accuracy']:.1%});\n"
        f"diversity within a class is {report['intra_class_diversity']:.2f} of real data's; "
        f"trained in {train_seconds:.0f} s, {report['images_per_second']:.0f} images/s; see {out}/"
    )


def judge(samples: Tensor, labels: Tensor, data: Data) -> dict[str, float]:
    """Read generated digits with a classifier that has only seen real ones.

    Returns:
        class_accuracy: share of samples that a support vector machine reads as the class asked for;
        real_class_accuracy: the same on real digits it was not trained on;
        intra_class_diversity: mean distance between images of one class, as a multiple of real data's.
    """
    from sklearn.svm import SVC

    pixels, real_labels = data.batch(torch.arange(len(data)))
    assert real_labels is not None
    real = data.to_raw(pixels).flatten(1).float()
    held_out = torch.arange(len(real)) % 5 == 0
    reader = SVC(gamma="scale").fit(real[~held_out].numpy(), real_labels[~held_out].numpy())
    fake = samples.flatten(1).float()
    return {
        "class_accuracy": float(reader.score(fake.numpy(), labels.numpy())),
        "real_class_accuracy": float(reader.score(real[held_out].numpy(), real_labels[held_out].numpy())),
        "intra_class_diversity": spread(fake, labels) / spread(real, real_labels),
    }


def _draw_pictures(out: Path, trainer: Trainer, samples: Tensor, labels: Tensor, trajectory: list[Tensor]) -> None:
    classes = trainer.data.classes
    rows = [(name, samples[labels == label][:10]) for label, name in enumerate(classes)]
    figures.labelled_grid(out / "samples.png", rows, "generated digits, by the class asked for")
    figures.animation(out / "denoising.gif", [frame[:100] for frame in trajectory])
    real = trainer.data.batch(torch.arange(6))[0]
    figures.noising_strip(out / "forward.png", trainer.diffusion, real, trainer.data.to_raw, "forward process")
    figures.loss_curve(out / "loss.png", trainer.losses())


def _make_way(out: Path) -> None:
    """Remove an earlier demo from ``out``, which its seed can make again; any other run there is an error."""
    settings = out / "config.json"
    if not settings.exists():
        return
    try:
        earlier = {**json.loads(settings.read_text(encoding="utf-8"))["training"], "seed": TRAINING.seed}
    except (ValueError, KeyError, TypeError):
        earlier = {}
    check(earlier == asdict(TRAINING), f"{out} holds another run: choose another --out")
    shutil.rmtree(out / checkpoint.FOLDER, ignore_errors=True)
    for name in ("log.jsonl", "config.json"):
        (out / name).unlink(missing_ok=True)


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
