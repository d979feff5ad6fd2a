# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The mergeable sufficient statistic of a 16-bit activation tensor for NVFP4.

The error of an element depends on the element, its block's amax and the scale alone. A bfloat16 or
float16 magnitude is one of 2**15 codes, so the joint histogram of (block amax code, element code)
holds everything that MSE(g), every percentile and every amax need, and histograms add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .error import E4M3, PairSums, Parabolas
from .histogram import CODE_BITS, Marginals, joint_histogram, merge_counts, sum_by_code, sum_by_key
from .quantize import BLOCK_SIZE, E2M1_MAX, Underflow, check_scale, check_underflow
from .statistic_file import read_pairs, write_pairs


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
        for name in ("marginals", "parabolas", "known_error", "_pair_sums"):
            self.__dict__.pop(name, None)  # caches of the old counts
        return self

    def __add__(self, other: ActivationStatistics) -> ActivationStatistics:
        return ActivationStatistics(self.dtype, self.keys, self.counts).merge(other)

    @classmethod
    def merged(cls, parts: Sequence[ActivationStatistics]) -> ActivationStatistics:
        """The sum of several statistics of one dtype, in one merge; empty ones add nothing."""
        if parts and all(part.dtype is None for part in parts):
            return cls()
        parts = [part for part in parts if part.dtype is not None]
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

    @cached_property
    def _pair_sums(self) -> PairSums:
        return PairSums(self.dtype, self.keys, self.counts)

    @cached_property
    def known_error(self) -> float:
        """Least summed squared error over the scales of one octave that represent the amax exactly."""
        scales = self.amax / (E2M1_MAX * E4M3[-8:])  # 240 to 448
        return float(self.mse(scales).min()) * self.count

    @cached_property
    def parabolas(self) -> Parabolas:
        """For searches; leaves out what cannot move the least error by a millionth of the known one."""
        return Parabolas(self.dtype, self.keys, self.counts, 1e-6 * self.known_error)

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
        relative; ``error.PairSums`` says how.

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
        scales, flat = self._checked(input_scale, underflow)
        error = self._pair_sums.squared_error(flat, underflow, out_dtype)
        mse = (error / self.count).cpu().numpy().reshape(scales.shape)
        return float(mse) if scales.ndim == 0 else mse

    def block_snr_db(
        self, input_scale, underflow: Underflow = "flush", *, out_dtype: torch.dtype = torch.float32
    ):
        """SNR in dB with every block weighted alike, for one scale or an array of scales.

        ``10 log10(sum_B |x_B|**2 / b**2 / sum_B |y_B - x_B|**2 / b**2)`` over blocks ``B`` of amax
        ``b > 0``: the SNR of the tensor whose every block is divided by its amax. A few massive blocks
        hold most of a tensor's energy, and so of ``snr_db``; here they count as much as any other.
        Arguments and errors as ``mse``.
        """
        scales, flat = self._checked(input_scale, underflow)
        energy, *error = self._pair_sums.unit_block_error(flat, underflow, out_dtype).cpu().numpy()
        with np.errstate(divide="ignore"):
            snr = 10 * np.log10(energy / np.array(error)).reshape(scales.shape)
        return float(snr) if snr.ndim == 0 else snr

    def _checked(self, input_scale, underflow: Underflow) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales as float32, and flat on the statistic's device."""
        check_underflow(underflow)
        if self.dtype is None:
            raise ValueError("the statistic is empty; expected at least one update(x) before.")
        scales = torch.as_tensor(input_scale, dtype=torch.float64).to(torch.float32)
        check_scale(scales)
        return scales, scales.flatten().to(self.keys.device)

    def snr_db(self, input_scale, underflow: Underflow = "flush", **kwargs):
        """``10 log10(signal_power / mse)`` in dB, for one scale or an array of scales."""
        with np.errstate(divide="ignore"):
            noise = np.asarray(self.mse(input_scale, underflow, **kwargs))
            snr = 10 * np.log10(self.signal_power / noise)
        return float(snr) if snr.ndim == 0 else snr

    def save(self, path, metadata: dict[str, str] | None = None) -> None:
        """Write Parquet, as ``statistic_file`` says; ``metadata`` is added to its header.

        Raises ``ValueError`` for metadata with a name of the header's own.
        """
        if self.dtype is None:
            raise ValueError("the statistic is empty; expected at least one update(x) before.")
        write_pairs(path, self.dtype, self.keys.cpu(), self.counts.cpu(), metadata or {})

    @classmethod
    def load(cls, path) -> ActivationStatistics:
        """Read what ``save`` wrote; what no tensor can have is refused.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated or damaged, or not a statistic.
        """
        return cls(*read_pairs(path))


@dataclass
class SiteStatistics:
    """What ``capture`` keeps of one site.

    ``groups``: statistics of consecutive groups of ``group_size`` sequences (the last may hold
    fewer), the unit of bootstrap intervals. ``sequence_amax``: float64 [sequences], the largest
    magnitude of each sequence, so that any subset's amax is known; NaN where experts that are modules
    see tokens that belong to no known sequence. ``expert_tokens`` int64 and ``expert_amax`` float64
    [experts]: what each expert of a mixture was given, 0 tokens for one that was never reached.
    """

    group_size: int
    groups: list[ActivationStatistics] = field(default_factory=list)
    sequence_amax: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    expert_tokens: torch.Tensor | None = None
    expert_amax: torch.Tensor | None = None

    @property
    def total(self) -> ActivationStatistics:
        """The groups' sum; a group of padding alone adds nothing."""
        counted = [group for group in self.groups if group.dtype is not None]
        return ActivationStatistics.merged(counted or self.groups)
