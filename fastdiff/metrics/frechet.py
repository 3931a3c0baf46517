"""The Fréchet distance between two Gaussians (Heusel et al. 2017, eq. 6; Dowson & Landau 1982), in float64.

|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With any factors S = F F^T the last trace is the nuclear norm of
F1^T F2, the sum of its singular values: real and not negative whatever the covariances, and of half the digits that a
square root of their product would lose. No eps is added to anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InputError, check
from fastdiff.metrics.features import check_features
from fastdiff.metrics.polar import nuclear_norm

NEGATIVE = 1e-6  # how far below zero an eigenvalue may lie, relative to the largest: what float32 statistics leave


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """The squared Fréchet distance of N(mu1, cov1) and N(mu2, cov2); 0 for equal arguments, never below.

    Args:
        mu1, mu2: means ``[d]``, of any real dtype and on one device; NumPy's arrays will do.
        cov1, cov2: covariances ``[d, d]``, of any rank.

    Raises:
        InputError: sizes that do not fit, values that are not finite, a matrix that is no covariance.
    """
    mean1, mean2 = (_mean(f"mu{i}", value) for i, value in ((1, mu1), (2, mu2)))
    s1, s2 = (_covariance(f"cov{i}", value) for i, value in ((1, cov1), (2, cov2)))
    sizes = [len(value) for value in (mean1, s1, mean2, s2)]
    check(len(set(sizes)) == 1, f"mu1, cov1, mu2, cov2 must have one width, got {sizes}")
    devices = {value.device for value in (mean1, s1, mean2, s2)}
    check(len(devices) == 1, f"means and covariances must be on one device, got {sorted(map(str, devices))}")
    apart = _squared_distance(mean1, mean2)
    if torch.equal(s1, s2):
        return apart
    return max(0.0, apart + float(s1.trace() + s2.trace() - 2 * trace_sqrt_product(s1, s2)))


def frechet_distance_from_features(x: Tensor, y: Tensor) -> float:
    """The same between two sets of features, from the features themselves: exact also where they are few.

    The factors are triangular ones of the centred features (QR), or those themselves where there are fewer than their
    width. Of as few samples the result is far above the distributions' distance: say how many there were.

    Args:
        x, y: ``[n, d]`` and ``[m, d]``, n, m >= 2.

    Raises:
        InputError: fewer than two rows, two widths, values that are not finite.
    """
    for name, features in (("x", x), ("y", y)):
        check_features(name, features, 2)
    check(x.shape[1] == y.shape[1], f"x and y must have one width, got {x.shape[1]} and {y.shape[1]}")
    (mean1, r1), (mean2, r2) = map(_centred_factor, (x, y.to(x.device)))
    if r1.shape == r2.shape and torch.equal(r1, r2):
        return _squared_distance(mean1, mean2)
    traces = r1.square().sum() + r2.square().sum()
    return max(0.0, _squared_distance(mean1, mean2) + float(traces - 2 * torch.linalg.svdvals(r1 @ r2.mT).sum()))


def trace_sqrt_product(s1: Tensor, s2: Tensor) -> Tensor:
    """tr (S1 S2)^(1/2) of two covariances, float64 ``[d, d]``: 0-d.

    On a CPU the singular values are roots of the eigenvalues of F1^T S2 F1, which a symmetric solver finds five times
    as fast; on a GPU, where those solvers crawl, the nuclear norm is found by matrix products.
    """
    factor = covariance_factor(s1)
    if s1.is_cuda:
        return nuclear_norm(factor.mT @ covariance_factor(s2))
    values: Tensor = torch.linalg.eigvalsh(factor.mT @ s2 @ factor)
    return values.clamp(min=0).sqrt().sum()


def covariance_factor(s: Tensor) -> Tensor:
    """F with F F^T = S, float64 ``[d, r]``: Cholesky's, and with pivots, or of eigenvectors, where S is singular."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(s)
    if not failed:
        return factor
    return _factor_by_eigenvectors(s) if s.is_cuda else _factor_by_pivots(s)


def _factor_by_eigenvectors(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


def _factor_by_pivots(s: Tensor) -> Tensor:
    """Of as many columns as S has rank (Higham 2002, section 10.3)."""
    from scipy.linalg.lapack import dpstrf

    factor, pivots, rank, _ = dpstrf(s.numpy(), lower=1)
    rows = torch.empty(len(s), rank, dtype=s.dtype)
    rows[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(factor).tril()[:, :rank]
    return rows


def sqrtm_psd(a: Tensor) -> Tensor:
    """The principal square root of a symmetric positive semi-definite matrix: ``[d, d]``, symmetric, float64.

    Raises:
        InputError: a matrix that is not square, finite, symmetric and without negative eigenvalues.
    """
    a = _covariance("a", a)
    values, vectors = torch.linalg.eigh(a)
    lowest, bound = float(values[0]), NEGATIVE * float(values[-1].abs())
    check(lowest >= -bound, f"a must be positive semi-definite, its lowest eigenvalue is {lowest:.3g}")
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return (root + root.mT) / 2


def _squared_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum())


def _centred_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R ``[r, d]`` with R^T R the covariance (n - 1 in the denominator)."""
    x = x.double()
    mean = x.mean(0)
    centred = (x - mean).div_((len(x) - 1) ** 0.5)
    return mean, centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r")[1]


def _mean(name: str, value: Tensor) -> Tensor:
    mean = _double(name, value)
    check(mean.ndim == 1 and len(mean), f"{name} must be a mean [d], got {list(mean.shape)}")
    return mean


def _covariance(name: str, value: Tensor) -> Tensor:
    s = _double(name, value)
    square = s.ndim == 2 and s.shape[0] == s.shape[1] > 0
    check(square, f"{name} must be a square matrix [d, d], got {list(s.shape)}")
    largest, lowest = float(s.abs().max()), float(s.diagonal().min())
    off = float((s - s.mT).abs().max())
    check(off <= NEGATIVE * largest, f"{name} must be symmetric, its two halves differ by {off:.3g}")
    check(lowest >= -NEGATIVE * largest, f"{name} must be positive semi-definite, it has {lowest:.3g} on its diagonal")
    return (s + s.mT) / 2


def _double(name: str, value: Tensor) -> Tensor:
    try:
        result = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or an array, got {type(value).__name__}") from error
    check(not result.is_complex(), f"{name} must be real, got {result.dtype}")
    result = result.double()
    check(bool(result.isfinite().all()), f"{name} holds NaN or infinite values")
    return result
