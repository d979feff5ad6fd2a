# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Where each policy lands at one site, of a stored run or of statistics that were just captured."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nvfp4_utils import POLICIES, ActivationStatistics, calibrate, input_scale_from_amax
from nvfp4_utils.policies import CALIBRATED
from studies.runs.store import Run

from . import regimes

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
        f"oracle.</strong> Their calibrated amaxes span {octaves:.1f} octaves, and {worst} is the "
        f"lowest. Scope: {scope}; other sites and mixes may answer otherwise: that is what this page "
        "is for."
    )


def policy_table(landed: pd.DataFrame) -> pd.DataFrame:
    """``landed``, best first, with the stored scale and the distance to the oracle (dB)."""
    table = landed.sort_values("snr_db", ascending=False)
    scales = [f"{input_scale_from_amax(a):.3g}" for a in table.calibrated_amax]
    gap = table.snr_db["oracle"] - table.snr_db
    table = table.assign(input_scale=scales, gap=gap).rename_axis(None)
    return table[["calibrated_amax", "input_scale", "snr_db", "gap"]]


def draw(
    run: Run,
    live: Mapping[str, ActivationStatistics],
    mix: str,
    site: str,
    underflow: str,
    octaves: float,
) -> tuple[plt.Figure, str]:
    """A site, its scale ``octaves`` above the amax policy's: of ``live`` if it is there, else stored."""
    if site in live:
        return draw_live(live[site], site, underflow, octaves)
    landed = regimes.policies_at(run, mix, site, underflow).set_index("policy")
    return regimes.draw_site(run, mix, site, underflow, landed.calibrated_amax["amax"] * 2**octaves)


def draw_live(
    statistics: ActivationStatistics, name: str, underflow: str = "flush", octaves: float = 0.0
) -> tuple[plt.Figure, str]:
    """Every policy of one scale on the statistics it was calibrated on, which are the test too."""
    amaxes = calibrate(statistics, [p for p in CALIBRATED if POLICIES[p].one_scale])

    def snr(calibrated_amax):
        return statistics.snr_db(input_scale_from_amax(calibrated_amax), underflow)

    places = np.array(list(amaxes.values()))
    landed = pd.DataFrame({"policy": list(amaxes), "calibrated_amax": places, "snr_db": snr(places)})
    grid = amaxes["amax"] * 2 ** np.arange(-8, 20, 1 / 8)
    here = amaxes["amax"] * 2**octaves
    return regimes.draw_scale(landed, pd.Series(snr(grid), grid), statistics.marginals, here,
                              float(snr(here)), f"{name} (live, {underflow})")  # fmt: skip
