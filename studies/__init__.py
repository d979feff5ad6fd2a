# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The book's code: text, models, runs, pages, benchmarks. It imports nvfp4_utils, never the reverse."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository: results, models and runs lie there
