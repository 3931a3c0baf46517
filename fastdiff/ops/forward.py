"""The forward-process family: noising a sample, and the loss against what the noise was.

Noise is either given or belongs to (seed, step, sample), see :mod:`fastdiff.noise`; the loss draws it again
rather than keep it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff import noise as noises
from fastdiff.errors import check
from fastdiff.ops.checks import check_floating, check_per_sample, check_same, check_scale
from fastdiff.ops.dispatch import body


def add_noise(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    noise: Tensor | None = None,
    *,
    seed: noises.Seed | None = None,
    step: int = 0,
    sample: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """x_t = alpha x0 + sigma noise (Ho et al. 2020, eq. 4).

    Args:
        x0: ``[N, ...]`` float; computed in float32 (float64 for float64) and rounded once to x0's dtype.
        alpha, sigma: a number or ``[N]``.
        noise: shape of ``x0``; when left out, the training noise of (``seed``, ``step``, ``sample``).

    Raises:
        InputError: shapes or devices that do not fit, integer tensors, neither or both of noise and seed.
    """
    check_floating("x0", x0)
    alpha, sigma = check_scale("alpha", alpha, x0), check_scale("sigma", sigma, x0)
    noise = _noise(x0, noise, seed, step, sample)
    result: Tensor = body("add_noise", x0.device)(x0, alpha, sigma, noise)
    return result


def diffusion_loss(
    out: Tensor,
    x0: Tensor,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    noise: Tensor | None = None,
    *,
    seed: noises.Seed | None = None,
    step: int = 0,
    sample: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Weighted mean squared error of a network output against ``f x0 + g noise``, one value per sample.

    Epsilon has f, g = 0, 1; sample 1, 0; v_prediction -sigma, alpha; flow_prediction -1, 1.

    Args:
        out: network output, shape of ``x0``, any float dtype. Gradients flow to it.
        x0: ``[N, ...]``.
        f, g, weight: ``[N]``.
        noise: shape of ``x0``; when left out, the training noise of (``seed``, ``step``, ``sample``).

    Returns:
        ``[N]``, float32 (float64 for float64), mean over all elements of a sample.

    Raises:
        InputError: shapes or devices that do not fit, integer tensors, neither or both of noise and seed.
    """
    check_floating("x0", x0)
    check_floating("out", out)
    check_same("out", out, x0)
    for name, value in (("f", f), ("g", g), ("weight", weight)):
        check_per_sample(name, value, x0)
    noise = _noise(x0, noise, seed, step, sample)
    result: Tensor = body("diffusion_loss", x0.device)(out, x0, noise, f, g, weight)
    return result


def _noise(
    x0: Tensor, noise: Tensor | None, seed: noises.Seed | None, step: int, sample: Sequence[int] | Tensor | None
) -> Tensor:
    check((noise is None) != (seed is None), "give either noise or seed")
    if noise is not None:
        check_floating("noise", noise)
        check_same("noise", noise, x0)
        return noise
    assert seed is not None
    dtype = torch.promote_types(x0.dtype, torch.float32)
    training = noises.Stream.TRAINING
    return noises.normal(x0.shape, seed=seed, step=step, sample=sample, stream=training, device=x0.device, dtype=dtype)
