# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The Triton kernels equal the enumeration; in the interpreter without a GPU, else on it."""

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
    mismatches,
    nearest,
    reference,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nvfp4_utils import ActivationStatistics  # noqa: E402
from nvfp4_utils.histogram import count_on_device  # noqa: E402
from nvfp4_utils.kernels import joint_table  # noqa: E402
from nvfp4_utils.kernels.fake_quantize import (  # noqa: E402
    round_e2m1,
    round_e4m3,
)
from nvfp4_utils.quantize import UNDERFLOWS, fake_quantize_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates float32 to bfloat16 instead of rounding (seen in 3.6 and before),
# so bfloat16 output is compared on a GPU only.
OUT_DTYPES = (BF16, FP16, FP32) if DEVICE == "cuda" else (FP16, FP32)


@triton.jit
def _round_kernel(x_ptr, y_ptr, n, E4M3_GRID: tl.constexpr, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    y = round_e4m3(x) if E4M3_GRID else round_e2m1(x)
    tl.store(y_ptr + offset, y, mask=offset < n)


def rounded(values: np.ndarray, e4m3: bool) -> np.ndarray:
    x = torch.from_numpy(values.astype(np.float32)).to(DEVICE)
    y = torch.empty_like(x)
    _round_kernel[(triton.cdiv(len(x), 4096),)](x, y, len(x), E4M3_GRID=e4m3, SIZE=4096)
    return y.cpu().numpy().astype(np.float64)


@pytest.mark.parametrize("e4m3", [True, False])
def test_rounding_on_codes_midpoints_neighbours_and_many_values(e4m3):
    grid, middle = (E4M3, E4M3_MIDPOINTS) if e4m3 else (E2M1, E2M1_MIDPOINTS)
    points = np.concatenate([grid, middle]).astype(np.float32)
    random = np.random.default_rng(0)
    values = np.concatenate([
        points,
        np.nextafter(points, np.float32(1e9)),
        np.nextafter(points, np.float32(0)),
        (2 ** random.uniform(-14, 9, 500_000)).astype(np.float32),
        (random.uniform(0, 8, 200_000)).astype(np.float32),
        np.array([1e-30, 2.0**-140], np.float32),
    ])  # fmt: skip
    values = np.minimum(values, np.float32(grid.max()))
    assert (rounded(values, e4m3) == nearest(values.astype(np.float64), grid)).all()


def quantized(x, g, underflow, out_dtype):
    scale = torch.tensor(g, dtype=FP32, device=DEVICE)
    return fake_quantize_kernel(x.to(DEVICE), scale, underflow, out_dtype).cpu()


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_equals_enumeration_in_every_regime(dtype, underflow):
    x = all_regimes(64, 256, dtype)
    for g in SCALES:
        for out_dtype in OUT_DTYPES:
            y = quantized(x, g, underflow, out_dtype)
            assert mismatches(y, reference(x, g, underflow, out_dtype)) == 0


@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_ties_go_where_the_specified_float32_arithmetic_puts_them(underflow):
    x = all_regimes(64, 256, BF16, seed=4)
    for g in (1.0, 2.0**-5, float(np.float32(5 / 2688))):
        expected = reference(x, g, underflow, FP32, arithmetic=np.float32)
        assert mismatches(quantized(x, g, underflow, FP32), expected) == 0


@pytest.mark.parametrize("shape", [(1823, 112), (16,), (3, 1, 48), (256, 16), (257, 16)])
def test_awkward_sizes(shape):
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    x = all_regimes(rows, columns, BF16, seed=5).reshape(shape)
    y = quantized(x, SCALES[3], "flush", FP32)
    assert mismatches(y, reference(x, SCALES[3], "flush", FP32)) == 0


def test_non_contiguous_input():
    x = all_regimes(64, 160, BF16, seed=6).reshape(8, 8, 160).transpose(0, 1)
    y = quantized(x, SCALES[3], "floor", FP32)
    assert mismatches(y, reference(x, SCALES[3], "floor", FP32)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_nan_and_infinity_are_found_by_the_kernel(dtype, bad):
    x = torch.ones(300, 16, dtype=dtype)
    x[299, 15] = bad
    message = (
        "x holds 1 values that are NaN or infinite; expected finite activations. Find the layer "
        "that overflows before calibrating."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quantized(x, 1.0, "flush", BF16)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 2.0**-127, 2.0**124])
def test_a_scale_out_of_range_is_found_by_the_kernel(bad):
    message = f"input_scale is {bad}; expected a finite positive float32 in [2**-126, 2**124)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        quantized(torch.ones(300, 16, dtype=BF16), bad, "flush", FP32)


@pytest.mark.parametrize("good", [2.0**-126, float(np.nextafter(np.float32(2.0**124), np.float32(0)))])
def test_the_first_and_the_last_scale_are_taken(good):
    assert bool(torch.isfinite(quantized(torch.zeros(1, 16, dtype=BF16), good, "flush", FP32)).all())


@pytest.mark.parametrize("rows, listed", [(4096, 5000), (64, 5000), (64, 7)])
@pytest.mark.parametrize("name", ["gaussian", "regimes", "equal", "zeros", "relu", "one block"])
def test_the_device_histogram_counts_every_pair(name, rows, listed, monkeypatch):
    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    x = {
        "gaussian": normal,
        "regimes": all_regimes(64, 256, BF16, seed=8),
        "equal": torch.full((3, 48), 1.25),
        "zeros": torch.zeros(1, 16),
        "relu": torch.relu(normal - 2),
        "one block": normal[:1, :16],
    }[name].to(BF16)
    monkeypatch.setattr(joint_table, "MAX_ROWS", rows)
    monkeypatch.setattr(joint_table, "LISTED", listed)
    found = count_on_device(x.to(DEVICE).view(torch.int16).view(-1, 16), BF16)
    expected = ActivationStatistics.from_tensor(x)
    assert torch.equal(found[0].cpu(), expected.keys)
    assert torch.equal(found[1].cpu(), expected.counts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_found_by_the_histogram(bad):
    x = torch.ones(300, 16, dtype=BF16)
    x[299, 15] = bad
    with pytest.raises(ValueError, match=r"^x holds 1 values that are NaN or infinite;"):
        count_on_device(x.to(DEVICE).view(torch.int16), BF16)


def test_the_pinned_pytorch_has_the_private_names_that_the_cuda_kernels_use():
    utils = torch.cuda._utils
    assert callable(torch.cuda._compile_kernel) and callable(utils._get_gpu_runtime_library)
    assert callable(utils._CudaKernel.set_shared_memory_config)
    assert "func" in utils._CudaKernel(None, None).__dict__
