# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The numbers behind the moving elements, without a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from studies.pages import index, interactive, loss_tables, plots, regimes, snr_tables
from studies.runs.store import Run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def unpack(text: str) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_packed_numbers_come_back_and_do_not_depend_on_the_time() -> None:
    numbers = {"a": [1, 2.5], "b": {"c": "x"}}
    assert unpack(interactive.pack(numbers)) == numbers
    assert interactive.pack(numbers) == interactive.pack(numbers)


def test_every_step_of_a_slider_is_a_stored_scale() -> None:
    for run in loss_tables.models("", interactive.RUNS):
        for mix in run.mixes:
            for site in run.sites[::7]:
                amax = run.marginals(mix, site, "test").amax
                stored = run.curve(mix, site).calibrated_amax.to_numpy()
                assert np.isin(amax * 2.0 ** (interactive.STEPS / 8), stored).all()


def test_a_run_has_a_script_of_its_own_for_each_text(run: Run, tmp_path: Path) -> None:
    written = interactive.write(tmp_path, [run])
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert [p.name for p in written] == [f"{run.name}.{mix}.js" for mix in run.mixes]
    match = re.fullmatch(r'moving\.deliver\("(.*)","(.*)"\);\n', written[0].read_text())
    assert match is not None and match[1] == written[0].name
    assert list(unpack(match[2])["sites"]) == run.sites


def test_a_page_stays_light() -> None:
    """Scripts and styles of all elements, and the largest script of numbers that one load takes."""
    own = [p for p in (ROOT / "book" / "_static").iterdir() if p.suffix in (".js", ".css")]
    assert sum(p.stat().st_size for p in own) < 60_000
    run = Run("smollm2")  # the most sites, on the mix with a yardstick
    assert len(interactive.pack(interactive.test_numbers(run, run.featured_mix))) < 300_000


def test_policies_agree_with_the_page_s_table(run: Run) -> None:
    mix, site = run.featured_mix, run.sites[5]
    found = interactive.landed(interactive.Case(run, site, mix, mix))
    table = regimes.policies_at(run, mix, site, "flush").set_index("policy")
    assert set(found.index) == set(table.index)
    assert np.allclose(found.snr_db, table.snr_db[found.index], rtol=0, atol=1e-9)
    assert found.loss_db["oracle"] == 0


def test_a_mix_that_is_not_detailed_has_no_yardstick(run: Run) -> None:
    assert interactive.yardstick(run, run.mixes[1]).empty
    assert interactive.yardstick(run, run.featured_mix).loss_db.min() >= 0


def test_the_first_page_s_case_is_the_worst_pair(run: Run) -> None:
    case = index.telling_case([run])
    foreign = snr_tables.foreign_losses(run)
    pair = foreign[(foreign.calibration == case.calibration) & (foreign.test == case.test)]
    assert case.site == pair.loc[pair.loss_db.idxmax()].site and case.calibration != case.test
    one = SimpleNamespace(mixes=["a"], featured=["s"], featured_mix="a")
    assert index.telling_case([one]) == interactive.Case(one, "s", "a", "a")
    assert "pairs of texts" in index.case_prose(case)
    assert "pairs" not in index.case_prose(index.telling_case([one]))


def test_settings_cannot_end_the_script_that_holds_them() -> None:
    html = interactive.element("scale", {"site": "</script>"}, "<p>static</p>")
    assert html.count("</script>") == 1
    text = html.split('application/json">')[1].split("</script>")[0]
    assert json.loads(text) == {"site": "</script>"}


def test_text_on_the_heat_map_has_contrast(run: Run) -> None:
    cross = snr_tables.cross_matrix(run)
    settings = interactive.cross_settings(run, cross, "amax", "flush")

    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for paper, ink in settings["colors"]:
        high, low = sorted((light(paper), light(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert plots.POLICY_STYLE["amax"].color not in {paper for paper, _ in settings["colors"]}
