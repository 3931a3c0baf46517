"""What is written down of training: a line of JSON for each step, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from fastdiff import _io
from fastdiff.errors import InputError

FLUSH_EVERY = 100  # steps, and SECONDS at most
SECONDS = 10.0
NAME = "log.jsonl"


class Log:
    """The log of a run, ``log.jsonl``; only the first process of several has one.

    Args:
        start: the step at which training goes on: later lines are taken out.
        tensorboard: whether to write ``tensorboard/`` too.
    """

    def __init__(self, run: Path, start: int, *, tensorboard: bool = False) -> None:
        self.path = run / NAME
        self._rows: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        _io.replace(self.path, _lines([row for row in read(self.path) if row["step"] < start]))
        self._board = _board(run / "tensorboard", start) if tensorboard else None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._board:
            self._board.close()

    def add(self, row: dict[str, Any]) -> None:
        """Take up a step's line: ``step``, numbers, lists of numbers; None for what there is not."""
        self._rows.append({name: _json(value) for name, value in row.items()})
        if len(self._rows) >= FLUSH_EVERY or time.monotonic() - self._flushed > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until all lines are on disk."""
        _io.append(self.path, _lines(self._rows))
        if self._board:
            for row in self._rows:
                _show(self._board, dict(row))
        self._rows.clear()
        self._flushed = time.monotonic()


class Nothing:
    """The log of the other processes."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, row: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that a kill left unfinished.

    Raises:
        InputError: lines that are no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU's memory by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _show(board: Any, row: dict[str, Any]) -> None:
    step = row.pop("step")
    for name, value in row.items():
        for i, number in enumerate(value if isinstance(value, list) else [value]):
            if number is not None:
                board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, step)


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None  # JSON has no NaN


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install 'fastdiff[train]'") from None
    return SummaryWriter(str(folder), purge_step=start)
