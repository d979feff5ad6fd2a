# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Should input_scale come from amax: the answer, and every policy's distance to the best scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.policies import ANCHOR_FLOOR, POLICIES
from nvfp4_utils.quantize import UNDERFLOWS
from nvfp4_utils.sites import kind_of
from studies.runs import synthetic
from studies.runs.store import Run

from . import loss_tables, plots, regimes, snr_tables

SHOWN_FROM = 1e-3  # dB; smaller distances are drawn here on a log axis
CLIPPING = ("p99", "p99.9", "p99.99", "p99.999")
UNCLIPPED = ("headroom", "headroom-amax", "raised", "raised-all", "constant", "aligned", "mse")
BOUNDS = ("oracle", "dynamic per sequence", "dynamic per token", "four-over-six")  # and other quantizers
SHOWN = (*CLIPPING, *UNCLIPPED, *BOUNDS)
RIPPLE_POLICIES = ("amax", "headroom", "constant")  # that should differ by the octave's ripple only


@dataclass(frozen=True)
class Answer:
    """What policies change of KL, each calibrated on the text it is tested on.

    ``change``: model -> policy -> percent and its 95 % interval; ``noise``: model -> the change of
    calibrations of equal merit, percent; ``below``: model -> sites where headroom lies below the amax.
    """

    change: dict[str, dict[str, loss_tables.Measured]]
    noise: dict[str, float]
    below: dict[str, list[str]]

    def outcome(self, policy: str) -> dict[str, int]:
        """model -> -1 where a policy gains beyond the noise, +1 where it loses, else 0."""
        return {m: loss_tables.beyond(c[policy], self.noise[m])
                for m, c in self.change.items() if policy in c}  # fmt: skip

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if not self.change:
            return "Unknown: no run here holds the model's own loss."
        better = [p for p in UNCLIPPED if set(self.outcome(p).values()) == {-1}]
        if better:
            gain = max(-c[p][0] for c in self.change.values() for p in better)
            return f"Not always: {loss_tables.listed(better)} can gain up to {gain:.1f} %."
        if max(self.outcome("raised").values()) > 0:
            return "Yes: raising it costs."
        if max(max(self.outcome(p).values(), default=0) for p in CLIPPING) > 0:
            return "From the amax or from more, never from less."
        return "It may: no policy leaves the noise."

    @property
    def text(self) -> str:
        """The numbers behind the verdict, in up to three sentences."""
        if not self.change:
            return "`make capture ... END_TO_END=1` measures it."
        clip = [c["p99.99"][0] for c in self.change.values()]
        said = (
            f"Clipping at p99.99 changes the KL divergence by {loss_tables.span(clip, '+.0f')} % "
            f"against the amax; raised in advance it {self._range('raised')}."
        )
        dear = [f"{self.change[m]['headroom'][0]:.1f} % on {m}"
                for m, way in self.outcome("headroom").items() if way > 0]  # fmt: skip
        if not dear:
            return said
        at = [f"`{sites[0]}` of {m}" for m, sites in self.below.items() if sites]
        where = f" (it clips {loss_tables.listed(at)})" if at else ""
        return f"{said} Headroom as published costs {loss_tables.listed(dear)}{where}."

    def _range(self, policy: str) -> str:
        if not any(self.outcome(policy).values()):
            return "stays within the noise of equal calibrations"
        return (
            f"changes it by {loss_tables.span([c[policy][0] for c in self.change.values()], '+.1f')} %"
        )


def answer(runs: Sequence[Run]) -> Answer:
    """Whether input_scale should always come from amax, by the model's output."""
    parts = {loss_tables.short(run): _parts(run) for run in runs if loss_tables.has_loss(run)}
    return Answer({m: p[0] for m, p in parts.items()}, {m: p[1] for m, p in parts.items()},
                  {m: p[2] for m, p in parts.items()})  # fmt: skip


@lru_cache(maxsize=8)
def _parts(run: Run) -> tuple[dict[str, loss_tables.Measured], float, list[str]]:
    measured = {policy: loss_tables.own_change(run, policy) for policy in SHOWN}
    known = {policy: m for policy, m in measured.items() if not np.isnan(m[0])}
    noise = loss_tables.noise_floor(loss_tables.changes(run))["pair"]
    return known, noise, list(headroom_below(run).index)


def headroom_below(run: Run) -> pd.Series:
    """Sites of the featured mix whose headroom lies below the amax: octaves below, largest first."""
    amaxes = run.policies(run.featured_mix).astype({"policy": str, "site": str})
    amaxes = amaxes.pivot(index="site", columns="policy", values="calibrated_amax")
    octaves = np.log2(amaxes.amax / amaxes.headroom).sort_values(ascending=False)
    return octaves[octaves > 0]


def compare(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per policy, a column per model: change of KL in percent, as text.

    Mean over test mixes, each with its own calibration, and 95 % interval over sequences. The
    first rows are the amax's KL in nats per token and the noise.
    """
    found = answer(runs)
    first = {loss_tables.short(r): loss_tables.own_kl(r) for r in runs if loss_tables.has_loss(r)}
    rows = {"amax: KL (nats per token)": {m: f"{kl:.4f}" for m, kl in first.items()},
            "noise": {m: f"±{v:.1f}" for m, v in found.noise.items()}}  # fmt: skip
    for policy in SHOWN:
        rows[label(policy)] = {
            m: loss_tables.cell(c.get(policy, (np.nan,) * 3)) for m, c in found.change.items()
        }
    return pd.DataFrame(rows).T


def within_noise(found: Answer) -> str:
    """How many of the scales that clip nothing on purpose lie within the noise, a clause."""
    ways = [way for policy in UNCLIPPED for way in found.outcome(policy).values()]
    return f"{ways.count(0)} of {len(ways)} others, a policy on a model each, stay within the noise"


def label(policy: str) -> str:
    """A policy's name in tables and figures."""
    style = plots.POLICY_STYLE.get(policy)
    return style.label if style else policy


def models_figure(found: Answer) -> plt.Figure:
    """Change of KL by policy, colour by policy, a marker per model; grey: the largest noise."""
    fig, ax = plt.subplots(figsize=(7.2, 5.2))
    ax.axvspan(-max(found.noise.values()), max(found.noise.values()), color="#dddddd", lw=0)
    for number, (model, changes) in enumerate(found.change.items()):
        marker = loss_tables.mark(number)["marker"]
        for y, policy in enumerate(SHOWN):
            if policy in changes:
                color = plots.POLICY_STYLE.get(policy, plots.OTHER_KIND).color
                middle, low, high = changes[policy]
                at = y + 0.22 * (number - (len(found.change) - 1) / 2)
                ax.plot([low, high], [at, at], color=color, lw=1.5)
                ax.plot(middle, at, marker, color=color, ms=5)
        ax.plot([], [], marker, color="k", ls="", label=model)
    ax.axvline(0, color="k", lw=0.6)
    ax.set_xscale("symlog", linthresh=3, linscale=1.5)
    ax.set_xticks([-10, -2, 0, 2, 10, 100, 1000, 10000], ["-10", "-2", "0", "2", "10", "100", "1,000",
                                                          "10,000"])  # fmt: skip
    ax.set_xlim(-30, None)
    ax.set_yticks(range(len(SHOWN)), [label(p) for p in SHOWN])
    ax.invert_yaxis()
    ax.set_xlabel("change of KL against amaxes of equal merit (%, symlog)")
    ax.legend(fontsize=8, loc="lower right")
    return fig


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
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 4.2), sharey=True)
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
    table = result.assign(kind=result.site.map(kind_of))
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
    fig, axes = plt.subplots(1, len(sites), figsize=(8.2, 4), squeeze=False)
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
