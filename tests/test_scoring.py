# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Four Over Six, subset marginals and window errors against independent evaluation."""

import re

import numpy as np
import pytest
import torch
from nvfp4_reference import E2M1, E4M3, nearest, odd_scale

from nvfp4_utils import ActivationStatistics, fake_quantize, input_scale_from_amax, policies
from nvfp4_utils.quantize import UNDERFLOWS, four_over_six_reference
from studies.runs.scoring import WindowErrors
from studies.runs.subsets import SubsetMarginals, subset_sizes


def activations(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * x.abs()).bfloat16()


def enumerated_four_over_six(x: torch.Tensor, g: float, underflow: str) -> np.ndarray:
    """Both scalings of every block in float64 with enumerated grids; the better of the two."""
    blocks = x.double().numpy().reshape(-1, 16)
    results = []
    for largest in (6.0, 4.0):
        s = np.abs(blocks).max(1, keepdims=True) / (largest * g)
        s8 = nearest(np.minimum(s, 448), E4M3)
        if underflow == "floor":
            s8 = np.where(s == 0, 1.0, np.maximum(s8, 2.0**-9))
        step = s8 * g
        with np.errstate(divide="ignore", invalid="ignore"):
            q = nearest(np.where(step == 0, 0.0, np.abs(blocks) / step), E2M1)
        results.append(np.copysign(q * step, blocks))
    six, four = results
    errors = [np.square(y - blocks).sum(1, keepdims=True) for y in results]
    return np.where(errors[1] < errors[0], four, six).reshape(x.shape)


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("octaves", [-4, 0, 8, 16, 20])
def test_four_over_six_takes_the_better_scaling_of_each_block(underflow, octaves):
    x = activations(64, 64)
    g = odd_scale(policies.four_over_six(ActivationStatistics.from_tensor(x)) / 2688 * 2.0**octaves)
    y = four_over_six_reference(x, torch.tensor(g), underflow, torch.float32)
    np.testing.assert_allclose(y.numpy(), enumerated_four_over_six(x, g, underflow), rtol=1e-6)


def test_four_over_six_is_never_worse_than_six_at_the_same_scale():
    x = activations(64, 64, seed=1)
    g = input_scale_from_amax(policies.four_over_six(ActivationStatistics.from_tensor(x)))
    six = fake_quantize(x, g, out_dtype=torch.float32).sub(x).reshape(-1, 16).square().sum(1)
    both = four_over_six_reference(x, torch.tensor(g), "flush", torch.float32)
    both = both.sub(x).reshape(-1, 16).square().sum(1)
    assert (both <= six).all() and both.sum() < 0.95 * six.sum()


def test_four_over_six_scale_leaves_room_for_384():
    x = torch.full((1, 16), 2.0).bfloat16()
    amax = policies.four_over_six(ActivationStatistics.from_tensor(x))
    assert amax == 3.5
    assert 1.5 * 2.0 / (6 * input_scale_from_amax(amax)) == pytest.approx(384, rel=1e-7)


def test_subset_sizes_are_powers_of_four_a_half_and_all():
    assert subset_sizes(1024) == [1, 4, 16, 64, 256, 512, 1024]
    assert subset_sizes(7) == [1, 3, 4, 7] and subset_sizes(1) == [1]


def test_subset_marginals_equal_those_of_the_subset_itself():
    x = activations(12, 8, 32)
    counted = SubsetMarginals(12, 3, "cpu")
    for batch in x.split(5):
        counted.count("site", batch)
    seen = 0
    for draw, size, marginals in counted.subsets("site"):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1000 + draw))
        expected = ActivationStatistics.from_tensor(x[order[:size]]).marginals
        for name in ("element_codes", "element_counts", "block_codes", "block_counts"):
            assert torch.equal(getattr(marginals, name), getattr(expected, name))
        seen += 1
    assert seen == 3 * len(subset_sizes(12))
    table = counted.table()
    whole = table[(table.n == 12) & (table.policy == "amax")]
    assert (whole.calibrated_amax == x.abs().max().item()).all() and len(whole) == 3


def test_subsets_of_a_run_that_ended_early():
    counted = SubsetMarginals(4, 1, "cpu")
    counted.count("site", activations(3, 8, 32))
    message = "site has seen 3 of 4 sequences; expected all. The run ended early: capture it again."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(counted.subsets("site"))
    with pytest.raises(ValueError, match=r"^site has seen 6 sequences; expected 4"):
        counted.count("site", activations(3, 8, 32))


def test_window_errors_equal_the_quantizer_on_each_window():
    x = activations(4, 8, 32, seed=2)
    menu = {("amax", "flush"): 3.0, ("dynamic", "floor"): np.nan, ("four-over-six", "flush"): 5.25}
    counted = WindowErrors({"site": menu}, 4)
    for batch in x.split(3):
        counted.count("site", batch)
    table = counted.table()
    assert table.window.tolist() == list(range(8))
    for i, window in enumerate(x.reshape(8, 4, 32)):
        own = x[i // 2].abs().max().item()
        expected = {
            "amax flush": fake_quantize(window, input_scale_from_amax(3.0), out_dtype=torch.float32),
            "dynamic floor": fake_quantize(window, input_scale_from_amax(own), underflow="floor",
                                           out_dtype=torch.float32),
            "four-over-six flush": four_over_six_reference(
                window, torch.tensor(input_scale_from_amax(5.25)), "flush", torch.float32),
        }  # fmt: skip
        for name, y in expected.items():
            mse = (y.double() - window.double()).square().mean().item()
            assert table[name][i] == pytest.approx(mse, rel=1e-12)
        power = window.double().square().mean().item()
        assert table.signal_power[i] == pytest.approx(power, rel=1e-12)


def test_window_that_does_not_divide_the_sequence():
    message = "sequences have 8 tokens; expected a multiple of the window, 3."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WindowErrors({"site": {}}, 3).count("site", activations(1, 8, 16))
