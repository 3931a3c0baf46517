"""What diffusers' scheduler classes take and do, as of 0.42: facts that findings follow from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

LEVELS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
SPACING: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
RESCALE = {"rescale_betas_zero_snr": False}
CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
THRESHOLD: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Facts:
    """A scheduler class.

    Attributes:
        defaults: its arguments; what is not among them is ignored.
        points: how it spaces N timesteps: ``closed`` (linspace reaches 0), ``open`` (N of N + 1, without the cleanest),
            or nothing where it has a way of its own.
        whole: whether its timesteps are whole numbers.
        looks_up: whether it begins at the second of two equal first timesteps.
        multistep: whether a step divides by the log-SNR between two noise levels.
        fixed_stride: whether it takes t - T // N for the timestep after t.
        casts: whether ``add_noise`` rounds alpha-bar to the samples' dtype before 1 - alpha-bar.
        predictions: what its networks may predict.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    points: str = ""
    whole: bool = True
    looks_up: bool = False
    multistep: bool = False
    fixed_stride: bool = False
    casts: bool = False
    predictions: tuple[str, ...] = PREDICTIONS


def _without(defaults: dict[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in defaults.items() if key not in left_out}


DDPM = {**LEVELS, **SPACING, **RESCALE, **CLIP, **THRESHOLD, "timestep_spacing": "leading"}
OF_DDPM = Facts({**DDPM, "variance_type": "fixed_small"}, "closed", casts=True)
OF_DDIM = Facts({**DDPM, "set_alpha_to_one": True}, "closed", fixed_stride=True, casts=True)
CONSISTENCY = {**DDPM, **LATENT, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True}
KARRAS = {**LEVELS, **SPACING, **SIGMAS}
SOLVER = {**KARRAS, **THRESHOLD, "solver_order": 2, "lambda_min_clipped": float("-inf"), "variance_type": None}
FINAL = {"final_sigmas_type": "zero", "algorithm_type": "dpmsolver++"}
FLOW = (*PREDICTIONS, "flow_prediction")
LOOKING_UP: dict[str, Any] = {"looks_up": True, "predictions": FLOW}
KDPM2 = Facts({**KARRAS, **LATENT}, "closed", looks_up=True, predictions=("epsilon", "v_prediction"))

CLASSES: dict[str, Facts] = {
    "DDPMScheduler": OF_DDPM,
    "DDPMParallelScheduler": OF_DDPM,
    "DDIMScheduler": OF_DDIM,
    "DDIMParallelScheduler": OF_DDIM,
    "PNDMScheduler": Facts(
        {**LEVELS, **SPACING, "timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
        "closed",
        fixed_stride=True,
        casts=True,
        predictions=("epsilon", "v_prediction"),
    ),
    "LCMScheduler": Facts(CONSISTENCY, casts=True),
    "TCDScheduler": Facts(CONSISTENCY, casts=True),
    "EulerDiscreteScheduler": Facts(
        {**KARRAS, **RESCALE, "final_sigmas_type": "zero"},
        "closed",
        False,
        predictions=(*PREDICTIONS, "original_sample"),
    ),
    "EulerAncestralDiscreteScheduler": Facts(
        {**LEVELS, **SPACING, **RESCALE}, "closed", False, predictions=("epsilon", "v_prediction")
    ),
    "HeunDiscreteScheduler": Facts({**KARRAS, **LATENT, **CLIP, "clip_sample": False}, "closed", False),
    "LMSDiscreteScheduler": Facts(KARRAS, "closed", False),
    "KDPM2DiscreteScheduler": KDPM2,
    "KDPM2AncestralDiscreteScheduler": KDPM2,
    "DPMSolverSDEScheduler": Facts({**KARRAS, **LATENT}, "closed", False, predictions=("epsilon", "v_prediction")),
    "DEISMultistepScheduler": Facts(
        {**KARRAS, **THRESHOLD, "solver_order": 2, "algorithm_type": "deis"}, "open", multistep=True, **LOOKING_UP
    ),
    "UniPCMultistepScheduler": Facts(
        {**KARRAS, **THRESHOLD, **RESCALE, "solver_order": 2, "final_sigmas_type": "zero"},
        "open",
        multistep=True,
        **LOOKING_UP,
    ),
    "DPMSolverMultistepScheduler": Facts({**SOLVER, **RESCALE, **FINAL}, "open", multistep=True, **LOOKING_UP),
    "DPMSolverSinglestepScheduler": Facts(
        _without({**SOLVER, **FINAL, "lower_order_final": False}, SPACING), "open", **LOOKING_UP
    ),
    "SASolverScheduler": Facts(_without(SOLVER, {"solver_order"}), "open", multistep=True, casts=True, **LOOKING_UP),
}
#: without betas, or with noise levels of their own: of these, only T is examined
OTHERS = (
    *("CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "KarrasVeScheduler"),
    *("CosineDPMSolverMultistepScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "IPNDMScheduler"),
    *("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "RePaintScheduler", "SCMScheduler"),
    *("ScoreSdeVeScheduler", "UnCLIPScheduler", "DDPMWuerstchenScheduler", "AmusedScheduler", "VQDiffusionScheduler"),
)
#: arguments of some class that nothing here depends on
MORE_KEYS = (
    *("lower_order_final", "euler_at_final", "solver_type", "use_lu_lambdas", "use_flow_sigmas", "flow_shift"),
    *("use_dynamic_shifting", "time_shift_type", "predict_x0", "disable_corrector", "solver_p", "skip_prk_steps"),
    *("interpolation_type", "timestep_type", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "shift"),
    *("original_inference_steps", "timestep_scaling", "predictor_order", "corrector_order", "tau_func"),
    *("noise_sampler_seed", "shift_terminal", "strict_compat"),
)
KEYS = {key for facts in CLASSES.values() for key in facts.defaults} | set(MORE_KEYS)
