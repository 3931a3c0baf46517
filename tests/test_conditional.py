"""Conditional sampling: from images, around what is known, between noises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import Gaussian, Mixture, model_of
from sampler_tools import SAMPLING, Writer, make
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.noise import Stream

# ---- image to image -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SAMPLING)
@pytest.mark.parametrize("strength", [0.1, 0.55, 1.0])
def test_an_image_is_noised_to_the_first_level_and_denoised(solver: str, strength: float) -> None:
    """With the noise of the seed; what follows is a run from that state."""
    sampler = make(Writer(), solver, 10, strength=strength, dtype=torch.float64)
    schedule = sampler.diffusion.schedule
    assert torch.equal(sampler.timesteps, schedule.timesteps(10)[-max(1, int(10 * strength)) :])
    image = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    noise = fd.noise.normal((4, 3), seed=5, stream=Stream.INITIAL, dtype=torch.float64)
    t = int(sampler.timesteps[0])
    start = schedule.alpha[t] * image + schedule.sigma[t] * noise
    assert torch.equal(sampler((4, 3), seed=5, image=image), sampler((4, 3), seed=5, x=start))


def test_an_image_of_the_data_stays_the_more_the_weaker_the_run() -> None:
    """Data at two points: a weak run keeps the side of the image, and all end on a point."""
    points = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    data = Mixture(torch.tensor([0.5, 0.5]).double(), points, torch.full((2,), 0.05).double())
    diffusion = fd.Diffusion(fd.Schedule.cosine(1000))
    image = torch.full((2000, 2), 0.8, dtype=torch.float64)
    kept = []
    for strength in (0.2, 0.6, 1.0):
        sampler = fd.Sampler(
            model_of(data, diffusion), diffusion, "dpmpp_2m", 50, strength=strength, dtype=torch.float64
        )
        x = sampler(image.shape, seed=0, image=image)
        assert (x.abs() - 1).abs().mean() < 0.1
        kept.append(float((x[:, 0] > 0).double().mean()))
    assert kept[0] > 0.99
    assert 0.55 < kept[1] < 0.999
    assert kept[2] == pytest.approx(0.5, abs=0.05)


def test_a_weak_run_needs_something_to_start_from() -> None:
    with pytest.raises(fd.InputError, match=r"a run of strength 0\.5 starts from an image or x"):
        make(strength=0.5)((4, 3))
    assert make(strength=0.5)((4, 3), x=torch.zeros(4, 3)).shape == (4, 3)


def test_an_image_is_found_again_by_runs_of_the_same_strength() -> None:
    data = Mixture.random(2, seed=3)
    diffusion = fd.Diffusion(fd.Schedule.cosine(1000))
    there, back = (
        fd.Sampler(model_of(data, diffusion), diffusion, solver, 200, strength=0.5, dtype=torch.float64)
        for solver in ("ddim_inverse", "ddim")
    )
    image = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noised = there(image.shape, x=image)
    assert (noised - image).abs().max() > 0.1
    assert (back(image.shape, x=noised) - image).abs().max() < 0.05


# ---- inpainting -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SAMPLING)
def test_what_is_kept_has_the_level_of_each_row_and_ends_as_it_was(solver: str) -> None:
    keep = torch.tensor([True, False, False])
    sampler = make(Writer(), solver, 6, dtype=torch.float64)
    alpha, sigma = sampler.table.alpha[1:], sampler.table.sigma[1:]
    image = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    states = list(sampler.iterate((4, 3), seed=3, image=image, keep=keep))
    for state in states:
        z = fd.noise.normal((4, 3), seed=3, step=state.step, stream=Stream.KNOWN, dtype=torch.float64)
        expected = alpha[state.step] * image + sigma[state.step] * z
        assert torch.equal(state.x[:, 0], expected[:, 0])
    assert torch.equal(states[-1].x[:, 0], image[:, 0])
    other = torch.where(keep, image, 9.0)
    assert torch.equal(sampler((4, 3), seed=3, image=other, keep=keep), states[-1].x), (
        "the rest of the image is not seen"
    )


def inpainted(solver: str, steps: int, **options: Any) -> tuple[Tensor, float]:
    """The unknown coordinate of a correlated Gaussian by runs that know the other one, and what it is correlated by."""
    share, keep = 0.8, torch.tensor([True, False])

    def denoise(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        covariance = torch.tensor([[1.0, share], [share, 1.0]], dtype=torch.float64)
        return alpha * x @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2)).T @ covariance

    diffusion = fd.Diffusion(fd.Schedule.cosine(1000), "sample")
    schedule = diffusion.schedule

    def model(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, schedule.alpha[int(t[0])], schedule.sigma[int(t[0])])

    sampler = fd.Sampler(model, diffusion, solver, steps, dtype=torch.float64, **options)
    return sampler((5_000, 2), seed=1, image=torch.full((5_000, 2), 1.5), keep=keep), share


def test_resampling_makes_what_is_unknown_fit_what_is_known() -> None:
    """Without it the unknown coordinate's mean falls short of the conditional one; with it, it comes near."""
    (plain, share), (fitted, _) = inpainted("ddpm", 50), inpainted("ddpm", 50, resample=(5, 10))
    mean = share * 1.5
    assert torch.equal(fitted[:, 0], torch.full((5_000,), 1.5).double())
    off = [abs(float(x[:, 1].mean()) - mean) for x in (plain, fitted)]
    assert off[0] > 0.1
    assert off[1] < off[0] / 3
    assert float(fitted[:, 1].std()) == pytest.approx((1 - share**2) ** 0.5, abs=0.1)


def test_resampling_without_anything_known_keeps_the_law() -> None:
    """Steps down and noise up again, of Gaussian data; ddpm's own error at 400 steps is 0.006 in the deviation."""
    data = Gaussian(0.7, 0.4)
    diffusion = fd.Diffusion(fd.Schedule.cosine(1000), "sample")
    sampler = fd.Sampler(model_of(data, diffusion), diffusion, "ddpm", 400, resample=(3, 4))
    assert len(sampler.table) == 1600
    x = sampler((5_000, 2), seed=0)
    assert float(x.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(x.std()) == pytest.approx(0.4, abs=0.016)


def test_the_way_between_two_noises() -> None:
    a, b = (fd.noise.normal((3, 1000), seed=seed, dtype=torch.float64) for seed in (0, 1))
    assert torch.allclose(fd.noise.slerp(a, b, 0.0), a)
    assert torch.allclose(fd.noise.slerp(a, b, 1.0), b)
    unit = [n / n.norm(dim=1, keepdim=True) for n in (a, b)]
    between = fd.noise.slerp(*unit, torch.tensor([0.25, 0.5, 0.75]))
    assert torch.allclose(between.norm(dim=1), torch.ones(3).double())
    angles = [(between * n).sum(1).arccos() for n in (*unit,)]
    assert torch.allclose(angles[0] / (angles[0] + angles[1]), torch.tensor([0.25, 0.5, 0.75]).double())
    assert torch.allclose(fd.noise.slerp(a, 2 * a, 0.5), 1.5 * a)
    assert fd.noise.slerp(a.float(), b.float(), 0.3).dtype == torch.float32
    with pytest.raises(fd.InputError, match="a and b must be alike"):
        fd.noise.slerp(a, b[:2], 0.5)
    with pytest.raises(fd.InputError, match="share must be one or one per sample"):
        fd.noise.slerp(a, b, torch.zeros(2))


# ---- images as conditions -------------------------------------------------------------------


def grey(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def halved(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 2)


def uncropped(x: Tensor) -> Tensor:
    """The left half, and where it is known."""
    known = torch.zeros_like(x[:, :1])
    known[..., : x.shape[-1] // 2] = 1
    return torch.cat((x * known, known), 1)


TASKS = {"super-resolution": (halved, 3), "colorization": (grey, 1), "uncropping": (uncropped, 4)}


def pictures(count: int, seed: int) -> Tensor:
    """Plain coloured 8 x 8 images with a brighter side: what is asked for can be told from each condition."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(count, 1, 1, 1, generator=generator) * torch.tensor([0.5, -0.5, 0.25]).reshape(1, 3, 1, 1)
    slope = torch.linspace(-0.5, 0.5, 8) * torch.randint(0, 2, (count, 1, 1, 1), generator=generator).mul(2).sub(1)
    return (colour + slope).expand(count, 3, 8, 8).contiguous()


def tiny_unet(channels: int) -> fd.UNet:
    shape: dict[str, Any] = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    return fd.UNet(8, **shape, attention_resolutions=(), condition_channels=channels)


@pytest.mark.parametrize(
    "task", ["super-resolution", *(pytest.param(task, marks=pytest.mark.slow) for task in [*TASKS][1:])]
)
def test_image_to_image_by_a_condition_joined_to_the_input(task: str) -> None:
    """A U-Net trained for some seconds gives back what belongs to the condition, not just any image of the data."""
    degrade, channels = TASKS[task]
    torch.manual_seed(0)
    unet = fd.UNet(
        8,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        condition_channels=channels,
    )
    diffusion = fd.Diffusion(fd.Schedule.cosine(100), "v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    for step in range(80):
        x0 = pictures(32, step)
        loss = diffusion.loss(unet, x0, seed=0, step=step, condition=degrade(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = pictures(16, 1000)
    images = fd.Sampler(unet.eval(), diffusion, "ddim", 10, clip=1.0)(wanted.shape, condition=degrade(wanted))
    off = (images - wanted).square().mean()
    any_other = (images - wanted.roll(1, 0)).square().mean()
    assert off < 0.3 * any_other
    assert (degrade(images) - degrade(wanted)).square().mean() < 0.05


def test_guidance_by_an_image() -> None:
    """The null condition of an image is what the caller says: zeros, or noise."""
    unet = tiny_unet(1).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    condition = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).repeat(2, 1, 1, 1)
    sampler = make(unet, steps=3, guidance_scale=2.0)
    with pytest.raises(fd.InputError, match="class-conditional"):
        sampler((2, 3, 8, 8), condition=condition)
    guided = sampler((2, 3, 8, 8), condition=condition, uncond={"condition": 0.0})
    two = make(unet, steps=3, guidance_scale=2.0, guidance=fd.guidance.ClassifierFree(batched=False))
    torch.testing.assert_close(
        guided, two((2, 3, 8, 8), condition=condition, uncond={"condition": 0.0}), rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(guided, make(unet, steps=3)((2, 3, 8, 8), condition=condition))
