# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""From what was measured to what to set: one policy, its exceptions, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nvfp4_utils.quantize import AMAX_PER_SCALE, input_scale_from_amax
from nvfp4_utils.sites import Coverage, kind_of, layer_of
from studies.runs.scoring import resamples

from .measure import CANDIDATES, EXACT_DB, Numbers
from .rules import HARM, HARMLESS_DB, Finding, finding, site_findings

DEFAULT = CANDIDATES[0]
FORMULAS = {
    "amax": "amax / 2688",
    "raised": "amax · 2^(room/2) / 2688",
    "raised-all": "amax · 2^room / 2688",
    "headroom-amax": "max(amax, 16384 p1, p99.99) / 2688, percentiles of the nonzero block amaxes",
}
ENOUGH_SITES = 0.9  # share of the sites whose amax must have been seen for "sure"


def losses(groups: Numbers) -> dict[str, np.ndarray]:
    """Yardstick of each policy in dB: first as measured, then in each bootstrap draw over sequences.

    The larger of the losses of SNR and of block SNR, to the best of each. One seed: all sites of a pool
    see the same draws, so means over sites may be taken draw by draw.
    """
    count = len(groups["signal"])
    weights = np.vstack([np.ones(count), resamples(count)])

    def snr(signal, error) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 10 * np.log10((weights @ np.array(signal))[:, None] / (weights @ np.array(error)))
        return np.minimum(ratio, EXACT_DB)

    plain = snr(groups["signal"], groups["error"])
    unit = snr(groups["unit_signal"], groups["unit_error"])
    larger = np.maximum(plain[:, -2:-1] - plain, unit[:, -1:] - unit)
    return {name: np.nan_to_num(larger[:, i]) for i, name in enumerate(groups["policies"])}


def interval(draws: np.ndarray) -> dict[str, float]:
    """value, low, high: as measured, and the 95 % interval of the draws."""
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}


def worst_losses(
    calibrated: Mapping[str, Numbers], pools: list[Mapping[str, Numbers]]
) -> dict[str, dict]:
    """site -> candidate -> the larger loss over the pools, flush, dB; without sites that have none."""
    found = {}
    for site in calibrated:
        scored = [pool[site]["policies"] for pool in pools if pool[site]["policies"]]
        names = [n for n in CANDIDATES if calibrated[site]["calibrated_amax"][n] is not None]
        if scored and names:
            found[site] = {n: max(s[n]["flush"]["loss_db"] for s in scored) for n in names}
    return found


def choose(worst: Mapping[str, Mapping[str, float]]) -> tuple[str, str, list[dict]]:
    """The policy, why, and the sites that take another one.

    The default stands unless its mean loss over the sites exceeds that of another candidate by over
    ``HARMLESS_DB``; then it is the first candidate that is no worse than that. A site takes another
    candidate where the policy's loss exceeds the best candidate's by over ``HARMLESS_DB``.
    """
    means = {n: np.mean([w[n] for w in worst.values()]) for n in CANDIDATES} if worst else {}
    limit = min(means.values(), default=0.0) + HARMLESS_DB
    policy = next((n for n, mean in means.items() if mean <= limit), DEFAULT)
    if policy == DEFAULT:
        why = (
            f"it is the default, and no other candidate ({', '.join(CANDIDATES[1:])}) is better by over"
            f" {HARMLESS_DB} dB on the mean of the sites"
        )
    else:
        why = (
            f"{DEFAULT} loses {means[DEFAULT]:.2f} dB on the mean of the sites, {policy} "
            f"{means[policy]:.2f}: over {HARMLESS_DB} dB less"
        )
    exceptions = []
    for site, of in worst.items():
        limit = min(of.values()) + HARMLESS_DB
        if of[policy] > limit:
            other = next(n for n in CANDIDATES if n in of and of[n] <= limit)
            exceptions.append(
                {
                    "site": site,
                    "policy": other,
                    "why": (
                        f"{policy} loses {of[policy]:.2f} dB, {other} {of[other]:.2f}: over"
                        f" {HARMLESS_DB} dB less"
                    ),
                }
            )
    return policy, why, exceptions


def scales_of(
    calibrated: Mapping[str, Numbers], policy: str, exceptions: list[dict]
) -> dict[str, tuple[str, float]]:
    """site -> (policy, calibrated amax). A dead site takes the largest of its kind, else 2688."""
    other = {e["site"]: e["policy"] for e in exceptions}
    found = {}
    for site, of in calibrated.items():
        name = other.get(site, policy)
        amax = of["calibrated_amax"][name]
        if amax is not None:
            found[site] = (name, amax)
    filled = {}
    for site in calibrated:
        same = [a for s, (_, a) in found.items() if kind_of(s) == kind_of(site)]
        filled[site] = found.get(
            site, ("largest of its kind" if same else "constant", max(same, default=AMAX_PER_SCALE))
        )
    return filled


def by_kl(evaluation: dict | None, policy: str) -> str:
    """Why the model's own loss overrules the policy for ``amax``; empty if it does not."""
    if not evaluation or policy == "amax":
        return ""
    chosen, plain = evaluation["kl"].get("A recommended"), evaluation["kl"].get("A amax")
    if chosen and plain and all(a > HARM * b for a, b in zip(chosen, plain, strict=True)):
        return (
            f"in every one of {len(plain)} held-out sequences the KL divergence with {policy} exceeds "
            f"{HARM:g} times that with amax"
        )
    return ""


def site_entry(
    label: str,
    calibrated: Numbers,
    held_out: Numbers,
    foreign: Numbers | None,
    chosen: tuple[str, float],
    linears: list[str],
) -> Numbers:
    """One site of the report, as ``schema`` describes it."""
    policy, amax = chosen
    groups = held_out["groups"]
    draws = losses(groups) if groups else {}
    own = held_out["policies"].get(policy, {})
    entry = {
        "kind": kind_of(label),
        "layer": layer_of(label),
        "linears": linears,
        "policy": policy,
        "recommended_amax": amax,
        "input_scale": input_scale_from_amax(amax),
        "slack_low_octaves": own.get("slack_low_octaves"),
        "slack_high_octaves": own.get("slack_high_octaves"),
        "loss_db": interval(draws[policy]) if policy in draws else None,
        "loss_db_amax": interval(draws["amax"]) if "amax" in draws else None,
        **calibrated,
        "held_out_amax": held_out["amax"],
        "held_out_room_octaves": held_out["room_octaves"],
        **{k: held_out[k] for k in ("policies", "oracle", "curve")},
        "foreign": foreign and {k: foreign[k] for k in ("amax", "room_octaves", "policies", "oracle")},
    }
    found = sorted(site_findings(label, entry), key=lambda f: f["severity"])  # attention first
    return entry | {"findings": found}


def urgency(item: tuple[str, Numbers]) -> tuple:
    """Sort key, worst first: findings that want attention, then the loss, then findings at all."""
    _, site = item
    grave = sum(f["severity"] == "attention" for f in site["findings"])
    loss = site["loss_db"]["value"] if site["loss_db"] else 0.0
    return -grave, -round(loss, 3), -len(site["findings"])


def mean_loss(held_out: Mapping[str, Numbers], policies: Mapping[str, str]) -> dict[str, float] | None:
    """The mean over sites of the loss of each site's policy, with its interval; None without sites."""
    draws = [losses(of["groups"]) for of in held_out.values() if of["groups"]]
    sites = [site for site, of in held_out.items() if of["groups"]]
    kept = [d[policies[s]] for s, d in zip(sites, draws, strict=True) if policies[s] in d]
    return interval(np.mean(kept, axis=0)) if kept else None


def model_findings(report: dict) -> list[Finding]:
    """What is to be said of the whole model."""
    found = []
    if report["model"]["uncovered"]:
        names = report["model"]["uncovered"]
        found.append(
            finding(
                "uncovered",
                "",
                len(names),
                f"the inputs of {len(names)} linears are not measured: "
                f"{Coverage({}, names).described()}",
            )
        )
    means = policy_means(report["sites"])
    lossy = {name: mean for name, mean in means.items() if mean > HARMLESS_DB}
    if lossy:
        listed = ", ".join(f"{name} {mean:.1f} dB" for name, mean in lossy.items())
        found.append(
            finding("avoid", "", max(lossy.values()), f"lost on the mean of the sites: {listed}")
        )
    kl = (report["evaluation"] or {}).get("kl", {})
    if "W" in kl and np.mean(kl["W"]) >= np.mean(kl["A recommended"]):
        ratio = float(np.mean(kl["W"]) / np.mean(kl["A recommended"]))
        found.append(
            finding(
                "weights",
                "",
                ratio,
                f"the weights alone cost {ratio:.1f} times the KL divergence of the activations alone",
            )
        )
    if report["text"]["default"]:
        found.append(finding("text", "", None, "the text is Python's documentation and source"))
    return found


def policy_means(sites: Mapping[str, Numbers]) -> dict[str, float]:
    """Mean loss of every policy over the sites that have it, flush, dB."""
    losses: dict[str, list[float]] = {}
    for site in sites.values():
        for name, of in site["policies"].items():
            losses.setdefault(name, []).append(of["flush"]["loss_db"])
    return {name: float(np.mean(values)) for name, values in losses.items()}


def doubts(report: dict) -> list[str]:
    """Why the recommendation may be wrong; none: fairly sure."""
    found = []
    loss = report["recommendation"]["loss_db"]
    if loss is None or loss["high"] > HARMLESS_DB:
        high = "unknown" if loss is None else f"{loss['high']:.2f} dB"
        found.append(f"the upper end of its mean loss is {high}, over {HARMLESS_DB} dB")
    growths = [s["growth"] for s in report["sites"].values() if s["growth"]]
    enough = sum(g["enough_at"] is not None for g in growths)
    if enough < ENOUGH_SITES * len(growths):
        found.append(
            f"at {len(growths) - enough} of {len(growths)} sites (over {1 - ENOUGH_SITES:.0%}) more "
            "sequences would still move the amax"
        )
    if report["model"]["uncovered"]:
        found.append(f"{len(report['model']['uncovered'])} linears' inputs are not measured")
    if report["text"]["default"]:
        found.append("the text is not yours")
    return found
