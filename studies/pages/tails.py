# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""How the amax grows with the sequences: the tail of the sequence amaxes, fitted and put to a test.

Sequence amaxes above a high threshold ``u`` follow a generalized Pareto law with tail index ``xi``
and scale ``sigma`` (Pickands, 1975). With ``p`` the share of sequences above ``u``, the level that
one sequence in ``n`` exceeds is ``U(n) = u + sigma / xi ((n p)**xi - 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import genpareto

from nvfp4_utils.sites import kind_of
from studies.runs.store import Run

from . import plots
from .snr_tables import sequence_amaxes

THRESHOLD = 0.8  # quantile of the sequence amaxes above which the tail is fitted


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


def forecast_summary(forecast: pd.DataFrame) -> dict[str, float]:
    """Of ``forecast_table``: shares inside and above the interval, growth from half to half.

    ``low`` and ``high``: between these lies the second half's amax over the first's in 90 % of cases.
    """
    growth = forecast.found / forecast["first"]
    return {
        "inside": float(forecast.found.between(forecast.low, forecast.high).mean()),
        "above": float((forecast.found > forecast.high).mean()),
        "low": float(growth.quantile(0.05)),
        "high": float(growth.quantile(0.95)),
    }


def growth_figure(fitted: pd.DataFrame) -> plt.Figure:
    """Sequences to 90 % of the pool's amax: against the tail's prediction, and the tail index."""
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.8))
    for kind, one in fitted.groupby(fitted.site.map(kind_of), sort=False):
        style = plots.kind_style(kind)
        marks = {"color": style.color, "marker": style.marker, "ms": 5, "ls": ""}
        axes[0].plot(one.predicted, one.measured, label=kind, **marks)
        axes[1].errorbar(one.tail_index, one.measured, xerr=2 * one.error.fillna(0), elinewidth=0.8,
                         **marks)  # fmt: skip
    span = [1, max(fitted.predicted.max(), fitted.measured.max())]
    axes[0].plot(span, span, color="k", lw=0.8, ls=":")
    axes[0].set(xscale="log", yscale="log", xlabel="sequences, predicted by the tail",
                ylabel="sequences to 90 % of the pool's amax")  # fmt: skip
    axes[1].set(yscale="log", xlabel="tail index ± 2 standard errors")
    axes[1].axvline(0, color="k", lw=0.8, ls=":")
    axes[0].legend(fontsize=8)
    return fig
