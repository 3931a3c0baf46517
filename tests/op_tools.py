"""Tools of the op tests: backends, layouts, error bounds, and each op against its formula in extended precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import settings

import fastdiff as fd
from fastdiff.ops.forward import BOUND
from fastdiff.ops.row import LETTERS, make_table

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = ("reference", "native")  # that serve the step family in float32; float64 is the reference's alone
SHAPES = [(0, 3, 4, 4), (1, 1), (5, 3), (2, 3, 1, 1), (3, 2, 5), (2, 2, 3, 2, 3), (2, 3, 7, 5), (1, 4, 16, 16)]
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")
PROCESS = {  # alpha, sigma, alpha_next, sigma_next of a step and of the last one, to the clean end
    "vp": [(0.6, 0.8, 0.8, 0.6), (0.96, 0.28, 1.0, 0.0)],
    "flow": [(0.25, 0.75, 0.5, 0.5), (0.75, 0.25, 1.0, 0.0)],
    "edm": [(1.0, 10.0, 1.0, 4.0), (1.0, 0.5, 1.0, 0.0)],
}
TINY = {F16: 2.0**-25, BF16: 2.0**-133, F32: 2.0**-149, F64: 0.0}
QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)
THOROUGH = settings(QUICK, max_examples=2_000)
LONG = settings(QUICK, max_examples=10_000)


def unit(dtype):
    """Half an ulp of 1: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def wide_of(dtype):
    return F64 if dtype == F64 else F32


def randn(shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def scattered(shape, seed, dtype=F32, decades=0):
    """Normals, each times a power of ten from -``decades`` to ``decades`` (at most 4 in float16)."""
    exponent = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1
    return (randn(shape, seed, F64) * 10 ** (exponent * min(decades, 4 if dtype == F16 else 30))).to(dtype)


def lay_out(x, layout):
    """The values of x (of its first sample for ``expanded``) with other strides."""
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device)
        wide[..., 1:-2:2] = x
        return wide[..., 1:-2:2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def exact(x):
    return x.detach().to(F64).contiguous().numpy().astype(np.longdouble)


def column(values, x):
    """Numbers or ``[N]`` as an extended-precision array that broadcasts against x."""
    values = np.asarray(exact(values) if isinstance(values, torch.Tensor) else values, np.longdouble)
    return values.reshape(-1, *(1,) * (x.ndim - 1)) if values.ndim else values


def assert_within(actual, truth, bound):
    """Every element of ``actual`` is within ``bound`` of ``truth``, or infinite if that is too large; NaN never is."""
    assert tuple(actual.shape) == truth.shape
    largest, size = torch.finfo(actual.dtype).max, np.abs(truth)
    assert (exact(actual) == np.sign(truth) * np.inf)[size - bound > largest].all()
    error = np.where(size + bound > largest, 0, np.abs(exact(actual) - truth))
    worst = np.max(error / np.maximum(bound, np.longdouble(1e-300)), initial=0.0)
    assert (error <= bound).all(), (
        f"error {float(worst):.3g} of the bound, {float(np.max(error, initial=0)):.3g} absolute"
    )


def rounded(truth, magnitude, work, kept):
    """Bound of a result computed in ``work`` with terms of ``magnitude`` and kept in ``kept``."""
    computed = 8 * unit(work) * magnitude
    final = unit(kept) * (np.abs(truth) + computed) if kept != work else 0
    return computed + final + TINY[kept] + TINY[work]


def twice(call, *tensors):
    """The result of a call, which repeats bit for bit and leaves its arguments as they were."""
    before = [t.detach().clone() for t in tensors]
    first, second = call(), call()
    for a, b in zip(flat(first), flat(second), strict=True):
        assert torch.equal(a, b)
    for t, copy in zip(tensors, before, strict=True):
        assert torch.equal(t, copy)
    return first


def backends_of(*dtypes):
    """The backends that compute in these dtypes."""
    return BACKENDS if F64 not in dtypes else BACKENDS[:1]


def on_each_backend(dtype, call, *tensors):
    """The result of a call on every backend that serves ``dtype``, the reference first; see :func:`twice`."""
    results = []
    for name in backends_of(dtype):
        with fd.backend(name):
            results.append(twice(call, *tensors))
    return results


def same_bits(a, b):
    """Whether two tensors are equal in shape, dtype and every bit; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = (a == b) & (a.signbit() == b.signbit())
    return bool((equal | (a.isnan() & b.isnan())).all())


def assert_same_bits(first, *others):
    """All results (tensors, or Steps of them) are equal bit for bit."""
    for other in others:
        for a, b in zip(flat(first), flat(other), strict=True):
            assert same_bits(a, b), f"largest difference {(a.double() - b.double()).abs().max()}"


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def memory_format(layout, ndim):
    if layout == "channels_last" and ndim in (4, 5):
        return torch.channels_last if ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


def assert_kept_format(result, layout):
    if layout in ("contiguous", "channels_last") and result.numel():
        assert result.is_contiguous(memory_format=memory_format(layout, result.ndim))


def scale(count, per_sample, seed, dtype=F64):
    """A number, or one per sample."""
    values = 0.1 + randn((max(count, 1),), seed, dtype).abs()
    return values[:count] if per_sample else float(values[0])


def check_add_noise(shape, dtype, layout="contiguous", per_sample=True, noise_dtype=None, seed=0, decades=0):
    x0 = lay_out(scattered(shape, seed, dtype, decades), layout)
    noise = lay_out(scattered(shape, seed + 1, noise_dtype or dtype, decades), layout)
    alpha, sigma = scale(shape[0], per_sample, seed + 2), scale(shape[0], per_sample, seed + 3)
    results = on_each_backend(dtype, lambda: fd.ops.add_noise(x0, alpha, sigma, noise), x0, noise)
    assert_same_bits(*results)
    result = results[-1]
    assert result.dtype == dtype
    signal, added = column(alpha, x0) * exact(x0), column(sigma, x0) * exact(noise)
    truth = signal + added
    assert_within(result, truth, rounded(truth, np.abs(signal) + np.abs(added), wide_of(dtype), dtype))
    assert_kept_format(result, layout)


def check_diffusion_loss(shape, dtype, layout="contiguous", output_dtype=None, seed=0, decades=0):
    x0 = lay_out(scattered(shape, seed, dtype, decades), layout)
    noise = lay_out(scattered(shape, seed + 1, dtype, decades), layout)
    output = lay_out(scattered(shape, seed + 2, output_dtype or dtype, decades), layout)
    f, g, weight = (randn(shape[:1], seed + i, F64) for i in (3, 4, 5))
    weight = weight.abs()
    results = on_each_backend(dtype, lambda: fd.ops.diffusion_loss(output, x0, f, g, weight, noise), output, x0, noise)
    work = wide_of(dtype)
    data, added = column(f, x0) * exact(x0), column(g, x0) * exact(noise)
    given = exact(output.to(work))
    difference = given - data - added
    error = 6 * unit(work) * (np.abs(given) + np.abs(data) + np.abs(added))
    inner = tuple(range(1, len(shape)))
    mean = (difference**2).mean(inner)
    spread = (2 * np.abs(difference) * error + error**2).mean(inner)
    w = exact(weight)
    for result in results:
        assert result.dtype == work
        assert_within(result, w * mean, w * (spread + 32 * unit(work) * mean) + (1 + w) * TINY[work])


def check_guide(shape, dtype, layout="contiguous", per_sample=True, seed=0, decades=0):
    cond, uncond = (lay_out(scattered(shape, seed + i, dtype, decades), layout) for i in (0, 1))
    w = scale(shape[0], per_sample, seed + 2)
    w = 7.5 * w
    results = on_each_backend(dtype, lambda: fd.ops.guide(cond, uncond, w), cond, uncond)
    assert_same_bits(*results)
    result = results[-1]
    assert result.dtype == dtype
    c, u, s = exact(cond), exact(uncond), column(w, cond)
    truth = u + s * (c - u)
    assert_within(result, truth, rounded(truth, np.abs(u) + np.abs(s) * (np.abs(c) + np.abs(u)), wide_of(dtype), dtype))
    assert_kept_format(result, layout)


def random_table(rows, seed, dtype, learned=False):
    """Rows in which every letter matters; ``clip`` bites now and then."""
    values = randn((rows, len(LETTERS)), seed, F64)
    table = make_table(rows, **{letter: values[:, i] for i, letter in enumerate(LETTERS)})
    table[:, LETTERS.index("clip")] = 0.5 + values[:, LETTERS.index("clip")].abs()
    table[:, LETTERS.index("s")] = values[:, LETTERS.index("s")].abs()
    table[:, [LETTERS.index("lo"), LETTERS.index("hi")]] *= learned
    return table.to(dtype)


def numpy_row(x, output, letters, uncond, history, anchor, noise):
    """One row by the letters in extended precision: each result with the bound of its rounding error."""
    work = x.dtype
    u, channels, big = unit(work), x.shape[1], exact(x)
    r = {letter: column(letters[..., i], x) for i, letter in enumerate(LETTERS)}
    given = exact(output.to(work))
    prediction, f = given[:, :channels], (1 + given[:, channels:]) / 2
    size = np.abs(prediction)
    if uncond is not None:
        without = exact(uncond.to(work))[:, :channels]
        size = np.abs(without) + np.abs(r["w"]) * (size + np.abs(without))
        prediction = without + r["w"] * (prediction - without)
    x0 = np.clip(r["p"] * big + r["q"] * prediction, -r["clip"], r["clip"])
    x0_error = 8 * u * (np.abs(r["p"] * big) + np.abs(r["q"]) * size)
    terms = [r["a"] * big, r["b"] * x0, *(r[f"c{i + 1}"] * exact(h) for i, h in enumerate(history))]
    stored = anchor
    if anchor is not None:
        terms.append(r["e"] * exact(anchor))
        parts = [r["k"] * exact(anchor), r["m"] * big, r["n"] * x0]
        stored = sum(parts), 8 * u * sum(map(np.abs, parts)) + np.abs(r["n"]) * x0_error
    if noise is not None:
        exponent = (f * r["hi"] + (1 - f) * r["lo"]) / 2 if f.size else np.longdouble(0)
        sloppy = 1 + np.abs(r["hi"]) * (1 + np.abs(f)) + np.abs(r["lo"]) * (1 + np.abs(f)) if f.size else 1
        terms.append(r["s"] * np.exp(exponent) * exact(noise))
    error = 12 * u * sum(map(np.abs, terms)) + np.abs(r["b"]) * x0_error
    if noise is not None:
        error = error + 8 * u * sloppy * np.abs(terms[-1])
    # Of the exponential, on which backends differ by an ulp or two, and of adding what it scales.
    last = unit(work) * (8 * np.abs(terms[-1]) + 2 * np.abs(sum(terms)))
    push = r["u"] * big + r["v"] * x0, 8 * u * (np.abs(r["u"] * big) + np.abs(r["v"] * x0)) + np.abs(r["v"]) * x0_error
    return {
        "x": (sum(terms), error),
        "x0": (x0, x0_error),
        "push": push if history else None,
        "anchor": stored,
        "last": last,
    }


def check_affine_step(
    shape,
    dtype=F32,
    output_dtype=F32,
    layout="contiguous",
    per_sample=False,
    guided=False,
    stored=0,
    anchored=False,
    noisy=True,
    learned=False,
    seed=0,
    decades=0,
):
    x = lay_out(scattered(shape, seed, dtype, decades), layout)
    wide = (shape[0], shape[1] * (2 if learned else 1), *shape[2:])
    output = lay_out(scattered(wide, seed + 1, output_dtype, decades), layout)
    uncond = lay_out(scattered(wide, seed + 2, output_dtype, decades), layout) if guided else None
    history = tuple(lay_out(scattered(shape, seed + 3 + i, dtype, decades), layout) for i in range(stored))
    anchor = lay_out(scattered(shape, seed + 6, dtype, decades), layout) if anchored else None
    noise = lay_out(scattered(shape, seed + 7, dtype, decades), layout) if noisy else None
    table = random_table(5, seed + 8, dtype, learned)
    row = torch.randint(5, shape[:1], generator=torch.Generator().manual_seed(seed)) if per_sample else seed % 5
    given_vectors = [t for t in (x, output, uncond, *history, anchor, noise, table) if t is not None]
    more = {"uncond": uncond, "history": history, "anchor": anchor, "noise": noise}
    steps = on_each_backend(dtype, lambda: fd.ops.affine_step(x, output, table, row, **more), *given_vectors)
    truth = numpy_row(x, output, table[row], uncond, history, anchor, noise)
    for step in steps:
        check_step(step, truth, x, history, layout)
    if learned and noisy:
        for a, b in zip(flat(steps[0]), flat(steps[-1]), strict=True):
            assert_within(b, exact(a), truth["last"] if a is steps[0].x else 0 * exact(a))
    else:
        assert_same_bits(*steps)


def check_step(step, truth, x, history, layout):
    """A step is the truth within its bounds, and holds what it should in the dtype and layout of x."""
    parts = {"x": step.x, "x0": step.x0, "push": step.history[0] if history else None, "anchor": step.anchor}
    for name, result in parts.items():
        assert (result is None) == (truth[name] is None)
        if result is not None:
            assert result.dtype == x.dtype
            assert_within(result, *(np.broadcast_to(part, x.shape) for part in truth[name]))
            assert_kept_format(result, layout)
    assert len(step.history) == len(history)
    for new, old in zip(step.history[1:], history[:-1], strict=True):
        assert torch.equal(new, old)


def numpy_group_norm(x, groups, eps=1e-5):
    """Two passes in extended precision; the normalised values, and the mean in units of their deviation."""
    grouped = exact(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    mean = grouped.mean(2, keepdims=True)
    deviation = np.sqrt(((grouped - mean) ** 2).mean(2, keepdims=True) + np.longdouble(eps))
    ratio = np.broadcast_to(np.abs(mean) / deviation, grouped.shape)
    return ((grouped - mean) / deviation).reshape(x.shape), ratio.reshape(x.shape)


def check_group_norm(shape, groups, dtype=F32, layout="contiguous", parts="wbsh", activation="silu", seed=0):
    work = wide_of(dtype)
    u = unit(work)
    x = lay_out(randn(shape, seed, dtype) * 3 + 1, layout)
    sizes = {"w": shape[1:2], "b": shape[1:2], "s": shape[:2], "h": shape[:2]}
    given_parts = {
        part: randn(size, seed + 1 + i, work) for i, (part, size) in enumerate(sizes.items()) if part in parts
    }
    weight, bias, scale_, shift = (given_parts.get(part) for part in "wbsh")
    residual = lay_out(randn(shape, seed + 9, dtype), layout) if "r" in parts else None
    total = x if residual is None else x + residual
    more = {"scale": scale_, "shift": shift, "activation": activation, "residual": residual, "keep_sum": True}
    results = on_each_backend(dtype, lambda: fd.ops.group_norm_silu(x, groups, weight, bias, 1e-5, **more), x)
    y, ratio = numpy_group_norm(total, groups)
    error = 16 * u * (1 + ratio) * (1 + np.abs(y))
    spread = {
        part: np.asarray(exact(value)).reshape(*((1,) * (2 - value.ndim)), *value.shape, *(1,) * (len(shape) - 2))
        for part, value in given_parts.items()
    }
    for gain, offset in ((spread.get("w", 1), spread.get("b", 0)), (1 + spread.get("s", 0), spread.get("h", 0))):
        error = error * np.abs(gain) + 4 * u * (np.abs(y) * (1 + np.abs(gain)) + np.abs(offset))
        y = y * gain + offset
    if activation == "silu":
        y = y / (1 + np.exp(-y))
        error = 1.2 * error + 8 * u * (1 + np.abs(y)) ** 2
    final = unit(dtype) * (np.abs(y) + error) if dtype != work else 0
    for result, kept in results:
        assert result.dtype == dtype
        assert_within(result, np.broadcast_to(y, shape), error + final + TINY[dtype])
        assert_kept_format(result, layout)
        assert_same_bits(kept, total)


# ---- every op as a function of its tensors --------------------------------------------------


class Call(NamedTuple):
    """``run(**tensors)``, or ``run(**tensors, out=...)``."""

    run: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    bitwise: bool = True  # backends give the same bits: neither noise is drawn nor an exponential taken, nor a sum
    sums: bool = False  # whose order depends on the layout
    writes: bool = True  # takes out=


def vectors(names, shape, seed, dtype=F32):
    return {name: randn(shape, seed + 10 * i, dtype) for i, name in enumerate(names.split())}


def call_of(op, shape, seed=0, network=F32):
    """An op with all that it can take, its network output in dtype ``network``."""
    n, wide = shape[0], (shape[0], 2 * shape[1], *shape[2:])
    name, _, source = op.partition(" ")
    place = {"seed": seed, "step": 3, "sample": torch.randperm(n, generator=torch.Generator().manual_seed(seed))}
    place = place if source == "drawn" else {}
    bitwise = source not in ("drawn", "learned")
    noise = "" if place else " noise"
    if name == "guide":
        more = vectors("scale", (n,), seed + 1)
        return Call(fd.ops.guide, vectors("cond uncond", shape, seed, network) | more)
    if name == "add_noise":
        more = vectors("alpha sigma", (n,), seed + 1)
        return Call(partial(fd.ops.add_noise, **place), vectors("x0" + noise, shape, seed) | more, bitwise)
    if name == "diffusion_loss":
        tensors = vectors("output", wide, seed + 1, network) | vectors("x0" + noise, shape, seed)
        backward = source.endswith("backward")
        run = loss_gradient if backward else fd.ops.diffusion_loss
        tensors |= vectors("f g weight", (n,), seed + 2)
        place |= {"bound": bounds(n, seed + 5)} if source.startswith("hybrid") else {}
        return Call(partial(run, **place), tensors, source == "backward", not backward, writes=False)
    more = {"input_dtype": BF16, **place}
    network_outputs = vectors("output uncond", wide if source == "learned" else shape, seed + 1, network)
    tensors = vectors("x" + noise, shape, seed) | network_outputs
    if name == "affine_step":
        tensors |= vectors("h1 h2 h3 anchor", shape, seed + 2)
        more["table"] = random_table(5, seed, F32, source == "learned")
        more["row"] = torch.arange(n) % 5 if seed % 2 else seed % 5
        return Call(partial(with_history, more=more), tensors, bitwise)
    levels = dict(zip(("alpha", "sigma", "alpha_next", "sigma_next"), PROCESS["vp"][0], strict=True))
    more |= levels | {"clip": 1.5, "guidance_scale": 2.5}
    more |= {"eta": 0.5} if name == "ddim_step" else {"variance": "learned_range" if source else "fixed_small"}
    return Call(partial(getattr(fd.ops, name), **more), tensors, bitwise)


def bounds(count, seed):
    """What the hybrid objective is told of each timestep: letters of a size as they have."""
    letters = randn((count, len(BOUND)), seed, F64)
    letters[:, BOUND.index("lo")] -= 3
    letters[:, BOUND.index("hi")] = letters[:, BOUND.index("lo")] + letters[:, BOUND.index("hi")].abs()
    return letters.float()


def with_history(h1, h2, h3, more, **tensors):
    return fd.ops.affine_step(history=(h1, h2, h3), **tensors, **more)


def loss_gradient(output, **others):
    output = output.detach().requires_grad_()
    return torch.autograd.grad(fd.ops.diffusion_loss(output, **others).sum(), output)[0]


CALLS = (
    *("add_noise", "add_noise drawn", "guide", "affine_step", "affine_step drawn", "affine_step learned"),
    *("ddim_step", "ddim_step drawn", "posterior_step", "posterior_step learned"),
    *("diffusion_loss", "diffusion_loss drawn", "diffusion_loss backward"),
    *("diffusion_loss hybrid", "diffusion_loss hybrid backward"),
)


def agree(call, a, b):
    """The results of a call on two backends are the same bits, or the same to a few ulp."""
    for first, second in zip(flat(a), flat(b), strict=True):
        if call.bitwise:
            assert same_bits(first, second)
        else:
            eps = torch.finfo(second.dtype).eps
            # A loss has terms of both signs, which may cancel.
            size = max(1, *second.abs().nan_to_num().tolist()) if call.sums and second.numel() else 1
            torch.testing.assert_close(first, second, rtol=max(3e-6, 2 * eps), atol=3e-6 * size, equal_nan=True)


FENCE = 64


def fence(x, fill):
    """A tensor with the strides and values of x between two fences; and the memory that holds all of it."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    extent *= bool(x.numel())
    memory = torch.full((extent + 2 * FENCE,), fill, dtype=x.dtype)
    memory[FENCE : FENCE + extent] = x.as_strided((extent,), (1,))
    return memory.as_strided(x.shape, x.stride(), FENCE), memory
