# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The exact squared error of a joint histogram at any scale.

Within a row, the pairs of one block amax, elements between two neighbouring E2M1 midpoints all become
one value ``y``, so their error is ``y**2 C - 2 y S1 + S2`` with the interval's count and first two
power sums: two look-ups in prefix sums. ``PairSums`` takes them row by row, to 1e-12 relative;
``Parabolas`` takes all rows of one E4M3 scale at once, which a search over thousands of scales needs.
"""

from __future__ import annotations

import numpy as np
import torch

from .histogram import CODE_BITS, INFINITY_CODE, codes_to_values
from .quantize import E2M1_MAX, E2M1_MIDPOINTS, E2M1_VALUES, Underflow, block_scale_e4m3, round_e2m1

# Interval sums cancel: below this error-to-signal ratio they lose more than 1e-12 relative.
MIN_CONDITION = 1e-4
E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)  # positive
# A block scale is rounded to E4M3[i] from FLIPS[i] on; under the first it underflows.
FLIPS = torch.cat([E4M3[:1] / 2, (E4M3[:-1] + E4M3[1:]) / 2])
COLUMNS_PER_OCTAVE = 128  # of the table of ``Parabolas``: the resolution of bfloat16


def _prefix_sum(values: torch.Tensor) -> torch.Tensor:
    """0 and the running sums of nonnegative float64 values, as if summed exactly and rounded once.

    Multiples of a grid 2**52 times finer than the total add up without rounding, in any order; what
    the grid leaves over is so small that its own rounding is lost in the result's.
    """
    _, exponent = torch.frexp(values.sum())
    grid = (exponent.to(torch.int64) + (1023 - 52) << 52).view(torch.float64)  # 2**(exponent - 52)
    multiples = torch.round(values / grid) * grid
    total = multiples.cumsum(0) + (values - multiples).cumsum(0)
    return torch.cat([torch.zeros_like(total[:1]), total])


class PairSums:
    """Sums over the pairs of a joint histogram, from which its error is read.

    ``keys``: sorted ``block_amax_code << 15 | element_code``, int64 [pairs]; ``counts``: int64 [pairs].
    """

    def __init__(self, dtype: torch.dtype, keys: torch.Tensor, counts: torch.Tensor):
        self.dtype, self.keys, self.counts = dtype, keys, counts
        self.rows, sizes = torch.unique_consecutive(keys >> CODE_BITS, return_counts=True)
        self.ends = torch.cumsum(sizes, 0)
        self.starts = self.ends - sizes
        x = codes_to_values(keys & (2**CODE_BITS - 1), dtype)
        n = counts.to(torch.float64)
        self.sums = [_prefix_sum(power) for power in (n, n * x, n * x * x)]

    def unit_block_error(self, scales: torch.Tensor, underflow: Underflow, out_dtype) -> torch.Tensor:
        """Summed squared error at each scale of blocks divided by their own amax, float64 [scales].

        At scale 0, which quantizes everything to zero, this is their energy: the first entry.
        """
        block_amax = codes_to_values(self.rows, self.dtype)
        weight = torch.where(block_amax > 0, block_amax, torch.inf).square().reciprocal()[:, None]
        second = self.sums[2]
        energy = ((second[self.ends] - second[self.starts]) * weight[:, 0]).sum()
        parts = [(self._row_errors(part, underflow, out_dtype) * weight).sum(0)
                 for part in scales.split(self._scales_at_once(scales.is_cuda))]  # fmt: skip
        return torch.cat([energy[None], *parts])

    def _scales_at_once(self, cuda: bool) -> int:
        return 2**22 // len(self.rows) + 1 if cuda else max(1, 2**17 // len(self.rows))

    def squared_error(self, scales: torch.Tensor, underflow: Underflow, out_dtype) -> torch.Tensor:
        """Summed squared error at each scale, float64 [scales]; ``scales``: checked float32 [scales]."""
        signal = float(self.sums[2][-1])
        parts = scales.split(self._scales_at_once(scales.is_cuda))
        error = torch.cat([self._row_errors(part, underflow, out_dtype).sum(0) for part in parts])
        for i in (error < MIN_CONDITION * signal).nonzero().flatten().tolist():
            error[i] = self._direct(scales[i], underflow, out_dtype)
        return error

    def _row_errors(self, scales, underflow, out_dtype) -> torch.Tensor:
        """Squared error of each block-amax row at each scale, float64 [rows, scales]."""
        count, first, second = self.sums
        block_amax = codes_to_values(self.rows, self.dtype).to(torch.float32)[:, None]
        step = block_scale_e4m3(block_amax, scales, underflow) * scales
        start, end = self.starts[:, None].expand_as(step), self.ends[:, None].expand_as(step)
        error = torch.zeros_like(step, dtype=torch.float64)
        below = start
        for k, value in enumerate(E2M1_VALUES):
            if k < len(E2M1_MIDPOINTS):
                code = self._last_code_below(k, step.to(torch.float64))
                key = (self.rows << CODE_BITS)[:, None] + code
                above = torch.searchsorted(self.keys, key, right=True)
                above = torch.minimum(torch.maximum(above, below), end)
            else:
                above = end
            y = (value * step).to(out_dtype).to(torch.float64)
            # A level that overflows float16 costs infinity where it is used, nothing elsewhere.
            y = torch.where(above > below, y, 0.0)
            n, sum_1, sum_2 = (s[above] - s[below] for s in (count, first, second))
            error += y * (y * n - 2 * sum_1) + sum_2
            below = above
        return error

    def _last_code_below(self, k: int, step: torch.Tensor) -> torch.Tensor:
        """Largest code that still rounds to at most ``E2M1_VALUES[k]``.

        ``float32(x / step)`` passes midpoint ``m`` when ``x / step`` passes the edge of the
        float32 interval that rounds to ``m``; edge times step is exact in float64.
        """
        m = np.float32(E2M1_MIDPOINTS[k])
        tie_goes_up = k % 2 == 1  # to the even code
        neighbour = np.nextafter(m, np.float32(0 if tie_goes_up else np.inf))
        threshold = (float(m) + float(neighbour)) / 2 * step
        nearest = threshold.to(torch.float32).to(self.dtype)
        # Two roundings may step over a code either way; compare with the exact threshold.
        code = nearest.view(torch.int16).to(torch.int64)
        code = torch.clamp(code, max=INFINITY_CODE[self.dtype])
        value = codes_to_values(code, self.dtype)
        past = value >= threshold if tie_goes_up else value > threshold
        return code - past.to(torch.int64)

    def _direct(self, scale, underflow, out_dtype) -> torch.Tensor:
        """The definition, pair by pair: for nearly exact representations, where sums cancel."""
        x = codes_to_values(self.keys & (2**CODE_BITS - 1), self.dtype)
        block_amax = codes_to_values(self.keys >> CODE_BITS, self.dtype).to(torch.float32)
        step = block_scale_e4m3(block_amax, scale, underflow) * scale
        y = round_e2m1(x.to(torch.float32) / step) * step
        y = torch.where(step == 0, 0.0, y).to(out_dtype).to(torch.float64)
        return ((y - x).square() * self.counts).sum()


class Parabolas:
    """Every scale's error as the parabola that it lies on, from a table of sums over rectangles.

    With the block scales ``s8`` and the codes ``q`` at a scale held fixed, the summed squared error of
    scale ``g`` is ``energy - 2 g A + g**2 B``, with ``A = sum s8 q |x|`` and ``B = sum (s8 q)**2``.
    Blocks of one ``s8`` share the magnitudes at which ``q`` changes. So their part of ``A`` and ``B`` is
    seven look-ups at both ends of their range of block amaxes, whatever number of rows lies between.

    The rows of least energy, together at most ``negligible``, are left out. No rounding to nearest
    costs more than rounding to zero: they move the error by no more than that. Magnitudes are told apart
    to 128 values an octave, as bfloat16 does; of float16, neighbours at a midpoint share a ``q``.

    Attributes
    ----------
    block_amax, row_energy : float64 [rows]
        Of the rows kept, ascending, and their sums of squares.
    energy : float
        Sum of squares of all elements.
    """

    def __init__(self, dtype: torch.dtype, keys: torch.Tensor, counts: torch.Tensor, negligible: float):
        block_amax = codes_to_values(keys >> CODE_BITS, dtype)
        x = codes_to_values(keys & (2**CODE_BITS - 1), dtype)
        power = counts * x * x
        codes, row = torch.unique_consecutive(_bfloat16_code(block_amax), return_inverse=True)
        energy, weighted = (
            torch.zeros(len(codes), dtype=torch.float64, device=keys.device).index_add_(0, row, values)
            for values in (power, power * block_amax)
        )
        first = int((energy.cumsum(0) <= negligible).sum())
        self.energy, self.row_energy = float(energy.sum()), energy[first:]
        mean = weighted[first:] / energy[first:]  # of equal float16 codes; exact of bfloat16
        self.block_amax = mean.to(torch.float32).to(torch.float64)
        # Columns go down from the largest code, so that running sums count what lies above a threshold.
        # Six octaves under the smallest row kept all elements are zero, unless that row saturates.
        self.highest = int(codes[-1])
        self.columns = self.highest - int(codes[first]) + 6 * COLUMNS_PER_OCTAVE
        kept = row >= first
        column = (self.highest + 1 - _bfloat16_code(x[kept])).clamp(max=self.columns - 1)
        cell = (row[kept] + 1 - first) * self.columns + column
        sums = torch.zeros(
            len(self.row_energy) + 1, self.columns, 2, dtype=torch.float64, device=x.device
        )
        for k, values in enumerate((counts.to(torch.float64), counts * x)):
            sums.view(-1, 2)[:, k].index_add_(0, cell, values[kept])
        torch.cumsum(sums, 0, out=sums)
        self.sums = torch.cumsum(sums, 1, out=sums).view(-1, 2)

    def at(self, scales: torch.Tensor, underflow: Underflow) -> tuple[torch.Tensor, torch.Tensor]:
        """``A`` and ``B`` at float64 scales [n]; both float64 [n]."""
        parts = [self._at(part, underflow) for part in scales.split(256)]
        a, b = zip(*parts, strict=True)
        return torch.cat(a), torch.cat(b)

    def _at(self, scales: torch.Tensor, underflow: Underflow):
        e4m3, values, midpoints = (
            torch.as_tensor(t, dtype=torch.float64, device=scales.device)
            for t in (E4M3, E2M1_VALUES, E2M1_MIDPOINTS)
        )
        edges = E2M1_MAX * scales[:, None] * FLIPS.to(scales.device)
        if underflow == "floor":
            edges[:, 0] = 0
        ends = torch.searchsorted(self.block_amax, edges)
        ends = torch.nn.functional.pad(ends, (0, 1), value=len(self.block_amax))
        which, level = (ends[:, 1:] > ends[:, :-1]).nonzero(as_tuple=True)
        s8 = e4m3[level]
        threshold = _bfloat16_code((s8 * scales[which])[:, None] * midpoints)
        column = (self.highest - threshold).clamp(0, self.columns - 1)  # 0 holds nothing
        low, high = (ends[which, level + i][:, None] * self.columns + column for i in (0, 1))
        above = self.sums[high] - self.sums[low]  # count and sum of |x| over each midpoint
        a, b = (torch.zeros_like(scales).index_add_(0, which, part) for part in (
            s8 * (above[..., 1] @ values.diff()), s8**2 * (above[..., 0] @ values.square().diff())
        ))  # fmt: skip
        return a, b


def _bfloat16_code(values: torch.Tensor) -> torch.Tensor:
    """The code of the largest bfloat16 magnitude at or under each value."""
    return (values.to(torch.float32).view(torch.int32) >> 16).to(torch.int64)
