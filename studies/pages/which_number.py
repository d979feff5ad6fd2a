# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which number of a tensor foretells the model's loss: rank correlations, misses and false alarms.

A predictor is turned into a score that rises with the damage it foresees. For a number in dB that is its
loss: the site's best over the scales evaluated, minus the value. For a share of blocks it is the share.
``larger loss`` is the larger of the losses of SNR and block SNR; ``lower SNR`` that of the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from studies.runs.store import Run

from . import snr_tables
from .plots import model_label

HARM = 1.1  # a setting is harmful if its KL exceeds the amax's by this factor
HARMLESS_DB = 0.5  # a loss below this is read as "no harm"
HARMLESS_SHARE = 0.001  # of blocks
MAX_MISSED = 0.05  # a yardstick misses at most this share of the harmful settings of any model
PREDICTORS = ("SNR", "block SNR", "lower SNR", "larger loss", "saturated", "underflowed")
SHARES = ("saturated", "underflowed")
DRAWN = ("SNR", "block SNR", "larger loss")
KEYS = ["calibration", "policy", "underflow"]


def _text(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    return table.astype({n: str for n in (*names, "policy") if n in table})


def settings(run: Run) -> pd.DataFrame:
    """One row per site and scale, that site alone quantized: octaves, kl, rise, metrics and scores.

    ``rise``: KL over the KL at the site's amax.
    """
    kl = run.single_sites()[["only", "policy", "kl"]].rename(columns={"only": "site"})
    mix = run.featured_mix
    metrics = _text(run.metrics(mix), "site", "calibration", "underflow")
    metrics = metrics[(metrics.calibration == mix) & (metrics.underflow == "flush")]
    table = _text(kl, "site").merge(metrics, on=["site", "policy"], validate="1:1")
    table["octaves"] = table.policy.str.removeprefix("x2^").astype(float)
    at_amax = table[table.octaves == 0].set_index("site").kl
    return snr_tables.scored(table.assign(rise=table.kl / table.site.map(at_amax)))


def spearman(a: pd.Series, b: pd.Series) -> float:
    """Rank correlation; NaN where one of both does not vary."""
    return float(a.corr(b, method="spearman")) if a.nunique() > 1 and b.nunique() > 1 else float("nan")


def check(run: Run) -> None:
    """The KL itself as predictor correlates fully and misses nothing; ValueError if not."""
    table = settings(run)
    row = verdicts(table.assign(itself=100 * (table.rise - HARM)), "itself", 0.0)
    within = spearman(table.kl, table.kl)
    if row["missed"] or row["alarms"] or abs(within - 1) > 1e-12:
        raise ValueError(
            f"KL as its own predictor in {run.name}: {row}, correlation {within}; "
            "expected 0 misses, 0 alarms and 1."
        )


def correlations(run: Run, scales: Sequence[float] = (-2.0, 0.0, 14.0)) -> pd.DataFrame:
    """Spearman's rank correlation of each predictor's score with KL.

    ``within a site``: over scales, the median over sites. ``at 2^k``: across sites at one scale.
    A share that is zero throughout foretells nothing: NaN is taken as 0 within a site.
    """
    table = settings(run)
    rows = {}
    for name in PREDICTORS:
        within = [spearman(one[name], one.kl) for _, one in table.groupby("site")]
        rows[name] = {"within a site": float(np.median(np.nan_to_num(within)))}
        for k in scales:
            one = table[table.octaves == k]
            rows[name][f"at 2^{k:g}"] = spearman(one[name], one.kl)
    return pd.DataFrame(rows).T


def over_policies(run: Run) -> pd.DataFrame:
    """Settings with all sites quantized: KL, and each score averaged over the sites.

    ``token SNR``: minus the mean over sites of the SNR by token, in the model whose earlier sites are
    quantized too.
    """
    mix = run.featured_mix
    table = _text(run.end_to_end(), *KEYS, "test")
    table = table[(table.test == mix) & (table.weights == "bf16") & (table.only == "")]
    scores = (
        snr_tables.scored(_text(run.metrics(mix), "site", *KEYS)).groupby(KEYS)[list(PREDICTORS)].mean()
    )
    token = _text(run.end_to_end_snr(), *KEYS, "test")
    token = token[(token.test == mix) & (token.weights == "bf16") & (token.only == "")]
    scores["token SNR"] = -token.groupby(KEYS).token_snr_db.mean()
    return table.set_index(KEYS)[["kl"]].join(scores, how="inner")


def policy_correlations(run: Run) -> pd.DataFrame:
    """``over_policies`` as rank correlations: of all settings, and without the sweep of scales."""
    table = over_policies(run)
    named = table[~table.index.get_level_values("policy").str.startswith("x2^")]
    parts = {"all settings": table, "policies only": named}
    names = [c for c in table if c != "kl"]
    return pd.DataFrame({k: {n: spearman(t[n], t.kl) for n in names} for k, t in parts.items()})


def ranks_above(score: pd.Series, harmful: pd.Series) -> float:
    """How often a harmful setting scores above a harmless one, ties counted half."""
    n, m = int(harmful.sum()), int((~harmful).sum())
    if not n or not m:
        return float("nan")
    return float((score.rank()[harmful].sum() - n * (n + 1) / 2) / (n * m))


def verdicts(table: pd.DataFrame, name: str, limit: float, harm: float = HARM) -> dict[str, float]:
    """Harmful settings a predictor calls harmless, and harmless ones it calls harmful.

    ``worst``: the largest rise among the missed; ``order``: ``ranks_above``, which needs no limit.
    """
    harmful, flagged = table.rise > harm, table[name] > limit
    missed = table.rise[harmful & ~flagged]
    return {
        "harmful": int(harmful.sum()), "missed": len(missed), "worst": float(missed.max()),
        "harmless": int((~harmful).sum()), "alarms": int((flagged & ~harmful).sum()),
        "order": ranks_above(table[name], harmful),
    }  # fmt: skip


def misses(run: Run, harm: float = HARM, harmless_db: float = HARMLESS_DB) -> pd.DataFrame:
    """``verdicts`` of every predictor on the settings of one site at a time."""
    table = settings(run)
    limits = {name: HARMLESS_SHARE if name in SHARES else harmless_db for name in PREDICTORS}
    return pd.DataFrame({n: verdicts(table, n, limit, harm) for n, limit in limits.items()}).T


def at_equal_alarms(run: Run, name: str, alarms: int, harm: float = HARM) -> dict[str, float]:
    """``verdicts`` with the limit that allows a predictor that many false alarms."""
    table = settings(run)
    scores = np.sort(table[name][table.rise <= harm])[::-1]
    limit = float(scores[min(alarms, len(scores) - 1)])
    return verdicts(table, name, limit, harm) | {"limit": limit}


def totals(runs: Sequence[Run], harm: float = HARM, harmless_db: float = HARMLESS_DB) -> pd.DataFrame:
    """``misses`` summed over models, with ``share``: the largest share missed in any of them."""
    parts = [misses(run, harm, harmless_db) for run in runs]
    total = pd.DataFrame(sum(p[["harmful", "missed", "harmless", "alarms"]] for p in parts))
    share = pd.concat([p.missed / p.harmful for p in parts], axis=1).max(axis=1)
    worst = pd.concat([p.worst for p in parts], axis=1).max(axis=1)
    return total.assign(share=share, worst=worst)


def yardstick(runs: Sequence[Run], harm: float = HARM, harmless_db: float = HARMLESS_DB) -> str:
    """The predictor with the fewest misses, if it misses few in every model; else empty.

    Of equal misses, the one with fewer false alarms.
    """
    table = totals(runs, harm, harmless_db)
    best = table.sort_values(["missed", "alarms"], kind="stable").iloc[0]
    return str(best.name) if best.share <= MAX_MISSED else ""


def control_table(
    runs: Sequence[Run], name: str, rest: str, harm: float = HARM, harmless_db: float = HARMLESS_DB
) -> pd.DataFrame:
    """Misses of both predictors in each model, ``rest`` with a limit that gives as many false alarms.

    Columns: the two names, false alarms, limit (dB, of ``rest``), and the worst miss of each.
    """
    rows = {}
    for run in runs:
        row = misses(run, harm, harmless_db).loc[name]
        other = at_equal_alarms(run, rest, int(row.alarms), harm)
        rows[model_label(run.model_name)] = {
            name: row.missed, rest: other["missed"], "false alarms": row.alarms, "limit": other["limit"],
            f"worst of {name}": row.worst, f"worst of {rest}": other["worst"]}  # fmt: skip
    return pd.DataFrame(rows).T


def answer(runs: Sequence[Run], harm: float = HARM, harmless_db: float = HARMLESS_DB) -> str:
    """The verdict: which predictor is the yardstick of the book, and what it costs."""
    table = totals(runs, harm, harmless_db)
    name = yardstick(runs, harm, harmless_db)
    if not name:
        least = table.missed.idxmin()
        return (
            f"<strong>None of them.</strong> Even the best, {least}, calls "
            f"{int(table.missed[least])} of {int(table.harmful[least])} harmful settings harmless; so a "
            "scale should be judged by running the model."
        )
    long = {"larger loss": "The larger of the losses of SNR and block SNR",
            "lower SNR": "The lower of SNR and block SNR"}.get(name, f"The {name}")  # fmt: skip
    rest = "block SNR" if name == "SNR" else "SNR"
    control = int(control_table(runs, name, rest, harm, harmless_db)[rest].sum())
    close = ", but narrowly" if control < 1.5 * table.missed[name] else ""
    return (
        f"<strong>{long}{close}.</strong> Of {int(table.harmful[name])} settings of a single site "
        f"that raise the model's KL by over {harm - 1:.0%}, it calls {int(table.missed[name])} "
        f"harmless, where {rest} alone passes {int(table.missed[rest])}. It judges a scale "
        "against others of the same site; which site matters more, none of these numbers says."
    )


def draw_misses(runs: Sequence[Run], harm: float = HARM, limit: float = HARMLESS_DB) -> plt.Figure:
    """The rise of KL against each score, a row a model; the shaded corner holds the misses."""
    fig, axes = plt.subplots(len(runs), len(DRAWN), figsize=(8.2, 2.5 * len(runs)), sharex=True,
                             sharey=True, squeeze=False)  # fmt: skip
    for row, run in zip(axes, runs, strict=True):
        table = settings(run)
        for ax, name in zip(row, DRAWN, strict=True):
            ax.fill_between((0.008, limit), harm, 1e4, color="#e4e4e4", lw=0)
            for mark, part in (("v", table[table.octaves < 0]), ("o", table[table.octaves > 0])):
                face = "k" if mark == "v" else "none"
                label = "below the amax" if mark == "v" else "above"
                ax.plot(part[name].clip(lower=0.01), part.rise, mark, ms=3, mec="k", mfc=face, mew=0.5,
                        alpha=0.6, label=label)  # fmt: skip
            ax.axvline(limit, color="k", lw=0.6, ls=":")
            ax.axhline(harm, color="k", lw=0.6, ls=":")
            ax.set(xscale="log", yscale="log", xlim=(0.008, 60), ylim=(0.5, 1e4))
        row[0].set_ylabel(f"{model_label(run.model_name)}\nKL / KL at the amax", fontsize=8)
    for ax, name in zip(axes[-1], DRAWN, strict=True):
        ax.set_xlabel(f"{name if 'loss' in name else 'loss of ' + name} (dB)")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    return fig
