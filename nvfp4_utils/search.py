# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The calibrated amax of least error, searched on a joint histogram.

Between two scales where a block scale flips to its E4M3 neighbour the error is continuous and made of
parabolas. Where an element changes its code, the lower of two parabolas holds: a kink that bends down,
never a minimum. So every local minimum is the vertex of a parabola or one side of a flip. A value that
dominates makes narrow valleys, at the scales that represent it exactly; those are vertices, and any scale
on the same parabola finds them.
"""

from __future__ import annotations

import numpy as np
import torch

from .error import FLIPS, Parabolas
from .histogram import codes_to_values
from .quantize import (
    AMAX_PER_SCALE,
    E2M1_MAX,
    E4M3_MIN_SUBNORMAL,
    E4M3_NORMAL_RANGE,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    Underflow,
    input_scale_from_amax,
)
from .statistics import ActivationStatistics

GRID_POINTS = 64  # an octave
HEAVY_ROWS = 4  # block amaxes of most energy, whose flips all are looked at
NEAR = 64  # scales whose neighbourhood is searched,
NEARBY = 1 / GRID_POINTS  # this many octaves to each side
EXACT = 12  # scales whose error is computed exactly
BOTH_SIDES = torch.tensor([1 - 2**-18, 1 + 2**-18], dtype=torch.float64)

Span = tuple[float, float]  # of calibrated amaxes, the first included, the last not


def least_error(
    statistics: ActivationStatistics, underflow: Underflow, spans: list[Span] | None = None
) -> float:
    """The calibrated amax of least error within the spans; all that can hold it by default.

    1. A log grid, and both sides of the flips of the block amaxes with most energy.
    2. The vertex of the parabola at each of those.
    3. Near the best of all these, both sides of every flip, and their vertices.
    4. The exact error of the few best decides.
    """
    curve = statistics.parabolas
    if spans is None:
        spans = spans_of_oracle(statistics, underflow)
    scales = torch.tensor(spans, dtype=torch.float64) / AMAX_PER_SCALE
    scales = scales.clamp(LOWEST_SCALE, HIGHEST_SCALE * (1 - 2**-24)).to(curve.block_amax.device)
    points = torch.arange(GRID_POINTS, device=scales.device) / GRID_POINTS
    grid = [low * (high / low) ** points for low, high in scales]  # spans are octaves
    heavy = curve.block_amax[curve.row_energy.argsort(descending=True)[:HEAVY_ROWS]]
    found = _with_vertices(curve, torch.cat([*grid, _flips(heavy, scales)]), underflow, scales)
    best = _best(*found, NEAR)
    near = torch.stack([best * 2**-NEARBY, best * 2**NEARBY], 1)
    flips = _within(_flips(curve.block_amax, near), scales)
    more = _with_vertices(curve, flips, underflow, scales)
    best = _best(*(torch.cat(pair) for pair in zip(found, more, strict=True)), EXACT)
    amaxes = best.cpu().numpy() * AMAX_PER_SCALE
    return float(amaxes[statistics.mse(input_scale_from_amax(amaxes), underflow).argmin()])


def spans_of_oracle(statistics: ActivationStatistics, underflow: Underflow) -> list[Span]:
    """The octaves, counted from the largest amax, that can hold the least error.

    Below, a calibrated amax ``L`` costs at least ``sum max(|x| - L, 0)**2``, as nothing quantizes above
    ``L``. Above, the blocks that underflow cost their energy. Octaves where either exceeds a known error
    are out. As long as every block scale is normal doubling the scale changes no bit: one octave stands
    for all of those.
    """
    curve, top = statistics.parabolas, statistics.amax
    known, marginals = statistics.known_error, statistics.marginals
    x = codes_to_values(marginals.element_codes, marginals.dtype)
    lowest = 0
    while float(((x - top * 2.0**lowest).clamp(min=0) ** 2 * marginals.element_counts).sum()) <= known:
        lowest -= 1
    # Under flush, s = b / 6g is zero up to half of the smallest E4M3 number; under floor that number
    # times g is the step, and an element is zero up to a quarter of it.
    zero_at = E2M1_MAX * E4M3_MIN_SUBNORMAL / 2 if underflow == "flush" else E4M3_MIN_SUBNORMAL / 4
    lost = np.concatenate([[0], curve.row_energy.cumsum(0).cpu().numpy()])
    block_amax = curve.block_amax.cpu().numpy()
    spans, octave = [], lowest
    while True:
        low, high = top * 2.0**octave, top * 2.0 ** (octave + 1)
        zeroed = np.searchsorted(block_amax, zero_at * low / AMAX_PER_SCALE, side="right")
        if lost[zeroed] > known or low / AMAX_PER_SCALE >= HIGHEST_SCALE:
            return spans
        if octave <= 0 or high > E4M3_NORMAL_RANGE * block_amax[0]:
            spans.append((low, high))
        octave += 1


def _flips(block_amax: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Both sides of the scales within the spans where a block scale flips, without repeats."""
    flips = block_amax[:, None] / (E2M1_MAX * FLIPS.to(block_amax.device))
    flips = _within(flips.flatten().sort().values, spans)
    return (flips[:, None] * BOTH_SIDES.to(flips.device)).flatten()


def _within(scales: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """The scales that lie in one of the spans [n, 2]."""
    begun, ended = (torch.searchsorted(e.contiguous().sort().values, scales, right=True) for e in spans.T)
    return scales[begun > ended]


def _with_vertices(curve: Parabolas, scales, underflow: Underflow, spans) -> tuple[torch.Tensor, ...]:
    """The scales and the vertices of their parabolas within the spans, and the error at each."""
    a, b = curve.at(scales, underflow)
    vertices = _within((a / b)[b > 0], spans)
    scales = torch.cat([scales, vertices])
    a, b = (torch.cat(pair) for pair in zip((a, b), curve.at(vertices, underflow), strict=True))
    return scales, curve.energy - scales * (2 * a - scales * b)


def _best(scales: torch.Tensor, errors: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` scales of least error."""
    return scales[errors.argsort(stable=True)[:count]]
