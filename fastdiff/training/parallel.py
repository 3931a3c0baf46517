"""A network on several processes, by torch's own engines: DistributedDataParallel or FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastdiff.training.distributed import world


class Parallel:
    """Runs a network in all processes: after a backward pass each has the mean of their gradients.

    ``fsdp`` splits weights, and with them gradients, averages and the optimiser's state; a pass gathers the weights as
    a whole, since our blocks read each other's (the conditions of all are one product of matrices).

    Args:
        model: on its device; with ``fsdp`` its parameters become DTensors.
        kind: ``ddp`` or ``fsdp``; without a meaning for one process.
    """

    def __init__(self, model: nn.Module, kind: str, *, compiled: bool = False) -> None:
        self.sharded = world() > 1 and kind == "fsdp"
        network: Callable[..., Any] = model
        if self.sharded:
            _shard(model)
        elif world() > 1:
            network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._wrapped = network
        self.network: Callable[..., Any] = torch.compile(network) if compiled else network

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around a part of a step; gradients are exchanged in the last one alone."""
        if self.sharded:
            self._wrapped.set_requires_gradient_sync(last)  # type: ignore[attr-defined]
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            yield
            return
        with self._wrapped.no_sync():
            yield


def _shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no others
    kind = next(model.parameters()).device.type
    fully_shard(model, mesh=init_device_mesh(kind, (world(),)))


def is_split(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return isinstance(tensor, DTensor)


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """All of it, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(like: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor split as ``like`` is, in its memory format, dtype and device."""
    if isinstance(like, DTensor) and whole.shape == like.shape:
        whole = whole.to(like.device, like.dtype)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(whole) if whole.shape == like.shape else whole
