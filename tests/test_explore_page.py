# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The explore page draws statistics that were just captured as it draws stored ones."""

import torch

from nvfp4_utils import ActivationStatistics, input_scale_from_amax
from studies.pages import explore
from studies.runs.store import Run


def test_live_statistics_take_the_place_of_stored_ones() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    live = {"mine": ActivationStatistics.from_tensor(x)}
    figure, words = explore.draw(Run(), live, "", "mine", "flush", octaves=-1)
    amax = live["mine"].amax
    assert f"{live['mine'].snr_db(input_scale_from_amax(amax / 2)):.2f} dB" in words
    assert f"{amax / 2:.4g}" in words and "mine (live, flush)" in words
    marked = [line.get_label() for line in figure.axes[0].get_lines()]
    assert any(label.startswith("raised amax") for label in marked)


def test_a_site_that_was_not_captured_comes_from_the_run() -> None:
    run = Run()
    _, words = explore.draw(run, {}, run.featured_mix, run.featured[0], "flush", octaves=0)
    assert run.featured[0] in words and run.featured_mix in words
