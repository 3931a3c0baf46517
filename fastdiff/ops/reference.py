"""The reference backend: every op in plain PyTorch, to be read as the specification.

Arguments are checked by the contract (the op's own module); what arrives here is valid, and results are written to
tensors the contract made or was given. Arithmetic runs in float32, or in float64 where the state is float64, and
the result is rounded once to the dtype it is kept in. ``noise`` is a tensor or the address it is drawn from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.noise import Address, draw
from fastdiff.ops.layout import format_of
from fastdiff.ops.row import LETTERS

Noise = Tensor | Address
Scalar = Tensor | float


def normal(result: Tensor, address: Address) -> None:
    result.copy_(draw(result.shape, address, result.device))


def add_noise(x0: Tensor, alpha: Scalar, sigma: Scalar, noise: Noise, result: Tensor) -> None:
    wide = _wide(x0)
    result.copy_(_like(alpha, x0) * x0.to(wide) + _like(sigma, x0) * _noise(noise, x0))


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    f: Scalar,
    g: Scalar,
    weight: Scalar,
    bound: Tensor | None,
    noise: Noise,
    result: Tensor,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """Beside the loss also what its gradient is made of: the differences, and the slopes of the divergence."""
    for kept, value in zip((result, residual, slope), _loss(output, x0, f, g, weight, bound, noise), strict=True):
        if kept is not None and value is not None:
            kept.copy_(value)


def loss(
    output: Tensor, x0: Tensor, f: Scalar, g: Scalar, weight: Scalar, bound: Tensor | None, noise: Noise
) -> Tensor:
    """The loss ``[N]``."""
    return _loss(output, x0, f, g, weight, bound, noise)[0]


def guide(cond: Tensor, uncond: Tensor, scale: Scalar, result: Tensor) -> None:
    wide = _wide(cond)
    cond_wide, uncond_wide = cond.to(wide), uncond.to(wide)
    result.copy_(uncond_wide + _like(scale, cond) * (cond_wide - uncond_wide))


def affine_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Noise | None,
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    table = table.to(x.dtype)
    at = torch.as_tensor(row, device=x.device)
    r = {letter: _like(column, x) for letter, column in zip(LETTERS, _look_up(table, at).unbind(-1), strict=True)}
    channels = x.shape[1]
    prediction, f = output[:, :channels].to(x.dtype), (1 + output[:, channels:].to(x.dtype)) / 2
    if uncond is not None:
        uncond = uncond[:, :channels].to(x.dtype)
        prediction = uncond + r["w"] * (prediction - uncond)
    x0 = torch.clamp(r["p"] * x + r["q"] * prediction, -r["clip"], r["clip"])
    following = r["a"] * x + r["b"] * x0
    for letter, h in zip(("c1", "c2", "c3"), history, strict=False):
        following = following + r[letter] * h.to(x.dtype)
    kept = None
    if anchor is not None:
        anchor = anchor.to(x.dtype)
        following = following + r["e"] * anchor
        kept = r["k"] * anchor + r["m"] * x + r["n"] * x0
    if noise is not None:
        std = r["s"] * torch.exp((f * r["hi"] + (1 - f) * r["lo"]) / 2) if f.numel() else r["s"]
        following = following + std * _noise(noise, x)
    after = at.add(1).clamp(max=len(table) - 1)
    c_in = _like(_look_up(table, after)[..., LETTERS.index("c_in")], x)
    values = following, x0, r["u"] * x + r["v"] * x0, kept, c_in * following
    for result, value in zip(results, values, strict=True):
        if result is not None and value is not None:
            result.copy_(value)


def _look_up(table: Tensor, row: Tensor) -> Tensor:
    """``table[row]``, which would wait for the device where there is one row for all."""
    return table.index_select(0, row.reshape(-1)).reshape(*row.shape, *table.shape[1:])


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    result: Tensor,
    total: Tensor | None,
    moments: Tensor | None,
) -> None:
    """``moments`` [N, groups, 2] gets the mean and 1 / sqrt(variance + eps) of each group."""
    y, h = group_norm(x, groups, weight, bias, eps, scale, shift, residual, silu)
    result.copy_(y)
    if total is not None:
        total.copy_(h)
    if moments is not None:
        flat = h.to(_wide(x)).reshape(len(x), groups, math.prod(x.shape[1:]) // groups)
        mean = flat.mean(2, keepdim=True)
        variance = (flat - mean).square().mean(2, keepdim=True)
        moments.copy_(torch.cat((mean, (variance + eps).rsqrt()), 2))


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result and the sum that was normalised."""
    # ATen's variance is two-pass only on contiguous memory; its channels-last form cancels.
    h = x if residual is None else x + residual
    wide = _wide(x)
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    flat = (h.flatten(2) if h.ndim > 2 else h).to(wide).contiguous()
    y = torch.group_norm(flat, groups, weight, bias, eps).reshape(x.shape)
    if scale is not None:
        y = y * (1 + _like(scale, y))
    if shift is not None:
        y = y + _like(shift, y)
    y = F.silu(y) if silu else y
    return y.to(x.dtype, memory_format=format_of(x)), h


def group_norm_silu_backward(
    grad: Tensor,
    h: Tensor,
    moments: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    more: Tensor | None,
    result: Tensor,
    sums: Tensor,
) -> None:
    """The gradient of the sum (plus ``more``), and for each channel the sums of dz and of dz xhat, ``[N, C, 2]``.

    z = xhat gain + offset is what the activation takes.
    """
    wide, (n, channels) = _wide(h), h.shape[:2]
    one = torch.ones((), dtype=wide, device=h.device)
    factor = one if scale is None else 1 + scale.to(wide)
    gain = (one if weight is None else weight.to(wide)) * factor
    offset = (0 * one if bias is None else bias.to(wide)) * factor + (0 if shift is None else shift.to(wide))
    gain, offset = (v.expand(n, channels)[..., None] for v in (gain, offset))
    mean, inverse = (m.repeat_interleave(channels // groups, 1)[..., None] for m in moments.to(wide).unbind(2))
    shape = (n, channels, math.prod(h.shape[2:]))
    flat, dz = h.to(wide).reshape(shape), grad.to(wide).reshape(shape)
    xhat = (flat - mean) * inverse
    if silu:
        z = xhat * gain + offset
        s = z.sigmoid()
        dz = dz * s * (1 + z * (1 - s))
    sums.copy_(torch.stack((dz.sum(2), (dz * xhat).sum(2)), 2))
    grouped = (n, groups, math.prod(shape[1:]) // groups)
    plain, along = ((gain * v).reshape(grouped).mean(2, keepdim=True) for v in (dz, dz * xhat))
    dx = inverse * ((gain * dz).reshape(grouped) - plain - xhat.reshape(grouped) * along).reshape(flat.shape)
    dx = dx.reshape(h.shape)
    result.copy_(dx if more is None else dx + more)


def _loss(
    output: Tensor, x0: Tensor, f: Scalar, g: Scalar, weight: Scalar, bound: Tensor | None, noise: Noise
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, the differences from the target and, with a bound, the slopes of the divergence."""
    wide, z, slope = _wide(x0), _noise(noise, x0), None
    difference = output[:, : x0.shape[1]].to(wide) - (_like(f, x0) * x0.to(wide) + _like(g, x0) * z)
    value = weight * _mean(difference.square())
    if bound is not None:
        divergence, slope = _divergence(output, x0, bound, z)
        value = value + bound[:, -1] * _mean(divergence)
    return value.to(wide), difference, slope


def _divergence(output: Tensor, x0: Tensor, bound: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the posterior from a step of learned variance, nats, and its slope in the variance's channels.

    log variance = lo + (hi - lo) (1 + v) / 2 (Nichol & Dhariwal 2021, eq. 15); the mean gets no gradient (eq. 16).
    """
    wide, channels = _wide(x0), x0.shape[1]
    alpha, sigma, p, q, b, lo, hi, _ = (_like(column, x0) for column in bound.unbind(1))
    x0, prediction, v = x0.to(wide), output[:, :channels].detach().to(wide), output[:, channels:].to(wide)
    log_variance = (1 + v) / 2 * hi + (1 - v) / 2 * lo
    difference = lo - log_variance
    mean = b * (x0 - (p * (alpha * x0 + sigma * z) + q * prediction))
    excess = mean.square() * (-log_variance).exp()
    kl = (difference.expm1() - difference + excess) / 2
    return kl, (-difference.expm1() - excess) / 2 * ((hi - lo) / 2)


def _mean(x: Tensor) -> Tensor:
    """The mean of each sample, summed in float64."""
    return x.flatten(1).mean(1, dtype=torch.float64)


def _noise(noise: Noise, x: Tensor) -> Tensor:
    """Noise in the dtype of the arithmetic."""
    return (noise if isinstance(noise, Tensor) else draw(x.shape, noise, x.device)).to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything else is computed in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _like(value: Scalar, x: Tensor) -> Tensor:
    """A number, ``[N]`` or ``[N, C]`` value as something that broadcasts against ``x`` ``[N, C, ...]``."""
    value = (value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)).to(x.device, _wide(x))
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value
