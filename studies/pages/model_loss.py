# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the activation scales do to the model: cliffs along the scale, policies, kinds of site, ceilings.

KL is the mean over tokens of ``sum p log(p / q)`` in nats, ``p`` the unquantized model's distribution of
the next token and ``q`` the quantized one's. A change is in percent of the KL that the amax of the
test mix's own calibration gives. Octaves count doublings of every site's amax.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from studies.runs.scoring import resamples
from studies.runs.store import Run

from .loss_tables import sequence_kl, sweep, value
from .plots import POLICY_STYLE, model_label

PLATEAU = 4  # octaves above the amax, over which the plateau is taken
TICKS = (-10, -2, 0, 2, 10, 100, 1000)  # of a change in percent
LEVELS = (0.01, 0.1, 1.0)  # excess over the plateau
CLIPPING = ("p99", "p99.9", "p99.99", "p99.999")
MARGINS = ("x2^1", "x2^2", "x2^3", "x2^4", "x2^6")
QUANTIZERS = ("four-over-six",)  # of another kind than one scale a tensor
LONG_POLICIES = ("amax", "x2^1", "headroom", "raised", "mse", "p99.999")
HALF = "amax of half"
CEILINGS = ("amax", "oracle", "dynamic per sequence", "dynamic per token", "four-over-six")


def short(run: Run) -> str:
    """A model's name for panels and tables."""
    return model_label(run.model_name)


def check(run: Run) -> None:
    """Known answers: untouched activations have KL 0, and a scale times 1 is the amax policy.

    Below the amax the conventions must agree within a hundredth of the plateau: the rare blocks that
    underflow there do so for any usable scale.

    Raises ValueError if either is false.
    """
    curve = sweep(run)
    if (kl := value(run, "none")) != 0:
        raise ValueError(f"unquantized KL of {run.name} is {kl}; expected exactly 0.")
    if (kl := value(run, "amax")) != curve.kl[0]:
        raise ValueError(f"KL of {run.name} at x2^0 is {curve.kl[0]}; expected the amax's, {kl}.")
    apart = (curve.kl - sweep(run, "floor").kl)[curve.index < 0].abs().max()
    if apart > 0.01 * plateau(curve):
        raise ValueError(f"flush and floor of {run.name} differ by {apart} below the amax; expected 0.")


def plateau(curve: pd.DataFrame, octaves: float = PLATEAU) -> float:
    """The median KL from the amax to ``octaves`` above it."""
    return float(curve.kl[(curve.index >= 0) & (curve.index <= octaves)].median())


def _crossing(octaves: np.ndarray, kl: np.ndarray, target: float) -> float:
    """Where KL last rises through the target, going outward, by log KL; NaN if it ends below it."""
    under = np.flatnonzero(kl <= target)
    if not len(under) or under[-1] == len(kl) - 1:
        return float("nan")
    i = under[-1]
    return float(np.interp(np.log(target), np.log(kl[i : i + 2]), octaves[i : i + 2]))


def reaches(curve: pd.DataFrame, kl: float, side: int) -> float:
    """Octaves from the amax where KL reaches a value, below (``side`` -1) or above (+1) the plateau."""
    part = curve[curve.index <= PLATEAU][::-1] if side < 0 else curve[curve.index >= 0]
    return _crossing(part.index.to_numpy(), part.kl.to_numpy(float), kl)


def break_even(curve: pd.DataFrame, below: float) -> float:
    """Octaves too high that cost as much as ``below`` octaves too low."""
    return reaches(curve, float(curve.kl[-below]), +1)


def cliffs(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per model and convention: plateau, octaves of each level on each side, break-even."""
    rows = {}
    for run in runs:
        for underflow in ("flush", "floor"):
            curve = sweep(run, underflow)
            flat = plateau(curve)
            row = {"plateau": flat}
            for name, side in (("below", -1), ("above", +1)):
                row |= {f"{name} +{e:.0%}": reaches(curve, (1 + e) * flat, side) for e in LEVELS}
            row |= {f"as dear as {b:g} low": break_even(curve, b) for b in (0.5, 1.0)}
            rows[short(run), underflow] = row
    return pd.DataFrame(rows).T


def first_leaving(run: Run, share: float = 0.01, sites: float = 0.5) -> float:
    """The first octave of the sweep at which over ``share`` of the blocks have left the normal range.

    At a site these are blocks with a subnormal scale or none; ``sites``: the quantile over sites.
    """
    table = run.metrics(run.featured_mix).astype({"policy": str})
    table = table[table.policy.str.startswith("x2^") & (table.underflow == "flush")]
    octaves = table.policy.str.removeprefix("x2^").astype(float)
    gone = (table.subnormal + table.underflowed).groupby([table.site.astype(str), octaves]).first()
    at = (gone.unstack(0) > share).quantile(1 - sites, axis=1, interpolation="lower")
    return float(at[at > 0].index.min())


def changes(run: Run, tests: Sequence[str] = ()) -> pd.DataFrame:
    """Change of KL against the amax of the test's own calibration, in percent.

    Rows (test, calibration, policy); column 0 is the measured change, the others bootstrap draws over
    sequences, the same sequences for both.
    """
    parts = []
    for seed, test in enumerate(tests or run.mixes):
        table = sequence_kl(run, test)
        weights = resamples(len(table), seed=seed)
        sums = np.vstack([np.ones(len(table)), weights]) @ table.to_numpy()
        amax = sums[:, [table.columns.get_loc((test, "amax"))]]
        parts.append(pd.DataFrame(100 * (sums / amax - 1).T, index=table.columns))
    return pd.concat(parts, keys=tests or run.mixes, names=["test"])


def interval(draws) -> list[float]:
    """The 95 % interval of bootstrap draws."""
    return np.quantile(np.asarray(draws, float), (0.025, 0.975)).tolist()


def policy_table(run: Run, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per policy: change of KL, own calibration and foreign ones, and the KL itself.

    Columns: kl (own, mean over test mixes), own, own_low, own_high, foreign, foreign_low,
    foreign_high, worst, worst_low, worst_high, worst_pair. ``table``: what ``changes`` gives.
    """
    table = changes(run) if table is None else table
    test, calibration = (table.index.get_level_values(n) for n in ("test", "calibration"))
    kl = pd.DataFrame([sequence_kl(run, t)[t].mean() for t in run.mixes]).mean()
    rows: dict[str, dict] = {}
    for policy in [p for p in (*POLICY_STYLE, *MARGINS) if p in kl]:
        of = table.index.get_level_values("policy") == policy
        own, foreign = table[of & (calibration == test)], table[of & (calibration != test)]
        draws, row = {"own": own.mean(), "foreign": foreign.mean()}, {"kl": kl[policy]}
        if len(foreign):
            worst = foreign[0].idxmax()
            draws["worst"], row["worst_pair"] = foreign.loc[worst], f"{worst[1]} on {worst[0]}"
        for name, values in draws.items():
            low, high = interval(values[1:])
            row |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
        rows[policy] = row
    return pd.DataFrame(rows).T


def noise_floor(table: pd.DataFrame) -> dict[str, float]:
    """Spread of calibrations of equal merit, the amax of random halves, in percent of KL.

    ``pair``: largest change to the amax at one test mix; ``mean``: largest of the means over tests;
    ``draws``: how many halves. ``table``: what ``changes`` gives.
    """
    policy = table.index.get_level_values("policy")
    halves = table[policy.str.startswith(HALF)][0]
    means = halves.groupby("policy").mean()
    return {"pair": float(halves.abs().max()), "mean": float(means.abs().max()), "draws": len(means)}


def policy_text(table: pd.DataFrame) -> pd.DataFrame:
    """``policy_table`` for the page: each change with its 95 % interval in one cell."""
    text = {}
    for policy, row in table.iterrows():
        label = POLICY_STYLE[str(policy)].label if policy in POLICY_STYLE else f"amax {policy[1:]}"
        text[label] = {"KL, own (nats)": f"{row.kl:.4f}"}
        for name in ("own", "foreign", "worst"):
            cell = f"{row[name]:+.1f} [{row[f'{name}_low']:+.1f}, {row[f'{name}_high']:+.1f}]"
            text[label][f"{name} (%)"] = "–" if pd.isna(row[name]) else cell
        text[label]["worst pair"] = "–" if pd.isna(row.worst) else row.worst_pair
    return pd.DataFrame(text).T


def beyond_noise(table: pd.DataFrame, floor: float) -> list[str]:
    """Policies that clip nothing on purpose whose own change lies beyond the noise, and is no chance."""
    rows = table.drop([*CLIPPING, *QUANTIZERS, *MARGINS], errors="ignore")
    rows = rows[["own", "own_low", "own_high"]].astype(float)
    real = (rows.own.abs() > floor) & (rows.own_low * rows.own_high > 0)
    return [f"{POLICY_STYLE[str(p)].label} {v:+.1f} %" for p, v in rows.own[real].items()]


def best_foreign(table: pd.DataFrame) -> tuple[str, float]:
    """The calibrated policy whose worst foreign calibration costs least, and that change."""
    worst = table.worst.drop([p for p in MARGINS if p in table.index]).dropna().astype(float)
    return str(worst.idxmin()), float(worst.min())


def kinds_table(run: Run) -> pd.DataFrame:
    """KL with one kind of site quantized (rows), their sum and all at once, by policy."""
    policies = ("amax", "headroom", "p99.99", "x2^-2", "x2^3", "x2^14")
    one = {kind: {p: value(run, p, only=kind) for p in policies} for kind in run.kinds}
    table = pd.DataFrame(one).T
    table.loc["sum of kinds"] = table.sum()
    table.loc["all at once"] = [value(run, p) for p in policies]
    return table


def weights_table(run: Run) -> pd.Series:
    """KL of activations alone, weights alone, their sum and both, at the amax and the best quantizer."""
    a, w = value(run, "amax"), value(run, "none", weights="nvfp4")
    names = {"amax": "both", "headroom": "both, headroom", "four-over-six": "both, four-over-six"}
    both = {name: value(run, policy, weights="nvfp4") for policy, name in names.items()}
    return pd.Series({"activations": a, "weights": w, "sum": a + w} | both)


def ceilings(run: Run) -> pd.DataFrame:
    """What static scales are measured against: KL, change to the amax with interval, top-1, tail."""
    mix = run.featured_mix
    table = changes(run, [mix])
    rows = {}
    for policy in CEILINGS:
        label = mix if policy in ("amax", *QUANTIZERS) else "test"
        draws = table.loc[mix, label, policy].to_numpy()
        rows[policy] = {name: value(run, policy, name) for name in ("kl", "kl_p999", "top1", "nll")}
        rows[policy] |= dict(
            zip(("change", "low", "high"), (draws[0], *interval(draws[1:])), strict=True)
        )
    return pd.DataFrame(rows).T


def long_tests(run: Run) -> list[str]:
    """Tests of longer sequences, named after the featured mix and their length."""
    names = run.end_to_end().test.astype(str).unique()
    return [n for n in names if n.startswith(f"{run.featured_mix}, ")]


def long_table(run: Run) -> pd.DataFrame:
    """On each long test: change of KL from the amax of its own length, by calibration length."""
    rows = {}
    for test in long_tests(run):
        table = changes(run, [test]).loc[test]
        for policy in LONG_POLICIES:
            own, short_ = table.loc[test, policy], table.loc[run.featured_mix, policy]
            cells = (own[0], short_[0], *interval(short_[1:]))
            rows[short(run), test.rsplit(", ", 1)[1], policy] = cells
    return pd.DataFrame(rows, index=["own length", "short", "low", "high"]).T


def draw_sweeps(runs: Sequence[Run]) -> plt.Figure:
    """KL and the rise of NLL against octaves, a panel a model, a dash a convention."""
    fig, axes = plt.subplots(2, len(runs), figsize=(3.1 * len(runs), 5.6), sharex=True, sharey="row",
                             squeeze=False)  # fmt: skip
    for (top, bottom), run in zip(axes.T, runs, strict=True):
        for underflow, dash in (("flush", "-"), ("floor", "--")):
            curve = sweep(run, underflow)
            top.plot(curve.index, curve.kl, dash, color="k", marker=".", ms=4, label=underflow)
            top.fill_between(curve.index, curve.low, curve.high, color="k", alpha=0.15, lw=0)
            rise = curve.nll - value(run, "none", "nll")
            bottom.plot(curve.index, rise.where(rise > 0), dash, color="k", marker=".", ms=4)
        for ax in (top, bottom):
            ax.axvline(0, color="#0072B2", lw=0.8)
            ax.set_yscale("log")
        top.set_title(short(run), fontsize=10)
        bottom.set(xlabel="octaves from the amax")
    for ax, label in zip(axes[:, 0], ("KL", "rise of NLL"), strict=True):
        ax.set(ylabel=f"{label} (nats per token)")
    axes[0, -1].legend(loc="upper center")
    return fig


def draw_policies(runs: Sequence[Run], tables: Sequence, floors: Sequence[dict]) -> plt.Figure:
    """Change of KL by policy, a panel a model: own calibration filled, worst foreign one open."""
    names = [p for p in POLICY_STYLE if p in tables[0].index]
    fig, axes = plt.subplots(1, len(runs), figsize=(3.1 * len(runs), 4.4), sharex=True, sharey=True,
                             squeeze=False)  # fmt: skip
    for ax, run, table, floor in zip(axes[0], runs, tables, floors, strict=True):
        ax.axvspan(-floor["mean"], floor["mean"], color="#cccccc", lw=0)
        for y, policy in enumerate(names):
            style, row = POLICY_STYLE[policy], table.loc[policy].drop("worst_pair").astype(float)
            ax.plot([row.own_low, row.own_high], [y, y], color=style.color, lw=2)
            ax.plot(row.own, y, style.marker, color=style.color, ms=6)
            ax.plot(row.worst, y, style.marker, color=style.color, ms=6, mfc="none")
        ax.axvline(0, color="k", lw=0.6)
        ax.set_xscale("symlog", linthresh=3, linscale=1.5)
        ax.set_xticks(TICKS, [str(t) for t in TICKS], fontsize=8)
        ax.set_title(short(run), fontsize=10)
        ax.set(xlabel="change of KL (%)", xlim=(-30, 2e4))
    axes[0, 0].set_yticks(range(len(names)), [POLICY_STYLE[p].label for p in names])
    axes[0, 0].invert_yaxis()
    return fig


def span(values: Sequence[float], style: str = ".1f") -> str:
    """The smallest and the largest of some numbers, or the one that they all are."""
    low, high = (f"{v:{style}}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def answer(runs: Sequence[Run]) -> str:
    """The verdict: which mistake is the dearer one, and by how many octaves."""
    curves = [sweep(run) for run in runs]
    even = [break_even(c, 1.0) for c in curves]
    room = [reaches(c, 1.1 * plateau(c), +1) for c in curves]
    even, room = ([np.inf if np.isnan(v) else v for v in part] for part in (even, room))
    if min(even) > 1:
        verdict = "It punishes a scale that is too low far more than one that is too high."
    elif max(even) < 1:
        verdict = "It punishes a scale that is too high more than one that is too low."
    else:
        verdict = "It depends on the model which side is the dangerous one."
    clipped = max(value(run, "p99.99") / value(run, "amax") for run in runs)
    return (
        f"<strong>{verdict}</strong> Raising every site's amax by {span(even)} octaves costs these "
        f"models as much as halving it, and up to {min(room):.1f} octaves above it the KL divergence "
        "from the unquantized model stays within a tenth of its plateau in all of them; the policy "
        f"p99.99, which clips on purpose, multiplies it by up to {clipped:.1f}. What would change "
        "this: a model whose smallest blocks carry more, or lie lower."
    )
