# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What a report says in words: the first screen, and ten lines for a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from studies import ROOT

from . import schema
from .verdict import policy_means


def load(path: str | Path) -> dict:
    """A report as ``make recommend`` wrote it; relative paths are from the repository's root.

    Raises ``FileNotFoundError`` if there is none, ``ValueError`` if it is not as ``schema`` says.
    """
    file = ROOT / path
    if not file.is_file():
        raise FileNotFoundError(
            f"no report at {file}; make one with `make recommend MODEL=... RUN=...`."
        )
    return schema.check(json.loads(file.read_text()))


def with_interval(loss: dict | None) -> str:
    """A loss and its interval in dB."""
    if loss is None:
        return "unknown"
    return f"{loss['value']:.2f} dB [{loss['low']:.2f}, {loss['high']:.2f}]"


def wanting_attention(report: dict) -> list[str]:
    """The sites with a finding of that severity, worst first."""
    sites = report["sites"].items()
    return [s for s, of in sites if any(f["severity"] == "attention" for f in of["findings"])]


def worst_site(report: dict) -> str:
    """The site whose recommended scale loses most on held-out text, with its loss."""
    losses = {s: of["loss_db"]["value"] for s, of in report["sites"].items() if of["loss_db"]}
    if not losses:
        return ""
    site = max(losses, key=losses.__getitem__)
    return f"{site} ({losses[site]:.2f} dB)"


def kl_sentence(report: dict) -> str:
    """What the model itself loses, and to what; empty where it was not evaluated."""
    evaluation = report["evaluation"]
    if not evaluation or not evaluation["kl"]:
        return ""
    kl = {name: float(np.mean(values)) for name, values in evaluation["kl"].items()}
    parts = [f"activations alone {kl['A recommended']:.3g} (with amax {kl['A amax']:.3g})"]
    if "W" in kl:
        parts.append(f"weights alone {kl['W']:.3g}")
        parts.append(f"both {kl['W and A recommended']:.3g}")
    if "A per token" in kl:
        parts.append(f"activations with a scale per token {kl['A per token']:.3g}")
    return (
        f"KL divergence from the unquantized model, nats per token, {evaluation['sequences']} held-out "
        f"sequences: {', '.join(parts)}."
    )


def sureness(report: dict) -> str:
    """How sure the recommendation is, and why not more."""
    found = report["recommendation"]["doubts"]
    return f"Not sure yet: {'; '.join(found)}." if found else "Fairly sure: no rule speaks against it."


def exceptions(report: dict) -> str:
    """How many sites take another policy, and which."""
    other = report["recommendation"]["exceptions"]
    if not other:
        return ""
    named = ", ".join(f"{e['site']} ({e['policy']})" for e in other[:4])
    return f"but at {len(other)} sites: {named}{' and more' if len(other) > 4 else ''}"


def summary_lines(report: dict) -> list[str]:
    """What to do, in at most ten lines."""
    of, text = report["recommendation"], report["text"]
    grave, count = wanting_attention(report), len(report["sites"])
    count_policies = len(policy_means(report["sites"]))
    avoid = [f["text"] for f in report["findings"] if f["rule"] == "avoid"]
    lines = [
        (
            f"Model     {report['model']['name']}: {count} sites, {len(report['model']['uncovered'])}"
            " inputs not measured"
        ),
        f"Set       input_scale = {of['formula']}  ({of['policy']} {exceptions(report)})".replace(
            " )", ")"
        ),
        f"Because   {of['why']}",
        (
            f"Loss      {with_interval(of['loss_db'])} to the best scale of each site; amax "
            f"{with_interval(of['loss_db_amax'])}; worst {worst_site(report)}"
        ),
        (
            f"Look at   {len(grave)} of {count} sites:"
            f" {', '.join(grave[:4])}{' and more' if grave[4:] else ''}"
            if grave
            else f"Look at   no site: none of {count} has a finding that wants attention"
        ),
        (
            f"Avoid     {'; '.join(avoid)}"
            if avoid
            else (
                f"Avoid     nothing compared: all {count_policies} policies stay within the threshold on"
                " the mean"
            )
        ),
        (
            f"Model     {kl_sentence(report)}"
            if kl_sentence(report)
            else f"Model     not evaluated: {'; '.join((report['evaluation'] or {}).get('skipped', []))}"
        ),
        f"Sure?     {sureness(report)}",
        (
            f"Text      {text['calibration']}: calibrated on {text['calibration_sequences']} sequences"
            f" of {text['length']} tokens, measured on {text['held_out_sequences']} others"
        ),
        "Scales    sites.<site>.input_scale in report.json",
    ]
    return lines
