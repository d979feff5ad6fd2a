# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Counters of capture, with Triton's interpreter in the device's place and reports that arrive."""

import contextlib
import math
import sys

import pytest
import torch
from nvfp4_reference import BF16

pytest.importorskip("triton")

from nvfp4_utils import ActivationStatistics, capture, device_counter
from nvfp4_utils.device_counter import STATUS, DeviceCounter, Reports, window_around

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs on the device")


class Ready:
    def synchronize(self):
        pass


@pytest.fixture(autouse=True)
def host_as_device(monkeypatch):
    monkeypatch.setattr(
        device_counter, "_to_host", lambda reports: (reports[:, :STATUS].clone(), Ready())
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> bool:
    return torch.equal(a.keys, b.keys) and torch.equal(a.counts, b.counts)


def test_what_leaves_the_window_padding_and_zeros_are_counted():
    x = normal(4, 6, 64)
    x[0, 3] = 0
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1, 2:] = False
    counter, expected = DeviceCounter(Reports()), ActivationStatistics()
    for part in (x, x * 2.0**20, x * torch.exp2(-20.0 * (x > 1)), x * 2.0**-100):
        part = part.to(BF16)
        amax = counter.add(part, keep, 4)
        expected.update(part[keep])
        assert torch.equal(amax, part.masked_fill(~keep[..., None], 0).abs().flatten(1).amax(1))
    counter.close()
    assert same(counter.finish(), expected)
    base, rows = counter.next_window
    assert base < 0x3F80 < base + rows


def test_the_next_window_holds_what_this_one_had_no_place_for():
    x = normal(2, 4, 64).to(BF16)
    counter = DeviceCounter(Reports(), window_around(0x3F80, 0x3F80))
    counter.add(x * 2.0**12, None, 0)
    counter.close()
    assert same(counter.finish(), ActivationStatistics.from_tensor(x * 2.0**12))
    following = DeviceCounter(Reports(), counter.next_window)
    following.add(x * 2.0**12, None, 0)
    assert not following.rest


def test_the_window_of_activations_too_wide_for_any_table_stays_where_it_is():
    exponents = torch.linspace(-60, 20, 64)[:, None].expand(64, 16)  # 80 octaves; a table has 32
    x = (normal(64, 16).abs() + 0.5).mul(torch.exp2(exponents)).view(2, 32, 16).to(BF16)
    window, windows = None, set()
    for _ in range(4):
        counter = DeviceCounter(Reports(), window)
        for _ in range(2):
            counter.add(x, None, 0)
        counter.close()
        assert same(counter.finish(), ActivationStatistics.from_tensor(torch.cat([x, x])))
        window = counter.next_window
        windows.add(window)
    assert len(windows) == 1
    base, rows = window
    assert base + rows > int(x.view(torch.int16).max())


def test_a_counter_that_was_not_closed_loses_nothing():
    x = normal(2, 4, 64).to(BF16)
    counter = DeviceCounter(Reports())
    for _ in range(2):
        counter.add(x, None, 0)
    assert same(counter.finish(), ActivationStatistics.from_tensor(torch.cat([x, x])))


def test_a_table_can_be_freed_before_the_counter_is_finished():
    x = normal(2, 4, 64).to(BF16)
    counter = DeviceCounter(Reports())
    counter.add(x, None, 0)
    counter.close()
    assert counter.table_bytes > 0
    counter.flush()
    assert counter.table_bytes == 0
    assert same(counter.finish(), ActivationStatistics.from_tensor(x))


def test_counts_that_would_overflow_go_to_the_sparse_form_first(monkeypatch):
    monkeypatch.setattr(device_counter, "MAX_ELEMENTS", 1000)
    counter, expected = DeviceCounter(Reports()), ActivationStatistics()
    for seed in range(3):
        x = normal(2, 4, 64, seed=seed).to(BF16)
        counter.add(x, None, 0)
        expected.update(x)
    counter.close()
    assert same(counter.finish(), expected)
    with pytest.raises(ValueError, match=r"^an activation has 1024 elements; expected at most 1000\."):
        counter.add(normal(4, 4, 64).to(BF16), None, 0)


def test_reports_are_read_in_order_and_few_wait():
    reports, x = Reports(), normal(2, 4, 64).to(BF16)
    several = [DeviceCounter(reports) for _ in range(20)]
    for counter in several:
        counter.add(x, None, 0)
        assert len(reports.sent) <= 2
    for counter in several:
        counter.close()
        assert same(counter.finish(), ActivationStatistics.from_tensor(x))


def test_only_padding_leaves_the_statistic_empty():
    counter = DeviceCounter(Reports())
    counter.add(normal(1, 4, 64).to(BF16), torch.zeros(1, 4, dtype=torch.bool), 4)
    counter.close()
    assert counter.finish().dtype is None


def test_nan_raises_and_a_change_in_place_is_noticed():
    x = normal(2, 8, 64).to(BF16)
    x[1, 2, 3:5] = math.nan
    for label, prefix in (("", ""), ("layers.3.mlp_input", r"layers\.3\.mlp_input: ")):
        counter = DeviceCounter(Reports())
        counter.label = label
        counter.add(x, None, 0)
        message = rf"^{prefix}x holds 2 values that are NaN or infinite;"
        with pytest.raises(ValueError, match=message):
            counter.close()
    x = normal(2, 8, 64).to(BF16)
    counter = DeviceCounter(Reports())
    counter.add(x, None, 0)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"^the model overwrote an activation in place"):
        counter.close()


@pytest.mark.parametrize("kept_bytes", [0, 2**32])
def test_capture_gives_the_same_with_either_counter(kept_bytes, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).bfloat16()
    mask = torch.ones(7, 6, dtype=torch.long)
    mask[1, 2:] = mask[4, 5:] = 0
    ids = torch.randint(1, 50, (7, 6)) * mask
    batches = [{"input_ids": ids[i : i + 3], "attention_mask": mask[i : i + 3]} for i in (0, 3, 6)]
    sites = ["mlp_input", "down_proj_input"]
    expected = capture(model, batches, sites, group_size=2, progress=False)
    module = sys.modules["nvfp4_utils.counters"]
    reports = Reports()
    monkeypatch.setattr(module, "Counter", lambda: DeviceCounter(reports))
    monkeypatch.setattr(module, "CLOSED_BYTES", kept_bytes)
    monkeypatch.setattr(module.Counters, "room", kept_bytes)
    found = capture(model, batches, sites, group_size=2, progress=False)
    assert list(found) == list(expected)
    for label, site in found.items():
        assert site.sequence_amax.tolist() == expected[label].sequence_amax.tolist()
        assert len(site.groups) == len(expected[label].groups) == 4
        for got, wanted in zip(site.groups, expected[label].groups, strict=True):
            assert same(got, wanted)
