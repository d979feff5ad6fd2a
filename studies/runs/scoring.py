# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Scores of calibrated scales on a test pool: exactly from statistics, and directly on activations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from nvfp4_utils.histogram import codes_to_values
from nvfp4_utils.hooks import SiteStatistics
from nvfp4_utils.quantize import (
    BLOCK_SIZE,
    UNDERFLOWS,
    Underflow,
    fake_quantize_reference,
    four_over_six_reference,
    input_scale_from_amax,
)
from nvfp4_utils.statistics import ActivationStatistics

CURVE_OCTAVES = 19  # above the largest block amax: past the last subnormal block scale
DYNAMIC = "dynamic"
FOUR_OVER_SIX = "four-over-six"
DRAWS = 2000  # of a bootstrap


def curve_amaxes(statistics: ActivationStatistics) -> np.ndarray:
    """Where the stored curve is evaluated: every bfloat16 from p99 (or 1/64 of the amax) to twice
    the amax, so that amax and percentile calibrations lie on it exactly; then 16 an octave."""
    top = torch.tensor(2 * statistics.amax, dtype=torch.bfloat16).view(torch.int16)
    low = min(max(statistics.percentile(99), statistics.amax / 2**12), statistics.amax / 64)
    bottom = torch.tensor(low, dtype=torch.bfloat16).view(torch.int16)
    dense = codes_to_values(torch.arange(int(bottom), int(top) + 1), torch.bfloat16).numpy()
    steps = np.arange(16, 16 * CURVE_OCTAVES + 1) / 16
    return np.concatenate([dense, statistics.amax * 2 ** steps[1:]])


def curve_table(site: str, total: ActivationStatistics, bf16: bool) -> pd.DataFrame:
    """MSE of the pool along ``curve_amaxes``; with ``bf16`` also ``mse_flush_bf16``, of that output."""
    amaxes = curve_amaxes(total)
    scales = input_scale_from_amax(amaxes)
    columns = {"site": site, "calibrated_amax": amaxes}
    columns |= {f"mse_{u}": total.mse(scales, u) for u in UNDERFLOWS}
    if bf16:
        columns["mse_flush_bf16"] = total.mse(scales, "flush", out_dtype=torch.bfloat16)
    return pd.DataFrame(columns)


def group_errors(
    site: str, test: SiteStatistics, total: ActivationStatistics,
    calibrations: dict[str, dict[str, float]], oracle: dict[Underflow, float],
) -> pd.DataFrame:  # fmt: skip
    """Errors of every calibration (mix -> policy -> amax) and of the oracle on every test group."""
    rows = []
    for underflow in UNDERFLOWS:
        menu = [(mix, policy, amax) for mix, amaxes in calibrations.items()
                for policy, amax in amaxes.items() if policy != FOUR_OVER_SIX]  # fmt: skip
        menu.append(("test", "oracle", oracle[underflow]))
        scales = input_scale_from_amax([amax for *_, amax in menu])
        for group, statistics in enumerate(test.groups):
            rows += [(site, mix, policy, underflow, amax, group, mse) for (mix, policy, amax), mse
                     in zip(menu, statistics.mse(scales, underflow), strict=True)]  # fmt: skip
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
    scales = input_scale_from_amax(amaxes)
    return subsets.assign(**{f"mse_{u}": total.mse(scales, u)[at] for u in UNDERFLOWS})


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
        sequences, tokens, width = x.shape
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
                own = x.abs().flatten(1).amax(1).tolist()
                blocks = tokens * width // BLOCK_SIZE
                scale = input_scale_from_amax(own).to(x.device).repeat_interleave(blocks)[:, None]
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
            own = [calibrations[s][mix][name] if name == FOUR_OVER_SIX else np.nan for s in one.site]
            tables.append(one.assign(calibration="test" if name == DYNAMIC else mix, policy=name,
                                     underflow=underflow, calibrated_amax=own))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def resamples(groups: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each group occurs in each bootstrap draw, int [draws, groups]."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
