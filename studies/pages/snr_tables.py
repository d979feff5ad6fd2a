# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The numbers of the question pages, computed from a stored run.

Intervals resample the test pool's groups of sequences (percentile bootstrap); differences between
policies are paired, as both score the same groups.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import gammaln

from nvfp4_utils.policies import POLICIES
from studies import ROOT
from studies.runs.scoring import resamples
from studies.runs.store import Run

# Policies that are not one scale for the plain quantizer: dynamic has a scale per sequence, Four Over
# Six chooses between two block scales. They lie on no curve, and may beat the oracle of one scale.
NOT_ONE_SCALE = tuple(name for name, policy in POLICIES.items() if not policy.one_scale)
HARM_DB = 0.1  # the loss from which on the pages speak of one


def db(ratio):
    """``10 log10``."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(ratio)


def scored_policies(run: Run, mix: str) -> list[str]:
    """The policies that a run scored on ``mix``, in the order of ``POLICIES``, without the oracle."""
    scored = set(run.errors(mix).policy)
    return [name for name in POLICIES if name in scored and name != "oracle"]


def scope(run: Run, mix: str = "") -> str:
    """What a page's numbers are measured on: model, sites, text, output."""
    mix = mix or run.featured_mix
    trained = ROOT / run.info["model"] / "training.json"
    about = ""
    if trained.is_file():
        size = json.loads(trained.read_text())["parameters"] / 1e6
        about = f" ({size:.1f}M parameters, trained for this book)"
    return (
        f"{len(run.sites)} sites of the {run.model_name}{about}, mix {mix}, {run.test_sequences(mix)} "
        f"test sequences of {run.info['texts'][mix]['length']} tokens, float32 output"
    )


@lru_cache(maxsize=32)
def pooled(run: Run, mix: str, underflow: str) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Per site, squared sums over ``mix``'s test pool (first entry) and over bootstrap draws of it.

    Keys (calibration, policy), the oracle and dynamic under calibration "test", and ("", "signal").
    One resample of test groups serves all sites and policies, as the same sequences pass through
    them: so differences are paired.
    """
    errors = run.errors(mix)
    errors = errors[errors.underflow == underflow]
    groups = run.groups(mix)
    result = {}
    for site, table in errors.groupby("site", observed=True, sort=False):
        g = groups[groups.site == site].sort_values("group")
        weight = np.vstack([np.ones(len(g)), resamples(len(g))]) * g["count"].to_numpy()
        wide = table.pivot_table(index="group", columns=["calibration", "policy"], values="mse",
                                 observed=True).sort_index()  # fmt: skip
        sums = dict(zip(wide.columns, (weight @ wide.to_numpy()).T, strict=True))
        result[str(site)] = sums | {("", "signal"): weight @ g.signal_power.to_numpy()}
    return result


def policy_snr(run: Run, mix: str, underflow: str, calibration: str | None = None) -> pd.DataFrame:
    """SNR of every policy at every site on ``mix``'s test pool, and its distance to the oracle.

    Columns: site, policy, calibrated_amax, snr_db, low, high (95 % interval of the SNR), gap_db
    (oracle's SNR minus the policy's, paired), gap_low, gap_high. Policies are calibrated on
    ``calibration`` (default: the same mix).
    """
    errors = run.errors(mix)
    errors = errors[(errors.underflow == underflow) & (errors.group == 0)]
    amaxes = errors.set_index(["site", "calibration", "policy"]).calibrated_amax.to_dict()
    rows = []
    for site, sums in pooled(run, mix, underflow).items():
        oracle = sums["test", "oracle"]
        for (source, policy), noise in sums.items():
            if source not in (calibration or mix, "test"):
                continue
            snr, gap = db(sums["", "signal"] / noise), db(noise / oracle)
            rows.append((site, policy, amaxes[site, source, policy], snr[0], *_interval(snr[1:]), gap[0],
                         *_interval(gap[1:])))  # fmt: skip
    return pd.DataFrame(rows, columns=["site", "policy", "calibrated_amax", "snr_db", "low", "high",
                                       "gap_db", "gap_low", "gap_high"])  # fmt: skip


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def curve_snr(run: Run, mix: str, site: str, underflow: str, amaxes) -> np.ndarray:
    """SNR on the whole test pool at calibrated amaxes that lie on the stored curve's grid.

    Below twice the test amax the grid holds every bfloat16, so amax and percentile calibrations
    are read exactly; other values are interpolated in log amax.
    """
    curve = run.curve(mix, site)
    power = run.marginals(mix, site, "test").signal_power
    mse = np.interp(np.log2(amaxes), np.log2(curve.calibrated_amax), curve[f"mse_{underflow}"])
    return db(power / mse)


def sequence_amaxes(run: Run, mix: str, site: str) -> np.ndarray:
    """The calibration pool's sequence amaxes at a site, in the pool's order."""
    table = run.sequences(mix)
    table = table[(table.site == site) & (table.pool == "calibration")]
    return table.sort_values("sequence").amax.to_numpy()


def subset_maximum(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The law of the largest of ``n`` values drawn without replacement: ascending values, weights.

    The i-th smallest of N is the largest of C(i - 1, n - 1) of the C(N, n) subsets.

    Raises
    ------
    ValueError
        If ``n`` is not between 1 and the number of values.
    """
    total = len(values)
    if not 1 <= n <= total:
        raise ValueError(f"n is {n}; expected a subset's size between 1 and {total}.")

    def log_choose(a, b):
        return gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)

    i = np.arange(n, total + 1)
    weights = np.zeros(total)
    weights[n - 1 :] = np.exp(log_choose(i - 1, n - 1) - log_choose(total, n))
    return np.sort(values), weights / weights.sum()


def weighted_quantiles(values: np.ndarray, weights: np.ndarray, shares) -> np.ndarray:
    """The smallest values at or below which lie at least ``shares`` of the weight."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[order])
    at = np.searchsorted(cumulated, np.asarray(shares) - 1e-9)
    return values[order][np.minimum(at, len(values) - 1)]


def size_curve(run: Run, mix: str, site: str, underflow: str = "flush") -> pd.DataFrame:
    """Amax calibration on a random subset of 1, 2, 4 ... sequences, exactly: over all subsets.

    Columns: n, amax (median), snr_db (mean), and the 5 % and 95 % quantiles of both.
    """
    amaxes = np.sort(sequence_amaxes(run, mix, site))
    snr = curve_snr(run, mix, site, underflow, amaxes)
    sizes = [2**k for k in range(int(np.log2(len(amaxes))) + 1)]
    rows = []
    for n in dict.fromkeys([*sizes, len(amaxes)]):
        _, weights = subset_maximum(amaxes, n)
        low, median, high = weighted_quantiles(amaxes, weights, (0.05, 0.5, 0.95))
        rows.append((n, median, low, high, weights @ snr,
                     *weighted_quantiles(snr, weights, (0.05, 0.95))))  # fmt: skip
    return pd.DataFrame(rows, columns=["n", "amax", "amax_low", "amax_high", "snr_db", "snr_low",
                                       "snr_high"])  # fmt: skip


def subset_curves(run: Run, mix: str) -> pd.DataFrame:
    """Distance to the oracle against calibration size, by policy: mean over sites and nested draws.

    Columns: policy, n, gap_flush, gap_floor (dB), draws. Exact: every subset's scale is scored on the
    whole test pool.
    """
    table = run.subsets(mix)
    columns = {"draws": table.draw.nunique()}
    counts = run.groups(mix).groupby("site", observed=True)["count"].sum()
    for convention in ("flush", "floor"):
        sums = pooled(run, mix, convention)
        best = table.site.map({s: sums[s]["test", "oracle"][0] / counts[s] for s in sums}).astype(float)
        columns[f"gap_{convention}"] = db(table[f"mse_{convention}"] / best)
    gaps = table.assign(**columns)
    names = ["gap_flush", "gap_floor", "draws"]
    return gaps.groupby(["policy", "n"], observed=True)[names].mean().reset_index()


def cross_matrix(run: Run, policy: str = "amax", underflow: str = "flush") -> pd.DataFrame:
    """What calibrating on another mix costs: columns site, calibration, test, loss_db, low, high.

    ``loss_db``: SNR of the test mix's own calibration minus SNR of ``calibration``'s, paired over
    the test groups; positive means the foreign calibration is worse.
    """
    rows = []
    for test in run.mixes:
        for site, sums in pooled(run, test, underflow).items():
            for calibration in run.mixes:
                loss = db(sums[calibration, policy] / sums[test, policy])
                rows.append((site, calibration, test, loss[0], *_interval(loss[1:])))
    return pd.DataFrame(rows, columns=["site", "calibration", "test", "loss_db", "low", "high"])


def foreign_losses(run: Run, policy: str = "amax", underflow: str = "flush") -> pd.DataFrame:
    """``cross_matrix`` without the own calibrations; empty where a run holds one mix."""
    cross = cross_matrix(run, policy, underflow)
    return cross[cross.calibration != cross.test]


def cross_mean(run: Run, policy: str = "amax", underflow: str = "flush") -> pd.DataFrame:
    """``cross_matrix`` averaged over sites, with the interval of that mean: calibration, test, ..."""
    rows = []
    for test in run.mixes:
        sites = pooled(run, test, underflow).values()
        for calibration in run.mixes:
            loss = np.mean([db(s[calibration, policy] / s[test, policy]) for s in sites], axis=0)
            rows.append((calibration, test, loss[0], *_interval(loss[1:])))
    return pd.DataFrame(rows, columns=["calibration", "test", "loss_db", "low", "high"])


def subset_losses(run: Run, mix: str, policy: str, n: int, underflow: str = "flush") -> pd.Series:
    """Each site's SNR loss (dB) of ``policy`` from about ``n`` sequences of ``mix`` against all of them.

    Of the stored subsets, the size nearest to ``n``; mean error over its draws.
    """
    table = run.subsets(mix)
    table = table[table.policy == policy]
    sizes = table.n.unique()
    mse = table.groupby(["site", "n"], observed=True)[f"mse_{underflow}"].mean().unstack()
    nearest = sizes[np.abs(np.log(sizes / n)).argmin()]
    return db(mse[nearest] / mse[sizes.max()])


def size_curves(run: Run, mix: str, underflow: str = "flush") -> pd.DataFrame:
    """``size_curve`` of every site, with a column site."""
    curves = [size_curve(run, mix, site, underflow).assign(site=site) for site in run.sites]
    return pd.concat(curves, ignore_index=True)


def paired_difference(run: Run, mix: str, base: str, policy: str, underflow: str) -> dict[str, float]:
    """How much SNR ``policy`` gains over ``base``: mean over sites with its 95 % interval.

    Also the number of sites whose own interval lies above (``better``) or below zero (``worse``).
    """
    gains = []
    for sums in pooled(run, mix, underflow).values():
        own = {p: noise for (source, p), noise in sums.items() if source in (mix, "test")}
        gains.append(db(own[base] / own[policy]))
    gain = np.array(gains)  # [sites, 1 + draws]
    low, high = np.quantile(gain[:, 1:], (0.025, 0.975), axis=1)
    mean_low, mean_high = _interval(gain[:, 1:].mean(0))
    return {"mean": float(gain[:, 0].mean()), "low": mean_low, "high": mean_high,
            "better": int((low > 0).sum()), "worse": int((high < 0).sum())}  # fmt: skip


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """A table of ``Run.metrics`` with each predictor's score; losses are from the site's best."""
    lower = table[["snr_db", "block_snr_db"]].min(axis=1)
    columns = {"SNR": table.snr_db, "block SNR": table.block_snr_db, "lower SNR": lower}
    loss = {name: v.groupby(table.site).transform("max") - v for name, v in columns.items()}
    loss["larger loss"] = np.maximum(loss["SNR"], loss["block SNR"])
    return table.assign(**loss)


def amax_ratio(run: Run, cross: pd.DataFrame) -> pd.DataFrame:
    """``cross_matrix`` with a column amax_ratio: calibration pool's amax over the test pool's."""
    pools = {
        (mix, pool): t.groupby("site", observed=True).amax.max()
        for mix in run.mixes
        for pool, t in run.sequences(mix).groupby("pool", observed=True)
    }
    ratio = [pools[row.calibration, "calibration"][row.site] / pools[row.test, "test"][row.site]
             for row in cross.itertuples()]  # fmt: skip
    return cross.assign(amax_ratio=ratio)
