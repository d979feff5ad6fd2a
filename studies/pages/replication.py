# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Every published number beside ours, with a verdict per row.

The study's model and data are not to be had here: rows measured on Qwen3.5-9B stand beside the same
quantity on the reference model and the open stand-in mixes, carry no difference, and are never
averaged with ours.
"""

from __future__ import annotations

import re
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nvfp4_utils.sites import kind_of, layer_of
from studies.data import distributions
from studies.data.mixes import STAND_INS
from studies.runs import synthetic
from studies.runs.store import Run

from . import snr_tables

REPRODUCED = "reproduced"
DRAW = "differs: draw"
CLIPPING = "differs: clipping"
UNEXPLAINED = "differs: unexplained"
NOT_COMPARABLE = "not comparable"
OTHER_MODEL = "their model and data are not to be had; ours is the reference model on {}"
CONVENTION = "floor"  # the study's
STUDY_DRAWS = 3
COLUMNS = ["part", "quantity", "published", "ours", "difference", "verdict", "reason"]


def synthetic_rows(tolerance: float) -> pd.DataFrame:
    """SNR (dB) of the seven distributions, amax at nine sizes and the oracle.

    Reproduced: within ``tolerance`` dB. Otherwise within the range of the replicates, so the random
    draw explains it; or outside of it, and unexplained.
    """
    cited = synthetic.published()["synthetic"]
    study = synthetic.stored_table()
    others = synthetic.stored_replicates()
    oracle = study.groupby("distribution", sort=False).oracle_db.first()
    rows = []
    for row in study.itertuples():
        drawn = others[(others.distribution == row.distribution) & (others.n == row.n)].snr_db_floor
        rows.append(_synthetic_row(row.distribution, f"amax, {row.n:,} elements", row.published_db,
                                   row.snr_db_floor, drawn, tolerance))  # fmt: skip
    for name, published in cited["oracle_snr_db"].items():
        drawn = others[others.distribution == name].oracle_db
        rows.append(_synthetic_row(name, "oracle", published, oracle[name], drawn, tolerance))
    return _table(rows)


def _table(rows: list[tuple]) -> pd.DataFrame:
    floats = dict.fromkeys(("published", "ours", "difference"), np.float64)
    return pd.DataFrame(rows, columns=COLUMNS).astype(floats)


def _synthetic_row(name, quantity, published, ours, drawn, tolerance):
    low, high = min(drawn.min(), ours), max(drawn.max(), ours)
    if abs(published - ours) <= tolerance:
        verdict, reason = REPRODUCED, ""
    else:
        inside = low - tolerance <= published <= high + tolerance
        verdict, reason = DRAW if inside else UNEXPLAINED, f"other seeds {low:.2f} to {high:.2f}"
    if name == "per_channel_outlier":
        # Our fixed channels were chosen among draws that match, so agreement would prove nothing.
        verdict = NOT_COMPARABLE
        reason = f"channels, {drawn.min():.2f} to {drawn.max():.2f}"
    difference = None if verdict == NOT_COMPARABLE else ours - published
    return name, quantity, published, ours, difference, verdict, reason


def outlier_rows(tolerance: float) -> pd.DataFrame:
    """MSE on unseen outliers (pull request 1573); reproduced within a ``tolerance`` ratio in dB."""
    rows = []
    for known in synthetic.published()["headroom_study"]["unseen_outlier_mse"]:
        ours = synthetic.unseen_outliers(known["growth"])
        for policy, mse in ours.items():
            apart = abs(float(snr_tables.db(mse / known[policy])))
            verdict = REPRODUCED if apart <= tolerance else CLIPPING
            reason = "" if verdict == REPRODUCED else "clipping at another sample's amax"
            rows.append(("unseen outliers", f"growth {known['growth']:g}, {policy}, MSE", known[policy],
                         mse, mse - known[policy], verdict, reason))  # fmt: skip
    return _table(rows)


def site_of(run: Run, layer: int) -> str:
    """The reference model's counterpart of the study's layers 0 and 31: first and last MLP input."""
    layers = [layer_of(s) or 0 for s in run.sites if kind_of(s) == "mlp_input"]
    return f"layers.{min(layers) if layer == 0 else max(layers)}.mlp_input"


def _mix_of(name: str) -> str:
    return STAND_INS["chat-only" if name == "nemotron_chat_only" else name]


def _not_comparable(part, quantity, published, ours, mix):
    reason = OTHER_MODEL.format(mix)
    if ours is None:
        reason += f"; the stored run holds no such set of {mix}"
    return part, quantity, published, ours, None, NOT_COMPARABLE, reason


def _subset_summary(run: Run, mix: str, site: str, n: int, test: str) -> dict[str, float] | None:
    """Amax and error of the study's three nested subsets of ``n`` sequences, tested on ``test``."""
    if mix not in run.info["detailed_mixes"]:
        return None
    table = run.subsets(mix)
    table = table[(table.site == site) & (table.policy == "amax") & (table.n == n)]
    table = table[table.draw < STUDY_DRAWS]
    if table.empty:
        return None
    power = run.marginals(test, site, "test").signal_power
    snr = snr_tables.curve_snr(run, test, site, CONVENTION, table.calibrated_amax.to_numpy())
    mse = float((power / 10 ** (snr / 10)).mean())
    return {
        "amax_mean": table.calibrated_amax.mean(),
        "amax_std": table.calibrated_amax.std(ddof=0),
        "mse": mse,
        "snr_db": float(snr_tables.db(power / mse)),
    }


def _pool_numbers(run: Run, mix: str, site: str) -> dict[str, float]:
    """What the study says of a pool, of ours; nothing if the run does not hold the mix."""
    if mix not in run.mixes:
        return {}
    test = run.marginals(mix, site, "test")
    snr = snr_tables.policy_snr(run, mix, CONVENTION)
    best = snr[(snr.site == site) & (snr.policy == "oracle")].iloc[0]
    return {
        "capture_amax": run.marginals(mix, site).amax,
        "test_amax": test.amax,
        "signal_power": test.signal_power,
        "oracle amax_equivalent": best.calibrated_amax,
        "oracle mse": test.signal_power / 10 ** (best.snr_db / 10),
        "oracle snr_db": best.snr_db,
    }


def dataset_rows(run: Run) -> pd.DataFrame:
    """The per-dataset sweep: pools, oracle, and amax at 512, 1,024 and 2,048 sequences."""
    rows = []
    for name, known in synthetic.published()["per_dataset"].items():
        mix = _mix_of(name)
        for layer, values in known["layers"].items():
            ours = _pool_numbers(run, mix, site_of(run, int(layer)))
            published = {key: values[key] for key in ("capture_amax", "test_amax", "signal_power")}
            published |= {f"oracle {key}": value for key, value in values["oracle"].items()}
            for key, value in published.items():
                label = f"layer {layer}, {key}"
                rows.append(_not_comparable(name, label, value, ours.get(key), mix))
        for known_row in known["amax"]:
            site = site_of(run, known_row["layer"])
            found = _subset_summary(run, mix, site, known_row["n_seqs"], mix)
            for key in ("amax_mean", "amax_std", "mse", "snr_db"):
                label = f"layer {known_row['layer']}, {known_row['n_seqs']:,} sequences, {key}"
                rows.append(_not_comparable(name, label, known_row[key], found and found[key], mix))
    return _table(rows)


def percentile_rows(run: Run) -> pd.DataFrame:
    """SNR of the percentile baselines; the study's ``amax_2048`` beside our whole pool's."""
    rows = []
    for name, layers in synthetic.published()["percentile_snr_db"].items():
        mix = _mix_of(name)
        found = {}
        if mix in run.mixes:
            snr = snr_tables.policy_snr(run, mix, CONVENTION)
            found = snr.set_index(["site", "policy"]).snr_db.to_dict()
        for layer, values in layers.items():
            for policy, published in values.items():
                ours = found.get((site_of(run, int(layer)), policy.split("_")[0]))
                label = f"layer {layer}, {policy}, SNR (dB)"
                rows.append(_not_comparable(f"percentiles, {name}", label, published, ours, mix))
    return _table(rows)


def shared_test_rows(run: Run) -> pd.DataFrame:
    """Two mixes on one test tensor: theirs one news article, ours the news mix's whole test pool."""
    known = synthetic.published()["shared_test"]
    test = _mix_of("cnn_nemotron_v2_mix")
    rows = []
    for name, sizes in known["pools"].items():
        mix = _mix_of(name)
        held = (
            run.sequences(mix).groupby("pool", observed=True).sequence.max() + 1
            if mix in run.mixes
            else {}
        )
        for pool, published in sizes.items():
            label = f"pool of {name}, {pool}, sequences"
            mine = held.get({"calib": "calibration"}.get(pool, pool))
            rows.append(_not_comparable("shared test", label, published, mine, mix))
    for layer, values in known["layers"].items():
        marginals = run.marginals(test, site_of(run, int(layer)), "test")
        ours = {"test_amax": marginals.amax, "signal_power": marginals.signal_power}
        for key, published in values.items():
            rows.append(
                _not_comparable("shared test", f"layer {layer}, {key}", published, ours[key], test)
            )
    site = site_of(run, 0)
    count = run.marginals(test, site, "test").count
    rows.append(_not_comparable("shared test", "test elements", known["test_elements"], count, test))
    table = snr_tables.policy_snr(run, test, CONVENTION).set_index(["site", "policy"])
    for row in known["rows"]:
        site = site_of(run, row["layer"])
        found: dict[str, float] | None
        if row["combo"] == "oracle":
            best = table.loc[site, "oracle"]
            power = run.marginals(test, site, "test").signal_power
            mse = power / 10 ** (best.snr_db / 10)
            found = {"amax_mean": best.calibrated_amax, "mse": mse, "snr_db": best.snr_db}
            label = f"layer {row['layer']}, oracle"
        else:
            found = _subset_summary(run, _mix_of(row["combo"]), site, row["n_seqs"], test)
            label = f"layer {row['layer']}, {row['combo']}, {row['n_seqs']:,} sequences"
        for key in ("amax_mean", "amax_std", "mse", "snr_db"):
            if row[key] is not None:
                rows.append(_not_comparable("shared test", f"{label}, {key}", row[key],
                                            found and found[key], test))  # fmt: skip
    return _table(rows)


def cross_rows(run: Run) -> pd.DataFrame:
    """Three calibration sets on one fixed test; ours on the seven-member mix's test pool."""
    test = _mix_of("nemotron-post-training-v3")
    rows = []
    for row in synthetic.published()["cross_dataset_fixed_test"]:
        site, mix = site_of(run, row["layer"]), _mix_of(row["combo"])
        ours = {}
        if mix in run.mixes:
            amax = run.marginals(mix, site).amax
            snr = float(snr_tables.curve_snr(run, test, site, CONVENTION, [amax])[0])
            power = run.marginals(test, site, "test").signal_power
            ours = {"amax": amax, "mse": power / 10 ** (snr / 10), "snr_db": snr}
        for key in ("amax", "mse", "snr_db"):
            label = f"layer {row['layer']}, {row['combo']}, {key}"
            rows.append(_not_comparable("fixed test", label, row[key], ours.get(key), mix))
    return _table(rows)


def downstream_rows() -> pd.DataFrame:
    """Benchmark accuracy of later work, headroom minus amax: no such model can be run here."""
    rows = []
    for row in synthetic.published()["headroom_study"]["downstream_delta_actmax_minus_max"]:
        for task in ("GPQA", "SciCode", "AA-LCR"):
            rows.append(("downstream", f"{row['model']} ({row['mlp']}), {task}, headroom minus amax",
                         row[task], None, None, NOT_COMPARABLE,
                         "models of this size and their benchmarks are not run here"))  # fmt: skip
    return _table(rows)


def timing_rows(run: Run) -> pd.DataFrame:
    """Wall clock and bytes: theirs on an RTX 6000 Ada, ours as stored with the results.

    Not comparable: other hardware, and another kind of statistic.
    """
    known = synthetic.published()["timings"]
    info = synthetic.stored_info("cuda/study")
    size = sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file()) / 1e9
    rows = [
        ("timings", "synthetic, minutes", known["synthetic_minutes"], info["seconds"] / 60, None,
         NOT_COMPARABLE, f"other hardware ({info['device']}) and one statistic for all scales"),
        ("timings", "stored, GB", known["captured_tensors_gb"], size, None, NOT_COMPARABLE,
         f"histograms, not tensors; another model, {len(run.sites)} sites, {len(run.mixes)} mixes"),
        ("timings", "capture of 2,600 sequences, minutes", known["capture_2600x512_minutes"], None, None,
         NOT_COMPARABLE, "another model size; the performance page times a model of theirs"),
        ("timings", "sweep, minutes", known["sweep_minutes"], None, None, NOT_COMPARABLE,
         "not a separate step here: scoring is part of the capture"),
    ]  # fmt: skip
    return _table(rows)


def all_rows(run: Run, tolerance: float) -> pd.DataFrame:
    """Every published number, one row each."""
    tables = [
        synthetic_rows(tolerance), outlier_rows(tolerance), dataset_rows(run), percentile_rows(run),
        shared_test_rows(run), cross_rows(run), downstream_rows(), timing_rows(run),
    ]  # fmt: skip
    with warnings.catch_warnings():
        # pandas announces another treatment of all-NaN columns; here they are float64 throughout.
        warnings.simplefilter("ignore", FutureWarning)
        return pd.concat(tables, ignore_index=True)


def answer(rows: pd.DataFrame) -> str:
    """The page's answer from ``all_rows``, simple HTML: the verdicts add up to what can be checked."""
    checked = rows[rows.verdict != NOT_COMPARABLE]
    n = checked.verdict.value_counts()
    reproduced = int(n.get(REPRODUCED, 0))
    share = reproduced / len(checked)
    word = "yes" if share == 1 else "mostly" if share > 0.5 else "seldom"
    unexplained = int(n.get(UNEXPLAINED, 0))
    differ = " The others differ as random draws and clipping do" if share < 1 else ""
    differ += f", but {unexplained} for no reason we found." if unexplained else "." if differ else ""
    rest = len(rows) - len(checked)
    return (
        f"<strong>Where they can be checked, {word}: {reproduced} of {len(checked)} numbers are "
        f"reproduced.</strong>{differ} The other {rest} published numbers cannot be checked here."
    )


def unchecked_prose(rows: pd.DataFrame) -> str:
    """Why the not comparable rows are that, Markdown; the counts add up."""
    parts = rows[rows.verdict == NOT_COMPARABLE].part
    channels, hardware = (int((parts == p).sum()) for p in ("per_channel_outlier", "timings"))
    model = len(parts) - channels - hardware
    return (
        f"Of {len(rows)} published numbers {len(parts)} are not comparable: {model} belong to models "
        "and datasets that are not to be had here (they stand beside the reference model's, never "
        f"blended with it), {channels} to outlier channels that the study does not name, and {hardware} "
        "are wall clock and storage. What would change this: the study's random streams, its ten "
        "outlier channels, or its model."
    )


def draw_synthetic(study: pd.DataFrame, others: pd.DataFrame) -> plt.Figure:
    """Published and our SNR against calibration size over the range of other seeds, a panel per law."""
    with plt.rc_context({"figure.constrained_layout.use": False}):  # the grid lays itself out
        grid = sns.FacetGrid(study, col="distribution", col_wrap=4, height=2.4, sharey=False)
        for name, ax in grid.axes_dict.items():
            one = study[study.distribution == name]
            band = others[others.distribution == name].groupby("n").snr_db_floor.agg(["min", "max"])
            ax.fill_between(band.index, band["min"], band["max"], color="0.8", lw=0, label="other seeds")
            ax.plot(one.n, one.snr_db_floor, color="#0072B2", marker="o", ms=3, label="ours")
            ax.plot(one.n, one.published_db, "x", color="#D55E00", ms=5, label="published")
            ax.set_xscale("log", base=2)
        handles, labels = grid.axes.flat[0].get_legend_handles_labels()
        grid.set_titles("{col_name}", size=9)
        grid.set_axis_labels("calibration elements", "SNR (dB), floor")
        grid.figure.legend(handles, labels, loc="center", bbox_to_anchor=(0.88, 0.28))
        grid.tight_layout()
    return grid.figure


def spike_probability(elements: int, seeds: int) -> float:
    """How likely the samples of all seeds hold a spike at ``elements`` elements each."""
    return (1 - (1 - distributions.SPIKE_PROBABILITY) ** elements) ** seeds


def unexplained_prose(rows: pd.DataFrame, seeds: int) -> str:
    """The values outside the tolerance and every other seed's range, Markdown."""
    left = rows[rows.verdict == UNEXPLAINED]
    if left.empty:
        return "No checkable synthetic value stays unexplained."
    listed = "; ".join(f"{r.part}, {r.quantity}: {r.reason}" for r in left.itertuples())
    text = f"Unexplained: {len(left)}, by up to {left.difference.abs().max():.2f} dB: {listed}."
    spiked = left[(left.part == "rare_giant_spike") & left["quantity"].str.startswith("amax")]
    for row in spiked.itertuples():
        elements = int(re.sub(r"\D", "", str(row.quantity)))
        text += (
            f" A spike case that is as bad at {elements:,} elements as at the end needs a spike in "
            "every seed's sample, which happens with probability "
            f"{spike_probability(elements, seeds):.0%}: the study's draw was unusual, or its seeds were "
            "not."
        )
    return text


def claim_rows(run: Run) -> pd.DataFrame:
    """The study's effect sizes (dB) beside ours: columns claim, published, ours, where.

    Published: the largest over its layers and mixes. Ours: the largest over all sites and mixes.
    """
    data = synthetic.published()
    by_size = [(name, row["layer"], row["n_seqs"], row["snr_db"])
               for name, values in data["per_dataset"].items() for row in values["amax"]]  # fmt: skip
    sizes = pd.DataFrame(by_size, columns=["mix", "layer", "n", "snr"]).groupby(["mix", "layer"]).snr
    percentiles = [v for layers in data["percentile_snr_db"].values() for v in layers.values()]
    fixed = pd.DataFrame(data["cross_dataset_fixed_test"]).groupby("layer").snr_db
    policy = pd.concat(snr_tables.policy_snr(run, m, CONVENTION).assign(mix=m) for m in run.mixes)
    cross = snr_tables.cross_matrix(run, "amax", CONVENTION).rename(columns={"loss_db": "gap_db"})
    grown = pd.concat(_grown(run, m) for m in run.info["detailed_mixes"])
    rows = [
        ("amax below the oracle", max(v["oracle"] - v["amax_2048"] for v in percentiles),
         policy[policy.policy == "amax"]),
        ("p99.99 below the oracle", max(v["oracle"] - v["p99.99"] for v in percentiles),
         policy[policy.policy == "p99.99"]),
        ("p99.999 below the oracle", max(v["oracle"] - v["p99.999"] for v in percentiles),
         policy[policy.policy == "p99.999"]),
        ("half the calibration below all (theirs: a quarter)", (sizes.max() - sizes.min()).max(), grown),
        ("one calibration mix below another, same test", (fixed.max() - fixed.min()).max(), cross),
    ]  # fmt: skip
    found = []
    for claim, published, table in rows:
        top = table.sort_values("gap_db").iloc[-1]
        where = top.site + (f", {top['mix']}" if "mix" in top else f", {top.calibration} on {top.test}")
        found.append((claim, published, top.gap_db, where))
    return pd.DataFrame(found, columns=["claim", "published", "ours", "where"])


def _grown(run: Run, mix: str) -> pd.DataFrame:
    """SNR that half of the calibration pool loses against all of it, by site and draw."""
    table = run.subsets(mix)
    table = table[table.policy == "amax"]
    wide = table.pivot_table(index=["site", "draw"], columns="n", values=f"mse_{CONVENTION}",
                             observed=True)  # fmt: skip
    loss = snr_tables.db(wide.iloc[:, -2] / wide.iloc[:, -1])
    return loss.rename("gap_db").reset_index().assign(mix=mix)


def published_count() -> int:
    """How many numbers ``published_results.json`` holds that are results, not settings."""
    data = {k: v for k, v in synthetic.published().items() if k != "source"}
    data["synthetic"] = {k: data["synthetic"][k] for k in ("snr_db", "oracle_snr_db")}
    return _count(data)


SETTINGS = {"layer", "n_seqs", "growth"}


def _count(value) -> int:
    if isinstance(value, dict):
        return sum(_count(v) for k, v in value.items() if k not in SETTINGS)
    if isinstance(value, list):
        return sum(_count(v) for v in value)
    return isinstance(value, int | float) and value is not None
