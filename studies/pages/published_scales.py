# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Published amaxes of large models: how far calibration sets differ, beside the book's own models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nvfp4_utils.sites import kind_of
from studies.runs.layer_ratios import TARGET
from studies.runs.store import RESULTS, Run

RUNS = {"smollm2": "smollm2", "gemma3": "gemma3", "reference": ""}
TEXT = "ref-"  # the published sets that are amaxes of other text than the reference set's
ABOVE = (1.25, 2.0, 4.0, 16.0)
QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
DRAWS = 8  # random halves of a pool
TEXTS, LENGTHS, HALVES = "other text", "other layout", "other half of the same text"
PUBLISHED = "published, other text"


def stored_runs() -> dict[str, Run]:
    """The stored run of each model."""
    return {model: Run(name) for model, name in RUNS.items()}


def published() -> tuple[pd.DataFrame, dict]:
    """The stored ratios (model, site, layer, set, ratio) and where they come from.

    Raises
    ------
    FileNotFoundError
        If they were never computed.
    """
    if not TARGET.is_file():
        raise FileNotFoundError(
            f"no {TARGET}; make it from a CSV of amaxes with `python -m studies.runs.layer_ratios CSV`."
        )
    table = pd.read_parquet(TARGET).astype({"model": str, "site": str, "set": str})
    return table, json.loads(TARGET.with_suffix(".json").read_text())


def of_text(ratios: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``published`` that compare text; the others compare a policy on the same text."""
    return ratios[ratios.set.str.startswith(TEXT)]


def _long(wide: pd.DataFrame, model: str, compared: str) -> pd.DataFrame:
    """model, site (its kind), layer, compared, set, ratio from ratios of sites by set."""
    table = wide.rename_axis(index="name", columns="set").stack().rename("ratio").reset_index()
    layer = table.name.astype(str).str.extract(r"\.(\d+)\.")[0].astype(int)
    kind = table.name.astype(str).map(kind_of)
    table = table.assign(model=model, layer=layer, site=kind, compared=compared)
    return table[["model", "site", "layer", "compared", "set", "ratio"]]


def mix_ratios(run: Run) -> pd.DataFrame:
    """A mix's calibrated amax over another's, every ordered pair: a row per site, a column per pair."""
    amaxes = {
        mix: run.policies(mix).query("policy == 'amax'").set_index("site").calibrated_amax
        for mix in run.mixes
    }
    pairs = itertools.permutations(run.mixes, 2)
    return pd.DataFrame({f"{a} over {b}": amaxes[a] / amaxes[b] for a, b in pairs})


def layout_ratios(run: Run) -> pd.DataFrame:
    """Calibrated amax of every layout over that of the run's own: a row per site."""
    table = run.layouts().query("policy == 'amax'")
    wide = table.pivot_table(index="site", columns="layout", values="calibrated_amax", observed=True)
    return wide.div(wide[str(table.layout.iloc[0])], axis=0)


def half_ratios(run: Run, draws: int = DRAWS) -> pd.DataFrame:
    """Amax of one random half of the first mix's sequences over the other half's; a column per draw."""
    table = run.sequences(run.featured_mix).query("pool == 'calibration'")
    wide = table.pivot_table(index="site", columns="sequence", values="amax", observed=True)
    found = {}
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(wide.shape[1])
        one, other = np.array_split(order, 2)
        found[f"half {draw}"] = wide.iloc[:, one].max(axis=1) / wide.iloc[:, other].max(axis=1)
    return pd.DataFrame(found)


def own_ratios(runs: Mapping[str, Run]) -> pd.DataFrame:
    """model, site, layer, compared, set, ratio: the book's models in the form of ``published``."""
    parts = []
    for model, run in runs.items():
        layouts = layout_ratios(run)
        parts += [
            _long(mix_ratios(run), model, TEXTS),
            _long(layouts.drop(columns=str(run.layouts().layout.iloc[0])), model, LENGTHS),
            _long(half_ratios(run), model, HALVES),
        ]
    return pd.concat(parts, ignore_index=True)


def check(ratios: pd.DataFrame, runs: Mapping[str, Run]) -> str:
    """Completeness of the published table, and what compared with itself must give; Markdown.

    Raises
    ------
    ValueError
        If a layer lacks a set or site, or there and back is not 1.
    """
    for model, rows in ratios.groupby("model"):
        expected = rows.layer.nunique() * rows.site.nunique() * rows.set.nunique()
        if len(rows) != expected:
            raise ValueError(f"{model} has {len(rows)} ratios; expected {expected}, one of each.")
    for model, run in runs.items():
        ratio = mix_ratios(run)
        for a, b in itertools.combinations(run.mixes, 2):
            product = ratio[f"{a} over {b}"] * ratio[f"{b} over {a}"]
            if not np.allclose(product, 1, rtol=1e-12):
                raise ValueError(f"{model}: {a} over {b} and back is {product.max()}; expected 1.")
    return (
        f"Every layer of {ratios.model.nunique()} published models has every set at both sites "
        f"({len(ratios)} ratios), and in our {len(runs)} models the ratio of any two mixes, times "
        "that of the exchanged pair, is 1."
    )


def share_table(ratios: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """By the given columns: how many ratios, the share above each of ``ABOVE`` (%), and the extremes."""
    groups = ratios.groupby(by, sort=False).ratio
    table = pd.DataFrame({"ratios": groups.size(), "lowest": groups.min(), "median": groups.median()})
    for limit in ABOVE:
        table[f"above {limit:g} (%)"] = groups.apply(lambda r, limit=limit: 100 * (r > limit).mean())
    return table.assign(highest=groups.max())


def prior_table(ratios: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of log2 of the ratio, octaves, by what is compared and the kind of site."""
    both = pd.concat([of_text(ratios).assign(compared=PUBLISHED), own], ignore_index=True)
    octaves = np.log2(both.ratio).groupby([both.compared, both.site], sort=False)
    table = octaves.quantile(list(QUANTILES)).unstack()
    table.columns = [f"{100 * q:g} %" for q in QUANTILES]
    return table


def margin(ratios: pd.DataFrame, site: str, share: float = 0.95) -> float:
    """Octaves that the amax must be raised by so that the share of published ratios is covered."""
    rows = of_text(ratios)
    return float(np.log2(rows[rows.site == site].ratio).quantile(share))


def accuracy_table(ratios: pd.DataFrame) -> pd.DataFrame:
    """By published model: spread of its down_proj ratios beside headroom's accuracy minus amax's."""
    study = json.loads((RESULTS / "published" / "published_results.json").read_text())["headroom_study"]
    down = ratios[ratios.site == "down_proj_input"]
    shares, room = share_table(of_text(down), ["model"]), down[down.set == "act-max-p5"]
    rows = {}
    for entry in study["downstream_delta_actmax_minus_max"]:
        model = entry["model"]
        rows[model] = {
            "MLP": entry["mlp"],
            "text: above 1.25 (%)": shares.loc[model, "above 1.25 (%)"],
            "text: highest ratio": shares.loc[model, "highest"],
            "headroom / amax, median": room[room.model == model].ratio.median(),
        } | {task: entry[task] for task in ("GPQA", "SciCode", "AA-LCR")}
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_layers(ratios: pd.DataFrame) -> plt.Figure:
    """Ratio by layer, a panel per model; down_proj inputs black, MLP inputs grey, a marker per set."""
    models = list(dict.fromkeys(ratios.model))
    fig, axes = plt.subplots(1, len(models), figsize=(8.2, 3.6), sharey=True, squeeze=False)
    shades = {"mlp_input": "#999999", "down_proj_input": "#000000"}
    for ax, model in zip(axes.flat, models, strict=True):
        rows = of_text(ratios)[lambda t, model=model: t.model == model]
        for (site, name), one in rows.groupby(["site", "set"], sort=False):
            marker = "o" if name.endswith("code") else "x"
            label = f"{site}, {name.removeprefix(TEXT)}"
            ax.scatter(one.layer, one.ratio, s=14, color=shades[site], marker=marker, lw=1, label=label)
        ax.axhline(1, color="k", lw=0.6, ls=":")
        ax.set_title(model, fontsize=9)
        ax.set_xlabel("layer")
    axes.flat[0].set_yscale("log", base=2)
    axes.flat[0].set_ylabel("amax / amax of the reference set (log2)")
    axes.flat[-1].legend(fontsize=7, loc="upper right")
    return fig


def draw_exceedance(ratios: pd.DataFrame, own: pd.DataFrame) -> plt.Figure:
    """Share of down_proj inputs whose ratio exceeds 2**octaves, by model and what is compared."""
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.6), sharex=True, sharey=True)
    at = np.linspace(-1, 4, 201)
    looks = (("#000000", "-"), ("#555555", "--"), ("#999999", ":"))
    own = own[own.compared == TEXTS]
    for ax, table, title in zip(axes, (of_text(ratios), own), ("published", "this book"), strict=True):
        down = table[table.site == "down_proj_input"]
        for (model, rows), (color, dashes) in zip(
            down.groupby("model", sort=False), looks, strict=False
        ):
            share = (np.log2(rows.ratio.to_numpy())[:, None] > at).mean(0)
            ax.plot(at, 100 * share, color=color, ls=dashes, label=model)
        ax.set_title(f"{title}: down_proj inputs, other text", fontsize=9)
        ax.set_xlabel("octaves above the calibrated amax")
        ax.legend(fontsize=8)
    axes[0].set_ylabel("share of layers and sets (%)")
    return fig


def answer(ratios: pd.DataFrame) -> str:
    """The page's answer, simple HTML."""
    shares = share_table(of_text(ratios), ["site"])
    down, norm = (shares.loc[site, "above 1.25 (%)"] for site in ("down_proj_input", "mlp_input"))
    verdict = "That text matters at down_proj inputs, hardly" if down > 2 * norm else "That text matters"
    where = " at MLP inputs" if down > 2 * norm else " at both sites"
    return (
        f"<strong>{verdict}{where}.</strong> Calibrated on other text, {down:.0f} % of the published "
        f"down_proj amaxes are more than a quarter above the "
        f"reference set's, against {norm:.0f} % at MLP inputs, which follow a norm. A margin of "
        f"{margin(ratios, 'down_proj_input'):.1f} octaves would cover 95 in 100 of them."
    )


def reconciliation(ratios: pd.DataFrame, own: pd.DataFrame) -> str:
    """The prediction, and text against chance; Markdown."""
    down = own[own.site == "down_proj_input"]
    q = {name: np.log2(down[down.compared == name].ratio).quantile(0.95) for name in (TEXTS, HALVES)}
    table = of_text(ratios)
    within = (np.log2(table[table.site == "mlp_input"].ratio).abs() <= np.log2(4 / 3)).mean()
    return (
        f"Beside the prediction: {within:.0%} of the published ratios at MLP inputs lie within a third. "
        f"In our models the amax of other text at down_proj inputs exceeds the calibrated one by "
        f"{q[TEXTS]:.2f} octaves at the 95 % quantile, the other half of the same text by "
        f"{q[HALVES]:.2f}, which is chance alone."
    )
