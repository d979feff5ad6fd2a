# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The page on checkpoints: its sentences follow from what was found and from the stored proof."""

from __future__ import annotations

import pandas as pd
import pytest

from studies.checkpoints.breakages import BREAKAGES, DOWN, put
from studies.pages import audit as page
from studies.runs.store import RESULTS, Run


@pytest.fixture(scope="module")
def found():
    return page.skeletons()


@pytest.fixture(scope="module")
def table(found):
    run = Run("smollm2")
    return page.slack(found, run, run.mixes[0])


def test_results_are_small_and_the_proof_is_whole():
    assert sum(p.stat().st_size for p in (RESULTS / "checkpoints").iterdir()) <= 150_000
    proof = page.proof()
    for maker in page.MAKERS:
        patch = proof["patch"][maker]
        assert patch["outside_scales"] == patch["other_files_differ"] == 0 < patch["bytes_differ"]
        assert proof["vllm"][maker]["scale in use"]["differ"] == 0
    assert proof["modelopt"]["activations, floor"]["differ"] == 0


def test_a_checkpoint_that_is_not_clean_stops_the_page(found):
    assert page.check(found).startswith(
        "No finding at 210 scales of ModelOpt and 210 scales of llm-comp"
    )
    with pytest.raises(ValueError, match="expected no finding"):
        page.check({"ModelOpt": put(found["ModelOpt"], {DOWN: 0.0})})


def test_each_breakage_has_a_row_and_the_answer_says_if_one_is_missed(found, table):
    broken = page.breakage_table(found)
    assert list(broken.index) == [b.label for b in BREAKAGES] and page.missed(broken) == 0
    run = Run("smollm2")
    assert "Each is found" in page.answer(found, table, broken, run)
    broken.loc["a scale of zero", "ModelOpt: found"] = 0
    assert "All but 1 are found" in page.answer(found, table, broken, run)


def test_slack_has_a_row_per_tool_and_site_and_its_summary_counts_them(table):
    assert len(table) == 2 * 120
    summary = page.slack_summary(table)
    assert summary.sites.sum() == 240
    assert summary["clip what the run saw"].sum() == (table.saturation < 0).sum()
    assert page.worst(table).loss_db == table.loss_db.max()


def test_only_llm_compressors_values_are_exact_in_bfloat16(found):
    bits = page.precision(found)
    assert bits.loc["llm-compressor", "exact in bfloat16"] == 210
    assert bits.loc["ModelOpt", "exact in bfloat16"] < 21


def test_the_control_counts_alarms_and_misses():
    control = page.exchange_table([Run()])
    assert not control["false alarm"].any()
    assert control.loc[("reference", "amax"), "seen"]


def test_differences_are_told_from_the_stored_numbers():
    proof = page.proof()
    text = page.differences(proof)
    assert "no differing element in its activations, under floor" in text
    proof["modelopt"]["activations, floor"]["differ"] = 12
    assert "12 differing elements in its activations, under floor" in page.differences(proof)
    assert isinstance(page.proof_table({"modelopt": proof["modelopt"]}), pd.DataFrame)
