"""Our schedulers in strict mode against installed diffusers, step by step, over random configurations."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.adapters.diffusers import SCHEDULERS
from fastdiff.ops import row as rows

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
schedulers = pytest.importorskip("fastdiff.adapters.diffusers.schedulers")

Config = dict[str, Any]
BETAS: Config = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "num_train_timesteps": [1000, 1000, 250],
    "trained_betas": [None, None, None, torch.linspace(1e-4, 0.05, 1000).tolist()],
}
CLIPPING: Config = {
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 2.0],
    "thresholding": [False, False, False, True],
    "sample_max_value": [1.0, 3.0],
}
ANY_OF_THREE: Config = {"prediction_type": ["epsilon", "sample", "v_prediction"]}
RATIOS: Config = {"levels": [None, None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]}
MULTISTEP: Config = {
    **BETAS,
    **RATIOS,
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "solver_order": [1, 2, 3],
    "lower_order_final": [True, True, False],
    "thresholding": [False, False, False, True],
}
#: what each scheduler may be told
POOLS: dict[str, Config] = {
    "DDPMScheduler": {
        **BETAS,
        **CLIPPING,
        **ANY_OF_THREE,
        "variance_type": [
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
            "learned",
            "learned_range",
        ],
        "rescale_betas_zero_snr": [False, False, True],
    },
    "DDIMScheduler": {
        **BETAS,
        **CLIPPING,
        **ANY_OF_THREE,
        "set_alpha_to_one": [True, False],
        "rescale_betas_zero_snr": [False, False, True],
    },
    "EulerDiscreteScheduler": {
        **BETAS,
        **RATIOS,
        **ANY_OF_THREE,
        "final_sigmas_type": ["zero", "sigma_min"],
        "rescale_betas_zero_snr": [False, False, True],
        "interpolation_type": ["linear", "linear", "log_linear"],
    },
    "EulerAncestralDiscreteScheduler": {
        **BETAS,
        "prediction_type": ["epsilon", "v_prediction", "v_prediction", "sample"],
        "rescale_betas_zero_snr": [False, False, True],
    },
    "HeunDiscreteScheduler": {**BETAS, **RATIOS, **ANY_OF_THREE, "clip_sample": [False, True]},
    "DPMSolverMultistepScheduler": {
        **MULTISTEP,
        "algorithm_type": ["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver"],
        "solver_type": ["midpoint", "heun"],
        "euler_at_final": [False, False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
        "use_flow_sigmas": [False, False, False, True],
    },
    "UniPCMultistepScheduler": {
        **MULTISTEP,
        "solver_type": ["bh1", "bh2"],
        "predict_x0": [True, True, True, True, False],
        "disable_corrector": [[], [], [], [0]],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "DEISMultistepScheduler": MULTISTEP,
    "LMSDiscreteScheduler": {**BETAS, **RATIOS, **ANY_OF_THREE},
    "PNDMScheduler": {
        **BETAS,
        "prediction_type": ["epsilon", "epsilon", "v_prediction"],
        "skip_prk_steps": [True, True, False],
        "set_alpha_to_one": [True, False],
    },
    "LCMScheduler": {
        **BETAS,
        **ANY_OF_THREE,
        "clip_sample": [False, True],
        "original_inference_steps": [50, 100],
        "timestep_scaling": [10.0, 1.0],
    },
    "FlowMatchEulerDiscreteScheduler": {
        **RATIOS,
        "shift": [1.0, 3.0],
        "stochastic_sampling": [False, False, True],
        "invert_sigmas": [False, False, False, True],
        "shift_terminal": [None, 0.1],
    },
}
OPTIONS: dict[str, Config] = {
    "DDIMScheduler": {"eta": [0.0, 0.5, 1.0], "use_clipped_model_output": [False, True]},
    "EulerDiscreteScheduler": {"s_churn": [0.0, 0.0, 0.0, 3.0]},
    "LMSDiscreteScheduler": {"order": [4, 4, 2]},
}
SHAPE = (2, 3, 4, 4)
MOST = 12  # steps from the beginning, and before the end


def chosen(pool: Config, draw: random.Random) -> Config:
    config = {name: draw.choice(values) for name, values in pool.items()}
    if (levels := config.pop("levels", None)) is not None:
        config[levels] = True
        config.pop("use_flow_sigmas", None)
    if config.get("trained_betas") is not None:
        config["num_train_timesteps"] = 1000
    return config


class Three:
    """diffusers' scheduler, the same on the same tables computing in float64, and ours, which are given the same."""

    def __init__(self, name: str, config: Config, options: Config) -> None:
        self.theirs, self.exact = (getattr(diffusers, name)(**config) for _ in range(2))
        self.ours = getattr(schedulers, name)(**config, strict_compat=True)
        self.options, self.fused = options, False
        self.stored: list[float] = []
        self.generated = "generator" in inspect.signature(self.theirs.step).parameters

    def set_timesteps(self, steps: int, first: int | None = None) -> Tensor:
        for each in (self.theirs, self.exact, self.ours):
            each.set_timesteps(steps)
            if first is not None:
                each.set_begin_index(first)
        for table in ("timesteps", "sigmas"):
            if hasattr(self.theirs, table):
                assert torch.equal(getattr(self.theirs, table), getattr(self.ours, table))
        for table in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
            if isinstance(value := getattr(self.exact, table, None), Tensor):
                setattr(self.exact, table, value.double())
        return self.theirs.timesteps[first:]

    def step(self, number: int, t: Tensor, x: Tensor, output: Tensor) -> Tensor | None:
        """One step of each: ours is the exact one, as far as diffusers' own is, or to 1e-6 of what is added up.

        None where diffusers ends in an error, and ours in the same.
        """
        given = (self.theirs, output, x), (self.exact, output.double(), x.double()), (self.ours, output, x)
        how = {**self.options, "return_dict": False}
        theirs, exact, ours = (attempt(partial(s.step, o, t, v, **how, **self.drawn(number))) for s, o, v in given)
        if isinstance(theirs, Exception):
            assert type(theirs) is type(ours)
            return None
        assert [(each.shape, each.dtype) for each in theirs] == [(each.shape, each.dtype) for each in ours]
        self.fused |= self.ours._run is not None
        for a, b, c, size in zip(theirs, exact, ours, self.sizes(x, output), strict=False):
            finite = torch.isfinite(a) & torch.isfinite(b)  # theirs is NaN where two levels are equal
            if bool(finite.any()):
                own, far = (float((each.double() - b)[finite].abs().max()) for each in (a, c))
                assert far <= max(1e-6 * size, 2 * own), (far, own, size)
        return theirs[0]

    def sizes(self, x: Tensor, output: Tensor) -> tuple[float, float]:
        """What is added up for the next state and for x0: both divide by an alpha that may be small."""
        run, largest, out = self.ours._run, float(x.abs().max()), float(output.abs().max())
        if run is None:
            return largest + out, largest + out
        row = dict(zip(rows.LETTERS, run.table[run.next - 1 - run.first].abs().tolist(), strict=True))
        x0 = row["p"] * largest + row["q"] * out
        self.stored = [max(x0, largest), *self.stored][:4]
        remembered = sum(row[c] for c in ("c1", "c2", "c3", "e")) * max(self.stored)
        return (1 + row["a"]) * largest + row["b"] * x0 + remembered, x0

    def drawn(self, number: int) -> Config:
        return {"generator": torch.Generator().manual_seed(number)} if self.generated else {}


@pytest.fixture(autouse=True)
def one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is drawn in float64 is that of float32."""
    original = diffusers.utils.torch_utils.randn_tensor

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return original(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for name in ("ddpm", "ddim", "euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep", "lcm"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{name}.randn_tensor", drawn)
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", drawn)


def compare(name: str, draw: random.Random) -> bool:
    """One configuration; whether our rows served it."""
    config, options = chosen(POOLS[name], draw), chosen(OPTIONS.get(name, {}), draw)
    steps = min(config.get("num_train_timesteps", 1000), round(10 ** draw.uniform(0, 3)))
    steps = min(steps, config.get("original_inference_steps", steps))
    made = (getattr(diffusers, name), partial(getattr(schedulers, name), strict_compat=True))
    said = [attempt(lambda each=each: first_step(each(**config), steps, options)) for each in made]
    assert type(said[0]) is type(said[1]), said
    if said[0] is not None:
        return False
    three = Three(name, config, options)
    later = hasattr(three.theirs, "set_begin_index") and steps > 2 * MOST
    for first in (None, (steps - MOST) // 2 * 2) if later else (None,):
        generator = torch.Generator().manual_seed(steps)
        x = torch.randn(SHAPE, generator=generator) * float(getattr(three.theirs, "init_noise_sigma", 1))
        for number, t in enumerate(three.set_timesteps(steps, first)[:MOST]):
            for each in (three.theirs, three.exact, three.ours):
                asked = each.scale_model_input(x, t) if hasattr(each, "scale_model_input") else x
            output = torch.tanh(torch.randn(output_shape(config), generator=generator) + asked.mean())
            found = three.step(number, t, x, output)
            if found is None or not torch.isfinite(found).all():
                break
            x = found
    return three.fused


def output_shape(config: Config) -> tuple[int, ...]:
    return (SHAPE[0], SHAPE[1] * (2 if str(config.get("variance_type")).startswith("learned") else 1), *SHAPE[2:])


def first_step(scheduler: Any, steps: int, options: Config) -> None:
    scheduler.set_timesteps(steps)
    scheduler.step(
        torch.zeros(output_shape(dict(scheduler.config))), scheduler.timesteps[0], torch.zeros(SHAPE), **options
    )


def attempt(work: Callable[[], Any]) -> Any:
    """What it gives, or the error it ends in."""
    try:
        return work()
    except Exception as error:
        return error


@pytest.mark.parametrize("count", [20, pytest.param(260, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_strict_mode_is_diffusers(name: str, count: int) -> None:
    draw = random.Random(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = sum(compare(name, draw) for _ in range(count))
    assert served >= 0.15 * count
