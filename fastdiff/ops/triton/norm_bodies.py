"""The group norm as the backend runs it: which programs share the work, and their launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2  # type: ignore[import-untyped]

from fastdiff.errors import Refused
from fastdiff.ops.layout import format_of
from fastdiff.ops.triton import norm
from fastdiff.ops.triton.bodies import EXACT
from fastdiff.ops.triton.norm import Affine, Spec, Vector

FORWARD = 32768  # elements of the largest tile that stays in registers: 64 to each of 512 threads,
BACKWARD = 16384  # half as many where a program holds two
CHUNK = 8192  # elements of a tile of some of the positions
LINE = 128  # bytes of adjacent channels: a line of memory, at most,
SECTOR = 32  # what memory moves at once, if registers allow,
VECTOR = 16  # and one load, at least
SMALL = 1024  # elements below which a program of adjacent positions takes more groups
MOST_GROUPS = 8  # of a program
WIDEST = 32768  # channels to a group
JOINED = 256  # chunks of a group, or numbers of a sample, that are joined at once


class Plan(NamedTuple):
    """What the programs of a call have: all positions (``whole``) or chunks of them."""

    spec: Spec
    positions: int
    chunks: int
    programs: int
    warps: int
    whole: bool

    @property
    def size(self) -> float:
        """The elements of a group."""
        return float(self.positions * self.spec.width)


def plan_of(x: Tensor, groups: int, silu: bool, most: int) -> Plan:
    """One tile for all positions if it has so many elements at most and its rows are not too narrow, else chunks.

    Two programs share a multiprocessor, of which one loads while the other computes, unless rows become too narrow.
    """
    channels, positions, size = x.shape[1], math.prod(x.shape[2:]), x.element_size()
    last, width = positions == 1 or not x.is_contiguous(), channels // groups
    rows = next_power_of_2(positions)
    row = LINE // size if last else SMALL // rows
    own = _own(groups, width, row, most // 2 // rows)
    if last and own * width * size < SECTOR:
        own = _own(groups, width, row, most // rows)
    whole = rows * next_power_of_2(own * width) <= most and (not last or own * width * size >= VECTOR or own == groups)
    if not whole:
        own = _own(groups, width, LINE // size if last else 1, CHUNK)
        rows = min(rows, max(1, CHUNK // next_power_of_2(own * width)))
    wide, chunks = next_power_of_2(own * width), -(-positions // rows)
    spec = Spec(channels, width, own, rows, wide, next_power_of_2(own), last, silu)
    warps = min(8 if 2 * rows * wide <= most else 16, max(1, rows * wide // 1024))
    return Plan(spec, positions, chunks, len(x) * chunks * (groups // own), warps, whole)


def _own(groups: int, width: int, row: int, most: int) -> int:
    """The groups of a program: an equal share, of as many channels as fill a row and fit in the widest tile."""
    shares = (n for n in range(1, MOST_GROUPS + 1) if groups % n == 0)
    return max((n for n in shares if n * width <= row and next_power_of_2(n * width) <= most), default=1)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    result: Tensor,
    total: Tensor | None,
    moments: Tensor | None,
) -> None:
    _check(groups, result, total, moments)
    if not result.numel():
        if moments is not None:
            moments.fill_(math.nan)  # the mean of nothing
        return
    x, residual = _alike(result, x), _optional(result, residual)
    affine, plan = _affine(weight, bias, scale, shift), plan_of(result, groups, silu, FORWARD)
    with torch.cuda.device_of(result):
        if plan.whole:
            _launch(norm.normalise, plan, x, residual, affine, eps, result, total, moments, plan.size, plan.positions)
        else:
            _normalise_chunks(plan, groups, x, residual, affine, eps, result, total, moments)


def group_norm_silu_backward(
    grad: Tensor,
    h: Tensor,
    moments: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    more: Tensor | None,
    result: Tensor,
    sums: Tensor,
) -> None:
    _check(groups, result, None, sums)
    if not result.numel():
        sums.zero_()
        return
    grad, h, more = _alike(result, grad), _alike(result, h), _optional(result, more)
    given = (grad, h, moments.contiguous(), _affine(weight, bias, scale, shift), more, result, sums)
    plan = plan_of(result, groups, silu, BACKWARD)
    with torch.cuda.device_of(result):
        if plan.whole:
            _launch(norm.gradient, plan, *given, plan.size, plan.positions)
        else:
            _gradient_of_chunks(plan, *given)


# ---- launching ------------------------------------------------------------------------------


def _launch(kernel: Any, plan: Plan, *arguments: Any) -> None:
    kernel[(plan.programs,)](*arguments, S=plan.spec, num_warps=plan.warps, **EXACT)


def _normalise_chunks(
    plan: Plan,
    groups: int,
    x: Tensor,
    residual: Tensor | None,
    affine: Affine,
    eps: float,
    result: Tensor,
    total: Tensor | None,
    moments: Tensor | None,
) -> None:
    n, space = len(x), (plan.positions, plan.chunks)
    partial = torch.empty((n, groups, plan.chunks, 3), dtype=torch.float32, device=x.device)
    if moments is None:
        moments = torch.empty((n, groups, 2), dtype=torch.float32, device=x.device)
    _launch(norm.chunk_moments, plan, x, residual, total, partial, *space)
    norm.join_moments[(n * groups,)](partial, moments, eps, *space, S=plan.spec, BLOCK=JOINED, **EXACT)
    if total is not None:
        x, residual = total, None
    _launch(norm.normalise_chunk, plan, x, residual, affine, moments, result, *space)


def _gradient_of_chunks(
    plan: Plan,
    grad: Tensor,
    h: Tensor,
    moments: Tensor,
    affine: Affine,
    more: Tensor | None,
    result: Tensor,
    sums: Tensor,
) -> None:
    n, channels, space = len(h), h.shape[1], (plan.positions, plan.chunks)
    partial = torch.empty((n, plan.chunks, channels, 2), dtype=torch.float32, device=h.device)
    _launch(norm.chunk_sums, plan, grad, h, moments, affine, partial, *space)
    blocks = -(-2 * channels // JOINED)
    norm.join_sums[(n * blocks,)](partial, sums, 2 * channels, plan.chunks, ROWS=8, BLOCK=JOINED, **EXACT)
    _launch(norm.gradient_chunk, plan, grad, h, moments, affine, sums, more, result, plan.size, *space)


def _check(groups: int, result: Tensor, total: Tensor | None, numbers: Tensor | None) -> None:
    """Refuse results that the kernels cannot write."""
    form = format_of(result)
    if result.dtype == torch.float64:
        raise Refused("float64 is for the reference")
    if result.shape[1] // groups > WIDEST:
        raise Refused(f"more than {WIDEST} channels to a group")
    if not result.is_contiguous(memory_format=form) or not (numbers is None or numbers.is_contiguous()):
        raise Refused("the results must be contiguous or channels-last")
    if total is not None and (total.dtype != result.dtype or not total.is_contiguous(memory_format=form)):
        raise Refused("the results differ in dtype or layout")


def _alike(result: Tensor, x: Tensor) -> Tensor:
    """A tensor in the layout of the result."""
    if x.dtype != result.dtype:
        raise Refused("the tensors differ in dtype")
    return x.contiguous(memory_format=format_of(result)).resolve_neg()


def _optional(result: Tensor, x: Tensor | None) -> Tensor | None:
    return x if x is None else _alike(result, x)


def _affine(*vectors: Tensor | None) -> Affine:
    return Affine(*map(_vector, vectors))


def _vector(x: Tensor | None) -> Vector | None:
    if x is None:
        return None
    x = x.resolve_neg()
    return Vector(x, x.stride(0) if x.ndim > 1 else 0, x.stride(-1))
