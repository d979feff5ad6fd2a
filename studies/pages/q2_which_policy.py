# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Should input_scale come from amax: the answer, and every policy's distance to the best scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.policies import ANCHOR_FLOOR, POLICIES
from nvfp4_utils.quantize import UNDERFLOWS
from studies.runs import synthetic
from studies.runs.store import Run

from . import plots, regimes, snr_tables
from .snr_tables import HARM_DB

SHOWN_FROM = 1e-3  # dB; smaller distances are drawn here on a log axis
RIPPLE_POLICIES = ("amax", "headroom", "constant")  # that should differ by the octave's ripple only


@dataclass(frozen=True)
class Answer:
    """How amax and its rivals do on one run, in dB, the worse of both conventions.

    ``gap``: policy -> distance to the best scale on the text it was calibrated on, mean over sites.
    ``foreign``: policy -> loss of a calibration on another mix, worst site; empty with one mix.
    """

    gap: dict[str, float]
    foreign: dict[str, float]

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if self.gap["amax"] > HARM_DB:
            return "No: even on its own text amax is far from the best scale."
        if not self.foreign:
            return "It may, on the text it was calibrated on; this run holds no other."
        if self.foreign["amax"] <= HARM_DB:
            return "It may: on this run amax holds on other text too."
        if self.foreign["headroom"] <= HARM_DB:
            return "No: on other text amax fails, and headroom does not."
        return "No, but headroom is no cure on this run: both fail on other text."

    @property
    def text(self) -> str:
        """The numbers behind the verdict, in one or two sentences."""
        other = ""
        if self.foreign:
            other = (
                f" On other text amax's worst site loses {self.foreign['amax']:.1f} dB, headroom's "
                f"{self.foreign['headroom']:.2f} dB."
            )
        return (
            f"On the text it was calibrated on, amax is {self.gap['amax']:.2f} dB below the best scale "
            f"on average over sites, clipping at p99.99 {self.gap['p99.99']:.1f} dB.{other}"
        )


@lru_cache(maxsize=8)
def answer(run: Run) -> Answer:
    """Whether input_scale should always come from amax, on a run's featured mix."""
    tables = gaps(run, run.featured_mix).values()
    means = pd.concat([t.groupby("policy", observed=True).gap_db.mean() for t in tables], axis=1)
    foreign = {}
    if len(run.mixes) > 1:
        foreign = {policy: worst_foreign(run, policy) for policy in ("amax", "headroom")}
    return Answer(means.max(axis=1).to_dict(), foreign)


@lru_cache(maxsize=32)
def worst_foreign(run: Run, policy: str) -> float:
    """The largest loss of a calibration on another mix over sites, mixes and conventions, dB."""
    return max(snr_tables.foreign_losses(run, policy, u).loss_db.max() for u in UNDERFLOWS)


def published_accuracy() -> str:
    """What accuracy others measured, one sentence: the range of headroom minus amax."""
    rows = synthetic.published()["headroom_study"]["downstream_delta_actmax_minus_max"]
    points = [v for row in rows for v in row.values() if isinstance(v, int | float)]
    return (
        f"Published accuracy of headroom minus amax is mixed, {max(points):+.2f} to {min(points):+.2f} "
        f"points over {len(rows)} models and {len(points) // len(rows)} benchmarks (ModelOpt pull "
        "request 1573)."
    )


def policy_table() -> pd.DataFrame:
    """Every policy of ``POLICIES``: what it is computed from, and how."""
    rows = {name: {"from": p.needs, "calibrated amax": p.text} for name, p in POLICIES.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def headroom_floor() -> str:
    """Which blocks headroom's percentile p1 leaves out, one sentence."""
    return (
        f"Headroom's p1 is over blocks whose amax lies above p99.99 / {ANCHOR_FLOOR:,.0f}: nearly empty "
        "blocks do not set it."
    )


def gaps(run: Run, mix: str) -> dict[str, pd.DataFrame]:
    """``policy_snr`` under each convention."""
    return {u: snr_tables.policy_snr(run, mix, u) for u in ("flush", "floor")}


def one_scale(run: Run, mix: str) -> list[str]:
    """The scored policies that are one scale for the plain quantizer."""
    return [p for p in snr_tables.scored_policies(run, mix) if POLICIES[p].one_scale]


def smallest_gap(results: dict[str, pd.DataFrame]) -> float:
    """Least distance to the oracle of any single scale: negative if one beats the bound."""
    return min(float(r[~r.policy.isin(snr_tables.NOT_ONE_SCALE)].gap_db.min()) for r in results.values())


def gap_figure(results: dict[str, pd.DataFrame], shown: list[str]) -> plt.Figure:
    """Distance to the oracle by policy, a point per site and a bar at the mean."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    np.random.seed(0)  # seaborn draws its jitter from here
    for ax, (convention, result) in zip(axes, results.items(), strict=True):
        drawn = result.assign(gap_db=result.gap_db.clip(lower=SHOWN_FROM))
        for i, policy in enumerate(shown):
            style = plots.POLICY_STYLE[policy]
            sns.stripplot(drawn[drawn.policy == policy], x="policy", y="gap_db", order=shown, ax=ax,
                          color=style.color, marker=style.marker, jitter=0.25, size=4, alpha=0.8,
                          edgecolor="k", linewidth=0.2, log_scale=(False, True))  # fmt: skip
            mean = result[result.policy == policy].gap_db.mean()
            ax.hlines(mean, i - 0.35, i + 0.35, color="k", lw=1.2, zorder=5)
        ax.set_title(plots.UNDERFLOW_STYLE[convention].label)
        ax.set(xlabel="", ylabel="SNR below the oracle (dB, log)")
        ax.tick_params(axis="x", rotation=35)
    return fig


def kind_gaps(result: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """Mean distance to the oracle (dB), a row per policy and a column per kind of site."""
    table = result.assign(kind=result.site.map(snr_tables.site_kind))
    table = table.pivot_table(index="policy", columns="kind", values="gap_db", observed=True)
    return table.loc[shown].rename_axis(index=None, columns=None)


def paired_table(run: Run, mix: str) -> pd.DataFrame:
    """What each policy gains over amax under flush: mean over sites, interval, sites either way.

    ``floor, if different``: the mean under the other convention where three decimals tell them apart.
    """
    rows = {}
    for policy in snr_tables.scored_policies(run, mix):
        if policy == "amax":
            continue
        flush, floor = (
            snr_tables.paired_difference(run, mix, "amax", policy, u) for u in ("flush", "floor")
        )
        same = f"{flush['mean']:.3f}" == f"{floor['mean']:.3f}"
        rows[policy] = {
            "gain over amax (dB)": flush["mean"], "low": flush["low"], "high": flush["high"],
            "sites better": flush["better"], "sites worse": flush["worse"],
            "floor, if different": np.nan if same else floor["mean"],
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def both_ends(run: Run, mix: str, result: pd.DataFrame) -> pd.DataFrame:
    """``regimes.clip_and_flush`` with each policy's distance to the oracle."""
    ends = regimes.clip_and_flush(run, mix)
    return ends.merge(result[["site", "policy", "gap_db"]], on=["site", "policy"])


def ends_table(ends: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """Blocks beyond either end (%) by policy, mean and worst site, and the flushed energy (%)."""
    table = ends.groupby("policy", observed=True).agg(**{
        "saturated, mean": ("saturated", "mean"), "worst": ("saturated", "max"),
        "flushed, mean": ("underflow", "mean"), "worst ": ("underflow", "max"),
        "flushed energy, worst": ("flushed_energy", "max"),
    })  # fmt: skip
    return 100 * table.loc[shown].rename_axis(None)


def landing_figure(run: Run, mix: str, sites: list[str]) -> plt.Figure:
    """Test SNR against calibrated amax at two sites, with every policy's place."""
    fig, axes = plt.subplots(1, len(sites), figsize=(9.6, 4), squeeze=False)
    for ax, site in zip(axes.flat, sites, strict=True):
        curve = run.curve(mix, site)
        for convention, style in plots.UNDERFLOW_STYLE.items():
            snr = snr_tables.curve_snr(run, mix, site, convention, curve.calibrated_amax)
            ax.plot(curve.calibrated_amax, snr, color=style.color, ls=style.linestyle, lw=1,
                    label=style.label)  # fmt: skip
        for row in regimes.policies_at(run, mix, site, "flush").itertuples():
            style = plots.POLICY_STYLE[row.policy]
            ax.plot(row.calibrated_amax, row.snr_db, style.marker, color=style.color, ms=7, mec="k",
                    mew=0.4, ls="", label=style.label)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_title(site, fontsize=10)
        ax.set_xlabel("calibrated amax (log2 axis)")
    axes.flat[0].set_ylabel("test SNR (dB)")
    axes.flat[-1].legend(fontsize=8, ncol=2)
    return fig


def ripple_check(result: pd.DataFrame) -> pd.DataFrame:
    """Largest SNR difference between the ``RIPPLE_POLICIES`` at each site: columns site, apart (dB)."""
    snr = result[result.policy.isin(RIPPLE_POLICIES)].pivot(index="site", columns="policy",
                                                            values="snr_db")  # fmt: skip
    apart = (snr.max(axis=1) - snr.min(axis=1)).rename("apart")
    return apart.sort_values(ascending=False).reset_index()
