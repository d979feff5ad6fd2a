# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Does the calibration dataset matter: the answer, and what a foreign calibration loses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.policies import POLICIES
from nvfp4_utils.quantize import UNDERFLOWS
from studies.runs.store import Run

from . import plots, snr_tables
from .snr_tables import HARM_DB

AFTER_NORM = ("attention_input", "mlp_input")
SHOWN_FROM = 1e-3  # dB; smaller losses are left out of a log axis


@dataclass(frozen=True)
class Answer:
    """What calibrating on another mix loses on one run: worst case over sites and conventions, dB.

    ``broad``: the run's featured mix; ``broad_amax``: amax calibrated on it, on the other mixes' text.
    With one mix all are NaN.
    """

    mixes: int
    broad: str
    amax: float
    broad_amax: float
    headroom: float

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if self.mixes < 2:
            return "Unknown: this run holds one mix."
        if self.amax <= HARM_DB:
            return "No, on this run."
        if self.headroom <= HARM_DB:
            return "With amax, yes; with headroom, no."
        return "Yes, with amax and with headroom."

    @property
    def text(self) -> str:
        """The numbers behind the verdict, in two sentences."""
        if self.mixes < 2:
            return "Capture at least two mixes to cross them."
        return (
            f"Calibrated on one mix and used on another, amax loses up to {self.amax:.1f} dB; "
            f"calibrated on {self.broad}, at most {self.broad_amax:.2f} dB. Headroom loses at most "
            f"{self.headroom:.2f} dB in any case."
        )


@lru_cache(maxsize=8)
def answer(run: Run) -> Answer:
    """Whether the calibration dataset matters on a run."""
    broad = run.featured_mix
    amax, headroom = (
        pd.concat([snr_tables.foreign_losses(run, policy, u) for u in UNDERFLOWS])
        for policy in ("amax", "headroom")
    )
    on_broad = amax[amax.calibration == broad].loss_db.max()
    return Answer(len(run.mixes), broad, amax.loss_db.max(), on_broad, headroom.loss_db.max())


def square(run: Run, cross: pd.DataFrame, values: str = "loss_db", how: str = "mean") -> pd.DataFrame:
    """A table with a row per calibration and a column per test pool, over sites by ``how``."""
    table = cross.pivot_table(index="calibration", columns="test", values=values, aggfunc=how,
                              observed=True)  # fmt: skip
    return table.loc[run.mixes, run.mixes]


def matrix_figure(mean: pd.DataFrame, worst: pd.DataFrame) -> plt.Figure:
    """Heat map of the mean loss, each cell with the worst site's in brackets."""
    fig, ax = plt.subplots(figsize=(8.4, 5.6))
    limit = max(0.02, float(np.abs(mean.to_numpy()).max()))
    pairs = zip(mean.to_numpy().flat, worst.to_numpy().flat, strict=True)
    labels = np.array([f"{m:.3f}\n({w:.2f})" for m, w in pairs]).reshape(mean.shape)
    sns.heatmap(mean, annot=labels, fmt="", annot_kws={"fontsize": 8}, cmap="RdBu_r", vmin=-limit,
                vmax=limit, cbar_kws={"label": "mean loss (dB)"}, ax=ax)  # fmt: skip
    ax.set(xlabel="test pool", ylabel="calibration pool")
    ax.grid(False)
    ax.set_xticks(ax.get_xticks(), mean.columns, rotation=30, ha="right")
    return fig


def interval_table(run: Run, means: pd.DataFrame) -> pd.DataFrame:
    """``cross_mean`` as text, loss with interval: a row per calibration, a column per test pool."""
    cells = [f"{r.loss_db:+.3f} [{r.low:+.3f}, {r.high:+.3f}]" for r in means.itertuples()]
    table = means.assign(cell=cells).pivot(index="calibration", columns="test", values="cell")
    return table.loc[run.mixes, run.mixes].rename_axis(index=None, columns=None)


def largest_losses(foreign: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """The largest losses with their intervals."""
    top = foreign.sort_values("loss_db", ascending=False).head(count)
    return top.set_index(["site", "calibration", "test"])[["loss_db", "low", "high"]]


def where_it_hurts(foreign: pd.DataFrame, loss_db: float = 1.0) -> str:
    """At which sites the large losses are, one sentence."""
    sites = foreign[foreign.loss_db > loss_db].site.value_counts()
    ever = foreign[foreign.loss_db > HARM_DB].site.nunique()
    top = sites.head(2)
    at = " and ".join(f"`{site}`" for site in top.index)
    large = f"Of the {sites.sum()} losses over {loss_db:g} dB, {top.sum()} are at {at}; " if at else ""
    return f"{large}{ever} of {foreign.site.nunique()} sites ever lose more than {HARM_DB} dB."


def one_domain_table(run: Run, foreign: pd.DataFrame, underflow: str) -> pd.DataFrame:
    """Calibrations on a single domain (mixes ``*-only``), and as many sequences of the broad mix."""
    rows = {}
    for mix in (m for m in run.mixes if m.endswith("-only")):
        one = foreign[foreign.calibration == mix]
        if one.empty:
            continue
        top = one.loc[one.loss_db.idxmax()]
        sequences = run.sequences(mix)
        n = int(sequences[sequences.pool == "calibration"].sequence.max()) + 1
        rows[mix] = {
            "sequences": n,
            "mean loss (dB)": one.loss_db.mean(),
            "worst (dB)": top.loss_db,
            as_many(run.featured_mix):
                snr_tables.subset_losses(run, run.featured_mix, "amax", n, underflow).max(),
            f"over {HARM_DB} dB (%)": 100 * (one.loss_db > HARM_DB).mean(),
            "worst site": top.site,
            "tested on": top.test,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def content_or_size(narrow: pd.DataFrame, broad: str) -> str:
    """Whether what is in the set counts more than how much, one sentence; "" if it does not."""
    if narrow.empty:
        return ""
    control = narrow[as_many(broad)]
    if not control.max() <= HARM_DB < narrow["worst (dB)"].min():
        return ""
    return (
        f"What is in the set counts, not how much: {narrow.sequences.min()} random sequences of {broad} "
        f"lose at most {control[narrow.sequences.idxmin()]:.3f} dB at any site on that mix's text, any "
        f"single domain of up to {narrow.sequences.max()} sequences at its worst site on other text "
        f"{narrow['worst (dB)'].min():.1f} dB or more."
    )


def as_many(broad: str) -> str:
    """Name of the control's column in ``one_domain_table``."""
    return f"as many of {broad}, worst (dB)"


def ratio_figure(ratio: pd.DataFrame) -> plt.Figure:
    """Loss against calibration amax over the test pool's, a marker per kind of site."""
    fig, ax = plt.subplots()
    kinds = ratio.site.map(snr_tables.site_kind).rename("kind")
    styles = {kind: plots.kind_style(kind) for kind in kinds.unique()}
    sns.scatterplot(ratio, x="amax_ratio", y="loss_db", hue=kinds, style=kinds, s=14, alpha=0.7, ax=ax,
                    palette={k: s.color for k, s in styles.items()},
                    markers={k: s.marker for k, s in styles.items()})  # fmt: skip
    ax.axhline(0, color="k", lw=0.6)
    ax.axvline(1, color="k", lw=0.6, ls=":")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="calibration amax / amax of the test pool", ylabel="loss (dB)")
    ax.legend(title=None)
    return fig


def losses_by_policy(run: Run, underflow: str) -> dict[str, pd.Series]:
    """Losses of every foreign calibration by one-scale policy, ascending."""
    shown = [p for p in snr_tables.scored_policies(run, run.featured_mix) if POLICIES[p].one_scale]
    return {p: snr_tables.foreign_losses(run, p, underflow).loss_db.sort_values() for p in shown}


def survival_figure(losses: dict[str, pd.Series]) -> plt.Figure:
    """Share of cases that lose more than a given dB, both axes logarithmic, a line per policy."""
    fig, ax = plt.subplots()
    for policy, values in losses.items():
        if not (values > SHOWN_FROM).any():
            continue  # nothing to draw on a log axis: the constant loses nothing by definition
        style = plots.POLICY_STYLE[policy]
        sns.ecdfplot(values.clip(lower=SHOWN_FROM / 2), complementary=True, ax=ax, label=style.label,
                     color=style.color, ls=style.linestyle)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(SHOWN_FROM, None))
    ax.set_ylim(0.5 / max(map(len, losses.values())), 1)
    ax.axvline(HARM_DB, color="k", lw=0.6, ls=":")
    ax.set_xlabel("loss of a foreign calibration (dB, log)")
    ax.set_ylabel("share of cases that lose more (log)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def loss_table(losses: dict[str, pd.Series]) -> pd.DataFrame:
    """Median, 99th percentile and worst loss by policy (dB), and the share over ``HARM_DB`` (%)."""

    def row(loss: pd.Series) -> dict[str, float]:
        return {
            "median (dB)": loss.median(),
            "p99 (dB)": loss.quantile(0.99),
            "worst (dB)": loss.max(),
            f"over {HARM_DB} dB (%)": 100 * (loss > HARM_DB).mean(),
        }

    return pd.DataFrame.from_dict({p: row(loss) for p, loss in losses.items()}, orient="index")


def by_ratio(ratio: pd.DataFrame) -> tuple[float, float]:
    """Largest loss where the calibration amax is below the test pool's, and where it is not; dB."""
    below, rest = ratio[ratio.amax_ratio < 1].loss_db, ratio[ratio.amax_ratio >= 1].loss_db
    return below.max() if len(below) else 0.0, rest.max() if len(rest) else 0.0
