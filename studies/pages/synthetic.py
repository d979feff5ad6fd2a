# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The seven synthetic distributions: published SNR beside ours, and what clipping does to them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from studies.runs import synthetic

from . import plots

LARGE = 2**20  # calibration elements from which on rare draws are mostly in the sample


def compare(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The amax policy's table with difference (ours under floor minus published) and reproduced."""
    difference = table.snr_db_floor - table.published_db
    return table.assign(difference=difference, reproduced=difference.abs() <= tolerance)


def answer(study: pd.DataFrame, spike: dict[str, float], tolerance: float) -> str:
    """The page's answer, simple HTML.

    ``study``: from ``compare``; ``spike``: what one freak value costs, by underflow convention (dB).
    """
    large = study[study.n >= LARGE]
    share = large.reproduced.mean()
    word = "All" if share == 1 else "Mostly" if share > 0.5 else "Seldom"
    return (
        f"<strong>{word} what the study published: {large.reproduced.sum()} of {len(large)} cells of "
        f"large calibration sets lie within {tolerance} dB.</strong> One freak value in the calibration "
        f"costs {spike['flush']:.1f} dB under flush, which is what inference kernels do; the study used "
        f"the floor convention, under which it costs less."
    )


def cells_prose(study: pd.DataFrame) -> str:
    """The numbers behind the answer, Markdown."""
    last = study[study.distribution == "rare_giant_spike"].sort_values("n").iloc[-1]
    return (
        f"Of all {len(study)} cells, small samples included, {study.reproduced.sum()} are reproduced. "
        f"The spike case at {last.n:,} elements: {last.published_db:.2f} dB published, "
        f"{last.snr_db_floor:.2f} dB here under floor and {last.snr_db_flush:.2f} dB under flush. Small "
        "calibration samples differ because the amax of a few thousand heavy-tailed draws differs "
        "between random streams, not because the arithmetic does."
    )


def redrawn(stored: pd.DataFrame, live: pd.DataFrame) -> tuple[int, float]:
    """How many cells ``live`` repeats, and by how much (dB) their flush SNR differs at most.

    Raises
    ------
    ValueError
        If no cell is in both tables, or one differs by more than 0.1 dB.
    """
    both = stored.merge(live, on=["distribution", "n", "policy"], suffixes=("", "_live"))
    apart = float((both.snr_db_flush - both.snr_db_flush_live).abs().max())
    if not apart <= 0.1:
        raise ValueError(
            f"{len(both)} stored and live cells differ by {apart} dB; expected the same draws. Rerun "
            "`python -m studies.runs.synthetic`."
        )
    return len(both), apart


def oracle_table(study: pd.DataFrame) -> pd.DataFrame:
    """The oracle's SNR by distribution: published, ours, difference (dB)."""
    ours = study.groupby("distribution", sort=False).oracle_db.first()
    known = pd.Series(synthetic.published()["synthetic"]["oracle_snr_db"])
    table = pd.DataFrame({"published": known, "ours": ours, "difference": ours - known})
    return table.loc[ours.index]


def draw_differences(study: pd.DataFrame, tolerance: float) -> plt.Figure:
    """Ours minus published against calibration size, a line per distribution."""
    fig, ax = plt.subplots(figsize=(7.2, 4))
    sns.lineplot(study, x="n", y="difference", hue="distribution", ax=ax, marker="o",
                 palette=sns.color_palette("colorblind", study.distribution.nunique()))  # fmt: skip
    ax.axhspan(-tolerance, tolerance, color="0.9", zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=0.5)
    ax.set_xlabel("calibration elements")
    ax.set_ylabel("ours minus published (dB, symlog)")
    ax.legend(fontsize=8, ncol=2)
    return fig


def percentile_gain(everything: pd.DataFrame) -> pd.Series:
    """Flush SNR of the best percentile minus amax's (dB), by distribution and calibration size."""
    wide = everything.pivot_table(index=["distribution", "n"], columns="policy", values="snr_db_flush",
                                  sort=False)  # fmt: skip
    return wide.drop(columns="amax").max(axis=1) - wide.amax


def gain_prose(gain: pd.Series) -> str:
    """What ``percentile_gain`` says, simple HTML."""
    if not (gain > 0.1).any():
        return (
            f"<strong>No percentile beats amax by more than 0.1 dB in any of {len(gain)} cells.</strong>"
        )
    name, n = gain.idxmax()
    return (
        f"<strong>A percentile beats amax by more than 0.1 dB in {(gain > 0.1).sum()} of {len(gain)} "
        f"cells, most ({gain.max():.1f} dB) for {name} at {n:,} elements.</strong>"
    )


def draw_percentiles(everything: pd.DataFrame) -> plt.Figure:
    """Flush SNR against calibration size, a panel per distribution; dotted: oracle."""
    with plt.rc_context({"figure.constrained_layout.use": False}):  # the grid lays itself out
        grid = sns.FacetGrid(everything, col="distribution", col_wrap=4, height=2.4, sharey=False)
        for name, ax in grid.axes_dict.items():
            one = everything[everything.distribution == name]
            for policy, curve in one.groupby("policy", sort=False):
                plots.policy_line(ax, str(policy), curve.n, curve.snr_db_flush)
            ax.axhline(one.oracle_db.iloc[0], color="k", lw=0.8, ls=":")
            ax.set_xscale("log", base=2)
        handles, labels = grid.axes.flat[0].get_legend_handles_labels()
        grid.set_titles("{col_name}", size=9)
        grid.set_axis_labels("calibration elements", "SNR (dB), flush")
        grid.figure.legend(handles, labels, loc="center", bbox_to_anchor=(0.88, 0.28))
        grid.tight_layout()
    return grid.figure


def differing(study: pd.DataFrame) -> str:
    """Where cells lie outside the tolerance, Markdown."""
    off = study[~study.reproduced].groupby("distribution", sort=False).size()
    if off.empty:
        return "No cell lies outside the tolerance."
    return (
        "Cells outside the tolerance, by distribution: "
        + "; ".join(f"{name} {count}" for name, count in off.items())
        + "."
    )
