"""Batches for training, read ahead by other processes: the same on any number of them, and their failures one line."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastdiff import noise
from fastdiff.errors import InputError, check, choose
from fastdiff.training.data import Data
from fastdiff.training.images import POLICIES, one_line
from fastdiff.training.order import Order

AUGMENTS = ("none", "flip")
TRIES = 1000  #: images in a row that may be unreadable: more are no accident
POLL = 1.0  #: seconds between looks whether the workers live
AHEAD = 2  #: batches that each worker is given before they are asked for
NOTHING = -1
#: signals that a trainer saves on, and after which it still needs its workers
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
#: what to do about a worker that a signal has ended
ADVICE = {
    "SIGKILL": " (where memory ran out, fewer workers need less)",
    "SIGBUS": " (where shared memory ran out, enlarge /dev/shm, in docker by --shm-size, or take fewer workers)",
}


class Batch(NamedTuple):
    """One process's share of the batch of a training step.

    Attributes:
        x: in data units, ``[len(positions), *shape]``: uint8 of images in files, else as the data are stored.
        y: int64 ``[len(positions)]`` or None.
        skipped: names of images that could not be read and were replaced, each the first time that it is met.
    """

    x: Tensor
    y: Tensor | None
    skipped: tuple[str, ...]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same in other memory."""
        return Batch(move(self.x), None if self.y is None else move(self.y), self.skipped)


class Loader:
    """Reads the batches of training steps; what they hold depends on (seed, step, position) only.

    Args:
        data: what to read.
        order: of the samples; training step k has its places ``k * batch`` ... ``(k + 1) * batch - 1``.
        batch: samples of a training step, of all processes.
        positions: those of them that this process reads, in 0 ... batch - 1.
        seed: of the augmentation.
        augment: ``none``, or ``flip``: left and right are exchanged with probability 1/2.
        workers: processes that read ahead, 0 for none. None: none for data in memory, for images in files 4, or as
            many as there are processors.
        corrupt: what an image that cannot be read leads to. ``fail``: an error that names it. ``skip``: the next
            readable one of the data set takes its place.
        timeout: seconds to wait for a worker.
        start_method: of the workers: fork, spawn or forkserver; None: Python's own.
        pin: put batches where a GPU can fetch them without waiting.

    Raises:
        InputError: settings that do not fit.
    """

    def __init__(
        self,
        data: Data,
        order: Order,
        *,
        batch: int,
        positions: range,
        seed: int,
        augment: str = "none",
        workers: int | None = None,
        corrupt: str = "fail",
        timeout: float = 30.0,
        start_method: str | None = None,
        pin: bool = False,
    ) -> None:
        choose("augmentation", augment, AUGMENTS)
        choose("policy for images that cannot be read", corrupt, POLICIES)
        choose("start method", start_method, (None, *multiprocessing.get_all_start_methods()))
        check(augment == "none" or not data.is_points, f"{data.name} holds points: {augment} is for images")
        fits = len(positions) and positions.step > 0 and 0 <= positions[0] <= positions[-1] < batch
        check(fits, f"positions must lie in 0...{batch - 1}, got {positions}")
        check(workers is None or workers >= 0, f"workers must be at least 0, got {workers}")
        check(timeout > 0, f"timeout must be positive, got {timeout}")
        by_default = min(4, len(os.sched_getaffinity(0))) if data.source.decodes else 0
        self.workers = by_default if workers is None else workers
        self.timeout, self.start_method, self.pin = timeout, start_method, pin and torch.cuda.is_available()
        self._steps = _Steps(data, order, batch, positions, seed, augment == "flip", corrupt == "skip")
        self._named: set[str] = set()

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of training steps ``start`` ... ``stop - 1``; closing this ends the workers.

        Raises:
            InputError: an image that cannot be read, or, with ``skip``, 1000 in a row; a worker that has ended, does
                not answer or finds no shared memory, with the training step and what was being read.
        """
        check(0 <= start <= stop, f"training steps must lie in 0...{stop}, got {start}")
        steps = range(start, stop)
        with closing(self._read_ahead(steps) if self.workers and steps else self._read_now(steps)) as found:
            for batch in found:
                new = tuple(name for name in dict.fromkeys(batch.skipped) if name not in self._named)
                self._named.update(new)
                yield batch._replace(skipped=new)

    def _read_now(self, steps: range) -> Generator[Batch, None, None]:
        for step in steps:
            batch = self._steps[step]
            yield batch.moved(Tensor.pin_memory) if self.pin else batch

    def _read_ahead(self, steps: range) -> Generator[Batch, None, None]:
        desk = _Desk.of(self._steps, min(self.workers, len(steps)))
        loader: DataLoader[_Done | _Failure] = DataLoader(
            desk,
            batch_size=None,
            sampler=steps,
            num_workers=len(desk.notes),
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            timeout=min(POLL, self.timeout),
            worker_init_fn=_ignore_signals,
            multiprocessing_context=self.start_method,
            generator=torch.Generator(),  # or a seed would be drawn from the global one
        )
        with _running(loader) as iterator:
            for number, step in enumerate(steps):
                try:
                    done = _next(iterator, self.timeout)
                except Exception as error:  # RuntimeError, or whatever half a message leads to
                    worker = number % len(desk.notes)
                    raise InputError(desk.report(step, worker, iterator._workers, error, self.timeout)) from error
                if isinstance(done, _Failure):
                    raise InputError(done.message) from (RuntimeError(done.trace) if done.trace else None)
                yield desk.taken(step, done, Tensor.pin_memory if self.pin else Tensor.clone)
            iterator._shutdown_workers()  # they have nothing left to do and end by themselves


@dataclass(frozen=True, eq=False)
class _Steps(Dataset[Batch]):
    """The batch of each training step."""

    data: Data
    order: Order
    batch: int
    positions: range
    seed: int
    flip: bool
    skip: bool

    def __getitem__(self, step: int) -> Batch:
        return self.read(step, lambda index: None)

    def read(self, step: int, watch: Callable[[int], None]) -> Batch:
        """The batch of a step; ``watch`` is told of each sample that is read by itself."""
        indices, skipped = self.indices(step), list[str]()
        if self.data.source.decodes:
            used, images = zip(*(self._readable(i, watch, skipped) for i in indices.tolist()), strict=True)
            x, indices = torch.cat(images), torch.tensor(used)
        else:
            x = self.data.source.read(indices)
        y = self.data.source.y
        return Batch(self._flipped(x, step) if self.flip else x, y if y is None else y[indices], tuple(skipped))

    def indices(self, step: int) -> Tensor:
        first, last = self.positions[0], self.positions[-1]
        return self.order.indices(step * self.batch + first, last - first + 1)[:: self.positions.step]

    def named(self, step: int, index: int) -> str:
        """The sample that a step was at, or those that it has."""
        if index >= 0:
            return self.data.source.name(index)
        indices = self.indices(step).tolist()
        return ", ".join(map(self.data.source.name, indices[:3])) + ", ..." * (len(indices) > 3)

    def _readable(self, index: int, watch: Callable[[int], None], skipped: list[str]) -> tuple[int, Tensor]:
        """An image ``[1, C, H, W]`` and its index: the next one's where it cannot be read, if those are skipped."""
        count = len(self.data)
        for candidate in range(index, index + min(count, TRIES)):
            watch(candidate % count)
            try:
                return candidate % count, self.data.source.read(torch.tensor([candidate % count]))
            except InputError:
                if not self.skip:
                    raise
                skipped.append(self.data.source.name(candidate % count))
        raise InputError(f"none of {min(count, TRIES)} images from {self.data.source.name(index)} on can be read")

    def _flipped(self, x: Tensor, step: int) -> Tensor:
        at: dict[str, Any] = {"step": step, "sample": self.positions, "stream": noise.Stream.AUGMENT}
        words = noise.uniform_words(len(self.positions), seed=self.seed, **at)
        return torch.where((words < 2**31)[:, None, None, None], x.flip(-1), x)


# ---- in workers ---------------------------------------------------------------------------------


_Done = tuple[str, ...]  # images that were skipped in a batch that is there


class _Failure(NamedTuple):
    """Why a batch could not be read; ``trace`` of what is not the data's fault."""

    message: str
    trace: str = ""


@dataclass(frozen=True, eq=False)
class _Desk(Dataset[Any]):
    """Shared memory that is there before the workers, where they put batches, and note what they are at.

    Torch's own way with tensors needs a worker to hand them over, for which nobody can wait who does not trust it.

    Attributes:
        notes: ``[workers, 2]``: training step and sample.
        x, y: ``[places, N, ...]``: more places than there are batches on their way, so that none is overwritten.
    """

    steps: _Steps
    notes: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, steps: _Steps, workers: int) -> _Desk:
        data, shape = steps.data, (AHEAD * workers + 1, len(steps.positions))
        dtype = torch.uint8 if data.source.decodes else data.source.read(torch.empty(0, dtype=torch.int64)).dtype
        x, y = torch.zeros(*shape, *data.shape, dtype=dtype), torch.zeros(shape, dtype=torch.int64)
        notes = torch.full((workers, 2), NOTHING)
        try:
            return cls(steps, *(tensor.share_memory_() for tensor in (notes, x, y)))
        except RuntimeError as error:
            for name in re.findall(r"</(torch_\w+)>", str(error)):  # torch leaves it there
                Path("/dev/shm", name).unlink(missing_ok=True)
            needed = f"{x.nbytes / 2**20:.0f} MB of shared memory for processes that read data"
            raise InputError(f"{needed}: {one_line(error)}{ADVICE['SIGBUS']}") from None

    def __getitem__(self, step: int) -> _Done | _Failure:
        info = get_worker_info()
        assert info is not None  # this is a worker
        note, place = self.notes[info.id].numpy(), step % len(self.x)
        note[:] = step, NOTHING
        try:
            x, y, skipped = self.steps.read(step, partial(note.__setitem__, 1))
            self.x[place] = x
            if y is not None:
                self.y[place] = y
            return skipped
        except InputError as error:
            return _Failure(str(error))
        except Exception as error:
            where = f"training step {step}, reading {self.steps.named(step, int(note[1]))}"
            return _Failure(f"{where}: {type(error).__name__}: {one_line(error)}", traceback.format_exc())
        finally:
            note[:] = NOTHING

    def taken(self, step: int, skipped: _Done, move: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of a step that is there."""
        place = step % len(self.x)
        y = None if self.steps.data.source.y is None else self.y[place]
        return Batch(self.x[place], y, skipped).moved(move)

    def report(self, step: int, worker: int, workers: list[BaseProcess], error: Exception, timeout: float) -> str:
        """Why the batch of ``step``, which ``worker`` should have read, has not come, and what was being read."""
        dead = [i for i, process in enumerate(workers) if not process.is_alive()]
        # One that reads nothing waits for another that should let it speak.
        busy = [i for i in dead or (worker, *range(len(workers))) if self.notes[i, 0] != NOTHING]
        at, index = self.notes[busy[0]].tolist() if busy else (step, NOTHING)
        where = f"at training step {at}, reading {self.steps.named(at, index)}"
        if dead:
            return f"a process that reads data {_end(workers[dead[0]].exitcode or 0)} {where}"
        if _is_late(error):
            return f"a process that reads data has not answered for {timeout:g} s {where}"
        return f"processes that read data failed {where}: {one_line(error)}"


def _ignore_signals(worker: int) -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


# ---- of workers ---------------------------------------------------------------------------------


@contextmanager
def _running(loader: DataLoader[Any]) -> Iterator[Any]:
    """The iterator of a loader, whose workers are gone after the block, however that ends."""
    iterator = _start(loader)
    # At exit Python sends SIGTERM and then waits, and workers ignore that.
    stop = atexit.register(partial(_stop, iterator._workers))
    try:
        yield iterator
    finally:
        stop()
        iterator._shutdown_workers()
        atexit.unregister(stop)


def _start(loader: DataLoader[Any]) -> Any:
    """Start the workers; they inherit that signals wait, until they ignore them.

    Not from a server that forks: it would pass that on to other processes of other people, too. Torch's handler of
    SIGCHLD is taken away again: it raises an exception in whatever is running when a worker dies.
    """
    handler, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    method = (loader.multiprocessing_context or multiprocessing).get_start_method()
    if method == "spawn":
        resource_tracker.ensure_running()  # else it is started next, and lets signals through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, () if method == "forkserver" else IGNORED)
    try:
        return iter(loader)
    except BaseException as error:
        _stop(set(multiprocessing.active_children()) - others)
        if isinstance(error, Exception):
            raise InputError(f"processes that read data cannot be started: {one_line(error)}") from error
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _stop(workers: Iterable[BaseProcess]) -> None:
    """End workers, whatever they are doing, and wait until they are gone."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _next(iterator: Any, timeout: float) -> Any:
    """The next batch; torch raises an exception when a worker is dead, or at every look that finds nothing new."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return next(iterator)
        except Exception as error:
            dead = wait([worker.sentinel for worker in iterator._workers], 0)
            if dead or not _is_late(error) or time.monotonic() >= deadline:
                raise


def _is_late(error: Exception) -> bool:
    return "timed out" in str(error)


def _end(code: int) -> str:
    """How a worker has ended."""
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}{ADVICE.get(name, '')}"
