# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The book's three answers, for its first page and the README, computed from stored results.

    python -m studies.pages.index

rewrites the results block and the figure of README.md.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nvfp4_utils.quantize import UNDERFLOWS
from studies import ROOT
from studies.runs import synthetic
from studies.runs.store import Run

from . import models, plots, q1_more_calibration, regimes, snr_tables

README = ROOT / "README.md"
FIGURE = ROOT / "book" / "_static" / "headline.svg"
MARKERS = "<!-- results: python -m studies.pages.index -->", "<!-- end of results -->"


@lru_cache(maxsize=4)
def numbers(name: str = "") -> dict[str, Any]:
    """Every number the headline uses, from run ``name`` and the stored synthetic table."""
    run = Run(name)
    mix = run.featured_mix
    sizes = snr_tables.size_curves(run, mix, "flush")
    eight = sizes[sizes.n == 8].set_index("site").snr_db
    whole = sizes.groupby("site", sort=False).snr_db.last()
    gaps = {u: snr_tables.policy_snr(run, mix, u) for u in ("flush", "floor")}
    mean = {u: g.groupby("policy", observed=True).gap_db.mean() for u, g in gaps.items()}
    flush = gaps["flush"]
    foreign = {}
    for policy in ("amax", "headroom"):
        for convention in ("flush", "floor"):
            cross = snr_tables.cross_matrix(run, policy, convention)
            foreign[policy, convention] = cross[cross.calibration != cross.test].loss_db
    spike = synthetic.stored_table()
    spike = spike[spike.distribution == "rare_giant_spike"]
    head = snr_tables.paired_difference(run, mix, "amax", "headroom", "flush")
    four = {u: snr_tables.paired_difference(run, mix, "amax", "four-over-six", u) for u in UNDERFLOWS}
    searched = {u: snr_tables.paired_difference(run, mix, "amax", "mse", u) for u in UNDERFLOWS}
    harm = q1_more_calibration.harm_table(run, mix, "flush")
    window = [np.log2(np.divide(*regimes.safe_window(run.marginals(mix, s))[::-1])) for s in run.sites]
    return {
        "sites": len(run.sites),
        "mix": mix,
        "model": run.model_name,
        "test": run.test_sequences(mix),
        "pool": int(sizes.n.max()),
        "eight_mean": float((eight - whole).mean()),
        "eight_worst": float((eight - whole).min()),
        "eight_sites": int((whole - eight > 0.1).sum()),
        "spike_floor": float(np.ptp(spike.snr_db_floor)),
        "spike_flush": float(np.ptp(spike.snr_db_flush)),
        "amax_flush": mean["flush"]["amax"],
        "amax_floor": mean["floor"]["amax"],
        "amax_worst": float(flush[flush.policy == "amax"].gap_db.max()),
        "headroom": mean["flush"]["headroom"],
        "headroom_gain": head["mean"],
        "headroom_low": head["low"],
        "headroom_high": head["high"],
        "four": min(four[u]["mean"] for u in UNDERFLOWS),
        "four_sites": min(four[u]["better"] for u in UNDERFLOWS),
        "searched": max(searched[u]["mean"] for u in UNDERFLOWS),
        "harm_octaves": float(harm.octaves.min()),
        "closed": int((np.array(window) < 0).sum()),
        "p99.99": mean["flush"]["p99.99"],
        "p99.99_worst": float(flush[flush.policy == "p99.99"].gap_db.max()),
        "mixes": len(run.mixes),
        "cross": foreign,
        "cross_large": float((foreign["amax", "flush"] > 0.1).mean()),
        "cross_worst": {
            p: max(foreign[p, u].max() for u in ("flush", "floor")) for p in ("amax", "headroom")
        },
    }


def sentences(name: str = "") -> list[str]:
    """The three answers, one sentence each, simple HTML."""
    n = numbers(name)
    worst = n["cross_worst"]
    if n["mixes"] < 2:
        outside = third = "this run holds one mix, so it cannot say"
        verdict = "Unknown"
    else:
        outside = (
            f"calibrated on another dataset, the worst site loses {worst['amax']:.1f} dB with amax and "
            f"{worst['headroom']:.2f} dB with headroom"
        )
        third = (
            f"over {len(n['cross']['amax', 'flush'])} combinations of site, calibration set and "
            f"foreign test set, amax loses more than 0.1 dB in {n['cross_large']:.1%}, and up to "
            f"{worst['amax']:.1f} dB; headroom loses at most {worst['headroom']:.2f} dB in any"
        )
        verdict = "At some sites, with amax" if worst["amax"] > 0.1 else "Little"
        if worst["amax"] > 0.1 > worst["headroom"]:
            verdict = "With amax, badly at a few sites; with headroom, no"
    return [
        "<strong>Does more calibration always help? "
        f"{'On average no, at a few sites yes' if n['eight_sites'] else 'No'}.</strong> "
        f"Eight sequences come within {abs(n['eight_mean']):.3f} dB of all {n['pool']} on average "
        f"over {n['sites']} sites; {n['eight_sites']} sites lose more than 0.1 dB (worst "
        f"{n['eight_worst']:+.2f} dB). More can also hurt: one freak value in a larger set costs "
        f"{n['spike_floor']:.1f} dB in the reference path and "
        f"{n['spike_flush']:.1f} dB in a kernel that flushes.",
        "<strong>Should it always come from amax? "
        f"{'No' if worst['amax'] > 0.1 > worst['headroom'] else 'It may'}.</strong> On the "
        f"distribution it was calibrated on, amax is {n['amax_flush']:.3f} dB (flush) and "
        f"{n['amax_floor']:.3f} dB (floor) from the oracle on average, worst site "
        f"{n['amax_worst']:.2f} dB; headroom changes that by {n['headroom_gain']:+.3f} dB "
        f"[{n['headroom_low']:+.3f}, {n['headroom_high']:+.3f}]; {outside}. Clipping at p99.99 is "
        f"{n['p99.99']:.2f} dB from the oracle on average, worst site {n['p99.99_worst']:.1f} dB. "
        f"The best scale that a search finds gains {n['searched']:.3f} dB on amax; another quantizer, "
        f"four-over-six, gains {n['four']:.2f} dB, under either convention.",
        f"<strong>Does the dataset matter? {verdict}.</strong> Scored on held-out text, {third}.",
    ]


def advice(name: str = "") -> str:
    """What to set, Markdown, with the numbers that support it."""
    n = numbers(name)
    worst = n["cross_worst"]
    elsewhere = ""
    if n["mixes"] > 1:
        elsewhere = (
            f", and at most {worst['headroom']:.2f} dB lost on any other text, where amax loses up to "
            f"{worst['amax']:.1f} dB"
        )
    points = (
        "**Use the room above.** Amax sits at the lower end of that window: whatever lies beyond it "
        "saturates. `headroom` places the scale octaves higher. Measured: "
        f"{n['headroom_gain']:+.3f} dB on the text it was calibrated on{elsewhere}.",
        f"**Do not fear the upper end.** At {n['closed']} of {n['sites']} sites some nearly empty block "
        "closes the window, but the first measurable harm (0.1 dB) begins "
        f"{n['harm_octaves']:.1f} octaves above the amax or later. Look at "
        "`block_amax_percentile(1, above=0)`, not at the smallest block.",
        "**If you must use amax,** calibrate on many sequences of the text you will serve, attention "
        "outputs (`o_proj_input`) above all: with eight sequences the worst site loses "
        f"{-n['eight_worst']:.1f} dB. Look for freak values: a kernel flushes everything far below "
        "them.",
        f"**Do not clip by element percentile:** p99.99 loses up to {n['p99.99_worst']:.1f} dB.",
        f"**To gain more than {n['searched']:.2f} dB, change the quantizer, not the scale:** "
        f"four-over-six gains {n['four']:.2f} dB on average, at {n['four_sites']} of {n['sites']} "
        "sites.",
    )
    return "\n".join(f"- {point}" for point in points)


def scope(name: str = "") -> str:
    """What the numbers are measured on."""
    n = numbers(name)
    about = ""
    if Run(name).info["model"] == str(models.MODEL.relative_to(ROOT)):
        size = models.read_json("training.json")["parameters"] / 1e6
        about = f" ({size:.1f}M parameters, Qwen3.5 architecture, trained for this book)"
    return (
        f"Scope: {n['sites']} sites (every linear layer's input) of the {n['model']}{about}, "
        f"mix {n['mix']}, "
        f"{n['test']} test sequences of 512 tokens, float32 output; the spike is synthetic, N(0, 1). "
        "Accuracy on tasks and models of "
        "billions of parameters are not measured here."
    )


def figure(name: str = "") -> tuple[plt.Figure, str, str]:
    """SNR against calibrated amax at one site, with every policy's place: figure, caption, alt."""
    run = Run(name)
    site, mix = run.featured[-1], run.featured_mix
    curve = run.curve(mix, site)
    power = run.marginals(mix, site, "test").signal_power
    fig, ax = plt.subplots(figsize=(7.2, 3.8))
    for convention, style in plots.UNDERFLOW_STYLE.items():
        snr = snr_tables.db(power / curve[f"mse_{convention}"])
        ax.plot(curve.calibrated_amax, snr, color=style.color, ls=style.linestyle, lw=1.2,
                label=style.label)  # fmt: skip
    landed = regimes.policies_at(run, mix, site, "flush")
    for row in landed.itertuples():
        style = plots.POLICY_STYLE[row.policy]
        ax.plot(row.calibrated_amax, row.snr_db, style.marker, color=style.color, ms=7, mec="k",
                mew=0.5, ls="", label=style.label)  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("calibrated amax = 2688 x input_scale (log2 axis)")
    ax.set_ylabel("test SNR (dB)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    by_policy = landed.set_index("policy").snr_db
    caption = (
        f"<strong>A plateau many octaves wide: amax reaches {by_policy['amax']:.2f} dB of the oracle's "
        f"{by_policy['oracle']:.2f} dB, clipping at p99.9 {by_policy['p99.9']:.2f} dB.</strong> {site}, "
        f"{mix}, {run.test_sequences(mix)} test sequences; lines are exact, not fitted."
    )
    alt = (
        "SNR rises steeply with the calibrated amax, stays flat over many octaves, and falls where "
        f"block scales underflow; amax lies on the plateau at {by_policy['amax']:.1f} dB, the lower "
        "percentiles on the rising edge."
    )
    return fig, caption, alt


def readme_block(name: str = "") -> str:
    """The results block of README.md, Markdown."""
    lines = [re.sub(r"</?strong>", "**", s) for s in sentences(name)]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)) + f"\n\n{scope(name)}"


def main() -> None:
    plots.use_style()
    begin, end = MARKERS
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n{readme_block()}\n{end}{after}")
    fig, _, _ = figure()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
