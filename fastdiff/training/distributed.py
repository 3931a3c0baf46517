"""One piece of work on several processes: those that --processes starts here, or those that torchrun has started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import typer
from torch import distributed
from torch.multiprocessing.spawn import spawn

from fastdiff.errors import InputError, check

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a process may wait long for another's metrics; one that dies is noticed at once


def on_processes(count: int, work: Callable[[Any], T], argument: Any) -> T:
    """Call ``work(argument)`` on ``count`` processes, of which this is the first; returns what it returns here.

    Where torchrun has started this process, its group does the work.

    Args:
        work: a function of a module, as ``argument`` something that can be pickled.

    Raises:
        InputError: fewer than one process, --processes with torchrun, what :func:`together` raises.
    """
    check(count >= 1, f"processes must be at least 1, got {count}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        check(count == 1, "--processes starts processes, and so has torchrun: leave it out")
        with _group("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])):
            return work(argument)
    if count == 1:
        return work(argument)
    with tempfile.TemporaryDirectory() as folder, _threads(count):
        method = f"file://{folder}/meeting"
        children = spawn(_child, (method, count, work, argument), nprocs=count - 1, join=False, daemon=True)
        try:
            with _group(method, 0, count):
                return work(argument)
        except RuntimeError:  # perhaps because another process is gone, which has the better message
            children.join(timeout=5)
            raise
        finally:
            for process in children.processes:
                process.terminate()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def together(work: Callable[[], T]) -> T:
    """``work()`` in every process; bad input in one of them ends all, and the first says so.

    Raises:
        InputError: the first process's own, or that of another one.
        typer.Exit: in the others, with status 2.
    """
    result, message = None, None
    try:
        result = work()
    except (InputError, OSError) as error:
        if world() == 1:
            raise
        message = str(error)
    for found in _of_all(message):
        if found is not None:
            raise InputError(found) if rank() == 0 else typer.Exit(2)
    return result  # type: ignore[return-value]


def first_alone(work: Callable[[], T]) -> T:
    """:func:`together`, but in the first process before the others: what it fetches, they find."""
    is_first = rank() == 0
    first = together(lambda: work() if is_first else None)
    other = together(lambda: None if is_first else work())
    return first if is_first else other  # type: ignore[return-value]


def placed(device: torch.device) -> torch.device:
    """The GPU of this process, where there are several and none is named."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank())) % torch.cuda.device_count())


def _of_all(value: Any) -> list[Any]:
    if world() == 1:
        return [value]
    values = [None] * world()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def _group(method: str, number: int, count: int) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=method, rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield
        distributed.barrier()  # nobody leaves while another one still reads from him
    finally:
        distributed.destroy_process_group()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """An equal share of the CPU's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _child(index: int, method: str, count: int, work: Callable[[Any], Any], argument: Any) -> None:
    with suppress(typer.Exit), _threads(count), _group(method, index + 1, count):
        work(argument)
