# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The mergeable sufficient statistic of a 16-bit activation tensor for NVFP4.

The error of an element depends on the element, its block's amax and the scale alone. A bfloat16 or
float16 magnitude is one of 2**15 codes, so the joint histogram of (block amax code, element code)
holds everything that MSE(g), every percentile and every amax need, and histograms add.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .histogram import (
    CODE_BITS,
    INFINITY_CODE,
    codes_to_values,
    joint_histogram,
    merge_counts,
    sum_by_code,
    sum_by_key,
)
from .quantize import (
    BLOCK_SIZE,
    E2M1_MIDPOINTS,
    E2M1_VALUES,
    Underflow,
    block_scale_e4m3,
    check_scale,
    check_underflow,
    round_e2m1,
)

DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Interval sums cancel: below this error-to-signal ratio they lose more than 1e-12 relative.
MIN_CONDITION = 1e-4


def _rank(p: float, n: int) -> int:
    """The ``kthvalue`` rank of percentile ``p`` among ``n`` values, counted from 1."""
    if not 0 < p <= 100:
        raise ValueError(f"percentile is {p}; expected a percentage in (0, 100].")
    return max(1, min(n, round(p / 100 * n)))


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


class Marginals:
    """The two marginals of the joint histogram: what a calibration policy may look at.

    ``element_codes``/``element_counts``: distinct \\|x\\| codes and how many elements have each;
    ``block_codes``/``block_counts``: distinct block-amax codes and how many blocks have each. All
    int64 tensors, codes ascending.
    """

    def __init__(self, dtype, element_codes, element_counts, block_codes, block_counts):
        self.dtype = dtype
        self.element_codes, self.element_counts = element_codes, element_counts
        self.block_codes, self.block_counts = block_codes, block_counts

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return int(self.element_counts.sum())

    @cached_property
    def amax(self) -> float:
        """Largest magnitude."""
        return float(codes_to_values(self.element_codes[-1:], self.dtype)[0])

    @cached_property
    def signal_power(self) -> float:
        """Mean square of the elements, float64."""
        values = codes_to_values(self.element_codes, self.dtype)
        return float((values.square() * self.element_counts).sum()) / self.count

    def percentile(self, p: float) -> float:
        """Order statistic of \\|x\\| at ``p`` percent: rank ``max(1, min(n, round(p/100 n)))``."""
        return self._order_statistic(self.element_codes, self.element_counts, p)

    def block_amax_percentile(self, p: float, *, above: float | None = None) -> float:
        """Order statistic of the per-block amax at ``p`` percent.

        With ``above``, only blocks whose amax is greater are ranked (``above=0``: nonzero blocks).
        """
        codes, counts = self.block_codes, self.block_counts
        if above is not None:
            keep = codes_to_values(codes, self.dtype) > above
            codes, counts = codes[keep], counts[keep]
        return self._order_statistic(codes, counts, p)

    def _order_statistic(self, codes, counts, p: float) -> float:
        n = int(counts.sum())
        if n == 0:
            raise ValueError("no value is left to rank; expected at least one nonzero block.")
        at = torch.searchsorted(counts.cumsum(0), _rank(p, n))
        return float(codes_to_values(codes[at : at + 1], self.dtype)[0])


class ActivationStatistics:
    """Joint histogram of (block amax code, \\|x\\| code): sufficient for MSE at every scale.

    Statistics add up over batches, devices and machines, exactly: counts are 64-bit integers.
    ``keys`` is sorted, ``block_amax_code << 15 | element_code``; ``counts`` is int64.

    Examples
    --------
    >>> x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    >>> a, b = (ActivationStatistics.from_tensor(part) for part in x.split(32))
    >>> (a + b).mse(0.001) == ActivationStatistics.from_tensor(x).mse(0.001)
    True
    """

    def __init__(self, dtype: torch.dtype | None = None, keys=None, counts=None):
        self.dtype: Any = dtype  # None until the first update
        self.keys = torch.zeros(0, dtype=torch.int64) if keys is None else keys
        self.counts = torch.zeros(0, dtype=torch.int64) if counts is None else counts

    @classmethod
    def from_tensor(cls, x: torch.Tensor) -> ActivationStatistics:
        """Statistics of one tensor ``[..., 16 k]``, bfloat16 or float16. Raises as ``update``."""
        return cls().update(x)

    def update(self, x: torch.Tensor) -> ActivationStatistics:
        """Count a tensor ``[..., 16 k]`` in; returns ``self``.

        Raises
        ------
        TypeError
            For a dtype other than bfloat16 and float16, or another than was counted before.
        ValueError
            For a last dimension that is not a multiple of 16, NaN or infinity.
        """
        return self.merge(ActivationStatistics(x.dtype, *joint_histogram(x)))

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Add another statistic's counts to this one's; returns ``self``."""
        if self.dtype is None:
            self.dtype, self.keys, self.counts = other.dtype, other.keys, other.counts
        elif other.dtype is not None:
            if self.dtype != other.dtype:
                raise TypeError(
                    f"cannot merge statistics of {self.dtype} and {other.dtype}; expected one "
                    "dtype. Cast the activations to one dtype before counting."
                )
            self.keys, self.counts = merge_counts(
                self.keys, self.counts, other.keys.to(self.keys.device),
                other.counts.to(self.keys.device),
            )  # fmt: skip
        for name in ("marginals", "_prefix_sums"):
            self.__dict__.pop(name, None)  # caches of the old counts
        return self

    def __add__(self, other: ActivationStatistics) -> ActivationStatistics:
        return ActivationStatistics(self.dtype, self.keys, self.counts).merge(other)

    @classmethod
    def merged(cls, parts: Sequence[ActivationStatistics]) -> ActivationStatistics:
        """The sum of several statistics of one dtype, in one merge."""
        if len({part.dtype for part in parts}) != 1:
            raise TypeError(
                f"cannot merge statistics of {[str(part.dtype) for part in parts]}; expected at "
                "least one statistic, all of one dtype."
            )
        device = parts[0].keys.device
        keys = torch.cat([part.keys.to(device) for part in parts])
        counts = torch.cat([part.counts.to(device) for part in parts])
        return cls(parts[0].dtype, *sum_by_key(keys, counts))

    def to(self, device) -> ActivationStatistics:
        """The same statistic with its tensors on ``device``."""
        return ActivationStatistics(self.dtype, self.keys.to(device), self.counts.to(device))

    @property
    def nbytes(self) -> int:
        """Memory of the pairs and their counts."""
        return self.keys.nbytes + self.counts.nbytes

    @property
    def block_codes(self) -> torch.Tensor:
        """Block amax code of every pair."""
        return self.keys >> CODE_BITS

    @property
    def element_codes(self) -> torch.Tensor:
        """Element code of every pair."""
        return self.keys & (2**CODE_BITS - 1)

    @cached_property
    def marginals(self) -> Marginals:
        """The element and the block-amax marginal, on the CPU."""
        if self.dtype is None:
            raise ValueError("the statistic is empty; expected at least one update(x) before.")
        elements, element_counts = sum_by_code(self.element_codes, self.counts)
        blocks, block_counts = sum_by_code(self.block_codes, self.counts)
        parts = (elements, element_counts, blocks, block_counts // BLOCK_SIZE)
        return Marginals(self.dtype, *(part.cpu() for part in parts))

    @property
    def count(self) -> int:
        """Number of elements counted."""
        return int(self.counts.sum())

    @property
    def amax(self) -> float:
        """Largest magnitude counted."""
        return self.marginals.amax

    @property
    def signal_power(self) -> float:
        """Mean square of the elements, float64."""
        return self.marginals.signal_power

    def percentile(self, p: float) -> float:
        """Order statistic of \\|x\\| at ``p`` percent (``kthvalue`` convention)."""
        return self.marginals.percentile(p)

    def block_amax_percentile(self, p: float, *, above: float | None = None) -> float:
        """Order statistic of the per-block amax at ``p`` percent, over blocks above ``above``."""
        return self.marginals.block_amax_percentile(p, above=above)

    def mse(
        self,
        input_scale,
        underflow: Underflow = "flush",
        *,
        out_dtype: torch.dtype = torch.float32,
    ):
        """Mean squared error of ``fake_quantize`` at one scale or an array of scales.

        Equal to direct float64 evaluation of ``mean((fake_quantize(x, g) - x)**2)`` to 1e-12
        relative. Within a block-amax row, elements between two neighbouring E2M1 midpoints all
        become one value ``y``, so their error is ``y**2 C - 2 y S1 + S2`` with the interval's
        count and first two power sums: two look-ups in prefix sums.

        Parameters
        ----------
        input_scale : float, or array/tensor of floats
            Rounded to float32.
        underflow : {"flush", "floor"}
        out_dtype : dtype
            Of the fake quantizer's output; float32 (default) or the 16-bit dtype of a layer.

        Returns
        -------
        float for one scale, else a float64 numpy array of the scales' shape.
        """
        check_underflow(underflow)
        if self.dtype is None:
            raise ValueError("the statistic is empty; expected at least one update(x) before.")
        scales = torch.as_tensor(input_scale, dtype=torch.float64).to(torch.float32)
        check_scale(scales)
        flat = scales.flatten().to(self.keys.device)
        error = self._squared_error(flat, underflow, out_dtype)
        mse = (error / self.count).cpu().numpy().reshape(scales.shape)
        return float(mse) if scales.ndim == 0 else mse

    def snr_db(self, input_scale, underflow: Underflow = "flush", **kwargs):
        """``10 log10(signal_power / mse)`` in dB, for one scale or an array of scales."""
        with np.errstate(divide="ignore"):
            noise = np.asarray(self.mse(input_scale, underflow, **kwargs))
            snr = 10 * np.log10(self.signal_power / noise)
        return float(snr) if snr.ndim == 0 else snr

    @cached_property
    def _prefix_sums(self):
        """Rows (block codes, first pair of each) and prefix sums of n, n x and n x**2."""
        rows, sizes = torch.unique_consecutive(self.block_codes, return_counts=True)
        starts = torch.cumsum(sizes, 0) - sizes
        x = codes_to_values(self.element_codes, self.dtype)
        n = self.counts.to(torch.float64)
        return rows, starts, sizes, [_prefix_sum(power) for power in (n, n * x, n * x * x)]

    def _squared_error(self, scales, underflow, out_dtype) -> torch.Tensor:
        rows, _, _, sums = self._prefix_sums
        signal = float(sums[2][-1])
        error = torch.zeros(len(scales), dtype=torch.float64, device=scales.device)
        at_once = max(1, 2**17 // len(rows)) if not scales.is_cuda else 2**22 // len(rows) + 1
        for part in torch.arange(len(scales), device=scales.device).split(at_once):
            error[part] = self._row_errors(scales[part], underflow, out_dtype).sum(0)
        for i in (error < MIN_CONDITION * signal).nonzero().flatten().tolist():
            error[i] = self._squared_error_direct(scales[i], underflow, out_dtype)
        return error

    def _row_errors(self, scales, underflow, out_dtype) -> torch.Tensor:
        """Squared error of each block-amax row at each scale, float64 [rows, scales]."""
        rows, starts, sizes, (count, first, second) = self._prefix_sums
        block_amax = codes_to_values(rows, self.dtype).to(torch.float32)[:, None]
        step = block_scale_e4m3(block_amax, scales, underflow) * scales
        start, end = starts[:, None].expand_as(step), (starts + sizes)[:, None].expand_as(step)
        error = torch.zeros_like(step, dtype=torch.float64)
        below = start
        for k, value in enumerate(E2M1_VALUES):
            if k < len(E2M1_MIDPOINTS):
                code = self._last_code_below(k, step.to(torch.float64))
                key = (rows << CODE_BITS)[:, None] + code
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

    def _squared_error_direct(self, scale, underflow, out_dtype) -> torch.Tensor:
        """The definition, pair by pair: for nearly exact representations, where sums cancel."""
        x = codes_to_values(self.element_codes, self.dtype)
        block_amax = codes_to_values(self.block_codes, self.dtype).to(torch.float32)
        step = block_scale_e4m3(block_amax, scale, underflow) * scale
        y = round_e2m1(x.to(torch.float32) / step) * step
        y = torch.where(step == 0, 0.0, y).to(out_dtype).to(torch.float64)
        return ((y - x).square() * self.counts).sum()

    def save(self, path, metadata: dict[str, str] | None = None) -> None:
        """Write Parquet: ``block_amax_code``, ``element_code`` (int16) and ``count`` (int64)."""
        if self.dtype is None:
            raise ValueError("the statistic is empty; expected at least one update(x) before.")
        table = pa.table(
            {
                "block_amax_code": self.block_codes.to(torch.int16).cpu().numpy(),
                "element_code": self.element_codes.to(torch.int16).cpu().numpy(),
                "count": self.counts.cpu().numpy(),
            }
        ).replace_schema_metadata(
            {"dtype": str(self.dtype).removeprefix("torch."), "count": str(self.count)}
            | (metadata or {})
        )
        pq.write_table(table, path, compression="zstd", compression_level=12)

    @classmethod
    def load(cls, path) -> ActivationStatistics:
        """Read what ``save`` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated, not a statistic, or its counts do not add up.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no statistic at {path}; expected a Parquet file written by "
                "ActivationStatistics.save. Run the capture that makes it first."
            )
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{path} is not readable as Parquet ({error}); expected a file written by "
                "ActivationStatistics.save. It may be truncated: capture it again."
            ) from error
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        columns = ["block_amax_code", "element_code", "count"]
        if table.column_names != columns or metadata.get("dtype") not in DTYPE_NAMES:
            raise ValueError(
                f"{path} has columns {table.column_names} and dtype {metadata.get('dtype')!r}; "
                f"expected {columns} and bfloat16 or float16. It is not an ActivationStatistics."
            )
        block, element, counts = (
            torch.from_numpy(table[name].to_numpy().astype(np.int64)) for name in columns
        )
        if int(counts.sum()) != int(metadata["count"]):
            raise ValueError(
                f"{path} holds {int(counts.sum())} elements; expected {metadata['count']} as its "
                "header says. It is damaged: capture it again."
            )
        return cls(DTYPE_NAMES[metadata["dtype"]], block << CODE_BITS | element, counts)
