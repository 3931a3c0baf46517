"""What a classifier of noised images is trained for, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.diffusion import Diffusion
from fastdiff.losses import brought

CLEAN = 0.5  #: share of a batch that is not noised: its features are those of images


def cross_entropies(
    network: Callable[[Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    x0: Tensor,
    y: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    positions: Tensor,
    batch: int,
) -> dict[str, Tensor]:
    """The cross-entropy of classes at all noise levels (Dhariwal & Nichol 2021, section 4), and of clean images.

    Args:
        network: ``network(x, t)`` gives the logits.
        x0, y: images ``[N, C, H, W]`` and their classes, int64 ``[N]``.
        seed, step, positions: address of t and noise, see :mod:`fastdiff.noise`. Positions int64 ``[N]`` are those in
            a batch of ``batch``: its first ones stay clean at t = 0, the others are noised as in
            :meth:`~fastdiff.diffusion.Diffusion.loss`.

    Returns:
        ``loss``, and ``accuracy``: 1 for what is read right, else 0; ``[N]``.
    """
    clean = brought(positions < CLEAN * batch, x0.device)
    where: dict[str, Any] = {"seed": seed, "step": step, "sample": positions}
    t = diffusion.draw_timesteps(len(x0), **where, device=x0.device).masked_fill(clean, 0)
    alpha, sigma = (level.masked_fill(clean, at) for level, at in zip(diffusion.levels(t, x0), (1, 0), strict=True))
    x_t = ops.add_noise(x0, alpha, sigma, seed=seed, step=step, sample=brought(positions, x0.device))
    logits = network(*diffusion.model_input(x_t, t))
    right = (logits.detach().argmax(1) == y).float()
    return {"loss": F.cross_entropy(logits, y, reduction="none"), "accuracy": right}
