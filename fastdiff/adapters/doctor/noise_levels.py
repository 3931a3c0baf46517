"""Faults of noise levels: signal at the noisy end, betas that are none, precision, variances."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.adapters.diffusers.tables import schedule_of
from fastdiff.adapters.doctor.description import Description
from fastdiff.adapters.doctor.finding import FAULT, WARNING, Finding
from fastdiff.errors import InputError

GREY = 127.5  #: grey levels in 1, for images in [-1, 1]
VISIBLE = 0.05  #: the share of the image in "pure noise" from which on it is a fault (Stable Diffusion: 0.068)
LARGE_BETA = 0.9  #: the cosine schedule's cap is larger, on purpose
IDLE = 0.25  #: the share of the timesteps that may hold nothing of the image
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DATA_STD = 0.5  #: of the Gaussian data whose exact denoiser the state's rounding is measured with
TUNED = ("linear", "scaled_linear", "sigmoid")  #: schedules whose default betas are for T = 1000
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def tolerated(d: Description) -> float:
    """The share of the image that sampling may begin with: one grey level, or next to nothing where zero is meant."""
    meant = d.zero_terminal_snr or d.values.get("prediction_type") == "v_prediction"
    return 1e-3 if meant else 1 / GREY


def amount(d: Description, share: float) -> str:
    """Of a white image, or of latents of variance 1, in words."""
    return f"{share:.2g} standard deviations" if d.network.latent else f"{share * GREY:.2g} of 255 grey levels"


def betas(d: Description) -> Iterator[Finding]:
    """Betas that are no share of variance, or not as many as timesteps."""
    given = ("trained_betas",) if d.values.get("trained_betas") is not None else ()
    if d.refused:
        cost = "no alpha-bar follows: divisions by zero, NaN, or no scheduler at all"
        yield Finding("betas", FAULT, d.refused, cost, d.named(COSINE), given)
    elif given and len(d.alpha_bar) != d.total:
        problem = f"num_train_timesteps is {d.total}, but there are {len(d.alpha_bar)} trained_betas"
        cost = f"{max(0, d.total - len(d.alpha_bar))} timesteps have no noise level"
        yield Finding("betas", FAULT, problem, cost, {"num_train_timesteps": len(d.alpha_bar)})


def large_betas(d: Description) -> Iterator[Finding]:
    """Betas that take nearly all of the image in one step: the defaults are tuned for T = 1000."""
    if d.values.get("beta_schedule") not in TUNED or len(d.alpha_bar) < 2:
        return
    bars = d.alpha_bar[d.alpha_bar > 0]
    least = (bars[1:] / bars[:-1]).min(initial=1.0)
    if least < 1 - LARGE_BETA:
        problem = (
            f"beta reaches {1 - least:.3g} with T = {d.total}: one step takes nearly all that is left of the image"
        )
        cost = f"errors of a step are multiplied by up to {least**-0.5:.3g}"
        yield Finding("large_betas", WARNING, problem, cost, d.named(COSINE))


def terminal_signal(d: Description) -> Iterator[Finding]:
    """Signal at the last timestep, where sampling begins with pure noise (Lin et al. 2024)."""
    if not d.alpha_bar.size or d.signal[-1] <= tolerated(d):
        return
    share, bar = float(d.signal[-1]), float(d.alpha_bar[-1])
    problem = (
        f"at t = {d.total - 1} alpha-bar is {bar:.3g} (SNR {bar / (1 - bar):.3g}): the network is trained with "
        f"{share:.2%} of the image where sampling begins with none of it"
    )
    changes, note = _to_zero(d)
    cost = f"means of samples are off by up to {amount(d, share)}"
    yield Finding("terminal_signal", FAULT if share >= VISIBLE else WARNING, problem, cost, changes, note=note)


def _to_zero(d: Description) -> tuple[dict[str, object], str]:
    """What takes the signal away: betas for this T where they were for another, or zero terminal SNR."""
    scaled = {"beta_start": 0.1 / d.total, "beta_end": 20 / d.total}
    if not d.ours and d.total != 1000 and _signal_with(d, scaled) <= tolerated(d):
        return d.named(scaled), "the defaults are tuned for T = 1000; train so"
    changes: dict[str, object] = {"rescale_betas_zero_snr": True}
    if d.values.get("prediction_type") == "epsilon":
        changes["prediction_type"] = "v_prediction"
    if "rescale_betas_zero_snr" not in d.facts.defaults:
        changes["_class_name"] = "DDIMScheduler"
    return d.named(changes), "the network has to be trained, or fine-tuned, so"


def _signal_with(d: Description, changes: dict[str, float]) -> float:
    """At T - 1."""
    if d.values.get("beta_schedule") != "linear":
        return 1.0
    try:
        return float(schedule_of({**d.values, "trained_betas": None, **changes}).alpha[-1])
    except InputError:
        return 1.0


def idle_timesteps(d: Description) -> Iterator[Finding]:
    """Betas for T = 1000 over many more timesteps: long before the end nothing is left of the image."""
    idle = float((d.signal < 1 / GREY).mean()) if d.alpha_bar.size else 0.0
    if d.values.get("beta_schedule") not in TUNED or idle <= IDLE:
        return
    problem = f"of T = {d.total} timesteps, less than a grey level of the image is left from t = {_first_idle(d)} on"
    cost = f"{idle:.0%} of training and of evenly spaced sampling steps are spent on noise"
    ends = {key: d.values[key] * 1000 / d.total for key in ("beta_start", "beta_end") if key in d.values}
    yield Finding("idle_timesteps", WARNING, problem, cost, d.named(COSINE if d.ours else ends))


def _first_idle(d: Description) -> int:
    return int((d.signal >= 1 / GREY).sum())


def zero_snr_epsilon(d: Description) -> Iterator[Finding]:
    """A prediction of the noise says nothing of the image where there is only noise."""
    if d.zero_terminal_snr and d.values.get("prediction_type") == "epsilon":
        problem = (
            f"alpha-bar is 0 at t = {d.total - 1} (SNR 0), and from noise that is predicted there follows no image"
        )
        by_ratio = d.facts.points and not d.facts.casts
        multiplied = f"errors of the first step are multiplied by {d.ratio[-1]:.0f}"
        cost = multiplied if by_ratio else "the first step divides by 0: NaN, or whatever clipping makes of it"
        note = "or a network that is trained for prediction_type v_prediction"
        yield Finding("zero_snr_epsilon", FAULT, problem, cost, _not_both(d), note=note)


def min_snr(d: Description) -> Iterator[Finding]:
    """Min-SNR weights (Hang et al. 2023) where there is no signal. Ours have their limit there."""
    if d.zero_terminal_snr and d.values.get("prediction_type") == "epsilon" and not d.ours:
        problem = f"min-SNR weights of a predicted noise, min(SNR, gamma) / SNR, are 0 / 0 at t = {d.total - 1}"
        met = 1 - (1 - 1 / d.total) ** 128
        cost = f"NaN for 1 of {d.total} timesteps, which a batch of 128 holds with probability {met:.0%}"
        yield Finding("min_snr", WARNING, problem, cost, _not_both(d), note="or train without --snr_gamma")


def _not_both(d: Description) -> dict[str, object]:
    rescaled = d.values.get("rescale_betas_zero_snr") or d.values.get("zero_terminal_snr")
    return d.named({"rescale_betas_zero_snr": False} if rescaled else {"prediction_type": "v_prediction"})


# ---- precision --------------------------------------------------------------------------------


def noise_precision(d: Description) -> Iterator[Finding]:
    """``add_noise`` in half precision: 1 - alpha-bar of an alpha-bar that is rounded."""
    dtype = HALVES.get(d.network.precision or "")
    if dtype is None or not d.facts.casts or not d.alpha_bar.size:
        return
    wrong = noise_error(d.alpha_bar, dtype)
    none, much = int((wrong == 1).sum()), int((wrong > 0.1).sum())
    if much:
        problem = f"add_noise rounds alpha-bar to {d.network.precision} before it takes 1 - alpha-bar"
        share = f"{none} of {d.total} timesteps ({none / d.total:.1%})"
        cost = f"the noise is zero at {share}, and more than 10 % wrong at {much}"
        note = f"add_noise(x.float(), noise.float(), t).to(x.dtype) {d.drop_in}".rstrip()
        yield Finding("noise_precision", FAULT if none else WARNING, problem, cost, note=note)


def noise_error(alpha_bar: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """The relative error of sqrt(1 - alpha-bar) when all of it is computed in a dtype; 1 where nothing is left."""
    rounded = torch.from_numpy(alpha_bar).float().to(dtype)
    made: NDArray[np.float64] = ((1 - rounded) ** 0.5).double().numpy()
    return np.abs(made / np.sqrt(1 - alpha_bar) - 1)


def state_precision(d: Description) -> Iterator[Finding]:
    """x_t is rounded at each step where the network runs in half precision."""
    dtype = HALVES.get(d.network.precision or "")
    if dtype is None or d.ours or not d.alpha_bar.size:
        return
    steps = min(d.steps or 50, d.total)
    problem = f"x_t is kept in the network's {d.network.precision} from step to step"
    error = state_error(d.alpha_bar, steps, dtype)
    cost = f"{steps} DDIM steps with the exact denoiser of Gaussian data end at least {error:.2%} off"
    note = f"keep x_t in float32 and cast it for the network alone, {d.drop_in}".rstrip(", ")
    yield Finding("state_precision", WARNING, problem, cost, note=note)


def state_error(alpha_bar: NDArray[np.float64], steps: int, dtype: torch.dtype) -> float:
    """The relative error that rounding x_t at each of ``steps`` DDIM steps makes, for Gaussian data."""
    alpha, sigma = torch.from_numpy(alpha_bar).sqrt(), torch.from_numpy(1 - alpha_bar).sqrt()
    x = rounded = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    t = torch.linspace(len(alpha) - 1, 0, steps, dtype=torch.float64).round().long()
    levels = [*zip(alpha[t].tolist(), sigma[t].tolist(), strict=True), (1.0, 0.0)]
    for (a, s), (a_next, s_next) in pairwise(levels):
        image = a * DATA_STD**2 / ((a * DATA_STD) ** 2 + s**2)  # E[x0 | x_t] = image x_t
        factor = a_next * image + s_next * (1 - a * image) / s
        x, rounded = factor * x, (factor * rounded).to(dtype).double()
    return float((rounded - x).norm() / x.norm())


# ---- variances --------------------------------------------------------------------------------


def nan_variance(d: Description) -> Iterator[Finding]:
    """Variances that come out as NaN."""
    kind, wanted = d.values.get("variance_type"), "learned_range" if _learns(d) else "fixed_large"
    if not d.facts.defaults.get("variance_type") or kind not in ("fixed_large_log", "learned"):
        return
    logarithm = kind == "fixed_large_log"
    problem = f"variance_type {kind} takes the square root of {'log(beta)' if logarithm else 'raw output'}"
    always = f"NaN at all {d.total - 1} steps that add noise: log(beta) < 0"
    sometimes = "NaN wherever that is negative: at half of the values, if their median is 0"
    yield Finding("nan_variance", FAULT, problem, always if logarithm else sometimes, {"variance_type": wanted})


def variance_channels(d: Description) -> Iterator[Finding]:
    """A variance that the network predicts and nobody takes, or the other way."""
    takes = str(d.values.get("variance_type")).startswith("learned")
    if not d.facts.defaults.get("variance_type") or _learns(d) in (None, takes):
        return
    channels = f"{d.network.in_channels} channels in and {d.network.out_channels} out"
    problem = f"variance_type is {d.values['variance_type']}, but the network has {channels}"
    wanted = "fixed_small" if takes else "learned_range"
    cost = "there is no variance to take: the step raises" if takes else "channels and sample differ: the step raises"
    yield Finding("variance_channels", FAULT, problem, cost, {"variance_type": wanted})


def _learns(d: Description) -> bool | None:
    """Whether the network predicts a variance; None if nobody knows."""
    inside, outside = d.network.in_channels, d.network.out_channels
    known = inside is not None and outside in (inside, 2 * inside)
    return outside != inside if known else None
