"""The schedulers: for each of diffusers' one class, which says what its rows are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_lms_discrete,
)
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff import solvers
from fastdiff.adapters.diffusers.fused import ANY, ByRatio, ByTimestep, Fused, Rows, Run, without_last
from fastdiff.ops import Step
from fastdiff.ops import row as rows
from fastdiff.ops.step import posterior_letters
from fastdiff.solvers import Grid, Letters

FEW = 15  #: diffusers ends runs of fewer steps with lower orders

# ---- schedulers that find their place by the timestep -----------------------------------------


class DDPMScheduler(ByTimestep, diffusers.DDPMScheduler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2)."""

    output = scheduling_ddpm.DDPMSchedulerOutput
    returns_x0 = True
    VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")

    def _fused(self, output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> tuple[Tensor, ...] | None:
        if self.num_inference_steps is None and not getattr(self, "custom_timesteps", False):
            return None  # by single timesteps, without a run
        return super()._fused(output, timestep, sample, **options)

    def _serves(self, **options: Any) -> bool:
        wrong = self._strict and self.config.variance_type == "fixed_large_log"
        return self.config.variance_type in self.VARIANCES and not wrong

    def _rows(self, first: int, **options: Any) -> Rows:
        t = self.timesteps.cpu()[first:]
        alpha, sigma = self._levels()
        after = torch.cat((alpha[t[1:]], torch.ones(1, dtype=torch.float64)))
        left = torch.cat((sigma[t[1:]], torch.zeros(1, dtype=torch.float64)))
        steps = alpha[t], sigma[t], after, left
        variance = self.config.variance_type.removesuffix("_log")
        letters = posterior_letters(*steps, variance=variance)
        if self._strict and t[-1] > 0:
            _noise_at_the_end(letters, variance, steps)
        return Rows(letters, alpha[t], sigma[t])


def _noise_at_the_end(letters: Letters, variance: str, steps: tuple[Tensor, ...]) -> None:
    """diffusers adds noise to the clean end too, where the last timestep is not 0, of a variance of at least 1e-20."""
    large = rows.forward_variance(*steps)[-1]
    if variance == "learned_range":
        letters["s"][-1], letters["lo"][-1], letters["hi"][-1] = 1, torch.tensor(1e-20).log(), large.log()
    else:
        letters["s"][-1] = 1e-10 if variance == "fixed_small" else large.sqrt()


class DDIMScheduler(ByTimestep, diffusers.DDIMScheduler):
    """DDIM (Song et al. 2021, eq. 12). The direction is that of the network's own noise, not that of a clipped x0,
    unless ``use_clipped_model_output`` says so.
    """

    output = scheduling_ddim.DDIMSchedulerOutput
    returns_x0 = True

    def _serves(self, *, eta: float = 0.0, **options: Any) -> bool:
        return 0 <= eta <= 1

    def _rows(self, first: int, *, eta: float = 0.0, use_clipped_model_output: bool = False, **options: Any) -> Rows:
        t = self.timesteps.cpu()[first:]
        levels = self._levels()
        alpha, sigma = (table[t] for table in levels)
        after, left = self._following(t, *levels)
        a, b, s = rows.ddim(alpha, sigma, after, left, eta)
        bounded = self.config.thresholding or self.config.clip_sample
        if not bounded or use_clipped_model_output:
            return Rows({"a": a, "b": b, "s": s}, alpha, sigma)
        way = (left**2 - s**2).clamp(min=0).sqrt()
        of_x, of_output = _noise_of(self._prediction, alpha, sigma)
        return Rows({"a": way * of_x, "b": after, "c1": way * of_output, "s": s}, alpha, sigma)

    def _following(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The levels after each timestep's step: diffusers goes back by T // N, whatever the next timestep is."""
        one = self.config.set_alpha_to_one
        end = (1.0, 0.0) if one else (float(alpha[0]), float(sigma[0]))
        assert self.num_inference_steps is not None
        back = t - self.config.num_train_timesteps // self.num_inference_steps
        following = back if self._strict else torch.cat((t[1:], torch.tensor([-1])))
        at = following.clamp(min=0)
        return tuple(  # type: ignore[return-value]
            torch.where(following >= 0, table[at], last) for table, last in zip((alpha, sigma), end, strict=True)
        )

    def _draws(self, run: Run, row: int) -> bool:
        return run.eta > 0  # also for the last step, which adds nothing of it

    def _stored(self, run: Run, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        return (output[:, : x.shape[1]].to(x.dtype),) if run.history else ()


def _noise_of(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What x and the output are multiplied by in the noise that the output stands for."""
    if prediction == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    return (sigma, alpha) if prediction == "v_prediction" else (1 / sigma, -alpha / sigma)


class PNDMScheduler(ByTimestep, diffusers.PNDMScheduler):
    """PNDM by its linear multistep form (Liu et al. 2022), with ``skip_prk_steps``; else diffusers' own step."""

    output = SchedulerOutput
    counter: int

    def _serves(self, **options: Any) -> bool:
        t, stride = self._once(), self.config.num_train_timesteps // (self.num_inference_steps or 1)
        chained = bool((-t.diff() == stride).all() and t[-1] < stride)
        told = self._prediction == "epsilon"  # else diffusers averages outputs of several levels
        return bool(self.config.skip_prk_steps) and ((chained and told) or not self._strict)

    def _once(self) -> Tensor:
        """The timesteps, of which diffusers' have the second twice."""
        t = self.timesteps.cpu()
        return torch.cat((t[:1], t[2:]))

    def _index(self, timestep: Any) -> int | None:
        """Its steps are counted; a run that begins elsewhere than at its first timestep is diffusers'."""
        if self._run is None and (self.counter > 0 or timestep != self.timesteps[0]):
            return None
        return self.counter

    def _passed(self) -> None:
        self.counter += 1

    def _rows(self, first: int, **options: Any) -> Rows:
        alpha, sigma = self._levels()
        end = (1.0, 0.0) if self.config.set_alpha_to_one else (float(alpha[0]), float(sigma[0]))
        grid = self._grid(self._once(), end)
        letters = solvers.pndm(grid)
        at = letters.pop("t").long()
        return Rows(letters, grid.alpha[at], grid.sigma[at])


# ---- schedulers that count their steps ---------------------------------------------------------


class EulerDiscreteScheduler(ByRatio, diffusers.EulerDiscreteScheduler):
    """Euler's method on the probability-flow ODE (Karras et al. 2022); with churn diffusers' own step."""

    output = scheduling_euler_discrete.EulerDiscreteSchedulerOutput
    takes_whole = False
    returns_x0 = casts = True

    def _serves(self, *, s_churn: float = 0.0, **options: Any) -> bool:
        return s_churn == 0

    def _rows(self, first: int, **options: Any) -> Rows:
        grid = self._grid(first, preserving=False)
        return self._of_grid(grid, solvers.euler(grid))

    @property
    def _prediction(self) -> str:
        return str(self.config.prediction_type).removeprefix("original_")


class EulerAncestralDiscreteScheduler(ByRatio, diffusers.EulerAncestralDiscreteScheduler):
    """Euler with ancestral noise."""

    output = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
    takes_whole = False
    returns_x0 = casts = True

    def _serves(self, **options: Any) -> bool:
        return bool(self.config.prediction_type != "sample")  # which diffusers refuses

    def _rows(self, first: int, **options: Any) -> Rows:
        grid = self._grid(first, preserving=False)
        return self._of_grid(grid, solvers.euler_a(grid))

    def _draws(self, run: Run, row: int) -> bool:
        return True  # also for the last step, which adds nothing of it


class HeunDiscreteScheduler(ByRatio, diffusers.HeunDiscreteScheduler):
    """Heun's method (Karras et al. 2022, algorithm 1): two network evaluations a step, one in the last."""

    output = scheduling_heun_discrete.HeunDiscreteSchedulerOutput
    returns_x0 = True
    state_in_first_order: bool

    def _rows(self, first: int, **options: Any) -> Rows:
        levels = self.sigmas.double().cpu()[first:]
        ratio = torch.cat((levels[:1], levels[1:-1:2], levels[-1:]))  # diffusers' has the inner ones twice
        grid = Grid(torch.ones_like(ratio), ratio, torch.arange(len(ratio)).double(), ANY)
        return self._of_grid(grid, solvers.heun(grid))

    def _serves(self, **options: Any) -> bool:
        return self._run is not None or self._step_index is None or self.state_in_first_order


class LMSDiscreteScheduler(ByRatio, diffusers.LMSDiscreteScheduler):
    """Linear multistep: Adams-Bashforth of order 1 to 4 on the slope over sigma."""

    output = scheduling_lms_discrete.LMSDiscreteSchedulerOutput
    returns_x0 = True

    def _serves(self, *, order: int = 4, **options: Any) -> bool:
        return 1 <= order <= 4

    def _run_from(self, index: int, *rest: Any) -> Run | None:
        # diffusers' weights are those of as many slopes as the index says, whatever is remembered.
        return None if self._strict and index > 0 else super()._run_from(index, *rest)

    def _rows(self, first: int, *, order: int = 4, **options: Any) -> Rows:
        grid = self._grid(first, preserving=False)
        return self._of_grid(grid, solvers.lms(grid, order=order))


class DPMSolverMultistepScheduler(ByRatio, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ and its SDE form (Lu et al. 2022) of order 1 to 3; for the older dpmsolver diffusers' own step."""

    output = SchedulerOutput
    casts = True

    def _serves(self, **options: Any) -> bool:
        config = self.config
        wrong = (self._noisy and config.solver_order == 3) or (config.use_flow_sigmas and self._prediction[0] == "v")
        usual = config.algorithm_type.endswith("dpmsolver++") and config.solver_order <= 3
        return bool(usual and not (self._strict and wrong))

    @property
    def _noisy(self) -> bool:
        return str(self.config.algorithm_type).startswith("sde")

    def _fused(self, output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> tuple[Tensor, ...] | None:
        if self.config.variance_type in ("learned", "learned_range"):
            output = output[:, : sample.shape[1]]
        return super()._fused(output, timestep, sample, **options)

    def _rows(self, first: int, **options: Any) -> Rows:
        grid = self._grid(first, preserving=True)
        config = self.config
        gentle = bool(config.lower_order_final) and len(self.timesteps) < FEW
        letters = self._letters(grid, min(config.solver_order, len(grid.h)), gentle)
        if config.euler_at_final:
            letters = without_last(letters, self._letters(grid, 1, gentle))
        return self._of_grid(grid, letters)

    def _letters(self, grid: Grid, order: int, gentle: bool) -> Letters:
        eta = 1.0 if self._noisy else 0.0
        if order == 1:
            return solvers.ddim(grid, eta=eta)
        how: dict[str, Any] = {"form": self.config.solver_type, "lower_order_final": gentle}
        if order == 2:
            return solvers.dpmpp_2m_sde(grid, eta=eta, **how)
        return solvers.dpmpp_3m(grid, **how) if self._strict else solvers.dpmpp_3m_true(grid, eta=eta, **how)

    def _draws(self, run: Run, row: int) -> bool:
        return self._noisy

    def _noise_dtype(self, output: Tensor) -> torch.dtype:
        return torch.float32


class UniPCMultistepScheduler(ByRatio, diffusers.UniPCMultistepScheduler):
    """UniPC of order 1 to 3 (Zhao et al. 2023), predictor and corrector in one row."""

    output = SchedulerOutput

    def _serves(self, **options: Any) -> bool:
        config = self.config
        usual = config.predict_x0 and config.solver_p is None and not config.disable_corrector
        return bool(usual and config.lower_order_final and config.solver_order <= 3)

    def _rows(self, first: int, **options: Any) -> Rows:
        grid = self._grid(first, preserving=True)
        return self._of_grid(grid, solvers.unipc(grid, order=self.config.solver_order, variant=self.config.solver_type))


class DEISMultistepScheduler(ByRatio, diffusers.DEISMultistepScheduler):
    """DEIS in its log-rho form (Zhang & Chen 2023) of order 1 to 3."""

    output = SchedulerOutput

    def _serves(self, **options: Any) -> bool:
        return bool(self.config.solver_order <= 3)

    def _rows(self, first: int, **options: Any) -> Rows:
        grid = self._grid(first, preserving=True)
        gentle = bool(self.config.lower_order_final) and len(self.timesteps) < FEW
        return self._of_grid(grid, solvers.deis(grid, order=self.config.solver_order, lower_order_final=gentle))


class LCMScheduler(ByTimestep, diffusers.LCMScheduler):
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3)."""

    output = scheduling_lcm.LCMSchedulerOutput
    returns_x0 = True
    get_scalings_for_boundary_condition_discrete: Callable[[Any], tuple[Any, Any]]

    def _rows(self, first: int, **options: Any) -> Rows:
        t = self.timesteps.cpu()[first:]
        grid = replace(self._grid(t, (1.0, 0.0)), t=torch.cat((t, torch.tensor([-1]))).double())
        letters = solvers.lcm(grid, timestep_scaling=self.config.timestep_scaling)
        return Rows(letters, grid.alpha[:-1], grid.sigma[:-1])

    def _index(self, timestep: Any) -> int | None:
        return Fused._index(self, timestep)

    def _passed(self) -> None:
        Fused._passed(self)

    def _row(self, run: Run, row: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Step:
        """diffusers gives the consistency function's value in place of x0."""
        made = super()._row(run, row, x, output, noise)
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(self.timesteps[run.first + row])
        assert made.x0 is not None
        return made._replace(x0=c_skip * x + c_out * made.x0)


class FlowMatchEulerDiscreteScheduler(ByRatio, diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler's method on rectified flow (Liu et al. 2023), or noised again in each step (``stochastic_sampling``)."""

    output = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
    takes_whole = False
    casts = True

    def _serves(self, *, per_token_timesteps: Tensor | None = None, **options: Any) -> bool:
        return per_token_timesteps is None and not self.config.invert_sigmas

    def _rows(self, first: int, **options: Any) -> Rows:
        sigma, after = (column.double().cpu() for column in (self.sigmas[first:-1], self.sigmas[first + 1 :]))
        if self.config.stochastic_sampling:
            letters = {"a": torch.zeros_like(sigma), "b": 1 - after, "s": after}
        else:
            letters = {"a": after / sigma, "b": 1 - after / sigma}
        return Rows(letters, 1 - sigma, sigma)

    def _draws(self, run: Run, row: int) -> bool:
        return bool(self.config.stochastic_sampling)

    def _noise_dtype(self, output: Tensor) -> torch.dtype:
        return torch.float32

    @property
    def _prediction(self) -> str:
        return "flow_prediction"
