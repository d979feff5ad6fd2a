# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What only a CUDA device can show: the compiled kernel, statistics and capture on it."""

import math
import sys

import pytest
import torch
from nvfp4_reference import BF16, FP16, FP32, all_regimes, mismatches, odd_scale

from nvfp4_utils import ActivationStatistics, capture, fake_quantize
from nvfp4_utils.histogram import count_on_cpu, count_on_device, joint_histogram
from nvfp4_utils.quantize import UNDERFLOWS
from studies.bench.timing import fresh_seed, histogram_hash, make

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nvfp4_utils.device_counter import DeviceCounter, Reports  # noqa: E402
from nvfp4_utils.kernels.fake_quantize import ratio, reciprocal  # noqa: E402
from nvfp4_utils.kernels.joint_table import count_pairs_triton  # noqa: E402

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


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_on_the_device_is_checked_there(bad):
    x = torch.ones(64, 64, dtype=BF16, device="cuda")
    with pytest.raises(ValueError, match=r"^input_scale is .*; expected a finite positive float32"):
        fake_quantize(x, torch.tensor(bad, device="cuda"))


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


KINDS = ("gaussian", "lognormal", "equal", "swiglu")


def same(a, b) -> bool:
    return torch.equal(a[0].cpu(), b[0].cpu()) and torch.equal(a[1].cpu(), b[1].cpu())


@pytest.mark.parametrize("kind", [*KINDS, "regimes", "relu", "zeros", "wide", "wide blocks", "part"])
def test_both_device_histograms_equal_the_cpus(kind):
    generator = torch.Generator("cuda").manual_seed(fresh_seed())

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    exponents = torch.randint(-60, 60, (2**16, 16), generator=generator, device="cuda")
    x = {
        "regimes": lambda: all_regimes(512, 1024, BF16, seed=24).cuda(),
        "relu": lambda: torch.relu(normal(999, 4112) - 1),
        "zeros": lambda: torch.zeros(5, 16, device="cuda"),
        "wide": lambda: normal(2**16, 16) * torch.exp2(exponents[:, :1].float()),
        "wide blocks": lambda: normal(2**16, 16) * torch.exp2(exponents.float()),
        "part": lambda: normal(2**20)[48 : 16 * 9999],
    }.get(kind, lambda: make(kind, 2**23, "cuda", fresh_seed()))()
    blocks = x.to(BF16).view(torch.int16).view(-1, 16)
    expected = count_on_cpu(blocks.cpu(), BF16)
    assert int(expected[1].sum()) == x.numel()
    assert same(joint_histogram(x.to(BF16)), expected)
    assert same(count_on_device(blocks, BF16, count_pairs_triton), expected)


def test_a_histogram_does_not_move_between_runs():
    x = make("lognormal", 2**26, "cuda", fresh_seed())
    hashes = {histogram_hash(*joint_histogram(x)) for _ in range(20)}
    assert len(hashes) == 1


@triton.jit
def _compare_ratios(bad_ptr, MANTISSA: tl.constexpr, SIZE: tl.constexpr):
    mantissa = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    step = (mantissa | 0x3F800000).to(tl.float32, bitcast=True)
    bad = tl.zeros((SIZE,), tl.int32)
    for k in range(0, 1 << MANTISSA):  # every mantissa of one octave: the others are alike
        bits = 0x3F800000 + (k << (23 - MANTISSA)) + tl.zeros((SIZE,), tl.int32)
        a = bits.to(tl.float32, bitcast=True)
        bad += (tl.div_rn(a, step) != ratio(a, step, reciprocal(step))).to(tl.int32)
    tl.atomic_add(bad_ptr, tl.sum(bad, axis=0))


@pytest.mark.parametrize("mantissa", [7, 10])
def test_ratio_rounds_like_division_for_every_element_and_step(mantissa):
    bad = torch.zeros(1, dtype=torch.int32, device="cuda")
    _compare_ratios[(2**23 // 256,)](bad, mantissa, 256)
    assert bad.item() == 0


def test_a_counter_counts_what_leaves_its_window_padding_and_zeros():
    generator = torch.Generator("cuda").manual_seed(25)
    x = torch.randn(4, 64, 4096, generator=generator, device="cuda")
    x[0, 3] = 0
    parts = [x, x * 2.0**20, x * torch.exp2(-20 * (x > 3)), x * 2.0**-100]
    keep = torch.ones(4, 64, dtype=torch.bool, device="cuda")
    keep[1, 20:] = False
    counter, expected, amax = DeviceCounter(Reports()), ActivationStatistics(), []
    for part in parts:
        amax.append(counter.add(part.to(BF16), keep, 44))
        expected.update(part.to(BF16)[keep])
        kept = part.to(BF16).masked_fill(~keep[..., None], 0)
        assert torch.equal(amax[-1], kept.abs().flatten(1).amax(1))
    counter.close()
    found = counter.finish()
    assert torch.equal(found.keys, expected.keys) and torch.equal(found.counts, expected.counts)
    base, rows = counter.next_window
    assert base < 0x3F80 < base + rows


def test_a_counter_finds_nan_and_changes_in_place():
    x = torch.randn(2, 8, 64, device="cuda").to(BF16)
    x[1, 2, 3:5] = math.nan
    counter = DeviceCounter(Reports())
    counter.add(x, None, 0)
    with pytest.raises(ValueError, match=r"^x holds 2 values that are NaN or infinite;"):
        counter.finish()
    x = torch.ones(2, 8, 64, device="cuda").to(BF16)
    counter = DeviceCounter(Reports())
    counter.add(x, None, 0)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"^the model overwrote an activation in place"):
        counter.close()


@pytest.mark.parametrize("room", [0, math.inf])
def test_capture_runs_on_the_device(room, monkeypatch):
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
    module = sys.modules["nvfp4_utils.counters"]
    if not room:
        monkeypatch.setattr(module, "CLOSED_BYTES", 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    found = capture(model, batches, ["mlp_input", "down_proj_input"], group_size=4, progress=False)
    assert len(found) == 8
    assert all(site.groups[0].keys.is_cuda == (room > 0) for site in found.values())
    for label, site in found.items():
        width = 128 if "down" in label else 64
        assert [g.count for g in site.groups] == [(3 * 32 + 10) * width, 2 * 32 * width]
        assert not site.sequence_amax.is_cuda
        assert site.total.amax == site.sequence_amax.max()
        assert site.total.snr_db(site.total.amax / 2688) > 10
