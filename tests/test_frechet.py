"""The Fréchet distance: closed forms, hostile covariances, peers, and the parts it is made of."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

import fastdiff as fd
from fastdiff.metrics import polar
from fastdiff.metrics.frechet import (
    _factor_by_eigenvectors,
    _factor_by_pivots,
    frechet_distance,
    frechet_distance_from_features,
    sqrtm_psd,
)

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def covariance(eigenvalues, seed=0):
    q = rotation(len(eigenvalues), seed)
    return q * eigenvalues @ q.mT


def commuting(a, b):
    """tr of (sqrt a - sqrt b)^2 in one basis."""
    return float((a.sqrt() - b.sqrt()).square().sum())


def moments(*sets):
    """Mean and covariance of each, one after the other."""
    return [m for x in sets for m in (x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1))]


def spectrum(kind, d, seed):
    u = torch.rand(d, generator=generator(seed), dtype=F64)
    if kind == "full rank":
        return 0.5 + u
    if kind == "of half rank":
        return torch.where(torch.arange(d) % 2 == seed % 2, 0.0, 0.5 + u)
    if kind == "nearly singular":
        return torch.logspace(2, -14, d, dtype=F64)[torch.randperm(d, generator=generator(seed))]
    return torch.zeros(d, dtype=F64)


# ---- closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["full rank", "of half rank", "nearly singular", "zero"])
@pytest.mark.parametrize("other", ["full rank", "of half rank", "nearly singular", "zero"])
def test_commuting_covariances(kind, other, d):
    a, b = spectrum(kind, d, 1), spectrum(other, d, 2)
    mu1, mu2 = normal(d, seed=3), normal(d, seed=4)
    truth = float((mu1 - mu2).square().sum()) + commuting(a, b)
    found = frechet_distance(mu1, covariance(a), mu2, covariance(b))
    trace = float(a.sum() + b.sum())
    bound = 1e-10 * truth if kind == other == "full rank" else 1e-10 * truth + 1e-5 * trace
    assert abs(found - truth) <= bound + 1e-13


@pytest.mark.parametrize("d", [2, 5, 40])
def test_a_scaled_rotated_covariance(d):
    """Of S and T S T with any positive definite T: (T S T) is the image of S by the optimal map T."""
    s, t = covariance(0.5 + torch.rand(d, dtype=F64)), covariance(0.5 + torch.rand(d, dtype=F64), seed=1)
    truth = float((s + t @ s @ t - 2 * s @ t).trace())
    found = frechet_distance(torch.zeros(d), s, torch.zeros(d), t @ s @ t)
    assert found == pytest.approx(truth, rel=1e-10)


def test_one_dimension_is_the_distance_of_standard_deviations():
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, rel=1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_arrays_will_do(dtype):
    x, y = (normal(50, 4, seed=i) for i in range(2))
    arrays = [m.numpy().astype(dtype) for m in moments(x, y)]
    assert frechet_distance(*arrays) == pytest.approx(frechet_distance_from_features(x, y), 1e-5)


# ---- identities -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 20, 63, 64, 65, 500])
def test_features_and_their_statistics_agree(n):
    x, y = normal(n, 64, seed=1) * torch.logspace(1, -3, 64), normal(300, 64, seed=2) + 0.1
    assert frechet_distance_from_features(x, y) == pytest.approx(frechet_distance(*moments(x, y)), rel=1e-6)
    assert frechet_distance_from_features(y, x) == pytest.approx(frechet_distance_from_features(x, y), rel=1e-12)


@pytest.mark.parametrize("n", [2, 10, 100])
@pytest.mark.parametrize("d", [1, 8, 64])
def test_few_features_against_extended_arithmetic(n, d):
    """Of two sets in one plane of the features' space, whose own two-dimensional distance is known in closed form."""
    basis = rotation(max(d, 2), seed=5)[:, : min(d, 2)][:d]
    x, y = normal(n, basis.shape[1], seed=1), 2 * normal(n, basis.shape[1], seed=2) + 1
    s1, s2 = (torch.cov(v.T).reshape(v.shape[1], -1) for v in (x, y))
    product = s1 @ s2
    # tr M^(1/2) of a 2x2 matrix with non-negative eigenvalues: sqrt(tr M + 2 sqrt(det M)).
    det = float(s1.det().clamp(min=0) * s2.det().clamp(min=0))
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(det)) if len(s1) == 2 else math.sqrt(float(product))
    truth = float((x.mean(0) - y.mean(0)).square().sum() + s1.trace() + s2.trace()) - 2 * root
    scale = float(basis.square().sum()) / basis.shape[1]
    found = frechet_distance_from_features(x @ basis.mT, y @ basis.mT)
    assert found == pytest.approx(truth * scale, rel=1e-9)


@pytest.mark.parametrize("n", [2, 5, 40, 64, 65, 300])
def test_a_set_is_at_no_distance_of_itself(n):
    x = normal(n, 64) * torch.logspace(2, -4, 64) + 1000
    assert frechet_distance_from_features(x, x.clone()) == 0
    assert 0 <= frechet_distance_from_features(x, x.flip(0)) <= 1e-9
    mu, s = x.mean(0), torch.cov(x.T)
    assert frechet_distance(mu, s, mu, s) == 0
    assert 0 <= frechet_distance(mu, s, mu, s * (1 + 1e-15)) <= 1e-5 * float(s.trace())


def test_constant_features_differ_by_their_means():
    x, y = torch.full((10, 5), 2.0), torch.full((7, 5), 5.0)
    assert frechet_distance_from_features(x, y) == 45


def test_float32_features_with_a_mean_of_a_thousand():
    x, y = (normal(400, 32, seed=i).float() * (1 + i) + 1000 for i in range(2))
    shifted = frechet_distance_from_features(x.double() - 1000, y.double() - 1000)
    assert frechet_distance_from_features(x, y) == pytest.approx(shifted, rel=1e-9)


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_never_nan_complex_or_negative(cases):
    random = np.random.default_rng(cases)
    for case in range(cases):
        d, n, m = int(random.integers(1, 65)), int(random.integers(2, 90)), int(random.integers(2, 90))
        x, y = (random.standard_normal((count, d)) * 10.0 ** random.uniform(-8, 8, d) for count in (n, m))
        if case % 3 == 0:
            y = x[random.integers(0, n, m)]
        if case % 5 == 0:
            x[:, random.integers(0, d)] = 3.0
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        for found in (frechet_distance_from_features(x, y), frechet_distance(*moments(x, y))):
            assert isinstance(found, float)
            assert 0 <= found < math.inf


# ---- the parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [_factor_by_eigenvectors, _factor_by_pivots])
@pytest.mark.parametrize("rank", [1, 3, 20, 31])
def test_factors_of_singular_covariances(factor, rank):
    a = normal(32, rank)
    s = a @ a.mT
    f = factor(s)
    assert (f @ f.mT - s).abs().max() <= 1e-13 * s.abs().max()
    assert factor is _factor_by_eigenvectors or f.shape == (32, rank)


@pytest.mark.parametrize("least", [1e-3, 1e-5, 1e-8, 1e-10, 1e-12])
def test_the_schedule_brings_every_number_to_one(least):
    """The proof, number by number: within rounding of 1 above ``least``, and between 0 and 1 below."""
    x = torch.cat((torch.logspace(math.log10(least), 0, 200_001, dtype=F64), torch.linspace(0, least, 1001, dtype=F64)))
    x = x.clamp(max=1)
    y = x.clone()
    for a, b, c in polar.schedule(least):
        y = y * (a + b * y**2 + c * y**4)
        assert float(y.min()) >= 0
        assert float(y.max()) <= 2.0001
    assert (y[x >= least] - 1).abs().max() <= 1e-14
    assert (y <= 1 + 1e-14).all()


def test_each_quintic_is_the_best():
    """It misses by the same amount at four places with alternating signs, so no other misses by less (Chebyshev)."""
    for low in (1e-8, 1e-3, 0.1, 0.5, 0.9):
        (a, b, c), error = polar.best_quintic(low, 1.0)
        x = torch.logspace(math.log10(low), 0, 100_001, dtype=F64).clamp(max=1)
        off = a * x + b * x**3 + c * x**5 - 1
        assert (off.abs().max() - error).abs() <= 1e-8 * error
        extremes = off[off.abs() >= (1 - 1e-6) * error].sign()
        assert int((extremes[1:] != extremes[:-1]).sum()) == 3


@pytest.mark.parametrize("d", [1, 2, 33, 128])
@pytest.mark.parametrize("exponent", [0.0, 1.5, 2.5, 3.5, 5.0])
def test_the_nuclear_norm_of_matrix_products(d, exponent):
    values = torch.arange(1, d + 1, dtype=F64) ** -exponent
    m = rotation(d) * values @ rotation(d, seed=1)
    assert float(polar.nuclear_norm(m)) == pytest.approx(float(values.sum()), rel=1e-9)


def test_the_nuclear_norm_of_singular_matrices():
    m = normal(64, 10) @ normal(10, 64, seed=1)
    truth = float(torch.linalg.svdvals(m).sum())
    assert float(polar.nuclear_norm(m)) == pytest.approx(truth, rel=1e-9)
    assert float(polar.nuclear_norm(torch.zeros(5, 5, dtype=F64))) == 0


@pytest.mark.parametrize("d", [1, 3, 50])
def test_the_square_root(d):
    s = covariance(0.1 + torch.rand(d, dtype=F64))
    root = sqrtm_psd(s)
    assert (root - torch.from_numpy(np.real(scipy.linalg.sqrtm(s.numpy())))).abs().max() <= 1e-12
    assert torch.equal(root, root.mT)
    low = normal(20, 4)
    low = low @ low.mT  # where scipy's is complex or NaN
    assert (sqrtm_psd(low) @ sqrtm_psd(low) - low).abs().max() <= 1e-12 * low.abs().max()


# ---- peers ----------------------------------------------------------------------------------


X, Y = normal(300, 32, seed=1) @ normal(32, 32, seed=2), normal(350, 32, seed=3) @ normal(32, 32, seed=4) + 0.5


def test_torch_fidelity_says_the_same():
    module = pytest.importorskip("torch_fidelity.metric_fid")
    sides = [{"mu": x.mean(0).numpy(), "sigma": torch.cov(x.T).numpy()} for x in (X, Y)]
    theirs = module.fid_statistics_to_metric(*sides, False)
    assert frechet_distance_from_features(X, Y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_torchmetrics_says_the_same():
    module = pytest.importorskip("torchmetrics.image.fid")
    theirs = float(module._compute_fid(*moments(X, Y)))
    assert frechet_distance(*moments(X, Y)) == pytest.approx(theirs, rel=1e-5)


def pytorch_fid(mu1, s1, mu2, s2):
    """pytorch-fid's formula (Seitzer 2020), with today's signature of scipy's root."""
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(np.square(mu1 - mu2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(np.real(root)))


def test_the_root_of_the_product_says_the_same_where_it_is_right():
    theirs = pytorch_fid(*(m.numpy() for m in moments(X, Y)))
    assert frechet_distance(*moments(X, Y)) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Matrix is singular", "ignore::UserWarning")
def test_it_is_right_where_the_root_of_the_product_is_not():
    """Of a set and itself the truth is 0; peers add to or subtract from it."""
    x = normal(20, 64).float().double()
    theirs = pytorch_fid(*(m.numpy() for m in moments(x, x)))
    assert not 0 <= theirs <= 1e-9
    assert 0 <= frechet_distance_from_features(x, x.flip(0)) <= 1e-9


# ---- bad input ------------------------------------------------------------------------------

EYE, ZERO = torch.eye(3), torch.zeros(3)
BAD = {
    "two widths": ((ZERO, EYE, torch.zeros(4), torch.eye(4)), "one width"),
    "a mean of matrices": ((EYE, EYE, ZERO, EYE), "mu1 must be a mean"),
    "not square": ((ZERO, EYE[:2], ZERO, EYE), "cov1 must be a square"),
    "NaN": ((ZERO, EYE, ZERO * math.nan, EYE), "mu2 holds NaN"),
    "complex": ((ZERO, EYE.to(torch.complex64), ZERO, EYE), "cov1 must be real"),
    "not symmetric": ((ZERO, EYE, ZERO, EYE + torch.ones(3, 3).triu(1)), "cov2 must be symmetric"),
    "a negative variance": ((ZERO, EYE, ZERO, -EYE), "cov2 must be positive semi-definite"),
    "text": (("mean", EYE, ZERO, EYE), "mu1 must be a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_statistics_are_named(case):
    arguments, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        frechet_distance(*arguments)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "x must hold at least 2 rows, got 1"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "one width, got 3 and 4"),
        (torch.zeros(5, 3), torch.full((5, 3), math.inf), "y holds NaN or infinite values, first in row 0"),
        (torch.zeros(5), torch.zeros(5, 3), r"x must be features \[N, D\]"),
    ],
)
def test_bad_features_are_named(x, y, message):
    with pytest.raises(fd.InputError, match=message):
        frechet_distance_from_features(x, y)


def test_a_matrix_with_negative_eigenvalues_has_no_root():
    with pytest.raises(fd.InputError, match="positive semi-definite, its lowest eigenvalue is -1"):
        sqrtm_psd(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
