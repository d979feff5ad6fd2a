# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Time the package and store what the performance page shows.

    python -m nvfp4_utils.benchmark [--parts cpu kernels model] [--corpora FOLDER]

``cpu`` runs anywhere; ``kernels`` needs a CUDA device with 40 GB; ``model`` 70 GB and a folder of
text (``*.jsonl.gz``). Each part is a table and a provenance file in ``results/performance``.
Device times are medians and 20th and 80th percentiles of ``triton.testing.do_bench``: events around
the call, caches cleared before it. Every kernel is first checked on data never seen before.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import policies
from .histogram import joint_histogram
from .quantize import BLOCK_SIZE, fake_quantize, fake_quantize_reference, input_scale_from_amax
from .results import ROOT, provenance, write_json, write_table
from .statistics import ActivationStatistics

FOLDER = ROOT / "results" / "performance"
MIB, GIB = 2**20, 2**30
KINDS = ("gaussian", "lognormal", "equal", "swiglu")
CANDIDATES = 122  # of the oracle that is searched one candidate at a time: 81 + 41
SCALES = 1000
HASH = 0x9E3779B97F4A7C15 - 2**64  # odd; products of it spread over 64 bits


def make(kind: str, elements: int, device: str, seed: int) -> torch.Tensor:
    """bfloat16 [elements / 4096, 4096]: N(0, 1), exp(3 N) with a sign, 1.25, or silu(N) N."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.empty(elements, dtype=torch.bfloat16, device=device)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator, device=device)

    for part in x.split(2**26):
        if kind == "gaussian":
            part.copy_(normal(len(part)))
        elif kind == "lognormal":
            part.copy_(normal(len(part)).sign() * torch.exp(3 * normal(len(part))))
        elif kind == "swiglu":
            part.copy_(torch.nn.functional.silu(normal(len(part))) * normal(len(part)))
        else:
            part.fill_(1.25)
    return x.view(-1, 4096)


def fresh_seed() -> int:
    """A seed no run has used: a race or a hard-coded answer shows."""
    return time.time_ns() % 2**31


def histogram_hash(keys: torch.Tensor, counts: torch.Tensor) -> str:
    """64 bits that any changed, missing or moved count changes."""
    total = int((keys * HASH ^ counts * (HASH >> 1 | 1)).mul(HASH).sum())
    return f"{total % 2**64:016x}"


def host_times(call: Callable, repeats: int = 7) -> list[float]:
    """Median, 20th and 80th percentile of wall time, ms."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return [float(np.quantile(times, q)) for q in (0.5, 0.2, 0.8)]


def device_times(call: Callable, rep: int = 100) -> list[float]:
    """Median, 20th and 80th percentile of device time, ms."""
    import triton

    return triton.testing.do_bench(call, rep=rep, quantiles=[0.5, 0.2, 0.8])


def write_provenance(part: str, commit: str | None, **parameters) -> None:
    """Where the part's results come from, beside them in ``FOLDER``, which is made."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    info = provenance(commit, **parameters)
    write_json(info, FOLDER / f"{part}.json")


class Table:
    """Rows of one part: what was timed, on what, how long, and whether the result was right."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, name: str, case: str, size: int, times: list[float], **more) -> None:
        """``times``: median, 20th and 80th percentile, ms; ``size``: bytes of the input."""
        median, low, high = times
        row = {"name": name, "case": case, "bytes": size, "ms": median, "ms_p20": low, "ms_p80": high}
        self.rows.append(row | more)
        detail = " ".join(f"{k}={v}" for k, v in more.items())
        print(f"{name:24} {case:22} {size / MIB:9.2f} MiB {median:10.4f} ms {detail}", flush=True)

    def write(self, part: str, commit: str | None, **parameters) -> None:
        write_provenance(part, commit, **parameters)
        write_table(pd.DataFrame(self.rows), FOLDER / f"{part}.parquet")


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
    from .triton_kernels import launch

    g = input_scale_from_amax(torch.tensor(5.0)).cuda()
    size = 2 * x.numel()
    y, bad = torch.empty_like(x), torch.zeros(1, dtype=torch.int32).pin_memory()
    copy = device_times(lambda: y.copy_(x))
    table.add("copy", case, size, copy)
    ok = equals_reference(x, fake_quantize(x, g), g)
    if x.is_contiguous():
        kernel = device_times(lambda: launch(x, y, bad, g, "flush"))
        table.add("fake_quantize_kernel", case, size, kernel, ok=ok, of_copy=copy[0] / kernel[0])
    call = device_times(lambda: fake_quantize(x, g))
    table.add("fake_quantize", case, size, call, ok=ok, of_copy=copy[0] / call[0])
    if x.is_contiguous() and x.ndim == 2:
        for name, peer in others.items():
            times = device_times(lambda peer=peer: peer(x, g))  # type: ignore[misc]
            table.add(name, case, size, times, of_copy=copy[0] / times[0])


def time_update(table: Table, kind: str, size: int) -> None:
    """``ActivationStatistics.update`` beside a copy of the same tensor."""
    from .device_histogram import count_on_device, count_pairs_triton

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
    from . import cuda_kernels
    from .device_histogram import STATUS, JointTable, block_codes, count_pairs_triton, new_reports

    blocks = x.view(torch.int16).view(-1, BLOCK_SIZE)
    (report,) = new_reports(1, x.device)
    codes = block_codes(blocks, report)
    counts = JointTable(report, cuda_kernels.MAX_ROWS).counts

    def count(kernel: Callable) -> None:
        report[STATUS:].zero_()
        kernel(blocks, codes, report, counts, report[STATUS:])

    stages: dict[str, Callable] = {
        "block_codes": lambda: block_codes(blocks, report),
        "count_pairs": lambda: count(cuda_kernels.count_pairs),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=None, choices=("cpu", "kernels", "model"))
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    cuda = torch.cuda.is_available()
    parts = a.parts or ["cpu"] + ["kernels"] * cuda + ["model"] * (cuda and a.corpora is not None)
    for part in ("kernels", "model"):
        if part not in parts:
            print(f"skipped: {part} (no CUDA device, no --corpora, or not asked for)")
    if "kernels" in parts:
        run_kernels(a.commit)
    if "model" in parts:
        from .benchmark_model import run_model

        run_model(a.commit, a.corpora)
    if "cpu" in parts:
        run_cpu(a.commit)


if __name__ == "__main__":
    main()
