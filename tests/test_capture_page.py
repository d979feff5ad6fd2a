# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The capture page's sentences for tensors that are tame, partly and not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from nvfp4_utils import ActivationStatistics
from studies.pages import capture, regimes


def table(*room: float, normal: float = 99.9) -> pd.DataFrame:
    """Sites of an MLP, then one of an attention output where the room is negative."""
    sites = [f"layers.{i}.{'o_proj_input' if r < 0 else 'mlp_input'}" for i, r in enumerate(room)]
    columns = {"amax": range(2, 2 + len(room)), "room (octaves)": room, "normal %": normal}
    return pd.DataFrame(columns | {"p99.99 / amax": 0.5}, index=sites)


def test_tame_but_for_the_kind_that_is_not() -> None:
    assert capture.answer(table(5.0, 6.0, -1.0), "few tokens") == (
        "<strong>Tame but for o_proj_input: at 2 of 3 sites one amax keeps every block of the tensor in "
        "the normal range of its scale, with 5.0 octaves or more to spare.</strong> The "
        "others, all o_proj_input, have none. Scope: few tokens."
    )


def test_other_tensors_get_another_verdict() -> None:
    tame = capture.answer(table(5.0, 6.0), "")
    assert tame.startswith("<strong>Tame: at 2 of 2") and "The other" not in tame
    wild = capture.answer(table(-5.0, -6.0), "")
    assert wild.startswith("<strong>Not tame: at 0 of 2") and "to spare" not in wild
    assert "nan" not in wild + capture.range_prose(table(-5.0, -6.0), 4)


def test_the_largest_magnitude_is_that_of_these_sequences() -> None:
    text = capture.range_prose(table(5.0, 6.5), 16)
    assert text.startswith("Of these 16 sequences the largest magnitude of a site runs from 2 to 3")
    assert "The widest room is 6.5 octaves." in text


def test_prediction_beside_the_table() -> None:
    text = capture.reconciliation(table(5.0, 4.0, -1.0))
    assert "4.0 octaves at mlp_input, -1.0 octaves at o_proj_input" in text
    assert "0.50 at mlp_input" in text


def test_room_is_counted_from_the_blocks() -> None:
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    x[1] *= 2.0**-10
    sites = {"layers.0.mlp_input": ActivationStatistics.from_tensor(x)}
    assert regimes.site_table(sites)[capture.ROOM].iloc[0] == pytest.approx(14.807 - 10, abs=1e-3)


def test_uneven_sequences_are_named() -> None:
    def found(*amaxes: float) -> Any:
        return SimpleNamespace(sequence_amax=torch.tensor(amaxes))

    text = capture.uneven_prose({"a": found(1.0, 1.0, 1.0), "b": found(1.0, 1.0, 4.0)}, 3)
    assert text.startswith("At b,") and "4.0 times" in text and "2.0 octaves" in text


def test_sites_by_kind_keep_their_order() -> None:
    sites: dict[str, object] = {
        "layers.1.mlp_input": 0,
        "layers.0.mlp_input": 0,
        "layers.0.o_proj_input": 0,
    }
    assert capture.by_kind(sites, ["o_proj_input", "mlp_input"]) == {
        "o_proj_input": ["layers.0.o_proj_input"],
        "mlp_input": ["layers.1.mlp_input", "layers.0.mlp_input"],
    }


def test_smollm2_is_run_where_it_was_fetched(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NVFP4_MODELS", str(tmp_path))
    assert capture.default_model() == "reference"
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "model.safetensors").touch()
    assert capture.default_model() == "smollm2"
    assert capture.title("smollm2").startswith("SmolLM2-135M") and capture.title("a/b") == "a/b"
