"""The step family: guidance and one row of a solver, by the letters of :mod:`fastdiff.ops.row`.

``guide``, ``ddim_step`` and ``posterior_step`` are the readable special cases of ``affine_step`` and share its body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdiff import noise as noises
from fastdiff.backends import body
from fastdiff.errors import InputError, check
from fastdiff.ops import library, reference
from fastdiff.ops import row as rows
from fastdiff.ops.checks import (
    FLOATS,
    check_apart,
    check_clip,
    check_floating,
    check_output,
    check_result,
    check_row,
    check_same,
    check_scale,
    check_state,
)
from fastdiff.ops.layout import empty_like, format_of

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
COLUMNS = len(rows.LETTERS)

Levels = tuple[Tensor, Tensor, Tensor, Tensor]
Noise = Tensor | noises.Address
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Step(NamedTuple):
    """What one row leaves: the next state, the estimate of x0, the stored vectors, and the next network input."""

    x: Tensor
    x0: Tensor | None = None
    history: tuple[Tensor, ...] = ()
    anchor: Tensor | None = None
    input: Tensor | None = None


class StepOptions(TypedDict, total=False):
    """The keyword arguments of :func:`affine_step` that every step takes."""

    uncond: Tensor | None
    noise: Noise | None
    seed: noises.Seed | None
    step: int | Tensor | None
    sample: Sequence[int] | Tensor | None
    keep_x0: bool
    input_dtype: torch.dtype | None
    out: Step | None


def guide(cond: Tensor, uncond: Tensor, scale: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond).

    ``scale`` 1 is the conditional model alone; the w of Ho & Salimans 2022, eq. 6, is ``scale - 1``.

    Args:
        cond, uncond: ``[N, C, ...]`` of one shape, dtype and device.
        scale: a number or ``[N]``.
        out: where to write the result, like ``cond`` and dense; may be ``cond`` or ``uncond`` itself.
    """
    try:
        if run := library.quick("guide", cond, uncond, scale, out):
            result = empty_like(cond) if out is None else out
            check(uncond.dtype == cond.dtype == result.dtype, "dtypes differ")
            run(cond, uncond, scale, result)
    except Exception:  # said better, or mended, below
        run = None
    if run is None:
        scale = _check_guide(cond, uncond, scale, out)
        result = empty_like(cond) if out is None else out
        _runner("guide", cond, library.needs_grad(cond, uncond, scale))(cond, uncond, scale, result)
    if out is not None:
        library.written(out)
    return result


def _check_guide(cond: Tensor, uncond: Tensor, scale: Tensor | float, out: Tensor | None) -> Tensor | float:
    check_floating("cond", cond)
    check_same("uncond", uncond, cond)
    if uncond.dtype != cond.dtype:
        raise InputError(f"uncond must be {cond.dtype}, got {uncond.dtype}")
    if out is not None:
        check_result("out", out, cond, cond.dtype)
        check_apart((cond, uncond), [("out", out, (cond, uncond))])
    return check_scale("scale", scale, cond)


def affine_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int | Tensor,
    *,
    uncond: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    anchor: Tensor | None = None,
    noise: Noise | None = None,
    seed: noises.Seed | None = None,
    step: int | Tensor | None = None,
    sample: Sequence[int] | Tensor | None = None,
    keep_x0: bool = True,
    input_dtype: torch.dtype | None = None,
    out: Step | None = None,
) -> Step:
    """Run one row of a solver table (see :mod:`fastdiff.ops.row` for the formula).

    Args:
        x: state ``[N, C, ...]``, float32 (float64 for the reference in float64).
        output: of the network, ``[N, C, ...]``, or ``[N, 2C, ...]`` with learned-range variance; any float dtype.
        table: rows by letters ``[R, len(LETTERS)]`` on x's device.
        row: which row, 0 ... R-1, an int64 tensor ``[]`` on x's device, or ``[N]`` for a row per sample.
        uncond: unconditional output like ``output``; without it w is not used.
        history: up to three stored vectors h1, h2, h3 of x's shape; absent ones drop out of the formula.
        anchor: stored vector of x's shape.
        noise: z of x's shape, or the :class:`~fastdiff.noise.Address` it is drawn from; or ``seed`` (and ``step``,
            ``sample``) for the noise that belongs to them; with neither, nothing is added. ``step`` is the row unless
            it is given.
        keep_x0: whether to return the estimate of x0.
        input_dtype: also return ``c_in x'`` of the row after this one (of this one after the last) in this dtype,
            which is what the network is given next; for another memory format than x's pass it as ``out.input``.
        out: where to write: dense tensors like those a call without it returns. Parts that are None are not
            written. ``out.x`` may be ``x``, ``out.history[0]`` any of ``history``, ``out.anchor`` the ``anchor``;
            otherwise nothing may share memory. Only ``out.history[0]`` is written: the older vectors are passed on.

    Raises:
        InputError: what does not fit, by name; an explicit backend that has no gradient where one is needed.
    """
    vectors = (uncond, history, anchor)
    given: Results | tuple[()] = ()
    try:
        given = () if out is None else _targets(out)
        if run := library.quick("affine_step", x, output, table, uncond, *history, anchor, noise, *given):
            source = _source(x, row, noise, seed, step, sample)
            results = _results(x, history, anchor, keep_x0, input_dtype) if out is None else out
            run(x, output, table, row, *vectors, source, given or _targets(results))
    except Exception:  # said better, or mended, below
        run = None
    if run is None:
        z = noise if not isinstance(noise, noises.Address) else None
        table = _check_step(x, output, table, row, *vectors, z)
        source = _source(x, row, noise, seed, step, sample)
        if out is not None:
            _check_out(out, x, output, table, *vectors, z)
        results = _results(x, history, anchor, keep_x0, input_dtype) if out is None else out
        grad = library.needs_grad(x, output, table, uncond, *history, anchor, z)
        _runner("affine_step", x, grad)(x, output, table, row, *vectors, source, given or _targets(results))
    if given:
        library.written(*given)
    return results._replace(history=(results.history[0], *history[:-1])) if history else results


def _runner(op: str, x: Tensor, grad: bool) -> Callable[..., None]:
    """What runs a step: a body that autograd can follow where it must; the registered op where it is compiled."""
    compiling = torch.compiler.is_compiling()
    if compiling or library.watched():
        run: Callable[..., None] = getattr(library if compiling and not grad else reference, op)
        return run
    return body(op, x.device, library.wide(x), differentiable=grad)


def _targets(results: Step) -> Results:
    """The tensors a body writes: the older vectors of the history are only passed on."""
    return results.x, results.x0, results.history[0] if results.history else None, results.anchor, results.input


def _source(
    x: Tensor,
    row: int | Tensor,
    noise: Noise | None,
    seed: noises.Seed | None,
    step: int | Tensor | None,
    sample: Sequence[int] | Tensor | None,
) -> Noise | None:
    if seed is None:
        if step is not None or sample is not None:
            raise InputError("step and sample choose among the noise of a seed: give seed")
        return noise
    if noise is not None:
        raise InputError("give either noise or seed")
    return noises.address(len(x), x.device, seed=seed, step=row if step is None else step, sample=sample)


def ddim_step(
    x: Tensor,
    output: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    alpha_next: Tensor | float,
    sigma_next: Tensor | float,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    clip: float | None = None,
    guidance_scale: float = 1.0,
    **options: Unpack[StepOptions],
) -> Step:
    """One DDIM step from (alpha, sigma) to the cleaner (alpha_next, sigma_next) (Song et al. 2021, eq. 12).

    Args:
        x, output, options: as in :func:`affine_step`. eta > 0 needs noise or seed.
        alpha, sigma, alpha_next, sigma_next: numbers, or ``[N]`` for a timestep per sample.
        clip: bound of the estimate of x0, None for no bound.
        guidance_scale: 1 = ``output`` alone, see :func:`guide`.
    """
    check_state("x", x)
    if not 0 <= eta <= 1:
        raise InputError(f"eta must lie in [0, 1], got {eta}")
    if eta and not _has_noise(options):
        raise InputError("eta > 0 adds noise: give noise or seed")
    levels = _levels(x, alpha, sigma, alpha_next, sigma_next)
    more = {"prediction": prediction, "eta": float(eta), "clip": check_clip(clip), "scale": float(guidance_scale)}
    return _one_step(x, output, _table(_ddim_letters, x, levels, **more), options)


def posterior_step(
    x: Tensor,
    output: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    alpha_next: Tensor | float,
    sigma_next: Tensor | float,
    *,
    prediction: str = "epsilon",
    variance: str | float = "fixed_small",
    clip: float | None = None,
    guidance_scale: float = 1.0,
    **options: Unpack[StepOptions],
) -> Step:
    """One ancestral DDPM step x_t -> x_t' ~ N(posterior mean, variance) (Ho et al. 2020, algorithm 2).

    Args:
        variance: ``fixed_small`` (posterior variance), ``fixed_large`` (forward variance), a number v between 0 and 1
            for small^(1-v) large^v (Ho & Salimans 2022, algorithm 2), or ``learned_range`` (between the two by the
            last half of ``output``'s channels). No noise is added at the clean end.
        The rest: as in :func:`ddim_step`; noise or seed is needed.
    """
    check_state("x", x)
    if not _has_noise(options):
        raise InputError("the posterior step adds noise: give noise or seed")
    check_floating("output", output)
    if variance == "learned_range" and output.shape[1] != 2 * x.shape[1]:
        raise InputError(f"output must have {2 * x.shape[1]} channels with learned_range, got {output.shape[1]}")
    levels = _levels(x, alpha, sigma, alpha_next, sigma_next)
    more = {"prediction": prediction, "variance": variance, "clip": check_clip(clip), "scale": float(guidance_scale)}
    return _one_step(x, output, _table(posterior_letters, x, levels, **more), options)


def posterior_letters(
    alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, *, variance: str | float
) -> dict[str, Tensor]:
    """The letters a, b, s, lo, hi of an ancestral step; s is 0 where the next level is clean."""
    named: dict[Any, Any] = {"fixed_small": 0.0, "fixed_large": 1.0}
    share = named.get(variance, variance)
    valid = share == "learned_range" or (isinstance(share, Real) and 0 <= float(share) <= 1)
    check(valid, f"variance must be one of {', '.join(VARIANCES)}, or between 0 and 1, got {variance!r}")
    a, b, small = rows.posterior(alpha, sigma, alpha_next, sigma_next)
    large = rows.forward_variance(alpha, sigma, alpha_next, sigma_next)
    noisy = small > 0
    if isinstance(share, str):
        lo, hi = (torch.where(noisy, v, 1.0).log() for v in (small, large))
        return {"a": a, "b": b, "s": noisy.double(), "lo": lo, "hi": hi}
    return {"a": a, "b": b, "s": torch.where(noisy, small ** ((1 - share) / 2) * large ** (share / 2), 0.0)}


def _ddim_letters(
    alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, *, eta: float
) -> dict[str, Tensor]:
    return dict(zip("abs", rows.ddim(alpha, sigma, alpha_next, sigma_next, eta), strict=True))


def _one_step(x: Tensor, output: Tensor, table: Tensor, options: StepOptions) -> Step:
    row = 0 if len(table) == 1 else torch.arange(len(table), device=x.device)
    if options.get("seed") is not None:
        options.setdefault("step", 0)
    return affine_step(x, output, table, row, **options)


def _has_noise(options: StepOptions) -> bool:
    return options.get("noise") is not None or options.get("seed") is not None


# ---- tables of one step ---------------------------------------------------------------------


def _levels(x: Tensor, *levels: Tensor | float) -> tuple[float, ...] | Levels:
    """The four levels: numbers, or float64 host tensors of one length."""
    names = ("alpha", "sigma", "alpha_next", "sigma_next")
    # A 0-d tensor is a number: a timestep's entry in the schedule's tables.
    plain = [_number(level) for level in levels]
    checked = [check_scale(name, level, x) for name, level in zip(names, plain, strict=True)]
    if not any(isinstance(level, Tensor) for level in checked):
        return tuple(checked)  # type: ignore[arg-type]
    columns = (torch.as_tensor(level, dtype=torch.float64).cpu().reshape(-1) for level in checked)
    alpha, sigma, alpha_next, sigma_next = torch.broadcast_tensors(*columns)
    return alpha, sigma, alpha_next, sigma_next


def _number(level: Tensor | float) -> Tensor | float:
    return level.item() if isinstance(level, Tensor) and not level.ndim and not library.traced(level) else level


def _table(letters: Any, x: Tensor, levels: tuple[float, ...] | Levels, **options: Any) -> Tensor:
    """The rows of a step, remembered where the levels are numbers: a loop over a schedule builds them once."""
    if isinstance(levels[0], Tensor) or torch.compiler.is_compiling() or library.watched():
        return _make_table(letters, x.device, x.dtype, levels, **options)
    with torch.inference_mode(False):  # a table is used again outside of it
        return _remembered_table(letters, x.device, x.dtype, levels, **options)


def _make_table(
    letters: Any,
    device: torch.device,
    dtype: torch.dtype,
    levels: tuple[float, ...] | Levels,
    *,
    prediction: str,
    clip: float | None,
    scale: float,
    **options: Any,
) -> Tensor:
    columns = [torch.as_tensor(level, dtype=torch.float64).reshape(-1) for level in levels]
    p, q = rows.to_x0(prediction, *columns[:2])
    values = letters(*columns, **options)
    return rows.make_table(len(p), p=p, q=q, w=scale, clip=check_clip(clip), **values).to(device, dtype)


_remembered_table = lru_cache(4096)(_make_table)


# ---- checks ---------------------------------------------------------------------------------


def _check_table(table: object, x: Tensor) -> Tensor:
    if not isinstance(table, Tensor):
        raise InputError(f"table must be a tensor, got {type(table).__name__}")
    shape = table.shape
    if len(shape) != 2 or shape[1] != COLUMNS or not shape[0]:
        raise InputError(f"table must be [R, {COLUMNS}], got {list(shape)}")
    if not table.is_floating_point():
        raise InputError(f"table must be floating-point, got {table.dtype}")
    if table.device != x.device:
        raise InputError(f"table must be on {x.device}, got {table.device}")
    return table if table.dtype is x.dtype and table.is_contiguous() else table.to(x.dtype).contiguous()


def _check_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """Check what a step reads; gives the table as the bodies take it."""
    check_state("x", x)
    check_output(output, x)
    table = _check_table(table, x)
    check_row(row, len(table), x)
    if uncond is not None:
        check_same("uncond", uncond, output)
    if not isinstance(history, tuple) or len(history) > 3:
        raise InputError(f"history must be a tuple of at most three vectors, got {type(history).__name__}")
    for i, vector in enumerate(history):
        check_same(f"h{i + 1}", vector, x)
    for name, value in (("anchor", anchor), ("noise", noise)):
        if value is not None:
            check_same(name, value, x)
    return table


def _results(
    x: Tensor, history: tuple[Tensor, ...], anchor: Tensor | None, keep_x0: bool, input_dtype: torch.dtype | None
) -> Step:
    return Step(
        empty_like(x),
        empty_like(x) if keep_x0 else None,
        (empty_like(x),) if history else (),
        None if anchor is None else empty_like(x),
        None if input_dtype is None else _input(x, input_dtype),
    )


def _input(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in FLOATS:
        raise InputError(f"input_dtype must be a floating-point dtype, got {dtype}")
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=format_of(x))


def _check_out(
    out: Step,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Tensor | None,
) -> None:
    if not isinstance(out, Step):
        raise InputError(f"out must be a Step of tensors, got {type(out).__name__}")
    if bool(out.history) != bool(history) or (out.anchor is None) != (anchor is None):
        raise InputError("out must hold history and anchor where the step is given them, and only there")
    pushed = out.history[0] if out.history else None
    results: tuple[tuple[str, Tensor | None, tuple[Tensor | None, ...]], ...] = (
        ("out.x", out.x, (x,)),
        ("out.x0", out.x0, ()),
        ("out.history", pushed, history),
        ("out.anchor", out.anchor, (anchor,)),
        ("out.input", out.input, ()),
    )
    check_floating("out.x", out.x)
    for name, result, _ in results:
        if result is not None:
            check_result(name, result, x, result.dtype if result is out.input else x.dtype)
    check_apart((x, output, table, uncond, *history, anchor, noise), results)
