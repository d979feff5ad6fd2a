# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Bit-equality with the published implementations, at 12-bit odd scales where no ties occur."""

import warnings

import pytest
import torch
from nvfp4_reference import BF16, FP16, FP32, all_regimes, odd_scale

from nvfp4_utils import ActivationStatistics, fake_quantize, policies
from nvfp4_utils.histogram import codes_to_values


def gaussian(seed, dtype=FP32):
    return torch.randn(256, 512, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal_scales(x) -> list[float]:
    """12-bit odd scales that keep every block scale in E4M3's normal range."""
    b = x.float().reshape(-1, 16).abs().amax(1)
    low, high = b.max().item() / 2688, b.min().item() / 6 * 2**6
    assert high > 4 * low
    return [odd_scale(low * 1.01 * (high / low * 0.98) ** t) for t in (0.0, 0.2, 0.5, 0.8, 1.0)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_modelopt_reference_is_the_floor_convention(dtype):
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    for x in (gaussian(0, dtype), all_regimes(256, 256, dtype, seed=11)):
        amax = x.float().abs().max().item()
        for octave in (-9, -3, 0.1, 4, 10, 15, 19):
            g = odd_scale(amax * 2**octave / 2688)
            scale = torch.tensor(g)
            q, s, _ = module.NVFP4QTensor.quantize(
                x.clone(), block_size=16, weights_scaling_factor_2=scale
            )
            theirs = q.dequantize(dtype=FP32, scale=s, double_scale=scale, block_sizes={-1: 16})
            ours = fake_quantize(x, g, underflow="floor", out_dtype=FP32)
            assert int((ours != theirs).sum()) == 0


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_torchao_agrees_in_the_normal_range(dtype):
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = gaussian(1, dtype)
    for g in normal_scales(x):
        quantized = module.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=torch.tensor(g))
        for out_dtype in (FP32, BF16):
            theirs = quantized.dequantize(out_dtype)
            for underflow in ("flush", "floor"):
                ours = fake_quantize(x, g, underflow=underflow, out_dtype=out_dtype)
                assert int((ours != theirs).sum()) == 0


class Log2Histogram:
    """A statistic whose block percentiles are read as ModelOpt 0.47 reads them: float32, 512 bins."""

    def __init__(self, statistics):
        marginals = statistics.marginals
        self.amax = marginals.amax
        values = codes_to_values(marginals.block_codes, marginals.dtype).float()
        self.counts = torch.zeros(512, dtype=torch.int64)
        self.counts.index_add_(0, self.bin_of(values[values > 0]), marginals.block_counts[values > 0])

    @staticmethod
    def bin_of(values):
        return ((torch.log2(values) + 40) / 80 * 512).floor().long().clamp(0, 511)

    def block_amax_percentile(self, p, *, above):
        weights = self.counts.float()
        if above > 0:
            weights[: int(self.bin_of(torch.tensor(above)))] = 0
        at = int(torch.searchsorted(weights.cumsum(0), p / 100.0 * weights.sum()))
        return 2.0 ** (-40 + (min(at, 511) + 0.5) / 512 * 80)


@pytest.mark.parametrize("seed", range(2))
def test_headroom_of_modelopts_histogram_equals_modelopt_to_the_bit(seed):
    module = pytest.importorskip("modelopt.torch.quantization.calib.nvfp4_act_headroom")
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        gaussian(seed, BF16),
        gaussian(seed, FP16) * 30,
        torch.relu(gaussian(seed) - 2.5).bfloat16(),
        (gaussian(seed) * torch.exp(3 * torch.randn(256, 1, generator=generator))).bfloat16(),
        (gaussian(seed) * torch.exp(9 * torch.randn(256, 1, generator=generator))).bfloat16(),
        all_regimes(64, 256, BF16, seed=seed),
    ]
    for x in tensors:
        for options in (
            {},
            {"rho": 100.0},
            {"upper_percentile": 100.0},
            {"anchor_percentile": 12.5, "upper_percentile": 90.0, "rho": 3.0},
        ):
            theirs = module.NVFP4ActHeadroomCalibrator(**options)
            for part in x.split(100):
                theirs.collect(part)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "leaves no headroom" is one of the cases
                expected = theirs.compute_amax().item()
            statistics = ActivationStatistics.from_tensor(x)
            assert policies.headroom(Log2Histogram(statistics), **options) == expected
            if x is tensors[0] and not options:  # exact percentiles differ by under a bin
                assert abs(policies.headroom(statistics) / expected - 1) < 0.1
