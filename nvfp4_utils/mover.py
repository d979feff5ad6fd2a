# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Moving statistics from a CUDA device to the host while a model runs."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .statistics import ActivationStatistics

MOVING_BYTES = 2**31  # of statistics on their way, at most


class Mover:
    """Moves statistics in a thread of its own, through pinned memory and on a stream of its own.

    Most of what a move costs is the host's first touch of so much memory, for which the thread that
    launches the model's kernels would wait. On the way both numbers of a pair have 32 bits if they fit.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.moves: deque[tuple[Future, int]] = deque()
        self.bytes = 0  # of these moves
        self.stream: Any = None
        self.pinned = torch.zeros(0, dtype=torch.uint8)

    def move(self, statistics: ActivationStatistics) -> Future:
        """The statistic on the host, once it is there; waits while ``MOVING_BYTES`` are on their way."""
        with torch.cuda.device(statistics.keys.device):
            made = torch.cuda.Event()
            made.record()
        move = self.pool.submit(self._move, statistics, made)
        self.moves.append((move, statistics.nbytes))
        self.bytes += statistics.nbytes
        while self.moves and (self.bytes > MOVING_BYTES or self.moves[0][0].done()):
            oldest, size = self.moves.popleft()
            oldest.result()
            self.bytes -= size
        return move

    def _move(self, statistics: ActivationStatistics, made: Any) -> ActivationStatistics:
        device = statistics.keys.device
        with torch.inference_mode(False), torch.cuda.device(device):
            if self.stream is None or self.stream.device != device:
                self.stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(made)
                pairs = torch.stack([statistics.keys, statistics.counts])
                if int(pairs.max()) < 2**31:
                    pairs = pairs.to(torch.int32)
                if self.pinned.nbytes < pairs.nbytes:
                    self.pinned = torch.empty(2 * pairs.nbytes, dtype=torch.uint8, pin_memory=True)
                arrived = self.pinned[: pairs.nbytes].view(pairs.dtype).view(pairs.shape)
                arrived.copy_(pairs, non_blocking=True)
                self.stream.synchronize()
        return ActivationStatistics(statistics.dtype, *arrived.to(torch.int64, copy=True))
