"""What ``fastdiff doctor`` knows and says of diffusers, against diffusers itself."""

import dataclasses
import inspect
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from doctor_tools import COSINE, LATENTS, NAMES, STABLE, found, names, peer, quiet, saved  # noqa: F401

from fastdiff.adapters import doctor
from fastdiff.adapters.diffusers.tables import schedule_of
from fastdiff.adapters.doctor import noise_levels, spacing
from fastdiff.adapters.doctor.facts import CLASSES, KEYS, OTHERS
from fastdiff.adapters.doctor.reading import SAMPLING
from fastdiff.cli.sample import SampleConfig

pytestmark = pytest.mark.usefixtures("quiet")

# ---- the facts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_a_class(name):
    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: p.default for key, p in arguments.items() if key not in ("self", "args", "kwargs")}
    assert set(defaults) <= KEYS
    assert {key: defaults[key] for key in CLASSES[name].defaults} == dict(CLASSES[name].defaults)
    asked = ("rescale_betas_zero_snr", "use_karras_sigmas", "thresholding", "clip_sample", "timestep_spacing")
    assert {key for key in asked if key in defaults} == {key for key in asked if key in CLASSES[name].defaults}


@pytest.mark.parametrize("name", NAMES)
def test_predictions_of_a_class(name):
    works = []
    for prediction in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        scheduler = peer(name, prediction_type=prediction)
        try:
            scheduler.set_timesteps(5)
            x = scheduler.scale_model_input(torch.zeros(1, 3, 4, 4), scheduler.timesteps[0])
            scheduler.step(x, scheduler.timesteps[0], x)
            works.append(prediction)
        except (ValueError, NotImplementedError):
            pass
    assert set(works) == set(CLASSES[name].predictions) - {"original_sample"}


def test_the_other_classes_are_there():
    assert [name for name in (*CLASSES, *OTHERS) if not hasattr(diffusers, name)] == []
    assert {field.name for field in dataclasses.fields(SampleConfig)} <= set(SAMPLING)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_alpha_bar(kind, rescaled):
    scheduler = peer("DDPMScheduler", beta_schedule=kind, rescale_betas_zero_snr=rescaled)
    ours = schedule_of({**scheduler.config}).alpha ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours, rtol=2e-3, atol=1e-7)


def theirs(name, steps, **settings):
    """diffusers' timesteps, without what a solver of several stages puts between."""
    scheduler = peer(name, **settings)
    scheduler.set_timesteps(steps)
    if name == "PNDMScheduler":
        return scheduler._timesteps[::-1].astype(float)
    t = scheduler.timesteps.double().numpy()
    return t[[0, *range(1, len(t), 2)]] if "Heun" in name or "KDPM2" in name else t


PLAIN = [name for name in NAMES if CLASSES[name].points and "KDPM2" not in name]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("spaced", ["linspace", "leading", "trailing"])
def test_timesteps_are_those_of_diffusers(name, spaced, tmp_path):
    settings = {"timestep_spacing": spaced, "steps_offset": 1}
    if name == "DPMSolverSinglestepScheduler":
        settings = {}
    described = doctor.read(saved(tmp_path, name, settings))
    for steps in (1, 2, 7, 50, 61, 121, 333, 501, 999):
        if name == "PNDMScheduler" and steps < 4:
            continue
        np.testing.assert_allclose(described.timesteps[steps], theirs(name, steps, **settings), atol=1e-3)


SIGMAS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
WHOLE = [name for name in NAMES if CLASSES[name].points == "open"]


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("way", SIGMAS)
def test_timesteps_of_noise_levels(name, way, kind, tmp_path):
    """Up to single ones, that rounding moves to the neighbour."""
    settings = {way: True, "beta_schedule": kind}
    described = doctor.read(saved(tmp_path, name, settings))
    for steps in (2, 5, 20, 50):
        difference = np.abs(described.timesteps[steps] - theirs(name, steps, **settings))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.05


# ---- the figures, against diffusers -------------------------------------------------------------


def test_trailing_has_one_too_many_for_62_step_counts(tmp_path):
    described = doctor.read(saved(tmp_path, "DDPMScheduler", {"timestep_spacing": "trailing"}))
    claimed = described.bad_counts(lambda n, t: len(t) > n)
    finding = next(f for f in doctor.examine(described) if f.check == "one_too_many")
    assert len(claimed) == 62
    assert claimed[:6] == [61, 103, 121, 122, 201, 206][: len(claimed)]
    assert "for 62 of 1000 step counts (61, 103, 121, 122" in finding.problem
    scheduler = peer("DDPMScheduler", timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        assert (len(scheduler.timesteps) == steps + 1) == (steps in claimed)
        assert (int(scheduler.timesteps[-1]) == -1) == (steps in claimed)


@pytest.mark.parametrize(("spaced", "count"), [("linspace", 998), ("trailing", 984), ("leading", 0)])
def test_strides_of_ddim(spaced, count, tmp_path):
    """A step's result tells its stride: of alpha x0 without noise it makes alpha of where it leads."""
    described = doctor.read(saved(tmp_path, "DDIMScheduler", {"timestep_spacing": spaced}))
    wrong = [n for n in described.timesteps if spacing.wrong_strides(described, n)]
    assert len(wrong) == count
    scheduler = peer("DDIMScheduler", timestep_spacing=spaced, prediction_type="sample")
    alpha = scheduler.alphas_cumprod**0.5
    x0 = torch.ones(1, 1, 1, 1)
    for steps in (3, 10, 30, 50):
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps.tolist()
        ends = [float(scheduler.step(x0, now, alpha[now] * x0).prev_sample) for now in t]
        wanted = [float(alpha[then]) for then in t[1:]] + [1.0]
        off = sum(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ends, wanted, strict=True))
        assert off == spacing.wrong_strides(described, steps)
        assert 1 - ends[-1] ** 2 == pytest.approx(spacing.noise_left(described, steps) ** 2, abs=1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_step_counts_that_run_past_the_end(name, tmp_path):
    """Karras levels on cosine betas: those of which it is claimed fail in diffusers, the others do not."""
    settings = {**COSINE, "use_karras_sigmas": True}
    finding = found(saved(tmp_path, name, settings), "duplicates")
    first = int(re.search(r"past the end for \d+ of 1000 step counts \((\d+),", finding.cost)[1])
    claimed = range(first, 1001)
    for steps in (2, 3, 4, 5, 6, 8, 15, 30):
        assert fails(name, steps, **settings) == (steps in claimed)


def fails(name, steps, **settings):
    scheduler = peer(name, **settings)
    scheduler.set_timesteps(steps)
    x = torch.full((1, 1, 2, 2), 0.1)
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
    except (IndexError, AssertionError):
        return True
    return bool(x.isnan().any())


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_equal_noise_levels_are_nan(name, tmp_path):
    assert "NaN for 1 of 1000 step counts (1000)" in found(saved(tmp_path, name, {}), "duplicates").cost
    assert fails(name, 1000)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize(("settings", "zero", "much"), [({}, 10, 19), (STABLE, None, None), (COSINE, 21, 37)])
def test_noise_in_half_precision(dtype, name, settings, zero, much, tmp_path):
    path = saved(tmp_path, "DDPMScheduler", settings)
    scheduler, t = peer("DDPMScheduler", **settings), torch.arange(1000)
    ones, zeros = torch.ones(1000, 1, dtype=dtype), torch.zeros(1000, 1, dtype=dtype)
    noise = scheduler.add_noise(zeros, ones, t).double()[:, 0]
    error = (noise / (1 - scheduler.alphas_cumprod.double()).sqrt() - 1).abs()
    costs = [f.cost for f in doctor.examine(doctor.read(path, precision=name)) if f.check == "noise_precision"]
    zeros_said = f"zero at {int((noise == 0).sum())} of 1000 timesteps"
    assert all(zeros_said in cost and cost.endswith(f"wrong at {int((error > 0.1).sum())}") for cost in costs)
    assert len(costs) == bool((error > 0.1).any())
    if name == "bf16" and zero:
        assert (int((noise == 0).sum()), int((error > 0.1).sum())) == (zero, much)
    mended = scheduler.add_noise(zeros.float(), ones.float(), t).to(dtype).double()[:, 0]
    assert float((mended / (1 - scheduler.alphas_cumprod.double()).sqrt() - 1).abs().max()) < 0.01
    assert "noise_precision" not in names(path, precision="fp32")
    assert "noise_precision" not in names(path)


def test_state_in_half_precision(tmp_path):
    path = saved(tmp_path, "DDIMScheduler", {})
    costs = {name: found(path, "state_precision", precision=name).cost for name in ("bf16", "fp16")}
    off = {name: float(re.search(r"at least ([\d.]+)% off", cost)[1]) for name, cost in costs.items()}
    for name, dtype in noise_levels.HALVES.items():
        assert off[name] < 100 * theirs_off(dtype) < 4 * off[name]
    assert off["bf16"] > 4 * off["fp16"]
    assert names(path, precision="fp32") == names(path)


def theirs_off(dtype):
    """How far diffusers' own steps end from those of float64, with the same denoiser."""
    scheduler = peer("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(50)
    ends = []
    for kind in (dtype, torch.float64):
        x = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096).to(kind)[None, None, None]
        for t in scheduler.timesteps:
            bar = scheduler.alphas_cumprod[t].double()
            denoised = bar.sqrt() / 4 / (bar / 4 + 1 - bar) * x.double()
            epsilon = (x.double() - bar.sqrt() * denoised) / (1 - bar).sqrt()
            x = scheduler.step(epsilon.to(kind), t, x).prev_sample.to(kind)
        ends.append(x.double())
    return float((ends[0] - ends[1]).norm() / ends[1].norm())


def test_variances_that_are_nan(tmp_path):
    assert (
        "NaN at all 999 steps"
        in found(saved(tmp_path, "DDPMScheduler", {"variance_type": "fixed_large_log"}), "nan_variance").cost
    )
    scheduler = peer("DDPMScheduler", variance_type="fixed_large_log")
    x = torch.zeros(1, 1, 2, 2)
    assert all(scheduler.step(x, t, x).prev_sample.isnan().all() for t in (1, 500, 999))
    learned = peer("DDPMScheduler", variance_type="learned")
    halves = torch.cat((x, torch.tensor([[-1.0, 1.0], [1.0, -1.0]])[None, None]), 1)
    assert float(learned.step(halves, 500, x).prev_sample.isnan().float().mean()) == 0.5


def test_signal_at_the_end(tmp_path):
    finding = found(saved(tmp_path, "DDIMScheduler", STABLE), "terminal_signal")
    bar = float(peer("DDIMScheduler", **STABLE).alphas_cumprod[-1])
    assert f"alpha-bar is {bar:.3g}" in finding.problem
    assert f"{bar**0.5:.2%} of the image" in finding.problem  # 6.83 %: Lin et al. 2024, section 3.1
    assert "8.7 of 255 grey levels" in finding.cost


def test_min_snr_divides_by_zero(tmp_path):
    settings = {"rescale_betas_zero_snr": True}
    assert found(saved(tmp_path, "DDPMScheduler", settings), "min_snr").cost.startswith("NaN for 1 of 1000 timesteps")
    snr = compute_snr(peer("DDPMScheduler", **settings), torch.arange(1000))
    assert (snr.clamp(max=5) / snr).isnan().nonzero().flatten().tolist() == [999]


def test_zero_snr_in_the_first_step(tmp_path):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    by_index = found(saved(tmp_path, "DDIMScheduler", settings), "zero_snr_epsilon")
    by_ratio = found(saved(tmp_path / "euler", "EulerDiscreteScheduler", settings), "zero_snr_epsilon")
    assert "divides by 0" in by_index.cost
    scheduler = peer("EulerDiscreteScheduler", **settings)
    scheduler.set_timesteps(50)
    assert f"multiplied by {float(scheduler.sigmas[0]):.0f}" in by_ratio.cost
    assert "multiplied by 4096" in by_ratio.cost


def test_offset_past_the_end(tmp_path):
    path = saved(tmp_path, "DDIMScheduler", {"steps_offset": 1})
    assert "reaches t = 1000 for 1 of 1000 step counts (1000)" in found(path, "out_of_range").problem
    scheduler = peer("DDIMScheduler", steps_offset=1)
    scheduler.set_timesteps(1000)
    with pytest.raises(IndexError):
        scheduler.step(torch.zeros(1, 1, 2, 2), scheduler.timesteps[0], torch.zeros(1, 1, 2, 2))


def test_thresholding_of_latents(tmp_path):
    """Their threshold divides latents of variance 1 by what is claimed."""
    settings = {"thresholding": True, "sample_max_value": 10.0}
    cost = found(saved(tmp_path, "DDIMScheduler", settings, LATENTS), "thresholded_latents").cost
    x = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096).reshape(1, 4, 32, 32)
    made = peer("DDIMScheduler", **settings)._threshold_sample(x)
    middle = slice(1800, 2300)
    assert float((x.flatten()[middle] / made.flatten()[middle]).mean()) == pytest.approx(
        float(re.search(r"at ([\d.]+),", cost)[1]), rel=0.02
    )
