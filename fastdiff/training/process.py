"""The diffusion process of a run, whose noise schedule may be part of what is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdiff.diffusion import Diffusion
from fastdiff.learned_schedule import LearnedSchedule
from fastdiff.schedule import Schedule

LEARNED = "learned"  #: the name of a schedule that is trained with the network, as its module ``learned_schedule``


def attach_schedule(model: nn.Module, settings: dict[str, Any]) -> None:
    """Give a model the schedule that is trained with it, if these settings say so."""
    if settings["name"] == LEARNED:
        model.learned_schedule = LearnedSchedule().to(next(model.parameters()).device)


def starting_schedule(settings: dict[str, Any]) -> Schedule:
    """The schedule by its settings; of a learned one, what it is before training."""
    if settings["name"] == LEARNED:
        return LearnedSchedule().schedule(settings["timesteps"])
    return Schedule.from_config(settings)


def detach_process(model: nn.Module, process: dict[str, Any]) -> Diffusion:
    """The process of a trained model, whose schedule, if it is a learned one, is frozen and taken from it."""
    settings = process["schedule"]
    if settings["name"] != LEARNED:
        return Diffusion(Schedule.from_config(settings), process["prediction"], process["variance"])
    learned = model.learned_schedule
    assert isinstance(learned, LearnedSchedule)
    del model.learned_schedule
    return Diffusion(learned.schedule(settings["timesteps"]), process["prediction"], process["variance"])
