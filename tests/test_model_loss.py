# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The model's loss: numbers of made-up runs with known answers, and of the stored ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from studies.pages import model_loss
from studies.runs.plan import SWEEP
from studies.runs.store import Run

KEYS = {"test": "a", "calibration": "a", "underflow": "flush", "weights": "bf16", "only": ""}
OWN = {"amax": 1.0, "headroom": 1.02, "four-over-six": 0.9, "p99.99": 3.0, "x2^1": 1.0,
       "amax of half 0": 0.99, "amax of half 1": 1.005}  # fmt: skip


def made_up(left: float = 2.0, right: float = 0.5, start: float = 6.0) -> Any:
    """KL doubles ``left`` times an octave below the amax, ``right`` times an octave after ``start``."""
    rows: list[dict] = [KEYS | {"policy": "none", "calibration": "", "kl": 0.0}]
    for underflow in ("flush", "floor"):
        late = start + (2 if underflow == "floor" else 0)
        for k in SWEEP:
            kl = 0.1 * 2.0 ** (left * max(0, -k) + right * max(0, k - late))
            rows.append(KEYS | {"policy": f"x2^{k:g}", "underflow": underflow, "kl": kl})
    rows += [KEYS | {"policy": p, "kl": 0.1 * v} for p, v in OWN.items() if p != "x2^1"]
    rows += [
        KEYS | {"policy": p, "calibration": "b", "kl": 0.1 * v}
        for p, v in (("amax", 1.5), ("x2^1", 1.1))
    ]
    table = pd.DataFrame(rows).assign(nll=2.0, kl_p999=1.0, top1=0.9, low=0.0, high=1.0)
    sequence = table.merge(pd.DataFrame({"sequence": range(8)}), how="cross")
    sequence["kl"] *= 1 + 0.1 * sequence.sequence
    return SimpleNamespace(
        name="made up", model_name="the embedded model (8 layers)", featured_mix="a", mixes=["a"],
        end_to_end=lambda: table, end_to_end_sequences=lambda: sequence,
    )  # fmt: skip


def test_cliffs_are_where_they_were_put() -> None:
    curve = model_loss.sweep(made_up())
    assert model_loss.plateau(curve) == pytest.approx(0.1)
    assert model_loss.reaches(curve, 0.2, -1) == pytest.approx(-0.5)
    assert model_loss.reaches(curve, 0.2, +1) == pytest.approx(8.0)
    # One octave low: four times the KL, four octaves past the start.
    assert model_loss.break_even(curve, 1.0) == pytest.approx(10.0)
    assert model_loss.break_even(curve, 0.5) == pytest.approx(8.0)
    rows = model_loss.cliffs([made_up()])
    assert rows.loc[("model", "floor"), "above +100%"] == pytest.approx(10.0)


def test_noise_on_the_plateau_is_no_cliff_and_a_missing_cliff_is_nan() -> None:
    curve = model_loss.sweep(made_up())
    curve.loc[3.0, "kl"] *= 1.05
    assert model_loss.reaches(curve, 0.101, +1) > 6
    assert np.isnan(model_loss.reaches(model_loss.sweep(made_up(right=0)), 0.2, +1))


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [([{}], "too low far more"), ([{}, {"left": 0.2, "right": 3.0, "start": 0}], "depends on the model"),
     ([{"left": 0.2, "right": 3.0, "start": 0}], "too high more")],
)  # fmt: skip
def test_the_verdict_follows_the_data(runs: list[dict], verdict: str) -> None:
    text = model_loss.answer([made_up(**options) for options in runs])
    assert verdict in text


def test_the_answer_states_break_even_room_and_percentile() -> None:
    text = model_loss.answer([made_up()])
    assert "10.0 octaves" in text
    assert "up to 6.3 octaves above" in text
    assert "by up to 3.0." in text


def test_changes_are_paired_and_the_noise_floor_is_that_of_halves() -> None:
    run = made_up()
    table = model_loss.changes(run)
    # Every sequence moves by the same factor, so no draw differs: the pairing takes all noise out.
    foreign = table.loc["a", "b", "amax"].to_numpy()
    np.testing.assert_allclose(foreign, 50.0)
    assert model_loss.noise_floor(table) == pytest.approx({"pair": 1.0, "mean": 1.0, "draws": 2})
    rows = model_loss.policy_table(run, table)
    assert rows.loc["amax", ["own", "foreign", "worst"]].tolist() == pytest.approx([0, 50, 50])
    assert rows.loc["amax", "worst_pair"] == "b on a"
    assert rows.loc["four-over-six", "own"] == pytest.approx(-10)
    assert model_loss.beyond_noise(rows, 1.0) == ["headroom +2.0 %"]
    assert model_loss.beyond_noise(rows, 3.0) == []
    assert model_loss.policy_text(rows).loc["amax 2^1", "foreign (%)"] == "+10.0 [+10.0, +10.0]"


def test_the_check_names_what_is_false() -> None:
    model_loss.check(made_up())
    run = made_up()
    run.end_to_end().loc[0, "kl"] = 1e-6
    with pytest.raises(ValueError, match="expected exactly 0"):
        model_loss.check(run)
    run = made_up()
    table = run.end_to_end()
    table.loc[table.policy == "x2^0", "kl"] = 0.2
    with pytest.raises(ValueError, match="expected the amax's"):
        model_loss.check(run)


@pytest.mark.parametrize("name", ["smollm2", "gemma3", ""])
def test_stored_runs(name: str) -> None:
    run = Run(name)
    model_loss.check(run)
    curve = model_loss.sweep(run)
    assert list(curve.index) == sorted(SWEEP)
    assert model_loss.break_even(curve, 1.0) > 10
    kinds = model_loss.kinds_table(run)
    assert kinds.loc["sum of kinds", "amax"] == pytest.approx(kinds.loc["all at once", "amax"], rel=0.05)
    weights = model_loss.weights_table(run)
    assert weights["both"] > max(weights["activations"], weights["weights"])
    ceilings = model_loss.ceilings(run)
    assert ceilings.loc["four-over-six", "high"] < -5
    assert ceilings.loc["amax", "change"] == 0
    long = model_loss.long_table(run).xs("amax", level=2)
    assert (long["own length"] == 0).all()
    assert (long.low < 0).all() and (long.high > 0).all()


def test_percentiles_wreck_smollm2_and_foreign_amaxes_gemma() -> None:
    assert model_loss.value(Run("smollm2"), "p99") > 10
    assert model_loss.value(Run("smollm2"), "p99.999") > 1.5
    table = model_loss.policy_table(Run("gemma3"))
    assert table.loc["amax", "worst_low"] > 40
    assert table.loc["x2^2", "worst_high"] < 5
    assert model_loss.best_foreign(table)[0] == "mse"
