# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Ratios of published amaxes: from a made-up table, with nothing but ratios written."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from studies.runs import layer_ratios

MADE_UP = """model,site,layer,calibration,g_amax
Big (mlp_only),mlp_in,0,ref-max,2.0
Big (mlp_only),mlp_in,0,code,3.0
Big (mlp_only),down_proj,0,ref-max,608.0
Big (mlp_only),down_proj,0,code,77824.0
"""


def written(folder: Path, text: str = MADE_UP) -> Path:
    path = folder / "amaxes.csv"
    path.write_text(text)
    return path


def test_a_ratio_is_a_sets_amax_over_the_reference_sets(tmp_path: Path) -> None:
    table = layer_ratios.layer_ratios(layer_ratios.read_amaxes(written(tmp_path)))
    assert table.to_dict("records") == [
        {"model": "Big", "site": "mlp_input", "layer": 0, "set": "code", "ratio": 1.5},
        {"model": "Big", "site": "down_proj_input", "layer": 0, "set": "code", "ratio": 128.0},
    ]


def test_only_ratios_and_their_origin_are_written(tmp_path: Path) -> None:
    target = tmp_path / "out" / "ratios.parquet"
    assert layer_ratios.main([str(written(tmp_path)), "--target", str(target)]) == 0
    table = pd.read_parquet(target)
    assert list(table) == ["model", "site", "layer", "set", "ratio"]
    info = json.loads(target.with_suffix(".json").read_text())
    assert info["citation"] == "modelopt1573" and "Apache-2.0" in info["source"]
    assert len(info["csv_sha256"]) == 64
    assert info["models"] == [{"as published": "Big (mlp_only)", "layers": 1}]
    assert "77824" not in target.with_suffix(".json").read_text()
    assert sorted(p.name for p in target.parent.iterdir()) == ["ratios.json", "ratios.parquet"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,site,layer,g_amax\n", "has the columns model, site, layer, g_amax; expected also"),
        (MADE_UP.replace("mlp_in,", "router,"), "names the site router; expected mlp_in, down_proj"),
        (MADE_UP.replace("3.0", "0.0"), "1 values of g_amax that are not positive"),
        (MADE_UP + "Big (mlp_only),mlp_in,0,code,3.0\n", "repeats 1 rows"),
        (MADE_UP.replace("down_proj,0,ref-max", "down_proj,1,ref-max"), "1 rows have no amax"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path, capsys) -> None:
    target = tmp_path / "ratios.parquet"
    assert layer_ratios.main([str(written(tmp_path, text)), "--target", str(target)]) == 1
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_missing_file_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a CSV of published amaxes with the columns"):
        layer_ratios.read_amaxes(tmp_path / "none.csv")


def test_the_stored_ratios_hold_no_amax_and_keep_the_known_extreme() -> None:
    table = pd.read_parquet(layer_ratios.TARGET)
    assert list(table) == ["model", "site", "layer", "set", "ratio"]
    assert table.groupby("model", observed=True).layer.nunique().to_dict() == {
        "Nemotron-3-Nano-30B-A3B": 23, "Qwen3.6-27B": 64, "Qwen3.6-35B-A3B": 40,
    }  # fmt: skip
    code = table[(table.set == "ref-code") & (table.site == "down_proj_input")]
    assert code.ratio.max() == pytest.approx(774_144 / 608, rel=1e-3)
