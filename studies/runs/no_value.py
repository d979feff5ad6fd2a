# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Sites where a policy or the oracle has no value: all zero, or with few nonzeros."""

from __future__ import annotations

import contextlib
import math

import pandas as pd

from nvfp4_utils import policies
from nvfp4_utils.quantize import UNDERFLOWS, Underflow
from nvfp4_utils.statistics import ActivationStatistics


def oracles(total: ActivationStatistics) -> dict[Underflow, float]:
    """The oracle under both conventions; NaN where no scale has a lower error than another."""
    found = dict.fromkeys(UNDERFLOWS, math.nan)
    for underflow in UNDERFLOWS:
        with contextlib.suppress(policies.NoValue):
            found[underflow] = policies.oracle(total, underflow)
    return found


def say_missing(table: pd.DataFrame) -> None:
    """One line for each site with policies that have no value there."""
    missing = table[table.calibrated_amax.isna()]
    for site, rows in missing.groupby("site", sort=False, observed=True):
        print(
            f"{site} has too few nonzero activations for {', '.join(rows.policy)}: no value there",
            flush=True,
        )
