"""k-diffusion's samplers over our rows, and wrappers both ways between its denoisers and our networks.

A script of theirs changes one import, ``import k_diffusion as K``::

    from fastdiff.adapters import k_diffusion as K

    x = K.sampling.sample_dpmpp_2m(model, x, K.sampling.get_sigmas_karras(20, 0.03, 80.0))

A denoiser of theirs is a network of ours on :func:`sigma_diffusion`; a network of ours is a :class:`Denoiser`.
``sample_dpm_fast`` and ``sample_dpm_adaptive``, which choose levels as they go, have no table of rows and are left out.
"""

from __future__ import annotations

from fastdiff.adapters.k_diffusion import external, sampling
from fastdiff.adapters.k_diffusion.external import Denoiser
from fastdiff.adapters.k_diffusion.levels import SigmaSchedule, sigma_diffusion, sigma_schedule
from fastdiff.adapters.k_diffusion.sampling import (
    BrownianPath,
    get_sigmas_exponential,
    get_sigmas_karras,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)

__all__ = [
    "BrownianPath",
    "Denoiser",
    "SigmaSchedule",
    "external",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "sampling",
    "sigma_diffusion",
    "sigma_schedule",
]
