# ruff: noqa: RET505 - Triton goes on compiling after an ``if`` that returned
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""The kernels. A program has ``BLOCK`` quads of one sample, one quad to a thread: four elements in row-major order,
which share a Philox counter and, in dense float32 tensors, one 128-bit load or store.

Arguments that are None, and what only they need, are dropped when a kernel is compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastdiff.ops.row import LETTERS
from fastdiff.ops.triton.maths import clamp, divergence, exponential, log_variance_of, normals, philox


class Dense(NamedTuple):
    """A tensor whose samples are row-major without gaps, by the distance between them."""

    data: Any
    sample: Any


class Strided(NamedTuple):
    """A tensor as ``[N, C, positions]`` by its strides."""

    data: Any
    sample: Any
    channel: Any
    position: Any


class Each(NamedTuple):
    """One number per sample (or, with stride 0, one for all of them) on the device."""

    data: Any
    stride: Any


class Source(NamedTuple):
    """Noise that is given, or that belongs to (seed, step, sample, element); without ids, samples are numbered."""

    given: Any
    seed: Any
    step: Any
    ids: Any
    stream: Any


class Place(NamedTuple):
    """The elements of a program: ``first`` ... of a sample of ``elements``, in channels of ``positions``."""

    sample: Any
    first: Any
    elements: Any
    positions: Any


COLUMNS = tl.constexpr(len(LETTERS))
C_IN, W, P, Q, CLIP, A, B, C1, C2, C3, E, S, LO, HI, U, V, K, M, N = (tl.constexpr(i) for i in range(len(LETTERS)))
ALPHA, SIGMA, BOUND_P, BOUND_Q, BOUND_B, BOUND_LO, BOUND_HI, WEIGHT = (tl.constexpr(i) for i in range(8))
BOUND_COLUMNS = tl.constexpr(8)  # the letters of fastdiff/ops/forward.py
NUMBERS = ["seed", "step", "ids", "stream", "row", "rows", "blocks"]  # compiled once for all their values


# ---- where, and what is there ---------------------------------------------------------------


@triton.jit
def locate(elements, positions, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    first = (program % blocks).to(tl.int64) * (4 * BLOCK)
    return Place((program // blocks).to(tl.int64), first, elements, positions)


@triton.jit
def element_of(place, BLOCK: tl.constexpr):
    return place.first + tl.arange(0, 4 * BLOCK)


@triton.jit
def pointers(operand, place, BLOCK: tl.constexpr):
    """The addresses of a program's elements in a tensor."""
    element = element_of(place, BLOCK)
    data = operand.data + place.sample * operand.sample
    if len(operand) == 2:
        return data + element
    else:
        channel = element.to(tl.int32) // place.positions
        position = element.to(tl.int32) - channel * place.positions
        return data + (channel.to(tl.int64) * operand.channel + position.to(tl.int64) * operand.position)


@triton.jit
def load(operand, place, BLOCK: tl.constexpr):
    inside = element_of(place, BLOCK) < place.elements
    return tl.load(pointers(operand, place, BLOCK), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(operand, place, value, BLOCK: tl.constexpr):
    inside = element_of(place, BLOCK) < place.elements
    tl.store(pointers(operand, place, BLOCK), value, mask=inside)


@triton.jit
def of_sample(value, sample, dtype: tl.constexpr):
    """A number, or the one that belongs to a sample."""
    if isinstance(value, tl.tensor):
        return value.to(dtype)
    elif isinstance(value, float):  # so it comes in the interpreter
        return tl.full([], value, dtype)
    else:
        return tl.load(value.data + sample * value.stride).to(dtype)


@triton.jit
def draw(source, place, BLOCK: tl.constexpr):
    seed = of_sample(source.seed, place.sample, tl.uint64)
    step = of_sample(source.step, place.sample, tl.uint32)
    sample = place.sample.to(tl.uint32)
    if source.ids is not None:
        sample = of_sample(source.ids, place.sample, tl.uint32)
    quad = (place.first // 4).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    words = philox(quad, step, sample, source.stream.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    z0, z1, z2, z3 = normals(words[0], words[1], words[2], words[3])
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [4 * BLOCK])


@triton.jit
def noise_of(source, place, BLOCK: tl.constexpr):
    if source.given is not None:
        return load(source.given, place, BLOCK)
    else:
        return draw(source, place, BLOCK)


@triton.jit
def loss_of(output, fraction, x0, f, g, bound, source, place, BLOCK: tl.constexpr):
    """output - (f x0 + g noise); with a bound also the divergence of each element and its slope in the fraction."""
    prediction, data, z = load(output, place, BLOCK), load(x0, place, BLOCK), noise_of(source, place, BLOCK)
    target = of_sample(f, place.sample, tl.float32) * data + of_sample(g, place.sample, tl.float32) * z
    difference = prediction - target
    value, slope = difference, difference
    if bound is not None:
        k = bound + place.sample * BOUND_COLUMNS
        noisy = tl.load(k + ALPHA) * data + tl.load(k + SIGMA) * z
        miss = data - (tl.load(k + BOUND_P) * noisy + tl.load(k + BOUND_Q) * prediction)
        v, lo, hi = load(fraction, place, BLOCK), tl.load(k + BOUND_LO), tl.load(k + BOUND_HI)
        value, slope = divergence(v, lo, hi, tl.load(k + BOUND_B), miss)
    return difference, value, slope


# ---- ops: what is read, what is written, numbers, address, space ------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def normal(result, seed, step, ids, stream, elements, positions, blocks, BLOCK: tl.constexpr):
    place = locate(elements, positions, blocks, BLOCK)
    source = Source(None, seed, step, ids, stream)
    store(result, place, noise_of(source, place, BLOCK), BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def add_noise(
    x0, noise, result, alpha, sigma, seed, step, ids, stream, elements, positions, blocks, BLOCK: tl.constexpr
):
    place = locate(elements, positions, blocks, BLOCK)
    source = Source(noise, seed, step, ids, stream)
    signal = of_sample(alpha, place.sample, tl.float32) * load(x0, place, BLOCK)
    added = of_sample(sigma, place.sample, tl.float32) * noise_of(source, place, BLOCK)
    tl.debug_barrier()  # the result may lie over an argument of which another thread has still to load its part
    store(result, place, signal + added, BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def guide(cond, uncond, result, scale, seed, step, ids, stream, elements, positions, blocks, BLOCK: tl.constexpr):
    place = locate(elements, positions, blocks, BLOCK)
    unconditional = load(uncond, place, BLOCK)
    beyond = of_sample(scale, place.sample, tl.float32) * (load(cond, place, BLOCK) - unconditional)
    tl.debug_barrier()  # as in add_noise
    store(result, place, unconditional + beyond, BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def affine_step(
    x,
    output,
    fraction,
    uncond,
    h1,
    h2,
    h3,
    anchor,
    noise,
    x_result,
    x0_result,
    h1_result,
    anchor_result,
    input_result,
    table,
    rows,
    row,
    seed,
    step,
    ids,
    stream,
    elements,
    positions,
    blocks,
    BLOCK: tl.constexpr,
):
    place = locate(elements, positions, blocks, BLOCK)
    source = Source(noise, seed, step, ids, stream)
    at = of_sample(row, place.sample, tl.int64)
    if (at < 0) | (at >= rows):
        return
    r = table + at * COLUMNS
    x_now, prediction = load(x, place, BLOCK), load(output, place, BLOCK)
    if uncond is not None:
        unconditional = load(uncond, place, BLOCK)
        prediction = unconditional + tl.load(r + W) * (prediction - unconditional)
    x0 = clamp(tl.load(r + P) * x_now + tl.load(r + Q) * prediction, tl.load(r + CLIP))
    following = tl.load(r + A) * x_now + tl.load(r + B) * x0
    if h1 is not None:
        following += tl.load(r + C1) * load(h1, place, BLOCK)
    if h2 is not None:
        following += tl.load(r + C2) * load(h2, place, BLOCK)
    if h3 is not None:
        following += tl.load(r + C3) * load(h3, place, BLOCK)
    if anchor is not None:
        kept = load(anchor, place, BLOCK)
        following += tl.load(r + E) * kept
    if noise is not None or seed is not None:
        std = tl.load(r + S)
        if fraction is not None:
            log_variance = log_variance_of(load(fraction, place, BLOCK), tl.load(r + LO), tl.load(r + HI))
            std = std * exponential(log_variance * 0.5)
        following += std * noise_of(source, place, BLOCK)
    tl.debug_barrier()  # results may lie over arguments of which another thread has still to load its part
    if x0_result is not None:
        store(x0_result, place, x0, BLOCK)
    if h1_result is not None:
        store(h1_result, place, tl.load(r + U) * x_now + tl.load(r + V) * x0, BLOCK)
    if anchor_result is not None:
        store(anchor_result, place, tl.load(r + K) * kept + tl.load(r + M) * x_now + tl.load(r + N) * x0, BLOCK)
    store(x_result, place, following, BLOCK)
    if input_result is not None:
        after = tl.minimum(at + 1, rows - 1)
        store(input_result, place, tl.load(table + after * COLUMNS + C_IN) * following, BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def loss_sums(
    output,
    fraction,
    x0,
    noise,
    residual,
    slope_result,
    partial,
    f,
    g,
    weight,
    bound,
    seed,
    step,
    ids,
    stream,
    elements,
    positions,
    blocks,
    BLOCK: tl.constexpr,
):
    """The loss, summed over the elements of each program, and what its gradient is made of."""
    place = locate(elements, positions, blocks, BLOCK)
    source = Source(noise, seed, step, ids, stream)
    difference, value, slope = loss_of(output, fraction, x0, f, g, bound, source, place, BLOCK)
    if residual is not None:
        store(residual, place, difference, BLOCK)
    if slope_result is not None:
        store(slope_result, place, slope, BLOCK)
    loss = of_sample(weight, place.sample, tl.float32) * (difference * difference)
    if bound is not None:
        loss += tl.load(bound + place.sample * BOUND_COLUMNS + WEIGHT) * value
    inside = element_of(place, BLOCK) < place.elements
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)))


@triton.jit(do_not_specialize=NUMBERS)
def mean(partial, result, elements, blocks, BLOCK: tl.constexpr):
    """The mean of a sample from its sums, which are added in a fixed order."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        total += tl.load(partial + sample * blocks + block, mask=block < blocks, other=0.0).to(tl.float64)
    tl.store(result + sample, (tl.sum(total) / elements).to(tl.float32))
