"""What the backward pass makes again instead of keeping (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import library


@contextmanager
def remade(value: Tensor, make: Callable[..., Tensor], *of: Tensor) -> Iterator[None]:
    """A block in which autograd, wherever it would keep ``value``, keeps that ``make(*of)`` gives the same again.

    Where somebody else decides what is kept (a compiler, torch.func, hooks of the caller's), that stays so.
    """
    if not value.requires_grad or not torch.is_grad_enabled() or _decided():
        yield
        return
    place, device, parts = _place(value), value.device.type, [part.detach() for part in of]
    versions = [part._version for part in parts]

    @torch.no_grad()
    def again() -> Tensor:
        if [part._version for part in parts] != versions:
            raise RuntimeError("what the gradient is computed from was changed in place after the forward pass")
        with torch.autocast(device, enabled=False):
            return make(*parts)

    def keep(kept: Tensor) -> Any:
        return again if _place(kept) == place else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, _give):
        yield


def _decided() -> bool:
    return (
        torch.compiler.is_compiling()
        or library.watched()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
    )


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride()


def _give(kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
