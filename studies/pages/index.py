# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The first page and the README: the three questions' answers, and what to set in which case.

    python -m studies.pages.index

rewrites the results block and the figure of README.md.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from nvfp4_utils.quantize import UNDERFLOWS
from studies import ROOT
from studies.runs.store import Run

from . import plots, q1_more_calibration, q2_which_policy, q3_which_dataset, snr_tables
from .snr_tables import HARM_DB

README = ROOT / "README.md"
FIGURE = ROOT / "book" / "_static" / "headline.svg"
MARKERS = "<!-- results: python -m studies.pages.index -->", "<!-- end of results -->"
QUESTIONS = {
    "Does more calibration always help?": q1_more_calibration,
    "Should it always come from amax?": q2_which_policy,
    "Does the dataset matter?": q3_which_dataset,
}
ZOOM_DB = 0.2  # height of the figure's lower panel
NOT_HERE = "Accuracy on tasks is not measured here."


def sentences(run: Run) -> list[str]:
    """The three answers as their own pages give them, Markdown."""
    found = {question: page.answer(run) for question, page in QUESTIONS.items()}
    return [f"**{question} {a.verdict}** {a.text}" for question, a in found.items()]


def scope(run: Run) -> str:
    """What the answers are measured on, and what they are not, Markdown."""
    return f"Scope: {snr_tables.scope(run)}. {q2_which_policy.published_accuracy()} {NOT_HERE}"


def recommendation(run: Run) -> str:
    """What to set, Markdown: only what the run's own answers support."""
    size, policy, dataset = (page.answer(run) for page in QUESTIONS.values())
    if not policy.foreign:
        return "**One mix cannot tell what to set:** capture a second one, of other text."
    if max(policy.gap["headroom"], policy.foreign["headroom"]) > HARM_DB:
        return "**No policy of this run holds on all its text:** calibrate on the text you will serve."
    first = (
        "**Set `input_scale` by headroom:** `max(16384 * p1, p99.99) / 2688`, percentiles of the "
        "nonzero block amaxes (ModelOpt: `nvfp4_act_headroom`)."
    )
    if dataset.amax > HARM_DB >= dataset.broad_amax:
        first += (
            f" If your tool offers only amax, calibrate on about {size.enough} sequences of mixed text, "
            "with every language you serve."
        )
    if policy.gap["p99.99"] > HARM_DB:
        first += " Never clip by percentile."
    return first


def decisions(run: Run) -> pd.DataFrame:
    """What each choice loses in the case it is for: columns set, mean, worst (dB), compared with."""
    rows: list[tuple] = []
    mix = run.featured_mix
    enough = q1_more_calibration.answer(run).enough

    def add(case: str, choice: str, loss: pd.Series, other: str) -> None:
        rows.append((case, choice, loss.mean(), loss.max(), other))

    if len(run.mixes) > 1:
        amax, room = (
            pd.concat([snr_tables.foreign_losses(run, p, u) for u in UNDERFLOWS])
            for p in ("amax", "headroom")
        )
        norm = amax.site.map(snr_tables.site_kind).isin(q3_which_dataset.AFTER_NORM)
        own = "the text's own calibration"
        add("text may change", "headroom", room.loss_db, own)
        add("text may change, only amax", f"amax on {mix}", amax[amax.calibration == mix].loss_db, own)
        narrow = amax[amax.calibration.str.endswith("-only")]
        if len(narrow):
            add("the same, one domain", "amax on one domain", narrow.loss_db, own)
        add("inputs after a norm", "amax", amax[norm].loss_db, own)
    add("little text", "headroom, 1 sequence", snr_tables.subset_losses(run, mix, "headroom", 1),
        "all sequences")  # fmt: skip
    sizes = snr_tables.size_curves(run, mix)
    last = sizes.groupby("site", sort=False).snr_db.last()
    few = last - sizes[sizes.n == enough].set_index("site").snr_db
    add("only amax", f"amax, {enough} sequences", few, "all sequences")
    gap = q2_which_policy.gaps(run, mix)["flush"]
    for case, policy in {
        "no calibration": "constant",
        "a scale while it runs": "dynamic",
        "to clip outliers": "p99.99",
        "another quantizer": "four-over-six",
    }.items():
        if policy in set(gap.policy):
            add(case, policy, gap[gap.policy == policy].gap_db, "the best single scale")
    return pd.DataFrame(rows, columns=["your case", "set", "mean loss (dB)", "worst site (dB)",
                                       "compared with"]).set_index("your case")  # fmt: skip


def room(run: Run) -> str:
    """How far a scale may be too large, two sentences, Markdown."""
    harm = q1_more_calibration.harm_table(run, run.featured_mix, "flush")
    return (
        f"A scale may be {2 ** harm.octaves.min():,.0f} times the amax's before it costs {HARM_DB} dB "
        f"at any site. Headroom ends at least {harm.headroom_octaves.min():.1f} octaves below its own "
        "site's first harm."
    )


def figure(run: Run) -> tuple[plt.Figure, str, str]:
    """SNR against calibrated amax where a foreign calibration hurts most: figure, caption, alt."""
    site, bad, test = run.featured[-1], "", run.featured_mix
    foreign = snr_tables.foreign_losses(run, "amax")
    if len(foreign):
        site, bad, test = foreign.loc[foreign.loss_db.idxmax(), ["site", "calibration", "test"]]
    curve = run.curve(test, site)
    grid = curve.calibrated_amax.to_numpy()
    landed = {name: snr_tables.policy_snr(run, test, "flush", name) for name in run.mixes}
    landed = {name: t[t.site == site].set_index("policy") for name, t in landed.items()}
    best = landed[test].snr_db["oracle"]
    # policy, calibration, how its marker is filled, and its size: some lie on one another
    marks = [("amax", test, "full", 6)]
    if run.featured_mix not in (test, bad):
        marks.append(("amax", run.featured_mix, "none", 11))
    if bad:
        marks.append(("amax", bad, "left", 8))
    marks.append(("headroom", bad or test, "full", 8))
    fig, axes = plt.subplots(2, 1, figsize=(7.2, 5.4), sharex=True, height_ratios=[3, 2])
    for convention, style in plots.UNDERFLOW_STYLE.items():
        snr = snr_tables.curve_snr(run, test, site, convention, grid)
        for ax, values in zip(axes, (snr, best - snr), strict=True):
            ax.plot(grid, values, color=style.color, ls=style.linestyle, lw=1.2, label=style.label)
    for policy, source, fill, size in marks:
        style, at = plots.POLICY_STYLE[policy], landed[source].loc[policy]
        for ax, value in zip(axes, (at.snr_db, best - at.snr_db), strict=True):
            ax.plot(at.calibrated_amax, value, style.marker, color=style.color, ms=size, fillstyle=fill,
                    ls="", label=f"{style.label} of {source}")  # fmt: skip
    axes[0].set(xscale="log", ylim=(0, None), ylabel="test SNR (dB)")
    axes[0].set_xscale("log", base=2)
    axes[0].legend(fontsize=8, loc="lower center")
    axes[1].set(ylim=(ZOOM_DB, -0.02), ylabel="dB below the best scale")
    axes[1].set_xlabel("calibrated amax = 2688 x input_scale (log2 axis)")
    lost = {source: best - landed[source].snr_db for source in (test, bad) if source}
    fails = ""
    if bad:
        fails = f", calibrated on {bad} it is {lost[bad]['amax']:.1f} dB below the best scale"
    held = lost[bad or test]["headroom"]
    caption = (
        f"<strong>The plateau is many octaves wide and amax sits at its edge{fails}; headroom is "
        f"{held:.2f} dB below.</strong> {site}, {run.test_sequences(test)} test sequences of {test}; "
        f"lower panel: the last {ZOOM_DB} dB. Lines are exact, not fitted."
    )
    alt = (
        "SNR rises steeply with the calibrated amax, stays flat over many octaves, and falls where "
        f"block scales underflow; amax lies at the left edge of the plateau{fails}, "
        "headroom far inside it."
    )
    return fig, caption, alt


def readme_block(run: Run) -> str:
    """The results block of README.md, Markdown."""
    numbered = [f"{i}. {line}" for i, line in enumerate(sentences(run), 1)]
    return "\n".join([recommendation(run), "", *numbered, "", scope(run)])


def main() -> None:
    plots.use_style()
    run = Run()
    begin, end = MARKERS
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n{readme_block(run)}\n{end}{after}")
    fig, _, _ = figure(run)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
