# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
