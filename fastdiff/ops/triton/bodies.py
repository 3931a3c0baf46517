"""The ops as the backend runs them: tensors become operands of a kernel, which is launched on their device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from fastdiff.noise import Address
from fastdiff.ops.layout import channels_last
from fastdiff.ops.triton import kernels
from fastdiff.ops.triton.kernels import Dense, Each, Strided

Noise = Tensor | Address | None
Scalar = Tensor | float

INTERPRETED = not isinstance(kernels.guide, triton.JITFunction)  # TRITON_INTERPRET was set at import
QUADS = 32  # of a warp, one to a thread
WARPS = 4  # of a program, at most
INT32 = 2**31
EXACT = {"enable_fp_fusion": False}  # products and sums round on their own, as everywhere else


def refuses(op: str, device: str, dtype: torch.dtype) -> str:
    """Why an op cannot run on a device with its state in a dtype; empty if it can."""
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return "runs on cuda, and on the CPU only under TRITON_INTERPRET=1"
    return "computes in float32, not in float64" if dtype == torch.float64 else ""


def normal(result: Tensor, address: Address) -> None:
    _launch(kernels.normal, (), (result,), (), address)


def add_noise(x0: Tensor, alpha: Scalar, sigma: Scalar, noise: Noise, result: Tensor) -> None:
    _launch(kernels.add_noise, (x0, _given(noise)), (result,), (_each(alpha), _each(sigma)), noise)


def guide(cond: Tensor, uncond: Tensor, scale: Scalar, result: Tensor) -> None:
    _launch(kernels.guide, (cond, uncond), (result,), (_each(scale),), None)


def affine_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Noise,
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    h1, h2, h3 = (*history, None, None, None)[:3]
    uncond = uncond if uncond is None else uncond[:, : x.shape[1]]
    tensors = (x, *_halves(output, x, noise), uncond, h1, h2, h3, anchor, _given(noise))
    if anchor is None:
        results = (*results[:3], None, results[4])
    _launch(kernels.affine_step, tensors, results, (table, len(table), _each(row)), noise)


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    f: Scalar,
    g: Scalar,
    weight: Scalar,
    bound: Tensor | None,
    noise: Noise,
    result: Tensor,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    elements = math.prod(x0.shape[1:])
    if not x0.numel():
        result.fill_(math.nan)  # the mean of nothing
        return
    blocks, _ = _blocks(elements)
    partial = torch.empty((len(x0), blocks), dtype=torch.float32, device=x0.device)
    tensors, kept = (*_halves(output, x0, bound), x0, _given(noise)), (residual, slope)
    _launch(kernels.loss_sums, tensors, kept, (partial, *map(_each, (f, g, weight)), bound), noise, merge=False)
    with torch.cuda.device_of(x0):
        kernels.mean[(len(x0),)](partial, result, elements, blocks, BLOCK=128, **EXACT)


def _halves(output: Tensor, x: Tensor, wanted: object) -> tuple[Tensor, Tensor | None]:
    """The prediction in a network's output and, where it is wanted and there, the fractions of a learned variance."""
    channels = x.shape[1]
    wide = wanted is not None and output.shape[1] > channels
    return output[:, :channels], output[:, channels:] if wide else None


# ---- launching ------------------------------------------------------------------------------


def _launch(
    kernel: Any,
    tensors: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    numbers: Sequence[Any],
    noise: Noise,
    *,
    merge: bool = True,
) -> None:
    """Run a kernel on what it reads, what it writes and its numbers, over all elements of tensors ``[N, ...]``."""
    lead = next(t for t in (*results, *tensors) if t is not None)
    if not lead.numel():
        return
    read, written = ([_regular(t) for t in some] for some in (tensors, results))
    samples, elements = len(lead), lead.numel() // len(lead)
    each = isinstance(noise, Address) or any(isinstance(n, Each) and n.stride for n in numbers)
    one = merge and not each and _alike((*read, *written))  # nothing tells one sample from another
    if one:
        samples, elements = 1, lead.numel()
    operands = [t if t is None else Dense(t, 0) if one else _operand(t) for t in (*read, *written)]
    blocks, warps = _blocks(elements)
    space = (elements, math.prod(lead.shape[2:]), blocks)
    with torch.cuda.device_of(lead):
        kernel[(samples * blocks,)](
            *operands, *numbers, *_address(noise), *space, BLOCK=QUADS * warps, num_warps=warps, **EXACT
        )
    for result, copy in zip(results, written, strict=True):
        if result is not None and copy is not None and copy is not result:
            result.copy_(copy)


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all tensors are contiguous, or all of them channels-last."""
    given = [t for t in tensors if t is not None]
    formats = (torch.contiguous_format, channels_last(given[0].ndim))
    return any(all(t.is_contiguous(memory_format=f) for t in given) for f in formats)


def _blocks(elements: int) -> tuple[int, int]:
    """How many programs share a sample, and the warps of each."""
    warps = -(-elements // (4 * QUADS))
    wide = min(WARPS, triton.next_power_of_2(warps))
    return -(-warps // wide), wide


def _regular(x: Tensor | None) -> Tensor | None:
    """The tensor, or its copy where its positions do not follow one another at one distance."""
    return x if x is None or _strides(x) else x.contiguous()


def _operand(x: Tensor) -> Dense | Strided:
    sample, channel, position = _strides(x) or (0, 0, 0)
    if position == 1 and channel == math.prod(x.shape[2:]):
        return Dense(x, sample)
    return Strided(x, sample, channel, position)


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """The strides of a tensor as ``[N, C, positions]``, if it has them."""
    if x.is_contiguous():
        positions = math.prod(x.shape[2:])
        return x.numel() // len(x), positions, 1
    sizes, strides = x.shape[1:], x.stride()[1:]
    spatial = [(size, stride) for size, stride in zip(sizes[1:], strides[1:], strict=True) if size > 1] or [(1, 1)]
    together = all(a[1] == b[0] * b[1] for a, b in pairwise(spatial))
    if not together or math.prod(sizes) >= INT32:
        return None
    position = spatial[-1][1]
    return x.stride(0), strides[0] if sizes[0] > 1 else position * math.prod(sizes[1:]), position


def _each(value: Any) -> Any:
    """A number as it is; a tensor of one per sample, or of one for all, with its stride."""
    return Each(value, value.stride(0) if value.numel() > 1 else 0) if isinstance(value, Tensor) else value


def _given(noise: Noise) -> Tensor | None:
    return noise if isinstance(noise, Tensor) else None


def _address(noise: Noise) -> tuple[Any, ...]:
    """seed, step, ids (None where samples are numbered) and stream; all None where no noise is drawn."""
    if not isinstance(noise, Address):
        return None, None, None, None
    ids = noise.sample
    if ids is None and isinstance(noise.seed, Tensor) and noise.seed.ndim:
        return _each(noise.seed), _each(noise.step), 0, noise.stream
    return _each(noise.seed), _each(noise.step), _each(ids), noise.stream
