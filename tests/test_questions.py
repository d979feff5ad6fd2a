# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The three answers: what they say of the stored run, and of runs whose numbers go the other way."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from nvfp4_utils import POLICIES, input_scale_from_amax, policies
from studies.pages import (
    index,
    q1_more_calibration,
    q2_which_policy,
    q3_which_dataset,
    snr_tables,
)
from studies.runs import synthetic
from studies.runs.store import Run

SPIKE = {"flush": 17.66, "floor": 2.43}


@pytest.fixture(scope="module")
def run():
    return Run()


class MadeUpRun:
    """Two mixes, two sites: amax and headroom calibrated on "other" lose what they are told to."""

    mixes, featured_mix = ("home", "other"), "home"
    sites = ("layers.0.mlp_input", "layers.0.o_proj_input")

    def __init__(self, amax_db: float, headroom_db: float, gap_db: float = 0.01) -> None:
        self.lost = {"amax": amax_db, "headroom": headroom_db}
        self.gap_db = gap_db

    def errors(self, mix: str) -> pd.DataFrame:
        """The oracle's error is 1; a foreign calibration costs only at the second site."""
        rows = [(s, "test", "oracle", u, 1.0, g, 1.0) for s in self.sites for u in ("flush", "floor")
                for g in range(3)]  # fmt: skip
        cases = itertools.product(
            self.sites, self.mixes, ("amax", "headroom", "p99.99"), ("flush", "floor")
        )
        for site, source, policy, underflow in cases:
            far = source != mix and site == self.sites[1]
            loss = self.gap_db + (self.lost.get(policy, 0.0) if far else 0.0)
            rows += [(site, source, policy, underflow, 1.0, g, 10 ** (loss / 10)) for g in range(3)]
        return pd.DataFrame(rows, columns=["site", "calibration", "policy", "underflow",
                                           "calibrated_amax", "group", "mse"])  # fmt: skip

    def groups(self, mix: str) -> pd.DataFrame:
        rows = [(site, g, 16, 100.0) for site in self.sites for g in range(3)]
        return pd.DataFrame(rows, columns=["site", "group", "count", "signal_power"])


def numbers(text: str) -> set[str]:
    """The numbers of a text, without those in names of policies."""
    return set(re.findall(r"\d[\d,.]*\d|\d", re.sub(r"p99[.\d]*|[\w-]*-[\w-]*", "", text)))


def test_answers_are_short_and_have_few_numbers(run):
    for page in index.QUESTIONS.values():
        found = page.answer(run)
        said = f"{found.verdict} {found.text}"
        assert len(re.findall(r"[.:](?: |$)", said)) <= 5
        assert len(numbers(said)) <= 4, said


def test_the_first_page_and_the_readme_say_what_the_pages_say(run):
    block = index.readme_block(run)
    for question, page in index.QUESTIONS.items():
        found = page.answer(run)
        assert f"**{question} {found.verdict}** {found.text}" in block
    assert q2_which_policy.published_accuracy() in block
    assert "+0.99 to -0.89 points over 3 models and 3 benchmarks" in block
    assert index.recommendation(run) in block


def test_answers_of_the_stored_run(run):
    size, policy, dataset = (page.answer(run) for page in index.QUESTIONS.values())
    assert size.verdict == "Up to about 64 sequences, yes; beyond, no."
    assert (size.pool, size.enough) == (512, 64)
    assert size.one == pytest.approx(0.543, abs=5e-4) and size.worst == pytest.approx(0.005, abs=5e-4)
    assert size.spike == pytest.approx(SPIKE, abs=0.01)
    assert policy.verdict == "No: on other text amax fails, and headroom does not."
    assert policy.gap["amax"] == pytest.approx(0.019, abs=5e-4)
    assert policy.foreign == pytest.approx({"amax": 10.423, "headroom": 0.032}, abs=5e-4)
    assert dataset.verdict == "With amax, yes; with headroom, no."
    assert (dataset.amax, dataset.headroom) == (policy.foreign["amax"], policy.foreign["headroom"])
    assert dataset.broad_amax == pytest.approx(0.034, abs=5e-4)


@pytest.mark.parametrize(
    ("enough", "verdict"),
    [(1, "No: one sequence is enough."), (64, "Up to about 64 sequences, yes; beyond, no."),
     (256, "Yes, up to all 256 sequences.")],
)  # fmt: skip
def test_more_calibration_goes_either_way(enough, verdict):
    found = q1_more_calibration.Answer(256, enough, 0.5, 0.02, SPIKE)
    assert found.verdict == verdict
    assert ("64 at most 0.02 dB" in found.text) == (enough == 64)


def test_enough_is_after_the_last_size_that_loses(monkeypatch):
    sizes = pd.DataFrame({"n": [1, 2, 4, 8] * 2, "site": ["a"] * 4 + ["b"] * 4,
                          "snr_db": [19.95, 20, 20, 20, 18, 19.95, 19.7, 20]})  # fmt: skip
    table = q1_more_calibration.loss_table(sizes)
    assert table["mean"].tolist() == pytest.approx([1.025, 0.025, 0.15, 0])
    assert table["worst site"].tolist()[:3] == ["b", "b", "b"]
    assert table["sites over 0.1 dB"].tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(snr_tables, "size_curves", lambda *_: sizes)
    found = q1_more_calibration.answer(MadeUpRun(0, 0))
    assert (found.enough, found.verdict) == (8, "Yes, up to all 8 sequences.")


@pytest.mark.parametrize(
    ("losses", "policy", "dataset"),
    [((5.0, 0.0), "No: on other text amax fails, and headroom does not.",
      "With amax, yes; with headroom, no."),
     ((0.05, 0.0), "It may: on this run amax holds on other text too.", "No, on this run."),
     ((5.0, 3.0), "No, but headroom is no cure on this run: both fail on other text.",
      "Yes, with amax and with headroom."),
     ((5.0, 0.0, 0.5), "No: even on its own text amax is far from the best scale.",
      "With amax, yes; with headroom, no.")],
)  # fmt: skip
def test_policy_and_dataset_go_either_way(losses, policy, dataset):
    made_up = MadeUpRun(*losses)
    found = q2_which_policy.answer(made_up)
    assert found.verdict == policy
    assert found.foreign == pytest.approx({"amax": losses[0], "headroom": losses[1]})
    other = q3_which_dataset.answer(made_up)
    assert other.verdict == dataset
    # "home" is the featured mix: what it loses elsewhere, elsewhere loses on it too
    assert (other.amax, other.broad_amax) == pytest.approx((losses[0], losses[0]))


def test_one_mix_cannot_answer_for_others():
    made_up = MadeUpRun(5.0, 0.0)
    made_up.mixes = ("home",)
    assert q2_which_policy.answer(made_up).verdict.endswith("this run holds no other.")
    assert "other text" not in q2_which_policy.answer(made_up).text
    found = q3_which_dataset.answer(made_up)
    assert (found.verdict, found.text) == ("Unknown: this run holds one mix.",
                                           "Capture at least two mixes to cross them.")  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "words"),
    [((5.0, 0.0), "Set `input_scale` by headroom"), ((5.0, 3.0), "No policy of this run holds"),
     ((0.0, 0.0, 0.5), "No policy of this run holds")],
)  # fmt: skip
def test_recommendation_follows_the_answers(losses, words, monkeypatch):
    monkeypatch.setattr(q1_more_calibration, "answer",
                        lambda _: q1_more_calibration.Answer(8, 4, 0.5, 0.0, SPIKE))  # fmt: skip
    said = index.recommendation(MadeUpRun(*losses))
    assert words in said
    assert "Never clip" not in said  # p99.99 is as good as amax here


def test_law_of_a_subsets_maximum_is_that_of_all_subsets():
    values = np.array([3.0, 1.0, 2.0, 2.0, 5.0])
    for n in range(1, 6):
        ascending, weights = snr_tables.subset_maximum(values, n)
        largest = [max(s) for s in itertools.combinations(values, n)]
        assert weights.sum() == pytest.approx(1)
        assert ascending @ weights == pytest.approx(np.mean(largest))
        quantiles = snr_tables.weighted_quantiles(ascending, weights, (0.05, 0.5, 0.95))
        assert (
            quantiles.tolist() == np.quantile(largest, (0.05, 0.5, 0.95), method="inverted_cdf").tolist()
        )
    with pytest.raises(ValueError, match=r"^n is 6; expected a subset's size between 1 and 5\.$"):
        snr_tables.subset_maximum(values, 6)


def test_size_curve_is_the_mean_of_random_subsets_and_ends_at_the_pool(run):
    mix, site = run.featured_mix, "layers.6.o_proj_input"
    curve = snr_tables.size_curve(run, mix, site).set_index("n")
    amaxes = snr_tables.sequence_amaxes(run, mix, site)
    generator = np.random.default_rng(0)
    drawn = [generator.choice(amaxes, 8, replace=False).max() for _ in range(4000)]
    snr = snr_tables.curve_snr(run, mix, site, "flush", drawn)
    assert curve.snr_db[8] == pytest.approx(snr.mean(), abs=4 * snr.std() / 4000**0.5)
    below, up_to = np.mean(drawn < curve.amax[8]), np.mean(drawn <= curve.amax[8])
    assert below - 0.03 < 0.5 < up_to + 0.03  # a median, within what 4,000 draws tell
    assert curve.amax[512] == amaxes.max()


def test_headroom_keeps_room_at_its_own_site(run):
    table = q1_more_calibration.harm_table(run, run.featured_mix, "flush").set_index("site")
    site = table.headroom_octaves.idxmin()
    assert table.headroom_octaves[site] == pytest.approx(1.70, abs=0.01)
    room = policies.headroom(run.marginals(run.featured_mix, site))
    at = snr_tables.curve_snr(run, run.featured_mix, site, "flush", [table.amax[site], room])
    assert at[0] - at[1] < snr_tables.HARM_DB


def test_spike_costs_what_the_last_set_loses_against_its_oracle():
    last = synthetic.stored_table().query("distribution == 'rare_giant_spike'").iloc[-1]
    cost = q1_more_calibration.spike_cost()
    assert cost["flush"] == last.oracle_db - last.snr_db_flush > cost["floor"] > 0


def test_paired_table_names_the_other_convention_only_where_it_differs(run):
    table = q2_which_policy.paired_table(run, run.featured_mix)
    assert list(table.index) == [p for p in POLICIES if p not in ("amax", "oracle")]
    other = table["floor, if different"].dropna()
    assert other.empty
    assert table["gain over amax (dB)"]["headroom"] == pytest.approx(0.0016, abs=5e-5)


def test_tables_of_the_policy_page(run):
    mix = run.featured_mix
    results = q2_which_policy.gaps(run, mix)
    shown = q2_which_policy.one_scale(run, mix)
    assert shown == [p for p in POLICIES if POLICIES[p].one_scale and p != "oracle"]
    assert q2_which_policy.smallest_gap(results) > -1e-6
    kinds = q2_which_policy.kind_gaps(results["flush"], shown)
    assert kinds.loc["amax", "o_proj_input"] == pytest.approx(0.0302, abs=5e-5)
    ends = q2_which_policy.ends_table(q2_which_policy.both_ends(run, mix, results["flush"]), shown)
    assert ends.loc["headroom", "worst"] == 0 < ends.loc["headroom", "worst "]
    assert ends.loc["p99.99", "saturated, mean"] == pytest.approx(0.165, abs=5e-4)
    ripple = q2_which_policy.ripple_check(results["flush"])
    assert ripple.apart.is_monotonic_decreasing and ripple.apart[0] == pytest.approx(0.058, abs=5e-4)


def test_tables_of_the_dataset_page(run):
    foreign = snr_tables.foreign_losses(run)
    assert len(foreign) == 32 * 4 * 3
    assert q3_which_dataset.where_it_hurts(foreign).startswith("Of the 7 losses over 1 dB, 7 are at ")
    narrow = q3_which_dataset.one_domain_table(run, foreign, "flush")
    assert narrow.loc["open-math-only", q3_which_dataset.as_many(run.featured_mix)] < 0.02
    assert "not how much: 512 random" in q3_which_dataset.content_or_size(narrow, run.featured_mix)
    same = narrow.assign(**{"worst (dB)": 0.01})
    assert q3_which_dataset.content_or_size(same, run.featured_mix) == ""
    below, above = q3_which_dataset.by_ratio(snr_tables.amax_ratio(run, foreign))
    assert below == foreign.loss_db.max() > 1 > 0.1 > above
    losses = {"amax": foreign.loss_db, "constant": 0 * foreign.loss_db}
    assert q3_which_dataset.loss_table(losses).loc["constant"].tolist() == [0, 0, 0, 0]
    assert len(q3_which_dataset.survival_figure(losses).axes[0].get_lines()) == 2  # amax, and 0.1 dB


def test_a_scale_of_the_decision_table_is_the_policies(run):
    table = index.decisions(run)
    assert table.loc["no calibration", "worst site (dB)"] == pytest.approx(0.132, abs=5e-4)
    assert table.loc["another quantizer", "mean loss (dB)"] < -0.5
    assert table.loc["only amax", "set"] == "amax, 64 sequences"
    assert input_scale_from_amax(policies.constant()) == 1
