"""Precision, recall, density, coverage against brute force, exact ties, closed forms and peers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.metrics.neighbours import PRDC, blocks, centred, prdc, squared_distances


def features(n: int, width: int = 8, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(real: Tensor, generated: Tensor, k: int = 3, density_k: int = 5) -> PRDC:
    """The definitions on whole matrices of differences, float64, strictly inside."""
    real, generated = real.double(), generated.double()

    def squares(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, None] - y).square().sum(2)

    def radii(x: Tensor, k: int) -> Tensor:
        others = squares(x, x) + torch.diag(torch.full((len(x),), torch.inf, dtype=torch.float64))
        return others.sort(1).values[:, k - 1]

    between = squares(real, generated)
    near, wide = (between < radii(real, count)[:, None] for count in (k, density_k))
    recalled = between < radii(generated, k)
    return PRDC(
        near.any(0).double().mean().item(),
        recalled.any(1).double().mean().item(),
        wide.sum().item() / (density_k * len(generated)),
        wide.any(1).double().mean().item(),
    )


@pytest.mark.parametrize(("n", "m"), [(6, 6), (60, 40), (40, 61)])
@pytest.mark.parametrize("block", [1, 300, 2**23])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_the_four_are_their_definitions(n: int, m: int, block: int, mean: float, monkeypatch) -> None:
    monkeypatch.setattr("fastdiff.metrics.neighbours.BLOCK", block)
    for seed in range(4):
        real = features(n, seed=2 * seed, shift=mean)
        generated = features(m, seed=2 * seed + 1, shift=mean + 0.3, scale=0.8)
        for k, density_k in [(3, 5), (1, 1), (5, 2)]:
            scores = prdc(real, generated, k=k, density_k=density_k)
            assert scores == pytest.approx(brute_force(real, generated, k, density_k), abs=1e-15)


def test_the_defaults_are_those_of_the_papers() -> None:
    real, generated = features(50), features(50, seed=1, shift=0.2)
    assert prdc(real, generated) == prdc(real, generated, k=3, density_k=5)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1 / 3])
def test_ties_and_copies_on_a_lattice_are_outside(offset: float) -> None:
    """Small integers: most distances tie and many rows are copies. Moved by a fraction they still tie."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        real, generated = (torch.randint(0, 3, (n, 4), generator=generator).double() for n in (70, 50))
        expected = brute_force(real, generated)
        assert 0 < expected.precision < 1
        assert prdc(real + offset, generated + offset) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("width", [2, 64, 2048])
def test_a_set_beside_itself_has_exact_scores(width: int) -> None:
    """The k-th neighbour ties with the radius and is outside: a ball holds the row and k - 1 others."""
    x = features(200, width, shift=0.4)
    assert prdc(x, x.clone()) == PRDC(1.0, 1.0, 1.0, 1.0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert prdc(x, x[order]) == PRDC(1.0, 1.0, 1.0, 1.0)


def test_equal_rows_have_empty_neighbourhoods() -> None:
    x = torch.full((10, 3), 0.7)
    assert prdc(x, x) == PRDC(0.0, 0.0, 0.0, 0.0)


def test_a_dropped_mode_and_an_invented_one() -> None:
    """Real: two clusters. Generated: one of them and one far away."""
    a, b, c = features(100), features(100, seed=1, shift=50.0), features(100, seed=2, shift=-50.0)
    scores = prdc(torch.cat((a, b)), torch.cat((features(100, seed=3), c)))
    only = prdc(a, features(100, seed=3))
    assert scores == pytest.approx([value / 2 for value in only], abs=1e-12)


def test_density_of_equal_distributions_is_1() -> None:
    """A generated row is inside as often as another real one; coverage has the closed form of Naeem et al. 2020."""
    values = [prdc(features(100, 4, seed=2 * i), features(100, 4, seed=2 * i + 1)) for i in range(60)]
    density = np.array([v.density for v in values])
    assert abs(density.mean() - 1) < 4 * density.std() / math.sqrt(60)
    # Not covered: the k nearest of a row's 199 others are all real.
    expected = 1 - math.prod((100 - 1 - i) / (2 * 100 - 1 - i) for i in range(5))
    coverage = np.array([v.coverage for v in values])
    assert abs(coverage.mean() - expected) < 4 * coverage.std() / math.sqrt(60)


def test_scores_move_with_the_scale_of_both_sets() -> None:
    real, generated = features(80), features(70, seed=1, shift=0.3)
    for scale in (1e-12, 1e12):
        assert prdc(scale * real.double(), scale * generated.double()) == prdc(real, generated)


# ---- peers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lattice", [False, True])
def test_as_the_prdc_package_has_it(lattice: bool, capsys) -> None:
    peer = pytest.importorskip("prdc")
    real, generated = features(150), features(120, seed=1, shift=0.3)
    if lattice:
        real, generated = real.round(), generated.round()
    theirs = peer.compute_prdc(real.double().numpy(), generated.double().numpy(), nearest_k=5)
    assert prdc(real, generated, k=5)._asdict() == pytest.approx(theirs, abs=1e-15)


@pytest.mark.parametrize("part", [False, True])
def test_as_torch_fidelity_has_it(part: bool) -> None:
    """Its balls are closed, which is the same where nothing ties."""
    peer = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = features(150).double(), features(120, seed=1, shift=0.3).double()
    options = {"prc_neighborhood": 3, "prc_batch_size": 50, "save_cpu_ram": part, "verbose": False}
    theirs = peer.prc_features_to_metric(generated, real, **options)
    ours = prdc(real, generated)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


# ---- distances ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 300])
def test_distances_of_features_at_a_mean_of_1000(dtype: torch.dtype, width: int) -> None:
    x, y = features(50, width, shift=1000.0).to(dtype), features(40, width, seed=1, shift=1000.0).to(dtype)
    exact = (x.double()[:, None] - y.double()).square().sum(2)
    torch.testing.assert_close(squared_distances(*centred(x, y)), exact, rtol=1e-12, atol=1e-9)


def test_distances_of_copies_are_not_negative() -> None:
    x = features(200, 100, shift=0.3)
    distances = squared_distances(*centred(x, x))
    assert distances.min() >= 0
    assert distances.diagonal().max() < 1e-12


@pytest.mark.parametrize(("n", "m", "most"), [(10, 7, 21), (10, 7, 6), (1, 1, 100), (100, 3, 30)])
def test_blocks_cover_every_row_once_and_stay_small(n: int, m: int, most: int, monkeypatch) -> None:
    monkeypatch.setattr("fastdiff.metrics.neighbours.BLOCK", most)
    rows = [torch.arange(n)[block] for block in blocks(torch.zeros(n, 2), torch.zeros(m, 2))]
    assert torch.equal(torch.cat(rows), torch.arange(n))
    assert all(len(part) == 1 or len(part) * m <= most for part in rows)


# ---- bad input ------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    good, holed = features(6), features(9)
    holed[4, 1] = math.inf
    for real, generated, message in [
        (features(5), good, r"real must hold more rows than neighbours \(5\), got 5"),
        (good, features(4), r"generated must hold more rows than neighbours \(5\), got 4"),
        (good, features(1), "generated must hold at least 2 rows, got 1"),
        (good, features(9, 3), "real and generated must have one width D, got 8 and 3"),
        (good, holed, "generated holds NaN or infinite values, first in row 4"),
    ]:
        with pytest.raises(InputError, match=message):
            prdc(real, generated)
    for options, message in [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"density_k": -2}, "density_k must be at least 1, got -2"),
        ({"k": 6}, r"real must hold more rows than neighbours \(6\), got 6"),
    ]:
        with pytest.raises(InputError, match=message):
            prdc(good, good, **options)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_and_is_not_mixed_with_the_cpu() -> None:
    real, generated = features(300, 64), features(200, 64, seed=1, shift=0.1)
    assert prdc(real.cuda(), generated.cuda()) == pytest.approx(prdc(real, generated), abs=1e-15)
    assert prdc(real.cuda(), real.cuda()) == PRDC(1.0, 1.0, 1.0, 1.0)
    with pytest.raises(InputError, match="real and generated must be on one device, got cpu and cuda:0"):
        prdc(real, generated.cuda())
