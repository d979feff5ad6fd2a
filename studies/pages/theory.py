# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The page that predicts every stored SNR curve from block amaxes: its tables, figures and answer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.quantize import input_scale_from_amax
from nvfp4_utils.sites import kind_of, layer_of
from nvfp4_utils.statistics import ActivationStatistics
from studies.runs.store import Run

from . import plots
from .block_shapes import (
    MODELS,
    RATIOS,
    Family,
    Shape,
    compare,
    mse_by_amax,
    plateau_and_limits,
    predicted_mse,
)  # fmt: skip
from .regimes import nonzero_blocks, safe_window
from .snr_tables import db

CURVE = ["mix", "site", "underflow"]  # what names one curve
REGIONS = [
    "saturation, beyond",
    "saturation, to 3 dB",
    "plateau",
    "underflow, to 3 dB",
    "underflow, beyond",
]
DASHES = ("", (4, 2), (1, 1), (5, 1, 1, 1))
NORMS = ("attention_input", "mlp_input")  # the sites that follow a norm


def _curve_table(run: Run, points: pd.DataFrame, loss_db: float) -> pd.DataFrame:
    rows = []
    for (mix, site, underflow), t in points.groupby(CURVE, sort=False):
        first, last = safe_window(run.marginals(mix, site, "test"))
        about = (mix, site, underflow, t.kind.iloc[0], t.crest.iloc[0], float(np.log2(last / first)))
        exact = plateau_and_limits(t.octaves, t.exact, loss_db)
        rows += [(*about, m, *exact, *plateau_and_limits(t.octaves, t[m], loss_db)) for m in MODELS]
    found = ["exact_plateau", "exact_low", "exact_high", "plateau", "low", "high"]
    table = pd.DataFrame(rows, columns=[*CURVE, "kind", "crest", "safe", "model", *found])
    factors = {f"{e}_factor": 2 ** (table[e] - table[f"exact_{e}"]).abs() for e in ("low", "high")}
    return table.assign(off=table.plateau - table.exact_plateau, **factors)


def _errors(points: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    exact = curves[[*CURVE, "exact_plateau", "exact_low", "exact_high"]].drop_duplicates()
    plateau = curves.pivot(index=CURVE, columns="model", values="off").add_prefix("plateau_off_")
    table = points.merge(exact, on=CURVE).merge(plateau.reset_index(), on=CURVE)
    lost = table.exact_plateau - table.exact
    right = table.octaves > 1
    at = np.select([(table.octaves >= 0) & ~right, right], [2, 3 + (lost > 3)], 1 - (lost > 3))
    errors = {f"off_{m}": table[m] - table.exact for m in MODELS}
    errors |= {f"loss_off_{m}": errors[f"off_{m}"] - table[f"plateau_off_{m}"] for m in MODELS}
    region = pd.Categorical.from_codes(at, REGIONS, ordered=True)
    return table.drop(columns=plateau.columns).assign(lost=lost, region=region, **errors)


def study(
    run: Run, family: Family, gaussian: Shape, loss_db: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every mix and site, two tables: ``points``, a row per scale, and ``curves``, per curve and model.

    points: ``compare``'s columns, the exact plateau and limits, lost (dB below that plateau), region
    (one of ``REGIONS``), and per model off_* (dB, predicted - exact) and loss_off_* (the same of the
    loss below its own plateau). curves: safe (octaves of the safe window; negative: empty),
    ``plateau_and_limits`` of the exact curve and the model's, off (dB, of the plateau), low_factor
    and high_factor (between predicted and exact amax, at least 1).
    """
    compared = pd.concat([compare(run, mix, family, gaussian) for mix in run.mixes])
    curves = _curve_table(run, compared, loss_db)
    return _errors(compared, curves), curves


def control(points: pd.DataFrame, joints: dict, shapes: dict, family: Family) -> pd.DataFrame:
    """``points`` of the sites of ``joints``, with errors of their own shapes instead of a model's.

    off_pooled: the site's shape; off_local: ``shapes``, one per bin of block amax (as
    ``shapes_by_amax``); off_crest: the family's shape for the crest of each bin.
    """
    parts = []
    for (site, underflow), t in points.groupby(["site", "underflow"], sort=False):
        joint, own, amaxes = joints[site], shapes[site], t.calibrated_amax.to_numpy()
        by_crest = {edge: family.matching(shape.crest) for edge, shape in own.items()}
        mse = {"pooled": predicted_mse(joint.marginals, amaxes, underflow, [Shape.of_site(joint)])[0],
               "crest": mse_by_amax(joint, amaxes, underflow, by_crest),
               "local": mse_by_amax(joint, amaxes, underflow, own)}  # fmt: skip
        off = {f"off_{name}": db(joint.signal_power / e) - t.exact for name, e in mse.items()}
        parts.append(t.assign(**off))
    return pd.concat(parts)


def normal_check(
    normal: ActivationStatistics, gaussian: Shape, shapes: dict, cases: dict
) -> pd.DataFrame:
    """SNR (dB) of a normal tensor: known, exact, predicted, with its own shape per bin of amax.

    ``cases``: name -> (calibrated amax, convention, known SNR).
    """
    rows = {}
    for name, (amax, underflow, known) in cases.items():
        mse = (normal.mse(input_scale_from_amax(amax), underflow),
               predicted_mse(normal.marginals, [amax], underflow, [gaussian])[0, 0],
               mse_by_amax(normal, [amax], underflow, shapes)[0])  # fmt: skip
        rows[name] = [known, *(float(db(normal.signal_power / e)) for e in mse)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["known", "exact", "predicted", "local"])


def worst_errors(points: pd.DataFrame, by: list[str], names: dict[str, str]) -> pd.DataFrame:
    """Largest \\|predicted - exact\\| (dB) per group ``by``; a column per model, ``name: label``."""
    off = points[[f"off_{name}" for name in names]].abs().set_axis(list(names.values()), axis=1)
    return off.groupby([points[column] for column in by], observed=True).max()


def gains(points: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """A row per model: plateau error (dB; mean, worst), and RMS over whole curves and of the loss."""
    plateau = curves.off.abs().groupby(curves.model, sort=False)
    rms = {
        kind: [np.sqrt((points[f"{kind}_{m}"] ** 2).mean()) for m in MODELS]
        for kind in ("off", "loss_off")
    }
    return pd.DataFrame(
        {"mean": plateau.mean(), "median": plateau.median(), "worst": plateau.max()}
    ).assign(curve=rms["off"], loss=rms["loss_off"])


def ends_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Per convention and site kind: worst factors of the ends, and median widths in octaves."""
    by, ends = ["underflow", "kind"], {"low_factor": "low", "high_factor": "high"}
    shown = curves[curves.model != "rescaled"].assign(band=curves.exact_high - curves.exact_low)
    table = shown.pivot_table(index=by, columns="model", values=list(ends), aggfunc="max")
    table = table[list(ends)].rename(columns=ends, level=0).rename_axis(columns=["end", "model"])
    for label, column in (("safe window", "safe"), ("harmless band", "band")):
        table["median octaves", label] = shown.groupby(by)[column].median()
    return table


def dips(points: pd.DataFrame, loss_db: float) -> pd.DataFrame:
    """Curves that lose over ``loss_db`` within their harmless band and recover.

    Indexed as ``CURVE``; lost: the most (dB); room: octaves from the first such scale to the right end.
    """
    inside = points[
        points.octaves.between(points.exact_low, points.exact_high) & (points.lost > loss_db)
    ]
    return inside.assign(room=inside.exact_high - inside.octaves).groupby(CURVE)[["room", "lost"]].max()


def crest_by_amax(sites: dict, shapes: dict, fewest: int) -> pd.DataFrame:
    """Columns site, amax (over the largest), crest, in bins of at least ``fewest`` blocks."""
    rows = []
    for site, statistics in sites.items():
        values, counts = nonzero_blocks(statistics.marginals)
        for (low, high), shape in shapes[site].items():
            if counts[(values >= low) & (values < high)].sum() >= fewest:
                rows.append((site, low / values[-1], shape.crest))
    return pd.DataFrame(rows, columns=["site", "amax", "crest"])


def kind_colors(kinds) -> dict[str, str]:
    """Colour of each site kind present, in the book's order; a kind of no fixed colour is grey."""
    present = set(kinds)
    known = {kind: color for kind, color in plots.KIND_COLORS.items() if kind in present}
    return known | dict.fromkeys(sorted(present - set(known)), "#666666")


def draw_psi(shapes: dict[str, Shape], gaussian: Shape, colors) -> plt.Figure:
    """Noise over signal against the rounding ratio, for labelled shapes and the Gaussian one."""
    fig, ax = plt.subplots(figsize=(7.2, 4.0))
    widths = np.linspace(4, 1.8, len(shapes))  # so that lines below others show
    for (label, shape), color, width in zip(shapes.items(), colors, widths, strict=True):
        ax.plot(RATIOS, db(shape.error / shape.crest), color=color, lw=width, label=label)
    label = f"Gaussian, {gaussian.crest:.3f}"
    ax.plot(RATIOS, db(gaussian.error / gaussian.crest), color="k", ls="--", lw=1, label=label)
    ax.set(xlim=(2.0**-6, 2.0**5), ylim=(-25, 2), ylabel="noise over signal, ψ(r) / m2 (dB)",
           xlabel="rounding ratio r = scale after E4M3 / before (log2 axis)")  # fmt: skip
    ax.set_xscale("log", base=2)
    for name, regime, left, right in (("saturated", "saturated", 2.0**-6, 16 / 17),
                                      ("normal", "normal", 16 / 17, 18 / 17),
                                      ("floored", "underflow", 2, 2.0**5),
                                      ("subnormal", "subnormal", 2 / 3, 2)):  # fmt: skip
        top, at = (0.08, 0.02) if name == "subnormal" else (1, 0.95)  # that one overlaps the others
        ax.axvspan(left, right, 0, top, color=plots.REGIME_COLORS[regime], lw=0, zorder=0)
        ax.text(
            np.sqrt(left * right), at, name, transform=ax.get_xaxis_transform(), ha="center", fontsize=8
        )
    ax.legend(title="median crest m2", fontsize=8, title_fontsize=8, bbox_to_anchor=(0.02, 0.6),
              loc="upper left")  # fmt: skip
    return fig


def draw_sites(points: pd.DataFrame) -> plt.Figure:
    """Exact and matched SNR of every site of one mix, and their difference under each convention."""
    colors = kind_colors(points.kind)
    fig, axes = plt.subplots(3, len(colors), figsize=(8.2, 7.2), sharex=True, sharey="row",
                             height_ratios=[4, 3, 3], squeeze=False)  # fmt: skip
    for (snr, flush, floor), (kind, color) in zip(axes.T, colors.items(), strict=True):
        for (_, underflow), t in points[points.kind == kind].groupby(["site", "underflow"], sort=False):
            amax, error = 2.0**t.octaves, flush if underflow == "flush" else floor
            error.plot(amax, t.off_matched, color=color, lw=0.9)
            if underflow == "flush":
                snr.plot(amax, t.exact, color=color, lw=2, alpha=0.35)
                snr.plot(amax, t.matched, color="k", lw=0.7, ls="--")
        snr.set_title(kind, fontsize=10)
        snr.set_xscale("log", base=2)
    axes[0, 0].set(xlim=(2.0**-6, 2.0**19), xticks=[2.0**k for k in (-4, 0, 4, 8, 12, 16)])
    for ax in axes[1:].flat:
        ax.axhline(0, color="#666666", lw=0.6)
    shown = points[points.octaves.between(-6, 19)].off_matched
    axes[0, 0].set_ylabel("SNR (dB), flush")
    for ax, underflow in zip(axes[1:, 0], ("flush", "floor"), strict=True):
        ax.set(
            ylim=(1.1 * shown.min(), 1.1 * shown.max()), ylabel=f"predicted − exact (dB)\n{underflow}"
        )
    fig.supxlabel("calibrated amax / largest block amax (log2 axis)", fontsize=10)
    return fig


def draw_crests(curves: pd.DataFrame, gaussian: Shape) -> plt.Figure:
    """Plateau residuals against the crest: matched (filled) and Gaussian (hollow) shape."""
    fig, ax = plt.subplots(figsize=(7.2, 3.8))
    crest = np.linspace(curves.crest.min(), curves.crest.max(), 100)
    ax.plot(crest, db(crest / gaussian.crest), color="k", lw=0.8, label="10 log10(m2 / Gaussian m2)")
    _points_by_model(ax, curves, "crest", "off")
    ax.set(xlabel="crest m2 of the site", ylabel="plateau, predicted − exact (dB)")
    ax.legend(fontsize=8, loc="lower right")
    return fig


def _points_by_model(ax: plt.Axes, curves: pd.DataFrame, x: str, y: str) -> None:
    for kind, color in kind_colors(curves.kind).items():
        for model, fill, label in (("gaussian", "none", "_"), ("matched", color, kind)):
            t = curves[(curves.kind == kind) & (curves.model == model)]
            ax.plot(t[x], t[y], "o", mfc=fill, color=color, ms=4, label=label)
    for label, fill in (("filled: matched", "#666666"), ("hollow: Gaussian", "none")):
        ax.plot([], [], "o", color="#666666", mfc=fill, label=label)


def draw_ends(curves: pd.DataFrame, loss_db: float) -> plt.Figure:
    """Predicted against exact ends of the harmless band, and its width against the safe window's."""
    fig, axes = plt.subplots(1, 3, figsize=(8.2, 3.9))
    t = curves.assign(width=curves.exact_high - curves.exact_low)
    panels = (("left end: saturation", t, "exact_low", "low"),
              ("right end: underflow", t, "exact_high", "high"),
              ("against the safe window", t[t.model == "matched"], "safe", "width"))  # fmt: skip
    for ax, (title, table, x, y) in zip(axes, panels, strict=True):
        _points_by_model(ax, table, x, y)
        ends = [t[x].min(), t[x].max()]
        ax.plot(ends, ends, color="k", lw=0.8, zorder=0)
        ax.set(xlabel="exact (octaves above largest amax)")
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("predicted (octaves)")
    axes[2].set(
        xlabel="safe window, width (octaves)", ylabel=f"band losing less than {loss_db:g} dB (octaves)"
    )
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=6, loc="outside upper center", fontsize=8)
    return fig


def draw_crest_by_amax(trend: pd.DataFrame) -> plt.Figure:
    """``crest_by_amax`` as lines: colour the site's kind, dash its layer."""
    fig, ax = plt.subplots(figsize=(7.2, 3.9))
    sites = list(trend.site.unique())
    layers = dict(zip(dict.fromkeys(layer_of(s) for s in sites), DASHES, strict=False))
    sns.lineplot(trend, x="amax", y="crest", hue="site", style="site", marker=".", ax=ax,
                 palette={s: plots.KIND_COLORS.get(kind_of(s), "k") for s in sites},
                 dashes={s: layers.get(layer_of(s), "") for s in sites})  # fmt: skip
    ax.axhline(1 / 16, color="#666666", lw=0.8, ls=":")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_yticks([1 / 16, 1 / 8, 1 / 4], ["1/16", "1/8", "1/4"])
    ax.text(ax.get_xlim()[0], 1 / 16, " one element per block", va="bottom", fontsize=8, color="#444444")
    ax.set(ylim=(None, 0.45), xlabel="block amax / largest block amax (log2 axis)",
           ylabel="crest of blocks with this amax (log2 axis)")  # fmt: skip
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def answer(points: pd.DataFrame, curves: pd.DataFrame, loss_db: float, model_name: str) -> str:
    """The answer box: how far plateau, its ends and the cliffs are predicted with the matched shape."""
    matched = curves[curves.model == "matched"]
    plateau, factor = matched.off.abs().max(), matched[["low_factor", "high_factor"]].max().max()
    cliff = points[(points.region != "plateau") & (points.lost > loss_db)].off_matched.abs().max()
    verdict = "Only in part"
    if plateau < 1 and factor < 1.25:
        verdict = "Yes" if cliff < 1 else "Where a calibrator works, yes; down the cliffs, no"
    return (
        f"<strong>{verdict}.</strong> Over the curves of the {model_name}, block "
        f"amaxes and signal power predict the SNR of the plateau within {plateau:.2f} dB and the "
        f"amaxes where {loss_db:g} dB is lost within a factor of {factor:.2f}; where more is lost, the "
        f"SNR is off by up to {cliff:.1f} dB. What would change this: sites whose blocks hold nearly "
        "all their energy in one element, so that one number no longer fixes the noise."
    )


def details(curves: pd.DataFrame, featured: pd.DataFrame, seed_noise: float, bins: int) -> str:
    """What the answer box has no room for; ``featured``: from ``control``."""
    matched, normal = (curves[curves.model == m] for m in ("matched", "gaussian"))
    worst = {n: featured[f"off_{n}"].abs().max() for n in ("matched", "crest", "local")}
    text = (
        f"Over {matched.site.nunique()} sites and {matched['mix'].nunique()} mixes the plateau is off "
        f"by {matched.off.abs().median():.2f} dB in the median, and another Monte-Carlo seed moves it "
        f"by at most {seed_noise:.2f}; with Gaussian blocks in place of a shape picked by the signal "
        f"power the worst is {normal.off.abs().max():.1f} dB. The two ends of the harmless band are "
        f"predicted within factors of {matched.low_factor.max():.2f} (left) and "
        f"{matched.high_factor.max():.2f} (right). At the {featured.site.nunique()} sites with joint "
        f"histograms the worst error is {worst['matched']:.1f} dB; with the shape measured in each "
        f"{1 / bins:g} octave of block amax it is {worst['local']:.2f} dB, with only the crest of each "
        f"{worst['crest']:.2f} dB."
    )
    if worst["local"] < worst["matched"] / 2:
        text += " So what is missing on the cliffs is how a block's shape depends on its amax."
    return text


def verdicts(points: pd.DataFrame, curves: pd.DataFrame, gaussian: Shape, spiky: Shape) -> str:
    """Each of the page's four predictions beside what was found, as Markdown."""
    normal, gain = curves[curves.model == "gaussian"], gains(points, curves)
    norm = normal[normal.kind.isin(NORMS)].off.abs().max()
    down = -normal[normal.kind == "down_proj_input"].off
    o_proj = normal[normal.kind == "o_proj_input"].off.abs().max()
    left, right = normal.low_factor.max(), normal.high_factor.max()
    rise = [db(shape.at(1.2) / shape.at(1)) for shape in (gaussian, spiky)]
    removed = 1 - gain.loc["matched"] / gain.loc["gaussian"]
    worst = worst_errors(points, ["underflow", "region"], {"matched": "off"}).off
    flush, floor = (worst.get((u, "underflow, beyond"), 0.0) for u in ("flush", "floor"))
    said = {True: "Held", False: "Wrong"}
    unforeseen = f" It did not foresee `o_proj`, off by up to {o_proj:.1f} dB." if o_proj > 1 else ""
    shape_matters = (
        f" The shape does matter: from r = 1 to 1.2, ψ rises by {rise[0]:.1f} dB for a Gaussian and by "
        f"{rise[1]:.1f} dB for the spikiest site's shape, where a misplaced largest element is most of "
        "the energy."
    ) if right > 1.1 or left > 1.1 else ""  # fmt: skip
    why = ", because small blocks hold more energy for their amax than large ones" if flush > 1 else ""
    return (
        f"1. *Absolute.* {said[bool(norm <= 0.5 and down.min() > 1)]}: at most {norm:.2f} dB off at "
        f"the sites after a norm (plateau); {down.min():.1f} to {down.max():.1f} dB too pessimistic at "
        f"`down_proj`.{unforeseen}\n"
        f"2. *Relative.* {said[bool(max(left, right) <= 1.1)]}: with Gaussian blocks the ends of the "
        f"harmless band are off by factors of up to {left:.2f} (left) and {right:.2f} "
        f"(right).{shape_matters}\n"
        f"3. *One number.* {said[bool(removed['mean'] > 0.5)]}: {removed['mean']:.0%} of the mean "
        f"plateau residual is gone, and {1 - (1 - removed.curve) ** 2:.0%} of the mean square over "
        "whole curves.\n"
        f"4. *Failure.* {'Incomplete' if flush > 1 else 'Held'}: saturation is off by up to "
        f"{worst.get(('flush', 'saturation, beyond'), 0.0):.1f} dB and floor by up to {floor:.1f} dB; "
        f"flush, which needs only the energy of a block, is off by up to {flush:.1f} dB{why}."
    )
