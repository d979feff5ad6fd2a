# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Does more calibration help: the answer, and how the amax grows with the sequences.

Sequence amaxes above a high threshold ``u`` follow a generalized Pareto law with tail index ``xi``
and scale ``sigma`` (Pickands, 1975). With ``p`` the share of sequences above ``u``, the level that
one sequence in ``n`` exceeds is ``U(n) = u + sigma / xi ((n p)**xi - 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy.stats import genpareto

from nvfp4_utils import policies
from studies.runs import synthetic
from studies.runs.store import Run

from . import plots, snr_tables
from .snr_tables import HARM_DB, curve_snr, sequence_amaxes

THRESHOLD = 0.8  # quantile of the sequence amaxes above which the tail is fitted
SPIKE = "rare_giant_spike"


@dataclass(frozen=True)
class Answer:
    """What amax gains from more sequences on one run; losses in dB against the whole pool, flush.

    ``enough``: the number of sequences from which on no site loses over ``HARM_DB``. ``one``: loss of
    a single sequence, mean over sites. ``worst``: loss of ``enough`` at the worst site. ``spike``: what
    the largest set of the synthetic spike case costs against its oracle, by convention.
    """

    pool: int
    enough: int
    one: float
    worst: float
    spike: dict[str, float]

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if self.enough == 1:
            return "No: one sequence is enough."
        if self.enough < self.pool:
            return f"Up to about {self.enough} sequences, yes; beyond, no."
        return f"Yes, up to all {self.pool} sequences."

    @property
    def text(self) -> str:
        """The numbers behind the verdict, in two sentences."""
        most = f", {self.enough} at most {self.worst:.2f} dB at any site"
        return (
            f"With amax, one sequence loses {self.one:.2f} dB on average against the whole pool"
            f"{most if 1 < self.enough < self.pool else ''}. A larger set can also hurt: "
            f"in synthetic data one freak value costs {self.spike['flush']:.1f} dB in a kernel that "
            "flushes."
        )


@lru_cache(maxsize=8)
def answer(run: Run) -> Answer:
    """Whether more calibration helps on a run, on its featured mix."""
    table = loss_table(snr_tables.size_curves(run, run.featured_mix))
    harmful = table.index[table.worst > HARM_DB]
    enough = int(table.index[table.index > harmful.max()][0]) if len(harmful) else 1
    return Answer(int(table.index.max()), enough, float(table["mean"][1]), float(table.worst[enough]),
                  spike_cost())  # fmt: skip


def loss_table(sizes: pd.DataFrame) -> pd.DataFrame:
    """What ``n`` sequences lose against the whole pool, from ``size_curves``; indexed by n.

    Columns: mean over sites, worst (dB), worst site, sites over ``HARM_DB``.
    """
    last = sizes.groupby("site", sort=False).snr_db.transform("last")
    loss = sizes.assign(loss=last - sizes.snr_db).pivot(index="n", columns="site", values="loss")
    return pd.DataFrame({"mean": loss.mean(axis=1), "worst": loss.max(axis=1),
                         "worst site": loss.idxmax(axis=1),
                         f"sites over {HARM_DB} dB": (loss > HARM_DB).sum(axis=1)})  # fmt: skip


def kind_table(sizes: pd.DataFrame, shown: tuple[int, ...] = (1, 8, 64, 512)) -> pd.DataFrame:
    """SNR (dB) at some sizes and of the whole pool: mean over the sites of a kind, a row each."""
    table = sizes.assign(kind=sizes.site.map(snr_tables.site_kind))
    table = table[table.n.isin([*shown, sizes.n.max()])]
    table = table.pivot_table(index="kind", columns="n", values="snr_db", sort=False)
    return table.sort_index(axis=1).rename_axis(index=None)


def spike_cost() -> dict[str, float]:
    """Oracle's SNR minus that of the largest calibration set with the spike, by convention."""
    study = synthetic.stored_table()
    last = study[study.distribution == SPIKE].sort_values("n").iloc[-1]
    return {u: float(last.oracle_db - last[f"snr_db_{u}"]) for u in plots.UNDERFLOW_STYLE}


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


def harm_table(run: Run, mix: str, underflow: str, loss_db: float = HARM_DB) -> pd.DataFrame:
    """Per site: from which calibrated amax on more of it costs over ``loss_db``, on the exact curve.

    Columns: site, amax (the calibration pool's), harm_amax, octaves between them, and octaves between
    headroom's amax and harm_amax (headroom_octaves). Infinite where the curve shows no harm.
    """
    rows = []
    for site in run.sites:
        amax = sequence_amaxes(run, mix, site).max()
        grid = run.curve(mix, site).calibrated_amax.to_numpy()
        grid = grid[grid >= amax]
        snr = curve_snr(run, mix, site, underflow, grid)
        fine = (snr >= snr[0] - loss_db).nonzero()[0][-1]  # beyond it, no ripple brings SNR back
        harm = float(grid[fine + 1]) if fine + 1 < len(grid) else np.inf
        headroom = policies.headroom(run.marginals(mix, site))
        rows.append((site, amax, harm, np.log2(harm / amax), np.log2(harm / headroom)))
    return pd.DataFrame(rows, columns=["site", "amax", "harm_amax", "octaves", "headroom_octaves"])


def size_figure(sizes: pd.DataFrame) -> plt.Figure:
    """SNR minus the whole pool's against sequences: a panel per kind, a line and a band per site."""
    last = sizes.groupby("site", sort=False).snr_db.transform("last")
    shown = sizes.assign(kind=sizes.site.map(snr_tables.site_kind), change=sizes.snr_db - last,
                         low=sizes.snr_low - last, high=sizes.snr_high - last)  # fmt: skip
    color, kinds = plots.POLICY_STYLE["amax"].color, list(dict.fromkeys(shown.kind))
    fig, axes = plt.subplots(-(-len(kinds) // 2), 2, figsize=(7.2, 4.8), sharex=True, sharey=True,
                             squeeze=False)  # fmt: skip
    for ax, kind in zip(axes.flat, kinds, strict=False):
        members = shown[shown.kind == kind]
        sns.lineplot(members, x="n", y="change", units="site", estimator=None, color=color, alpha=0.5,
                     lw=1, ax=ax)  # fmt: skip
        for _, one in members.groupby("site", sort=False):
            ax.fill_between(one.n, one.low, one.high, color=color, alpha=0.08, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=HARM_DB)
        ax.set_yticks([-10, -1, -HARM_DB, 0], ["-10", "-1", f"-{HARM_DB}", "0"])
        ax.set(title=kind, xlabel="calibration sequences", ylabel="")
    for ax in axes.flat[len(kinds) :]:
        ax.axis("off")
    fig.supylabel("SNR minus whole pool's (dB, symlog)", fontsize=10)
    return fig


def policy_figure(curves: pd.DataFrame) -> plt.Figure:
    """Distance to the oracle against sequences, a line per policy and a panel per convention."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    for ax, (convention, style) in zip(axes, plots.UNDERFLOW_STYLE.items(), strict=True):
        for policy, curve in curves.groupby("policy", observed=True):
            plots.policy_line(ax, policy, curve.n, -curve[f"gap_{convention}"])
        ax.set_xscale("log", base=4)
        ax.set_yscale("symlog", linthresh=0.05)
        ax.set_yticks([-10, -1, -0.1, 0], ["-10", "-1", "-0.1", "0"])
        ax.set_title(style.label)
        ax.set_xlabel("calibration sequences")
    axes[0].set_ylabel("SNR minus oracle's (dB, symlog)")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def growth_figure(fitted: pd.DataFrame) -> plt.Figure:
    """Sequences to 90 % of the pool's amax: against the tail's prediction, and the tail index."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for kind, one in fitted.groupby(fitted.site.map(snr_tables.site_kind), sort=False):
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


def share_table(sizes: pd.DataFrame) -> pd.DataFrame:
    """Median amax over the whole pool's by size: mean over the sites of a kind, a column each."""
    share = sizes.assign(
        kind=sizes.site.map(snr_tables.site_kind),
        share=sizes.amax / sizes.groupby("site", sort=False).amax.transform("last"),
    )
    return share.pivot_table(index="n", columns="kind", values="share", sort=False)


def share_of_amax(sizes: pd.DataFrame, n: int) -> float:
    """Median amax of ``n`` sequences over the whole pool's, mean over sites."""
    last = sizes.groupby("site", sort=False).amax.transform("last")
    return float((sizes.amax / last)[sizes.n == n].mean())


def share_figure(shares: pd.DataFrame) -> plt.Figure:
    """``share_table`` drawn, a line per kind of site."""
    fig, ax = plt.subplots()
    for kind, share in shares.items():
        style = plots.kind_style(str(kind))
        ax.plot(share, marker=style.marker, ls=style.linestyle, color=style.color, ms=4, label=kind)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("calibration sequences")
    ax.set_ylabel("median amax / amax of the whole pool")
    ax.legend()
    return fig


def synthetic_figure(study: pd.DataFrame) -> plt.Figure:
    """SNR against calibration elements on the study's distributions, both conventions."""
    fig, axes = plt.subplots(2, 4, figsize=(9.6, 5), sharex=True)
    for ax, (name, one) in zip(axes.flat, study.groupby("distribution", sort=False), strict=False):
        for convention, style in plots.UNDERFLOW_STYLE.items():
            ax.plot(one.n, one[f"snr_db_{convention}"], color=style.color, ls=style.linestyle,
                    marker=style.marker, ms=3, label=style.label)  # fmt: skip
        ax.axhline(one.oracle_db.iloc[0], color="k", lw=0.8, ls=":")
        ax.set_xscale("log", base=2)
        ax.set_title(name, fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center")
    fig.supxlabel("calibration elements")
    fig.supylabel("SNR on the test tensor (dB)")
    return fig
