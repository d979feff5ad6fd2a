# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The first page and the README: the three questions' answers, and what to set in which case.

    python -m studies.pages.index

rewrites the results block and the figure of README.md, and the picture that links to the pages show.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nvfp4_utils import input_scale_from_amax, policies
from nvfp4_utils.quantize import E4M3_NORMAL_RANGE
from studies import ROOT
from studies.runs.store import Run

from . import (
    interactive,
    loss_tables,
    plots,
    q1_more_calibration,
    q2_which_policy,
    q3_which_dataset,
    snr_tables,
    what_to_set,
)

README = ROOT / "README.md"
FIGURE = ROOT / "book" / "_static" / "headline.svg"
CARD = ROOT / "book" / "_static" / "card.png"
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


def certainty(runs: Sequence[Run]) -> str:
    """How sure the recommendation is, Markdown."""
    runs = tuple(runs)
    policy, noise = what_to_set.chosen(runs), max(what_to_set.noise_floor(runs).values())
    best, plain = (what_to_set.worst(runs, p).percent for p in (policy, "amax"))
    return (
        f"**How sure?** Over every text tried on {len(runs)} small models, this changes the KL "
        f"divergence from the unquantized model by at most {best:+.1f} %, the plain "
        f"amax by up to {plain:+.0f} %; {noise:.1f} % is chance. {NOT_HERE}"
    )


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


def telling_case(runs: Sequence[Run]) -> interactive.Case:
    """Where a foreign calibration by amax costs most: the pair of mixes by KL, its site by SNR.

    By SNR alone without KL; the featured site of the first run where no run holds two mixes.
    """
    crossed = [run for run in runs if len(run.mixes) > 1]
    pairs = {
        run: q3_which_dataset.worst_pair(run, "amax") for run in crossed if loss_tables.has_loss(run)
    }
    losses = {run: snr_tables.foreign_losses(run) for run in pairs or crossed}
    if not losses:
        first = runs[0]
        return interactive.Case(first, first.featured[0], first.featured_mix, first.featured_mix)
    if pairs:
        run = max(pairs, key=lambda run: pairs[run][0][0])
        _, calibration, test = pairs[run]
        lost = losses[run]
        lost = lost[(lost.calibration == calibration) & (lost.test == test)]
    else:
        run = max(losses, key=lambda run: losses[run].loss_db.max())
        lost = losses[run]
    top = lost.loc[lost.loss_db.idxmax()]
    return interactive.Case(run, str(top.site), str(top.calibration), str(top.test))


def case_prose(case: interactive.Case) -> str:
    """Why ``telling_case`` is shown, one sentence, Markdown."""
    if case.calibration == case.test:
        return "One site, calibrated and tested on one text. Drag the scale, or press a policy."
    what = "the model's output" if loss_tables.has_loss(case.run) else "SNR"
    pair = f"the amax of {case.calibration} costs {what} most on {case.test}"
    return (
        f"Of the pairs of texts measured, {pair}; below, the site that loses most. Drag the scale, or "
        "press a policy."
    )


def block_numbers(case: interactive.Case) -> dict[str, float]:
    """What ``calculator`` takes: p1, p99.99 and amax of a case's nonzero block amaxes in calibration."""
    marginals = case.run.marginals(case.calibration, case.site)
    upper = marginals.block_amax_percentile(99.99, above=0.0)
    anchor = marginals.block_amax_percentile(1.0, above=upper / policies.ANCHOR_FLOOR)
    return {"p1": anchor, "p9999": upper, "amax": marginals.amax}


def calculator(p1: float, p9999: float, amax: float) -> pd.DataFrame:
    """Scales from three numbers of the nonzero block amaxes, and the octaves of room around each.

    ``room = log2(28672 p1 / amax)``: how far the amax may be raised before over 1 % of the blocks are
    subnormal. Columns: the amax; the amax raised by half of that, if there is any; headroom.
    """
    room = np.log2(E4M3_NORMAL_RANGE * p1 / amax)
    rows = {
        "amax": amax,
        "middle of the room": amax * 2 ** (max(room, 0) / 2),
        "headroom": float(np.float32(max(16384 * p1, p9999))),
    }
    table = pd.DataFrame({"calibrated amax": rows})
    scale = [input_scale_from_amax(float(a)) for a in table["calibrated amax"]]
    return table.assign(**{
        "input_scale": scale, "1 / input_scale": 1 / np.array(scale),
        "octaves above the largest block": np.log2(table["calibrated amax"] / amax),
        "octaves until p1 is subnormal": np.log2(E4M3_NORMAL_RANGE * p1 / table["calibrated amax"]),
    }).T  # fmt: skip


def readme_block(runs: Sequence[Run]) -> str:
    """The results block of README.md, Markdown."""
    numbered = [f"{i}. {line}" for i, line in enumerate(sentences(runs), 1)]
    return "\n".join([what_to_set.recommendation(tuple(runs)), "", *numbered, "", scope(runs)])


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
    fig.suptitle("How should the input_scale of NVFP4 activations be calibrated?")
    fig.set_size_inches(7.2, 3.78)  # 1200 by 630 pixels, what social cards ask for
    fig.savefig(CARD, dpi=1200 / 7.2, metadata={"Software": None})


if __name__ == "__main__":
    main()
