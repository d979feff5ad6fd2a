# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Does more calibration help: the answer over models, and what sequences add at each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils import policies
from nvfp4_utils.sites import kind_of
from studies.runs import synthetic
from studies.runs.store import Run

from . import loss_tables, plots, snr_tables
from .snr_tables import HARM_DB, curve_snr, sequence_amaxes

MEAN_DB = 0.02  # mean loss over sites up to which a smaller set is as good
SPIKE = "rare_giant_spike"


@dataclass(frozen=True)
class Answer:
    """From how many sequences on amax has nothing to gain, by model.

    ``enough`` and ``pool``: model -> sequences. ``slowest``: the site that needs most, and its model.
    ``halves``: how far the KL of half a pool's amax, or all of it, lies from their mean, percent.
    """

    enough: dict[str, int]
    pool: dict[str, int]
    slowest: str
    halves: float

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if max(self.enough.values()) == 1:
            return "No: one sequence is enough."
        short = [name for name, n in self.enough.items() if n >= self.pool[name]]
        if not short:
            return f"Up to about {max(self.enough.values())} sequences, yes; beyond, no."
        return f"Yes, up to all sequences on {loss_tables.listed(short)}."

    @property
    def text(self) -> str:
        """The numbers behind the verdict, in one or two sentences."""
        said = (
            f"From then on amax is within {MEAN_DB} dB of the whole pool's SNR on average and within "
            f"{HARM_DB} dB at "
            f"every site; the slowest is {self.slowest}."
        )
        if np.isnan(self.halves):
            return said
        return f"{said} Half of a pool or all of it: KL lies within {self.halves:.1f} % of the mean."


def answer(runs: Sequence[Run]) -> Answer:
    """Whether more calibration helps, on the featured mix of each run."""
    table = compare(runs)
    slowest = runs[int(table.enough.to_numpy().argmax())]
    halves = table["halves (%)"]
    return Answer(
        table.enough.to_dict(), table.pool.to_dict(),
        loss_tables.site_of(table["slowest site"][loss_tables.short(slowest)], slowest),
        float(halves.max()),
    )  # fmt: skip


def compare(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per model: pool, sequences that are enough, losses of a single one, slowest site, KL.

    ``halves (%)``: how far the KL of the amax of random halves of a pool, and of all of it, lies from
    their mean, at most, over test mixes: the noise of calibrations of equal merit.
    """
    return pd.DataFrame({loss_tables.short(run): _row(run) for run in runs}).T.infer_objects()


@lru_cache(maxsize=8)
def _row(run: Run) -> dict:
    table = loss_table(_sizes(run))
    n = needed(table)
    before = table[table.index < n]
    row = {"pool": int(table.index.max()), "enough": n, "one, mean (dB)": table["mean"][1],
           "one, worst site (dB)": table.worst[1],
           "slowest site": (before if len(before) else table)["worst site"].iloc[-1]}  # fmt: skip
    known = loss_tables.has_loss(run)
    halves = loss_tables.noise_floor(loss_tables.changes(run))["pair"] if known else np.nan
    return row | {"halves (%)": halves}


@lru_cache(maxsize=8)
def _sizes(run: Run) -> pd.DataFrame:
    return snr_tables.size_curves(run, run.featured_mix)


def needed(table: pd.DataFrame) -> int:
    """The size from which on ``loss_table`` keeps to ``MEAN_DB`` in the mean, ``HARM_DB`` at worst."""
    over = table.index[(table["mean"] > MEAN_DB) | (table.worst > HARM_DB)]
    return int(table.index[table.index > over.max()][0]) if len(over) else int(table.index.min())


def late_sites(runs: Sequence[Run]) -> tuple[int, dict[str, list[str]]]:
    """Where the quickest model has enough: n, and model -> sites that still lose over ``HARM_DB``."""
    n = int(compare(runs).enough.min())
    found = {}
    for run in runs:
        sizes = _sizes(run)
        last = sizes.groupby("site", sort=False).snr_db.last()
        loss = last - sizes[sizes.n == n].set_index("site").snr_db
        found[loss_tables.short(run)] = list(loss.index[loss > HARM_DB])
    return n, found


def late_text(runs: Sequence[Run]) -> str:
    """``late_sites`` as a sentence, Markdown."""
    n, late = late_sites(runs)
    lost = [
        f"{', '.join(f'`{site}`' for site in sites)} of {model}"
        for model, sites in late.items()
        if sites
    ]
    at = loss_tables.listed(lost) if lost else "no site of any model"
    return f"With {n} sequences, a loss of more than {HARM_DB} dB is left at {at}."


def long_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Change of KL (%) on long sequences from calibrating on short ones: a row per model and length."""
    rows = {}
    for run in runs:
        for test in loss_tables.long_tests(run) if loss_tables.has_loss(run) else ():
            draws = loss_tables.changes(run, [test]).loc[test]
            length = test.rsplit(", ", 1)[1]
            rows[f"{loss_tables.short(run)}, {length}"] = {
                "sequences": int(loss_tables.of_test(run, test).sequences.iloc[0]),
                **{policy: loss_tables.cell(loss_tables.measured(draws.loc[run.featured_mix, policy]))
                   for policy in ("amax", "raised", "headroom")},
            }  # fmt: skip
    return pd.DataFrame(rows).T


def models_figure(runs: Sequence[Run]) -> plt.Figure:
    """What amax of n sequences loses against the pool: mean over sites, worst site, a line a model."""
    fig, axes = plt.subplots(2, 1, figsize=(7.2, 5.0), sharex=True)
    for number, run in enumerate(runs):
        table = loss_table(_sizes(run))
        for ax, column in zip(axes, ("mean", "worst"), strict=True):
            ax.plot(table[column].clip(lower=0), label=loss_tables.short(run), ms=5,
                    **loss_tables.mark(number))  # fmt: skip
    for ax, limit, name in zip(axes, (MEAN_DB, HARM_DB), ("mean over sites", "worst site"), strict=True):
        ax.axhline(limit, color="k", lw=0.6)
        ax.set_yscale("symlog", linthresh=limit)
        ax.set(ylabel=f"loss, {name}\n(dB, symlog)", ylim=(0, None))
    axes[1].set_xscale("log", base=2)
    axes[1].set_xlabel("calibration sequences (log2 axis)")
    axes[0].legend(fontsize=8)
    return fig


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
    table = sizes.assign(kind=sizes.site.map(kind_of))
    table = table[table.n.isin([*shown, sizes.n.max()])]
    table = table.pivot_table(index="kind", columns="n", values="snr_db", sort=False)
    return table.sort_index(axis=1).rename_axis(index=None)


def spike_cost() -> dict[str, float]:
    """Oracle's SNR minus that of the largest calibration set with the spike, by convention."""
    study = synthetic.stored_table()
    last = study[study.distribution == SPIKE].sort_values("n").iloc[-1]
    return {u: float(last.oracle_db - last[f"snr_db_{u}"]) for u in plots.UNDERFLOW_STYLE}


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
    shown = sizes.assign(kind=sizes.site.map(kind_of), change=sizes.snr_db - last,
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
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.6), sharey=True)
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


def share_table(sizes: pd.DataFrame) -> pd.DataFrame:
    """Median amax over the whole pool's by size: mean over the sites of a kind, a column each."""
    share = sizes.assign(
        kind=sizes.site.map(kind_of),
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
    fig, axes = plt.subplots(2, 4, figsize=(8.2, 5), sharex=True)
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
