"""What an extractor says of images, and the checks every metric shares.

An extractor is any callable that takes uint8 images ``[N, C, H, W]`` and returns :class:`Features`, or a tensor
``[N, D]`` of which those are the ``pool``. Its attribute ``settings``, a dictionary, is kept with every result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError, check
from fastdiff.ops.checks import is_finite


class Features(NamedTuple):
    """Features of a batch of images, a row for each."""

    pool: Tensor  #: ``[N, D]``: for FID, KID, precision and recall
    spatial: Tensor | None = None  #: ``[N, S]``: for sFID
    logits: Tensor | None = None  #: ``[N, classes]``: for the Inception Score


Extractor = Callable[[Tensor], Features | Tensor]


def to_uint8(images: Tensor) -> Tensor:
    """uint8 images of float ones in [-1, 1], as samplers give them: nearest, clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor) -> None:
    """Raise :class:`InputError` unless ``images`` is uint8 ``[N, C, H, W]``."""
    check(isinstance(images, Tensor), f"images must be a tensor, got {type(images).__name__}")
    right = "images must be uint8 [N, C, H, W]"
    check(images.ndim == 4 and images.shape[1] in (1, 3), f"{right} with 1 or 3 channels, got {list(images.shape)}")
    how = "; float images in [-1, 1] become so by fd.metrics.to_uint8(images)"
    check(images.dtype == torch.uint8, f"{right}, got {images.dtype}{how if images.is_floating_point() else ''}")


def check_features(name: str, features: Tensor, least: int = 1) -> None:
    """Raise :class:`InputError` unless ``features`` is finite ``[N >= least, D >= 1]``."""
    fits = isinstance(features, Tensor) and features.ndim == 2 and features.shape[1] > 0
    check(fits, f"{name} must be features [N, D], got {list(getattr(features, 'shape', [type(features).__name__]))}")
    check(len(features) >= least, f"{name} must hold at least {least} rows, got {len(features)}")
    if not is_finite(features):
        first = int((~torch.isfinite(features)).any(1).nonzero()[0])
        raise InputError(f"{name} holds NaN or infinite values, first in row {first}")


def extract(extractor: Extractor, images: Tensor) -> Features:
    """The features of uint8 images ``[N, C, H, W]``.

    Raises:
        InputError: other images, or features that are not finite or not one row per image.
    """
    check_images(images)
    with torch.no_grad():
        result: Any = extractor(images)
    features = result if isinstance(result, Features) else Features(result)
    for name, value in zip(Features._fields, features, strict=True):
        if value is None:
            continue
        check_features(f"the extractor's {name}", value, 0)
        if len(value) != len(images):
            raise InputError(f"the extractor gave {len(value)} rows of {name} for {len(images)} images")
    return features
