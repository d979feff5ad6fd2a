# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What is counted while a model runs: a statistic for each site and group, and each sequence's amax."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .quantize import naming
from .sites import Site
from .statistics import ActivationStatistics, SiteStatistics

CLOSED_BYTES = 2**32  # of tables of complete groups that have not been turned sparse


class Counter:
    """One statistic, updated at once; bfloat16 on a CUDA device has ``DeviceCounter`` instead."""

    next_window = None
    table_bytes = 0
    label = ""  # of the site, for errors

    def __init__(self) -> None:
        self.statistics = ActivationStatistics()

    def add(self, x: torch.Tensor, keep: torch.Tensor | None, padding: int) -> torch.Tensor:
        """Count ``x`` [sequences, tokens, ...] where ``keep``; returns each sequence's amax."""
        rows = x if keep is None else x[keep]
        if rows.numel():
            with naming(self.label):
                self.statistics.update(rows)
        magnitude = x.abs() if keep is None else x.abs().masked_fill(~keep[..., None], 0)
        return magnitude.flatten(1).amax(dim=1)

    def close(self) -> None:
        """Nothing comes after."""

    def flush(self) -> None:
        """There is no table to turn sparse."""

    def finish(self) -> ActivationStatistics:
        """The statistic."""
        return self.statistics


class Counters:
    """Counters of every site and group, and the amax of every sequence, while a model runs."""

    room = math.inf  # bytes on the device for the statistics of complete groups

    def __init__(self, group_size: int, sites: Mapping[str, Site]) -> None:
        self.group_size = group_size
        self.found = sites
        self.sites: dict[str, list] = {label: [] for label in sites}  # a counter a group
        self.amaxes: dict[str, list[torch.Tensor]] = {label: [] for label in sites}
        self.experts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # their tokens and amaxes
        self.calls: dict[str, list[int]] = {}  # experts that ran in this forward
        self.reports: Any = None  # of all ``DeviceCounter``
        self.closed: deque = deque()  # counters of complete groups that still have a table
        self.closed_bytes = 0  # of these tables
        self.sparse_bytes = 0  # of statistics that were tables

    def add(self, label: str, x: torch.Tensor, first: int, keep, padding: list[int]) -> None:
        """Count ``x`` at a site; ``first``: sequences before it, ``padding``: rows each has."""
        counters = self.sites[label]
        start = 0
        while start < len(x):
            room = self.group_size - (first + start) % self.group_size
            part = slice(start, start + room)
            if (first + start) // self.group_size == len(counters):
                self._start_group(label, counters, x)
            mask = None if keep is None else keep[part]
            amax = counters[-1].add(x[part], mask, sum(padding[part]))
            self.amaxes[label].append(amax)
            start += room

    def add_routed(self, label: str, x: torch.Tensor, first: int, expert: int) -> None:
        """Count ``x`` [tokens, width], what one expert is given of sequences of one group."""
        self.calls.setdefault(label, []).append(expert)
        if not len(x):
            return
        counters = self.sites[label]
        if first // self.group_size == len(counters):
            self._start_group(label, counters, x)
        amax = counters[-1].add(x[None], None, 0)
        tokens, amaxes = self._experts(label, x)
        tokens[expert] += len(x)
        amaxes[expert] = torch.maximum(amaxes[expert], amax[0])

    def add_experts(self, label: str, x: torch.Tensor, keep, experts: torch.Tensor) -> None:
        """Note what each expert is given of ``x`` [sequences, rows, width]; ``experts`` [all rows]."""
        tokens, amaxes = self._experts(label, x)
        rows = x.abs().amax(dim=-1)
        kept = torch.ones_like(rows, dtype=torch.bool) if keep is None else keep
        tokens.scatter_add_(0, experts, kept.flatten().long())
        amaxes.scatter_reduce_(0, experts, rows.masked_fill(~kept, 0).flatten(), "amax")

    def _experts(self, label: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if label not in self.experts:
            n = self.found[label].experts
            self.experts[label] = x.new_zeros(n, dtype=torch.int64), x.new_zeros(n)
        return self.experts[label]

    def _start_group(self, label: str, counters: list, x: torch.Tensor) -> None:
        window = None
        if counters:
            self._close(counters[-1])
            window = counters[-1].next_window
        if x.is_cuda and x.dtype == torch.bfloat16:
            from .device_counter import DeviceCounter, Reports  # need Triton

            if self.reports is None:
                self.reports = Reports()
                self.room = torch.cuda.mem_get_info(x.device)[0] // 4
            counters.append(DeviceCounter(self.reports, window))
        else:
            counters.append(Counter())
        counters[-1].label = label

    def _close(self, counter) -> None:
        """Free tables once they take much memory: the oldest, whose counting has long ended."""
        counter.close()
        self.closed.append(counter)
        self.closed_bytes += counter.table_bytes
        while self.closed_bytes > CLOSED_BYTES:
            oldest = self.closed.popleft()
            self.closed_bytes -= oldest.table_bytes
            oldest.flush()
            self.sparse_bytes += oldest.statistics.nbytes
            if self.sparse_bytes > self.room:
                oldest.leave_device()

    def check(self, model: nn.Module, fed: int) -> None:
        """Refuse a site that has not seen every sequence once; done after every forward."""
        for label, site in self.found.items():
            seen = sum(map(len, self.amaxes[label]))
            calls = self.calls.get(label, [])
            if site.form == "routed":
                seen = fed if len(calls) == len(set(calls)) else 2 * fed
            if seen != fed:
                module = site.first[1]
                names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
                cause = (
                    f"Its module stands in several places, {' and '.join(names)}."
                    if len(names) > 1
                    else "Its module runs not once a forward, or another forward runs too."
                )
                raise ValueError(
                    f"{label} saw {seen} sequences of {fed}; expected each once. {cause} Leave this "
                    "site out."
                )
        self.calls.clear()

    def finish(self, label: str, fed: int) -> SiteStatistics:
        """The site's statistics; waits for the device."""
        counters = self.sites[label]
        counters[-1].close()
        amax = torch.full((fed,), torch.nan, dtype=torch.float64)
        if self.amaxes[label]:
            amax = torch.cat(self.amaxes[label]).to(torch.float64).cpu()
        tokens, amaxes = self.experts.get(label, (None, None))
        return SiteStatistics(
            self.group_size,
            [counter.finish() for counter in counters],
            amax,
            tokens if tokens is None else tokens.cpu(),
            amaxes if amaxes is None else amaxes.to(torch.float64).cpu(),
        )
