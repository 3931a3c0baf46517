"""Energy distance: how far two point clouds are apart, for data without images or features."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import check


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs (Székely & Rizzo 2013), float64; at least 0.

    Args:
        x, y: points ``[n, d]`` and ``[m, d]``.

    Raises:
        InputError: not two sets of points of one dimension, or values that are not finite.
    """
    for name, points in (("x", x), ("y", y)):
        check(points.ndim == 2 and len(points) > 0, f"{name} must be points [n, d], got {list(points.shape)}")
        check(bool(torch.isfinite(points).all()), f"{name} holds NaN or infinite values")
    check(x.shape[1] == y.shape[1], f"x and y must have one dimension, got {x.shape[1]} and {y.shape[1]}")
    x, y = x.double(), y.double()
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def _mean_distance(x: Tensor, y: Tensor) -> float:
    rows = (torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist").sum() for part in x.split(1024))
    return float(sum(rows)) / (len(x) * len(y))
