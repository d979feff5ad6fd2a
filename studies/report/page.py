# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What a report's page displays: first screen, figures, and tables with their captions."""

from __future__ import annotations

import html

import matplotlib.pyplot as plt
import numpy as np

from studies.pages import plots

from . import tables
from .rules import FACTOR, HARMLESS_DB
from .verdict import policy_means
from .words import (
    exceptions,
    kl_sentence,
    sureness,
    wanting_attention,
    with_interval,
    worst_site,
)


def first_screen(report: dict) -> None:
    """Display what to set, what it loses, what wants attention, and how sure that is."""
    of, count = report["recommendation"], len(report["sites"])
    grave = wanting_attention(report)
    default = f" {exceptions(report)}" if of["exceptions"] else ""
    plots.answer(
        f"<strong>Set `input_scale = {of['formula']}`</strong> (the policy <em>{of['policy']}</em>"
        f"{html.escape(default)}), because {html.escape(of['why'])}."
        "</p><ul>"
        f"<li><strong>Expected loss: {with_interval(of['loss_db'])}</strong> to the best scale of each "
        f"site, mean over {count} sites; amax would lose {with_interval(of['loss_db_amax'])}. The worst "
        f"site is {worst_site(report) or 'unknown'}.</li>"
        f"<li><strong>{len(grave)} of {count} sites need attention</strong>"
        f"{': ' + ', '.join(grave[:5]) + (' and more' if grave[5:] else '') if grave else ''}.</li>"
        f"<li><strong>{sureness(report).split(':')[0]}:</strong>{sureness(report).split(':', 1)[1]}</li>"
        f"</ul><p>{kl_sentence(report)}",
        title=f"What to set for {html.escape(report['model']['name'])}",
    )


def drawn_sites(report: dict, most: int) -> list[str]:
    """The first sites that want attention; without any, the first site."""
    return wanting_attention(report)[:most] or list(report["sites"])[:1]


def not_drawn(report: dict, most: int) -> str:
    """Which sites that want attention have no figure, in words."""
    left = [s for s in wanting_attention(report) if s not in drawn_sites(report, most)]
    if not left:
        return ""
    return (
        f"No figure here for {len(left)} more: {', '.join(left)}. Their numbers are in the table and in "
        "`report.json`."
    )


def losses_of_curve(site: dict, underflow: str) -> np.ndarray:
    """Yardstick along the curve: the larger loss of SNR and of block SNR to the best evaluated."""
    curve, found = site["curve"][underflow], []
    for name in ("snr_db", "block_snr_db"):
        values = np.array(curve[name], dtype=float)
        own = [p[underflow][name] for p in site["policies"].values()] + [site["oracle"][underflow][name]]
        found.append(np.nanmax([*values, *(v for v in own if v is not None)]) - values)
    return np.fmax(*found)


def site_figure(site: dict) -> plt.Figure:
    """Loss against the scale with every policy's place, and the amax against the number of sequences."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.8), width_ratios=[5, 2])
    octaves = np.array(site["curve"]["octaves"])
    top = max(
        3.0,
        *(p["flush"]["loss_db"] for p in site["policies"].values() if p["flush"]["loss_db"] is not None),
    )
    room = site["held_out_room_octaves"]
    left.axvspan(octaves[0], 0, color=plots.REGIME_COLORS["saturated"], lw=0)
    left.axvspan(max(room, 0), octaves[-1], color=plots.REGIME_COLORS["subnormal"], lw=0)
    for underflow, style in plots.UNDERFLOW_STYLE.items():
        left.plot(
            octaves,
            losses_of_curve(site, underflow),
            color=style.color,
            ls=style.linestyle,
            lw=1,
            label=style.label,
        )
    for name, policy in site["policies"].items():
        style = plots.POLICY_STYLE[name]
        x, y = policy["slack_low_octaves"], policy["flush"]["loss_db"]
        if y is not None:
            left.plot(
                x,
                y,
                style.marker,
                color=style.color,
                mec="k",
                mew=0.5,
                ms=8,
                ls="",
                label=f"{style.label} {y:.2f}",
            )
    left.axvline(np.log2(site["recommended_amax"] / site["held_out_amax"]), color="k", lw=1, ls=":")
    left.set_xlim(octaves[0], octaves[-1])
    left.set_ylim(-0.04 * min(top, 25), 1.08 * min(top, 25))
    left.set_xlabel("calibrated amax, octaves above the held-out amax")
    left.set_ylabel("loss to the best scale (dB)")
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="loss (dB), flush")
    law = site["growth"]
    if law:
        right.plot(law["sequences"], law["share"], "o-", color="k", ms=4)
        right.axhline(0.9, color="k", lw=0.8, ls=":")
        right.set_xscale("log", base=2)
        right.set_xticks(law["sequences"][::2], [str(n) for n in law["sequences"][::2]])
        right.minorticks_off()
        right.set_ylim(0, 1.05)
    right.set_xlabel("sequences")
    right.set_ylabel("share of the pool's amax")
    return fig


def show_sites(report: dict, most: int) -> None:
    """Display the sites that want attention, ``most`` of them; without any, the one that loses most."""
    if not wanting_attention(report):
        plots.prose("No site needs attention. The first of the table:")
    for label in drawn_sites(report, most):
        show_site(report, label)
    plots.prose(not_drawn(report, most))


def show_site(report: dict, label: str) -> None:
    """Display one site: its findings and its figure."""
    site = report["sites"][label]
    plots.prose(f"### {label}")
    if site["findings"]:
        plots.table(tables.site_findings_table(report, label), caption=_amaxes(site), wrap=True)
    if not site["curve"]:
        plots.prose("All of its held-out values are zero: there is no error to draw.")
        return
    loss, low, high = (
        with_interval(site["loss_db"]),
        site["slack_low_octaves"],
        site["slack_high_octaves"],
    )
    place = "" if low is None else f", {low:+.1f} octaves from saturation and {high:+.1f} from underflow"
    growth = site["growth"]
    enough = "no number of sequences was enough"
    if growth and growth["enough_at"]:
        enough = f"enough at {growth['enough_at']}"
    caption = (
        f"{label}: the recommended scale (dotted) loses {loss} to the best one{place}. Left: the larger"
        " of the losses of SNR and of block SNR on held-out text; shaded: saturation, and underflow,"
        " where blocks notice. Right: the expected share of the pool's amax in n of its sequences;"
        f" dotted: 90 %, {enough}."
    )
    plots.show(
        site_figure(site),
        caption=caption,
        alt=f"Loss against the scale at {label}: {loss} at the recommended scale{place}.",
    )


def _amaxes(site: dict) -> str:
    parts = [f"{n} {a:.4g}" for n, a in site["calibrated_amax"].items() if a is not None]
    return f"Calibrated amax: {', '.join(parts)}. Held-out amax {site['held_out_amax']:.4g}."


def overview_figure(report: dict) -> plt.Figure:
    """Loss of the recommendation and of amax at every site, by layer, a panel per kind."""
    kinds = list(dict.fromkeys(s["kind"] for s in report["sites"].values()))
    fig, axes = plt.subplots(1, len(kinds), figsize=(9.0, 3.0), sharey=True, squeeze=False)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        sites = [s for s in report["sites"].values() if s["kind"] == kind and s["loss_db"]]
        layers = [s["layer"] for s in sites] if all(s["layer"] is not None for s in sites) else None
        x = layers if layers else list(range(len(sites)))
        amax = plots.POLICY_STYLE["amax"]
        ax.plot(
            x,
            [(s["loss_db_amax"] or s["loss_db"])["value"] for s in sites],
            amax.marker,
            ms=4,
            ls="",
            color=amax.color,
            label="amax",
            mfc="none",
        )
        style = plots.POLICY_STYLE[report["recommendation"]["policy"]]
        value, low, high = (np.array([s["loss_db"][k] for s in sites]) for k in ("value", "low", "high"))
        ax.errorbar(
            x,
            value,
            yerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)],
            fmt=style.marker,
            ms=4,
            color=style.color,
            lw=1,
            label="recommended",
        )
        ax.axhline(HARMLESS_DB, color="k", lw=0.8, ls=":")
        ax.set_title(kind, fontsize=10)
        ax.set_xlabel("layer")
    axes.flat[0].set_ylabel("loss to the best scale (dB)")
    axes.flat[0].legend(fontsize=8)
    return fig


def method(report: dict) -> str:
    """How the numbers were made, Markdown."""
    text, seconds = report["text"], report["seconds"]
    forward = seconds["forward"]
    total = sum(s for name, s in seconds.items() if name != "forward")
    second = f" and on {text['foreign_sequences']} of {text['foreign']}" if text["foreign"] else ""
    return (
        f"Calibrated on {text['calibration_sequences']} sequences of {text['length']} tokens of"
        f" {text['calibration']}, scored on {text['held_out_sequences']} others of it{second}; no record"
        " is in both. Losses are in dB to the best scale of each site on the text that is scored, the"
        " larger of the loss of SNR and of the SNR that weights every block alike; under flush, as"
        " kernels do, unless floor is named, ModelOpt's reference. Brackets: 95 % intervals over"
        f" held-out sequences. Measuring took {total:.0f} s on {report['provenance']['device']}, of"
        f" which {forward:.0f} s is what a plain forward of"
        f" {text['calibration_sequences'] + text['held_out_sequences']} sequences takes."
    )


def findings_caption(report: dict) -> str:
    """How many findings there are."""
    return (
        f"{len(report['findings'])} findings that are not of one site. Each states the rule by which it"
        " fired."
    )


def policy_caption(report: dict) -> str:
    """What the table of policies says first."""
    means = policy_means(report["sites"])
    best = min(means, key=means.__getitem__) if means else "none"
    return (
        f"{best} loses least on the mean of the sites. Loss: to each site's best scale, flush; floor:"
        " ModelOpt's reference. Saturated and flushed: the largest share of the nonzero blocks at any"
        " site."
    )


def site_caption(report: dict) -> str:
    """How to read the table of sites."""
    return (
        f"{len(wanting_attention(report))} of {len(report['sites'])} sites have a finding in capitals,"
        " which wants attention. Loss with its 95 % interval. To saturation, to underflow: octaves on"
        " held-out text; negative: beyond. Enough at: sequences that show 90 % of the pool's amax;"
        " more: half the pool does not."
    )


def show_overview(report: dict) -> None:
    """Display the losses of all sites."""
    worst = worst_site(report) or "unknown"
    plots.show(
        overview_figure(report),
        caption=(
            f"The recommendation loses most at {worst}. Loss to the best scale of each site on held-out"
            f" text, flush; bars: 95 % intervals over sequences; dotted: {HARMLESS_DB} dB, below which"
            " the book found no harm."
        ),
        alt=f"Loss by layer of the recommended scale and of amax; the worst is {worst}.",
    )


def show_evaluation(report: dict) -> None:
    """Display the model's own loss, or why it was not measured."""
    of = report["evaluation"]
    if of and of["kl"]:
        plots.table(
            tables.evaluation_table(report),
            digits=4,
            caption=(
                f"A: activations, W: weights, in NVFP4, on {of['sequences']} held-out sequences"
                f" ({of['tokens']} predictions), against the unquantized model; least, most: over"
                " sequences."
            ),
        )
    for sentence in (of or {}).get("skipped", []):
        plots.prose(sentence)


def show_massive(report: dict) -> None:
    """Display the sites with massive activations, or that there are none."""
    table = tables.massive_table(report)
    if table.empty:
        plots.prose(f"No site's amax is {FACTOR:g} times that of its median token.")
        return
    plots.table(
        table,
        caption=(
            f"{len(table)} sites whose amax is at least {FACTOR:g} times the median token's. "
            "Token and channel: of the largest value."
        ),
    )


def show_growth(report: dict) -> None:
    """Display what fewer sequences would have shown of the amax."""
    plots.table(
        tables.growth_table(report),
        caption=(
            "Expected share of the pool's amax in n random sequences of it, exactly; the least over the"
            " sites of a kind. Enough at: where every site of the kind has 90 %; more: half the pool is"
            " not enough somewhere."
        ),
    )


def show_foreign(report: dict) -> None:
    """Display losses on the second text, or that none was given."""
    name = report["text"]["foreign"]
    if not name:
        plots.prose("No second text was given: `DATASET=first,second` scores the scales on it too.")
        return
    plots.table(
        tables.foreign_table(report),
        caption=(
            f"Loss on {report['text']['foreign_sequences']} sequences of "
            f"{name} to its own best scales, by kind of site, flush."
        ),
    )
