"""The ops: one contract per op, one body per backend."""

from fastdiff.backends import backend, explain
from fastdiff.ops.forward import add_noise, diffusion_loss
from fastdiff.ops.norm import group_norm_silu
from fastdiff.ops.step import Step, affine_step, ddim_step, guide, posterior_step

__all__ = [
    "Step",
    "add_noise",
    "affine_step",
    "backend",
    "ddim_step",
    "diffusion_loss",
    "explain",
    "group_norm_silu",
    "guide",
    "posterior_step",
]
