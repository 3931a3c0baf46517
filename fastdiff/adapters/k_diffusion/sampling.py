"""The samplers, each the plan of its rows run by one function. What they share:

    model: a denoiser ``model(x, sigma, **extra_args)``: x ``[N, C, ...]`` is data plus noise of standard deviation
        sigma ``[N]``, in x's dtype; it returns its estimate of the data, of x's shape.
    x: ``[N, C, ...]``, any floating dtype; a run begins with noise times ``sigmas[0]``. What is returned is like x;
        in between, the state is float32 (float64 for float64).
    sigmas: ``[N + 1]``, strictly descending; the last is 0, or where a run that goes on elsewhere ends.
    extra_args: keyword arguments of the denoiser.
    callback: called once in a step, between denoiser and step, with a dictionary of ``x``, ``i``, ``sigma``,
        ``sigma_hat`` (the level that the denoiser was asked at) and ``denoised``.
    disable: of the progress bar over the denoiser's calls; None shows it on a terminal only.
    noise_sampler: ``noise_sampler(sigma, sigma_next)`` gives noise like x; left out, ``torch.randn_like``. Noise is
        drawn in k-diffusion's order: the same ``torch.manual_seed`` gives the same images, but for ``*_sde``, whose
        path k-diffusion draws from generators of its own.

What does not fit raises :class:`~fastdiff.errors.InputError` by name. Coefficients are float64, made on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import ops, solvers
from fastdiff.adapters.k_diffusion import plans
from fastdiff.adapters.k_diffusion.levels import checked
from fastdiff.adapters.k_diffusion.levels import get_sigmas_exponential as get_sigmas_exponential
from fastdiff.adapters.k_diffusion.levels import get_sigmas_karras as get_sigmas_karras
from fastdiff.adapters.k_diffusion.plans import Plan
from fastdiff.diffusion import Model, network_output
from fastdiff.errors import choose
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_floating, check_same

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], object]
Arguments = dict[str, Any]


@torch.no_grad()
def _sample(
    plan_of: Callable[[Tensor], Plan],
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Run the plan of the levels: all samplers are this."""
    check_floating("x", x)
    plan = plan_of(checked(sigmas))
    state, draw = x.to(torch.promote_types(x.dtype, torch.float32)), _drawing(noise_sampler, x)
    told, reach, steps = plan.sigma.to(sigmas), plan.reach.to(sigmas), plan.step.long().tolist()
    table = rows.make_table(len(told), **plan.letters).to(x.device, state.dtype)
    history = tuple(torch.zeros_like(state) for _ in range(plan.history))
    anchor = torch.zeros_like(state) if "e" in plan.letters else None
    ones, noisy = x.new_ones(len(x)), (~plan.reach.isnan()).tolist()
    if plan.first is not None:
        state = state + plan.first * draw(sigmas[0], told[0])
    for row, i in enumerate(tqdm(steps, disable=disable)):
        asked = state.to(x.dtype)
        denoised = network_output(model(asked, told[row] * ones, **(extra_args or {})))
        check_same("what the model gives", denoised, x)
        if callback is not None and (not row or steps[row - 1] != i):
            callback({"x": asked, "i": i, "sigma": sigmas[i], "sigma_hat": told[row], "denoised": denoised})
        noise = draw(sigmas[i], reach[row]).to(state.dtype) if noisy[row] else None
        step = ops.affine_step(state, denoised, table, row, history=history, anchor=anchor, noise=noise, keep_x0=False)
        state, history, anchor = step.x, step.history, step.anchor
    return state.to(x.dtype)


def _drawing(noise_sampler: NoiseSampler | None, x: Tensor) -> NoiseSampler:
    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        noise = torch.randn_like(x) if noise_sampler is None else noise_sampler(sigma, sigma_next)
        check_same("what noise_sampler gives", noise, x)
        return noise

    return draw


class BrownianPath:
    """Noise of one Brownian path over sigma, k-diffusion's default where two draws of a step overlap.

    ``path(sigma, sigma_next)``, in the order in which :func:`sample_dpmpp_sde` asks, is the increment of the path over
    the square root of its length: standard normal, and where two intervals begin at one sigma, correlated as they are.
    """

    def __init__(self, x: Tensor) -> None:
        self._x, self._begin, self._end, self._increment = x, math.inf, math.inf, torch.zeros_like(x)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        begin, end = float(sigma), float(sigma_next)
        if begin != self._begin:
            self._begin = self._end = begin
            self._increment = torch.zeros_like(self._x)
        self._increment = self._increment + math.sqrt(self._end - end) * torch.randn_like(self._x)
        self._end = end
        return self._increment / math.sqrt(begin - end)


# ---- the samplers ----------------------------------------------------------------------


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with churn (Karras et al. 2022, algorithm 2 without its correction)."""
    churned = partial(plans.churned, solvers.euler, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _sample(churned, model, x, sigmas, extra_args, callback, disable)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, algorithm 2); the step to 0 is Euler's.

    The first step may be raised above ``sigmas[0]``, which our own solver ``edm`` does not do.
    """
    churned = partial(plans.churned, solvers.heun, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _sample(churned, model, x, sigmas, extra_args, callback, disable)


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """The midpoint method with churn; the middle is the geometric one, as in our ``dpm2`` (Lu et al. 2022)."""
    churned = partial(plans.churned, solvers.dpm2, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _sample(churned, model, x, sigmas, extra_args, callback, disable)


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's method to sigma_down, then noise up to the next level; eta and s_noise scale it (eta = 1: ddpm)."""
    ancestral = partial(plans.ancestral, solvers.euler, eta=eta, s_noise=s_noise)
    return _sample(ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """The midpoint method to sigma_down, then noise up to the next level.

    Where an eta above 1 takes sigma_down to 0, k-diffusion leaves the noise out; here it is added, as in the others.
    """
    ancestral = partial(plans.ancestral, solvers.dpm2, eta=eta, s_noise=s_noise)
    return _sample(ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1, r = 1/2) to sigma_down, then noise up to the next level."""
    ancestral = partial(plans.ancestral, solvers.dpmpp_2s, eta=eta, s_noise=s_noise)
    return _sample(ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep of order 1 to 4 over sigma: Adams-Bashforth on any levels, integrated exactly."""
    return _sample(partial(plans.multistep, solvers.lms, order=order), model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """SDE-DPM-Solver++ of one step (Lu et al. 2022, section 5), whose evaluation at ``r`` of a step is ancestral.

    k-diffusion's form, whose rows are its own: the second evaluation starts from the first state again, with the noise
    of the whole step, while that of our ``dpmpp_sde`` goes on from the middle; and eta is the ancestral one.

    Args:
        noise_sampler: left out, a :class:`BrownianPath`, on which the two noises of a step lie.
        r: in (0, 1], where in log(sigma) a step is evaluated again.
    """
    plan = partial(plans.dpmpp_sde, eta=eta, s_noise=s_noise, r=r)
    return _sample(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler or BrownianPath(x))


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); first order in the first step and to 0."""
    plan = partial(plans.multistep, solvers.dpmpp_2m, lower_order_final=False)
    return _sample(plan, model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5); eta = 0 is the ODE.

    Args:
        solver_type: ``midpoint``, our ``dpmpp_2m_sde``, or ``heun``: the line of estimates is integrated exactly.
    """
    choose("solver_type", solver_type, ("midpoint", "heun"))
    form: dict[str, Any] = {"form": solver_type, "lower_order_final": False}
    plan = partial(plans.multistep, solvers.dpmpp_2m_sde, eta=eta, s_noise=s_noise, **form)
    return _sample(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """SDE-DPM-Solver++ with three estimates, as it is published in code: see :func:`fastdiff.solvers.dpmpp_3m`.

    The second step integrates the line through two estimates exactly, and the end of a run lowers no order.
    """
    plan = partial(plans.multistep, plans.dpmpp_3m_sde, eta=eta, s_noise=s_noise)
    return _sample(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)
