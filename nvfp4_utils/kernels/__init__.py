# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Kernels for CUDA devices: they take tensors and constants and return reports; callers raise errors."""

INFINITY = 0x7F80  # the bfloat16 code of infinity; above it is NaN
COLUMNS = 8192  # of a joint table of bfloat16: 64 octaves below the block's amax
MAX_ROWS = 4096  # of one on a device: 32 octaves, 128 MiB
