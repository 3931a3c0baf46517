"""Measures of how close samples are to data."""

from fastdiff.metrics.energy import energy_distance

__all__ = ["energy_distance"]
