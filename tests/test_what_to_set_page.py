# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What to set: expected losses by hand, verdicts that flip with made-up runs, and the stored ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from studies.pages import what_to_set as page

OCTAVES = np.arange(-4, 19)
SITES = ["layers.0.mlp_input", "layers.0.down_proj_input"]
EVERYWHERE = ("raised", "raised-all", "headroom", "headroom-amax", "mse", "constant", "p99.99",
              "four-over-six")  # fmt: skip


class MadeUpRun:
    """Two mixes; policies multiply the KL of the amax, 1, as told: ``own`` and ``foreign``."""

    featured_mix = "a"
    mixes = ("a", "b")
    model_name = "Made-up (1 layer)"

    def __init__(self, own: dict[str, float], foreign: dict[str, float], halves=(0.99, 1.01)):
        self.own, self.foreign, self.halves = own, foreign, halves

    def end_to_end(self) -> pd.DataFrame:
        table = self.end_to_end_sequences()
        keys = ["test", "calibration", "policy", "underflow", "weights", "only"]
        return table.groupby(keys, sort=False).kl.mean().reset_index()

    def end_to_end_sequences(self) -> pd.DataFrame:
        rows = []
        for test in self.mixes:
            other = "b" if test == "a" else "a"
            halves = {f"amax of half {i}": k for i, k in enumerate(self.halves)}
            sweep = {f"x2^{k}": 4.0 ** max(0, -k) * 2.0 ** max(0, k - 8) for k in OCTAVES}
            own = {"amax": 1.0, **halves, **sweep, **dict.fromkeys(EVERYWHERE, 1.0), **self.own}
            foreign = dict.fromkeys(("amax", "x2^1", "x2^2", "raised", "headroom"), 1.0) | self.foreign
            rows += [(test, test, p, k) for p, k in own.items()]
            rows += [(test, other, p, k) for p, k in foreign.items()]
            rows += [(test, "test", "dynamic per token", 0.97), (test, "", "none", 0.0)]
        table = pd.DataFrame(rows, columns=["test", "calibration", "policy", "kl"])
        table = table.assign(underflow="flush", weights="bf16", only="")
        sequences = pd.DataFrame({"sequence": range(4), "share": [0.5, 1.5, 0.8, 1.2]})
        table = table.merge(sequences, how="cross")
        return table.assign(kl=table.kl * table.share).drop(columns="share")

    def policies(self, mix: str) -> pd.DataFrame:
        places = {"amax": (1.0, 4000.0), "raised-all": (256.0, 4000.0), "headroom": (64.0, 2000.0),
                  "constant": (2688.0, 2688.0)}  # fmt: skip
        rows = [(s, p, a) for p, by in places.items() for s, a in zip(SITES, by, strict=True)]
        return pd.DataFrame(rows, columns=["site", "policy", "calibrated_amax"])

    def sequences(self, mix: str) -> pd.DataFrame:
        calibration, test = {"a": (1.0, 2.0), "b": (4.0, 8.0)}[mix]
        rows = [(s, p, a) for s in SITES for p, a in (("calibration", calibration), ("test", test))]
        return pd.DataFrame(rows, columns=["site", "pool", "amax"])

    def layouts(self) -> pd.DataFrame:
        sizes = {"packed, 512 tokens": 1.0, "packed, 2048 tokens": 8.0}
        return pd.DataFrame([(name, s, "amax", a) for name, a in sizes.items() for s in SITES],
                            columns=["layout", "site", "policy", "calibrated_amax"])  # fmt: skip


def made_up(
    own: dict[str, float] | None = None, foreign: dict[str, float] | None = None, **kwargs
) -> page.Runs:
    return (MadeUpRun(own or {}, foreign or {}, **kwargs),)  # type: ignore[return-value]


def test_break_even_and_expected_loss_by_hand() -> None:
    curve = page.loss_curve(made_up()[0])
    assert page.curve_at(curve, [-0.5, 0, 8, 9.5, -99]) == pytest.approx([2, 1, 1, 2**1.5, 4**4])
    assert page.break_even(curve, 1) == 10
    assert np.isnan(page.break_even(curve.loc[:8], 1))
    # Half of the text grows by one octave: without a margin that half costs four times as much.
    expected = page.expected_loss(curve, [0, 1], [0, 0.5, 1, 9])
    assert expected == pytest.approx([2.5, 1.5, 1, 1.5])
    assert page.flat_range(expected, 60, [0, 0.5, 1, 9]) == (1, 0.5, 9)
    assert page.flat_range(expected, 1, [0, 0.5, 1, 9]) == (1, 1, 1)


def test_growth_is_of_other_text_and_of_length() -> None:
    growth = page.growth(made_up())
    ours = growth[(growth.prior == "ours") & (growth.site == "mlp_input")].octaves.tolist()
    assert ours == [-1, 3, 3]  # a over b, b over a, 2,048 tokens over 512
    published = growth[growth.prior == "published"].octaves
    assert published.mean() == pytest.approx(0, abs=1e-9)  # every pair is there both ways


def test_percent_is_of_calibrations_of_equal_merit() -> None:
    runs = made_up({"raised": 1.02}, halves=(0.98, 1.05))
    rows = page.compared(runs).set_index(["test", "calibration", "policy"]).percent
    assert rows["a", "a", "amax"] == pytest.approx(100 * (1 / 1.01 - 1))
    assert rows["a", "a", "raised"] == pytest.approx(100 * (1.02 / 1.01 - 1))
    assert page.noise_floor(runs)["Made-up"] == pytest.approx(100 * (1.05 / 1.01 - 1))
    table = page.compared(runs)
    assert table[table.calibration == "b"].groupby("test").text.first().to_dict() == {
        "a": page.OTHER, "b": page.OWN,
    }  # fmt: skip
    assert set(table[table.calibration == "test"].text) == {page.OWN}


def test_an_interval_holds_its_value_and_is_paired() -> None:
    table = page.compared(made_up({"raised": 1.2}))
    raised = table[(table.policy == "raised") & (table.text == page.OWN)]
    assert raised.low.tolist() == pytest.approx([20, 20]) and raised.high.tolist() == pytest.approx(
        [20, 20]
    )


def test_the_verdict_flips() -> None:
    harmless, clipped = made_up(), made_up(foreign={"amax": 1.5})
    assert page.chosen(harmless) == "amax" and "buys nothing" in page.answer(harmless)
    assert "policies.amax(statistics)" in page.recommendation(harmless)
    assert page.chosen(clipped) == "raised" and "+50 %" in page.answer(clipped)
    assert "costs nothing" in page.answer(clipped) and "2^(room/2)" in page.recommendation(clipped)
    worse = made_up({"raised": 1.3, "raised-all": 1.3}, {"amax": 1.5, "raised": 1.3})
    assert page.chosen(worse) == "headroom-amax" and "headroom_over_amax" in page.recommendation(worse)
    same = dict.fromkeys(page.CANDIDATES[1:], 1.03)
    dear = made_up(same, {**same, "amax": 1.5}, halves=(0.97, 1.0))
    assert page.chosen(dear) == "raised" and "changes the KL divergence by +4.0 %" in page.answer(dear)


def test_the_decision_table_says_what_the_runs_say() -> None:
    table = page.decision_table(made_up({"p99.99": 3.0, "four-over-six": 0.9}, {"amax": 1.5}))
    measured = table["measured here (KL)"]
    assert "amax up to +50 %" in measured.iloc[0] and table["set"].iloc[0].startswith("raised: amax")
    assert "room 0 at 1, headroom clips at 1 of 2 sites" in measured.iloc[3]
    assert "too low at 1, beyond the room at 1 of 2 sites" in measured.iloc[4]
    assert "four-over-six -10.0 to -10.0 %" in measured.iloc[5]
    assert measured.iloc[7] == "p99.99: +200.0 to +200.0 %"
    calm = page.decision_table(made_up())
    assert calm["set"].iloc[0] == "amax: amax / 2688"


def test_published_accuracies_are_read_from_the_file() -> None:
    points = page.accuracies()
    assert points.shape == (3, 3) and points.loc["Nemotron-3-Nano-30B-A3B", "AA-LCR"] == 0.99


def test_the_stored_runs_support_the_page() -> None:
    runs = page.stored_runs()
    floor = max(page.noise_floor(runs).values())
    assert 0.5 < floor < 3
    assert page.chosen(runs) == "raised"
    assert page.worst(runs, "amax").percent > 20 > 3 > page.worst(runs, "raised").percent
    assert page.worst(runs, "p99.99").percent > 100
    assert page.worst(runs, "four-over-six").percent < -5
    margins = page.margin_table(runs)
    assert (margins["best margin"] > 0).all() and (margins["as bad as 1 octave too low"] > 5).all()
    assert page.chosen_margin(runs) == 2
    assert len(page.decision_table(runs)) == 8
    assert page.summary(runs).notna().any(axis=1).all()
