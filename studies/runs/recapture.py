# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture what ``results`` holds again: every stored run, with these settings.

    python -m studies.runs.recapture [--runs smollm2 gemma3 reference] [--out build/results]

Needs the models (``make models``), the corpora and, for its size, a CUDA device. What is done is kept
when the command is repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from studies import ROOT

from .capture_run import capture_run
from .capture_settings import CaptureSettings

# A broad mix of seven, the study's news and instructions, one domain, and eleven languages.
MIXES = ("open-sft-seven", "open-news-instruct", "open-math-only", "open-multilingual-only")
COMMON = CaptureSettings(MIXES, calibration=512, test=128, end_to_end=True)
RUNS: dict[str, CaptureSettings] = {
    "smollm2": replace(
        COMMON,
        layouts=(2048, 8192),
        featured=("layers.11.down_proj_input", "layers.15.mlp_input"),
    ),
    "gemma3": replace(
        COMMON,
        layouts=(2048,),
        featured=("layers.9.mlp_input",),
    ),
    "reference": replace(COMMON, windows=1, layouts=(2048,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "results")
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    for name in a.runs:
        print(f"run {name}", flush=True)
        capture_run(name, a.out / name, RUNS[name], folder=a.corpora, commit=a.commit)


if __name__ == "__main__":
    main()
