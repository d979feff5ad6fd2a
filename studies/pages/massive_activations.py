# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Massive activations: which sites and tokens hold them, when calibration sees them, what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nvfp4_utils.histogram import Marginals
from nvfp4_utils.quantize import E4M3_NORMAL_RANGE
from nvfp4_utils.sites import SITES, kind_of
from studies.runs.store import Run
from studies.runs.subsets import doublings, seen_law

from . import plots, regimes

FACTOR = 32.0  # times the median token's amax, from which a site's amax counts as massive
RUNS = {"smollm2": "smollm2", "gemma3": "gemma3", "reference": ""}
ANCHORS = {"smallest": None, "p0.1": 0.1, "p1": 1.0}  # block amax at the lower end of the window
CLIPPER = "p99.99"  # the percentile that is also stored for one kind of site at a time
GREYS = ("#000000", "#444444", "#777777", "#999999", "#bbbbbb")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)))


def stored_runs() -> dict[str, Run]:
    """The stored run of each model."""
    return {model: Run(name) for model, name in RUNS.items()}


def room(m: Marginals, percentile: float | None) -> float:
    """Octaves from the amax up to 28672 times the smallest nonzero block amax, or its percentile."""
    end = regimes.safe_window(m)[1]
    if percentile is not None:
        end = E4M3_NORMAL_RANGE * m.block_amax_percentile(percentile, above=0.0)
    return float(np.log2(end / m.amax))


def site_table(run: Run, factor: float = FACTOR) -> pd.DataFrame:
    """A row per site of the first mix's calibration pool.

    amax; over_rms, over_block (the 99.99th percentile of nonzero ones), over_token (median over
    sequences of the median token): the amax over each; next: largest over next token, median; first:
    share of sequences whose largest token is at position 0; massive; room by ``ANCHORS``, octaves.
    """
    rows = {}
    for site, tokens in run.tokens(run.featured_mix).groupby("site", observed=True, sort=False):
        m = run.marginals(run.featured_mix, str(site))
        rows[str(site)] = {
            "amax": m.amax,
            "over_rms": m.amax / math.sqrt(m.signal_power),
            "over_block": m.amax / m.block_amax_percentile(99.99, above=0.0),
            "over_token": m.amax / tokens.median_amax.median(),
            "next": (tokens.amax / tokens.next_amax).median(),
            "first": (tokens.position == 0).mean(),
        } | {name: room(m, p) for name, p in ANCHORS.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(massive=table.over_token >= factor)


def site_tables(runs: Mapping[str, Run], factor: float = FACTOR) -> dict[str, pd.DataFrame]:
    """``site_table`` of each model."""
    return {model: site_table(run, factor) for model, run in runs.items()}


def massive_sites(table: pd.DataFrame) -> list[str]:
    """The sites with massive activations, the most extreme first."""
    return table[table.massive].sort_values("over_token", ascending=False).index.tolist()


def tokens_at(run: Run, site: str) -> pd.DataFrame:
    """The largest token of every calibration sequence at one site."""
    tokens = run.tokens(run.featured_mix)
    return tokens[tokens.site == site]


def check(runs: Mapping[str, Run]) -> int:
    """Compare the largest token with the pool's amax and with the amax policy; how many sites agree.

    Raises
    ------
    ValueError
        If one differs at any site.
    """
    for model, run in runs.items():
        tokens = run.tokens(run.featured_mix).groupby("site", observed=True).amax.max()
        policies = run.policies(run.featured_mix).query("policy == 'amax'").set_index("site")
        for site, amax in tokens.items():
            known = run.marginals(run.featured_mix, str(site)).amax, policies.calibrated_amax[site]
            if known != (amax, amax):
                raise ValueError(
                    f"{model} {site}: largest token {amax}, pool and policy {known}; expected equal."
                )
    return sum(len(run.policies(run.featured_mix).site.unique()) for run in runs.values())


def seen_table(run: Run, sites: list[str]) -> dict[str, pd.DataFrame]:
    """``seen_law`` of each site over the calibration pool."""
    found = {site: tokens_at(run, site).amax.to_numpy() for site in sites}
    return {site: seen_law(a, doublings(len(a))) for site, a in found.items()}


def piece_table(run: Run, site: str, top: int = 6) -> pd.DataFrame:
    """By vocabulary piece at position 0: sequences, and the median amax there."""
    first = tokens_at(run, site)
    first = first[first.position == 0]
    by_piece = first.groupby("token", observed=True).first_amax.agg(["size", "median"])
    by_piece = by_piece[by_piece["size"] > 0].sort_values("size", ascending=False).head(top)
    by_piece.index = [repr(piece) for piece in by_piece.index]
    return by_piece.rename(columns={"size": "sequences", "median": "median amax"})


def token_table(run: Run, sites: list[str]) -> pd.DataFrame:
    """At each massive site: medians over sequences of the largest, next and median token's amax."""
    rows = {}
    for site in sites:
        t = tokens_at(run, site)
        rows[site] = {
            "amax of the pool": t.amax.max(),
            "largest token": t.amax.median(),
            "next token": t.next_amax.median(),
            "median token": t.median_amax.median(),
            "at position 0 (%)": 100 * (t.position == 0).mean(),
            "pieces there": t[t.position == 0].token.nunique(),
            "channels": t.channel.nunique(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def over_amax(run: Run) -> pd.DataFrame:
    """Calibrated amax over the pool's amax: a row per site, a column per policy."""
    table = run.policies(run.featured_mix)
    wide = table.pivot_table(index="site", columns="policy", values="calibrated_amax", observed=True)
    return wide.div(wide["amax"], axis=0)[[p for p in plots.POLICY_STYLE if p in wide]]


def clip_table(runs: Mapping[str, Run], run: Run, sites: list[str]) -> pd.DataFrame:
    """By policy: its range over the massive sites, and the share of each model's sites it clips.

    To clip is to calibrate below the pool's own largest value.
    """
    ratio = over_amax(run).loc[sites]
    table = pd.DataFrame({"lowest / amax": ratio.min(), "highest / amax": ratio.max()})
    table["massive sites clipped"] = [f"{n} of {len(sites)}" for n in (ratio < 1).sum()]
    for model, each in runs.items():
        table[f"{model}: sites clipped (%)"] = 100 * (over_amax(each) < 1).mean()
    return table


def kl_at(run: Run, policy: str, only: str = "") -> float:
    """Mean KL of the model on the first mix's test pool, calibrated on it (flush, bf16 weights)."""
    t = run.end_to_end()
    t = t[(t.test == run.featured_mix) & (t.calibration == run.featured_mix) & (t.policy == policy)]
    t = t[(t.underflow == "flush") & (t.weights == "bf16") & (t.only == only)]
    return float(t.kl.iloc[0])


def clipping_costs(runs: Mapping[str, Run]) -> pd.DataFrame:
    """KL with amax, the clipping percentile and headroom, whole and down_proj inputs only."""
    rows = {
        (model, only or "all sites"): {p: kl_at(run, p, only) for p in ("amax", CLIPPER, "headroom")}
        for model, run in runs.items()
        for only in ("", "down_proj_input")
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(**{f"{CLIPPER} / amax": table[CLIPPER] / table["amax"]})


def octave_costs(run: Run) -> pd.DataFrame:
    """KL with one site quantized: a row per site, a column per octaves that its amax is moved by."""
    t = run.single_sites()
    octaves = t.policy.astype(str).str.removeprefix("x2^").astype(float)
    return t.assign(octaves=octaves).pivot_table(
        index="only", columns="octaves", values="kl", observed=True
    )


def window_table(runs: Mapping[str, Run], tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Sites where no amax keeps every block normal: room, and KL against the median of their kind.

    Room in octaves by ``ANCHORS``. KL with that site alone quantized, at its amax and with it moved.
    """
    rows = {}
    for model, run in runs.items():
        costs = octave_costs(run)
        kinds = costs.groupby(costs.index.map(kind_of))[0.0].median()
        for site, row in tables[model].query("smallest < 0").sort_values("smallest").iterrows():
            of = costs.loc[site]
            rows[model, site] = {
                "massive": "yes" if row.massive else "no", **row[list(ANCHORS)],
                "KL at amax": of[0.0], "median of the kind": kinds[kind_of(str(site))],
                **{f"KL at {k:+g}": of[k] for k in (-1.0, 4.0, 8.0, 12.0)},
            }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def layout_octaves(run: Run) -> pd.DataFrame:
    """Octaves between each layout's amax and that of packed sequences: a row per site."""
    table = run.layouts()
    wide = table[table.policy == "amax"].pivot_table(
        index="site", columns="layout", values="calibrated_amax", observed=True
    )
    base = str(table.layout.iloc[0])
    return np.log2(wide.div(wide[base], axis=0)).drop(columns=base)


def layout_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """By model and layout: the spread of ``layout_octaves``, and how many sites move by a quarter."""
    rows = {}
    for model, run in runs.items():
        for layout, octaves in layout_octaves(run).items():
            rows[model, layout] = {
                "lowest": octaves.min(), "median": octaves.median(), "highest": octaves.max(),
                "at": octaves.abs().idxmax(),
                "sites moved by 1/4": f"{(octaves.abs() > 0.25).sum()} of {len(octaves)}",
            }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_sites(tables: Mapping[str, pd.DataFrame], factor: float) -> plt.Figure:
    """Amax over the median token's, by layer; a marker per kind of site, massive ones in black."""
    fig, axes = plt.subplots(1, len(tables), figsize=(8.2, 3.6), sharey=True, squeeze=False)
    markers = dict(zip(SITES, "^svo", strict=True))
    for ax, (model, table) in zip(axes.flat, tables.items(), strict=True):
        layer = table.index.str.extract(r"\.(\d+)\.")[0].astype(int).to_numpy()
        for kind, marker in markers.items():
            one = table.index.map(kind_of) == kind
            color = np.where(table.massive[one], "#000000", "#999999")
            ax.scatter(layer[one], table.over_token[one], s=16, c=color, marker=marker, label=kind)
        ax.axhline(factor, color="k", lw=0.8, ls=":")
        ax.set_title(model)
        ax.set_xlabel("layer")
    axes.flat[0].set_yscale("log", base=2)
    axes.flat[0].set_ylabel("amax / median token's amax (log2)")
    axes.flat[-1].legend(fontsize=8)
    return fig


def draw_seen(seen: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """Expected share of the pool's amax, and the probability of a near one, by sequences."""
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.4), sharey=True, sharex=True)
    for (site, law), color, dashes in zip(seen.items(), 2 * GREYS, 2 * DASHES, strict=False):
        look = {"color": color, "linestyle": dashes}
        axes[0].plot(law.n, law.share, marker="o", ms=3, label=site, **look)
        axes[1].plot(law.n, law.probability, marker="o", ms=3, label=site, **look)
    axes[0].set_title("expected share of the pool's amax")
    axes[1].set_title("probability of a sequence within 10 %")
    axes[0].set_xscale("log", base=2)
    axes[0].set_ylim(0, 1.05)
    axes[0].legend(fontsize=8)
    for ax in axes:
        ax.set_xlabel("calibration sequences")
    return fig


def answer(runs: Mapping[str, Run], factor: float = FACTOR) -> str:
    """The page's answer, simple HTML."""
    tables = site_tables(runs, factor)
    model = max(tables, key=lambda name: tables[name].over_token.max())
    sites = massive_sites(tables[model])
    if not sites:
        return (
            f"<strong>None here: no amax of {sum(map(len, tables.values()))} sites is {factor:g} times "
            "that of the median token.</strong>"
        )
    others = sum(len(massive_sites(t)) for name, t in tables.items() if name != model)
    kinds = " and ".join(sorted({kind_of(site) for site in sites}))
    first = tables[model]["first"][sites].min()
    costs = clipping_costs(runs)[f"{CLIPPER} / amax"]
    return (
        f"<strong>In {model} at {len(sites)} of {len(tables[model])} sites, all {kinds}, at the first "
        f"position of at least {first:.0%} of the sequences, whatever token stands there; the other "
        f"models have {others or 'none'}.</strong> They set the amax, and clipping them is what hurts: "
        f"{CLIPPER} in place of amax at every down_proj input multiplies the KL of {model} by "
        f"{costs[model, 'down_proj_input']:.0f}."
    )


def reconciliation(tables: Mapping[str, pd.DataFrame], seen: Mapping[str, pd.DataFrame]) -> str:
    """What the prediction got right and wrong, Markdown."""
    one = [law.share.iloc[0] for law in seen.values()]
    closed = {m: t[t.smallest < 0] for m, t in tables.items()}
    counts = [f"{len(t)} in {m}, {int(t.massive.sum())} of them massive" for m, t in closed.items()]
    shown = f"{min(one):.0%} to {max(one):.0%}" if one else "nothing"
    return (
        f"Beside the prediction: one random sequence shows on average {shown} of the pool's amax. "
        f"Sites without a window: {'; '.join(counts)}. A closed window need not come from large values; "
        "a few nearly empty blocks close it as well."
    )


def advice(windows: pd.DataFrame) -> str:
    """What to do at sites without a window, from ``window_table``; Markdown."""
    if windows.empty:
        return "Every site has a window."
    base = windows["KL at amax"]
    beside = (base / windows["median of the kind"]).median()
    times = {k: (windows[f"KL at {k}"] / base).median() for k in ("-1", "+4", "+8", "+12")}
    keep = min(times, key=lambda k: times[k] if times[k] < 0.9 else math.inf)
    verdict = f"Move the amax by {keep} octaves" if times[keep] < 0.9 else "Keep the amax there"
    return (
        f"**{verdict}.** At amax such a site costs {beside:.2f} times what its kind does (median), so "
        f"the model hardly notices the blocks outside. One octave down it costs {times['-1']:.2f} "
        f"times as much, 4, 8 and 12 octaves up {times['+4']:.2f}, {times['+8']:.2f} and "
        f"{times['+12']:.1f} times. With the 1st percentile of block amaxes as the lower end, "
        f"{(windows.p1 < 0).sum()} of {len(windows)} windows stay closed."
    )


def layout_prose(run: Run, seen: Mapping[str, pd.DataFrame]) -> str:
    """How far layouts move the massive sites, and what fewer sequences explain of it; Markdown."""
    if not seen:
        return ""
    sizes = run.layouts().groupby("layout", observed=True).sequences.first()
    parts = []
    for name, octaves in layout_octaves(run).loc[list(seen)].items():
        site, n = octaves.abs().idxmax(), int(sizes[name])
        expected = np.log2(seen_law(tokens_at(run, site).amax.to_numpy(), [n]).share.iloc[0])
        parts.append(f"{name} ({n} sequences) {octaves[site]:+.2f} at {site} ({expected:+.2f})")
    return (
        "The largest move of a massive site, in octaves, and in brackets what the law expects of that "
        f"many sequences of the pool: {'; '.join(parts)}. Longer sequences are fewer, so fewer first "
        "tokens are seen."
    )
