# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The oracle is a bound: no dense search beats it, on tensors of every kind."""

import math

import numpy as np
import pytest
import torch
from nvfp4_reference import BF16, FP16, all_regimes

from nvfp4_utils import ActivationStatistics, fake_quantize, input_scale_from_amax, policies, search
from nvfp4_utils.error import Parabolas
from nvfp4_utils.quantize import UNDERFLOWS

KINDS = ("gaussian", "gaussian_small", "lognormal", "laplace", "sparse", "relu2", "swiglu", "wide",
         "massive1", "massive_small", "massive_swiglu")  # fmt: skip


def make(kind: str, seed: int) -> torch.Tensor:
    """Massive: one element 1e3 to 1e4 times the rest. Small: 16 blocks, else 256."""
    generator = torch.Generator().manual_seed(1000 * seed + 7)

    def normal(columns: int = 64) -> torch.Tensor:
        return torch.randn(4 if "small" in kind else 64, columns, generator=generator)

    x, u = normal(), float(torch.rand(1, generator=generator))
    if kind == "lognormal":
        x = x.sign() * torch.exp(3 * normal())
    elif kind == "laplace":
        x = x * normal().abs()
    elif kind == "sparse":
        x = 3 * torch.relu(x - 2.2)
    elif kind == "relu2":
        x = torch.relu(x - u).square()
    elif kind == "wide":
        x = x * 2 ** (6 * normal(1))
    elif "swiglu" in kind:
        x = torch.nn.functional.silu(2 * x) * normal() * 2 ** (2 * normal(1))
    if "massive" in kind:
        x[0, 5] = x.abs().max() * 10 ** (3 + u)
    return x.bfloat16()


def mse_at(statistics: ActivationStatistics, amaxes, underflow):
    return statistics.mse(input_scale_from_amax(amaxes), underflow)


def dense_search(statistics: ActivationStatistics, underflow, points: int = 256) -> float:
    """The least error of a log grid over all octaves, its best points refined twice."""
    amaxes = statistics.amax * 2 ** (np.arange(-4 * points, 18 * points) / points)
    errors, width = mse_at(statistics, amaxes, underflow), 1 / points
    for keep in (12, 4):
        best = amaxes[np.argsort(errors, kind="stable")[:keep]]
        amaxes = np.append(best, best[:, None] * 2 ** np.linspace(-width, width, 33))
        errors, width = mse_at(statistics, amaxes, underflow), width / 16
    return errors.min()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_search_beats_the_oracle(kind, seed):
    x = make(kind, seed)
    statistics = ActivationStatistics.from_tensor(x)
    for underflow in UNDERFLOWS[: 2 if seed < 2 else 1]:
        found = policies.oracle(statistics, underflow)
        error = mse_at(statistics, found, underflow)
        assert error <= dense_search(statistics, underflow) * (1 + 1e-4)
        y = fake_quantize(x, input_scale_from_amax(found), underflow=underflow, out_dtype=torch.float32)
        assert error == pytest.approx((y.double() - x.double()).square().mean().item(), rel=1e-10)


def test_the_narrow_valleys_of_massive_values_are_found():
    """One value 1e4 times the rest: the best scale represents it exactly."""
    for seed in range(6):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x[0, 0] = 1e4 * (1 + seed / 7)
        y = fake_quantize(x, input_scale_from_amax(policies.oracle(ActivationStatistics.from_tensor(x))))
        assert y[0, 0] == x[0, 0]


@pytest.mark.parametrize("kind", ["gaussian", "swiglu", "massive1"])
def test_float16_has_the_same_bound(kind):
    statistics = ActivationStatistics.from_tensor((make(kind, 0).float() * 1.0001).clamp(max=6e4).half())
    error = mse_at(statistics, policies.oracle(statistics), "flush")
    assert error <= dense_search(statistics, "flush") * (1 + 1e-4)


@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_parabolas_pass_through_the_exact_error(underflow):
    statistics = ActivationStatistics.from_tensor(all_regimes(64, 256, BF16, seed=3))
    scales = torch.tensor(statistics.amax / 2688 * 2 ** np.linspace(-3, 26, 700)).float().double()
    exact = torch.from_numpy(statistics.mse(scales, underflow)) * statistics.count
    for negligible in (0.0, 1e-3 * float(exact.min())):
        curve = Parabolas(statistics.dtype, statistics.keys, statistics.counts, negligible)
        a, b = curve.at(scales, underflow)
        error = curve.energy - 2 * scales * a + scales**2 * b
        # Relative: the exact error rounds each block's step to float32.
        assert ((error - exact).abs() <= negligible + 1e-6 * exact + 1e-12 * curve.energy).all()
    assert len(curve.block_amax) < len(statistics.marginals.block_codes) - 1  # some were negligible


def test_parabolas_of_float16_are_close():
    x = all_regimes(64, 256, FP16, seed=3)
    statistics = ActivationStatistics.from_tensor(x)
    scales = torch.tensor(statistics.amax / 2688 * 2 ** np.linspace(-1, 12, 100)).float().double()
    a, b = statistics.parabolas.at(scales, "flush")
    error = (statistics.parabolas.energy - 2 * scales * a + scales**2 * b) / statistics.count
    np.testing.assert_allclose(error, statistics.mse(scales), rtol=0.01)


def test_a_vertex_is_the_least_of_its_parabola():
    """Three values in one block, at a scale where none changes its code up to the vertex."""
    x = torch.zeros(1, 16).bfloat16()
    x[0, :3] = torch.tensor([5.75, 2.9, 1.05])
    curve = ActivationStatistics.from_tensor(x).parabolas
    (a,), (b,) = curve.at(torch.tensor([5.75 / 6 / 256], dtype=torch.float64), "flush")
    x, q = x[0, :3].double(), torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    assert a.item() == pytest.approx(256 * (q * x).sum().item(), rel=1e-12)
    assert b.item() == pytest.approx(256**2 * q.square().sum().item(), rel=1e-12)


def test_octaves_that_are_left_out_hold_no_lower_error():
    for kind in ("swiglu", "sparse", "massive1"):
        statistics = ActivationStatistics.from_tensor(make(kind, 0))
        for underflow in UNDERFLOWS:
            octaves = search.octaves_of_least_error(statistics, underflow)
            least = mse_at(statistics, policies.oracle(statistics, underflow), underflow)
            every = statistics.amax * 2.0 ** (np.arange(-12 * 32, 24 * 32) / 32)
            inside = np.any([(low <= every) & (every < high) for low, high in octaves], 0)
            assert 0 < inside.sum() < len(every)
            assert mse_at(statistics, every[~inside], underflow).min() >= least * (1 - 1e-5)


def blocks_near(value: float) -> ActivationStatistics:
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ActivationStatistics.from_tensor(((x / x.max()) * value).bfloat16())


@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_the_oracle_at_both_ends_of_the_range(underflow):
    largest = torch.finfo(BF16).max
    for value in (1.05 * 2688 * 2.0**-126, 2688 * 2.0**-126 * 2**4, largest / 4, largest):
        statistics = blocks_near(value)
        found = policies.oracle(statistics, underflow)
        assert math.isfinite(found) and mse_at(statistics, found, underflow) <= mse_at(
            statistics, statistics.amax, underflow
        )
