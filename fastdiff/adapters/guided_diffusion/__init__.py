"""The interface of guided-diffusion's ``SpacedDiffusion`` (Dhariwal & Nichol 2021) over our engine.

A script of theirs changes one import::

    from fastdiff.adapters.guided_diffusion import create_gaussian_diffusion

Sampling runs the fused rows of :class:`fastdiff.Sampler`, the likelihood is :meth:`fastdiff.Diffusion.bits_per_dim`.
Noise of a run belongs to its ``seed``; without one, a seed is drawn from torch's generator of the CPU, so that
``torch.manual_seed`` decides it. ``q_sample`` and ``training_losses`` draw ``torch.randn_like``, as theirs do.

What differs: the decoder of the bound has the exact normal distribution function, where theirs has an approximation and
ends at 27.6 nats, and its images have to lie in [-1, 1]; ``eta`` is at most 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdiff.adapters.guided_diffusion.spaced import SpacedDiffusion
from fastdiff.adapters.guided_diffusion.spacing import is_whole, linear, space_timesteps
from fastdiff.errors import check, choose
from fastdiff.schedule import Schedule

__all__ = ["SpacedDiffusion", "create_gaussian_diffusion", "space_timesteps"]
SCHEDULES: dict[str, Callable[[int], Schedule]] = {"linear": linear, "cosine": Schedule.cosine}


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> SpacedDiffusion:
    """The process of guided-diffusion's flags.

    Args:
        steps: T of the whole chain; more than 20 for the linear schedule, whose betas go to 20 / T.
        learn_sigma: the network has 2C channels, the last C are the variance's (Nichol & Dhariwal 2021, eq. 15).
        sigma_small: otherwise, the variance is the posterior's and not beta.
        noise_schedule: ``linear``: betas from 0.1 / T to 20 / T, those of Ho et al. 2020 at T = 1000; ``cosine``
            (Nichol & Dhariwal 2021, eq. 17).
        use_kl: train by the variational bound, all terms of it.
        predict_xstart: the network gives x0 and not the noise.
        rescale_timesteps: the network is told t 1000 / T.
        rescale_learned_sigmas: the bound in the hybrid loss is that of all terms, over 1000.
        timestep_respacing: which timesteps the chain keeps, see :func:`space_timesteps`.

    Raises:
        InputError: an unknown schedule, steps or a respacing that cannot be.
    """
    choose("noise_schedule", noise_schedule, SCHEDULES)
    check(is_whole(steps) and steps >= 1, f"steps must be a whole number of at least 1, got {steps!r}")
    kind = "rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse"
    return SpacedDiffusion(
        SCHEDULES[noise_schedule](steps),
        space_timesteps(steps, timestep_respacing),
        prediction="sample" if predict_xstart else "epsilon",
        variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss_type=kind,
        rescale_timesteps=rescale_timesteps,
    )
