"""The kinds of pictures that several recipes draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff import figures
from fastdiff.reproduce.page import Mean
from fastdiff.training.picture import histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f4e8c", "#b3541e", "#2a7d4f", "#8c2f5e", "#6b6b1e", "#4b4b9e", "#1e7b85", "#7a4a1e")
Lines = Mapping[str, Sequence[Sequence[float]]]  #: by name, for each place on the x axis the values of all seeds


def curves(
    path: Path, panels: Mapping[str, Lines], x: Sequence[float], xlabel: str, *, logx: bool = False, logy: bool = False
) -> None:
    """A panel for each quantity: the mean over seeds of each line, and its 95 % interval as a band."""
    from matplotlib.ticker import LogFormatter

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = figures.subplots(rows, columns, size=(4.6 * columns, 3.6 * rows))
    for axis, (ylabel, lines) in zip(axes.flat, panels.items(), strict=False):
        for i, (name, values) in enumerate(lines.items()):
            _line(axis, name, x, values, COLORS[i % len(COLORS)], "-" if i < len(COLORS) else "--")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if logy:  # a band may reach below zero: the axis ends at half the least mean
            axis.set(yscale="log", ylim=(min(Mean.of(v).value for each in lines.values() for v in each) / 2, None))
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # else one decade has one label
        if logx:
            axis.set_xscale("log")
            axis.set_xticks(x, [f"{place:g}" for place in x])
            axis.set_xticks([], minor=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if len(next(iter(panels.values()))) > 1:
        axes[0, 0].legend(frameon=False, fontsize=8)
    figures.save(figure, path)


def _line(axis: Axes, name: str, x: Sequence[float], values: Sequence[Sequence[float]], color: str, style: str) -> None:
    means = [Mean.of(each) for each in values]
    y = torch.tensor([mean.value for mean in means])
    margin = torch.tensor([mean.margin or 0.0 for mean in means])
    axis.plot(x, y, marker="o" if len(y) < 30 else None, markersize=3, linestyle=style, color=color, label=name)
    axis.fill_between(x, y - margin, y + margin, color=color, alpha=0.15, linewidth=0)


def bars(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A panel of bars for each quantity, by name: mean and 95 % interval over seeds."""
    figure, axes = figures.subplots(1, len(panels), size=(4.6 * len(panels), 3.8))
    for axis, (ylabel, bars) in zip(axes[0], panels.items(), strict=True):
        means = [Mean.of(values) for values in bars.values()]
        margins = [mean.margin or 0.0 for mean in means]
        axis.bar(range(len(means)), [mean.value for mean in means], yerr=margins, color=COLORS[: len(means)], capsize=4)
        axis.set_xticks(range(len(means)), list(bars), rotation=20, ha="right", fontsize=8)
        axis.set_ylabel(ylabel)
    figures.save(figure, path)


def scatters(path: Path, panels: Mapping[str, Tensor]) -> None:
    """Points ``[N, 2]`` of each name side by side, on the axes of the first."""
    figure, axes = figures.subplots(1, len(panels), size=(2.8 * len(panels), 3.0))
    first = next(iter(panels.values()))
    low, high = first.amin(0), first.amax(0)
    margin = (high - low) / 10
    limits = torch.stack((low - margin, high + margin), 1).tolist()
    for axis, (name, points), color in zip(axes[0], panels.items(), COLORS * 2, strict=False):
        figures.scatter(axis, points, name, color)
        axis.set(xlim=limits[0], ylim=limits[1])
    figures.save(figure, path)


def point_animation(path: Path, frames: Sequence[Tensor]) -> None:
    """A GIF of points ``[N, 2]``, dark where there are many, in the frame of the last."""
    last = frames[-1]
    low, high = last.amin(0), last.amax(0)
    inside = [frame[((frame >= low) & (frame <= high)).all(1)] for frame in frames]
    corners = torch.stack((low, high))
    figures.animation(path, [histogram(torch.cat((frame, corners))) for frame in inside], columns=1)
