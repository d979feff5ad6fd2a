# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The first page and the README: the three questions' answers, and what to set in which case.

    python -m studies.pages.index

rewrites the results block and the figure of README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from studies import ROOT
from studies.runs.store import Run

from . import loss_tables, plots, q1_more_calibration, q2_which_policy, q3_which_dataset

README = ROOT / "README.md"
FIGURE = ROOT / "book" / "_static" / "headline.svg"
MARKERS = "<!-- results: python -m studies.pages.index -->", "<!-- end of results -->"
QUESTIONS = {
    "Does more calibration always help?": q1_more_calibration,
    "Should it always come from amax?": q2_which_policy,
    "Does the dataset matter?": q3_which_dataset,
}
RUNS = ("smollm2", "gemma3", "")  # the README's models, and the first page's
MARKED = ("amax", "raised", "headroom")
NOT_HERE = "Accuracy on tasks is not measured here."


def sentences(runs: Sequence[Run]) -> list[str]:
    """The three answers as their own pages give them, Markdown."""
    found = {question: page.answer(runs) for question, page in QUESTIONS.items()}
    return [f"**{question} {a.verdict}** {a.text}" for question, a in found.items()]


def scope(runs: Sequence[Run]) -> str:
    """What the answers are measured on, and what they are not, Markdown."""
    return f"Scope: {loss_tables.scope(runs)}. {q2_which_policy.published_accuracy()} {NOT_HERE}"


def recommendation(runs: Sequence[Run]) -> str:
    """What to set, Markdown: only what the runs' own answers support."""
    size, policy, dataset = (page.answer(runs) for page in QUESTIONS.values())
    if not dataset.worst:
        return "**One mix, or no loss of the model, cannot tell what to set.**"
    if dataset.hurt("raised") or max(policy.outcome("raised").values()) > 0:
        said = "**Set `input_scale` to `amax / 2688` of the text you will serve:** more room costs here."
    else:
        said = (
            "**Set `input_scale` to `amax * 2**(room / 2) / 2688`,** the amax raised by half the "
            "octaves that its smallest blocks leave: "
            "`input_scale_from_amax(policies.raised(statistics))`."
        )
    said += f" Calibrate on about {max(size.enough.values())} sequences of mixed text."
    if max(policy.outcome("p99.99").values()) > 0:
        said += " Never clip by percentile."
    return said


def decisions(runs: Sequence[Run]) -> pd.DataFrame:
    """What each choice changes of KL (%) in the case it is for: a row a case, a column a model."""
    cases = {
        ("text may change", "raised"): "foreign",
        ("the same, only amax", "amax"): "foreign",
        ("text is known", "raised"): "own",
        ("headroom as published", "headroom"): "own",
        ("no calibration", "constant"): "own",
        ("a scale while it runs", "dynamic per sequence"): "own",
        ("to clip outliers", "p99.99"): "own",
        ("another quantizer", "four-over-six"): "own",
    }
    rows = {}
    for (case, policy), text in cases.items():
        row = {"set": q2_which_policy.label(policy)}
        for run in (run for run in runs if loss_tables.has_loss(run)):
            if text == "own":
                change = loss_tables.own_change(run, policy)
            elif len(run.mixes) > 1:
                change = q3_which_dataset.worst_pair(run, policy)[0]
            else:
                change = (np.nan,) * 3
            row[loss_tables.short(run)] = loss_tables.cell(change)
        rows[case] = row
    return pd.DataFrame(rows).T


def octaves_above(run: Run, policy: str) -> float:
    """How far a policy's calibrated amax lies above the amax, median over sites of the featured mix."""
    amaxes = run.policies(run.featured_mix).astype({"policy": str, "site": str})
    amaxes = amaxes.pivot(index="site", columns="policy", values="calibrated_amax")
    return float(np.log2(amaxes[policy] / amaxes.amax).median())


def figure(runs: Sequence[Run]) -> tuple[plt.Figure, str, str]:
    """KL against octaves from the amax, a line a model, policies marked: figure, caption, alt."""
    fig, ax = plt.subplots(figsize=(7.2, 4.4))
    shown = [run for run in runs if loss_tables.has_loss(run)]
    for number, run in enumerate(shown):
        curve, mark = loss_tables.sweep(run), loss_tables.mark(number)
        ax.plot(curve.index, curve.kl, color=mark["color"], ls=mark["linestyle"], lw=1.3,
                label=loss_tables.short(run))  # fmt: skip
        ax.fill_between(curve.index, curve.low, curve.high, color=mark["color"], alpha=0.12, lw=0)
        for policy in MARKED:
            style = plots.POLICY_STYLE[policy]
            at = octaves_above(run, policy), loss_tables.value(run, policy)
            ax.plot(*at, style.marker, ms=8, ls="",
                    color=style.color, mec="w", mew=0.6, zorder=4,
                    label=None if number else style.label)  # fmt: skip
    ax.set_yscale("log")
    ax.set(xlabel="octaves from the calibration's amax, all sites together",
           ylabel="KL from the unquantized model\n(nats per token, log)")  # fmt: skip
    ax.legend(fontsize=8, loc="upper center")
    curves = [loss_tables.sweep(run).kl for run in shown]
    low, high = ([curve.get(octaves, np.nan) / curve[0] for curve in curves] for octaves in (-2.0, 4.0))
    told = (
        f"two octaves below the amax multiply KL by {loss_tables.span(low)}, four octaves above it by "
        f"{loss_tables.span(high, '.2f')}"
        if shown
        else "no run here holds the model's own loss"
    )
    caption = (
        f"<strong>{told[:1].upper()}{told[1:]}.</strong> All sites' scales moved together; "
        "bands: 95 % intervals over test sequences. Policies are marked at their median distance from "
        "the amax over sites, with the KL that their own scales give. Featured mix of each model, flush."
    )
    alt = (
        "KL falls steeply up to the calibration's amax, stays flat above it, and rises again where "
        f"block scales underflow; {told}."
    )
    return fig, caption, alt


def readme_block(runs: Sequence[Run]) -> str:
    """The results block of README.md, Markdown."""
    numbered = [f"{i}. {line}" for i, line in enumerate(sentences(runs), 1)]
    return "\n".join([recommendation(runs), "", *numbered, "", scope(runs)])


def main() -> None:
    plots.use_style()
    runs = loss_tables.models("", RUNS)
    begin, end = MARKERS
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n{readme_block(runs)}\n{end}{after}")
    fig, _, _ = figure(runs)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
