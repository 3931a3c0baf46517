"""What multiplies matrices in the networks: in the precision of its input, whatever that of its parameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.ops import library

ONEDNN = torch.ops.mkldnn


class Layer(nn.Module):
    """A linear map with a bias in the precision of its input, and optionally a sum: ``layer(x) + add``.

    ``bias``: another one instead of the layer's own; False for none, where somebody else adds it. PyTorch adds that of
    a convolution on a GPU in a pass of its own.

    After :meth:`pack` the weights are also held in the layout that oneDNN's kernels walk: no call arranges them again,
    and the sum is made before the result is rounded.
    """

    packed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, add: Tensor | None = None, bias: Tensor | bool = True) -> Tensor:
        if self.packed is not None and x.dtype == self.packed[1].dtype and not self._followed(x, add):
            weight, own = self.packed
            return self._packed(x, weight, _either(bias, own, x), add)
        y = self._plain(x, self.kernel().to(x.dtype), _either(bias, cast(Tensor, self.bias), x))
        return y if add is None else y + add

    def _followed(self, *values: Tensor | None) -> bool:
        """Whether PyTorch has to see the operations: what oneDNN does has no derivatives."""
        return library.traced(*values, self.weight, self.bias) or library.watched()

    def kernel(self) -> Tensor:
        """The weights as they are multiplied with."""
        return cast(Tensor, self.weight)

    def pack(self, dtype: torch.dtype) -> None:
        """Hold the weights, as they are now, as oneDNN wants them for a dtype."""
        self.packed = self._pack(self.kernel().detach().to(dtype)), cast(Tensor, self.bias).detach().to(dtype)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.packed = None  # of another dtype or device
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.packed = None  # of other weights
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # what oneDNN holds is copied and saved by nobody

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _pack(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        raise NotImplementedError


def _either(bias: Tensor | bool, own: Tensor, x: Tensor) -> Tensor | None:
    if bias is False:
        return None
    return (own if bias is True else bias).to(x.dtype)


class Linear(Layer, nn.Linear):
    """A matrix, over the last dimension of its input."""

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _pack(self, weight: Tensor) -> Any:
        return ONEDNN._reorder_linear_weight(weight)

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Any:
        if add is None:
            return ONEDNN._linear_pointwise(x, weight, bias, "none", [], "")
        return ONEDNN._linear_pointwise.binary(x, add, weight, bias, "add")


class Conv(Layer, nn.Conv2d):
    """A convolution; on a GPU that of single positions is the product of matrices it is, in half the time."""

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_cuda and self.kernel_size == (1, 1):
            n, _, height, width = x.shape
            rows: Tensor = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1), bias)
            y: Tensor = rows.unflatten(0, (n, height, width)).permute(0, 3, 1, 2)
            return y
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def _pack(self, weight: Tensor) -> Any:
        return ONEDNN._reorder_convolution_weight(weight, self.padding, self.stride, (1, 1), 1, None)

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Any:
        where = (self.padding, self.stride, (1, 1), 1)
        if add is None:
            return ONEDNN._convolution_pointwise(x, weight, bias, *where, "none", [], "")
        return ONEDNN._convolution_pointwise.binary(x, add, weight, bias, *where, "add", None, None, [], None)


class Upsample(Layer, nn.Conv2d):
    """Double the resolution, nearest neighbour, then convolve 3x3.

    Each output pixel sees only 2x2 different pixels of its input, so this is one transposed convolution of stride 2
    with a 4x4 kernel, of four ninths of the products.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def kernel(self) -> Tensor:
        """``[in, out, 4, 4]``: the weights convolved with the 2x2 pixels that a pixel becomes, turned around."""
        kernel = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).transpose(0, 1).flip(2, 3)
        for before, after in (((0, 0, 1, 0), (0, 0, 0, 1)), ((1, 0), (0, 1))):
            kernel = F.pad(kernel, before) + F.pad(kernel, after)
        return kernel.contiguous(memory_format=torch.channels_last)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)

    def _pack(self, weight: Tensor) -> Any:
        return ONEDNN._reorder_convolution_transpose_weight(weight, (1, 1), (0, 0), (2, 2), (1, 1), 1, None)

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        where = ((1, 1), (0, 0), (2, 2), (1, 1), 1)
        y: Tensor = ONEDNN._convolution_transpose_pointwise(x, weight, bias, *where, "none", [], "")
        return y if add is None else y + add


class Downsample(Conv):
    """Halve the resolution by a strided convolution; ``padding=0`` pads on the right and below only."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, add: Tensor | None = None, bias: Tensor | bool = True) -> Tensor:
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)), add, bias)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(ONEDNN._is_mkldnn_bf16_supported())
    return dtype == torch.float32
