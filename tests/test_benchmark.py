# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The benchmark checks what it times, and its stored tables say so."""

import json

import pandas as pd
import pytest
import torch

from nvfp4_utils import benchmark
from nvfp4_utils.histogram import joint_histogram

STORED = ("cpu", "kernels", "model")


def test_a_hash_sees_a_changed_a_moved_and_a_missing_count():
    keys, counts = joint_histogram(benchmark.make("gaussian", 2**16, "cpu", 1))
    hashes = {benchmark.histogram_hash(keys, counts)}
    for at in (0, 100, len(keys) - 1):
        more = counts.clone()
        more[at] += 1
        hashes.add(benchmark.histogram_hash(keys, more))
    moved = counts.clone()
    moved[0], moved[1] = counts[0] + 1, counts[1] - 1
    hashes |= {benchmark.histogram_hash(keys, moved), benchmark.histogram_hash(keys[1:], counts[1:])}
    assert len(hashes) == 6


@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_data_are_what_the_seed_says(kind):
    x = benchmark.make(kind, 2**17, "cpu", 3)
    assert x.shape == (32, 4096) and x.dtype == torch.bfloat16
    assert bool(torch.isfinite(x).all())
    assert torch.equal(x, benchmark.make(kind, 2**17, "cpu", 3))
    assert kind == "equal" or not torch.equal(x, benchmark.make(kind, 2**17, "cpu", 4))


def test_times_are_a_median_between_percentiles():
    median, low, high = benchmark.host_times(lambda: sum(range(1000)), 5)
    assert 0 < low <= median <= high


@pytest.mark.parametrize("part", STORED)
def test_stored_results_were_right_and_say_where_they_come_from(part):
    table = pd.read_parquet(benchmark.FOLDER / f"{part}.parquet")
    checked = table.ok.dropna() if "ok" in table else pd.Series(dtype=bool)
    assert checked.astype(bool).all() and len(checked)
    assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all()
    info = json.loads((benchmark.FOLDER / f"{part}.json").read_text())
    assert {"commit", "device", "date", "versions"} <= set(info)
