# ruff: noqa: RET505 - Triton goes on compiling after an ``if`` that returned
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""The kernels of the group norm. A program has a tile: positions times the channels of a few whole groups of a sample.

A tile of all positions stays in registers from its load to the result (``normalise``, ``gradient``). Where that is
too much, chunks of positions leave partial sums, which are joined in a fixed order, and the chunks are read again
(``chunk_moments``, ``join_moments``, ``normalise_chunk``; ``chunk_sums``, ``join_sums``, ``gradient_chunk``).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastdiff.ops.triton.maths import silu, silu_slope


class Spec(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    width: int  # channels to a group
    groups: int  # to a program
    P: int  # the powers of two that hold a program's positions,
    K: int  # channels
    G: int  # and groups
    last: bool  # channels lie side by side in memory, otherwise positions do
    silu: bool


class Vector(NamedTuple):
    """A number per channel, or per sample and channel, by its strides."""

    data: Any
    sample: Any
    channel: Any


class Affine(NamedTuple):
    """What normalised values are multiplied by, and what is added: vectors, or None."""

    weight: Any
    bias: Any
    scale: Any
    shift: Any


class Tile(NamedTuple):
    """The positions [P], channels [K] and groups [G] of a program, and which of each are there."""

    sample: Any
    chunk: Any
    position: Any
    rows: Any
    channel: Any
    own: Any
    group: Any
    mine: Any


# ---- where, and what is there ---------------------------------------------------------------


@triton.jit
def locate(positions, chunks, S: tl.constexpr):
    """Programs that follow one another have adjacent channels: they share lines of memory."""
    program, blocks = tl.program_id(0), S.channels // (S.width * S.groups)
    block, rest = program % blocks, program // blocks
    chunk, k, g = rest % chunks, tl.arange(0, S.K), tl.arange(0, S.G)
    position = chunk * S.P + tl.arange(0, S.P)
    channel, own = block * (S.width * S.groups) + k, k < S.width * S.groups
    sample = (rest // chunks).to(tl.int64)
    return Tile(sample, chunk, position, position < positions, channel, own, block * S.groups + g, g < S.groups)


@triton.jit
def elements(tile, positions, S: tl.constexpr):
    """Where the elements of a tile are in a tensor, and which of them are there."""
    position, channel = tile.position[:, None].to(tl.int64), tile.channel[None, :].to(tl.int64)
    first, inside = tile.sample * S.channels * positions, tile.rows[:, None] & tile.own[None, :]
    if S.last:
        return first + (position * S.channels + channel), inside
    else:
        return first + (channel * positions + position), inside


@triton.jit
def load(data, at, inside):
    return tl.load(data + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_sum(x, residual, at, inside):
    """What is normalised: x, or its sum with the residual, rounded once."""
    h = load(x, at, inside)
    if residual is not None:
        h = (h + load(residual, at, inside)).to(x.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def load_pairs(data, at, there):
    return load(data, 2 * at, there), load(data, 2 * at + 1, there)


@triton.jit
def store_pairs(data, at, first, second, there):
    tl.store(data + 2 * at, first, mask=there)
    tl.store(data + 2 * at + 1, second, mask=there)


@triton.jit
def of_channels(vector, tile):
    return load(vector.data, tile.sample * vector.sample + tile.channel.to(tl.int64) * vector.channel, tile.own)


@triton.jit
def gain_and_offset(affine, tile, S: tl.constexpr):
    """w (1 + scale) and b (1 + scale) + shift."""
    gain, offset = tl.full([S.K], 1.0, tl.float32), tl.full([S.K], 0.0, tl.float32)
    if affine.weight is not None:
        gain = of_channels(affine.weight, tile)
    if affine.bias is not None:
        offset = of_channels(affine.bias, tile)
    if affine.scale is not None:
        factor = 1.0 + of_channels(affine.scale, tile)
        gain, offset = gain * factor, offset * factor
    if affine.shift is not None:
        offset += of_channels(affine.shift, tile)
    return gain, offset


@triton.jit
def moments_of_channels(moments, tile, S: tl.constexpr):
    """The mean of its group and 1 / sqrt(variance + eps) for each channel."""
    return load_pairs(moments, tile.sample * (S.channels // S.width) + tile.channel // S.width, tile.own)


# ---- arithmetic -----------------------------------------------------------------------------


@triton.jit
def members(S: tl.constexpr):
    """Which channels of a tile belong to which of its groups [G, K]."""
    return tl.arange(0, S.G)[:, None] == (tl.arange(0, S.K) // S.width)[None, :]


@triton.jit
def sum_groups(value, S: tl.constexpr):
    """From a number for each channel its sum for each group."""
    return tl.sum(tl.where(members(S), value[None, :], 0.0), 1)


@triton.jit
def spread(value, S: tl.constexpr):
    """For each channel the number of its group."""
    return tl.sum(tl.where(members(S), value[:, None], 0.0), 0)


@triton.jit
def moments_of(h, inside, count, S: tl.constexpr):
    """The differences from a first mean of their group (``near``); that, what the mean is beyond it, the variance.

    The rest of the mean is as small as the rounding of the first, so that no mean, however large, cancels.
    """
    near = sum_groups(tl.sum(h, 0), S) / count
    d = tl.where(inside, h - spread(near, S)[None, :], 0.0)
    rest = sum_groups(tl.sum(d, 0), S) / count
    variance = sum_groups(tl.sum(d * d, 0), S) / count - rest * rest
    return d, near, rest, tl.maximum(variance, 0.0)


@triton.jit
def inverse_root(variance, eps):
    return 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def scaled(value, gain, offset):
    """value gain + offset, for each channel its own."""
    return tl.fma(value, tl.broadcast_to(gain[None, :], value.shape), tl.broadcast_to(offset[None, :], value.shape))


@triton.jit
def activation(z, S: tl.constexpr):
    if S.silu:
        return silu(z)
    else:
        return z


@triton.jit
def through_activation(grad, h, moments, affine, tile, at, inside, S: tl.constexpr):
    """The gradient dz of z = xhat gain + offset from that of its activation; xhat; 1 / deviation and gain."""
    mean, inverse = moments_of_channels(moments, tile, S)
    gain, offset = gain_and_offset(affine, tile, S)
    dz, xhat = load(grad, at, inside), (load(h, at, inside) - mean[None, :]) * inverse[None, :]
    if S.silu:
        dz = dz * silu_slope(scaled(xhat, gain, offset))
    return dz, xhat, inverse, gain


@triton.jit
def through_moments(dz, xhat, plain, along, inverse, gain, count, S: tl.constexpr):
    """The gradient of h from dz and, for each channel, the sums over positions of dz and of dz xhat."""
    p = spread(sum_groups(gain * plain, S) / count, S)
    q = spread(sum_groups(gain * along, S) / count, S)
    return inverse[None, :] * (gain[None, :] * dz - p[None, :] - xhat * q[None, :])


@triton.jit
def store_gradient(result, more, at, inside, dx):
    if more is not None:
        dx += load(more, at, inside)
    tl.store(result + at, dx, mask=inside)


# ---- forward --------------------------------------------------------------------------------


@triton.jit
def normalise(x, residual, affine, eps, result, total, moments, count, POSITIONS: tl.constexpr, S: tl.constexpr):
    tile = locate(POSITIONS, 1, S)
    at, inside = elements(tile, POSITIONS, S)
    h = load_sum(x, residual, at, inside)
    if total is not None:
        tl.store(total + at, h, mask=inside)
    d, near, rest, variance = moments_of(h, inside, count, S)
    inverse = inverse_root(variance, eps)
    if moments is not None:
        group = tile.sample * (S.channels // S.width) + tile.group
        store_pairs(moments, group, near + rest, inverse, tile.mine)
    gain, offset = gain_and_offset(affine, tile, S)
    gain = gain * spread(inverse, S)
    z = scaled(d, gain, offset - spread(rest, S) * gain)
    tl.store(result + at, activation(z, S), mask=inside)


@triton.jit
def chunk_moments(x, residual, total, partial, positions, chunks, S: tl.constexpr):
    """The mean of each group of a chunk, in two parts, and the sum of squares about it [N, groups, chunks, 3].

    Also keeps the sum with the residual, where that is wanted.
    """
    tile = locate(positions, chunks, S)
    at, inside = elements(tile, positions, S)
    h = load_sum(x, residual, at, inside)
    if total is not None:
        tl.store(total + at, h, mask=inside)
    count = (tl.minimum(positions - tile.chunk * S.P, S.P) * S.width).to(tl.float32)
    _, near, rest, variance = moments_of(h, inside, count, S)
    to = partial + 3 * ((tile.sample * (S.channels // S.width) + tile.group) * chunks + tile.chunk)
    tl.store(to, near, mask=tile.mine)
    tl.store(to + 1, rest, mask=tile.mine)
    tl.store(to + 2, variance * count, mask=tile.mine)


@triton.jit
def some_moments(partial, group, begin, positions, chunks, S: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements some chunks of a group have, their means and their sums of squares."""
    chunk = begin + tl.arange(0, BLOCK)
    there, at = chunk < chunks, 3 * (group * chunks + chunk)
    count = tl.where(there, tl.minimum(positions - chunk * S.P, S.P) * S.width, 0)
    mean = load(partial, at, there).to(tl.float64) + load(partial, at + 1, there).to(tl.float64)
    return count.to(tl.float64), mean, load(partial, at + 2, there).to(tl.float64)


@triton.jit
def join_moments(partial, moments, eps, positions, chunks, S: tl.constexpr, BLOCK: tl.constexpr):
    """The moments of a group from those of its chunks, in two passes."""
    group, zero = tl.program_id(0).to(tl.int64), tl.zeros([BLOCK], tl.float64)
    elements, total, squares = zero, zero, zero
    for begin in range(0, chunks, BLOCK):
        count, mean, _ = some_moments(partial, group, begin, positions, chunks, S, BLOCK)
        elements += count
        total += count * mean
    count_of_all = tl.sum(elements)
    mean_of_all = tl.sum(total) / count_of_all
    for begin in range(0, chunks, BLOCK):
        count, mean, inner = some_moments(partial, group, begin, positions, chunks, S, BLOCK)
        squares += inner + count * ((mean - mean_of_all) * (mean - mean_of_all))
    variance = (tl.sum(squares) / count_of_all).to(tl.float32)
    tl.store(moments + 2 * group, mean_of_all.to(tl.float32))
    tl.store(moments + 2 * group + 1, inverse_root(variance, eps))


@triton.jit
def normalise_chunk(x, residual, affine, moments, result, positions, chunks, S: tl.constexpr):
    tile = locate(positions, chunks, S)
    at, inside = elements(tile, positions, S)
    mean, inverse = moments_of_channels(moments, tile, S)
    gain, offset = gain_and_offset(affine, tile, S)
    z = scaled(load_sum(x, residual, at, inside) - mean[None, :], gain * inverse, offset)
    tl.store(result + at, activation(z, S), mask=inside)


# ---- backward -------------------------------------------------------------------------------


@triton.jit
def gradient(grad, h, moments, affine, more, result, sums, count, POSITIONS: tl.constexpr, S: tl.constexpr):
    tile = locate(POSITIONS, 1, S)
    at, inside = elements(tile, POSITIONS, S)
    dz, xhat, inverse, gain = through_activation(grad, h, moments, affine, tile, at, inside, S)
    plain, along = tl.sum(dz, 0), tl.sum(dz * xhat, 0)  # what is not there has a gradient of 0
    store_pairs(sums, tile.sample * S.channels + tile.channel, plain, along, tile.own)
    dx = through_moments(dz, xhat, plain, along, inverse, gain, count, S)
    store_gradient(result, more, at, inside, dx)


@triton.jit
def chunk_sums(grad, h, moments, affine, partial, positions, chunks, S: tl.constexpr):
    """The sums of dz and dz xhat over the positions of a chunk [N, chunks, C, 2]."""
    tile = locate(positions, chunks, S)
    at, inside = elements(tile, positions, S)
    dz, xhat, _, _ = through_activation(grad, h, moments, affine, tile, at, inside, S)
    of_chunk = (tile.sample * chunks + tile.chunk) * S.channels
    store_pairs(partial, of_chunk + tile.channel, tl.sum(dz, 0), tl.sum(dz * xhat, 0), tile.own)


@triton.jit
def join_sums(partial, sums, numbers, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """So many numbers for a sample, each the sum of those of its chunks."""
    blocks = tl.cdiv(numbers, BLOCK)
    sample, number = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for begin in range(0, chunks, ROWS):
        chunk = begin + tl.arange(0, ROWS)
        at = (sample * chunks + chunk[:, None]) * numbers + number[None, :]
        total += load(partial, at, (chunk < chunks)[:, None] & (number < numbers)[None, :]).to(tl.float64)
    tl.store(sums + sample * numbers + number, tl.sum(total, 0).to(tl.float32), mask=number < numbers)


@triton.jit
def gradient_chunk(grad, h, moments, affine, sums, more, result, count, positions, chunks, S: tl.constexpr):
    tile = locate(positions, chunks, S)
    at, inside = elements(tile, positions, S)
    dz, xhat, inverse, gain = through_activation(grad, h, moments, affine, tile, at, inside, S)
    plain, along = load_pairs(sums, tile.sample * S.channels + tile.channel, tile.own)
    dx = through_moments(dz, xhat, plain, along, inverse, gain, count, S)
    store_gradient(result, more, at, inside, dx)
