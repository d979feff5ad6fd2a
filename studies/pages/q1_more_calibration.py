# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""How the amax grows with calibration: extreme-value theory on the largest magnitude of a sequence.

Sequence amaxes above a high threshold ``u`` follow a generalized Pareto law with tail index ``xi``
and scale ``sigma`` (Pickands, 1975). With ``p`` the share of sequences above ``u``, the level that
one sequence in ``n`` exceeds is ``U(n) = u + sigma / xi ((n p)**xi - 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import genpareto

from studies.runs.store import Run

from .snr_tables import curve_snr, sequence_amaxes

THRESHOLD = 0.8  # quantile of the sequence amaxes above which the tail is fitted
HARM_DB = 0.1


@dataclass(frozen=True)
class Tail:
    """A fitted tail: ``index`` xi, from k excesses.

    ``error``: the asymptotic standard error of xi, ``(1 + xi) / sqrt(k)`` (Smith, 1987); NaN for xi
    under -1/2, where maximum likelihood has none.
    """

    index: float
    error: float
    scale: float
    threshold: float
    share: float

    def level(self, n: float) -> float:
        """The amax that one sequence in ``n`` exceeds, ``U(n)``; needs ``n >= 1 / share``."""
        return self._excess_level(1 - 1 / (n * self.share))

    def sequences(self, level: float) -> float:
        """The inverse: how many sequences until one exceeds ``level``; infinite beyond the end."""
        tail = genpareto.sf(level - self.threshold, self.index, scale=self.scale)
        return float(np.inf) if tail == 0 else float(1 / (self.share * tail))

    def largest_of(self, n: int, probability: float) -> float:
        """Quantile of the largest amax of ``n`` sequences: ``F(x)**n = probability``."""
        return self._excess_level(1 - (1 - probability ** (1 / n)) / self.share)

    def _excess_level(self, probability: float) -> float:
        if not 0 <= probability < 1:
            raise ValueError(
                f"excess probability is {probability}; expected a value in [0, 1). Ask for more "
                f"sequences than 1 / {self.share:g}: the level lies below the fitted tail."
            )
        return float(self.threshold + genpareto.ppf(probability, self.index, scale=self.scale))


def fit_tail(amaxes: np.ndarray, quantile: float = THRESHOLD) -> Tail:
    """Maximum-likelihood fit to the sequence amaxes above their ``quantile``.

    Raises ValueError for fewer than 20 excesses, or fewer than 10 different ones: where one frequent
    token sets the amax of many sequences, there is no tail to fit.
    """
    threshold = float(np.quantile(amaxes, quantile))
    excess = amaxes[amaxes > threshold] - threshold
    distinct = len(np.unique(excess))
    if len(excess) < 20 or distinct < 10:
        raise ValueError(
            f"{len(excess)} sequence amaxes, {distinct} different ones, lie above the "
            f"{quantile:.0%} quantile; expected at least 20 and 10. Capture more sequences; or one "
            "token sets the amax of most, and there is no tail."
        )
    index, _, scale = (float(v) for v in genpareto.fit(excess, floc=0))
    error = (1 + index) / len(excess) ** 0.5 if index > -0.5 else np.nan
    return Tail(index, error, scale, threshold, len(excess) / len(amaxes))


def _tail_or_none(amaxes: np.ndarray) -> Tail | None:
    try:
        return fit_tail(amaxes)
    except ValueError:
        return None  # the tables say NaN


def growth_table(run: Run, mix: str, share: float = 0.9) -> pd.DataFrame:
    """Per site: the tail, and sequences until the amax reaches ``share`` of the pool's.

    ``measured``: ``(N + 1) / (k + 1)``, the mean first passage of a random order when k of N
    sequences reach the target; ``predicted``: the same from the fitted tail and its own ``U(N)``.
    """
    rows = []
    for site in run.sites:
        amaxes = sequence_amaxes(run, mix, site)
        tail = _tail_or_none(amaxes)
        target = share * amaxes.max()
        measured = (len(amaxes) + 1) / ((amaxes >= target).sum() + 1)
        if tail is None:
            rows.append((site, np.nan, np.nan, amaxes.max(), measured, np.nan, False))
            continue
        level = share * tail.level(len(amaxes))
        in_tail = level > tail.threshold
        predicted = tail.sequences(level) if in_tail else 1 / (amaxes >= level).mean()
        rows.append((site, tail.index, tail.error, amaxes.max(), measured, predicted, in_tail))
    return pd.DataFrame(rows, columns=["site", "tail_index", "error", "amax", "measured", "predicted",
                                       "in_tail"])  # fmt: skip


def forecast_table(run: Run, probability: float = 0.9) -> pd.DataFrame:
    """A forecast that can fail: the tail of a pool's first half against its second half's amax.

    Columns: mix, site, first (amax of the first half), low, middle, high (predicted amax of the
    second half, central interval of ``probability``), found.
    """
    rows = []
    edge = (1 - probability) / 2
    for mix in run.mixes:
        for site in run.sites:
            amaxes = sequence_amaxes(run, mix, site)
            first, second = np.array_split(amaxes, 2)
            tail = _tail_or_none(first)
            if tail is None:
                continue
            band = [tail.largest_of(len(second), q) for q in (edge, 0.5, 1 - edge)]
            rows.append((mix, site, first.max(), *band, second.max()))
    return pd.DataFrame(rows, columns=["mix", "site", "first", "low", "middle", "high", "found"])


def harm_table(run: Run, mix: str, underflow: str, loss_db: float = HARM_DB) -> pd.DataFrame:
    """Per site: from which calibrated amax on more of it costs over ``loss_db``, on the exact curve.

    Columns: site, amax (the calibration pool's), harm_amax, octaves between them, sequences (until
    the fitted tail expects one amax that large; infinite if its end lies below).
    """
    rows = []
    for site in run.sites:
        amaxes = sequence_amaxes(run, mix, site)
        grid = run.curve(mix, site).calibrated_amax.to_numpy()
        grid = grid[grid >= amaxes.max()]
        snr = curve_snr(run, mix, site, underflow, grid)
        fine = (snr >= snr[0] - loss_db).nonzero()[0][-1]  # beyond it, no ripple brings SNR back
        harm = float(grid[fine + 1]) if fine + 1 < len(grid) else np.inf
        tail = _tail_or_none(amaxes)
        n = np.nan if tail is None else tail.sequences(harm)
        rows.append((site, amaxes.max(), harm, np.log2(harm / amaxes.max()), n))
    return pd.DataFrame(rows, columns=["site", "amax", "harm_amax", "octaves", "sequences"])
