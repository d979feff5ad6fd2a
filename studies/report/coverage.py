# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which activations of a model are measured, and by name what is not."""

from __future__ import annotations

from torch import nn

from nvfp4_utils.hooks import SITES, find_sites
from studies.runs.quantized import site_of


def coverage(model: nn.Module) -> tuple[tuple[str, ...], list[str]]:
    """The kinds of site that the model has, and the names of what no measured site feeds.

    The second holds every ``nn.Linear`` but the head and every parameter of three dimensions, which is
    how fused experts are stored.

    Raises
    ------
    ValueError
        If the model has no site that is known at all.
    """
    kinds, labels = [], set()
    for kind in SITES:
        try:
            labels |= set(find_sites(model, [kind]))
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
    left = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            try:
                known = site_of(name) in labels
            except ValueError:
                known = False
            left += [] if known else [name]
        elif not isinstance(module, nn.Conv1d):
            own = module.named_parameters(prefix=name, recurse=False)
            left += [path for path, parameter in own if parameter.ndim == 3]
    return tuple(kinds), left
