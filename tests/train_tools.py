"""What tests of training share: small data, a small network, runs on several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.training.data import Data, from_tensor
from fastdiff.training.distributed import on_processes, rank
from fastdiff.training.loader import Batch
from fastdiff.training.objective import Found, Objective
from fastdiff.training.trainer import Trainer

#: with dropout, so that there is a random generator to lose
TINY = {
    "type": "unet",
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "norm_groups": 4,
    "num_classes": 3,
    "dropout": 0.2,
}


def images(count: int = 24, classes: int = 3) -> Data:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return from_tensor("noise", x, torch.arange(count) % classes, [str(i) for i in range(classes)])


def cloud(count: int = 50) -> Data:
    return from_tensor("cloud", torch.randn(count, 2, generator=torch.Generator().manual_seed(5)))


def write_model(folder: Path, **settings: Any) -> str:
    """The path of a configuration file of a small network."""
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY, **settings}))
    return str(path)


def on(count: int, work: Callable[[Any], Any], argument: Any, timeout: float = 60.0) -> Any:
    """``work(argument)`` on processes; what the first one returns."""
    before = torch.get_num_threads()
    try:
        return on_processes(count, work, argument, timeout=timedelta(seconds=timeout))
    finally:
        torch.set_num_threads(before)  # of the first process, which is this one


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of tensors by name, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-12)) for name in a)


def spoil(trainer: Trainer, kind: str, step: int, whose: int, bad: float) -> None:
    """Make a loss, a gradient or the optimiser's state of one process bad at a step."""
    original, compute = trainer.train_step, Objective.__call__

    def train_step(i: int, batch: Batch, **how: Any) -> dict[str, Any]:
        if i != step or rank() != whose:
            return original(i, batch, **how)
        weight = next(iter(trainer.model.parameters()))
        if kind == "optimizer":
            trainer.optimizer.state[weight]["exp_avg"].fill_(bad)
        handles = [weight.register_hook(lambda gradient: gradient * bad)] if kind == "gradient" else []
        if kind == "loss":
            Objective.__call__ = lambda *a: Found({"loss": compute(*a).values["loss"] * bad})  # type: ignore[method-assign]
        try:
            return original(i, batch, **how)
        finally:
            Objective.__call__ = compute  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()

    trainer.train_step = train_step  # type: ignore[method-assign]
