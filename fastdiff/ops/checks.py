"""What every op asks of its arguments; each failure is one :class:`InputError` that names the argument.

Messages are made only when something is wrong: a step on a small tensor takes microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index

import torch
from torch import Tensor

from fastdiff.errors import InputError, check
from fastdiff.ops.layout import is_dense

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_finite(x: Tensor) -> bool:
    """Whether all values are; a sum says it in an eighth of the time, but may overflow."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise InputError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise InputError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.ndim < 2:
        raise InputError(f"{name} must be [N, C, ...], got {list(x.shape)}")
    if x.is_meta or _is_freed(x):
        raise InputError(f"{name} is a {'meta' if x.is_meta else 'freed'} tensor and holds no values")


def _is_freed(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not x.numel():
        return False
    try:
        return x.untyped_storage().nbytes() == 0
    except RuntimeError:  # a tensor that stands for others, as those of torch.func
        return False


def check_state(name: str, x: object) -> None:
    check_floating(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} must be float32 or float64, got {x.dtype}")


def check_same(name: str, y: object, x: Tensor) -> None:
    """``y`` is a floating-point tensor with the shape and the device of ``x``."""
    check_floating(name, y)
    assert isinstance(y, Tensor)
    if y.shape != x.shape:
        raise InputError(f"{name} must have shape {list(x.shape)}, got {list(y.shape)}")
    if y.device != x.device:
        raise InputError(f"{name} must be on {x.device}, got {y.device}")


def check_channels(name: str, value: object, shape: tuple[int, ...], x: Tensor) -> None:
    """Floating-point numbers of channels, or of channels of each sample."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        raise InputError(f"{name} must be a dense tensor {list(shape)}, got {type(value).__name__}")
    if value.shape != shape or value.device != x.device or value.dtype not in FLOATS:
        given = f"{list(value.shape)}, {value.dtype}, on {value.device}"
        raise InputError(f"{name} must be {list(shape)}, floating-point, on {x.device}, got {given}")
    if _is_freed(value):
        raise InputError(f"{name} is a freed tensor and holds no values")


def check_per_sample(name: str, value: object, x: Tensor) -> None:
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        raise InputError(f"{name} must be a tensor with one number per sample, got {type(value).__name__}")
    if value.shape != x.shape[:1]:
        raise InputError(f"{name} must hold one number per sample ({len(x)}), got {list(value.shape)}")
    if value.device != x.device:
        raise InputError(f"{name} must be on {x.device}, got {value.device}")
    if value.is_complex():
        raise InputError(f"{name} must hold real numbers, got {value.dtype}")
    if _is_freed(value):
        raise InputError(f"{name} is a freed tensor and holds no values")


def check_numbers(name: str, value: Tensor, x: Tensor) -> Tensor:
    """One number per sample, in float32 or float64."""
    check_per_sample(name, value, x)
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def check_output(output: object, x: Tensor) -> None:
    """A network output: x's shape, or twice its channels."""
    check_floating("output", output)
    assert isinstance(output, Tensor)
    if output.shape == x.shape and output.device == x.device:
        return
    wide = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    if output.shape != wide or output.device != x.device:
        raise InputError(
            f"output must be {list(x.shape)}, or {list(wide)} with learned variance, on {x.device},"
            f" got {list(output.shape)} on {output.device}"
        )


def check_clip(clip: float | None) -> float:
    """The bound of the estimate of x0, infinite for None."""
    valid = clip is None or (isinstance(clip, Real) and clip > 0)
    check(valid, f"clip must be positive or None, got {clip}")
    return torch.inf if clip is None else clip


def check_row(row: object, count: int, x: Tensor) -> None:
    """An index 0 ... count-1, or int64 ``[N]`` of them; those on a device are not looked at: that would wait for it."""
    if isinstance(row, Tensor):
        if row.dtype != torch.int64:
            raise InputError(f"row must be int64, got {row.dtype}")
        if row.ndim:
            check_per_sample("row", row, x)
        elif row.device != x.device:
            raise InputError(f"row must be on {x.device}, got {row.device}")
        if torch.compiler.is_compiling() or row.device.type != "cpu" or not row.numel():
            return
        low, high = map(int, row.aminmax())
    else:
        low = high = _whole(row)
    if low < 0 or high >= count:
        raise InputError(f"row must lie in 0...{count - 1}, got {row}")


def _whole(row: object) -> int:
    if isinstance(row, bool) or not hasattr(row, "__index__"):
        raise InputError(f"row must be a whole number or one per sample, got {row!r}")
    return index(row)


def check_scale(name: str, value: Tensor | float, x: Tensor) -> Tensor | float:
    """A number, or one float32 or float64 number per sample; a number with a gradient is made one per sample."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor) and not value.ndim and (value.requires_grad or torch.compiler.is_compiling()):
        value = value.to(x.device).expand(len(x))
    if isinstance(value, Tensor) and value.ndim:
        return check_numbers(name, value, x)
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{name} must be a number or one per sample, got {value!r}") from None


def check_result(name: str, result: object, x: Tensor, dtype: torch.dtype) -> None:
    """A tensor to write to: like x, in ``dtype``, contiguous or channels-last."""
    check_same(name, result, x)
    assert isinstance(result, Tensor)
    if result.dtype is not dtype:
        raise InputError(f"{name} must be {dtype}, got {result.dtype}")
    if result.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name} requires a gradient, which writing to it would not give: detach it, or use no_grad")
    if not is_dense(result):
        raise InputError(f"{name} must be contiguous or channels-last, got strides {list(result.stride())}")


def check_apart(
    given: Sequence[Tensor | None], results: Iterable[tuple[str, Tensor | None, Sequence[Tensor | None]]]
) -> None:
    """No result shares memory with another or with what is given, but one may be exactly a tensor it is allowed."""
    if torch.compiler.is_compiling():  # memory is not known then
        return
    taken = [tensor for tensor in given if tensor is not None]
    for name, result, may_lie_over in results:
        if result is None:
            continue
        allowed = any(tensor is not None and _same_place(result, tensor) for tensor in may_lie_over)
        for other in taken:
            if _overlap(result, other) and not (allowed and _same_place(result, other)):
                raise InputError(f"{name} shares memory with another argument")
        taken.append(result)


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype and a.shape == b.shape


def _overlap(a: Tensor, b: Tensor) -> bool:
    (low, high), (start, end) = _bytes(a), _bytes(b)
    return low < end and start < high


def _bytes(x: Tensor) -> tuple[int, int]:
    """The address range of a tensor."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (extent * x.element_size() if x.numel() else 0)
