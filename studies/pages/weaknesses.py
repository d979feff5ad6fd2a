# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What each shortcut of the published study does to its numbers, measured on a stored run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from studies.runs.store import Run

from .snr_tables import curve_snr, db, sequence_amaxes


def window_gains(run: Run, mix: str, first: str, second: str, underflow: str) -> pd.DataFrame:
    """SNR of ``second`` minus ``first`` on every window of 256 tokens and on the whole pool.

    Columns: site, pool (dB, all windows together), mean, std, low, high (2.5 and 97.5 % of single
    windows), other_sign (share of windows whose gain has the other sign than the pool's).
    """
    windows = run.windows(mix)
    rows = []
    for site, table in windows.groupby("site", observed=True, sort=False):
        a, b = (table[f"{name} {underflow}"] for name in (first, second))
        gain = db((a / b).to_numpy())
        pool = float(db(a.sum() / b.sum()))
        low, high = np.quantile(gain, (0.025, 0.975))
        rows.append((site, pool, gain.mean(), gain.std(), low, high,
                     float((np.sign(gain) * np.sign(pool) < 0).mean())))  # fmt: skip
    return pd.DataFrame(rows, columns=["site", "pool", "mean", "std", "low", "high", "other_sign"])


def window_snr(run: Run, mix: str, policy: str, underflow: str) -> pd.DataFrame:
    """SNR of every single window: columns site, window, snr_db, pool_db (all windows together)."""
    windows = run.windows(mix)
    column = f"{policy} {underflow}"
    totals = windows.groupby("site", observed=True)[["signal_power", column]].transform("sum")
    return pd.DataFrame({
        "site": windows.site, "window": windows.window,
        "snr_db": db(windows.signal_power / windows[column]),
        "pool_db": db(totals.signal_power / totals[column]),
    })  # fmt: skip


def first_split_table(run: Run, mix: str, underflow: str, *, draws: int = 200, seed: int = 0):
    """Calibrating on each member's first split only, against all splits. None if no member has two.

    Columns: site, n (sequences of the first splits), first_db, all_db (SNR on the mix's test pool),
    low, high (5 and 95 % of as many random sequences from all splits).
    """
    sequences = run.sequences(mix)
    sequences = sequences[sequences.pool == "calibration"]
    order = list(dict.fromkeys(sequences.sort_values("sequence").source))
    firsts = {source.split("/")[0]: source for source in reversed(order)}.values()
    if len(firsts) == len(order):
        return None
    generator = np.random.default_rng(seed)
    rows = []
    for site, table in sequences.groupby("site", observed=True, sort=False):
        amaxes = table.amax.to_numpy()
        chosen = table.source.isin(firsts).to_numpy()
        n = int(chosen.sum())
        random = [generator.choice(amaxes, n, replace=False).max() for _ in range(draws)]
        snr = curve_snr(run, mix, str(site), underflow, [amaxes[chosen].max(), amaxes.max(), *random])
        rows.append((site, n, *snr[:2], *np.quantile(snr[2:], (0.05, 0.95))))
    return pd.DataFrame(rows, columns=["site", "n", "first_db", "all_db", "low", "high"])


def subset_spread(run: Run, mix: str, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Spread of the amax over subsets of n sequences, three ways; mean over sites of std(log2 amax).

    ``study``: three subsets nested in one pool, as the study drew them. ``subsets``: many subsets of
    that pool, without replacement: both shrink to zero as n approaches the pool. ``fresh``: with
    replacement, which is what another user's n sequences would give.
    """
    generator = np.random.default_rng(seed)
    stored = run.subsets(mix)
    stored = stored[(stored.policy == "amax") & (stored.draw < 3)]
    rows = []
    for n, table in stored.groupby("n"):
        study: list[float] = []
        subsets: list[float] = []
        fresh: list[float] = []
        for site, one in table.groupby("site", observed=True):
            amaxes = np.log2(sequence_amaxes(run, mix, str(site)))
            study.append(np.log2(one.calibrated_amax).std(ddof=0))
            for kept, replace in ((subsets, False), (fresh, True)):
                drawn = [generator.choice(amaxes, n, replace=replace).max() for _ in range(draws)]
                kept.append(np.std(drawn))
        rows.append((n, np.mean(study), np.mean(subsets), np.mean(fresh)))
    return pd.DataFrame(rows, columns=["n", "study", "subsets", "fresh"])


def output_dtype_table(run: Run, mix: str) -> pd.DataFrame:
    """SNR at the amax calibration with float32 and bfloat16 output: site, float32, bfloat16, cost."""
    rows = []
    for site in run.sites:
        amax = [run.marginals(mix, site).amax]
        full = float(curve_snr(run, mix, site, "flush", amax)[0])
        half = float(curve_snr(run, mix, site, "flush_bf16", amax)[0])
        rows.append((site, full, half, full - half))
    return pd.DataFrame(rows, columns=["site", "float32", "bfloat16", "cost"])


def convention_table(run: Run, mix: str) -> pd.DataFrame:
    """Floor minus flush SNR along the stored curves: what the reference path hides.

    Columns: site, at_amax (dB), octaves (above the calibration amax until they are 0.1 dB apart, inf if
    never), largest (dB, anywhere above the amax), largest_octaves (above the amax, where that is).
    """
    rows = []
    for site, curve in run.curves(mix).groupby("site", observed=True, sort=False):
        amax = run.marginals(mix, str(site)).amax
        curve = curve[curve.calibrated_amax >= amax].sort_values("calibrated_amax")
        apart = db(curve.mse_flush / curve.mse_floor)
        begins = curve.calibrated_amax[apart > 0.1]
        octaves = np.log2(begins.iloc[0] / amax) if len(begins) else np.inf
        most = np.log2(curve.calibrated_amax.loc[apart.idxmax()] / amax)
        rows.append((site, apart.iloc[0], octaves, apart.max(), most))
    return pd.DataFrame(rows, columns=["site", "at_amax", "octaves", "largest", "largest_octaves"])
