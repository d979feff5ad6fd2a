# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Scores of calibrated scales on a test pool: exactly from statistics, and directly on activations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch

from nvfp4_utils.histogram import Marginals, codes_to_values
from nvfp4_utils.quantize import (
    E4M3_MAX,
    E4M3_MIN_SUBNORMAL,
    E4M3_NORMAL_RANGE,
    UNDERFLOWS,
    Underflow,
    fake_quantize_reference,
    four_over_six_reference,
    input_scale_from_amax,
)
from nvfp4_utils.statistics import ActivationStatistics, SiteStatistics

from . import plan
from .quantized import row_scales
from .settings import FOUR_OVER_SIX, STATIC

CURVE_OCTAVES = 19  # above the largest block amax: past the last subnormal block scale
WINDOW = 256  # tokens of the study's test tensor
UNDERFLOW_START = E4M3_MAX / (E4M3_MIN_SUBNORMAL / 2)  # rho = 458752; this tie rounds to even, 0
DYNAMIC = "dynamic"
DRAWS = 2000  # of a bootstrap


def where_known(function, amaxes) -> np.ndarray:
    """``function`` of the input scales of those amaxes that have a value; NaN for the others."""
    amaxes = np.asarray(amaxes, dtype=np.float64)
    result = np.full(amaxes.shape, np.nan)
    known = np.isfinite(amaxes)
    if known.any():
        with np.errstate(invalid="ignore"):  # the SNR of a pool that is all zero
            result[known] = function(input_scale_from_amax(amaxes[known]))
    return result


def curve_amaxes(statistics: ActivationStatistics, exact) -> np.ndarray:
    """Where the stored curve is evaluated: 8 points per octave, 16 around the amax, and ``exact``.

    ``exact`` are calibrated amaxes whose error is to be read off without interpolation; those of a
    policy without a value are left out. Of a pool that is all zero only ``exact`` are left.
    """
    exact = np.asarray(exact, dtype=np.float64)
    exact = exact[exact > 0]
    if not statistics.amax:
        return np.unique(exact)
    around = np.arange(-32, 33) / 16
    far = np.arange(-8 * 6, 8 * CURVE_OCTAVES + 1) / 8
    exponents = np.union1d(around, far)
    return np.union1d(statistics.amax * 2.0**exponents, exact)


def curve_table(site: str, total: ActivationStatistics, exact, bf16: bool) -> pd.DataFrame:
    """MSE of the pool along ``curve_amaxes``; with ``bf16`` also ``mse_flush_bf16``, of that output."""
    amaxes = curve_amaxes(total, exact)
    scales = input_scale_from_amax(amaxes)
    columns = {"site": site, "calibrated_amax": amaxes}
    columns |= {f"mse_{u}": total.mse(scales, u) for u in UNDERFLOWS}
    if bf16:
        columns["mse_flush_bf16"] = total.mse(scales, "flush", out_dtype=torch.bfloat16)
    return pd.DataFrame(columns).astype({name: np.float32 for name in columns if name.startswith("mse")})


def block_shares(m: Marginals, amaxes: np.ndarray) -> dict[str, np.ndarray]:
    """Share of nonzero blocks at each calibrated amax that are saturated, subnormal or underflow.

    With ``rho = amax / b``: below 1; above 28672; from 458752 on, where the scale rounds to zero. NaN
    without a nonzero block, or for an amax without a value.
    """
    values = codes_to_values(m.block_codes, m.dtype).numpy()
    counts = m.block_counts.numpy()[values > 0]
    values = values[values > 0]
    known = np.isfinite(amaxes)
    if not (len(values) and known.all()):
        found = {name: np.full(len(amaxes), np.nan) for name in ("saturated", "subnormal", "underflow")}
        if len(values) and known.any():
            for name, shares in block_shares(m, amaxes[known]).items():
                found[name][known] = shares
        return found
    total = np.concatenate([[0], counts.cumsum()])

    def below(limit) -> np.ndarray:
        return total[np.searchsorted(values, limit, side="left")] / total[-1]

    under = below(np.nextafter(amaxes / UNDERFLOW_START, np.inf))
    return {
        "saturated": 1 - total[np.searchsorted(values, amaxes, side="right")] / total[-1],
        "subnormal": below(amaxes / E4M3_NORMAL_RANGE) - under,
        "underflow": under,
    }


def site_menu(site: str, mix: str, calibrations, oracle, halves) -> list[tuple[str, str, str, float]]:
    """(calibration, policy, convention, amax) of every scale that the model is evaluated with here."""
    amaxes = {m: {p: {site: a[site]} for p, a in by.items()} for m, by in calibrations.items()}
    oracles = {u: {site: amax} for u, amax in oracle.items()}
    own_halves = {name: {site: a[site]} for name, a in halves.items()}
    settings = plan.settings_for(mix, amaxes, oracles, own_halves, sweep=True)
    return [(s.calibration, s.policy, s.underflow, s.amaxes[site]) for s in settings
            if s.rule == STATIC and s.weights == "bf16" and not s.only]  # fmt: skip


def metric_table(site: str, total: ActivationStatistics, menu) -> pd.DataFrame:
    """Numbers that may foretell what a scale does to the model, one row per entry of ``site_menu``.

    Columns: site, calibration, policy, underflow, calibrated_amax, snr_db, block_snr_db, saturated,
    subnormal, underflowed (shares of the nonzero blocks).
    """
    table = pd.DataFrame(menu, columns=["calibration", "policy", "underflow", "calibrated_amax"])
    table.insert(0, "site", site)
    for underflow in UNDERFLOWS:
        rows = table.underflow == underflow
        amaxes = table.calibrated_amax[rows]
        table.loc[rows, "snr_db"] = where_known(partial(total.snr_db, underflow=underflow), amaxes)
        table.loc[rows, "block_snr_db"] = where_known(
            partial(total.block_snr_db, underflow=underflow), amaxes
        )
    shares = block_shares(total.marginals, table.calibrated_amax.to_numpy())
    table = table.assign(saturated=shares["saturated"], subnormal=shares["subnormal"],
                         underflowed=shares["underflow"])  # fmt: skip
    floats = ["snr_db", "block_snr_db", "saturated", "subnormal", "underflowed"]
    return table.astype(dict.fromkeys(floats, np.float32))


def group_errors(
    site: str, test: SiteStatistics, total: ActivationStatistics,
    calibrations: dict[str, dict[str, float]], oracle: dict[Underflow, float],
) -> pd.DataFrame:  # fmt: skip
    """Errors of every calibration (mix -> policy -> amax) and of the oracle on every test group.

    NaN for a policy without a value.
    """
    rows = []
    for underflow in UNDERFLOWS:
        menu = [(mix, policy, amax) for mix, amaxes in calibrations.items()
                for policy, amax in amaxes.items() if policy != FOUR_OVER_SIX]  # fmt: skip
        menu.append(("test", "oracle", oracle[underflow]))
        amaxes = [amax for *_, amax in menu]
        for group, statistics in enumerate(test.groups):
            errors = where_known(partial(statistics.mse, underflow=underflow), amaxes)
            rows += [(site, mix, policy, underflow, amax, group, mse)
                     for (mix, policy, amax), mse in zip(menu, errors, strict=True)]  # fmt: skip
    return pd.DataFrame(rows, columns=["site", "calibration", "policy", "underflow",
                                       "calibrated_amax", "group", "mse"])  # fmt: skip


def group_table(site: str, test: SiteStatistics) -> pd.DataFrame:
    """Elements and signal power of every test group."""
    return pd.DataFrame({
        "site": site, "group": np.arange(len(test.groups)),
        "count": [g.count for g in test.groups],
        "signal_power": [g.signal_power for g in test.groups],
    })  # fmt: skip


def score_subsets(subsets: pd.DataFrame, total: ActivationStatistics) -> pd.DataFrame:
    """One site's subset calibrations with their error on the whole pool, both conventions."""
    amaxes, at = np.unique(subsets.calibrated_amax, return_inverse=True)
    errors = {u: where_known(partial(total.mse, underflow=u), amaxes) for u in UNDERFLOWS}
    return subsets.assign(**{f"mse_{u}": errors[u][at] for u in UNDERFLOWS})


class WindowErrors:
    """Error of the quantizer itself, window by window; ``count`` is a hook's callback.

    No histogram is involved: this is the independent check of the statistics, the study's small test
    tensors, and the only way to score what a histogram cannot hold: ``dynamic`` (each sequence's own
    amax) and ``four-over-six`` (a choice by all 16 elements of a block).

    ``menu``: site -> {(name, underflow): calibrated amax}; ``window``: tokens, dividing the length.
    """

    def __init__(self, menu: dict[str, dict[tuple[str, Underflow], float]], window: int) -> None:
        self.menu, self.window = menu, window
        self.parts: dict[str, list[pd.DataFrame]] = {}

    def count(self, site: str, x: torch.Tensor) -> None:
        """Score a batch [sequences, tokens, 16 k]; its sequences must arrive in order."""
        # One sequence at a time keeps a CPU's temporaries in its cache.
        for part in x.split(len(x) if x.is_cuda else 1):
            self._count(site, part)

    def _count(self, site: str, x: torch.Tensor) -> None:
        sequences, tokens, _ = x.shape
        if tokens % self.window:
            raise ValueError(
                f"sequences have {tokens} tokens; expected a multiple of the window, {self.window}."
            )
        windows = sequences * tokens // self.window

        def mean(values: torch.Tensor) -> np.ndarray:
            return values.double().square().view(windows, -1).mean(1).cpu().numpy()

        columns = {"site": [site] * windows, "signal_power": mean(x)}
        for (name, underflow), amax in self.menu[site].items():
            if name == DYNAMIC:
                scale = row_scales(x, per_token=False)
            elif not np.isfinite(amax):
                columns[f"{name} {underflow}"] = np.full(windows, np.nan)
                continue
            else:
                scale = input_scale_from_amax([amax]).to(x.device)
            quantize = four_over_six_reference if name == FOUR_OVER_SIX else fake_quantize_reference
            y = quantize(x, scale, underflow, torch.float32)
            columns[f"{name} {underflow}"] = mean(y.double() - x.double())
        self.parts.setdefault(site, []).append(pd.DataFrame(columns))

    def table(self) -> pd.DataFrame:
        """One row a site and window: site, window, signal_power and the MSE ``"name underflow"``."""
        tables = []
        for parts in self.parts.values():
            one = pd.concat(parts, ignore_index=True)
            one.insert(1, "window", np.arange(len(one)))
            tables.append(one)
        return pd.concat(tables, ignore_index=True)


def window_length(tokens: int) -> int:
    """``WINDOW`` where sequences of so many tokens are a multiple of it, else the whole sequence."""
    return tokens if tokens % WINDOW else WINDOW


def window_menu(site: str, mix: str, calibrations, oracle: dict, settings) -> dict:
    """What is scored window by window: two policies always, all of them where windows are kept."""
    own = {policy: amaxes[site] for policy, amaxes in calibrations[mix].items()}
    kept = settings.mixes[: settings.windows]
    menu = {DYNAMIC: np.nan, FOUR_OVER_SIX: own[FOUR_OVER_SIX]}
    if mix in kept:
        menu |= {p: own[p] for p in ("amax", "p99.99", "p99.999", "headroom", "mse", "aligned")}
        menu |= {f"amax of {m}": calibrations[m]["amax"][site] for m in kept if m != mix}
    both = {(name, u): amax for name, amax in menu.items() for u in UNDERFLOWS}
    return both | ({("oracle", u): oracle[u] for u in UNDERFLOWS} if mix in kept else {})


def as_float32(windows: pd.DataFrame) -> pd.DataFrame:
    """A single window's error is wanted to 7 digits, and the files travel with the book."""
    return windows.astype(dict.fromkeys(windows.columns[2:], np.float32))


def window_group_errors(
    windows: pd.DataFrame, calibrations: dict, mix: str, windows_a_group: int
) -> pd.DataFrame:
    """Rows like ``group_errors`` for the two policies that only ``WindowErrors`` can score."""
    tables = []
    windows = windows.assign(group=windows.window // windows_a_group)
    for name in (DYNAMIC, FOUR_OVER_SIX):
        for underflow in UNDERFLOWS:
            column = f"{name} {underflow}"
            one = windows.groupby(["site", "group"], sort=False)[column].mean()
            one = one.rename("mse").reset_index()
            own = [calibrations[mix][name][s] if name == FOUR_OVER_SIX else np.nan for s in one.site]
            tables.append(one.assign(calibration="test" if name == DYNAMIC else mix, policy=name,
                                     underflow=underflow, calibrated_amax=own))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def resamples(groups: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each group occurs in each bootstrap draw, int [draws, groups]."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
