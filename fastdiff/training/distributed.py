"""Several processes: those that --processes starts here, or those that torchrun has started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.spawn import spawn

from fastdiff.errors import InputError, check

T = TypeVar("T")
WRONG = "wrong"  # what a process says that ends without the others
PATIENCE = timedelta(days=7)  # a process may wait long for another's metrics; one that dies is noticed at once


class ElsewhereError(InputError):
    """Something is wrong in another process, which has the message."""


@dataclass(frozen=True)
class Group:
    """Processes that work together, of which this is number ``rank``; by default this one alone."""

    rank: int = 0
    world: int = 1
    handle: Any = None  # of torch.distributed; None for all processes

    @classmethod
    def of_all(cls, *, apart: bool = False, timeout: timedelta | None = None) -> Group:
        """All processes that there are; ``apart``, over connections of their own, for use in another thread.

        Args:
            timeout: of those connections, how long a process waits for another one; by default half an hour.
        """
        if world() == 1:
            return cls()
        return cls(rank(), world(), distributed.new_group(backend="gloo", timeout=timeout) if apart else None)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def everyone(self, value: T) -> list[T]:
        """What every process has given here, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value, group=self.handle)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """``work()`` in every process; bad input in one of them ends all, and the first says so.

        Raises:
            InputError: the first process's own, or that of another one; :class:`ElsewhereError` in the others.
        """
        result, message = None, None
        try:
            result = work()
        except (InputError, OSError) as error:
            if self.world == 1:
                raise
            message = str(error)
        wrong = next(filter(None, self.everyone(message)), None)
        if wrong is not None:
            raise (InputError if self.is_first else ElsewhereError)(wrong)
        return result  # type: ignore[return-value]


def on_processes(
    count: int,
    work: Callable[[Any], T],
    argument: Any,
    *,
    device: torch.device | None = None,
    timeout: timedelta = PATIENCE,
) -> T:
    """Call ``work(argument)`` on ``count`` processes, of which this is the first; returns what it returns here.

    Where torchrun has started this process, its group does the work.

    Args:
        work: a function of a module, as ``argument`` something that can be pickled.
        device: where tensors are exchanged; the CPU by default.
        timeout: how long a process waits for another one.

    Raises:
        InputError: fewer than one process, --processes with torchrun, what :meth:`Group.together` raises.
    """
    check(count >= 1, f"processes must be at least 1, got {count}")
    backend = "cpu:gloo,cuda:nccl" if device is not None and device.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        check(count == 1, "--processes starts processes, and so has torchrun: leave it out")
        with _group(backend, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout):
            return work(argument)
    if count == 1:
        return work(argument)
    with tempfile.TemporaryDirectory() as folder, _threads(count):
        meeting = (backend, f"file://{folder}/meeting")
        children = spawn(_child, (meeting, count, timeout, work, argument), nprocs=count - 1, join=False, daemon=True)
        try:
            with _group(*meeting, 0, count, timeout):
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
    """``work()`` in every process; raises as :meth:`Group.together`."""
    return Group.of_all().together(work)


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


def summed(values: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    if world() > 1:
        distributed.all_reduce(values)
    return values


def of_all(values: Tensor) -> list[Tensor]:
    """Every process's tensor, by rank, whatever their lengths."""
    if world() == 1:
        return [values]
    lengths = [torch.empty(1, dtype=torch.int64, device=values.device) for _ in range(world())]
    distributed.all_gather(lengths, torch.full_like(lengths[0], len(values)))
    counts = [int(length) for length in lengths]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(found, padded)
    return [part[:count] for part, count in zip(found, counts, strict=True)]


@contextmanager
def _group(backend: str, method: str, number: int, count: int, timeout: timedelta) -> Iterator[None]:
    store, *_ = next(rendezvous(method, number, count, timeout=timeout))
    # torchrun's store outlives processes: after a restart, what they had left there would lead to those that are gone.
    attempt = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    distributed.init_process_group(backend, store=attempt, rank=number, world_size=count, timeout=timeout)
    try:
        distributed.barrier()  # nobody begins, and perhaps ends, while another one still connects to him
        yield
        distributed.barrier()  # nobody leaves while another one still reads from him
    except InputError as error:
        attempt.set(WRONG, str(error))
        raise
    except RuntimeError as error:  # perhaps because another process is gone, which has the better message
        if not attempt.check([WRONG]):
            raise
        raise (InputError if number == 0 else ElsewhereError)(attempt.get(WRONG).decode()) from error
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


def _child(
    index: int, meeting: tuple[str, str], count: int, timeout: timedelta, work: Callable[[Any], Any], argument: Any
) -> None:
    with suppress(ElsewhereError), _threads(count), _group(*meeting, index + 1, count, timeout):
        work(argument)
