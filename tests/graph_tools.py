"""A stand-in for CUDA graphs on the CPU: what a row asks of PyTorch is written down once and then done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import graph

# What would wait for the device, or bring numbers to it from the host.
HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh")


class Tape(TorchDispatchMode):
    """Writes down operations, with the tensors they were given and gave; refuses those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """The same operations on the same memory, gradients too: nothing of Python or autograd runs again."""
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, results in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Device:
    """Stands for the GPU: counts what is captured and replayed, and can be told to fail."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.serves = True
        self.taped = True  #: whether rows are written down; otherwise they are run again, on the backend that is asked
        self.trouble: Callable[[], object] | None = None

    def capture(self, row: Callable[[], object], start: Callable[[], object], *_: object) -> Callable[[], object]:
        self.captures += 1
        for _ in range(2):
            start()
            row()
        if self.trouble is not None:
            self.trouble()
        if not self.taped:
            return self._counted(row)
        with Tape() as tape:
            row()
        return self._counted(tape.replay)

    def _counted(self, run: Callable[[], object]) -> Callable[[], object]:
        def replay() -> None:
            self.replays += 1
            run()

        return replay


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The CPU as a device that captures."""
    made = Device()
    monkeypatch.setattr(graph, "_of", WeakKeyDictionary())
    monkeypatch.setattr(graph, "serves", lambda device: made.serves)
    monkeypatch.setattr(graph, "capture", made.capture)
    monkeypatch.setattr(graph, "new_pool", lambda: None)
    return made
