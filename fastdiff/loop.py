"""The one loop: rows of a solver's table, in memory that is set up once.

Nothing is read back from the device and no tensor of the state's size is made between rows, so that a row can be
captured as a CUDA graph: everything that differs between rows is looked up by the row's number on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import Diffusion, Model, network_output
from fastdiff.guidance import Conditions, Guidance, spread, thresholded
from fastdiff.noise import Address, Stream
from fastdiff.ops.layout import format_of
from fastdiff.ops.row import LETTERS

Row = int | Tensor  # the number of a row: an int, or int64 [], or [N] for a row per sample


class Columns(NamedTuple):
    """What rows look up, by row: ``[R, ...]`` on the device."""

    table: Tensor  #: by the letters of :mod:`fastdiff.ops.row`
    time: Tensor  #: that the network is told
    alpha: Tensor  #: of the state that the row leaves
    sigma: Tensor
    c_in: Tensor  #: of the next row
    push: Tensor  #: what a gradient of log p(y | c_in x) changes the network's output by


class Given(NamedTuple):
    """What a run is given."""

    x: Tensor
    columns: Columns
    address: Address
    conditions: Conditions
    scale: Tensor | None = None
    image: Tensor | None = None
    keep: Tensor | None = None


class Memory(NamedTuple):
    """What the rows of a run change in place.

    ``asked`` is what the network is given, twice the batch where it gets both conditions at once, and ``input`` its
    first part; x is that part itself unless the network wants it scaled or in another dtype.
    """

    x: Tensor
    input: Tensor
    asked: Tensor
    x0: Tensor | None
    history: tuple[Tensor, ...]
    anchor: Tensor | None


class Kind(NamedTuple):
    """Rows of a kind compute alike: with guidance, with noise, with the history turned so often."""

    guided: bool
    noisy: bool
    turn: int


@dataclass(frozen=True)
class Loop:
    """How rows are computed.

    Attributes:
        history, anchored: as of the :class:`~fastdiff.table.StepTable`.
        scaled: whether the network's input is another tensor than the state.
        threshold: the quantile and the bound of dynamic thresholding.
        shift_mean: whether a classifier's gradient moves the mean (algorithm 1 of Dhariwal & Nichol 2021).
    """

    network: Model | None = field(compare=False)
    diffusion: Diffusion | None = field(compare=False)
    guidance: Guidance
    input_dtype: torch.dtype
    history: int
    anchored: bool
    scaled: bool
    threshold: tuple[float, float] | None
    shift_mean: bool

    @torch.inference_mode(False)  # of the caller, which a generator may be taken out of
    def memory(self, given: Given, keep_x0: bool) -> Memory:
        x, (n, *shape) = given.x, given.x.shape

        def empty(samples: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((samples, *shape), dtype=dtype, device=x.device, memory_format=format_of(x))

        asked = empty(n if given.conditions.both is None else 2 * n, self.input_dtype)
        return Memory(
            empty(n, x.dtype) if self.scaled else asked[:n],
            asked[:n],
            asked,
            empty(n, x.dtype) if keep_x0 else None,
            tuple(empty(n, x.dtype) for _ in range(self.history)),
            empty(n, x.dtype) if self.anchored else None,
        )

    def start(self, given: Given, memory: Memory, row: Row = 0) -> None:
        """Bring the memory to the state before the first row."""
        memory.x.copy_(given.x)
        for vector in (*memory.history, *(() if memory.anchor is None else (memory.anchor,))):
            vector.zero_()
        self._ask(memory, _letter(given, "c_in", row))

    def run(self, given: Given, memory: Memory, row: Row, kind: Kind) -> None:
        """Run a row: ask the network, and take the solver's step."""
        x, columns = memory.x, given.columns
        out, other = self._outputs(given, memory, row, kind)
        gradient = None
        if other is not None and self.guidance.by_gradient:
            gradient, other = spread(_scale(given, row), x) * other.to(x.dtype), None
            if not self.shift_mean:
                out, gradient = _pushed(out, spread(at(columns.push, row, len(x)), x) * gradient), None
        elif other is not None and (given.scale is not None or self.guidance.rescale or self.threshold):
            out, other = self.guidance.combined(out, other, _scale(given, row), x.shape[1]), None
        if self.threshold is not None:
            out = self._thresholded(given, x, out, row)
        shift = None if gradient is None else self._variance(given, row, out, x) * gradient
        self._step(given, memory, row, kind, out, other)
        if shift is not None:
            x.add_(shift)
        if given.keep is not None:
            self._put_back(given, x, row)
        changed = shift is not None or given.keep is not None
        self._ask(memory, at(columns.c_in, row, len(x)) if changed else None)

    def _outputs(self, given: Given, memory: Memory, row: Row, kind: Kind) -> tuple[Tensor, Tensor | None]:
        asked = memory.asked if kind.guided else memory.input
        t = at(given.columns.time, row, len(asked))
        assert self.network is not None
        assert self.diffusion is not None
        if kind.guided:
            out, other = self.guidance.outputs(self.network, asked, t, given.conditions)
        else:
            out, other = network_output(self.network(asked, t, **given.conditions.cond)), None
        self.diffusion.check_output(out, memory.x)
        return _apart(out, asked), None if other is None else _apart(other, asked)

    def _step(self, given: Given, memory: Memory, row: Row, kind: Kind, out: Tensor, other: Tensor | None) -> None:
        oldest = len(memory.history) - kind.turn
        history = memory.history[oldest:] + memory.history[:oldest]
        ops.affine_step(
            memory.x,
            out,
            given.columns.table,
            row,
            uncond=other,
            history=history,
            anchor=memory.anchor,
            noise=given.address._replace(step=row) if kind.noisy else None,
            out=ops.Step(memory.x, memory.x0, history[-1:], memory.anchor, memory.input if self.scaled else None),
        )

    def _ask(self, memory: Memory, c_in: Tensor | None) -> None:
        """Let the network's input follow x, whose step has already left it there if no ``c_in`` is given."""
        if c_in is not None and self.scaled:
            memory.input.copy_(memory.x * spread(c_in, memory.x))
        n = len(memory.x)
        if len(memory.asked) > n:
            memory.asked[n:].copy_(memory.input)

    def _thresholded(self, given: Given, x: Tensor, out: Tensor, row: Row) -> Tensor:
        """The output that gives the x0 of dynamic thresholding."""
        assert self.threshold is not None
        p, q = (spread(_letter(given, letter, row), x) for letter in "pq")
        x0 = p * x + q * out[:, : x.shape[1]].to(x.dtype)
        return _pushed(out, (thresholded(x0, *self.threshold) - x0) / q)

    def _variance(self, given: Given, row: Row, out: Tensor, x: Tensor) -> Tensor:
        """Of the row's noise: one per sample, or per element where it is learned."""
        s, lo, hi = (spread(_letter(given, letter, row), x) for letter in ("s", "lo", "hi"))
        v = out[:, x.shape[1] :].to(x.dtype)
        return s**2 * (((1 + v) * hi + (1 - v) * lo) / 2).exp() if v.shape[1] else s**2

    def _put_back(self, given: Given, x: Tensor, row: Row) -> None:
        """Put the image back where it is kept, with noise of the level that the row leaves."""
        assert given.image is not None
        assert given.keep is not None
        alpha, sigma = at(given.columns.alpha, row, len(x)), at(given.columns.sigma, row, len(x))
        known = ops.add_noise(given.image, alpha, sigma, given.address._replace(step=row, stream=Stream.KNOWN))
        torch.where(given.keep, known, x, out=x)


def at(column: Tensor, row: Row, n: int) -> Tensor:
    """What a column holds at a row, for each of ``n`` samples, without a look at the device."""
    values = column.narrow(0, row, 1) if isinstance(row, int) else column.index_select(0, row.reshape(-1))
    return values.expand(n) if len(values) == 1 else values.repeat(n // len(values))


def _letter(given: Given, letter: str, row: Row) -> Tensor:
    return at(given.columns.table[:, LETTERS.index(letter)], row, len(given.x))


def _scale(given: Given, row: Row) -> Tensor:
    """The guidance scale ``[N]``: of the call, or of the row."""
    return _letter(given, "w", row) if given.scale is None else given.scale


def _pushed(out: Tensor, push: Tensor) -> Tensor:
    """A network's output with a change of its first channels."""
    channels = push.shape[1]
    changed = out[:, :channels] + push
    return torch.cat((changed, out[:, channels:].to(changed.dtype)), 1) if out.shape[1] > channels else changed


def _apart(out: Tensor, asked: Tensor) -> Tensor:
    """An output in memory of its own: a step writes to where the network's input lies."""
    return out.clone() if out.untyped_storage().data_ptr() == asked.untyped_storage().data_ptr() else out


class Rows:
    """The rows of one run, one by one."""

    def __init__(self, loop: Loop, given: Given, keep_x0: bool) -> None:
        self._loop, self._given, self.memory = loop, given, loop.memory(given, keep_x0)
        loop.start(given, self.memory)

    def run(self, row: int, kind: Kind) -> None:
        self._loop.run(self._given, self.memory, row, kind)
