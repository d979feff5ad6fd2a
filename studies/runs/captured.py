# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The sites of a model that a run holds, and the passes that count what is seen at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch

from nvfp4_utils.hooks import SITES, capture, find_sites, hooked
from nvfp4_utils.statistics import SiteStatistics

WANTED = tuple(SITES)  # of every layer
Callback = Callable[[str, torch.Tensor], None]


def labels(model) -> list[str]:
    """Every site's label, ``layers.<i>.<kind>``, in module order."""
    return list(find_sites(model, WANTED))


def count(
    model, batches: Iterable, group: int, callbacks: Sequence[Callback] = ()
) -> dict[str, SiteStatistics]:
    """Statistics of every site, with other callbacks fed by the same forward passes."""
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(hooked(model, WANTED, callback))
        return capture(model, batches, WANTED, group_size=group)


def follow(model, batches: Iterable[torch.Tensor], callback: Callback) -> None:
    """Run batches of int64 tokens for a callback alone."""
    device = next(model.parameters()).device
    with torch.inference_mode(), hooked(model, WANTED, callback):
        for batch in batches:
            getattr(model, "model", model)(input_ids=batch.to(device))
