# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Does the calibration dataset matter: the answer, and what a foreign calibration loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.policies import POLICIES
from nvfp4_utils.sites import kind_of
from studies.runs.store import Run

from . import loss_tables, plots, snr_tables
from .loss_tables import HARM_PERCENT
from .snr_tables import HARM_DB

REMEDY = "raised"
CROSSED = ("amax", REMEDY, "raised-all", "headroom", "headroom-amax", "mse")
AFTER_NORM = ("attention_input", "mlp_input")
SHOWN_FROM = 1e-3  # dB; smaller losses are left out of a log axis


@dataclass(frozen=True)
class Answer:
    """What calibrating on another mix than the one tested does, by model.

    ``worst``: model -> policy -> largest change of KL (%) over pairs of mixes, its interval, calibration
    and test. ``noise``: model -> the largest change of calibrations of equal merit (%). ``snr``: model
    -> the largest loss of SNR with amax (dB), and its site.
    """

    worst: dict[str, dict[str, tuple[loss_tables.Measured, str, str]]]
    noise: dict[str, float]
    snr: dict[str, tuple[float, str]]

    def hurt(self, policy: str = "amax") -> list[str]:
        """The models on which some foreign calibration costs over ``HARM_PERCENT``, beyond the noise."""
        large = [m for m, w in self.worst.items() if w[policy][0][0] > HARM_PERCENT]
        return [m for m in large if loss_tables.beyond(self.worst[m][policy][0], self.noise[m]) > 0]

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if not self.snr:
            return "Unknown: no run here holds two mixes."
        if not self.worst:
            lost = [m for m, (db, _) in self.snr.items() if db > HARM_DB]
            return "In SNR, with amax, yes." if lost else "No, by SNR."
        hurt = self.hurt()
        if not hurt:
            return "No: in the model's output no foreign calibration leaves the noise by much."
        some = f"on {loss_tables.listed(hurt)}" if len(hurt) < len(self.worst) else "on every model"
        if self.hurt(REMEDY):
            return f"Yes, {some}, and raising the amax does not cure it."
        return f"With amax it can, {some}; with the amax raised in advance, no."

    @property
    def text(self) -> str:
        """The numbers behind the verdict, in up to three sentences."""
        if not self.snr:
            return "Capture at least two mixes to cross them."
        model, (lost, site) = max(self.snr.items(), key=lambda item: item[1][0])
        if not self.worst:
            return (
                f"Calibrated on one mix and used on another, amax loses up to {lost:.1f} dB at `{site}`."
            )
        name, worst = max(self.worst.items(), key=lambda item: item[1]["amax"][0][0])
        change, calibration, test = worst["amax"]
        cure = max(w[REMEDY][0][0] for w in self.worst.values())
        said = (
            f"Amax from another mix changes the KL divergence by up to {change[0]:+.0f} % ({name}, "
            f"{calibration} used on {test}), raised amax by up to {cure:+.1f} %."
        )
        if lost <= HARM_DB:
            return said
        told = "" if model in self.hurt() or model not in self.worst else ", where KL hardly moves"
        return f"{said} SNR falls by up to {lost:.1f} dB, at `{site}` of {model}{told}."


def answer(runs: Sequence[Run]) -> Answer:
    """Whether the calibration dataset matters."""
    crossed = [run for run in runs if len(run.mixes) > 1]
    loss = [run for run in crossed if loss_tables.has_loss(run)]
    worst = {loss_tables.short(r): {p: worst_pair(r, p) for p in CROSSED} for r in loss}
    noise = {loss_tables.short(r): loss_tables.noise_floor(loss_tables.changes(r))["pair"] for r in loss}
    snr = {}
    for run in crossed:
        losses = snr_tables.foreign_losses(run)
        top = losses.loc[losses.loss_db.idxmax()]
        snr[loss_tables.short(run)] = (float(top.loss_db), str(top.site))
    return Answer(worst, noise, snr)


@lru_cache(maxsize=64)
def worst_pair(run: Run, policy: str) -> tuple[loss_tables.Measured, str, str]:
    """The foreign calibration that raises KL most: change in percent, calibration, test."""
    rows = loss_tables.foreign_changes(run, policy)
    test, calibration, _ = rows[0].idxmax()
    return loss_tables.measured(rows.loc[(test, calibration, policy)]), calibration, test


def compare(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per model: worst change of KL (%) by policy, noise, worst loss of SNR and its sites."""
    found, rows = answer(runs), {}
    for run in (run for run in runs if loss_tables.short(run) in found.snr):
        name = loss_tables.short(run)
        row = {f"{p}: KL (%)": loss_tables.cell(w[0]) for p, w in found.worst.get(name, {}).items()}
        if name in found.worst:
            _, calibration, test = found.worst[name]["amax"]
            row |= {
                "amax's worst pair": f"{calibration} on {test}",
                "noise": f"±{found.noise[name]:.1f}",
            }
        losses = snr_tables.foreign_losses(run)
        sites = list(dict.fromkeys(losses[losses.loss_db > HARM_DB].site.astype(str)))
        rows[name] = row | {"amax: SNR (dB)": f"{found.snr[name][0]:.1f}",
                            f"sites over {HARM_DB} dB": ", ".join(sites) or "none"}  # fmt: skip
    return pd.DataFrame(rows)


def pair_table(run: Run, policy: str = "amax") -> pd.DataFrame:
    """Every foreign pair of a run: calibration, test, worst site's loss of SNR (dB), KL (%)."""
    snr = snr_tables.foreign_losses(run, policy).astype({"calibration": str, "test": str})
    snr = snr.groupby(["calibration", "test"]).loss_db.max().rename("snr_db")
    kl = loss_tables.foreign_changes(run, policy)[0].droplevel("policy").rename("kl")
    return pd.concat([snr, kl.reorder_levels(["calibration", "test"])], axis=1).reset_index()


def models_figure(runs: Sequence[Run]) -> plt.Figure:
    """KL against the worst site's SNR: a point per pair of mixes, colour by policy, marker by model."""
    fig, ax = plt.subplots(figsize=(7.2, 4.4))
    noise = [loss_tables.noise_floor(loss_tables.changes(run))["pair"] for run in runs]
    ax.axhspan(-max(noise), max(noise), color="#dddddd", lw=0)
    for number, run in enumerate(runs):
        for policy, fill in (("amax", "full"), (REMEDY, "none")):
            pairs, style = pair_table(run, policy), plots.POLICY_STYLE[policy]
            ax.plot(pairs.snr_db, pairs.kl, loss_tables.mark(number)["marker"], color=style.color, ms=6,
                    fillstyle=fill, label=f"{style.label}, {loss_tables.short(run)}")  # fmt: skip
    ax.axhline(0, color="k", lw=0.6)
    ax.set_xscale("symlog", linthresh=HARM_DB)
    ax.set_yscale("symlog", linthresh=HARM_PERCENT)
    ax.set_yticks([-5, -2, 0, 2, 5, 20, 50], ["-5", "-2", "0", "2", "5", "20", "50"])
    ax.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    ax.set_xlim(-0.02, None)
    ax.set(xlabel="loss of SNR at the worst site (dB, symlog)",
           ylabel="change of KL against amaxes\nof the own text (%, symlog)")  # fmt: skip
    ax.legend(fontsize=8)
    return fig


def square(run: Run, cross: pd.DataFrame, values: str = "loss_db", how: str = "mean") -> pd.DataFrame:
    """A table with a row per calibration and a column per test pool, over sites by ``how``."""
    table = cross.pivot_table(index="calibration", columns="test", values=values, aggfunc=how,
                              observed=True)  # fmt: skip
    return table.loc[run.mixes, run.mixes]


def matrix_figure(mean: pd.DataFrame, worst: pd.DataFrame) -> plt.Figure:
    """Heat map of the mean loss, each cell with the worst site's in brackets."""
    fig, ax = plt.subplots(figsize=(8.2, 5.6))
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


def after_norm(runs: Sequence[Run]) -> str:
    """The largest loss of SNR of a foreign amax at inputs that follow a norm, by model, Markdown."""
    found = []
    for run in (run for run in runs if len(run.mixes) > 1):
        losses = snr_tables.foreign_losses(run)
        losses = losses[losses.site.map(kind_of).isin(AFTER_NORM)]
        if len(losses):
            top = losses.loc[losses.loss_db.idxmax()]
            found.append(f"{top.loss_db:.2f} dB at {loss_tables.site_of(top.site, run)}")
    return loss_tables.listed(found)


def content_or_size(narrow: pd.DataFrame, broad: str) -> str:
    """Whether what is in the set counts more than how much, one sentence; "" if that is not known."""
    if narrow.empty:
        return ""
    control = narrow[as_many(broad)]
    if not 0 < control.max() <= HARM_DB < narrow["worst (dB)"].min():
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
    kinds = ratio.site.map(kind_of).rename("kind")
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
