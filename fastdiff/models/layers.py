"""The parts of the networks. Each is one op or one matrix product away from its fused form."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.errors import check

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """cos and sin of t at dim/2 geometric frequencies, float32 ``[N, dim]`` (Vaswani et al. 2017; cos first)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat((angles.cos(), angles.sin()), -1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """t ``[N]`` to the embedding ``[N, emb]`` that conditions every block."""

    def __init__(self, dim: int, emb: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear1, self.linear2 = nn.Linear(dim, emb), nn.Linear(emb, emb)

    def forward(self, t: Tensor) -> Tensor:
        angles = timestep_embedding(t, self.dim).to(self.linear1.weight.dtype)
        emb: Tensor = self.linear2(F.silu(self.linear1(angles)))
        return emb


class LabelEmbedding(nn.Embedding):
    """Class labels ``[N]``, 0 ... classes-1, and the null label ``classes`` that stands for no condition."""

    def __init__(self, classes: int, emb: int) -> None:
        super().__init__(classes + 1, emb)

    def forward(self, y: Tensor | None) -> Tensor:
        check(y is not None, f"this model is class-conditional: pass y, labels 0...{self.num_embeddings - 2}")
        assert y is not None
        check(y.dtype == torch.int64 and y.ndim == 1, f"y must be int64 [N], got {y.dtype} {list(y.shape)}")
        if y.device.type == "cpu" and y.numel():
            low, high = int(y.min()), int(y.max())
            last = self.num_embeddings - 1
            check(low >= 0 and high <= last, f"labels must lie in 0...{last - 1} ({last} = none), got {low} to {high}")
        return super().forward(y)

    def null(self, y: Tensor) -> Tensor:
        return torch.full_like(y, self.num_embeddings - 1)


class GroupNormSiLU(nn.Module):
    """Group norm, optional AdaGN scale and shift, and SiLU or nothing, as one op."""

    def __init__(self, channels: int, groups: int, eps: float, activation: str = "silu") -> None:
        super().__init__()
        check(channels % groups == 0, f"{channels} channels cannot be split into {groups} groups (norm_groups)")
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(
            *(x, self.groups, self.weight, self.bias, self.eps), scale=scale, shift=shift, activation=self.activation
        )


class ResBlock(nn.Module):
    """norm-SiLU-conv, time embedding, norm-SiLU-dropout-conv, and the skip (Ho et al. 2020; Dhariwal & Nichol 2021).

    ``scale_shift``: the embedding scales and shifts the second norm (AdaGN) instead of being added before it.
    ``resample``: +1 doubles, -1 halves the resolution inside the block, 0 keeps it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb: int,
        *,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resample: int = 0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = GroupNormSiLU(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNormSiLU(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x ``[N, C, H, W]``, emb ``[N, emb]`` after its SiLU."""
        h = self.conv1(resample(self.norm1(x), self.resample))
        x = resample(x, self.resample)
        condition = self.emb(emb)
        h = self.norm2(h, *condition.chunk(2, 1)) if self.scale_shift else self.norm2(h + condition[:, :, None, None])
        out: Tensor = self.skip(x) + self.conv2(self.dropout(h))
        return out


class Attention(nn.Module):
    """Self-attention over positions with a residual, on scaled_dot_product_attention."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        fits = heads >= 1 and channels % heads == 0
        check(fits, f"{channels} channels cannot be split into {heads} attention heads (num_heads)")
        self.heads = heads
        self.norm = GroupNormSiLU(channels, groups, eps, activation="none")
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, c // self.heads)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(attended)
        return x + out.transpose(1, 2).reshape(n, c, height, width)


class Downsample(nn.Conv2d):
    """Halve the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double the resolution, nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(resample(x, 1))


def resample(x: Tensor, direction: int) -> Tensor:
    """Nearest-neighbour doubling (+1), 2x2 mean (-1) or nothing (0)."""
    if direction > 0:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x, 2) if direction < 0 else x


def zero_init(module: M) -> M:
    """Set all parameters to zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
