# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""``report.json``: what it holds, and a check of it.

Amaxes and scales are in the activation's units, losses and SNRs in dB, slacks and rooms in octaves
(doublings), shares are of 1, KL divergence and NLL in nats per token. A number that does not exist,
as of a site without nonzero values, is null. An SNR of 150 stands for no error at all. Losses are
under ``flush`` unless ``floor`` is named.

``format``
    1.
``model``
    ``name``; ``source``: folder or hub id; ``parameters``; ``kinds``: kinds of site; ``uncovered``:
    linear or fused experts that no site feeds -> why.
``text``
    ``calibration``: mix or folder; ``default``: whether it is the embedded mix;
    ``calibration_sequences``, ``held_out_sequences``, ``foreign_sequences``, each of ``length``
    tokens; ``foreign``: second mix or null.
``recommendation``
    ``policy``; ``formula``; ``why``: the rule that chose it; ``exceptions``: list of ``site``,
    ``policy``, ``why``; ``loss_db``, ``loss_db_amax``: mean over sites of the loss to the best
    scale of each site on held-out text, with 95 % interval over sequences (``value``, ``low``,
    ``high``); ``attention``: sites with a finding of that severity; ``doubts``: sentences, none if
    fairly sure.
``evaluation``
    null, or the model's own loss: ``sequences``, ``tokens``, ``kl``, ``nll``, ``top1``: setting ->
    a value per sequence; ``skipped``: sentences.
``findings``
    Of the whole model: ``site`` (empty), ``rule``, ``severity`` (attention, note), ``value``,
    ``threshold``, ``text``, ``advice``.
``rules``
    rule -> ``text``, ``threshold``, ``severity``, ``advice``.
``sites``
    label -> a site, worst first:

    ``kind``, ``layer``; ``linears``: names of the linears that read it, which share its scale;
    ``policy``, ``recommended_amax``, ``input_scale``: what to set;
    ``slack_low_octaves``, ``slack_high_octaves``: from it down to saturation, the held-out amax,
    and up to underflow, where the held-out error of blocks rises by 1 %; ``loss_db``,
    ``loss_db_amax``: of the recommendation and of amax, with interval;
    of calibration: ``elements``; ``amax``; ``distinct_magnitudes``; ``zero_blocks`` (share);
    ``calibrated_amax``: policy -> amax; ``block_amax``: ``min``, ``p1``, ``p99.99``, ``amax`` of
    the nonzero block amaxes; ``room_octaves``; ``massive``: ``over_token``, ``at_position_0``,
    ``token``, ``channel``; ``growth``: ``sequences``, ``share``, ``share_of_half``,
    ``enough_at``; ``experts``: null, or ``tokens`` and ``amax`` per expert;
    of held-out text: ``held_out_amax``; ``held_out_room_octaves``; ``policies``: policy -> the
    slacks, ``saturated``, ``subnormal``, ``flushed`` (shares of the nonzero blocks), and ``flush``
    and ``floor`` with ``snr_db``, ``block_snr_db``, ``loss_db``; ``oracle``: convention ->
    ``calibrated_amax`` and the same; ``curve``: ``octaves`` from the held-out amax, convention ->
    ``snr_db``, ``block_snr_db``; ``foreign``: null, or ``amax``, ``room_octaves``, ``policies`` and
    ``oracle`` on the second text; ``findings``: as above.
``seconds``
    what each part took, ``forward``: the plain forward of all sequences, from one batch.
``provenance``
    commit, versions, device, date, parameters, hashes.
"""

from __future__ import annotations

import math
from typing import Any

FORMAT = 1
NUMBER = (int, float)
SITE: dict[str, Any] = {
    "kind": str,
    "layer": (int, None),
    "linears": list,
    "policy": str,
    "recommended_amax": NUMBER,
    "input_scale": NUMBER,
    "slack_low_octaves": (*NUMBER, None),
    "slack_high_octaves": (*NUMBER, None),
    "loss_db": (dict, None),
    "loss_db_amax": (dict, None),
    "elements": int,
    "amax": NUMBER,
    "distinct_magnitudes": int,
    "zero_blocks": NUMBER,
    "calibrated_amax": dict,
    "block_amax": (dict, None),
    "room_octaves": (int, None),
    "massive": (dict, None),
    "growth": (dict, None),
    "experts": (dict, None),
    "held_out_amax": NUMBER,
    "held_out_room_octaves": (int, None),
    "policies": dict,
    "oracle": (dict, None),
    "curve": (dict, None),
    "foreign": (dict, None),
    "findings": list,
}
REPORT: dict[str, Any] = {
    "format": int,
    "model": dict,
    "text": dict,
    "recommendation": dict,
    "evaluation": (dict, None),
    "findings": list,
    "rules": dict,
    "sites": dict,
    "seconds": dict,
    "provenance": dict,
}


def check(report: dict) -> dict:
    """Return the report; ``ValueError`` naming what is missing, too much or of another type."""
    wrong = _wrong(report, REPORT, "")
    for label, site in report.get("sites", {}).items():
        wrong += _wrong(site, SITE, f"sites.{label}.")
    if report.get("format") != FORMAT:
        wrong.append(f"format is {report.get('format')}, expected {FORMAT}")
    if wrong:
        raise ValueError(f"the report does not fit its description: {'; '.join(wrong[:5])}")
    return report


def _wrong(of: dict, expected: dict[str, Any], where: str) -> list[str]:
    found = [f"{where}{name} is missing" for name in expected if name not in of]
    found += [f"{where}{name} is not described" for name in of if name not in expected]
    for name, types in expected.items():
        allowed = types if isinstance(types, tuple) else (types,)
        plain = tuple(t for t in allowed if t is not None)
        value = of.get(name)
        if name in of and not (isinstance(value, plain) or (value is None and None in allowed)):
            found.append(f"{where}{name} is {type(value).__name__}")
    return found


def plain(value: Any) -> Any:
    """The same with infinity and NaN as null, which JSON has no word for, and tuples as lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
