"""Schedules in float64 by the configurations of diffusers' schedulers; nothing of diffusers is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.errors import choose
from fastdiff.schedule import Schedule

#: diffusers' names of ours
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule of ``scheduler_config.json``, or of a live scheduler's ``config``.

    Raises:
        InputError: a ``beta_schedule`` that has no counterpart, betas outside (0, 1).
    """
    betas = config.get("trained_betas")
    schedule = Schedule.from_betas(betas) if betas is not None else _of_betas(config)
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def _of_betas(config: Mapping[str, Any]) -> Schedule:
    kind = config.get("beta_schedule", "linear")
    choose("beta_schedule", kind, SCHEDULES)
    size = {"name": SCHEDULES[kind], "timesteps": config.get("num_train_timesteps", 1000)}
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return Schedule.from_config(size if kind == "squaredcos_cap_v2" else size | ends)
