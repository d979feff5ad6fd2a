# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Policies in closed form, and an oracle that a ten times finer search cannot beat."""

import math
import re

import numpy as np
import pytest
import torch

from nvfp4_utils import ActivationStatistics, input_scale_from_amax, policies
from nvfp4_utils.quantize import UNDERFLOWS

ROWS, COLUMNS = 32, 256


def normal(seed, rows=ROWS, columns=COLUMNS):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> torch.Tensor:
    x = normal(0)
    if name == "lognormal":
        x = x.sign() * torch.exp(3 * normal(1))
    elif name == "sparse":
        x = torch.relu(x - 2.2) * 3
    elif name == "swiglu":
        x = torch.nn.functional.silu(2 * x) * normal(1) * 2 ** (2 * normal(2)[:, :1])
    elif name == "clipped":
        # In half of the blocks 15 values sit at 0.83 of the largest: clipping it to them makes
        # them exact. The small blocks rule out the same ratio between subnormal block scales.
        x = 0.05 * x.clamp(-2.5, 2.5)
        x[::2] = 0.83
        x[::2, ::16] = 1.0
    return x.bfloat16()


def statistics(name: str) -> ActivationStatistics:
    return ActivationStatistics.from_tensor(make(name))


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_amax_percentile_and_constant():
    x = make("lognormal")
    s = ActivationStatistics.from_tensor(x)
    magnitude = x.float().abs().flatten()
    assert policies.amax(s) == policies.amax(s.marginals) == magnitude.max().item()
    k = round(0.999 * x.numel())
    assert policies.percentile(s, 99.9) == magnitude.kthvalue(k).values.item()
    assert policies.percentile(s) == policies.percentile(s, 99.99)
    assert policies.constant(s) == policies.constant() == 2688.0
    assert input_scale_from_amax(policies.constant()) == 1.0


@pytest.mark.parametrize("name", ["gaussian", "lognormal", "sparse", "swiglu"])
def test_headroom_is_rho_anchors_or_the_upper_block(name):
    x = make(name)
    s = ActivationStatistics.from_tensor(x)
    b = x.float().reshape(-1, 16).abs().amax(1)
    b = b[b > 0]

    def kth(values, p):
        return values.kthvalue(max(1, min(len(values), round(p / 100 * len(values))))).values.item()

    for rho in (4.0, 256.0, 16384.0):
        for p_anchor, p_upper in ((1.0, 99.99), (10.0, 90.0), (1.0, 100.0)):
            upper = kth(b, p_upper)
            expected = np.float32(max(rho * kth(b[b > upper / 1e6], p_anchor), upper))
            got = policies.headroom(s, rho=rho, anchor_percentile=p_anchor, upper_percentile=p_upper)
            assert got == expected


@pytest.mark.parametrize("rho", [0.0, -1.0, 28672.0, math.nan])
def test_headroom_refuses_rho_outside_the_normal_range(rho):
    message = (
        f"rho is {rho}; expected a value in (0, 28672), the normal range of E4M3. A larger rho "
        "would push the anchor's block scale into the subnormals."
    )
    with raises(ValueError, message):
        policies.headroom(statistics("gaussian"), rho=rho)


def test_all_zero_tensors_calibrate_nothing():
    zero = ActivationStatistics.from_tensor(torch.zeros(4, 32, dtype=torch.bfloat16))
    message = (
        "the calibrated amax is 0.0; expected a positive value. The percentile or the whole tensor "
        "is zero: calibrate on more data or a higher percentile."
    )
    for policy in (policies.amax, policies.percentile, policies.oracle):
        with raises(ValueError, message):
            policy(zero)
    with raises(ValueError, message):
        policies.percentile(statistics("sparse"), 50)
    for options in ({}, {"upper_percentile": 100}):
        with raises(ValueError, message):
            policies.headroom(zero, **options)


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("name", ["gaussian", "lognormal", "sparse", "swiglu", "clipped"])
def test_no_finer_grid_over_the_whole_range_beats_the_oracle(name, underflow):
    s = statistics(name)
    found = policies.oracle(s, underflow)
    best = s.mse(input_scale_from_amax(found), underflow)
    fine = s.amax * 2 ** (np.arange(-12 * 1280, 23 * 1280 + 1) / 1280)
    errors = s.mse(input_scale_from_amax(torch.from_numpy(fine)), underflow)
    assert errors.min() >= best * (1 - 1e-4)
    for policy in (policies.amax, policies.percentile, policies.headroom):
        assert best <= s.mse(input_scale_from_amax(policy(s)), underflow)
    if name == "clipped":
        assert found < s.amax and best < errors[fine >= s.amax].min()


def test_the_oracle_finds_minima_at_jumps():
    """Beside a dense search of two octaves and both sides of every jump of the error."""
    for seed, cube in ((0, False), (1, True)):
        x = torch.randn(512, 64, generator=torch.Generator().manual_seed(seed))
        statistics = ActivationStatistics.from_tensor((x**3 if cube else x).bfloat16())
        low = 2.0 ** math.floor(math.log2(statistics.amax))
        mantissas, midpoints = np.arange(128, 256) / 128, np.arange(17, 33, 2) / 16
        jumps = np.unique(1.75 * mantissas[:, None] / midpoints) * low
        dense = np.concatenate(
            [jumps * (1 - 2**-18), jumps * (1 + 2**-18), low * 2 ** (np.arange(4096) / 2048)]
        )
        best = statistics.mse(input_scale_from_amax(torch.from_numpy(dense))).min()
        found = statistics.mse(input_scale_from_amax(policies.oracle(statistics)))
        assert 10 * math.log10(found / best) < 2e-3


def test_aligned_headroom_stays_within_an_octave_above_headroom_and_is_better():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    statistics = ActivationStatistics.from_tensor(x)
    low, found = policies.headroom(statistics), policies.aligned_headroom(statistics)
    assert low <= found < 2 * low
    plain, aligned = (statistics.mse(input_scale_from_amax(a)) for a in (low, found))
    assert aligned <= plain
    best = statistics.mse(input_scale_from_amax(policies.oracle(statistics)))
    assert 10 * math.log10(aligned / best) < 0.02  # the octave holds the same minima


def test_the_registry_calibrates_what_each_policy_says():
    statistics = ActivationStatistics.from_tensor(torch.randn(64, 256).bfloat16())
    found = policies.calibrate(statistics)
    assert list(found) == [name for name, p in policies.POLICIES.items() if p.calibrate]
    assert found["amax"] == statistics.amax
    assert found["p99.9"] == statistics.percentile(99.9)
    assert found["headroom"] == policies.headroom(statistics)
    assert found["mse"] == policies.oracle(statistics, "flush")
    assert found["constant"] == 2688
    only = policies.calibrate(statistics.marginals, policies.FROM_MARGINALS)
    names = ["amax", "p99", "p99.9", "p99.99", "p99.999", "headroom", "headroom-amax"]
    assert list(only) == names and only == {name: found[name] for name in names}
    with pytest.raises(
        ValueError, match=r"^policies \['oracle', 'p98'\] do not calibrate; expected some of"
    ):
        policies.calibrate(statistics, ["amax", "oracle", "p98"])


def blocks_of(*amaxes: float) -> ActivationStatistics:
    """A Gaussian of 4,096 blocks for each amax, every block scaled to exactly that amax."""
    x = torch.randn(len(amaxes), 4096, 16, generator=torch.Generator().manual_seed(0))
    x /= x.abs().amax(-1, keepdim=True)
    return ActivationStatistics.from_tensor((x * torch.tensor(amaxes)[:, None, None]).bfloat16())


def test_room_is_the_octaves_to_the_first_subnormal_block_scales():
    # A block scale is normal up to 28672 = 2**14.8 times the block's amax, subnormal beyond.
    mixed = [1.0, 0.93, 0.86, 0.79]
    small = [2.0**-10 * b for b in mixed]
    assert policies.room(blocks_of(*mixed)) == 14
    assert policies.room(blocks_of(*mixed, *small)) == 4  # the smaller blocks notice first
    assert policies.room(blocks_of(*mixed, *(2.0**-8 * b for b in small))) == 0
    assert policies.raised(blocks_of(*mixed, *small)) == 4.0
    assert policies.raised(blocks_of(*mixed, *small), share=1.0) == 16.0


def test_headroom_over_amax_never_clips():
    massive = blocks_of(*[2.0**-12] * 7, 1.0)
    x = torch.zeros(1, 16).bfloat16()
    x[0, 0] = 2.0**12  # one block in 32,769, above the 99.99th percentile
    massive.update(x)
    assert policies.headroom(massive) < massive.amax == policies.headroom_over_amax(massive)
    assert policies.headroom_over_amax(blocks_of(1.0)) == policies.headroom(blocks_of(1.0))


def nearly_all_zero() -> ActivationStatistics:
    """ReLU**2 of which 0.5 % of the elements are not zero: its 99th percentile is."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    return ActivationStatistics.from_tensor(torch.relu(x - 2.6).square().bfloat16())


def test_calibrate_says_nan_where_a_policy_has_no_value():
    few = policies.calibrate(nearly_all_zero())
    assert [name for name, amax in few.items() if math.isnan(amax)] == ["p99"]
    with pytest.raises(policies.NoValue, match=r"^the calibrated amax is 0\.0"):
        policies.percentile(nearly_all_zero(), 99)
    zeros = ActivationStatistics.from_tensor(torch.zeros(4, 32).bfloat16())
    none = policies.calibrate(zeros)
    assert [name for name, amax in none.items() if not math.isnan(amax)] == ["constant"]
    assert list(none) == list(policies.CALIBRATED)
    with pytest.raises(ValueError, match="do not calibrate"):
        policies.calibrate(zeros, ["p98"])
    with pytest.raises(ValueError, match="the statistic is empty"):  # a mistake, not a tensor of zeros
        policies.calibrate(ActivationStatistics())


def test_subnormals_only_are_refused_and_nan_to_calibrate():
    x = torch.full((4, 32), 2.0**-130).bfloat16()
    statistics = ActivationStatistics.from_tensor(x)
    message = (
        f"the calibrated amax is {2.0**-130}; expected at least 3.16e-35, whose scale is a normal "
        "float32. Such a tensor is zero but for underflow."
    )
    for policy in (policies.amax, policies.percentile, policies.oracle, policies.aligned_headroom,
                   policies.raised, policies.headroom):  # fmt: skip
        with raises(policies.NoValue, message):
            policy(statistics)
    assert [n for n, a in policies.calibrate(statistics).items() if a == a] == ["constant"]


@pytest.mark.filterwarnings("error")
def test_every_policy_has_a_scale_at_bfloat16s_maximum():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    largest = torch.finfo(torch.bfloat16).max
    x = (x / x.abs().max()).double() * largest
    found = policies.calibrate(ActivationStatistics.from_tensor(x.bfloat16()))
    scales = input_scale_from_amax(np.array(list(found.values())))
    assert bool((scales > 0).all()) and found["headroom"] == np.finfo(np.float32).max
    assert found["raised"] > found["amax"] == largest
