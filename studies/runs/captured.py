# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The passes of a run that count what is seen at the sites of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch

from nvfp4_utils.forward import entry_of
from nvfp4_utils.hooks import capture, hooked
from nvfp4_utils.sites import Site
from nvfp4_utils.statistics import SiteStatistics

Callback = Callable[[str, torch.Tensor], None]


def _by_sequence(sites: dict[str, Site]) -> dict[str, Site]:
    """Without experts that are modules, whose tokens belong to no known sequence."""
    return {label: site for label, site in sites.items() if site.form != "routed"}


def count(
    model,
    sites: dict[str, Site],
    batches: Iterable,
    group: int,
    callbacks: Sequence[Callback] = (),
) -> dict[str, SiteStatistics]:
    """Statistics of every site, with other callbacks fed by the same forward passes."""
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(hooked(model, _by_sequence(sites), callback))
        return capture(model, batches, sites, group_size=group)


def follow(model, sites: dict[str, Site], batches: Iterable[torch.Tensor], callback: Callback) -> None:
    """Run batches of int64 tokens for a callback alone."""
    device = next(model.parameters()).device
    with torch.inference_mode(), hooked(model, _by_sequence(sites), callback):
        for batch in batches:
            entry_of(model)(input_ids=batch.to(device))
