# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The format page's sweep and sentences, on tensors whose safe window is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvfp4_utils import ActivationStatistics
from studies.pages import format as page


def tensor_of(*block_amaxes: float) -> ActivationStatistics:
    x = torch.ones(len(block_amaxes), 16) * torch.tensor(block_amaxes)[:, None]
    return ActivationStatistics.from_tensor(x.to(torch.bfloat16))


def test_sweep_of_equal_blocks_is_flat_inside_its_window() -> None:
    sweep = page.sweep(tensor_of(6.0, 6.0), overshoot=1e7)
    assert (sweep.low, sweep.high, sweep.elements) == (6.0, 6.0 * 28672, 32)
    assert sweep.octaves == pytest.approx(np.log2(28672))
    # At amax the scale and every value are exact; at half of it every value is 6 for 3.
    assert sweep.right == np.inf
    assert sweep.half == pytest.approx(10 * np.log10(4))
    assert sweep.wrong["flush"] == pytest.approx(0)  # the whole tensor is zeroed


def test_answer_has_the_window_and_both_conventions() -> None:
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    sweep = page.sweep(ActivationStatistics.from_tensor(x), overshoot=1e6)
    text = page.answer(sweep)
    assert f"Over a factor of {sweep.high / sweep.low:,.0f}" in text
    assert f"{sweep.right - sweep.wrong['flush']:.1f} dB under flush" in text
    assert f"amax from {sweep.low:.3g} to {sweep.high:,.0f} gives" in page.plateau_prose(sweep)
    assert f"{sweep.octaves:.1f} octaves wide" in page.reconciliation(sweep)


def test_blocks_without_a_common_scale_are_not_called_safe() -> None:
    sweep = page.sweep(tensor_of(6.0, 6.0 / 2**16), overshoot=1e6)
    assert sweep.plateau.empty
    text = page.answer(sweep) + page.plateau_prose(sweep)
    assert "does nothing else" not in text and "no scale suits them all" in text and "nan" not in text


def test_ripple_repeats_every_octave() -> None:
    statistics = tensor_of(6.0, 5.0)
    fig = page.draw_ripple(statistics, 6.0)
    lines = [line.get_ydata() for line in fig.axes[0].get_lines()]
    np.testing.assert_array_equal(lines[1], lines[2])
    np.testing.assert_array_equal(lines[0][::16], lines[1])
    assert page.sweep(statistics, 1e6).ripple == pytest.approx(np.ptp(lines[0])) != 0
