# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The calibrated amax of least error, searched on a joint histogram.

Between two scales where a block scale flips to its E4M3 neighbour the error is continuous and made of
parabolas. Where an element changes its code, the lower of two parabolas holds: a kink that bends down,
never a minimum. So every local minimum is the vertex of a parabola or one side of a flip. A value that
dominates makes narrow valleys, at the scales that represent it exactly; these are vertices, which any
scale on the same parabola finds.
"""

from __future__ import annotations

import numpy as np
import torch

from .error import FLIPS, Parabolas
from .histogram import codes_to_values
from .quantize import (
    AMAX_PER_SCALE,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN_SUBNORMAL,
    E4M3_NORMAL_RANGE,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    Underflow,
    input_scale_from_amax,
)
from .statistics import ActivationStatistics

CELLS = 64  # of an octave
HEAVY_ROWS = 4  # block amaxes of most energy, whose flips are looked at in every octave
PLACES = 2**14  # of an octave that count as different
EXACT = 12  # places whose error is computed exactly
BOTH_SIDES = torch.tensor([1 - 2**-18, 1 + 2**-18], dtype=torch.float64)

Octave = tuple[float, float]  # of calibrated amaxes, the first included, the last not


def least_error(
    statistics: ActivationStatistics, underflow: Underflow, octaves: list[Octave] | None = None
) -> float:
    """The calibrated amax of least error within some octaves; by default, all that can hold it.

    1. In every octave a log grid, and both sides of the flips of the block amaxes with most energy;
       and at each the vertex of its parabola.
    2. Octaves are much alike. So of each of the grid's cells the one in the octave where it is best:
       both sides of every flip in it, and their vertices.
    3. The best few places, wherever they were found, in every octave; their exact error decides.
    """
    curve = statistics.parabolas
    tried = _Tried(curve, underflow, octaves or octaves_of_least_error(statistics, underflow))
    grid = 2 ** (torch.arange(CELLS, dtype=torch.float64, device=curve.block_amax.device) / CELLS)
    tried.add((tried.octaves[:, :1] * grid).flatten())
    heavy = curve.block_amax[curve.row_energy.argsort(descending=True)[:HEAVY_ROWS]]
    tried.add(_flips(heavy, tried.octaves))

    cells = tried.octave_of(tried.best(CELLS), parts=CELLS)
    tried.add(_flips(curve.block_amax, torch.stack([cells, cells * grid[1]], 1)))

    best = tried.best(PLACES)[:EXACT]
    tried.add((tried.octaves[:, :1] * (best / tried.octave_of(best))).flatten())
    amaxes = tried.best(PLACES)[:EXACT].cpu().numpy()
    return float(amaxes[statistics.mse(input_scale_from_amax(amaxes), underflow).argmin()])


class _Tried:
    """Calibrated amaxes within some octaves and their errors, to a millionth of the least."""

    def __init__(self, curve: Parabolas, underflow: Underflow, octaves: list[Octave]):
        self.curve, self.underflow = curve, underflow
        self.octaves = torch.tensor(octaves, dtype=torch.float64, device=curve.block_amax.device)
        self.amaxes = self.errors = self.octaves[:0, 0]

    def add(self, amaxes: torch.Tensor) -> None:
        """Try the amaxes, and the vertices of the parabolas on which they lie."""
        for _ in range(2):
            scales = _within(amaxes, self.octaves).unique() / AMAX_PER_SCALE
            scales = scales[(scales >= LOWEST_SCALE) & (scales < HIGHEST_SCALE * (1 - 2**-24))]
            a, b = self.curve.at(scales, self.underflow)
            self.amaxes = torch.cat([self.amaxes, scales * AMAX_PER_SCALE])
            self.errors = torch.cat([self.errors, self.curve.energy - scales * (2 * a - scales * b)])
            vertices = a / b  # kept up to the next amax to each side, which finds those beyond itself
            next_one = torch.cat([0 * scales[:1], scales, torch.inf + scales[:1]])
            kept = (next_one[:-2] < vertices) & (vertices < next_one[2:])
            amaxes = vertices[kept] * AMAX_PER_SCALE

    def octave_of(self, amaxes: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """Where the octave begins that holds each amax, or its n-th part."""
        low = self.octaves[0, 0]
        return low * 2 ** (torch.floor(torch.log2(amaxes / low) * parts) / parts)

    def best(self, parts: int) -> torch.Tensor:
        """The best amax in each part of an octave, whichever octave that is in; the best first."""
        amaxes = self.amaxes[self.errors.argsort(stable=True)]
        part = torch.floor(torch.log2(amaxes / self.octaves[0, 0]) * parts) % parts
        part, at = part.sort(stable=True)
        first = torch.cat([part[:1] >= 0, part[1:] != part[:-1]])
        return amaxes[at[first].sort().values]


def octaves_of_least_error(statistics: ActivationStatistics, underflow: Underflow) -> list[Octave]:
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
    octaves: list[tuple[float, float]] = []
    octave = lowest
    while True:
        low, high = top * 2.0**octave, top * 2.0 ** (octave + 1)
        zeroed = np.searchsorted(block_amax, zero_at * low / AMAX_PER_SCALE, side="right")
        if lost[zeroed] > known or low / AMAX_PER_SCALE >= HIGHEST_SCALE:
            return octaves
        if octave <= 0 or high > E4M3_NORMAL_RANGE * block_amax[0]:
            octaves.append((low, high))
        octave += 1


def _flips(block_amax: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Both sides of the calibrated amaxes within the spans [n, 2] where a block scale flips."""
    flips = E4M3_MAX * block_amax[:, None] / FLIPS.to(block_amax.device)
    flips = _within(flips.flatten(), spans).unique()  # blocks whole octaves apart flip together
    return (flips[:, None] * BOTH_SIDES.to(flips.device)).flatten()


def _within(amaxes: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """The amaxes that lie in one of the spans [n, 2], which do not overlap."""
    begun, ended = (
        torch.searchsorted(edge.contiguous().sort().values, amaxes, right=True) for edge in spans.T
    )
    return amaxes[begun > ended]
