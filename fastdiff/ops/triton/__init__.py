"""The Triton backend on NVIDIA GPUs: the step family, noising and the loss, with the bits of the native backend; and
the group norm."""

try:
    import triton as _  # type: ignore[import-untyped]  # noqa: F401
except ImportError as error:
    raise ImportError(f"triton is missing: {error}") from None

from fastdiff.ops.triton.bodies import (
    add_noise,
    affine_step,
    diffusion_loss,
    guide,
    normal,
    refuses,
)
from fastdiff.ops.triton.norm_bodies import group_norm_silu, group_norm_silu_backward

__all__ = [
    "add_noise",
    "affine_step",
    "diffusion_loss",
    "group_norm_silu",
    "group_norm_silu_backward",
    "guide",
    "normal",
    "refuses",
]
