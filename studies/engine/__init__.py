# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The activations of vLLM, the engine that serves models: counted and quantized inside it."""
