"""Faults of schedulers' and runs' configurations, each with the figure it costs and the line that mends it.

Everything is computed from the configuration in float64; diffusers is not needed. A check is a function of a
:class:`Description` that yields what it finds, and its entry in ``CHECKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastdiff.adapters.doctor import noise_levels, settings, spacing
from fastdiff.adapters.doctor.description import Description, Network
from fastdiff.adapters.doctor.finding import FAULT, WARNING, Finding
from fastdiff.adapters.doctor.reading import read, together

__all__ = ["CHECKS", "FAULT", "WARNING", "Description", "Finding", "Network", "examine", "read", "together"]

Check = Callable[[Description], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    settings.scheduler_class,
    settings.unknown_keys,
    settings.ignored_keys,
    settings.prediction,
    settings.spacing_name,
    settings.sigmas,
    settings.final_level,
    settings.training_length,
    noise_levels.betas,
    noise_levels.large_betas,
    noise_levels.terminal_signal,
    noise_levels.idle_timesteps,
    noise_levels.zero_snr_epsilon,
    noise_levels.min_snr,
    spacing.start,
    spacing.stride,
    spacing.one_too_many,
    spacing.duplicates,
    spacing.out_of_range,
    spacing.final_alpha,
    spacing.third_order,
    noise_levels.nan_variance,
    noise_levels.variance_channels,
    noise_levels.noise_precision,
    noise_levels.state_precision,
    settings.unclipped_pixels,
    settings.clipped_latents,
    settings.thresholded_latents,
    settings.guidance,
)


def examine(description: Description) -> list[Finding]:
    """All findings of one configuration, faults first."""
    found = [finding for check in CHECKS for finding in check(description)]
    return sorted(found, key=lambda finding: finding.severity != FAULT)
