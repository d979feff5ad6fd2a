# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Time the package and store what the performance page shows.

    python -m studies.bench [--parts cpu kernels model] [--corpora FOLDER]

``cpu`` runs anywhere; ``kernels`` needs a CUDA device with 40 GB; ``model`` 70 GB and a folder of
text (``*.jsonl.gz``). Each part is a table and a provenance file in ``results/performance``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .kernels import run_cpu, run_kernels
from .model import run_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=None, choices=("cpu", "kernels", "model"))
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    cuda = torch.cuda.is_available()
    parts = a.parts or ["cpu"] + ["kernels"] * cuda + ["model"] * (cuda and a.corpora is not None)
    for part in ("kernels", "model"):
        if part not in parts:
            print(f"skipped: {part} (no CUDA device, no --corpora, or not asked for)")
    if "kernels" in parts:
        run_kernels(a.commit)
    if "model" in parts:
        run_model(a.commit, a.corpora)
    if "cpu" in parts:
        run_cpu(a.commit)


if __name__ == "__main__":
    main()
