# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The synthetic page's tables and sentences, on small tables and on the stored one."""

from __future__ import annotations

import pandas as pd
import pytest

from studies.pages import synthetic as page
from studies.runs import synthetic


def cells(*ours: float) -> pd.DataFrame:
    """Cells of one distribution whose published SNR is 20 dB, two of them below 2**20 elements."""
    n = [2**10, 2**12, 2**20, 2**22][: len(ours)]
    return pd.DataFrame({"distribution": "rare_giant_spike", "n": n, "published_db": 20.0,
                         "snr_db_floor": ours, "snr_db_flush": ours})  # fmt: skip


def test_a_cell_is_reproduced_within_the_tolerance() -> None:
    study = page.compare(cells(19.0, 20.2, 20.3, 20.0), 0.25)
    assert study.difference.tolist() == pytest.approx([-1, 0.2, 0.3, 0])
    assert study.reproduced.tolist() == [False, True, False, True]
    assert page.differing(study) == "Cells outside the tolerance, by distribution: rare_giant_spike 2."
    assert page.differing(study[study.reproduced]) == "No cell lies outside the tolerance."


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [((0, 0, 20, 20), "All what the study published: 2 of 2"), ((0, 0, 9, 9), "Seldom"),
     ((20, 20, 20, 9), "Seldom")],
)  # fmt: skip
def test_the_verdict_follows_the_large_samples(ours, verdict) -> None:
    text = page.answer(page.compare(cells(*ours), 0.25), {"floor": 1.0, "flush": 2.0}, 0.25)
    assert text.startswith(f"<strong>{verdict}")
    assert "costs 2.0 dB under flush" in text


def test_answer_of_the_stored_table() -> None:
    study = page.compare(synthetic.stored_table(), 0.25)
    text = page.answer(study, synthetic.spike_loss(), 0.25)
    assert "Mostly what the study published: 19 of 28 cells of large" in text
    assert "costs 17.6 dB under flush" in text
    assert "Of all 63 cells, small samples included, 38 are reproduced." in page.cells_prose(study)
    assert page.oracle_table(study).difference["lognormal_sigma3"] == pytest.approx(-2.39, abs=0.01)


def test_spike_loss_is_the_range_over_sizes() -> None:
    spiked = synthetic.stored_table().query("distribution == 'rare_giant_spike'")
    loss = synthetic.spike_loss()
    assert loss["flush"] == pytest.approx(spiked.snr_db_flush.max() - spiked.snr_db_flush.min())
    assert (round(loss["floor"], 2), round(loss["flush"], 2)) == (2.42, 17.65)


def policies(amax: float, p99: float) -> pd.DataFrame:
    return pd.DataFrame({"distribution": "d", "n": 8, "policy": ["amax", "p99"],
                         "snr_db_flush": [amax, p99]})  # fmt: skip


def test_a_percentile_that_wins_is_named_and_one_that_loses_is_not() -> None:
    won = page.percentile_gain(policies(10.0, 13.0))
    assert won.tolist() == [3.0]
    assert "in 1 of 1 cells, most (3.0 dB) for d at 8 elements" in page.gain_prose(won)
    lost = page.gain_prose(page.percentile_gain(policies(13.0, 10.0)))
    assert lost == "<strong>No percentile beats amax by more than 0.1 dB in any of 1 cells.</strong>"


def test_a_redrawn_cell_must_equal_the_stored_one() -> None:
    assert page.redrawn(policies(10.0, 13.0), policies(10.05, 13.0)) == (2, pytest.approx(0.05))
    with pytest.raises(ValueError, match=r"^2 stored and live cells differ by 1.0 dB; expected"):
        page.redrawn(policies(10.0, 13.0), policies(11.0, 13.0))
    with pytest.raises(ValueError, match=r"^0 stored and live cells differ by nan dB"):
        page.redrawn(policies(10.0, 13.0), policies(10.0, 13.0).assign(n=9))
