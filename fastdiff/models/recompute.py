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
    if not value.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling() or library.watched():
        yield
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer = hooks[0] if hooks else None
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if forbidden or not (outer is None or isinstance(outer, _Keep)):
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_Keep(value, _Recipe(make, of), outer), _give):
        yield


class _Recipe:
    def __init__(self, make: Callable[..., Tensor], of: tuple[Tensor, ...]) -> None:
        self.make, self.of, self.versions = make, [part.detach() for part in of], [part._version for part in of]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if [part._version for part in self.of] != self.versions:
            raise RuntimeError("what the gradient is computed from was changed in place after the forward pass")
        return self.make(*self.of)


class _Keep:
    """A tensor stays itself, but for the one that has a recipe."""

    def __init__(self, value: Tensor, recipe: _Recipe, outer: _Keep | None) -> None:
        self.place, self.recipe, self.outer = _place(value), recipe, outer

    def __call__(self, kept: Tensor) -> Tensor | _Recipe:
        if _place(kept) == self.place:
            return self.recipe
        return kept if self.outer is None else self.outer(kept)


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride()


def _give(kept: Tensor | _Recipe) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
