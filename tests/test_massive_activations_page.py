# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The massive activations page: its exact law, its tables on made-up runs, its answer on stored ones."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nvfp4_utils import ActivationStatistics
from studies.pages import massive_activations as page

SITES = ("layers.0.mlp_input", "layers.0.down_proj_input")


def run_of(peak: float, *, clipped_kl: float = 0.5, calibrated: float | None = None) -> Any:
    """Two sites of ones; the second has `peak` at the first token of each of 4 sequences."""
    x = torch.ones(4, 16, dtype=torch.bfloat16)
    spiky = x.clone()
    spiky[0, 0] = peak
    statistics = {s: ActivationStatistics.from_tensor(v).marginals
                  for s, v in zip(SITES, (x, spiky), strict=True)}  # fmt: skip
    tokens = pd.DataFrame([
        {"site": s, "sequence": i, "amax": top * (1 - i / 10), "position": 0, "channel": 3,
         "next_amax": 1.0, "median_amax": 1.0, "first_amax": top, "token": f"t{i % 2}"}
        for s, top in zip(SITES, (1.0, peak), strict=True) for i in range(4)
    ])  # fmt: skip
    policies = pd.DataFrame([
        {"site": s, "policy": p, "calibrated_amax": a}
        for s, top in zip(SITES, (1.0, peak), strict=True)
        for p, a in (("amax", calibrated or top), ("p99.99", 1.0))
    ])  # fmt: skip
    kl = {"amax": 0.1, "p99.99": clipped_kl, "headroom": 0.1}
    end = pd.DataFrame([
        {"test": "mix", "calibration": "mix", "policy": p, "underflow": "flush", "weights": "bf16",
         "only": only, "kl": v}
        for p, v in kl.items() for only in ("", "down_proj_input")
    ])  # fmt: skip
    return SimpleNamespace(
        featured_mix="mix", tokens=lambda mix: tokens, policies=lambda mix: policies,
        marginals=lambda mix, site: statistics[site], end_to_end=lambda: end,
    )  # fmt: skip


def test_the_law_equals_counting_every_subset() -> None:
    amaxes = np.array([1.0, 5.0, 9.5, 10.0, 3.0])
    law = page.seen_law(amaxes, [1, 2, 3, 5]).set_index("n")
    for n, row in law.iterrows():
        subsets = [max(s) for s in itertools.combinations(amaxes, int(str(n)))]
        assert row.share == pytest.approx(np.mean(subsets) / 10)
        assert row.probability == pytest.approx(np.mean([m >= 9 for m in subsets]))
    assert page.doublings(5) == [1, 2, 4, 5]


def test_a_site_is_massive_from_the_factor_on() -> None:
    table = page.site_table(run_of(64.0))
    assert page.massive_sites(table) == [SITES[1]]
    assert table.over_token.tolist() == [1, 64] and table["first"].tolist() == [1, 1]
    assert page.massive_sites(page.site_table(run_of(64.0), 65)) == []
    assert table.smallest[SITES[1]] == pytest.approx(np.log2(28672 / 64))


def test_check_refuses_a_policy_that_is_not_the_largest_token() -> None:
    assert page.check({"m": run_of(64.0)}) == 2
    with pytest.raises(ValueError, match=r"down_proj_input: largest token 64\.0, pool and policy"):
        page.check({"m": run_of(64.0, calibrated=2.0)})


def test_answer_follows_the_runs() -> None:
    text = page.answer({"a": run_of(64.0), "b": run_of(2.0)})
    assert "In a at 1 of 2 sites, all down_proj_input, at the first position of at least 100%" in text
    assert "the other models have none" in text and "the KL of a by 5." in text
    assert page.answer({"b": run_of(2.0)}).startswith(
        "<strong>None here: no amax of 2 sites is 32 times"
    )


def test_a_percentile_clips_and_amax_does_not() -> None:
    run = run_of(64.0)
    table = page.clip_table({"a": run}, run, [SITES[1]])
    assert table["massive sites clipped"].to_dict() == {"amax": "0 of 1", "p99.99": "1 of 1"}
    assert table.loc["p99.99", "lowest / amax"] == 1 / 64
    assert table.loc["p99.99", "a: sites clipped (%)"] == 50


def test_pieces_and_tokens() -> None:
    run = run_of(64.0)
    assert page.piece_table(run, SITES[1])["sequences"].to_dict() == {"'t0'": 2, "'t1'": 2}
    row = page.token_table(run, [SITES[1]]).iloc[0]
    assert (row["pieces there"], row["next token"], row["at position 0 (%)"]) == (2, 1, 100)


def windows(at_amax: float, up: float) -> pd.DataFrame:
    row = {"KL at amax": at_amax, "median of the kind": 1.0, "p1": -1.0, "KL at -1": 2.0,
           "KL at +4": up, "KL at +8": 4.0, "KL at +12": 9.0}  # fmt: skip
    return pd.DataFrame([row])


def test_advice_follows_the_costs() -> None:
    assert page.advice(windows(1.0, 1.0)).startswith(
        "**Keep the amax there.** At amax such a site costs 1.00"
    )
    assert page.advice(windows(1.0, 0.5)).startswith("**Move the amax by +4 octaves.**")
    assert page.advice(pd.DataFrame()) == "Every site has a window."


def test_the_stored_runs() -> None:
    runs = page.stored_runs()
    tables = page.site_tables(runs)
    sites = page.massive_sites(tables["smollm2"])
    assert sites[0] == "layers.11.down_proj_input" and len(sites) == 5
    assert not tables["gemma3"].massive.any() and not tables["reference"].massive.any()
    seen = page.seen_table(runs["smollm2"], sites)
    assert seen[sites[0]].share.iloc[0] == pytest.approx(0.84, abs=0.005)
    assert "2 in smollm2, 2 of them massive" in page.reconciliation(tables, seen)
    rows = page.window_table(runs, tables)
    assert len(rows) == 18 and (rows.smallest < 0).all()
    assert "layers.1.down_proj_input" in page.layout_prose(runs["smollm2"], seen)
    assert page.layout_prose(runs["gemma3"], {}) == ""
