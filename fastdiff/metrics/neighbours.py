"""Precision, recall, density and coverage: whose nearest neighbours are whose, from blocks of distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import check
from fastdiff.metrics.features import check_features

BLOCK = 2**23  # values of a block of pairs: 64 MB in float64


class PRDC(NamedTuple):
    """How generated features lie among real ones."""

    precision: float  #: share of generated rows within the k-th neighbour of some real row, in [0, 1]
    recall: float  #: share of real rows within the k-th neighbour of some generated row, in [0, 1]
    density: float  #: real neighbourhoods around a generated row, over k; 1 for equal distributions, may exceed 1
    coverage: float  #: share of real rows with a generated row within their k-th neighbour, in [0, 1]


@torch.no_grad()
def prdc(real: Tensor, generated: Tensor, *, k: int = 3, density_k: int = 5) -> PRDC:
    """Precision and recall (Kynkäänniemi et al. 2019, section 2), density and coverage (Naeem et al. 2020, section 3).

    A neighbourhood is the open ball around a row that reaches to its k-th nearest other row, as in the ``prdc``
    package: a row as far away as the k-th neighbour (a tie, a copy of it) is outside, and k + 1 equal rows have an
    empty one. Distances are float64; they tie where rounding cannot tell them apart. Memory is that of a block of
    distances and of the features in float64.

    Args:
        real: features ``[n, D]``.
        generated: features ``[m, D]``.
        k: neighbours of precision and recall.
        density_k: neighbours of density and coverage.

    Raises:
        InputError: not two finite sets of one width and device, or not more rows than neighbours.
    """
    for name, count in (("k", k), ("density_k", density_k)):
        check(count >= 1, f"{name} must be at least 1, got {count}")
    check_sets(2, real=real, generated=generated)
    for name, features in (("real", real), ("generated", generated)):
        enough = len(features) > max(k, density_k)
        check(enough, f"{name} must hold more rows than neighbours ({max(k, density_k)}), got {len(features)}")
    real, generated = centred(real, generated)
    near, wide = _radii(real, (k, density_k))
    reach = _radii(generated, (k,))[0]

    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled, covered, inside = 0, 0, 0
    for rows in blocks(real, generated):
        distances = squared_distances(real[rows], generated)
        precise |= (distances < near[rows, None]).any(0)
        recalled += int((distances < reach).any(1).sum())
        neighbours = (distances < wide[rows, None]).sum(1)
        covered += int((neighbours > 0).sum())
        inside += int(neighbours.sum())
    n, m = len(real), len(generated)
    return PRDC(float(precise.double().mean()), recalled / n, inside / (density_k * m), covered / n)


def _radii(x: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    """Squared distance ``[n]`` of each row to its k-th nearest other one for each k, less what rounding may add."""
    nearest = torch.cat(
        [squared_distances(x[rows], x).topk(max(counts) + 1, largest=False).values for rows in blocks(x, x)]
    )
    rounding = 64 * torch.finfo(x.dtype).eps
    return [nearest[:, k] - rounding * (x.square().sum(1) + nearest[:, k]) for k in counts]  # the 0th is the row itself


# ---- what metrics of pairs of rows share ----------------------------------------------------


def check_sets(least: int, **sets: Tensor) -> None:
    """Raise :class:`InputError` unless all are finite ``[N >= least, D]`` of one D, on one device."""
    for name, features in sets.items():
        check_features(name, features, least)
    names = " and ".join(sets)
    widths, devices = [f.shape[1] for f in sets.values()], [str(f.device) for f in sets.values()]
    check(len(set(widths)) == 1, f"{names} must have one width D, got {' and '.join(map(str, widths))}")
    check(len(set(devices)) == 1, f"{names} must be on one device, got {' and '.join(devices)}")


def blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``x``, few enough that each with all of ``y`` is :data:`BLOCK` pairs at most."""
    step = max(1, BLOCK // len(y))
    return (slice(start, start + step) for start in range(0, len(x), step))


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, moved by their common mean: the products of :func:`squared_distances` cancel less."""
    x, y = x.double(), y.double()
    centre = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
    return x - centre, y - centre


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|²`` ``[n, m]`` as a matrix product, exact to a few roundings of ``|x_i|² + |y_j|²``."""
    squares = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return squares.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)
