"""The parts of the networks. Each is one op or one matrix product away from its fused form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module

from fastdiff import ops
from fastdiff.errors import check
from fastdiff.models.convolution import Conv, Linear, Upsample
from fastdiff.models.recompute import remade
from fastdiff.ops import library
from fastdiff.ops.checks import check_per_sample

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, dim: int, shift: int = 0) -> Tensor:
    """cos and sin of t at dim/2 geometric frequencies, float32 ``[N, dim]`` (Vaswani et al. 2017; cos first).

    Frequency k is 10,000 ** (-k / (dim/2 - shift)): with ``shift=1``, as Ho et al. 2020 have it, the last is 1/10,000.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * steps / (half - shift))
    return F.pad(torch.cat((angles.cos(), angles.sin()), -1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """t ``[N]`` to the embedding ``[N, emb]`` that conditions every block."""

    def __init__(self, dim: int, emb: int, shift: int = 0) -> None:
        super().__init__()
        self.dim, self.shift = dim, shift
        self.linear1, self.linear2 = Linear(dim, emb), Linear(emb, emb)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        angles = timestep_embedding(t, self.dim, self.shift).to(dtype)
        emb: Tensor = self.linear2(F.silu(self.linear1(angles)))
        return emb


class LabelEmbedding(nn.Embedding):
    """Class labels ``[N]``, 0 ... classes-1, and with ``null`` the label ``classes`` that stands for no condition."""

    def __init__(self, classes: int, emb: int, null: bool = True) -> None:
        super().__init__(classes + null, emb)
        self.classes = classes

    def forward(self, y: Tensor | None) -> Tensor:
        check(y is not None, f"this model is class-conditional: pass y, labels 0...{self.classes - 1}")
        assert y is not None
        check(y.dtype == torch.int64, f"y must be int64 [N], got {y.dtype}")
        if y.device.type == "cpu" and y.numel() and not (torch.compiler.is_compiling() or library.watched()):
            low, high = int(y.min()), int(y.max())
            none = f" ({self.classes} = none)" if self.num_embeddings > self.classes else ""
            fits = low >= 0 and high < self.num_embeddings
            check(fits, f"labels must lie in 0...{self.classes - 1}{none}, got {low} to {high}")
        return super().forward(y)

    def null(self, y: Tensor) -> Tensor:
        check(self.num_embeddings > self.classes, "this model has no null label: it was trained with labels only")
        return torch.full_like(y, self.classes)


class Conditional(nn.Module):
    """A network conditional on the time and, with ``label``, on a class."""

    time: TimeEmbedding
    label: LabelEmbedding | None

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """``cond`` without its label: what classifier-free guidance compares with. What else there is stays."""
        check(self.label is not None and "y" in cond, "classifier-free guidance needs a class-conditional model and y")
        assert self.label is not None
        return {**cond, "y": self.label.null(cond["y"])}

    def _check_conditions(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        check_per_sample("t", t, x)
        check(y is None or self.label is not None, "this model takes no labels (num_classes=None)")
        if y is not None:
            check_per_sample("y", y, x)

    def _embedding(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        emb: Tensor = self.time(t, dtype)
        return emb if self.label is None else emb + self.label(y).to(dtype)


class GroupNormSiLU(nn.Module):
    """Group norm, optional AdaGN scale and shift, and SiLU or nothing, as one op."""

    def __init__(self, channels: int, groups: int, eps: float, activation: str = "silu") -> None:
        super().__init__()
        check(channels % groups == 0, f"{channels} channels cannot be split into {groups} groups (norm_groups)")
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self._normed(x, self.weight, self.bias, scale, shift)

    def then(self, f: Callable[[Tensor], Tensor], x: Tensor, *condition: Tensor) -> Tensor:
        """f(self(x, *condition)); the backward pass normalises again rather than keep what f takes."""
        h = self(x, *condition)
        if _hooked(self):  # h may be something else
            return f(h)
        with remade(h, self._normed, x, self.weight, self.bias, *condition):
            return f(h)

    def _normed(
        self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_silu(
            *(x, self.groups, weight, bias, self.eps), scale=scale, shift=shift, activation=self.activation
        )


def _hooked(layer: nn.Module) -> bool:
    own = layer._forward_hooks or layer._forward_pre_hooks
    return bool(own or module._global_forward_hooks or module._global_forward_pre_hooks)


class ResBlock(nn.Module):
    """norm-SiLU-conv, time embedding, norm-SiLU-dropout-conv, and the skip (Ho et al. 2020; Dhariwal & Nichol 2021).

    ``scale_shift``: the condition scales and shifts the second norm (AdaGN) instead of being added before it.
    ``resample``: +1 doubles, -1 halves the resolution inside the block, 0 keeps it.

    Attributes:
        condition: channels of the condition, which the network makes of the time embedding for all blocks at once.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resample: int = 0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.condition = out_channels * (2 if scale_shift else 1)
        self.norm1 = GroupNormSiLU(in_channels, groups, eps)
        up = resample > 0
        self.conv1 = Upsample(in_channels, out_channels) if up else Conv(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else Conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x ``[N, C, H, W]``, condition ``[N, condition]``, which :attr:`joined` is part of already."""
        h = self.norm1.then(lambda h: self.conv1(resample(h, min(self.resample, 0)), bias=self.joined is None), x)
        x = resample(x, self.resample)
        if isinstance(self.skip, Conv):  # two biases in one pass
            x = self.skip(x, bias=cast(Tensor, self.skip.bias) + cast(Tensor, self.conv2.bias))
        normed = (h, *condition.chunk(2, 1)) if self.scale_shift else (h + condition[..., None, None],)
        return self.norm2.then(
            lambda h: self.conv2(self.dropout(h), add=x, bias=not isinstance(self.skip, Conv)), *normed
        )

    @property
    def joined(self) -> Tensor | None:
        """The bias of the first convolution where it can be part of the condition, which is added to the same."""
        return None if self.scale_shift else self.conv1.bias


class Attention(nn.Module):
    """Self-attention over positions with a residual, on scaled_dot_product_attention."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float, norm: bool = True) -> None:
        super().__init__()
        _check_heads(channels, heads)
        self.heads = heads
        self.norm = GroupNormSiLU(channels, groups, eps, activation="none") if norm else nn.Identity()
        self.qkv = Linear(channels, 3 * channels)
        self.out = zero_init(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = _by_heads(self.qkv(tokens), self.heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(attended, add=x.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).reshape(n, c, height, width)


class AttentionPool(nn.Module):
    """One vector ``[N, C]`` of an image ``[N, C, H, W]``: what the mean of its positions attends to, itself included.

    Each has a learned place (Radford et al. 2021, section 2.4; Dhariwal & Nichol 2021, section 4.1).
    """

    def __init__(self, channels: int, heads: int, positions: int) -> None:
        super().__init__()
        _check_heads(channels, heads)
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, 1 + positions) / channels**0.5)
        self.qkv = Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2)
        places = torch.cat((places.mean(2, keepdim=True), places), 2) + self.positional_embedding.to(x.dtype)
        q, k, v = _by_heads(self.qkv(places.transpose(1, 2)), self.heads)
        return F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1)


def _by_heads(qkv: Tensor, heads: int) -> list[Tensor]:
    """Query, key and value ``[N, heads, T, C / heads]`` of ``[N, T, 3 C]``."""
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2)]


def _check_heads(channels: int, heads: int) -> None:
    fits = heads >= 1 and channels % heads == 0
    check(fits, f"{channels} channels cannot be split into {heads} attention heads (num_heads)")


class Resample(nn.Module):
    """Change the resolution without weights: +1 doubles, -1 halves."""

    def __init__(self, direction: int) -> None:
        super().__init__()
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.direction)


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
