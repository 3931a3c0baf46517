"""The Fréchet Inception Distance as a metric object, with torchmetrics' interface."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, distributed

from fastdiff.errors import check
from fastdiff.metrics.features import Extractor, extract
from fastdiff.metrics.frechet import frechet_distance
from fastdiff.metrics.statistics import FeatureStatistics


class FID:
    """The Fréchet distance between features of real and of generated images (Heusel et al. 2017).

    ``update(images, real=)`` as often as there are batches, then ``compute()``. Between processes of
    ``torch.distributed`` it is computed over what all have seen: each image counts once where each process is given
    its own, however many those are.

    Args:
        feature_extractor: takes images, returns features ``[N, D]`` or :class:`~fastdiff.metrics.Features`; default
            the network of 2015, whose weights :meth:`Inception.load` finds.
        reset_real_features: whether :meth:`reset` forgets the real images too.
        normalize: whether images are float in [0, 1]; otherwise uint8.
        device: where statistics are summed.

    Raises:
        InputError: an extractor that is not callable; images that do not fit, fewer than two of a kind.
    """

    def __init__(
        self,
        feature_extractor: Extractor | None = None,
        *,
        reset_real_features: bool = True,
        normalize: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if feature_extractor is None:
            from fastdiff.metrics.inception import Inception

            feature_extractor = Inception.load().to(device)
        kind = type(feature_extractor).__name__
        check(callable(feature_extractor), f"feature_extractor must be callable, got {kind}")
        self.feature_extractor, self.device = feature_extractor, torch.device(device)
        self.reset_real_features, self.normalize = reset_real_features, normalize
        self.statistics: dict[bool, FeatureStatistics | None] = {True: None, False: None}

    def update(self, images: Tensor, real: bool) -> None:
        """Take up images ``[N, C, H, W]``, 1 or 3 channels."""
        features = extract(self.feature_extractor, self._uint8(images)).pool
        statistics = self.statistics[bool(real)] or FeatureStatistics(features.shape[1], self.device)
        statistics.update(features)
        self.statistics[bool(real)] = statistics

    def compute(self) -> Tensor:
        """The distance, 0-d float64; at least 0."""
        real, fake = (self._of_all(kind) for kind in (True, False))
        warn_of_bias(fake, real)
        moments = (fake.mean, fake.covariance, real.mean, real.covariance)
        distance = frechet_distance(*(moment.to(self.device) for moment in moments))
        return torch.tensor(distance, dtype=torch.float64)

    def reset(self) -> None:
        self.statistics[False] = None
        if self.reset_real_features:
            self.statistics[True] = None

    def _of_all(self, real: bool) -> FeatureStatistics:
        """The statistics of all processes' images of a kind."""
        mine = self.statistics[real]
        everyone = gathered(mine) if distributed.is_available() and distributed.is_initialized() else mine
        count = 0 if everyone is None else everyone.count
        check(count > 1, f"at least 2 {'real' if real else 'generated'} images are needed, there were {count}")
        assert everyone is not None
        return everyone

    def _uint8(self, images: Tensor) -> Tensor:
        if not self.normalize:
            return images
        fits = isinstance(images, Tensor) and images.is_floating_point()
        check(fits, f"normalize=True takes float images in [0, 1], got {getattr(images, 'dtype', type(images))}")
        low, high = torch.stack(images.aminmax()).tolist() if images.numel() else (0.0, 0.0)
        check(low >= 0 and high <= 1, f"normalize=True takes images in [0, 1], got {low:g} to {high:g}")
        return (images * 255).to(torch.uint8)  # truncated, as torchmetrics does


def gathered(statistics: FeatureStatistics | None) -> FeatureStatistics | None:
    """The statistics of all processes, merged in the order of their ranks: the same in each. None if there are none."""
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, None if statistics is None else statistics.state())
    present = [FeatureStatistics.from_state(*state) for state in filter(None, states)]
    if not present:
        return None
    first, *others = present  # on the CPU
    for other in others:
        first.merge(other)
    return first


def warn_of_bias(*sets: FeatureStatistics) -> None:
    """Warn where there are no more samples than features: the covariance is singular and the distance too large."""
    for each in sets:
        n, d = each.count, each.dim
        if 0 < n <= d:
            of_means = float(each.covariance.trace()) / n
            warnings.warn(
                f"{n} samples of {d} features: their covariance has rank {n - 1} and the Fréchet distance is biased "
                f"upwards, by {of_means:.3g} in the means alone; compare equal counts, or ask for fid_infinity",
                stacklevel=3,
            )
