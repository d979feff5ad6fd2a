# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Elements that move without a kernel: a static figure, the numbers behind it, and a script of the book.

    python -m studies.pages.interactive build/book/_build/html/_static/curves --run NAME

writes what the scripts in ``book/_static`` load when a reader asks for a model and a text. They get a
folder of their own: Jupyter Book puts every script of ``book/_static`` on every page.

Libraries that embed their data were weighed: Vega's scripts are 0.90 MB, Bokeh's with its sliders
1.65 MB, Plotly's 4.82 MB, before any data (minified, releases of July 2026). A page may weigh 1.5 MB in
all, and the theme takes most of it. So the elements are plain scripts, under 50 kB together.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline

from nvfp4_utils.policies import POLICIES
from nvfp4_utils.quantize import AMAX_PER_SCALE, UNDERFLOWS
from studies.runs.scoring import block_shares
from studies.runs.store import Run

from . import loss_tables, plots, snr_tables

RUNS = ("smollm2", "gemma3", "")  # the models that a reader may pick
STEPS = np.arange(-6 * 8, 19 * 8 + 1)  # eighths of an octave from the test pool's amax: stored scales
SHARES = ("saturated", "subnormal", "underflow")
TOLD = ("amax", "raised", "headroom")  # the policies that a caption speaks of
UNIT_DB = 0.001  # decibels are stored in whole numbers of it


def pack(numbers: dict) -> str:
    """JSON, compressed, as text: what ``moving.unpack`` of ``book/_static/moving.js`` reads."""
    text = json.dumps(numbers, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def in_units(values_db) -> list[int]:
    """Decibels in whole numbers of ``UNIT_DB``."""
    return np.rint(np.asarray(values_db) / UNIT_DB).astype(int).tolist()


def _short(values, digits: int) -> list[float]:
    return [float(f"{v:.{digits}g}") for v in np.asarray(values, dtype=np.float64)]


def _shares(run: Run, mix: str, site: str, amaxes: np.ndarray) -> dict[str, list[float]]:
    shares = block_shares(run.marginals(mix, site, "test"), amaxes)
    return {name: _short(shares[name], 3) for name in SHARES}


def curve(run: Run, mix: str, site: str) -> dict:
    """One site's stored curve on a mix's test pool, at every eighth of an octave from the pool's amax.

    ``amax``: that of the test pool; ``flush``: SNR in ``UNIT_DB`` along ``STEPS``, ``gain``: floor's
    minus it; and the share of nonzero blocks that are saturated, subnormal, and below E4M3.
    """
    amax = run.marginals(mix, site, "test").amax
    amaxes = amax * 2.0 ** (STEPS / 8)
    flush, floor = (
        np.array(in_units(snr_tables.curve_snr(run, mix, site, u, amaxes))) for u in UNDERFLOWS
    )
    snr = {"flush": flush.tolist(), "gain": (floor - flush).tolist()}
    return {"amax": amax} | snr | _shares(run, mix, site, amaxes)


def policies(run: Run, mix: str) -> pd.DataFrame:
    """Calibrated amax and SNR of every one-scale policy of every calibration on a mix's test pool.

    Columns: site, calibration ("test" for the oracle), policy, underflow, calibrated_amax, snr_db.
    """
    keys = ["site", "calibration", "policy", "underflow", "calibrated_amax"]
    errors = run.errors(mix).astype(dict.fromkeys(keys[:4], str))
    errors = errors[~errors.policy.isin(snr_tables.NOT_ONE_SCALE)]
    groups = run.groups(mix).astype({"site": str})
    errors = errors.merge(groups, on=["site", "group"], validate="m:1")
    sums = errors.assign(
        noise=errors.mse * errors["count"], signal=errors.signal_power * errors["count"]
    )
    sums = sums.groupby(keys, sort=False)[["noise", "signal"]].sum().reset_index()
    return sums.assign(snr_db=snr_tables.db(sums.signal / sums.noise))[[*keys, "snr_db"]]


def yardstick(run: Run, mix: str) -> pd.DataFrame:
    """The larger of the losses of SNR and block SNR (dB) where it is stored: ``snr_tables.scored``.

    Columns: site, underflow, calibrated_amax, loss_db; empty where the mix is not detailed. It is known
    at the scales that the model was evaluated with, not along the curve. Interpolated, it would be off
    by up to 3.6 dB at the featured sites of the stored runs, so it is not interpolated.
    """
    columns = ["site", "underflow", "calibrated_amax", "loss_db"]
    if mix not in run.info["detailed_mixes"]:
        return pd.DataFrame(columns=columns)
    scored = snr_tables.scored(run.metrics(mix).astype({"site": str, "underflow": str, "policy": str}))
    scored = scored.rename(columns={"larger loss": "loss_db"})
    return scored.drop_duplicates(columns[:3]).sort_values("calibrated_amax")[columns]


def test_numbers(run: Run, mix: str) -> dict:
    """All that one test text has to say: every site's curve, policies and yardstick."""
    places, known = policies(run, mix), yardstick(run, mix)
    places["units"] = in_units(places.snr_db)
    sites = {}
    for site in run.sites:
        rows, own = places[places.site == site], known[known.site == site]
        amaxes = np.unique(rows.calibrated_amax)
        sites[site] = curve(run, mix, site) | {
            "at": {"amax": _short(amaxes, 7)} | _shares(run, mix, site, amaxes),
            "policies": {
                calibration: _places(one, amaxes)
                for calibration, one in rows.groupby("calibration", sort=False)
            },
            "yardstick": {
                u: [_short(t.calibrated_amax, 7), in_units(t.loss_db)]
                for u, t in own.groupby("underflow", sort=False)
            },
        }
    return {"sites": sites}


def _places(rows: pd.DataFrame, amaxes: np.ndarray) -> dict[str, list[list[int]]]:
    """Policy -> per convention its place in ``amaxes`` and its SNR in ``UNIT_DB``."""
    rows = rows.assign(place=np.searchsorted(amaxes, rows.calibrated_amax))
    at = {(r.policy, r.underflow): [int(r.place), int(r.units)] for r in rows.itertuples()}
    return {p: [at[p, u] for u in UNDERFLOWS] for p in POLICIES if (p, "flush") in at}


def file_name(run: Run, mix: str) -> str:
    """The script that holds a run's numbers on a mix's test pool."""
    return f"{run.name}.{mix}.js"


def write(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write each run's numbers, a script per test mix that calls ``moving.deliver``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for run in runs:
        for mix in run.mixes:
            path = folder / file_name(run, mix)
            part = path.with_suffix(".partial")
            part.write_text(f'moving.deliver("{path.name}","{pack(test_numbers(run, mix))}");\n')
            written.append(part.replace(path))
    return written


def policy_marks() -> dict[str, dict[str, str]]:
    """Label, colour and marker of each policy, the marker as the path of an SVG 2 units wide."""
    return {
        name: {"label": style.label, "color": style.color, "path": _svg_path(style.marker)}
        for name, style in plots.POLICY_STYLE.items()
    }


def _svg_path(marker: str) -> str:
    style = MarkerStyle(marker)
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C",
               Outline.CLOSEPOLY: "Z"}  # fmt: skip
    text = ""
    for points, code in style.get_path().transformed(style.get_transform()).iter_segments():
        letter = letters[Outline.code_type(code)]
        pairs = [] if letter == "Z" else (np.asarray(points).reshape(-1, 2) * [2, -2]).tolist()
        text += letter + " ".join(f"{x:.3f},{y:.3f}" for x, y in pairs)
    return text


@dataclass(frozen=True)
class Case:
    """What is shown of a run: a site, the mixes it is calibrated on and tested on, a convention."""

    run: Run
    site: str
    calibration: str
    test: str
    underflow: str = "flush"


def scale_settings(runs: Sequence[Run], case: Case) -> dict:
    """What the element ``scale`` needs before it loads numbers; it begins with ``case`` at the amax."""
    return {
        "models": [
            {"name": run.name, "label": plots.model_label(run.model_name), "mixes": run.mixes,
             "sites": run.sites}
            for run in runs
        ],
        "state": {"model": case.run.name, "site": case.site, "calibration": case.calibration,
                  "test": case.test, "underflow": case.underflow, "at": "amax"},
        "steps": [int(STEPS[0]), int(STEPS[-1])],
        "unit": UNIT_DB,
        "marks": policy_marks(),
        "regimes": plots.REGIME_COLORS,
    }  # fmt: skip


def landed(case: Case) -> pd.DataFrame:
    """Where the policies of a case land, and the oracle: ``policies`` by policy, with loss_db."""
    table = policies(case.run, case.test)
    table = table[(table.site == case.site) & (table.underflow == case.underflow)]
    table = table[table.calibration.isin([case.calibration, "test"])].set_index("policy")
    table = table.loc[[p for p in POLICIES if p in table.index]]
    return table.assign(loss_db=table.snr_db["oracle"] - table.snr_db)


def scale_figure(case: Case) -> plt.Figure:
    """SNR of a case's site over all stored scales, with the place of every policy."""
    stored = case.run.curve(case.test, case.site)
    x = stored.calibrated_amax.to_numpy()
    snr = snr_tables.curve_snr(case.run, case.test, case.site, case.underflow, x)
    fig, ax = plt.subplots(figsize=(7.2, 3.6))
    ax.plot(x / AMAX_PER_SCALE, snr, color="#666666", lw=1)
    for policy, row in landed(case).iterrows():
        style = plots.POLICY_STYLE[str(policy)]
        ax.plot(row.calibrated_amax / AMAX_PER_SCALE, row.snr_db, style.marker, color=style.color, ms=7,
                mec="k", mew=0.4, ls="", label=f"{style.label} {row.snr_db:.2f}")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set(xlabel="input_scale (log2 axis)", ylabel=f"test SNR (dB), {case.underflow}")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="policy, SNR (dB)")
    return fig


def scale_words(case: Case) -> tuple[str, str]:
    """Caption, simple HTML, and alternative text of ``scale_figure``."""
    found = landed(case)
    lost = [f"{plots.POLICY_STYLE[p].label} {found.loss_db[p]:.2f} dB" for p in TOLD if p in found.index]
    what = f"{case.site} of {loss_tables.short(case.run)}, calibrated on {case.calibration}"
    losses = loss_tables.listed(lost)
    caption = (
        f"<strong>Below the best scale on {case.test}: {losses}.</strong> {what}; {case.underflow}; "
        f"{case.run.test_sequences(case.test)} test sequences. Marks: where the policies land."
    )
    alt = (
        f"SNR against input_scale of {what}, tested on {case.test}: a plateau between two cliffs, best "
        f"{found.snr_db['oracle']:.2f} dB; below it {losses}."
    )
    return caption, alt


def sizes_settings(run: Run, mix: str, underflow: str, site: str) -> dict:
    """What the element ``sizes`` needs: each site's sequence amaxes, how often each occurs, its SNR."""
    sites = {}
    for name in run.sites:
        values, counts = np.unique(snr_tables.sequence_amaxes(run, mix, name), return_counts=True)
        snr = snr_tables.curve_snr(run, mix, name, underflow, values)
        sites[name] = {"amax": values.tolist(), "count": counts.tolist(), "snr": in_units(snr)}
    return {"data": pack(sites), "unit": UNIT_DB, "sites": run.sites, "site": site,
            "color": plots.POLICY_STYLE["amax"].color}  # fmt: skip


def cross_settings(run: Run, cross: pd.DataFrame, policy: str, underflow: str) -> dict:
    """What the element ``cross`` needs: loss and interval of every site in every cell, and its colours.

    ``cross``: ``snr_tables.cross_matrix``. Cells go by calibration, then test, as ``run.mixes``.
    """
    pairs = dict(list(cross.groupby(["calibration", "test"])))
    limit = max(0.02, *(abs(rows.loss_db.mean()) for rows in pairs.values()))
    cells, colors = [], []
    for calibration in run.mixes:
        for test in run.mixes:
            rows = pairs[calibration, test].set_index("site").loc[run.sites]
            cells.append([in_units(rows[name]) for name in ("loss_db", "low", "high")])
            place = 0.5 + rows.loss_db.mean() / limit / 2
            red, green, blue, _ = plt.get_cmap("RdBu_r")(place)
            dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
            paper = "#" + "".join(f"{round(255 * c):02x}" for c in (red, green, blue))
            colors.append([paper, "#ffffff" if dark else "#000000"])
    return {"data": pack({"cells": cells}), "unit": UNIT_DB, "mixes": run.mixes, "sites": run.sites,
            "colors": colors, "run": run.name, "policy": policy, "underflow": underflow}  # fmt: skip


def element(name: str, settings: dict, static: str, keep: bool = False) -> str:
    """The HTML of an element: what stands without a script, and the script's settings.

    The script takes the place of the static figure or table, but for its caption; with ``keep`` it
    comes below, where the figure shows what the element does not.
    """
    text = json.dumps(settings, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="moving{" moving-keep" if keep else ""}" data-element="{name}">'
        f'<div class="moving-static">{static}</div>'
        f'<script type="application/json">{text}</script></div>'
    )


def show(
    name: str, settings: dict, fig: plt.Figure, *, caption: str, alt: str, keep: bool = False
) -> None:
    """Display a figure that ``book/_static/NAME.js`` makes move; arguments as ``plots.show``."""
    static = plots.figure_html(fig, caption=caption, alt=alt)
    plots.display_html(element(name, settings, static, keep))


def show_table(name: str, settings: dict, frame: pd.DataFrame, *, caption: str, **layout) -> None:
    """The same of a table; arguments as ``plots.table``."""
    plots.display_html(element(name, settings, plots.table_html(frame, caption=caption, **layout)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", default="", help="of `make capture`: that one alone")
    options = parser.parse_args()
    write(options.folder, loss_tables.models(options.run, RUNS))


if __name__ == "__main__":
    main()
