"""The step family: guidance and one row of a solver, by the letters of :mod:`fastdiff.ops.row`.

``guide``, ``ddim_step`` and ``posterior_step`` are the readable special cases of ``affine_step`` and share its body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import noise as noises
from fastdiff.errors import check, choose
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_clip, check_floating, check_row, check_same, check_scale, check_state
from fastdiff.ops.dispatch import body

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


Levels = tuple[Tensor, Tensor, Tensor, Tensor]


class Step(NamedTuple):
    """What one row leaves: the next state, the estimate of x0 and the stored vectors."""

    x: Tensor
    x0: Tensor
    history: tuple[Tensor, ...]
    anchor: Tensor | None


def guide(cond: Tensor, uncond: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond).

    ``scale`` 1 is the conditional model alone; the w of Ho & Salimans 2022, eq. 6, is ``scale - 1``.

    Args:
        cond, uncond: ``[N, C, ...]`` of one shape, dtype and device.
        scale: a number or ``[N]``.
    """
    check_floating("cond", cond)
    check_floating("uncond", uncond)
    check_same("uncond", uncond, cond)
    check(uncond.dtype == cond.dtype, f"uncond must be {cond.dtype}, got {uncond.dtype}")
    result: Tensor = body("guide", cond.device)(cond, uncond, check_scale("scale", scale, cond))
    return result


def affine_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    row: int | Tensor,
    *,
    uncond: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    anchor: Tensor | None = None,
    noise: Tensor | None = None,
    seed: noises.Seed | None = None,
    step: int | None = None,
    sample: Sequence[int] | Tensor | None = None,
) -> Step:
    """Run one row of a solver table (see :mod:`fastdiff.ops.row` for the formula).

    Args:
        x: state ``[N, C, ...]``, float32 (float64 for the reference in float64).
        out: network output ``[N, C, ...]``, or ``[N, 2C, ...]`` with learned-range variance; any float dtype.
        table: rows by letters ``[R, len(LETTERS)]`` on x's device.
        row: which row, 0 ... R-1, or int64 ``[N]`` for a row per sample.
        uncond: unconditional output like ``out``; without it w is not used.
        history: up to three stored vectors h1, h2, h3 of x's shape; absent ones drop out of the formula.
        anchor: stored vector of x's shape.
        noise: z of x's shape; or ``seed`` (and ``step``, ``sample``) for the noise that belongs to them;
            with neither, nothing is added. ``step`` is the row unless it is given.

    Raises:
        InputError: what does not fit, by name.
    """
    check_state("x", x)
    _check_step(x, out, table, row, uncond, history, anchor, noise)
    if seed is not None:
        check(noise is None, "give either noise or seed")
        at = row if step is None else step
        noise = noises.normal(x.shape, seed=seed, step=at, sample=sample, device=x.device, dtype=x.dtype)
    return Step(*body("affine_step", x.device)(x, out, table, row, uncond, history, anchor, noise))


def ddim_step(
    x: Tensor,
    out: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    alpha_next: Tensor | float,
    sigma_next: Tensor | float,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    clip: float | None = None,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: noises.Seed | None = None,
    step: int = 0,
    sample: Sequence[int] | Tensor | None = None,
) -> Step:
    """One DDIM step from (alpha, sigma) to the cleaner (alpha_next, sigma_next) (Song et al. 2021, eq. 12).

    Args:
        x, out, uncond, noise, seed, step, sample: as in :func:`affine_step`. eta > 0 needs noise or seed.
        alpha, sigma, alpha_next, sigma_next: numbers, or ``[N]`` for a timestep per sample.
        clip: bound of the estimate of x0, None for no bound.
        guidance_scale: 1 = ``out`` alone, see :func:`guide`.
    """
    check_state("x", x)
    check(0 <= eta <= 1, f"eta must lie in [0, 1], got {eta}")
    check(eta == 0 or noise is not None or seed is not None, "eta > 0 adds noise: give noise or seed")
    levels = _levels(x, alpha, sigma, alpha_next, sigma_next)
    a, b, s = rows.ddim(*levels, eta)
    table, row = _table(x, levels, prediction, clip, guidance_scale, a=a, b=b, s=s)
    return affine_step(x, out, table, row, uncond=uncond, noise=noise, seed=seed, step=step, sample=sample)


def posterior_step(
    x: Tensor,
    out: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    alpha_next: Tensor | float,
    sigma_next: Tensor | float,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = None,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: noises.Seed | None = None,
    step: int = 0,
    sample: Sequence[int] | Tensor | None = None,
) -> Step:
    """One ancestral DDPM step x_t -> x_t' ~ N(posterior mean, variance) (Ho et al. 2020, algorithm 2).

    Args:
        variance: ``fixed_small`` (posterior variance), ``fixed_large`` (forward variance) or ``learned_range``
            (between the two by the last half of ``out``'s channels). No noise is added at the clean end.
        The rest: as in :func:`ddim_step`; noise or seed is needed.
    """
    check_state("x", x)
    check(noise is not None or seed is not None, "the posterior step adds noise: give noise or seed")
    check_floating("out", out)
    learned = variance == "learned_range"
    check(not learned or out.shape[1] == 2 * x.shape[1], f"out must have {2 * x.shape[1]} channels with learned_range")
    levels = _levels(x, alpha, sigma, alpha_next, sigma_next)
    table, row = _table(x, levels, prediction, clip, guidance_scale, **posterior_letters(*levels, variance=variance))
    return affine_step(x, out, table, row, uncond=uncond, noise=noise, seed=seed, step=step, sample=sample)


def posterior_letters(
    alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, *, variance: str
) -> dict[str, Tensor]:
    """The letters a, b, s, lo, hi of an ancestral step; s is 0 where the next level is clean."""
    choose("variance", variance, VARIANCES)
    a, b, small = rows.posterior(alpha, sigma, alpha_next, sigma_next)
    large = rows.forward_variance(alpha, sigma, alpha_next, sigma_next)
    noisy = small > 0
    if variance == "learned_range":
        lo, hi = (torch.where(noisy, v, 1.0).log() for v in (small, large))
        return {"a": a, "b": b, "s": noisy.double(), "lo": lo, "hi": hi}
    return {"a": a, "b": b, "s": torch.where(noisy, small if variance == "fixed_small" else large, 0.0).sqrt()}


def _levels(x: Tensor, *levels: Tensor | float) -> Levels:
    """The four levels as float64 host tensors of one length."""
    names = ("alpha", "sigma", "alpha_next", "sigma_next")
    columns = [check_scale(name, level, x) for name, level in zip(names, levels, strict=True)]
    alpha, sigma, alpha_next, sigma_next = torch.broadcast_tensors(*(c.double().cpu().reshape(-1) for c in columns))
    return alpha, sigma, alpha_next, sigma_next


def _table(
    x: Tensor, levels: Levels, prediction: str, clip: float | None, scale: float, **letters: Tensor
) -> tuple[Tensor, int | Tensor]:
    p, q = rows.to_x0(prediction, *levels[:2])
    count = len(p)
    table = rows.make_table(count, p=p, q=q, w=scale, clip=check_clip(clip), **letters)
    return table.to(x.device, x.dtype), 0 if count == 1 else torch.arange(count, device=x.device)


def _check_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Tensor | None,
) -> None:
    check_floating("out", out)
    wide = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    check(
        out.shape in (x.shape, wide) and out.device == x.device,
        f"out must be {list(x.shape)}, or {list(wide)} with learned variance, on {x.device},"
        f" got {list(out.shape)} on {out.device}",
    )
    if uncond is not None:
        check_same("uncond", uncond, out)
    check(len(history) <= 3, f"history holds at most three vectors, got {len(history)}")
    for name, vector in (*((f"h{i + 1}", h) for i, h in enumerate(history)), ("anchor", anchor), ("noise", noise)):
        if vector is not None:
            check_floating(name, vector)
            check_same(name, vector, x)
    check(isinstance(table, Tensor), f"table must be a tensor, got {type(table).__name__}")
    letters = len(rows.LETTERS)
    check(table.ndim == 2 and table.shape[1] == letters, f"table must be [R, {letters}], got {list(table.shape)}")
    check(table.device == x.device, f"table must be on {x.device}, got {table.device}")
    check_row(row, len(table), x)
