# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""An independent NVFP4 fake quantizer: enumerated grids, exact arithmetic, none of the package."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every code's magnitude, decoded from its bits: E4M3 up to 0x7E = 448, E2M1 up to 6.
E4M3 = np.array(
    [
        (code % 8) * 2.0**-9 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7)
        for code in range(127)
    ]
)
E2M1 = np.array(
    [0.5 * (code % 2) if code < 2 else (1 + code % 2 / 2) * 2.0 ** (code // 2 - 1)
     for code in range(8)]
)  # fmt: skip
E4M3_MIDPOINTS = (E4M3[1:] + E4M3[:-1]) / 2
E2M1_MIDPOINTS = (E2M1[1:] + E2M1[:-1]) / 2


def odd_scale(g: float) -> float:
    """Return the scale near ``g`` with an odd 12-bit mantissa: no ties for 16-bit inputs."""
    m, e = math.frexp(g)
    return math.ldexp((round(m * 4096) | 1) / 4096, e)


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Round to the nearest grid value, ties to the even code."""
    middle = (grid[1:] + grid[:-1]) / 2
    code = np.searchsorted(middle, values, side="left")  # midpoints below the value
    tie = (code < len(middle)) & (values == middle[np.minimum(code, len(middle) - 1)])
    return grid[code + (tie & (code % 2 == 1))]


def reference(x, g: float, underflow: str, out_dtype, arithmetic=np.float64) -> torch.Tensor:
    """Fake-quantize in float64 (or float32, the specified arithmetic) with enumerated grids."""
    blocks = x.double().contiguous().numpy().reshape(-1, 16).astype(arithmetic)
    g = arithmetic(np.float32(g))
    s = np.abs(blocks).max(1, keepdims=True) / (arithmetic(6) * g)
    s8 = nearest(np.minimum(s, 448).astype(np.float64), E4M3)
    if underflow == "floor":
        s8 = np.where(s == 0, 1.0, np.maximum(s8, 2.0**-9))
    step = s8.astype(arithmetic) * g
    with np.errstate(divide="ignore", invalid="ignore"):
        u = np.abs(blocks) / step
    q = nearest(np.where(step == 0, 0, u).astype(np.float64), E2M1)
    y = np.copysign(q.astype(arithmetic) * step, blocks)
    return torch.from_numpy(y).float().reshape(x.shape).to(out_dtype)


def rational(values: list[float], g: float, underflow: str) -> list[float]:
    """Fake-quantize one block in rational arithmetic, by trying every code."""

    def closest(value: Fraction, grid: np.ndarray) -> Fraction:
        codes = range(len(grid))
        best = min(codes, key=lambda c: (abs(value - Fraction(float(grid[c]))), c % 2))
        return Fraction(float(grid[best]))

    scale = Fraction(g)
    s = max(abs(Fraction(v)) for v in values) / (6 * scale)
    s8 = closest(min(s, Fraction(448)), E4M3)
    if underflow == "floor":
        s8 = Fraction(1) if s == 0 else max(s8, Fraction(1, 512))
    step = s8 * scale
    if step == 0:
        return [math.copysign(0.0, v) for v in values]
    return [math.copysign(float(closest(abs(Fraction(v)) / step, E2M1) * step), v) for v in values]


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bit pattern, so that -0.0 differs from 0.0."""
    return x.contiguous().view(torch.int32 if x.dtype == FP32 else torch.int16)


def mismatches(a: torch.Tensor, b: torch.Tensor) -> int:
    """Count elements whose bits differ."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return int((bits(a) != bits(b)).sum())


def all_regimes(rows: int, columns: int, dtype, seed: int = 0) -> torch.Tensor:
    """Draw blocks of widely different amax, with zero blocks, zeros of both signs and outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns // 16, 16, generator=generator)
    octaves = 8 if dtype == FP16 else 16
    x *= 2 ** (octaves * (2 * torch.rand(rows, columns // 16, 1, generator=generator) - 1))
    x[torch.rand(x.shape[:2], generator=generator) < 0.02] = 0.0
    x[torch.rand(x.shape[:2], generator=generator) < 0.02] *= -0.0
    x[torch.rand(x.shape, generator=generator) < 0.05] = -0.0
    return x.reshape(rows, columns).to(dtype)


# Saturated to flushed for the tensors of `all_regimes`.
SCALES = [odd_scale(2.0**e * 1.37) for e in (-24, -14, -8, -2, 4, 12, 22)]
