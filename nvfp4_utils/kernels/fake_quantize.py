# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The NVFP4 fake quantizer in Triton: one pass over memory, bit-equal to the PyTorch reference.

Rounding uses no FP8 or FP4 conversion instruction: adding and subtracting 1.5 * 2**23 ulps of the
target grid rounds to nearest even in float32. So the kernel runs on every CUDA device Triton
supports, and under Triton's interpreter (``TRITON_INTERPRET=1``), which the CPU tests use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCKS, WARPS = 128, 4  # a program: one block of 16 elements a thread


@triton.jit
def _binade(s):
    """2**floor(log2 s) of positive normal float32 values, from the exponent bits."""
    return (s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_binade(s):
    """1 / _binade(s); 2**127 for zero and subnormal values."""
    return (0x7F000000 - (s.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(s):
    """Nearest-even E4M3 of float32 in [0, 448]: spacing binade / 8, at least 2**-9."""
    binade = tl.maximum(_binade(s), 0.015625)
    # Adds and takes off 1.5 * 2**20 binades; their product is exact, so each line rounds once.
    rounded = tl.fma(binade, 1572864.0, s)
    return tl.fma(binade, -1572864.0, rounded)


@triton.jit
def round_e2m1(u):
    """Nearest-even E2M1 of float32 in [0, 6]: spacing binade / 2, at least 0.5."""
    binade = tl.maximum(_binade(u), 1.0)
    rounded = tl.fma(binade, 6291456.0, u)  # 1.5 * 2**22 binades
    return tl.fma(binade, -6291456.0, rounded)


@triton.jit
def reciprocal(x):
    """``1 / x`` correctly rounded for ``ratio``: one Newton step from Triton's approximate division."""
    r = 1.0 / x
    return tl.fma(tl.fma(r, -x, 1.0), r, r)


@triton.jit
def ratio(a, b, reciprocal_of_b):
    """``a / b`` as IEEE division rounds it: a product, corrected by its own remainder.

    For ``b`` in [1, 2) and ``a`` far from float32's ends, at a third of division's cost. Checked for
    every mantissa of ``b`` and of 16-bit ``a``.
    """
    u = a * reciprocal_of_b
    return tl.fma(tl.fma(u, -b, a), reciprocal_of_b, u)


@triton.jit
def _block_scale(block_amax, g, FLOOR: tl.constexpr, DIVIDE: tl.constexpr):
    """E4M3 scale of each block: ``block_amax / (6 g)``, rounded."""
    six_g = 6.0 * g
    if DIVIDE:
        s = tl.div_rn(block_amax, tl.zeros_like(block_amax) + six_g)
    else:
        power = _inverse_binade(six_g)
        six_g *= power
        s = ratio(tl.minimum(block_amax * power, 1024.0), six_g, reciprocal(six_g))
    s = tl.minimum(s, 448.0)
    s8 = round_e4m3(s)
    if FLOOR:
        s8 = tl.where(s == 0.0, 1.0, tl.maximum(s8, 0.001953125))
    return s8


@triton.jit
def _quantize(x, step, DIVIDE: tl.constexpr):
    """E2M1 value of ``|x| / step`` times ``step``, with the sign of ``x``; a step a row."""
    if DIVIDE:
        u = tl.div_rn(tl.abs(x), tl.broadcast_to(step[:, None], x.shape))
        u = tl.where(step[:, None] == 0.0, 0.0, tl.minimum(u, 6.0))
    else:
        # A power of two takes the step to [1, 2); what saturates is clipped: no overflow below.
        power = _inverse_binade(step)
        scaled = tl.maximum(step * power, 1.1920928955078125e-07)  # 2**-23: a step of 0 divides too
        a = tl.minimum(tl.abs(x) * power[:, None], 6.0 * scaled[:, None])
        u = ratio(a, scaled[:, None], reciprocal(scaled)[:, None])
    y = round_e2m1(u) * step[:, None]
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _fake_quantize_kernel(
    x_ptr, y_ptr, bad_ptr, scale_ptr, n_blocks,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, FLOOR: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    g = tl.load(scale_ptr)
    # A thread loads 16 bytes at a time. Two loads give it a whole block, and each scale is made once.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offset = block[:, None] * SIZE + tl.arange(0, SIZE // 2)[None, :]
    inside = (block < n_blocks)[:, None]
    first = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offset + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    larger = tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL)
    # As integers, NaN compares greater than infinity, and infinity than every finite value.
    amax_bits = tl.max(larger.to(tl.int32, bitcast=True), axis=1)
    block_amax = amax_bits.to(tl.float32, bitcast=True)
    step = _block_scale(block_amax, g, FLOOR, DIVIDE) * g
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + offset, _quantize(first, step, DIVIDE).to(dtype), mask=inside)
    tl.store(y_ptr + offset + SIZE // 2, _quantize(second, step, DIVIDE).to(dtype), mask=inside)
    # Checked last: here a program's warps wait for each other.
    if (tl.max(amax_bits, axis=0) >= 0x7F800000) | (g < LOWEST) | (g >= HIGHEST) | (g != g):
        tl.store(bad_ptr, 1)


def launch(
    x: torch.Tensor, y: torch.Tensor, bad: torch.Tensor, input_scale: torch.Tensor, floor: bool,
    block_size: int, lowest: float, highest: float,
) -> None:  # fmt: skip
    """Fake-quantize contiguous ``x`` into ``y``, block scales floored or flushed; nothing is waited for.

    ``bad`` [1] becomes 1 if ``x`` has NaN or infinity, or the scale is not in ``[lowest, highest)``.
    """
    n_blocks = x.numel() // block_size
    with torch.cuda.device_of(x):
        _fake_quantize_kernel[(triton.cdiv(n_blocks, BLOCKS),)](
            x, y, bad, input_scale, n_blocks, LOWEST=lowest, HIGHEST=highest, FLOOR=floor,
            # Triton's interpreter has no fused multiply-add, and float32 input is not checked.
            DIVIDE=x.dtype == torch.float32 or not x.is_cuda,
            BLOCKS=BLOCKS, SIZE=block_size, num_warps=WARPS,
        )  # fmt: skip


def new_flag(x: torch.Tensor) -> torch.Tensor:
    """A cleared ``bad`` in host memory: the kernel writes it when it must, nothing is copied back."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=x.is_cuda)
