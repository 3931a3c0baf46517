"""Guidance: how the network is asked for a conditional and an unconditional output."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import Model, network_output
from fastdiff.errors import InputError, check


class ClassifierFree:
    """Evaluates a model with its condition and, where asked, without it (Ho & Salimans 2022).

    Both go through the network in one batch if all conditions are tensors with one row per sample.

    Args:
        model: ``model(x, t, **cond)``.
        cond: conditions, tensors with one row per sample or anything else.
        uncond: the same names with their null values; when left out the model's own ``null_condition(cond)``.
    """

    def __init__(self, model: Model, cond: dict[str, Any], uncond: dict[str, Any] | None = None) -> None:
        self.model, self.cond, self._uncond = model, cond, uncond

    @cached_property
    def uncond(self) -> dict[str, Any]:
        """The null condition of each sample.

        Raises:
            InputError: there is no condition to drop, or nothing says what its null is.
        """
        check(self.cond, "guidance_scale other than 1 needs a condition: pass it by name, for instance y=labels")
        if self._uncond is None:
            null = getattr(self.model, "null_condition", None)
            if null is None:
                raise InputError("this model does not know its null condition: pass uncond={name: value}")
            return dict(null(self.cond))
        check(isinstance(self._uncond, dict), f"uncond must be {{name: value}}, got {type(self._uncond).__name__}")
        missing = self.cond.keys() ^ self._uncond.keys()
        check(not missing, f"uncond must name what the condition names, not so: {', '.join(sorted(missing))}")
        return {name: _like(value, self.cond[name]) for name, value in self._uncond.items()}

    def outputs(self, x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """The conditional output and, if ``guided``, the unconditional one."""
        if not guided:
            return network_output(self.model(x, t, **self.cond)), None
        if not all(isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] for value in self.cond.values()):
            return network_output(self.model(x, t, **self.cond)), network_output(self.model(x, t, **self.uncond))
        both = {name: torch.cat((value, self.uncond[name])) for name, value in self.cond.items()}
        out = network_output(self.model(torch.cat((x, x)), torch.cat((t, t)), **both))
        cond, uncond = out.chunk(2)
        return cond, uncond


def _like(value: Any, cond: Any) -> Any:
    """A null value given once, spread over the batch of the condition it stands for."""
    if not isinstance(cond, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=cond.dtype, device=cond.device).expand_as(cond)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"uncond must broadcast to its condition {list(cond.shape)}: {error}") from None
