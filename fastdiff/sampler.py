"""The one loop: run the rows of a solver's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import noise as noises
from fastdiff import ops
from fastdiff._progress import progress as show
from fastdiff.diffusion import Diffusion, Model
from fastdiff.errors import InputError, check
from fastdiff.guidance import ClassifierFree
from fastdiff.ops.checks import check_floating
from fastdiff.ops.row import LETTERS
from fastdiff.table import build_table


@dataclass(frozen=True)
class State:
    """What a row has left: after row ``step`` (from 0) at ``timestep``, the state ``x`` and the estimate ``x0``."""

    step: int
    timestep: float
    x: Tensor
    x0: Tensor


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
        guidance_interval: the lowest and highest sigma / alpha at which there is guidance (Kynkäänniemi et al. 2024);
            elsewhere the network is asked once. None for everywhere.
        strength: share of the steps that are taken, the last ones, in (0, 1]: how far an ``image`` is taken back to
            noise (SDEdit, Meng et al. 2022). Below 1 a call needs an ``image`` or ``x``.
        clip: bound of the estimate of x0 in every row, 1.0 for images in [-1, 1]; None for no bound.
        resample: ``(length, times)`` for inpainting: every ``length`` steps are taken ``times`` times, so that what is
            made fits what is known (RePaint, Lugmayr et al. 2022). Of ddpm, ddim, euler, euler_a and lcm.
        final: where a run ends: at ``zero`` noise, or ``minimal``, at that of the schedule's timestep 0.
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
        guidance_interval: Sequence[float] | None = None,
        strength: float = 1.0,
        resample: tuple[int, int] | None = None,
        final: str = "zero",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check(callable(model), f"model must be callable, got {type(model).__name__}")
        check(isinstance(diffusion, Diffusion), f"diffusion must be a Diffusion, got {type(diffusion).__name__}")
        check(dtype in (torch.float32, torch.float64), f"dtype must be float32 or float64, got {dtype}")
        self.model, self.diffusion, self.solver, self.dtype = model, diffusion, solver, dtype
        prepared = getattr(type(model), "prepared", None)  # of the model itself, not of what a wrapper passes on
        self._network: Any = prepared(model) if prepared else model
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = torch.device(device or ("cpu" if parameter is None else parameter.device))
        # The network gets its input in its own precision, the state keeps its own.
        self._input_dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else dtype
        valid = isinstance(strength, Real) and 0 < strength <= 1
        check(valid, f"strength must lie in (0, 1], got {strength!r}")
        timesteps = diffusion.schedule.timesteps(steps, spacing)
        self.strength, self.timesteps = strength, timesteps[-max(1, int(len(timesteps) * strength)) :]
        self.table = build_table(
            diffusion,
            self.timesteps,
            solver,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            clip=clip,
            final=final,
            resample=resample,
            **options,
        )
        self._table = self.table.tensor(self.device, dtype)
        wide = torch.promote_types(self._input_dtype, torch.float32)  # times have more digits than bf16
        self._times = self.table.times(self.device, wide)

    def __call__(
        self,
        shape: Sequence[int],
        *,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        x: Tensor | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        uncond: dict[str, Any] | None = None,
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
            uncond: the null condition, by the names of ``cond``; may be left out for models that know theirs.
            callback: called with the :class:`State` after each row.
            progress: show a progress bar on standard error.
            cond: what the model is given besides x and t, one row per sample.
        """
        check(callback is None or callable(callback), f"callback must be callable, got {type(callback).__name__}")
        state = None
        rows = self.iterate(shape, seed=seed, sample=sample, x=x, image=image, keep=keep, uncond=uncond, **cond)
        for state in show(rows, len(self.table), "sampling", enabled=progress):
            if callback is not None:
                callback(state)
        assert state is not None  # a table has at least one row
        return state.x

    def iterate(
        self,
        shape: Sequence[int],
        *,
        seed: noises.Seed = 0,
        sample: Sequence[int] | Tensor | None = None,
        x: Tensor | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        uncond: dict[str, Any] | None = None,
        **cond: Any,
    ) -> Iterator[State]:
        """Yield the :class:`State` after each row; arguments as in a call, checked before the first network call."""
        shape = self._check_shape(shape)
        self._check_conditions(shape[0], cond)
        noises.sample_ids(shape[0], seed, sample)
        guidance = ClassifierFree(self._network, cond, uncond)
        if (self.table.rows.w != 1).any():
            guidance.uncond  # noqa: B018 - raises now rather than at some row
        known = None if keep is None else self._known(shape, seed, sample, image, keep)
        if keep is not None and image is not None and self.strength == 1:
            image = torch.where(keep.to(image.device), image, 0.0)  # nothing is known of the rest
        start = self._start(shape, seed, sample, x, image)
        if self._network is not self.model:
            self._network.refresh(self.model)
        return self._run(start, guidance, seed, sample, known)

    @torch.no_grad()
    def _run(
        self,
        x: Tensor,
        guidance: ClassifierFree,
        seed: noises.Seed,
        sample: Sequence[int] | Tensor | None,
        known: Callable[[Tensor, int], Tensor] | None,
    ) -> Iterator[State]:
        rows, c_in = self.table.rows, LETTERS.index("c_in")
        step = ops.Step(
            x,
            history=tuple(torch.zeros_like(x) for _ in range(self.table.history)),
            anchor=torch.zeros_like(x) if self.table.anchored else None,
            input=(x * self._table[0, c_in]).to(self._input_dtype),
        )
        # The network is given the state itself, unless it is scaled or the network has another precision.
        input_dtype = None if self._input_dtype == self.dtype and (rows.c_in == 1).all() else self._input_dtype
        for i in range(len(rows)):
            x_in = step.x if step.input is None else step.input
            out, uncond = guidance.outputs(x_in, self._times[i].expand(len(x)), rows.w[i] != 1)
            self.diffusion.check_output(out, x)
            noisy = rows.s[i] != 0
            step = ops.affine_step(
                step.x,
                out,
                self._table,
                i,
                uncond=uncond,
                history=step.history,
                anchor=step.anchor,
                seed=seed if noisy else None,
                sample=sample if noisy else None,
                input_dtype=input_dtype if known is None else None,
            )
            if known is not None:
                x = known(step.x, i)
                after = min(i + 1, len(rows) - 1)
                step = step._replace(x=x, input=(x * self._table[after, c_in]).to(self._input_dtype))
            assert step.x0 is not None
            yield State(i, self.table.timesteps[i].item(), step.x, step.x0)

    def _known(
        self,
        shape: tuple[int, ...],
        seed: noises.Seed,
        sample: Sequence[int] | Tensor | None,
        image: Tensor | None,
        keep: Tensor,
    ) -> Callable[[Tensor, int], Tensor]:
        """What puts the image, with noise of the level after a row, where it is kept."""
        check(image is not None, "keep says where an image is kept: pass the image")
        assert image is not None
        check(
            isinstance(keep, Tensor) and keep.dtype == torch.bool, "keep must be a bool tensor, True where it is kept"
        )
        fits = keep.ndim <= len(shape) and all(n in (1, m) for n, m in zip(keep.shape[::-1], shape[::-1], strict=False))
        check(fits, f"keep must broadcast to {list(shape)}, got {list(keep.shape)}")
        kept, x0 = keep.to(self.device), image.to(self.device, self.dtype)
        alpha, sigma = (level.tolist() for level in self.table.after)

        def known(x: Tensor, row: int) -> Tensor:
            noise = noises.normal(
                shape,
                seed=seed,
                step=row,
                sample=sample,
                stream=noises.Stream.KNOWN,
                device=self.device,
                dtype=self.dtype,
            )
            return torch.where(kept, ops.add_noise(x0, alpha[row], sigma[row], noise), x)

        return known

    def _start(
        self,
        shape: tuple[int, ...],
        seed: noises.Seed,
        sample: Sequence[int] | Tensor | None,
        x: Tensor | None,
        image: Tensor | None,
    ) -> Tensor:
        """x at the first timestep: unit variance for variance-preserving schedules, sigma otherwise."""
        check(x is None or image is None, "give either x or image to start from")
        for name, given in (("x", x), ("image", image)):
            if given is not None:
                check_floating(name, given)
                check(given.shape == shape, f"{name} must have shape {list(shape)}, got {list(given.shape)}")
        if x is not None:
            return x.to(self.device, self.dtype)
        check(self.solver != "ddim_inverse", "ddim_inverse starts from images: pass them as x")
        check(image is not None or self.strength == 1, f"a run of strength {self.strength} starts from an image or x")
        stream = noises.Stream.INITIAL
        noise = noises.normal(shape, seed=seed, sample=sample, stream=stream, device=self.device, dtype=self.dtype)
        schedule, t = self.diffusion.schedule, int(self.timesteps[0])
        if image is not None:
            levels = float(schedule.alpha[t]), float(schedule.sigma[t])
            return ops.add_noise(image.to(self.device, self.dtype), *levels, noise)
        return noise if schedule.variance_preserving else noise * float(schedule.sigma[t])

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
