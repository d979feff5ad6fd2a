# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The joint histogram of bfloat16 on a CUDA device, as a table; see ``histogram`` for what it holds.

``block_codes`` is the one pass that reads the tensor in order. The pairs are then counted by CUDA
kernels in shared memory or, where those cannot be compiled, by a Triton kernel with atomics in
global memory; the two Triton kernels also run in Triton's interpreter, under the CPU tests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import COLUMNS, INFINITY, MAX_ROWS, cuda

# A window of codes is {FLIP - lowest, highest} on the device: both are maxima over blocks, which start
# at the 0 of a cleared report. ``Status`` and ``JointTable`` are where Python turns it round.
FLIP = tl.constexpr(0x7FFF)
STATUS = 5  # numbers of a report that the host reads
LIST = STATUS + MAX_ROWS  # where a report's list begins; before it is room for the kernels' work
REPORT = 2**16  # numbers of a report
LISTED = REPORT - LIST  # blocks without a place that it can list


@triton.jit
def _raise(ptr, value):
    if value > tl.load(ptr):
        tl.atomic_max(ptr, value)


@triton.jit
def _extremes(words):
    """Largest code of two a word, and the smallest that is not 0, less 1, as unsigned numbers."""
    low, high = words & 0x7FFF, (words >> 16) & 0x7FFF
    # As an unsigned number, 0 - 1 is the largest: zeros do not count.
    below_low, below_high = (low - 1).to(tl.uint32, bitcast=True), (high - 1).to(tl.uint32, bitcast=True)
    return tl.maximum(low, high), tl.minimum(below_low, below_high)


@triton.jit(do_not_specialize=["base", "rows"])  # they vary: no compilation in the middle of a run
def _block_codes_kernel(
    x_ptr, codes_ptr, status_ptr, n_blocks, n_codes, base, rows,
    COLUMNS: tl.constexpr, LIST: tl.constexpr, LISTED: tl.constexpr,
    BLOCKS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    below = tl.zeros((BLOCKS,), tl.int32)
    highest = tl.zeros((BLOCKS,), tl.int32)
    zeros = tl.zeros((BLOCKS,), tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(n_codes, BLOCKS), tl.num_programs(0)):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < n_blocks
        # Two loads of 16 bytes give a thread a whole block.
        offset = block.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS // 2)[None, :]
        first = tl.load(x_ptr + offset, mask=inside[:, None], other=0)
        second = tl.load(x_ptr + offset + WORDS // 2, mask=inside[:, None], other=0)
        largest, smallest = _extremes(first)
        largest_2, smallest_2 = _extremes(second)
        amax = tl.max(tl.maximum(largest, largest_2), axis=1)
        smallest = tl.min(tl.minimum(smallest, smallest_2), axis=1).to(tl.int32, bitcast=True)
        zero = amax == 0
        placed = (amax - smallest <= COLUMNS - 1) & (amax >= base) & (amax < base + rows) & (amax > 0)
        code = tl.where(placed | zero, amax, amax - 0x8000)
        tl.store(codes_ptr + block, code.to(tl.int16), mask=block < n_codes)
        below = tl.maximum(below, tl.where(zero, 0, FLIP - amax))
        highest = tl.maximum(highest, amax)
        zeros += (zero & inside).to(tl.int32)
        left = code < 0
        if tl.max(left.to(tl.int32), axis=0) > 0:
            at = tl.atomic_add(status_ptr + 3 + tl.zeros((BLOCKS,), tl.int32), 1, mask=left)
            tl.store(status_ptr + LIST + at, block, mask=left & (at < LISTED))
    # A program has nothing to add to what others have reported, as a rule: no queue forms.
    _raise(status_ptr, tl.max(below, axis=0))
    _raise(status_ptr + 1, tl.max(highest, axis=0))
    if tl.max(zeros, axis=0) > 0:
        tl.atomic_add(status_ptr + 2, tl.sum(zeros, axis=0))


@triton.jit
def _count_pairs_kernel(
    x_ptr, codes_ptr, window_ptr, table_ptr, n_blocks, rows,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    code = tl.load(codes_ptr + block, mask=block < n_blocks, other=0).to(tl.int32)[:, None]
    offset = block.to(tl.int64)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    element = tl.load(x_ptr + offset, mask=code > 0, other=0).to(tl.int32) & 0x7FFF
    column = tl.where(element == 0, 0, element - code + COLUMNS - 1)
    row = code - (FLIP - tl.load(window_ptr))
    inside = (code > 0) & (row < rows)
    cell = row.to(tl.int64) * COLUMNS + column
    one = tl.full((BLOCKS, SIZE), 1, tl.int32)
    tl.atomic_add(table_ptr + cell, one, mask=tl.broadcast_to(inside, (BLOCKS, SIZE)))


@dataclass
class Status:
    """What the kernels saw."""

    lowest: int  # of the codes that are not 0
    highest: int
    zeros: int  # blocks of zeros
    unplaced: int  # blocks that have no place
    cells: int  # nonzero ones of the table, once counted

    @property
    def bad(self) -> bool:
        """NaN or infinity was seen."""
        return self.highest >= INFINITY

    @classmethod
    def read(cls, status: list[int]) -> Status:
        """From the first ``STATUS`` numbers of a report."""
        below, *others = status
        return cls(FLIP.value - below, *others)


def new_reports(n: int, device: torch.device) -> torch.Tensor:
    """Cleared reports, int32 [n, REPORT]: a status, room to work in, a list of blocks."""
    return torch.zeros(n, REPORT, dtype=torch.int32, device=device)


def block_codes(
    blocks: torch.Tensor, report: torch.Tensor, base: int = 1, rows: int = INFINITY - 1
) -> torch.Tensor:
    """Each block's amax code; what else is found goes to a cleared report. Neither is waited for.

    ``blocks``: int16 [n, 16], bits of bfloat16. Codes: int16, padded with 0 to a multiple of 8; 0
    is a block of zeros, and a block without a place in the window has the sign bit set.
    """
    n = len(blocks)
    padded = triton.cdiv(n, 8) * 8
    codes = torch.empty(padded, dtype=torch.int16, device=blocks.device)
    programs = triton.cdiv(padded, 4 * 256)
    if blocks.is_cuda:
        programs = min(programs, 32 * cuda.processors(blocks.get_device()))
    _block_codes_kernel[(programs,)](
        blocks.view(torch.int32), codes, report, n, padded, base, rows,
        COLUMNS=COLUMNS, LIST=LIST, LISTED=LISTED, BLOCKS=256, WORDS=blocks.shape[1] // 2, num_warps=8,
    )  # fmt: skip
    return codes


def count_pairs_triton(blocks, codes, window, table, _) -> None:
    """Add the pairs of blocks with a positive code to ``table``, as ``cuda.count_pairs``."""
    _count_pairs_kernel[(triton.cdiv(len(blocks), 128),)](
        blocks, codes, window, table, len(blocks), len(table),
        COLUMNS=COLUMNS, BLOCKS=128, SIZE=blocks.shape[1], num_warps=4,
    )  # fmt: skip


def unplaced_blocks(blocks: torch.Tensor, codes: torch.Tensor, report: torch.Tensor, unplaced: int):
    """The blocks [unplaced, 16] that have no place; ``report`` is the one on the device."""
    if unplaced <= LISTED:
        return blocks[report[LIST : LIST + unplaced]]
    return blocks[codes[: len(blocks)] < 0]


@functools.lru_cache(maxsize=4096)  # making one costs the host as much as a kernel
def _window(base: int, rows: int, device: torch.device) -> torch.Tensor:
    """The codes ``[base, base + rows)`` as the kernels report and take them."""
    window = torch.tensor([FLIP.value - base, base + rows - 1], dtype=torch.int32)
    return window.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else window


class JointTable:
    """Counts of (block amax code, element code) over a window of amax codes, on the device.

    ``window``: int32 on the device, begins with what ``_window`` gives or ``block_codes`` reports; at
    most ``rows`` codes.
    """

    def __init__(self, window: torch.Tensor, rows: int, count_pairs=None):
        self.window = window
        self.counts = torch.zeros(rows, COLUMNS, dtype=torch.int32, device=window.device)
        self.cuda = cuda.available(window.device)
        self.count_pairs = count_pairs or (cuda.count_pairs if self.cuda else count_pairs_triton)

    @classmethod
    def of(cls, base: int, rows: int, device: torch.device, count_pairs=None) -> JointTable:
        """A table of ``[base, base + rows)``."""
        return cls(_window(base, rows, device), rows, count_pairs)

    def add(self, blocks: torch.Tensor, codes: torch.Tensor, report: torch.Tensor) -> None:
        """Count the blocks [n, 16] that have a place; ``block_codes`` made codes and report."""
        self.count_pairs(blocks, codes, self.window, self.counts, report[STATUS:])

    def measure(self, report: torch.Tensor) -> None:
        """Write the number of nonzero cells to ``report``; ``sparse`` needs it."""
        if self.cuda:
            self.ends = cuda.count_cells(self.counts, self.window, report[STATUS - 1 :])

    @property
    def base(self) -> int:
        """The code of the first row; waits for the device."""
        return FLIP.value - int(self.window[0])

    def sparse(self, cells: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Sorted keys and their counts, int64 [cells]; None where there is no CUDA kernel for it."""
        return cuda.list_cells(self.counts, self.window, self.ends, cells) if self.cuda else None
