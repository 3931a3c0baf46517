"""Kernel distances of two sets of features: the squared maximum mean discrepancy, KID and CMMD."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import check
from fastdiff.metrics.neighbours import blocks, centred, check_sets, squared_distances

CMMD_SCALE = 1000.0  # Jayasumana et al. 2024, section 4
Kernel = Callable[[Tensor, Tensor], Tensor]  # float64 [n, D], [m, D] -> [n, m]


class KernelDistance(NamedTuple):
    """A squared maximum mean discrepancy.

    The standard error comes from the variance of rows and of pairs of rows (Hoeffding's decomposition). It is never
    below what holds for equal distributions: for like sets that makes it up to 1.4 times too large.
    """

    value: float  #: unbiased, so it may fall below 0
    standard_error: float  #: of ``value``, over new samples of both sets; NaN below 4 rows
    std: float  #: over the subsets, as peers report it: no error of ``value``; 0 without subsets


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³, the kernel of KID (Bińkowski et al. 2018, section 4)."""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base * base * base


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|² / (2 sigma²)); cancels least for centred features."""
    check(sigma > 0, f"sigma must be above 0, got {sigma}")
    return lambda x, y: squared_distances(x, y).div_(-2 * sigma**2).exp_()


@torch.no_grad()
def mmd(x: Tensor, y: Tensor, kernel: Kernel = polynomial) -> KernelDistance:
    """The unbiased squared MMD of all pairs of rows (Gretton et al. 2012, eq. 3), KID by default.

    Products and sums are float64, whatever the features are: in float32 the three means, which nearly cancel, would
    lose digits. Memory is that of a block of pairs and of the features in float64.

    Args:
        x, y: features ``[n, D]`` and ``[m, D]``; symmetric in both.
        kernel: of float64 rows, see :data:`Kernel`.

    Raises:
        InputError: not two finite sets of at least 2 rows, one width and device.
    """
    check_sets(2, x=x, y=y)
    moments = _moments(kernel, x.double(), y.double())
    return KernelDistance(moments.value, math.sqrt(moments.variance(len(x), len(y))), 0.0)


@torch.no_grad()
def kid(x: Tensor, y: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> KernelDistance:
    """Kernel inception distance as it is reported: the mean of :func:`mmd` over random subsets (Bińkowski et al. 2018).

    Subsets are drawn as torch-fidelity draws them: an equal seed gives its number. ``mmd(x, y)`` uses every pair
    instead and is the better estimate.

    Args:
        x, y: features ``[n, D]`` and ``[m, D]``.
        subsets: how many pairs of subsets.
        subset_size: rows of each, drawn without replacement.
        seed: of the draws.

    Raises:
        InputError: not two finite sets of at least 2 rows, one width and device, or fewer rows than ``subset_size``.
    """
    check_sets(2, x=x, y=y)
    check(subsets >= 1, f"subsets must be at least 1, got {subsets}")
    check(subset_size >= 2, f"subset_size must be at least 2, got {subset_size}")
    for name, features in (("x", x), ("y", y)):
        fits = subset_size <= len(features)
        check(fits, f"subset_size must be at most the rows of {name}: got {subset_size} for {len(features)}")
    random = np.random.RandomState(seed)

    def subset(features: Tensor) -> Tensor:
        rows = random.choice(len(features), subset_size, replace=False)
        return features[torch.from_numpy(rows).to(features.device)].double()

    drawn = [_moments(polynomial, subset(x), subset(y)) for _ in range(subsets)]
    mean = _Moments(*map(fmean, zip(*drawn, strict=True)))
    # Subsets are independent given the rows: their mean varies as mmd(x, y) does and by the draw.
    rows, part = mean.variance(len(x), len(y)), mean.variance(subset_size, subset_size)
    return KernelDistance(mean.value, math.sqrt(rows + (part - rows) / subsets), pstdev(d.value for d in drawn))


@torch.no_grad()
def cmmd(x: Tensor, y: Tensor, *, sigma: float = 10.0) -> KernelDistance:
    """CLIP maximum mean discrepancy: 1000 times :func:`mmd` with a Gaussian kernel (Jayasumana et al. 2024).

    The paper's own code keeps the pairs of a row with itself and gives more by 1000 (1 - mean k(x, x')) / n
    + 1000 (1 - mean k(y, y')) / m.

    Args:
        x, y: CLIP image embeddings of unit length ``[n, D]`` and ``[m, D]``.
        sigma: width of the kernel.

    Raises:
        InputError: not two finite sets of at least 2 rows, one width and device, or sigma not above 0.
    """
    check_sets(2, x=x, y=y)
    value, error, std = mmd(*centred(x, y), gaussian(sigma))
    return KernelDistance(CMMD_SCALE * value, CMMD_SCALE * error, std)


# ---- the estimate and its variance ----------------------------------------------------------


class _Moments(NamedTuple):
    """The estimate from one pair of sets, and the parts of its variance."""

    value: float
    row_x: float  # variance of E[k(x, X')] - E[k(x, Y)] over x
    row_y: float
    pair_xx: float  # mean square of what k(x, x') is beyond its rows' means
    pair_yy: float
    pair_xy: float

    def variance(self, n: int, m: int) -> float:
        """Of the estimate from n and m rows."""
        rows = 4 * max(self.row_x, 0.0) / n + 4 * max(self.row_y, 0.0) / m
        pairs = 2 * self.pair_xx / (n * (n - 1)) + 2 * self.pair_yy / (m * (m - 1)) + 4 * self.pair_xy / (n * m)
        return rows + pairs


class _Sums(NamedTuple):
    rows: Tensor
    columns: Tensor
    squares: Tensor


def _moments(kernel: Kernel, x: Tensor, y: Tensor) -> _Moments:
    n, m = len(x), len(y)
    xx, yy, xy = _sums(kernel, x), _sums(kernel, y), _sums(kernel, x, y)
    of_x, of_y = xx.rows / (n - 1) - xy.rows / m, yy.rows / (m - 1) - xy.columns / n
    pair_xx, pair_yy, pair_xy = _pair_within(xx), _pair_within(yy), _pair_between(xy)
    row_x = float(of_x.var()) - pair_xx / (n - 1) - pair_xy / m
    row_y = float(of_y.var()) - pair_yy / (m - 1) - pair_xy / n
    return _Moments(float(of_x.mean() + of_y.mean()), row_x, row_y, pair_xx, pair_yy, pair_xy)


def _sums(kernel: Kernel, x: Tensor, y: Tensor | None = None) -> _Sums:
    """Sums over all pairs of ``x`` and ``y``, or of different rows of ``x``."""
    other = x if y is None else y
    rows, columns, squares = [], x.new_zeros(len(other)), x.new_zeros(())
    for block in blocks(x, other):
        values = kernel(x[block], other)
        if y is None:
            values.diagonal(block.start).zero_()
        rows.append(values.sum(1))
        columns += values.sum(0)
        squares += values.square().sum()
    return _Sums(torch.cat(rows), columns, squares)


def _pair_within(s: _Sums) -> float:
    """Unbiased, by U-centring (Székely & Rizzo 2014, section 3)."""
    n = len(s.rows)
    if n < 4:
        return math.nan
    total = s.rows.sum()
    squares = s.squares - 2 * s.rows.square().sum() / (n - 2) + total.square() / ((n - 1) * (n - 2))
    return max(float(squares) / (n * (n - 3)), 0.0)


def _pair_between(s: _Sums) -> float:
    """Unbiased: the interaction of a two-way table."""
    n, m = len(s.rows), len(s.columns)
    total = s.rows.sum()
    squares = s.squares - s.rows.square().sum() / m - s.columns.square().sum() / n + total.square() / (n * m)
    return max(float(squares) / ((n - 1) * (m - 1)), 0.0)
