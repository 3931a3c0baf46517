"""guided-diffusion's interface: sampling against loops written down from the papers, respacing by its definition."""

from __future__ import annotations

import functools
import itertools
import math
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guided_diffusion_tools import (
    F64,
    SHAPE,
    VARIANCES,
    asked,
    betas_of,
    chain_of,
    every_variance,
    far,
    made,
    network,
    plain_steps,
    randn,
    spread,
)
from sampler_tools import classes_mlp
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.adapters.guided_diffusion import SpacedDiffusion, create_gaussian_diffusion, space_timesteps
from fastdiff.noise import Stream, normal

pytestmark = pytest.mark.usefixtures("one_thread")


def progressive(
    diffusion: SpacedDiffusion, how: SimpleNamespace, start: Tensor, **more: Any
) -> list[dict[str, Tensor]]:
    model = network(how.prediction, how.variance)
    given = {"clip_denoised": how.clip, "denoised_fn": how.denoised_fn, "seed": how.seed, **more}
    if how.cond_fn is not None:
        given["cond_fn"] = how.cond_fn
    if how.eta is None:
        return list(diffusion.p_sample_loop_progressive(model, start.shape, start, **given))
    return list(diffusion.ddim_sample_loop_progressive(model, start.shape, start, eta=how.eta, **given))


def compare(diffusion: SpacedDiffusion, chain: SimpleNamespace, how: SimpleNamespace) -> None:
    """Every step and every estimate in float64 to 1e-10, and the ends in float32 to 1e-5."""
    start = randn(1)
    plain = list(plain_steps(chain, network(how.prediction, how.variance), start, how))
    ours = progressive(diffusion, how, start)
    assert len(ours) == chain.n
    for step, (x, x0) in zip(ours, plain, strict=True):
        assert step.keys() == {"sample", "pred_xstart"}
        assert far(step["sample"], x) <= 1e-10
        assert far(step["pred_xstart"], x0) <= 1e-10
    narrow = progressive(diffusion, how, start.float())[-1]
    assert narrow["sample"].dtype == torch.float32
    assert far(narrow["sample"].double(), plain[-1][0]) <= 1e-5
    assert far(narrow["pred_xstart"].double(), plain[-1][1]) <= 1e-5


# ---- sampling ---------------------------------------------------------------------------------

SHORT = [
    (respacing, eta, prediction, variance, clip)
    for respacing in ("ddim50", "10,15,20")
    for eta in (None, 0.0, 0.5, 1.0)
    for prediction in ("epsilon", "sample")
    for variance in VARIANCES
    for clip in (True, False)
    if clip or eta is not None or prediction == "sample" or variance != "fixed_small"
]
LONG = [
    (respacing, eta, prediction, variance, True)
    for respacing in ("250", "")
    for eta, prediction, variance in (
        (None, "epsilon", "learned_range"),
        (None, "sample", "fixed_large"),
        (0.0, "epsilon", "fixed_small"),
        (0.5, "sample", "learned_range"),
    )
]


@pytest.mark.parametrize(("respacing", "eta", "prediction", "variance", "clip"), SHORT + LONG)
def test_every_step_is_the_paper_s(
    respacing: str, eta: float | None, prediction: str, variance: str, clip: bool
) -> None:
    diffusion = made(variance, prediction, timestep_respacing=respacing)
    chain = chain_of(sorted(space_timesteps(1000, respacing)))
    compare(diffusion, chain, asked(eta, variance, prediction, clip=clip))


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
@pytest.mark.parametrize("respacing", ["", "7", "1", "3,0,4"])
def test_the_cosine_schedule(eta: float | None, respacing: str) -> None:
    diffusion = made("learned_range", steps=60, noise_schedule="cosine", timestep_respacing=respacing)
    chain = chain_of(sorted(space_timesteps(60, respacing)), 60, "cosine")
    compare(diffusion, chain, asked(eta, "learned_range"))


def towards(x: Tensor, t: Tensor) -> Tensor:
    """A gradient that is another one at every timestep."""
    return 0.5 * (torch.cos(spread(t.to(x.dtype), x) / 50) - x)


@pytest.mark.parametrize("denoised_fn", [None, lambda x0: x0 - 0.1 * x0**3], ids=["plain", "denoised_fn"])
@pytest.mark.parametrize("clip", [True, False])
@every_variance
@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_guidance_and_denoised_fn_are_the_paper_s(
    eta: float | None, variance: str, clip: bool, denoised_fn: Any
) -> None:
    """The last step too: its mean moves by the variance at t = 0, which the posterior alone does not have."""
    diffusion = made(variance, "sample", timestep_respacing="4,4,2")
    how = asked(eta, variance, "sample", clip=clip, cond_fn=towards, denoised_fn=denoised_fn)
    compare(diffusion, chain_of(sorted(space_timesteps(1000, "4,4,2"))), how)


@pytest.mark.parametrize("eta", [None, 0.0])
def test_guided_estimates_of_noise(eta: float | None) -> None:
    how = asked(eta, "learned_range", cond_fn=towards)
    compare(made("learned_range", timestep_respacing="25"), chain_of(sorted(space_timesteps(1000, "25"))), how)


def test_denoised_fn_that_changes_nothing_changes_nothing() -> None:
    """Two ways through the engine: the model as it is with clamping rows, and the model as one of x0."""
    for eta in (None, 0.5):
        how, same = (asked(eta, "learned_range", denoised_fn=f) for f in (None, lambda x0: x0))
        diffusion = made("learned_range", timestep_respacing="ddim50")
        for one, other in zip(*(progressive(diffusion, h, randn(1)) for h in (how, same)), strict=True):
            assert far(one["sample"], other["sample"]) <= 1e-11


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("steps", [1000, 250])
@pytest.mark.parametrize("guided", [False, True])
def test_the_model_is_told_the_original_timesteps(rescale: bool, steps: int, guided: bool) -> None:
    told: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(y, torch.arange(3))
        told.append(t.clone())
        return 0.5 * x

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(t, told[-1])
        assert torch.equal(y, torch.arange(3))
        return -x

    diffusion = made(steps=steps, timestep_respacing="4,3", rescale_timesteps=rescale)
    whole = not rescale or steps == 1000
    numbers = [t if whole else t * 1000 / steps for t in diffusion.timestep_map]
    kwargs = {"y": torch.arange(3)}
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        told.clear()
        loop(model, SHAPE, model_kwargs=kwargs, cond_fn=cond_fn if guided else None)
        assert [t.tolist() for t in told] == [[pytest.approx(number, rel=1e-6)] * 3 for number in reversed(numbers)]
        assert {t.dtype for t in told} == {torch.int64 if whole else torch.float32}
    told.clear()
    diffusion.training_losses(model, randn(0).float(), torch.tensor([0, 3, 6]), kwargs)
    assert told[0].tolist() == pytest.approx([numbers[0], numbers[3], numbers[6]], rel=1e-6)


def test_a_gradient_by_autograd_as_scripts_take_it() -> None:
    weights = randn(3, (2, 5)).float()

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("ncd,ck->nk", x, weights)

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            chosen = classifier(x_in, t).log_softmax(-1)[range(len(x)), y]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * 40.0

    y, diffusion = torch.tensor([4, 0, 2]), made(timestep_respacing="25")
    model = lambda x, t, y: 0.9 * x  # noqa: E731
    guided, plain = (
        diffusion.ddim_sample_loop(model, SHAPE, cond_fn=c, model_kwargs={"y": y}, seed=1) for c in (cond_fn, None)
    )
    log_p = [classifier(x, y).log_softmax(-1)[range(3), y] for x in (guided, plain)]
    assert (log_p[0] > log_p[1] + 0.1).all()
    assert not guided.requires_grad


@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
def test_a_gradient_is_what_classifier_guidance_takes(eta: float | None) -> None:
    """The engine's own guidance by a classifier, where nothing is clamped and the last variance is 0."""
    weights, y = randn(3, (2, 5)), torch.tensor([4, 0, 2])
    guidance = fd.guidance.ClassifierGuidance(lambda x, t: torch.einsum("ncd,ck->nk", x, weights))
    model, diffusion = network("sample", "fixed_small"), made("fixed_small", "sample", timestep_respacing="25")
    loop = diffusion.p_sample_loop if eta is None else functools.partial(diffusion.ddim_sample_loop, eta=eta)
    start, cond_fn = randn(1), lambda x, t: 4.0 * guidance.gradient(x, t, y)
    ours = loop(model, SHAPE, start, clip_denoised=False, cond_fn=cond_fn, seed=2)
    options: dict[str, Any] = {"solver": "ddpm"} if eta is None else {"solver": "ddim", "eta": eta}
    options |= {"steps": diffusion.timestep_map[::-1], "guidance": guidance, "guidance_scale": 4.0, "dtype": F64}
    sampler = fd.Sampler(model, fd.Diffusion(fd.Schedule.linear(1000), "sample"), **options)
    assert far(ours, sampler(SHAPE, x=start, seed=2, y=y)) <= 1e-10


def test_another_model_is_another_run() -> None:
    diffusion = made(timestep_respacing="5")
    one, other = (diffusion.p_sample_loop(lambda x, t, k=k: k * x, SHAPE, seed=1) for k in (0.5, 0.9))
    assert far(one, other) > 1e-2


def test_the_loops_end_where_their_steps_do() -> None:
    diffusion, model = made(timestep_respacing="12"), network("epsilon", "fixed_large")
    for cond_fn in (None, towards):
        given = {"noise": randn(1).float(), "cond_fn": cond_fn, "seed": 3}
        *_, last = diffusion.p_sample_loop_progressive(model, SHAPE, **given)
        assert torch.equal(diffusion.p_sample_loop(model, SHAPE, **given), last["sample"])
        *_, last = diffusion.ddim_sample_loop_progressive(model, SHAPE, eta=0.3, **given)
        assert torch.equal(diffusion.ddim_sample_loop(model, SHAPE, eta=0.3, **given), last["sample"])


def test_seeds_and_torch_s_generator() -> None:
    diffusion, model = made(timestep_respacing="5"), network("epsilon", "fixed_large")
    start = normal(SHAPE, seed=7, stream=Stream.INITIAL)
    seeded = diffusion.p_sample_loop(model, SHAPE, seed=7)
    assert torch.equal(seeded, diffusion.p_sample_loop(model, SHAPE, start, seed=7))
    alone = diffusion.p_sample_loop(model, (1, 2, 4), seed=[7])
    assert torch.equal(seeded[:1], alone)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws += [diffusion.p_sample_loop(model, SHAPE) for _ in range(2)]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])


def own_networks() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = fd.UNet(8, model_channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return {"mlp": (classes_mlp(), (4, 2), {"y": torch.tensor([0, 1, 2, 1])}), "unet": (unet, (2, 3, 8, 8), {})}


@pytest.mark.parametrize("name", ["mlp", "unet"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_own_networks_whose_weights_change(loop: str, name: str) -> None:
    """A sampler is kept from call to call; weights and their precision are those of the call, in all ways to ask."""
    model, shape, kwargs = own_networks()[name]
    given: dict[str, Any] = {"shape": shape, "model_kwargs": kwargs, "seed": 1}
    run, elsewhere = (functools.partial(getattr(made(timestep_respacing="6"), loop), **given) for _ in range(2))

    def hidden(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return model(x.to(next(model.parameters()).dtype), t, **cond)

    def ways() -> list[Tensor]:
        return [run(model), run(model, denoised_fn=lambda x0: x0), elsewhere(hidden)]

    before = ways()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = ways()
    assert max(far(one, runs[0]) for runs in (before, after) for one in runs) <= 1e-4
    assert far(after[0], before[0]) > 1e-3
    model.bfloat16()
    for half in ways():
        assert half.dtype == torch.float32
        assert not torch.equal(half, after[0])
        assert name == "mlp" or far(half, after[0]) <= 0.2  # the small one's rounding grows from step to step


def test_progress_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    diffusion, model = made(timestep_respacing="5"), network("epsilon", "fixed_large")
    diffusion.p_sample_loop(model, SHAPE)
    assert capfd.readouterr().err == ""
    diffusion.p_sample_loop(model, SHAPE, progress=True)
    list(diffusion.ddim_sample_loop_progressive(model, SHAPE, progress=True))
    assert capfd.readouterr().err.count("sampling: 5/5") == 2


def test_ddim_reversed_is_the_way_back() -> None:
    """Every step along the slope seen where it begins (Song et al. 2021, eq. 14), and a smooth way there and back."""
    diffusion = made(timestep_respacing="100")
    chain, x = chain_of(diffusion.timestep_map), 0.5 * torch.tanh(randn(2))
    gain = lambda t: math.sqrt(1 - chain.bar[chain.kept.index(t)]) / (1 - 0.91 * chain.bar[chain.kept.index(t)])  # noqa: E731
    exact = lambda x, t: gain(int(t[0])) * x  # noqa: E731  # of data N(0, 0.09)
    plain, (alpha, sigma) = x, (1.0, 0.0)
    for i in range(chain.n):
        seen = max(i - 1, 0)
        out = exact(plain, torch.tensor([chain.kept[seen]]))
        x0 = (plain - math.sqrt(1 - chain.bar[seen]) * out) / math.sqrt(chain.bar[seen])
        epsilon = (plain - math.sqrt(chain.bar[seen]) * x0.clamp(-1, 1)) / math.sqrt(1 - chain.bar[seen])
        then = math.sqrt(chain.bar[i]), math.sqrt(1 - chain.bar[i])
        plain = then[0] * (plain / alpha + (then[1] / then[0] - sigma / alpha) * epsilon)
        alpha, sigma = then
    noise = diffusion.ddim_reverse_sample_loop(exact, x)
    assert far(noise, plain) <= 1e-10
    assert far(diffusion.ddim_sample_loop(exact, SHAPE, noise), x) <= 0.05


# ---- timesteps --------------------------------------------------------------------------------


def test_spacings_worked_by_hand() -> None:
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert space_timesteps(10, "ddim4") == {0, 3, 6, 9}
    assert space_timesteps(10, "ddim5") == {0, 2, 4, 6, 8}
    assert space_timesteps(10, "ddim2") == {0, 5}, "the smallest stride of those that would do"
    assert space_timesteps(10, "10") == space_timesteps(10, "") == set(range(10))
    assert space_timesteps(10, "7") == {0, 2, 3, 4, 6, 8, 9}, "1.5, 4.5 and 7.5 become even"
    assert space_timesteps(9, [3, 2]) == {0, 2, 4, 5, 8}, "sections of 5 and 4"
    assert space_timesteps(11, "2,1,2") == {0, 3, 4, 8, 10}, "sections of 4, 4 and 3"
    assert space_timesteps(1000, "1") == {0}
    # The docstring's own example: 300 timesteps, of whose hundreds 10, 15 and 20 are kept.
    kept = sorted(space_timesteps(300, "10,15,20"))
    assert kept[:10] == list(range(0, 100, 11))
    assert kept[10:13] == [100, 107, 114]
    assert kept[24:] == [199, *(200 + round(99 * i / 19) for i in range(20))]


def test_hundreds_of_random_sections() -> None:
    """So many of each section, both its ends, at equal distances: nowhere more than half a timestep off."""
    draw = random.Random(0)
    for _ in range(500):
        total = draw.randint(1, 1500)
        sections = draw.randint(1, min(total, 8))
        sizes = [total // sections + (i < total % sections) for i in range(sections)]
        counts = [draw.randint(1, size) for size in sizes]
        kept = space_timesteps(total, draw.choice((",".join(map(str, counts)), counts)))
        assert len(kept) == sum(counts)
        for first, size, count in zip(itertools.accumulate([0, *sizes]), sizes, counts, strict=False):
            of_section = sorted(t - first for t in kept if first <= t < first + size)
            assert len(of_section) == count
            assert of_section[0] == 0
            assert count == 1 or of_section[-1] == size - 1
            for i, t in enumerate(of_section):
                assert abs(t * (count - 1) - i * (size - 1)) <= (count - 1) * (0.5 + 1e-9)


@pytest.mark.parametrize("total", [1, 2, 25, 1000])
def test_whole_strides_and_no_others(total: int) -> None:
    """The condition is theirs: of 1000 timesteps, 62 numbers can be reached."""
    possible = {math.ceil(total / stride) for stride in range(1, total)}
    for count in range(total + 2):
        if count not in possible:
            with pytest.raises(fd.InputError, match=f"takes {count} of {total} timesteps"):
                space_timesteps(total, f"ddim{count}")
            continue
        kept = sorted(space_timesteps(total, f"ddim{count}"))
        assert len(kept) == count
        assert len(set(np.diff(kept))) <= 1
        assert kept[0] == 0
    assert total != 1000 or len(possible) == 62


def test_what_a_chain_says_of_itself() -> None:
    diffusion = made(timestep_respacing="10,15,20")
    chain = chain_of(sorted(space_timesteps(1000, "10,15,20")))
    assert diffusion.num_timesteps == 45
    assert diffusion.original_num_steps == 1000
    assert diffusion.timestep_map == chain.kept
    assert np.abs(diffusion.alphas_cumprod / chain.bar - 1).max() <= 1e-12
    assert np.abs(diffusion.betas / chain.beta - 1).max() <= 1e-10


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [21, 100, 1000, 4000])
def test_the_betas_of_all_steps(noise_schedule: str, steps: int) -> None:
    diffusion = made(steps=steps, noise_schedule=noise_schedule)
    assert np.abs(diffusion.betas / betas_of(steps, noise_schedule) - 1).max() <= 1e-9


# ---- what does not fit ------------------------------------------------------------------------

D, L = made(timestep_respacing="5"), made("learned_range", timestep_respacing="5")
X, T = torch.zeros(SHAPE), torch.tensor([0, 1, 4])
same = lambda x, t, **cond: x  # noqa: E731
BAD = {
    "steps": (lambda: create_gaussian_diffusion(steps=0), "steps must be a whole number of at least 1, got 0"),
    "steps in words": (lambda: create_gaussian_diffusion(steps="many"), "steps must be a whole number"),
    "few linear steps": (
        lambda: create_gaussian_diffusion(steps=19),
        "must be more than 20, got",
    ),
    "20 linear steps": (
        lambda: create_gaussian_diffusion(steps=20),
        "must be more than 20, got",
    ),
    "schedule": (lambda: create_gaussian_diffusion(noise_schedule="sqrt"), "unknown noise_schedule 'sqrt'"),
    "section": (lambda: made(timestep_respacing="1001"), "section 1 of '1001' has 1000 of 1000 timesteps, not 1001"),
    "sections": (lambda: space_timesteps(30, "10,11,10"), "section 2 of '10,11,10' has 10 of 30 timesteps, not 11"),
    "negative": (lambda: space_timesteps(30, "-1"), "not -1"),
    "none": (lambda: space_timesteps(30, "0,0"), "'0,0' keeps no timestep"),
    "words": (lambda: space_timesteps(30, "fast27"), "timestep_respacing must be whole numbers such as"),
    "gap": (lambda: space_timesteps(30, "10,,5"), "timestep_respacing must be whole numbers such as"),
    "fractions": (lambda: space_timesteps(30, [1.5]), "timestep_respacing must be whole numbers such as"),
    "a number": (lambda: space_timesteps(30, 250), "timestep_respacing must be whole numbers such as"),
    "ddim": (
        lambda: made(timestep_respacing="ddim60"),
        "no whole stride takes 60 of 1000 timesteps (ddim60): take ddim59 or ddim63, or 60 without ddim",
    ),
    "ddim, two": (lambda: space_timesteps(30, "ddim5,6"), "'ddim5,6' must be ddim and one whole number"),
    "ddim, none": (lambda: space_timesteps(30, "ddim"), "'ddim' must be ddim and one whole number"),
    "ddim, words": (lambda: space_timesteps(30, "ddimfifty"), "timestep_respacing must be whole numbers"),
    "no timesteps": (lambda: space_timesteps(0, "1"), "num_timesteps must be at least 1, got 0"),
    "process": (lambda: SpacedDiffusion(fd.Schedule.edm(9), [0]), "variance-preserving"),
    "no schedule": (lambda: SpacedDiffusion("linear", [0]), "variance-preserving Schedule, got 'linear'"),
    "timesteps in words": (lambda: SpacedDiffusion(fd.Schedule.linear(9), "1"), "use_timesteps must be whole numbers"),
    "a timestep": (lambda: SpacedDiffusion(fd.Schedule.linear(9), 5), "use_timesteps must be whole numbers, got 5"),
    "outside": (lambda: SpacedDiffusion(fd.Schedule.linear(9), [3, 9]), "timesteps must lie in 0...8"),
    "prediction": (lambda: SpacedDiffusion(fd.Schedule.linear(9), [3], prediction="x"), "unknown prediction 'x'"),
    "variance": (lambda: SpacedDiffusion(fd.Schedule.linear(9), [3], variance="x"), "unknown variance 'x'"),
    "loss": (lambda: SpacedDiffusion(fd.Schedule.linear(9), [3], loss_type="x"), "unknown loss_type 'x'"),
    "shape": (lambda: D.p_sample_loop(same, (4,)), "shape must be [N, C, ...]"),
    "no shape": (lambda: D.p_sample_loop(same, 4), "shape must be [N, C, ...]"),
    "noise": (lambda: D.p_sample_loop(same, SHAPE, X[:2]), "noise must have shape (3, 2, 4), got (2, 2, 4)"),
    "noise and no shape": (lambda: D.p_sample_loop(same, None, X), "noise must have shape None"),
    "whole noise": (lambda: D.p_sample_loop(same, SHAPE, X.long()), "noise must be a floating-point tensor"),
    "model": (lambda: D.p_sample_loop(None, SHAPE), "model must be callable, got NoneType"),
    "guided model": (lambda: D.p_sample_loop(3, SHAPE, cond_fn=same), "model must be callable, got int"),
    "denoised_fn": (lambda: D.p_sample_loop(same, SHAPE, denoised_fn=3), "denoised_fn must be callable, got int"),
    "cond_fn": (lambda: D.ddim_sample_loop(same, SHAPE, cond_fn=3), "cond_fn must be callable, got int"),
    "gradient": (
        lambda: D.ddim_sample_loop(same, SHAPE, cond_fn=lambda x, t: x[:1]),
        "the gradient of cond_fn must have shape [3, 2, 4], got [1, 2, 4]",
    ),
    "no gradient": (lambda: D.p_sample_loop(same, SHAPE, cond_fn=lambda x, t: None), "the gradient of cond_fn must be"),
    "denoised": (lambda: D.p_sample_loop(same, SHAPE, denoised_fn=lambda x: x[0]), "what denoised_fn gives must have"),
    "eta": (lambda: D.ddim_sample_loop(same, SHAPE, eta=1.5), "eta must lie in [0, 1], got 1.5"),
    "seed": (lambda: D.p_sample_loop(same, SHAPE, seed=1.5), "seed must hold whole numbers"),
    "model_kwargs": (lambda: D.p_sample_loop(same, SHAPE, model_kwargs=[1]), "model_kwargs must be {name: value}"),
    "a condition": (
        lambda: D.p_sample_loop(same, SHAPE, model_kwargs={"y": torch.zeros(2)}),
        "condition y must hold one row per sample (3)",
    ),
    "our own word": (
        lambda: D.p_sample_loop(same, SHAPE, model_kwargs={"image": X, "y": 1}),
        "model_kwargs cannot name image, which the engine does",
    ),
    "a bound's word": (lambda: D.calc_bpd_loop(same, X, True, {"x_start": X}), "model_kwargs cannot name x_start"),
    "channels": (lambda: L.p_sample_loop(same, SHAPE), "the model's out must be [3, 4, 4] with variance=learned_range"),
    "guided channels": (lambda: L.ddim_sample_loop(same, SHAPE, cond_fn=same), "the model's out must be [3, 4, 4]"),
    "trained channels": (lambda: L.training_losses(same, X, T), "the model's out must be [3, 4, 4]"),
    "no output": (lambda: D.training_losses(lambda x, t: None, X, T), "the model must return a tensor"),
    "t": (lambda: D.training_losses(same, X, T + 1), "t must lie in 0...4, got 1 to 5"),
    "t of another batch": (lambda: D.q_sample(X, T[:2]), "t must hold one timestep per sample (3), got [2]"),
    "t in fractions": (lambda: D.q_posterior_mean_variance(X, X, T.float()), "t must be int64"),
    "data": (lambda: D.training_losses(same, X.long(), T), "x_start must be a floating-point tensor"),
    "noise of another batch": (lambda: D.q_sample(X, T, X[:1]), "noise must have shape [3, 2, 4]"),
    "bytes": (
        lambda: made(use_kl=True).training_losses(same, X + 2, T),
        "the discrete decoder needs x0 in [-1, 1]",
    ),
    "bytes of the bound": (lambda: D.calc_bpd_loop(same, X + 2), "the discrete decoder needs x0 in [-1, 1]"),
    "not finite": (lambda: D.calc_bpd_loop(same, X * math.nan), "holds NaN or infinite values"),
    "nothing": (lambda: D.calc_bpd_loop(same, X[:0]), "x_start is empty"),
    "reversed": (lambda: D.ddim_reverse_sample_loop(same, 3), "x must be a tensor, got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(fd.InputError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_progressive_loops_check_before_they_are_asked() -> None:
    for loop in (D.p_sample_loop_progressive, D.ddim_sample_loop_progressive):
        with pytest.raises(fd.InputError):
            loop(same, (4,))


def test_the_room_of_adapters_is_entered_by_name() -> None:
    code = "import sys, fastdiff; before = {*sys.modules}; import fastdiff.adapters; print({*sys.modules} - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "{'fastdiff.adapters'}"
