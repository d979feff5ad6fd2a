# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Activation scales in NVFP4 checkpoints: writing them, auditing them, and proving both."""
