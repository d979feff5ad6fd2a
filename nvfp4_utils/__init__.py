# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""NVFP4 activation quantization: the quantizer, the sufficient statistic, policies and capture."""

from . import corpora, distributions, mixes, plots, policies
from .capture import capture
from .quantize import fake_quantize, input_scale_from_amax
from .statistics import ActivationStatistics, Marginals

__all__ = [
    "ActivationStatistics",
    "Marginals",
    "capture",
    "corpora",
    "distributions",
    "fake_quantize",
    "input_scale_from_amax",
    "mixes",
    "plots",
    "policies",
]
