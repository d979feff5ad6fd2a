# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The quantizer equals an enumeration of its grids on every bit, and refuses bad input."""

import math
import re

import numpy as np
import pytest
import torch
from nvfp4_reference import (
    BF16,
    E2M1,
    E2M1_MIDPOINTS,
    E4M3,
    E4M3_MIDPOINTS,
    FP16,
    FP32,
    SCALES,
    all_regimes,
    bits,
    mismatches,
    nearest,
    odd_scale,
    rational,
    reference,
)

from nvfp4_utils import fake_quantize, input_scale_from_amax, quantize
from nvfp4_utils.quantize import E2M1_VALUES, UNDERFLOWS, block_scale_e4m3, round_e2m1

DTYPES = (BF16, FP16, FP32)


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# ------------------------------------------------------------------------------- exact rounding


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_enumeration_in_every_regime(dtype, underflow):
    x = all_regimes(256, 256, dtype)
    for g in SCALES:
        for out_dtype in DTYPES:
            expected = reference(x, g, underflow, out_dtype)
            assert mismatches(fake_quantize(x, g, underflow=underflow, out_dtype=out_dtype),
                              expected) == 0  # fmt: skip


def test_the_scales_of_that_test_reach_every_regime():
    b = all_regimes(256, 256, BF16).float().reshape(-1, 16).abs().amax(1)
    s = b[None, :] / (6 * torch.tensor(SCALES)[:, None])
    assert (s > 448).any() and (s == 0).any()
    for low, high in ((2**-6, 448), (2**-9, 2**-6), (2**-10, 2**-9), (1e-30, 2**-10)):
        assert ((s > low) & (s < high)).sum() > 100


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_rational_arithmetic(dtype, underflow):
    x = all_regimes(4, 64, dtype, seed=1)
    for g in SCALES:
        y = fake_quantize(x, g, underflow=underflow, out_dtype=FP32)
        expected = [rational(b, g, underflow) for b in x.float().reshape(-1, 16).tolist()]
        assert mismatches(y, torch.tensor(expected).reshape(x.shape)) == 0


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float32_enumeration_at_scales_that_make_ties(dtype, underflow):
    x = all_regimes(128, 256, dtype, seed=2)
    for g in (2.0**-8, 2.0**-3, 1.0, *(input_scale_from_amax(a) for a in (0.75, 5.0, 100.0, 1e6))):
        expected = reference(x, g, underflow, FP32, arithmetic=np.float32)
        y = fake_quantize(x, g, underflow=underflow, out_dtype=FP32)
        assert mismatches(y, expected) == 0


@pytest.mark.parametrize("exponent", [-7, 0, 5])
def test_every_block_scale_code_midpoint_and_neighbour(exponent):
    g = 2.0**exponent
    targets = torch.from_numpy(np.concatenate([E4M3, E4M3_MIDPOINTS]))
    exact = (6 * g * targets).float()
    for b in (exact, torch.nextafter(exact, torch.tensor(math.inf)),
              torch.nextafter(exact, torch.tensor(0.0))):  # fmt: skip
        s = block_scale_e4m3(b[:, None], torch.tensor(g), "flush").flatten()
        expected = nearest(np.minimum(b.double().numpy() / (6 * g), 448), E4M3)
        assert s.tolist() == expected.tolist()
        x = torch.ones(len(b), 16) * b[:, None]
        assert mismatches(fake_quantize(x, g), reference(x, g, "flush", FP32, np.float32)) == 0
    codes = block_scale_e4m3(exact[:127, None], torch.tensor(g), "flush").flatten()
    assert codes.tolist() == E4M3.tolist()


def test_every_element_code_midpoint_and_neighbour():
    u = torch.from_numpy(np.concatenate([E2M1, E2M1_MIDPOINTS])).float()
    u = torch.cat([u, torch.nextafter(u, torch.tensor(9.0)), torch.nextafter(u, torch.tensor(0.0))])
    assert round_e2m1(u).tolist() == nearest(u.double().numpy(), E2M1).tolist()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    step = 2.0**-3 * 1.375  # a block scale code times a power of two
    x = torch.zeros(2, 16)
    x[:, :7], x[:, 7] = ties * step, 6 * step
    x[1] *= -1
    y = fake_quantize(x, 2.0**-3)
    assert (y / step)[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert mismatches(y[1], -y[0]) == 0


def test_a_block_scale_tie_at_half_the_smallest_subnormal_flushes_or_floors():
    x = torch.full((1, 16), 6 * 2.0**-10)
    assert (fake_quantize(x, 1.0) == 0).all()
    assert (fake_quantize(x, 1.0, underflow="floor") == 3 * 2.0**-9).all()
    x = torch.nextafter(x, torch.tensor(1.0))
    assert (fake_quantize(x, 1.0) == 3 * 2.0**-9).all()


def test_saturated_blocks_clip_at_the_calibrated_amax():
    x = torch.tensor([[5000.0, -2688.0, 2500.0, 1.0] * 4])
    assert fake_quantize(x, 1.0)[0, :4].tolist() == [2688.0, -2688.0, 2688.0, 0.0]


@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_zeros_keep_their_sign_in_zero_and_flushed_blocks(underflow):
    x = torch.tensor([[0.0, -0.0] * 8, [1e-6, -1e-6] * 8])
    y = fake_quantize(x, 1.0, underflow=underflow)
    assert (y == 0).all()
    assert torch.equal(torch.signbit(y), torch.signbit(x))


@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_doubling_the_scale_in_the_normal_range_changes_no_bit(underflow):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    b = x.float().reshape(-1, 16).abs().amax(1)
    g = odd_scale(b.max().item() / 2688 * 1.1)
    y = fake_quantize(x, g, underflow=underflow, out_dtype=FP32)
    doublings = int(math.log2(b.min().item() / (6 * g) / 2**-6))
    assert doublings > 8
    for k in range(1, doublings + 1):
        assert mismatches(fake_quantize(x, g * 2**k, underflow=underflow, out_dtype=FP32), y) == 0


# --------------------------------------------------------------------------- dtypes and layouts


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_input_dtype_by_default_and_the_input_is_kept(dtype):
    x = all_regimes(8, 64, dtype)
    before = x.clone()
    y = fake_quantize(x, 0.01)
    assert y.dtype == dtype
    assert mismatches(x, before) == 0
    assert mismatches(y, fake_quantize(x, 0.01, out_dtype=FP32).to(dtype)) == 0


def test_layout_and_scale_type_do_not_matter():
    x = all_regimes(48, 160, BF16).reshape(6, 8, 160)
    y = fake_quantize(x, 0.25)
    flat = fake_quantize(x.reshape(-1, 16), 0.25).reshape(x.shape)
    assert y.shape == x.shape and mismatches(y, flat) == 0
    assert mismatches(fake_quantize(x.transpose(0, 1), 0.25), y.transpose(0, 1)) == 0
    wide = torch.zeros(6, 8, 320, dtype=BF16)
    wide[..., ::2] = x
    assert mismatches(fake_quantize(wide[..., ::2], 0.25), y) == 0
    assert mismatches(fake_quantize(x[0, 0], 0.25), y[0, 0]) == 0
    for scale in (torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        assert mismatches(fake_quantize(x, scale), y) == 0


def test_the_scale_is_rounded_to_float32_first():
    x = all_regimes(32, 64, FP32)
    assert torch.equal(bits(fake_quantize(x, 0.1)), bits(fake_quantize(x, float(np.float32(0.1)))))


# ------------------------------------------------------------------------- input_scale_from_amax


def test_input_scale_is_divided_in_float64_and_rounded_once():
    amaxes = torch.arange(1, 4097, dtype=torch.float64) / 64
    expected = (amaxes.numpy() / 2688).astype(np.float32)
    assert input_scale_from_amax(amaxes).tolist() == expected.tolist()
    reciprocal = amaxes.numpy().astype(np.float32) * np.float32(1 / 2688)
    assert (reciprocal != expected).sum() > 100  # the shortcut is an ulp off
    assert input_scale_from_amax(2688) == 1.0
    assert input_scale_from_amax(3.0) == float(np.float32(3.0 / 2688))
    assert input_scale_from_amax(torch.tensor(2688.0)).dtype == FP32


@pytest.mark.parametrize("amax", [0.0, -1.0, math.nan, math.inf, 1e-36])
def test_input_scale_refuses_an_amax_that_calibrates_nothing(amax):
    got = float(np.float32(amax / 2688))
    message = (
        f"amax / 2688 is {got}; expected a finite positive float32 in [2**-126, 2**124). "
        "Calibrate on data with at least one nonzero finite value, or pass a positive scale."
    )
    with raises(ValueError, message):
        input_scale_from_amax(amax)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-39])
def test_bad_scale(scale):
    message = (
        f"input_scale is {scale}; expected a finite positive float32 in [2**-126, 2**124). "
        "Calibrate on data with at least one nonzero finite value, or pass a positive scale."
    )
    for value in (scale, torch.tensor(scale, dtype=torch.float64)):
        with raises(ValueError, message):
            fake_quantize(torch.ones(1, 16), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_bad_dtype(dtype):
    name = str(dtype).removeprefix("torch.")
    message = f"x has dtype {name}; expected one of bfloat16, float16, float32. Cast it first."
    with raises(TypeError, message):
        fake_quantize(torch.ones(1, 16).to(dtype), 1.0)


@pytest.mark.parametrize("shape", [(4, 17), (16, 8), (), (0, 16), (4, 0)])
def test_bad_shape(shape):
    message = (
        f"x has shape {shape}; expected a nonempty tensor whose last dimension is a multiple of "
        "16. Blocks run along the last dimension: reshape or pad it."
    )
    with raises(ValueError, message):
        fake_quantize(torch.ones(shape), 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype, bad):
    x = torch.ones(4, 32, dtype=dtype)
    x[1, 3] = x[3, 30] = bad
    message = (
        "x holds 2 values that are NaN or infinite; expected finite activations. Find the layer "
        "that overflows before calibrating."
    )
    with raises(ValueError, message):
        fake_quantize(x, 1.0)


def test_bad_convention_and_bad_output_dtype():
    message = (
        "underflow is 'clamp'; expected 'flush' (inference kernels) or 'floor' (ModelOpt's "
        "PyTorch reference)."
    )
    with raises(ValueError, message):
        fake_quantize(torch.ones(1, 16), 1.0, underflow="clamp")
    message = "out_dtype is torch.float64; expected bfloat16, float16 or float32."
    with raises(TypeError, message):
        fake_quantize(torch.ones(1, 16), 1.0, out_dtype=torch.float64)


def test_midpoints_are_where_the_rounding_changes():
    assert list(quantize.E2M1_MIDPOINTS) == E2M1_MIDPOINTS.tolist()
    for k, middle in enumerate(quantize.E2M1_MIDPOINTS):
        around = torch.tensor([np.nextafter(np.float32(middle), np.float32(end)) for end in (0, 9)])
        assert round_e2m1(around).tolist() == [E2M1_VALUES[k], E2M1_VALUES[k + 1]]
        assert round_e2m1(torch.tensor(middle)).item() == E2M1_VALUES[k + k % 2]


@pytest.mark.parametrize("x", [[1.0] * 16, np.ones(16, np.float32)])
def test_what_is_no_tensor_is_refused(x):
    message = f"x is a {type(x).__name__}; expected a tensor. Convert it with torch.tensor(x)."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fake_quantize(x, 1.0)


def test_scales_of_arrays_and_lists_have_their_shape():
    assert input_scale_from_amax([2688.0, 5376.0]).tolist() == [1.0, 2.0]
    assert input_scale_from_amax(np.full((2, 3), 2688.0)).shape == (2, 3)
    assert input_scale_from_amax(np.float64(2688)) == 1.0
