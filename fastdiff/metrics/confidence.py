"""How far a metric is to be trusted: bootstrap intervals, and its value at infinitely many samples (FID∞)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import check, choose
from fastdiff.metrics.features import check_features
from fastdiff.metrics.frechet import frechet_distance
from fastdiff.metrics.neighbours import check_sets
from fastdiff.metrics.statistics import FeatureStatistics

METHODS = ("percentile", "basic")
LEAST = 5000  # rows of the smallest subset (Chong & Forsyth 2020, section 5)
Metric = Callable[..., float]  # of one or more sets of features


class ConfidenceInterval(NamedTuple):
    """What a metric is, and where it may lie."""

    value: float  #: of the sets as they are
    low: float
    high: float
    standard_error: float  #: standard deviation over the resamples


class Extrapolation(NamedTuple):
    """A line through a metric at growing sizes, over 1 / size."""

    value: float  #: its intercept: the metric at infinitely many rows
    standard_error: float  #: of the intercept as the fit has it; the subsets overlap, so it is a lower bound
    slope: float
    sizes: list[int]  #: rows of the first set
    values: list[float]  #: the metric at each size


@torch.no_grad()
def bootstrap(
    metric: Metric,
    *sets: Tensor,
    resamples: int = 200,
    level: float = 0.95,
    method: str = "percentile",
    seed: int = 0,
) -> ConfidenceInterval:
    """Confidence interval of ``metric(*sets)`` from resampled rows (Efron & Tibshirani 1993, chapter 13).

    Every set is resampled for itself; what shall stay fixed belongs into ``metric``. Resamples hold rows several
    times: metrics that compare rows of one set with each other (KID, neighbours) see copies where there are none.

    Args:
        metric: a number from features, such as ``frechet_distance_from_features``.
        sets: features ``[N, D]`` each.
        resamples: how many evaluations.
        level: share of the resamples inside, in (0, 1).
        method: ``percentile`` | ``basic``: the same reflected at the value, which takes away the bias that resampling
            shows. A Fréchet distance is too large at any sample size and larger in a resample: it needs ``basic``.
        seed: of the draws.

    Raises:
        InputError: sets that are not finite, of at least 2 rows, one width and device, or an option out of range.
    """
    _check_sets(2, sets)
    choose("method", method, METHODS)
    check(resamples >= 2, f"resamples must be at least 2, got {resamples}")
    check(0 < level < 1, f"level must be in (0, 1), got {level}")
    random = np.random.default_rng(seed)

    value = float(metric(*sets))
    values = [float(metric(*(_take(s, random.integers(len(s), size=len(s))) for s in sets))) for _ in range(resamples)]
    low, high = map(float, np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
    if method == "basic":
        low, high = 2 * value - high, 2 * value - low
    return ConfidenceInterval(value, low, high, float(np.std(values, ddof=1)))


@torch.no_grad()
def extrapolate(
    metric: Metric, *sets: Tensor, points: int = 15, least: int | None = None, seed: int = 0
) -> Extrapolation:
    """The metric at infinitely many rows, from its values at ``points`` sizes (Chong & Forsyth 2020, section 5).

    The bias of an Inception Score or a Fréchet distance is linear in 1 / size but for higher orders. Each size is a
    random subset without replacement, the same share of every set; what shall stay whole belongs into ``metric``.

    Args:
        metric: a number from features, such as ``frechet_distance_from_features``.
        sets: features ``[N, D]`` each.
        points: how many sizes, evenly from ``least`` to N.
        least: the smallest size of the first set; 5000, or half of it where there are fewer than 10,000 rows.
        seed: of the subsets.

    Raises:
        InputError: sets that are not finite, of at least 4 rows, one width and device, or an option out of range.
    """
    from scipy.stats import linregress

    _check_sets(4, sets)
    total = len(sets[0])
    least = min(LEAST, total // 2) if least is None else least
    check(points >= 3, f"points must be at least 3, got {points}")
    check(2 <= least < total, f"least must be 2 to {total - 1} for {total} rows, got {least}")
    random = np.random.default_rng(seed)

    sizes = [round(size) for size in np.linspace(least, total, points)]
    values = [float(metric(*_subsets(sets, size / total, random))) for size in sizes]
    fit = linregress([1 / size for size in sizes], values)
    return Extrapolation(float(fit.intercept), float(fit.intercept_stderr), float(fit.slope), sizes, values)


@torch.no_grad()
def fid_infinity(
    x: Tensor, y: Tensor | FeatureStatistics, *, points: int = 15, least: int | None = None, seed: int = 0
) -> Extrapolation:
    """FID∞: the Fréchet distance of infinitely many generated images from the reference as it is.

    The bias that the reference's own size leaves stays; ``extrapolate(frechet_distance_from_features, x, y)`` shrinks
    both sets and takes both away.

    Args:
        x: features of generated images ``[n, D]``; better n well above D.
        y: features of the reference ``[m, D]``, or their statistics.
        points, least, seed: as in :func:`extrapolate`.

    Raises:
        InputError: as :func:`extrapolate`.
    """
    if isinstance(y, Tensor):
        check_sets(2, x=x, y=y)
        y = FeatureStatistics.of(y)
    check_features("x", x, 4)
    check(x.shape[1] == y.dim, f"x must be as wide as the reference's {y.dim}, got {x.shape[1]}")
    mean, covariance = y.mean.to(x.device), y.covariance.to(x.device)

    def distance(part: Tensor) -> float:
        statistics = FeatureStatistics.of(part)
        return frechet_distance(statistics.mean, statistics.covariance, mean, covariance)

    return extrapolate(distance, x, points=points, least=least, seed=seed)


def _check_sets(least: int, sets: tuple[Tensor, ...]) -> None:
    check(len(sets) >= 1, "give at least one set of features")
    check_sets(least, **{f"set {i}": s for i, s in enumerate(sets, 1)})


def _subsets(sets: tuple[Tensor, ...], share: float, random: np.random.Generator) -> Iterator[Tensor]:
    for features in sets:
        yield _take(features, random.permutation(len(features))[: max(2, round(share * len(features)))])


def _take(features: Tensor, rows: np.ndarray) -> Tensor:
    return features[torch.from_numpy(rows).to(features.device)]
