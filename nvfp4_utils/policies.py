# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Calibration policies: from a tensor's statistics to the calibrated amax.

Every policy takes statistics (``ActivationStatistics`` or ``Marginals``; the oracle needs the
joint histogram) and returns an amax in the activation's units; ``input_scale_from_amax`` turns it
into the stored scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

from .quantize import (
    AMAX_PER_SCALE,
    E4M3_MAX,
    E4M3_MIN_NORMAL,
    FOUR_OVER_SIX_ROOM,
    Underflow,
    input_scale_from_amax,
)
from .statistics import ActivationStatistics, Marginals, codes_to_values

E4M3_NORMAL_RANGE = E4M3_MAX / E4M3_MIN_NORMAL  # 28672
ANCHOR_FLOOR = 1e6  # blocks this far under the upper anchor count as zero
OCTAVE_POINTS = 128  # of the oracle's grid
# The error jumps where a block scale passes an E4M3 midpoint, and its minimum often lies at a jump. A
# midpoint has 5 significant bits and a bfloat16 block amax 8, so at 448 times a number of 4 bits or
# fewer, block amaxes of many values jump together: both sides of those, within one octave.
EDGES = (E4M3_MAX / 256 * np.arange(8, 16)[:, None] / 8 * [1 - 2**-18, 1 + 2**-18]).ravel()
MANY_ROWS = 512  # distinct block amaxes from which the oracle looks at octaves coarsely first

Statistics: TypeAlias = ActivationStatistics | Marginals


def amax(statistics: Statistics) -> float:
    """The largest magnitude seen (ModelOpt ``max``, llm-compressor ``static_minmax``)."""
    return _positive(statistics.amax)


def percentile(statistics: Statistics, p: float = 99.99) -> float:
    """The element percentile of \\|x\\| at ``p`` percent (``kthvalue`` convention); clips the rest."""
    return _positive(statistics.percentile(p))


def constant(statistics: Statistics | None = None) -> float:
    """2688, which is ``input_scale = 1``: ModelOpt ``constant_amax`` for MoE experts."""
    return AMAX_PER_SCALE


def four_over_six(statistics: Statistics) -> float:
    """1.75 times the amax, which is ``amax / (6 * 256)`` as scale: for that quantizer's two choices."""
    return FOUR_OVER_SIX_ROOM * amax(statistics)


def headroom(
    statistics: Statistics,
    *,
    rho: float = 16384.0,
    anchor_percentile: float = 1.0,
    upper_percentile: float = 99.99,
    histogram: bool = False,
) -> float:
    """``max(rho * anchor, upper)`` over nonzero per-block amaxes: ModelOpt ``nvfp4_act_headroom``.

    ``anchor`` is the per-block amax at ``anchor_percentile``, over blocks not under
    ``upper / 1e6``; ``upper`` the one at ``upper_percentile`` (100: the largest). The anchor's
    block scale then sits at ``448 / rho`` of E4M3, everything above is room for unseen outliers.

    Parameters
    ----------
    rho : float in (0, 28672)
        28672 would put the anchor on E4M3's smallest normal.
    histogram : bool
        False: exact order statistics. True: ModelOpt's 512-bin log2 histogram over
        [-40, 40), percentiles at bin centres in float32, equal to theirs to the bit.

    Raises
    ------
    ValueError
        For ``rho`` or a percentile out of range, or if every block is zero.
    """
    if not 0 < rho < E4M3_NORMAL_RANGE:
        raise ValueError(
            f"rho is {rho}; expected a value in (0, {E4M3_NORMAL_RANGE:g}), the normal range of "
            "E4M3. A larger rho would push the anchor's block scale into the subnormals."
        )
    rank = _histogram_percentile if histogram else _exact_percentile
    upper = _positive(statistics.amax)
    if upper_percentile < 100:
        upper = rank(statistics, upper_percentile, 0.0)
    anchor = rank(statistics, anchor_percentile, upper / ANCHOR_FLOOR)
    # The result is stored as float32 there.
    return float(np.float32(max(rho * anchor, upper)))


def aligned_headroom(statistics: ActivationStatistics, underflow: Underflow = "flush") -> float:
    """Headroom, moved up within one octave to the scale of lowest MSE on these very statistics.

    While block scales are normal the error repeats every octave, so the best place within the octave
    can be had at headroom's distance from saturation as well as at the amax.
    """
    exponents = np.arange(OCTAVE_POINTS) / OCTAVE_POINTS
    low = headroom(statistics)
    amaxes = low * np.concatenate([2**exponents, _edges_above(low) / low])
    scales = torch.as_tensor(input_scale_from_amax(torch.from_numpy(amaxes)))
    return float(amaxes[statistics.mse(scales, underflow).argmin()])


def _edges_above(low: float) -> np.ndarray:
    """Both sides of the error's largest jumps in the octave above ``low``."""
    edges = EDGES * 2.0 ** np.floor(np.log2(low / EDGES[0]))
    return np.where(edges < low, 2 * edges, edges)


def _exact_percentile(statistics: Statistics, p: float, above: float) -> float:
    return statistics.block_amax_percentile(p, above=above)


def _histogram_percentile(statistics: Statistics, p: float, above: float) -> float:
    """A percentile as ModelOpt 0.47 reads it off its log2 histogram; arithmetic in float32."""
    marginals = statistics if isinstance(statistics, Marginals) else statistics.marginals
    bins, low, high = 512, -40.0, 40.0

    def bin_of(values: torch.Tensor) -> torch.Tensor:
        position = (torch.log2(values) - low) / (high - low)
        return (position * bins).floor().long().clamp(0, bins - 1)

    values = codes_to_values(marginals.block_codes, marginals.dtype).to(torch.float32)
    nonzero = values > 0
    counts = torch.zeros(bins, dtype=torch.int64)
    counts.index_add_(0, bin_of(values[nonzero]), marginals.block_counts[nonzero])
    weights = counts.float()
    if above > 0:
        weights[: int(bin_of(torch.tensor(above)))] = 0
    at = int(torch.searchsorted(weights.cumsum(0), p / 100.0 * weights.sum()))
    return float(2.0 ** (low + (min(at, bins - 1) + 0.5) / bins * (high - low)))


def oracle(
    statistics: ActivationStatistics,
    underflow: Underflow = "flush",
    *,
    out_dtype: torch.dtype = torch.float32,
) -> float:
    """The amax whose scale has the lowest MSE on these very statistics: the bound for a policy.

    Searches every octave that can hold the minimum. From below, a calibrated amax ``L`` costs at
    least ``sum max(|x| - L, 0)**2``, as nothing quantizes above ``L``: octaves where that exceeds
    the best error are out. From above, the search ends where every block has underflowed. Between
    ``B_max`` and ``28672 B_min`` doubling the scale changes no bit, so one octave stands for all.
    The grid has 128 points an octave, where a statistic of many block amaxes first narrows the
    octaves at 16, and both sides of ``EDGES``; the best points are refined twice.
    """
    marginals = statistics.marginals
    blocks = codes_to_values(marginals.block_codes, marginals.dtype)
    block_max = _positive(float(blocks[-1]))
    block_min = float(blocks[blocks > 0][0])

    def mse(amaxes: np.ndarray) -> np.ndarray:
        scales = input_scale_from_amax(torch.from_numpy(amaxes))
        return statistics.mse(scales, underflow, out_dtype=out_dtype)

    def grid(octaves: Iterable[int], points: int) -> np.ndarray:
        """Log grid over octaves counted from the largest block amax, without repeated ones."""
        octaves = np.array(list(octaves))
        exponents = octaves[:, None] + np.arange(points) / points
        edges = _edges_above(block_max) * 2.0 ** octaves[:, None]
        amaxes = np.concatenate([(block_max * 2**exponents).ravel(), edges.ravel()])
        repeated = (amaxes > 2 * block_max) & (amaxes <= normal_end / 2)
        return amaxes[~repeated & (amaxes / AMAX_PER_SCALE < 2.0**123)]

    normal_end = E4M3_NORMAL_RANGE * block_min
    known = mse(grid([0], OCTAVE_POINTS)).min()
    # At 448 * 2**10 * B_max all blocks flush; under floor all elements are zero 12 times later.
    octaves: Any = range(_lowest_octave(marginals, known, block_max), 23)
    if len(blocks) >= MANY_ROWS:
        # Many block amaxes average out: no scale between two coarse points is far below both.
        coarse = grid(octaves, 16)
        errors = mse(coarse)
        near = coarse[errors <= 1.5 * min(known, errors.min())]
        octaves = np.union1d(0, np.floor(np.log2(near / block_max))).astype(int)
    candidates = grid(octaves, OCTAVE_POINTS)
    errors = mse(candidates)
    width = 1 / OCTAVE_POINTS
    for keep, points in ((12, 33), (4, 33)):
        best = candidates[np.argsort(errors, kind="stable")[:keep]]
        fine = best[:, None] * 2 ** (np.linspace(-width, width, points)[None, :])
        candidates = np.concatenate([best, fine.ravel()])
        errors = mse(candidates)
        width *= 2 / (points - 1)
    return float(candidates[errors.argmin()])


def _lowest_octave(marginals: Marginals, error: float, block_max: float) -> int:
    """How far under the largest amax clipping alone still costs less than ``error``, in octaves."""
    x = codes_to_values(marginals.element_codes, marginals.dtype)
    weights = marginals.element_counts / marginals.count
    octave = 0
    while octave > -120:
        excess = (x - block_max * 2.0**octave).clamp(min=0)
        if float((excess.square() * weights).sum()) > error:
            break
        octave -= 1
    return octave


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(
            f"the calibrated amax is {value}; expected a positive value. The percentile or the "
            "whole tensor is zero: calibrate on more data or a higher percentile."
        )
    return value
