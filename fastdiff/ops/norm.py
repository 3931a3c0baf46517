"""Group normalisation with everything that follows it in a diffusion U-Net, as one op."""

from __future__ import annotations

from torch import Tensor

from fastdiff.backends import body
from fastdiff.errors import check, choose
from fastdiff.ops.checks import check_floating


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """activation((1 + scale) GroupNorm(x) + shift) (Wu & He 2018; AdaGN of Dhariwal & Nichol 2021, eq. 2).

    Args:
        x: ``[N, C, ...]`` float; statistics in float32 (float64 for float64); memory format and dtype are kept.
        groups: divides C.
        weight, bias: ``[C]``.
        scale, shift: ``[N, C]``, AdaGN.
        activation: ``silu`` or ``none``.

    Raises:
        InputError: shapes that do not fit, C not divisible by ``groups``, an unknown activation.
    """
    check_floating("x", x)
    choose("activation", activation, ("silu", "none"))
    n, channels = x.shape[:2]
    check(groups > 0 and channels % groups == 0, f"{channels} channels cannot be split into {groups} groups")
    shapes = {
        "weight": (weight, (channels,)),
        "bias": (bias, (channels,)),
        "scale": (scale, (n, channels)),
        "shift": (shift, (n, channels)),
    }
    for name, (value, shape) in shapes.items():
        check(
            value is None or value.shape == shape,
            f"{name} must be {list(shape)}, got {value is not None and list(value.shape)}",
        )
    result: Tensor = body("group_norm_silu", x.device, x.dtype)(x, groups, weight, bias, eps, scale, shift, activation)
    return result
