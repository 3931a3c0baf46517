"""What tests of the sampler share: a model that writes down how it is called, and samplers of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.noise import Stream
from fastdiff.solvers import SOLVERS

SAMPLING = [solver for solver in SOLVERS if solver != "ddim_inverse"]  # which starts from images
LABELS = {"y": torch.tensor([1.0, -1.0, 0.5, 0.25])}
NULL = {"y": 0.0}


class Writer:
    """The model out = x / 4 + 1 / 8 + y, the same for an element in any batch, that writes down how it is called."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append(SimpleNamespace(x=x.clone(), t=t, y=y, grad=torch.is_grad_enabled()))
        out = 0.25 * x + 0.125
        return out if y is None else out + y.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def make(model: Any = None, solver: str = "ddim", steps: Any = 8, prediction: str = "v_prediction", **options: Any):
    schedule = options.pop("schedule", None) or fd.Schedule.cosine(100)
    diffusion = fd.Diffusion(schedule, prediction, options.pop("variance_of", "fixed_small"))
    return fd.Sampler(model or Writer(), diffusion, solver, steps, **options)


def noise_of(shape: tuple[int, ...], row: int, **address: Any) -> Tensor:
    return fd.noise.normal(shape, step=row, stream=Stream.STEP, dtype=torch.float64, **address)


def classes_mlp() -> fd.MLP:
    mlp = fd.MLP(2, width=16, depth=1, num_classes=3).eval()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return mlp
