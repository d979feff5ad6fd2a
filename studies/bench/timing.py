# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What every benchmark shares: data, clocks, a table of rows, and where they are stored."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from studies import ROOT
from studies.runs.store import provenance, write_json, write_table

FOLDER = ROOT / "results" / "performance"
MIB, GIB = 2**20, 2**30
KINDS = ("gaussian", "lognormal", "equal", "swiglu")
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
