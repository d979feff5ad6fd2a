# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What each shortcut of the published study does to its numbers, measured on a stored run.

A *tensor* here is what the study scored on: the activations of 256 tokens. A run stores the error of
every such tensor of a test pool (``Run.windows``); all of them together are the *pool*.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.sites import kind_of, layer_of
from studies.runs import synthetic
from studies.runs.store import Run

from . import plots
from .snr_tables import HARM_DB, cross_matrix, curve_snr, db, policy_snr, sequence_amaxes

COMPARED = ("p99.99", "p99.999", "headroom", "mse", "oracle", "dynamic", "four-over-six")
COIN = 0.25  # share of tensors with the other sign from which on one tensor decides nothing


def study_sites(run: Run) -> list[str]:
    """The study's two sites: the MLP input of the first and of the last layer.

    Raises
    ------
    ValueError
        If the run holds no MLP input.
    """
    sites = [s for s in run.sites if kind_of(s) == "mlp_input"]
    if not sites:
        raise ValueError(
            f"the run's sites are {run.sites}; expected some mlp_input, which the study looked at. "
            "Capture with the site mlp_input."
        )
    return [sites[0], sites[-1]]


def tensor_gains(run: Run, mix: str, underflow: str) -> pd.DataFrame:
    """SNR gain over amax on every single tensor and on the whole pool, by policy and site.

    Columns: policy (``COMPARED``, then the amax of other mixes), site, pool (dB, all tensors
    together), mean, std, low, high (2.5 and 97.5 % of single tensors), other_sign (share of tensors
    whose gain has the other sign than the pool's).
    """
    others = [f"amax of {other}" for other in run.window_mixes if other != mix]
    rows = []
    for site, table in run.windows(mix).groupby("site", observed=True, sort=False):
        base = table[f"amax {underflow}"]
        for policy in (*COMPARED, *others):
            noise = table[f"{policy} {underflow}"]
            gain, pool = db((base / noise).to_numpy()), float(db(base.sum() / noise.sum()))
            low, high = np.quantile(gain, (0.025, 0.975))
            other_sign = float((np.sign(gain) * np.sign(pool) < 0).mean())
            rows.append((policy, site, pool, gain.mean(), gain.std(), low, high, other_sign))
    columns = ["policy", "site", "pool", "mean", "std", "low", "high", "other_sign"]
    return pd.DataFrame(rows, columns=columns)


def gain_table(gains: pd.DataFrame) -> pd.DataFrame:
    """``tensor_gains`` over its sites, a row per policy."""
    by_policy = gains.assign(size=gains.pool.abs()).groupby("policy", sort=False)
    return pd.DataFrame({
        "pool, mean over sites (dB)": by_policy.pool.mean(),
        "std of one tensor (dB)": by_policy["std"].mean(),
        "largest |pool| (dB)": by_policy["size"].max(),
        "other sign (%)": 100 * by_policy.other_sign.mean(),
    }).rename_axis(None)  # fmt: skip


def draw_gains(gains: pd.DataFrame, sites: list[str]) -> plt.Figure:
    """Gain over amax at some sites: the pool's as a point, 95 % of single tensors as a bar."""
    fig, axes = plt.subplots(1, len(sites), figsize=(8.2, 3.8), sharey=True, squeeze=False)
    for ax, site in zip(axes.flat, sites, strict=True):
        rows = gains[(gains.site == site) & (gains.policy != "p99.99")]
        ax.hlines(rows.policy, rows.low, rows.high, color="0.6", lw=5)
        ax.plot(rows.pool, rows.policy, "o", color="#D55E00", ms=6)
        ax.axvline(0, color="k", lw=0.8)
        ax.set_title(site, fontsize=10)
        ax.set_xlabel("SNR gain over amax (dB, symlog)")
        ax.set_xscale("symlog", linthresh=0.05)
        ax.set_xticks([-1, -0.1, 0, 0.1, 1], ["-1", "-0.1", "0", "0.1", "1"])
    return fig


def flip_prose(flips: float) -> str:
    """The finding of ``draw_gains``, simple HTML."""
    luck = "nearly at random" if flips >= COIN else "as the pool says, mostly"
    return (
        f"<strong>On one tensor, headroom beats or loses to amax {luck}: {flips:.0%} of tensors show "
        "the sign that the pool does not.</strong>"
    )


def gains_alt(gains: pd.DataFrame) -> str:
    """The alternative text of ``draw_gains``, from the rows it draws."""
    rows = gains[gains.policy != "p99.99"]
    crossing = (rows.low < 0) & (rows.high > 0)
    across = crossing.groupby(rows.policy, sort=False).any()
    names = ", ".join(across.index[across]) or "none"
    clear = ", ".join(across.index[~across]) or "none"
    return f"Grey bars of gain over amax by policy. Across zero: {names}; clear of it: {clear}."


def tensor_snr(run: Run, mix: str, policy: str, underflow: str) -> pd.DataFrame:
    """SNR of every single tensor: columns site, tensor, snr_db, pool_db (all tensors together)."""
    tensors = run.windows(mix)
    column = f"{policy} {underflow}"
    totals = tensors.groupby("site", observed=True)[["signal_power", column]].transform("sum")
    return pd.DataFrame({
        "site": tensors.site, "tensor": tensors.window,
        "snr_db": db(tensors.signal_power / tensors[column]),
        "pool_db": db(totals.signal_power / totals[column]),
    })  # fmt: skip


def draw_levels(snr: pd.DataFrame, sites: list[str]) -> plt.Figure:
    """``tensor_snr`` at sites, in this order: 95 % of single tensors as a bar, the pool as a dash."""
    by_site = snr.groupby("site", observed=True, sort=False)
    table = by_site.snr_db.quantile([0.025, 0.975]).unstack().set_axis(["low", "high"], axis=1)
    table = table.assign(pool=by_site.pool_db.first()).loc[sites].assign(at=range(len(sites)))
    fig, ax = plt.subplots(figsize=(7.2, 3.4))
    for kind, part in table.groupby(table.index.map(kind_of), sort=False):
        color = plots.KIND_COLORS.get(str(kind), "k")
        ax.vlines(part["at"], part.low, part.high, color=color, lw=4, alpha=0.5, label=kind)
    ax.plot(table["at"], table.pool, "k_", ms=8)
    ax.legend(ncol=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    ax.set_xticks(table["at"], table.index.map(layer_of), fontsize=7)
    ax.set_xlabel("layer")
    ax.set_ylabel("SNR (dB)")
    return fig


def distance_from_statistics(run: Run, mix: str, underflow: str) -> float:
    """Largest relative distance of the tensors' mean error from the one that histograms give.

    Over sites and the policies amax, headroom and p99.99. Tensors are scored by the quantizer itself
    and stored in float32.
    """
    errors = run.errors(mix)
    errors = errors[(errors.calibration == mix) & (errors.underflow == underflow)]
    tensors = run.windows(mix).groupby("site", observed=True)
    apart = []
    for policy in ("amax", "headroom", "p99.99"):
        exact = errors[errors.policy == policy].groupby("site", observed=True).mse.mean()
        apart.append((tensors[f"{policy} {underflow}"].mean() / exact - 1).abs().max())
    return float(max(apart))


def site_losses(run: Run, mix: str, underflow: str) -> pd.DataFrame:
    """The worst losses (dB) as the study's two sites show them, and as all sites do.

    The last column is over all mixes, NaN where a run holds one.
    """
    cross = cross_matrix(run, "amax", underflow)
    foreign = cross[cross.calibration != cross.test]
    scored = policy_snr(run, mix, underflow)
    rows = {}
    for name, sites in (("the study's two", study_sites(run)), ("all", run.sites)):
        gap = scored[scored.site.isin(sites)].groupby("policy", observed=True).gap_db.max()
        rows[f"{name} ({len(sites)})"] = {
            "amax below oracle, worst": gap["amax"],
            "p99.99 below oracle, worst": gap["p99.99"],
            "foreign mix, worst loss": foreign[foreign.site.isin(sites)].loss_db.max(),
        }
    return pd.DataFrame(rows).T


def answer(foreign: pd.Series, flips: float, scope: str) -> str:
    """The page's answer, simple HTML.

    Parameters
    ----------
    foreign : two losses (dB)
        The worst foreign calibration at the study's two sites and at all, as ``site_losses`` has them.
    flips : float
        Share of single tensors that rank amax and headroom otherwise than their pool.
    """
    two, every = foreign
    third = "did not decide" if not two <= HARM_DB < every else "decided"
    verdict = f"Its sites {third} its third answer"
    where = "At the study's two sites"
    if np.isnan(every):
        verdict = "One mix cannot say whether its sites decided its third answer"
    else:
        where += f" a foreign calibration costs at most {two:.3f} dB, over all sites {every:.1f} dB. "
        where += "At those two"
    second = "could not decide" if flips >= COIN else "was enough to decide"
    return (
        f"<strong>{verdict}; its test tensor {second} its second.</strong> {where}, {flips:.0%} of "
        "single test tensors rank amax and headroom the other way round than all of them together do. "
        f"Scope: {scope}."
    )


def sites_prose(foreign: pd.Series) -> str:
    """What ``answer``'s two losses say about the study's choice of sites, Markdown."""
    two, every = foreign
    if np.isnan(every):
        return "This run holds one mix, so no calibration is foreign."
    start = f"At the study's two sites the worst foreign calibration costs {two:.3f} dB"
    if two <= HARM_DB < every:
        return (
            f"{start}, and the dataset does not matter; at all sites {every:.1f} dB. This one choice "
            "decides the study's third answer."
        )
    return f"{start}; at all sites {every:.3f} dB. The choice of sites does not decide the answer."


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


def split_prose(split: pd.DataFrame) -> str:
    """What ``first_split_table`` says, Markdown."""
    loss = split.all_db - split.first_db
    beyond = int((split.first_db < split.low - 1e-9).sum())
    return (
        f"Leaving the other splits out costs up to {loss.max():.2f} dB (mean {loss.mean():.4f} dB). "
        f"Part of that is only the smaller number of sequences: at {beyond} of {len(split)} sites the "
        "loss is beyond what 95 % of equally many sequences from all splits lose."
    )


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


def draw_spread(spread: pd.DataFrame) -> plt.Figure:
    """``subset_spread`` against the number of sequences."""
    names = {"study": "three nested subsets", "subsets": "many subsets of the pool",
             "fresh": "with replacement"}  # fmt: skip
    fig, ax = plt.subplots(figsize=(7.2, 3.6))
    sns.lineplot(spread.set_index("n").rename(columns=names), ax=ax, dashes=False, markers=["o"] * 3,
                 palette=["#D55E00", "#0072B2", "#009E73"])  # fmt: skip
    ax.set_xscale("log", base=4)
    ax.set_xlabel("calibration sequences")
    ax.set_ylabel("std of log2 amax, mean over sites")
    return fig


def output_dtype_table(run: Run, mix: str) -> pd.DataFrame:
    """SNR at the amax calibration with float32 and bfloat16 output: site, float32, bfloat16, cost."""
    rows = []
    for site in run.sites:
        amax = [run.marginals(mix, site).amax]
        full = float(curve_snr(run, mix, site, "flush", amax)[0])
        half = float(curve_snr(run, mix, site, "flush_bf16", amax)[0])
        rows.append((site, full, half, full - half))
    return pd.DataFrame(rows, columns=["site", "float32", "bfloat16", "cost"])


def output_dtype_prose(output: pd.DataFrame) -> str:
    """What ``output_dtype_table`` says, beside the study's effects, Markdown."""
    known = pd.DataFrame(synthetic.published()["cross_dataset_fixed_test"]).groupby("layer").snr_db
    return (
        f"A bfloat16 output costs {output.cost.min():+.3f} to {output.cost.max():+.3f} dB, the same for "
        "all calibration sets; the study reports differences of at most "
        f"{(known.max() - known.min()).max():.2f} dB between them."
    )


def convention_table(run: Run, mix: str) -> pd.DataFrame:
    """Floor minus flush SNR along the stored curves: what the study's convention hides.

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


def convention_prose(convention: pd.DataFrame, spike: dict[str, float]) -> str:
    """Where floor and flush part, Markdown. ``spike``: what a spike costs under each (dB)."""
    first = convention.loc[convention.octaves.idxmin()]
    most = convention.loc[convention.largest.idxmax()]
    apart = convention.at_amax.abs().max()
    text = f"Floor and flush differ by at most {apart:.1e} dB at an amax calibration"
    if np.isfinite(first.octaves):
        text += (
            f". They first differ by 0.1 dB {first.octaves:.1f} octaves above the amax (at "
            f"`{first.site}`), and by up to {most.largest:.1f} dB {most.largest_octaves:.1f} octaves "
            f"above it (at `{most.site}`)"
        )
    near = "On these activations no amax calibration comes near. " if apart < HARM_DB else ""
    return (
        f"{text}. {near}One freak value brings it there: in the synthetic spike case it costs "
        f"{spike['floor']:.1f} dB under floor and {spike['flush']:.1f} dB under flush."
    )


def steady(gains: pd.DataFrame) -> list[str]:
    """The policies whose pool's sign more than 99 % of single tensors show."""
    other = gains.groupby("policy", sort=False).other_sign.mean()
    return list(other.index[other < 0.01])
