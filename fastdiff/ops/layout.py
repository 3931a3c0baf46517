"""Memory formats: results are contiguous, or channels-last where their argument is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack as _levels

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(ndim: int) -> torch.memory_format:
    """The channels-last format of tensors of so many dimensions, contiguous where there is none."""
    return torch.contiguous_format if _mapped() else _CHANNELS_LAST.get(ndim, torch.contiguous_format)


def _mapped() -> bool:
    """Whether torch.func.vmap is at work, which knows contiguous tensors only."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in _levels())


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is contiguous or channels-last."""
    return x.is_contiguous() or x.is_contiguous(memory_format=channels_last(x.ndim))


def format_of(x: Tensor) -> torch.memory_format:
    """The format that results made of x have."""
    last = channels_last(x.ndim)
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def empty_like(x: Tensor) -> Tensor:
    """A result of x's shape, dtype, device and format."""
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=format_of(x))
