"""EDM and EDM2: their networks in our sampler, their samplers' look-alikes, and a reader of their network pickles.

A network of theirs is ``net(x, sigma, class_labels=None) -> D(x; sigma)``, an estimate of the clean image in float32
with all preconditioning inside (Karras et al. 2022, eq. 7; Karras et al. 2024b). Here that is a network that predicts
the sample on a schedule of noise alone, and that is told sigma itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.adapters.edm_pickle import PickledObject as PickledObject
from fastdiff.adapters.edm_pickle import read_pickle as read_pickle
from fastdiff.adapters.k_diffusion.levels import sigma_diffusion
from fastdiff.diffusion import Model, precision_of
from fastdiff.errors import check
from fastdiff.guidance import AutoGuidance
from fastdiff.ops.checks import check_floating
from fastdiff.sampler import Sampler
from fastdiff.schedule import karras_levels

Noise = Callable[[Tensor], Tensor]


def levels_of(
    net: Model, num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The noise levels t_0 ... t_{N-1} of a network, float64 ``[num_steps]``; t_N = 0 is left out.

    Equidistant in sigma^(1/rho) (Karras et al. 2022, eq. 5), within the network's own ``sigma_min`` and ``sigma_max``,
    and rounded to levels that it knows by its ``round_sigma``, where it has these.

    Raises:
        InputError: numbers out of range; levels that meet when they are rounded.
    """
    check(isinstance(num_steps, int) and num_steps >= 1, f"num_steps must be at least 1, got {num_steps!r}")
    low = max(sigma_min, float(getattr(net, "sigma_min", 0.0)))
    high = min(sigma_max, float(getattr(net, "sigma_max", math.inf)))
    check(0 < low < high < math.inf and rho > 0, f"0 < sigma_min < sigma_max, 0 < rho must hold: {low}, {high}, {rho}")
    levels = _rounded(net, karras_levels(num_steps, low, high, rho))
    check(bool((levels.diff() < 0).all()), f"the network rounds {num_steps} levels to fewer: take fewer num_steps")
    return levels


def sampler_of(
    net: Model,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    solver: str = "heun",
    gnet: Model | None = None,
    **options: Any,
) -> Sampler:
    """A :class:`fastdiff.Sampler` of a network of EDM or EDM2, to keep: any solver, seeds of our own.

    ``sampler((64, 3, 32, 32), seed=0, class_labels=one_hot)`` gives float32 images in the network's range.

    Args:
        net: ``net(x, sigma, class_labels=None)`` gives D(x; sigma).
        num_steps, sigma_min, sigma_max, rho: of the levels, see :func:`levels_of`.
        solver: of :data:`fastdiff.solvers.SOLVERS`: ``heun`` is algorithm 1 of Karras et al. 2022, ``edm`` its
            algorithm 2 with ``s_churn``, ``s_tmin``, ``s_tmax``, ``s_noise``; no step is raised above the first level.
        gnet: the network of autoguidance (Karras et al. 2024a, eq. 1), with ``guidance_scale``.
        options: the sampler's and the solver's own.

    Raises:
        InputError: as of :func:`levels_of` and of the sampler.
    """
    return _sampler(net, levels_of(net, num_steps, sigma_min, sigma_max, rho), solver, gnet=gnet, **options)


def edm_sampler(
    net: Model,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Noise = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Algorithm 2 of Karras et al. 2022, with the arguments of EDM's function of this name; 1 where S_churn is 0.

    Args:
        latents: standard normal, ``[N, C, ...]``, on the network's device.
        class_labels: ``[N, label_dim]``, one-hot.
        randn_like: gives the noise of a step, of the shape and dtype of its float64 argument. With churn it is called
            once for every step in order, and its numbers are not used in steps outside S_min ... S_max.
        num_steps, sigma_min, sigma_max, rho: of the levels, see :func:`levels_of`.
        S_churn, S_min, S_max, S_noise: how much noise is added, at which levels, and what it is multiplied by.
        dtype: of the state and of the result; EDM's own are float64.

    Returns:
        Images ``[N, C, ...]`` in the network's range.

    Raises:
        InputError: numbers out of range; what a sampler refuses.
    """
    levels = levels_of(net, num_steps, sigma_min, sigma_max, rho)
    raised = _rounded(net, levels * (1 + _churn(levels, S_churn, S_min, S_max)))
    drawn = [S_churn > 0] * num_steps
    run = partial(_run, net, latents, class_labels, levels, raised, drawn, dtype=dtype)
    return run(lambda x: S_noise * randn_like(x.double()))


def edm2_sampler(
    net: Model,
    noise: Tensor,
    labels: Tensor | None = None,
    gnet: Model | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    guidance: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    dtype: torch.dtype = torch.float32,
    randn_like: Noise = torch.randn_like,
) -> Tensor:
    """The same with the arguments of EDM2's ``edm_sampler``: D = gnet + guidance (net - gnet) (Karras et al. 2024a).

    Here ``randn_like`` is called in steps with churn alone, with an argument of ``dtype``. The rest is as of
    :func:`edm_sampler`, whose ``latents`` and ``class_labels`` are ``noise`` and ``labels`` here.

    Raises:
        InputError: as :func:`edm_sampler`; guidance without a ``gnet``.
    """
    check(guidance == 1 or gnet is not None, "guidance other than 1 needs a gnet")
    levels = levels_of(net, num_steps, sigma_min, sigma_max, rho)
    churn = _churn(levels, S_churn, S_min, S_max)
    run = partial(_run, net, noise, labels, levels, levels * (1 + churn), (churn > 0).tolist(), dtype=dtype)
    return run(lambda x: S_noise * randn_like(x), gnet=gnet, guidance_scale=guidance)


# ---- what these are made of -------------------------------------------------------------------


def _run(
    net: Model,
    latents: Tensor,
    class_labels: Tensor | None,
    levels: Tensor,
    raised: Tensor,
    drawn: list[bool],
    noise: Noise,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """Algorithm 2: each step from its raised level to the next one; a single run where no level is raised."""
    check_floating("latents", latents)
    cond: dict[str, Any] = {} if class_labels is None else {"class_labels": class_labels}
    options |= {"device": latents.device, "dtype": dtype}
    x = (latents.double() * float(levels[0])).to(dtype)
    if bool((raised == levels).all()):
        return _sampler(net, levels, "heun", **options)(x.shape, x=x, **cond)
    net, ends = _asked(net), [*levels[1:].tolist(), 0.0]
    for level, high, end, draws in zip(levels.tolist(), raised.tolist(), ends, drawn, strict=True):
        if draws:
            x = (x.double() + math.sqrt(high**2 - level**2) * noise(x)).to(dtype)
        step = _sampler(net, [high, end] if end else [high], "heun", final="minimal" if end else "zero", **options)
        x = step(x.shape, x=x, **cond)
    return x


def _sampler(
    net: Model,
    levels: Sequence[float] | Tensor,
    solver: str,
    *,
    gnet: Model | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Sampler:
    if gnet is not None:
        options["guidance"] = AutoGuidance(_asked(gnet))
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    device = parameter.device if device is None and parameter is not None else device
    timesteps = torch.arange(len(levels)).flip(0)
    diffusion = sigma_diffusion(torch.as_tensor(levels, dtype=torch.float64))
    return Sampler(_asked(net), diffusion, solver, timesteps, device=device, **options)


def _asked(net: Model) -> Model:
    """The network as one that is given float32, which theirs want whatever their weights are: EDM2's are float16."""
    return net if precision_of(net) in (None, torch.float32) else partial(net)


def _rounded(net: Model, levels: Tensor) -> Tensor:
    rounding = getattr(net, "round_sigma", None)
    return levels if rounding is None else torch.as_tensor(rounding(levels)).to("cpu", torch.float64)


def _churn(levels: Tensor, S_churn: float, S_min: float, S_max: float) -> Tensor:
    """gamma of each step: the share by which its level is raised."""
    numbers = all(isinstance(number, Real) and number >= 0 for number in (S_churn, S_min, S_max))
    check(numbers, f"S_churn, S_min and S_max must not be negative, got {S_churn!r}, {S_min!r}, {S_max!r}")
    inside = (levels >= S_min) & (levels <= S_max)
    return min(S_churn / len(levels), math.sqrt(2) - 1) * inside.double()
