"""What multiplies matrices in the networks: in the precision of its input, whatever that of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """A linear map in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Conv(nn.Conv2d):
    """A convolution with a bias in the precision of its input, and optionally a sum: ``conv(x) + add``.

    After :meth:`pack` the weights are also held in the layout that oneDNN's kernels walk: no call arranges them again.
    """

    bias: Tensor

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.packed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if self.packed is not None and not torch.compiler.is_compiling():
            packed: Tensor = self._packed(x, *self.packed, add)
            return packed
        y = self._plain(x, self.kernel().to(x.dtype), self.bias.to(x.dtype))
        return y if add is None else y + add

    def kernel(self) -> Tensor:
        """The weights as they are convolved with."""
        return self.weight

    def pack(self, dtype: torch.dtype) -> None:
        """Hold the weights, as they are now, as oneDNN wants them for a dtype."""
        self.packed = self._pack(self.kernel().detach().to(dtype)), self.bias.detach().to(dtype)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def _pack(self, weight: Tensor) -> Any:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, self.padding, self.stride, (1, 1), 1, None)

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> Any:
        run, where = torch.ops.mkldnn._convolution_pointwise, (self.padding, self.stride, (1, 1), 1)
        if add is None:
            return run(x, weight, bias, *where, "none", [], "")
        return run.binary(x, add, weight, bias, *where, "add", None, None, [], None)


class Upsample(Conv):
    """Double the resolution, nearest neighbour, then convolve 3x3.

    Each output pixel sees only 2x2 different pixels of its input, so this is one transposed convolution of stride 2
    with a 4x4 kernel, of four ninths of the products.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def kernel(self) -> Tensor:
        """``[in, out, 4, 4]``: the kernel convolved with the 2x2 pixels that a pixel becomes, turned around."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        rows = wide.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ad,be,oide->ioab", rows, rows, wide)
        return kernel.contiguous(memory_format=torch.channels_last)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)

    def _pack(self, weight: Tensor) -> Any:
        return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, (1, 1), (0, 0), (2, 2), (1, 1), 1, None)

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
        where = ((1, 1), (0, 0), (2, 2), (1, 1), 1)
        y: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(x, weight, bias, *where, "none", [], "")
        return y if add is None else y + add


class Downsample(Conv):
    """Halve the resolution by a strided convolution; ``padding=0`` pads on the right and below only."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)), add)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
