"""Times one call against peers and a floor, taking turns in one process, once its result is known to be right.

A case is a callable of ours, its formula, and peers. Before any time is shown ours is held against the formula in
float64, and so is every peer that computes the same numbers. Then ours, the peers and the floor take turns, each turn
at least 200 microseconds long after a call that is not timed, and medians are quoted.

Every call takes the next of several input sets, whoever makes it, so that all find the same caches. Sets up to 8 MiB
stay in a CPU's cache as a small batch does (one set); larger ones, and all on a GPU, are rotated through twice the
last-level cache, by at least 3 and at most 64 sets.

The floor is what the memory allows, measured: as many arrays are read and written as the op has to, by ``torch.add``
(two reads, one write), ``copy_`` (one and one), ``fill_`` (one write) and ``sum`` (one read), without allocation.
A kernel that writes around the cache can beat it, for these operations read a line before they write it.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

TURN = 200e-6  # seconds a turn takes at least
ROUNDS = 7  # turns everyone gets at least
LONG = 1.0  # seconds of a call that needs no waking, and gets fewer turns
LONG_ROUNDS = 2
IN_CACHE = 8 << 20  # bytes of an input set that a CPU is allowed to keep in its cache
MOST_SETS = 64

Call = Callable[[], Any]


class Arrays(NamedTuple):
    """An input set: the arrays an op reads, filled with normals, and those it writes."""

    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    def double(self) -> Arrays:
        return Arrays(tuple(v.double() for v in self.reads), self.writes)


Bind = Callable[[Arrays], Call]  # all that a user prepares once stays out of the call


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to the same result.

    Attributes:
        build: makes the binding; whatever it raises, or the first call does, leaves the peer out with a note.
        tolerance: of its result; None where it computes other numbers, such as noise of its own.
        slow: takes seconds or minutes to build, left out of quick runs and with ``--no-slow``.
    """

    name: str
    build: Callable[[], Bind]
    tolerance: float | None = 1e-4
    slow: bool = False


@dataclass(frozen=True)
class Case:
    """One row's subject; ``reads`` and ``writes`` count its arrays, ``moves`` those passes where they are more.

    ``floor`` is for what the memory does not bound; the default is to stream what the op has to. ``facts`` says more of
    a contestant, by its name and milliseconds; a row has ours, and the peer's with ``peer_`` before their names.
    """

    name: str
    shape: tuple[int, ...]
    reads: int
    writes: int
    ours: Bind
    formula: Callable[[Arrays], Sequence[Tensor]]
    peers: tuple[Peer, ...] = ()
    tolerance: float = 2e-6
    moves: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    floor: Bind | None = None
    facts: Callable[[str, float], dict[str, Any]] | None = None

    def contestants(self) -> tuple[Peer, ...]:
        """All that are timed: ours, the peers that are here, and the floor."""
        floor = self.floor or partial(streaming, moves=self.moves or (self.reads, self.writes))
        return Peer("ours", lambda: self.ours, self.tolerance), *self.peers, Peer("floor", lambda: floor, None)


class Row(TypedDict):
    """One case against one peer, which is the ``strongest`` if none is faster.

    ``ratio`` is peer / ours, ``of_floor`` floor / ours; a failed case has no times.
    """

    case: str
    ours_ms: float | None
    peer: str | None
    strongest: bool
    peer_ms: float | None
    ratio: float | None
    floor_ms: float | None
    of_floor: float | None
    error: float | None
    device: str
    threads: int
    torch: str
    commit: str


class WrongResult(Exception):
    """A result that is not the formula's."""

    def __init__(self, message: str, error: float) -> None:
        super().__init__(message)
        self.error = error


# ---- a case -----------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    case: Case, device: torch.device, *, seconds: float = 1.0, sets: int | None = None, slow: bool = True
) -> list[Row]:
    """The rows of a case, one for each peer that is here; one row without times if our result is wrong."""
    inputs = make_inputs(case, device, sets)
    want = truth(case, inputs[0])
    try:
        error = gate(case, inputs[0], want)
    except WrongResult as wrong:
        note(str(wrong))
        return [_row(case, device, {}, None, wrong.error)]
    binds = _present(case, inputs[0], want, slow)
    times = race({name: [bind(arrays) for arrays in inputs] for name, bind in binds.items()}, device, seconds)
    peers: list[str | None] = [name for name in binds if name not in ("ours", "floor")]
    more = {name: case.facts(name, ms) for name, ms in times.items() if name != "floor"} if case.facts else {}
    return [_row(case, device, times, peer, error) | _facts(more, peer) for peer in peers or [None]]


def make_inputs(case: Case, device: torch.device, sets: int | None = None) -> list[Arrays]:
    return [make_arrays(case, device, number) for number in range(sets or count_sets(case, device))]


def make_arrays(case: Case, device: torch.device, number: int = 0) -> Arrays:
    generator = torch.Generator(device).manual_seed(number)
    like: dict[str, Any] = {"device": device, "dtype": case.dtype}
    reads = (torch.randn(case.shape, generator=generator, **like) for _ in range(case.reads))
    return Arrays(tuple(reads), tuple(torch.zeros(case.shape, **like) for _ in range(case.writes)))


def count_sets(case: Case, device: torch.device) -> int:
    size = case.dtype.itemsize * math.prod(case.shape) * (case.reads + case.writes)
    if device.type == "cpu" and size <= IN_CACHE:
        return 1
    return min(max(3, math.ceil(2 * cache_size(device) / size)), MOST_SETS)


def truth(case: Case, arrays: Arrays) -> Sequence[Tensor]:
    """The formula in float64."""
    return case.formula(arrays.double())


def gate(case: Case, arrays: Arrays, want: Sequence[Tensor]) -> float:
    """The error of our result.

    Raises:
        WrongResult: it is above the case's tolerance, or not a number.
    """
    got = results(case.ours, arrays)
    if len(got) != len(want):
        raise WrongResult(f"{case.name}: {len(got)} results where the formula has {len(want)}", math.inf)
    return check(case.name, got, want, case.tolerance)


def check(name: str, got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> float:
    """The largest error of the results, each relative to the largest value of its formula."""
    error = max(map(relative_error, got, want), default=math.inf)
    if not error <= tolerance:
        raise WrongResult(f"{name}: wrong result, error {error:.1e} is above {tolerance:.0e}", error)
    return error


def relative_error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    error = float((got.double() - want).abs().max() / want.abs().max())
    return math.inf if math.isnan(error) else error


def results(bind: Bind, arrays: Arrays) -> list[Tensor]:
    """What a call leaves, where nothing was before."""
    for array in arrays.writes:
        array.fill_(math.nan)
    return tensors(bind(arrays)())


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result in order, however nested."""
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [tensor for part in result for tensor in tensors(part)]


def _present(case: Case, arrays: Arrays, want: Sequence[Tensor], slow: bool) -> dict[str, Bind]:
    """Who can be had here and, where they should, computes the same."""
    binds = {}
    for peer in case.contestants():
        if peer.slow and not slow:
            continue
        try:
            binds[peer.name] = build(peer, arrays, want)
        except Exception as error:  # a peer may fail in any way it likes
            note(f"{case.name}: {peer.name} is left out: {_reason(error)}")
    return binds


def _reason(error: Exception) -> str:
    return " ".join((type(error).__name__, *str(error).splitlines()[:1]))


def build(peer: Peer, arrays: Arrays, want: Sequence[Tensor]) -> Bind:
    """A contestant that has run once; raises what it raises, and WrongResult."""
    bind = peer.build()
    got = results(bind, arrays)
    if peer.tolerance is not None:
        check(peer.name, got, want[: len(got)], peer.tolerance)
    return bind


# ---- the floor --------------------------------------------------------------------------------


def streaming(arrays: Arrays, moves: tuple[int, int]) -> Call:
    """A call that reads and writes so many arrays, those of the set in turn."""
    return partial(_run, list(_streams(arrays, *moves)))


def _run(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def _streams(arrays: Arrays, reads: int, writes: int) -> Iterator[Call]:
    read, write = cycle(arrays.reads), cycle(arrays.writes)
    for left in range(writes, 0, -1):
        take = min(2, max(0, reads - left + 1))
        reads -= take
        yield _stream(list(islice(read, take)), next(write))
    for _ in range(reads):
        yield partial(torch.sum, next(read))


def _stream(reads: list[Tensor], write: Tensor) -> Call:
    if len(reads) == 2:
        return partial(torch.add, *reads, out=write)
    return partial(write.copy_, reads[0]) if reads else partial(write.fill_, 1.0)


# ---- time -------------------------------------------------------------------------------------


def race(calls: dict[str, list[Call]], device: torch.device, seconds: float) -> dict[str, float]:
    """The median milliseconds of each call; ``calls`` holds one per input set."""
    turn = partial(_turn, _elapsed_on_gpu if device.type == "cuda" else _elapsed, cycle(range(len(calls["ours"]))))
    with _without_collection():
        repeats = {name: _repeats(partial(turn, each)) for name, each in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in _rounds(seconds, ROUNDS if all(repeats.values()) else LONG_ROUNDS):
            for name, each in calls.items():
                samples[name].append(turn(each, repeats[name]) / max(repeats[name], 1))
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


def _turn(elapsed: Callable[[list[Call]], float], rotation: Iterator[int], calls: list[Call], repeats: int) -> float:
    """An untimed call comes first: it wakes the threads that slept through somebody else's turn. 0 is once without."""
    if repeats:
        calls[next(rotation)]()
    return elapsed([calls[i] for i in islice(rotation, max(repeats, 1))])


def _repeats(turn: Callable[[int], float]) -> int:
    """How many calls fill a turn; finding out also warms up. 0 for a long one."""
    if turn(0) > LONG:
        return 0
    repeats = 1
    while (taken := turn(repeats)) < TURN:
        repeats = max(repeats + 1, math.ceil(1.2 * repeats * TURN / max(taken, TURN / 10)))
    return repeats


def _rounds(seconds: float, least: int) -> Iterator[int]:
    began = time.perf_counter()
    for number in count():
        if number >= least and time.perf_counter() - began > seconds:
            return
        yield number


def _elapsed(calls: list[Call]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _elapsed_on_gpu(calls: list[Call]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for call in calls:
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


@contextmanager
def _without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---- rows -------------------------------------------------------------------------------------


def _row(case: Case, device: torch.device, times: dict[str, float], peer: str | None, error: float) -> Row:
    ours, other, floor = times.get("ours"), times.get(peer or ""), times.get("floor")
    fastest = min((ms for name, ms in times.items() if name not in ("ours", "floor")), default=None)
    return {
        "case": case.name,
        "ours_ms": ours,
        "peer": peer,
        "strongest": other is not None and other == fastest,
        "peer_ms": other,
        "ratio": other / ours if ours and other else None,
        "floor_ms": floor,
        "of_floor": floor / ours if ours and floor else None,
        "error": error if math.isfinite(error) else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def _facts(more: dict[str, dict[str, Any]], peer: str | None) -> dict[str, Any]:
    theirs = more.get(peer or "", {})
    return more.get("ours", {}) | {f"peer_{name}": value for name, value in theirs.items()}


COLUMNS = ("ours_ms", "peer_ms", "ratio", "floor_ms", "of_floor", "error")
HEADER = f"{'case':<56} {'peer (* strongest)':<30}" + "".join(f"{name:>10}" for name in COLUMNS)


def format_row(row: Row) -> str:
    figures = "".join(f"{_figure(row[name]):>10}" for name in COLUMNS)  # type: ignore[literal-required]
    peer = "FAILED: wrong result" if row["ours_ms"] is None else row["peer"] or "-"
    peer += " *" * row["strongest"]
    return f"{row['case']:<56} {peer:<30}{figures}"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.4g}"


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


@cache
def commit() -> str:
    """The commit that is measured, ``-dirty`` with changes: FASTDIFF_COMMIT, what git says, or ``unknown``."""
    if given := os.environ.get("FASTDIFF_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def cache_size(device: torch.device) -> int:
    """Bytes of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (ValueError, OSError):
        return 32 << 20
