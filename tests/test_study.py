# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Replication rows, extreme values and design weaknesses, on known laws and on the stored run."""

import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import genpareto

from nvfp4_utils import fake_quantize, input_scale_from_amax
from nvfp4_utils.hooks import hooked
from nvfp4_utils.sites import SITES
from studies import ROOT
from studies.data import corpora
from studies.pages import q1_more_calibration, replication, snr_tables, tails, weaknesses
from studies.runs import synthetic
from studies.runs.store import Run


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.mark.parametrize("index", [-0.3, 0.0, 0.4])
def test_tail_of_a_known_law_is_recovered(index):
    values = 2 + genpareto.rvs(index, scale=1.5, size=20000, random_state=np.random.default_rng(0))
    tail = tails.fit_tail(values)
    assert abs(tail.index - index) < 4 * tail.error and tail.share == pytest.approx(0.2, abs=1e-3)
    exact = genpareto(index, loc=2, scale=1.5)
    for n in (10, 100, 1000):
        level = tail.level(n)
        assert exact.sf(level) == pytest.approx(1 / n, rel=0.35)
        assert tail.sequences(level) == pytest.approx(n, rel=1e-6)
    middle = tail.largest_of(500, 0.5)
    assert exact.cdf(middle) ** 500 == pytest.approx(0.5, abs=0.15)


def test_tail_needs_excesses_that_differ():
    with pytest.raises(ValueError, match=r"^2 sequence amaxes, 2 different ones, lie above the 80%"):
        tails.fit_tail(np.arange(10.0))
    with pytest.raises(ValueError, match=r"0 different ones, lie above the 80% quantile"):
        tails.fit_tail(np.r_[np.arange(100.0), np.full(400, 200.0)])
    tail = tails.fit_tail(np.random.default_rng(0).exponential(size=1000))
    with pytest.raises(ValueError, match=r"^excess probability is -1.5; expected a value in \[0, 1\)"):
        tail.level(2)


def test_first_passage_is_that_of_random_orders(run):
    site = "layers.6.down_proj_input"
    table = tails.growth_table(run, run.featured_mix).set_index("site")
    amaxes = snr_tables.sequence_amaxes(run, run.featured_mix, site)
    generator = np.random.default_rng(0)
    target = 0.9 * amaxes.max()
    first = [1 + int((generator.permutation(amaxes) >= target).argmax()) for _ in range(3000)]
    error = np.std(first) / len(first) ** 0.5
    assert table.measured[site] == pytest.approx(np.mean(first), abs=4 * error)


def test_harm_begins_where_the_curve_stays_lower(run):
    mix = run.featured_mix
    row = q1_more_calibration.harm_table(run, mix, "flush").iloc[5]
    at = snr_tables.curve_snr(run, mix, row.site, "flush", [row.amax, row.harm_amax, 4 * row.harm_amax])
    assert (
        at[0] - at[1] > q1_more_calibration.HARM_DB > 0 and at[0] - at[2] > q1_more_calibration.HARM_DB
    )
    assert row.octaves == pytest.approx(math.log2(row.harm_amax / row.amax))


def test_every_published_number_has_one_row_and_no_foreign_one_a_difference(run):
    rows = replication.all_rows(run, 0.25)
    assert len(rows) == replication.published_count()
    assert dict(rows.verdict.value_counts()) == {
        "reproduced": 47, "differs: draw": 22, "differs: clipping": 2, "differs: unexplained": 1,
        "not comparable": 240,
    }  # fmt: skip
    other = rows[rows.verdict == "not comparable"]
    assert other.difference.isna().all()
    assert (rows[rows.verdict.str.startswith("differs")].reason != "").all()
    checked = rows[rows.verdict != "not comparable"]
    np.testing.assert_allclose(checked.difference, checked.ours - checked.published, atol=1e-12)
    close = rows[(rows.verdict == "reproduced") & rows["quantity"].str.contains("elements|^oracle")]
    assert (close.difference.abs() <= 0.25).all()
    assert sorted(rows.published) == sorted(published_numbers(synthetic.published()))


def published_numbers(value, key=""):
    """Walk the cited file, leaving out settings: what ``all_rows`` must hold, number by number."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in {"source", "layer", "n_seqs", "growth", "n_calib", "n_test", "seeds"}:
                yield from published_numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from published_numbers(inner, key)
    elif isinstance(value, int | float):
        yield float(value)


def test_unseen_outliers_grow_with_the_power_where_nothing_saturates():
    at_1, at_10 = (synthetic.unseen_outliers(growth) for growth in (1.0, 10.0))
    for policy in ("bmin_anchor", "oracle"):
        assert at_10[policy] / at_1[policy] == pytest.approx(0.8 + 0.2 * 100, rel=0.03)
    assert at_10["bmax_anchor"] > 30 * at_10["oracle"]


def test_tensor_gains_pool_the_tensors(run):
    mix = run.window_mixes[0]
    gains = weaknesses.tensor_gains(run, mix, "flush")
    assert (gains.low <= gains["mean"]).all() and (gains["mean"] <= gains.high).all()
    pool = gains[gains.policy == "headroom"].set_index("site").pool
    snr = snr_tables.policy_snr(run, mix, "flush").set_index(["site", "policy"]).snr_db
    for site in run.sites[::5]:
        assert pool[site] == pytest.approx(snr[site, "headroom"] - snr[site, "amax"], abs=1e-5)


def test_first_splits_are_part_of_all_splits(run):
    table = weaknesses.first_split_table(run, "open-news-instruct", "flush", draws=20)
    sequences = run.sequences("open-news-instruct")
    sequences = sequences[(sequences.pool == "calibration") & (sequences.site == run.sites[0])]
    first = sequences.source.isin(["news/cnn_dailymail", "instruct/stem"])
    assert (table.n == first.sum()).all() and 0 < first.sum() < len(sequences)
    assert weaknesses.first_split_table(run, "open-math-only", "flush") is None


def test_nested_subsets_end_without_spread(run):
    spread = weaknesses.subset_spread(run, run.featured_mix, draws=20)
    assert max(spread.study.iloc[-1], spread.subsets.iloc[-1]) < 1e-12 < 1e-3 < spread.fresh.iloc[-1]
    assert (spread.fresh.diff().dropna() < 0).all()


def test_mean_of_the_matrix_is_the_mean_over_sites(run):
    mean = snr_tables.cross_mean(run).set_index(["calibration", "test"])
    cross = snr_tables.cross_matrix(run).groupby(["calibration", "test"]).loss_db.mean()
    pd.testing.assert_series_equal(mean.loss_db, cross.loc[mean.index], check_names=False)
    assert (mean.low <= mean.loss_db + 1e-9).all() and (mean.loss_db <= mean.high + 1e-9).all()


@pytest.mark.skipif(corpora.corpora_folder() is None, reason="NVFP4_CORPORA is not set")
def test_three_random_cells_of_the_stored_run_equal_raw_activations(run):
    """From text to decibels once more, by direct evaluation; another device rounds bf16 otherwise."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ROOT / run.info["model"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    parameters = run.info["provenance"]["parameters"]
    mix = run.mixes[1]
    texts = corpora.sequences(
        mix, tokenizer, calibration=0, test=parameters["test"], length=parameters["length"],
        progress=False,
    )  # fmt: skip
    chooser = random.Random(5)
    group = chooser.randrange(parameters["test"] // parameters["test_group"])
    kept = {}
    with torch.no_grad(), hooked(model, tuple(SITES), lambda site, x: kept.update({site: x.clone()})):
        first = group * parameters["test_group"]
        model.model(input_ids=texts.test[first : first + parameters["test_group"]].long())
    errors = run.errors(mix)
    cells = errors[(errors.group == group) & ~errors.policy.isin(snr_tables.NOT_ONE_SCALE)]
    for i in chooser.sample(range(len(cells)), 3):
        row = cells.iloc[i]
        x = kept[row.site]
        scale = input_scale_from_amax(row.calibrated_amax)
        y = fake_quantize(x, scale, underflow=row.underflow, out_dtype=torch.float32)
        direct = (y.double() - x.double()).square().mean().item()
        assert row.mse == pytest.approx(direct, rel=0.02), row
