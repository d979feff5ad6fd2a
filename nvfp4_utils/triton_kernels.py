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

from .quantize import (
    BLOCK_SIZE,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    Underflow,
    check_scale,
    nonfinite_error,
)

BLOCKS = 128  # a program; more, or more warps, are slower on an H100


@triton.jit
def _binade(s):
    """2**floor(log2 s) of positive normal float32 values, from the exponent bits."""
    return (s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(s):
    """Nearest-even E4M3 of float32 in [0, 448]: spacing binade / 8, at least 2**-9."""
    magic = tl.maximum(_binade(s), 0.015625) * 1572864.0  # 1.5 * 2**20 * max(binade, 2**-6)
    return (s + magic) - magic


@triton.jit
def round_e2m1(u):
    """Nearest-even E2M1 of nonnegative float32: spacing binade / 2, at least 0.5; at most 6."""
    u = tl.minimum(u, 8.0)  # keeps the sum exact; everything above 5 becomes 6
    magic = tl.maximum(_binade(u), 1.0) * 6291456.0  # 1.5 * 2**22 * max(binade, 1)
    return tl.minimum((u + magic) - magic, 6.0)


@triton.jit
def ratio(a, step, reciprocal):
    """``a / step`` for E2M1 rounding: a product, corrected by its own remainder.

    With ``reciprocal = 1 / step`` correctly rounded, ``step`` in [1, 2) and 16-bit ``a``, it rounds
    as IEEE division does: checked for every mantissa of both, at a third of division's cost.
    """
    u = a * reciprocal
    return tl.fma(tl.fma(-u, step, a), reciprocal, u)


@triton.jit
def _fake_quantize_kernel(
    x_ptr, y_ptr, bad_ptr, scale_ptr, n_blocks,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, FLOOR: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offset = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (block < n_blocks)[:, None]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(scale_ptr)
    if tl.program_id(0) == 0:
        if not (g >= LOWEST and g < HIGHEST):  # NaN too
            tl.store(bad_ptr + 1, 1)
    magnitude = tl.abs(x)
    # Integer maximum of the bits: NaN compares greater than every finite value.
    amax_bits = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1)
    if tl.max(amax_bits, axis=0) >= 0x7F800000:
        tl.store(bad_ptr, 1)
    block_amax = amax_bits.to(tl.float32, bitcast=True)
    s = tl.minimum(tl.div_rn(block_amax, tl.zeros_like(block_amax) + 6.0 * g), 448.0)
    s8 = round_e4m3(s)
    if FLOOR:
        s8 = tl.where(s == 0.0, 1.0, tl.maximum(s8, 0.001953125))
    step = s8 * g
    if DIVIDE:
        u = tl.div_rn(magnitude, tl.broadcast_to(step[:, None], (BLOCKS, SIZE)))
        q = tl.where(step[:, None] == 0.0, 0.0, round_e2m1(u))
    else:
        # A power of two takes step to [1, 2) and clips what saturates: no over- or underflow below.
        power = (0x7F000000 - (step.to(tl.int32, bitcast=True) & 0x7F800000)).to(
            tl.float32, bitcast=True
        )
        scaled = step * power
        reciprocal = tl.where(step == 0.0, 0.0, tl.div_rn(tl.zeros_like(scaled) + 1.0, scaled))
        a = tl.minimum(magnitude * power[:, None], 32.0)
        q = round_e2m1(ratio(a, scaled[:, None], reciprocal[:, None]))
    y = q * step[:, None]
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    y = (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor, y: torch.Tensor, bad: torch.Tensor, input_scale: torch.Tensor, underflow: Underflow
) -> None:
    """Fake-quantize contiguous ``x`` into ``y``.

    ``bad`` [2] becomes 1 where ``x`` has NaN or infinity, and where the scale is out of range.
    """
    n_blocks = x.numel() // BLOCK_SIZE
    _fake_quantize_kernel[(triton.cdiv(n_blocks, BLOCKS),)](
        x, y, bad, input_scale, n_blocks,
        LOWEST=LOWEST_SCALE, HIGHEST=HIGHEST_SCALE,
        FLOOR=underflow == "floor",
        # Triton's interpreter has no fused multiply-add, and float32 input is not checked.
        DIVIDE=x.dtype == torch.float32 or not x.is_cuda,
        BLOCKS=BLOCKS, SIZE=BLOCK_SIZE, num_warps=4,
    )  # fmt: skip


def fake_quantize_triton(
    x: torch.Tensor, input_scale: torch.Tensor, underflow: Underflow, out_dtype: torch.dtype
) -> torch.Tensor:
    """Run the kernel; the arguments are those ``fake_quantize`` has checked.

    Raises ``ValueError`` for NaN or infinity in ``x`` and for a scale out of range; the kernel finds
    both, so the host waits once.
    """
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    # In host memory: the kernel writes it when it must, and there is nothing to copy back.
    bad = torch.zeros(2, dtype=torch.int32, pin_memory=x.is_cuda)
    with torch.cuda.device_of(x):
        launch(x, y, bad, input_scale, underflow)
        if x.is_cuda:
            torch.cuda.current_stream().synchronize()
    if bad[1]:
        check_scale(input_scale)
    if bad[0]:
        raise nonfinite_error(int((~torch.isfinite(x)).sum()))
    return y
