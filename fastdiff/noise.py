"""Counter-based Gaussian noise: the value that belongs to (seed, sample, step, element).

Philox4x32-10 (Salmon et al. 2011) with key = the 64-bit seed and counter = (quad index within the
sample, step, sample id, stream); each counter gives four 32-bit words and, by Box-Muller, four normals,
elements 4q ... 4q+3 of the sample in row-major order. So sample k gets the same noise in whatever batch,
split, rank or backend it is drawn, and noise is never stored: whoever needs it again draws it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.backends import body
from fastdiff.errors import InputError, check

Seed = int | Sequence[int] | Tensor
MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """The last word of the counter: draws for different purposes never meet."""

    STEP = 0  #: z of a sampling step; step = row of the solver table
    INITIAL = 1  #: the noise that sampling starts from; step = 0
    TRAINING = 2  #: forward noising in training; step = training step
    TIMESTEP = 3  #: the timestep a training sample gets; step = training step
    DROPOUT = 4  #: whether a training sample loses its label; step = training step
    LIKELIHOOD = 5  #: forward noising in bits_per_dim; step = timestep
    ORDER = 6  #: the order of the training data; step = epoch
    NETWORK = 7  #: dropout inside the network; step = training step
    KNOWN = 8  #: forward noising of what is known in inpainting; step = row of the solver table
    PROBE = 9  #: the vectors of Hutchinson's estimate in log_likelihood; step = question to the network
    DEQUANTIZATION = 10  #: the uniform noise of bytes in log_likelihood; step = 0
    AUGMENT = 11  #: how a training image is augmented; step = training step, sample = position in the batch


class Address(NamedTuple):
    """Where the noise of a batch of N samples is found; tensors are int64 ``[N]`` (or hold one value) on its device."""

    seed: int | Tensor
    step: int | Tensor
    sample: Tensor | None  #: ids; None for 0 ... N-1, or all 0 when each sample has its own seed
    stream: int


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10, the reference form.

    Args:
        counter: int64 ``[..., 4]`` of 32-bit words (values 0 ... 2**32 - 1).
        key: int64 ``[..., 2]`` of 32-bit words, broadcast against ``counter``.

    Returns:
        int64 ``[..., 4]`` of 32-bit words.
    """
    for name, words, width in (("counter", counter, 4), ("key", key, 2)):
        check(words.dtype == torch.int64, f"{name} must be int64 holding 32-bit words, got {words.dtype}")
        check(words.ndim > 0 and words.shape[-1] == width, f"{name} must end in {width} words, got {list(words.shape)}")
    c0, c1, c2, c3 = (counter & MASK).unbind(-1)
    k0, k1 = (key & MASK).unbind(-1)
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        low, high = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (high >> 32 & MASK) ^ c1 ^ k0, high & MASK, (low >> 32 & MASK) ^ c3 ^ k1, low & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def normal(
    shape: Sequence[int],
    *,
    seed: Seed,
    step: int | Tensor = 0,
    sample: Sequence[int] | Tensor | None = None,
    stream: int = Stream.STEP,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of ``shape`` ``[N, ...]``, one addressed stream per sample.

    Args:
        seed: one seed for the batch, or one per sample (int64 range, negative seeds are their two's complement).
        step: row of the solver table or training step, one or ``[N]``, 0 ... 2**32 - 1.
        sample: ids of the samples ``[N]``, 0 ... 2**32 - 1; default 0 ... N-1, or all 0 when each sample has
            its own seed (so that it is the image this seed gives alone).
        stream: what the noise is for, see :class:`Stream`.

    Returns:
        ``[N, ...]``; |z| <= 5.89. The reference computes in float64 and rounds to ``dtype``; the fused backends
        compute in float32, all of them the same bits, within 2 units in the last place of the reference.
    """
    shape = tuple(shape)
    check(
        len(shape) > 0 and all(n >= 0 for n in shape),
        f"shape must be [N, ...] without negative sizes, got {list(shape)}",
    )
    check(dtype.is_floating_point, f"dtype must be a floating-point type, got {dtype}")
    device = torch.device("cpu" if device is None else device)
    return at(shape, address(shape[0], device, seed=seed, step=step, sample=sample, stream=stream), device, dtype)


def at(shape: Sequence[int], place: Address, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The normals of an address: what :func:`normal` draws there."""
    result = torch.empty(shape, dtype=dtype, device=device)
    body("normal", device, dtype)(result, place)
    return result


def slerp(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """From noise ``a`` to noise ``b`` along the great circle (Shoemake 1985; Song et al. 2021, eq. 67).

    What lies between is as long as noise is, which a straight mean is not: deterministic solvers make images of it.

    Args:
        a, b: ``[N, ...]``, alike.
        share: of ``b``, 0 ... 1, one or ``[N]``.

    Raises:
        InputError: tensors that are not alike.
    """
    check(
        a.shape == b.shape and a.ndim >= 2, f"a and b must be alike, [N, ...], got {list(a.shape)} and {list(b.shape)}"
    )
    share = torch.as_tensor(share, dtype=torch.float64, device=a.device)
    check(
        share.ndim == 0 or share.shape == a.shape[:1], f"share must be one or one per sample, got {list(share.shape)}"
    )
    x, y = a.double().flatten(1), b.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1)
    angle = cosine.arccos()
    # Where the circle has no direction, of parallel vectors, it is the straight line.
    plain = angle.sin() < 1e-6
    first = torch.where(plain, 1 - share, ((1 - share) * angle).sin() / angle.sin())
    second = torch.where(plain, share * torch.ones_like(angle), (share * angle).sin() / angle.sin())
    return (first[:, None] * x + second[:, None] * y).reshape(a.shape).to(a.dtype)


def draw(shape: Sequence[int], place: Address, device: torch.device) -> Tensor:
    """The normals of an address in float64: the reference form."""
    elements = math.prod(shape[1:])
    quads = -(-elements // 4)
    z = box_muller(_words(shape[0], quads, place, device)).reshape(shape[0], 4 * quads)[:, :elements]
    return z.reshape(shape)


def uniform_words(
    count: int,
    *,
    seed: Seed,
    step: int | Tensor = 0,
    sample: Sequence[int] | Tensor | None = None,
    stream: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """One uniform 32-bit word per sample, int64 ``[count]``: word 0 of quad 0, addressed as in :func:`normal`."""
    device = torch.device("cpu" if device is None else device)
    place = address(count, device, seed=seed, step=step, sample=sample, stream=stream)
    return _words(count, 1, place, device)[:, 0, 0]


def box_muller(words: Tensor) -> Tensor:
    """Four normals from four 32-bit words, ``[..., 4]``, in float64.

    The radius takes the upper 24 bits of words 0 and 2, as (w + 1/2) 2^-24; the angle all of words 1 and 3.
    """
    radius = (-2 * (((words[..., 0::2] >> 8).double() + 0.5) * 2.0**-24).log()).sqrt()
    angle = words[..., 1::2].double() * (2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)


def check_seed(seed: Seed) -> None:
    """Raise :class:`~fastdiff.errors.InputError` for what is no seed, before any work is done."""
    _whole_numbers("seed", seed)


def address(
    count: int,
    device: torch.device,
    *,
    seed: Seed,
    step: int | Tensor = 0,
    sample: Sequence[int] | Tensor | None = None,
    stream: int = Stream.STEP,
) -> Address:
    """Check the address of a batch of ``count`` samples and bring it to a device.

    Raises:
        InputError: what is no whole number or out of range, or not one or one per sample.
    """
    seeds = _as_int64(seed) if type(seed) is int else _per_sample("seed", _whole_numbers("seed", seed), count, device)
    steps: int | Tensor = step
    if type(step) is not int or not 0 <= step <= MASK:
        steps = _per_sample("step", _word("step", step), count, device)
    ids = None if sample is None else _word("sample", sample).to(device)
    if ids is not None and ids.shape != (count,):
        raise InputError(f"sample must hold one id per sample ({count}), got {list(ids.shape)}")
    return Address(seeds, steps, ids, int(stream))


def sample_ids(
    count: int, seed: Seed, sample: Sequence[int] | Tensor | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The (seed, sample id) pairs of a batch of ``count``: two int64 tensors ``[count]``.

    Numbers become tensors on the device itself: bringing them there would wait for it.
    """
    device = torch.device(device)
    place = address(count, device, seed=seed, sample=sample)
    return _made_on(device, place.seed).expand(count).contiguous(), _ids(place, count, device)


def _ids(place: Address, count: int, device: torch.device) -> Tensor:
    if place.sample is not None:
        return place.sample
    each = isinstance(place.seed, Tensor) and place.seed.ndim > 0
    return torch.zeros(count, dtype=torch.int64, device=device) if each else torch.arange(count, device=device)


def _words(count: int, quads: int, place: Address, device: torch.device) -> Tensor:
    """Philox words ``[count, quads, 4]``, on ``device``."""
    seeds, steps = (_made_on(device, value).expand(count) for value in (place.seed, place.step))
    ids = _ids(place, count, device)
    quad = torch.arange(quads, device=device)
    per_sample = (value[:, None].expand(count, quads) for value in (steps, ids, torch.full_like(ids, place.stream)))
    counter = torch.stack((quad.expand(count, quads), *per_sample), -1)
    key = torch.stack((seeds & MASK, seeds >> 32 & MASK), -1)[:, None]
    return philox4x32(counter, key)


def _made_on(device: torch.device, value: int | Tensor) -> Tensor:
    """A number as a tensor that is made on the device, since bringing it there would wait."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.int64, device=device)


def _as_int64(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed must hold 64-bit whole numbers, got {seed}")
    return seed


def _per_sample(name: str, values: Tensor, count: int, device: torch.device) -> Tensor:
    check(
        values.ndim == 0 or values.shape == (count,),
        f"{name} must be one or one per sample ({count}), got {list(values.shape)}",
    )
    return values.to(device)


def _word(name: str, value: object) -> Tensor:
    """32-bit words as int64; a step on the device is taken as it is, for looking would wait for the device."""
    words = _whole_numbers(name, value)
    if words.device.type == "cpu" and words.numel() and not torch.compiler.is_compiling():
        low, high = words.aminmax()
        check(low >= 0 and high <= MASK, f"{name} must lie in 0...2**32-1, got {int(low)} to {int(high)}")
    return words


def _whole_numbers(name: str, value: object) -> Tensor:
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} must hold 64-bit whole numbers: {error}") from None
    whole = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
    check(whole or table.numel() == 0, f"{name} must hold whole numbers, got {table.dtype}")
    return table.to(torch.int64)
