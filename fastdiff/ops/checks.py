"""What every op asks of its arguments; each failure is one :class:`InputError` that names the argument."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from fastdiff.errors import InputError, check


def check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
    check(x.is_floating_point(), f"{name} must be a floating-point tensor, got {x.dtype}")
    check(x.ndim >= 2, f"{name} must be [N, C, ...], got {list(x.shape)}")
    check(not x.is_meta, f"{name} is a meta tensor and holds no values")


def check_state(name: str, x: object) -> None:
    check_floating(name, x)
    assert isinstance(x, Tensor)
    check(x.dtype in (torch.float32, torch.float64), f"{name} must be float32 or float64, got {x.dtype}")


def check_same(name: str, y: object, x: Tensor) -> None:
    """``y`` has the shape and the device of ``x``."""
    if not isinstance(y, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(y).__name__}")
    check(y.shape == x.shape, f"{name} must have shape {list(x.shape)}, got {list(y.shape)}")
    check(y.device == x.device, f"{name} must be on {x.device}, got {y.device}")


def check_per_sample(name: str, value: object, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor with one number per sample, got {type(value).__name__}")
    check(value.shape == x.shape[:1], f"{name} must hold one number per sample ({len(x)}), got {list(value.shape)}")
    check(value.device == x.device, f"{name} must be on {x.device}, got {value.device}")


def check_clip(clip: float | None) -> float:
    """The bound of the estimate of x0, infinite for None."""
    valid = clip is None or (isinstance(clip, Real) and clip > 0)
    check(valid, f"clip must be positive or None, got {clip}")
    return torch.inf if clip is None else clip


def check_row(row: object, count: int, x: Tensor) -> None:
    """An index 0 ... count-1, or int64 ``[N]`` of them; those on a device are not looked at: that would wait for it."""
    if isinstance(row, Tensor):
        check(row.dtype == torch.int64, f"row must be int64, got {row.dtype}")
        check_per_sample("row", row, x)
        low, high = (0, 0) if row.device.type != "cpu" or not row.numel() else map(int, row.aminmax())
    else:
        check(isinstance(row, int), f"row must be a whole number or one per sample, got {row!r}")
        low = high = row  # type: ignore[assignment]
    check(low >= 0 and high < count, f"row must lie in 0...{count - 1}, got {row}")


def check_scale(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A number or one number per sample, as a tensor."""
    if isinstance(value, Tensor) and value.ndim:
        check_per_sample(name, value, x)
        return value
    try:
        return torch.tensor(float(value), dtype=torch.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number or one per sample, got {value!r}") from None
