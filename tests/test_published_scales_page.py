# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The published scales page: tables by hand, and answers for made-up and for stored ratios."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from studies.pages import published_scales as page


def ratios_of(down: float, norm: float) -> pd.DataFrame:
    return pd.DataFrame([
        {"model": "Big", "site": site, "layer": layer, "set": name, "ratio": ratio}
        for site, ratio in (("down_proj_input", down), ("mlp_input", norm))
        for layer in (0, 1)
        for name in ("ref-code", "act-max-p5")
    ])  # fmt: skip


def run_of() -> Any:
    amaxes = {"a": 2.0, "b": 3.0}
    site = "layers.4.mlp_input"

    def policies(mix: str) -> pd.DataFrame:
        return pd.DataFrame({"site": [site], "policy": "amax", "calibrated_amax": amaxes[mix]})

    layouts = pd.DataFrame({
        "layout": ["short", "long"], "site": site, "policy": "amax", "calibrated_amax": [2.0, 4.0]
    })  # fmt: skip
    sequences = pd.DataFrame({
        "site": site, "pool": "calibration", "sequence": range(4), "amax": [1.0, 1.0, 1.0, 4.0]
    })  # fmt: skip
    return SimpleNamespace(mixes=["a", "b"], featured_mix="a", policies=policies, sites=[site],
                           layouts=lambda: layouts, sequences=lambda mix: sequences)  # fmt: skip


def test_own_ratios_have_the_published_form() -> None:
    table = page.own_ratios({"m": run_of()})
    assert set(table.site) == {"mlp_input"} and set(table.layer) == {4}
    by_kind = {k: sorted(set(t.ratio)) for k, t in table.groupby("compared")}
    assert by_kind[page.TEXTS] == pytest.approx([2 / 3, 1.5])
    assert by_kind[page.LENGTHS] == [2.0]
    assert by_kind[page.HALVES] in ([0.25], [4.0], [0.25, 4.0])
    assert (table.compared == page.HALVES).sum() == page.DRAWS


def test_shares_and_quantiles_by_hand() -> None:
    table = page.share_table(ratios_of(2.5, 1.0), ["site"])
    assert table.loc["down_proj_input", ["above 1.25 (%)", "above 2 (%)", "above 4 (%)"]].tolist() == [
        100, 100, 0,
    ]  # fmt: skip
    prior = page.prior_table(ratios_of(4.0, 1.0), page.own_ratios({"m": run_of()}))
    assert prior.loc[(page.PUBLISHED, "down_proj_input"), "50 %"] == 2
    assert page.margin(ratios_of(4.0, 1.0), "down_proj_input") == 2


def test_answer_follows_the_ratios() -> None:
    text = page.answer(ratios_of(4.0, 1.0))
    assert "matters at down_proj inputs, hardly at MLP inputs" in text
    assert "100 % of the published down_proj amaxes are more" in text and "A margin of 2.0" in text
    assert "matters at both sites" in page.answer(ratios_of(2.0, 2.0))


def test_an_incomplete_table_is_refused() -> None:
    whole, runs = ratios_of(2.0, 1.0), {"m": run_of()}
    assert "(8 ratios)" in page.check(whole, runs)
    with pytest.raises(ValueError, match="Big has 7 ratios; expected 8"):
        page.check(whole.iloc[1:], runs)


def test_the_stored_ratios() -> None:
    ratios, origin = page.published()
    assert origin["citation"] == "modelopt1573"
    shares = page.share_table(page.of_text(ratios), ["model", "site", "set"])
    row = shares.loc["Qwen3.6-27B", "down_proj_input", "ref-code"]
    assert row["above 1.25 (%)"] == pytest.approx(100 * 21 / 64)
    accuracy = page.accuracy_table(ratios)
    assert accuracy.loc["Nemotron-3-Nano-30B-A3B", "AA-LCR"] == 0.99
    assert np.isfinite(accuracy["headroom / amax, median"]).all()
    text = page.reconciliation(ratios, page.own_ratios({"reference": page.Run()}))
    assert text.startswith("Beside the prediction: 100% of")


def test_missing_ratios_say_how_to_make_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(page, "TARGET", tmp_path / "none.parquet")
    with pytest.raises(FileNotFoundError, match=r"python -m studies\.runs\.layer_ratios CSV"):
        page.published()
