"""The U-Net of guided-diffusion (Dhariwal & Nichol 2021) for tests: its equations and its names, in plain PyTorch.

Written from the paper and a description of the parameters, and without fastdiff: what ours is compared with.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def embedding(t, channels):
    """cos, then sin, of t at frequencies from 1 down to (not reaching) 1/10,000; an odd channel is zero."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t.float().outer(frequencies)
    return torch.cat([angles.cos(), angles.sin(), torch.zeros(len(t), channels % 2)], 1)


def norm(channels):
    return nn.GroupNorm(32, channels)


def double(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halve(x):
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))


class Residual(nn.Module):
    def __init__(self, inside, outside, emb, *, scale_shift, dropout=0.0, change=None):
        super().__init__()
        self.scale_shift, self.change = scale_shift, change or nn.Identity()
        self.in_layers = nn.Sequential(norm(inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, (1 + scale_shift) * outside))
        self.out_layers = nn.Sequential(
            norm(outside), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outside, outside, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x, emb):
        normalise, activate, convolve = self.in_layers
        h = convolve(self.change(activate(normalise(x))))
        told = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(self.change(x)) + h


class Change(nn.Module):
    """Doubles or halves as a function says; for residual blocks, which have no weights for it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Down(nn.Module):
    def __init__(self, channels, conv):
        super().__init__()
        if conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x) if hasattr(self, "op") else halve(x)


class Up(nn.Module):
    def __init__(self, channels, conv):
        super().__init__()
        if conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(double(x)) if hasattr(self, "conv") else double(x)


class Attention(nn.Module):
    def __init__(self, channels, heads, width, new_order):
        super().__init__()
        self.heads, self.new_order = channels // width if width > 0 else heads, new_order
        self.norm, self.qkv, self.proj_out = (
            norm(channels),
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x):
        n, c = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            q, k, v = qkv.view(n, 3, self.heads, c // self.heads, -1).unbind(1)
        else:
            q, k, v = qkv.view(n, self.heads, 3, c // self.heads, -1).unbind(2)
        weight = torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(c // self.heads)
        out = torch.einsum("nhts,nhcs->nhct", weight.softmax(3), v)
        return x + self.proj_out(out.reshape(n, c, -1)).view_as(x)


class Block(nn.Sequential):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Residual) else layer(x)
        return x


class UNetModel(nn.Module):
    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
    ):
        super().__init__()
        self.model_channels = model_channels
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        widths = [int(factor * model_channels) for factor in channel_mult]

        def residual(inside, outside, change=None):
            return Residual(
                inside,
                outside,
                emb,
                scale_shift=use_scale_shift_norm,
                dropout=dropout,
                change=change and Change(change),
            )

        def attention(width, level):
            here = level is None or 2**level in attention_resolutions
            return [Attention(width, num_heads, num_head_channels, use_new_attention_order)] * here

        last = len(widths) - 1
        ins, now, skips = [Block(nn.Conv2d(in_channels, widths[0], 3, padding=1))], widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                ins.append(Block(residual(now, width), *attention(width, level)))
                now = width
                skips.append(now)
            if level < last:
                ins.append(Block(residual(now, now, halve) if resblock_updown else Down(now, conv_resample)))
                skips.append(now)
        self.input_blocks = nn.ModuleList(ins)
        self.middle_block = Block(residual(now, now), *attention(now, None), residual(now, now))
        outs = []
        for level in range(last, -1, -1):
            for i in range(num_res_blocks + 1):
                layers = [residual(now + skips.pop(), widths[level]), *attention(widths[level], level)]
                now = widths[level]
                if level and i == num_res_blocks:
                    layers.append(residual(now, now, double) if resblock_updown else Up(now, conv_resample))
                outs.append(Block(*layers))
        self.output_blocks = nn.ModuleList(outs)
        self.out = nn.Sequential(norm(now), nn.SiLU(), nn.Conv2d(now, out_channels, 3, padding=1))

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        return self.out(x)


class SuperResModel(UNetModel):
    def __init__(self, image_size, in_channels, *arguments, **settings):
        super().__init__(image_size, 2 * in_channels, *arguments, **settings)

    def forward(self, x, timesteps, low_res=None, **cond):
        large = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, large], 1), timesteps, **cond)
