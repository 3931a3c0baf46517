"""Configurations of schedulers and runs, diffusers' and ours, in one form; and the timesteps that they lead to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.adapters.diffusers import SCHEDULERS
from fastdiff.adapters.doctor.facts import LEVELS, PREDICTIONS, RESCALE, SIGMAS, Facts
from fastdiff.schedule import Schedule, karras_levels

MOST_STEPS = 1000
TINY = 2.0**-24  #: diffusers' alpha-bar instead of 0, where a level is sigma / alpha
#: our names of diffusers' keys
OURS = {
    "rescale_betas_zero_snr": "zero_terminal_snr",
    "prediction_type": "prediction",
    "beta_schedule": "schedule",
    "num_train_timesteps": "timesteps",
    "timestep_spacing": "spacing",
    "variance_type": "variance",
    "squaredcos_cap_v2": "cosine",
}
OF_FASTDIFF = Facts({**LEVELS, **RESCALE}, predictions=(*PREDICTIONS, "flow_prediction"))


@dataclass(frozen=True)
class Network:
    """What is known of the network that a scheduler is for; None for what is not.

    Attributes:
        latent: whether it works on latents of an autoencoder, not on pixels.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        timesteps: T of its training.
    """

    in_channels: int | None = None
    out_channels: int | None = None
    latent: bool | None = None
    precision: str | None = None
    timesteps: int | None = None


@dataclass(frozen=True)
class Description:
    """One configuration.

    Attributes:
        source: the file.
        name: the scheduler's class, or ``fastdiff``.
        facts: of the class.
        given: what the file says.
        values: what holds, by diffusers' names: as given or by default, without what the class ignores.
        schedule: None without one; ``refused`` says what is wrong, if it is because of these settings.
        total: T.
        steps: the sampling steps asked for; None for all that are usual.
        trained: T of networks' training by the files that say so.
        known: keys that mean something in this file; None where nobody says.
    """

    source: str
    name: str
    facts: Facts
    given: Mapping[str, Any]
    values: Mapping[str, Any]
    schedule: Schedule | None
    refused: str = ""
    total: int = 1000
    network: Network = Network()
    steps: int | None = None
    trained: Mapping[str, int] = field(default_factory=dict)
    known: frozenset[str] | None = None

    def __str__(self) -> str:
        says = [self.values.get(key) for key in ("beta_schedule", "prediction_type", "timestep_spacing")]
        levels = [f"T = {self.total}", *(str(value) for value in says if value)]
        return ", ".join([self.name, *(levels if self.facts.defaults else ["of which only T is examined"])])

    @property
    def ours(self) -> bool:
        return self.name == "fastdiff"

    @property
    def drop_in(self) -> str:
        """Our class of the same name, if there is one, which does not have the scheduler's own faults."""
        return f"or fastdiff.adapters.diffusers.{self.name}" if self.name in SCHEDULERS else ""

    def named(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Changes of diffusers' keys in the names of this file."""
        if not self.ours:
            return dict(changes)
        return {OURS.get(key, key): OURS.get(value, value) for key, value in changes.items() if key in OURS}

    # ---- noise levels ------------------------------------------------------------------------

    @cached_property
    def alpha_bar(self) -> NDArray[np.float64]:
        """float64 ``[T]``; nothing without a variance-preserving schedule."""
        fits = self.schedule is not None and self.schedule.variance_preserving
        return (self.schedule.alpha**2).numpy() if fits and self.schedule is not None else np.empty(0)

    @cached_property
    def signal(self) -> NDArray[np.float64]:
        """float64 ``[T]``, the share of the image in x_t: sqrt(alpha-bar)."""
        share: NDArray[np.float64] = np.sqrt(self.alpha_bar)
        return share

    @cached_property
    def ratio(self) -> NDArray[np.float64]:
        """float64 ``[T]``, sigma / alpha, finite as in diffusers."""
        bars = np.where(self.alpha_bar < 1e-300, TINY, self.alpha_bar)
        ratio: NDArray[np.float64] = np.sqrt((1 - bars) / bars)
        return ratio

    @cached_property
    def rounded_ratio(self) -> NDArray[np.float64]:
        """The same by way of float32 tables: where timesteps follow from levels, diffusers' rounding decides."""
        bars = torch.from_numpy(self.alpha_bar)
        kept = torch.cat((bars[:1], bars[1:] / bars[:-1].clamp(min=1e-300)))
        bars = (1 - (1 - kept).float()).cumprod(0)
        bars[bars == 0] = TINY
        return (((1 - bars) / bars) ** 0.5).double().numpy()

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.alpha_bar.size and self.alpha_bar[-1] == 0)

    # ---- timesteps ---------------------------------------------------------------------------

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The step counts to look at."""
        return (self.steps,) if self.steps is not None else tuple(range(1, min(MOST_STEPS, self.total) + 1))

    @cached_property
    def timesteps(self) -> dict[int, NDArray[np.float64]]:
        """The timesteps of each step count, noisiest first; nothing where a scheduler has its own way."""
        spacing, spaced = str(self.values.get("timestep_spacing", "linspace")), len(self.alpha_bar) == self.total
        if self.ours:
            counts = [n for n in self.counts if n <= self.total] if spaced and "timestep_spacing" in self.values else []
            assert self.schedule is not None or not counts
            return {n: self.schedule.timesteps(n, spacing).double().numpy() for n in counts if self.schedule}
        way = self.sigma_way or SPACINGS.get(spacing)
        known = self.facts.points and spaced and not self.given.get("use_lu_lambdas")
        return {n: way(self, n) for n in self.counts} if known and way else {}

    @property
    def sigma_way(self) -> Callable[[Description, int], NDArray[np.float64]] | None:
        """How timesteps follow from noise levels, if they do."""
        return next((SIGMA_WAYS[key] for key in SIGMAS if self.values.get(key)), None)

    def bad_counts(self, wrong: Callable[[int, NDArray[np.float64]], bool]) -> list[int]:
        """The step counts whose timesteps are wrong."""
        return [n for n, timesteps in self.timesteps.items() if wrong(n, timesteps)]


# ---- diffusers' spacings, in its own floating point -------------------------------------------


def _last(d: Description) -> int:
    """The timesteps below the clipped log-SNR (of halves: log(alpha / sigma))."""
    least = d.values.get("lambda_min_clipped", -np.inf)
    return d.total - int((-np.log(d.ratio) < least).sum())


def _linspace(d: Description, n: int) -> NDArray[np.float64]:
    opened = d.facts.points == "open"
    points = np.linspace(0, _last(d) - 1, n + opened)[::-1][:n]
    return points.round() if d.facts.whole else points


def _leading(d: Description, n: int) -> NDArray[np.float64]:
    opened = d.facts.points == "open"
    points = np.arange(n + opened, dtype=np.float64) * (_last(d) // (n + opened))
    return points[::-1][:n] + int(d.values["steps_offset"])


def _trailing(d: Description, n: int) -> NDArray[np.float64]:
    # arange's own rounding decides how many there are: that is the fault to find.
    return np.arange(_last(d), 0, -d.total / n).round() - 1


SPACINGS: dict[str, Callable[[Description, int], NDArray[np.float64]]] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
}


def _karras(d: Description, n: int) -> NDArray[np.float64]:
    t = _at_levels(d, karras_levels(n, *_ends(d), 7.0).numpy())
    cut = d.name == "DPMSolverMultistepScheduler" and d.values["beta_schedule"] == "squaredcos_cap_v2"
    return np.trunc(t) if cut else t.round() if d.facts.whole else t


def _exponential(d: Description, n: int) -> NDArray[np.float64]:
    low, high = _ends(d)
    t = _at_levels(d, np.exp(np.linspace(np.log(high), np.log(low), n)))
    return np.trunc(t) if d.facts.whole else t


def _beta(d: Description, n: int) -> NDArray[np.float64]:
    from scipy.special import betaincinv

    low, high = _ends(d)
    t = _at_levels(d, low + betaincinv(0.6, 0.6, np.linspace(1, 0, n)) * (high - low))
    return np.trunc(t) if d.facts.whole else t


def _at_levels(d: Description, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fractional timesteps of levels sigma / alpha."""
    table = np.log(d.rounded_ratio.astype(np.float32))
    t: NDArray[np.float64] = np.interp(np.log(levels), table, np.arange(d.total, dtype=np.float64))
    return t


def _ends(d: Description) -> tuple[float, float]:
    return float(d.rounded_ratio[0]), float(d.rounded_ratio[-1])


SIGMA_WAYS = dict(zip(SIGMAS, (_karras, _exponential, _beta), strict=True))
