# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The performance page's numbers: by hand on a made-up benchmark, and the stored one's known values."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from studies.pages import performance

LIMITS = {"copy_share": 0.97, "peer_factor": 1.5, "update_copies": 4.0, "worst_copies": 6.0,
          "oracle_factor": 10.0, "mse_gpu_ms": 20.0, "mse_cpu_ms": 2000.0, "oracle_cpu_ms": 5000.0,
          "mlp_percent": 3.0, "all_percent": 12.0, "capture_s": 60.0, "written_mb": 100.0,
          "cpu_rate": 100.0}  # fmt: skip
GIB = performance.GIB


def row(name: str, case: str, ms: float, size: int = 0, far: float = 0.01, **more: float) -> dict:
    times = {"ms": ms, "ms_p20": ms * (1 - far / 2), "ms_p80": ms * (1 + far)}
    return {"name": name, "case": case, "bytes": size} | times | more


def made_up(**log: Any) -> performance.Timings:
    """One run of a slow card: the quantizer takes two copies, capture a quarter of the forward."""
    kernels = [row("copy", "1024 MiB", 1.0, GIB), row("fake_quantize_kernel", "1024 MiB", 2.0, GIB),
               row("fake_quantize", "1024 MiB", 2.5, GIB), row("modelopt", "1024 MiB", 5.0, GIB),
               row("mse", "cuda", 30.0, pairs=10), row("mse_again", "cuda", 4.0, pairs=10, far=0.2),
               row("candidates", "modelopt", 50.0, GIB, far=0.5, candidates=7)]  # fmt: skip
    for factor, kind in enumerate(performance.KINDS, 2):
        kernels += [row(name, kind, float(factor * at), GIB, pairs=factor)
                    for at, name in enumerate(performance.KIND_COLUMNS, 1)]  # fmt: skip
    forward = [row("forward", case, 100 * (1 + over), overhead=over, group=group, steps=8)
               for case, over, group in (("plain", 0.0, 0), (performance.MLP, 0.1, 20),
                                         (performance.FOUR, 0.25, 20))]  # fmt: skip
    long = {"sequences": 40, "written": 5e7, "sites": 3}
    model = [*forward, row("long_capture", "all", 9000.0, far=0, **long)]
    cpu = [row("update", k, 5.0, rate=r, pairs=1) for k, r in (("gaussian", 3e8), ("equal", 2e8))]
    cpu += [row("mse", "cpu", 900.0, pairs=4), row("oracle", "cpu", 6000.0, pairs=4)]
    counters = pd.DataFrame({"DRAM bytes read": [1e9, 2e9], "DRAM bytes written": [1e9, 0.0],
                             "warp instructions": [2e8, 1e9], "duration": [1e-3, 4e-3]},
                            index=["fake_quantize", "count_pairs"])  # fmt: skip
    info = {"kernels": {"device": "Toy card"}, "cpu": {"parameters": {"threads": 8}},
            "model_fla": {"parameters": {"layers": 3}}}  # fmt: skip
    tables = [pd.DataFrame(t) for t in (kernels, model, model, cpu)]
    return performance.Timings(*tables, counters=counters, info=info, log=log)


TOY = made_up(multiprocessors=2, clock_hz=1e9)


def test_targets_are_measured_by_hand() -> None:
    table = performance.targets(TOY, LIMITS)
    expected = {
        "fake quantizer, speed of a copy": (0.5, False),
        "fake quantizer, times ModelOpt's kernel": (2.5, True),
        "histogram, Gaussian, copies": (6, False), "histogram, worst of four kinds, copies": (15, False),
        "histogram, times faster than 7 candidates": (50 / 6, False),
        "MSE at 1,000 scales, device, ms, asked before": (4, True),
        "MSE at 1,000 scales, device, ms, first time": (30, False),
        "MSE at 1,000 scales, the CPU, ms": (900, True), "oracle, the CPU, ms": (6000, False),
        "capture of 3 MLP inputs, % of the forward": (10, False),
        "capture of 12 sites, % of the forward": (25, False), "capture of 40 sequences, s": (9, True),
        "the same, MB written": (50, True),
        "histogram on the CPU, worst of four, million elements/s": (200, True),
    }  # fmt: skip
    assert table.index.tolist() == list(expected)
    assert table.measured.tolist() == pytest.approx([measured for measured, _ in expected.values()])
    assert table.met.tolist() == [met for _, met in expected.values()]
    assert table.off.dropna().tolist() == pytest.approx([1.94, 1.5, 2.5, 1.2, 1.5, 1.2, 10 / 3, 25 / 12])
    exact = performance.targets(TOY, LIMITS | {"copy_share": 0.5})
    assert exact.met.iloc[0]  # a target that is just reached


def test_rows_of_wide_timings_are_starred_and_misses_shown() -> None:
    table = performance.targets(TOY, LIMITS)
    shown = performance.target_rows(table)
    starred = [name for name in shown.index if name.endswith(" *")]
    assert starred == ["histogram, times faster than 7 candidates *",
                       "MSE at 1,000 scales, device, ms, asked before *"]  # fmt: skip
    assert shown["off by"].iloc[0] == "1.94x" and shown["off by"].iloc[1] == ""
    assert shown.target.iloc[0] == ">= 0.97" and shown.met.tolist()[:2] == ["no", "yes"]
    assert "off by" not in performance.target_rows(table[table.met])


def test_spread_is_the_farther_percentile_and_none_for_one_timing() -> None:
    rows = pd.DataFrame([row("a", "x", 2.0, far=0.1), row("b", "y", 3.0, far=0)])
    rows.loc[2] = ["c", "z", 0, 1.0, 0.4, 1.1]
    found = performance.spread(rows).tolist()
    assert found[0] == pytest.approx(0.1) and np.isnan(found[1]) and found[2] == pytest.approx(0.6)
    assert performance.spread_text(TOY) == (
        "Of 37 repeated timings the 20th and 80th percentile lie within 5 % of the median in 35; the "
        "farthest is 50 % away (`candidates`, modelopt)."
    )


def test_answer_and_details_state_this_run_and_no_other() -> None:
    table = performance.targets(TOY, LIMITS)
    text = performance.answer(TOY, table)
    assert text.startswith(
        "<strong>The fake quantizer runs at 50 % of a copy's speed, and capture of every MLP input adds "
        "10.0 % to a forward pass.</strong> On one Toy card, "
    )
    assert "takes 6.0 copies of it; 6 of 14 targets are met." in text
    assert text.count(". ") == 1
    assert "all 6 targets are met" in performance.answer(TOY, table[table.met])
    more = performance.details(TOY, table)
    assert more.startswith("Quantizing 1 GiB takes 2.000 ms where copying it takes 1.000 ms; ")
    assert "15.0 copies on the worst of 4 kinds" in more and "all 3 MLP inputs" in more
    assert "Missed: fake quantizer, speed of a copy (0.5, target 0.97); " in more
    assert "Missed" not in performance.details(TOY, table[table.met])


def test_roofline_by_hand() -> None:
    points, bandwidth, issue = performance.roofline(TOY)
    assert bandwidth == 2 * GIB * 1e3 and issue == 8e9
    assert points.intensity.tolist() == pytest.approx([0.1, 0.5])
    assert points.rate.tolist() == pytest.approx([2e11, 2.5e11])
    assert points.share.tolist() == pytest.approx([2e12 / bandwidth, 0.5e12 / bandwidth])


def test_kinds_and_versions_in_copies() -> None:
    table = performance.kinds_table(TOY)
    assert table.index.tolist() == list(performance.KINDS.values())  # the made-up order is the slower
    assert table["call, copies"].tolist() == [6, 9, 12, 15]
    assert table["distinct pairs"].tolist() == [2, 3, 4, 5]
    steps = {"ladder": ["a", "b"], "unit": ["ms", "%"], "predicted": [None, 3.0], "measured": [8.0, 4.0],
             "copy_ms": [2.0, None]}  # fmt: skip
    versions = performance.versions({"versions": pd.DataFrame(steps).to_dict("records")})
    assert versions.measured.tolist() == [4, 4] and versions.unit.tolist() == ["copies", "%"]
    assert np.isnan(versions.predicted[0]) and versions.predicted[1] == 3
    forward = performance.forward_table(TOY)
    assert forward["overhead (%)"].tolist() == [0, 10, 25]
    assert forward["sequences per group"].tolist() == ["", "20", "20"]


def test_a_missing_timing_is_named() -> None:
    with pytest.raises(ValueError) as error:
        performance.timing(TOY.kernels, "copy", "2 MiB", 5)
    assert str(error.value) == (
        "no timing of copy, 2 MiB at 5 bytes; expected one. Run python -m studies.bench."
    )


def test_the_stored_benchmark_is_what_the_page_says() -> None:
    timings = performance.Timings.read()
    copy, fake = (
        performance.ms(timings.kernels, n, performance.LARGE) for n in ("copy", "fake_quantize_kernel")
    )
    assert (copy, fake) == pytest.approx((0.508384, 0.514208))
    assert (timings.model_fla.overhead.max(), timings.model.overhead.max()) == pytest.approx(
        (0.358749, 0.108123), abs=1e-6
    )
    table = performance.targets(timings, LIMITS)
    assert table.met.all()
    assert table.measured["histogram, times faster than 122 candidates"] == pytest.approx(
        449.16, abs=0.01
    )
    assert table.index[table.spread > performance.WIDE].tolist() == [
        "histogram, times faster than 122 candidates"
    ]
    assert performance.spread(timings.kernels).max() == pytest.approx(0.987, abs=0.001)
    assert "all 14 targets are met" in performance.answer(timings, table)


def test_figures_draw_every_series() -> None:
    timings = performance.Timings.read()
    roofline = performance.draw_roofline(*performance.roofline(timings)).axes[0]
    assert {t.get_text() for t in roofline.texts} >= set(performance.KERNEL_STYLE)
    sizes = performance.draw_sizes(timings.kernels).axes[0]
    for line, (label, color, *_) in zip(sizes.get_lines(), performance.SIZE_STYLE.values(), strict=True):
        assert (line.get_label(), line.get_color()) == (label, color)
    last = {line.get_label(): line.get_ydata()[-1] for line in sizes.get_lines()}
    assert last["ModelOpt"] == pytest.approx(8589934592 / 6.656272 / 1e6)
    versions = performance.versions(timings.log)
    ladders = performance.draw_ladder(versions).axes
    assert [ax.get_title() for ax in ladders] == ["histogram", "fake quantize", "capture"]
    plt.close("all")
