"""diffusers' schedulers and pipelines on our rows. It needs diffusers, which is imported when a name is first used.

Each scheduler is a subclass of diffusers' of the same name, so that configurations, files, pipelines and ``isinstance``
take it for that; ``step`` is one row of a solver's table, by the fused ops::

    from fastdiff.adapters.diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

``accelerate(pipeline)`` does so, and takes our network for a ``UNet2DModel``, on a GPU as a CUDA graph;
``restore(pipeline)`` undoes it.

``strict_compat=True`` keeps diffusers' float32 tables, timesteps and strides to the last bit. By default

* tables are float64 and rounded once (diffusers' product of float32 alphas loses up to three digits of 1 - alpha-bar);
* DDIM and PNDM step to the next timestep of the list, and not by ``T // N``, which misses it for most N;
* trailing timesteps never end in an additional -1;
* PNDM averages slopes, not outputs of a v-prediction at several levels, and LMS that begins later starts with order 1;
* a run begins at the timestep that it is given, also where two are equal (Karras' levels on a cosine schedule);
* ``fixed_large_log`` is the variance its name says, and not NaN;
* the last step of DDPM adds no noise where the last timestep is not 0;
* the third order of DPM-Solver++ is of third order, and its SDE form exists;
* noise is added in float32, also to half-precision samples, and a state in half precision goes on unrounded as long as
  what a step gave away comes back as it was;
* threads that share a scheduler have a run each.

What no row can say is diffusers' own step in either mode: churn, ``dpmsolver`` and ``sde-dpmsolver``, UniPC without
``predict_x0`` or with a disabled corrector, PNDM with Runge-Kutta steps, ``learned`` variances, timesteps per token.
"""

from __future__ import annotations

from typing import Any

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
PIPELINES = ("accelerate", "restore")
__all__ = [*SCHEDULERS, *PIPELINES]


def __getattr__(name: str) -> Any:
    if name in SCHEDULERS:
        from fastdiff.adapters.diffusers import schedulers

        return getattr(schedulers, name)
    if name in PIPELINES:
        from fastdiff.adapters.diffusers import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
