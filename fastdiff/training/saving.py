"""When checkpoints are written: beside training, from copies of that moment; and what asks for one ahead of time."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.checks import is_finite
from fastdiff.training import checkpoint
from fastdiff.training.distributed import Group

Tensors = dict[str, dict[str, Tensor]]


class Saver:
    """Writes the checkpoints of a run, one at a time: the next one waits for the one before.

    Args:
        background: write in another thread, from copies that are made before :meth:`save` returns. What goes wrong
            there is raised by the next call.
        sharded: whether each process holds parts of the tensors, see :func:`checkpoint.save`.
        timeout: how long a process waits for the others to write theirs.
    """

    def __init__(
        self, run: Path, *, keep: int, background: bool, sharded: bool, timeout: timedelta | None = None
    ) -> None:
        self.run, self._keep, self._sharded = run, keep, sharded
        self._group = Group.of_all(apart=background, timeout=timeout)
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._writing: Future[None] | None = None
        self._copies: Tensors = {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: BaseException | TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def save(self, step: int, tensors: Tensors, values: dict[str, Any]) -> None:
        """Commit a checkpoint of these tensors as they are now."""
        self.wait()
        if self._thread is None:
            self._write(step, tensors, values)
            return
        self._copies = {name: _copied(named, self._copies.get(name, {})) for name, named in tensors.items()}
        self._writing = self._thread.submit(self._write, step, self._copies, values)

    @property
    def writing(self) -> bool:
        """Whether the last one is still being written."""
        return self._writing is not None and not self._writing.done()

    def look(self) -> None:
        """Raise what went wrong with the last one, if it is done."""
        if not self.writing:
            self.wait()

    def wait(self) -> None:
        """Until the last one is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: Tensors, values: dict[str, Any]) -> None:
        self._group.together(lambda: self._check(step, tensors))
        how: dict[str, Any] = {"keep": self._keep, "sharded": self._sharded}
        checkpoint.save(self.run, step, tensors, values, group=self._group, **how)

    def _check(self, step: int, tensors: Tensors) -> None:
        """Nothing that is not finite is ever saved."""
        for file, named in tensors.items():
            for name, tensor in named.items():
                if not is_finite(tensor):
                    what = f"{file} {name} holds NaN or infinite values at training step {step}, which is not saved"
                    raise InputError(f"{what}; {last_checkpoint(self.run)}")


def last_checkpoint(run: Path) -> str:
    """For messages."""
    kept = checkpoint.steps(run)
    return f"the last checkpoint is {kept[0]}" if kept else "no checkpoint was written"


def _copied(tensors: dict[str, Tensor], memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in the memory of those before where they fit."""
    copies = {}
    for name, tensor in tensors.items():
        old = memory.get(name)
        fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
        copies[name] = old if fits and old is not None else torch.empty_like(tensor, device="cpu")
        copies[name].copy_(tensor.detach())
    return copies


class Signals:
    """Notes SIGTERM and SIGUSR1, by which schedulers of jobs announce the end, instead of ending at once.

    Attributes:
        received: whether one has come.
    """

    ASKING = (signal.SIGTERM, signal.SIGUSR1)
    STATUS = 143  #: with which the process then ends

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in self.ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
