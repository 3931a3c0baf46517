"""Group normalisation with everything around it in a diffusion U-Net, as one op."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastdiff.backends import body
from fastdiff.errors import InputError, check, choose
from fastdiff.ops import library, reference
from fastdiff.ops.checks import check_channels, check_floating, check_same
from fastdiff.ops.layout import empty_like


@overload
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
    keep_sum: Literal[False] = False,
) -> Tensor: ...


@overload
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
    keep_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
    keep_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """activation((1 + scale) GroupNorm(x + residual) + shift) (Wu & He 2018; AdaGN of Dhariwal & Nichol 2021, eq. 2).

    Args:
        x: ``[N, C, ...]`` float; statistics in float32 (float64 for float64); memory format and dtype are kept.
        groups: divides C.
        weight, bias: ``[C]``.
        scale, shift: ``[N, C]``, AdaGN.
        residual: shape and dtype of ``x``; the sum is rounded once to that dtype.
        activation: ``silu`` or ``none``.
        keep_sum: also return ``x + residual`` (``x`` itself without a residual), for what follows in a network.

    Returns:
        Like ``x``; with ``keep_sum`` the pair of it and the sum. The gradient keeps the sum and two numbers for each
        group, and computes the rest again.

    Raises:
        InputError: shapes that do not fit, C not divisible by ``groups``, an unknown activation.
    """
    _check(x, groups, weight, bias, scale, shift, residual, activation)
    arguments = (x, groups, weight, bias, float(eps), scale, shift, residual, activation == "silu")
    if library.watched() and not torch.compiler.is_compiling():
        result, total = reference.group_norm(*arguments)
    elif library.traced(x, weight, bias, scale, shift, residual):
        result, total = library.group_norm_silu(*arguments)
    else:
        result, total = empty_like(x), None
        if residual is not None and keep_sum:
            total = empty_like(x)
        body("group_norm_silu", x.device, library.wide(x))(*arguments, result, total, None)
    if not keep_sum:
        return result
    return result, x if residual is None else total  # type: ignore[return-value]


def _check(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    check_floating("x", x)
    choose("activation", activation, ("silu", "none"))
    n, channels = x.shape[:2]
    check(hasattr(groups, "__index__"), f"groups must be a whole number, got {groups!r}")
    check(groups > 0 and channels % groups == 0, f"{channels} channels cannot be split into {groups} groups")
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (n, channels)),
        ("shift", shift, (n, channels)),
    ):
        if value is not None:
            check_channels(name, value, shape, x)
    if residual is not None:
        check_same("residual", residual, x)
        if residual.dtype != x.dtype:
            raise InputError(f"residual must be {x.dtype}, got {residual.dtype}")
