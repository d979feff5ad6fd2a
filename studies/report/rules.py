# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What is worth saying of a site: every finding has a rule, a threshold and an advice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nvfp4_utils.quantize import E4M3_NORMAL_RANGE

Severity = Literal["attention", "note"]
Finding = dict[str, Any]

HARMLESS_DB = 0.5  # a loss up to this is read as "no harm": what the page on which number to watch found
HARMLESS_SHARE = 0.001  # of the nonzero blocks
FACTOR = 32.0  # times the median token's amax, from which a site's amax is massive
NARROW = 1.0  # octave: text of another kind moves an amax by that much
EXPERT_TOKENS = 512  # one sequence's worth
HARM = 1.1  # times the KL divergence of amax: harmful


@dataclass(frozen=True)
class Rule:
    """A rule as the report states it. ``text`` says when it fires, with the threshold in it."""

    severity: Severity
    threshold: float
    text: str
    advice: str


RULES: dict[str, Rule] = {
    "dead": Rule(
        "attention",
        0.0,
        "No value of the calibration pool is nonzero.",
        "There is nothing to calibrate. The scale given is that of the largest site of its kind: a"
        " checkpoint must hold a positive one. Calibrate on text that reaches this input, or check the"
        " model.",
    ),
    "constant": Rule(
        "attention",
        1,
        "At most 1 distinct nonzero magnitude occurs.",
        "An input that does not vary carries nothing. Check the layer that feeds it.",
    ),
    "experts": Rule(
        "attention",
        EXPERT_TOKENS,
        f"An expert saw fewer than {EXPERT_TOKENS} tokens.",
        "Its amax says little. Take the largest amax of the layer's experts for it, or calibrate on more"
        " text.",
    ),
    "lossy": Rule(
        "attention",
        HARMLESS_DB,
        f"The recommended scale loses more than {HARMLESS_DB} dB to the best one on held-out text.",
        "Look at the figure: if the place is left of the plateau, raise the amax; if right, lower it.",
    ),
    "saturates": Rule(
        "attention",
        HARMLESS_SHARE,
        f"At the recommended scale more than {HARMLESS_SHARE:.1%} of the nonzero held-out blocks"
        " saturate.",
        "Calibrate on more text, or raise the amax.",
    ),
    "flushes": Rule(
        "attention",
        HARMLESS_SHARE,
        f"At the recommended scale more than {HARMLESS_SHARE:.1%} of the nonzero held-out blocks flush"
        " to 0.",
        "Lower the amax, or quantize this input with a scale per token, or keep it in higher precision.",
    ),
    "wide": Rule(
        "attention",
        0.0,
        f"More than 1 % of the nonzero blocks lie over a factor {E4M3_NORMAL_RANGE:g} below the amax: "
        "no scale keeps both ends normal.",
        "No calibration helps: a scale per token (dynamic) where the large values sit in few tokens,"
        " else higher precision for the linears that read this input.",
    ),
    "foreign": Rule(
        "attention",
        HARMLESS_DB,
        f"On the second text the recommended scale loses more than {HARMLESS_DB} dB to the best one.",
        "Calibrate on both texts.",
    ),
    "convention": Rule(
        "note",
        HARMLESS_DB,
        "The losses under flush (kernels) and floor (ModelOpt's reference) differ by over"
        f" {HARMLESS_DB} dB.",
        "Accuracy measured with a fake quantizer does not carry over: trust flush.",
    ),
    "above": Rule(
        "note",
        0.0,
        "The largest held-out value exceeds the recommended amax.",
        "It saturates. The loss says whether that matters.",
    ),
    "narrow": Rule(
        "note",
        NARROW,
        f"Less than {NARROW:g} octave is left to a cliff on held-out text.",
        "Other text may push this site over. Calibrate on the text that will be served.",
    ),
    "massive": Rule(
        "note",
        FACTOR,
        f"The amax is at least {FACTOR:g} times that of the median token.",
        "Do not clip here: no percentile, and plain headroom only if it stays above the amax.",
    ),
    "growing": Rule(
        "note",
        0.9,
        "Half of the calibration sequences show on average less than 90 % of the pool's amax.",
        "More sequences would move the amax. The room above it is what the recommended scale relies on.",
    ),
    "uncovered": Rule(
        "attention",
        0,
        "A linear, or a parameter of fused experts, reads no site that is measured.",
        "Nothing is known of these inputs. Keep them in higher precision, or calibrate them elsewhere.",
    ),
    "weights": Rule(
        "note",
        1.0,
        "Quantizing the weights alone costs at least as much KL divergence as the activations alone.",
        "Activation scales will not win the loss back: improve the weights' quantization first.",
    ),
    "avoid": Rule(
        "note",
        HARMLESS_DB,
        f"Policies that lose over {HARMLESS_DB} dB to the best scale on the mean of all sites.",
        "Do not use them on this model.",
    ),
    "text": Rule(
        "note",
        0,
        "Calibrated on the documentation and source text that comes with Python.",
        "Give DATASET=folder with text like that which will be served.",
    ),
}


def finding(rule: str, site: str, value: float | None, text: str) -> Finding:
    """A finding: ``text`` says what was seen; severity, threshold and advice are the rule's."""
    of = RULES[rule]
    return {
        "site": site,
        "rule": rule,
        "severity": of.severity,
        "value": value,
        "threshold": of.threshold,
        "text": text,
        "advice": of.advice,
    }


def wide_octaves(site: dict) -> float:
    """Octaves from the amax up to 28672 times p1 of the nonzero block amaxes; negative: wide."""
    return math.log2(E4M3_NORMAL_RANGE * site["block_amax"]["p1"] / site["amax"])


def site_findings(label: str, site: dict) -> Iterator[Finding]:
    """Every finding of one site as ``schema`` describes it."""

    def say(rule: str, value: float | None, text: str) -> Finding:
        return finding(rule, label, value, text)

    yield from _calibration_findings(site, say)
    chosen = site["policies"].get(site["policy"])
    if chosen:
        yield from _held_out_findings(site, chosen, say)
    of_foreign = (site["foreign"] or {}).get("policies", {}).get(site["policy"])
    if of_foreign and of_foreign["flush"]["loss_db"] > HARMLESS_DB:
        loss = of_foreign["flush"]["loss_db"]
        above = -of_foreign["slack_low_octaves"]
        where = f"; its amax is {above:.1f} octaves above the scale" if above > 0 else ""
        yield say("foreign", loss, f"loses {loss:.2f} dB on the second text{where}")


def _calibration_findings(site: dict, say) -> Iterator[Finding]:
    if not site["amax"] > 0:
        yield say("dead", 0.0, "all of its calibration values are zero")
        return
    nonzero = site["distinct_magnitudes"] - (site["zero_blocks"] > 0)
    if nonzero <= RULES["constant"].threshold:
        yield say("constant", nonzero, f"its magnitude is {site['amax']:.4g} or zero everywhere")
    if site["experts"]:
        few = [i for i, n in enumerate(site["experts"]["tokens"]) if n < EXPERT_TOKENS]
        if few:
            least = min(site["experts"]["tokens"])
            yield say(
                "experts",
                least,
                f"{len(few)} of {len(site['experts']['tokens'])} experts saw few "
                f"tokens, the least {least}: {', '.join(map(str, few[:8]))}"
                f"{' and more' if len(few) > 8 else ''}",
            )
    octaves = wide_octaves(site)
    if octaves < 0:
        yield say(
            "wide",
            octaves,
            f"1 % of its blocks lie {-octaves:.2f} octaves or more below what a "
            "scale at the amax represents",
        )
    over = (site["massive"] or {}).get("over_token")
    if over is not None and over >= FACTOR:
        yield say(
            "massive",
            over,
            f"its amax is {over:.0f} times the median token's, at position 0 in "
            f"{site['massive']['at_position_0']:.0%} of the sequences",
        )
    if site["growth"] and site["growth"]["enough_at"] is None:
        share = site["growth"]["share_of_half"]
        yield say("growing", share, f"half of the sequences show {share:.0%} of its amax")


def _held_out_findings(site: dict, chosen: dict, say) -> Iterator[Finding]:
    loss, floor = chosen["flush"]["loss_db"], chosen["floor"]["loss_db"]
    if loss > HARMLESS_DB:
        yield say("lossy", loss, f"loses {loss:.2f} dB to its best scale")
    if chosen["saturated"] > HARMLESS_SHARE:
        yield say("saturates", chosen["saturated"], f"{chosen['saturated']:.2%} of its blocks saturate")
    if chosen["flushed"] > HARMLESS_SHARE:
        yield say("flushes", chosen["flushed"], f"{chosen['flushed']:.2%} of its blocks flush to zero")
    if abs(loss - floor) > HARMLESS_DB:
        yield say(
            "convention", loss - floor, f"loses {loss:.2f} dB under flush, {floor:.2f} under floor"
        )
    low, high = chosen["slack_low_octaves"], chosen["slack_high_octaves"]
    if low < 0:
        yield say("above", low, f"held-out text goes {-low:.2f} octaves above its scale")
    if min(low, high) < NARROW and wide_octaves(site) >= 0:
        side = "saturation" if low <= high else "underflow"
        yield say("narrow", min(low, high), f"{min(low, high):.2f} octaves from {side}")
