# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What to set: expected loss against the margin, every policy on every text, and the verdict.

``runs`` is a tuple of ``Run`` (``stored_runs()``). A policy's ``percent`` is its mean KL divergence over
that of calibrations of equal merit on the test pool's own text: the amax of the calibration pool and of
its random halves. How far those scatter is the noise floor.
"""

from __future__ import annotations

import itertools
import json
import re
from functools import lru_cache

import numpy as np
import pandas as pd

from nvfp4_utils.sites import kind_of
from studies.runs.layer_ratios import TARGET
from studies.runs.plan import MARGINS
from studies.runs.scoring import resamples
from studies.runs.store import Run
from studies.runs.synthetic import PUBLISHED

Runs = tuple[Run, ...]
OWN, OTHER, LONGER = "own text", "other text", "longer text"
EQUAL_MERIT = r"amax|amax of half \d+"
# From what every tool has to what needs most; the first that is as good as any is recommended.
CANDIDATES = ("amax", "raised", "raised-all", "headroom-amax", "headroom")
MARGIN_NAMES = tuple(f"x2^{k}" for k in MARGINS)
SHOWN = ("amax", *MARGIN_NAMES, "raised", "raised-all", "headroom", "headroom-amax", "constant", "mse",
         "oracle", "p99.99", "dynamic per sequence", "dynamic per token", "four-over-six")  # fmt: skip
GRID = np.arange(0, 12.25, 0.25)  # margins, octaves
ANCHORS, OF_BLOCKS = "16384 p1, p99.99", ", percentiles of the nonzero block amaxes"
CALLS = {  # formula, call
    "amax": ("amax / 2688", "policies.amax(statistics)"),
    "raised": ("amax · 2^(room/2) / 2688", "policies.raised(statistics)"),
    "raised-all": ("amax · 2^room / 2688", "policies.raised(statistics, share=1)"),
    "headroom-amax": (
        f"max(amax, {ANCHORS}) / 2688{OF_BLOCKS}",
        "policies.headroom_over_amax(statistics)",
    ),
    "headroom": (f"max({ANCHORS}) / 2688{OF_BLOCKS}", "policies.headroom(statistics)"),
}


@lru_cache(maxsize=1)
def stored_runs() -> Runs:
    """The stored runs of all models, real ones first."""
    return Run("smollm2"), Run("gemma3"), Run()


def label(run: Run) -> str:
    """The model's name without its size."""
    return re.split(r"[,(]", run.model_name)[0].removeprefix("the embedded ").strip()


@lru_cache(maxsize=8)
def model_losses(run: Run, underflow: str = "flush") -> pd.DataFrame:
    """``end_to_end`` with all activations quantized and no weight."""
    table = run.end_to_end().astype(dict.fromkeys(("test", "calibration", "policy", "only"), str))
    kept = (table.underflow == underflow) & (table.weights == "bf16") & (table["only"] == "")
    return table[kept]


def loss_curve(run: Run, underflow: str = "flush") -> pd.Series:
    """KL against octaves above the amax, the featured mix's own calibration."""
    table = model_losses(run, underflow)
    table = table[(table.test == run.featured_mix) & (table.calibration == run.featured_mix)]
    sweep = table[table.policy.str.startswith("x2^")]
    return pd.Series(sweep.kl.to_numpy(float), sweep.policy.str[3:].astype(float)).sort_index()


def curve_at(curve: pd.Series, octaves) -> np.ndarray:
    """The curve between its points, linear in log KL; beyond its ends its last value."""
    return np.exp(np.interp(octaves, curve.index, np.log(curve)))


def break_even(curve: pd.Series, below: float) -> float:
    """How many octaves above the amax cost as much as ``below`` octaves under it; NaN if none do."""
    octaves = np.arange(0, curve.index[-1], 1 / 64)
    over = curve_at(curve, octaves) >= curve_at(curve, -below)
    return float(octaves[over.argmax()]) if over.any() else float("nan")


def _sequence_amaxes(run: Run, mix: str) -> pd.DataFrame:
    table = run.sequences(mix)
    return table.pivot_table(index="site", columns="pool", values="amax", aggfunc="max", observed=True)


@lru_cache(maxsize=4)
def growth(runs: Runs) -> pd.DataFrame:
    """prior, model, site, octaves: log2 of the amax at inference over that of calibration.

    ``published``: each of three calibration sets over each other one, per layer. ``ours``: a mix's test
    pool over the calibration pool of another mix, and longer sequences over shorter ones, per site.
    """
    ratios = pd.read_parquet(TARGET).astype({"model": str, "site": str, "set": str})
    text = ratios[ratios.set.str.startswith("ref-")]
    wide = np.log2(text.pivot(index=["model", "site", "layer"], columns="set", values="ratio"))
    wide["ref-max"] = 0.0
    parts = [
        pd.DataFrame({"prior": "published", "octaves": wide[a] - wide[b]}).reset_index()
        for a, b in itertools.permutations(wide.columns, 2)
    ]
    for run in runs:
        amaxes = {mix: _sequence_amaxes(run, mix) for mix in run.mixes}
        found = [
            np.log2(amaxes[a]["test"] / amaxes[b]["calibration"])
            for a, b in itertools.permutations(run.mixes, 2)
        ]
        layouts = run.layouts()[lambda t: t.policy == "amax"].pivot_table(
            index="site", columns="layout", values="calibrated_amax", observed=True)  # fmt: skip
        short = layouts[next(c for c in layouts if c.startswith("packed, 512"))]
        found += [np.log2(layouts[c] / short) for c in layouts if re.match(r"packed, \d{4}", str(c))]
        octaves = pd.concat(found)
        site = octaves.index.astype(str).map(kind_of)
        parts.append(pd.DataFrame({"prior": "ours", "model": label(run), "site": site,
                                   "octaves": octaves.to_numpy(float)}))  # fmt: skip
    return pd.concat(parts, ignore_index=True)[["prior", "model", "site", "octaves"]]


def expected_loss(curve: pd.Series, octaves, margins=GRID) -> np.ndarray:
    """Mean of the curve at ``margin - growth`` over the growths, for every margin."""
    return curve_at(curve, np.subtract.outer(np.asarray(margins), np.asarray(octaves))).mean(axis=1)


def flat_range(expected: np.ndarray, floor: float, margins=GRID) -> tuple[float, float, float]:
    """The margin of least expected loss, and the range around it that lies within ``floor`` percent."""
    best = int(expected.argmin())
    over = np.flatnonzero(expected > expected[best] * (1 + floor / 100))
    low = over[over < best].max(initial=-1) + 1
    high = over[over > best].min(initial=len(expected)) - 1
    return float(margins[best]), float(margins[low]), float(margins[high])


def clipping_harm(run: Run, calibration: str, test: str) -> pd.DataFrame:
    """octaves, kl: growth of each site, and what clipping it costs by the loss of one site at a time."""
    amaxes = {mix: _sequence_amaxes(run, mix) for mix in (calibration, test)}
    octaves = np.log2(amaxes[test]["test"] / amaxes[calibration]["calibration"])
    single = run.single_sites().pivot_table(index="only", columns="policy", values="kl", observed=True)
    single = single.rename(columns=lambda name: float(str(name)[3:])).sort_index(axis=1)
    kl = [np.interp([-g, 0], single.columns, single.loc[site]) for site, g in octaves.clip(0).items()]
    return pd.DataFrame({"octaves": octaves, "kl": -np.diff(kl)[:, 0]})


@lru_cache(maxsize=4)
def margin_table(runs: Runs) -> pd.DataFrame:
    """Per model and prior: break-evens, the best margin, its flat range, and the loss without one."""
    floors, rows = noise_floor(runs), []
    priors = growth(runs).groupby("prior", sort=False).octaves
    for run, (prior, octaves) in itertools.product(runs, priors):
        curve = loss_curve(run)
        expected = expected_loss(curve, octaves)
        best, low, high = flat_range(expected, floors[label(run)])
        rows.append({
            "model": label(run), "prior": prior, "as bad as 1/2 octave too low": break_even(curve, 0.5),
            "as bad as 1 octave too low": break_even(curve, 1), "best margin": best, "flat from": low,
            "flat to": high, "cost of no margin (%)": 100 * (expected[0] / expected.min() - 1),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _text(test: pd.Series, calibration: pd.Series) -> np.ndarray:
    own = calibration.isin(["", "test"]) | (calibration == test)
    return np.select([own, test.str.contains(",")], [OWN, LONGER], OTHER)


@lru_cache(maxsize=8)
def _compared(run: Run) -> pd.DataFrame:
    labels = ["test", "calibration", "policy"]
    table = run.end_to_end_sequences().astype(dict.fromkeys([*labels, "only"], str))
    kept = (table.underflow == "flush") & (table.weights == "bf16") & (table["only"] == "")
    table = table[kept & (table.policy != "none")]
    parts = []
    for test, rows in table.groupby("test", sort=False):
        wide = rows.pivot(index="sequence", columns=["calibration", "policy"], values="kl")
        weights = np.vstack([np.ones(len(wide)), resamples(len(wide))])
        sums = pd.DataFrame(weights @ wide.to_numpy(float), columns=wide.columns)
        base = sums[test].filter(regex=f"^({EQUAL_MERIT})$").mean(axis=1)
        percent = 100 * (sums.div(base, axis=0) - 1)
        low, high = (percent[1:].quantile(q) for q in (0.025, 0.975))
        found = pd.DataFrame({"percent": percent.iloc[0], "low": low, "high": high}).reset_index()
        parts.append(found.assign(model=label(run), test=test))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(text=_text(table.test, table.calibration))


@lru_cache(maxsize=4)
def compared(runs: Runs) -> pd.DataFrame:
    """model, test, calibration, text, policy, percent, low, high: flush, all activations, every text.

    95 % intervals resample sequences, paired with the calibrations of equal merit.
    """
    return pd.concat([_compared(run) for run in runs], ignore_index=True)


def noise_floor(runs: Runs) -> dict[str, float]:
    """Per model, how far a calibration of equal merit lies from their mean, percent, at most."""
    table = compared(runs)
    equal = table[(table.text == OWN) & table.policy.str.fullmatch(EQUAL_MERIT)]
    return equal.percent.abs().groupby(equal.model, sort=False).max().to_dict()


def worst(runs: Runs, policy: str, texts: tuple[str, ...] = (OWN, OTHER, LONGER)) -> pd.Series:
    """The row of a policy with the largest loss over all models and texts."""
    table = compared(runs)
    return table.loc[table[(table.policy == policy) & table.text.isin(texts)].percent.idxmax()]


def chosen(runs: Runs) -> str:
    """The first of ``CANDIDATES`` whose worst case is within the noise floor of the least one."""
    table = compared(runs)
    losses = {p: worst(runs, p).percent for p in CANDIDATES if (table.policy == p).any()}
    limit = min(losses.values()) + max(noise_floor(runs).values())
    return next(p for p, loss in losses.items() if loss <= limit)


def chosen_margin(runs: Runs) -> int:
    """Of ``MARGINS``, octaves, the nearest to the models' best one under the published prior."""
    table = margin_table(runs)
    best = table[table.prior == "published"]["best margin"].mean()
    return min(MARGINS, key=lambda k: abs(k - best))


def summary(runs: Runs) -> pd.DataFrame:
    """Percent by policy, model and text: the mean, and the worst with its interval."""
    table = compared(runs)
    table = table[table.policy.isin(SHOWN)]
    rows = {}
    for (model, policy, text), of in table.groupby(["model", "policy", "text"], sort=False):
        top = of.loc[of.percent.idxmax()]
        rows[policy, model, text] = (
            f"{of.percent.mean():+.1f}; {top.percent:+.1f} [{top.low:+.1f}, {top.high:+.1f}]"
        )
    wide = pd.Series(rows).unstack([1, 2])
    columns = [(label(r), text) for r in runs for text in (OWN, OTHER, LONGER)]
    return wide.reindex(index=[p for p in SHOWN if p in wide.index], columns=columns)


def site_losses(run: Run) -> pd.DataFrame:
    """policy, loss_snr, loss_yardstick (mean over sites, dB), worst_yardstick, against the own amax.

    The yardstick is the lower of SNR and of the SNR that weights every block alike.
    """
    table = run.metrics(run.featured_mix)
    table = table[(table.underflow == "flush") & (table.calibration == run.featured_mix)]
    table = table.astype({"site": str, "policy": str}).assign(
        snr=table.snr_db, yardstick=table[["snr_db", "block_snr_db"]].min(axis=1)
    )
    base = table[table.policy == "amax"].drop_duplicates("site").set_index("site")
    loss = {f"loss_{m}": table.site.map(base[m]) - table[m] for m in ("snr", "yardstick")}
    by_policy = table.assign(**loss).groupby("policy", sort=False)
    return by_policy[list(loss)].mean().assign(worst_yardstick=by_policy.loss_yardstick.max())


def site_places(run: Run) -> pd.DataFrame:
    """room, headroom, constant: octaves above the amax, a row per site of the featured mix."""
    table = run.policies(run.featured_mix).astype({"site": str, "policy": str})
    wide = table.pivot(index="site", columns="policy", values="calibrated_amax")
    octaves = np.log2(wide.div(wide["amax"], axis=0)).rename(columns={"raised-all": "room"})
    return octaves[["room", "headroom", "constant"]]


def accuracies() -> pd.DataFrame:
    """Published accuracy with headroom minus that with amax, points: model by benchmark."""
    rows = json.loads(PUBLISHED.read_text())["headroom_study"]["downstream_delta_actmax_minus_max"]
    return pd.DataFrame(rows).set_index("model").drop(columns="mlp")


def answer(runs: Runs) -> str:
    """The verdict, simple HTML."""
    policy, floor = chosen(runs), max(noise_floor(runs).values())
    plain, best = worst(runs, "amax").percent, worst(runs, policy).percent
    if policy == "amax":
        return (
            "<strong>The amax: never clip.</strong> Room above it buys nothing here: whatever the text, "
            f"the amax costs at most {plain:+.1f} % of the KL divergence, beside a noise floor of "
            f"{floor:.1f} %. {_scope(runs)}"
        )
    table = compared(runs)
    home = table[(table.policy == policy) & (table.text == OWN)].percent.mean()
    costs = "it is no better than the amax and costs nothing"
    if abs(home) > floor:
        costs = f"it changes the KL divergence by {home:+.1f} %"
    return (
        f"<strong>Never clip, and leave room above: <code>{CALLS[policy][0]}</code>.</strong> On text "
        f"like the calibration's {costs}; it is insurance: over all texts the worst case of the amax is "
        f"{plain:+.0f} % of the KL divergence, of this {best:+.1f} %, beside a noise floor of "
        f"{floor:.1f} %. {_scope(runs)}"
    )


def _scope(runs: Runs) -> str:
    return f"Measured as KL on {', '.join(map(label, runs))}; not as accuracy, nor on large models."


def recommendation(runs: Runs) -> str:
    """One sentence with the formula and the call, Markdown."""
    policy = chosen(runs)
    formula, call = CALLS[policy]
    room = ", where `room` is by how many octaves the amax may be raised before its blocks notice"
    return (
        f"Set `input_scale = {formula}`{room if 'room' in formula else ''}: "
        f"`input_scale_from_amax({call})`."
    )


def _range(values) -> str:
    return f"{min(values):+.1f} to {max(values):+.1f} %"


def decision_table(runs: Runs) -> pd.DataFrame:
    """set, measured here, published: indexed by what the statistics look like."""
    table, margin, policy = compared(runs), chosen_margin(runs), chosen(runs)
    loss = {p: table[table.policy == p].percent for p in SHOWN}
    other = {p: worst(runs, p, (OTHER,)).percent for p in ("amax", policy)}
    places = pd.concat([site_places(run) for run in runs])
    of = f"of {len(places)} sites"
    norm = places[places.index.str.contains("attention_input|mlp_input")].room
    reach = growth(runs).groupby(["prior", "site"]).octaves.max()
    points = accuracies()
    first = points.iloc[0]
    four, token = _range(loss["four-over-six"]), _range(loss["dynamic per token"])
    rows = [
        ("Text may change, or there is little of it", f"{policy}: {CALLS[policy][0]}",
         f"other text: amax up to {other['amax']:+.0f} %, {policy} up to {other[policy]:+.1f} %",
         f"headroom minus amax: {points.min(axis=None):+.2f} to {points.max(axis=None):+.2f} points"),
        ("Your tool gives only the amax", f"{2**margin} times its input_scale",
         f"{_range(loss[f'x2^{margin}'])} on any text", "–"),
        ("Inputs after a norm (q, k, v, gate, up)", f"{policy}: there is room",
         f"room of {norm.min():.0f} to {norm.max():.0f} octaves; other text exceeds the amax by up to "
         f"{reach['ours'].filter(regex='attention|mlp').max():.1f}",
         f"by up to {reach['published', 'mlp_input']:.1f} octaves"),
        ("Massive activations, as at some down_proj inputs: room 0", "the amax; no margin or headroom",
         f"room 0 at {(places.room == 0).sum()}, headroom clips at {(places.headroom < 0).sum()} {of}: "
         f"headroom {_range(loss['headroom'])}",
         f"other text exceeds the amax by up to {reach['published', 'down_proj_input']:.1f} octaves"),
        ("No calibration possible", "1.0, after checking B_max ≤ 2688 ≤ 28672 p1 on any text you have",
         f"{_range(loss['constant'])}; too low at {(places.constant < 0).sum()}, beyond the room at "
         f"{(places.constant > places.room).sum()} {of}", "–"),
        ("You want more than a scale can give", "four-over-six, or a scale per token",
         f"four-over-six {four}, per token {token}", "–"),
        ("Mixture of experts, experts that calibration never reached", "not measured", "–",
         f"{points.index[0]}, headroom minus amax: {first.min():+.2f} to {first.max():+.2f} points"),
        ("A percentile of the elements", "never", f"p99.99: {_range(loss['p99.99'])}", "–"),
    ]  # fmt: skip
    columns = ["your statistics", "set", "measured here (KL)", "published (pull request 1573)"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[0])
