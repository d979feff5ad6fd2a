# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which regime of E4M3 each block's scale falls in at a calibrated amax, and figures of it.

With calibrated amax ``A``, a block of amax ``b`` gets the scale ``448 / rho``, ``rho = A / b``:
saturated below ``rho = 1``, a normal E4M3 number up to 28672, subnormal up to 458752, and zero from
there on, where the scale is at or under half of E4M3's smallest subnormal.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from nvfp4_utils.histogram import Marginals, codes_to_values
from nvfp4_utils.quantize import (
    BLOCK_SIZE,
    E2M1_MAX,
    E4M3_NORMAL_RANGE,
    UNDERFLOWS,
    Underflow,
    block_scale_e4m3,
    input_scale_from_amax,
    round_e2m1,
)
from nvfp4_utils.sites import kind_of
from nvfp4_utils.statistics import ActivationStatistics
from studies.runs.scoring import UNDERFLOW_START, block_shares
from studies.runs.store import Run

from . import plots, snr_tables

REGIMES = ("saturated", "normal", "subnormal", "underflow")
BINS_AN_OCTAVE = 2


def nonzero_blocks(marginals: Marginals) -> tuple[np.ndarray, np.ndarray]:
    """Distinct nonzero block amaxes, float64 ascending, and how many blocks have each."""
    values = codes_to_values(marginals.block_codes, marginals.dtype).numpy()
    keep = values > 0
    return values[keep], marginals.block_counts.numpy()[keep]


def nonzero_elements(marginals: Marginals) -> tuple[np.ndarray, np.ndarray]:
    """Distinct nonzero magnitudes, float64 ascending, and how many elements have each."""
    values = codes_to_values(marginals.element_codes, marginals.dtype).numpy()
    keep = values > 0
    return values[keep], marginals.element_counts.numpy()[keep]


def safe_window(marginals: Marginals) -> tuple[float, float]:
    """Calibrated amaxes that keep every nonzero block normal: ``(B_max, 28672 B_min)``.

    Empty, with the first above the second, where block amaxes span more than a factor of 28672.
    """
    values, _ = nonzero_blocks(marginals)
    return float(values[-1]), float(E4M3_NORMAL_RANGE * values[0])


def block_regimes(marginals: Marginals, calibrated_amax: float) -> dict[str, float]:
    """Share of the nonzero blocks in each regime at a calibrated amax.

    Raises
    ------
    ValueError
        If the amax is not positive.
    """
    if not calibrated_amax > 0:
        raise ValueError(f"calibrated_amax is {calibrated_amax}; expected a positive value.")
    shares = block_shares(marginals, np.array([calibrated_amax]))
    found = {name: float(share[0]) for name, share in shares.items()}
    found["normal"] = 1 - sum(found.values())
    return {name: found[name] for name in REGIMES}


def octave_histogram(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share in bins of half an octave: left edges (log2) and shares that sum to 1."""
    position = np.floor(np.log2(values) * BINS_AN_OCTAVE).astype(int)
    weights = np.bincount(position - position.min(), weights=counts)
    edges = (np.arange(len(weights)) + position.min()) / BINS_AN_OCTAVE
    return edges, weights / weights.sum()


def worked_block(
    x: torch.Tensor, calibrated_amax: float, underflow: Underflow = "flush"
) -> tuple[dict[str, float], pd.DataFrame]:
    """Every intermediate value of one block [16]: per-block numbers, and a row an element."""
    if x.shape != (BLOCK_SIZE,):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected one block, ({BLOCK_SIZE},).")
    g = torch.tensor(input_scale_from_amax(calibrated_amax), dtype=torch.float32)
    x = x.to(torch.float32)
    block_amax = x.abs().amax()
    s8 = block_scale_e4m3(block_amax, g, underflow)
    u = x / (s8 * g)
    q = torch.copysign(round_e2m1(u.abs()), u)
    block = {
        "input_scale": g.item(),
        "block_amax": block_amax.item(),
        "s": (block_amax / (E2M1_MAX * g)).item(),
        "s8": s8.item(),
        "step": (s8 * g).item(),
    }
    y = q * (s8 * g)
    rows = pd.DataFrame({"x": x, "u": u, "q": q, "y": y, "error": y - x})
    return block, rows


def snr_curve(statistics: ActivationStatistics, amaxes: np.ndarray) -> pd.DataFrame:
    """SNR (dB) at calibrated amaxes under both conventions: columns calibrated_amax, flush, floor."""
    scales = input_scale_from_amax(amaxes)
    return pd.DataFrame(
        {"calibrated_amax": amaxes} | {u: statistics.snr_db(scales, u) for u in UNDERFLOWS}
    )


def shade_scale_axis(ax: plt.Axes, marginals: Marginals) -> None:
    """Shade and label the regimes of a tensor along an axis of calibrated amaxes."""
    low, high = safe_window(marginals)
    end = high * UNDERFLOW_START / E4M3_NORMAL_RANGE
    left, right = ax.get_xlim()
    edges = [left, low, high, end, right]
    names = ["saturation", "safe window", "subnormal\nblock scales", "blocks\nunderflow"]
    _shade(ax, edges, names)


def shade_block_axis(ax: plt.Axes, marginals: Marginals, calibrated_amax: float) -> None:
    """Shade the regimes along an axis of block amaxes, labelled with the share of blocks in each."""
    shares = block_regimes(marginals, calibrated_amax)
    left, right = ax.get_xlim()
    rhos = [UNDERFLOW_START, E4M3_NORMAL_RANGE, 1]
    edges = [left, *(calibrated_amax / rho for rho in rhos), right]
    names = [f"{name}\n{100 * shares[name]:.4g} %" for name in reversed(REGIMES)]
    _shade(ax, edges, names, reversed(REGIMES))


def _shade(ax, edges, names, regimes=REGIMES) -> None:
    left, right = ax.get_xlim()
    for start, stop, name, regime in zip(edges, edges[1:], names, regimes, strict=False):
        start, stop = max(start, left), min(stop, right)
        if start >= stop:
            continue
        ax.axvspan(start, stop, color=plots.REGIME_COLORS[regime], lw=0, zorder=0)
        if np.log(stop / start) > 0.07 * np.log(right / left):  # else the name has no room
            ax.text(np.sqrt(start * stop), 0.98, name, transform=ax.get_xaxis_transform(),
                    ha="center", va="top", fontsize=8, color="#333333")  # fmt: skip
    ax.set_xlim(left, right)


def policies_at(run: Run, mix: str, site: str, underflow: str) -> pd.DataFrame:
    """Calibrated amax and test SNR of every one-scale policy at one site, calibrated on ``mix``."""
    errors, groups = run.errors(mix), run.groups(mix)
    errors = errors[~errors.policy.isin(snr_tables.NOT_ONE_SCALE)]
    errors = errors[(errors.site == site) & (errors.underflow == underflow)]
    errors = errors[errors.calibration.isin([mix, "test"])]
    groups = groups[groups.site == site].set_index("group")
    weight = groups["count"]
    signal = (weight * groups.signal_power).sum()
    rows = [
        (policy, t.calibrated_amax.iloc[0], signal / (weight * t.set_index("group").mse).sum())
        for policy, t in errors.groupby("policy", observed=True, sort=False)
    ]
    table = pd.DataFrame(rows, columns=["policy", "calibrated_amax", "snr_db"])
    return table.assign(snr_db=snr_tables.db(table.snr_db))


def clip_and_flush(run: Run, mix: str) -> pd.DataFrame:
    """What each policy of ``mix`` saturates and flushes on the mix's own test pool, by site.

    Columns: site, policy, saturated and underflow (share of the nonzero blocks), flushed_energy (share
    of the pool's signal power that is at most lost with them: 16 block_amax**2 a block).
    """
    rows = []
    amaxes = run.errors(mix)
    amaxes = amaxes[(amaxes.calibration == mix) & (amaxes.underflow == "flush")]
    amaxes = amaxes[~amaxes.policy.isin(snr_tables.NOT_ONE_SCALE)].drop_duplicates(["site", "policy"])
    for row in amaxes.itertuples():
        marginals = run.marginals(mix, row.site, "test")
        shares = block_regimes(marginals, row.calibrated_amax)
        values, counts = nonzero_blocks(marginals)
        lost = values < row.calibrated_amax / UNDERFLOW_START
        energy = (values[lost] ** 2 * counts[lost]).sum() * BLOCK_SIZE
        rows.append((row.site, row.policy, shares["saturated"], shares["underflow"],
                     energy / (marginals.signal_power * marginals.count)))  # fmt: skip
    return pd.DataFrame(rows, columns=["site", "policy", "saturated", "underflow", "flushed_energy"])


def draw_site(
    run: Run, mix: str, site: str, underflow: str = "flush", calibrated_amax: float | None = None
) -> tuple[plt.Figure, str]:
    """One site of a run at one calibrated amax (default: the amax policy's): figure and a caption."""
    landed = policies_at(run, mix, site, underflow)
    if calibrated_amax is None:
        calibrated_amax = float(landed[landed.policy == "amax"].calibrated_amax.iloc[0])
    amaxes = run.curve(mix, site).calibrated_amax.to_numpy()
    snr = snr_tables.curve_snr(run, mix, site, underflow, np.append(amaxes, calibrated_amax))
    curve = pd.Series(snr[:-1], amaxes)
    return draw_scale(landed, curve, run.marginals(mix, site, "test"), calibrated_amax, float(snr[-1]),
                      f"{site} ({mix}, {underflow})")  # fmt: skip


def draw_scale(
    landed: pd.DataFrame,
    curve: pd.Series,
    marginals: Marginals,
    calibrated_amax: float,
    here: float,
    name: str,
) -> tuple[plt.Figure, str]:
    """One tensor at one calibrated amax, where its SNR is ``here`` (dB): figure and a caption.

    Above, ``curve``, the SNR by calibrated amax, with every policy's place of ``landed`` (policy,
    calibrated_amax, snr_db); below, how the block amaxes fall into the regimes at this amax.
    """
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 6.4), height_ratios=[3, 2])
    top.plot(curve.index, curve, color="#666666", lw=1)
    for row in landed.itertuples():
        style = plots.POLICY_STYLE[row.policy]
        top.plot(row.calibrated_amax, row.snr_db, style.marker, color=style.color, ms=7, mec="k",
                 mew=0.4, ls="", label=f"{style.label} {row.snr_db:.2f}")  # fmt: skip
    top.set_xscale("log", base=2)
    top.set_ylim(top=top.get_ylim()[1] + 0.25 * np.ptp(top.get_ylim()))  # room for the labels
    shade_scale_axis(top, marginals)
    top.axvline(calibrated_amax, color="k", lw=1, ls=":")
    top.set_xlabel("calibrated amax (log2 axis)")
    top.set_ylabel("test SNR (dB)")
    top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="policy, SNR (dB)")
    values, counts = nonzero_blocks(marginals)
    edges, share = octave_histogram(values, counts)
    bottom.bar(2.0**edges, 100 * share, width=2.0**edges * (2 ** (1 / BINS_AN_OCTAVE) - 1),
               align="edge", color="#777777", zorder=2)  # fmt: skip
    bottom.set_xscale("log", base=2)
    bottom.set_xlim(values[0] / 8, max(values[-1], calibrated_amax / 2) * 4)
    bottom.set_ylim(top=1.6 * 100 * share.max())
    shade_block_axis(bottom, marginals, calibrated_amax)
    bottom.set_xlabel("block amax (log2 axis)")
    bottom.set_ylabel("blocks (%) per half octave")
    shares = block_regimes(marginals, calibrated_amax)
    caption = (
        f"At a calibrated amax of {calibrated_amax:.4g} the test SNR of {name} is {here:.2f} dB; of its "
        "nonzero blocks "
        + ", ".join(f"{100 * shares[r]:.4g} % are {label}" for r, label in _STATES.items())
        + "."
    )
    return fig, caption


_STATES = {"saturated": "saturated", "normal": "normal", "subnormal": "subnormal",
           "underflow": "below E4M3"}  # fmt: skip


def site_table(sites: dict[str, ActivationStatistics]) -> pd.DataFrame:
    """One row a site: what decides whether its scale is easy to calibrate.

    ``room``: octaves between ``B_max`` and ``28672 B_min`` (negative: no scale keeps every block
    normal); ``normal %``: share of nonzero blocks with a normal scale at amax calibration.
    """
    rows = {}
    for site, statistics in sites.items():
        m = statistics.marginals
        low, high = safe_window(m)
        rows[site] = {
            "amax": m.amax,
            "rms": m.signal_power**0.5,
            "p99.99 / amax": m.percentile(99.99) / m.amax,
            "log2 B_max/B_min": np.log2(low / high * E4M3_NORMAL_RANGE),
            "room (octaves)": np.log2(high / low),
            "normal %": 100 * block_regimes(m, m.amax)["normal"],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def kind_table(table: pd.DataFrame) -> pd.DataFrame:
    """``site_table`` by site kind, as "smallest to largest" over the kind's layers."""

    def spread(column: pd.Series) -> str:
        low, high = column.min(), column.max()
        return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"

    kinds = table.index.map(kind_of)
    return table.groupby(kinds, sort=False).agg(spread).rename_axis(None)
