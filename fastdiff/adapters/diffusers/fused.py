"""What our schedulers share: diffusers' class of the same name, whose ``step`` is one row of a solver's table.

Configuration, files, timesteps, messages and whatever is not said here are the peer's own, by inheritance. A run is the
rows from the index where somebody begins; each thread has its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff import ops
from fastdiff.adapters.diffusers.per_thread import PerThread
from fastdiff.adapters.diffusers.tables import schedule_of
from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError, check
from fastdiff.likelihood import NO_SIGNAL
from fastdiff.ops import row as rows
from fastdiff.schedule import Schedule
from fastdiff.solvers import Grid, Letters

#: what a run changes in a scheduler of diffusers, so that each thread has its own
OF_A_RUN = (
    *("timesteps", "sigmas", "num_inference_steps", "custom_timesteps", "alphas_cumprod", "is_scale_input_called"),
    *("_step_index", "_begin_index", "model_outputs", "lower_order_nums", "timestep_list", "last_sample", "this_order"),
    *("prev_derivative", "dt", "sample", "derivatives", "prk_timesteps", "plms_timesteps", "_timesteps"),
    *("ets", "counter", "cur_sample", "cur_model_output", "_run"),
)
TABLES = 8  #: that a scheduler keeps
INTEGERS = (torch.int32, torch.int64)
TINY = 2.0**-24  #: diffusers' alpha-bar where there is no signal and a level is sigma / alpha
ANY = Schedule.linear(2)  # builders of rows that ask a grid for its schedule ask for a name that is not "flow"


@dataclass(frozen=True)
class Rows:
    """A solver's letters for the steps from an index on, and the levels at which the network is asked."""

    letters: Letters
    alpha: Tensor
    sigma: Tensor


@dataclass
class Run:
    """Rows on a device, and what the last one has left."""

    key: Any
    first: int
    table: Tensor
    dtype: torch.dtype  #: of what is given away
    noisy: list[bool]
    history: tuple[Tensor, ...]
    anchor: Tensor | None
    next: int
    eta: float = 0.0
    left: Tensor | None = None  #: in half precision: what was given away, at which version
    version: int = 0
    state: Tensor | None = None  #: the same in float32


class Fused:
    """Mixed in before a scheduler of diffusers.

    Args:
        strict_compat: diffusers' float32 tables, timesteps and strides to the last bit. By default tables are float64,
            rounded once, and what is wrong in diffusers is put right: see :mod:`fastdiff.adapters.diffusers`.
        The rest: the peer's.
    """

    output: ClassVar[Callable[..., Any]]  #: what ``step`` returns with ``return_dict``
    returns_x0: ClassVar[bool] = False
    casts: ClassVar[bool] = False  #: whether a step's result has the network's dtype and not the promoted one
    by_ratio: ClassVar[bool] = False  #: whether its levels are ``sigmas``
    takes_whole: ClassVar[bool] = True  #: whether a timestep may be a whole number, which Euler's refuse

    config: Any
    alphas_cumprod: Tensor
    betas: Tensor
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None
    _step_index: int | None
    _begin_index: int | None
    _run: Run | None
    _extra: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        if len(cls.__bases__) < 2:  # no scheduler yet
            return
        peer = cls.__bases__[1]
        for name in OF_A_RUN:
            setattr(cls, name, PerThread(name))
        strict = inspect.Parameter("strict_compat", inspect.Parameter.KEYWORD_ONLY, default=False)
        theirs = vars(peer)
        setattr(cls, "__init__", _as_in(theirs["__init__"], Fused._begin, strict))  # noqa: B010
        for name in ("set_timesteps", "step", "add_noise", "get_velocity"):
            if name in theirs:
                setattr(cls, name, _as_in(theirs[name], getattr(Fused, f"_{name}")))
        cls._extra = tuple(inspect.signature(theirs["step"]).parameters)[4:]

    # ---- the peer's methods, and what is put right -------------------------------------------

    def _begin(self, *args: Any, strict_compat: bool = False, **kwargs: Any) -> None:
        self._strict, self._exact, self._run = strict_compat, None, None
        super().__init__(*args, **kwargs)
        self.register_to_config(strict_compat=strict_compat)  # type: ignore[attr-defined]
        if not strict_compat and hasattr(self, "betas"):
            self._schedule = schedule_of(self.config)
            self._diffusion = Diffusion(self._schedule)
            self._exact = self._schedule.alpha**2
            if self.by_ratio:
                self._exact = self._exact.masked_fill(self._exact == 0, TINY)
            self.alphas_cumprod = self._exact.float()

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with self._exact_tables():
            super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self._run = None
        wanted = args[0] if args else kwargs.get("num_inference_steps")
        if not self._strict and wanted is not None and getattr(self.config, "timestep_spacing", "") == "trailing":
            self._without_more_than(wanted)

    def _without_more_than(self, steps: int) -> None:
        """Trailing timesteps of diffusers end in a -1 too many where a stride is no whole number."""
        count = int((self.timesteps >= 0).sum())
        if count < len(self.timesteps):
            self.timesteps, self.num_inference_steps = self.timesteps[:count], steps
            if self.by_ratio:
                self.sigmas = torch.cat((self.sigmas[:count], self.sigmas[-1:]))

    @contextmanager
    def _exact_tables(self) -> Iterator[None]:
        """Levels of a run are made of float64."""
        if self._exact is None:
            yield
            return
        kept, self.alphas_cumprod = self.alphas_cumprod, self._exact
        try:
            yield
        finally:
            self.alphas_cumprod = kept

    def _init_step_index(self, timestep: Any) -> None:
        """Where a run begins; of several equal timesteps the one that was given, where that can be seen."""
        place = None if self._strict or self._begin_index is not None else _place(timestep, self.timesteps)
        if place is None:
            super()._init_step_index(timestep)  # type: ignore[misc]
        else:
            self._step_index = place

    def _add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise, computed in float32 at least and rounded once to the samples' dtype."""
        if self._exact is None or self.by_ratio:
            dtype = original_samples.dtype
            wide = dtype if self._strict else torch.promote_types(dtype, torch.float32)
            given = original_samples.to(wide), noise.to(wide), timesteps
            noised: Tensor = super().add_noise(*given)  # type: ignore[misc]
            return noised.to(dtype)
        alpha, sigma = self._levels_at(timesteps, original_samples)
        return ops.add_noise(original_samples, alpha, sigma, noise.to(original_samples.dtype))

    def _get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x0 (Salimans & Ho 2022, appendix D), as noise is added."""
        if self._exact is None or self.by_ratio:
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc,no-any-return]
        alpha, sigma = self._levels_at(timesteps, sample)
        return ops.add_noise(noise.to(sample.dtype), alpha, -sigma, sample)

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._diffusion.levels(timesteps.long().expand(len(like)), like)

    # ---- a step ------------------------------------------------------------------------------

    def _step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **options: Any
    ) -> Any:
        options |= dict(zip(self._extra, args, strict=False))
        return_dict = options.pop("return_dict", return_dict)
        if unknown := options.keys() - set(self._extra):
            raise TypeError(f"step() got an unexpected keyword argument {', '.join(sorted(unknown))}")
        found = self._fused(model_output, timestep, sample, **options)
        if found is None:
            how = {**options, "return_dict": return_dict}
            return super().step(model_output, timestep, sample, **how)  # type: ignore[misc]
        return type(self).output(*found) if return_dict else found

    def _fused(
        self,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...] | None:
        """The results, or None where the peer has to answer: for what is rare, and with what is wrong."""
        refused = not self.takes_whole and _is_whole(timestep)
        if self.num_inference_steps is None or refused or not self._serves(**options):
            return None
        index = self._index(timestep)
        if index is None:
            return None
        key = (sample.device, sample.dtype, output.dtype, sample.shape, *options.items())
        run = self._run
        if run is None or run.key != key or not self._continues(run, index):
            run = self._run = self._run_from(index, key, sample, output, options)
        row = 0 if run is None else index - run.first
        if run is None or row >= len(run.noisy):
            return None
        noise = variance_noise if variance_noise is not None else self._drawn(run, row, output, generator)
        x = run.state if sample is run.left and sample._version == run.version else _as(sample, run.table)
        assert x is not None
        made = self._row(run, row, x, output, None if noise is None else _as(noise, run.table))
        run.history, run.anchor, run.next = made.history, made.anchor, index + 1
        self._passed()
        return self._given_away(run, made)

    def _row(self, run: Run, row: int, x: Tensor, output: Tensor, noise: Tensor | None) -> ops.Step:
        table, history = run.table, self._stored(run, x, output)
        if getattr(self.config, "thresholding", False):
            output, table = self._thresholded(table[row], x, output)
            row = 0
        stored: dict[str, Any] = {"history": history, "anchor": run.anchor}
        return ops.affine_step(x, output, table, row, **stored, noise=noise, keep_x0=self.returns_x0)

    def _given_away(self, run: Run, made: ops.Step) -> tuple[Tensor, ...]:
        """In the peer's dtypes. What was rounded to half precision goes on unrounded, if it comes back as it is."""
        if run.dtype == made.x.dtype:
            return (made.x, made.x0) if made.x0 is not None else (made.x,)
        given = made.x.to(run.dtype)
        if not self._strict:
            run.left, run.version, run.state = given, given._version, made.x
        return (given, made.x0.to(run.dtype)) if made.x0 is not None else (given,)

    def _run_from(self, index: int, key: Any, sample: Tensor, output: Tensor, options: dict[str, Any]) -> Run | None:
        """Rows that are no numbers are an error; what diffusers makes of them is for the strict mode to repeat."""
        try:
            letters = self._table(index, tuple(options.items()))
        except InputError:
            if self._strict:
                return None
            raise
        dtype = torch.promote_types(sample.dtype, torch.float32)
        table = letters.to(sample.device, dtype)
        column = dict(zip(rows.LETTERS, letters.unbind(1), strict=True))
        used = [number for number in (1, 2, 3) if bool(column[f"c{number}"].any())]
        blank = torch.zeros(sample.shape, dtype=dtype, device=sample.device)
        history = tuple(blank for _ in range(max(used, default=0)))
        anchor = blank if bool(column["e"].any()) else None
        given = output.dtype if self.casts else torch.promote_types(sample.dtype, output.dtype)
        noisy = (column["s"] != 0).tolist()
        return Run(key, index, table, given, noisy, history, anchor, index, float(options.get("eta", 0)))

    def _table(self, index: int, options: tuple[tuple[str, Any], ...]) -> Tensor:
        """The rows from an index on, float64; those of the latest runs are kept."""
        levels = self.sigmas if self.by_ratio else self.timesteps
        key = index, options, tuple(levels.tolist()), self.num_inference_steps
        kept: dict[Any, Tensor] = self.__dict__.setdefault("_tables", {})
        table = kept.get(key)
        if table is None:
            found = self._rows(index, **dict(options))
            p, q = rows.to_x0(self._prediction, found.alpha, found.sigma)
            check(torch.isfinite(p).all(), NO_SIGNAL)
            table = kept[key] = rows.make_table(len(p), p=p, q=q, clip=self._clip, **found.letters)
            for oldest in list(kept)[:-TABLES]:
                kept.pop(oldest, None)
        return table

    def _thresholded(self, letters: Tensor, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x0 after dynamic thresholding (Saharia et al. 2022) for an output, and a row that takes it."""
        p, q = (letters[rows.LETTERS.index(letter)] for letter in "pq")
        x0 = self._threshold_sample(p * x + q * output[:, : x.shape[1]].to(x.dtype))  # type: ignore[attr-defined]
        changed = letters.clone()
        for letter, value in (("p", 0.0), ("q", 1.0), ("clip", torch.inf)):
            changed[rows.LETTERS.index(letter)] = value
        return torch.cat((x0, output[:, x.shape[1] :].to(x.dtype)), 1), changed[None]

    def _drawn(self, run: Run, row: int, output: Tensor, generator: Any) -> Tensor | None:
        """Noise from torch's generators, where the peer draws it too."""
        if not self._draws(run, row):
            return None
        shape = (len(output), *run.key[3][1:])
        drawn: Tensor = randn_tensor(shape, generator=generator, device=output.device, dtype=self._noise_dtype(output))
        return drawn

    # ---- what a scheduler says of itself ------------------------------------------------------

    def _rows(self, first: int, **options: Any) -> Rows:
        """The rows from an index on."""
        raise NotImplementedError

    def _serves(self, **options: Any) -> bool:
        """Whether rows can say what is asked."""
        return True

    def _stored(self, run: Run, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """The vectors that a row is given beside x and the output."""
        return run.history

    def _draws(self, run: Run, row: int) -> bool:
        return run.noisy[row]

    def _noise_dtype(self, output: Tensor) -> torch.dtype:
        return output.dtype

    def _continues(self, run: Run, index: int) -> bool:
        """Whether a run has come to this index, or remembers nothing that would be wrong there."""
        return run.next == index or (not run.history and run.anchor is None and index >= run.first)

    def _index(self, timestep: Any) -> int | None:
        """The number of the step; None for a timestep that is none of the run's."""
        if self._step_index is None:
            self._init_step_index(timestep)
        return self._step_index

    def _passed(self) -> None:
        assert self._step_index is not None
        self._step_index += 1

    @property
    def _prediction(self) -> str:
        return str(self.config.prediction_type)

    @property
    def _clip(self) -> float:
        clips = getattr(self.config, "clip_sample", False) and not getattr(self.config, "thresholding", False)
        return float(self.config.clip_sample_range) if clips else torch.inf


class ByTimestep(Fused):
    """Steps of a scheduler that finds its place by the timestep alone."""

    def _index(self, timestep: Any) -> int | None:
        place = _place(timestep, self.timesteps)
        if place is None:
            found = (self.timesteps == timestep).nonzero()
            place = int(found[0]) if len(found) == 1 else None
        return place

    def _passed(self) -> None:
        pass

    def _levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma by timestep, float64: exact, or of the peer's float32 tables."""
        if not self._strict:
            return self._schedule.alpha, self._schedule.sigma
        bars = self.alphas_cumprod.double().cpu()
        return bars.sqrt(), (1 - bars).sqrt()

    def _grid(self, t: Tensor, end: tuple[float, float]) -> Grid:
        """The levels of these timesteps, and where they end; ``t`` are their numbers."""
        columns = [
            torch.cat((table[t], table.new_tensor([last]))) for table, last in zip(self._levels(), end, strict=True)
        ]
        return Grid(columns[0], columns[1], torch.arange(len(t) + 1).double(), ANY)


class ByRatio(Fused):
    """Steps of a scheduler whose levels are ``sigmas``, that is sigma / alpha."""

    by_ratio = True

    def _grid(self, first: int, *, preserving: bool) -> Grid:
        """The levels from an index on, ``t`` their numbers; of a variance-preserving state, or with alpha = 1."""
        ratio = self.sigmas.double().cpu()[first:]
        alpha = torch.ones_like(ratio)
        if getattr(self.config, "use_flow_sigmas", False):
            alpha = 1 - ratio
        elif preserving:
            alpha = (1 + ratio**2).rsqrt()
            ratio = ratio * alpha
        return Grid(alpha, ratio, torch.arange(len(ratio)).double(), ANY)

    def _of_grid(self, grid: Grid, letters: Letters) -> Rows:
        at = letters.pop("t", grid.t[:-1]).long()
        letters.pop("step", None)
        return Rows(letters, grid.alpha[at], grid.sigma[at])


def without_last(letters: Letters, other: Letters) -> Letters:
    """The letters, with the last row of others."""
    names = letters.keys() | other.keys()
    zeros = torch.zeros_like(letters["a"])
    return {name: torch.cat((letters.get(name, zeros)[:-1], other.get(name, zeros)[-1:])) for name in names}


def _as(x: Tensor, like: Tensor) -> Tensor:
    """On the device and in the dtype of the rows."""
    return x if x.dtype == like.dtype and x.device == like.device else x.to(like.device, like.dtype)


def _is_whole(timestep: Any) -> bool:
    return isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in INTEGERS)


def _place(timestep: Any, timesteps: Tensor) -> int | None:
    """Which of the timesteps a tensor is, where it is a view of them: to look at its value would wait for a GPU."""
    if not isinstance(timestep, Tensor) or timestep.ndim or not timesteps.numel():
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (int(timestep.storage_offset()) - int(timesteps.storage_offset())) // timesteps.stride(0)


def _as_in(peer: Callable[..., Any], own: Callable[..., Any], *more: inspect.Parameter) -> Callable[..., Any]:
    """``own`` with the signature of the peer's method, which pipelines look at, and its docstring."""

    @functools.wraps(peer)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    given = inspect.signature(peer)
    method.__signature__ = given.replace(parameters=[*given.parameters.values(), *more])  # type: ignore[attr-defined]
    return method
