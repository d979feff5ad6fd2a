# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which activations of a model are measured, and by name what is not."""

from __future__ import annotations

import re

from torch import nn

from nvfp4_utils.hooks import SITES, find_sites
from studies.runs.quantized import LINEARS

Sites = tuple[str, ...]  # as ``capture`` and ``hooked`` take them


def kind_of(label: str) -> str:
    """``layers.3.mlp_input`` -> ``mlp_input``."""
    return label.rpartition(".")[2]


def layer_of(label: str) -> int | None:
    """``layers.3.mlp_input`` -> 3; None outside the layers."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", label)
    return int(found[1]) if found else None


def coverage(model: nn.Module) -> tuple[Sites, dict[str, list[str]], list[str]]:
    """What to capture of a model, the linears that read each site, and what no measured site feeds.

    The last holds the names of every ``nn.Linear`` but the head and of every parameter of three
    dimensions, which is how fused experts are stored, that are not among the second.

    Raises
    ------
    ValueError
        If the model has no site that is known at all.
    """
    kinds: list[str] = []
    readers: dict[str, list[str]] = {}
    for kind in SITES:
        try:
            readers |= {label: [] for label in find_sites(model, [kind])}
        except ValueError:
            continue
        kinds.append(kind)
    if not kinds:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"{type(model).__name__} has no site that is known; expected decoder layers with "
            f"{', '.join(SITES)}. Its linears are named {linears[:4]}."
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            readers.get(_site_or_none(name) or "", left).append(name)
        elif not isinstance(module, nn.Conv1d):
            own = module.named_parameters(prefix=name, recurse=False)
            left += [path for path, parameter in own if parameter.ndim == 3]
    return tuple(kinds), readers, left


def _site_or_none(linear: str) -> str | None:
    for kind, pattern in LINEARS.items():
        match = re.fullmatch(rf"(?:.*\.)?layers\.(\d+)\.(?:{pattern})", linear)
        if match:
            return f"layers.{match[1]}.{kind}"
    return None
