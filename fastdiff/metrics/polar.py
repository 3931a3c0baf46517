"""The nuclear norm by matrix products alone: what a GPU does best, in float64.

The orthogonal factor U of M = U H is what odd polynomials of M tend to that bring its singular values to 1, and the
nuclear norm is tr(U^T M). The polynomials are composed quintics, each the best on what the one before leaves
(Nakatsukasa & Freund 2016; Amsel et al. 2025). A singular value below ``LEAST`` of the Frobenius norm counts too
little; all others come within rounding.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

LEAST = 1e-10
_NEAR = 1e-4  # where the quintic that is flat at 1 is as good as the best one
_SLACK = 1 + 1e-12  # what rounding may add to a singular value

Quintic = tuple[float, float, float]  # a x + b x^3 + c x^5


def nuclear_norm(m: Tensor) -> Tensor:
    """The sum of the singular values of ``m``, float64 ``[n, n]``: 0-d, on its device."""
    norm = torch.linalg.matrix_norm(m) * _SLACK
    u = m / torch.where(norm > 0, norm, 1.0)
    gram, factor, following = (torch.empty_like(u) for _ in range(3))
    for a, b, c in schedule():
        torch.mm(u.mT, u, out=gram)
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=factor)
        torch.addmm(u, u, factor, beta=a, out=following)
        u, following = following, u
    return (u * m).sum()


@cache
def schedule(least: float = LEAST) -> tuple[Quintic, ...]:
    """The quintics that bring every number of [least, 1] to 1, in their order."""
    quintics: list[Quintic] = []
    low, high = least, 1.0
    while high - low > _NEAR:
        quintic, error = best_quintic(low, high)
        quintics.append(quintic)
        low, high = 1 - error, (1 + error) * _SLACK
    error = high - low
    while error > 1e-17:
        quintics.append((15 / 8, -10 / 8, 3 / 8))
        error = 2.5 * error**3
    return tuple(quintics)


def best_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic nearest to 1 on [low, high], and how far off it is at most (Remez's exchange).

    It misses by the same amount, with alternating signs, at both ends and at its two extrema between.
    """
    inner = low + (high - low) * np.array([0.35, 0.8])
    for _ in range(100):
        at = np.array([low, *inner, high])
        # p(at) = 1 -+ error; 1 - error is the unknown, for it is lost in 1 where low is tiny.
        rows = np.stack((at, at**3, at**5, [-1, 1, -1, 1]), 1)
        a, b, c, least = np.linalg.solve(rows, [0, 2, 0, 2])
        spread = math.sqrt(9 * b * b - 20 * a * c)
        before, inner = inner, np.sqrt(np.array([-3 * b - spread, -3 * b + spread]) / (10 * c))
        if np.allclose(before, inner, rtol=1e-14, atol=0):
            break
    return (float(a), float(b), float(c)), 1 - float(least)
