# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A report's tables."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from .rules import FACTOR
from .verdict import policy_means
from .words import with_interval

SEVERITY = {"attention": "needs attention", "note": "note"}


def findings_table(report: dict) -> pd.DataFrame:
    """The findings of the whole model: severity, what was seen, the rule, the advice."""
    rows = [
        {
            "": SEVERITY[f["severity"]],
            "seen": f["text"],
            "rule": f"{f['rule']}: {report['rules'][f['rule']]['text']}",
            "what to do": f["advice"],
        }
        for f in report["findings"]
    ]
    return pd.DataFrame(rows, columns=["", "seen", "rule", "what to do"]).set_index("").rename_axis(None)


def policy_table(report: dict) -> pd.DataFrame:
    """Policies: octaves above amax, loss (mean, worst), share saturated and flushed (worst)."""
    sites = [s for s in report["sites"].values() if s["policies"]]
    rows = {}
    for name in policy_means(report["sites"]):
        of = [s["policies"][name] for s in sites if name in s["policies"]]
        above = [np.log2(s["calibrated_amax"][name] / s["amax"]) for s in sites if name in s["policies"]]
        flush = [p["flush"]["loss_db"] for p in of]
        rows[name] = {
            "octaves above amax": np.median(above),
            "mean loss (dB)": np.mean(flush),
            "worst (dB)": max(flush),
            "worst, floor (dB)": max(p["floor"]["loss_db"] for p in of),
            "saturated, worst (%)": 100 * max(p["saturated"] for p in of),
            "flushed, worst (%)": 100 * max(p["flushed"] for p in of),
            "sites": len(of),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def site_table(report: dict) -> pd.DataFrame:
    """Every site, worst first: what to set, its loss beside amax's, slack, shares, findings."""
    rows = {}
    for label, s in report["sites"].items():
        own = s["policies"].get(s["policy"])
        rows[label] = {
            "findings": (
                ", ".join(
                    f["rule"].upper() if f["severity"] == "attention" else f["rule"]
                    for f in s["findings"]
                )
                or "–"
            ),
            "policy": s["policy"],
            "input_scale": f"{s['input_scale']:.4g}",
            "loss (dB)": with_interval(s["loss_db"]).replace(" dB", ""),
            "amax's": _number(s["loss_db_amax"] and s["loss_db_amax"]["value"], ".2f"),
            "floor": _number(own and own["floor"]["loss_db"], ".2f"),
            "SNR (dB)": _number(own and own["flush"]["snr_db"], ".1f"),
            "to saturation": _number(s["slack_low_octaves"], "+.1f"),
            "to underflow": _number(s["slack_high_octaves"], "+.1f"),
            "saturated %": _number(own and 100 * own["saturated"], ".3g"),
            "subnormal %": _number(own and 100 * own["subnormal"], ".3g"),
            "flushed %": _number(own and 100 * own["flushed"], ".3g"),
            "enough at": (s["growth"] and (s["growth"]["enough_at"] or "more")) or "–",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else f"{value:{style}}"


def site_findings_table(report: dict, label: str) -> pd.DataFrame:
    """The findings of one site."""
    rows = [
        {
            "": SEVERITY[f["severity"]],
            "seen": f["text"],
            "rule": report["rules"][f["rule"]]["text"],
            "what to do": f["advice"],
        }
        for f in report["sites"][label]["findings"]
    ]
    return pd.DataFrame(rows, columns=["", "seen", "rule", "what to do"]).set_index("").rename_axis(None)


def evaluation_table(report: dict) -> pd.DataFrame:
    """The model itself: KL, NLL and agreement by setting, means over the sequences, and KL's range."""
    of = report["evaluation"]
    rows = {
        name: {
            "KL (nats)": np.mean(values),
            "least": min(values),
            "most": max(values),
            "NLL (nats)": np.mean(of["nll"][name]),
            "same top token (%)": 100 * np.mean(of["top1"][name]),
        }
        for name, values in of["kl"].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def massive_table(report: dict) -> pd.DataFrame:
    """Sites whose amax is massive: over the median token's, where it stands, in which channel."""
    rows = {
        label: {
            "amax": s["amax"],
            "over the median token's": s["massive"]["over_token"],
            "at position 0 (%)": 100 * s["massive"]["at_position_0"],
            "token": s["massive"]["token"],
            "channel": s["massive"]["channel"],
        }
        for label, s in report["sites"].items()
        if s["massive"] and (s["massive"]["over_token"] or 0) >= FACTOR
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def growth_table(report: dict) -> pd.DataFrame:
    """By kind of site: expected share of the pool's amax in n sequences, the least over the sites."""
    shares: dict[str, list] = {}
    for site in report["sites"].values():
        if site["growth"]:
            shares.setdefault(site["kind"], []).append(site["growth"])
    rows = {}
    for kind, laws in shares.items():
        least = np.min([law["share"] for law in laws], axis=0)
        enough = [law["enough_at"] for law in laws]
        rows[kind] = dict(zip(map(str, laws[0]["sequences"]), least, strict=True))
        rows[kind]["enough at"] = max((n for n in enough if n), default=0) if all(enough) else "more"
    return pd.DataFrame.from_dict(rows, orient="index")


def foreign_table(report: dict) -> pd.DataFrame:
    """Loss on the second text: the recommendation and amax, by kind of site, mean and worst."""
    rows: dict[str, dict[str, list]] = {}
    for site in report["sites"].values():
        policies = (site["foreign"] or {}).get("policies", {})
        for what, name in (("recommended", site["policy"]), ("amax", "amax")):
            if name in policies:
                rows.setdefault(site["kind"], {}).setdefault(what, []).append(
                    policies[name]["flush"]["loss_db"]
                )
    table = {
        kind: dict(
            itertools.chain.from_iterable(
                ((f"{what}, mean (dB)", np.mean(v)), (f"{what}, worst (dB)", max(v)))
                for what, v in of.items()
            )
        )
        for kind, of in rows.items()
    }
    return pd.DataFrame.from_dict(table, orient="index")


def rules_table(report: dict) -> pd.DataFrame:
    """Every rule that can fire, with its threshold in its text, and how often it did."""
    fired = [f["rule"] for f in report["findings"]]
    fired += [f["rule"] for s in report["sites"].values() for f in s["findings"]]
    rows = {
        name: {
            "severity": SEVERITY[rule["severity"]],
            "fires when": rule["text"],
            "fired": fired.count(name),
        }
        for name, rule in report["rules"].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")
