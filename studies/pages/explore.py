# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Where each policy lands at one site: the answer and the table of ``regimes.policies_at``."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nvfp4_utils import input_scale_from_amax

CLOSE_DB = 0.1


def answer(landed: pd.DataFrame, site: str, scope: str) -> str:
    """The page's answer, simple HTML; ``landed`` has calibrated_amax and snr_db by policy."""
    oracle = landed.snr_db["oracle"]
    others = landed.drop("oracle")
    close = int((others.snr_db > oracle - CLOSE_DB).sum())
    worst = others.snr_db.idxmin()
    octaves = np.log2(landed.calibrated_amax.max() / landed.calibrated_amax.min())
    return (
        f"<strong>At {site}, {close} of {len(others)} policies land within {CLOSE_DB} dB of the "
        f"oracle</strong> ({oracle:.2f} dB) with calibrated amaxes that span {octaves:.1f} octaves; "
        f"{worst} is the lowest, at {others.snr_db[worst]:.2f} dB. Scope: {scope}; other sites and "
        "mixes may answer otherwise: that is what this page is for."
    )


def policy_table(landed: pd.DataFrame) -> pd.DataFrame:
    """``landed``, best first, with the stored scale and the distance to the oracle (dB)."""
    table = landed.sort_values("snr_db", ascending=False)
    scales = [f"{input_scale_from_amax(a):.3g}" for a in table.calibrated_amax]
    gap = table.snr_db["oracle"] - table.snr_db
    table = table.assign(input_scale=scales, gap=gap).rename_axis(None)
    return table[["calibrated_amax", "input_scale", "snr_db", "gap"]]
