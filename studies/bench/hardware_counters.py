# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Read the hardware counters of the large kernels with ``ncu``, for the performance page.

    python -m studies.bench.hardware_counters [--commit HASH]

One launch a kernel on 1 GiB of Gaussian bfloat16. Writes ``results/performance/counters.csv`` (one row
a kernel and counter, in base units) and its provenance, ``counters.json``. ``ncu`` comes with CUDA.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys

import pandas as pd
import torch

from nvfp4_utils.histogram import joint_histogram
from nvfp4_utils.quantize import fake_quantize

from .timing import FOLDER, GIB, make, write_provenance

KERNELS = ("block_codes", "sort_blocks", "count_pairs", "fake_quantize")
COUNTERS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes_read.sum": "DRAM bytes read",
    "dram__bytes_write.sum": "DRAM bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM throughput",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 throughput",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM throughput",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved occupancy",
    "smsp__inst_executed.sum": "warp instructions",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots busy",
}


def launch_once() -> None:
    """What ``ncu`` watches: each kernel once, after a first call that compiles it."""
    x = make("gaussian", GIB // 2, "cuda", 0)
    scale = torch.tensor(5.0 / 2688, device="cuda")
    for watched in (False, True):
        if watched:
            torch.cuda.profiler.start()
        joint_histogram(x)
        fake_quantize(x, scale)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def read() -> pd.DataFrame:
    """Run this module under ``ncu``; a row a kernel and counter."""
    if shutil.which("ncu") is None:
        raise FileNotFoundError(
            "ncu is not on the PATH; expected NVIDIA Nsight Compute, which comes with CUDA. Add its "
            "folder to PATH."
        )
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
               "--print-units", "base", "--kernel-name", f"regex:({'|'.join(KERNELS)})",
               "--metrics", ",".join(COUNTERS),
               sys.executable, "-m", "studies.bench.hardware_counters", "--launch-once"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    at = done.stdout.find('"ID"')
    if done.returncode or at < 0:
        raise RuntimeError(f"ncu read no counters: {(done.stdout + done.stderr)[-500:]}")
    table = pd.read_csv(io.StringIO(done.stdout[at:]))
    units, launches = table.iloc[0], table.iloc[1:]
    rows = []
    for name in KERNELS:
        (launch,) = (row for _, row in launches.iterrows() if name in row["Kernel Name"])
        for metric, counter in COUNTERS.items():
            value, unit = float(str(launch[metric]).replace(",", "")), units[metric]
            if unit in ("ns", "nsecond"):
                value, unit = value / 1e9, "s"
            rows.append((name, counter, unit, value))
    return pd.DataFrame(rows, columns=["kernel", "counter", "unit", "value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--launch-once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    if a.launch_once:
        launch_once()
        return
    found = read()
    write_provenance("counters", a.commit, kernels=list(KERNELS), elements=GIB // 2, data="gaussian")
    found.to_csv(FOLDER / "counters.csv", index=False)


if __name__ == "__main__":
    main()
