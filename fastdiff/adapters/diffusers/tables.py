"""Schedules in float64 by the configurations of diffusers' schedulers; nothing of diffusers is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.errors import choose
from fastdiff.schedule import MAX_BETA, Schedule

Numbers = NDArray[np.float64]


def _laplace(t: Numbers) -> Numbers:
    """alpha-bar as diffusers has it, which is the square root of what its name says."""
    log_snr = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return np.sqrt(1 / (1 + np.exp(-log_snr)))


#: alpha-bar of t / T, of what diffusers alone has
FORMULAS: dict[str, Callable[[Numbers], Numbers]] = {"laplace": _laplace, "exp": lambda t: np.exp(-12 * t)}
#: names of ours that take two betas
ENDS = ("linear", "scaled_linear", "sigmoid")
KINDS = (*ENDS, "squaredcos_cap_v2", *FORMULAS)  #: of ``beta_schedule``


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule of ``scheduler_config.json``, or of a live scheduler's ``config``.

    Raises:
        InputError: a ``beta_schedule`` that there is not, betas outside (0, 1).
    """
    betas = config.get("trained_betas")
    schedule = Schedule.from_betas(betas) if betas is not None else _of_kind(config)
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def _of_kind(config: Mapping[str, Any]) -> Schedule:
    kind, total = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    choose("beta_schedule", kind, KINDS)
    if kind in FORMULAS:
        bars = FORMULAS[kind](np.arange(total + 1) / total)
        return Schedule.from_betas(torch.from_numpy(1 - bars[1:] / bars[:-1]).clamp(max=MAX_BETA))
    if kind == "squaredcos_cap_v2":
        return Schedule.cosine(total)
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return Schedule.from_config({"name": kind, "timesteps": total, **ends})
