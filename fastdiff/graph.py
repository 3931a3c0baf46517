"""The loop as CUDA graphs: network, guidance, step, noise and the number of the next row, replayed without the host.

Each kind of row is captured once, over memory of its own, and replayed for every row of that kind. Another seed,
guidance scale, number of steps, schedule or solver only brings other numbers into that memory. A new capture is for
another shape class: shapes, dtypes and formats of what a run is given, how many vectors its solver keeps, the guidance,
the backend, autocast, and where the network's weights lie. Weights may change in place.

A call of a network alone can be a graph too (:func:`replayed`), for loops that are not ours.

A network keeps its latest :data:`BOUND` classes. What cannot be captured runs operation by operation, with one warning.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import cache
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff import backends
from fastdiff.errors import InputError
from fastdiff.loop import Columns, Given, Kind, Loop, Rows
from fastdiff.noise import sample_ids
from fastdiff.ops import library

BOUND = 8  #: shape classes that a network keeps
WARM_UPS = 2  # of a row before it is captured: libraries load and choose their algorithms
LEAST_ROWS = 1024  # that a captured table has room for

Call = Callable[[], object]
_of: WeakKeyDictionary[Any, Graphs] = WeakKeyDictionary()
_capturing = threading.Lock()  # PyTorch captures one graph at a time
_left: list[Any] = []  # pools of captures that failed, whose memory PyTorch never frees: the next ones use it


def serves(device: torch.device) -> bool:
    """Whether there are graphs on a device, and nobody has to see each operation or makes a graph of his own."""
    if device.type != "cuda" or torch.compiler.is_compiling() or library.watched():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@contextmanager
def rows(loop: Loop, given: Given, kinds: Sequence[Kind], keep_x0: bool, pauses: bool) -> Iterator[Rows | Captured]:
    """The rows of a run, captured where they can be. ``pauses``: whoever runs them may take his time between them."""
    seed, sample = sample_ids(len(given.x), given.address.seed, given.address.sample, given.x.device)
    fixed = given._replace(address=given.address._replace(seed=seed, sample=sample))
    slot = _slot(loop.network, _with_a_row(fixed), _of_loop(loop), keep_x0, _room(len(given.columns.table)))

    def ready(kept: Captured | None, pool: Any) -> Captured:
        kept = kept or Captured(loop, fixed, keep_x0, pool)
        kept.capture(loop, fixed, kinds)
        return kept

    with _held(slot, pauses, ready, "this loop, it runs row by row") as captured:
        yield captured or Rows(loop, given, keep_x0)


def replayed(network: nn.Module, function: Callable[..., Tensor], given: tuple[Any, ...]) -> Tensor:
    """What a function that asks a network makes of tensors, by a replay where it can; the result is the caller's.

    Args:
        function: of what is given and of the network alone, and the same one at every call; without gradients.
        given: tensors on a device that has graphs, None, numbers.
    """

    def ready(kept: Function | None, pool: Any) -> Function:
        return kept or Function(function, given, pool)

    with _held(_slot(network, given), False, ready, "this network, its kernels are launched one by one") as captured:
        return function(*given) if captured is None else captured(*given).clone()


def teardown(network: Any) -> None:
    """Forget what is captured of a network and give its memory back to the GPU; runs under way keep theirs."""
    _of.pop(network, None)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- a shape class ----------------------------------------------------------------------------


class Captured:
    """The rows of a shape class, and the memory they run in."""

    def __init__(self, loop: Loop, given: Given, keep_x0: bool, pool: Any) -> None:
        own: Given = pytree.tree_map_only(Tensor, torch.empty_like, given)
        self._given = own._replace(columns=Columns(*map(_with_room, given.columns)))
        self.memory = loop.memory(self._given, keep_x0)
        self._row = torch.zeros((), dtype=torch.int64, device=given.x.device)
        self._replays: dict[Kind, Call] = {}
        self._pool, self.device = pool, given.x.device
        self._noisy = False

    def capture(self, loop: Loop, given: Given, kinds: Sequence[Kind]) -> None:
        """Capture the kinds of rows of a run that are not yet, and bring the run into this memory."""
        self._noisy = any(kind.noisy for kind in kinds)  # one graph serves rows with and without: s is 0 there
        for kind in {kind._replace(noisy=self._noisy) for kind in kinds} - self._replays.keys():

            def row(kind: Kind = kind) -> None:
                loop.run(self._given, self.memory, self._row, kind)
                self._row.add_(1)

            self._replays[kind] = capture(row, lambda: self.start(loop, given), self.device, self._pool)
        self.start(loop, given)

    def start(self, loop: Loop, given: Given) -> None:
        _bring(self._given, given)
        loop.start(self._given, self.memory)
        self._row.zero_()

    def run(self, row: int, kind: Kind) -> None:
        """Replay a row; its number is what the row before has left on the device."""
        self._replays[kind._replace(noisy=self._noisy)]()


class Function:
    """A function of tensors as one graph. Its arguments lie in memory of its own, its result until the next call.

    Args:
        given: arguments to warm up with, on one device but for what is no tensor; later ones are like them.
    """

    def __init__(self, function: Callable[..., Any], given: tuple[Any, ...], pool: Any) -> None:
        self._given: tuple[Any, ...] = pytree.tree_map_only(Tensor, torch.empty_like, given)
        self._result: Any = None
        self.device = _device_of(given)

        def run() -> None:
            self._result = function(*self._given)

        self._replay = capture(run, lambda: _bring(self._given, given), self.device, pool)

    def __call__(self, *given: Any) -> Any:
        _bring(self._given, given)
        self._replay()
        return self._result


class Slot:
    """Where a shape class is kept, for one run at a time."""

    def __init__(self) -> None:
        self._kept: Captured | Function | None = None
        self._failed, self._pool = False, new_pool()
        self._lock = threading.Lock()
        self._holder = 0, False
        self._done: torch.cuda.Event | None = None

    def take(self, pauses: bool) -> bool:
        """Wait for it; False if it is with somebody who may never give it back."""
        me = threading.get_ident()
        while not self._lock.acquire(timeout=0.01):
            holder, his = self._holder
            if his or holder == me:
                return False
        self._holder = me, pauses
        return True

    def give_back(self) -> None:
        if self._kept is not None:
            self._done = _event(self._kept.device)
        self._lock.release()

    @torch.inference_mode(False)
    @torch.no_grad()
    def ready(self, make: Callable[[Any, Any], Any], what: str) -> Any:
        """What ``make`` makes of what is kept and the pool, which is kept then; None if it cannot be captured."""
        if self._failed:
            return None
        try:
            if self._kept is not None and self._done is not None:
                torch.cuda.current_stream(self._kept.device).wait_event(self._done)
            self._kept = make(self._kept, self._pool)
        except InputError:
            self._kept = None
            raise
        except Exception as error:
            _left.append(self._pool)
            self._kept, self._failed = None, True
            reason = " ".join((type(error).__name__, *str(error).splitlines()[:1]))
            warnings.warn(f"no CUDA graph of {what}: {reason}", RuntimeWarning, stacklevel=8)
        return self._kept


@contextmanager
def _held(slot: Slot | None, pauses: bool, make: Callable[[Any, Any], Any], what: str) -> Iterator[Any]:
    """What a slot holds, made ready for a run; None where there is nothing to be had."""
    if slot is None or not slot.take(pauses):
        yield None
        return
    try:
        yield slot.ready(make, what)
    finally:
        slot.give_back()


def _slot(network: Any, given: Any, *more: Any) -> Slot | None:
    """The slot of a shape class; None where a network or a condition cannot be told from another."""
    leaves, structure = pytree.tree_flatten(given)
    classes, autocast = tuple(map(_class_of, leaves)), _autocast(_device_of(given))
    try:
        key = (structure, classes, backends.choice(), autocast, _weights(network), *more)
        return _of.setdefault(network, Graphs()).slot(key)
    except TypeError:  # it has no hash, or no weak reference
        return None


class Graphs:
    """The slots of a network."""

    def __init__(self) -> None:
        self._slots: OrderedDict[Any, Slot] = OrderedDict()
        self._lock = threading.Lock()

    def slot(self, key: Any) -> Slot:
        with self._lock:
            slot = self._slots[key] = self._slots.pop(key) if key in self._slots else Slot()
            while len(self._slots) > BOUND:
                self._slots.popitem(last=False)
        return slot


def _device_of(given: Any) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))


def _class_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _with_a_row(given: Given) -> Given:
    """How many rows there are is a number, not a shape, as long as there is room."""
    return given._replace(columns=Columns(*(column[:1] for column in given.columns)))


def _room(count: int) -> int:
    return max(LEAST_ROWS, 1 << (count - 1).bit_length())


def _with_room(column: Tensor) -> Tensor:
    return column.new_zeros((_room(len(column)), *column.shape[1:]))


def _bring(own: Any, given: Any) -> None:
    """Copy what is given into memory like it, whose first rows it may be."""
    for memory, value in zip(pytree.tree_leaves(own), pytree.tree_leaves(given), strict=True):
        if isinstance(memory, Tensor):
            (memory[: len(value)] if memory.ndim else memory).copy_(value)


def _weights(network: Any) -> Any:
    """Where the weights of a network lie."""
    if not isinstance(network, nn.Module):
        return None
    places: list[int] = [network.training]
    modules = [network]
    for module in modules:  # which grows: ``parameters()`` takes several times as long
        modules += [part for part in module._modules.values() if part is not None]
        held = chain(module._parameters.values(), module._buffers.values())
        places += [value.data_ptr() for value in held if value is not None]
    return tuple(places)


def _of_loop(loop: Loop) -> Any:
    guides = (getattr(loop.guidance, part.name) for part in fields(loop.guidance))  # type: ignore[arg-type]
    return replace(loop, network=None, diffusion=None), *map(_weights, guides)


def _autocast(device: torch.device) -> Any:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


# ---- CUDA -------------------------------------------------------------------------------------


def new_pool() -> Any:
    return _left.pop() if _left else torch.cuda.graph_pool_handle()


def capture(row: Call, start: Call, device: torch.device, pool: Any) -> Call:
    """Capture ``row``, which is run from ``start`` before; gives what replays it."""
    with _capturing, torch.cuda.device(device), _without_weight_cache():
        side, current = _side_stream(device), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                start()
                row()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                row()
        except BaseException:
            _end_another(device, side)
            raise
    return graph.replay


def _end_another(device: torch.device, side: torch.cuda.Stream) -> None:
    """After a capture that failed: PyTorch's random numbers believe that it goes on, until another one ends."""
    with suppress(RuntimeError):
        number = torch.zeros((), device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"):
            number.add_(1)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps tens of megabytes for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _without_weight_cache() -> Iterator[None]:
    """Autocast would keep weights that it has cast while capturing, in memory that belongs to the graph."""
    enabled, dtype = _autocast(torch.device("cuda"))
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Passed when all that a run has asked of the GPU is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
