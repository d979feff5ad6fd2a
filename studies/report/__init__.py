# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What to set for one's own model: measured, judged by stated rules, written as JSON and as a page."""
