# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What only a CUDA device can show: the compiled kernel, statistics and capture on it."""

import math

import pytest
import torch
from nvfp4_reference import BF16, FP16, FP32, all_regimes, mismatches, odd_scale

from nvfp4_utils import ActivationStatistics, capture, fake_quantize
from nvfp4_utils.quantize import UNDERFLOWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_triton_equals_the_reference_on_8_million_elements(dtype, underflow):
    x = all_regimes(2048, 4096, dtype, seed=20)
    on_gpu = x.cuda()
    for g in (odd_scale(2.0**e * 1.37) for e in (-14, -2, 8, 18)):
        for out_dtype in (BF16, FP16, FP32):
            expected = fake_quantize(x, g, underflow=underflow, out_dtype=out_dtype)
            found = fake_quantize(on_gpu, g, underflow=underflow, out_dtype=out_dtype)
            assert mismatches(found.cpu(), expected) == 0


def test_triton_equals_the_reference_at_scales_that_make_ties():
    x = all_regimes(1024, 1024, BF16, seed=21)
    for g in (1.0, 2.0**-6, 5 / 2688, 1e4 / 2688):
        found = fake_quantize(x.cuda(), g, out_dtype=FP32).cpu()
        assert mismatches(found, fake_quantize(x, g, out_dtype=FP32)) == 0


def test_nan_is_found_on_the_device():
    x = torch.ones(4096, 4096, dtype=BF16, device="cuda")
    x[-1, -1] = math.nan
    with pytest.raises(ValueError, match=r"^x holds 1 values that are NaN or infinite;"):
        fake_quantize(x, 1.0)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_modelopt_triton_kernel_agrees_in_the_normal_range(dtype):
    module = pytest.importorskip("modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper")
    generator = torch.Generator("cuda").manual_seed(22)
    x = torch.randn(2048, 4096, generator=generator, device="cuda").to(dtype)
    b = x.float().reshape(-1, 16).abs().amax(1)
    low, high = b.max().item() / 2688, b.min().item() / 6 * 2**6
    for t in (0.0, 0.3, 0.6, 1.0):
        g = odd_scale(low * 1.01 * (high / low * 0.98) ** t)
        amax = torch.tensor(2688 * g, device="cuda")  # exact: their division gives g back
        assert (amax / 2688).item() == g
        theirs = module.fp4_fake_quant_block(x, amax)
        assert int((fake_quantize(x, g) != theirs).sum()) == 0


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_statistics_on_the_device_equal_the_cpus(dtype):
    x = all_regimes(512, 1024, dtype, seed=23)
    cpu = ActivationStatistics.from_tensor(x)
    gpu = ActivationStatistics()
    for part in x.cuda().split(100):
        gpu.update(part)
    assert gpu.keys.is_cuda
    moved = gpu.to("cpu")
    assert torch.equal(moved.keys, cpu.keys) and torch.equal(moved.counts, cpu.counts)
    scales = [2.0**e * 1.1 for e in range(-24, 12, 3)]
    for underflow in UNDERFLOWS:
        assert gpu.mse(scales, underflow) == pytest.approx(cpu.mse(scales, underflow), rel=1e-12)
    assert gpu.amax == cpu.amax and gpu.percentile(99.9) == cpu.percentile(99.9)


def test_capture_runs_on_the_device():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3_5ForCausalLM(config).bfloat16().cuda()
    mask = torch.ones(6, 32, dtype=torch.long)
    mask[1, 10:] = 0
    ids = torch.randint(1, 97, (6, 32)) * mask
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    found = capture(model, batches, ["mlp_input", "down_proj_input"], group_size=4, progress=False)
    assert len(found) == 8
    for label, site in found.items():
        width = 128 if "down" in label else 64
        assert [g.count for g in site.groups] == [(3 * 32 + 10) * width, 2 * 32 * width]
        assert not site.sequence_amax.is_cuda
        assert site.total.amax == site.sequence_amax.max()
        assert site.total.snr_db(site.total.amax / 2688) > 10
