"""The U-Net of DDPM (Ho et al. 2020) and of ADM (Dhariwal & Nichol 2021), by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import check
from fastdiff.models.layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    LabelEmbedding,
    ResBlock,
    TimeEmbedding,
    Upsample,
    zero_init,
)


class UNet(nn.Module):
    """Noise-conditional U-Net: ``unet(x, t, y=None, condition=None)``, ``[N, C, H, W]`` to ``[N, out, H, W]``.

    Args:
        image_size: height and width it is built for; it places the attention. Other sizes run if they divide by
            2 ** (levels - 1).
        in_channels: of the image.
        out_channels: default ``in_channels``; twice that with ``learned_variance``.
        model_channels: width of the first level.
        channel_mult: width of each level in units of ``model_channels``.
        num_res_blocks: per level on the way down; one more on the way up.
        attention_resolutions: resolutions (pixels) that have attention.
        num_heads, num_head_channels: attention heads; ``num_head_channels`` sets their width instead of their number.
        norm_groups, norm_eps: of group norm.
        dropout: in the residual blocks.
        scale_shift: AdaGN (ADM) instead of adding the time embedding (DDPM).
        resblock_updown: change the resolution in residual blocks (ADM) instead of by single convolutions (DDPM).
        num_classes: class-conditional on ``y``, int64 ``[N]``; ``y = num_classes`` is the null label of
            classifier-free guidance. None: unconditional.
        learned_variance: twice the output channels, the last half for the variance.
        condition_channels: channels of an image ``condition`` joined to x (Palette, Saharia et al. 2022);
            a smaller one is upsampled to x's size.

    The CIFAR-10 network of Ho et al. 2020 is
    ``UNet(32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1)``.

    Raises:
        InputError: a configuration that does not fit together, inputs of the wrong shape, labels out of range.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        *,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resblock_updown: bool = False,
        num_classes: int | None = None,
        learned_variance: bool = False,
        condition_channels: int = 0,
    ) -> None:
        self_config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config: dict[str, Any] = {k: list(v) if isinstance(v, Sequence) else v for k, v in self_config.items()}
        _check_config(image_size, channel_mult, attention_resolutions)
        self.in_channels, self.condition_channels = in_channels, condition_channels
        self.factor = 2 ** (len(channel_mult) - 1)
        emb = 4 * model_channels
        common: dict[str, Any] = {
            "groups": norm_groups,
            "eps": norm_eps,
            "dropout": dropout,
            "scale_shift": scale_shift,
        }

        def res(inside: int, outside: int, direction: int = 0) -> ResBlock:
            return ResBlock(inside, outside, emb, **common, resample=direction)

        def attention(channels: int) -> Attention:
            heads = channels // num_head_channels if num_head_channels else num_heads
            return Attention(channels, heads, norm_groups, norm_eps)

        def change(channels: int, direction: int) -> nn.Module:
            if resblock_updown:
                return res(channels, channels, direction)
            return Upsample(channels) if direction > 0 else Downsample(channels)

        def block(inside: int, outside: int, size: int) -> nn.ModuleList:
            return nn.ModuleList(
                [res(inside, outside), *([attention(outside)] if size in attention_resolutions else [])]
            )

        self.time = TimeEmbedding(model_channels, emb)
        self.label = LabelEmbedding(num_classes, emb) if num_classes is not None else None
        self.conv_in = nn.Conv2d(in_channels + condition_channels, model_channels, 3, padding=1)
        skips, width = [model_channels], model_channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        last = len(channel_mult) - 1
        for level, multiple in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                self.down.append(block(width, multiple * model_channels, image_size >> level))
                width = multiple * model_channels
                skips.append(width)
            if level < last:
                self.down.append(nn.ModuleList([change(width, -1)]))
                skips.append(width)
        self.middle = nn.ModuleList([res(width, width), attention(width), res(width, width)])
        for level in range(last, -1, -1):
            for i in range(num_res_blocks + 1):
                outside = channel_mult[level] * model_channels
                up = block(width + skips.pop(), outside, image_size >> level)
                width = outside
                if level and i == num_res_blocks:
                    up.append(change(width, 1))
                self.up.append(up)
        self.norm_out = GroupNormSiLU(width, norm_groups, norm_eps)
        out = (out_channels or in_channels) * (2 if learned_variance else 1)
        self.conv_out = zero_init(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """x ``[N, C, H, W]``, t ``[N]`` (whole or fractional), y int64 ``[N]``, condition ``[N, c, h, w]``."""
        self._check_input(x, t, y)
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label(y)
        emb = F.silu(emb)
        h = self.conv_in(self._with_condition(x, condition))
        skips = [h]
        for block in self.down:
            h = _run(block, h, emb)
            skips.append(h)
        h = _run(self.middle, h, emb)
        for block in self.up:
            h = _run(block, torch.cat((h, skips.pop()), 1), emb)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """``cond`` without its label: what classifier-free guidance compares with. An image condition stays."""
        check(self.label is not None and "y" in cond, "classifier-free guidance needs a class-conditional model and y")
        assert self.label is not None
        return {**cond, "y": self.label.null(cond["y"])}

    def _with_condition(self, x: Tensor, condition: Tensor | None) -> Tensor:
        if not self.condition_channels:
            check(condition is None, "this model takes no condition image (condition_channels=0)")
            return x
        expected = (len(x), self.condition_channels)
        valid = condition is not None and condition.ndim == 4 and condition.shape[:2] == expected
        check(
            valid,
            f"condition must be {[*expected, 'h', 'w']}, got {None if condition is None else list(condition.shape)}",
        )
        assert condition is not None
        if condition.shape[2:] != x.shape[2:]:
            condition = F.interpolate(condition, x.shape[2:], mode="bilinear", antialias=True)
        return torch.cat((x, condition.to(x.dtype)), 1)

    def _check_input(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        shape = list(x.shape)
        check(x.ndim == 4 and shape[1] == self.in_channels, f"x must be [N, {self.in_channels}, H, W], got {shape}")
        fits = shape[2] % self.factor == 0 and shape[3] % self.factor == 0
        check(fits, f"height and width must divide by {self.factor}, got {shape[2:]}")
        check(t.shape == x.shape[:1], f"t must hold one time per sample ({shape[0]}), got {list(t.shape)}")
        check(y is None or self.label is not None, "this model takes no labels (num_classes=None)")
        check(y is None or len(y) == len(x), f"y must hold one label per sample ({shape[0]})")


def _run(block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    for layer in block.children():
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
    return h


def _check_config(image_size: int, channel_mult: Sequence[int], attention_resolutions: Sequence[int]) -> None:
    check(len(channel_mult) > 0, "channel_mult must name at least one level")
    factor = 2 ** (len(channel_mult) - 1)
    check(
        image_size % factor == 0,
        f"image_size {image_size} cannot be halved {len(channel_mult) - 1} times (channel_mult)",
    )
    sizes = [image_size >> level for level in range(len(channel_mult))]
    unknown = sorted(set(attention_resolutions) - set(sizes))
    check(not unknown, f"attention_resolutions {unknown} do not occur: the levels are {sizes}")
