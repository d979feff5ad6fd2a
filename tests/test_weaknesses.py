# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Tables about the study's shortcuts, on curves whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from studies.pages import weaknesses


def run_with(apart: list[float], octaves: list[float]) -> Any:
    """A run of one site with amax 2 whose flush error is `apart` dB above floor's, at these octaves."""
    curve = pd.DataFrame({
        "site": "s", "calibrated_amax": 2 * np.exp2(octaves), "mse_floor": 1.0,
        "mse_flush": 10 ** (np.array(apart) / 10),
    })  # fmt: skip
    return SimpleNamespace(
        curves=lambda mix: curve, marginals=lambda mix, site: SimpleNamespace(amax=2.0)
    )


def test_the_largest_difference_of_the_conventions_is_told_with_its_own_octave() -> None:
    run = run_with([9.0, 0.0, 0.05, 0.2, 16.8, 3.0], [-1, 0, 8, 10, 17.5, 20])
    row = weaknesses.convention_table(run, "mix").iloc[0]
    assert (row.at_amax, row.octaves) == (0, 10)
    assert (row.largest, row.largest_octaves) == pytest.approx((16.8, 17.5))


def test_conventions_that_never_part_by_a_tenth_of_a_decibel_part_at_infinity() -> None:
    row = weaknesses.convention_table(run_with([0.0, 0.01], [0, 1]), "mix").iloc[0]
    assert np.isinf(row.octaves)
    assert row.largest_octaves == 1
