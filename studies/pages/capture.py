# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What a model's activations look like: the answer and the figures of statistics just counted."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nvfp4_utils import SiteStatistics
from nvfp4_utils.histogram import Marginals
from nvfp4_utils.quantize import E4M3_NORMAL_RANGE
from nvfp4_utils.sites import kind_of
from studies.data import models

from . import plots, regimes

ROOM = "room (octaves)"


def by_kind(sites: Mapping[str, object], kinds: list[str]) -> dict[str, list[str]]:
    """The sites of each kind, in their order."""
    return {kind: [s for s in sites if kind_of(s) == kind] for kind in kinds}


def answer(table: pd.DataFrame, scope: str) -> str:
    """The page's answer from ``regimes.site_table``, simple HTML."""
    room = table[ROOM]
    safe, tight = room[room >= 0], table[room < 0]
    kinds = " and ".join(sorted(set(tight.index.map(kind_of))))
    verdict = "Tame" if tight.empty else f"Tame but for {kinds}"
    if len(safe) < len(table) / 2:
        verdict = "Not tame"
    spare = f", with {safe.min():.1f} octaves or more to spare" if len(safe) else ""
    rest = f" The others, all {kinds}, have none." if len(tight) else ""
    return (
        f"<strong>{verdict}: at {len(safe)} of {len(table)} sites one amax keeps every block of the "
        f"tensor in the normal range of its scale{spare}.</strong>{rest} Scope: {scope}."
    )


def range_prose(table: pd.DataFrame, calibration: int) -> str:
    """The spread over sites that the answer leaves out, Markdown."""
    room = table[ROOM]
    tight = table[room < 0]
    without = (
        f" At the {len(tight)} without such an amax at most {100 - tight['normal %'].min():.2f} % of "
        "the nonzero blocks stand in its way."
        if len(tight)
        else ""
    )
    widest = f" The widest room is {room.max():.1f} octaves." if (room >= 0).any() else ""
    return (
        f"Of these {calibration} sequences the largest magnitude of a site runs from "
        f"{table.amax.min():.3g} to {table.amax.max():.3g} across layers and sites.{widest}{without} An "
        "outlier that these tokens do not meet would change the answer."
    )


def draw_distributions(marginals: Mapping[str, Marginals]) -> plt.Figure:
    """Histograms of |x| and of block amaxes, a panel per site; dotted: where scales turn subnormal."""
    fig, axes = plt.subplots(2, 2, figsize=(8.2, 5.4), sharex=True, sharey=True)
    for ax, (site, m) in zip(axes.flat, marginals.items(), strict=False):
        color = plots.KIND_COLORS.get(kind_of(site), "k")
        for values, name, dashes in (
            (regimes.nonzero_elements(m), "|x|", "-"),
            (regimes.nonzero_blocks(m), "block amax", "--"),
        ):
            edges, share = regimes.octave_histogram(*values)
            ax.step(edges, 100 * share, where="post", color=color, ls=dashes, label=name)
        ax.axvline(np.log2(m.amax / E4M3_NORMAL_RANGE), color="k", lw=0.8, ls=":")
        ax.set_title(site, fontsize=9)
    ax.set_xlim(-26, None)
    axes.flat[0].legend(loc="upper left", fontsize=8)
    fig.supxlabel("log2 of the magnitude (dotted: amax / 28,672)")
    fig.supylabel("share (%) per half octave")
    return fig


def draw_layers(found: Mapping[str, SiteStatistics], kinds: Mapping[str, list[str]]) -> plt.Figure:
    """Amax against layer by kind: all sequences as a line, 5 to 95 % of single ones as a band."""
    fig, ax = plt.subplots()
    for kind, members in kinds.items():
        amax = np.array([found[m].sequence_amax.numpy() for m in members])
        color = plots.KIND_COLORS.get(kind, "k")
        low, high = np.quantile(amax, (0.05, 0.95), axis=1)
        ax.fill_between(range(len(members)), low, high, color=color, alpha=0.15, lw=0)
        ax.plot(amax.max(axis=1), marker="o", ms=4, color=color, label=kind)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("layer")
    ax.set_ylabel("amax (log2 axis)")
    plots.label_lines(ax)
    return fig


def reconciliation(table: pd.DataFrame) -> str:
    """The prediction's quantities by site kind, Markdown."""
    kinds = table.groupby(table.index.map(kind_of), sort=False)
    rooms = ", ".join(f"{v:.1f} octaves at {k}" for k, v in kinds[ROOM].min().items())
    tails = ", ".join(f"{v:.2f} at {k}" for k, v in kinds["p99.99 / amax"].median().items())
    return (
        f"Beside the prediction: the narrowest room by site kind is {rooms}; the median over layers of "
        f"the 99.99th percentile, as a share of the amax, is {tails}."
    )


def uneven_prose(found: Mapping[str, SiteStatistics], calibration: int) -> str:
    """Where sequences differ most in amax, Markdown."""
    amaxes = {site: statistics.sequence_amax for site, statistics in found.items()}
    ratio = {site: float(a.max() / a.quantile(0.5)) for site, a in amaxes.items()}
    site = max(ratio, key=ratio.__getitem__)
    return (
        f"At {site}, where sequences differ most, the amax of all {calibration} is {ratio[site]:.1f} "
        f"times that of the median sequence, {np.log2(ratio[site]):.1f} octaves."
    )


def default_model() -> str:
    """``smollm2`` where it has been fetched, else the model of the repository."""
    try:
        models.resolve("smollm2")
    except FileNotFoundError:
        return "reference"
    return "smollm2"


def title(model: str) -> str:
    """How the page calls a model."""
    return models.MODELS[model].title if model in models.MODELS else model
