# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The kernels beside a copy and their peers, and what two CPU cores do.

Device times are medians and 20th and 80th percentiles of ``triton.testing.do_bench``: events around
the call, caches cleared before it. Every kernel is first checked on data never seen before.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import numpy as np
import torch

from nvfp4_utils import policies
from nvfp4_utils.histogram import joint_histogram
from nvfp4_utils.quantize import (
    BLOCK_SIZE,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    fake_quantize,
    fake_quantize_reference,
    input_scale_from_amax,
)
from nvfp4_utils.statistics import ActivationStatistics

from .timing import GIB, KINDS, MIB, Table, device_times, fresh_seed, histogram_hash, host_times, make

CANDIDATES = 122  # of the oracle that is searched one candidate at a time: 81 + 41
SCALES = 1000


# -------------------------------------------------------------------------------------------- CPU


def statistic_of_many_pairs(device: str) -> ActivationStatistics:
    """At least 1.5 million distinct pairs: 2**22 values of the log-normal kind."""
    return ActivationStatistics.from_tensor(make("lognormal", 2**22, device, 0))


def time_questions(table: Table, device: str) -> None:
    """MSE at 1,000 scales and the oracle, from a statistic of many pairs."""
    statistic = statistic_of_many_pairs(device)
    pairs = len(statistic.keys)
    scales = input_scale_from_amax(statistic.amax * 2.0 ** np.linspace(-14, 14, SCALES))

    def again() -> ActivationStatistics:  # without what an earlier call has cached
        return ActivationStatistics(statistic.dtype, statistic.keys, statistic.counts)

    where = "cpu" if device == "cpu" else "cuda"
    table.add("mse", where, 0, host_times(lambda: again().mse(scales)), pairs=pairs)
    warm = again()
    warm.mse(scales[:2])
    table.add("mse_again", where, 0, host_times(lambda: warm.mse(scales)), pairs=pairs)
    table.add("oracle", where, 0, host_times(lambda: policies.oracle(again()), 3), pairs=pairs)


def run_cpu(commit: str | None) -> None:
    """What two CPU cores do."""
    table = Table()
    elements = 2**26
    for kind in KINDS:
        x = make(kind, elements, "cpu", fresh_seed())
        times = host_times(lambda x=x: ActivationStatistics.from_tensor(x), 5)
        keys, counts = joint_histogram(x)
        table.add("update", kind, 2 * elements, times, rate=elements / times[0] * 1e3,
                  pairs=len(keys), ok=int(counts.sum()) == elements)  # fmt: skip
    time_questions(table, "cpu")
    table.write("cpu", commit, threads=torch.get_num_threads(), elements=elements)


# ---------------------------------------------------------------------------------------- kernels


def peers() -> dict[str, Callable]:
    """Fake quantizers of other packages that are installed, as functions of (x, input_scale)."""
    found: dict[str, Callable] = {}
    try:
        from modelopt.torch.kernels.quantization.gemm import fp4_kernel_hopper

        def modelopt(x, g):
            return fp4_kernel_hopper.fp4_fake_quant_block(x, g * 2688)

        modelopt(torch.ones(16, 16, dtype=torch.bfloat16, device="cuda"), torch.ones((), device="cuda"))
        found["modelopt"] = modelopt
    except Exception as error:  # absent, or its compiler refuses this device
        print(f"skipped peer ModelOpt: {error!r}"[:200])
    return found


def equals_reference(x: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> bool:
    """Whether ``y`` is the reference's result to the bit, part by part."""
    parts = zip(x.reshape(-1, BLOCK_SIZE).split(2**22), y.view(-1, BLOCK_SIZE).split(2**22), strict=True)
    return all(
        torch.equal(
            fake_quantize_reference(a, g, "flush", a.dtype).view(torch.int16), b.view(torch.int16)
        )
        for a, b in parts
    )


def awkward() -> dict[str, torch.Tensor]:
    """Shapes that do not divide evenly, one row, three dimensions, strides."""
    x = make("gaussian", 2**23, "cuda", fresh_seed()).view(-1)
    return {
        "1823x4112": x[: 1823 * 4112].view(1823, 4112),
        "one row of 4096": x[:4096].view(1, 4096),
        "3-D 8x33x4096": x[: 8 * 33 * 4096].view(8, 33, 4096),
        "transposed 64x33x1024": x[: 64 * 33 * 1024].view(33, 64, 1024).transpose(0, 1),
    }


def time_fake_quantize(table: Table, case: str, x: torch.Tensor, others: dict[str, Callable]) -> None:
    """The kernel alone, the whole call, and peers, beside a copy of the same tensor."""
    from nvfp4_utils.kernels.fake_quantize import launch, new_flag

    g = input_scale_from_amax(torch.tensor(5.0)).cuda()
    size = 2 * x.numel()
    y, bad = torch.empty_like(x), new_flag(x)
    copy = device_times(lambda: y.copy_(x))
    table.add("copy", case, size, copy)
    ok = equals_reference(x, fake_quantize(x, g), g)
    if x.is_contiguous():
        kernel = device_times(
            lambda: launch(x, y, bad, g, False, BLOCK_SIZE, LOWEST_SCALE, HIGHEST_SCALE)
        )
        table.add("fake_quantize_kernel", case, size, kernel, ok=ok, of_copy=copy[0] / kernel[0])
    call = device_times(lambda: fake_quantize(x, g))
    table.add("fake_quantize", case, size, call, ok=ok, of_copy=copy[0] / call[0])
    if x.is_contiguous() and x.ndim == 2:
        for name, peer in others.items():
            times = device_times(lambda peer=peer: peer(x, g))  # type: ignore[misc]
            table.add(name, case, size, times, of_copy=copy[0] / times[0])


def time_update(table: Table, kind: str, size: int) -> None:
    """``ActivationStatistics.update`` beside a copy of the same tensor."""
    from nvfp4_utils.histogram import count_on_device
    from nvfp4_utils.kernels.joint_table import count_pairs_triton

    x = make(kind, size // 2, "cuda", fresh_seed())
    y = torch.empty_like(x)
    copy = device_times(lambda: y.copy_(x))
    keys, counts = joint_histogram(x)
    digest = histogram_hash(keys, counts)
    ok = int(counts.sum()) == x.numel() and histogram_hash(*joint_histogram(x)) == digest
    if size <= GIB:  # another kernel, with atomics in global memory, counts the same
        blocks = x.view(torch.int16).view(-1, BLOCK_SIZE)
        ok = ok and histogram_hash(*count_on_device(blocks, x.dtype, count_pairs_triton)) == digest
    times = device_times(lambda: ActivationStatistics.from_tensor(x), 200)
    table.add("update", kind, size, times, copies=times[0] / copy[0], copy_ms=copy[0],
              pairs=len(keys), hash=digest, ok=ok)  # fmt: skip
    if size == GIB:
        statistic = ActivationStatistics(x.dtype, keys, counts)
        again = device_times(lambda: (statistic + ActivationStatistics()).update(x), 200)
        table.add("update_existing", kind, size, again, copies=again[0] / copy[0])
        time_versions(table, kind, x)


def time_versions(table: Table, kind: str, x: torch.Tensor) -> None:
    """The stages of the histogram, and the plainer kernels they replaced."""
    from nvfp4_utils.kernels import cuda
    from nvfp4_utils.kernels.joint_table import (
        STATUS,
        JointTable,
        block_codes,
        count_pairs_triton,
        new_reports,
    )

    blocks = x.view(torch.int16).view(-1, BLOCK_SIZE)
    (report,) = new_reports(1, x.device)
    codes = block_codes(blocks, report)
    counts = JointTable(report, cuda.MAX_ROWS).counts

    def count(kernel: Callable) -> None:
        report[STATUS:].zero_()
        kernel(blocks, codes, report, counts, report[STATUS:])

    stages: dict[str, Callable] = {
        "block_codes": lambda: block_codes(blocks, report),
        "count_pairs": lambda: count(cuda.count_pairs),
        "global_atomics": lambda: count(count_pairs_triton),
    }
    if kind == "gaussian":
        stages["bincount"] = lambda: torch.bincount(blocks.view(-1) & 0x7FFF, minlength=2**15)
    for name, stage in stages.items():
        table.add(name, kind, 2 * x.numel(), device_times(stage, 50))


def time_candidates(table: Table, others: dict[str, Callable]) -> None:
    """The oracle one candidate at a time: the fastest fake quantizer plus MSE, 122 times."""
    x = make("gaussian", GIB // 2, "cuda", fresh_seed())
    amax = x.abs().max().item()
    scales = input_scale_from_amax(amax * np.logspace(-2, 2, CANDIDATES)).cuda()
    found = others or {"this package": fake_quantize}
    for name, peer in found.items():

        def search(peer=peer) -> torch.Tensor:
            return torch.stack([(peer(x, g).float() - x).square_().mean() for g in scales])

        table.add("candidates", name, GIB, host_times(search, 3), candidates=CANDIDATES)


def run_kernels(commit: str | None) -> None:
    """What the CUDA device does."""
    table = Table()
    others = peers()
    for size in (1, 4, 16, 64, 256, 1024, 4096, 8192):
        x = make("gaussian", size * MIB // 2, "cuda", fresh_seed())
        time_fake_quantize(table, f"{size} MiB", x, others)
        del x
    for case, x in awkward().items():
        time_fake_quantize(table, case, x, others)
    for kind, size in [(k, GIB) for k in KINDS] + [(KINDS[0], m * MIB) for m in (1, 16, 64, 8192)]:
        time_update(table, kind, size)
    time_questions(table, "cuda")
    time_candidates(table, others)
    modelopt = importlib.metadata.version("nvidia-modelopt") if "modelopt" in others else "absent"
    memory = torch.cuda.get_device_properties(0).total_memory
    table.write("kernels", commit, memory=memory, modelopt=modelopt)
