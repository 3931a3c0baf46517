"""The Fréchet distance of features 2048 wide, from statistics and from few features, and the statistics themselves.

The features' deviations fall over three decades, as Inception's do. The truth is the nuclear norm of centred features
in float64. Peers are what people call: pytorch-fid, torchmetrics and torch-fidelity, given the same statistics. The
floor is the products of matrices that the way ours goes cannot do without, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Arrays, Bind, Call, Case, Peer
from fastdiff.metrics import FeatureStatistics, frechet_distance, frechet_distance_from_features
from fastdiff.metrics.polar import schedule

WIDTH, FEW, MANY, BATCH = 2048, 500, 10_000, 50
Moments = Sequence[Tensor]  # mean and covariance of one set, then of the other
Distance = Callable[..., float]


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    width, few, many = (32, 20, 200) if quick else (WIDTH, FEW, MANY)
    yield from_statistics((many, width))
    yield from_statistics((few, width))
    yield from_features((few, width))
    yield streaming((many, width))


def from_statistics(shape: tuple[int, int]) -> Case:
    tolerance = 1e-6 if shape[0] > shape[1] else 1e-5  # where they are singular, covariances say no more
    return Case(
        name=f"frechet_distance, statistics of {shape[0]} features, {shape[1]} wide",
        shape=shape,
        reads=2,
        writes=0,
        ours=partial(_with_statistics, frechet_distance),
        formula=truth,
        peers=tuple(Peer(name, partial(_peer, find), 1e-2) for name, find in PEERS.items()),
        tolerance=tolerance,
        floor=_products_of_statistics,
    )


def from_features(shape: tuple[int, int]) -> Case:
    """Peers have to make statistics first."""
    return Case(
        name=f"frechet_distance_from_features, {shape[0]} of {shape[1]}",
        shape=shape,
        reads=2,
        writes=0,
        ours=lambda arrays: partial(_distance, frechet_distance_from_features, *map(spread, arrays.reads)),
        formula=truth,
        peers=tuple(Peer(name, partial(_peer, find, features=True), 1e-2) for name, find in PEERS.items()),
        tolerance=1e-9,
        floor=_product_of_features,
    )


def streaming(shape: tuple[int, int]) -> Case:
    """Mean and covariance of features that come in batches of 50; NumPy has them all at once."""
    return Case(
        name=f"FeatureStatistics, {shape[0]} of {shape[1]} in batches of {BATCH}",
        shape=shape,
        reads=1,
        writes=0,
        ours=lambda arrays: partial(_stream, spread(arrays.reads[0])),
        formula=lambda arrays: _moments(arrays.reads[0]),
        peers=(
            Peer("numpy.cov, stored", lambda: lambda arrays: partial(_numpy, spread(arrays.reads[0])), 1e-4),
            Peer("torchmetrics update", _torchmetrics_update, None),
        ),
        tolerance=1e-9,
        floor=_half_a_product,
    )


# ---- features and the truth -------------------------------------------------------------------


def spread(x: Tensor) -> Tensor:
    """Features of deviations between 1 and 1/1000, around 0.4, as Inception's are around."""
    return x * torch.logspace(0, -3, x.shape[1], dtype=x.dtype, device=x.device) + 0.4


def truth(arrays: Arrays) -> tuple[Tensor]:
    mean1, x, mean2, y = (part for value in arrays.reads for part in _centred(spread(value.float()).double().cpu()))
    if len(x) > x.shape[1]:
        x, y = (torch.linalg.qr(part, mode="r")[1] for part in (x, y))
    traces = x.square().sum() + y.square().sum()
    distance = (mean1 - mean2).square().sum() + traces - 2 * torch.linalg.matrix_norm(x @ y.mT, "nuc")
    return (distance.to(arrays.reads[0].device),)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), (x - x.mean(0)) / (len(x) - 1) ** 0.5


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = spread(x.float()).double()
    return x.mean(0), torch.cov(x.T)


# ---- ours and peers ---------------------------------------------------------------------------


def _with_statistics(distance: Distance, arrays: Arrays) -> Call:
    return partial(_distance, distance, *(part for x in arrays.reads for part in _moments(x)))


def _distance(distance: Distance, *given: Tensor) -> tuple[Tensor]:
    return (torch.tensor(float(distance(*given)), dtype=torch.float64, device=given[0].device),)


def _peer(find: Callable[[], Distance], features: bool = False) -> Bind:
    distance = find()
    if not features:
        return partial(_with_statistics, distance)
    return lambda arrays: partial(_distance, partial(_from_features, distance), *map(spread, arrays.reads))


def _from_features(distance: Distance, *sets: Tensor) -> float:
    return distance(*(part for x in sets for part in (x.double().mean(0), torch.cov(x.double().T))))


def _pytorch_fid() -> Distance:
    """Its formula: the package itself asks SciPy for an argument that SciPy 1.18 no longer has."""
    from scipy.linalg import sqrtm

    def distance(*moments: Tensor) -> float:
        mu1, s1, mu2, s2 = (m.cpu().numpy() for m in moments)
        return float(np.square(mu1 - mu2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real)

    return distance


def _torchmetrics() -> Distance:
    from torchmetrics.image.fid import _compute_fid

    return lambda *moments: float(_compute_fid(*moments))


def _torch_fidelity() -> Distance:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    def distance(*moments: Tensor) -> float:
        mu1, s1, mu2, s2 = (m.cpu().numpy() for m in moments)
        found = fid_statistics_to_metric({"mu": mu1, "sigma": s1}, {"mu": mu2, "sigma": s2}, False)
        return float(found["frechet_inception_distance"])

    return distance


PEERS = {"pytorch-fid (scipy sqrtm)": _pytorch_fid, "torchmetrics": _torchmetrics, "torch-fidelity": _torch_fidelity}


def _stream(x: Tensor) -> tuple[Tensor, Tensor]:
    statistics = FeatureStatistics(x.shape[1], x.device)
    for part in x.split(BATCH):
        statistics.update(part)
    return statistics.mean, statistics.covariance


def _numpy(x: Tensor) -> tuple[Tensor, ...]:
    rows = x.cpu().numpy()
    return tuple(torch.from_numpy(part).to(x.device) for part in (rows.mean(0), np.cov(rows, rowvar=False)))


def _torchmetrics_update() -> Bind:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        """What is given are the features."""

        num_features = 0

        def forward(self, x: Tensor) -> Any:
            return x

    def bind(arrays: Arrays) -> Call:
        extractor = Given()
        extractor.num_features = arrays.reads[0].shape[1]
        metric = FrechetInceptionDistance(extractor, normalize=False).to(arrays.reads[0].device)
        return partial(run, metric, spread(arrays.reads[0]))

    def run(metric: Any, x: Tensor) -> None:
        metric.reset()
        for part in x.split(BATCH):
            metric.update(part, real=True)

    return bind


# ---- the floor --------------------------------------------------------------------------------


def _products_of_statistics(arrays: Arrays) -> Call:
    """F1^T S2 F1 on a CPU; on a GPU F1^T F2 and three products for each quintic."""
    d = arrays.reads[0].shape[1]
    return _products(d, d, d, 1 + 3 * len(schedule()) if arrays.reads[0].is_cuda else 2, arrays)


def _product_of_features(arrays: Arrays) -> Call:
    n, d = arrays.reads[0].shape
    return _products(n, d, n, 1, arrays)


def _half_a_product(arrays: Arrays) -> Call:
    n, d = arrays.reads[0].shape
    return _products(d, n // 2, d, 1, arrays)


def _products(rows: int, inner: int, columns: int, times: int, arrays: Arrays) -> Call:
    like: dict[str, Any] = {"dtype": torch.float64, "device": arrays.reads[0].device}
    a, b = torch.randn(rows, inner, **like), torch.randn(inner, columns, **like)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return run
