# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The prediction equals direct quantization where its assumption holds, in every regime."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nvfp4_utils import fake_quantize, input_scale_from_amax
from nvfp4_utils.statistics import ActivationStatistics
from studies.pages import block_shapes

GAUSSIAN = block_shapes.Shape.generalized_normal(2.0, blocks=2**18, seed=1)
REGIMES = {"saturated": 0.3, "at the amax": 1.0, "normal": 300.0, "subnormal": 2.0**16.3,
           "around the last subnormal": 2.0**18.6, "under E4M3": 2.0**21}  # fmt: skip


@lru_cache
def independent_blocks(count: int, seed: int) -> torch.Tensor:
    """Gaussian shapes drawn with the weight b**2, each at one of four amaxes of its own."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, 16, generator=generator)
    amax = y.abs().amax(dim=1, keepdim=True)
    pick = torch.multinomial(amax[:, 0].square(), count, replacement=True, generator=generator)
    b = torch.tensor([0.03, 0.11, 0.47, 1.0])[torch.randint(4, (count, 1), generator=generator)]
    # bfloat16 after scaling to the block's amax, which is made a bfloat16 first
    return (y / amax)[pick].mul(b.bfloat16().float()).bfloat16()


@pytest.mark.parametrize("underflow", ["flush", "floor"])
@pytest.mark.parametrize("rho", REGIMES.values(), ids=REGIMES.keys())
def test_prediction_is_the_direct_error_where_shape_and_amax_are_independent(rho, underflow) -> None:
    x = independent_blocks(2**18, seed=2)
    m = ActivationStatistics.from_tensor(x).marginals
    amax = rho * m.amax
    y = fake_quantize(x, input_scale_from_amax(amax), underflow=underflow, out_dtype=torch.float32)
    direct = (y.double() - x.double()).square().mean().item()
    predicted = block_shapes.predicted_mse(m, [amax], underflow, [GAUSSIAN])[0, 0]
    assert predicted == pytest.approx(direct, rel=0.008)


def test_psi_equals_its_definition_at_any_ratio() -> None:
    from nvfp4_utils.quantize import round_e2m1

    generator = torch.Generator().manual_seed(3)
    z = torch.rand(16 * 512, generator=generator).bfloat16().double()
    shape = block_shapes.Shape.from_elements(z, torch.ones_like(z))
    for r in (0.01, 0.3, 0.9, 1.0, 1.06, 1.7, 5.0, 23.0, 30.0):
        y = round_e2m1((6 * z / r).float()).double() * r / 6
        expected = (y - z).square().mean().item()
        assert np.interp(r, block_shapes.RATIOS, shape.error) == pytest.approx(expected, rel=2e-3)


def test_prediction_is_exact_when_each_amax_has_its_own_measured_shape() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    joint = ActivationStatistics.from_tensor(x)
    shapes = block_shapes.shapes_by_amax(joint, 64)
    pooled = block_shapes.Shape.of_site(joint)
    worst = {"own": 0.0, "pooled": 0.0}
    for underflow in ("flush", "floor"):
        amaxes = joint.amax * np.array([0.25, 0.7, 1.5, 2.0**15.5, 2.0**17])
        exact = joint.mse(input_scale_from_amax(torch.from_numpy(amaxes)), underflow)
        own = block_shapes.mse_by_amax(joint, amaxes, underflow, shapes)
        one = block_shapes.predicted_mse(joint.marginals, amaxes, underflow, [pooled])[0]
        worst["own"] = max(worst["own"], np.abs(own / exact - 1).max())
        worst["pooled"] = max(worst["pooled"], np.abs(one / exact - 1).max())
    assert worst["own"] < 0.01
    assert worst["pooled"] > 0.05  # the assumption is what fails, even for a Gaussian


def test_normal_scales_give_the_same_prediction_one_octave_on() -> None:
    values, counts = np.array([0.11, 0.47, 1.0]), np.array([5, 3, 1])
    first = block_shapes.ratio_energy(values, counts, [1.3, 1.7], "flush")
    for octave in (1, 5, 9):
        later = block_shapes.ratio_energy(values, counts, np.array([1.3, 1.7]) * 2.0**octave, "flush")
        assert np.array_equal(first, later)


def test_energy_is_conserved_and_falls_on_the_ratio_of_the_regime() -> None:
    values, counts = np.array([0.5, 1.0]), np.array([4, 1])
    for amax, underflow, expected in ((0.25, "flush", [0.5, 0.25]), (2.0**22, "flush", [0, 0]),
                                      (448 * 2.0**10, "floor", [4, 2])):  # fmt: skip
        energy = block_shapes.ratio_energy(values, counts, [amax], underflow)[0]
        assert energy.sum() == pytest.approx(2.0)
        assert energy @ block_shapes.RATIOS == pytest.approx(sum(expected), rel=1e-6)  # both weigh 1


def test_flushed_blocks_lose_their_energy_and_floored_ones_no_more() -> None:
    x = independent_blocks(2**12, seed=5)
    m = ActivationStatistics.from_tensor(x).marginals
    shape = block_shapes.Family(blocks=2**12).matching(block_shapes.crest(m))
    far = [1e9 * m.amax, 1e12 * m.amax]
    for underflow in ("flush", "floor"):
        gone = block_shapes.predicted_mse(m, far, underflow, [shape])[0]
        assert gone == pytest.approx(m.signal_power, rel=1e-9)
    peak = block_shapes.predicted_mse(m, m.amax * 2.0 ** np.arange(14, 25, 0.1), "floor", [shape])
    assert np.isfinite(peak).all()


def test_zero_blocks_count_as_elements_without_error() -> None:
    x = independent_blocks(2**10, seed=6)
    with_zeros = torch.cat([x, torch.zeros_like(x)])
    half, full = (ActivationStatistics.from_tensor(t).marginals for t in (with_zeros, x))
    mse = [block_shapes.predicted_mse(m, [1.0, 1e5], "floor", [GAUSSIAN]) for m in (half, full)]
    assert mse[0] == pytest.approx(mse[1] / 2)
    assert block_shapes.crest(half) == pytest.approx(block_shapes.crest(full))


def test_crest_of_known_blocks() -> None:
    one = torch.zeros(4, 16)
    one[:, 2] = torch.tensor([1.0, 2.0, 0.5, 4.0])
    equal = torch.full((4, 16), 3.0)
    found = [
        block_shapes.crest(ActivationStatistics.from_tensor(t.bfloat16()).marginals)
        for t in (one, equal)
    ]
    assert found == [1 / 16, 1.0]


def test_family_has_the_crest_asked_for_and_clamps_beyond_its_ends() -> None:
    family = block_shapes.Family((0.5, 2.0, 32.0), blocks=2**12)
    crests = [m.crest for m in family.members]
    assert crests == sorted(crests)
    assert crests[1] == pytest.approx(0.22, abs=0.005)  # 1 / E[max of 16 squared normals]
    for wanted in (*crests, 0.15, 0.3):
        shape = family.matching(wanted)
        assert shape.crest == pytest.approx(wanted)
        assert shape.error[0] == pytest.approx(wanted)
    assert family.matching(0.01).crest == pytest.approx(crests[0])
    assert family.matching(0.99).crest == pytest.approx(crests[-1])


def test_compare_scores_each_model_against_the_stored_curve() -> None:
    x = torch.randn(2**12, 16, generator=torch.Generator().manual_seed(7)).bfloat16()
    joint = ActivationStatistics.from_tensor(x)
    amaxes = joint.amax * 2.0 ** np.arange(-3, 19, 1 / 32)
    scales = input_scale_from_amax(torch.from_numpy(amaxes))
    curve = {"site": "layers.0.mlp_input", "calibrated_amax": amaxes}
    curve |= {f"mse_{u}": joint.mse(scales, u) for u in ("flush", "floor")}
    run: Any = SimpleNamespace(
        curves=lambda mix: pd.DataFrame(curve), marginals=lambda mix, site, pool: joint.marginals
    )
    family = block_shapes.Family((1.0, 2.0, 4.0), blocks=2**14)
    table = block_shapes.compare(run, "some mix", family, GAUSSIAN, step=1 / 4)
    assert len(table) == 2 * len(np.unique(np.floor(4 * np.log2(amaxes))))
    assert set(table.kind) == {"mlp_input"}
    flush = table[table.underflow == "flush"]
    exact = joint.snr_db(input_scale_from_amax(torch.from_numpy(flush.calibrated_amax.to_numpy())))
    assert flush.exact.to_numpy() == pytest.approx(exact)
    assert flush.octaves.to_numpy() == pytest.approx(np.log2(flush.calibrated_amax / joint.amax))
    plateau = table[table.octaves.between(0, 10)]
    for model in block_shapes.MODELS:  # one Gaussian tensor: all three are right, up to its own sample
        assert plateau[model].to_numpy() == pytest.approx(plateau.exact.to_numpy(), abs=0.06)
    spiky = dataclasses.replace(GAUSSIAN, crest=2 * GAUSSIAN.crest)
    halved = block_shapes.compare(run, "some mix", family, spiky, step=1 / 4)
    assert (halved.rescaled - table.rescaled).to_numpy() == pytest.approx(10 * np.log10(2))


def test_limits_are_where_the_loss_passes_and_ripple_is_no_loss() -> None:
    octaves = np.arange(-4, 20, 1 / 16)
    snr = 20 - np.maximum(0, -octaves - 1) - 2 * np.maximum(0, octaves - 10)
    snr += 0.03 * np.sin(2 * np.pi * octaves) * ((octaves > -0.5) & (octaves < 9.5))
    plateau, low, high = block_shapes.plateau_and_limits(octaves, snr)
    assert plateau == pytest.approx(20, abs=1e-3)
    assert low == pytest.approx(-1.1, abs=0.01)
    assert high == pytest.approx(10.05, abs=0.01)
    flat = block_shapes.plateau_and_limits(octaves, np.full(len(octaves), 20.0))
    assert flat == (pytest.approx(20), octaves[0], octaves[-1])


def test_bad_input_is_refused() -> None:
    empty = ActivationStatistics.from_tensor(torch.zeros(2, 16).bfloat16())
    ok = ActivationStatistics.from_tensor(torch.ones(2, 16).bfloat16()).marginals
    for call in (lambda: block_shapes.crest(empty.marginals),
                 lambda: block_shapes.predicted_mse(empty.marginals, [1.0], "flush", [GAUSSIAN]),
                 lambda: block_shapes.shapes_by_amax(empty, 1)):  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == "the marginal holds no nonzero block; expected at least one."
    with pytest.raises(ValueError) as error:
        block_shapes.Shape.of_site(empty)
    assert str(error.value) == "weights sum to 0; expected at least one nonzero block."
    for amax in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match=r"^amax / 2688 is .*expected a finite positive"):
            block_shapes.predicted_mse(ok, [1.0, amax], "flush", [GAUSSIAN])
    with pytest.raises(ValueError, match="underflow is 'zero'"):
        block_shapes.predicted_mse(ok, [1.0], "zero", [GAUSSIAN])
    with pytest.raises(ValueError) as error:
        block_shapes.Shape.generalized_normal(0.0)
    assert str(error.value) == "exponent is 0.0; expected a positive number (2: Gaussian)."
    with pytest.raises(ValueError) as error:
        block_shapes.plateau_and_limits([-3.0, 4.0], [1.0, 2.0])
    assert str(error.value) == "no calibrated amax lies within the octave above B_max; expected some."
