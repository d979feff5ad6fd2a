# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""NVFP4 activation quantization: the quantizer, the sufficient statistic, policies and capture."""

from . import policies
from .histogram import Marginals
from .hooks import capture, hooked
from .policies import POLICIES, calibrate
from .quantize import fake_quantize, input_scale_from_amax
from .sites import Coverage, Site, find_coverage, find_sites
from .statistics import ActivationStatistics, SiteStatistics

__all__ = [
    "POLICIES",
    "ActivationStatistics",
    "Coverage",
    "Marginals",
    "Site",
    "SiteStatistics",
    "calibrate",
    "capture",
    "fake_quantize",
    "find_coverage",
    "find_sites",
    "hooked",
    "input_scale_from_amax",
    "policies",
]
