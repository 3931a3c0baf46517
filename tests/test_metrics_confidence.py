"""Bootstrap intervals against SciPy's and their own promise, FID∞ against known distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.metrics.confidence import Extrapolation, bootstrap, extrapolate, fid_infinity
from fastdiff.metrics.frechet import frechet_distance_from_features
from fastdiff.metrics.inception_score import inception_score
from fastdiff.metrics.statistics import FeatureStatistics


def features(n: int, width: int = 4, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def mean(x: Tensor) -> float:
    return float(x.double().mean())


def difference(x: Tensor, y: Tensor) -> float:
    return mean(x) - mean(y)


def frechet_on_a_line(x: Tensor, y: Tensor) -> float:
    """Width 1: (difference of means)² + (difference of deviations)²."""
    a, b = x.double().numpy(), y.double().numpy()
    return (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2


# ---- bootstrap ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "basic"])
def test_one_set_as_scipy_has_it(method: str) -> None:
    """The same draws of rows give the same interval."""
    stats = pytest.importorskip("scipy.stats")
    pytest.importorskip("scipy", minversion="1.15")  # its argument `rng`

    x = features(40, 1).double().exp()
    theirs = stats.bootstrap(
        (x[:, 0].numpy(),),
        np.median,
        n_resamples=300,
        confidence_level=0.9,
        method=method,
        rng=np.random.default_rng(7),
    )
    ours = bootstrap(lambda v: np.median(v.numpy()), x, resamples=300, level=0.9, method=method, seed=7)
    low, high = theirs.confidence_interval
    assert (ours.low, ours.high, ours.standard_error) == pytest.approx((low, high, theirs.standard_error), rel=1e-12)
    assert ours.value == np.median(x.numpy())
    assert [type(v) for v in ours] == [float] * 4


def test_the_standard_error_of_a_mean_has_a_closed_form() -> None:
    x = features(200, 1)
    result = bootstrap(mean, x, resamples=1000)
    assert result.standard_error == pytest.approx(float(x.std(correction=0)) / math.sqrt(200), rel=0.1)
    assert result.low < result.value < result.high


def test_sets_are_resampled_each_for_itself_by_whole_rows() -> None:
    seen = []

    def metric(x: Tensor, y: Tensor) -> float:
        seen.append((x, y))
        return 0.0

    x = torch.arange(50.0)[:, None].repeat(1, 2)
    bootstrap(metric, x[:30], x + 100, resamples=5)
    for a, b in seen:
        assert a.shape == (30, 2)
        assert b.shape == (50, 2)
        assert torch.equal(a[:, 0], a[:, 1])
        assert a.max() < 30 < 100 <= b.min()
    assert len(seen) == 6
    assert not torch.equal(seen[1][0], seen[1][1][:30] - 100)
    assert not torch.equal(seen[1][0], seen[2][0])
    assert 12 < len(seen[1][0][:, 0].unique()) < 27  # with replacement
    assert seen[1][1].max() > 140  # from all rows of its own set


def test_the_seed_says_which_rows() -> None:
    x, y = features(30), features(40, seed=1)
    assert bootstrap(difference, x, y, resamples=20) == bootstrap(difference, x, y, resamples=20, seed=0)
    assert bootstrap(difference, x, y, resamples=20) != bootstrap(difference, x, y, resamples=20, seed=1)


def test_a_higher_level_is_wider() -> None:
    x, y = features(30), features(40, seed=1)
    narrow, wide = (bootstrap(difference, x, y, level=level) for level in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_percentile_intervals_of_unbiased_metrics_cover_as_often_as_they_say(level: float, one_thread) -> None:
    times = 120
    covered = 0
    for i in range(times):
        x, y = features(40, 1, seed=2 * i, shift=0.5), features(40, 1, seed=2 * i + 1)
        result = bootstrap(difference, x, y, resamples=80, level=level, seed=i)
        covered += result.low <= 0.5 <= result.high
    assert abs(covered / times - level) < 4 * math.sqrt(level * (1 - level) / times)


def test_basic_intervals_of_a_frechet_distance_cover_as_often_as_they_say(one_thread) -> None:
    times = 120
    covered = 0
    for i in range(times):
        x, y = features(60, 1, seed=2 * i, shift=1.0, scale=2.0), features(60, 1, seed=2 * i + 1)
        result = bootstrap(frechet_on_a_line, x, y, resamples=80, level=0.9, method="basic", seed=i)
        covered += result.low <= 2.0 <= result.high
    assert abs(covered / times - 0.9) < 4 * math.sqrt(0.09 / times)


def test_a_resampled_frechet_distance_is_larger_and_basic_intervals_take_it_away() -> None:
    """Width 40: the bias is many standard errors. Truth: 40 * 0.2²."""
    x, y = features(150, 40, shift=0.2), features(150, 40, seed=1)
    percentile, basic = (
        bootstrap(frechet_distance_from_features, x, y, resamples=40, method=method)
        for method in ("percentile", "basic")
    )
    assert percentile.value == pytest.approx(frechet_distance_from_features(x, y), rel=1e-12)
    assert percentile.low > percentile.value > basic.high
    truth = 40 * 0.2**2
    assert abs((basic.low + basic.high) / 2 - truth) < 0.3 * abs(percentile.value - truth)


# ---- infinitely many samples ----------------------------------------------------------------


def test_a_line_in_one_over_the_size_is_found_exactly() -> None:
    result = extrapolate(lambda x: 3.0 + 40.0 / len(x), features(1000))
    assert result.value == pytest.approx(3.0, rel=1e-12)
    assert result.slope == pytest.approx(40.0, rel=1e-12)
    assert result.standard_error == pytest.approx(0.0, abs=1e-6)
    assert result.values == pytest.approx([3.0 + 40.0 / n for n in result.sizes], rel=1e-15)


def test_the_fit_and_its_error_are_least_squares() -> None:
    result = extrapolate(mean, features(300, 1), points=9)
    rows = np.stack((np.ones(9), 1 / np.array(result.sizes)), 1)
    (intercept, slope), residual, *_ = np.linalg.lstsq(rows, np.array(result.values), rcond=None)
    covariance = residual[0] / (9 - 2) * np.linalg.inv(rows.T @ rows)
    assert (result.value, result.slope) == pytest.approx((intercept, slope), rel=1e-9)
    assert result.standard_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)


@pytest.mark.parametrize(
    ("total", "least", "expected"),
    [(12_000, None, 5000), (9_000, None, 4500), (4, None, 2), (600, 100, 100), (20_000, 15_000, 15_000)],
)
def test_sizes_are_spread_evenly_to_the_whole(total: int, least: int | None, expected: int) -> None:
    sizes = extrapolate(lambda x: 0.0, torch.zeros(total, 1), least=least).sizes
    assert (len(sizes), sizes[0], sizes[-1]) == (15, expected, total)
    assert np.ptp(np.diff(sizes)) <= 1


def test_subsets_are_the_same_share_of_every_set_without_replacement() -> None:
    seen = []

    def metric(x: Tensor, y: Tensor) -> float:
        seen.append((x[:, 0], y[:, 0]))
        return 0.0

    result = extrapolate(metric, torch.arange(100.0)[:, None], torch.arange(300.0)[:, None])
    assert [(len(x), len(y)) for x, y in seen] == [(n, round(3 * n)) for n in result.sizes]
    assert all(len(v.unique()) == len(v) for pair in seen for v in pair)
    assert seen[0][0].max() > 60  # not the first rows


def test_fid_infinity_is_much_closer_to_the_truth_than_fid(one_thread) -> None:
    """Gaussians of known distance; the reference has so many rows that it has no bias of its own."""
    truth = 48 * 0.1**2 + 48 * (1.1 - 1) ** 2
    reference = features(20_000, 48, seed=99)
    plain, infinite, stated = [], [], []
    for i in range(8):
        x = features(1000, 48, seed=i, shift=0.1, scale=1.1)
        plain.append(frechet_distance_from_features(x, reference) - truth)
        result = fid_infinity(x, reference)
        infinite.append(result.value - truth)
        stated.append(result.standard_error)
    assert min(plain) > 0.5
    assert abs(np.mean(infinite)) < 0.1 * np.mean(plain)
    assert 1 < np.std(infinite) / np.mean(stated) < 2


def test_shrinking_both_sets_takes_both_biases_away(one_thread) -> None:
    truth = 48 * 0.2**2
    plain, one, both = [], [], []
    for i in range(8):
        x, y = features(1000, 48, seed=2 * i, shift=0.2), features(1000, 48, seed=2 * i + 1)
        plain.append(frechet_distance_from_features(x, y) - truth)
        one.append(fid_infinity(x, y).value - truth)
        both.append(extrapolate(frechet_distance_from_features, x, y).value - truth)
    assert 0.4 < np.mean(one) / np.mean(plain) < 0.6
    assert abs(np.mean(both)) < 0.15 * np.mean(plain)


def test_fid_infinity_ends_at_fid() -> None:
    x, y = features(300, 6, shift=0.5), features(200, 6, seed=1)
    result = fid_infinity(x, y, points=5, least=100, seed=3)
    assert isinstance(result, Extrapolation)
    assert result.sizes == [100, 150, 200, 250, 300]
    assert result.values[-1] == pytest.approx(frechet_distance_from_features(x, y), rel=1e-9)
    assert result == fid_infinity(x, y, points=5, least=100, seed=3)
    assert result.values[0] != fid_infinity(x, y, points=5, least=100, seed=4).values[0]


def test_a_reference_may_be_statistics() -> None:
    x, y = features(300, 6, shift=0.5), features(2500, 6, seed=1)
    statistics = FeatureStatistics(6)
    statistics.update(y)
    assert fid_infinity(x, statistics).value == pytest.approx(fid_infinity(x, y).value, rel=1e-9)


def test_an_inception_score_at_infinity_loses_the_bias_of_few_rows(one_thread) -> None:
    """IS∞ of Chong & Forsyth 2020: the shares of few rows look less even than they are."""
    rows = 2.0 * features(20_000, 50)

    def score(logits: Tensor) -> float:
        return inception_score(logits, splits=1).value

    parts = rows[:10_000].split(100)
    truth = score(rows)
    plain = np.mean([score(part) for part in parts]) - truth
    infinite = np.mean([extrapolate(score, part).value for part in parts]) - truth
    assert plain < -0.05
    assert abs(infinite) < 0.5 * abs(plain)


# ---- bad input ------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    x, holed = features(6), features(6)
    holed[2, 1] = math.nan
    for call, message in [
        (lambda: bootstrap(mean), "give at least one set of features"),
        (lambda: bootstrap(mean, features(1)), "set 1 must hold at least 2 rows, got 1"),
        (lambda: bootstrap(difference, x, features(6, 3)), "set 1 and set 2 must have one width D, got 4 and 3"),
        (lambda: bootstrap(difference, x, holed), "set 2 holds NaN or infinite values, first in row 2"),
        (lambda: bootstrap(mean, x, resamples=1), "resamples must be at least 2, got 1"),
        (lambda: bootstrap(mean, x, level=1.0), r"level must be in \(0, 1\), got 1\.0"),
        (lambda: bootstrap(mean, x, method="bca"), "unknown method 'bca': choose from percentile, basic"),
        (lambda: extrapolate(mean, features(3)), "set 1 must hold at least 4 rows, got 3"),
        (lambda: extrapolate(mean, x, points=2), "points must be at least 3, got 2"),
        (lambda: extrapolate(mean, x, least=6), "least must be 2 to 5 for 6 rows, got 6"),
        (lambda: extrapolate(mean, x, least=1), "least must be 2 to 5 for 6 rows, got 1"),
        (lambda: fid_infinity(x, features(6, 3)), "x and y must have one width D, got 4 and 3"),
        (lambda: fid_infinity(x, holed), "y holds NaN or infinite values, first in row 2"),
        (lambda: fid_infinity(features(3), x), "x must hold at least 4 rows, got 3"),
        (lambda: fid_infinity(x, FeatureStatistics(3)), "x must be as wide as the reference's 3, got 4"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    x, y = features(300, 6, shift=0.5), features(200, 6, seed=1)
    on_gpu = fid_infinity(x.cuda(), y.cuda())
    assert on_gpu.value == pytest.approx(fid_infinity(x, y).value, rel=1e-7)
    assert bootstrap(frechet_distance_from_features, x.cuda(), y.cuda(), resamples=5) == pytest.approx(
        bootstrap(frechet_distance_from_features, x, y, resamples=5), rel=1e-7
    )
