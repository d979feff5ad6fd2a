# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Calibration policies: from a tensor's statistics to the calibrated amax.

Every policy takes statistics (``ActivationStatistics`` or ``Marginals``; the oracle needs the
joint histogram) and returns an amax in the activation's units; ``input_scale_from_amax`` turns it
into the stored scale. ``POLICIES`` names them all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from .histogram import Marginals
from .quantize import (
    AMAX_PER_SCALE,
    E4M3_NORMAL_RANGE,
    FOUR_OVER_SIX_ROOM,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    Underflow,
    input_scale_from_amax,
)
from .search import least_error
from .statistics import ActivationStatistics

ANCHOR_FLOOR = 1e6  # blocks this far under the upper anchor count as zero
MOST_ROOM = 22  # octaves above the amax, where every block is flushed

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
    largest = float(np.finfo(np.float32).max)
    return _positive(float(np.float32(min(max(rho * anchor, upper), largest))))


def headroom_over_amax(statistics: Statistics) -> float:
    """Headroom, but never below the amax, so that nothing seen in calibration saturates."""
    return max(amax(statistics), headroom(statistics))


def room(statistics: ActivationStatistics, tolerance: float = 0.01) -> int:
    """By how many octaves the amax may be raised before its blocks notice.

    As long as block scales are normal, doubling the scale changes no error. The first whole octave whose
    error under flush, every block weighted alike (``block_snr_db``), exceeds that at the amax by more
    than the share ``tolerance`` is the first too many. At most 22, where every block is flushed, or what
    the largest scale allows.
    """
    amaxes = amax(statistics) * 2.0 ** np.arange(MOST_ROOM + 1)
    scales = input_scale_from_amax(amaxes[amaxes < HIGHEST_SCALE * AMAX_PER_SCALE])
    error = 10 ** (-statistics.block_snr_db(scales) / 10)
    harmed = error > (1 + tolerance) * error[0]
    return int(harmed.argmax()) - 1 if harmed.any() else len(scales) - 1


def raised(statistics: ActivationStatistics, share: float = 0.5, tolerance: float = 0.01) -> float:
    """The amax raised by a share of its ``room``: as far from saturation as from underflow at 0.5."""
    return amax(statistics) * 2.0 ** (share * room(statistics, tolerance))


def aligned_headroom(statistics: ActivationStatistics, underflow: Underflow = "flush") -> float:
    """Headroom, moved up within one octave to the scale of lowest MSE on these very statistics.

    While block scales are normal the error repeats every octave, so the best place within the octave
    can be had at headroom's distance from saturation as well as at the amax.
    """
    low = headroom(statistics)
    return least_error(statistics, underflow, [(low, 2 * low)])


def oracle(statistics: ActivationStatistics, underflow: Underflow = "flush") -> float:
    """The amax whose scale has the lowest MSE on these very statistics: the bound for a policy.

    ``search.least_error`` says how it is found. No scale of a dense search was lower by more than
    1e-4 of that MSE on any tensor tried.
    """
    _positive(statistics.amax)
    return least_error(statistics, underflow)


class NoValue(ValueError):
    """A policy has no value for a statistic: the tensor, or all that the policy looks at, is zero."""


def _positive(value: float) -> float:
    if not value > 0:
        raise NoValue(
            f"the calibrated amax is {value}; expected a positive value. The percentile or the "
            "whole tensor is zero: calibrate on more data or a higher percentile."
        )
    if value < LOWEST_SCALE * AMAX_PER_SCALE:
        raise NoValue(
            f"the calibrated amax is {value}; expected at least {LOWEST_SCALE * AMAX_PER_SCALE:.3g}, "
            "whose scale is a normal float32. Such a tensor is zero but for underflow."
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

    NaN where a policy has no value: of a tensor of zeros, and of a percentile that is zero.

    Raises
    ------
    ValueError
        For a name that ``POLICIES`` lacks, or whose scale is not calibrated.
    """
    names = list(names)
    unknown = [name for name in names if name not in CALIBRATED]
    if unknown:
        raise ValueError(f"policies {unknown} do not calibrate; expected some of {list(CALIBRATED)}.")
    found = dict.fromkeys(names, math.nan)
    for name in names:
        with contextlib.suppress(NoValue):
            found[name] = POLICIES[name].calibrate(statistics)  # type: ignore[misc]
    return found
