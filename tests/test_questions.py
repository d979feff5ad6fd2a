# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The three answers: what they say of the stored run, and of runs whose numbers go the other way."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from nvfp4_utils import POLICIES, policies
from studies.pages import (
    index,
    loss_tables,
    q1_more_calibration,
    q2_which_policy,
    q3_which_dataset,
    snr_tables,
)
from studies.runs import synthetic
from studies.runs.store import Run

RUNS = ("smollm2", "gemma3", "")


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def runs():
    return loss_tables.models("", RUNS)


def numbers(text: str, runs) -> set[str]:
    """The numbers of a text, without those in names of models, sites, mixes and policies."""
    for run in runs:
        text = text.replace(loss_tables.short(run), "")
    return set(
        re.findall(r"\d[\d,.]*\d|\d", re.sub(r"`[^`]*`|p99[.\d]*|[A-Za-z][\w-]*-[\w-]*", "", text))
    )


def test_answers_are_short_and_have_few_numbers(runs):
    for page in index.QUESTIONS.values():
        found = page.answer(runs)
        said = f"{found.verdict} {found.text}"
        assert len(re.findall(r"[.:](?: |$)", said)) <= 5
        assert len(numbers(said, runs)) <= 4, said


def test_the_first_page_and_the_readme_say_what_the_pages_say(runs):
    block = index.readme_block(runs)
    for question, page in index.QUESTIONS.items():
        found = page.answer(runs)
        assert f"**{question} {found.verdict}** {found.text}" in block
    assert q2_which_policy.published_accuracy() in block
    assert "+0.99 to -0.89 points over 3 models and 3 benchmarks" in block
    assert all(loss_tables.short(run) in index.scope(runs) for run in runs)


def test_answers_of_the_stored_runs(runs):
    size, policy, dataset = (page.answer(runs) for page in index.QUESTIONS.values())
    assert size.verdict == "Up to about 256 sequences, yes; beyond, no."
    assert list(size.enough.values()) == [128, 256, 64]
    assert size.slowest == "`layers.17.mlp_input` of Gemma 3 270M"
    assert size.halves == pytest.approx(1.42, abs=0.01)
    assert policy.verdict == "From the amax or from more, never from less."
    smollm2, gemma3, reference = policy.change
    assert policy.change[smollm2]["p99.99"][0] == pytest.approx(885.0, abs=0.1)
    assert policy.outcome("headroom") == {smollm2: 1, gemma3: 0, reference: 0}
    assert policy.below == {smollm2: ["layers.11.down_proj_input"], gemma3: [], reference: []}
    assert set(policy.outcome("four-over-six").values()) == {-1}
    assert dataset.verdict.startswith("With amax it can, on Gemma 3 270M; with")
    assert dataset.worst[gemma3]["amax"][0][0] == pytest.approx(59.6, abs=0.1)
    assert dataset.snr[reference] == (pytest.approx(10.42, abs=0.01), "layers.6.o_proj_input")
    assert dataset.hurt() == [gemma3] and dataset.hurt("raised") == []


def test_one_run_answers_alone(run):
    one = loss_tables.models("gemma3", RUNS)
    assert [r.name for r in one] == ["gemma3"]
    assert "on every model" in q3_which_dataset.answer(one).verdict
    assert q3_which_dataset.answer([run]).verdict.startswith("No:")
    assert q1_more_calibration.answer([run]).enough == {"the reference model": 64}


@pytest.mark.parametrize(
    ("enough", "verdict"),
    [({"a": 1, "b": 1}, "No: one sequence is enough."),
     ({"a": 64, "b": 8}, "Up to about 64 sequences, yes; beyond, no."),
     ({"a": 64, "b": 256}, "Yes, up to all sequences on b.")],
)  # fmt: skip
def test_more_calibration_goes_either_way(enough, verdict):
    found = q1_more_calibration.Answer(enough, {"a": 256, "b": 256}, "`x` of a", 1.0)
    assert found.verdict == verdict
    assert "KL" not in q1_more_calibration.Answer(enough, enough, "`x` of a", np.nan).text


def test_enough_is_after_the_last_size_that_loses():
    sizes = pd.DataFrame({"n": [1, 2, 4, 8] * 2, "site": ["a"] * 4 + ["b"] * 4,
                          "snr_db": [19.95, 20, 20, 20, 18, 19.95, 19.7, 20]})  # fmt: skip
    table = q1_more_calibration.loss_table(sizes)
    assert table["mean"].tolist() == pytest.approx([1.025, 0.025, 0.15, 0])
    assert table["worst site"].tolist()[:3] == ["b", "b", "b"]
    assert table["sites over 0.1 dB"].tolist() == [1, 0, 1, 0]
    assert q1_more_calibration.needed(table) == 8
    assert q1_more_calibration.needed(table * [0, 0, 1, 1]) == 1


def by_policy(**percent) -> dict:
    """policy -> change with an interval of a tenth of a percent; 0 unless given."""
    known = dict.fromkeys(q2_which_policy.SHOWN, 0.0) | {
        k.replace("_", "."): v for k, v in percent.items()
    }
    return {policy: (v, v - 0.1, v + 0.1) for policy, v in known.items()}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"p99_99": 50.0}, "From the amax or from more, never from less."),
     ({"p99_99": 50.0, "raised": 3.0}, "Yes: raising it costs."),
     ({"mse": -3.0}, "Not always: mse can gain up to 3.0 %."),
     ({}, "It may: no policy leaves the noise.")],
)  # fmt: skip
def test_policy_goes_either_way(changes, verdict):
    found = q2_which_policy.Answer({"a": by_policy(**changes)}, {"a": 1.0}, {"a": []})
    assert found.verdict == verdict
    two = q2_which_policy.Answer({"a": by_policy(mse=-3.0), "b": by_policy()}, {"a": 1.0, "b": 1.0}, {})
    assert two.verdict == "It may: no policy leaves the noise."  # a gain on one model only is none
    assert q2_which_policy.within_noise(two).startswith("13 of 14 others")
    assert q2_which_policy.Answer({}, {}, {}).verdict.startswith("Unknown")


@pytest.mark.parametrize(
    ("amax", "raised", "verdict"),
    [(1.0, 0.0, "No: in the model's output no foreign calibration leaves the noise by much."),
     (40.0, 1.0, "With amax it can, on a; with the amax raised in advance, no."),
     (40.0, 30.0, "Yes, on a, and raising the amax does not cure it.")],
)  # fmt: skip
def test_dataset_goes_either_way(amax, raised, verdict):
    def worst(**changes):
        return {p: ((v, v - 0.5, v + 0.5), "x", "y") for p, v in changes.items()}

    models = {"a": worst(amax=amax, raised=raised), "b": worst(amax=0.0, raised=0.0)}
    found = q3_which_dataset.Answer(models, {"a": 2.0, "b": 2.0}, {"a": (0.0, "s"), "b": (9.0, "t")})
    assert found.verdict == verdict
    assert "9.0 dB, at `t` of b, where KL hardly moves" in found.text
    assert q3_which_dataset.Answer({}, {}, {}).verdict.startswith("Unknown")
    assert q3_which_dataset.Answer({}, {}, {"b": (9.0, "t")}).verdict == "In SNR, with amax, yes."


def test_beyond_the_noise_takes_size_and_certainty():
    cases = ((2, 1, 3), (2, -1, 5), (0.5, 0.4, 0.6), (-2, -3, -1))
    assert [loss_tables.beyond(case, 1.0) for case in cases] == [1, 0, 0, -1]


def test_a_change_is_paired_by_sequence(run):
    mix = run.featured_mix
    kl = loss_tables.sequence_kl(run, mix)
    equal = ["amax", *(f"amax of half {i}" for i in range(6))]
    expected = 100 * (kl[mix, "headroom"].mean() / kl[mix][equal].mean().mean() - 1)
    draws = loss_tables.changes(run, [mix]).loc[mix, mix, "headroom"]
    assert loss_tables.measured(draws)[0] == pytest.approx(expected)
    unpaired = 100 * kl[mix, "amax"].std() / kl[mix, "amax"].mean() / len(kl) ** 0.5
    assert draws[1:].std() < unpaired / 2


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
    assert (
        q3_which_dataset.content_or_size(narrow, run.featured_mix) == ""
    )  # as many are all: no control
    control = {q3_which_dataset.as_many(run.featured_mix): 0.01}
    assert "not how much: 512 random" in q3_which_dataset.content_or_size(
        narrow.assign(**control, **{"worst (dB)": 3.0}), run.featured_mix
    )
    same = narrow.assign(**{"worst (dB)": 0.01})
    assert q3_which_dataset.content_or_size(same, run.featured_mix) == ""
    below, above = q3_which_dataset.by_ratio(snr_tables.amax_ratio(run, foreign))
    assert below == foreign.loss_db.max() > 1 > 0.1 > above
    losses = {"amax": foreign.loss_db, "constant": 0 * foreign.loss_db}
    assert q3_which_dataset.loss_table(losses).loc["constant"].tolist() == [0, 0, 0, 0]
    assert len(q3_which_dataset.survival_figure(losses).axes[0].get_lines()) == 2  # amax, and 0.1 dB
