"""The recipes, one file each: its docstring is what the gallery says of it, ``run(studio, page)`` does the work."""

from __future__ import annotations

import importlib
from typing import Any

#: in the order of the sources
NAMES = (
    *("sohl-dickstein", "ddpm", "iddpm", "ddim", "guided", "cfg", "vdm", "x0-snr", "emnist-letters", "palette"),
    *("schedules", "steps", "disturbances", "evolution", "samplers"),
)
#: Settings of training that recipes share, and with them networks
DDPM: dict[str, Any] = {"schedule": "linear", "prediction": "epsilon", "variance": "fixed_large"}
COSINE = DDPM | {"schedule": "cosine"}
VELOCITY = COSINE | {"prediction": "v_prediction", "variance": "fixed_small"}
IDDPM: dict[str, Any] = COSINE | {"variance": "learned_range", "loss": "hybrid"}


def recipe(name: str) -> Any:
    """The module of a recipe."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
