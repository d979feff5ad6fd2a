# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The joint histogram of (block amax code, element code), counted in a dense table.

A code is a 16-bit float without its sign. A table has one row a block-amax code, over a window
``[base, base + rows)`` of codes, and one column a distance of the element's code below its block's;
column 0 counts zeros. A block has a place in the table if its amax code lies in the window and its
nonzero elements in the columns' octaves below it. In activations nearly every block does; the few
others are counted by sorting.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch

from . import kernels
from .quantize import BLOCK_SIZE, check_tensor, nonfinite_error

CODE_BITS = 15
INFINITY_CODE = {torch.bfloat16: kernels.INFINITY, torch.float16: 0x7C00}
COLUMNS = {torch.bfloat16: kernels.COLUMNS, torch.float16: 16384}  # float16: 16 octaves
MAX_CELLS = 2**26  # of one table: 256 MiB
MIN_CELLS = 2**18  # up to here, or four cells an element, a table costs less than sorting
MAX_BLOCKS = 2**26  # counted into one table, so that no 32-bit count overflows
BLOCKS_AT_ONCE = 16000  # of a CPU thread: their codes and cell numbers stay in its cache


def codes_to_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Magnitudes, float64, of sign-free 16-bit float codes."""
    return codes.to(torch.int16).view(dtype).to(torch.float64)


def sum_by_key(keys: torch.Tensor, counts: torch.Tensor):
    """Sorted distinct keys, and the sum of each one's counts."""
    distinct, where = torch.unique(keys, return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, where, counts)


def sum_by_code(codes: torch.Tensor, counts: torch.Tensor):
    """``sum_by_key`` of keys that are codes."""
    total = torch.zeros(2**CODE_BITS, dtype=torch.int64, device=codes.device)
    total.index_add_(0, codes, counts)
    distinct = total.nonzero().view(-1)
    return distinct, total[distinct]


def merge_counts(keys_a, counts_a, keys_b, counts_b):
    """Sum two sparse histograms whose keys are sorted and distinct."""
    if len(keys_a) < len(keys_b):
        keys_a, counts_a, keys_b, counts_b = keys_b, counts_b, keys_a, counts_a
    if not len(keys_b):
        return keys_a, counts_a
    at = torch.searchsorted(keys_a, keys_b)
    known = at.clamp(max=len(keys_a) - 1)
    new = keys_a[known] != keys_b
    counts_a = counts_a.index_add(0, known, torch.where(new, 0, counts_b))
    new = new.nonzero().squeeze(1)  # the one place where the host waits for a device
    place = at[new] + torch.arange(len(new), device=at.device)
    size = len(keys_a) + len(new)
    old = torch.ones(size, dtype=torch.bool, device=at.device)
    old[place] = False
    merged = []
    for a, b in ((keys_a, keys_b), (counts_a, counts_b)):
        both = torch.empty(size, dtype=torch.int64, device=at.device).masked_scatter_(old, a)
        both[place] = b[new]
        merged.append(both)
    return merged[0], merged[1]


def joint_histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted keys ``block_amax_code << 15 | element_code`` (int64) and their counts (int64).

    ``x``: bfloat16 or float16 ``[..., 16 k]``. bfloat16 on a CUDA device takes
    ``kernels.joint_table``.

    Raises
    ------
    TypeError
        For another dtype.
    ValueError
        For a last dimension that is not a multiple of 16, NaN or infinity.
    """
    if x.dtype not in INFINITY_CODE:
        raise TypeError(
            f"x has dtype {str(x.dtype).removeprefix('torch.')}; expected bfloat16 or float16: the "
            "joint histogram counts 16-bit codes. Cast with x.to(torch.bfloat16), which is what a "
            "bfloat16 model feeds its quantizers."
        )
    check_tensor(x)
    # Threads do not inherit the caller's inference mode; tensors made in it could not be written there.
    with torch.inference_mode(False):
        return _joint_histogram(x.detach())


def _joint_histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.contiguous().view(torch.int16).view(-1, BLOCK_SIZE)
    count = count_on_device if x.is_cuda and x.dtype == torch.bfloat16 else count_on_cpu
    keys = counts = torch.zeros(0, dtype=torch.int64, device=x.device)
    for part in blocks.split(MAX_BLOCKS):
        keys, counts = merge_counts(keys, counts, *count(part, x.dtype))
    return keys, counts


def count_nonfinite(blocks: torch.Tensor, dtype: torch.dtype) -> int:
    """How many values are NaN or infinite."""
    return int(((blocks & 0x7FFF) >= INFINITY_CODE[dtype]).sum())


def table_to_sparse(table: torch.Tensor, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted keys and counts of a table [rows, columns] whose first row is code ``base``."""
    flat, columns = table.view(-1), table.shape[1]
    cells = flat.nonzero().view(-1)
    row = cells >> (columns.bit_length() - 1)  # a power of two
    # block << 15 | element, with block = base + row and element = block - (columns - 1) + column.
    keys = row * ((1 << CODE_BITS) + 1 - columns)
    keys += cells
    keys += base * ((1 << CODE_BITS) + 1) - (columns - 1)
    zeros = ((cells & (columns - 1)) == 0).nonzero()
    keys[zeros] = (row[zeros] + base) << CODE_BITS
    return keys, flat[cells].to(torch.int64)


def add_rest(keys, counts, zero_blocks: int, rest: torch.Tensor):
    """Add what a table does not hold: blocks of zeros, and blocks [n, 16] without a place."""
    if zero_blocks:
        zeros = torch.tensor([BLOCK_SIZE * zero_blocks], device=keys.device)
        keys = torch.cat([torch.zeros_like(zeros), keys])
        counts = torch.cat([zeros, counts])
    if len(rest):
        keys, counts = merge_counts(keys, counts, *count_sorted(rest & 0x7FFF))
    return keys, counts


def count_sorted(codes: torch.Tensor):
    """The joint histogram of codes [n, 16], by sorting them."""
    keys = counts = torch.zeros(0, dtype=torch.int64, device=codes.device)
    for part in codes.split(2**18):
        joint = (part.amax(dim=1).to(torch.int64) << CODE_BITS)[:, None] | part
        keys, counts = merge_counts(keys, counts, *torch.unique(joint, return_counts=True))
    return keys, counts


def count_on_cpu(blocks: torch.Tensor, dtype: torch.dtype):
    """The joint histogram with PyTorch operations, on as many CPU threads as PyTorch has."""
    threads = 1 if blocks.is_cuda or len(blocks) < 4 * BLOCKS_AT_ONCE else torch.get_num_threads()
    at_once = 2**18 if blocks.is_cuda else BLOCKS_AT_ONCE
    amax = torch.empty(len(blocks), dtype=torch.int16, device=blocks.device)

    def find_amax(part: torch.Tensor, amax: torch.Tensor) -> int:
        smallest = 0x7FFF
        for some, out in zip(part.split(at_once), amax.split(at_once), strict=True):
            codes = some & 0x7FFF
            torch.amax(codes, dim=1, out=out)
            smallest = min(smallest, int((codes.sub_(1) & 0x7FFF).min()) + 1)
        return smallest

    with ThreadPoolExecutor(threads) as pool:
        smallest = min(pool.map(find_amax, blocks.chunk(threads), amax.chunk(threads)))
        highest = int(amax.max())
        if highest >= INFINITY_CODE[dtype]:
            raise nonfinite_error(count_nonfinite(blocks, dtype))
        lowest = int(torch.where(amax == 0, 0x7FFF, amax).min())
        columns = COLUMNS[dtype]
        rows = min(max(highest - lowest + 1, 0), MAX_CELLS // columns)
        if rows * columns > max(MIN_CELLS, 4 * blocks.numel()):
            rows = 0
        base = highest - rows + 1
        all_placed = base <= lowest and highest - smallest < columns - 1

        def count(part: torch.Tensor, amax: torch.Tensor):
            # One row more than the window's is for blocks that have no place in it.
            table = torch.zeros((rows + 1) * columns, dtype=torch.int32, device=part.device)
            one = torch.ones(1, dtype=torch.int32, device=part.device)
            rest = []
            for some, code in zip(part.split(at_once), amax.split(at_once), strict=True):
                codes, code = some & 0x7FFF, code.to(torch.int32)
                row = torch.where(code == 0, rows, code - base)
                if not all_placed:
                    least = ((codes - 1) & 0x7FFF).amin(dim=1) + 1
                    left = (code > 0) & ((code < base) | (code - least >= columns - 1))
                    rest.append(some[left])
                    row = torch.where(left, rows, row)
                start = (row * columns)[:, None]
                cell = torch.maximum(codes + (start + (columns - 1) - code[:, None]), start)
                cell = cell.view(-1).to(torch.int64)
                table.scatter_add_(0, cell, one.expand(len(cell)))
            return table[: rows * columns], torch.cat(rest or [part[:0]])

        tables, rests = zip(*pool.map(count, blocks.chunk(threads), amax.chunk(threads)), strict=True)
    for other in tables[1:]:
        tables[0].add_(other)
    table = tables[0].view(rows, columns)
    return add_rest(*table_to_sparse(table, base), int((amax == 0).sum()), torch.cat(rests))


def sparse_of(table, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted keys and counts of a ``kernels.joint_table.JointTable`` with that many nonzero cells."""
    return table.sparse(cells) or table_to_sparse(table.counts, table.base)


def count_on_device(blocks: torch.Tensor, dtype: torch.dtype, count_pairs=None):
    """``joint_histogram`` of int16 [n, 16], bits of bfloat16; waits for the device once.

    ``count_pairs`` names another kernel than the fastest that can run.
    """
    from .kernels import joint_table as device  # needs Triton

    if blocks.data_ptr() % 16:
        blocks = blocks.clone()  # they are read 16 bytes at a time
    with torch.cuda.device_of(blocks):
        (report,) = device.new_reports(1, blocks.device)
        codes = device.block_codes(blocks, report)
        table = device.JointTable(report, device.MAX_ROWS, count_pairs)
        table.add(blocks, codes, report)
        table.measure(report)
        status = device.Status.read(report[: device.STATUS].tolist())
        if status.bad:
            raise nonfinite_error(count_nonfinite(blocks, dtype))
        if status.highest - status.lowest >= device.MAX_ROWS:  # too wide for a table: its upper part
            window = status.highest - device.MAX_ROWS + 1, device.MAX_ROWS
            (report,) = device.new_reports(1, blocks.device)
            codes = device.block_codes(blocks, report, *window)
            table = device.JointTable.of(*window, blocks.device, count_pairs)
            table.add(blocks, codes, report)
            table.measure(report)
            status = device.Status.read(report[: device.STATUS].tolist())
        rest = device.unplaced_blocks(blocks, codes, report, status.unplaced)
        keys, counts = sparse_of(table, status.cells)
        return add_rest(keys, counts, status.zeros, rest)


def _rank(p: float, n: int) -> int:
    """The ``kthvalue`` rank of percentile ``p`` among ``n`` values, counted from 1."""
    if not 0 < p <= 100:
        raise ValueError(f"percentile is {p}; expected a percentage in (0, 100].")
    return max(1, min(n, round(p / 100 * n)))


class Marginals:
    """The two marginals of the joint histogram: what a calibration policy may look at.

    ``element_codes``/``element_counts``: distinct \\|x\\| codes and how many elements have each;
    ``block_codes``/``block_counts``: distinct block-amax codes and how many blocks have each. All
    int64 tensors, codes ascending.
    """

    def __init__(self, dtype, element_codes, element_counts, block_codes, block_counts):
        self.dtype = dtype
        self.element_codes, self.element_counts = element_codes, element_counts
        self.block_codes, self.block_counts = block_codes, block_counts

    @classmethod
    def of_blocks(cls, dtype, block_codes, block_counts, amax: float, signal_power: float) -> Marginals:
        """Of a tensor whose element marginal is not known, but its amax and mean square are."""
        nothing = torch.zeros(0, dtype=torch.int64)
        marginals = cls(dtype, nothing, nothing, block_codes, block_counts)
        known = {"amax": amax, "signal_power": signal_power}
        marginals.__dict__.update(known, count=BLOCK_SIZE * int(block_counts.sum()))
        return marginals

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return int(self.element_counts.sum())

    @cached_property
    def amax(self) -> float:
        """Largest magnitude."""
        return float(codes_to_values(self.element_codes[-1:], self.dtype)[0])

    @cached_property
    def signal_power(self) -> float:
        """Mean square of the elements, float64."""
        values = codes_to_values(self.element_codes, self.dtype)
        return float((values.square() * self.element_counts).sum()) / self.count

    def percentile(self, p: float) -> float:
        """Order statistic of \\|x\\| at ``p`` percent: rank ``max(1, min(n, round(p/100 n)))``."""
        return self._order_statistic(self.element_codes, self.element_counts, p)

    def block_amax_percentile(self, p: float, *, above: float | None = None) -> float:
        """Order statistic of the per-block amax at ``p`` percent.

        With ``above``, only blocks whose amax is greater are ranked (``above=0``: nonzero blocks).
        """
        codes, counts = self.block_codes, self.block_counts
        if above is not None:
            keep = codes_to_values(codes, self.dtype) > above
            codes, counts = codes[keep], counts[keep]
        return self._order_statistic(codes, counts, p)

    def _order_statistic(self, codes, counts, p: float) -> float:
        n = int(counts.sum())
        if n == 0:
            raise ValueError("no value is left to rank; expected at least one nonzero block.")
        at = torch.searchsorted(counts.cumsum(0), _rank(p, n))
        return float(codes_to_values(codes[at : at + 1], self.dtype)[0])
