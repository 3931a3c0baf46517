"""A residual multilayer perceptron for points: two-dimensional toy data and other vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import check
from fastdiff.models.layers import Conditional, LabelEmbedding, TimeEmbedding, zero_init
from fastdiff.models.settings import Setting, exactly, settled, whole
from fastdiff.ops.checks import check_floating

SETTINGS: dict[str, Setting] = {
    "dim": whole(),
    "width": whole(least=2),
    "depth": whole(),
    "frequencies": whole(least=0),
    "num_classes": whole(or_value=(None,)),
    "learned_variance": exactly(True, False),
}


class MLP(Conditional):
    """Noise-conditional MLP: ``mlp(x, t, y=None)``, ``[N, dim]`` to ``[N, dim]``.

    Args:
        dim: of the points.
        width, depth: of the hidden layers; each is a residual block conditioned on the time embedding.
        frequencies: how many sines and cosines of each coordinate the network sees beside it, 1, 2, 4 ... a unit.
        num_classes: class-conditional on ``y`` as in :class:`~fastdiff.models.UNet`.
        learned_variance: twice the outputs, the last half for the variance.

    Raises:
        InputError: inputs of the wrong shape, labels out of range.
    """

    def __init__(
        self,
        dim: int = 2,
        *,
        width: int = 128,
        depth: int = 4,
        frequencies: int = 6,
        num_classes: int | None = None,
        learned_variance: bool = False,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        settled("this configuration does not fit fastdiff.MLP", config, SETTINGS)
        self.config: dict[str, Any] = config
        self.dim = dim
        self.time = TimeEmbedding(width, width)
        self.label = LabelEmbedding(num_classes, width) if num_classes is not None else None
        self.frequencies = frequencies
        self.into = nn.Linear(dim * (1 + 2 * frequencies), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.out = zero_init(nn.Linear(width, dim * (2 if learned_variance else 1)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x ``[N, dim]``, t ``[N]``, y int64 ``[N]``."""
        check_floating("x", x)
        check(x.ndim == 2 and x.shape[1] == self.dim, f"x must be [N, {self.dim}], got {list(x.shape)}")
        self._check_conditions(x, t, y)
        emb = F.silu(self._embedding(t, y, self.into.weight.dtype))
        h = self.into(self._features(x))
        for block in self.blocks:
            h = block(h, emb)
        out: Tensor = self.out(F.silu(h))
        return out

    def _features(self, x: Tensor) -> Tensor:
        """x, and sin and cos of 2^k x: a plain MLP would see only the coarse shape of the data."""
        angles = [x * 2.0**k for k in range(self.frequencies)]
        return torch.cat([x, *(a.sin() for a in angles), *(a.cos() for a in angles)], 1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = h + self.linear2(F.silu(self.linear1(F.silu(h + self.emb(emb)))))
        return out
