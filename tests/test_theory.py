# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The theory page's tables and texts, on curves whose errors are made up and so known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from nvfp4_utils.statistics import ActivationStatistics
from studies.pages import block_shapes, plots, theory

GAUSSIAN = block_shapes.Shape.generalized_normal(2.0, blocks=2**14, seed=1)
FAMILY = block_shapes.Family((1.0, 2.0, 4.0), blocks=2**14)
STEP = 1 / 16
OCTAVES = np.arange(-4, 20, STEP)
WINDOW = SimpleNamespace(marginals=lambda mix, site, pool: ActivationStatistics.from_tensor(
    torch.tensor([[4.0] * 16, [1.0] * 16]).bfloat16()).marginals)  # fmt: skip


def snr(plateau: float, left: float, right: float) -> np.ndarray:
    """Flat from octave ``left`` to ``right``; 1 dB per octave lost below, 2 dB above."""
    return plateau - np.maximum(0, left - OCTAVES) - 2 * np.maximum(0, OCTAVES - right)


def study(sites: dict[str, dict[str, np.ndarray]], loss_db: float = 0.1) -> Any:
    """Points and curves of made-up exact and predicted SNR, as ``theory.study`` makes them."""
    parts = []
    for site, lines in sites.items():
        for underflow in ("flush", "floor"):
            keys = {"mix": "m", "site": f"layers.0.{site}", "kind": site, "crest": 0.2,
                    "calibrated_amax": 2.0**OCTAVES, "octaves": OCTAVES,
                    "underflow": underflow}  # fmt: skip
            parts.append(pd.DataFrame(keys | lines))
    points = pd.concat(parts, ignore_index=True)
    run: Any = SimpleNamespace(mixes=["m"], marginals=WINDOW.marginals)
    original, theory.compare = theory.compare, lambda *_: points
    try:
        return theory.study(run, FAMILY, GAUSSIAN, loss_db)
    finally:
        theory.compare = original


def lines(gaussian: np.ndarray, matched: np.ndarray) -> dict[str, np.ndarray]:
    return {"exact": snr(20, -1, 10), "gaussian": gaussian, "rescaled": gaussian, "matched": matched}


SITES = {
    "mlp_input": lines(snr(19.7, -1, 10), snr(20.01, -1, 10)),
    "down_proj_input": lines(snr(16, -1.2, 10.9), snr(19.75, -1.1, 10.2)),
    "o_proj_input": lines(snr(17, -1, 10), snr(20.2, -1, 9)),
}


@pytest.fixture(scope="module")
def tables() -> Any:
    return study(SITES)


def test_curves_hold_the_differences_that_were_made_up(tables: Any) -> None:
    _, curves = tables
    assert len(curves) == 3 * 2 * 3  # sites, conventions, models
    row = curves[(curves.kind == "down_proj_input") & (curves.underflow == "flush")].set_index("model")
    assert row.exact_plateau.to_numpy() == pytest.approx(20)
    assert (row.exact_low.iloc[0], row.exact_high.iloc[0]) == pytest.approx((-1.1, 10.05))
    assert row.off.to_numpy() == pytest.approx([-4, -4, -0.25])
    assert row.low_factor.to_numpy() == pytest.approx([2**0.2, 2**0.2, 2**0.1])
    assert row.high_factor.to_numpy() == pytest.approx([2**0.9, 2**0.9, 2**0.2])
    assert row.safe.to_numpy() == pytest.approx(np.log2(28672 / 4))  # block amaxes 1 and 4


def test_regions_split_at_the_plateau_and_at_three_db(tables: Any) -> None:
    points, _ = tables
    one = points[(points.kind == "mlp_input") & (points.underflow == "flush")]
    found = one.groupby("region", observed=False).octaves.agg(["min", "max"])
    assert found.loc["plateau"].tolist() == [0, 1]
    assert found.loc["saturation, to 3 dB"].tolist() == [-4, -STEP]
    assert np.isnan(found.loc["saturation, beyond", "min"])  # 3 dB are lost at -4, no more
    assert found.loc["underflow, to 3 dB"].tolist() == [1 + STEP, 11.5]
    assert found.loc["underflow, beyond", "min"] == 11.5 + STEP
    assert one.off_matched.to_numpy() == pytest.approx(0.01)
    assert one.loss_off_matched.to_numpy() == pytest.approx(0)


def test_tables_of_worst_errors_gains_and_ends(tables: Any) -> None:
    points, curves = tables
    worst = theory.worst_errors(points, ["kind"], {"gaussian": "G", "matched": "M"})
    assert worst.loc["mlp_input"].tolist() == pytest.approx([0.3, 0.01])
    assert worst.loc["o_proj_input"].tolist() == pytest.approx([3, 1.8])  # 2 dB lost early, 0.2 above
    gains = theory.gains(points, curves)
    assert gains["mean"].tolist() == pytest.approx([7.3 / 3, 7.3 / 3, 0.46 / 3])
    assert gains.worst.tolist() == pytest.approx([4, 4, 0.25])
    assert gains["median"].matched == pytest.approx(0.2)
    flat = points[points.kind == "mlp_input"], curves[curves.kind == "mlp_input"]
    assert theory.gains(*flat).loc["gaussian"].tolist() == pytest.approx(
        [0.3, 0.3, 0.3, 0.3, 0], abs=1e-9
    )
    ends = theory.ends_table(curves).loc["flush", "o_proj_input"]
    assert ends["high", "matched"] == pytest.approx(2)
    assert ends["low", "gaussian"] == pytest.approx(1)
    assert ends["median octaves", "harmless band"] == pytest.approx(11.15)


def test_a_dip_within_the_band_is_found_with_its_depth_and_room() -> None:
    exact = snr(20, -1, 10)
    exact[np.abs(OCTAVES - 7).argmin()] -= 0.3
    points, _ = study({"mlp_input": lines(exact, exact) | {"exact": exact}})
    dips = theory.dips(points, 0.1)
    assert dips.lost.tolist() == pytest.approx([0.3, 0.3])
    assert dips.room.tolist() == pytest.approx([3.05, 3.05])
    assert len(theory.dips(study(SITES)[0], 0.1)) == 0


def test_control_uses_the_sites_own_shapes() -> None:
    x = torch.randn(2**12, 16, generator=torch.Generator().manual_seed(7)).bfloat16()
    joint = ActivationStatistics.from_tensor(x)
    amaxes = joint.amax * 2.0 ** np.array([-1, 0.5, 17])
    rows = {"site": "s", "underflow": "flush", "calibrated_amax": amaxes,
            "exact": joint.snr_db(amaxes / 2688)}  # fmt: skip
    shapes = {"s": block_shapes.shapes_by_amax(joint, 8)}
    found = theory.control(pd.DataFrame(rows), {"s": joint}, shapes, FAMILY)
    assert found.off_local.abs().max() < 0.05
    assert found.off_crest.abs().max() < 0.2
    assert found.off_pooled.abs().max() > 0.4  # flush, deep: shape depends on the amax


def test_check_of_a_normal_tensor_and_its_bins() -> None:
    x = torch.randn(2**12, 16, generator=torch.Generator().manual_seed(8)).bfloat16()
    normal = ActivationStatistics.from_tensor(x)
    shapes = block_shapes.shapes_by_amax(normal, 4)
    check = theory.normal_check(normal, GAUSSIAN, shapes, {"at its amax": (normal.amax, "floor", 20.43)})
    assert check.loc["at its amax"].tolist() == pytest.approx([20.43] * 4, abs=0.15)
    trend = theory.crest_by_amax({"N(0,1)": normal}, {"N(0,1)": shapes}, 30)
    assert 0 < len(trend) < len(shapes)
    assert (trend.crest.diff().dropna() < 0).all()


def test_a_site_kind_without_a_colour_is_drawn_grey() -> None:
    found = theory.kind_colors(["router", "mlp_input", "router"])
    assert found == {"mlp_input": plots.KIND_COLORS["mlp_input"], "router": "#666666"}


def test_answer_states_its_numbers_and_its_verdict_follows_them(tables: Any) -> None:
    text = theory.answer(*tables, 0.1, "toy model")
    assert text.startswith("<strong>Only in part.</strong> Over the curves of the toy model")
    assert "within 0.25 dB" in text and "within a factor of 2.00" in text
    assert "off by up to 1.8 dB" in text  # o_proj: 2 dB lost an octave early, from 0.2 dB above
    near = study({"mlp_input": SITES["mlp_input"]})
    assert theory.answer(*near, 0.1, "toy model").startswith("<strong>Yes.</strong>")
    steep = SITES["mlp_input"] | {"matched": snr(20, -1, 10) + np.where(OCTAVES > 12, 2, 0)}
    assert "down the cliffs, no" in theory.answer(*study({"mlp_input": steep}), 0.1, "toy model")
    assert text.removeprefix("<strong>Only in part.</strong>").count(". ") <= 2


def test_details_name_the_amax_only_where_the_control_says_so(tables: Any) -> None:
    _, curves = tables
    featured = pd.DataFrame({"site": ["a", "b"], "off_matched": [2.0, -1], "off_crest": [0.5, 0],
                             "off_local": [0.1, 0]})  # fmt: skip
    text = theory.details(curves, featured, 0.04, 4)
    assert "3 sites and 1 mixes the plateau is off by 0.20 dB in the median" in text
    assert (
        "worst is 4.0 dB" in text and "2 sites with joint histograms the worst error is 2.0 dB" in text
    )
    assert "depends on its amax" in text
    assert "depends on its amax" not in theory.details(curves, featured.assign(off_local=1.9), 0.04, 4)


def test_verdicts_follow_the_tables(tables: Any) -> None:
    spiky = block_shapes.Shape(0.1, GAUSSIAN.error)
    text = theory.verdicts(*tables, GAUSSIAN, spiky).split("\n")
    assert text[0] == (
        "1. *Absolute.* Held: at most 0.30 dB off at the sites after a norm (plateau); 4.0 to 4.0 dB "
        "too pessimistic at `down_proj`. It did not foresee `o_proj`, off by up to 3.0 dB."
    )
    assert text[1].startswith("2. *Relative.* Wrong: with Gaussian blocks the ends")
    assert "factors of up to 1.15 (left) and 1.87 (right). The shape does matter" in text[1]
    assert text[2].startswith("3. *One number.* Held: 94% of the mean plateau residual")
    assert text[3].startswith("4. *Failure.* Incomplete") and "small blocks" in text[3]
    mild = {"mlp_input": lines(snr(19, -1, 10), snr(19, -1, 10)),
            "down_proj_input": lines(snr(19.5, -1, 10), snr(19.5, -1, 10))}  # fmt: skip
    other = theory.verdicts(*study(mild), GAUSSIAN, spiky)
    assert other.startswith("1. *Absolute.* Wrong")
    for absent in ("o_proj", "shape does matter", "small blocks"):
        assert absent not in other
    assert "2. *Relative.* Held" in other and "3. *One number.* Wrong" in other
    assert "4. *Failure.* Held" in other


def test_figures_show_what_they_say(tables: Any) -> None:
    points, curves = tables
    sites = theory.draw_sites(points)
    assert [ax.get_title() for ax in sites.axes[:3]] == ["o_proj_input", "mlp_input", "down_proj_input"]
    assert len(theory.draw_ends(curves, 0.1).axes) == 3
    crests = theory.draw_crests(curves, GAUSSIAN).axes[0]
    assert crests.get_legend().get_texts()[-1].get_text() == "hollow: Gaussian"
    trend = pd.DataFrame({"site": ["N(0,1)", "N(0,1)", "layers.0.mlp_input"], "amax": [0.5, 1, 1],
                          "crest": [0.2, 0.1, 0.1]})  # fmt: skip
    legend = theory.draw_crest_by_amax(trend).axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["N(0,1)", "layers.0.mlp_input"]
    psi = theory.draw_psi({"spiky": GAUSSIAN}, GAUSSIAN, ["r"]).axes[0]
    assert psi.get_lines()[0].get_ydata().min() == pytest.approx(-GAUSSIAN.snr_db, abs=0.1)
    plt.close("all")
