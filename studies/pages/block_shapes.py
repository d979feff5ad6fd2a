# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""MSE(g) predicted from the block-amax marginal: one function of how far E4M3 rounds a block scale.

An element ``x = b z`` of a block with amax ``b`` becomes ``b (r / 6) e2m1(6 z / r)``, where
``r = s8 / s`` is the block scale after rounding over the one before. So its block's mean squared
error is ``b**2 psi(r)``, with ``psi`` fixed by the block's shape, the 16 values ``z``. Every regime
is a range of ``r``: saturated below 1, normal within 1/17 of 1, flushed 0, floored up to infinity.
If shape does not depend on ``b``, then ``MSE(g) = sum n_b b**2 psi(r(b, g)) / sum n_b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from nvfp4_utils import quantize
from nvfp4_utils.histogram import CODE_BITS, Marginals, codes_to_values
from nvfp4_utils.quantize import BLOCK_SIZE, E2M1_MAX, UNDERFLOWS, Underflow, input_scale_from_amax
from nvfp4_utils.sites import kind_of
from nvfp4_utils.statistics import ActivationStatistics
from studies.runs.store import Run

from .regimes import nonzero_blocks, safe_window
from .snr_tables import db

STEPS = 64  # an octave of r; between grid points psi is taken as linear
# From r = 24 on every element rounds to 0, as at r = 0.
RATIOS = np.concatenate([[0.0], 2.0 ** np.arange(-12, 5 + 1 / STEPS, 1 / STEPS)])
EXPONENTS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0, 32.0)  # 2 is the Gaussian
MODELS = ("gaussian", "rescaled", "matched")
TOTAL_WEIGHT = 2.0**44  # integer weights of a shape's elements; far above their number


@dataclass(frozen=True)
class Shape:
    """Blocks of amax 1: ``crest`` is E[x**2] / E[b**2], ``error`` is psi at ``RATIOS``."""

    crest: float
    error: np.ndarray

    def at(self, ratio: float) -> float:
        """psi at a rounding ratio."""
        return float(np.interp(ratio, RATIOS, self.error))

    @property
    def snr_db(self) -> float:
        """SNR (dB) of blocks whose scale E4M3 does not round."""
        return float(db(self.crest / self.at(1)))

    @classmethod
    def from_elements(cls, z: torch.Tensor, energy: torch.Tensor) -> Shape:
        """Of magnitudes ``z`` [n] over their own block's amax, weighted with ``energy`` [n], b**2.

        The package's quantizer measures psi: a scale ``s = 448 / r`` saturates to every ``r`` below
        1, a scale ``2**-9 / r`` is floored to every ``r`` above. Raises ValueError without weight.
        """
        total = float(energy.sum())
        if not total > 0:
            raise ValueError(f"weights sum to {total:g}; expected at least one nonzero block.")
        one = 0x3F80 << CODE_BITS  # block amax 1.0, as a bfloat16 code
        keys = one | z.to(torch.bfloat16).view(torch.int16).to(torch.int64)
        counts = (energy.to(torch.float64) * (TOTAL_WEIGHT / total)).round().to(torch.int64)
        unsorted = ActivationStatistics(torch.bfloat16, keys, counts)
        unit = ActivationStatistics.merged([unsorted])
        low, high = RATIOS[(RATIOS > 0) & (RATIOS < 1)], RATIOS[RATIOS >= 1]
        saturated = unit.mse(low / (E2M1_MAX * quantize.E4M3_MAX), "flush")
        floored = unit.mse(high / (E2M1_MAX * quantize.E4M3_MIN_SUBNORMAL), "floor")
        return cls(unit.signal_power, np.concatenate([[unit.signal_power], saturated, floored]))

    @classmethod
    def generalized_normal(cls, exponent: float, *, blocks: int = 2**16, seed: int = 0) -> Shape:
        """Monte-Carlo blocks of density ``exp(-abs(x)**exponent)``, each weighted with its ``b**2``.

        If ``t`` is Gamma(1 / exponent), then ``t**(1 / exponent)`` has that density.
        """
        if not exponent > 0:
            raise ValueError(f"exponent is {exponent}; expected a positive number (2: Gaussian).")
        generator = np.random.default_rng(seed)
        log_x = np.log(generator.gamma(1 / exponent, size=(blocks, BLOCK_SIZE))) / exponent
        x = torch.from_numpy(np.exp(log_x - log_x.max()))
        b = x.amax(dim=1, keepdim=True)
        return cls.from_elements((x / b).flatten(), b.square().expand_as(x).flatten())

    @classmethod
    def of_site(cls, joint: ActivationStatistics, low: float = 0, high: float = np.inf) -> Shape:
        """A site's own shape, pooled over its nonzero blocks with ``low <= b < high``."""
        b, x = (codes_to_values(c, joint.dtype) for c in (joint.block_codes, joint.element_codes))
        keep = (b > 0) & (b >= low) & (b < high)
        return cls.from_elements(x[keep] / b[keep], b[keep].square() * joint.counts[keep])


class Family:
    """One shape a crest: generalized normals, and mixtures of two neighbours between them."""

    def __init__(self, exponents: Sequence[float] = EXPONENTS, **kwargs):
        self.members = [Shape.generalized_normal(e, **kwargs) for e in sorted(exponents)]

    def matching(self, crest: float) -> Shape:
        """The shape of a given crest; beyond the ends of the family, its nearest member."""
        crests = [m.crest for m in self.members]
        position = float(np.interp(crest, crests, np.arange(len(crests))))
        k = min(int(position), len(crests) - 2)
        (one, two), share = self.members[k : k + 2], position - k
        blend = (1 - share) * one.crest + share * two.crest
        return Shape(blend, (1 - share) * one.error + share * two.error)


def _blocks(marginals: Marginals) -> tuple[np.ndarray, np.ndarray]:
    values, counts = nonzero_blocks(marginals)
    if not counts.sum():
        raise ValueError("the marginal holds no nonzero block; expected at least one.")
    return values, counts


def crest(marginals: Marginals) -> float:
    """E[x**2] / E[b**2] of a site, from its two marginals: 1/16 (one element) to 1 (all equal)."""
    values, counts = _blocks(marginals)
    return marginals.signal_power * int(marginals.block_counts.sum()) / float(values**2 @ counts)


def ratio_energy(values, counts, amaxes, underflow: Underflow) -> np.ndarray:
    """Block energy ``n b**2`` at each rounding ratio, [amaxes, RATIOS]; shared between neighbours.

    ``values``, ``counts``: distinct nonzero block amaxes, float64, and how many blocks have each.
    Raises ValueError if a calibrated amax is not positive and finite, or the convention unknown.
    """
    quantize.check_underflow(underflow)
    g = input_scale_from_amax(np.atleast_1d(amaxes))[:, None]
    s8 = quantize.block_scale_e4m3(torch.from_numpy(values).to(torch.float32), g, underflow)
    ratio = np.minimum((s8.double() * g.double()).numpy() * (E2M1_MAX / values), RATIOS[-1])
    with np.errstate(divide="ignore"):
        octave = np.log2(ratio) - np.log2(RATIOS[1])
    k = np.clip(np.floor(octave * STEPS) + 1, 0, len(RATIOS) - 2).astype(int)
    share = (ratio - RATIOS[k]) / (RATIOS[k + 1] - RATIOS[k])
    energy = counts * values**2
    cell = k + len(RATIOS) * np.arange(len(ratio))[:, None]
    table = np.zeros(len(ratio) * len(RATIOS))
    for at, part in ((cell, (1 - share) * energy), (cell + 1, share * energy)):
        table += np.bincount(at.ravel(), weights=part.ravel(), minlength=len(table))
    return table.reshape(-1, len(RATIOS))


def predicted_mse(marginals: Marginals, amaxes, underflow: Underflow, shapes) -> np.ndarray:
    """Predicted MSE of every shape at calibrated amaxes: float64 [shapes, amaxes]."""
    energy = ratio_energy(*_blocks(marginals), amaxes, underflow)
    return np.array([energy @ s.error for s in shapes]) / int(marginals.block_counts.sum())


def shapes_by_amax(joint: ActivationStatistics, bins: int) -> dict[tuple[float, float], Shape]:
    """A site's own shape in each bin ``(low, high)`` of block amax, ``bins`` an octave."""
    k = np.unique(np.floor(np.log2(_blocks(joint.marginals)[0]) * bins))
    edges = [(2.0 ** (i / bins), 2.0 ** ((i + 1) / bins)) for i in k]
    return {edge: Shape.of_site(joint, *edge) for edge in edges}


def mse_by_amax(joint: ActivationStatistics, amaxes, underflow: Underflow, shapes) -> np.ndarray:
    """MSE [amaxes] predicted with another shape in each bin of block amax (``shapes_by_amax``)."""
    values, counts = _blocks(joint.marginals)
    total = np.zeros(np.size(amaxes))
    for (low, high), shape in shapes.items():
        at = (values >= low) & (values < high)
        total += ratio_energy(values[at], counts[at], amaxes, underflow) @ shape.error
    return total / int(joint.marginals.block_counts.sum())


def compare(run: Run, mix: str, family: Family, gaussian: Shape, step: float = 1 / 16) -> pd.DataFrame:
    """Exact SNR (dB) and each model's at every site of a mix, every ``step`` octaves of its curve.

    Columns: mix, site, kind, underflow, crest, calibrated_amax, octaves (of it above ``B_max``),
    exact, ``MODELS``: psi Gaussian, that scaled to the site's crest, the family's of this crest.
    """
    parts = []
    for site, curve in run.curves(mix).groupby("site", observed=True, sort=False):
        curve = curve.sort_values("calibrated_amax")
        _, first = np.unique(np.floor(np.log2(curve.calibrated_amax) / step), return_index=True)
        curve, m = curve.iloc[first], run.marginals(mix, site, "test")
        amaxes, m2 = curve.calibrated_amax.to_numpy(), crest(m)
        rescaled = Shape(m2, gaussian.error * (m2 / gaussian.crest))
        keys = {"mix": mix, "site": site, "kind": kind_of(site), "crest": m2,
                "calibrated_amax": amaxes, "octaves": np.log2(amaxes / safe_window(m)[0])}  # fmt: skip
        for u in UNDERFLOWS:
            predicted = predicted_mse(m, amaxes, u, [gaussian, rescaled, family.matching(m2)])
            noise = {"exact": curve[f"mse_{u}"].to_numpy()} | dict(zip(MODELS, predicted, strict=True))
            snr = {name: db(m.signal_power / mse) for name, mse in noise.items()}
            parts.append(pd.DataFrame(keys | {"underflow": u} | snr))
    return pd.concat(parts, ignore_index=True)


def plateau_and_limits(octaves, snr, loss_db: float = 0.1) -> tuple[float, float, float]:
    """Plateau SNR, and the octaves above ``B_max`` beyond which every loss exceeds ``loss_db``.

    The plateau is the mean noise of the octave above ``B_max``: the ripple within it is no loss.
    ``octaves`` [n] ascends. Raises ValueError without a point in that octave.
    """
    octaves, snr = np.asarray(octaves), np.asarray(snr)
    home = (octaves >= 0) & (octaves <= 1)
    if not home.any():
        raise ValueError("no calibrated amax lies within the octave above B_max; expected some.")
    plateau = float(-db(np.mean(10 ** (-snr[home] / 10))))
    excess = plateau - snr - loss_db

    def crossing(inside: int, outside: int) -> float:
        at = [inside, min(max(outside, 0), len(snr) - 1)]
        return float(np.interp(0, excess[at], octaves[at]))

    good = np.flatnonzero(excess <= 0)
    return plateau, crossing(good[0], good[0] - 1), crossing(good[-1], good[-1] + 1)
