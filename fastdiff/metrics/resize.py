"""How images get the size a feature network takes: FID depends on it (Parmar et al. 2022).

Every function takes images ``[N, C, H, W]`` in 0 ... 255, uint8 or floating point, and gives float32
``[N, C, size, size]`` in the same range on the same device. :data:`RESIZES` names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import check


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """``resize_bilinear`` of TensorFlow 1 (align_corners=False), to the last bit on every device.

    Pixel i lies at i * in/out: the corner is kept, not the centre, and nothing is averaged when images shrink. This is
    what the FID of the 2015 graph means (Heusel et al. 2017).

    Raises:
        InputError: no images, or size below 1.
    """
    _check(images, size)
    return _between_neighbours(_between_neighbours(images.float(), size, 3), size, 2)


def _between_neighbours(x: Tensor, size: int, dim: int) -> Tensor:
    # Gathered and not multiplied by a matrix: a GPU could do the latter in TF32, and in another order everywhere.
    length = x.shape[dim]
    scale = torch.tensor(length / size, dtype=torch.float32, device=x.device)
    place = torch.arange(size, dtype=torch.float32, device=x.device) * scale  # rounded as TensorFlow rounds it
    low = place.long()
    share = (place - low).reshape(-1, *[1] * (3 - dim))
    before, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
    return before + (after - before) * share


def resize_bilinear(images: Tensor, size: int) -> Tensor:
    """Bilinear between pixel centres, without antialiasing: what pytorch-fid does.

    Raises:
        InputError: no images, or size below 1.
    """
    _check(images, size)
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)


def resize_clean(images: Tensor, size: int) -> Tensor:
    """Bicubic (a = -1/2), antialiased, not rounded to 8 bits: clean-fid's, which are Pillow's on floats.

    Raises:
        InputError: no images, or size below 1.
    """
    _check(images, size)
    # In float64: PyTorch's float32 weights differ from Pillow's by up to 0.005 grey levels, these by 0.00002.
    cubic = F.interpolate(images.double(), (size, size), mode="bicubic", align_corners=False, antialias=True)
    return cubic.clamp(0, 255).float()


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tf1": resize_tf1,
    "bilinear": resize_bilinear,
    "clean": resize_clean,
}


def _check(images: Tensor, size: int) -> None:
    fits = images.ndim == 4 and min(images.shape[1:]) > 0
    check(fits, f"images must be [N, C, H, W] with at least one pixel, got {list(images.shape)}")
    check(size >= 1, f"size must be at least 1, got {size}")
