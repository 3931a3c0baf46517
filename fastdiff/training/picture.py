"""Pictures of samples while training goes on, by the average of the weights; every process draws its share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff import _io
from fastdiff.metrics.evaluation import share
from fastdiff.sampler import Sampler
from fastdiff.training.parallel import whole_of
from fastdiff.training.presets import build_model
from fastdiff.training.process import attach_schedule, detach_process

if TYPE_CHECKING:
    from fastdiff.training.trainer import Trainer

IMAGES, POINTS, STEPS = 64, 4096, 25
FOLDER = "pictures"
TILE = 64  # pixels that a small image is enlarged to, at least
CELLS = 128  # of a side of a histogram of points


@torch.no_grad()
def draw(trainer: Trainer) -> None:
    """Write ``pictures/step-XXXXXXXX.png``: the same noise and labels every time."""
    data, group = trainer.data, trainer.group
    count = POINTS if data.is_points else IMAGES
    ids = torch.tensor(share(count, group.rank, group.world), dtype=torch.int64)
    with torch.random.fork_rng([]):
        model = build_model(trainer.description["model"]).to(trainer.device).eval()
    process = trainer.description["diffusion"]
    attach_schedule(model, process["schedule"])
    average = next(iter(trainer.averages.values()))
    model.load_state_dict({name: whole_of(value) for name, value in average.tensors.items()})
    diffusion = detach_process(model, process)
    cond: dict[str, Any] = {}
    if getattr(model, "label", None) is not None:
        cond["y"] = (ids % len(data.classes)).to(trainer.device)
    clip = None if data.is_points else 1.0
    sampler = Sampler(model, diffusion, "dpmpp_2m", STEPS, clip=clip, graph=False)
    x = sampler((len(ids), *data.shape), seed=trainer.config.seed, sample=ids, **cond) if len(ids) else None
    parts = group.everyone(None if x is None else data.to_raw(x).cpu())
    if group.is_first:
        raw = torch.cat([part for part in parts if part is not None])
        path = trainer.run / FOLDER / f"step-{trainer.step:08d}.png"
        image_grid(path, histogram(raw) if data.is_points else raw, columns=8)


def histogram(points: Tensor) -> Tensor:
    """How many of ``[N, 2]`` lie where, the first coordinate to the right, dark where many do: ``[1, 1, H, W]``."""
    points = points[points.isfinite().all(1)].double()
    counts, _ = torch.histogramdd(points.flip(1), CELLS)
    shown = 255 * (1 - (counts / counts.max()).sqrt())
    return shown.flip(0).to(torch.uint8)[None, None]


def image_grid(path: Path, images: Tensor, columns: int = 10) -> None:
    """uint8 images ``[N, C, H, W]`` side by side."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mosaic(images, columns)).save(buffer, "png")
    _io.replace(path, buffer.getvalue())


def mosaic(images: Tensor, columns: int) -> Any:
    """``[N, C, H, W]`` uint8 to one array ``[H', W']`` or ``[H', W', 3]``, small images enlarged without blur."""
    from torchvision.utils import make_grid

    scale = max(1, -(-TILE // images.shape[-1]))
    large = F.interpolate(images.float(), scale_factor=float(scale), mode="nearest").byte()
    return to_array(make_grid(large, nrow=columns, padding=2, pad_value=255)[: images.shape[1]])


def to_array(image: Tensor) -> Any:
    """``[C, H, W]`` to ``[H, W]`` for one channel, else ``[H, W, 3]``."""
    return image[0].numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).numpy()
