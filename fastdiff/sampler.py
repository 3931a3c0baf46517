"""The sampler: what a user asks for, checked, and run by the one loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import graph as graphs
from fastdiff import noise as noises
from fastdiff import ops
from fastdiff._progress import progress as show
from fastdiff.diffusion import Diffusion, Model, inference_form, precision_of
from fastdiff.errors import InputError, check
from fastdiff.guidance import ClassifierFree, Conditions, Guidance
from fastdiff.loop import Columns, Given, Kind, Loop, Memory, Rows
from fastdiff.ops.checks import check_floating, check_row, check_same
from fastdiff.table import build_table


@dataclass(frozen=True)
class State:
    """What a row has left: after row ``step`` (from 0) at ``timestep``, the state ``x`` and the estimate ``x0``."""

    step: int
    timestep: float
    x: Tensor
    x0: Tensor


class Recorder:
    """Keeps every so many-th state of a run in a ring of memory on the device, which nothing waits for.

    Args:
        every: 1 for each row, 5 for rows 4, 9, 14 ...
        what: ``x`` or ``x0``.
        capacity: most states kept, the last ones; None for all.

    Attributes:
        steps: the rows of the last run that are kept.

    Raises:
        InputError: numbers below 1, another ``what``.
    """

    def __init__(self, every: int = 1, what: str = "x", capacity: int | None = None) -> None:
        for name, value in (("every", every), ("capacity", 1 if capacity is None else capacity)):
            check(isinstance(value, int) and value >= 1, f"{name} must be a whole number of at least 1, got {value!r}")
        check(what in ("x", "x0"), f"what must be x or x0, got {what!r}")
        self.every, self.what, self.capacity = every, what, capacity
        self.steps: list[int] = []
        self._ring: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """``[len(steps), N, C, ...]``, in the order of the rows.

        Raises:
            InputError: nothing has been recorded.
        """
        if self._ring is None or not self.steps:
            raise InputError("nothing is recorded: pass the recorder to a sampler, record=recorder")
        first = (self.steps[0] + 1) // self.every - 1
        return self._ring[: len(self.steps)].roll(-(first % len(self._ring)), 0)

    def begin(self, rows: int, x: Tensor) -> None:
        """Make room for a run of so many rows of states like x."""
        size = min(rows // self.every, self.capacity or rows)
        self._ring, self.steps = x.new_empty((size, *x.shape)), []

    def take(self, row: int, memory: Memory) -> None:
        if (row + 1) % self.every or self._ring is None:
            return
        state = memory.x if self.what == "x" else memory.x0
        assert state is not None
        self._ring[((row + 1) // self.every - 1) % len(self._ring)].copy_(state)
        self.steps = [*self.steps, row][-len(self._ring) :]


class Sampler:
    """Draws samples from a model.

    Args:
        model: any callable ``model(x, t, **cond)`` that returns a tensor or an object with ``.sample``. A module
            is used as it is: call ``.eval()`` on it if it has dropout. A network that has a form for inference, as
            :class:`fastdiff.UNet` has, is used in that, with the weights it has when a call begins; calls that are
            still running take those too.
        diffusion: schedule, prediction type and variance the model was trained with.
        solver: one of :data:`fastdiff.solvers.SOLVERS`, where each says what it is: ``ddpm`` | ``ddim`` | ``euler`` |
            ``euler_a`` | ``lcm`` | ``heun`` | ``edm`` | ``dpm2`` | ``dpmpp_2s`` | ``dpmpp_sde`` | ``dpmpp_2m`` |
            ``dpmpp_2m_sde`` | ``dpmpp_3m`` | ``dpmpp_3m_true`` | ``unipc`` | ``deis`` | ``lms`` | ``pndm``; and
            ``ddim_inverse``, from an image ``x`` to its noise.
        steps: how many, 1 ... T, or the timesteps themselves in descending order.
        spacing: ``trailing`` | ``leading`` | ``linspace`` | ``karras`` | ``exponential`` | ``beta``.
        guidance_scale: s of uncond + s (cond - uncond); 1 is the conditional model alone, the paper's w is
            s - 1 (Ho & Salimans 2022, eq. 6). One, or one for each step.
        clip: bound of the estimate of x0 in every row, 1.0 for images in [-1, 1]; None for no bound.
        guidance: what the scale is the scale of: :class:`~fastdiff.guidance.ClassifierFree`,
            :class:`~fastdiff.guidance.AutoGuidance` or :class:`~fastdiff.guidance.ClassifierGuidance`.
        guidance_interval: the lowest and highest sigma / alpha at which there is guidance (Kynkäänniemi et al. 2024);
            elsewhere the network is asked once. None for everywhere.
        threshold: the quantile of dynamic thresholding (Saharia et al. 2022), 0.995 say; ``clip`` is then its bound.
        strength: share of the steps that are taken, the last ones, in (0, 1]: how far an ``image`` is taken back to
            noise (SDEdit, Meng et al. 2022). Below 1 a call needs an ``image`` or ``x``.
        resample: ``(length, times)`` for inpainting: every ``length`` steps are taken ``times`` times, so that what is
            made fits what is known (RePaint, Lugmayr et al. 2022). Of ddpm, ddim, euler, euler_a and lcm.
        final: where a run ends: at ``zero`` noise, or ``minimal``, at that of the schedule's timestep 0.
        graph: whether rows on a GPU are captured as CUDA graphs, see :mod:`fastdiff.graph`.
        dtype: of the state, float32, or float64 for the reference in float64.
        device: default, where the model's first parameter is.
        options: the solver's own, for instance ``eta=0.5`` for ddim.

    A sampler holds no state between calls: threads may share it. ``sampler.table.rows`` are its float64 rows.

    Raises:
        InputError: unknown names, steps outside 1 ... T, options the solver does not have.
    """

    def __init__(
        self,
        model: Model,
        diffusion: Diffusion,
        solver: str = "ddim",
        steps: int | Sequence[int] | Tensor = 50,
        spacing: str = "trailing",
        guidance_scale: float | Sequence[float] = 1.0,
        clip: float | None = None,
        *,
        guidance: Guidance = ClassifierFree(),  # noqa: B008 - it holds nothing
        guidance_interval: Sequence[float] | None = None,
        threshold: float | None = None,
        strength: float = 1.0,
        resample: tuple[int, int] | None = None,
        final: str = "zero",
        graph: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check(callable(model), f"model must be callable, got {type(model).__name__}")
        check(isinstance(diffusion, Diffusion), f"diffusion must be a Diffusion, got {type(diffusion).__name__}")
        check(isinstance(guidance, Guidance), f"guidance must be a Guidance, got {type(guidance).__name__}")
        check(dtype in (torch.float32, torch.float64), f"dtype must be float32 or float64, got {dtype}")
        _check_share("strength", strength)
        if threshold is not None:
            _check_share("threshold", threshold)
            check(clip is not None, "threshold needs clip, the least that values are clamped to: 1.0 for images")
        self.model, self.diffusion, self.solver, self.dtype, self.graph = model, diffusion, solver, dtype, graph
        timesteps = diffusion.schedule.timesteps(steps, spacing)
        self.strength, self.timesteps = strength, timesteps[-max(1, int(len(timesteps) * strength)) :]
        self.table = build_table(
            diffusion,
            self.timesteps,
            solver,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            off=guidance.off,
            clip=clip,
            final=final,
            resample=resample,
            **options,
        )
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = torch.device(device or ("cpu" if parameter is None else parameter.device))
        # The network gets its input in its own precision, the state keeps its own.
        of_network = precision_of(model) or dtype
        rows = self.table.rows
        self._loop = Loop(
            inference_form(model),
            diffusion,
            guidance,
            of_network,
            self.table.history,
            self.table.anchored,
            scaled=of_network != dtype or bool((rows.c_in != 1).any()),
            threshold=None if threshold is None else (threshold, float(clip or 0)),
            shift_mean=guidance.by_gradient and solver == "ddpm" and resample is None,
        )
        self._columns = self._make_columns(torch.promote_types(of_network, torch.float32))
        self._scaled, self._inside = (rows.w != guidance.off).tolist(), self.table.inside.tolist()
        self._noisy, self._timesteps = (rows.s != 0).tolist(), self.table.timesteps.tolist()

    def __call__(
        self,
        shape: Sequence[int],
        *,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        x: Tensor | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        guidance_scale: Tensor | float | None = None,
        uncond: dict[str, Any] | None = None,
        record: Recorder | None = None,
        callback: Callable[[State], object] | None = None,
        progress: bool = False,
        **cond: Any,
    ) -> Tensor:
        """Draw samples of ``shape`` ``[N, C, ...]``; returns them in the sampler's dtype.

        Their noise does not depend on the batch, bit for bit; the network's own rounding may.

        Args:
            seed: one for the batch, or one per sample; the noise of sample k of a seed is the same in any batch.
            sample: ids of the samples, default 0 ... N-1: to draw samples 64 ... 127 of a seed, pass those ids.
            x: the state to start from instead of the seed's noise, shape ``shape``.
            image: an x0 to start from, noised to the level of the first step, shape ``shape``.
            keep: where the ``image`` is kept and the rest is made to fit (inpainting, Song et al. 2021, appendix I.2):
                bool, broadcast to ``shape``. There each row is given the image with noise of its level, and in the end
                the image.
            guidance_scale: in place of the sampler's in all rows of its interval: one, or one per sample ``[N]``.
            uncond: the null condition, by the names of ``cond``; may be left out for models that know theirs.
            record: what keeps states of the run.
            callback: called with the :class:`State` after each row.
            progress: show a progress bar on standard error.
            cond: what the model is given besides x and t, one row per sample.
        """
        check(callback is None or callable(callback), f"callback must be callable, got {type(callback).__name__}")
        check(record is None or isinstance(record, Recorder), f"record must be a Recorder, got {type(record).__name__}")
        given = self._given(shape, seed, sample, x, image, keep, guidance_scale, uncond, cond)
        keep_x0 = callback is not None or (record is not None and record.what == "x0")
        if record is not None:
            record.begin(len(self.table), given.x)
        for row, memory in show(
            self._run(given, keep_x0, callback is not None), len(self.table), "sampling", enabled=progress
        ):
            if record is not None:
                record.take(row, memory)
            if callback is not None:
                callback(self._state(row, memory))
            if row == len(self.table) - 1:  # before the memory goes back
                result = memory.x.clone()
        return result

    def iterate(
        self,
        shape: Sequence[int],
        *,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        x: Tensor | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        guidance_scale: Tensor | float | None = None,
        uncond: dict[str, Any] | None = None,
        **cond: Any,
    ) -> Iterator[State]:
        """Yield the :class:`State` after each row; arguments as in a call, checked before the first network call."""
        given = self._given(shape, seed, sample, x, image, keep, guidance_scale, uncond, cond)
        return (self._state(row, memory) for row, memory in self._run(given, keep_x0=True, pauses=True))

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        row: int | Tensor,
        *,
        history: Sequence[Tensor] = (),
        anchor: Tensor | None = None,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        guidance_scale: Tensor | float | None = None,
        uncond: dict[str, Any] | None = None,
        **cond: Any,
    ) -> ops.Step:
        """Run one row, or another one for each sample: for loops of one's own, in which samples come and go.

        Args:
            x: state ``[N, C, ...]``.
            row: 0 ... R-1, or int64 ``[N]`` on x's device.
            history, anchor: what the step before left, as many as ``table.history`` and ``table.anchored`` say; left
                out in a first row.
            The rest: as in a call.

        Returns:
            New tensors: ``x``, ``x0``, and ``history`` and ``anchor`` for the next step.

        Raises:
            InputError: as a call; a row out of range, another number of vectors.
        """
        given = self._given(x.shape, seed, sample, x, None, None, guidance_scale, uncond, cond)
        check_row(row, len(self.table), given.x)
        fits = len(history) in (0, self.table.history) and (anchor is None or self.table.anchored)
        check(fits, f"this solver keeps {self.table.history} vectors of history and anchor={self.table.anchored}")
        for name, vector in (*(("history", h) for h in history), ("anchor", anchor)):
            if vector is not None:
                check_same(name, vector, given.x)
        memory = self._loop.memory(given, keep_x0=True)
        self._loop.start(given, memory, row)
        for own, vector in zip(memory.history, history, strict=False):
            own.copy_(vector)
        if memory.anchor is not None and anchor is not None:
            memory.anchor.copy_(anchor)
        kinds = self._kinds(given) if isinstance(row, Tensor) else self._kinds(given)[row : row + 1]
        kind = Kind(any(kind.guided for kind in kinds), any(kind.noisy for kind in kinds), 0)
        self._loop.run(given, memory, row, kind)
        return ops.Step(memory.x, memory.x0, memory.history[-1:] + memory.history[:-1], memory.anchor)

    def teardown(self) -> None:
        """Give back what the CUDA graphs of this sampler's network hold on the GPU."""
        graphs.teardown(self._loop.network)

    # ---- a run ------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, given: Given, keep_x0: bool, pauses: bool) -> Iterator[tuple[int, Memory]]:
        """Yield the memory after each row. ``pauses``: whoever takes them may take his time."""
        kinds = self._kinds(given)
        captured = self.graph and graphs.serves(self.device)
        rows: AbstractContextManager[Any] = (
            graphs.rows(self._loop, given, kinds, keep_x0, pauses)
            if captured
            else nullcontext(Rows(self._loop, given, keep_x0))
        )
        with rows as running:
            for row, kind in enumerate(kinds):
                running.run(row, kind)
                yield row, running.memory

    def _kinds(self, given: Given) -> list[Kind]:
        asked = self._scaled if given.scale is None else self._inside
        turns = max(self.table.history, 1)
        return [
            Kind(guided, noisy, row % turns) for row, (guided, noisy) in enumerate(zip(asked, self._noisy, strict=True))
        ]

    def _state(self, row: int, memory: Memory) -> State:
        assert memory.x0 is not None
        return State(row, self._timesteps[row], memory.x.clone(), memory.x0.clone())

    def _make_columns(self, time_dtype: torch.dtype) -> Columns:
        """Times have more digits than bf16."""
        table, (alpha, sigma) = self.table, (self.table.alpha[:-1], self.table.sigma[:-1])
        c_in, q = table.column("c_in"), table.column("q")
        # Where there is no signal, no condition shows.
        push = torch.where(alpha > 0, c_in * sigma**2 / (alpha * q), 0.0)
        following = torch.cat((c_in[1:], c_in[-1:]))
        numbers = (v.to(self.device, self.dtype) for v in (table.alpha[1:], table.sigma[1:], following, push))
        return Columns(table.tensor(self.device, self.dtype), table.times(self.device, time_dtype), *numbers)

    # ---- what a run is given ----------------------------------------------------------------

    def _given(
        self,
        shape: Sequence[int],
        seed: noises.Seed,
        sample: Sequence[int] | Tensor | None,
        x: Tensor | None,
        image: Tensor | None,
        keep: Tensor | None,
        guidance_scale: Tensor | float | None,
        uncond: dict[str, Any] | None,
        cond: dict[str, Any],
    ) -> Given:
        shape = self._check_shape(shape)
        self._check_conditions(shape[0], cond)
        place = noises.address(shape[0], self.device, seed=seed, sample=sample)
        scale = None if guidance_scale is None else self._scale(guidance_scale, shape[0])
        guided = any(self._scaled if scale is None else self._inside)
        network: Any = self._loop.network
        guidance = self._loop.guidance
        alone = Conditions(guidance.alone(cond))
        conditions = guidance.conditions(network, shape[0], cond, uncond) if guided else alone
        if keep is not None:
            image = self._check_keep(shape, image, keep)
        start = self._start(shape, place, x, self._to_start_from(image, keep))
        if network is not self.model:
            network.refresh(self.model)
        kept = (None, None) if keep is None else (image, keep.to(self.device))
        return Given(start, self._columns, place, conditions, scale, *kept)

    def _scale(self, scale: Tensor | float, n: int) -> Tensor:
        """A scale for each sample; one on the device is not looked at, which would wait for it."""
        try:
            scales = torch.as_tensor(scale, dtype=self.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"guidance_scale must be a number or one per sample: {error}") from None
        fits = scales.ndim == 0 or scales.shape == (n,)
        check(fits, f"guidance_scale must be one or one per sample ({n}), got {list(scales.shape)}")
        finite = scales.device.type != "cpu" or bool(scales.isfinite().all())
        check(finite, f"guidance_scale must be finite, got {scale}")
        return scales.to(self.device).expand(n)

    def _check_keep(self, shape: tuple[int, ...], image: Tensor | None, keep: Tensor) -> Tensor:
        """The image that is kept somewhere, on the device."""
        if image is None:
            raise InputError("keep says where an image is kept: pass the image")
        self._check_state("image", image, shape)
        mask = isinstance(keep, Tensor) and keep.dtype == torch.bool
        check(mask, "keep must be a bool tensor, True where the image is kept")
        fits = keep.ndim <= len(shape) and all(n in (1, m) for n, m in zip(keep.shape[::-1], shape[::-1], strict=False))
        check(fits, f"keep must broadcast to {list(shape)}, got {list(keep.shape)}")
        return image.to(self.device, self.dtype)

    def _to_start_from(self, image: Tensor | None, keep: Tensor | None) -> Tensor | None:
        """The image, or as much of it as is known where a run begins at full noise."""
        if image is None or keep is None or self.strength < 1:
            return image
        return torch.where(keep.to(image.device), image, 0.0)

    def _start(self, shape: tuple[int, ...], place: noises.Address, x: Tensor | None, image: Tensor | None) -> Tensor:
        """x at the first timestep: unit variance for variance-preserving schedules, sigma otherwise."""
        check(x is None or image is None, "give either x or image to start from")
        for name, given in (("x", x), ("image", image)):
            if given is not None:
                self._check_state(name, given, shape)
        if x is not None:
            return x.to(self.device, self.dtype)
        check(self.solver != "ddim_inverse", "ddim_inverse starts from images: pass them as x")
        check(image is not None or self.strength == 1, f"a run of strength {self.strength} starts from an image or x")
        noise = noises.at(shape, place._replace(stream=noises.Stream.INITIAL), self.device, self.dtype)
        schedule, t = self.diffusion.schedule, int(self.timesteps[0])
        if image is not None:
            levels = float(schedule.alpha[t]), float(schedule.sigma[t])
            return ops.add_noise(image.to(self.device, self.dtype), *levels, noise)
        return noise if schedule.variance_preserving else noise * float(schedule.sigma[t])

    def _check_state(self, name: str, given: object, shape: tuple[int, ...]) -> None:
        check_floating(name, given)
        assert isinstance(given, Tensor)
        check(given.shape == shape, f"{name} must have shape {list(shape)}, got {list(given.shape)}")

    def _check_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        valid = len(sizes) >= 2 and all(isinstance(n, int) and n >= 1 for n in sizes)
        check(valid, f"shape must be [N, C, ...] of sizes of at least 1, got {shape}")
        return sizes

    def _check_conditions(self, n: int, cond: dict[str, Any]) -> None:
        for name, value in cond.items():
            if not isinstance(value, Tensor):
                continue
            if value.ndim and len(value) != n:
                raise InputError(f"condition {name} must hold one row per sample ({n}), got {list(value.shape)}")
            here = value.device.type == self.device.type
            check(here, f"condition {name} must be on {self.device}, got {value.device}")


def _check_share(name: str, value: object) -> None:
    check(isinstance(value, Real) and 0 < float(value) <= 1, f"{name} must lie in (0, 1], got {value!r}")
