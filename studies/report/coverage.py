# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which activations of a model are measured, and by name what is not."""

from __future__ import annotations

from torch import nn

from nvfp4_utils.sites import Coverage, find_coverage


def coverage(model: nn.Module) -> Coverage:
    """The sites of a model, and why which linears belong to none; ``ValueError`` if it has no site."""
    found = find_coverage(model)
    if not found.sites:
        raise ValueError(
            f"{type(model).__name__} has no site that can be counted; expected a language model with "
            f"linear layers. Not covered: {found.described() or 'nothing, it has no linear layer'}."
        )
    return found
