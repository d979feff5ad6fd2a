# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The launcher of joint_table.cu: what Triton has no way to say, atomics in shared memory.

Compiled at first use with NVRTC, through PyTorch. Blocks are counted by amax code (``count_rows``),
their numbers sorted by it (``sort_blocks``), and the pairs of one amax code counted in shared memory
before they reach the table (``count_pairs``): one row of it has 32 KiB, which shared memory holds,
all of it tens of megabytes. A block of 16 elements is one 32-byte sector, the smallest access to
memory, so blocks can be read in any order. ``count_cells`` and ``list_cells`` make the sparse form.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from . import COLUMNS, MAX_ROWS

SOURCE = Path(__file__).with_name("joint_table.cu")
FEW_BLOCKS = 256  # rows with fewer are added to the table directly: clearing bins would cost more
TILE = 4096  # blocks sorted at a time
SORT_THREADS, PAIR_THREADS, CELL_THREADS = 512, 512, 256
SORT_MEMORY = 12 * MAX_ROWS  # bytes beside the tile
SORT_PROGRAMS, PAIR_PROGRAMS = 2, 4  # a multiprocessor
AHEAD = 2  # blocks a thread reads before it counts them


def available(device: torch.device) -> bool:
    """Whether these kernels can be compiled for a device: NVIDIA, PyTorch 2.9 or later."""
    return device.type == "cuda" and bool(torch.version.cuda) and hasattr(torch.cuda, "_compile_kernel")


@functools.lru_cache
def _kernels(device: int) -> dict:
    """The compiled kernels by name."""
    constants = {"COLUMNS": COLUMNS, "MAX_ROWS": MAX_ROWS, "FEW": FEW_BLOCKS, "TILE": TILE,
                 "SORT_THREADS": SORT_THREADS, "PAIR_THREADS": PAIR_THREADS, "AHEAD": AHEAD}  # fmt: skip
    source = "".join(f"#define {k} {v}\n" for k, v in constants.items()) + SOURCE.read_text()
    names = ("count_rows", "sort_blocks", "count_pairs", "count_cells", "list_cells")
    with torch.cuda.device(device):
        kernels = {name: torch.cuda._compile_kernel(source, name) for name in names}
    kernels["sort_blocks"].set_shared_memory_config(SORT_MEMORY)
    return kernels


@functools.lru_cache
def _driver():
    return torch.cuda._utils._get_gpu_runtime_library()


def _stream(device: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


def _launch(
    name: str, programs: int, threads: int, args: list, stream: ctypes.c_void_p, memory: int = 0
) -> None:
    """Launch a kernel; a small part of what PyTorch's own launch costs the host."""
    n = len(args)
    values = (ctypes.c_int64 * n)(*[a if isinstance(a, int) else a.data_ptr() for a in args])
    first = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * n)(*range(first, first + 8 * n, 8))
    kernel = _kernels(args[0].get_device())[name].func
    shape = (programs, 1, 1, threads, 1, 1)
    error = _driver().cuLaunchKernel(kernel, *shape, memory, stream, pointers, None)
    if error:
        raise RuntimeError(f"CUDA kernel {name} was not launched: driver error {error}.")


@functools.lru_cache
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_pairs(
    blocks: torch.Tensor,
    codes: torch.Tensor,
    window: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Add the pairs of blocks with a positive code to ``table``; nothing waits for the host.

    ``blocks``: int16 [n, 16], bits of bfloat16, on a 16-byte boundary. ``codes``: int16, n rounded
    up to a multiple of 8. ``window``: int32, begins with ``0x7FFF - lowest`` and ``highest`` of the
    positive codes. ``table``: int32 [rows, COLUMNS], a row for each code in the window. ``counts``:
    int32 [MAX_ROWS] of zeros, to work in.
    """
    device, n, limit = blocks.get_device(), len(codes), len(table)
    stream = _stream(device)
    programs = SORT_PROGRAMS * processors(device)
    sizes = programs * MAX_ROWS, MAX_ROWS + 2, n  # one allocation: the host's time counts too
    work = torch.empty(sum(sizes), dtype=torch.int32, device=blocks.device)
    offsets, starts, order = work.split(sizes)
    found = [codes, n, window, limit, counts, offsets]
    _launch("count_rows", programs, SORT_THREADS, found, stream)
    _launch("sort_blocks", programs, SORT_THREADS, [*found, starts, order], stream, SORT_MEMORY)
    programs = PAIR_PROGRAMS * processors(device)
    sorted_blocks = [blocks, codes, order, counts, starts, window, limit, table]
    _launch("count_pairs", programs, PAIR_THREADS, sorted_blocks, stream)


def count_cells(table: torch.Tensor, window: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Where each row's nonzero cells end among all, int64 [rows]; adds their number to ``total``."""
    cells = torch.empty(len(table), dtype=torch.int64, device=table.device)
    stream = _stream(table.get_device())
    _launch("count_cells", len(table), CELL_THREADS, [table, window, cells, total], stream)
    return cells.cumsum(0)


def list_cells(table: torch.Tensor, window: torch.Tensor, ends: torch.Tensor, total: int):
    """Sorted keys and counts, int64 [total], of a table's nonzero cells."""
    keys, counts = torch.empty(2, total, dtype=torch.int64, device=table.device)
    stream = _stream(table.get_device())
    _launch("list_cells", len(table), CELL_THREADS, [table, ends, window, keys, counts], stream)
    return keys, counts
