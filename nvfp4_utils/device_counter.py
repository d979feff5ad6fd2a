# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Counting a site's activations while a model runs, without making the host wait for the device.

A statistic's sparse form has a size only the device knows, so ``ActivationStatistics.update`` waits
for it. A ``DeviceCounter`` adds to one dense table instead, and reads what the kernels report about
a tensor some tensors later, when it has long arrived.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

import torch

from .histogram import CODE_BITS, add_rest, count_nonfinite, count_sorted, merge_counts, sparse_of
from .kernels import INFINITY, MAX_ROWS
from .kernels.joint_table import (
    STATUS,
    JointTable,
    Status,
    block_codes,
    new_reports,
    unplaced_blocks,
)
from .mover import Mover
from .quantize import BLOCK_SIZE, check_tensor, naming, nonfinite_error
from .statistics import ActivationStatistics

ONE, OCTAVE = 0x3F80, 128  # the bfloat16 code of 1.0, and how many codes an octave has
ROOM_BELOW, ROOM_ABOVE = 2 * OCTAVE, 2 * OCTAVE  # of a table's window around its first tensor
TOGETHER = 4  # reports that are cleared, and sent to the host, in one go
MAX_ELEMENTS = 2**31 - 1  # counted into a table, whose counts have 32 bits


class Reports:
    """What the kernels report of the tensors that counters count, and those tensors until then.

    Reports travel to the host ``TOGETHER`` at a time, and are read when the next but one are sent.
    """

    def __init__(self) -> None:
        self.mover = Mover()
        self.sent: deque = deque()
        self.rows: Any = None  # a tensor of the reports that are not sent yet
        self.entries: list[tuple] = []  # counter and its tensors, one a row

    def new(self, device: torch.device) -> torch.Tensor:
        """A cleared report; ``append`` follows."""
        if self.rows is not None and self.rows.device != device:
            self._send()
        if self.rows is None:
            self.rows = new_reports(TOGETHER, device)
        return self.rows[len(self.entries)]

    def append(self, counter: DeviceCounter, *tensors) -> None:
        """Keep what ``counter.read_report`` will need."""
        counter.unread += 1
        self.entries.append((counter, *tensors))
        if len(self.entries) == TOGETHER:
            self._send()

    def settle(self, counter: DeviceCounter | None = None) -> None:
        """Read what has long arrived, or all that a counter waits for."""
        while len(self.sent) > 2 or (counter is not None and counter.unread):
            self._read()

    def _send(self) -> None:
        self.sent.append((self.entries, _to_host(self.rows)))
        self.rows, self.entries = None, []

    def _read(self) -> None:
        if not self.sent:
            self._send()
        entries, seen = self.sent.popleft()
        for (counter, *tensors), status in zip(entries, _arrived(seen), strict=False):
            counter.unread -= 1
            counter.read_report(status, *tensors)


class DeviceCounter:
    """One statistic of bfloat16 tensors on a CUDA device; the host waits for nothing but ``finish``.

    Counts are in a dense table until ``close``. ``reports``, which counters share, keeps a tensor
    until its report has arrived; NaN and infinity raise then. ``window`` (base, rows) is the
    table's range of block amax codes; without one, the first tensor is counted when its own range
    has arrived, so a model must not overwrite that tensor by means PyTorch does not see. Blocks
    without a place in the table are kept, and counted by ``finish``.
    """

    label = ""  # of the site, for errors

    def __init__(self, reports: Reports, window: tuple[int, int] | None = None):
        self.reports = reports
        self.unread = 0  # reports
        self.window = window
        self.next_window = window  # for the next table: holds what this one had no place for
        self.low, self.high = INFINITY, 0  # block amax codes seen, without zero
        self.table: JointTable | None = None
        self.cells: tuple | None = None  # report of a closed table
        self.rest: list[torch.Tensor] = []
        self.elements = self.zero_blocks = 0
        self.statistics = ActivationStatistics()
        self.leaving: Future | None = None  # of a statistic that is on its way to the host

    def add(self, x: torch.Tensor, keep: torch.Tensor | None, padding: int) -> torch.Tensor:
        """Count ``x`` [sequences, tokens, ...] where ``keep``; returns each sequence's amax.

        ``padding``: tokens that ``keep`` leaves out, known on the host.
        """
        with naming(self.label):
            check_tensor(x)
        if x.numel() > MAX_ELEMENTS:
            raise ValueError(
                f"{self.label or 'an activation'} has {x.numel()} elements; expected at most "
                f"{MAX_ELEMENTS}. Use smaller batches."
            )
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
            self.zero_blocks -= padding * x.shape[-1] // BLOCK_SIZE  # counted with the others
        blocks = x.detach().contiguous().view(torch.int16).view(-1, BLOCK_SIZE)
        if blocks.data_ptr() % 16:
            blocks = blocks.clone()
        if self.window is None:
            self.reports.settle(self)
        codes = self._count(blocks)
        self.reports.settle()
        # The largest magnitude, whatever the sign bits of the codes say.
        amaxes = codes[: len(blocks)].view(torch.bfloat16).view(len(x), -1)
        return torch.linalg.vector_norm(amaxes, torch.inf, dim=1)

    def _count(self, blocks: torch.Tensor) -> torch.Tensor:
        """Launch the kernels; with no window yet, only those that find it."""
        with torch.cuda.device(blocks.device):
            report = self.reports.new(blocks.device)
            if self.window is None:
                codes = block_codes(blocks, report)
            else:
                if self.elements + blocks.numel() > MAX_ELEMENTS:
                    self.flush()
                if self.table is None:
                    self.table = JointTable.of(*self.window, blocks.device)
                codes = block_codes(blocks, report, *self.window)
                self.table.add(blocks, codes, report)
                self.elements += blocks.numel()
            self.reports.append(self, blocks, _version(blocks), codes, report, self.window)
        return codes

    def read_report(self, status: Status, blocks, version, codes, report, window) -> None:
        """Deal with what the kernels could not count."""
        if (status.bad or status.unplaced or window is None) and _version(blocks) != version:
            raise RuntimeError(
                f"the model overwrote {self.label or 'an activation'} in place before it was counted. "
                "Capture the input of an earlier module instead."
            )
        if status.bad:
            with naming(self.label):
                raise nonfinite_error(count_nonfinite(blocks, torch.bfloat16))
        if status.highest:
            self.low, self.high = min(self.low, status.lowest), max(self.high, status.highest)
        if window is None:
            around = (self.low, self.high) if self.high else (ONE, ONE)
            self.window = self.next_window = window_around(*around)
            self._count(blocks)
            return
        self.zero_blocks += status.zeros
        if status.unplaced:
            self.rest.append(unplaced_blocks(blocks, codes, report, status.unplaced))
            self.next_window = window_around(self.low, self.high)

    def close(self) -> None:
        """Nothing comes after; what ``flush`` needs is under way."""
        if self.window is None:
            self.reports.settle(self)
        if self.table is not None:
            report = self.table.window.new_zeros(1, STATUS)
            with torch.cuda.device(report.device):
                self.table.measure(report[0])
            self.cells = _to_host(report)

    @property
    def table_bytes(self) -> int:
        """Device memory of the table."""
        return 0 if self.table is None else self.table.counts.nbytes

    def flush(self) -> None:
        """Move the counts of the table to the sparse statistic; frees the table."""
        if self.table is None:
            return
        if self.cells is None:
            self.close()
        with torch.cuda.device(self.table.window.device):
            (status,) = _arrived(self.cells)
            found = sparse_of(self.table, status.cells)
        self.statistics.merge(ActivationStatistics(torch.bfloat16, *found))
        self.table = self.cells = None
        self.elements = 0

    def leave_device(self) -> None:
        """Begin to move the statistic to the host's memory; nobody waits but ``finish``."""
        if self.statistics.keys.is_cuda:  # else nothing was counted
            self.leaving = self.reports.mover.move(self.statistics)
            self.statistics = ActivationStatistics()

    def finish(self) -> ActivationStatistics:
        """The statistic; waits for the device."""
        self.reports.settle(self)
        self.flush()
        if self.leaving is not None:
            self.statistics = self.statistics.merge(self.leaving.result())
        if self.rest and self.window is not None:
            self._add_rest(torch.cat(self.rest), *self.window)
        if self.zero_blocks:
            keys, counts = self.statistics.keys, self.statistics.counts
            found = add_rest(keys, counts, self.zero_blocks, keys.new_empty(0, BLOCK_SIZE))
            self.statistics = ActivationStatistics(torch.bfloat16, *found)
        return self.statistics if len(self.statistics.keys) else ActivationStatistics()

    def _add_rest(self, blocks: torch.Tensor, base: int, rows: int) -> None:
        """Count blocks that had no place: most lie before or after all that had one."""
        found = torch.stack(count_sorted(blocks.cpu() & 0x7FFF))
        edges = torch.tensor([base << CODE_BITS, (base + rows) << CODE_BITS])
        low, high = torch.searchsorted(found[0], edges).tolist()
        known = torch.stack([self.statistics.keys, self.statistics.counts])
        found = found.to(known.device)
        keys, counts = torch.cat([found[:, :low], known, found[:, high:]], dim=1)
        keys, counts = merge_counts(keys, counts, *found[:, low:high])
        self.statistics = ActivationStatistics(torch.bfloat16, keys, counts)


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference tensors do not count their writes


def _arrived(seen) -> list[Status]:
    numbers, ready = seen
    ready.synchronize()
    return [Status.read(row) for row in numbers.tolist()]


def _to_host(reports: torch.Tensor):
    """A copy of the reports' statuses that is under way to the host, and the event that ends it."""
    numbers = torch.empty(len(reports), STATUS, dtype=reports.dtype, pin_memory=True)
    with torch.cuda.device(reports.device):  # a model may be spread over several
        numbers.copy_(reports[:, :STATUS], non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    return numbers, ready


def window_around(low: int, high: int) -> tuple[int, int]:
    """Base and rows of a table's window with room on both sides, cut at its low end if too wide."""
    top = min(high + ROOM_ABOVE, INFINITY - 1)
    base = max(low - ROOM_BELOW, top - MAX_ROWS + 1, 1)
    return base, top - base + 1
