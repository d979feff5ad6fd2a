# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The book's own code: studies made with the helper package, which never imports them."""
