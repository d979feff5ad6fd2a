# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The weaknesses page's tables and sentences: hand-computed, of the stored run, of another run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from studies.pages import weaknesses
from studies.runs import synthetic
from studies.runs.store import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def scored_tensors() -> Any:
    """Two tensors of one site; every policy's error is amax's, headroom's is half and twice of it."""
    columns = {f"{name} flush": [1.0, 1.0] for name in ("amax", *weaknesses.COMPARED, "amax of other")}
    columns["headroom flush"] = [0.5, 2.0]
    table = pd.DataFrame({"site": "s", "window": [0, 1], "signal_power": [10.0, 1000.0]} | columns)
    return SimpleNamespace(windows=lambda mix: table, window_mixes=["this", "other"])


def test_gains_of_two_tensors_by_hand() -> None:
    gains = weaknesses.tensor_gains(scored_tensors(), "this", "flush").set_index("policy")
    assert list(gains.index) == [*weaknesses.COMPARED, "amax of other"]
    row = gains.loc["headroom"]
    assert row.pool == pytest.approx(10 * np.log10(2 / 2.5))
    assert (row["mean"], row["std"]) == pytest.approx((0, 10 * np.log10(2)))
    assert row.other_sign == 0.5  # the tensor that headroom helps
    assert gains.drop("headroom").pool.tolist() == [0] * 7


def test_levels_of_two_tensors_by_hand() -> None:
    snr = weaknesses.tensor_snr(scored_tensors(), "this", "headroom", "flush")
    assert snr.snr_db.tolist() == pytest.approx([10 * np.log10(20), 10 * np.log10(500)])
    assert snr.pool_db.tolist() == pytest.approx([10 * np.log10(1010 / 2.5)] * 2)


def test_gain_table_averages_over_sites() -> None:
    gains = pd.DataFrame({"policy": "mse", "site": ["a", "b"], "pool": [0.3, -0.5], "std": [0.1, 0.3],
                          "other_sign": [0.0, 0.5]})  # fmt: skip
    assert weaknesses.gain_table(gains).loc["mse"].tolist() == pytest.approx([-0.1, 0.2, 0.5, 25])
    assert weaknesses.steady(gains) == []
    assert weaknesses.steady(gains[gains.site == "a"]) == ["mse"]


def test_alternative_text_names_what_crosses_zero() -> None:
    rows = [("mse", -1.0, 1.0), ("four-over-six", 0.4, 0.6), ("p99.99", -1.0, -0.5)]
    alt = weaknesses.gains_alt(pd.DataFrame(rows, columns=["policy", "low", "high"]))
    assert alt.endswith("Across zero: mse; clear of it: four-over-six.")


def test_study_sites_are_the_outer_mlp_inputs(run: Run) -> None:
    assert weaknesses.study_sites(run) == ["layers.0.mlp_input", "layers.7.mlp_input"]
    with pytest.raises(ValueError, match="expected some mlp_input, which the study looked at"):
        weaknesses.study_sites(SimpleNamespace(sites=["layers.0.o_proj_input"]))  # type: ignore[arg-type]


def test_losses_of_the_stored_run(run: Run) -> None:
    losses = weaknesses.site_losses(run, run.window_mixes[0], "flush")
    assert list(losses.index) == ["the study's two (2)", "all (32)"]
    assert losses.iloc[0].round(3).tolist() == [0.012, 0.064, 0.009]
    assert losses.iloc[1].round(3).tolist() == [0.076, 7.790, 11.875]


@pytest.mark.parametrize("underflow", ["flush", "floor"])
def test_single_tensors_average_to_the_histograms_error(run: Run, underflow: str) -> None:
    assert weaknesses.distance_from_statistics(run, run.window_mixes[0], underflow) < 1e-6


def test_answer_of_the_stored_run() -> None:
    assert weaknesses.answer(pd.Series([0.009, 11.875]), 0.403, "a model, a mix") == (
        "<strong>Its sites decided its third answer; its test tensor could not decide its "
        "second.</strong> At the study's two sites a foreign calibration costs at most 0.009 dB, over "
        "all sites 11.9 dB. At those two, 40% of single test tensors rank amax and headroom the other "
        "way round than all of them together do. Scope: a model, a mix."
    )


def test_another_runs_answer_does_not_repeat_it() -> None:
    harmless = weaknesses.answer(pd.Series([0.009, 0.05]), 0.02, "")
    assert "did not decide its third" in harmless and "was enough to decide its second" in harmless
    assert "did not decide its third" in weaknesses.answer(pd.Series([3.0, 11.0]), 0.4, "")
    alone = weaknesses.answer(pd.Series([np.nan, np.nan]), 0.4, "")
    assert "One mix cannot say" in alone and "nan" not in alone
    assert "the dataset does not matter" in weaknesses.sites_prose(pd.Series([0.009, 11.875]))
    assert "does not matter" not in weaknesses.sites_prose(pd.Series([3.0, 11.0]))
    assert "holds one mix" in weaknesses.sites_prose(pd.Series([np.nan, np.nan]))
    assert "nearly at random" in weaknesses.flip_prose(0.4)
    assert "random" not in weaknesses.flip_prose(0.02)


def test_first_splits_that_lose_are_counted() -> None:
    split = pd.DataFrame({"first_db": [20.0, 21.0], "all_db": [20.5, 21.0], "low": [20.2, 20.9]})
    text = weaknesses.split_prose(split)
    assert "up to 0.50 dB (mean 0.2500 dB)" in text and "at 1 of 2 sites" in text


def test_conventions_of_the_stored_run(run: Run) -> None:
    convention = weaknesses.convention_table(run, run.window_mixes[0])
    text = weaknesses.convention_prose(convention, synthetic.spike_loss())
    assert "first differ by 0.1 dB 10.4 octaves above the amax (at `layers.0.o_proj_input`)" in text
    assert "up to 16.8 dB 17.7 octaves above it (at `layers.0.attention_input`)" in text
    assert text.endswith("it costs 2.4 dB under floor and 17.6 dB under flush.")


def test_conventions_that_never_part_or_part_at_once() -> None:
    table = pd.DataFrame({"site": ["s"], "at_amax": [0.0], "octaves": [np.inf], "largest": [0.01],
                          "largest_octaves": [1.0]})  # fmt: skip
    spike = {"floor": 1.0, "flush": 2.0}
    assert "first differ" not in weaknesses.convention_prose(table, spike)
    at_once = table.assign(at_amax=3.0, octaves=0.0)
    assert "comes near" not in weaknesses.convention_prose(at_once, spike)


def run_with(apart: list[float], octaves: list[float]) -> Any:
    """A run of one site with amax 2 whose flush error is `apart` dB above floor's, at these octaves."""
    curve = pd.DataFrame({
        "site": "s", "calibrated_amax": 2 * np.exp2(octaves), "mse_floor": 1.0,
        "mse_flush": 10 ** (np.array(apart) / 10),
    })  # fmt: skip
    return SimpleNamespace(
        curves=lambda mix: curve, marginals=lambda mix, site: SimpleNamespace(amax=2.0)
    )


def test_the_largest_difference_of_the_conventions_is_told_with_its_own_octave() -> None:
    run = run_with([9.0, 0.0, 0.05, 0.2, 16.8, 3.0], [-1, 0, 8, 10, 17.5, 20])
    row = weaknesses.convention_table(run, "mix").iloc[0]
    assert (row.at_amax, row.octaves) == (0, 10)
    assert (row.largest, row.largest_octaves) == pytest.approx((16.8, 17.5))


def test_conventions_that_never_part_by_a_tenth_of_a_decibel_part_at_infinity() -> None:
    row = weaknesses.convention_table(run_with([0.0, 0.01], [0, 1]), "mix").iloc[0]
    assert np.isinf(row.octaves)
    assert row.largest_octaves == 1
