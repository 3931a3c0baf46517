"""Proves add_noise and diffusion_loss against their formulas, over hostile shapes, dtypes and layouts."""

import pytest
import torch
from op_tools import BF16, F16, F32, F64, LAYOUTS, SHAPES, check_add_noise, check_diffusion_loss, randn, wide_of

import fastdiff as fd
from fastdiff.noise import Stream, normal

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
levels = pytest.mark.parametrize("per_sample", [False, True], ids=["scalar", "per_sample"])


@shapes
@layouts
@levels
def test_add_noise_shapes_and_layouts(shape, layout, per_sample):
    check_add_noise(shape, F32, layout, per_sample)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("noise_dtype", [F32, F64, BF16, F16])
def test_add_noise_dtypes(dtype, noise_dtype):
    check_add_noise((3, 4, 5, 7), dtype, noise_dtype=noise_dtype)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_add_noise_draws_the_training_noise_of_its_address(dtype):
    x0 = randn((3, 2, 5), 0, dtype)
    place = {"seed": 5, "step": 9, "sample": [7, 1, 2]}
    noise = normal((3, 2, 5), stream=Stream.TRAINING, dtype=wide_of(dtype), **place)
    drawn = fd.ops.add_noise(x0, 0.8, 0.6, **place)
    assert torch.equal(drawn, fd.ops.add_noise(x0, 0.8, 0.6, noise))
    assert not torch.equal(drawn, fd.ops.add_noise(x0, 0.8, 0.6, seed=5, step=8, sample=[7, 1, 2]))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_add_noise_takes_levels_of_any_float_type(dtype, each_backend):
    x0, noise = randn((2, 3), 0), randn((2, 3), 1)
    alpha, sigma = torch.tensor([0.5, 0.25], dtype=dtype), torch.tensor([0.75, 1.0], dtype=dtype)
    expected = torch.stack([a * x + s * z for a, s, x, z in zip(alpha, sigma, x0, noise, strict=True)])
    assert torch.equal(fd.ops.add_noise(x0, alpha, sigma, noise), expected.float())
    assert torch.equal(fd.ops.add_noise(x0, alpha[0], sigma[0], noise)[0], expected.float()[0])


@shapes
@layouts
def test_diffusion_loss_shapes_and_layouts(shape, layout):
    check_diffusion_loss(shape, F32, layout)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("output_dtype", [F32, F64, BF16, F16])
def test_diffusion_loss_dtypes(dtype, output_dtype):
    check_diffusion_loss((3, 4, 5, 7), dtype, output_dtype=output_dtype)


def test_diffusion_loss_draws_the_noise_again_that_add_noise_drew(each_backend):
    x0, one, zero = randn((4, 3, 5), 0), torch.ones(4), torch.zeros(4)
    place = {"seed": 1, "step": 2, "sample": [3, 0, 9, 4]}
    noise = fd.ops.add_noise(torch.zeros_like(x0), 0.0, 1.0, **place)
    assert torch.equal(fd.ops.diffusion_loss(noise, x0, zero, one, one, **place), zero)
    given_noise = fd.ops.diffusion_loss(0 * x0, x0, one, one, one, noise)
    assert torch.equal(fd.ops.diffusion_loss(0 * x0, x0, one, one, one, **place), given_noise)
