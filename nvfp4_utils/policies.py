# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Calibration policies: from a tensor's statistics to the calibrated amax.

Every policy takes statistics (``ActivationStatistics`` or ``Marginals``; the oracle needs the
joint histogram) and returns an amax in the activation's units; ``input_scale_from_amax`` turns it
into the stored scale. ``POLICIES`` names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from .histogram import Marginals, codes_to_values
from .quantize import (
    AMAX_PER_SCALE,
    E4M3_MAX,
    E4M3_NORMAL_RANGE,
    FOUR_OVER_SIX_ROOM,
    Underflow,
    input_scale_from_amax,
)
from .statistics import ActivationStatistics

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
) -> float:
    """``max(rho * anchor, upper)`` over nonzero per-block amaxes: ModelOpt ``nvfp4_act_headroom``.

    ``anchor`` is the per-block amax at ``anchor_percentile``, over blocks not under ``upper / 1e6``;
    ``upper`` the one at ``upper_percentile`` (100: the largest). The anchor's block scale then sits at
    ``448 / rho`` of E4M3, everything above is room for unseen outliers. Percentiles are exact order
    statistics; ModelOpt reads them off a histogram of 512 bins.

    Parameters
    ----------
    rho : float in (0, 28672)
        28672 would put the anchor on E4M3's smallest normal.

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
    upper = _positive(statistics.amax)
    if upper_percentile < 100:
        upper = statistics.block_amax_percentile(upper_percentile, above=0.0)
    anchor = statistics.block_amax_percentile(anchor_percentile, above=upper / ANCHOR_FLOOR)
    # The result is stored as float32 there.
    return float(np.float32(max(rho * anchor, upper)))


def headroom_over_amax(statistics: Statistics) -> float:
    """Headroom, but never below the amax, so that nothing seen in calibration saturates."""
    return max(amax(statistics), headroom(statistics))


def room(statistics: ActivationStatistics, tolerance: float = 0.01) -> int:
    """By how many octaves the amax may be raised before its blocks notice.

    As long as block scales are normal, doubling the scale changes no error. The first whole octave whose
    error under flush, every block weighted alike (``block_snr_db``), exceeds that at the amax by more
    than the share ``tolerance`` is the first too many; at most 22, where every block is flushed.
    """
    scales = input_scale_from_amax(amax(statistics) * 2.0 ** np.arange(23))
    error = 10 ** (-statistics.block_snr_db(scales) / 10)
    harmed = error > (1 + tolerance) * error[0]
    return int(harmed.argmax()) - 1 if harmed.any() else 22


def raised(statistics: ActivationStatistics, share: float = 0.5, tolerance: float = 0.01) -> float:
    """The amax raised by a share of its ``room``: as far from saturation as from underflow at 0.5."""
    return amax(statistics) * 2.0 ** (share * room(statistics, tolerance))


def aligned_headroom(statistics: ActivationStatistics, underflow: Underflow = "flush") -> float:
    """Headroom, moved up within one octave to the scale of lowest MSE on these very statistics.

    While block scales are normal the error repeats every octave, so the best place within the octave
    can be had at headroom's distance from saturation as well as at the amax.
    """
    exponents = np.arange(OCTAVE_POINTS) / OCTAVE_POINTS
    low = headroom(statistics)
    amaxes = low * np.concatenate([2**exponents, _edges_above(low) / low])
    scales = input_scale_from_amax(amaxes)
    return float(amaxes[statistics.mse(scales, underflow).argmin()])


def _edges_above(low: float) -> np.ndarray:
    """Both sides of the error's largest jumps in the octave above ``low``."""
    edges = EDGES * 2.0 ** np.floor(np.log2(low / EDGES[0]))
    return np.where(edges < low, 2 * edges, edges)


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
        scales = input_scale_from_amax(amaxes)
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


Needs = Literal["nothing", "marginals", "joint histogram", "each sequence", "the test tensor"]


@dataclass(frozen=True)
class Policy:
    """A way to calibrate.

    ``needs``: what it is computed from. ``text``: one sentence. ``calibrate``: statistics -> calibrated
    amax; None for what no calibration can give, the scale of a sequence while it runs and the oracle
    of the test tensor. ``one_scale``: it sets one scale for the plain quantizer, so it lies on the curve
    of error against scale.
    """

    needs: Needs
    text: str
    calibrate: Callable[[Any], float] | None = None
    one_scale: bool = True


def _percentile_policy(p: float) -> Policy:
    text = f"Percentile {p:g} of |x|; what is larger saturates."
    return Policy("marginals", text, lambda statistics: percentile(statistics, p))


# The one list: scoring, styles, tables and pages take their policies, and their order, from here.
POLICIES: dict[str, Policy] = {
    "amax": Policy("marginals", "Largest magnitude of the calibration pool.", amax),
    **{f"p{p:g}": _percentile_policy(p) for p in (99.0, 99.9, 99.99, 99.999)},
    "headroom": Policy(
        "marginals", "max(16384 p1, p99.99) of the nonzero per-block amaxes: room above.", headroom
    ),
    "headroom-amax": Policy(
        "marginals", "Headroom, but never below the amax: nothing seen saturates.", headroom_over_amax
    ),
    "raised": Policy(
        "joint histogram",
        "The amax, raised by half of the octaves that no block notices: room on both sides.",
        raised,
    ),
    "raised-all": Policy(
        "joint histogram",
        "The amax, raised by all the octaves that no block notices: as much room as there is.",
        lambda statistics: raised(statistics, 1.0),
    ),
    "constant": Policy("nothing", "2688, so that input_scale = 1.", constant),
    "aligned": Policy(
        "joint histogram",
        "The scale of least flush error on the calibration pool in the octave above headroom.",
        aligned_headroom,
    ),
    "mse": Policy(
        "joint histogram",
        "Least flush error on the calibration pool at any scale, searched on its exact statistic.",
        oracle,
    ),
    "dynamic": Policy("each sequence", "Each sequence's own amax while it runs.", one_scale=False),
    "four-over-six": Policy(
        "marginals",
        "448/256 of the amax; each block is scaled to 6 or to 4, the better one.",
        four_over_six,
        one_scale=False,
    ),
    "oracle": Policy("the test tensor", "Least error on the test tensor itself: the bound."),
}
CALIBRATED = tuple(name for name, policy in POLICIES.items() if policy.calibrate)
FROM_MARGINALS = tuple(  # what can be had of any subset of sequences
    name for name in CALIBRATED if POLICIES[name].needs == "marginals" and POLICIES[name].one_scale
)


def calibrate(statistics: Statistics, names: Iterable[str] = CALIBRATED) -> dict[str, float]:
    """The calibrated amax of each named policy; all that calibrate need the joint histogram.

    Raises
    ------
    ValueError
        For a name that ``POLICIES`` lacks, or whose scale is not calibrated.
    """
    names = list(names)
    unknown = [name for name in names if name not in CALIBRATED]
    if unknown:
        raise ValueError(f"policies {unknown} do not calibrate; expected some of {list(CALIBRATED)}.")
    return {name: POLICIES[name].calibrate(statistics) for name in names}  # type: ignore[misc]
