"""What a classifier of noised images is trained for, and on what."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.diffusion import Diffusion

CLEAN = 0.5  #: share of a batch that is not noised: its features are those of images


def cross_entropy(
    network: Callable[[Tensor, Tensor], Tensor], diffusion: Diffusion, x0: Tensor, y: Tensor, *, seed: int, step: int
) -> dict[str, Tensor]:
    """The cross-entropy of classes at all noise levels (Dhariwal & Nichol 2021, section 4), and of clean images.

    Args:
        network: ``network(x, t)`` gives the logits.
        x0, y: images ``[N, C, H, W]`` and their classes, int64 ``[N]``. All but the first ones, which stay clean at
            t = 0, are noised as in :meth:`~fastdiff.diffusion.Diffusion.loss`.
        seed, step: address of t and noise, see :mod:`fastdiff.noise`.

    Returns:
        ``loss``, and ``accuracy``: the share of the batch that is read right; scalars.
    """
    schedule, clean = diffusion.schedule, torch.arange(len(x0)) < CLEAN * len(x0)
    t = diffusion.draw_timesteps(len(x0), seed=seed, step=step).where(~clean, 0)
    alpha, sigma = schedule.alpha[t].where(~clean, 1.0), schedule.sigma[t].where(~clean, 0.0)
    x_t = ops.add_noise(x0, alpha.to(x0.device), sigma.to(x0.device), seed=seed, step=step)
    logits = network(*diffusion.model_input(x_t, t))
    return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.detach().argmax(1) == y).float().mean()}
