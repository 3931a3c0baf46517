"""The forward-process family: noising a sample, and the loss against what the noise was.

Noise is either given or belongs to (seed, step, sample), see :mod:`fastdiff.noise`; the loss draws it again, once,
and keeps for its gradient what it left over of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff import noise as noises
from fastdiff.backends import body
from fastdiff.errors import InputError, check
from fastdiff.ops import library, reference
from fastdiff.ops.checks import (
    check_apart,
    check_floating,
    check_numbers,
    check_output,
    check_result,
    check_same,
    check_scale,
)
from fastdiff.ops.layout import empty_like

#: What a bound holds of a sample's timestep: its levels, p and q of :mod:`fastdiff.ops.row`, the posterior mean's
#: weight of x0, the logarithms of the two variances, and the weight of the divergence.
BOUND = ("alpha", "sigma", "p", "q", "b", "lo", "hi", "weight")


def add_noise(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    noise: Tensor | noises.Address | None = None,
    *,
    seed: noises.Seed | None = None,
    step: int | Tensor = 0,
    sample: Sequence[int] | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x_t = alpha x0 + sigma noise (Ho et al. 2020, eq. 4).

    Args:
        x0: ``[N, C, ...]`` float; computed in float32 (float64 for float64) and rounded once to x0's dtype.
        alpha, sigma: a number or ``[N]``.
        noise: shape of ``x0``, or the :class:`~fastdiff.noise.Address` it is drawn from; when left out, the training
            noise of (``seed``, ``step``, ``sample``).
        out: where to write the result, like ``x0`` and dense; may be ``x0`` or ``noise`` itself.

    Raises:
        InputError: shapes or devices that do not fit, integer tensors, neither or both of noise and seed.
    """
    try:
        if run := library.quick("add_noise", x0, alpha, sigma, noise, out):
            result = empty_like(x0) if out is None else out
            check(result.dtype == x0.dtype, "dtypes differ")
            run(x0, alpha, sigma, _noise(x0, noise, seed, step, sample), result)
    except Exception:  # said better, or mended, below
        run = None
    if run is None:
        result = _add_noise(x0, alpha, sigma, noise, seed, step, sample, out)
    if out is not None:
        library.written(out)
    return result


def _add_noise(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    noise: Tensor | noises.Address | None,
    seed: noises.Seed | None,
    step: int | Tensor,
    sample: Sequence[int] | Tensor | None,
    out: Tensor | None,
) -> Tensor:
    check_floating("x0", x0)
    alpha, sigma = check_scale("alpha", alpha, x0), check_scale("sigma", sigma, x0)
    source = _noise(x0, noise, seed, step, sample)
    if out is not None:
        check_result("out", out, x0, x0.dtype)
        given = (x0, noise if isinstance(noise, Tensor) else None)
        check_apart(given, [("out", out, given)])
    if library.watched() and not torch.compiler.is_compiling():
        result = empty_like(x0) if out is None else out
        reference.add_noise(x0, alpha, sigma, source, result)
        return result
    if library.traced(x0, alpha, sigma, noise):
        result = library.add_noise(x0, alpha, sigma, source)
        return result if out is None else out.copy_(result)
    result = empty_like(x0) if out is None else out
    body("add_noise", x0.device, library.wide(x0))(x0, alpha, sigma, source, result)
    return result


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    noise: Tensor | None = None,
    *,
    bound: Tensor | None = None,
    seed: noises.Seed | None = None,
    step: int | Tensor = 0,
    sample: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Weighted mean squared error of a network output against ``f x0 + g noise``, one value per sample.

    Epsilon has f, g = 0, 1; sample 1, 0; v_prediction -sigma, alpha; flow_prediction -1, 1. Noise that is not
    given is drawn again and never stored: where only ``output`` needs a gradient, the forward pass keeps its residual,
    a tensor of x0's shape, and the backward pass scales that.

    Args:
        output: network output of any float dtype, shape of ``x0``, or ``[N, 2C, ...]`` with learned variance: the
            first half is compared with the target, the second is the fractions that ``bound`` asks for.
            Gradients flow to it, and to every other tensor but ``bound``.
        x0: ``[N, C, ...]``.
        f, g, weight: ``[N]``.
        noise: shape of ``x0``; when left out, the training noise of (``seed``, ``step``, ``sample``).
        bound: ``[N, len(BOUND)]``, the letters of :data:`BOUND` for each sample: adds ``weight`` times the mean
            divergence of the posterior from the learned step, nats, whose gradient goes to the fractions alone
            (the hybrid objective, Nichol & Dhariwal 2021, eq. 15 and 16).

    Returns:
        ``[N]``, float32 (float64 for float64), mean over all elements of a sample.

    Raises:
        InputError: shapes or devices that do not fit, integer tensors, neither or both of noise and seed.
    """
    check_floating("x0", x0)
    check_output(output, x0)
    f, g, weight = (check_numbers(name, v, x0) for name, v in (("f", f), ("g", g), ("weight", weight)))
    source = _noise(x0, noise, seed, step, sample)
    bound = _check_bound(bound, output, x0)
    wide = library.wide(x0)
    if library.watched() and not torch.compiler.is_compiling():
        return reference.loss(output, x0, f, g, weight, bound, source)
    if library.traced(output, x0, f, g, weight, noise):
        return library.diffusion_loss(output, x0, f, g, weight, bound, source)
    result = torch.empty(len(x0), dtype=wide, device=x0.device)
    body("diffusion_loss", x0.device, wide)(output, x0, f, g, weight, bound, source, result)
    return result


def _check_bound(bound: Tensor | None, output: Tensor, x0: Tensor) -> Tensor | None:
    if bound is None:
        return None
    check_floating("bound", bound)
    if bound.shape != (len(x0), len(BOUND)) or bound.device != x0.device:
        raise InputError(f"bound must be {[len(x0), len(BOUND)]} on {x0.device}, got {list(bound.shape)}")
    if output.shape[1] != 2 * x0.shape[1]:
        raise InputError(f"output must have {2 * x0.shape[1]} channels with a bound, got {output.shape[1]}")
    return bound.detach().to(library.wide(x0)).contiguous()


def _noise(
    x0: Tensor,
    noise: Tensor | noises.Address | None,
    seed: noises.Seed | None,
    step: int | Tensor,
    sample: Sequence[int] | Tensor | None,
) -> Tensor | noises.Address:
    if (noise is None) == (seed is None):
        raise InputError("give either noise or seed")
    if noise is not None:
        if sample is not None or isinstance(step, Tensor) or step:
            raise InputError("step and sample choose among the noise of a seed: give seed instead of noise")
        if not isinstance(noise, noises.Address):
            check_same("noise", noise, x0)
        return noise
    assert seed is not None
    training = noises.Stream.TRAINING
    return noises.address(len(x0), x0.device, seed=seed, step=step, sample=sample, stream=training)
