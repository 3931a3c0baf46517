"""Proves group_norm_silu against two passes in extended precision; at large means too."""

import numpy as np
import pytest
import torch
from op_tools import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    assert_within,
    check_group_norm,
    exact,
    lay_out,
    numpy_group_norm,
    randn,
    unit,
)

import fastdiff as fd

layouts = pytest.mark.parametrize("layout", LAYOUTS)


GROUPED = [((0, 4, 3, 3), 2), ((2, 3, 1, 1), 1), ((3, 6, 5), 3), ((2, 4, 3, 2, 3), 2), ((2, 6, 7, 5), 3), ((2, 8), 2)]
GROUPED += [((1, 8, 16, 16), 8), ((2, 5, 3, 3), 5), ((2, 7, 3), 1), ((1, 64, 8, 8), 32)]


@pytest.mark.parametrize(("shape", "groups"), GROUPED, ids=str)
@layouts
def test_group_norm_shapes_and_layouts(shape, groups, layout):
    check_group_norm(shape, groups, layout=layout)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_group_norm_dtypes(dtype, activation):
    check_group_norm((2, 8, 5, 3), 4, dtype, activation=activation)


@pytest.mark.parametrize("parts", ["", "w", "b", "wb", "s", "h", "sh", "ws", "bh"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_with_and_without_each_part(parts, layout):
    check_group_norm((2, 6, 4, 3), 2, layout=layout, parts=parts)


@pytest.mark.parametrize(("shape", "groups"), [((1, 1), 1), ((1, 4, 1, 1), 4), ((2, 4, 1, 1), 4)])
def test_groups_of_one_element_are_their_bias(shape, groups):
    x, bias = randn(shape, 0), randn(shape[1:2], 1)
    result = fd.ops.group_norm_silu(x, groups, None, bias, activation="none")
    rounding = 4 * unit(F32) * (1 + x.abs() / 1e-5**0.5)
    assert ((result.flatten(1) - bias).abs() <= rounding.flatten(1)).all()


def test_a_constant_group_is_its_bias():
    bias = randn((4,), 1)
    result = fd.ops.group_norm_silu(torch.full((2, 4, 5, 5), 7.0), 2, torch.ones(4), bias, activation="none")
    assert (result - bias[:, None, None]).abs().max() <= 4 * unit(F32) * 7 / 1e-5**0.5


def norm_error(x, groups, result):
    return float(np.abs(exact(result) - numpy_group_norm(x, groups)[0]).max())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("ratio", [0, 1, 10, 100, 1e3, 1e4])
def test_group_norm_does_not_cancel_at_large_means(ratio, layout):
    x = lay_out(randn((2, 8, 16, 16), 3) + ratio, layout)
    error = norm_error(x, 4, fd.ops.group_norm_silu(x, 4, activation="none"))
    assert error <= 8 * unit(F32) * (4 + ratio)
    eager = norm_error(x, 4, torch.nn.functional.group_norm(x.contiguous(), 4))
    assert error <= 2 * eager + 4 * unit(F32)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_group_norm_statistics_are_not_taken_in_half_precision(dtype):
    x = (randn((2, 4, 16, 16), 5) * 100 + 200).to(dtype)
    truth, _ = numpy_group_norm(x, 2)
    assert_within(fd.ops.group_norm_silu(x, 2, activation="none"), truth, 1.01 * unit(dtype) * np.abs(truth) + 1e-5)


def test_each_sample_is_normalised_alone():
    x = randn((5, 6, 4, 4), 0)
    whole = fd.ops.group_norm_silu(x, 3)
    for k in range(5):
        assert (whole[k] - fd.ops.group_norm_silu(x[k : k + 1], 3)[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_group_norm_does_not_cancel_on_planes_of_one_element(ratio, layout):
    """Such a tensor is contiguous in both formats, and ATen may take the wrong one."""
    x = lay_out(randn((2, 64, 1, 1), 3) + ratio, layout)
    error = norm_error(x, 2, fd.ops.group_norm_silu(x, 2, activation="none"))
    assert error <= 8 * unit(F32) * (4 + ratio)
