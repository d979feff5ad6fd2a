# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which scales a run is scored and evaluated with: one list for tensors' errors and the model's loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nvfp4_utils.sites import kind_of

from .settings import (
    FOUR_OVER_SIX,
    NONE,
    PER_SEQUENCE,
    Amaxes,
    Setting,
    policy_settings,
    sweep_settings,
    uncalibrated_settings,
)

SWEEP = (-4, -3, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.5, *range(1, 19))  # octaves from the amax
MARGINS = (1, 2, 3, 4, 6)  # octaves that a calibrated amax may be raised by, in advance
SINGLE = (-3, -2, -1, -0.5, 0, 4, 8, 10, 12, 14, 16)  # octaves, one site at a time
FLOORED = ("amax", "headroom", "raised", "constant", "mse")
KINDS_ALONE = ("amax", "p99.99", "headroom", "x2^-2", "x2^3", "x2^14")
Calibrations = Mapping[str, Mapping[str, Amaxes]]  # mix -> policy -> site -> calibrated amax


def scaled(amaxes: Amaxes, octaves: float) -> dict[str, float]:
    """Every site's amax times ``2**octaves``."""
    return {site: amax * 2.0**octaves for site, amax in amaxes.items()}


def with_margins(policies: Mapping[str, Amaxes]) -> dict[str, Amaxes]:
    """A mix's calibrations, and its amax raised by each of ``MARGINS``: policy -> site -> amax."""
    return {**policies, **{f"x2^{k:g}": scaled(policies["amax"], k) for k in MARGINS}}


def half_amaxes(sequence_amaxes: Mapping[str, np.ndarray], draws: int = 6) -> dict[str, Amaxes]:
    """The amax of ``draws`` random halves of the calibration sequences: calibrations of equal merit.

    ``sequence_amaxes``: site -> amax of each sequence. One permutation serves all sites. NaN where all
    sequences of a half are zero.
    """
    count = len(next(iter(sequence_amaxes.values())))
    found: dict[str, Amaxes] = {}
    for draw in range(draws):
        half = np.random.default_rng(draw).permutation(count)[: max(1, count // 2)]
        found[f"amax of half {draw}"] = {
            s: float(a[half].max()) or math.nan for s, a in sequence_amaxes.items()
        }
    return found


def settings_for(
    test: str, calibrations: Calibrations, oracle: Mapping[str, Amaxes], halves: Mapping[str, Amaxes],
    *, sweep: bool,
) -> list[Setting]:  # fmt: skip
    """Every setting that a test mix is evaluated with.

    ``oracle``: convention -> site -> amax; ``halves``: what ``half_amaxes`` gives; ``sweep``: also the
    scales along ``SWEEP``, one kind of site at a time, and quantized weights.
    """
    own = calibrations[test]
    found = uncalibrated_settings(test)
    found += policy_settings(test, {test: with_margins(own) | dict(halves)}, underflows=("flush",))
    found += policy_settings(test, {test: {p: own[p] for p in FLOORED}}, underflows=("floor",))
    found += [Setting(test, "test", "oracle", u, amaxes=oracle[u]) for u in ("flush", "floor")]
    # The same whatever the text, another quantizer, or far from anything one would deploy.
    left_out = ("constant", FOUR_OVER_SIX, "p99", "p99.9")
    foreign = {
        mix: {p: amaxes for p, amaxes in with_margins(policies).items() if p not in left_out}
        for mix, policies in calibrations.items()
        if mix != test
    }
    found += policy_settings(test, foreign, underflows=("flush",))
    if sweep:
        known = {s.key for s in found}
        found += [s for s in sweep_settings(test, test, own["amax"], SWEEP) if s.key not in known]
        menu = {**own, **{f"x2^{k}": scaled(own["amax"], k) for k in (-2, 3, 14)}}
        for kind in dict.fromkeys(kind_of(site) for site in own["amax"]):
            one = {policy: menu[policy] for policy in KINDS_ALONE}
            found += policy_settings(test, {test: one}, underflows=("flush",), only=kind)
        found += [Setting(test, "", NONE, weights="nvfp4", rule=NONE),
                  Setting(test, "test", PER_SEQUENCE, weights="nvfp4", rule=PER_SEQUENCE)]  # fmt: skip
        both = {policy: own[policy] for policy in ("amax", "headroom", "raised", FOUR_OVER_SIX)}
        found += policy_settings(test, {test: both}, underflows=("flush",), weights="nvfp4")
    return found


def with_values(settings: Sequence[Setting], what: str) -> list[Setting]:
    """The settings that have a value at every site that they quantize; one line names the others."""
    kept: list[Setting] = []
    missing: dict[str, dict[str, None]] = {}
    for setting in settings:
        absent = [s for s, amax in setting.amaxes.items() if math.isnan(amax) and setting.quantizes(s)]
        if absent:
            missing.setdefault(absent[0], {})[setting.policy] = None
        else:
            kept.append(setting)
    for site, policies in missing.items():
        print(
            f"{what} is not evaluated with {', '.join(policies)}: no value at {site}",
            flush=True,
        )
    return kept


def single_site_settings(test: str, amaxes: Amaxes) -> list[Setting]:
    """One site at a time along ``SINGLE``, flush: a tensor's error beside the model's loss."""
    return [
        Setting(test, test, f"x2^{k:g}", "flush", only=site, amaxes={site: amax * 2.0**k})
        for site, amax in amaxes.items()
        for k in SINGLE
    ]
