"""Inception Score: how sure a classifier is of each image, and how evenly it spreads them over classes."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import check
from fastdiff.metrics.features import check_features


class InceptionScore(NamedTuple):
    """The score over splits, from 1 (all predictions equal) to the number of classes."""

    value: float  #: mean over the splits
    std: float  #: over the splits, of the population as peers report it


@torch.no_grad()
def inception_score(logits: Tensor, *, splits: int = 10, shuffle: bool = True, seed: int = 2020) -> InceptionScore:
    """exp(E KL(p(y | x) || p(y))), the mean over splits of the rows (Salimans et al. 2016, section 4), in float64.

    Rows are shuffled as torch-fidelity shuffles them: an equal seed gives its number.

    Args:
        logits: of a classifier ``[N, classes]``.
        splits: how many runs of consecutive rows, as long as each other to one row; a class's share p(y) is of a run.
        shuffle: take rows in random order; where classes are drawn one after the other, order would matter.
        seed: of the order.

    Raises:
        InputError: logits that are not finite ``[N >= 2, classes]``, or not 1 to N splits.
    """
    check_features("logits", logits, 2)
    check(1 <= splits <= len(logits), f"splits must be 1 to {len(logits)} for so many rows, got {splits}")
    order = np.random.RandomState(seed).permutation(len(logits)) if shuffle else np.arange(len(logits))
    rows = torch.from_numpy(order).to(logits.device)
    scores = [_score(logits[part]) for part in rows.tensor_split(_ends(len(rows), splits))]
    return InceptionScore(fmean(scores), pstdev(scores))


def _ends(count: int, splits: int) -> list[int]:
    return [i * count // splits for i in range(1, splits)]


def _score(logits: Tensor) -> float:
    log_p = logits.double().log_softmax(1)
    log_share = log_p.logsumexp(0) - math.log(len(log_p))  # finite where every p underflows
    return math.exp((log_p.exp() * (log_p - log_share)).sum(1).mean())
