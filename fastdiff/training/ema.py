"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.errors import check

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Averaged weights: average <- d average + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d lets the average forget the initial weights early (as TensorFlow's moving average does).
    ``step`` comes from outside, so there is no counter to lose when training resumes.

    Args:
        model: its weights are copied now.
        decay: in [0, 1).

    Attributes:
        model: the averaged model, in evaluation mode, without gradients.
    """

    def __init__(self, model: M, decay: float) -> None:
        check(0 <= decay < 1, f"ema_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """d of the update after training step ``step``, from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: M, step: int) -> None:
        """Take in the weights after training step ``step``."""
        average: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(average, weights, 1 - self.decay_at(step))
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
