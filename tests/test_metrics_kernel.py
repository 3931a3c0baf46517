"""KID and CMMD against written-out sums, exact arithmetic, peers, and Monte Carlo of their standard errors."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.metrics import kernel as kernels
from fastdiff.metrics.kernel import KernelDistance, cmmd, gaussian, kid, mmd, polynomial


def features(n: int, width: int = 16, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def written_out(x: Tensor, y: Tensor, kernel) -> float:
    """Gretton et al. 2012, eq. 3, pair by pair."""
    x, y = x.double().tolist(), y.double().tolist()
    n, m = len(x), len(y)
    xx = math.fsum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = math.fsum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = math.fsum(kernel(a, b) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def cubic(a: list[float], b: list[float]) -> float:
    return (math.fsum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (17, 12)])
@pytest.mark.parametrize("block", [1, 40, 2**23])
def test_mmd_is_its_definition_in_blocks_of_any_size(n: int, m: int, block: int, monkeypatch) -> None:
    monkeypatch.setattr("fastdiff.metrics.neighbours.BLOCK", block)
    x, y = features(n), features(m, seed=1, shift=0.3)
    assert mmd(x, y).value == pytest.approx(written_out(x, y, cubic), rel=1e-12)
    assert mmd(y, x).value == pytest.approx(mmd(x, y).value, rel=1e-12)
    if min(n, m) >= 4:
        assert mmd(y, x).standard_error == pytest.approx(mmd(x, y).standard_error, rel=1e-12)
    else:
        assert math.isnan(mmd(x, y).standard_error)


def test_the_standard_error_does_not_depend_on_the_blocks(monkeypatch) -> None:
    x, y = features(31), features(23, seed=1, shift=0.3)
    whole = mmd(x, y)
    monkeypatch.setattr("fastdiff.metrics.neighbours.BLOCK", 100)
    assert mmd(x, y) == pytest.approx(whole, rel=1e-12)


def test_cmmd_is_a_thousand_gaussian_mmds() -> None:
    x, y = features(9), features(12, seed=1, shift=0.3)

    def gauss(a: list[float], b: list[float]) -> float:
        return math.exp(-(math.dist(a, b) ** 2) / (2 * 3.0**2))

    assert cmmd(x, y, sigma=3.0).value == pytest.approx(1000 * written_out(x, y, gauss), rel=1e-11)
    assert cmmd(x, y, sigma=3.0).standard_error == pytest.approx(1000 * mmd(x, y, gaussian(3.0)).standard_error)
    x, y = x.double() + 1e5, y.double() + 1e5  # far from the origin
    assert cmmd(x, y, sigma=3.0).value == pytest.approx(1000 * written_out(x, y, gauss), rel=1e-11)
    assert cmmd(x, y) == cmmd(x, y, sigma=10.0)


def test_two_points_have_closed_forms() -> None:
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -3.0]])
    x, y = a.repeat(5, 1), b.repeat(7, 1)
    assert mmd(x, y).value == pytest.approx(2.0**3 + 6.0**3 - 2 * 0.0**3, rel=1e-14)
    assert cmmd(x, y, sigma=2.0).value == pytest.approx(2000 * (1 - math.exp(-16 / 8)), rel=1e-14)
    assert mmd(x, y).standard_error == pytest.approx(0, abs=1e-6)
    assert mmd(x, x).value == pytest.approx(0, abs=1e-14)


def test_products_of_float32_features_lose_nothing_at_a_mean_of_1000() -> None:
    """Exact integers: k is 10^18 and its three means nearly cancel; float32 products get no digit right."""
    x = (1000 + 4 * features(40, 8)).round()
    y = (1000 + 4 * features(50, 8, seed=1)).round()

    def exact(a: list[float], b: list[float]) -> Fraction:
        return (Fraction(int(sum(p * q for p, q in zip(a, b, strict=True))), len(a)) + 1) ** 3

    xs, ys = x.tolist(), y.tolist()
    within = [sum(exact(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) for s in (xs, ys)]
    truth = float(
        within[0] / (40 * 39) + within[1] / (50 * 49) - 2 * sum(exact(a, b) for a in xs for b in ys) / (40 * 50)
    )
    assert mmd(x, y).value == pytest.approx(truth, rel=1e-8)


def test_small_distances_of_inception_like_features() -> None:
    """Non-negative, mean 0.4, 2048 wide: against long doubles."""
    x = features(60, 2048).clamp(min=0)
    y = features(60, 2048, seed=1, scale=1.01).clamp(min=0)
    a, b = (v.numpy().astype(np.longdouble) for v in (x, y))

    def k(p, q):
        return (p @ q.T / 2048 + 1) ** 3

    truth = (k(a, a).sum() - np.trace(k(a, a)) + k(b, b).sum() - np.trace(k(b, b))) / (60 * 59) - 2 * k(a, b).mean()
    assert mmd(x, y).value == pytest.approx(float(truth), rel=1e-10)


# ---- subsets --------------------------------------------------------------------------------


def test_kid_of_the_whole_sets_as_one_subset_is_mmd() -> None:
    x, y = features(50), features(50, seed=1, shift=0.2)
    assert kid(x, y, subsets=1, subset_size=50) == pytest.approx(mmd(x, y), rel=1e-9)
    assert kid(x, y, subsets=3, subset_size=50).std == pytest.approx(0, abs=1e-12)
    assert kid(x, y, subsets=3, subset_size=50).standard_error == pytest.approx(mmd(x, y).standard_error, rel=1e-9)


def test_the_seed_says_which_subsets() -> None:
    x, y = features(200), features(150, seed=1)
    one = kid(x, y, subsets=5, subset_size=40, seed=3)
    assert one == kid(x, y, subsets=5, subset_size=40, seed=3)
    assert one.value != kid(x, y, subsets=5, subset_size=40, seed=4).value


def test_many_subsets_near_the_whole() -> None:
    x, y = features(300, 8), features(300, 8, seed=1, shift=0.2)
    drawn = kid(x, y, subsets=400, subset_size=100)
    assert abs(drawn.value - mmd(x, y).value) < 4 * drawn.std / math.sqrt(400)


@pytest.mark.parametrize("double", [False, True])
def test_kid_as_torch_fidelity_has_it(double: bool) -> None:
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(300, 64).clamp(min=0), features(250, 64, seed=1, shift=0.1).clamp(min=0)
    options = {"kid_subsets": 20, "kid_subset_size": 100, "kid_kernel": "poly", "verbose": False}
    options |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    theirs = peer.kid_features_to_metric(*((x.double(), y.double()) if double else (x, y)), **options, rng_seed=2020)
    ours = kid(x, y, subsets=20, subset_size=100)
    tolerance = 1e-12 if double else 1e-5
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=tolerance)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=tolerance)


def test_cmmd_as_torch_fidelity_s_gaussian_kernel() -> None:
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = (torch.nn.functional.normalize(v.double()) for v in (features(80, 64), features(80, 64, seed=1, shift=0.1)))
    theirs = peer.kernel_mmd(x.numpy(), y.numpy(), kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)
    assert cmmd(x, y).value == pytest.approx(1000 * theirs, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all:UserWarning")
def test_kid_as_torchmetrics_has_it() -> None:
    peer = pytest.importorskip("torchmetrics.image.kid")
    metric = peer.KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=120)
    metric.set_dtype(torch.float64)
    x, y = features(120, 64).clamp(min=0), features(120, 64, seed=1, shift=0.1).clamp(min=0)
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    assert mmd(x, y).value == pytest.approx(float(metric.compute()[0]), rel=1e-10)


# ---- standard errors ------------------------------------------------------------------------


def stated_and_real(metric, n: int, m: int, width: int, shift: float, times: int) -> tuple[float, float, float]:
    """Root mean square of the standard errors, the deviation of the values, their mean."""
    results = [
        metric(features(n, width, seed=2 * i), features(m, width, seed=2 * i + 1, shift=shift)) for i in range(times)
    ]
    values = np.array([r.value for r in results])
    return np.mean([r.standard_error**2 for r in results]) ** 0.5, values.std(ddof=1), values.mean()


@pytest.mark.parametrize("kernel", [polynomial, gaussian(8.0)], ids=["polynomial", "gaussian"])
def test_standard_errors_are_those_of_new_samples(kernel, one_thread) -> None:
    """Sets of unequal size. Where they are alike, what must be above 0 is hardly known and makes them larger."""
    for width, shift, most in [(2, 0.0, 1.45), (64, 0.0, 1.2), (64, 0.5, 1.1), (2, 1.0, 1.1)]:
        stated, real, _ = stated_and_real(lambda x, y: mmd(x, y, kernel), 40, 60, width, shift, 400)
        assert 0.9 < stated / real < most, (width, shift)


def test_the_parts_of_the_variance_are_unbiased(one_thread) -> None:
    """Equal distributions: what pairs add is all of it, and rows add 0."""
    n, m = 40, 60
    drawn = [
        kernels._moments(polynomial, features(n, 64, seed=2 * i).double(), features(m, 64, seed=2 * i + 1).double())
        for i in range(400)
    ]
    real = np.var([d.value for d in drawn], ddof=1)
    pairs = np.mean([d._replace(row_x=0.0, row_y=0.0).variance(n, m) for d in drawn])
    rows = np.mean([4 * d.row_x / n + 4 * d.row_y / m for d in drawn])
    assert pairs == pytest.approx(real, rel=0.1)
    assert abs(rows) < 0.1 * real


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("subsets", [1, 4])
def test_standard_errors_of_subsets_are_those_of_new_samples(shift: float, subsets: int, one_thread) -> None:
    stated, real, mean = stated_and_real(
        lambda x, y: kid(x, y, subsets=subsets, subset_size=20), 60, 80, 32, shift, 400
    )
    assert 0.9 < stated / real < (1.1 if shift else 1.25)
    if shift == 0:
        assert abs(mean) < 4 * real / math.sqrt(400)  # unbiased


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [mmd, cmmd, lambda x, y: kid(x, y, subset_size=2)], ids=["mmd", "cmmd", "kid"])
def test_what_is_no_pair_of_sets_is_refused(metric) -> None:
    good, holed = features(6), features(6)
    holed[3, 2] = math.nan
    for x, y, message in [
        (features(1), good, "x must hold at least 2 rows, got 1"),
        (good, features(6, 8), "x and y must have one width D, got 16 and 8"),
        (good, holed, "y holds NaN or infinite values, first in row 3"),
        (good[0], good, r"x must be features \[N, D\], got \[16\]"),
    ]:
        with pytest.raises(InputError, match=message):
            metric(x, y)


def test_options_out_of_range_are_refused() -> None:
    x, y = features(30), features(20)
    with pytest.raises(InputError, match="subset_size must be at most the rows of y: got 25 for 20"):
        kid(x, y, subset_size=25)
    with pytest.raises(InputError, match="subset_size must be at most the rows of x: got 1000 for 30"):
        kid(x, y)
    with pytest.raises(InputError, match="subset_size must be at least 2, got 1"):
        kid(x, y, subset_size=1)
    with pytest.raises(InputError, match="subsets must be at least 1, got 0"):
        kid(x, y, subsets=0, subset_size=2)
    with pytest.raises(InputError, match=r"sigma must be above 0, got 0\.0"):
        cmmd(x, y, sigma=0.0)


def test_features_that_need_gradients_are_read() -> None:
    x, y = features(8).requires_grad_(), features(8, seed=1)
    assert isinstance(mmd(x, y), KernelDistance)
    assert [type(v) for v in kid(x, y, subsets=2, subset_size=4)] == [float] * 3
    assert kernels.CMMD_SCALE == 1000


@pytest.mark.gpu
def test_a_gpu_gives_the_same_and_is_not_mixed_with_the_cpu() -> None:
    x, y = features(300, 64), features(200, 64, seed=1, shift=0.1)
    for metric in (mmd, cmmd, lambda x, y: kid(x, y, subsets=4, subset_size=100)):
        assert metric(x.cuda(), y.cuda()) == pytest.approx(metric(x, y), rel=1e-9)
        with pytest.raises(InputError, match="x and y must be on one device, got cpu and cuda:0"):
            metric(x, y.cuda())
