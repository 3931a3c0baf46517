"""Guidance: scales, two conditions in one network, weak models, classifiers, thresholds, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import Gaussian, Mixture, model_of, predict
from sampler_tools import LABELS, NULL, SAMPLING, Writer, classes_mlp, make, noise_of
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.guidance import AutoGuidance, ClassifierFree, ClassifierGuidance, Guidance, rescaled, thresholded
from fastdiff.noise import Stream


@pytest.mark.parametrize("solver", SAMPLING)
def test_scale_1_is_no_guidance(solver: str) -> None:
    model = Writer()
    guided = make(model, solver, guidance_scale=1.0)((4, 3), seed=2, uncond=NULL, **LABELS)
    assert {len(call.x) for call in model.calls} == {4}
    assert torch.equal(guided, make(solver=solver)((4, 3), seed=2, **LABELS))


@pytest.mark.parametrize("solver", SAMPLING)
def test_scale_0_is_the_unconditional_model(solver: str) -> None:
    guided = make(solver=solver, guidance_scale=0.0)((4, 3), seed=2, uncond=NULL, **LABELS)
    assert torch.equal(guided, make(solver=solver)((4, 3), seed=2, y=torch.zeros(4)))


@pytest.mark.parametrize("solver", SAMPLING)
@pytest.mark.parametrize("scale", [-1.5, 0.4, 3.0, 7.5])
def test_samples_of_an_affine_model_are_affine_in_the_scale(scale: float, solver: str) -> None:
    def at(w: float) -> Tensor:
        sampler = make(solver=solver, guidance_scale=w, dtype=torch.float64)
        return sampler((4, 3), seed=2, uncond=NULL, **LABELS)

    expected = at(0.0) + scale * (at(1.0) - at(0.0))
    assert (at(1.0) - at(0.0)).abs().max() > 0.1
    assert (at(scale) - expected).abs().max() <= 1e-12


def test_conditional_and_unconditional_go_through_the_network_in_one_batch() -> None:
    model = Writer()
    make(model, guidance_scale=[1.0, 3.0, 0.0, 1.0], steps=4)((4, 3), uncond=NULL, **LABELS)
    assert [len(call.x) for call in model.calls] == [4, 8, 8, 4]
    both = model.calls[1]
    assert torch.equal(both.x[:4], both.x[4:])
    assert torch.equal(both.t[:4], both.t[4:])
    assert torch.equal(both.y, torch.cat((LABELS["y"], torch.zeros(4))))


def test_scales_by_step_are_used_in_their_step() -> None:
    scales = [1.0, 3.0, 0.5, 2.0]
    sampler = make(guidance_scale=scales, steps=4, dtype=torch.float64)
    assert sampler.table.rows.w.tolist() == scales
    x = fd.noise.normal((4, 3), seed=0, stream=Stream.INITIAL, dtype=torch.float64)
    for scale, row, state in zip(
        scales, sampler.table.rows, sampler.iterate((4, 3), uncond=NULL, **LABELS), strict=True
    ):
        out = 0.25 * x + 0.125 + scale * LABELS["y"].double()[:, None]
        x0 = row.p * x + row.q * out
        assert (state.x0 - x0).abs().max() <= 1e-13
        x = state.x


def test_own_networks_know_their_null_condition() -> None:
    sampler = make(classes_mlp(), guidance_scale=2.5)
    y = torch.tensor([0, 1, 2, 1])
    known = sampler((4, 2), y=y)
    assert torch.equal(known, sampler((4, 2), y=y, uncond={"y": 3}))
    assert torch.equal(known, sampler((4, 2), y=y, uncond={"y": torch.full((4,), 3)}))
    assert not torch.equal(known, sampler((4, 2), y=y, uncond={"y": 0}))


def test_a_condition_that_is_no_tensor_has_its_null_respected() -> None:
    """Prompts, numbers, nested structures: the unconditional half must be given the null value, or be refused."""

    def model(x: Tensor, t: Tensor, level: float) -> Tensor:
        return 0.25 * x + level

    weak = make(model, guidance_scale=0.0)
    try:
        got = weak((4, 3), level=2.0, uncond={"level": 0.0})
    except fd.InputError:
        return
    assert torch.equal(got, make(model)((4, 3), level=0.0))


def test_guidance_in_an_interval_of_noise() -> None:
    """Outside it the scale is 1 and the network is asked once."""
    model = Writer()
    sampler = make(model, "ddim", 10, guidance_scale=3.0, guidance_interval=(0.5, 2.0))
    schedule = sampler.diffusion.schedule
    ratio = (schedule.sigma / schedule.alpha)[sampler.timesteps]
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    assert 0 < int(inside.sum()) < 10
    assert sampler.table.rows.w.tolist() == [3.0 if here else 1.0 for here in inside]
    sampler((4, 3), uncond=NULL, **LABELS)
    assert [len(call.x) for call in model.calls] == [8 if here else 4 for here in inside]


# ---- one batch or two calls, a scale per sample ---------------------------------------------


@pytest.mark.parametrize("solver", SAMPLING)
def test_two_calls_give_what_one_batch_gives(solver: str) -> None:
    model = Writer()
    two = make(model, solver, guidance_scale=2.5, guidance=ClassifierFree(batched=False))
    one = make(solver=solver, guidance_scale=2.5)
    assert torch.equal(two((4, 3), seed=2, uncond=NULL, **LABELS), one((4, 3), seed=2, uncond=NULL, **LABELS))
    assert {len(call.x) for call in model.calls} == {4}
    assert len(model.calls) == 2 * len(two.table)


@pytest.mark.parametrize("solver", SAMPLING)
def test_a_scale_per_sample_is_that_of_a_run_for_itself(solver: str) -> None:
    sampler = make(solver=solver)
    scales = torch.tensor([1.0, 0.0, 2.5, -1.0])
    together = sampler((4, 3), seed=2, guidance_scale=scales, uncond=NULL, **LABELS)
    for k, scale in enumerate(scales.tolist()):
        alone = make(solver=solver, guidance_scale=scale)((4, 3), seed=2, uncond=NULL, **LABELS)
        torch.testing.assert_close(together[k], alone[k], rtol=1e-5, atol=1e-5)
    number = sampler((4, 3), seed=2, guidance_scale=2.5, uncond=NULL, **LABELS)
    assert torch.equal(number[2], together[2])


def test_a_scale_of_a_call_is_of_the_interval_alone() -> None:
    model = Writer()
    sampler = make(model, "ddim", 10, guidance_interval=(0.5, 2.0))
    sampler((4, 3), guidance_scale=3.0, uncond=NULL, **LABELS)
    assert [len(call.x) for call in model.calls] == [8 if here else 4 for here in sampler.table.inside]
    inside = make(None, "ddim", 10, guidance_interval=(0.5, 2.0), guidance_scale=3.0)
    one, other = (s((4, 3), uncond=NULL, **LABELS) for s in (inside, sampler))
    torch.testing.assert_close(one, sampler((4, 3), guidance_scale=3.0, uncond=NULL, **LABELS), rtol=1e-6, atol=1e-6)
    assert not torch.equal(one, other)


# ---- rescale --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rescaling_gives_the_deviation_of_the_conditional_output_back(share: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(5, 3, 8, 8, generator=generator).to(dtype)
    guided = (3 * torch.randn(5, 3, 8, 8, generator=generator) + 1).to(dtype)
    result = rescaled(guided, cond, share)
    assert result.dtype == dtype
    deviations = [v.double().flatten(1).std(1) for v in (result, cond, guided)]
    expected = share * deviations[1] + (1 - share) * deviations[2]
    torch.testing.assert_close(deviations[0], expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    directions = [nn.functional.normalize(v.double().flatten(1)) for v in (result, guided)]
    torch.testing.assert_close(*directions, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_rescaling_as_diffusers_does_it() -> None:
    peer = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    guided, cond = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(
        rescaled(guided, cond, 0.7), peer.rescale_noise_cfg(guided, cond, 0.7), rtol=1e-5, atol=1e-6
    )


def test_rescaled_guidance_is_of_the_network_s_output() -> None:
    guidance = ClassifierFree(rescale=0.7)
    sampler = make(None, "ddim", 4, guidance_scale=3.0, guidance=guidance, dtype=torch.float64)
    x = fd.noise.normal((4, 3), seed=0, stream=Stream.INITIAL, dtype=torch.float64)
    for row, state in zip(sampler.table.rows, sampler.iterate((4, 3), uncond=NULL, **LABELS), strict=True):
        other = 0.25 * x + 0.125
        cond = other + LABELS["y"].double()[:, None]
        guided = other + 3.0 * (cond - other)
        out = guided * (0.7 * cond.std(1) / guided.std(1) + 0.3)[:, None]
        assert (state.x0 - (row.p * x + row.q * out)).abs().max() <= 1e-12
        x = state.x


# ---- dynamic thresholding -------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.001, 0.3, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (4, 3, 5, 5), (1, 3, 32, 32)], ids=str)
@pytest.mark.parametrize("bound", [0.05, 1.0])
def test_thresholding_by_torch_s_quantile(quantile: float, shape: tuple[int, ...], bound: float) -> None:
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = thresholded(x0, quantile, bound)
    limit = torch.quantile(x0.flatten(1).abs(), quantile, dim=1).clamp(min=bound)
    limit = limit.reshape(-1, *(1,) * (len(shape) - 1))
    torch.testing.assert_close(result, x0.clamp(-limit, limit) / limit * bound, rtol=1e-12, atol=1e-15)
    assert result.abs().max() <= bound * (1 + 1e-12)


def test_thresholding_leaves_small_values_and_other_samples_alone() -> None:
    x0 = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x0[0] *= 0.1
    result = thresholded(x0, 0.9, 1.0)
    assert torch.equal(result[0], x0[0])
    for k in range(3):
        assert torch.equal(result[k : k + 1], thresholded(x0[k : k + 1], 0.9, 1.0))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", SAMPLING)
def test_thresholded_estimates_in_every_row(solver: str, prediction: str) -> None:
    """The x0 of a row is the thresholded one of what the network says; below the bound nothing changes."""
    wild = make(lambda x, t: 2.0 * x, solver, prediction=prediction, threshold=0.8, clip=0.5)
    states = list(wild.iterate((4, 30), seed=1))
    assert all(state.x0.abs().max() <= 0.5 + 1e-5 for state in states)
    limits = [state.x0.abs().flatten(1).amax(1) for state in states]
    assert any((limit - 0.5).abs().max() < 1e-4 for limit in limits)
    mild, plain = (make(solver=solver, clip=1e4, **more) for more in ({"threshold": 0.8}, {}))
    assert torch.allclose(mild((4, 30), seed=1), plain((4, 30), seed=1), rtol=1e-4, atol=1e-5)


def test_thresholding_is_of_the_guided_estimate() -> None:
    sampler = make(None, "ddim", 4, guidance_scale=5.0, threshold=0.75, clip=0.4, dtype=torch.float64)
    x = fd.noise.normal((4, 9), seed=0, stream=Stream.INITIAL, dtype=torch.float64)
    for row, state in zip(sampler.table.rows, sampler.iterate((4, 9), uncond=NULL, **LABELS), strict=True):
        out = 0.25 * x + 0.125 + 5.0 * LABELS["y"].double()[:, None]
        x0 = thresholded(row.p * x + row.q * out, 0.75, 0.4)
        assert (state.x0 - x0).abs().max() <= 1e-12
        x = state.x


# ---- a weak model ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SAMPLING)
def test_autoguidance_goes_away_from_the_weak_model(solver: str) -> None:
    """Affine models: the guided one is the affine model of the combined coefficients."""
    weak = Writer()
    strong = lambda x, t, y: 0.5 * x - 0.25 + y.to(x.dtype)[:, None]  # noqa: E731
    sampler = make(strong, solver, guidance_scale=3.0, guidance=AutoGuidance(weak), dtype=torch.float64)

    def combined(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (3 * 0.5 - 2 * 0.25) * x + (3 * -0.25 - 2 * 0.125) + y.to(x.dtype)[:, None]

    expected = make(combined, solver, dtype=torch.float64)((4, 3), seed=2, **LABELS)
    assert (sampler((4, 3), seed=2, **LABELS) - expected).abs().max() <= 1e-12
    assert all(torch.equal(call.y, LABELS["y"]) for call in weak.calls)


def test_the_weak_model_may_have_another_condition() -> None:
    weak = Writer()
    sampler = make(Writer(), guidance_scale=2.0, guidance=AutoGuidance(weak))
    sampler((4, 3), uncond=NULL, **LABELS)
    assert all(torch.equal(call.y, torch.zeros(4)) for call in weak.calls)


def test_a_weak_model_is_not_asked_at_scale_1() -> None:
    weak = Writer()
    guided = make(guidance=AutoGuidance(weak))((4, 3), seed=2, **LABELS)
    assert torch.equal(guided, make()((4, 3), seed=2, **LABELS))
    assert weak.calls == []


# ---- classifiers ----------------------------------------------------------------------------

MEANS, STD = torch.tensor([[-1.0, 0.5], [1.5, -0.25], [0.0, 1.0]], dtype=torch.float64), 0.4
CLASSES = Mixture(torch.full((3,), 1 / 3, dtype=torch.float64), MEANS, torch.full((3,), STD, dtype=torch.float64))


def classifier_of(diffusion: fd.Diffusion) -> Any:
    """log p(y | x_t), exactly, up to a constant of x."""
    schedule = diffusion.schedule

    def logits(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha[t.long()][:, None], schedule.sigma[t.long()][:, None]
        offset = x[:, None] - alpha[..., None] * MEANS
        return -offset.square().sum(-1) / (2 * ((alpha * STD) ** 2 + sigma**2))

    return logits


def of_class(y: Tensor, diffusion: fd.Diffusion) -> Any:
    """The exact model of one Gaussian per sample."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v[t.long()][:, None] for v in (diffusion.schedule.alpha, diffusion.schedule.sigma))
        x0 = Gaussian(0.0, STD).denoise(x - alpha * MEANS[y], alpha, sigma) + MEANS[y]
        return predict(diffusion.prediction, x, x0, alpha, sigma)

    return model


WITHOUT_SHIFT = ["ddim", "euler", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "lms", "lcm", "euler_a", "dpmpp_2m_sde"]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", WITHOUT_SHIFT)
def test_an_exact_classifier_makes_the_exact_conditional_model(solver: str, prediction: str) -> None:
    """Bayes: the score of the mixture plus that of the classifier is the score of the class, row by row."""
    diffusion = fd.Diffusion(fd.Schedule.linear(100), prediction)
    y = torch.tensor([0, 1, 2, 1, 0])
    guidance = ClassifierGuidance(classifier_of(diffusion))
    options: dict[str, Any] = {"solver": solver, "steps": 20, "dtype": torch.float64}
    guided = fd.Sampler(model_of(CLASSES, diffusion), diffusion, guidance_scale=1.0, guidance=guidance, **options)
    exact = fd.Sampler(of_class(y, diffusion), diffusion, **options)
    for one, other in zip(guided.iterate((5, 2), seed=3, y=y), exact.iterate((5, 2), seed=3), strict=True):
        assert (one.x - other.x).abs().max() <= 1e-10
        assert (one.x0 - other.x0).abs().max() <= 1e-9


def test_a_classifier_that_scales_the_gradient_is_the_tempered_law() -> None:
    """At scale s the score gains s times the classifier's gradient."""
    diffusion = fd.Diffusion(fd.Schedule.linear(100))
    y = torch.tensor([0, 1, 2])
    network, logits = model_of(CLASSES, diffusion), classifier_of(diffusion)
    guidance = ClassifierGuidance(logits)
    sampler = fd.Sampler(network, diffusion, "ddim", 10, guidance_scale=4.0, guidance=guidance, dtype=torch.float64)
    x = fd.noise.normal((3, 2), seed=0, stream=Stream.INITIAL, dtype=torch.float64)
    for t, row, state in zip(sampler.timesteps, sampler.table.rows, sampler.iterate((3, 2), seed=0, y=y), strict=True):
        times = t.expand(3)
        gradient = torch.func.grad(lambda x, times=times: logits(x, times).log_softmax(1)[range(3), y].sum())(x)
        epsilon = network(x, times) - 4.0 * diffusion.schedule.sigma[t] * gradient  # algorithm 2
        x = row.a * x + row.b * (row.p * x + row.q * epsilon)
        assert (state.x - x).abs().max() <= 1e-11


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_moves_its_mean(variance: str) -> None:
    """Algorithm 1 of Dhariwal & Nichol 2021: the mean, plus s variance gradient, plus the noise."""
    diffusion = fd.Diffusion(fd.Schedule.linear(100), "epsilon", variance)
    y = torch.tensor([0, 1, 2])
    exact, logits = model_of(CLASSES, diffusion), classifier_of(diffusion)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((exact(x, t), x.sin()), 1) if variance == "learned_range" else exact(x, t)

    guidance = ClassifierGuidance(logits)
    sampler = fd.Sampler(network, diffusion, "ddpm", 10, guidance_scale=4.0, guidance=guidance, dtype=torch.float64)
    x = fd.noise.normal((3, 2), seed=0, stream=Stream.INITIAL, dtype=torch.float64)
    timesteps = [*sampler.timesteps.tolist(), -1]
    alpha_bar = {t: float(diffusion.schedule.alpha[t]) ** 2 if t >= 0 else 1.0 for t in timesteps}
    for step, state in enumerate(sampler.iterate((3, 2), seed=0, y=y)):
        t, after = timesteps[step : step + 2]
        beta = 1 - alpha_bar[t] / alpha_bar[after]
        small = beta * (1 - alpha_bar[after]) / (1 - alpha_bar[t])
        out = network(x, torch.full((3,), t))
        x0 = (x - (1 - alpha_bar[t]) ** 0.5 * out[:, :2]) / alpha_bar[t] ** 0.5
        mean = (
            alpha_bar[after] ** 0.5 * beta / (1 - alpha_bar[t]) * x0
            + (1 - beta) ** 0.5 * (1 - alpha_bar[after]) / (1 - alpha_bar[t]) * x
        )
        share = {"fixed_small": 0.0, "fixed_large": 1.0}.get(variance, (1 + out[:, 2:]) / 2 if after >= 0 else 0.0)
        spread = torch.as_tensor(share, dtype=torch.float64)
        of_noise = torch.exp(spread * math.log(beta) + (1 - spread) * math.log(small)) if after >= 0 else 0 * spread
        times = torch.full((3,), t)
        gradient = torch.func.grad(lambda x, times=times: logits(x, times).log_softmax(1)[range(3), y].sum())(x)
        x = mean + 4.0 * of_noise * gradient + of_noise**0.5 * noise_of((3, 2), step, seed=0)
        assert (state.x - x).abs().max() <= 1e-10


def test_ddpm_guided_by_a_classifier_draws_the_class() -> None:
    """The mean shift is exact in the limit of small steps: 6,000 draws of 250 steps have the class's moments."""
    diffusion = fd.Diffusion(fd.Schedule.cosine(250))
    y = torch.zeros(6_000, dtype=torch.int64)
    guidance = ClassifierGuidance(classifier_of(diffusion))
    sampler = fd.Sampler(model_of(CLASSES, diffusion), diffusion, "ddpm", 250, guidance_scale=1.0, guidance=guidance)
    draws = sampler((6_000, 2), seed=1, y=y)
    assert (draws.mean(0) - MEANS[0]).abs().max() < 0.025
    assert (draws.std(0) - STD).abs().max() < 0.025
    assert (sampler((6_000, 2), seed=1, y=y, guidance_scale=0.0).std(0) > 2 * STD).any()  # all classes


def test_a_classifier_is_not_asked_at_scale_0_or_outside_the_interval() -> None:
    asked = []

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return x @ torch.ones(3, 5)

    y = torch.tensor([0, 1, 2, 3])
    plain = make()((4, 3), seed=2)
    silent = make(guidance_scale=0.0, guidance=ClassifierGuidance(classifier))
    assert torch.equal(silent((4, 3), seed=2, y=y), plain)
    assert not asked
    sampler = make(None, "ddim", 10, guidance=ClassifierGuidance(classifier), guidance_interval=(0.5, 2.0))
    sampler((4, 3), y=y, guidance_scale=3.0)
    assert len(asked) == int(sampler.table.inside.sum())


@pytest.mark.parametrize("conditional", [False, True])
def test_whether_the_network_is_given_the_classes_too(conditional: bool) -> None:
    model = Writer()
    guidance = ClassifierGuidance(lambda x, t: x @ torch.ones(3, 5), conditional)
    make(model, guidance_scale=2.0, guidance=guidance)((4, 3), y=torch.tensor([0, 1, 2, 3]))
    assert {call.y is not None for call in model.calls} == {conditional}


def test_guidance_by_a_classifier_within_inference_mode() -> None:
    y = torch.tensor([0, 1, 2, 3])
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    sampler = make(guidance_scale=2.0, guidance=ClassifierGuidance(lambda x, t: (x @ weights).square()))
    expected = sampler((4, 3), y=y)
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(sampler((4, 3), y=y), expected)


# ---- variances between the two --------------------------------------------------------------


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_variances_between_the_posterior_s_and_the_forward_one(v: float) -> None:
    """Algorithm 2 of Ho & Salimans 2022, in log-SNR on a uniform grid, by scalars."""
    schedule, steps, w = fd.Schedule.cosine(1000), 12, 1.5
    diffusion = fd.Diffusion(schedule)
    options: dict[str, Any] = {"spacing": "exponential", "variance": v, "guidance_scale": 1 + w, "clip": 1.0}
    sampler = fd.Sampler(Writer(), diffusion, "ddpm", steps, dtype=torch.float64, **options)
    levels = [float(value) for value in schedule.log_snr[sampler.timesteps]]
    z = fd.noise.normal((4, 3), seed=0, stream=Stream.INITIAL, dtype=torch.float64)
    for step, (state, here) in enumerate(zip(sampler.iterate((4, 3), uncond=NULL, **LABELS), levels, strict=True)):
        other = 0.25 * z + 0.125
        epsilon = (1 + w) * (other + LABELS["y"].double()[:, None]) - w * other
        a, b = (1 / (1 + math.exp(-here))) ** 0.5, (1 / (1 + math.exp(here))) ** 0.5
        x = ((z - b * epsilon) / a).clamp(-1, 1)
        assert (state.x0 - x).abs().max() <= 1e-10
        if step + 1 == steps:
            z = x
        else:
            there = levels[step + 1]
            rise = -math.expm1(here - there)
            a_next, next_variance = (1 / (1 + math.exp(-there))) ** 0.5, 1 / (1 + math.exp(there))
            mean = math.exp(here - there) * a_next / a * z + rise * a_next * x
            small, large = rise * next_variance, rise / (1 + math.exp(here))
            z = mean + small ** ((1 - v) / 2) * large ** (v / 2) * noise_of((4, 3), step, seed=0)
        assert (state.x - z).abs().max() <= 1e-10


def test_the_ends_of_the_interpolation_are_the_named_variances() -> None:
    for v, name in ((0, "fixed_small"), (1.0, "fixed_large")):
        runs = [make(solver="ddpm", variance=variance)((4, 3), seed=1) for variance in (v, name)]
        assert torch.equal(*runs)


# ---- bad input ------------------------------------------------------------------------------

GUIDANCES: dict[str, Any] = {
    "rescale above one": lambda: ClassifierFree(rescale=1.5),
    "rescale in words": lambda: ClassifierFree(rescale="much"),  # type: ignore[arg-type]
    "rescale not a number": lambda: AutoGuidance(Writer(), rescale=math.nan),
    "a weak model that is none": lambda: AutoGuidance(3),  # type: ignore[arg-type]
    "a classifier that is none": lambda: ClassifierGuidance("resnet"),  # type: ignore[arg-type]
    "guidance by name": lambda: make(guidance="cfg"),
    "a guidance's class": lambda: make(guidance=ClassifierFree),
    "a threshold without a bound": lambda: make(threshold=0.9),
    "a threshold of zero": lambda: make(threshold=0.0, clip=1.0),
    "a threshold above one": lambda: make(threshold=99.5, clip=1.0),
    "a variance above one": lambda: make(solver="ddpm", variance=1.5),
    "a variance below zero": lambda: make(solver="ddpm", variance=-0.5),
    "a variance not a number": lambda: make(solver="ddpm", variance=math.nan),
}


@pytest.mark.parametrize("case", GUIDANCES)
def test_a_bad_guidance_is_refused(case: str) -> None:
    with pytest.raises(fd.InputError):
        GUIDANCES[case]()


Y = torch.tensor([0, 1, 2, 3])
BY_A_CLASSIFIER: dict[str, Any] = {
    "no classes": {},
    "classes of another batch": {"y": Y[:3]},
    "classes that are fractions": {"y": Y.float()},
    "classes in a list": {"y": [0, 1, 2, 3]},
    "a null condition": {"y": Y, "uncond": {"y": 0}},
    "scales of another batch": {"y": Y, "guidance_scale": torch.ones(3)},
    "an infinite scale": {"y": Y, "guidance_scale": math.inf},
    "a scale in words": {"y": Y, "guidance_scale": "strong"},
}


@pytest.mark.parametrize("case", BY_A_CLASSIFIER)
def test_a_bad_call_with_a_classifier_is_refused_before_the_model_runs(case: str) -> None:
    model = Writer()
    sampler = make(model, guidance_scale=2.0, guidance=ClassifierGuidance(lambda x, t: x @ torch.ones(3, 5)))
    with pytest.raises(fd.InputError):
        sampler((4, 3), **BY_A_CLASSIFIER[case])
    assert model.calls == []


@pytest.mark.parametrize("shape", [(4,), (3, 5), (4, 5, 1)], ids=str)
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    sampler = make(guidance_scale=2.0, guidance=ClassifierGuidance(lambda x, t: x.new_zeros(shape) + 0 * x.sum()))
    with pytest.raises(fd.InputError, match="logits"):
        sampler((4, 3), y=Y)


def test_classes_the_classifier_lacks_are_refused() -> None:
    sampler = make(guidance_scale=2.0, guidance=ClassifierGuidance(lambda x, t: x @ torch.ones(3, 2)))
    with pytest.raises(fd.InputError, match="classes"):
        sampler((4, 3), y=Y)


def test_a_guidance_of_one_s_own() -> None:
    """Whoever derives from Guidance says what the network is asked; the rest is the loop's."""

    class Perturbed(Guidance):
        def conditions(self, model: Any, n: int, cond: Any, uncond: Any) -> fd.guidance.Conditions:
            return fd.guidance.Conditions(cond, {"y": -cond["y"]})

    sampler = make(guidance_scale=2.0, guidance=Perturbed(), dtype=torch.float64)
    expected = make(dtype=torch.float64)((4, 3), y=3 * LABELS["y"])
    assert (sampler((4, 3), **LABELS) - expected).abs().max() <= 1e-12
