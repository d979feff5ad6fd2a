# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The synthetic distributions have the moments, quantiles and rates of their definitions."""

import math
import re

import pytest
import torch

from studies.data import distributions
from studies.data.distributions import CHUNK_ROWS, DISTRIBUTIONS, OUTLIER_CHANNELS, ROW, sample

N = 2**20


def quantile(x: torch.Tensor, p: float) -> float:
    return x.double().kthvalue(round(p * x.numel())).values.item()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_are_bf16_vectors_and_repeat_for_a_seed(name):
    x = sample(name, 4 * ROW, 7)
    assert x.dtype == torch.bfloat16 and x.shape == (4 * ROW,) and x.isfinite().all()
    assert torch.equal(x, sample(name, 4 * ROW, 7))
    assert not torch.equal(x, sample(name, 4 * ROW, 8))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_positive_and_negative_values_are_equally_likely(name):
    positive = (sample(name, N, 1) > 0).double().mean().item()
    assert positive == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(N) + 1e-3)


def test_the_registry_holds_the_seven_names_with_formulas():
    assert list(DISTRIBUTIONS) == [
        "post_layernorm_spikes", "per_channel_outlier", "per_token_outlier", "post_gelu",
        "pareto_mixture", "rare_giant_spike", "lognormal_sigma3",
    ]  # fmt: skip
    assert all(d.name == k and "\n" not in d.formula for k, d in DISTRIBUTIONS.items())


def test_layernorm_spikes_add_their_variance():
    x = sample("post_layernorm_spikes", N, 1).double()
    # E x^2 = 0.999 + 0.001 * 100; P(|x| > 6) comes from spikes alone: 1e-3 * P(|z| > 0.6)
    assert (x**2).mean().item() == pytest.approx(1.099, abs=0.03)
    expected = 1e-3 * math.erfc(0.6 / math.sqrt(2))
    assert (x.abs() > 6).double().mean().item() == pytest.approx(expected, rel=0.15)


def test_outlier_channels_are_the_same_ten_in_every_row_and_seed():
    for seed in (1, 2):
        rms = sample("per_channel_outlier", N, seed).view(-1, ROW).double().pow(2).mean(0).sqrt()
        assert (rms > 50).nonzero().flatten().tolist() == list(OUTLIER_CHANNELS)
        assert rms[list(OUTLIER_CHANNELS)].mean().item() == pytest.approx(100, rel=0.03)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (49, 1), (150, 3), (CHUNK_ROWS + 4, 82)])
def test_one_row_in_fifty_and_at_least_one_is_an_outlier(rows, expected):
    rms = sample("per_token_outlier", rows * ROW, 3).view(rows, ROW).float().pow(2).mean(1).sqrt()
    assert int((rms > 5).sum()) == expected
    assert rms[rms > 5].mean().item() == pytest.approx(15, rel=0.1)
    if rows > 1:
        assert rms[rms < 5].mean().item() == pytest.approx(0.5, rel=0.02)


def test_gelu_has_the_closed_form_mean_and_its_minimum():
    x = sample("post_gelu", N, 1).double()
    # exact GELU of s*z has mean s^2 / sqrt(2 pi (1 + s^2)); the tanh form differs by under 1e-3
    assert x.mean().item() == pytest.approx(4 / math.sqrt(2 * math.pi * 5), abs=6e-3)
    assert x.min().item() == pytest.approx(-0.17, abs=1e-3)


def test_pareto_tail_follows_its_power_law():
    x = sample("pareto_mixture", 4 * N, 1).abs()
    for t in (10.0, 100.0):  # P(|x| > t) = 0.01 * (t / 3)^-1.5
        expected = 0.01 * (t / 3) ** -1.5
        error = 5 / math.sqrt(4 * N * expected) + 0.01  # five sigma, and bf16's rounding of t
        assert (x > t).double().mean().item() == pytest.approx(expected, rel=error)
    assert x.max().item() <= 3 * 1e-7 ** (-1 / 1.5) * 1.01


def test_spikes_come_at_their_rate_and_never_in_the_test_split(monkeypatch):
    name = "rare_giant_spike"
    assert sample(name, N, 1, split="test").abs().max().item() < 7
    monkeypatch.setattr(distributions, "SPIKE_PROBABILITY", 1e-4)
    x = sample(name, N, 1)
    spikes = x[x.abs() > 100]
    assert len(spikes) == pytest.approx(1e-4 * N, abs=5 * math.sqrt(1e-4 * N))
    assert {abs(v) for v in spikes.tolist()} == {torch.tensor(1e6).bfloat16().item()}
    assert spikes.min() < 0 < spikes.max()


def test_the_published_spike_probability_is_1e_minus_7():
    assert distributions.SPIKE_PROBABILITY == 1e-7 and distributions.SPIKE_MAGNITUDE == 1e6


def test_lognormal_has_median_one_and_sigma_three():
    x = sample("lognormal_sigma3", N, 1).abs()
    assert quantile(x, 0.5) == pytest.approx(1, rel=0.03)
    assert math.log(quantile(x, 0.8413447)) == pytest.approx(3, abs=0.03)


def test_chunks_draw_new_values():
    x = sample("post_gelu", (CHUNK_ROWS + 1) * ROW, 1)
    assert not torch.equal(x[:ROW], x[-ROW:])


@pytest.mark.parametrize("n", [0, 1000, ROW + 16, -ROW])
def test_a_length_that_is_no_multiple_of_a_row_is_refused(n):
    message = f"got n={n}, expected a positive multiple of 1024. Round it up."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample("post_gelu", n, 1)


def test_unknown_names_and_splits_are_refused():
    message = f"unknown distribution 'cauchy'. Known distributions: {', '.join(DISTRIBUTIONS)}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample("cauchy", ROW, 1)
    message = "got split='train', expected one of ('calibration', 'test')."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample("post_gelu", ROW, 1, split="train")
