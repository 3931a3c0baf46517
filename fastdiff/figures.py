"""The pictures that commands and recipes leave behind. Each is written whole or not at all."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _io, noise
from fastdiff.diffusion import Diffusion
from fastdiff.errors import check
from fastdiff.training.picture import mosaic, to_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiff.metrics.evaluation import Result


def require_matplotlib() -> None:
    """Raise :class:`~fastdiff.errors.InputError` where matplotlib is missing, before any work is done."""
    check(find_spec("matplotlib"), "this needs matplotlib: pip install 'fastdiff[demo]'")


def _can_draw(path: Path) -> bool:
    found = find_spec("matplotlib") is not None
    if not found:
        print(f"{path.name} is left out: it needs matplotlib, pip install 'fastdiff[demo]'", file=sys.stderr)
    return found


def loss_curve(path: Path, losses: list[float]) -> None:
    """The loss of every step and its running mean; without matplotlib, only a line that says so."""
    if not _can_draw(path):
        return
    figure, axes = subplots(1, 1, size=(6.4, 4.0))
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes[0, 0].plot(losses, color="#c6d4e8", linewidth=0.7, label="each step")
    axes[0, 0].plot(np.arange(len(smooth)) + window - 1, smooth, color="#1f4e8c", label=f"mean of {window}")
    if min(losses, default=0.0) > 0:
        axes[0, 0].set_yscale("log")
    axes[0, 0].set(xlabel="training step", ylabel="loss")
    axes[0, 0].legend(frameon=False)
    save(figure, path)


def divergence(path: Path, curves: dict[str, list[float]]) -> None:
    """How far runs are from the exact one after each step; without matplotlib, only a line that says so."""
    if not _can_draw(path):
        return
    figure, axes = subplots(1, 1, size=(6.4, 4.0))
    for name, values in curves.items():
        axes[0, 0].plot(values, label=name, linestyle="--" if name == "budget" else "-")
    axes[0, 0].set(xlabel="step", ylabel="largest difference from float64", yscale="log")
    axes[0, 0].legend()
    save(figure, path)


def metric_curves(path: Path, over: str, curves: dict[str, list[tuple[int, Result]]], title: str) -> None:
    """One panel for each metric: its value, and interval if there is one, over ``steps`` or along a ``trajectory``."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = subplots(rows, columns, size=(3.8 * columns, 3.2 * rows + 0.3))
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        _metric_curve(axis, over, points)
        axis.set(title=name, xlabel="number of steps" if over == "steps" else "step whose $x_0$ is judged")
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def _metric_curve(axis: Axes, over: str, points: list[tuple[int, Result]]) -> None:
    places, values = [place for place, _ in points], [result.value for _, result in points]
    axis.plot(places, values, color="#1f4e8c", marker="o", markersize=3)
    intervals = [result.interval for _, result in points if result.interval]
    if intervals:  # without the bias that few images have, and so perhaps beside the value
        low, high = zip(*intervals, strict=True)
        axis.fill_between(places, low, high, color="#c6d4e8", linewidth=0, label="95 % interval")
        axis.legend()
    elif min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    if over == "steps":
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()


def labelled_grid(path: Path, rows: list[tuple[str, Tensor]], title: str) -> None:
    """One row of uint8 images ``[N, C, H, W]`` for each name."""
    columns = max(len(images) for _, images in rows)
    figure, axes = subplots(len(rows), columns, size=(0.62 * columns + 0.5, 0.62 * len(rows) + 0.5))
    for (name, images), line in zip(rows, axes, strict=True):
        for image, axis in zip(images, line, strict=False):
            axis.imshow(to_array(image), cmap="gray", vmin=0, vmax=255)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    bare(axes)
    figure.suptitle(title)
    save(figure, path)


def noising_strip(path: Path, diffusion: Diffusion, x0: Tensor, to_raw: Any, title: str) -> None:
    """The forward process of a few images ``[N, C, H, W]`` (network scale), one column for each of some timesteps."""
    moments = torch.linspace(0, len(diffusion.schedule) - 1, 9).long()
    columns = [to_raw(_noised(diffusion, x0, t)) for t in moments]
    figure, axes = subplots(len(x0), len(moments) + 1, size=(0.9 * (len(moments) + 1), 0.9 * len(x0) + 0.6))
    for j, (name, images) in enumerate(
        [("$x_0$", to_raw(x0)), *((f"t = {int(t)}", c) for t, c in zip(moments, columns, strict=True))]
    ):
        axes[0, j].set_title(name, fontsize=8)
        for i, image in enumerate(images):
            axes[i, j].imshow(to_array(image), cmap="gray", vmin=0, vmax=255)
    bare(axes)
    figure.suptitle(title)
    save(figure, path)


def animation(path: Path, frames: list[Tensor], columns: int = 10, milliseconds: int = 80) -> None:
    """A GIF of uint8 images ``[N, C, H, W]``, the last frame held."""
    from PIL import Image

    first, *others = [Image.fromarray(mosaic(frame, columns)) for frame in frames]
    durations = [milliseconds] * len(others) + [25 * milliseconds]
    buffer = io.BytesIO()
    first.save(buffer, "gif", save_all=True, append_images=others, duration=durations, loop=0)
    _io.replace(path, buffer.getvalue())


def point_trajectories(path: Path, diffusion: Diffusion, data: Tensor, to_raw: Any, reverse: list[Tensor]) -> None:
    """Above, data ``[N, 2]`` (network scale) is noised; below, noise turns to samples (data units); noise is right."""
    moments = torch.linspace(0, len(diffusion.schedule) - 1, len(reverse)).long().tolist()[1:]
    forward = [
        ("data", to_raw(data)),
        *((f"t = {t}", to_raw(_noised(diffusion, data, torch.tensor(t)))) for t in moments),
    ]
    figure, axes = subplots(2, len(reverse), size=(2.1 * len(reverse), 4.6))
    for axis, (name, points) in zip(axes[0], forward, strict=True):
        scatter(axis, points, name, "#1f4e8c")
    names = ["samples"] + [""] * (len(reverse) - 1)
    for axis, name, points in zip(axes[1], names, reversed(reverse), strict=True):
        scatter(axis, points, name, "#b3541e")
    axes[0, 0].set_ylabel("forward")
    axes[1, 0].set_ylabel("reverse")
    low, high = forward[0][1].amin(0), forward[0][1].amax(0)
    margin = (high - low).clamp(min=1) / 4
    limits = torch.stack((low - margin, high + margin), 1).tolist()
    for axis in axes.flat:
        axis.set(xlim=limits[0], ylim=limits[1])
    save(figure, path)


def _noised(diffusion: Diffusion, x0: Tensor, t: Tensor) -> Tensor:
    """x_t along one path: the same noise at every t."""
    return diffusion.add_noise(x0, noise.normal(x0.shape, seed=0, stream=noise.Stream.TRAINING), t.expand(len(x0)))


def subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """An empty picture and its panels ``[rows, columns]``; ``size`` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def scatter(axis: Axes, points: Tensor, title: str, color: str) -> None:
    """Points ``[N, 2]``."""
    axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=1.0, color=color, alpha=0.4, linewidths=0)
    axis.set(xticks=[], yticks=[], title=title)


def bare(axes: Any) -> None:
    """Leave out the frames and ticks of panels that show images."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _io.replace(path, buffer.getvalue())
