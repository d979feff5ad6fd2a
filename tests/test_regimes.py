# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The regimes of the block scales agree with the quantizer, and bad input is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from nvfp4_utils import fake_quantize, input_scale_from_amax
from nvfp4_utils.quantize import block_scale_e4m3
from nvfp4_utils.statistics import ActivationStatistics
from studies.pages import regimes


def marginals_of(*block_amaxes: float):
    x = torch.zeros(len(block_amaxes), 16)
    x[:, 3] = torch.tensor(block_amaxes)
    return ActivationStatistics.from_tensor(x.to(torch.bfloat16)).marginals


def test_regimes_are_those_of_the_block_scales() -> None:
    amaxes = [2.0**-k for k in range(24)]
    a = 1.5  # the first block saturates; none lies on a border
    scale = torch.tensor(input_scale_from_amax(a))
    s8 = block_scale_e4m3(torch.tensor(amaxes), scale, "flush")
    shares = regimes.block_regimes(marginals_of(*amaxes), a)
    found = {
        "saturated": sum(b > a for b in amaxes),
        "underflow": int((s8 == 0).sum()),
        "subnormal": int(((s8 > 0) & (s8 < 2.0**-6)).sum()),
    }
    for name, count in found.items():
        assert shares[name] == pytest.approx(count / len(amaxes))
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("rho", "regime"),
    [(0.5, "saturated"), (1, "normal"), (28672, "normal"), (28673, "subnormal"),
     (458751, "subnormal"), (458752, "underflow")],
)  # fmt: skip
def test_borders_of_the_regimes(rho: float, regime: str) -> None:
    assert regimes.block_regimes(marginals_of(1.0), rho)[regime] == 1


def test_safe_window_ignores_zero_blocks() -> None:
    assert regimes.safe_window(marginals_of(0.0, 0.5, 4.0)) == (4.0, 28672 * 0.5)


def test_worked_block_is_fake_quantize_to_the_bit() -> None:
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for amax in (0.5, 3.0, 1e5, 1e7):
        for underflow in ("floor", "flush"):
            if amax == 1e7 and underflow == "flush":
                continue  # the whole block is zero: no element has a ratio to show
            block, rows = regimes.worked_block(x, amax, underflow)
            y = fake_quantize(
                x[None], block["input_scale"], underflow=underflow, out_dtype=torch.float32
            )
            assert np.array_equal(rows.y.to_numpy(np.float32), y[0].numpy())


def test_octave_histogram_sums_to_one() -> None:
    edges, share = regimes.octave_histogram(np.array([0.25, 1.0, 1.5]), np.array([1, 2, 1]))
    assert edges[0] == -2
    assert edges[-1] == 0.5
    assert share.sum() == pytest.approx(1)


def test_kind_table_gives_the_spread_over_layers() -> None:
    table = pd.DataFrame({"amax": [1.0, 2.5]}, index=["layers.0.mlp_input", "layers.1.mlp_input"])
    assert regimes.kind_table(table).loc["mlp_input", "amax"] == "1 to 2.5"


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        regimes.block_regimes(marginals_of(1.0), 0.0)
    assert str(error.value) == "calibrated_amax is 0.0; expected a positive value."
    with pytest.raises(ValueError) as error:
        regimes.worked_block(torch.ones(8), 1.0)
    assert str(error.value) == "x has shape (8,); expected one block, (16,)."
