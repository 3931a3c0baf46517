"""Proves every op within its error budget, backends equal where they must be, over random shapes, dtypes, layouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_tools import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    LONG,
    QUICK,
    check_add_noise,
    check_affine_step,
    check_diffusion_loss,
    check_group_norm,
    check_guide,
)

CASES = {
    "shape": st.lists(st.integers(1, 6), min_size=1, max_size=4).flatmap(
        lambda inner: st.integers(0, 4).map(lambda n: (n, *inner))
    ),
    "dtype": st.sampled_from([F32, F32, F64]),
    "narrow": st.sampled_from([F32, F64, BF16, F16]),
    "layout": st.sampled_from(LAYOUTS),
    "flags": st.tuples(*[st.booleans()] * 5),
    "stored": st.integers(0, 3),
    "seed": st.integers(0, 2**31),
    "decades": st.sampled_from([0, 30]),  # from 1 to whatever bfloat16 and float32 hold
}


def property_add_noise(shape, dtype, narrow, layout, flags, stored, seed, decades):
    check_add_noise(shape, narrow, layout, flags[0], dtype, seed, decades)


def property_diffusion_loss(shape, dtype, narrow, layout, flags, stored, seed, decades):
    check_diffusion_loss(shape, dtype, layout, narrow, seed, decades / 2)  # whose square float32 holds


def property_guide(shape, dtype, narrow, layout, flags, stored, seed, decades):
    check_guide(shape, narrow, layout, flags[0], seed, decades)


def property_affine_step(shape, dtype, narrow, layout, flags, stored, seed, decades):
    # The exponential of a fraction of any magnitude overflows.
    learned = flags[4] and not decades
    check_affine_step(shape, dtype, narrow, layout, *flags[:2], stored, *flags[2:4], learned, seed, decades)


def property_group_norm_silu(shape, dtype, narrow, layout, flags, stored, seed, decades):
    n, channels, *rest = shape
    parts = "".join(part for part, used in zip("wbsh", flags, strict=False) if used)
    activation = "silu" if flags[4] else "none"
    # At least two elements in each group: a group of one has its own test.
    check_group_norm((n, 2 * channels, *rest), channels, narrow, layout, parts, activation, seed)


PROPERTIES = {
    "add_noise": property_add_noise,
    "diffusion_loss": property_diffusion_loss,
    "guide": property_guide,
    "affine_step": property_affine_step,
    "group_norm_silu": property_group_norm_silu,
}
ops = pytest.mark.parametrize("op", PROPERTIES)


@ops
@QUICK
@given(case=st.fixed_dictionaries(CASES))
def test_properties(op, case):
    PROPERTIES[op](**case)


@pytest.mark.slow
@ops
@LONG
@given(case=st.fixed_dictionaries(CASES))
def test_properties_at_length(op, case):
    PROPERTIES[op](**case)
