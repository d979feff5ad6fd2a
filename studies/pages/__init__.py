# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the pages compute and draw: one module per notebook, and what they share."""
