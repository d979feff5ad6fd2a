# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Runs: what is measured once, over a model and its texts, and stored for the pages."""
