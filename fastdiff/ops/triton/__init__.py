"""The Triton backend: the step family, noising and the loss on NVIDIA GPUs, with the bits of the native backend."""

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

__all__ = ["add_noise", "affine_step", "diffusion_loss", "guide", "normal", "refuses"]
