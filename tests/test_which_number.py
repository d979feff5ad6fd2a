# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which number predicts the loss: misses and correlations on made-up data, and on the stored runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nvfp4_utils import input_scale_from_amax
from studies.pages import which_number
from studies.runs.store import Run

OCTAVES = (-2, -1, 0, 4, 8)


def made_up(kl: list[float], snr: list[float], block: list[float]) -> Any:
    """Two sites with the same numbers along ``OCTAVES``; the second's KL is ten times the first's."""
    label = {"underflow": "flush", "calibration": "a"}
    keys = [(s, f"x2^{k}") for s in ("layers.0.x", "layers.1.x") for k in OCTAVES]
    metrics = pd.DataFrame(keys, columns=["site", "policy"]).assign(**label)
    metrics = metrics.assign(snr_db=snr * 2, block_snr_db=block * 2, saturated=0.0, subnormal=0.0,
                             underflowed=[0.0, 0.0, 0.0, 0.0, 0.1] * 2)  # fmt: skip
    single = metrics.rename(columns={"site": "only"}).assign(kl=kl + [10 * v for v in kl])
    whole = metrics[metrics.site == "layers.0.x"].drop(columns=["site"]).assign(kl=kl, test="a")
    whole = whole.assign(weights="bf16", only="")
    token = metrics.assign(token_snr_db=metrics.snr_db, test="a", weights="bf16", only="")
    return SimpleNamespace(
        name="made up", model_name="a model (2 layers)", featured_mix="a", metrics=lambda mix: metrics,
        single_sites=lambda: single, end_to_end=lambda: whole, end_to_end_snr=lambda: token,
    )  # fmt: skip


# Harm at both ends; SNR sees the low end alone, block SNR the high end alone.
BOTH = made_up([3.0, 2.0, 1.0, 1.0, 4.0], [10.0, 15.0, 20.0, 20.0, 20.0], [20.0, 20.0, 20.0, 20.0, 5.0])


def test_each_is_blind_on_one_side_and_the_larger_loss_on_none() -> None:
    table = which_number.misses(BOTH)
    assert table.harmful.tolist() == [6] * 6
    assert table.missed[["SNR", "block SNR", "larger loss", "lower SNR"]].tolist() == [2, 4, 0, 0]
    assert table.worst[["SNR", "block SNR"]].tolist() == [4, 3]
    assert table.missed[["saturated", "underflowed"]].tolist() == [6, 4]
    assert (table.alarms == 0).all()
    assert table.order["larger loss"] == 1


def test_scores_rank_within_a_site_and_not_across_equal_sites() -> None:
    table = which_number.correlations(BOTH, scales=(0.0,))
    assert table.loc["larger loss", "within a site"] == pytest.approx(1, abs=0.03)
    assert table.loc["saturated", "within a site"] == 0
    assert np.isnan(table.loc["SNR", "at 2^0"])
    which_number.check(BOTH)
    policies = which_number.policy_correlations(BOTH)
    assert policies.loc["token SNR", "all settings"] == policies.loc["SNR", "all settings"]


def test_the_yardstick_follows_the_data() -> None:
    assert which_number.yardstick([BOTH]) in ("larger loss", "lower SNR")
    assert "calls 0 harmless, where SNR alone passes 2" in which_number.answer([BOTH])
    flat = [20.0] * 5
    tensor = made_up([3.0, 2.0, 1.0, 1.0, 4.0], [10.0, 15.0, 20.0, 20.0, 9.0], flat)
    assert which_number.yardstick([tensor]) == "SNR"
    assert which_number.answer([tensor]).startswith("<strong>The SNR")
    blind = made_up([3.0, 2.0, 1.0, 1.0, 4.0], flat, flat)
    assert which_number.yardstick([blind]) == ""
    assert which_number.answer([blind]).startswith("<strong>None of them")


def test_false_alarms_are_counted_and_a_limit_can_buy_them() -> None:
    # The best predictor's loss at 4 octaves is 0.4 dB, where nothing is harmed.
    run = made_up([3.0, 1.2, 1.0, 1.0, 1.0], [10.0, 19.7, 20.0, 19.6, 19.0], [20.0] * 5)
    table = which_number.misses(run)
    assert table.loc["SNR", ["missed", "alarms"]].tolist() == [2, 2]
    row = which_number.at_equal_alarms(run, "SNR", 4)
    assert row["limit"] < 0.3
    assert row["missed"] == 0


@pytest.mark.parametrize("name", ["smollm2", "gemma3", ""])
def test_stored_runs(name: str) -> None:
    run = Run(name)
    which_number.check(run)
    table = which_number.misses(run)
    assert table.missed["larger loss"] <= min(table.missed["SNR"], table.missed["block SNR"])
    assert table.missed["larger loss"] < 0.03 * table.harmful["larger loss"]
    assert which_number.correlations(run).loc["larger loss", "within a site"] > 0.85


def test_stored_metrics_are_the_method_on_the_joint_histogram() -> None:
    run = Run("smollm2")
    table = which_number.settings(run)
    for site in run.featured:
        stats = run.joint(run.featured_mix, site)
        rows = table[table.site == site]
        scales = input_scale_from_amax(rows.calibrated_amax.to_numpy())
        np.testing.assert_allclose(stats.snr_db(scales), rows.snr_db, atol=1e-4)
        np.testing.assert_allclose(stats.block_snr_db(scales), rows.block_snr_db, atol=1e-4)
