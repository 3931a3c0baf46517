"""The table of a run: a solver's rows, completed by guidance, prediction type and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError, check, choose
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_clip
from fastdiff.schedule import Schedule
from fastdiff.solvers import SOLVERS, Grid, Letters

FINALS = ("zero", "minimal")


@dataclass(frozen=True)
class StepTable:
    """The rows of a run, for people and tests to read, and as the device table of the loop.

    Attributes:
        rows: numpy record array, float64, one record per network evaluation: ``rows.a``, ``rows[0].b`` ... by
            the letters of :mod:`fastdiff.ops.row` (``clip``, which is also a method, as ``rows["clip"]``), and
            ``rows.t``, the time the network is told.
        timesteps: ``[R]``, the schedule's timestep of each row: int64, or float64 if solvers go between them.
        alpha, sigma: float64 ``[R + 1]``, of the state that each row is given, and of what the last one leaves.
        inside: bool ``[R]``, the rows within the interval of guidance.
        history, anchored: how many of h1 h2 h3 the rows use, and whether they use the anchor.
    """

    rows: np.recarray[Any, Any]
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    inside: Tensor
    history: int
    anchored: bool

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The letters ``[R, len(LETTERS)]`` on the device, rounded once."""
        return torch.stack([self.column(letter) for letter in rows.LETTERS], 1).to(device, dtype)

    def column(self, letter: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.rows[letter]))

    def times(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What the network is told ``[R]``: int64 where it is whole timesteps, or in ``dtype``."""
        times = self.column("t")
        whole = not self.timesteps.is_floating_point() and bool((times == self.timesteps).all())
        return times.to(device, torch.int64 if whole else dtype)


def build_table(
    diffusion: Diffusion,
    timesteps: Tensor,
    solver: str = "ddim",
    *,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: Sequence[float] | None = None,
    off: float = 1.0,
    clip: float | None = None,
    final: str = "zero",
    resample: tuple[int, int] | None = None,
    **options: Any,
) -> StepTable:
    """The table of a run: the solver's letters, and guidance, prediction type and clipping.

    Args:
        timesteps: int64 ``[N]``, strictly descending.
        guidance_scale: one, or one for each step.
        guidance_interval: the lowest and highest sigma / alpha at which there is guidance; None for everywhere.
        off: the scale that is no guidance, which rows outside the interval have.
        clip: bound of the estimate of x0, None for no bound.
        final: where the run ends: ``zero`` noise, or ``minimal``, the schedule's timestep 0, of which the network is
            then not asked.
        resample: ``(length, times)``: every so many steps are taken so many times, each time from noise that is put
            back on (Lugmayr et al. 2022, algorithm 1). Of solvers that remember nothing.
        options: the solver's own, for instance ``eta``.

    Raises:
        InputError: an unknown solver or option, scales that do not match the steps, a singular start, levels that
            repeat.
    """
    choose("solver", solver, SOLVERS)
    schedule = diffusion.schedule
    grid = grid_of(schedule, timesteps, final)
    if solver == "ddpm":
        options = {"variance": diffusion.variance, **options}
        learned = options["variance"] == "learned_range"
        check(not learned or diffusion.variance == "learned_range", "this diffusion has no learned_range variance")
    try:
        letters = SOLVERS[solver](grid, **options)
    except TypeError as error:
        raise InputError(f"solver {solver}: {error}") from None
    if resample is not None:
        letters = resampled(solver, letters, grid, resample)
    t = letters.pop("t", grid.t[: len(grid.h)])
    level = schedule.at(t)
    check(
        diffusion.prediction != "epsilon" or bool((level.alpha > 0).all()),
        "an epsilon prediction cannot start from zero terminal SNR: train with v_prediction or sample",
    )
    p, q = rows.to_x0(diffusion.prediction, level.alpha, level.sigma)
    step = letters.pop("step", (timesteps >= t[:, None]).sum(1) - 1).clamp(0, len(timesteps) - 1)
    low, high = (0.0, torch.inf) if guidance_interval is None else _interval(guidance_interval)
    inside = (level.sigma >= low * level.alpha) & (level.sigma <= high * level.alpha.clamp(min=1e-300))
    w = torch.where(inside, _scales(guidance_scale, len(timesteps))[step.long()], off)
    table = rows.make_table(len(t), p=p, q=q, w=w, c_in=level.c_in, clip=check_clip(clip), **letters)
    end = 0 if solver == "ddim_inverse" else -1
    alpha, sigma = torch.cat((level.alpha, grid.alpha[end, None])), torch.cat((level.sigma, grid.sigma[end, None]))
    return _step_table(table, level.c_noise, t, alpha, sigma, inside)


def resampled(solver: str, letters: Letters, grid: Grid, resample: tuple[int, int]) -> Letters:
    """The rows again and again: the last of a repeated piece also puts the noise back that the piece took off.

    Raises:
        InputError: a length or a number below 1; a solver that remembers, goes between the levels or learned its noise.
    """
    pair = isinstance(resample, Sequence) and len(resample) == 2
    valid = pair and all(isinstance(value, int) and value >= 1 for value in resample)
    check(valid, f"resample must be (steps of a piece, times it is taken), whole numbers, got {resample!r}")
    fixed = not any(letters[bound].any() for bound in ("lo", "hi") if bound in letters)
    alone = fixed and letters.keys() <= {"a", "b", "s", "lo", "hi"}
    check(alone, f"resample needs ddpm with a fixed variance, ddim, euler, euler_a or lcm, not this {solver}")
    (length, times), n = resample, len(grid.h)
    at, back = [], []  # the rows, and the level that each goes back to
    for first in range(0, n, length):
        piece = list(range(first, min(first + length, n)))
        at += piece * times
        back += ([step + 1 for step in piece[:-1]] + [first]) * (times - 1) + [step + 1 for step in piece]
    taken = {name: column[at] for name, column in letters.items()}
    factor = grid.alpha[back] / grid.alpha[[step + 1 for step in at]]
    put_on = grid.sigma[back] ** 2 - (factor * grid.sigma[[step + 1 for step in at]]) ** 2
    s = ((factor * taken.get("s", torch.zeros(()))) ** 2 + put_on).clamp(min=0).sqrt()
    return {**taken, "a": factor * taken["a"], "b": factor * taken["b"], "s": s, "t": grid.t[at]}


def grid_of(schedule: Schedule, timesteps: Tensor, final: str = "zero") -> Grid:
    """The levels of a run.

    Raises:
        InputError: levels whose log-SNR does not rise from step to step, an unknown ``final``, no step at all.
    """
    choose("final", final, FINALS)
    last = (1.0, 0.0, -1.0)
    if final == "minimal":
        timesteps = timesteps[timesteps > 0]
        check(len(timesteps) > 0, "a run that ends at timestep 0 (final='minimal') needs one above it")
        last = (float(schedule.alpha[0]), float(schedule.sigma[0]), 0.0)
    levels = schedule.alpha[timesteps], schedule.sigma[timesteps], timesteps.double()
    alpha, sigma, t = (torch.cat((column, column.new_tensor([end]))) for column, end in zip(levels, last, strict=True))
    level = torch.log(alpha) - torch.log(sigma)
    same = (level.diff() <= 0).nonzero().flatten()
    where = [] if not len(same) else t[same[0] : same[0] + 2].long().tolist()
    check(not len(same), f"timesteps {where} have the same log-SNR: leave one of them out")
    return Grid(alpha, sigma, t, schedule)


def _scales(guidance_scale: float | Sequence[float], steps: int) -> Tensor:
    try:
        scales = torch.as_tensor(guidance_scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"guidance_scale must be a number or one for each step: {error}") from None
    check(
        scales.ndim == 0 or scales.shape == (steps,),
        f"guidance_scale must be one or one for each of {steps} steps, got {list(scales.shape)}",
    )
    check(bool(torch.isfinite(scales).all()), f"guidance_scale must be finite, got {guidance_scale}")
    return scales.expand(steps)


def _interval(interval: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    check(0 <= low <= high, f"guidance_interval must be the lowest and highest sigma / alpha, got {interval}")
    return low, high


def _step_table(table: Tensor, times: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, inside: Tensor) -> StepTable:
    columns = (times.double(), *table.unbind(1))
    record = np.rec.fromarrays(  # type: ignore[call-overload]
        [column.numpy() for column in columns], names=("t", *rows.LETTERS)
    )
    used = [letter for letter in ("c1", "c2", "c3") if np.any(record[letter])]
    anchored = bool(np.any(record.e))
    timesteps = t.long() if bool((t == t.round()).all()) else t
    return StepTable(record, timesteps, alpha, sigma, inside, int(used[-1][1]) if used else 0, anchored)
