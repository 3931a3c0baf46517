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
from fastdiff.training.distributed import on_processes

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
