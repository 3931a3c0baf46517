"""The Inception Score against closed forms, its definition in probabilities, and peers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.metrics.inception_score import InceptionScore, inception_score


def logits(n: int, classes: int = 12, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def written_out(rows: Tensor, splits: int) -> InceptionScore:
    """In probabilities, from long doubles."""
    p = np.exp(rows.numpy().astype(np.longdouble))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


@pytest.mark.parametrize("n", [10, 100, 103])
@pytest.mark.parametrize("splits", [1, 3, 10])
def test_the_score_is_its_definition(n: int, splits: int) -> None:
    score = inception_score(logits(n), splits=splits, shuffle=False)
    assert score == pytest.approx(written_out(logits(n), splits), rel=1e-12)


def test_uniform_predictions_have_score_1() -> None:
    for rows in (torch.zeros(50, 7), logits(1, 7).repeat(50, 1)):
        assert inception_score(rows) == pytest.approx((1.0, 0.0), abs=1e-13)


@pytest.mark.parametrize("sharpness", [60.0, 1e4, 1e30])
def test_sure_and_balanced_predictions_have_the_number_of_classes(sharpness: float) -> None:
    """Also where the other classes' probabilities underflow to 0."""
    rows = sharpness * torch.eye(8).repeat(25, 1)
    assert inception_score(rows, splits=5, shuffle=False) == pytest.approx((8.0, 0.0), abs=1e-12)
    assert inception_score(rows[:, :8], splits=1).value == pytest.approx(8.0, rel=1e-12)
    # A ninth class that nobody is ever given: its share is 0, as its probabilities are.
    nine = torch.cat((rows, torch.full((200, 1), -sharpness)), 1)
    assert inception_score(nine, splits=5, shuffle=False) == pytest.approx((8.0, 0.0), abs=1e-12)


def test_two_kinds_of_predictions_have_a_closed_form() -> None:
    """Shares 1/4 and 3/4, sure of each: exp of the entropy of the shares."""
    rows = 1e3 * torch.eye(2)[torch.tensor([0, 1, 1, 1]).repeat(10)]
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert inception_score(rows, splits=10, shuffle=False).value == pytest.approx(math.exp(entropy), rel=1e-14)


def test_logits_far_from_0_lose_nothing() -> None:
    score = inception_score(logits(40).double() + 1e6)
    assert score == pytest.approx(inception_score(logits(40).double()), rel=1e-8)


def test_one_split_knows_no_order_and_the_seed_says_which() -> None:
    rows = logits(60)
    whole = [inception_score(rows, splits=1, shuffle=s, seed=i).value for s, i in ((False, 0), (True, 0), (True, 1))]
    assert whole == pytest.approx([whole[0]] * 3, rel=1e-14)
    one = inception_score(rows, seed=1)
    assert one == inception_score(rows, seed=1)
    assert one != inception_score(rows, seed=2)
    assert one != inception_score(rows, shuffle=False)


@pytest.mark.parametrize("n", [200, 207])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("splits", [1, 10])
def test_as_torch_fidelity_has_it(n: int, shuffle: bool, splits: int) -> None:
    peer = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = peer.isc_features_to_metric(logits(n), splits, shuffle, 2020)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    assert inception_score(logits(n), splits=splits, shuffle=shuffle) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all:UserWarning")
def test_as_torchmetrics_has_it(monkeypatch) -> None:
    """In order; its deviation over splits is that of a sample."""
    peer = pytest.importorskip("torchmetrics.image.inception")
    metric = peer.InceptionScore(feature=torch.nn.Identity(), splits=10)
    metric.set_dtype(torch.float64)
    metric.update(logits(200).double())
    monkeypatch.setattr(torch, "randperm", torch.arange)
    mean, std = map(float, metric.compute())
    ours = inception_score(logits(200), shuffle=False)
    assert ours == pytest.approx((mean, std * math.sqrt(0.9)), rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    holed = logits(20)
    holed[7, 0] = math.nan
    for rows, splits, message in [
        (logits(1), 1, "logits must hold at least 2 rows, got 1"),
        (logits(5), 10, "splits must be 1 to 5 for so many rows, got 10"),
        (logits(20), 0, "splits must be 1 to 20 for so many rows, got 0"),
        (holed, 10, "logits holds NaN or infinite values, first in row 7"),
        (logits(20)[0], 1, r"logits must be features \[N, D\], got \[12\]"),
    ]:
        with pytest.raises(InputError, match=message):
            inception_score(rows, splits=splits)


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    assert inception_score(logits(500).cuda()) == pytest.approx(inception_score(logits(500)), rel=1e-12)
