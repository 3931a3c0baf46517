"""The loop as CUDA graphs: network, guidance, step, noise and the number of the next row, replayed without the host.

Each kind of row is captured once, over memory of its own, and replayed for every row of that kind. Another seed,
guidance scale, number of steps, schedule or solver only brings other numbers into that memory. A new capture is for
another shape class: shapes, dtypes and formats of what a run is given, how many vectors its solver keeps, the guidance,
the backend, autocast, and where the network's weights lie. Weights may change in place.

A network keeps its latest :data:`BOUND` classes. What cannot be captured runs row by row, with one warning.
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
from fastdiff.guidance import Guidance
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
    """Whether rows are captured on a device, and nobody has to see each operation."""
    return device.type == "cuda" and not (torch.compiler.is_compiling() or library.watched())


@contextmanager
def rows(loop: Loop, given: Given, kinds: Sequence[Kind], keep_x0: bool, pauses: bool) -> Iterator[Rows | Captured]:
    """The rows of a run, captured where they can be. ``pauses``: whoever runs them may take his time between them."""
    seed, sample = sample_ids(len(given.x), given.address.seed, given.address.sample, given.x.device)
    on_device = given.address._replace(seed=seed, sample=sample)
    slot = _slot(loop, fixed := given._replace(address=on_device), keep_x0)
    if slot is None or not slot.take(pauses):
        yield Rows(loop, given, keep_x0)
        return
    try:
        yield slot.ready(loop, fixed, kinds, keep_x0) or Rows(loop, given, keep_x0)
    finally:
        slot.give_back()


def teardown(network: Any) -> None:
    """Forget what is captured of a network and give its memory back to the GPU; runs under way keep theirs."""
    _of.pop(network, None)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- a shape class ----------------------------------------------------------------------------


class Captured:
    """The rows of a shape class, and the memory they run in."""

    def __init__(self, loop: Loop, given: Given, keep_x0: bool) -> None:
        own: Given = pytree.tree_map_only(Tensor, torch.empty_like, given)
        self._given = own._replace(columns=Columns(*map(_with_room, given.columns)))
        self.memory = loop.memory(self._given, keep_x0)
        self._row = torch.zeros((), dtype=torch.int64, device=given.x.device)
        self._replays: dict[Kind, Call] = {}
        self.pool = new_pool()
        self._noisy = False

    def capture(self, loop: Loop, given: Given, kinds: Sequence[Kind]) -> None:
        """Capture the kinds of rows of a run that are not yet, and bring the run into this memory."""
        self._noisy = any(kind.noisy for kind in kinds)  # one graph serves rows with and without: s is 0 there
        for kind in {kind._replace(noisy=self._noisy) for kind in kinds} - self._replays.keys():

            def row(kind: Kind = kind) -> None:
                loop.run(self._given, self.memory, self._row, kind)
                self._row.add_(1)

            self._replays[kind] = capture(row, lambda: self.start(loop, given), given.x.device, self.pool)
        self.start(loop, given)

    def start(self, loop: Loop, given: Given) -> None:
        for own, value in zip(pytree.tree_leaves(self._given), pytree.tree_leaves(given), strict=True):
            if isinstance(own, Tensor):
                (own[: len(value)] if own.ndim else own).copy_(value)
        loop.start(self._given, self.memory)
        self._row.zero_()

    def run(self, row: int, kind: Kind) -> None:
        """Replay a row; its number is what the row before has left on the device."""
        self._replays[kind._replace(noisy=self._noisy)]()


class Slot:
    """Where a shape class is kept, for one run at a time."""

    def __init__(self) -> None:
        self._captured: Captured | None = None
        self._failed = False
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
        if self._captured is not None:
            self._done = _event(self._captured.memory.x.device)
        self._lock.release()

    @torch.inference_mode(False)
    @torch.no_grad()
    def ready(self, loop: Loop, given: Given, kinds: Sequence[Kind], keep_x0: bool) -> Captured | None:
        """What is captured, with a run in its memory; None if it cannot be."""
        if self._failed:
            return None
        try:
            if self._done is not None:
                torch.cuda.current_stream(given.x.device).wait_event(self._done)
            self._captured = self._captured or Captured(loop, given, keep_x0)
            self._captured.capture(loop, given, kinds)
        except InputError:
            self._captured = None
            raise
        except Exception as error:
            if self._captured is not None:
                _left.append(self._captured.pool)
            self._captured, self._failed = None, True
            reason = " ".join((type(error).__name__, *str(error).splitlines()[:1]))
            warnings.warn(f"no CUDA graph of this loop, it runs row by row: {reason}", RuntimeWarning, stacklevel=6)
        return self._captured


def _slot(loop: Loop, given: Given, keep_x0: bool) -> Slot | None:
    """The slot of a run's shape class; None where a network or a condition cannot be told from another."""
    leaves, structure = pytree.tree_flatten(given)
    columns = {id(column) for column in given.columns}
    try:
        key = (
            replace(loop, network=None, diffusion=None),
            keep_x0,
            structure,
            tuple(_class_of(leaf, id(leaf) in columns) for leaf in leaves),
            backends.choice(),
            _autocast(given.x.device),
            (_weights(loop.network), *_guides(loop.guidance)),
        )
        slots = _of.setdefault(loop.network, Graphs())
        return slots.slot(key)
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


def _class_of(leaf: Any, column: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    size = (_room(len(leaf)), *leaf.shape[1:]) if column else leaf.shape
    return size, leaf.stride(), leaf.dtype, leaf.device


def _room(count: int) -> int:
    return max(LEAST_ROWS, 1 << (count - 1).bit_length())


def _with_room(column: Tensor) -> Tensor:
    return column.new_zeros((_room(len(column)), *column.shape[1:]))


def _weights(network: Any) -> Any:
    """Where the weights of a network lie."""
    if not isinstance(network, nn.Module):
        return None
    return network.training, *(v.data_ptr() for v in chain(network.parameters(), network.buffers()))


def _guides(guidance: Guidance) -> Iterator[Any]:
    return (_weights(getattr(guidance, part.name)) for part in fields(guidance))  # type: ignore[arg-type]


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
