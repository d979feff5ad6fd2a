# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The benchmark checks what it times, and its stored tables say so."""

import json

import pandas as pd
import pytest
import torch

from nvfp4_utils.histogram import joint_histogram
from studies.bench import hardware_counters, timing

STORED = ("cpu", "kernels", "model", "model_fla")


def test_a_hash_sees_a_changed_a_moved_and_a_missing_count():
    keys, counts = joint_histogram(timing.make("gaussian", 2**16, "cpu", 1))
    hashes = {timing.histogram_hash(keys, counts)}
    for at in (0, 100, len(keys) - 1):
        more = counts.clone()
        more[at] += 1
        hashes.add(timing.histogram_hash(keys, more))
    moved = counts.clone()
    moved[0], moved[1] = counts[0] + 1, counts[1] - 1
    hashes |= {timing.histogram_hash(keys, moved), timing.histogram_hash(keys[1:], counts[1:])}
    assert len(hashes) == 6


@pytest.mark.parametrize("kind", timing.KINDS)
def test_data_are_what_the_seed_says(kind):
    x = timing.make(kind, 2**17, "cpu", 3)
    assert x.shape == (32, 4096) and x.dtype == torch.bfloat16
    assert bool(torch.isfinite(x).all())
    assert torch.equal(x, timing.make(kind, 2**17, "cpu", 3))
    assert kind == "equal" or not torch.equal(x, timing.make(kind, 2**17, "cpu", 4))


def test_times_are_a_median_between_percentiles():
    median, low, high = timing.host_times(lambda: sum(range(1000)), 5)
    assert 0 < low <= median <= high


@pytest.mark.parametrize("part", STORED)
def test_stored_results_were_right_and_say_where_they_come_from(part):
    table = pd.read_parquet(timing.FOLDER / f"{part}.parquet")
    checked = table.ok.dropna() if "ok" in table else pd.Series(dtype=bool)
    assert checked.astype(bool).all() and len(checked)
    assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all()
    info = json.loads((timing.FOLDER / f"{part}.json").read_text())
    assert {"commit", "device", "date", "versions"} <= set(info)


def test_counters_are_read_from_what_ncu_prints(tmp_path, monkeypatch):
    header = ["ID", "Kernel Name", *hardware_counters.COUNTERS]
    units = ["", "", "ns", "byte", "byte", *["%"] * 4, "inst", "%"]
    lines = [header, units]
    for i, name in enumerate(reversed(hardware_counters.KERNELS)):
        lines.append([i, f"_{name}_kernel", f"1,{i}00,000", *[f"{10 * i + k}" for k in range(8)]])
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    (tmp_path / "output").write_text("==PROF== Connected\n" + text)
    (tmp_path / "ncu").write_text(f"#!/bin/sh\ncat {tmp_path / 'output'}\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = hardware_counters.read().set_index(["kernel", "counter"]).value
    assert len(found) == 36
    assert found["fake_quantize", "duration"] == 1e6 / 1e9
    assert found["block_codes", "duration"] == pytest.approx(1.3e6 / 1e9)
    assert found["count_pairs", "DRAM bytes read"] == 10
    stored = pd.read_csv(timing.FOLDER / "counters.csv").set_index(["kernel", "counter"])
    assert list(stored.index) == list(found.index)


def test_without_ncu_the_error_says_where_it_comes_from(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"^ncu is not on the PATH; expected NVIDIA Nsight"):
        hardware_counters.read()
