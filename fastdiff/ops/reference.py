"""The reference backend: every op in plain PyTorch, to be read as the specification.

Arguments are checked by the contract (the op's own module); what arrives here is valid. Arithmetic runs in
float32, or in float64 where the state is float64, and the result is rounded once to the dtype it is kept in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops.row import LETTERS


def add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    wide = _wide(x0)
    return (_like(alpha, x0) * x0.to(wide) + _like(sigma, x0) * noise.to(wide)).to(x0.dtype)


def diffusion_loss(out: Tensor, x0: Tensor, noise: Tensor, f: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    wide = _wide(x0)
    target = _like(f, x0) * x0.to(wide) + _like(g, x0) * noise.to(wide)
    return weight.to(wide) * (out.to(wide) - target).square().flatten(1).mean(1)


def guide(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    wide = _wide(cond)
    cond_wide, uncond_wide = cond.to(wide), uncond.to(wide)
    return (uncond_wide + _like(scale, cond) * (cond_wide - uncond_wide)).to(cond.dtype)


def affine_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
    r = {letter: _like(column, x) for letter, column in zip(LETTERS, table[row].to(x.dtype).unbind(-1), strict=True)}
    channels = x.shape[1]
    prediction, f = out[:, :channels].to(x.dtype), (1 + out[:, channels:].to(x.dtype)) / 2
    if uncond is not None:
        uncond = uncond[:, :channels].to(x.dtype)
        prediction = uncond + r["w"] * (prediction - uncond)
    x0 = torch.clamp(r["p"] * x + r["q"] * prediction, -r["clip"], r["clip"])
    following = r["a"] * x + r["b"] * x0
    for letter, h in zip(("c1", "c2", "c3"), history, strict=False):
        following = following + r[letter] * h
    if anchor is not None:
        following = following + r["e"] * anchor
        anchor = r["k"] * anchor + r["m"] * x + r["n"] * x0
    if noise is not None:
        std = r["s"] * torch.exp((f * r["hi"] + (1 - f) * r["lo"]) / 2) if f.numel() else r["s"]
        following = following + std * noise
    if history:
        history = (r["u"] * x + r["v"] * x0, *history[:-1])
    return following, x0, history, anchor


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    # ATen's variance is two-pass only on contiguous memory; its channels-last form cancels.
    wide = _wide(x)
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    y = torch.group_norm(x.to(wide).contiguous(), groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _like(scale, y))
    if shift is not None:
        y = y + _like(shift, y)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype, memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything else is computed in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A scalar, ``[N]`` or ``[N, C]`` value as something that broadcasts against ``x`` ``[N, C, ...]``."""
    value = value.to(x.device, _wide(x))
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value
